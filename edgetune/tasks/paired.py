"""What a candidate loses against a reference on the same samples, and whether it may.

Accuracy is compared by the samples on which the models differ (see
edgetune.runtime.proportions), macro F1 by a paired bootstrap. A `verdict` reads "a loss of at
most X" as "with 95 % confidence, at most X": the one-sided upper bound has to lie below X,
which is the non-inferiority test at level 5 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgetune.runtime.proportions import (
    CONFIDENCE,
    MOST_SAMPLES,
    check_share,
    mcnemar_p,
    samples_needed,
    tango_bound,
)
from edgetune.tasks.metrics import (
    Counts,
    FloatArray,
    Floats,
    IntArray,
    Interval,
    averages_of_cells,
    calibration_error,
    check_probabilities,
    class_indices,
    log_loss,
    percentile_interval,
    resample,
)
from edgetune.tasks.proportions import tango_interval

GatedMetric = Literal["accuracy", "f1_macro"]
# a drop of exactly the limit is not over it for the last bit of a mean
_ROUNDING = 1e-12

Status = Literal["pass", "fail", "cannot tell"]

_METRIC_NAMES: dict[GatedMetric, str] = {"accuracy": "accuracy", "f1_macro": "macro F1"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A candidate against a reference on the same samples; see `compare`.

    Shares lie in [0, 1], their differences in [-1, 1]. A drop is reference - candidate, so a
    gain is negative; a change is candidate - reference.

    Attributes:
        samples: how many both answered.
        reference_accuracy: of the reference.
        candidate_accuracy: of the candidate.
        drop: of accuracy, with its two-sided 95 % score interval (Tango 1998).
        bound: one-sided 95 % upper bound of that drop.
        lost: samples that only the reference gets right.
        gained: samples that only the candidate gets right.
        mcnemar_p: two-sided exact p-value of "both are equally accurate".
        agreement: share of samples on which both predict the same class.
        f1_macro_drop: of macro F1, with its two-sided 95 % paired bootstrap interval.
        f1_macro_bound: one-sided 95 % upper bound of that drop; see `compare`.
        effective_samples: what the samples are worth to macro F1, at most `samples`.
        worst_class: the class that has samples and loses most recall.
        worst_class_drop: the recall that it loses.
        worst_class_support: its true samples.
        calibration_change: change of the expected calibration error, 15 bins.
        log_loss_change: change of the log loss, nats.
        max_probability_difference: largest difference of any class's probability.
    """

    samples: int
    reference_accuracy: float
    candidate_accuracy: float
    drop: Interval
    bound: float
    lost: int
    gained: int
    mcnemar_p: float
    agreement: float
    f1_macro_drop: Interval
    f1_macro_bound: float
    effective_samples: float
    worst_class: str
    worst_class_drop: float
    worst_class_support: int
    calibration_change: float
    log_loss_change: float
    max_probability_difference: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a candidate may be used, and one sentence that says why."""

    status: Status
    sentence: str


def compare(
    truth: IntArray,
    reference_probabilities: FloatArray,
    candidate_probabilities: FloatArray,
    labels: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Comparison:
    """Measure what a candidate loses against a reference.

    A model predicts the most probable class, of equals the first.

    The bootstrap of macro F1 can't see what no sample shows: where the models agree on
    every sample it has no width, and where they differ on few it has too little. So
    `f1_macro_bound` keeps at least the distance from its drop that Tango's bound of accuracy
    keeps, on `effective_samples` instead of all: classes^2 / sum(1 / support), the size of a
    balanced set that would weigh its classes as exactly as these samples do (Kish 1965,
    sec. 11.7, for the weights that a macro average gives to samples).

    Args:
        truth: class indices, shape (samples,).
        reference_probabilities: shape (samples, classes), rows summing to 1.
        candidate_probabilities: the same of the candidate.
        labels: the classes' names; index i is labels[i].
        seed: of the bootstrap.
        resamples: number of bootstrap resamples.

    Raises:
        DataError: there are no samples, shapes disagree, an index is out of range, or what is
            given as probabilities is not (NaN, for one).
        ConfigError: `resamples` is below 1.

    Source: Tango 1998, Statistics in Medicine 17:891-908.
    """
    classes = len(labels)
    truth = class_indices("truth", truth, classes)
    samples = len(truth)
    shape = (samples, classes)
    check_probabilities("reference probabilities", reference_probabilities, shape)
    check_probabilities("candidate probabilities", candidate_probabilities, shape)
    # one type, so that both log losses are clipped at the same epsilon
    before = reference_probabilities.astype(np.float64)
    after = candidate_probabilities.astype(np.float64)
    reference, candidate = before.argmax(axis=1), after.argmax(axis=1)

    lost = int(np.sum((reference == truth) & (candidate != truth)))
    gained = int(np.sum((reference != truth) & (candidate == truth)))
    support = np.bincount(truth, minlength=classes)  # (classes,)
    loss = (reference == truth).astype(np.int64) - (candidate == truth)  # -1 gained, 1 lost
    lost_recall = np.bincount(truth, weights=loss, minlength=classes) / np.maximum(support, 1)
    worst = int(np.argmax(np.where(support > 0, lost_recall, -np.inf)))
    f1_drops = paired_bootstrap(
        truth, reference, candidate, classes, "f1_macro", seed=seed, resamples=resamples
    )
    drop = tango_interval(lost, gained, samples)
    effective = _effective_samples(support)
    share = effective / samples
    return Comparison(
        samples=samples,
        reference_accuracy=float(np.mean(reference == truth)),
        candidate_accuracy=float(np.mean(candidate == truth)),
        drop=drop,
        bound=tango_bound(lost, gained, samples),
        lost=lost,
        gained=gained,
        mcnemar_p=mcnemar_p(lost, gained),
        agreement=float(np.mean(reference == candidate)),
        f1_macro_drop=percentile_interval(f1_drops.value, f1_drops.drops, CONFIDENCE),
        f1_macro_bound=max(
            float(np.quantile(f1_drops.drops, CONFIDENCE)),
            f1_drops.value + tango_bound(lost * share, gained * share, effective) - drop.value,
        ),
        effective_samples=effective,
        worst_class=labels[worst],
        worst_class_drop=float(lost_recall[worst]),
        worst_class_support=int(support[worst]),
        calibration_change=calibration_error(truth, candidate, after)
        - calibration_error(truth, reference, before),
        log_loss_change=log_loss(truth, after) - log_loss(truth, before),
        max_probability_difference=float(np.abs(after - before).max()),
    )


def verdict(
    comparison: Comparison,
    max_drop: float,
    metric: GatedMetric = "accuracy",
    max_class_drop: float | None = None,
) -> Verdict:
    """Say whether a candidate loses at most `max_drop`, with 95 % confidence.

    "fail": the drop on these samples is larger. "pass": its one-sided upper bound is at most
    `max_drop`. "cannot tell": the drop is small enough, but there are too few samples to
    show it; so a candidate that answers every sample as the reference does may still not
    pass.

    Args:
        comparison: of the candidate with the reference.
        max_drop: largest loss of `metric` allowed, a share in [0, 1].
        metric: what must not fall.
        max_class_drop: largest loss of recall allowed in any class, a share in [0, 1], on
            these very samples (few classes have the samples for a bound); None for any.

    Raises:
        ConfigError: `max_drop` or `max_class_drop` lies outside [0, 1].
    """
    check_share("max_drop", max_drop)
    if max_class_drop is not None:
        check_share("max_class_drop", max_class_drop)
    drop, bound = comparison.drop, comparison.bound
    if metric == "f1_macro":
        drop, bound = comparison.f1_macro_drop, comparison.f1_macro_bound
    samples = _samples(comparison.samples)
    finding = f"It {_change(drop.value, metric, max_drop)} on {samples}"
    if drop.value > max_drop + _ROUNDING:
        return Verdict(
            status="fail",
            sentence=f"{finding} (95 % interval {_number(drop.low)} to {_number(drop.high)}), more"
            f" than the {_points(max_drop)} allowed; keep its worst layers in float, or allow a"
            " larger drop.",
        )
    if max_class_drop is not None and comparison.worst_class_drop > max_class_drop + _ROUNDING:
        return Verdict(
            status="fail",
            sentence=f"{finding}, but class {comparison.worst_class!r}"
            f" ({_samples(comparison.worst_class_support)}) loses"
            f" {_over(comparison.worst_class_drop, max_class_drop)} of recall, more than the"
            f" {_points(max_class_drop)} allowed in a class; keep its worst layers in float, or"
            " allow a larger drop in a class.",
        )
    if bound <= max_drop:
        known = f"loses at most {_at_most(bound)}" if bound >= 0.0 else "loses none"
        return Verdict(
            status="pass",
            sentence=f"{finding}, and with 95 % confidence {known} on all data of this kind;"
            f" {_points(max_drop)} may be lost.",
        )
    claim = f"a loss below {_points(max_drop)}" if max_drop > 0.0 else "that none is lost"
    return Verdict(
        status="cannot tell",
        sentence=f"{finding}, but {samples} cannot show {claim}: with"
        f" 95 % confidence the loss is at most {_at_most(bound)};"
        f" {_advice(comparison, max_drop, metric)}.",
    )


@dataclass(frozen=True, kw_only=True)
class PairedDrops:
    """A metric's drop on the samples, and its bootstrap drops, shape (resamples,)."""

    value: float
    drops: Floats


