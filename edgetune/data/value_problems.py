"""Finders of what is wrong with values that are to be learned. No I/O."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from edgetune.data.evidence import Evidence, counted, examples, splits_of
from edgetune.data.report import Problem, ValueSpread
from edgetune.data.split import Split

# how many interquartile ranges beyond the quartiles a value is far out: Tukey 1977, section 2D
FAR_OUT = 3.0


def value_spreads(evidence: Evidence) -> dict[str, ValueSpread]:
    """Return the spread of each split's values; splits without one are left out."""
    found = {}
    for split in splits_of(evidence):
        values = _values(split)[0]
        if len(values):
            low, median, p95, high = np.percentile(
                values, [0, 50, 95, 100], method="inverted_cdf"
            ).tolist()
            found[split.name] = ValueSpread(
                minimum=low, median=median, p95=p95, maximum=high,
                mean=float(values.mean()), std=float(values.std()),
            )  # fmt: skip
    return found


def _constant_value(evidence: Evidence) -> Iterator[Problem]:
    values, _ = _values(evidence.dataset.splits["train"])
    if len(set(values.tolist())) < 2:
        there = f"only {values[0]:g}" if len(values) else "none"
        yield Problem(
            kind="constant-value",
            severity="error",
            count=len(values),
            message=f"the training data needs at least 2 different values, and has {there}",
        )


def _far_value(evidence: Evidence) -> Iterator[Problem]:
    known, _ = _values(evidence.dataset.splits["train"])
    if not len(known):
        return
    low, high = np.percentile(known, [25, 75])
    reach = FAR_OUT * (high - low)
    if reach == 0:  # most values are the same: all others would be far
        return
    for split in splits_of(evidence):
        values, rows = _values(split)
        far = np.flatnonzero((values < low - reach) | (values > high + reach))
        if len(far):
            worst = far[np.argmax(np.abs(values[far] - (low + high) / 2))]
            yield Problem(
                kind="far-value",
                severity="warning",
                count=len(far),
                message=f"{split.name}: {counted(len(far), 'value')} far from the others, such as"
                f" {values[worst]:g}; half of the training data lies from {low:g} to {high:g}",
                examples=examples(split, [rows[i] for i in far]),
            )


def _values(split: Split) -> tuple[npt.NDArray[np.float64], list[int]]:
    """Return the values that there are, and which samples have them."""
    rows = [i for i, value in enumerate(split.labels) if value]
    return np.array([float(split.labels[i]) for i in rows], np.float64), rows


VALUE_FINDERS: tuple[Callable[[Evidence], Iterable[Problem]], ...] = (
    _constant_value,
    _far_value,
)
