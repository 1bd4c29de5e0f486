"""One split of a data set: labelled inputs in their order, and where each came from."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["text", "image"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Labelled samples. `inputs`, `labels` and `where` run in parallel, one entry a sample.

    Attributes:
        name: "train", "val" or "test".
        inputs: the text itself, or the absolute path of an image; "" where there is none.
        labels: the class name; "" where there is none.
        where: for messages: "train.csv:12" (the line as an editor shows it; for Parquet the
            row, from 1) or the path of the image.
        ignored: paths that lay in the folder and are no samples; a folder ends in "/".
        empty_classes: class folders that hold no image.
    """

    name: str
    inputs: tuple[str, ...]
    labels: tuple[str, ...]
    where: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    empty_classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse columns of unequal length.

        Raises:
            ValueError: `inputs`, `labels` and `where` have different lengths.
        """
        lengths = (len(self.inputs), len(self.labels), len(self.where))
        if len(set(lengths)) != 1:
            raise ValueError(f"inputs, labels and where differ in length: {lengths}")

    def take(self, indices: Iterable[int]) -> "Split":
        """Return the split with only the samples at `indices`, in that order."""
        chosen = tuple(indices)
        return replace(
            self,
            inputs=tuple(self.inputs[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            where=tuple(self.where[i] for i in chosen),
        )
