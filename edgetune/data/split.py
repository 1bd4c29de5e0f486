"""One split of a data set: labelled inputs in their order, and where each came from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

Kind = Literal["text", "image"]
# what a label is: one class of several, any number of them at once, or a number
Target = Literal["classes", "multilabel", "values"]

LABEL_SEPARATOR = "|"
# the one output of a regression
VALUE_NAME = "value"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Labelled samples. `inputs`, `labels` and `where` run in parallel, one entry a sample.

    Attributes:
        name: "train", "val" or "test".
        inputs: the text itself, or the absolute path of an image; "" where there is none.
        labels: classes: the class name; multilabel: names joined by `separator`, "" for no label;
            values: the number as it was written. "" where there is none.
        where: for messages: "train.csv:12" (the line as an editor shows it; for Parquet the
            row, from 1) or the path of the image.
        ignored: paths that lay in the folder and are no samples; a folder ends in "/".
        empty_classes: class folders that hold no image.
        columns: further columns that were asked for: name -> a value each sample, "" for none.
        target: what the labels are.
        separator: of multilabel, what stands between two names.
    """

    name: str
    inputs: tuple[str, ...]
    labels: tuple[str, ...]
    where: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    empty_classes: tuple[str, ...] = ()
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    target: Target = "classes"
    separator: str = LABEL_SEPARATOR

    def __post_init__(self) -> None:
        """Refuse columns of unequal length.

        Raises:
            ValueError: `inputs`, `labels`, `where` and `columns` have different lengths.
        """
        parallel = (self.inputs, self.labels, self.where, *self.columns.values())
        lengths = tuple(len(values) for values in parallel)
        if len(set(lengths)) != 1:
            raise ValueError(f"inputs, labels, where and columns differ in length: {lengths}")

    @cached_property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The class names of each sample: one, none where it has no label; of values never any."""
        if self.target == "values":
            return ((),) * len(self.labels)
        if self.target == "multilabel":
            return tuple(tuple(x.split(self.separator)) if x else () for x in self.labels)
        return tuple((x,) if x.strip() else () for x in self.labels)

    def take(self, indices: Iterable[int]) -> "Split":
        """Return the split with only the samples at `indices`, in that order."""
        chosen = tuple(indices)
        return replace(
            self,
            inputs=tuple(self.inputs[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            where=tuple(self.where[i] for i in chosen),
            columns={name: tuple(v[i] for i in chosen) for name, v in self.columns.items()},
        )


def labels_of(split: Split) -> tuple[str, ...]:
    """Return the names that a training split teaches, sorted; of values the one output's."""
    if split.target == "values":
        return (VALUE_NAME,)
    return tuple(sorted({name for names in split.names for name in names}))
