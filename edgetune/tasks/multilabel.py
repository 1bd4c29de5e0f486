"""How well several labels at once are told, with an interval around every headline number.

Conventions are scikit-learn's: 0 / 0 counts as 0. Macro averages run over the labels that occur in
the truth or in the prediction, mean average precision over those that occur in the truth.
Intervals are percentile bootstraps over samples (Efron & Tibshirani 1993, ch. 13).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import DataError
from edgetune.tasks.metrics import (
    Counts,
    FloatArray,
    Floats,
    Interval,
    percentile_interval,
    resample,
)

BoolArray = npt.NDArray[np.bool_]

# from which probability on a label is given
THRESHOLD = 0.5
# mean average precision sorts and sums all scores in each resample: no more than so many in all
_MOST_SCORES = 200_000_000
_LEAST_RESAMPLES = 100


@dataclass(frozen=True, kw_only=True)
class LabelScores:
    """One label: shares in [0, 1]; support is the number of samples that have it.

    average_precision is None where no sample has the label.
    """

    label: str
    precision: float
    recall: float
    f1: float
    average_precision: float | None
    support: int


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """What `label_report` measures; shares in [0, 1], log loss in nats.

    accuracy: samples of which every label is right. mean_average_precision is None where no sample
    has any label. log_loss: mean over samples and labels. `per_label` is in the labels' order.
    """

    samples: int
    accuracy: Interval
    precision_micro: Interval
    recall_micro: Interval
    f1_micro: Interval
    f1_macro: Interval
    mean_average_precision: Interval | None
    log_loss: float
    per_label: tuple[LabelScores, ...]


def label_report(
    truth: BoolArray,
    probabilities: FloatArray,
    labels: Sequence[str],
    *,
    thresholds: FloatArray | float = THRESHOLD,
    seed: int = 0,
    resamples: int = 1000,
) -> LabelReport:
    """Measure a multi-label classifier on samples whose labels are known.

    Args:
        truth: shape (samples, labels).
        probabilities: of each label for itself, the same shape.
        labels: their names.
        thresholds: probability from which on a label is given; one, or one a label.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        DataError: there are no samples, shapes disagree, or a number is no probability.
        ConfigError: `resamples` is below 1.
    """
    truth = check_labels(truth, probabilities, len(labels))
    predicted = np.asarray(probabilities >= thresholds)
    hits = LabelCounts(truth, predicted)
    drawn: dict[str, list[Floats]] = {}
    for weights in _weights(len(truth), len(labels), seed, resamples):
        for name, values in hits.averages(weights).items():
            drawn.setdefault(name, []).append(values)
    own = hits.averages(np.ones((1, len(truth)), np.int64))
    intervals = {
        name: percentile_interval(float(value[0]), np.concatenate(drawn[name]), 0.95)
        for name, value in own.items()
    }
    true, given, right = hits.true.sum(0), hits.given.sum(0), hits.right.sum(0)
    precisions = average_precisions(truth, probabilities, np.ones((1, len(truth)), np.int64))[0]
    return LabelReport(
        samples=len(truth),
        **intervals,
        mean_average_precision=_mean_average_precision(truth, probabilities, seed, resamples),
        log_loss=float(log_losses(truth, probabilities).mean()),
        per_label=tuple(
            LabelScores(
                label=label,
                precision=float(right[i] / max(given[i], 1)),
                recall=float(right[i] / max(true[i], 1)),
                f1=float(2 * right[i] / max(given[i] + true[i], 1)),
                average_precision=float(precisions[i]) if true[i] else None,
                support=int(true[i]),
            )
            for i, label in enumerate(labels)
        ),
    )


class LabelCounts:
    """What true and predicted labels have in common, to be summed over drawn samples.

    true, given, right: int64 (samples, labels); exact: int64 (samples,).
    """

    def __init__(self, truth: BoolArray, predicted: BoolArray) -> None:
        """Count; both of shape (samples, labels)."""
        self.true, self.given = truth.astype(np.int64), predicted.astype(np.int64)
        self.right = self.true * self.given
        self.exact = (truth == predicted).all(axis=1).astype(np.int64)

    def averages(self, weights: Counts) -> dict[str, Floats]:
        """Return metrics of resamples, named as `LabelReport`'s, each (resamples,).

        Args:
            weights: how often each sample was drawn, shape (resamples, samples).
        """
        # a matrix product of integers is slow; of doubles it is exact up to 2^53
        w = weights.astype(np.float64)
        true, given, right = w @ self.true, w @ self.given, w @ self.right  # (resamples, labels)
        occurs = (true > 0) | (given > 0)
        f1 = 2 * right / np.maximum(true + given, 1)
        all_true, all_given, all_right = true.sum(1), given.sum(1), right.sum(1)
        return {
            "accuracy": (w @ self.exact) / w.sum(1),
            "precision_micro": all_right / np.maximum(all_given, 1),
            "recall_micro": all_right / np.maximum(all_true, 1),
            "f1_micro": 2 * all_right / np.maximum(all_true + all_given, 1),
            "f1_macro": f1.sum(1) / np.maximum(occurs.sum(1), 1),
        }


def average_precisions(truth: BoolArray, scores: FloatArray, weights: Counts) -> Floats:
    """Return each label's average precision in resamples, (resamples, labels).

    The sum of precision times the step in recall over the distinct scores, as
    sklearn.metrics.average_precision_score; 0 where a resample has no sample with the label.

    Args:
        truth: shape (samples, labels).
        scores: the same shape, larger for likelier labels.
        weights: how often each sample was drawn, shape (resamples, samples).
    """
    found = np.zeros((len(weights), truth.shape[1]))
    for label in range(truth.shape[1]):
        order = np.argsort(-scores[:, label], kind="stable")
        ends = np.flatnonzero(np.diff(scores[order, label], append=-np.inf))  # last of equal scores
        drawn = weights[:, order]  # (resamples, samples)
        positives = np.cumsum(drawn * truth[order, label], axis=1)[:, ends]
        taken = np.cumsum(drawn, axis=1)[:, ends]
        steps = np.diff(positives, axis=1, prepend=0)
        total = np.maximum(positives[:, -1], 1)
        found[:, label] = (steps * (positives / np.maximum(taken, 1))).sum(axis=1) / total
    return found


def log_losses(truth: BoolArray, probabilities: FloatArray) -> Floats:
    """Return -ln of what each decision was given, (samples, labels), clipped at the epsilon."""
    given = np.where(truth, probabilities, 1.0 - probabilities).astype(np.float64)
    epsilon = float(np.finfo(probabilities.dtype).eps)
    clipped: Floats = -np.log(np.clip(given, epsilon, 1.0))
    return clipped


def check_labels(truth: npt.NDArray[Any], probabilities: FloatArray, labels: int) -> BoolArray:
    """Return `truth` as booleans.

    Raises:
        DataError: there are no samples, shapes disagree, or a number is no probability.
    """
    if truth.ndim != 2 or truth.shape != (len(truth), labels) or probabilities.shape != truth.shape:
        raise DataError(
            f"expected truth and probabilities of shape (samples, {labels}), got {truth.shape} and"
            f" {probabilities.shape}"
        )
    if not len(truth):
        raise DataError("truth: no samples; metrics need at least one")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():  # NaN too
        raise DataError("probabilities: expected numbers from 0 to 1 (logits need a sigmoid first)")
    return truth.astype(np.bool_)


def _weights(samples: int, labels: int, seed: int, resamples: int) -> Iterator[Counts]:
    return resample(np.ones(samples, np.int64), seed, resamples, width=labels)


def _mean_average_precision(
    truth: BoolArray, scores: FloatArray, seed: int, resamples: int
) -> Interval | None:
    if not truth.any():
        return None
    affordable = max(_LEAST_RESAMPLES, _MOST_SCORES // truth.size)

    def means(weights: Counts) -> Floats:
        occurs = weights.astype(np.float64) @ truth > 0  # (resamples, labels)
        found = average_precisions(truth, scores, weights).sum(axis=1)
        averaged: Floats = found / np.maximum(occurs.sum(axis=1), 1)
        return averaged

    value = means(np.ones((1, len(truth)), np.int64))[0]
    draws = _weights(len(truth), truth.shape[1], seed, min(resamples, affordable))
    return percentile_interval(float(value), np.concatenate([means(d) for d in draws]), 0.95)
