"""Compile a training step: forward, backward and optimizer in one ordinary ONNX graph.

The step takes what its frozen part hands it (latents), not raw samples: whatever no trainable
tensor has a part in is computed once a sample, by the inference graph, and can be kept.

Names, for a trainable tensor NAME:

| input | what |
|---|---|
| raw inputs and latents | as the inference graph names them, batch first |
| targets | float32 (batch, classes), rows that sum to 1: one-hot or soft |
| sample_weight | float32 (batch,); 0 leaves a sample out |
| NAME, NAME.grad, NAME.m, NAME.v | value, gradient accumulated so far, optimizer state |
| weight_sum | what the accumulated gradient is divided by: the sum of all sample weights |
| lr, weight_decay, t | scalars; t counts optimizer steps from 1 |

| output | what |
|---|---|
| loss | sum over the batch of sample_weight * cross-entropy |
| logits | float32 (batch, classes), before the step |
| NAME.grad.out | NAME.grad + the gradient of that sum |
| NAME.out, NAME.m.out, NAME.v.out | after one optimizer step |

Who accumulates fetches `loss` and `*.grad.out` only, and has onnxruntime compute no more than that
(`RunOptions.only_execute_path_to_fetches`).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from edgetune.autodiff.backward import Backward, Gradients
from edgetune.autodiff.builder import MICROSOFT, Builder
from edgetune.autodiff.convolution import ALL_RULES
from edgetune.autodiff.lower import Unit, expand_attention, expand_depthwise, find_units
from edgetune.autodiff.shapes import Tensor, find_shapes
from edgetune.errors import ConfigError
from edgetune.quantize.layers import arrays, copy_model

Optimizer = Literal["adamw", "sgd"]

# Loshchilov and Hutter 2019 (arXiv:1711.05101), torch's defaults but for eps, which rewriting of
# graphs has been seen to drop when it is smaller
BETAS = (0.9, 0.999)
EPS = 1e-6
MOMENTUM = 0.9
# how tensors are called that the inference graph has not
EXPANDED = "step."
# units that cost: what comes of them is handed over, what comes of others is computed again
PRODUCTS = frozenset(
    {"MatMul", "FusedMatMul", "Gemm", "Conv", "ConvTranspose", "MatMulInteger", "QuantizedMatMul",
     "MatMulNBits", "MultiHeadAttention", "ConvInteger", "QLinearConv", "QLinearMatMul"}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Step:
    """A compiled step.

    inputs: raw inputs of the inference graph that the step takes as they are.
    latents: tensors of the inference graph that it takes besides; the inference graph has to
        give them.
    trainable: names; decayed: those that weight decay shrinks.
    """

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    latents: tuple[onnx.ValueInfoProto, ...]
    trainable: tuple[str, ...]
    decayed: tuple[str, ...]
    optimizer: Optimizer


def compile_step(
    model: onnx.ModelProto,
    trainable: Sequence[str],
    runs: Sequence[Mapping[str, Any]],
    *,
    logits: str = "logits",
    optimizer: Optimizer = "adamw",
    gradients: Gradients = "float32",
    class_axes: Mapping[str, int] | None = None,
    inner: Collection[str] = (),
) -> Step:
    """Differentiate an inference graph with respect to some of its tensors.

    Args:
        model: weights inside; quantized or not.
        trainable: names of float32 initializers.
        runs: two batches of inputs of different size in every free dimension.
        logits: the output that the loss is of.
        optimizer: "adamw", or "sgd" with momentum.
        gradients: what goes back through products with int8 weights: "float32", or "int8", where
            it is quantized as it comes and the product is one of integers too.
        class_axes: trainable tensor -> its axis of classes, which is left free so that the
            same step serves more of them.
        inner: tensors that the step is to compute itself although they are frozen: those of the
            blocks that learn, so that it is handed what enters the first of them.

    Raises:
        ConfigError: a trainable tensor is no initializer, or the logits do not depend on it.
        EdgetuneError: an operator between one and the logits has no gradient.
    """
    constants = arrays(model)
    for name in trainable:
        if name not in constants:
            raise ConfigError(f"{name!r} cannot be trained: the graph has no such initializer")
    raw = {value.name: value for value in model.graph.input if value.name not in constants}
    builder = Builder(EXPANDED)
    lowered = _lowered(model, builder, runs, {*raw}, inner)
    constants |= builder.constants
    fixed = set(constants) - set(trainable)
    units = find_units(lowered.graph.node, fixed)
    tensors = find_shapes(lowered, runs, [*raw, *_made(lowered)])
    wanted = _depending(units, trainable, tensors)
    if logits not in wanted:
        raise ConfigError(f"{logits}: does not depend on what is to be trained")
    upper = _needed(units, [logits], set())
    active = [u for u in upper if any(name in wanted for name in u.inputs)]
    whole = _inner(units, inner)
    forward = [u for u in upper if u in active or whole.intersection(_writes(u))]
    cut = _cut(units, forward, wanted, fixed | set(trainable), raw)
    dims = _free_names(raw, tensors)
    latents = tuple(_latent(name, tensors[name], units, lowered, dims) for name in cut.latents)

    forward = [*cut.again, *forward]
    loss, seed = _loss(builder, logits)
    backward = Backward(builder, tensors, constants, wanted, gradients=gradients)
    backward.run(active, ALL_RULES, {logits: seed})
    outputs = [loss, logits]
    for name in trainable:
        gradient = backward.gradient(name)
        if not gradient:
            raise ConfigError(f"{name!r} cannot be trained: the logits do not depend on it")
        value = constants[name]
        shape = _free_shape(value.shape, (class_axes or {}).get(name))
        outputs += _optimize(builder, name, shape, gradient, optimizer, decays=_decays(value))
    inputs = [raw[name] for name in cut.inputs]
    state = _state(trainable, constants, optimizer, class_axes or {})
    step = _assemble(
        model, forward, builder, set(trainable),
        inputs=[*inputs, *latents, *_batch_inputs(), *state],
        outputs=outputs,
    )  # fmt: skip
    return Step(
        model=step,
        inputs=tuple(cut.inputs),
        latents=latents,
        trainable=tuple(trainable),
        decayed=tuple(n for n in trainable if _decays(constants[n])),
        optimizer=optimizer,
    )


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """Where the step begins.

    inputs: raw ones that it takes. latents: tensors that it is handed. again: cheap units that it
    computes itself.
    """

    inputs: list[str]
    latents: list[str]
    again: list[Unit]


def _lowered(
    model: onnx.ModelProto,
    builder: Builder,
    runs: Sequence[Mapping[str, Any]],
    raw: Collection[str],
    inner: Collection[str],
) -> onnx.ModelProto:
    """Return the graph in nodes that have a gradient, and a cheap one."""
    lowered = copy_model(model)
    tensors = find_shapes(lowered, runs, [*raw, *_made(lowered)])
    nodes = expand_attention(list(lowered.graph.node), builder)
    nodes = expand_depthwise(nodes, builder, tensors, set(inner))
    del lowered.graph.node[:]
    lowered.graph.node.extend(nodes)
    lowered.graph.initializer.extend(builder.initializers())
    _import_microsoft(lowered, nodes)
    return lowered


def _made(model: onnx.ModelProto) -> list[str]:
    """Return every tensor that a node makes."""
    return [name for node in model.graph.node for name in node.output if name]


def _cut(
    units: Sequence[Unit],
    forward: Sequence[Unit],
    wanted: set[str],
    constants: set[str],
    raw: Mapping[str, Any],
) -> _Cut:
    """Find what the forward pass reads that neither it nor a trainable tensor has a part in."""
    maker = {name: unit for unit in units for name in unit.outputs if name}
    frontier = dict.fromkeys(
        name
        for unit in forward
        for name in _reads(unit)
        if name and name not in wanted and name not in constants
    )
    made = {name for unit in forward for name in _writes(unit)}
    latents: dict[str, None] = {}
    again: dict[int, Unit] = {}
    inputs: dict[str, None] = {}
    for name in frontier:
        if name in made:
            continue
        below, sources = _below(name, maker, constants)
        if any(unit.kind in PRODUCTS for unit in below):
            unit = maker[name]
            if unit.kind == "FakeQuantize":  # a quarter of the bytes, and the same values
                latents[unit.nodes[0].output[0]] = None
                again[id(unit)] = Unit(
                    kind="DequantizeLinear", nodes=unit.nodes[1:], outputs=unit.outputs,
                    inputs=tuple(unit.nodes[1].input),
                )  # fmt: skip
            else:
                latents[name] = None
            continue
        again.update((id(unit), unit) for unit in below)
        inputs.update(dict.fromkeys(sources))
    order = {id(unit): i for i, unit in enumerate(units)}
    return _Cut(
        inputs=[name for name in raw if name in inputs],
        latents=list(latents),
        again=[again[key] for key in sorted(again, key=lambda key: order[key])],
    )


def _inner(units: Sequence[Unit], names: Collection[str]) -> set[str]:
    """Return the named tensors and, of units that attention was expanded to, what they make."""
    found = set(names)
    for unit in reversed(units):
        if unit.kind == "Identity" and unit.outputs[0] in found:
            waiting = [unit]
            while waiting:
                found.update(_writes(waiting[-1]))
                reads = _reads(waiting.pop())
                waiting += [
                    u for u in units
                    if any(n in reads and n.startswith(EXPANDED) for n in _writes(u))
                ]  # fmt: skip
    return found


def _below(
    name: str, maker: Mapping[str, Unit], constants: set[str]
) -> tuple[list[Unit], list[str]]:
    """Return all units that a tensor comes of, and the raw inputs that those read."""
    found: dict[int, Unit] = {}
    sources: dict[str, None] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if not name or name in constants:
            continue
        if name not in maker:
            sources[name] = None
            continue
        unit = maker[name]
        if id(unit) not in found:
            found[id(unit)] = unit
            waiting.extend(_reads(unit))
    return list(found.values()), list(sources)


def _reads(unit: Unit) -> list[str]:
    """Return what a unit's nodes read that they do not make themselves."""
    made = set(_writes(unit))
    return [name for node in unit.nodes for name in node.input if name and name not in made]


