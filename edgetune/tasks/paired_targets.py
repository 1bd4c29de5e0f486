"""What a candidate loses against a reference where labels are several at once, or numbers.

Several labels: a sample is right where all its labels are, which is the 0 or 1 that
`edgetune.tasks.paired` compares. Numbers: the mean absolute error may rise by a share of itself;
docs/adr/0014 says why.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgetune.runtime.proportions import CONFIDENCE, check_share, mcnemar_p, tango_bound
from edgetune.tasks.metrics import (
    FloatArray,
    Interval,
    calibration_error,
    percentile_interval,
    resample,
)
from edgetune.tasks.multilabel import (
    THRESHOLD,
    BoolArray,
    LabelCounts,
    check_labels,
    log_losses,
)
from edgetune.tasks.paired import Comparison, Verdict
from edgetune.tasks.proportions import tango_interval
from edgetune.tasks.regression import check_values

# of fewer samples a bootstrap's percentiles say too little
LEAST_SAMPLES = 30
_ROUNDING = 1e-12


def compare_labels(
    truth: BoolArray,
    reference: FloatArray,
    candidate: FloatArray,
    labels: Sequence[str],
    *,
    thresholds: FloatArray | float = THRESHOLD,
    seed: int = 0,
    resamples: int = 2000,
) -> Comparison:
    """Measure what a candidate loses against a reference.

    In the `Comparison` a sample is right, and two answers agree, where all labels are; a class's
    recall is a label's; calibration error and log loss are of the decisions, one a sample and
    label.

    Args:
        truth: shape (samples, labels).
        reference: probabilities, the same shape.
        candidate: the same of the candidate.
        labels: their names.
        thresholds: probability from which on a label is given; one, or one a label.
        seed: of the bootstrap of macro F1.
        resamples: of the same.

    Raises:
        DataError: there are no samples, shapes disagree, or a number is no probability.
        ConfigError: `resamples` is below 1.

    Source: Tango 1998, Statistics in Medicine 17:891-908.
    """
    truth = check_labels(truth, reference, len(labels))
    check_labels(truth, candidate, len(labels))
    before, after = reference.astype(np.float64), candidate.astype(np.float64)
    given, later = before >= thresholds, after >= thresholds  # (samples, labels)
    first, second = LabelCounts(truth, given), LabelCounts(truth, later)
    samples = len(truth)
    lost = int((first.exact & (1 - second.exact)).sum())
    gained = int((second.exact & (1 - first.exact)).sum())
    drop = tango_interval(lost, gained, samples)
    bound = tango_bound(lost, gained, samples)
    support = first.true.sum(axis=0)
    lost_recall = (first.right - second.right).sum(axis=0) / np.maximum(support, 1)
    worst = int(np.argmax(np.where(support > 0, lost_recall, -np.inf)))
    ones = np.ones((1, samples), np.int64)
    f1_drop = float(first.averages(ones)["f1_macro"][0] - second.averages(ones)["f1_macro"][0])
    drops = np.concatenate(
        [
            first.averages(w)["f1_macro"] - second.averages(w)["f1_macro"]
            for w in resample(np.ones(samples, np.int64), seed, resamples, width=len(labels))
        ]
    )
    return Comparison(
        samples=samples,
        reference_accuracy=float(first.exact.mean()),
        candidate_accuracy=float(second.exact.mean()),
        drop=drop,
        bound=bound,
        lost=lost,
        gained=gained,
        mcnemar_p=mcnemar_p(lost, gained),
        agreement=float((given == later).all(axis=1).mean()),
        f1_macro_drop=percentile_interval(f1_drop, drops, CONFIDENCE),
        f1_macro_bound=max(float(np.quantile(drops, CONFIDENCE)), f1_drop + bound - drop.value),
        effective_samples=float(samples),
        worst_class=labels[worst],
        worst_class_drop=float(lost_recall[worst]),
        worst_class_support=int(support[worst]),
        calibration_change=_decision_error(truth, after) - _decision_error(truth, before),
        log_loss_change=float((log_losses(truth, after) - log_losses(truth, before)).mean()),
        max_probability_difference=float(np.abs(after - before).max()),
    )


def _decision_error(truth: BoolArray, probabilities: FloatArray) -> float:
    """Return the calibration error of all decisions, each as one between two classes."""
    flat = probabilities.ravel()
    two = np.stack([1.0 - flat, flat], axis=1)
    return calibration_error(truth.ravel().astype(np.int64), two.argmax(axis=1), two)


@dataclass(frozen=True, kw_only=True)
class ValueComparison:
    """A candidate against a reference on the same samples, where labels are numbers.

    Attributes:
        samples: how many both answered.
        reference_mae: mean absolute error of the reference, in the unit of the values.
        candidate_mae: of the candidate.
        rise: of the mean absolute error, as a share of the reference's, with its two-sided 95 %
            paired bootstrap interval; a fall is negative.
        bound: one-sided 95 % upper bound of that rise.
        largest_change: largest difference between the two answers to a sample, in that unit.
    """

    samples: int
    reference_mae: float
    candidate_mae: float
    rise: Interval
    bound: float
    largest_change: float


def compare_values(
    truth: FloatArray,
    reference: FloatArray,
    candidate: FloatArray,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> ValueComparison:
    """Measure how much further off a candidate is than a reference.

    The bootstrap is paired: each resample judges both on the same samples, so what makes a
    sample hard for both cancels. A resample in which the reference makes no error counts as a
    rise without bound where the candidate makes one.

    Args:
        truth: shape (samples,).
        reference: the reference's values, shape (samples,).
        candidate: the candidate's.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        DataError: there are no samples, shapes disagree, or a number is not finite.
        ConfigError: `resamples` is below 1.
    """
    _, before = check_values(truth, reference)
    truth, after = check_values(truth, candidate)
    first, second = np.abs(before - truth), np.abs(after - truth)

    def rises(weights: FloatArray) -> FloatArray:
        base, now = weights @ first, weights @ second  # (resamples,)
        exact = np.where(now > 0, np.inf, 0.0)
        return np.where(base > 0, now / np.where(base > 0, base, 1.0) - 1.0, exact)

    draws = resample(np.ones(len(truth), np.int64), seed, resamples)
    drawn = np.concatenate([rises(w.astype(np.float64)) for w in draws])
    # of sorted values one is taken, not a mean of two: either may be infinite
    tail = (1 - CONFIDENCE) / 2
    low, high, bound = np.quantile(drawn, (tail, 1 - tail, CONFIDENCE), method="inverted_cdf")
    return ValueComparison(
        samples=len(truth),
        reference_mae=float(first.mean()),
        candidate_mae=float(second.mean()),
        rise=Interval(
            value=float(rises(np.ones((1, len(truth))))[0]), low=float(low), high=float(high)
        ),
        bound=float(bound),
        largest_change=float(np.abs(after - before).max()),
    )


def value_verdict(comparison: ValueComparison, max_drop: float) -> Verdict:
    """Say whether a candidate's mean absolute error rises by at most a share, with 95 % confidence.

    "fail", "pass" and "cannot tell" are those of `edgetune.tasks.paired.verdict`.

    Args:
        comparison: of the candidate with the reference.
        max_drop: largest rise allowed, a share of the reference's error, in [0, 1].

    Raises:
        ConfigError: `max_drop` lies outside [0, 1].
    """
    check_share("max_drop", max_drop)
    found = comparison
    rise, bound, samples = found.rise.value, found.bound, f"{found.samples:,} samples"
    moved = "falls" if rise < 0 else "rises"
    finding = (
        f"Its mean absolute error {moved} by {_percent(abs(rise))}, from {found.reference_mae:.4g}"
        f" to {found.candidate_mae:.4g}, on {samples}"
    )
    status: Literal["pass", "fail", "cannot tell"] = "cannot tell"
    if rise > max_drop + _ROUNDING:
        status, ending = "fail", (
            f" (95 % interval {_percent(found.rise.low)} to {_percent(found.rise.high)}), more than"
            f" the {_percent(max_drop)} allowed; keep its worst layers in float, or allow more."
        )  # fmt: skip
    elif found.samples < LEAST_SAMPLES:
        ending = f", of which {LEAST_SAMPLES} are the fewest to judge by; add samples."
    elif bound <= max_drop:
        status, ending = "pass", (
            f", and with 95 % confidence {_most(bound)} on all data of this kind;"
            f" {_percent(max_drop)} are allowed."
        )  # fmt: skip
    else:
        ending = (
            f", but they cannot show a rise below {_percent(max_drop)}: with 95 % confidence it is"
            f" at most {_at_most(bound)}; {_advice(found, max_drop)}."
        )
    return Verdict(status=status, sentence=finding + ending)


def _advice(found: ValueComparison, max_drop: float) -> str:
    room = max_drop - found.rise.value
    if room <= 0 or not math.isfinite(found.bound):
        return "allow a larger one"
    # the bootstrap's width shrinks with the root of the number of samples
    needed = found.samples * ((found.bound - found.rise.value) / room) ** 2
    step = int(10 ** max(0, math.floor(math.log10(needed)) - 2))
    return f"about {math.ceil(needed / step) * step:,} samples would, or allow a larger one"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _most(bound: float) -> str:
    return f"by at most {_at_most(bound)}" if bound >= 0 else "it does not rise"


def _at_most(share: float) -> str:
    """Return `_percent` rounded up, so that a bound over a limit never reads as the limit."""
    return f"{math.ceil(1e4 * share - 1e-9) / 100:g} %" if math.isfinite(share) else "any share"
