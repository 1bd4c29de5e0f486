from pathlib import Path

import pytest

from edgetune.data import DataSource, load_dataset, read_split
from edgetune.errors import ConfigError, DataError


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())  # loading never decodes


def images(root: Path, name="train"):
    return read_split(root, kind="image", input_column="", label_column="label", name=name)


def load(root: Path, **options):
    return load_dataset(DataSource(kind=options.pop("kind", "image"), data=str(root), **options))


def test_class_folders_are_read_sorted_and_recursively(tmp_path):
    touch(tmp_path, "dog/z.PNG", "dog/deep/er/a.jpeg", "cat/1.tiff", "cat/2.webp")
    split = images(tmp_path)
    assert split.labels == ("cat", "cat", "dog", "dog")
    assert split.where == tuple(
        str(tmp_path / n) for n in ("cat/1.tiff", "cat/2.webp", "dog/deep/er/a.jpeg", "dog/z.PNG")
    )
    assert split.inputs == split.where
    assert split.ignored == ()


def test_inputs_are_absolute_and_where_is_as_given(tmp_path, monkeypatch):
    touch(tmp_path, "pets/cat/1.png")
    monkeypatch.chdir(tmp_path)
    split = images(Path("pets"))
    assert split.inputs == (str(tmp_path / "pets/cat/1.png"),)
    assert split.where == ("pets/cat/1.png",)


def test_what_is_no_image_is_listed_as_ignored(tmp_path):
    touch(tmp_path, "cat/1.png", "cat/._1.png", "cat/notes.txt", "README.md", "cat/.git/x.png")
    touch(tmp_path, "loose.jpg", ".ipynb_checkpoints/1.png", "bird/2.heic")
    split = images(tmp_path)
    assert split.labels == ("cat",)
    names = (".ipynb_checkpoints/", "README.md", "bird/2.heic", "cat/._1.png", "cat/.git/")
    expected = [f"{tmp_path}/{n}" for n in (*names, "cat/notes.txt", "loose.jpg")]
    assert sorted(split.ignored) == expected
    assert split.empty_classes == (f"{tmp_path}/bird/",)


def test_a_folder_that_links_to_itself_ends(tmp_path):
    touch(tmp_path, "cat/1.png")
    (tmp_path / "cat/again").symlink_to(tmp_path / "cat")
    split = images(tmp_path)
    assert split.labels == ("cat",)
    assert split.ignored == (f"{tmp_path}/cat/again/",)


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_split_folders_are_found(tmp_path, val):
    touch(tmp_path, "train/a/1.png", f"{val}/a/2.png", "test/a/3.png", "test/a/4.png", "about.txt")
    data = load(tmp_path)
    assert {n: len(s.inputs) for n, s in data.splits.items()} == {"train": 1, "val": 1, "test": 2}
    assert list(data.splits) == ["train", "val", "test"]
    assert data.splits["val"].name == "val"
    assert data.splits["train"].ignored == (str(tmp_path / "about.txt"),)
    assert not data.held_out


def test_named_validation_data_comes_before_a_val_folder(tmp_path):
    touch(tmp_path, "d/train/a/1.png", "d/val/a/2.png", "other/a/3.png")
    data = load(tmp_path / "d", val=str(tmp_path / "other"))
    assert data.splits["val"].where == (str(tmp_path / "other/a/3.png"),)


def test_a_class_may_be_called_train(tmp_path):
    touch(tmp_path, "train/1.png", "train/2.png", "plane/3.png", "plane/4.png")
    assert load(tmp_path).labels == ("plane", "train")


def test_a_train_folder_that_may_be_either_is_refused(tmp_path):
    touch(tmp_path, "train/old/1.png", "plane/3.png")
    with pytest.raises(DataError, match="a split or a class"):
        load(tmp_path)


def test_folders_of_unused_images_beside_the_splits_are_ignored(tmp_path):
    touch(tmp_path, "train/a/1.png", "test/a/2.png", "more/a/3.png", "train/a/4.png")
    assert load(tmp_path).splits["train"].ignored == (f"{tmp_path}/more/",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no images found in class folders, but nothing"),
        (("1.png", "2.png"), "the images lie in no class folders"),
        (("cat/1.heic",), "no images found in class folders, but 1 folders and 1 other files"),
        (("train/1.png", "test/2.png"), "train: the images lie in no class folders"),
        (("training/a/1.png", "testing/a/1.png"), "look like splits, not classes"),
        (("test/a/1.png",), "look like splits, not classes"),
        (("train/a/1.png", "val/a/2.png", "valid/a/3.png"), "has val and valid, both for val"),
        (("train.csv", "train/a/1.png"), "holds both train.csv and train/"),
        (("train.csv", "train.jsonl"), "has train.csv and train.jsonl, both for train"),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_tables_in_a_folder_are_its_splits(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "valid.jsonl").write_text('{"text": "c", "label": "x"}\n')
    (tmp_path / "Test.tsv").write_text("text\tlabel\nd\ty\n")
    data = load(tmp_path, kind="text")
    assert {n: s.inputs for n, s in data.splits.items()} == {
        "train": ("a", "b"), "val": ("c",), "test": ("d",),
    }  # fmt: skip
    assert data.labels == ("x", "y")


def test_a_folder_of_text_files_is_refused(tmp_path):
    touch(tmp_path, "pos/1.txt")
    with pytest.raises(DataError, match=r"no train\.csv"):
        load(tmp_path, kind="text")
    with pytest.raises(DataError, match="expected a CSV"):
        read_split(tmp_path, kind="text", input_column="", label_column="label", name="test")


def test_one_split_is_not_read_from_a_folder_of_splits(tmp_path):
    touch(tmp_path, "train/a/1.png", "val/a/2.png")
    with pytest.raises(DataError, match=r"holds whole splits; name one of them: .*train or .*val"):
        images(tmp_path)
    assert images(tmp_path / "val", "test").labels == ("a",)


def test_a_source_without_data_or_with_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="data: not given"):
        load_dataset(DataSource(kind="text", data=""))
    with pytest.raises(ConfigError, match="did you mean 'image'"):
        load_dataset(DataSource(kind="images", data="x"))
