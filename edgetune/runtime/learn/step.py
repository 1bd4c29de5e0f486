"""Run train.onnx: one pass forward and backward, and one step of the optimizer.

Large tensors stay where they are: gradients and the optimizer's state are read from and written
to the same arrays, which is safe because the graph reads each of them once, for its own new value.
The trained tensors have two sets of arrays in turn, as the backward pass may read an old value
after the new one is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import IntegrityError
from edgetune.runtime.bundle import STEP_NAME, Bundle
from edgetune.runtime.graph import check_graph
from edgetune.runtime.manifest import TrainingStep
from edgetune.runtime.ort import RunLimit, open_session, run_session

Array = npt.NDArray[Any]
Tensors = dict[str, npt.NDArray[np.float32]]
MOMENTS = {"adamw": (".m", ".v"), "sgd": (".m",)}
ALIGNMENT = 64
SCALARS = ("weight_sum", "lr", "weight_decay", "t")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a run is fed: inputs of the graph, rows of probabilities, and weights.

    targets: float32 (batch, classes). weights: float32 (batch,).
    """

    inputs: Mapping[str, Array]
    targets: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """lr: learning rate. weight_decay: as of Loshchilov and Hutter 2019."""

    lr: float
    weight_decay: float


class StepSession:
    """A bundle's training step in an onnxruntime session."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Open the session.

        Raises:
            ConfigError, ResourceError: as `open_session`.
            IntegrityError: the graph is not what the manifest says.
        """
        training = bundle.manifest.training
        assert training is not None
        check_graph(bundle, STEP_NAME)
        # without a pool every step asks the system for its memory; but batches differ in size,
        # and a pattern of each would be kept
        settings = replace(bundle.manifest.session, arena=True, graph_optimization="all")
        pooled = replace(bundle, manifest=replace(bundle.manifest, session=settings))
        self.training = training
        self._session = open_session(pooled, STEP_NAME, threads=threads, patterns=False)
        self._inputs = {node.name for node in self._session.get_inputs()}
        _check_names(bundle, training, self._inputs, self._session.get_outputs())

    def run(
        self,
        batch: Batch,
        tensors: Mapping[str, Array],
        outputs: Sequence[str],
        *,
        state: Mapping[str, Array],
        scalars: Mapping[str, float],
        into: Mapping[str, Array],
    ) -> list[Any]:
        """Run what the outputs need, and no more.

        Args:
            batch: of at least one sample.
            tensors: values of the trainable ones.
            outputs: names.
            state: NAME.grad, NAME.m and NAME.v.
            scalars: of SCALARS; 1 where none is given.
            into: arrays that outputs are written to.

        Returns:
            The outputs that are not in `into`.
        """
        given = {name: np.array(scalars.get(name, 1.0), np.float32) for name in SCALARS}
        given |= {"targets": batch.targets, "sample_weight": batch.weights, **batch.inputs}
        limit = RunLimit(None)
        limit.options.only_execute_path_to_fetches = True
        session = _Bound(self._session, self._known({**tensors, **state}), into)
        return run_session(session, outputs, self._known(given), limit)

    def _known(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Return those that the graph takes: one of SGD has no NAME.v, for one."""
        return {name: value for name, value in values.items() if name in self._inputs}

    def loss_and_logits(
        self, batch: Batch, tensors: Mapping[str, Array], blanks: Mapping[str, Array]
    ) -> tuple[float, npt.NDArray[np.float32]]:
        """Return the summed loss of a batch and its logits, (batch, classes); `blanks_of` helps."""
        state = {n + s: v for n, v in blanks.items() for s in (".grad", ".m", ".v")}
        loss, logits = self.run(
            batch, tensors, ["loss", "logits"], state=state, scalars={}, into={}
        )
        return float(loss), logits


class Descent:
    """Tensors on their way, and the optimizer's state."""

    def __init__(self, session: StepSession, tensors: Mapping[str, Array]) -> None:
        """Start from these values, which stay as they are."""
        self._session = session
        self.tensors: Tensors = {name: _aligned(value) for name, value in tensors.items()}
        # written next
        self._spare = {name: _room(value) for name, value in tensors.items()}
        self.blanks = blanks_of(tensors)
        self._moments = {
            name + suffix: _room(value)
            for name, value in tensors.items()
            for suffix in MOMENTS[session.training.optimizer]
        }
        self.steps = 0

    def step(self, parts: Sequence[Batch], rate: Rate) -> float:
        """Take one step of the optimizer by the gradient of several batches; return their loss.

        Args:
            parts: one after the other, their gradients summed: the step is that of one batch of
                them all.
            rate: of this step.

        Returns:
            The mean over all samples, by their weights.
        """
        total = float(sum(part.weights.sum(dtype=np.float64) for part in parts))
        if total <= 0:
            return 0.0
        gradients = {f"{name}.grad": value for name, value in self.blanks.items()}
        state = gradients | self._moments
        loss = 0.0
        for part in parts[:-1]:
            into = {f"{name}.out": value for name, value in gradients.items()}
            found = self._session.run(
                part, self.tensors, ["loss", *into], state=state, scalars={}, into=into
            )
            loss += float(found[0])
        into = {f"{name}.out": value for name, value in (self._spare | self._moments).items()}
        scalars = {
            "weight_sum": total, "lr": rate.lr, "weight_decay": rate.weight_decay,
            "t": float(self.steps + 1),
        }  # fmt: skip
        found = self._session.run(
            parts[-1], self.tensors, ["loss", *into], state=state, scalars=scalars, into=into
        )
        self.tensors, self._spare = self._spare, self.tensors
        self.steps += 1
        if len(parts) > 1:
            for value in self.blanks.values():
                value.fill(0)
        return (loss + float(found[0])) / total

    def copy(self) -> Tensors:
        """Return the values as they are now."""
        return {name: _aligned(value) for name, value in self.tensors.items()}


def blanks_of(tensors: Mapping[str, Array]) -> Tensors:
    """Return zeros in the shape of each tensor, as gradients and moments that nothing reads."""
    return {name: _room(value) for name, value in tensors.items()}


def _room(like: Array) -> Array:
    """Return zeros of a shape and type.

    They begin where onnxruntime's own arrays would: elsewhere the last bit of a sum may be another.
    """
    room = np.zeros(like.nbytes + ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    return room[begin : begin + like.nbytes].view(like.dtype).reshape(like.shape)


def _aligned(value: Array) -> Array:
    """Return a copy that begins as `_room` does."""
    copy = _room(value)
    copy[...] = value
    return copy


class _Bound:
    """What `run_session` runs: a session that has its state, and outputs that go into arrays."""

    def __init__(self, session: Any, state: Mapping[str, Array], into: Mapping[str, Array]) -> None:
        self._session, self._state, self._into = session, state, into

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Array], options: Any) -> list[Any]:
        binding = self._session.io_binding()
        for name, value in {**self._state, **inputs}.items():
            whole = value if value.ctypes.data % ALIGNMENT == 0 else _aligned(value)
            binding.bind_cpu_input(name, whole)
        for name in outputs:
            target = self._into.get(name)
            if target is None:
                binding.bind_output(name, "cpu")
            else:
                binding.bind_output(name, "cpu", 0, np.float32, target.shape, target.ctypes.data)
        self._session.run_with_iobinding(binding, options)
        found = dict(zip(outputs, binding.get_outputs(), strict=True))
        return [found[name].numpy() for name in outputs if name not in self._into]


def _check_names(
    bundle: Bundle, training: TrainingStep, inputs: set[str], outputs: Sequence[Any]
) -> None:
    suffixes = ("", ".grad", *MOMENTS[training.optimizer])
    state = {spec.name + suffix for spec in training.trainable for suffix in suffixes}
    latents = {spec.name for spec in training.latents}
    known = {*state, *latents, *training.inputs, "targets", "sample_weight", *SCALARS}
    made = {f"{spec.name}{s}.out" for spec in training.trainable for s in suffixes}
    wanted = {"loss", "logits", *made}
    found = {node.name for node in outputs}
    odd = sorted((inputs - known) | (state - inputs) | (latents - inputs) | (wanted - found))
    if odd:
        raise IntegrityError(
            f"{bundle.where / STEP_NAME}: is not the step that the manifest describes:"
            f" {', '.join(odd[:3])}"
        )
