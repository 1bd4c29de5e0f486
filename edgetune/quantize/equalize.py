"""Repair of convolutional nets for int8: cross-layer equalisation and bias correction.

Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction"
(arXiv:1906.04721). Equalisation comes before quantization and bias correction after it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgetune.errors import DataError
from edgetune.quantize.calibrate import run_tensors
from edgetune.quantize.layers import (
    Feeds,
    FloatArray,
    Layer,
    arrays,
    attribute,
    copy_model,
    weight_layers,
)

Relu6 = Literal["keep", "relu"]

_SWEEPS = 50
_SETTLED = 1e-3


def equalize(
    model: onnx.ModelProto, *, relu6: Relu6 = "keep", exclude: Collection[str] = ()
) -> onnx.ModelProto:
    """Return a float graph of the same function whose weight channels have more equal ranges.

    For two Conv in a row, with nothing or a Relu between and no one else reading what is
    between: output channel i of the first is divided by s_i and input channel i of the second
    multiplied by it. In a chain this is repeated over all pairs until no s moves.

    A Clip to [0, 6] is not Relu: what it cuts at 6 would have to be cut at 6 / s_i. Only a cut
    for each channel would be exact, and that neither fuses with the Conv nor folds into the
    range of a quantized activation. So there is a choice:

    Args:
        model: float graph, batch normalisation already folded.
        relu6: "keep" leaves pairs with such a Clip between them as they are, and the function
            exact; "relu" makes the Clip a Relu, as the paper does, which changes the function
            where a value was above the bound: measure the float graph again after it.
        exclude: names of Conv nodes whose weights must stay as they are.

    Source: Nagel et al. 2019, section 4.1, eq. 9 to 11.
    """
    result = copy_model(model)
    pairs = _pairs(model, relu6, exclude)
    changed = {name: value.copy() for name, value in arrays(model).items() if _used(name, pairs)}
    for _ in range(_SWEEPS):
        moved = 0.0
        for pair in pairs:
            s = equalizing_scale(
                _output_ranges(changed[pair.first.weight]),
                _input_ranges(changed[pair.second.weight], pair.groups),
            )
            _apply(changed, pair, s)
            moved = max(moved, float(np.abs(np.log(s)).max()))
        if moved < _SETTLED:
            break
    for tensor in result.graph.initializer:
        if tensor.name in changed:
            tensor.CopyFrom(numpy_helper.from_array(changed[tensor.name], tensor.name))
    _make_relus(result.graph, {pair.clip for pair in pairs if pair.clip})
    return result


def equalizing_scale(first: FloatArray, second: FloatArray) -> FloatArray:
    """Return s_i = sqrt(r1_i r2_i) / r2_i, after which both ranges are sqrt(r1_i r2_i).

    Args:
        first: r1, largest |weight| of each output channel of the first layer, (channels,).
        second: r2, largest |weight| of each input channel of the second, (channels,).

    A channel that either layer has no weights for keeps s = 1.

    Source: Nagel et al. 2019, eq. 11.
    """
    usable = (first > 0) & (second > 0)
    ratio = np.where(usable, first, 1) / np.where(usable, second, 1)
    scale: FloatArray = np.sqrt(ratio).astype(np.float32)
    return scale


def correct_bias(
    model: onnx.ModelProto, quantized: onnx.ModelProto, feeds: Iterable[Feeds]
) -> onnx.ModelProto:
    """Return the quantized graph, its biases moved so that every layer's mean is the float one's.

    Rounding weights shifts the mean of what a layer gives, channel by channel; depthwise layers,
    with their few weights a channel, most of all. The shift is measured before any Relu and taken
    off the bias, layer by layer in the graph's order, so each sees its inputs already corrected.

    Layers are matched by the names of their nodes. A Conv or Gemm whose weight comes from codes
    is corrected; where it has no bias it gets one. A MatMul has no bias of its own and is left.

    Args:
        model: the float graph that `quantized` was made of.
        quantized: with QuantizeLinear and DequantizeLinear.
        feeds: samples. All of them, and the tensors between two layers for all of them, are in
            memory at once.

    Raises:
        DataError: there are no feeds.

    Source: Nagel et al. 2019, section 4.2 and appendix D (empirical bias correction).
    """
    states = [dict(feed) for feed in feeds]
    if not states:
        raise DataError("bias correction needs at least one sample, got none")
    result = copy_model(quantized)
    editor = _Biases(result)
    layers = {
        layer.node: layer.output
        for layer in weight_layers(model)
        if layer.op != "MatMul" and layer.node in editor.nodes
    }
    wanted = _means(run_tensors(model, states, list(layers.values())))
    order = list(result.graph.node)
    start = 0
    for stop, node in enumerate(order, start=1):
        if node.name not in layers:
            continue
        _advance(result, order, start, stop, states)
        start = stop
        output = node.output[0]
        found = _means([{output: state[output]} for state in states])[output]
        shift = editor.add(node, wanted[layers[node.name]] - found)
        for state in states:
            state[output] = state[output] + shift.reshape(1, -1, *[1] * (state[output].ndim - 2))
    editor.write()
    return result


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two Conv in a row: `groups` is the second's; `clip` the Clip between, if there is one."""

    first: Layer
    second: Layer
    groups: int
    clip: str


