"""Hold a training graph against torch before it may ship.

train.onnx is one micro-batch's forward and backward pass, and one optimizer step, in ordinary
operators. Its gradients are derived by edgetune; `check_step` runs it with stock onnxruntime
beside torch's autograd (`TorchGraph` on the inference graph) and torch.optim.

Its tensors, float32 but for the batch's own, NAME standing for every trainable tensor:

| inputs | |
|---|---|
| the inference graph's, or tensors inside it | the batch |
| targets (batch, classes) | one-hot, or soft |
| sample_weight (batch,) | w |
| lr (), weight_decay (), t () | t counts optimizer steps from 1; the last two where they are used |
| weight_sum () | what the accumulated gradient is divided by |
| NAME, NAME.grad | the tensor; the gradient accumulated so far |
| NAME.m, NAME.v | moments of AdamW; SGD has its momentum in NAME.m |

| outputs | |
|---|---|
| loss () | sum_i w_i CE_i, CE the softmax cross-entropy |
| logits (batch, classes) | compared where it is given |
| NAME.grad.out | NAME.grad + d loss / d NAME |
| NAME.out, NAME.m.out, NAME.v.out | one step with the gradient NAME.grad.out / weight_sum |
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from edgetune.errors import EdgetuneError, GateError
from edgetune.export.reference import TorchGraph
from edgetune.runtime.ort import onnxruntime

Array = npt.NDArray[Any]
Batches = Callable[[np.random.Generator, int], Mapping[str, Array]]
Optimizer = Literal["adamw", "sgd"]

BETAS = (0.9, 0.999)
EPS = 1e-6  # not torch's 1e-8: optimizers of graphs take x + 1e-8 for x
MOMENTUM = 0.9
MOMENTS: dict[Optimizer, tuple[str, ...]] = {"adamw": ("m", "v"), "sgd": ("m",)}
FEWEST_STEPS = 20
# a tensor's gradient is judged on its own scale, down to this share of the largest gradient of
# all: one that is zero but for roundings (an attention key's bias) has no scale of its own
GRADIENT_FLOOR = 1e-2
# a float32 sum may be off by this much of what is added to
ROUNDING = 4 * float(np.finfo(np.float32).eps)
_DTYPES: dict[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
# below it float32 squares have few digits or none
SMALLEST_SQUARE = 1e-30


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """What a training graph trains, and how.

    Attributes:
        trainable: names of initializers of the inference graph.
        inputs: names of the training graph's inputs for the batch: tensors of the inference
            graph, its inputs or what it makes of them before any trainable tensor comes in.
        optimizer: "adamw" (torch.optim.AdamW, betas 0.9 and 0.999, eps 1e-6) or "sgd"
            (torch.optim.SGD, momentum 0.9, weight decay added to the gradient).
        logits: the inference graph's output that the loss is taken of.
        decayed: the trainable tensors that weight decay shrinks; None: all of them.
    """

    trainable: tuple[str, ...]
    inputs: tuple[str, ...]
    optimizer: Optimizer
    logits: str = "logits"
    decayed: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """How far from torch a value may be, relative to the scale that goes with it.

    Attributes:
        loss: the loss, of itself and a tenth of the sum of weights; logits, of the largest.
        gradient: a gradient, of the tensor's largest and GRADIENT_FLOOR of the largest of all.
        optimizer: a parameter's change, of the tensor's largest change; an element of a moment,
            of the terms it is the sum of. 1 - 0.999^t at t = 1 is off by 6e-5 in float32.

    A quantized graph needs more: where two float32 orders of summation fall on both sides of a
    rounding, a whole code lies between the two answers.
    """

    loss: float = 1e-4
    gradient: float = 1e-4
    optimizer: float = 2e-4


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """How near the training graph stayed to torch; deviations are relative, see Tolerances.

    Attributes:
        steps: how many optimizer steps were compared.
        worst_loss: of losses and logits.
        worst_gradient: of the gradients that single micro-batches added.
        worst_parameter: of parameters' changes and of the optimizer's moments.
        worst_name: the tensor that came nearest to its tolerance.
    """

    steps: int
    worst_loss: float
    worst_gradient: float
    worst_parameter: float
    worst_name: str


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One optimizer step of the schedule.

    Attributes:
        start: "kept" goes on from the step before; "zero" is a first step ever; "random" has
            moments of the gradients' scale; "tiny" has moments and gradients of eps's scale.
        missing: samples that each micro-batch lacks of a full one.
        weights: sample weights: all different, half of them zeros, or only zeros.
        accumulated: whether NAME.grad is non-zero from the start.
        lr: times the base rate.
        t: step number; a kept start counts on.
    """

    title: str
    start: Literal["kept", "random", "tiny", "zero"]
    missing: tuple[int, ...] = (0,)
    weights: Literal["different", "half", "none"] = "different"
    soft: bool = False
    accumulated: bool = False
    lr: float = 1.0
    weight_decay: float = 0.1
    t: int = 1


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A micro-batch; feeds are the inference graph's."""

    feeds: dict[str, Array]
    targets: Array
    weights: Array


