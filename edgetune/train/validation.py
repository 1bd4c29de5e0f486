"""A split measured in the middle of training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgetune.data import Target
from edgetune.tasks import TaskModel
from edgetune.tasks.metrics import classification_report
from edgetune.tasks.multilabel import label_report
from edgetune.tasks.regression import regression_report
from edgetune.tasks.targets import plain_losses
from edgetune.train.engine import Engine
from edgetune.train.feeding import Feeder


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured.

    values: "loss", without class weights and smoothing, and of classes "accuracy" and "f1_macro";
    of several labels also "f1_micro" and "mean_average_precision"; of numbers instead "mae" and
    "rmse", in their own unit, "r2" and "pearson".
    """

    values: Mapping[str, float]


def measure(engine: Engine, feed: Feeder) -> Measured:
    """Return how well the network does, the same whatever the number of processes.

    Every process calls it, within `engine.evaluating()`.
    """
    samples = len(feed.samples)
    found: list[tuple[np.ndarray, ...]] = []
    with torch.inference_mode():
        for batch in feed.epoch(0):
            tensors = dict(batch.tensors)
            targets = tensors.pop("labels")
            logits = engine.logits(tensors).float()
            losses = plain_losses(logits, targets, engine.task.target)
            if batch.counts:
                parts = (losses.double(), targets, _ANSWERS[engine.task.target](logits))
                found.append((batch.indices, *(p.cpu().numpy() for p in parts)))
    columns: list[np.ndarray | None] = [None, None, None]
    for share in engine.machine.gather(found):
        for indices, *values in share:
            for at, value in enumerate(values):
                column = columns[at]
                if column is None:
                    column = columns[at] = np.empty((samples, *value.shape[1:]))
                column[indices] = value
    loss, truth, predicted = columns
    assert loss is not None
    assert truth is not None
    assert predicted is not None
    metrics = _METRICS[engine.task.target](truth, predicted, engine.task)
    return Measured(values={"loss": float(loss.mean()), **metrics})


# what of the logits the metrics need
_ANSWERS: Mapping[Target, Callable[[Tensor], Tensor]] = {
    "classes": lambda logits: logits.argmax(-1),
    "multilabel": lambda logits: logits.sigmoid(),
    "values": lambda logits: logits.squeeze(1),
}


def _of_classes(truth: np.ndarray, predicted: np.ndarray, task: TaskModel) -> dict[str, float]:
    report = classification_report(
        truth.astype(np.int64), predicted.astype(np.int64), task.labels, resamples=1
    )
    return {"accuracy": report.accuracy.value, "f1_macro": report.f1_macro.value}


def _of_labels(truth: np.ndarray, predicted: np.ndarray, task: TaskModel) -> dict[str, float]:
    report = label_report(truth > 0, predicted, task.labels, resamples=1)
    precision = report.mean_average_precision
    return {
        "accuracy": report.accuracy.value,
        "f1_macro": report.f1_macro.value,
        "f1_micro": report.f1_micro.value,
        **({} if precision is None else {"mean_average_precision": precision.value}),
    }


def _of_values(truth: np.ndarray, predicted: np.ndarray, task: TaskModel) -> dict[str, float]:
    assert task.scale is not None
    mean, std = task.scale.mean, task.scale.std
    report = regression_report(mean + std * truth, mean + std * predicted, resamples=1)
    found = {"mae": report.mae, "rmse": report.rmse, "r2": report.r2, "pearson": report.pearson}
    return {name: interval.value for name, interval in found.items()}


_METRICS: Mapping[Target, Callable[[np.ndarray, np.ndarray, TaskModel], dict[str, float]]] = {
    "classes": _of_classes,
    "multilabel": _of_labels,
    "values": _of_values,
}
