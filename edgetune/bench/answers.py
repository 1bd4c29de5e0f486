"""What was predicted for a split, where labels are several at once, or numbers.

`edgetune.bench.evaluate.Answers` is the same of one class a sample; `AnyAnswers` there is any.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from edgetune.data import Split, Target, encode_targets
from edgetune.runtime.manifest import Evaluation, Manifest, Metric
from edgetune.tasks.metrics import Interval
from edgetune.tasks.multilabel import THRESHOLD, LabelReport, label_report
from edgetune.tasks.regression import RegressionReport, regression_report

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class LabelAnswers:
    """What several labels at once were predicted to be.

    probabilities: of each label for itself, (samples, labels). truth: the same shape. threshold:
    from which probability on a label is given, (labels,).
    """

    split: Split
    labels: tuple[str, ...]
    probabilities: FloatArray
    truth: BoolArray
    threshold: FloatArray

    @property
    def raw(self) -> FloatArray:
        """What the answers can be made of again."""
        return self.probabilities

    @property
    def predicted(self) -> BoolArray:
        """Which labels are given, (samples, labels)."""
        return self.probabilities >= self.threshold

    @property
    def right(self) -> BoolArray:
        """Whether all labels of a sample are right, (samples,)."""
        return cast("BoolArray", (self.predicted == self.truth).all(axis=1))

    @property
    def quality(self) -> float:
        """The share of samples that are right; more is better."""
        return float(self.right.mean())

    @property
    def accuracy(self) -> Interval:
        """The same with its interval."""
        return self.report().accuracy

    def report(self) -> LabelReport:
        """Return every metric with its bootstrap interval."""
        return label_report(self.truth, self.probabilities, self.labels, thresholds=self.threshold)

    def evaluation(self) -> Evaluation:
        """Return the headline metrics as a manifest holds them."""
        report = self.report()
        found = {"accuracy": report.accuracy, "f1_micro": report.f1_micro}
        found["f1_macro"] = report.f1_macro
        if report.mean_average_precision is not None:
            found["mean_average_precision"] = report.mean_average_precision
        return _evaluation(self.split, report.samples, found)

    def named(self, row: BoolArray) -> str:
        """Return the names of a row's labels, with the split's separator between them."""
        return self.split.separator.join(
            label for label, given in zip(self.labels, row, strict=True) if given
        )


@dataclass(frozen=True, kw_only=True)
class ValueAnswers:
    """What numbers were predicted to be, in their own unit: predicted and truth, (samples,)."""

    split: Split
    labels: tuple[str, ...]
    predicted: FloatArray
    truth: FloatArray

    @property
    def raw(self) -> FloatArray:
        """What the answers can be made of again."""
        return self.predicted

    @property
    def quality(self) -> float:
        """R2: the share of the variance that is explained; more is better."""
        return regression_report(self.truth, self.predicted, resamples=1).r2.value

    @property
    def accuracy(self) -> None:
        """A number is not right or wrong."""
        return

    def report(self) -> RegressionReport:
        """Return every metric with its bootstrap interval."""
        return regression_report(self.truth, self.predicted)

    def evaluation(self) -> Evaluation:
        """Return the headline metrics as a manifest holds them."""
        report = self.report()
        found = {"mae": report.mae, "rmse": report.rmse, "r2": report.r2}
        return _evaluation(self.split, report.samples, found | {"pearson": report.pearson})


def label_answers(
    probabilities: npt.NDArray[Any],
    split: Split,
    labels: Sequence[str],
    threshold: FloatArray | None = None,
) -> LabelAnswers:
    """Return probabilities, shape (samples, labels), as answers.

    Args:
        probabilities: of each label for itself.
        split: that they are of.
        labels: their names.
        threshold: from which probability on a label is given, (labels,); None: 0.5 for all.

    Raises:
        DataError: the split has no samples, or a label that is none of `labels`.
    """
    return LabelAnswers(
        split=split,
        labels=tuple(labels),
        probabilities=probabilities.astype(np.float64),
        truth=encode_targets(split, labels) > 0,
        threshold=np.full(len(labels), THRESHOLD) if threshold is None else threshold,
    )


def thresholds_of(manifest: Manifest) -> FloatArray | None:
    """Return a bundle's thresholds, (labels,); None where it states none."""
    stated = manifest.options.get("thresholds")
    if not stated:
        return None
    return np.array([stated.get(label, THRESHOLD) for label in manifest.labels], np.float64)


def value_answers(predicted: npt.NDArray[Any], split: Split, labels: Sequence[str]) -> ValueAnswers:
    """Return values, shape (samples,), as answers.

    Raises:
        DataError: the split has no samples, or one without a value.
    """
    return ValueAnswers(
        split=split,
        labels=tuple(labels),
        predicted=predicted.astype(np.float64),
        truth=encode_targets(split, labels),
    )


def worst_of_labels(answers: LabelAnswers, most: int) -> list[int]:
    """Return the samples with a wrong label, those of the largest log loss first."""
    from edgetune.tasks.multilabel import log_losses

    losses = log_losses(answers.truth, answers.probabilities).sum(axis=1)
    wrong = np.flatnonzero(~answers.right)
    return [int(i) for i in wrong[np.argsort(-losses[wrong], kind="stable")][:most]]


def worst_of_values(answers: ValueAnswers, most: int) -> list[int]:
    """Return the samples of the largest absolute error."""
    errors = np.abs(answers.predicted - answers.truth)
    return [int(i) for i in np.argsort(-errors, kind="stable")[:most]]


def _evaluation(split: Split, samples: int, found: Mapping[str, Interval]) -> Evaluation:
    metrics = {
        name: Metric(value=round(i.value, 6), low=round(i.low, 6), high=round(i.high, 6))
        for name, i in found.items()
    }
    return Evaluation(split=split.name, samples=samples, metrics=metrics)


# how the device's results and the network's outputs become what answers are made of
ROW_OF_RESULT: Mapping[Target, Callable[[Any, Sequence[str]], Any]] = {
    "classes": lambda result, labels: [result.scores[label] for label in labels],
    "multilabel": lambda result, labels: [result.scores[label] for label in labels],
    "values": lambda result, labels: result.value,  # noqa: ARG005
}
