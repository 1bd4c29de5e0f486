"""What a bundle needs to learn on the device: the factory's statistics, and a training step.

The step is compiled of the very graph that ships, quantized or not, and is held against torch
before it may ship.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from edgetune.autodiff.backward import Gradients
from edgetune.autodiff.learnable import Learnable, LearnRequest, prepare, release
from edgetune.autodiff.step import Optimizer, Step, compile_step
from edgetune.data import Split
from edgetune.errors import ConfigError
from edgetune.export.graph import save_graphs
from edgetune.export.step_check import StepReport, Tolerances, TrainSpec, check_step
from edgetune.export.workshop import Say, spread
from edgetune.models.families import Family, blocks
from edgetune.runtime.bundle import GRAPH_NAME, LEARN_NAME, STEP_NAME
from edgetune.runtime.learn.material import Material, dump_material
from edgetune.runtime.learn.projection import Projection
from edgetune.runtime.learn.ridge import balanced_accuracy, regularisation, solve
from edgetune.runtime.learn.statistics import Statistics, add, compress, empty, expand
from edgetune.runtime.manifest import TensorSpec, TrainingStep
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.ort import onnxruntime
from edgetune.runtime.proportions import tango_bound
from edgetune.runtime.tasks import DeviceTask
from edgetune.tasks import TaskModel

FloatArray = npt.NDArray[np.float32]

# what each part of learn.npz may take
PRIOR_BYTES = 384 * 2**10
CANARY_BYTES = 384 * 2**10
LATENT_BYTES = 2**20
MOST_CANARIES = 1000
# training samples whose features make the statistics
MOST_SAMPLES = 4000
# of projected features: a head takes their cube in time, their square in memory
MOST_FEATURES = 8192
PROJECTION_SEED = 0
RIDGE_FACTORS = (1.0, 10.0, 100.0)
SMALLEST_MARGIN = 0.02
CHECKED_STEPS = 24
# where a ReLU6 meets its bound, roundings decide on which side: a few of many gradients differ
FLOAT_TOLERANCES = Tolerances(gradient=5e-2)
# of the largest value of a tensor: a wrong sign or factor is 1 or more
QUANTIZED_TOLERANCES = Tolerances(loss=0.2, gradient=0.5)


@dataclass(frozen=True, kw_only=True)
class LearnPlan:
    """What of a network is to learn.

    request: the method. optimizer: of the step. blocks: the network's. family: its row.
    """

    request: LearnRequest
    optimizer: Optimizer
    blocks: tuple[str, ...]
    family: Family

    @property
    def static(self) -> bool:
        """Whether the family's activations are quantized by calibrated ranges."""
        return self.family.int8 == "static"

    def key(self) -> str:
        """Return what tells graphs of this plan from others."""
        return f"{self.request} {self.request.rank} {self.optimizer}"

    def prepared(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return the float graph, ready to be quantized around what learns."""
        return prepare(model, self.request, self.blocks, self._is_target, static=self.static)

    def released(self, model: onnx.ModelProto) -> Learnable:
        """Return a finished graph with what learns as inputs."""
        return release(model, self.request, self.blocks)

    def _is_target(self, path: str) -> bool:
        family = self.family
        if family.lora_regex:
            return re.fullmatch(family.lora_regex, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in family.lora)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A graph that can learn, and its step."""

    model: onnx.ModelProto
    learnable: Learnable
    step: Step
    gradients: Gradients


def plan_learning(
    request: LearnRequest, optimizer: Optimizer, task: TaskModel, family: Family
) -> LearnPlan:
    """Return the plan for a network."""
    names = tuple(name for name, _ in blocks(task.network, family))
    return LearnPlan(request=request, optimizer=optimizer, blocks=names, family=family)


def compile_learning(plan: LearnPlan, model: onnx.ModelProto) -> Compiled:
    """Make a quantized graph learnable, and compile the step of it.

    Raises:
        ConfigError: nothing of it can learn so.
        EdgetuneError: an operator has no gradient.
    """
    learnable = plan.released(model)
    integer = any(node.op_type == "MatMulInteger" for node in learnable.model.graph.node)
    gradients: Gradients = "int8" if integer else "float32"
    step = compile_step(
        learnable.model, learnable.trainable, example_runs(learnable.model),
        optimizer=plan.optimizer, gradients=gradients, class_axes=learnable.class_axes,
        inner=learnable.inner,
    )  # fmt: skip
    shipped = onnx.ModelProto()
    shipped.CopyFrom(learnable.model)
    outputs = {value.name for value in shipped.graph.output}
    shipped.graph.output.extend(v for v in step.latents if v.name not in outputs)
    return Compiled(model=shipped, learnable=learnable, step=step, gradients=gradients)


def example_runs(model: onnx.ModelProto) -> list[dict[str, npt.NDArray[Any]]]:
    """Return two sets of inputs of ones whose free dimensions differ, for shapes."""
    defaults = {t.name for t in model.graph.initializer}
    names: dict[str, tuple[int, int]] = {}
    sizes = iter([(5, 7), (11, 13), (17, 19)])
    runs: list[dict[str, npt.NDArray[Any]]] = [{}, {}]
    for value in model.graph.input:
        if value.name in defaults:
            continue
        dims = value.type.tensor_type.shape.dim
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for dim in dims:
            if dim.dim_param and dim.dim_param not in names:
                names[dim.dim_param] = (2, 3) if dim.dim_param == "batch" else next(sizes)
        for i, run in enumerate(runs):
            shape = [names[d.dim_param][i] if d.dim_param else d.dim_value for d in dims]
            run[value.name] = np.ones(shape, dtype)
    return runs


def check_learning(
    plan: LearnPlan, source: onnx.ModelProto, compiled: Compiled, task: DeviceTask, split: Split
) -> StepReport:
    """Hold the step against torch for `CHECKED_STEPS` steps; return how near it stayed.

    Of a quantized graph the step of its float source is judged strictly first: it is derived by
    the same rules. Where two orders of summation fall on both sides of a rounding, a whole code
    lies between two quantized answers, and its own step can only be judged as near as that.

    Args:
        plan: what learns.
        source: the float graph that the compiled one was made of.
        compiled: what is to ship.
        task: encodes samples.
        split: real samples.

    Raises:
        GateError: it strayed.
    """
    if not _is_quantized(compiled.model):
        return _checked(compiled, task, split, FLOAT_TOLERANCES)
    _checked(compile_learning(plan, source), task, split, FLOAT_TOLERANCES)
    return _checked(compiled, task, split, QUANTIZED_TOLERANCES)


def _checked(
    compiled: Compiled, task: DeviceTask, split: Split, tolerances: Tolerances
) -> StepReport:
    step = compiled.step
    spec = TrainSpec(
        trainable=step.trainable,
        inputs=(*step.inputs, *(v.name for v in step.latents)),
        optimizer=step.optimizer,
        decayed=step.decayed,
    )
    return check_step(
        step.model, compiled.learnable.model, spec, batches=_Batches(compiled, task, split),
        steps=CHECKED_STEPS, tolerances=tolerances,
    )  # fmt: skip


def _is_quantized(model: onnx.ModelProto) -> bool:
    kinds = {"DequantizeLinear", "MatMulInteger", "DynamicQuantizeLinear"}
    return any(node.op_type in kinds for node in model.graph.node)


def describe_learning(plan: LearnPlan, compiled: Compiled, report: StepReport) -> TrainingStep:
    """Return what the manifest says of a step."""
    inputs = {value.name: value for value in compiled.step.model.graph.input}
    step = compiled.step
    return TrainingStep(
        method=str(plan.request),
        optimizer=step.optimizer,
        gradients=compiled.gradients,
        trainable=tuple(_spec(inputs[name]) for name in step.trainable),
        inputs=step.inputs,
        latents=tuple(_spec(value) for value in step.latents),
        decayed=step.decayed,
        checked_steps=report.steps,
        worst_gradient=float(f"{report.worst_gradient:.2g}"),
    )


def save_learning(folder: Path, compiled: Compiled) -> None:
    """Write both graphs of a draft anew, on one weights.bin that no session may have open."""
    save_graphs({GRAPH_NAME: compiled.model, STEP_NAME: compiled.step.model}, folder)


def check_projection(width: int | None) -> None:
    """Refuse a projection to a width that no device solves a head of.

    Raises:
        ConfigError: it is out of bounds.
    """
    if width is not None and not 1 <= width <= MOST_FEATURES:
        raise ConfigError(f"learn_projection: expected 1 to {MOST_FEATURES}, got {width}")


def write_material(
    folder: Path,
    edge: EdgeModel,
    train: Split,
    val: Split,
    training: TrainingStep | None,
    *,
    projection: int | None = None,
    say: Say = lambda _: None,
) -> str | None:
    """Write learn.npz into a draft bundle; its manifest has to be written after.

    Args:
        folder: of the draft.
        edge: the draft, or a bundle that answers as the device will.
        train: samples whose features the statistics are of.
        val: samples that the model was not trained on, for the canary.
        training: the step that the bundle has, if any.
        projection: how many features the graph's are projected to, before the statistics.
        say: is told what is being done.

    Returns:
        None, or why nothing was written.
    """
    outputs = {spec.name for spec in edge.manifest.outputs}
    if not {"features", "logits"} <= outputs:
        return "its graph gives no features"
    say(f"learning: features of up to {MOST_SAMPLES} training samples")
    labels = edge.manifest.labels
    index = {label: i for i, label in enumerate(labels)}
    width = next(s.shape[-1] for s in edge.manifest.outputs if s.name == "features")
    assert isinstance(width, int)
    chosen = spread(len(val.inputs), min(MOST_CANARIES, CANARY_BYTES // (2 * width)))
    canary, answers, latents = _look(edge, val, chosen, training, keep=set(chosen))
    truth = np.array([index[val.labels[i]] for i in chosen], np.int64)
    most = 0
    if training is not None:
        most = max(1, LATENT_BYTES // max(1, _bytes_a_sample(latents)))
        fits = spread(len(chosen), most)
        canary, answers, truth = canary[fits], answers[fits], truth[fits]
        latents = {name: [values[i] for i in fits] for name, values in latents.items()}

    rows = spread(len(train.inputs), MOST_SAMPLES)
    classes = np.array([index[train.labels[i]] for i in rows], np.int64)
    replayed = _replayed(classes, rows, most)
    features, _, replay = _look(edge, train, rows, training, keep=replayed)
    planned = None
    if projection is not None:
        planned = Projection(width_in=width, width=projection, seed=PROJECTION_SEED)
    place = (lambda x: x) if planned is None else planned.apply
    stats = add(empty(place(features[:1]).shape[1], labels), place(features), classes)
    prior = compress(stats, PRIOR_BYTES + 4 * len(labels) * stats.width)
    material = Material(
        prior=prior,
        canary_features=canary.astype(np.float16).astype(np.float32),
        canary_classes=truth,
        canary_answers=answers,
        ridge_factor=_ridge_factor(expand(prior), place(canary), truth),
        margin=_margin(len(truth)),
        projection=planned,
        canary_latents=latents,
        replay_latents=replay,
        replay_classes=np.array(
            [classes[k] for k, i in enumerate(rows) if i in replayed], np.int64
        ),
    )
    (folder / LEARN_NAME).write_bytes(dump_material(material))
    return None


def _replayed(classes: npt.NDArray[np.int64], rows: Sequence[int], most: int) -> set[int]:
    """Return which training samples travel for rehearsal: as many of each class, `most` in all."""
    each = most // (int(classes.max()) + 1)
    chosen: set[int] = set()
    for c in range(int(classes.max()) + 1):
        of_class = np.flatnonzero(classes == c)
        chosen |= {rows[of_class[k]] for k in spread(len(of_class), each)} if each else set()
    return chosen


def _look(
    edge: EdgeModel,
    split: Split,
    rows: Sequence[int],
    training: TrainingStep | None,
    *,
    keep: set[int],
) -> tuple[FloatArray, npt.NDArray[np.int64], dict[str, list[npt.NDArray[Any]]]]:
    """Return features, answers and, of the samples in `keep`, what train.onnx takes."""
    features, answers = [], []
    latents: dict[str, list[npt.NDArray[Any]]] = {}
    for row in rows:
        encoded = edge.task.encode(split.inputs[row])
        found = edge.run(edge.task.stack([encoded]))
        features.append(found["features"][0])
        answers.append(int(found["logits"][0].argmax()))
        if training is not None and row in keep:
            for name in training.inputs:
                latents.setdefault(name, []).append(encoded[name])
            for spec in training.latents:
                latents.setdefault(spec.name, []).append(found[spec.name][0])
    return np.stack(features), np.array(answers, np.int64), latents


def _bytes_a_sample(latents: Mapping[str, list[npt.NDArray[Any]]]) -> int:
    """Return the bytes that a sample takes in learn.npz, on average."""
    total = 0
    for values in latents.values():
        for value in values:
            total += value.size * (2 if value.dtype.kind == "f" else min(value.itemsize, 4))
    count = max((len(v) for v in latents.values()), default=1)
    return total // max(count, 1)


def _ridge_factor(stats: Statistics, canary: FloatArray, truth: npt.NDArray[np.int64]) -> float:
    """Return the factor by which the ridge serves fresh samples best; of equals the largest."""
    middle = regularisation(stats)
    scores = {
        factor: balanced_accuracy(solve(stats, ridge=factor * middle).scores(canary), truth)
        for factor in RIDGE_FACTORS
    }
    best = max(scores.values())
    return max(f for f, score in scores.items() if score > best - 1 / max(len(truth), 1))


def _margin(samples: int) -> float:
    """Return what so many canaries can prove where 2 % of the answers get worse and 1 % better.

    A head that is solved anew answers a few of the old samples otherwise, as often right as wrong.
    """
    if samples < 3:
        return 1.0
    bound = tango_bound(np.ceil(0.02 * samples), np.ceil(0.01 * samples), samples)
    return round(max(SMALLEST_MARGIN, float(np.ceil(1000 * bound) / 1000)), 3)


def canary_note(samples: int) -> str:
    """Return what people should know of a small canary; "" of one that is large enough."""
    margin = _margin(samples)
    if margin <= SMALLEST_MARGIN:
        return ""
    return (
        f"{samples} validation samples make a canary that proves losses down to"
        f" {100 * margin:.1f} points: what a device learns may cost as much; 900 prove 2"
    )


class _Batches:
    """Batches of real samples, as the step takes them; called with (generator, size)."""

    def __init__(self, compiled: Compiled, task: DeviceTask, split: Split) -> None:
        self._task, self._split, self._step = task, split, compiled.step
        self._session: Any = None
        if compiled.step.latents:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            self._session = onnxruntime.InferenceSession(
                compiled.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )

    def __call__(self, rng: np.random.Generator, size: int) -> Mapping[str, npt.NDArray[Any]]:
        rows = rng.choice(len(self._split.inputs), size, replace=size > len(self._split.inputs))
        encoded = [self._task.encode(self._split.inputs[i]) for i in rows]
        raw = self._task.stack(_alike(encoded))
        feeds = {name: raw[name] for name in self._step.inputs}
        if self._session is not None:
            names = [value.name for value in self._step.latents]
            feeds |= dict(zip(names, self._session.run(names, raw), strict=True))
        return feeds


def _alike(encoded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cut images to the smallest of them, so that they make a batch."""
    if "image" not in encoded[0]:
        return encoded
    height = min(e["image"].shape[0] for e in encoded)
    width = min(e["image"].shape[1] for e in encoded)
    return [{"image": np.ascontiguousarray(e["image"][:height, :width])} for e in encoded]


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    return TensorSpec(
        name=value.name,
        dtype=helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        shape=tuple(d.dim_param or int(d.dim_value) for d in tensor.shape.dim),
    )
