"""Folders of class folders of images, and folders that hold one folder or table a split."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from edgetune.data.split import Split
from edgetune.data.tables import table_suffix
from edgetune.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
)

# what a folder or a table of each split may be called, in any case
SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}
# never classes, where nothing else stands beside them
_SPLIT_LIKE = frozenset(
    {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}
)


def read_class_folders(root: Path, *, name: str) -> Split:
    """Read `root`/<class>/**/*.jpg as the split `name`, sorted by path.

    Raises:
        DataError: there is no image in any class folder, or a folder cannot be read.
    """
    paths: list[str] = []
    labels: list[str] = []
    ignored: list[str] = []
    empty: list[str] = []
    for entry in _entries(root):
        if not entry.is_dir() or entry.name.startswith("."):
            ignored.append(_shown(entry))
            continue
        found = list(_images(entry, ignored, frozenset()))
        if not found:
            empty.append(entry.path + "/")
        paths += found
        labels += [entry.name] * len(found)
    if not paths:
        raise _no_images(root, ignored, empty)
    return Split(
        name=name,
        inputs=tuple(os.path.abspath(p) for p in paths),  # noqa: PTH100  keep links as they are
        labels=tuple(labels),
        where=tuple(paths),
        ignored=tuple(ignored),
        empty_classes=tuple(empty),
    )


def find_split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split in `root`; {} where `root` holds class folders.

    A class may be called "train" or "test": its folder is taken for a split only where it
    holds class folders itself, or where nothing but splits stands beside it.

    Raises:
        DataError: it cannot be told, or a split is there twice.
    """
    folders = [Path(e.path) for e in _entries(root) if e.is_dir() and e.name[0] != "."]
    found = _by_split(root, {f: f.name for f in folders})
    only_splits = bool(folders) and all(f.name.casefold() in _SPLIT_LIKE for f in folders)
    if "train" not in found:
        if only_splits and any(_has_folders(f) for f in folders):
            raise DataError(
                f"{root}: {_listed(folders)} look like splits, not classes; expected train/"
                " (and optionally val/, test/) or class folders"
            )
        return {}
    if only_splits:
        return found
    if not _has_folders(found["train"]):
        return {}
    others = [f for f in folders if f not in found.values() and _has_images(f)]
    if others and len(found) == 1:
        raise DataError(
            f"{root}: cannot tell whether train/ is a split or a class, as {_listed(others)}"
            f" hold images too; name one of them instead, such as {found['train']}"
        )
    return found


def find_split_tables(root: Path) -> dict[str, Path]:
    """Return the table of each split in `root`: train.csv, valid.jsonl.gz, test.parquet, ...

    Raises:
        DataError: a split is there twice.
    """
    stems = {}
    for entry in _entries(root):
        path = Path(entry.path)
        if table_suffix(path) and not entry.is_dir():
            stem = path.name.removesuffix(path.suffix)
            stems[path] = Path(stem).stem if path.suffix.lower() == ".gz" else stem
    return _by_split(root, stems)


def entries_beside(root: Path, used: Iterable[Path]) -> tuple[str, ...]:
    """Return what lies in `root` and is none of `used`, as `Split.ignored` has it."""
    names = {p.name for p in used}
    return tuple(_shown(e) for e in _entries(root) if e.name not in names)


def _by_split(root: Path, names: Mapping[Path, str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for split, known in SPLIT_NAMES.items():
        paths = [p for p, name in names.items() if name.casefold() in known]
        if len(paths) > 1:
            raise DataError(
                f"{root}: has {' and '.join(p.name for p in paths)}, both for {split}; keep one,"
                " or name the training, validation and test data one by one"
            )
        if paths:
            found[split] = paths[0]
    return found


def _entries(folder: str | Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error


def _images(
    folder: "os.DirEntry[str]", ignored: list[str], above: frozenset[tuple[int, int]]
) -> Iterator[str]:
    """Yield the paths of the images under `folder`; add all else to `ignored`."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that holds it
        ignored.append(_shown(folder))
        return
    for entry in _entries(folder.path):
        if entry.name.startswith("."):
            ignored.append(_shown(entry))
        elif entry.is_dir():
            yield from _images(entry, ignored, above | {here})
        elif _is_image(entry.name):
            yield entry.path
        else:
            ignored.append(_shown(entry))


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _has_folders(folder: Path) -> bool:
    return any(e.is_dir() and not e.name.startswith(".") for e in _entries(folder))


def _has_images(folder: Path) -> bool:
    return any(
        _is_image(name) and not name.startswith(".")
        for _, _, names in os.walk(folder)
        for name in names
    )


def _shown(entry: "os.DirEntry[str]") -> str:
    return entry.path + "/" if entry.is_dir() else entry.path


def _listed(folders: list[Path]) -> str:
    names = [f"{f.name}/" for f in folders[:5]]
    return ", ".join(names) + (", ..." if len(folders) > len(names) else "")


def _no_images(root: Path, ignored: list[str], empty: list[str]) -> DataError:
    expected = f"expected {root}/<class>/*.jpg ({', '.join(sorted(IMAGE_SUFFIXES))})"
    if any(_is_image(p) and not Path(p).name.startswith(".") for p in ignored):
        return DataError(f"{root}: the images lie in no class folders; {expected}")
    there = (
        f"{len(empty)} folders and {len(ignored)} other files" if empty or ignored else "nothing"
    )
    return DataError(f"{root}: no images found in class folders, but {there}; {expected}")