def _writes(unit: Unit) -> list[str]:
    return [name for node in unit.nodes for name in node.output if name]


def _depending(
    units: Sequence[Unit], trainable: Iterable[str], tensors: Mapping[str, Tensor]
) -> set[str]:
    """Return the real tensors that change with a trainable one."""
    wanted = set(trainable)
    for unit in units:
        if any(name in wanted for name in unit.inputs):
            wanted.update(n for n in unit.outputs if n and tensors[n].real)
    return wanted


def _needed(units: Sequence[Unit], names: Iterable[str], known: set[str]) -> list[Unit]:
    """Return the units that the named tensors come of, in order."""
    needed = set(names) - known
    found = []
    for unit in reversed(units):
        if any(name in needed for name in _writes(unit)):
            found.append(unit)
            needed.update(name for name in _reads(unit) if name not in known)
    return found[::-1]


def _loss(b: Builder, logits: str) -> tuple[str, str]:
    """Write the loss; return its name and that of the gradient of the logits.

    With targets t and p = softmax(logits): -sum t log p, and its gradient p sum(t) - t.
    """
    weight = b.reshape("sample_weight", -1, 1)
    log = b.node("LogSoftmax", logits, axis=-1)
    each = b.sum(b.mul("targets", log), 1, keep=True)  # (batch, 1)
    loss = b.alias(b.node("Neg", b.node("ReduceSum", b.mul(each, weight), keepdims=0)), "loss")
    mass = b.sum("targets", 1, keep=True)
    slope = b.sub(b.mul(b.node("Exp", log), mass), "targets")
    return loss, b.mul(slope, weight)