def _pairs(model: onnx.ModelProto, relu6: Relu6, exclude: Collection[str]) -> list[_Pair]:
    constants = arrays(model)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in model.graph.output}
    convs = {
        layer.node: layer
        for layer in weight_layers(model, exclude=exclude)
        if layer.op == "Conv"
        and all(len(readers[name]) == 1 for name in (layer.weight, layer.bias) if name)
    }
    # a bias that the graph computes cannot be divided
    unknown_bias = {
        node.name
        for node in model.graph.node
        if node.name in convs and any(node.input[2:]) and not convs[node.name].bias
    }
    pairs = []
    for first in convs.values():
        reader = _only_reader(first.output, readers, outputs)
        clip = ""
        if reader is not None and _is_relu6(reader, constants) and relu6 == "relu":
            clip = reader.name
        if reader is not None and (clip or _is_relu(reader, constants)):
            reader = _only_reader(reader.output[0], readers, outputs)
        if reader is None or reader.name not in convs or first.node in unknown_bias:
            continue
        second = convs[reader.name]
        if second.input == reader.input[0]:
            groups = int(attribute(reader, "group", 1))
            pairs.append(_Pair(first=first, second=second, groups=groups, clip=clip))
    return pairs


def _only_reader(
    tensor: str, readers: dict[str, list[onnx.NodeProto]], outputs: Collection[str]
) -> onnx.NodeProto | None:
    found = readers.get(tensor, [])
    return found[0] if len(found) == 1 and tensor not in outputs else None


def _is_relu(node: onnx.NodeProto, constants: dict[str, npt.NDArray[Any]]) -> bool:
    return node.op_type == "Relu" or _bounds(node, constants) == (0.0, np.inf)


def _is_relu6(node: onnx.NodeProto, constants: dict[str, npt.NDArray[Any]]) -> bool:
    low, high = _bounds(node, constants)
    return low == 0 and 0 < high < np.inf


def _bounds(node: onnx.NodeProto, constants: dict[str, npt.NDArray[Any]]) -> tuple[float, float]:
    """Return a Clip's bounds; NaN for one that is not constant, and of any other node."""
    if node.op_type != "Clip":
        return np.nan, np.nan
    bounds = []
    for i, default in ((1, -np.inf), (2, np.inf)):
        name = node.input[i] if len(node.input) > i else ""
        bounds.append(float(constants.get(name, np.nan)) if name else default)
    return bounds[0], bounds[1]


def _used(name: str, pairs: list[_Pair]) -> bool:
    return any(name in (p.first.weight, p.first.bias, p.second.weight) for p in pairs)


def _output_ranges(weight: FloatArray) -> FloatArray:
    """Return the largest |weight| of each output channel; weight (out, in / groups, ...)."""
    largest: FloatArray = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    return largest


