"""A data set in its splits, and how it is found and read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from edgetune.data.folders import (
    entries_beside,
    find_split_folders,
    find_split_tables,
    read_class_folders,
)
from edgetune.data.holdout import hold_out
from edgetune.data.split import LABEL_SEPARATOR, Kind, Split, Target, labels_of
from edgetune.data.tables import read_table
from edgetune.errors import ConfigError, DataError
from edgetune.runtime.records import nearest


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Labelled data in splits.

    Attributes:
        kind: of the inputs.
        labels: class names of the training split, sorted; a blank label is none of them. Of values
            the one output's name.
        splits: "train" and "val" always, "test" where there is one.
        held_out: whether "val" was held out of the training data.
    """

    kind: Kind
    labels: tuple[str, ...]
    splits: dict[str, Split]
    held_out: bool

    @property
    def target(self) -> Target:
        """What the labels are."""
        return self.splits["train"].target


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """What to read. The names and meanings are those of the training config.

    Attributes:
        kind: "text" or "image".
        data: a table (CSV, TSV, JSONL, Parquet), a folder of class folders of images, or a
            folder with train, val and test in it as tables or folders.
        val: validation data; "" for what `data` holds, else `val_fraction` of the training data.
        test: test data; "" for what `data` holds.
        input_column: column of the text or the image path; "" for "text" or "image".
        label_column: column of the label.
        val_fraction: share of the training data to hold out, 0 < val_fraction < 1.
        seed: of the choice of what is held out.
        columns: further columns of the tables to read, for `Split.columns`.
        target: what the labels are; several at once, and numbers, take a table.
        label_separator: of multilabel, what stands between two labels.
    """

    kind: Kind
    data: str
    val: str = ""
    test: str = ""
    input_column: str = ""
    label_column: str = "label"
    val_fraction: float = 0.15
    seed: int = 0
    columns: tuple[str, ...] = ()
    target: Target = "classes"
    label_separator: str = LABEL_SEPARATOR


def load_dataset(source: DataSource) -> Dataset:
    """Read the data that `source` names, images by path only; equal inputs give equal splits.

    Raises:
        ConfigError: `source` has an unknown kind, no data, or a bad share to hold out.
        DataError: a path is absent, holds no data or data of another kind, or is malformed.
        MissingExtraError: a file is Parquet and pyarrow is not installed.
    """
    if source.kind not in get_args(Kind):
        raise ConfigError(f"kind: got {source.kind!r}{nearest(source.kind, get_args(Kind))}")
    if not source.data:
        raise ConfigError("data: not given; name a folder or a table")
    root = Path(source.data)
    paths = _locate(root, source.kind, source.target)
    paths |= {name: Path(p) for name, p in (("val", source.val), ("test", source.test)) if p}
    splits = {
        name: read_split(
            path,
            kind=source.kind,
            input_column=source.input_column,
            label_column=source.label_column,
            name=name,
            columns=source.columns,
            target=source.target,
            separator=source.label_separator,
        )
        for name, path in paths.items()
    }
    train = splits["train"]
    if source.kind == "image" and paths["train"] != root and paths["train"].is_dir():
        strays = entries_beside(root, paths.values())
        splits["train"] = replace(train, ignored=train.ignored + strays)
    held_out = "val" not in splits
    if held_out:
        splits["train"], splits["val"] = hold_out(
            splits["train"], kind=source.kind, fraction=source.val_fraction, seed=source.seed
        )
    return Dataset(
        kind=source.kind,
        labels=labels_of(splits["train"]),
        splits={name: splits[name] for name in ("train", "val", "test") if name in splits},
        held_out=held_out,
    )


def read_split(
    path: Path, *, kind: Kind, input_column: str, label_column: str, name: str,
    columns: Sequence[str] = (), target: Target = "classes", separator: str = LABEL_SEPARATOR,
) -> Split:  # fmt: skip
    """Read one table, or one folder of class folders of images, as the split `name`.

    Raises:
        ConfigError: both columns have the same name, or a folder was asked for `columns`.
        DataError: `path` is absent, holds no data or several splits, is malformed, or is a folder
            of class folders where labels are not one class each.
        MissingExtraError: the file is Parquet and pyarrow is not installed.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not path.is_dir():
        return read_table(
            path, kind=kind, input_column=input_column, label_column=label_column, name=name,
            columns=columns, target=target, separator=separator,
        )  # fmt: skip
    inside = find_split_tables(path)
    if kind == "image" and "train" not in inside:
        inside = find_split_folders(path)
    if inside:
        names = " or ".join(str(p) for p in inside.values())
        raise DataError(f"{path}: holds whole splits; name one of them: {names}")
    if kind == "text" or target != "classes":
        raise DataError(f"{path}: is a folder; expected a CSV, TSV, JSONL or Parquet file")
    if columns:
        raise ConfigError(
            f"{path}: is a folder, which has no column {columns[0]!r}; name a table of images"
        )
    return read_class_folders(path, name=name)


def _locate(root: Path, kind: Kind, target: Target) -> dict[str, Path]:
    """Return the path of each split that `root` holds; {"train": root} for a single one."""
    if not root.is_dir():
        return {"train": root}
    tables = find_split_tables(root)
    if kind == "text" or target != "classes":
        if "train" not in tables:
            raise DataError(
                f"{root}: no train.csv, .tsv, .jsonl or .parquet in this folder;"
                " put one there, or name a file"
            )
        return tables
    if "train" not in tables:
        return find_split_folders(root) or {"train": root}
    folder = root / "train"
    if folder.is_dir() and any(e.is_dir() for e in folder.iterdir()):
        raise DataError(
            f"{root}: holds both {tables['train'].name} and train/; name the one that is meant:"
            f" {tables['train']} or {folder}"
        )
    return tables
