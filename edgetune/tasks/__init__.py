"""The cloud half of each task: samples -> batches -> logits, and what its graph looks like."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from edgetune.config import SelectionMetric, TrainConfig
from edgetune.data import Kind as Kind
from edgetune.data import Scale, Target
from edgetune.errors import ConfigError
from edgetune.runtime.records import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgetune.data import Split
    from edgetune.models.load import Loaded

_IMAGES = "edgetune.tasks.image_classification:ImageClassification"
_TEXTS = "edgetune.tasks.text_classification:TextClassification"


class Row(NamedTuple):
    """A task: what its samples are, where its cloud half lies, and what its labels are."""

    kind: Kind
    half: str
    target: Target


TASKS: dict[str, Row] = {
    "image-classification": Row("image", _IMAGES, "classes"),
    "image-multilabel-classification": Row("image", _IMAGES, "multilabel"),
    "image-regression": Row("image", _IMAGES, "values"),
    "text-classification": Row("text", _TEXTS, "classes"),
    "text-multilabel-classification": Row("text", _TEXTS, "multilabel"),
    "text-regression": Row("text", _TEXTS, "values"),
}

# what may pick the best checkpoint; the first is what "auto" stands for
METRICS: dict[Target, tuple[SelectionMetric, ...]] = {
    "classes": ("accuracy", "f1_macro", "loss"),
    "multilabel": ("f1_macro", "accuracy", "loss"),
    "values": ("loss", "mae", "r2"),
}
# of these, less is better
MINIMIZED: frozenset[SelectionMetric] = frozenset({"loss", "mae"})


class Samples(Protocol):
    """A split, encoded: a torch map-style dataset whose keys are (epoch, index).

    `lengths` are the samples' lengths, for batches of like length; None where all are equal.
    `views` is in how many forms training sees a sample: 1 without augmentation, None where it
    is a new one every epoch.
    """

    lengths: Sequence[int] | None
    views: int | None

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return sample `index` as it is seen in `epoch` (augmentation depends on both)."""

    def view(self, epoch: int, index: int) -> int:
        """Return which of the sample's views `epoch` sees."""

    def batch(
        self, indices: Sequence[int], *, epoch: int = 0, view: int | None = None
    ) -> "dict[str, Tensor]":
        """Return samples as a batch, as seen in `epoch`, or all in the same `view`."""

    def outline(self, indices: Sequence[int]) -> "dict[str, Tensor]":
        """Return a batch without what is costly to make: masks, shapes and labels are right."""


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """What the exporter needs of a task.

    module: raw inputs -> (logits, features) or (logits,); preprocessing inside.
    inputs: name -> example of the raw input, batch axis first.
    free: name -> {axis: name of the free dimension}.
    """

    module: "nn.Module"
    inputs: dict[str, "Tensor"]
    free: dict[str, dict[int, str]]


class TaskModel(Protocol):
    """A task with a network in it.

    target: what its labels are. scale: of values, how they are learned; the network gives them
    with mean 0 and standard deviation 1.
    """

    network: "nn.Module"
    labels: tuple[str, ...]
    target: Target
    scale: Scale | None

    def __init__(
        self,
        loaded: "Loaded",
        labels: Sequence[str],
        config: TrainConfig,
        *,
        target: Target = "classes",
        scale: Scale | None = None,
    ) -> None:
        """Keep the network and what its inputs and labels need."""

    def samples(self, split: "Split", *, training: bool) -> Samples:
        """Encode a split; augmentation only where `training`."""

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, "Tensor"]:
        """Join samples into a batch of the network's inputs and "labels"."""

    def logits(self, network: "nn.Module", batch: dict[str, "Tensor"]) -> "Tensor":
        """Return logits, shape (batch, labels), of a batch without its "labels"."""

    def graph(self, family_output: str) -> GraphSpec:
        """Return the module to export, made of a copy of the network."""

    def device_options(self) -> dict[str, Any]:
        """Return the manifest's options for the device half."""

    def device_files(self) -> dict[str, bytes]:
        """Return the files that the device half needs in the bundle."""


def task_kind(name: str) -> Kind:
    """Return what the samples of task `name` are.

    Raises:
        ConfigError: there is no such task.
    """
    if name not in TASKS:
        raise ConfigError(f"task: no task {name!r}{nearest(name, TASKS)}")
    return TASKS[name].kind


def task_target(name: str) -> Target:
    """Return what the labels of task `name` are.

    Raises:
        ConfigError: there is no such task.
    """
    task_kind(name)
    return TASKS[name].target


def selection_metric(config: TrainConfig) -> SelectionMetric:
    """Return what picks the best checkpoint: what the config names, or the task's own.

    Raises:
        ConfigError: the task has no such metric, or there is no such task.
    """
    known = METRICS[task_target(config.task)]
    if config.metric == "auto":
        return known[0]
    if config.metric not in known:
        raise ConfigError(
            f"metric {config.metric!r} does not fit {config.task}; it has {', '.join(known)}"
        )
    return config.metric


def open_task(
    name: str,
    loaded: "Loaded",
    labels: Sequence[str],
    config: TrainConfig,
    *,
    scale: Scale | None = None,
) -> TaskModel:
    """Return the cloud half of task `name` around a loaded network.

    Args:
        name: of the task.
        loaded: the network, with an output a label.
        labels: their names.
        config: of the run.
        scale: of values, how they are learned; `edgetune.data.scale_of` the training split.

    Raises:
        ConfigError: there is no such task, or the config does not fit what its labels are.
    """
    target = task_target(name)
    if target == "values" and (config.mixup or config.cutmix):
        raise ConfigError("mixup and cutmix mix labels, which do not fit values; set both to 0")
    module, _, attribute = TASKS[name].half.partition(":")
    model: TaskModel = getattr(importlib.import_module(module), attribute)(
        loaded, labels, config, target=target, scale=scale
    )
    return model
