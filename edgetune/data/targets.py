"""Labels as what is learned: class indices, rows of 0 and 1, or numbers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.data.dataset import Dataset
from edgetune.data.split import Split
from edgetune.errors import DataError
from edgetune.runtime.records import nearest


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How numbers are learned: value = mean + std * what the network gives."""

    mean: float
    std: float


def encode_targets(split: Split, labels: Sequence[str]) -> npt.NDArray[Any]:
    """Return a split's labels as numbers.

    Args:
        split: what to encode.
        labels: the model's, in the order of its outputs.

    Returns:
        classes: int64 (samples,), indices of labels; multilabel: float32 (samples, labels) of 0
        and 1; values: float64 (samples,), as they stand in the data.

    Raises:
        DataError: there are no samples, or a label is missing or none of `labels`.
    """
    if not split.labels:
        raise DataError(f"{split.name}: holds no samples")
    if split.target == "values":
        for value, where in zip(split.labels, split.where, strict=True):
            if not value:
                raise DataError(f"{where}: expected a number as the label, got none")
        return np.array([float(value) for value in split.labels], np.float64)
    index = {label: i for i, label in enumerate(labels)}
    given = split.names if split.target == "multilabel" else [(x,) for x in split.labels]
    for names, where in zip(given, split.where, strict=True):
        for name in names:
            if name not in index:
                raise DataError(
                    f"{where}: label {name!r} is none of the model's{nearest(name, index)}"
                )
    if split.target == "classes":
        return np.array([index[label] for label in split.labels], np.int64)
    rows = np.zeros((len(split.labels), len(labels)), np.float32)
    for row, names in zip(rows, given, strict=True):
        row[[index[name] for name in names]] = 1.0
    return rows


def scale_of(split: Split) -> Scale | None:
    """Return mean and standard deviation (population) of a split's values; None of no values.

    Raises:
        DataError: a label is missing, or all are the same.
    """
    if split.target != "values":
        return None
    values = encode_targets(split, ())
    mean, std = float(values.mean()), float(values.std())
    # of equal values the mean may be off in its last bit, and so the deviation from it not 0
    if not std > 1e-12 * max(1.0, abs(mean)):
        raise DataError(f"{split.name}: all values are {values[0]:g}, so nothing can be learned")
    return Scale(mean=mean, std=std)


def class_counts(dataset: Dataset) -> list[int]:
    """Return how many training samples each label has, in the order of the labels."""
    counts = Counter(name for names in dataset.splits["train"].names for name in names)
    return [counts[label] for label in dataset.labels]
