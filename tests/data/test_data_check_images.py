import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgetune.data import Dataset, DataSource, Problem, Spread, accept, check_dataset, load_dataset


def picture(seed: int, width: int = 32, height: int = 24, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def folder(root: Path, *, count: int = 4) -> Path:
    """Make train/ and val/ with classes a and b of `count` and 2 different images."""
    for i, (split, label) in enumerate((s, c) for s in ("train", "val") for c in "ab"):
        path = root / split / label
        path.mkdir(parents=True)
        for n in range(count if split == "train" else 2):
            picture(100 * i + n).save(path / f"{n}.png")
    return root


def load(root: Path) -> Dataset:
    return load_dataset(DataSource(kind="image", data=str(root)))


def problems(root: Path) -> dict[str, Problem]:
    return {p.kind: p for p in check_dataset(load(root)).problems}


def test_good_images_have_no_problems(tmp_path):
    report = check_dataset(load(folder(tmp_path)))
    assert report.problems == ()
    assert report.image is not None
    assert report.image.width == Spread(minimum=32, median=32, p95=32, maximum=32)
    assert report.image.height == Spread(minimum=24, median=24, p95=24, maximum=24)
    assert report.image.modes == {"RGB": 12}
    assert report.image.formats == {"PNG": 12}
    assert report.text is None


def corrupt_png() -> bytes:
    data = bytearray(encoded(picture(1, 64, 64), "PNG"))
    data[len(data) // 2] ^= 0xFF
    data[len(data) // 2 + 1] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cut.jpg", encoded(picture(1, 64, 64), "JPEG")[:-500], "truncated"),
        ("cut.png", encoded(picture(1, 64, 64), "PNG")[:-500], ""),
        ("corrupt.png", corrupt_png(), ""),
        ("page.jpg", b"<html>404</html>", "no image format that Pillow knows"),
        ("head.gif", b"GIF89a", ""),
    ],
)
def test_a_broken_image_is_unreadable_and_can_be_left_out(tmp_path, name, content, reason):
    bad = folder(tmp_path) / "train/a" / name
    bad.write_bytes(content)
    data = load(tmp_path)
    report = check_dataset(data)
    (problem,) = report.errors
    assert (problem.kind, problem.count, problem.examples) == ("unreadable", 1, (str(bad),))
    assert str(bad) in problem.message
    assert reason in problem.message
    kept, left_out = accept(data, report, ["unreadable"])
    assert left_out == (str(bad),)
    assert str(bad) not in kept.splits["train"].inputs
    assert len(kept.splits["train"].inputs) == 8


def test_a_file_of_no_bytes_is_empty(tmp_path):
    bad = folder(tmp_path) / "train/a/zero.png"
    bad.touch()
    (problem,) = check_dataset(load(tmp_path)).errors
    assert (problem.kind, problem.examples) == ("empty", (str(bad),))


def test_an_absent_file_of_a_table_is_unreadable(tmp_path):
    picture(1).save(tmp_path / "1.png")
    rows = "1.png,a\n2.png,a\n,b\n"
    (tmp_path / "t.csv").write_text("image,label\n" + rows)
    (tmp_path / "v.csv").write_text("image,label\n1.png,a\n")
    source = DataSource(kind="image", data=str(tmp_path / "t.csv"), val=str(tmp_path / "v.csv"))
    found = {p.kind: p for p in check_dataset(load_dataset(source)).problems}
    assert found["unreadable"].examples == ("t.csv:3",)
    assert f"t.csv:3 ({tmp_path}/2.png): no such file" in found["unreadable"].message
    assert found["empty"].examples == ("t.csv:4",)
    assert found["leak"].severity == "error"


def test_the_same_pixels_in_another_format_are_a_leak(tmp_path):
    folder(tmp_path)
    image = Image.open(tmp_path / "train/a/0.png")
    image.save(tmp_path / "val/a/other.bmp")
    found = problems(tmp_path)["leak"]
    assert (found.severity, found.count) == ("error", 1)  # 1 of 5
    assert found.examples == (f"{tmp_path}/val/a/other.bmp",)


def test_grey_pixels_are_the_same_as_mode_l_and_as_rgb(tmp_path):
    folder(tmp_path)
    grey = picture(7, mode="L")
    grey.save(tmp_path / "train/a/grey.png")
    grey.convert("RGB").save(tmp_path / "train/a/rgb.png")
    assert problems(tmp_path)["duplicates"].examples == (f"{tmp_path}/train/a/rgb.png",)


def test_palette_images_of_equal_indices_and_other_colours_differ(tmp_path):
    folder(tmp_path)
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        image = Image.new("P", (20, 20), 0)
        image.putpalette(colour)
        image.save(tmp_path / f"train/a/{name}.png")
    assert "duplicates" not in problems(tmp_path)


def test_an_image_turned_on_its_side_is_another(tmp_path):
    folder(tmp_path)
    Image.new("RGB", (20, 30)).save(tmp_path / "train/a/tall.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "train/a/wide.png")
    assert "duplicates" not in problems(tmp_path)


def test_one_image_under_two_classes_conflicts(tmp_path):
    folder(tmp_path)
    picture(5).save(tmp_path / "train/a/x.png")
    picture(5).save(tmp_path / "train/b/x.png")
    found = problems(tmp_path)["conflicting-labels"]
    assert found.examples == (f"{tmp_path}/train/a/x.png", f"{tmp_path}/train/b/x.png")


def test_small_images_and_mixed_modes_are_warnings(tmp_path):
    folder(tmp_path)
    picture(5, 15, 40, "RGBA").save(tmp_path / "train/a/x.png")
    found = problems(tmp_path)
    assert found["tiny-images"].examples == (f"{tmp_path}/train/a/x.png",)
    assert found["mixed-modes"].message.endswith("RGB (12), RGBA (1)")
    assert {p.severity for p in found.values()} == {"warning"}


def test_ignored_files_and_empty_classes_are_reported(tmp_path):
    folder(tmp_path)
    (tmp_path / "train/c").mkdir()
    (tmp_path / "train/a/notes.txt").touch()
    (tmp_path / "val/.DS_Store").touch()
    report = check_dataset(load(tmp_path))
    assert report.ignored == (f"{tmp_path}/train/a/notes.txt", f"{tmp_path}/val/.DS_Store")
    (problem,) = report.problems
    assert (problem.kind, problem.severity) == ("empty-class", "warning")
    assert problem.examples == (f"{tmp_path}/train/c/",)


def test_progress_counts_every_file_once(tmp_path):
    folder(tmp_path, count=3)
    calls = []
    check_dataset(load(tmp_path), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 10) for n in range(1, 11)]
