"""How far scores can be taken for probabilities: temperature, and when to say nothing.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599, section 4.2) divides all logits by one
number, which changes no answer. Abstaining (selective classification; El-Yaniv & Wiener 2010,
JMLR 11:1605-1641) leaves the answers of low score out. Pure functions of arrays.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, DataError, GateError
from edgetune.runtime.learn.ridge import fit_temperature
from edgetune.runtime.proportions import CONFIDENCE
from edgetune.tasks.metrics import (
    CALIBRATION_BINS,
    Counts,
    FloatArray,
    Floats,
    IntArray,
    calibration_error,
    class_indices,
)
from edgetune.tasks.proportions import exact_bound, tail

BoolArray = npt.NDArray[np.bool_]

# what a temperature is held against; each sample is in one fold, the n-th in fold n mod FOLDS
FOLDS = 5
# fewer samples in a fold tell nothing
MIN_SAMPLES = 4 * FOLDS
# bounds of what is fitted: beyond them the samples, not the scores, are odd
LEAST, MOST = 0.05, 20.0
# the best that could be reached is looked for among so few mistakes
_FEW_MISTAKES = 200


@dataclass(frozen=True, kw_only=True)
class TemperatureFit:
    """A temperature, and what it does to samples that it was not fitted to.

    Losses are mean log losses in nats, errors are expected calibration errors, shares; both by
    cross-validation, `before` at temperature 1. `helps` says whether the loss falls.
    """

    temperature: float
    samples: int
    loss_before: float
    loss_after: float
    error_before: float
    error_after: float

    @property
    def helps(self) -> bool:
        """Whether it lowers the log loss of samples held out."""
        return self.loss_after < self.loss_before


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A score below which answers are left out.

    threshold: answers of this score and above are kept. accuracy: wanted of them. low: its 95 %
    lower bound. right, answered, samples: counts.
    """

    threshold: float
    accuracy: float
    low: float
    right: int
    answered: int
    samples: int

    @property
    def coverage(self) -> float:
        """The share of samples that is answered."""
        return self.answered / self.samples


@dataclass(frozen=True, kw_only=True)
class SelectiveCurve:
    """Accuracy of the surest answers, by how many there are.

    thresholds: distinct scores, falling. coverage, accuracy: of the answers of that score and
    above, each (thresholds,). area: mean error over coverages (area under the risk-coverage
    curve; Geifman & El-Yaniv 2017, arXiv:1705.08500), 0 is best.
    """

    thresholds: Floats
    coverage: Floats
    accuracy: Floats
    area: float


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Samples whose confidence falls into one bin: mean confidence, accuracy, count."""

    confidence: float
    accuracy: float
    samples: int


def temperature_of(logits: FloatArray, truth: IntArray) -> TemperatureFit | None:
    """Fit a temperature and hold it against samples left out.

    Log-probabilities serve as logits: they differ by a number a row. The fit is the runtime's:
    golden section over the log of the temperature, on targets smoothed by one sample's worth.

    Args:
        logits: shape (samples, classes), finite.
        truth: class indices, shape (samples,).

    Returns:
        None where there are fewer than `MIN_SAMPLES` samples.

    Raises:
        DataError: shapes disagree, an index is out of range, or a logit is not finite.
    """
    if logits.ndim != 2 or logits.shape[0] != len(truth):
        raise DataError(f"logits: expected shape ({len(truth)}, classes), got {logits.shape}")
    truth = class_indices("truth", truth, logits.shape[1])
    samples = len(truth)
    if samples < MIN_SAMPLES:
        return None
    held_out = np.empty(samples)
    folds = np.arange(samples) % FOLDS
    for fold in range(FOLDS):
        rest = folds != fold
        held_out[~rest] = _fitted(logits[rest], truth[rest])
    before, after = log_softmax(logits, 1.0), log_softmax(logits, held_out[:, None])
    predicted = logits.argmax(axis=1)
    rows = np.arange(samples)
    return TemperatureFit(
        temperature=_fitted(logits, truth),
        samples=samples,
        loss_before=float(-before[rows, truth].mean()),
        loss_after=float(-after[rows, truth].mean()),
        error_before=calibration_error(truth, predicted, np.exp(before)),
        error_after=calibration_error(truth, predicted, np.exp(after)),
    )


def log_softmax(logits: FloatArray, temperature: float | Floats) -> Floats:
    """Return ln softmax(logits / temperature), shape unchanged; a temperature may be a row's."""
    scaled = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature
    return cast("Floats", scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True)))


def log_probabilities(probabilities: FloatArray) -> Floats:
    """Return ln p, the smallest number above 0 of the type standing for 0."""
    least = np.finfo(np.float32).smallest_subnormal
    return cast("Floats", np.log(np.maximum(probabilities.astype(np.float64), least)))