def _input_ranges(weight: FloatArray, groups: int) -> FloatArray:
    """Return the largest |weight| of each input channel; weight (out, in / groups, ...)."""
    by_group = np.abs(weight).reshape(groups, len(weight) // groups, weight.shape[1], -1)
    largest: FloatArray = by_group.max(axis=(1, 3)).reshape(-1)  # (groups, in / groups) -> (in,)
    return largest


def _apply(changed: dict[str, FloatArray], pair: _Pair, s: FloatArray) -> None:
    first, second = changed[pair.first.weight], changed[pair.second.weight]
    changed[pair.first.weight] = first / s.reshape(-1, *[1] * (first.ndim - 1))
    if pair.first.bias:
        changed[pair.first.bias] = changed[pair.first.bias] / s
    by_group = second.reshape(pair.groups, -1, *second.shape[1:])
    factor = s.reshape(pair.groups, 1, second.shape[1], *[1] * (second.ndim - 2))
    changed[pair.second.weight] = (by_group * factor).reshape(second.shape)


def _make_relus(graph: onnx.GraphProto, clips: Collection[str]) -> None:
    for node in graph.node:
        if node.name in clips:
            node.op_type = "Relu"
            del node.input[1:]
    used = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


class _Biases:
    """The biases of a quantized graph's Conv and Gemm, int32 codes or float."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {n: v.copy() for n, v in arrays(model).items()}
        self.dequantizers = {
            node.output[0]: node
            for node in model.graph.node
            if node.op_type == "DequantizeLinear" and node.input[1] in self.constants
        }
        self.readers: dict[str, int] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers[name] = self.readers.get(name, 0) + 1
        self.before: dict[str, onnx.NodeProto] = {}  # layer -> the dequantizer of its new bias
        self.nodes = {
            node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")
            and self._has_codes(node) and self._is_own(node)
        }  # fmt: skip

    def add(self, node: onnx.NodeProto, shift: FloatArray) -> FloatArray:
        """Add to a layer's bias and return what was added, after rounding, to its output."""
        factor = float(attribute(node, "beta", 1.0)) if node.op_type == "Gemm" else 1.0
        if len(node.input) < 3 or not node.input[2]:
            self._new_bias(node, len(shift))
        codes, scale = self._code_of(node.input[2])
        before = self.constants[codes]
        if scale is None:
            self.constants[codes] = (before + shift / factor).astype(np.float32)
            return shift
        steps = np.rint(shift / factor / scale)
        after = np.clip(before.astype(np.float64) + steps, -(2**31), 2**31 - 1)
        self.constants[codes] = after.astype(np.int32)
        added: FloatArray = ((after - before) * scale * factor).astype(np.float32)
        return added

    def write(self) -> None:
        nodes: list[onnx.NodeProto] = []
        for node in self.graph.node:
            if node.name in self.before:
                nodes.append(self.before[node.name])
            nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        tensors = [numpy_helper.from_array(v, name) for name, v in self.constants.items()]
        del self.graph.initializer[:]
        self.graph.initializer.extend(tensors)

    def _has_codes(self, node: onnx.NodeProto) -> bool:
        dequantizer = self.dequantizers.get(node.input[1])
        return dequantizer is not None and dequantizer.input[0] in self.constants

    def _is_own(self, node: onnx.NodeProto) -> bool:
        """Tell whether a layer's bias is constant and only its own, or there is none."""
        if len(node.input) < 3 or not node.input[2]:
            return True
        codes, _ = self._code_of(node.input[2])
        names = {node.input[2], codes}
        return codes in self.constants and all(self.readers[name] == 1 for name in names)

    def _code_of(self, bias: str) -> tuple[str, FloatArray | None]:
        """Return the constant behind a bias, and the scale of its codes if it has codes."""
        dequantizer = self.dequantizers.get(bias)
        if dequantizer is None:
            return bias, None
        return dequantizer.input[0], self.constants[dequantizer.input[1]]

    def _new_bias(self, node: onnx.NodeProto, channels: int) -> None:
        """Give a layer a bias of zeros: with codes where its activation has codes too."""
        name = f"{node.name}_bias_correction"
        del node.input[2:]
        activation = self.dequantizers.get(node.input[0])
        if activation is None:
            self.constants[name] = np.zeros(channels, np.float32)
            node.input.append(name)
            return
        weight_scale = self.constants[self.dequantizers[node.input[1]].input[1]]
        scale = self.constants[activation.input[1]] * weight_scale
        self.constants[f"{name}_scale"] = np.broadcast_to(scale, (channels,)).astype(np.float32)
        self.constants[f"{name}_codes"] = np.zeros(channels, np.int32)
        inputs, output = [f"{name}_codes", f"{name}_scale"], f"{name}_dequantized"
        self.before[node.name] = self.dequantizers[output] = helper.make_node(
            "DequantizeLinear", inputs, [output], name=f"{name}_DequantizeLinear", axis=0
        )
        node.input.append(output)


def _means(runs: Iterable[dict[str, npt.NDArray[Any]]]) -> dict[str, FloatArray]:
    """Return the mean of each tensor for each channel, axis 1, over all else and all runs."""
    sums: dict[str, npt.NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    for values in runs:
        for name, value in values.items():
            others = tuple(i for i in range(value.ndim) if i != 1)
            sums[name] = sums.get(name, 0) + value.sum(axis=others, dtype=np.float64)
            counts[name] = counts.get(name, 0) + value.size // value.shape[1]
    return {name: (total / counts[name]).astype(np.float32) for name, total in sums.items()}


def _advance(
    model: onnx.ModelProto,
    order: list[onnx.NodeProto],
    start: int,
    stop: int,
    states: list[dict[str, npt.NDArray[Any]]],
) -> None:
    """Run nodes start..stop on every state, and leave in it what the rest of the graph reads.

    A state is what the nodes before `start` made of one feed.
    """
    nodes, rest = order[start:stop], order[stop:]
    made = {name for node in nodes for name in node.output if name}
    read = {name for node in nodes for name in node.input}
    later = {name for node in rest for name in node.input}
    # the last node is a layer: its output is looked at even if only the graph's end reads it
    names = sorted((made & later) | {nodes[-1].output[0]})
    part = helper.make_graph(
        nodes,
        "part",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), None)
            for n, v in states[0].items()
            if n in read
        ],
        [],
        [t for t in model.graph.initializer if t.name in read],
    )
    segment = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    feeds = ({n: v for n, v in state.items() if n in read} for state in states)
    for state, values in zip(states, run_tensors(segment, feeds, names), strict=True):
        for name in [name for name in state if name not in later]:
            del state[name]
        state.update(values)
