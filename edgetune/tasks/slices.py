"""How well a classifier does on each group of samples, and how far groups lie apart.

Groups are the values of a column: a sensor, a site, a language. What a mean over all samples
hides, a slice shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.errors import ConfigError, DataError
from edgetune.tasks.metrics import (
    Floats,
    IntArray,
    Interval,
    check_same_length,
    class_indices,
    classification_report,
    percentile_interval,
)
from edgetune.tasks.proportions import exact_interval

# groups of fewer samples are listed, and neither best nor worst
MIN_SAMPLES = 30
# what a group without a value is called
BLANK = "(blank)"


@dataclass(frozen=True, kw_only=True)
class Group:
    """The samples of one value.

    accuracy: with its exact interval (Clopper & Pearson 1934). f1_macro: over the classes that
    occur in the group, with its bootstrap interval. small: fewer samples than asked for.
    """

    value: str
    samples: int
    accuracy: Interval
    f1_macro: Interval
    small: bool


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far the group of highest accuracy lies above that of lowest.

    difference: of their accuracies, with its bootstrap interval; samples are drawn again within
    each group. p_value: how often groups of these sizes would lie as far apart by chance, were
    all answered equally well (permutation of right and wrong among samples).
    """

    best: str
    worst: str
    difference: Interval
    p_value: float


@dataclass(frozen=True, kw_only=True)
class SliceReport:
    """One column: its groups, of lowest accuracy first, and their gap; None of fewer than two."""

    column: str
    min_samples: int
    groups: tuple[Group, ...]
    gap: Gap | None


def slice_report(
    column: str,
    values: Sequence[str],
    truth: IntArray,
    predicted: IntArray,
    labels: Sequence[str],
    *,
    min_samples: int = MIN_SAMPLES,
    seed: int = 0,
    resamples: int = 1000,
) -> SliceReport:
    """Measure each group of samples that share a value.

    Args:
        column: what the values are.
        values: one a sample, "" for none.
        truth: class indices, shape (samples,).
        predicted: class indices, shape (samples,).
        labels: the classes' names; index i is labels[i].
        min_samples: groups of fewer are marked `small` and left out of the gap.
        seed: of bootstrap and permutation.
        resamples: of each.

    Raises:
        DataError: there are no samples, lengths disagree, or an index is out of range.
        ConfigError: `min_samples` or `resamples` is below 1.
    """
    if min_samples < 1:
        raise ConfigError(f"min_samples: expected 1 or more, got {min_samples}")
    if resamples < 1:
        raise ConfigError(f"resamples: expected 1 or more, got {resamples}")
    truth = class_indices("truth", truth, len(labels))
    predicted = class_indices("predicted", predicted, len(labels))
    check_same_length("truth", truth, "predicted", predicted)
    if len(values) != len(truth):
        raise DataError(f"{column}: expected {len(truth)} values, got {len(values)}")
    names = sorted({v or BLANK for v in values})
    index = {name: i for i, name in enumerate(names)}
    places = np.array([index[v or BLANK] for v in values])
    groups = []
    for place, name in enumerate(names):
        chosen = places == place
        count = int(chosen.sum())
        right = int((truth[chosen] == predicted[chosen]).sum())
        report = classification_report(
            truth[chosen], predicted[chosen], labels, seed=seed, resamples=resamples
        )
        groups.append(
            Group(
                value=name, samples=count, accuracy=exact_interval(right, count),
                f1_macro=report.f1_macro, small=count < min_samples,
            )
        )  # fmt: skip
    groups.sort(key=lambda g: (g.accuracy.value, g.value))
    return SliceReport(
        column=column,
        min_samples=min_samples,
        groups=tuple(groups),
        gap=_gap([g for g in groups if not g.small], np.random.default_rng(seed), resamples),
    )


def _gap(groups: Sequence[Group], rng: np.random.Generator, resamples: int) -> Gap | None:
    """Compare the last of groups, sorted by accuracy, with the first."""
    if len(groups) < 2:
        return None
    counts = np.array([g.samples for g in groups])
    right = np.array([round(g.accuracy.value * g.samples) for g in groups])
    shares = right / counts
    drawn: Floats = (
        rng.binomial(counts[-1], shares[-1], resamples) / counts[-1]
        - rng.binomial(counts[0], shares[0], resamples) / counts[0]
    )
    # the right answers dealt out anew among all samples: (resamples, groups)
    dealt = rng.multivariate_hypergeometric(counts, right.sum(), resamples, "marginals") / counts
    spans = dealt.max(axis=1) - dealt.min(axis=1)
    value = float(shares[-1] - shares[0])
    as_far = int((spans >= value - 1e-12).sum())
    return Gap(
        best=groups[-1].value,
        worst=groups[0].value,
        difference=percentile_interval(value, drawn, 0.95),
        p_value=(1 + as_far) / (1 + resamples),
    )