SCHEDULE = (
    _Case(title="random state, soft targets", start="random", soft=True, accumulated=True, t=7),
    _Case(title="two micro-batches", start="kept", missing=(0, 0), lr=0.2, weight_decay=0.0),
    _Case(title="a partial batch", start="kept", missing=(1,), weights="half", lr=3.0),
    _Case(title="no gradient", start="kept", weights="none"),
    _Case(
        title="three micro-batches, late",
        start="random",
        missing=(0, 1, 2),
        weights="half",
        soft=True,
        lr=0.5,
        weight_decay=0.3,
        t=1000,
    ),
    _Case(title="gradients as small as eps", start="tiny", weight_decay=0.0, t=3),
    _Case(title="the first step", start="zero", accumulated=True, lr=2.0),
    _Case(title="the first step, no gradient", start="zero", weights="none", weight_decay=0.0),
)


def check_step(
    step: onnx.ModelProto | Path,
    inference: onnx.ModelProto,
    spec: TrainSpec,
    *,
    batches: Batches,
    batch_size: int = 4,
    steps: int = 24,
    seed: int = 0,
    tolerances: Tolerances | None = None,
) -> StepReport:
    """Return how near a training graph stays to torch; it has not left the tolerances.

    The state goes from step to step through the training graph alone, and torch judges every
    micro-batch and every optimizer step from the same state, the optimizer in float64. So an
    error shows where it is made, and roundings do not add up. The schedule begins from moments
    and gradients that are non-zero and differ from each other, so that inputs that were merged
    show, and has partial batches, zero weights, a zero gradient, accumulation over micro-batches,
    different rates, soft targets, gradients as small as eps, and first steps ever.

    Args:
        step: train.onnx, as this module describes it; a path where it has external data.
        inference: the graph that is trained, weights inside, unquantized or quantized.
        spec: what is trained.
        batches: (rng, size) -> `size` samples, as the inference graph takes them, from which
            those of `spec.inputs` that are missing are made; torch always begins at what this
            gives, so that a training graph that begins too late shows.
        batch_size: samples in a full micro-batch, 3 at least.
        steps: optimizer steps, 20 at least; the schedule is gone through over and over.
        seed: of batches, targets and states.
        tolerances: the default is for float32 graphs.

    Raises:
        GateError: an input or output is missing, onnxruntime cannot run the graph, or a loss,
            gradient, parameter or moment deviates.
        EdgetuneError: the schedule would be cut short, or the inference graph cannot be run.
    """
    if steps < FEWEST_STEPS or batch_size < 3:
        raise EdgetuneError(
            f"check_step: expected at least {FEWEST_STEPS} steps of at least 3 samples,"
            f" got {steps} of {batch_size}"
        )
    check = _Check(step, inference, spec, batches, batch_size, seed, tolerances or Tolerances())
    for number in range(steps):
        check.step(number, SCHEDULE[number % len(SCHEDULE)])
    return StepReport(
        steps=steps,
        worst_loss=check.worst["loss"],
        worst_gradient=check.worst["gradient"],
        worst_parameter=check.worst["optimizer"],
        worst_name=check.worst_name,
    )


