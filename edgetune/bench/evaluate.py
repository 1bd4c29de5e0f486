"""Accuracy of a run (torch) or of a bundle (the device runtime) on labelled data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from edgetune.bench.answers import (
    ROW_OF_RESULT,
    LabelAnswers,
    ValueAnswers,
    label_answers,
    thresholds_of,
    value_answers,
    worst_of_labels,
    worst_of_values,
)
from edgetune.data import Kind, Split, encode_targets, load_dataset, read_split
from edgetune.data.split import LABEL_SEPARATOR
from edgetune.errors import ConfigError
from edgetune.runtime.manifest import MANIFEST_NAME, Abstention, Evaluation, Metric
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.records import nearest
from edgetune.tasks import TaskModel, task_kind, task_target
from edgetune.tasks.metrics import ClassificationReport, Interval, classification_report
from edgetune.tasks.multilabel import LabelReport
from edgetune.tasks.proportions import exact_interval
from edgetune.tasks.regression import RegressionReport
from edgetune.tasks.slices import MIN_SAMPLES, SliceReport, slice_report

if TYPE_CHECKING:
    from edgetune.train.run import Run

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]
# samples handed to the runtime at a time, so that images need not all be in memory
CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was predicted for a split.

    probabilities: shape (samples, labels). truth, predicted: indices of labels, (samples,).
    """

    split: Split
    labels: tuple[str, ...]
    probabilities: FloatArray
    truth: IntArray

    @property
    def raw(self) -> FloatArray:
        """What the answers can be made of again."""
        return self.probabilities

    @property
    def predicted(self) -> IntArray:
        """The most probable label of each sample."""
        return cast("IntArray", self.probabilities.argmax(axis=1))

    @property
    def confidence(self) -> FloatArray:
        """The score of each answer, (samples,)."""
        return cast("FloatArray", self.probabilities.max(axis=1))

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether each answer is right, (samples,)."""
        return cast("npt.NDArray[np.bool_]", self.predicted == self.truth)

    @property
    def quality(self) -> float:
        """The share of right answers; more is better."""
        return float(np.mean(self.right))

    @property
    def accuracy(self) -> Interval:
        """The same with its interval."""
        return self.report().accuracy

    def report(self) -> ClassificationReport:
        """Return every metric with its bootstrap interval."""
        return classification_report(
            self.truth, self.predicted, self.labels, probabilities=self.probabilities
        )

    def evaluation(self) -> Evaluation:
        """Return the headline metrics as a manifest holds them."""
        report = self.report()
        return Evaluation(
            split=self.split.name,
            samples=report.samples,
            metrics={"accuracy": _metric(report.accuracy), "f1_macro": _metric(report.f1_macro)},
        )


AnyAnswers = Answers | LabelAnswers | ValueAnswers
AnyReport = ClassificationReport | LabelReport | RegressionReport


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The answers that a bundle keeps, of the score `threshold` and above.

    coverage: their share of the samples. accuracy: of them, None where none is kept; with its
    exact interval (Clopper & Pearson 1934). wanted: the accuracy that the threshold was chosen for.
    """

    threshold: float
    wanted: float
    answered: int
    coverage: float
    accuracy: Interval | None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A finished evaluation: what was measured, and the facts to print beside it.

    slices: one a column that was asked for. kept: of a bundle that abstains.
    """

    answers: AnyAnswers
    report: AnyReport
    facts: Mapping[str, str]
    history: list[dict[str, float]]
    slices: tuple[SliceReport, ...] = ()
    kept: Kept | None = None


def evaluate(
    path: Path, *, split: str = "", data: str = "", progress: Progress | None = None,
    input_column: str = "", label_column: str = "", slices: Sequence[str] = (),
    min_slice: int = MIN_SAMPLES, label_separator: str = "",
) -> Evaluated:  # fmt: skip
    """Measure the run or the bundle in folder `path`.

    Args:
        path: a run folder or a bundle.
        split: of the run's own data: "train", "val" or "test" (the default is test where there
            is one, else val). With `data` it only names what is measured.
        data: labelled data to measure on; needed for a bundle, which knows of none.
        progress: called with (done, all) samples.
        input_column: of `data`, where it is a table.
        label_column: of `data`, where it is a table.
        slices: columns of the table; each group of samples of one value is measured by itself.
        min_slice: groups of fewer samples are marked, and take no part in the gap between groups.
        label_separator: of `data`, where a sample may have several labels.

    Raises:
        ConfigError: `path` is neither run nor bundle, `data` is missing, or `slices` are asked for
            and the data is a folder, or labels are not one class each.
        DataError: the data has labels that the model has not, or lacks a column.
    """
    if min_slice < 1:
        raise ConfigError(f"min_slice: expected 1 or more, got {min_slice}")
    columns = tuple(dict.fromkeys(slices))
    abstention: Abstention | None = None
    if (path / MANIFEST_NAME).is_file() or path.is_file():  # a folder, or one zip
        model = EdgeModel.load(path, check="full")
        if not data:
            raise ConfigError(f"{path}: a bundle holds no data; name some with --data")
        kind = task_kind(model.manifest.task)
        chosen = read_split(
            Path(data), kind=kind, input_column=input_column or kind,
            label_column=label_column or "label", name=split or "test", columns=columns,
            target=task_target(model.manifest.task), separator=label_separator or LABEL_SEPARATOR,
        )  # fmt: skip
        answers = answer_bundle(model, chosen, progress)
        abstention = model.manifest.abstention
        facts = {
            "bundle": f"{model.manifest.name}, {model.manifest.precision}, for"
            f" {model.manifest.profile}",
            "measured through": "the device runtime (onnxruntime)",
        }
        history: list[dict[str, float]] = []
    else:
        # torch is needed from here on
        from edgetune.train.history import read_history
        from edgetune.train.run import open_run

        run = open_run(path)
        chosen = _run_split(run, split, data, input_column, label_column, columns, label_separator)
        answers = answer_run(run.task, chosen, run.record.labels, progress)
        facts = {
            "run": path.name,
            "model": run.config.model,
            "method": run.config.method,
            "best epoch": str(run.record.best_epoch),
            "measured through": "torch",
        }
        history = read_history(path)
    facts |= {"data": data or str(path / "config.toml"), "split": chosen.name}
    return Evaluated(
        answers=answers,
        report=answers.report(),
        facts=facts,
        history=history,
        slices=_slices(answers, columns, min_slice),
        kept=None
        if abstention is None or not isinstance(answers, Answers)
        else _kept(answers, abstention),
    )


def answer_bundle(model: EdgeModel, split: Split, progress: Progress | None = None) -> AnyAnswers:
    """Predict a split with a bundle, through the device runtime."""
    encode_targets(split, model.labels)  # a label that the model lacks is said before the work
    row_of = ROW_OF_RESULT[split.target]
    rows: list[Any] = []
    for start in range(0, len(split.inputs), CHUNK):
        chunk = list(split.inputs[start : start + CHUNK])
        rows += [row_of(r, model.labels) for r in model.predict(chunk, all_scores=True)]
        if progress:
            progress(len(rows), len(split.inputs))
    raw = np.array(rows, np.float64)
    return answers_of(raw, split, model.labels, threshold=thresholds_of(model.manifest))


def answers_of(
    raw: FloatArray,
    split: Split,
    labels: Sequence[str],
    *,
    threshold: FloatArray | None = None,
) -> AnyAnswers:
    """Return kept answers as what they were.

    Args:
        raw: probabilities, shape (samples, labels), or values, (samples,).
        split: that they are of; it says what its labels are.
        labels: the model's.
        threshold: of several labels at once, (labels,); None: 0.5 for all.

    Raises:
        DataError: the split has no samples, or a label that is none of `labels`.
    """
    if split.target == "values":
        return value_answers(raw, split, labels)
    if split.target == "multilabel":
        return label_answers(raw, split, labels, threshold)
    return Answers(
        split=split,
        labels=tuple(labels),
        probabilities=raw,
        truth=encode_targets(split, labels),
    )


def answer_run(
    task: TaskModel, split: Split, labels: Sequence[str], progress: Progress | None = None
) -> AnyAnswers:
    """Predict a split with a task's torch network, one batch after the other."""
    import torch

    encode_targets(split, labels)
    samples = task.samples(split, training=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = task.network.to(device).eval()
    order = range(len(samples))
    if samples.lengths is not None:
        order = sorted(order, key=samples.lengths.__getitem__)  # type: ignore[assignment]
    raw = np.zeros((len(samples), len(labels)))
    with torch.inference_mode():
        for start in range(0, len(samples), CHUNK):
            chosen = list(order[start : start + CHUNK])
            batch = task.collate([samples[0, i] for i in chosen])
            batch = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            logits = task.logits(network, batch).double()
            shares = logits
            if task.target != "values":
                shares = logits.softmax(-1) if task.target == "classes" else logits.sigmoid()
            raw[chosen] = shares.cpu().numpy()
            if progress:
                progress(start + len(chosen), len(samples))
    if task.scale is not None:
        raw = task.scale.mean + task.scale.std * raw[:, 0]
    return answers_of(raw, split, labels)


def _slices(answers: AnyAnswers, columns: Sequence[str], min_slice: int) -> tuple[SliceReport, ...]:
    if not columns:
        return ()
    if not isinstance(answers, Answers):
        raise ConfigError("slices: groups are only measured where each sample has one class")
    return tuple(
        slice_report(
            column, answers.split.columns[column], answers.truth, answers.predicted,
            answers.labels, min_samples=min_slice,
        )
        for column in columns
    )  # fmt: skip


def _kept(answers: Answers, abstention: Abstention) -> Kept:
    chosen = answers.confidence >= abstention.threshold
    answered = int(chosen.sum())
    right = int(answers.right[chosen].sum())
    return Kept(
        threshold=abstention.threshold,
        wanted=abstention.accuracy,
        answered=answered,
        coverage=answered / len(chosen),
        accuracy=exact_interval(right, answered) if answered else None,
    )


def _run_split(
    run: "Run", split: str, data: str, input_column: str, label_column: str,
    columns: tuple[str, ...], label_separator: str,
) -> Split:  # fmt: skip
    from edgetune.train.run import data_source, run_dataset

    if data:
        kind: Kind = task_kind(run.config.task)
        return read_split(
            Path(data), kind=kind,
            input_column=input_column or run.config.input_column or kind,
            label_column=label_column or run.config.label_column, name=split or "test",
            columns=columns, target=task_target(run.config.task),
            separator=label_separator or run.config.label_separator,
        )  # fmt: skip
    splits = run_dataset(run).splits
    name = split or ("test" if "test" in splits else "val")
    if name not in splits:
        raise ConfigError(f"split: the run's data has no {name!r}{nearest(name, splits)}")
    if not columns:
        return splits[name]
    # as training saw it, some samples may have been left out: the columns are found by place
    whole = load_dataset(replace(data_source(run.config), columns=columns)).splits[name]
    rows = {where: i for i, where in enumerate(whole.where)}
    return whole.take(rows[where] for where in splits[name].where)


def _metric(interval: Interval) -> Metric:
    return Metric(
        value=round(interval.value, 6), low=round(interval.low, 6), high=round(interval.high, 6)
    )


def worst_mistakes(answers: AnyAnswers, most: int = 24) -> list[dict[str, Any]]:
    """Return the worst answers: input, where, truth, predicted and, of one class, confidence.

    Of one class, wrong ones of the most confidence; of several labels, those with one wrong and of
    the largest log loss; of numbers, those furthest off.
    """
    if isinstance(answers, LabelAnswers):
        return [
            _shown(answers, i, answers.named(answers.truth[i]), answers.named(answers.predicted[i]))
            for i in worst_of_labels(answers, most)
        ]
    if isinstance(answers, ValueAnswers):
        return [
            _shown(answers, i, f"{answers.truth[i]:.6g}", f"{answers.predicted[i]:.6g}")
            for i in worst_of_values(answers, most)
        ]
    wrong = np.flatnonzero(answers.predicted != answers.truth)
    confidence = answers.probabilities[wrong, answers.predicted[wrong]]
    chosen = wrong[np.argsort(-confidence, kind="stable")][:most]
    return [
        {
            **_shown(
                answers, i, answers.labels[answers.truth[i]], answers.labels[answers.predicted[i]]
            ),
            "confidence": float(answers.probabilities[i, answers.predicted[i]]),
        }
        for i in chosen
    ]


def _shown(answers: AnyAnswers, index: int, truth: str, predicted: str) -> dict[str, Any]:
    split = answers.split
    return {
        "input": split.inputs[index],
        "where": split.where[index],
        "truth": truth,
        "predicted": predicted,
    }
