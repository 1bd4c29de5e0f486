"""The evidence that the finders of problems look at, and the words they share."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from edgetune.data.contents import Contents
from edgetune.data.dataset import Dataset
from edgetune.data.report import Problem
from edgetune.data.split import Split

T = TypeVar("T")

EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the finders look at.

    Attributes:
        dataset: the data.
        contents: what is in its inputs.
        min_per_class: fewest training samples a class may have.
        counts: split -> class -> samples that have a readable input and a label.
    """

    dataset: Dataset
    contents: Contents
    min_per_class: int
    counts: Mapping[str, Counter[str]]


def gather(dataset: Dataset, contents: Contents, min_per_class: int) -> Evidence:
    """Count the usable samples of each class and put the evidence together."""
    counts = {
        name: Counter(
            label
            for labels, key in zip(split.names, contents.keys[name], strict=True)
            if key
            for label in labels
        )
        for name, split in dataset.splits.items()
    }
    return Evidence(dataset=dataset, contents=contents, min_per_class=min_per_class, counts=counts)


def splits_of(evidence: Evidence) -> list[Split]:
    """Return the splits, "train" first."""
    return sorted(evidence.dataset.splits.values(), key=lambda s: s.name != "train")


def label_counts(evidence: Evidence) -> Counter[str]:
    """Return label -> samples over all splits, whatever their inputs are."""
    return Counter(x for s in splits_of(evidence) for names in s.names for x in names)


def sample_error(
    kind: str, message: str, samples: Sequence[tuple[str, int]], evidence: Evidence
) -> Problem:
    """Return an error that concerns single samples."""
    splits = evidence.dataset.splits
    return Problem(
        kind=kind,
        severity="error",
        count=len(samples),
        message=message,
        examples=tuple(splits[name].where[i] for name, i in samples[:EXAMPLES]),
        samples=tuple(samples),
    )


def examples(split: Split, indices: Sequence[int]) -> tuple[str, ...]:
    """Return where the first few samples at `indices` are."""
    return tuple(split.where[i] for i in indices[:EXAMPLES])


def examples_of_labels(evidence: Evidence, labels: set[str]) -> tuple[str, ...]:
    """Return where the first few samples with one of `labels` are."""
    found = (
        where
        for split in splits_of(evidence)
        for names, where in zip(split.names, split.where, strict=True)
        if not labels.isdisjoint(names)
    )
    return tuple(where for where, _ in zip(found, range(EXAMPLES), strict=False))


def listed(items: Sequence[T], show: Callable[[T], str] = str) -> str:
    """Return "a, b, c, d, e and 4 more"."""
    more = f" and {len(items) - EXAMPLES} more" if len(items) > EXAMPLES else ""
    return ", ".join(map(show, items[:EXAMPLES])) + more


def counted(count: int, noun: str) -> str:
    """Return "1 image", "2 images", "2 classes"."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count} {noun if count == 1 else plural}"