def paired_bootstrap(
    truth: IntArray,
    reference: IntArray,
    candidate: IntArray,
    classes: int,
    metric: str,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> PairedDrops:
    """Resample the drop, reference - candidate, of a metric of the confusion matrix.

    Each resample judges both models on the same samples. Samples are drawn as cells of the
    table (truth, reference's class, candidate's class), multinomially; only cells that occur
    are drawn.

    Args:
        truth: class indices, shape (samples,), samples > 0.
        reference: the reference's predictions, shape (samples,).
        candidate: the candidate's predictions, shape (samples,).
        classes: number of classes.
        metric: "accuracy", or one of precision, recall and f1 with "_macro" or "_weighted".
        seed: of the bootstrap.
        resamples: number of resamples.

    Raises:
        ConfigError: `resamples` is below 1.
    """
    table = np.stack((truth, reference, candidate))  # (3, samples)
    (rows, first, second), counts = np.unique(table, axis=1, return_counts=True)

    def drops_of(draw: Counts) -> Floats:
        before = averages_of_cells(draw, rows, first, classes)[metric]
        after = averages_of_cells(draw, rows, second, classes)[metric]
        return before - after  # (chunk,)

    drawn = [drops_of(draw) for draw in resample(counts, seed, resamples, width=classes)]
    return PairedDrops(value=float(drops_of(counts[None])[0]), drops=np.concatenate(drawn))


def _effective_samples(support: Counts) -> float:
    present = support[support > 0]
    return float(len(present) ** 2 / np.sum(1.0 / present))


def _advice(comparison: Comparison, max_drop: float, metric: GatedMetric) -> str:
    """Say what would settle it."""
    lost, gained, samples = comparison.lost, comparison.gained, comparison.samples
    needed: float | None
    if metric == "accuracy":
        needed = samples_needed(max_drop, lost=lost, gained=gained, samples=samples)
    else:
        needed = _samples_needed_by_f1(comparison, max_drop)
    if needed is None or needed > MOST_SAMPLES:
        return "no number of samples like these would, so allow a larger drop"
    return f"about {_rounded(needed):,} would, so add samples or allow a larger drop"


def _samples_needed_by_f1(comparison: Comparison, max_drop: float) -> float | None:
    drop, bound = comparison.f1_macro_drop.value, comparison.f1_macro_bound
    room = max_drop - drop
    if room <= 0.0:
        return None
    share = comparison.effective_samples / comparison.samples
    effective = samples_needed(
        min(1.0, max(0.0, comparison.drop.value + room)),
        lost=comparison.lost * share,
        gained=comparison.gained * share,
        samples=comparison.effective_samples,
    )
    if effective is not None and effective > comparison.effective_samples:
        return effective / share
    # the bootstrap decides; its width shrinks with the root of the number of samples
    return comparison.samples * ((bound - drop) / room) ** 2


def _rounded(number: float) -> int:
    """Round up to three digits: more would pretend to know."""
    step = int(10 ** max(0, math.floor(math.log10(number)) - 2))
    return math.ceil(number / step) * step


def _change(drop: float, metric: GatedMetric, limit: float) -> str:
    name = _METRIC_NAMES[metric]
    if drop == 0.0:
        return f"loses no {name}"
    if drop < 0.0:
        return f"gains {_points(-drop)} of {name}"
    return f"loses {_over(drop, limit) if drop > limit + _ROUNDING else _points(drop)} of {name}"


def _over(drop: float, limit: float) -> str:
    """Return a drop over its limit, rounded up where it would read as the limit."""
    return _points(drop) if _points(drop) != _points(limit) else _at_most(drop)


def _points(share: float) -> str:
    """Return "1 point", "0.25 points"."""
    number = _number(share)
    return f"{number} point" if number == "1" else f"{number} points"


def _number(share: float) -> str:
    """Return a share in points: two decimals, and of less than that the first digit."""
    points = 100.0 * share
    shown = f"{points:.2f}" if abs(points) >= 0.01 or points == 0.0 else f"{points:.1g}"
    return shown.rstrip("0").rstrip(".") if "e" not in shown else shown


def _at_most(bound: float) -> str:
    """Return `_points` rounded up, so that a bound over a limit never reads as the limit."""
    return _points(math.ceil(1e4 * bound - 1e-9) / 1e4)


def _samples(number: int) -> str:
    return f"{number:,} sample" if number == 1 else f"{number:,} samples"