def threshold_for(
    accuracy: float, confidence: FloatArray, right: BoolArray, *, level: float = CONFIDENCE
) -> Threshold:
    """Return the smallest score at which the answers kept are as accurate as wanted.

    "As accurate" is read as: the exact one-sided lower bound (Clopper & Pearson 1934) of their
    accuracy is at least `accuracy`. The bound is that of one threshold; as the threshold is chosen
    on the same samples, others tell better what it does.

    Args:
        accuracy: wanted of the answers kept, in (0, 1).
        confidence: score of each answer, shape (samples,).
        right: whether it is right, bool, shape (samples,).
        level: of the bound.

    Raises:
        ConfigError: `accuracy` is out of range.
        DataError: there are no samples, or shapes disagree.
        GateError: no threshold reaches it; the message names the best that one does.
    """
    check_abstain(accuracy)
    scores, answered, hits = _cumulated(confidence, right)
    # a bound lies below the share itself, so most need no sum
    for i in np.flatnonzero(hits > accuracy * answered)[::-1]:
        kept, good = int(answered[i]), int(hits[i])
        if tail(good, kept, accuracy) <= 1.0 - level:
            return Threshold(
                threshold=float(scores[i]) if kept < len(confidence) else 0.0,
                accuracy=accuracy,
                low=exact_bound(good, kept, level),
                right=good,
                answered=kept,
                samples=len(confidence),
            )
    best, low = _best(scores, answered, hits, level)
    raise GateError(
        f"abstain: no score keeps answers that are {100 * accuracy:g} % right, with"
        f" {100 * level:g} % confidence, on {len(confidence)} samples; the most that can be"
        f" shown is {100 * np.floor(low * 1e4) / 1e4:.2f} %, by the {int(answered[best])} answers"
        f" of score {scores[best]:.4f} and above; ask for that, or bring more validation samples"
    )


def check_abstain(accuracy: float | None) -> None:
    """Refuse what is no accuracy to ask for; None asks for none.

    Raises:
        ConfigError: it lies not between 0 and 1.
    """
    if accuracy is not None and not 0.0 < accuracy < 1.0:
        raise ConfigError(f"abstain: expected an accuracy between 0 and 1, got {accuracy:g}")


def selective_curve(confidence: FloatArray, right: BoolArray) -> SelectiveCurve:
    """Return accuracy against coverage; answers of one score are taken or left together.

    Args:
        confidence: score of each answer, shape (samples,).
        right: whether it is right, bool, shape (samples,).

    Raises:
        DataError: there are no samples, or shapes disagree.
    """
    scores, answered, hits = _cumulated(confidence, right)
    samples = len(confidence)
    risk = 1.0 - hits / answered
    steps = np.diff(answered, prepend=0)  # answers of one score share its risk
    return SelectiveCurve(
        thresholds=scores,
        coverage=answered / samples,
        accuracy=hits / answered,
        area=float((risk * steps).sum() / samples),
    )


def reliability(confidence: FloatArray, right: BoolArray) -> tuple[ReliabilityBin, ...]:
    """Return the bins of the expected calibration error that hold samples, lowest first."""
    edges = np.linspace(0.0, 1.0, CALIBRATION_BINS + 1)[1:-1]
    bins = np.digitize(confidence, edges, right=True)
    return tuple(
        ReliabilityBin(
            confidence=float(confidence[bins == b].mean()),
            accuracy=float(right[bins == b].mean()),
            samples=int((bins == b).sum()),
        )
        for b in np.unique(bins)
    )


def _fitted(logits: FloatArray, truth: IntArray) -> float:
    return float(np.clip(fit_temperature(logits, truth), LEAST, MOST))


def _cumulated(confidence: FloatArray, right: BoolArray) -> tuple[Floats, Counts, Counts]:
    """Return distinct scores, falling, and how many answers and right ones lie there or above."""
    if confidence.ndim != 1 or len(confidence) == 0 or confidence.shape != right.shape:
        raise DataError(
            "expected a confidence and a bool for each of 1 sample or more, got shapes"
            f" {confidence.shape} and {right.shape}"
        )
    order = np.argsort(-confidence, kind="stable")
    sorted_scores = confidence[order].astype(np.float64)
    last = np.append(np.flatnonzero(np.diff(sorted_scores)), len(order) - 1)
    hits = np.cumsum(right[order].astype(np.int64))[last]
    return sorted_scores[last], last + 1, hits


def _best(scores: Floats, answered: Counts, hits: Counts, level: float) -> tuple[int, float]:
    """Return where the lower bound is largest, and the bound there."""
    wrong = answered - hits
    # of as many mistakes, the most answers are best
    last = np.append(np.flatnonzero(np.diff(wrong)), len(scores) - 1)[:_FEW_MISTAKES]
    bounds = [exact_bound(int(hits[i]), int(answered[i]), level) for i in last]
    at = int(np.argmax(bounds))
    return int(last[at]), bounds[at]
