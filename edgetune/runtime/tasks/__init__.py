"""The device half of each task: raw sample -> arrays, outputs -> result. One row a task."""

import importlib
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from edgetune.errors import IntegrityError
from edgetune.runtime.bundle import Bundle
from edgetune.runtime.records import nearest

TASKS = {
    "image-classification": "edgetune.runtime.tasks.image_classification:ImageClassification",
    "text-classification": "edgetune.runtime.tasks.text_classification:TextClassification",
}


class DeviceTask(Protocol):
    """What the runtime asks of a task. An encoded sample has no batch axis."""

    def __init__(self, bundle: Bundle) -> None:
        """Read what the task needs from the bundle."""

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
        self, outputs: dict[str, Any], labels: Sequence[str], *, all_scores: bool
    ) -> list[Any]:
        """Turn a batch's outputs, whose logits are of `labels`, into one result a sample."""


def open_task(bundle: Bundle) -> DeviceTask:
    """Return the device half of the bundle's task.

    Raises:
        IntegrityError: the manifest names a task that this edgetune does not have.
    """
    name = bundle.manifest.task
    if name not in TASKS:
        raise IntegrityError(f"the manifest names task {name!r:.200}{nearest(name, TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    task: DeviceTask = getattr(importlib.import_module(module), attribute)(bundle)
    return task
