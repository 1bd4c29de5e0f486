"""The material that rungs work with: float graphs, real samples, ranges, damage; made once."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime

from edgetune.data import Dataset
from edgetune.export.cache import Cache, code_key, key_of, model_key, split_key
from edgetune.export.graph import export_graph
from edgetune.export.records import Repair
from edgetune.profile import DeviceProfile
from edgetune.quantize.calibrate import Method, Range, calibrate
from edgetune.quantize.fuse import fuse
from edgetune.quantize.layers import Feeds, weight_layers
from edgetune.quantize.qdq import StaticPlan
from edgetune.quantize.sensitivity import Damage, Quantize, layer_damage
from edgetune.runtime.tasks import DeviceTask
from edgetune.tasks import TaskModel
from edgetune.train.run import Run

if TYPE_CHECKING:
    from edgetune.export.learning import Compiled, LearnPlan

# calibrating on more adds little; fewer leave the ranges of rare activations out
CALIBRATION_SAMPLES = 128
# damage and saturation are looked for on fewer: they are gone through once per layer
PROBE_SAMPLES = 16

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A float graph that can be quantized: the run's own, or a student's.

    task: its cloud half, which says what the device half needs.
    """

    name: str
    model: onnx.ModelProto
    key: str
    task: TaskModel


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a rung made of a source.

    max_batch, session: for the manifest. repairs: layer -> what keeps it from saturating.
    damage: (layer, operator, parameters, SQNR in dB) worst first, where it was measured.
    saturation: (layer, pairs that could, share of pair sums that did, worst error), before repair.
    kept_float: nodes left in float.
    compiled: where it is to learn, the graph that does, which `model` is, and its step.
    """

    model: onnx.ModelProto
    precision: str
    max_batch: int = 1
    session: Mapping[str, str] = field(default_factory=dict)
    repairs: Mapping[str, Repair] = field(default_factory=dict)
    damage: tuple[tuple[str, str, int, float], ...] = ()
    saturation: tuple[tuple[str, int, float, float], ...] = ()
    kept_float: tuple[str, ...] = ()
    compiled: "Compiled | None" = None


class CalibrationFeeds:
    """Training samples as the graph takes them, one a batch; starts anew when iterated."""

    def __init__(self, task: DeviceTask, inputs: tuple[str, ...], most: int) -> None:
        """Take up to `most` of `inputs`, evenly spread."""
        self._task = task
        self._inputs = [inputs[i] for i in spread(len(inputs), most)]

    def __iter__(self) -> Iterator[Feeds]:
        """Yield feeds, encoding each when its turn comes."""
        for value in self._inputs:
            yield self._task.stack([self._task.encode(value)])


class Workshop:
    """One export's material."""

    def __init__(
        self, run: Run, dataset: Dataset, profile: DeviceProfile, cache: Cache, say: Say
    ) -> None:
        """Keep what everything is made of; nothing is made yet."""
        self.run, self.dataset, self.profile = run, dataset, profile
        self.cache, self.say = cache, say
        self.learn: LearnPlan | None = None
        self._device_task: DeviceTask | None = None
        self._sources: dict[str, Source] = {}

    def use_device_task(self, task: DeviceTask) -> None:
        """Take the device half, which encodes samples; a first draft of the bundle has it."""
        self._device_task = task

    @property
    def device_task(self) -> DeviceTask:
        """The device half of the task."""
        assert self._device_task is not None
        return self._device_task

    def source(self, name: str, make: Callable[[], TaskModel]) -> Source:
        """Return the float graph of that name, exported when it is first asked for."""
        if name not in self._sources:
            task = make()
            model = export_graph(task.graph(self.run.family.output))
            model = fuse(model if self.learn is None else self.learn.prepared(model))
            self._sources[name] = Source(name=name, model=model, key=model_key(model), task=task)
        return self._sources[name]

    def feeds(self, most: int = CALIBRATION_SAMPLES) -> CalibrationFeeds:
        """Return training samples, encoded."""
        return CalibrationFeeds(self.device_task, self.dataset.splits["train"].inputs, most)

    @functools.cached_property
    def data_key(self) -> str:
        """Hash of what calibration and students see."""
        return split_key(self.dataset.splits["train"])

    @functools.cached_property
    def run_key(self) -> str:
        """Hash of the trained network."""
        digest = hashlib.sha256(repr(self.run.config).encode())
        for name, tensor in sorted(self.run.task.network.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def ranges(self, source: Source, plan: StaticPlan, method: Method) -> dict[str, Range]:
        """Return the calibrated range of every tensor of a plan."""
        key = key_of(
            code_key(), source.key, self.data_key, method, list(plan.tensors),
            onnxruntime.__version__,
        )  # fmt: skip

        def make() -> Any:
            self.say(f"calibrating ({method}) on {CALIBRATION_SAMPLES} training samples")
            found = calibrate(source.model, self.feeds(), plan.tensors, method=method)
            return {name: [r.low, r.high] for name, r in found.items()}

        stored, _ = self.cache.json("ranges", key, make)
        return {name: Range(low=low, high=high) for name, (low, high) in stored.items()}

    def damage(self, source: Source, kind: str, quantize: Quantize) -> list[Damage]:
        """Return what each layer's quantization costs, worst first."""
        key = key_of(code_key(), source.key, self.data_key, kind, onnxruntime.__version__)

        def make() -> Any:
            self.say("measuring each layer's damage")
            feeds = list(self.feeds(PROBE_SAMPLES))
            found = layer_damage(source.model, quantize, feeds)
            return [[d.layer.node, d.parameters, d.noise] for d in found]

        stored, _ = self.cache.json("damage", key, make)
        layers = {layer.node: layer for layer in weight_layers(source.model)}
        return [
            Damage(layer=layers[node], parameters=parameters, noise=noise)
            for node, parameters, noise in stored
        ]

    def folder(self, kind: str, key: str) -> Path:
        """Return a folder in the cache for what resumes by itself."""
        return self.cache.path(kind, key)


def spread(count: int, most: int) -> list[int]:
    """Return up to `most` indices, evenly over range(count)."""
    if count <= most:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, most).round()]
