"""The device half of each task: raw sample -> arrays, outputs -> result. One row a task."""

import importlib
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

from edgetune.errors import IntegrityError
from edgetune.runtime.bundle import Bundle
from edgetune.runtime.records import nearest

_IMAGES = "edgetune.runtime.tasks.image_classification:ImageClassification"
_TEXTS = "edgetune.runtime.tasks.text_classification:TextClassification"
_CLASSES = "edgetune.runtime.tasks.classification:Classes"
_LABELS = "edgetune.runtime.tasks.multilabel:MultiLabels"
_VALUES = "edgetune.runtime.tasks.regression:Values"


class Row(NamedTuple):
    """A task: what encodes its samples, and what turns the graph's outputs into results."""

    half: str
    answers: str


TASKS = {
    "image-classification": Row(_IMAGES, _CLASSES),
    "image-multilabel-classification": Row(_IMAGES, _LABELS),
    "image-regression": Row(_IMAGES, _VALUES),
    "text-classification": Row(_TEXTS, _CLASSES),
    "text-multilabel-classification": Row(_TEXTS, _LABELS),
    "text-regression": Row(_TEXTS, _VALUES),
}


class DeviceTask(Protocol):
    """What the runtime asks of a task. An encoded sample has no batch axis."""

    def __init__(self, bundle: Bundle, answers: Any) -> None:
        """Read what the task needs from the bundle; `answers` is the type that gives results."""

    def is_many(self, value: Any) -> bool:
        """Say whether `value` is a sequence of samples rather than one."""

    def golden(self, array: Any, where: str) -> Any:
        """Return the raw sample that a golden's array holds; `where` names it in an error."""

    def encode(self, sample: Any) -> dict[str, Any]:
        """Turn one raw sample into the graph's input arrays."""

    def group(self, encoded: dict[str, Any]) -> Hashable:
        """Return a key; samples of equal key can share a batch."""

    def stack(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join encoded samples of one group into a batch, axis 0 added."""

    def results(
        self,
        outputs: dict[str, Any],
        labels: Sequence[str],
        *,
        all_scores: bool,
        learned: bool = False,
    ) -> list[Any]:
        """Turn a batch's outputs, whose logits are of `labels`, into one result a sample.

        `learned`: a head that a device has learned gave them, not the bundle's own.
        """


def open_task(bundle: Bundle) -> DeviceTask:
    """Return the device half of the bundle's task.

    Raises:
        IntegrityError: the manifest names a task that this edgetune does not have.
    """
    name = bundle.manifest.task
    if name not in TASKS:
        raise IntegrityError(f"the manifest names task {name!r:.200}{nearest(name, TASKS)}")
    row = TASKS[name]
    task: DeviceTask = _load(row.half)(bundle, _load(row.answers))
    return task


def has_classes(name: str) -> bool:
    """Say whether task `name` gives one class a sample, which watching and learning need."""
    return name in TASKS and TASKS[name].answers == _CLASSES


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