def _optimize(
    b: Builder,
    name: str,
    shape: Sequence[int],
    gradient: str,
    optimizer: Optimizer,
    *,
    decays: bool,
) -> list[str]:
    """Write accumulation and update of one tensor; return the names of the outputs."""
    total = b.alias(b.add(f"{name}.grad", gradient), f"{name}.grad.out")

    def flat(name: str) -> str:
        # onnxruntime is slow with a scalar beside (576, 144, 1, 1): one element at a time
        return b.reshape(name, -1) if len(shape) > 2 else name

    def whole(value: str, suffix: str) -> str:
        if len(shape) > 2:
            value = b.reshape(value, *shape)
        return b.alias(value, name + suffix)

    g = b.div(flat(total), "weight_sum")
    p, m = flat(name), flat(f"{name}.m")
    if optimizer == "sgd":
        if decays:
            g = b.add(g, b.mul("weight_decay", p))
        m = b.add(b.scale(m, MOMENTUM), g)
        moved = b.sub(p, b.mul("lr", m))
        return [total, whole(moved, ".out"), whole(m, ".m.out")]
    first, second = BETAS
    m = b.add(b.scale(m, first), b.scale(g, 1 - first))
    v = b.add(b.scale(flat(f"{name}.v"), second), b.scale(b.mul(g, g), 1 - second))
    one = b.constant(1.0)
    m_share = b.sub(one, b.node("Pow", b.constant(first), "t"))
    v_share = b.node("Sqrt", b.sub(one, b.node("Pow", b.constant(second), "t")))
    # lr / m_share * m / (sqrt(v) / v_share + eps), with fewer passes over what is large
    rate = b.div(b.mul("lr", v_share), m_share)
    deviation = b.add(b.node("Sqrt", v), b.mul(b.constant(EPS), v_share))
    if decays:
        p = b.mul(p, b.sub(one, b.mul("lr", "weight_decay")))
    moved = b.sub(p, b.mul(rate, b.div(m, deviation)))
    return [total, whole(moved, ".out"), whole(m, ".m.out"), whole(v, ".v.out")]


