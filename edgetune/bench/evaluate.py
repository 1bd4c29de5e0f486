"""Accuracy of a run (torch) or of a bundle (the device runtime) on labelled data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from edgetune.data import Split, read_split
from edgetune.errors import ConfigError, DataError
from edgetune.runtime.manifest import MANIFEST_NAME, Evaluation, Metric
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.records import nearest
from edgetune.tasks import Kind, TaskModel, task_kind
from edgetune.tasks.metrics import ClassificationReport, Interval, classification_report

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
    def predicted(self) -> IntArray:
        """The most probable label of each sample."""
        return cast("IntArray", self.probabilities.argmax(axis=1))

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


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A finished evaluation: what was measured, and the facts to print beside it."""

    answers: Answers
    report: ClassificationReport
    facts: Mapping[str, str]
    history: list[dict[str, float]]


def evaluate(
    path: Path, *, split: str = "", data: str = "", progress: Progress | None = None,
    input_column: str = "", label_column: str = "",
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

    Raises:
        ConfigError: `path` is neither run nor bundle, or `data` is missing.
        DataError: the data has labels that the model has not.
    """
    if (path / MANIFEST_NAME).is_file() or path.is_file():  # a folder, or one zip
        model = EdgeModel.load(path, check="full")
        if not data:
            raise ConfigError(f"{path}: a bundle holds no data; name some with --data")
        kind = task_kind(model.manifest.task)
        chosen = read_split(
            Path(data), kind=kind, input_column=input_column or kind,
            label_column=label_column or "label", name=split or "test",
        )  # fmt: skip
        answers = answer_bundle(model, chosen, progress)
        facts = {
            "bundle": f"{model.manifest.name}, {model.manifest.precision}, for"
            f" {model.manifest.profile}",
            "measured through": "the device runtime (onnxruntime)",
        }
        history: list[dict[str, float]] = []
    else:
        # torch is needed from here on
        from edgetune.train.loop import read_history
        from edgetune.train.run import open_run

        run = open_run(path)
        chosen = _run_split(run, split, data, input_column, label_column)
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
    return Evaluated(answers=answers, report=answers.report(), facts=facts, history=history)


def answer_bundle(model: EdgeModel, split: Split, progress: Progress | None = None) -> Answers:
    """Predict a split with a bundle, through the device runtime."""
    truth = _truth(split, model.labels)
    rows: list[list[float]] = []
    for start in range(0, len(split.inputs), CHUNK):
        chunk = list(split.inputs[start : start + CHUNK])
        rows += [
            [result.scores[label] for label in model.labels]
            for result in model.predict(chunk, all_scores=True)
        ]
        if progress:
            progress(len(rows), len(split.inputs))
    return Answers(
        split=split,
        labels=model.labels,
        probabilities=np.array(rows, np.float64),
        truth=truth,
    )


def answers_of(probabilities: FloatArray, split: Split, labels: Sequence[str]) -> Answers:
    """Return kept probabilities, shape (samples, labels), as the answers they were."""
    return Answers(
        split=split,
        labels=tuple(labels),
        probabilities=probabilities,
        truth=_truth(split, labels),
    )


def answer_run(
    task: TaskModel, split: Split, labels: Sequence[str], progress: Progress | None = None
) -> Answers:
    """Predict a split with a task's torch network, one batch after the other."""
    import torch

    truth = _truth(split, labels)
    samples = task.samples(split, training=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = task.network.to(device).eval()
    order = range(len(samples))
    if samples.lengths is not None:
        order = sorted(order, key=samples.lengths.__getitem__)  # type: ignore[assignment]
    probabilities = np.zeros((len(samples), len(labels)))
    with torch.inference_mode():
        for start in range(0, len(samples), CHUNK):
            chosen = list(order[start : start + CHUNK])
            batch = task.collate([samples[0, i] for i in chosen])
            batch = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            logits = task.logits(network, batch).double()
            probabilities[chosen] = logits.softmax(-1).cpu().numpy()
            if progress:
                progress(start + len(chosen), len(samples))
    return Answers(split=split, labels=tuple(labels), probabilities=probabilities, truth=truth)


def _run_split(run: "Run", split: str, data: str, input_column: str, label_column: str) -> Split:
    from edgetune.train.run import run_dataset

    if data:
        kind: Kind = task_kind(run.config.task)
        return read_split(
            Path(data), kind=kind,
            input_column=input_column or run.config.input_column or kind,
            label_column=label_column or run.config.label_column, name=split or "test",
        )  # fmt: skip
    splits = run_dataset(run).splits
    name = split or ("test" if "test" in splits else "val")
    if name not in splits:
        raise ConfigError(f"split: the run's data has no {name!r}{nearest(name, splits)}")
    return splits[name]


def _truth(split: Split, labels: Sequence[str]) -> IntArray:
    index = {label: i for i, label in enumerate(labels)}
    if not split.labels:
        raise DataError(f"{split.name}: holds no samples")
    for label, where in zip(split.labels, split.where, strict=True):
        if label not in index:
            raise DataError(
                f"{where}: label {label!r} is none of the model's{nearest(label, index)}"
            )
    return cast("IntArray", np.array([index[label] for label in split.labels], np.int64))


def _metric(interval: Interval) -> Metric:
    return Metric(
        value=round(interval.value, 6), low=round(interval.low, 6), high=round(interval.high, 6)
    )


def worst_mistakes(answers: Answers, most: int = 24) -> list[dict[str, Any]]:
    """Return the most confident wrong answers: index, shown, truth, predicted, confidence."""
    wrong = np.flatnonzero(answers.predicted != answers.truth)
    confidence = answers.probabilities[wrong, answers.predicted[wrong]]
    chosen = wrong[np.argsort(-confidence, kind="stable")][:most]
    return [
        {
            "input": answers.split.inputs[i],
            "where": answers.split.where[i],
            "truth": answers.labels[answers.truth[i]],
            "predicted": answers.labels[answers.predicted[i]],
            "confidence": float(answers.probabilities[i, answers.predicted[i]]),
        }
        for i in chosen
    ]
