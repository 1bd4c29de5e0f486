"""The cloud half of each task: samples -> batches -> logits, and what its graph looks like."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError
from edgetune.runtime.records import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgetune.data import Split
    from edgetune.models.load import Loaded

Kind = Literal["text", "image"]

# name -> (what its samples are, where its cloud half lies)
TASKS: dict[str, tuple[Kind, str]] = {
    "image-classification": ("image", "edgetune.tasks.image_classification:ImageClassification"),
    "text-classification": ("text", "edgetune.tasks.text_classification:TextClassification"),
}


class Samples(Protocol):
    """A split, encoded: a torch map-style dataset whose keys are (epoch, index).

    `lengths` are the samples' lengths, for batches of like length; None where all are equal.
    """

    lengths: Sequence[int] | None

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return sample `index` as it is seen in `epoch` (augmentation depends on both)."""


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
    """A task with a network in it."""

    network: "nn.Module"
    labels: tuple[str, ...]

    def __init__(self, loaded: "Loaded", labels: Sequence[str], config: TrainConfig) -> None:
        """Keep the network and what its inputs need."""

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
    return TASKS[name][0]


def open_task(name: str, loaded: "Loaded", labels: Sequence[str], config: TrainConfig) -> TaskModel:
    """Return the cloud half of task `name` around a loaded network.

    Raises:
        ConfigError: there is no such task.
    """
    task_kind(name)
    module, _, attribute = TASKS[name][1].partition(":")
    model: TaskModel = getattr(importlib.import_module(module), attribute)(loaded, labels, config)
    return model