class _Check:
    """Both sides of the comparison, and the state that goes from step to step."""

    def __init__(
        self,
        step: onnx.ModelProto | Path,
        inference: onnx.ModelProto,
        spec: TrainSpec,
        batches: Batches,
        batch_size: int,
        seed: int,
        tolerances: Tolerances,
    ) -> None:
        self.spec, self.batches, self.batch_size = spec, batches, batch_size
        self.tolerances = tolerances
        self.rng = np.random.default_rng(seed)
        self.graph = TorchGraph(inference)
        self.session = _open(step)
        self.decayed = spec.trainable if spec.decayed is None else spec.decayed
        self.types = {i.name: i.type for i in self.session.get_inputs()}
        self.types |= {i.name: i.type for i in self.session.get_overridable_initializers()}
        self.moments = MOMENTS[spec.optimizer]
        self.gradient_names = [f"{name}.grad.out" for name in spec.trainable]
        self.step_names = [
            f"{name}{part}.out"
            for name in spec.trainable
            for part in ("", *(f".{moment}" for moment in self.moments))
        ]
        if unknown := [n for n in spec.trainable if n not in self.graph.initializers]:
            raise EdgetuneError(f"the inference graph has no initializer {unknown[0]!r} to train")
        self.initial = {n: self.graph.initializers[n].numpy() for n in spec.trainable}
        self._check_interface()
        self.rms = self._gradient_scales()
        # steps of a thousandth: far above float32's roundings, and the network stays itself
        self.base_lr = 1e-3 / (1.0 if spec.optimizer == "adamw" else self._common_rms())
        self.state: dict[str, Array] = {}
        self.t = 0
        self.worst = {"loss": 0.0, "gradient": 0.0, "optimizer": 0.0}
        self.worst_name, self._worst_share = "loss", 0.0
        self.where = ""

    def step(self, number: int, case: _Case) -> None:
        """Run one step of the schedule on both sides."""
        self.where = f"step {number + 1} ({case.title})"
        self._begin(case)
        before = dict(self.state)
        scalars = self._micro_batches(case)
        wanted = self._torch_optimizer(before, scalars)
        for name in self.spec.trainable:
            self._judge_step(name, before, wanted, scalars)

    def _begin(self, case: _Case) -> None:
        """Set parameters, moments and accumulated gradients as the case wants them."""
        self.t = self.t + 1 if case.start == "kept" else case.t
        for name, value in self.initial.items():
            if case.start != "kept":
                self._start(name, value, case.start)
            noise = self._normal(value.shape) if case.accumulated else np.zeros_like(value)
            # a tensor may have no gradient at first: half of an adapter, while the other is zero
            size = max(self.rms[name], 1e-3 * self._common_rms())
            self.state[f"{name}.grad"] = np.float32(size) * noise

    def _start(self, name: str, value: Array, start: str) -> None:
        if start == "random":  # also where it is zero, as one half of an adapter is at first
            spread = 0.1 * (float(np.sqrt(np.mean(np.square(value)))) or 0.1)
            value = value + np.float32(spread) * self._normal(value.shape)
        self.state[name] = value
        # roots of v, over three decades
        size = {"random": self._common_rms(), "tiny": EPS, "zero": 0.0}[start]
        root = size * np.power(10.0, self.rng.uniform(-2, 1, value.shape)).astype(np.float32)
        self.state[f"{name}.m"] = (root * self._normal(value.shape)).astype(np.float32)
        if "v" in self.moments:
            self.state[f"{name}.v"] = np.square(root).astype(np.float32)

    def _micro_batches(self, case: _Case) -> dict[str, float]:
        """Accumulate gradients over the case's micro-batches; the last one ends the step.

        Returns:
            The step's lr, weight_decay, t and weight_sum, as float32 has them.
        """
        made = [self._batch(self.batch_size - missing, case) for missing in case.missing]
        weight_sum = sum(float(batch.weights.sum()) for batch in made) or 1.0
        if case.start == "tiny":
            weight_sum *= self._common_rms() / EPS
        scalars: dict[str, Array] = {
            "lr": np.array(self.base_lr * case.lr, np.float32),
            "weight_decay": np.array(case.weight_decay, np.float32),
            "t": np.array(self.t, np.float32),
            "weight_sum": np.array(weight_sum, np.float32),
        }
        given = {name: value for name, value in scalars.items() if name in self.types}
        for i, batch in enumerate(made):
            last = i == len(made) - 1
            names = ["loss", *self.gradient_names]
            names += [*self.logits_name, *self.step_names] if last else []
            feeds = {"targets": batch.targets, "sample_weight": batch.weights}
            feeds |= {**self._inputs(batch), **self.state, **given}
            found = self._run(names, feeds, partly=not last)
            self._judge_batch(batch, found)
            for name in self.spec.trainable:
                self.state[f"{name}.grad"] = found[f"{name}.grad.out"]
            if last:
                self.state.update((n.removesuffix(".out"), found[n]) for n in self.step_names)
        return {name: float(value) for name, value in scalars.items()}

    def _batch(self, size: int, case: _Case) -> _Batch:
        feeds = dict(self.batches(self.rng, size))
        with torch.no_grad():
            logits = self.graph.run(_tensors(feeds), outputs=[self.spec.logits])[self.spec.logits]
        classes = logits.shape[-1]
        if case.soft:
            targets = np.exp(2 * self._normal((size, classes)))
            targets /= targets.sum(1, keepdims=True)
        else:
            targets = np.eye(classes, dtype=np.float32)[self.rng.integers(0, classes, size)]
        weights = self.rng.uniform(0.2, 2, size).astype(np.float32)
        if case.weights == "half":
            weights[(size + 1) // 2 :] = 0
        elif case.weights == "none":
            weights[:] = 0
        return _Batch(feeds=feeds, targets=targets, weights=weights)

    def _inputs(self, batch: _Batch) -> dict[str, Array]:
        """Return the training graph's inputs: the batch's own, or what torch makes of them."""
        with torch.no_grad():
            found = self.graph.run(_tensors(batch.feeds), outputs=self.spec.inputs)
        # codes inside a graph are float64 there, see TorchGraph
        return {name: v.numpy().astype(_DTYPES[self.types[name]]) for name, v in found.items()}

    # torch's side

    def _torch_gradients(
        self, batch: _Batch, parameters: Mapping[str, Array]
    ) -> tuple[Tensor, Tensor, dict[str, Array]]:
        """Return loss, logits and the gradient of every trainable tensor."""
        values = {n: torch.tensor(parameters[n]).requires_grad_() for n in self.spec.trainable}
        feeds = _tensors(batch.feeds)
        logits = self.graph.run(feeds, values, outputs=[self.spec.logits])[self.spec.logits]
        entropies = -(torch.tensor(batch.targets) * logits.log_softmax(-1)).sum(-1)  # (batch,)
        loss = (torch.tensor(batch.weights) * entropies).sum()
        found = torch.autograd.grad(
            loss, list(values.values()), allow_unused=True, materialize_grads=True
        )
        gradients = {n: g.numpy() for n, g in zip(values, found, strict=True)}
        return loss.detach(), logits.detach(), gradients

    def _torch_optimizer(
        self, before: Mapping[str, Array], scalars: Mapping[str, float]
    ) -> dict[str, Array]:
        """Return what torch.optim makes of the training graph's own gradients, in float64."""
        made: dict[str, Array] = {}
        for name in self.spec.trainable:
            value = torch.nn.Parameter(_double(before[name]))
            value.grad = _double(self.state[f"{name}.grad"]) / scalars["weight_sum"]
            m = _double(before[f"{name}.m"])
            lr = scalars["lr"]
            decay = scalars["weight_decay"] if name in self.decayed else 0.0
            if self.spec.optimizer == "adamw":
                v = _double(before[f"{name}.v"])
                adamw = torch.optim.AdamW([value], lr, BETAS, EPS, decay)
                done = torch.tensor(scalars["t"] - 1)
                adamw.state[value] = {"step": done, "exp_avg": m, "exp_avg_sq": v}
                adamw.step()
                made[f"{name}.v"] = v.numpy()
            else:
                sgd = torch.optim.SGD([value], lr, MOMENTUM, weight_decay=decay)
                sgd.state[value] = {"momentum_buffer": m}
                sgd.step()
            made[name], made[f"{name}.m"] = value.detach().numpy(), m.numpy()
        return made

    def _gradient_scales(self) -> dict[str, float]:
        """Return the root mean square of every tensor's gradient, for a mean loss."""
        batch = self._batch(self.batch_size, SCHEDULE[0])
        _, _, gradients = self._torch_gradients(batch, self.initial)
        total = float(batch.weights.sum())
        return {n: float(np.sqrt(np.mean(np.square(g)))) / total for n, g in gradients.items()}

    def _common_rms(self) -> float:
        """Return the root mean square of the gradients' scales, 1 where all are zero."""
        return math.sqrt(sum(r * r for r in self.rms.values()) / len(self.rms)) or 1.0

    # onnxruntime's side

    def _check_interface(self) -> None:
        """Raise GateError unless the graph has the inputs and outputs of this module's table."""
        states = [
            f"{name}{part}"
            for name in self.spec.trainable
            for part in ("", ".grad", *(f".{moment}" for moment in self.moments))
        ]
        scalars = ["targets", "sample_weight", "lr", "weight_sum"]
        scalars += ["weight_decay"] if self.decayed else []
        scalars += ["t"] if self.spec.optimizer == "adamw" else []
        _require("inputs", [*self.spec.inputs, *scalars, *states], self.types.keys())
        made = {o.name for o in self.session.get_outputs()}
        _require("outputs", ["loss", *self.gradient_names, *self.step_names], made)
        self.logits_name = ["logits"] if "logits" in made else []

    def _run(self, names: list[str], feeds: Mapping[str, Any], *, partly: bool) -> dict[str, Array]:
        options = onnxruntime.RunOptions()
        # as the device runs a micro-batch that no optimizer step follows
        options.only_execute_path_to_fetches = partly
        try:
            arrays = {name: np.asarray(value) for name, value in feeds.items()}
            found = self.session.run(names, arrays, options)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise GateError(
                f"{self.where}: onnxruntime cannot run the training graph: {error}"
            ) from error
        return dict(zip(names, found, strict=True))

    # the comparison

    def _judge_batch(self, batch: _Batch, found: Mapping[str, Array]) -> None:
        """Compare loss, logits and gradients; `state` is still what the batch was run on."""
        loss, logits, gradients = self._torch_gradients(batch, self.state)
        weight = float(batch.weights.sum())
        scale = abs(float(loss)) + 0.1 * weight
        self._judge("loss", "loss", found["loss"], loss.numpy(), scale)
        if "logits" in found:
            largest = float(logits.abs().max())
            self._judge("loss", "logits", found["logits"], logits.numpy(), largest)
        largest = max(float(np.abs(g).max(initial=0)) for g in gradients.values())
        for name, gradient in gradients.items():
            start = self.state[f"{name}.grad"]
            scale = float(np.abs(gradient).max(initial=0)) + GRADIENT_FLOOR * largest
            wanted = start.astype(np.float64) + gradient
            out = f"{name}.grad.out"
            self._judge("gradient", out, found[out], wanted, scale, added_to=start)

    def _judge_step(
        self,
        name: str,
        before: Mapping[str, Array],
        wanted: Mapping[str, Array],
        scalars: Mapping[str, float],
    ) -> None:
        """Compare a tensor's moments, then itself, after the optimizer's step."""
        start = before[name]
        gradient = np.abs(self.state[f"{name}.grad"].astype(np.float64)) / scalars["weight_sum"]
        if self.spec.optimizer == "sgd" and name in self.decayed:
            gradient = gradient + scalars["weight_decay"] * np.abs(start)
        terms = {"m": np.abs(before[f"{name}.m"]) + gradient}
        if "v" in self.moments:
            terms["v"] = before[f"{name}.v"] + np.square(gradient) + SMALLEST_SQUARE
        for moment, scale in terms.items():
            key = f"{name}.{moment}"
            self._judge("optimizer", f"{key}.out", self.state[key], wanted[key], scale)
        change = float(np.abs(wanted[name] - start).max(initial=0))
        out = f"{name}.out"
        self._judge("optimizer", out, self.state[name], wanted[name], change, added_to=start)

    def _judge(
        self,
        kind: Literal["loss", "gradient", "optimizer"],
        name: str,
        found: Array,
        wanted: Array,
        scale: float | Array,
        *,
        added_to: Array | float = 0.0,
    ) -> None:
        """Raise GateError where a tensor is off by more than its tolerance of `scale`."""
        if np.shape(found) != wanted.shape:
            raise GateError(
                f"{self.where}: {name} is of shape {np.shape(found)}, expected {wanted.shape}"
            )
        off = np.abs(np.asarray(found, np.float64) - wanted) - ROUNDING * np.abs(added_to)
        off = np.maximum(off, 0)  # NaN stays
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(off == 0, 0.0, off / scale)
        deviation, allowed = float(shares.max(initial=0)), getattr(self.tolerances, kind)
        if not deviation <= allowed:
            raise GateError(
                f"{self.where}: {name} deviates from torch by {deviation:.1e} of its scale,"
                f" allowed is {allowed:.0e}; this training graph must not ship"
            )
        self.worst[kind] = max(self.worst[kind], deviation)
        if deviation / allowed > self._worst_share:
            self.worst_name, self._worst_share = name, deviation / allowed

    def _normal(self, shape: Sequence[int]) -> npt.NDArray[np.float32]:
        return self.rng.normal(size=shape).astype(np.float32)


def _open(step: onnx.ModelProto | Path) -> Any:
    """Return a session as a device opens one: every optimization is on."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    source = str(step) if isinstance(step, Path) else step.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        raise GateError(f"onnxruntime cannot open the training graph: {error}") from error


def _require(what: str, wanted: Sequence[str], found: Collection[str]) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise GateError(f"the training graph lacks the {what} {', '.join(missing)}")


def _tensors(feeds: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in feeds.items()}


def _double(value: Array) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
