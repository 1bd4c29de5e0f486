"""How well a classifier does, with an interval around every headline number.

Conventions are scikit-learn's: rows of a confusion matrix are the truth, 0 / 0 counts as
0, and macro averages run over the classes that occur in the truth or in the prediction.

Intervals are percentile bootstraps over samples (Efron & Tibshirani 1993, ch. 13). All the
metrics here are functions of the confusion matrix, and resampling n samples with
replacement draws its cells from Multinomial(n, cells / n); so the cells are drawn, only
those that are not zero, and no sample is touched twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, DataError

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.floating[Any]]

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CALIBRATION_BINS = 15

# a chunk of resamples holds at most this many numbers in one array (8 MiB of int64)
_CHUNK_ELEMENTS = 1_048_576


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number and its interval: percentile bootstrap, 95 %, where nothing else is said.

    Where every resample gives the same number (no mistake at all, for one) a bootstrap
    interval has no width; that is the bootstrap's limit, not certainty.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One class: precision, recall and F1 in [0, 1]; support is its number of true samples."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, kw_only=True)
class ClassificationReport:
    """What `classification_report` measures; shares in [0, 1], log loss in nats.

    `log_loss` and `expected_calibration_error` are None where no probabilities were given.
    `per_class` and `confusion` (rows = truth) are in the order of the labels.
    """

    samples: int
    accuracy: Interval
    precision_macro: Interval
    recall_macro: Interval
    f1_macro: Interval
    precision_weighted: Interval
    recall_weighted: Interval
    f1_weighted: Interval
    log_loss: float | None = None
    expected_calibration_error: float | None = None
    per_class: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class PairedDrop:
    """Two models on the same samples; see `paired_drop`.

    `reference` and `candidate` are accuracies, `drop` is their difference in [-1, 1],
    `agreement` the share of samples on which both predict the same class.
    `worst_class_drop` is the largest fall in recall of any class that has samples.
    """

    reference: float
    candidate: float
    drop: Interval
    agreement: float
    worst_class: str
    worst_class_drop: float
    samples: int


def confusion_matrix(truth: IntArray, predicted: IntArray, classes: int) -> IntArray:
    """Count samples by true and predicted class.

    Args:
        truth: class indices, shape (samples,).
        predicted: class indices, shape (samples,).
        classes: number of classes; every index lies in [0, classes).

    Returns:
        Counts, int64, shape (classes, classes); rows are the truth.

    Raises:
        DataError: there are no samples, the shapes differ, or an index is out of range.
    """
    truth = class_indices("truth", truth, classes)
    predicted = class_indices("predicted", predicted, classes)
    check_same_length("truth", truth, "predicted", predicted)
    cells = np.bincount(truth * classes + predicted, minlength=classes * classes)
    return cells.reshape(classes, classes)


def classification_report(
    truth: IntArray,
    predicted: IntArray,
    labels: Sequence[str],
    *,
    probabilities: FloatArray | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> ClassificationReport:
    """Measure a classifier on samples whose class is known.

    A resample's macro average runs over the classes that occur in that resample, as
    scikit-learn's would.

    Args:
        truth: class indices, shape (samples,).
        predicted: class indices, shape (samples,).
        labels: the classes' names; index i is labels[i].
        probabilities: shape (samples, classes), rows summing to 1; adds the log loss
            (natural logarithm, clipped at the type's epsilon as scikit-learn does) and the
            expected calibration error (15 bins of equal width; Guo et al. 2017,
            arXiv:1706.04599, eq. 3).
        seed: of the bootstrap.
        resamples: number of bootstrap resamples.

    Raises:
        DataError: there are no samples, shapes disagree, an index is out of range, or
            `probabilities` are not probabilities.
        ConfigError: `resamples` is below 1.
    """
    confusion = confusion_matrix(truth, predicted, len(labels)).astype(np.int64)
    true_positives = np.diagonal(confusion)[None]  # (1, classes)
    predicted_counts = confusion.sum(axis=0)[None]  # (1, classes)
    support = confusion.sum(axis=1)[None]  # (1, classes)
    precision, recall, f1 = _scores(true_positives, predicted_counts, support)
    averages = _averages(true_positives, predicted_counts, support)
    intervals = _report_intervals(confusion, averages, seed=seed, resamples=resamples)
    loss, miscalibration = None, None
    if probabilities is not None:
        check_probabilities("probabilities", probabilities, (len(truth), len(labels)))
        loss = log_loss(truth, probabilities)
        miscalibration = calibration_error(truth, predicted, probabilities)
    return ClassificationReport(
        samples=int(confusion.sum()),
        **intervals,
        log_loss=loss,
        expected_calibration_error=miscalibration,
        per_class=tuple(
            ClassScores(
                label=label,
                precision=float(precision[0, i]),
                recall=float(recall[0, i]),
                f1=float(f1[0, i]),
                support=int(support[0, i]),
            )
            for i, label in enumerate(labels)
        ),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def paired_drop(
    truth: IntArray,
    reference: IntArray,
    candidate: IntArray,
    labels: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> PairedDrop:
    """Measure what a candidate loses against a reference on the same samples.

    drop = accuracy(reference) - accuracy(candidate). The bootstrap is paired: each resample
    judges both models on the same samples, so what both get right or wrong cancels.

    Args:
        truth: class indices, shape (samples,).
        reference: the reference's predictions, shape (samples,).
        candidate: the candidate's predictions, shape (samples,).
        labels: the classes' names; index i is labels[i].
        seed: of the bootstrap.
        resamples: number of bootstrap resamples.
        confidence: coverage of `drop`'s interval, in (0, 1).

    Raises:
        DataError: there are no samples, shapes disagree, or an index is out of range.
        ConfigError: `resamples` or `confidence` is out of range.
    """
    classes = len(labels)
    truth = class_indices("truth", truth, classes)
    reference = class_indices("reference", reference, classes)
    candidate = class_indices("candidate", candidate, classes)
    check_same_length("truth", truth, "reference", reference)
    check_same_length("truth", truth, "candidate", candidate)
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence: expected a number between 0 and 1, got {confidence}")
    samples = len(truth)
    loss = (reference == truth).astype(np.int64) - (candidate == truth)  # -1 gained, 1 lost
    value = float(loss.mean())
    cells = np.bincount(loss + 1, minlength=3)  # samples with loss -1, 0, 1
    drops = np.concatenate(
        [(draw[:, 2] - draw[:, 0]) / samples for draw in resample(cells, seed, resamples)]
    )
    support = np.bincount(truth, minlength=classes)
    lost_recall = np.bincount(truth, weights=loss, minlength=classes) / np.maximum(support, 1)
    worst = int(np.argmax(np.where(support > 0, lost_recall, -np.inf)))
    return PairedDrop(
        reference=float(np.mean(reference == truth)),
        candidate=float(np.mean(candidate == truth)),
        drop=percentile_interval(value, drops, confidence),
        agreement=float(np.mean(reference == candidate)),
        worst_class=labels[worst],
        worst_class_drop=float(lost_recall[worst]),
        samples=samples,
    )


def averages_of_cells(
    draw: Counts, rows: Counts, columns: Counts, classes: int
) -> dict[str, Floats]:
    """Return accuracy and the macro and weighted averages of drawn confusion matrices.

    Args:
        draw: samples in each cell, shape (resamples, cells).
        rows: the true class of each cell, shape (cells,); a class pair may occur again.
        columns: the predicted class of each cell, shape (cells,).
        classes: number of classes.

    Returns:
        Metrics named as `ClassificationReport`'s, each of shape (resamples,). Macro averages
        run over the classes that occur in the resample.
    """
    right = rows == columns
    return _averages(
        _sum_groups(draw[:, right], rows[right], classes),
        _sum_groups(draw, columns, classes),
        _sum_groups(draw, rows, classes),
    )


def _report_intervals(
    confusion: Counts, averages: Mapping[str, Floats], *, seed: int, resamples: int
) -> dict[str, Interval]:
    rows, columns = np.nonzero(confusion)
    classes = len(confusion)
    drawn: dict[str, list[Floats]] = {name: [] for name in averages}
    for draw in resample(confusion[rows, columns], seed, resamples, width=classes):
        for name, values in averages_of_cells(draw, rows, columns, classes).items():
            drawn[name].append(values)
    return {
        name: percentile_interval(float(value[0]), np.concatenate(drawn[name]), 0.95)
        for name, value in averages.items()
    }


def _averages(
    true_positives: Counts, predicted_counts: Counts, support: Counts
) -> dict[str, Floats]:
    """Average per-class counts, each (resamples, classes), to metrics, each (resamples,)."""
    samples = support.sum(axis=1)
    occurs = (support > 0) | (predicted_counts > 0)
    averages = {"accuracy": true_positives.sum(axis=1) / samples}
    scores = _scores(true_positives, predicted_counts, support)
    for name, score in zip(("precision", "recall", "f1"), scores, strict=True):
        # a class that does not occur scores 0, so it adds nothing to the sum
        averages[f"{name}_macro"] = score.sum(axis=1) / occurs.sum(axis=1)
        averages[f"{name}_weighted"] = (score * support).sum(axis=1) / samples
    return averages


def _scores(
    true_positives: Counts, predicted_counts: Counts, support: Counts
) -> tuple[Floats, Floats, Floats]:
    """Return precision, recall and F1 of each class, the shape of the counts; 0 / 0 is 0."""
    precision = true_positives / np.maximum(predicted_counts, 1)
    recall = true_positives / np.maximum(support, 1)
    f1 = 2 * true_positives / np.maximum(predicted_counts + support, 1)
    return precision, recall, f1


def _sum_groups(counts: Counts, groups: Counts, classes: int) -> Counts:
    """Sum columns of `counts`, (resamples, cells), that share a group."""
    sums = np.zeros((len(counts), classes), np.int64)
    if len(groups) > 0:
        order = np.argsort(groups, kind="stable")
        present, starts = np.unique(groups[order], return_index=True)
        sums[:, present] = np.add.reduceat(counts[:, order], starts, axis=1)
    return sums


def resample(cells: Counts, seed: int, resamples: int, *, width: int = 0) -> Iterator[Counts]:
    """Draw bootstrap counts, (chunk, cells), in chunks that also bound (chunk, width) arrays."""
    if resamples < 1:
        raise ConfigError(f"resamples: expected 1 or more, got {resamples}")
    random = np.random.default_rng(seed)
    samples = int(cells.sum())
    shares = cells / samples
    chunk = max(1, _CHUNK_ELEMENTS // max(len(cells), width))
    for start in range(0, resamples, chunk):
        yield random.multinomial(samples, shares, size=min(chunk, resamples - start))


def percentile_interval(value: float, resampled: Floats, confidence: float) -> Interval:
    """Return `value` between the percentiles of `resampled` that hold `confidence` of it."""
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(resampled, (tail, 1.0 - tail))
    return Interval(value=value, low=float(low), high=float(high))


def log_loss(truth: IntArray, probabilities: FloatArray) -> float:
    """Return the mean of -ln p(truth), clipped at the type's epsilon; arguments are checked."""
    given = probabilities[np.arange(len(truth)), truth].astype(np.float64)  # (samples,)
    epsilon = float(np.finfo(probabilities.dtype).eps)
    return float(-np.log(np.clip(given, epsilon, 1.0 - epsilon)).mean())


def calibration_error(truth: IntArray, predicted: IntArray, probabilities: FloatArray) -> float:
    """Return how far confidence lies from accuracy on average, in [0, 1].

    Confidence is the probability of the predicted class. Samples fall into bins of equal
    width ((m - 1) / 15, m / 15]; the result is the mean of |accuracy - confidence| over the
    bins, weighted by their samples.

    Source: Guo et al. 2017 (arXiv:1706.04599), eq. 3.
    """
    samples = len(truth)
    confidence = probabilities[np.arange(samples), predicted].astype(np.float64)  # (samples,)
    edges = np.linspace(0.0, 1.0, CALIBRATION_BINS + 1)[1:-1]
    bins = np.digitize(confidence, edges, right=True)
    correct = np.bincount(bins, weights=truth == predicted, minlength=CALIBRATION_BINS)
    expected = np.bincount(bins, weights=confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(correct - expected).sum() / samples)


def class_indices(name: str, values: IntArray, classes: int) -> Counts:
    """Return `values` as int64.

    Raises:
        DataError: they are no class indices of shape (samples,), samples > 0.
    """
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise DataError(
            f"{name}: expected class indices of shape (samples,), integers;"
            f" got shape {values.shape}, {values.dtype}"
        )
    if len(values) == 0:
        raise DataError(f"{name}: no samples; metrics need at least one")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= classes:
        outside = low if low < 0 else high
        raise DataError(f"{name}: expected indices from 0 to {classes - 1}, got {outside}")
    return values.astype(np.int64)


def check_same_length(name: str, values: IntArray, other: str, others: IntArray) -> None:
    """Refuse two lists of samples that differ in length.

    Raises:
        DataError: they do.
    """
    if len(values) != len(others):
        raise DataError(
            f"expected as many {other} as {name}, got {len(others)} {other}"
            f" and {len(values)} {name}"
        )


def check_probabilities(name: str, probabilities: FloatArray, shape: tuple[int, int]) -> None:
    """Refuse what is not one row of probabilities for each sample.

    Args:
        name: what `probabilities` are, for the message.
        probabilities: what to check.
        shape: (samples, classes) that they must have.

    Raises:
        DataError: the shape or type is another, or a row does not sum to 1.
    """
    if probabilities.shape != shape or not np.issubdtype(probabilities.dtype, np.floating):
        raise DataError(
            f"{name}: expected floats of shape (samples, classes) = {shape},"
            f" got shape {probabilities.shape}, {probabilities.dtype}"
        )
    # half precision sums to 1 only roughly
    tolerance = max(1e-3, float(np.finfo(probabilities.dtype).eps) ** 0.5)
    sums = probabilities.sum(axis=1, dtype=np.float64)
    wrong = ~((np.abs(sums - 1.0) <= tolerance) & (probabilities >= 0.0).all(axis=1))  # NaN too
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{name}: expected rows of numbers from 0 to 1 that sum to 1; row {row} sums"
            f" to {sums[row]:.6g} (logits need a softmax first)"
        )
