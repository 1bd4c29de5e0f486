from collections import Counter
from pathlib import Path

import pytest

from edgetune.data import Dataset, DataSource, load_dataset
from edgetune.errors import ConfigError, DataError


def table(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def load(path: Path, **options) -> Dataset:
    return load_dataset(DataSource(kind="text", data=str(path), **options))


def numbered(label: str, count: int) -> list[tuple[str, str]]:
    return [(f"{label} text {i}", label) for i in range(count)]


def test_each_class_gives_its_share_rounded_half_up(tmp_path):
    # 0.15 of 100 is 15; of 10 is 1.5, so 2; of 3 is 0.45, so 0, but at least 1; of 1 none
    rows = numbered("a", 100) + numbered("b", 10) + numbered("c", 3) + numbered("d", 1)
    data = load(table(tmp_path / "t.csv", rows))
    assert data.held_out
    assert Counter(data.splits["val"].labels) == {"a": 15, "b": 2, "c": 1}
    assert Counter(data.splits["train"].labels) == {"a": 85, "b": 8, "c": 2, "d": 1}
    assert data.labels == ("a", "b", "c", "d")


def test_a_class_keeps_at_least_one_sample(tmp_path):
    data = load(table(tmp_path / "t.csv", numbered("a", 2) + numbered("b", 5)), val_fraction=0.9)
    # 0.9 of 5 is 4.5, so 5, but at most 4
    assert Counter(data.splits["train"].labels) == {"a": 1, "b": 1}


def test_the_parts_are_the_whole_in_its_order(tmp_path):
    rows = numbered("a", 20) + numbered("b", 20)
    splits = load(table(tmp_path / "t.csv", rows)).splits
    lines = [[int(w.split(":")[1]) for w in splits[name].where] for name in ("train", "val")]
    assert lines[0] == sorted(lines[0])
    assert lines[1] == sorted(lines[1])
    assert sorted(lines[0] + lines[1]) == list(range(2, 42))
    assert splits["val"].name == "val"


def test_the_same_seed_gives_the_same_parts_and_another_gives_others(tmp_path):
    path = table(tmp_path / "t.csv", numbered("a", 50) + numbered("b", 50))
    assert load(path, seed=3) == load(path, seed=3)
    assert load(path, seed=3).splits["val"].where != load(path, seed=4).splits["val"].where


def test_same_texts_stay_on_one_side(tmp_path):
    # 30 texts, each three times, in other case and spacing
    rows = [(t, "ab"[i % 2]) for i in range(30) for t in (f"text {i}", f" Text  {i}", f"TEXT {i} ")]
    for seed in range(5):
        splits = load(table(tmp_path / "t.csv", rows), seed=seed).splits
        sides = [{" ".join(t.lower().split()) for t in splits[n].inputs} for n in ("train", "val")]
        assert not sides[0] & sides[1]
        assert Counter(splits["val"].labels) == {"a": 6, "b": 6}  # 0.15 of 45 is 6.75; 2 x 3 fit


def test_groups_larger_than_the_share_give_the_smallest(tmp_path):
    rows = [("x", "a")] * 5 + [("y", "a")] * 2
    splits = load(table(tmp_path / "t.csv", rows)).splits  # 0.15 of 7 is 1.05, so 1
    assert splits["val"].inputs == ("y", "y")


def test_a_class_of_copies_of_one_text_stays_in_training(tmp_path):
    rows = [("x", "a")] * 5 + numbered("b", 4)
    assert Counter(load(table(tmp_path / "t.csv", rows)).splits["val"].labels) == {"b": 1}


def test_doubtful_samples_stay_in_training(tmp_path):
    rows = [("same", "a"), ("same", "b"), ("", "a"), ("no label", ""), *numbered("b", 4)]
    rows += numbered("a", 4)
    for seed in range(5):
        val = load(table(tmp_path / "t.csv", rows), seed=seed).splits["val"]
        assert not {"same", "", "no label"} & set(val.inputs)
        assert set(val.labels) == {"a", "b"}


def test_image_files_of_the_same_bytes_stay_on_one_side(tmp_path):
    for label in "ab":
        folder = tmp_path / label
        folder.mkdir()
        for i in range(10):
            for copy in range(2):
                (folder / f"{i}-{copy}.png").write_bytes(f"{label}{i}".encode())
    for seed in range(5):
        source = DataSource(kind="image", data=str(tmp_path), val_fraction=0.3, seed=seed)
        val = load_dataset(source).splits["val"]
        pairs = zip(val.inputs, val.labels, strict=True)
        names = Counter((label, Path(path).name[0]) for path, label in pairs)
        assert set(names.values()) == {2}
        assert len(names) == 6  # 0.3 of 20 is 6 files, 3 pairs, of each class


def test_absent_image_files_can_be_held_out(tmp_path):
    rows = "".join(f"{label}{i}.png,{label}\n" for label in "ab" for i in range(4))
    (tmp_path / "t.csv").write_text("image,label\n" + rows)
    data = load_dataset(DataSource(kind="image", data=str(tmp_path / "t.csv")))
    assert Counter(data.splits["val"].labels) == {"a": 1, "b": 1}


def test_what_cannot_be_held_out_is_refused(tmp_path):
    path = table(tmp_path / "t.csv", [("x", "a"), ("y", "b")])
    with pytest.raises(DataError, match="name validation data with --val"):
        load(path)
    with pytest.raises(ConfigError, match="val_fraction"):
        load(path, val_fraction=1.0)


def test_validation_data_that_is_named_is_not_held_out(tmp_path):
    train = table(tmp_path / "t.csv", [("x", "a"), ("y", "b")])
    val = table(tmp_path / "v.csv", [("z", "a")])
    data = load(train, val=str(val), test=str(val))
    assert not data.held_out
    assert len(data.splits["train"].inputs) == 2
    assert data.splits["test"].name == "test"