def _free_shape(shape: Sequence[int], free: int | None) -> list[int]:
    """Return a shape with -1 at the axis that is left free."""
    return [-1 if axis == free else size for axis, size in enumerate(shape)]


def _decays(value: npt.NDArray[Any]) -> bool:
    """Weight decay is for matrices and kernels, not for biases and scales."""
    return len([size for size in value.shape if size > 1]) > 1


def _batch_inputs() -> list[onnx.ValueInfoProto]:
    real = TensorProto.FLOAT
    return [
        helper.make_tensor_value_info("targets", real, ["batch", "classes"]),
        helper.make_tensor_value_info("sample_weight", real, ["batch"]),
        *(
            helper.make_tensor_value_info(name, real, [])
            for name in ("weight_sum", "lr", "weight_decay", "t")
        ),
    ]


def _state(
    trainable: Iterable[str],
    constants: Mapping[str, npt.NDArray[Any]],
    optimizer: Optimizer,
    class_axes: Mapping[str, int],
) -> list[onnx.ValueInfoProto]:
    suffixes = ("", ".grad", ".m", ".v") if optimizer == "adamw" else ("", ".grad", ".m")
    values = []
    for name in trainable:
        shape: list[int | str] = list(constants[name].shape)
        if name in class_axes:
            shape[class_axes[name]] = "classes"
        values += [
            helper.make_tensor_value_info(name + s, TensorProto.FLOAT, shape) for s in suffixes
        ]
    return values


def _free_names(
    raw: Mapping[str, onnx.ValueInfoProto], tensors: Mapping[str, Tensor]
) -> dict[tuple[int, int], str]:
    """Return what the free dimensions of the raw inputs are called, by their sizes in the runs."""
    names: dict[tuple[int, int], str] = {}
    for name, value in raw.items():
        for dim, found in zip(value.type.tensor_type.shape.dim, tensors[name].dims, strict=True):
            if not isinstance(found, int) and dim.dim_param:
                names.setdefault(found, dim.dim_param)
    return names


def _latent(
    name: str,
    tensor: Tensor,
    units: Sequence[Unit],
    model: onnx.ModelProto,
    dims: Mapping[tuple[int, int], str],
) -> onnx.ValueInfoProto:
    shape: list[int | str] = []
    for axis, dim in enumerate(tensor.dims):
        if isinstance(dim, int):
            shape.append(dim)
        elif dim in dims:
            shape.append(dims[dim])
        else:
            raise ConfigError(f"latent {name}: axis {axis} is free and of no input")
    if not shape or shape[0] != "batch":
        raise ConfigError(f"latent {name}: its first axis is no batch: {shape}")
    kind = int(TensorProto.FLOAT) if tensor.real else _code_type(name, units, model)
    return helper.make_tensor_value_info(name, kind, shape)


def _code_type(name: str, units: Sequence[Unit], model: onnx.ModelProto) -> int:
    """Return the element type of codes: that of their zero point."""
    types = {t.name: t.data_type for t in model.graph.initializer}
    for unit in units:
        if unit.kind == "FakeQuantize" and unit.nodes[0].output[0] == name:
            return int(types.get(unit.inputs[2], TensorProto.UINT8))
    raise ConfigError(f"latent {name}: is of no type that can be kept")


def _assemble(
    model: onnx.ModelProto,
    forward: Sequence[Unit],
    builder: Builder,
    trainable: set[str],
    *,
    inputs: list[onnx.ValueInfoProto],
    outputs: list[str],
) -> onnx.ModelProto:
    """Return the model of what the outputs need, each node once."""
    nodes: dict[str, onnx.NodeProto] = {}
    for unit in forward:
        for node in unit.nodes:
            nodes.setdefault(node.output[0], node)
    for node in builder.nodes:
        nodes.setdefault(node.output[0], node)
    needed, kept = set(outputs), []
    for node in reversed(list(nodes.values())):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(node.input)
    kept.reverse()
    _name_outputs(kept, outputs)
    for node in kept:
        del node.metadata_props[:]
    own = {t.name: t for t in model.graph.initializer}
    tensors = [own[name] for name in own if name in needed and name not in trainable]
    tensors += [t for t in builder.initializers() if t.name in needed]
    graph = helper.make_graph(
        kept, "step", [v for v in inputs if v.name in needed or v.name == "sample_weight"],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs], tensors,
    )  # fmt: skip
    step = helper.make_model(graph, ir_version=model.ir_version, opset_imports=model.opset_import)
    step.producer_name = "edgetune"
    _import_microsoft(step, kept)
    return step


def _name_outputs(nodes: list[onnx.NodeProto], outputs: Collection[str]) -> None:
    """Have nodes make the outputs under their names, instead of copying them there."""
    makers = {name: node for node in nodes for name in node.output if name}
    for copy in [n for n in nodes if n.op_type == "Identity" and n.output[0] in outputs]:
        old, new = copy.input[0], copy.output[0]
        if old not in makers or old in outputs:
            continue
        nodes.remove(copy)
        for node in nodes:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = new
        makers[new] = makers.pop(old)


def _import_microsoft(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    if any(n.domain == MICROSOFT for n in nodes) and all(
        o.domain != MICROSOFT for o in model.opset_import
    ):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


__all__ = ["BETAS", "EPS", "MOMENTUM", "Optimizer", "Step", "compile_step"]
