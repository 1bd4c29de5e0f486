"""Static quantization: codes for weights and activations, written as QuantizeLinear pairs.

Every float value stays where it was; a QuantizeLinear and a DequantizeLinear around a node
say which codes it may be computed with, and onnxruntime puts the integer kernel there. So
one graph is right on every runtime, and fast where the runtime knows the pattern.

Notation of Jacob et al. 2018 (arXiv:1712.05877): real r = scale * (code - zero point).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetune.quantize.calibrate import Method, Range, calibrate
from edgetune.quantize.layers import (
    Feeds,
    FloatArray,
    Layer,
    attribute,
    copy_model,
    preprocessing_nodes,
    weight_layers,
)

# s8: -127..127, twice as fast as u8 where there are dot products; u8: the same values, shifted by
# 128, which no CPU's integer sums saturate on; s7: -63..63, whose pairs of products fit in int16
WeightCode = Literal["s8", "u8", "s7"]
_LARGEST = {"s8": 127, "u8": 127, "s7": 63}

# onnxruntime's CPU kernels on codes; all their inputs are activations
_ELEMENTWISE = ("Add",)
# keep the codes they are given
_SHUFFLES = (
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad",
)  # fmt: skip
_RECTIFIERS = ("Relu", "Clip")
# of int32; as much again is left for the sum of products
_LARGEST_BIAS = 2**30
# no smaller scale: a channel of zeros has none, and 1 / scale must be finite
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny) * 2**10


@dataclass(frozen=True, kw_only=True)
class StaticPlan:
    """Which nodes of a float graph work on codes, and which tensors so need a range.

    layers: the Conv, Gemm and MatMul nodes.
    elementwise, shuffles: names of other nodes.
    rectifiers: Relu or Clip node -> the node on codes it follows; the range does its work.
    tensors: the float tensors that get codes.
    """

    layers: tuple[Layer, ...]
    elementwise: frozenset[str]
    shuffles: frozenset[str]
    rectifiers: Mapping[str, str] = field(default_factory=dict)
    tensors: tuple[str, ...]


def plan_static(model: onnx.ModelProto, *, keep_float: Collection[str] = ()) -> StaticPlan:
    """Decide which nodes work on codes, but for those named in `keep_float`.

    A Conv's output gets codes (onnxruntime has no integer convolution that gives floats), and so
    does what a Relu or Clip makes of a layer's (onnxruntime would fuse it into a float product);
    a matrix product's own only where a node that works on codes takes it.
    """
    layers = weight_layers(model, exclude=keep_float)
    by_node = {layer.node: layer for layer in layers}
    quiet = {*preprocessing_nodes(model), *keep_float}
    consumers = _consumers(model)
    outputs = {value.name for value in model.graph.output}
    constants = {t.name for t in model.graph.initializer}
    rectifiers: dict[str, str] = {}
    elementwise: set[str] = set()
    shuffles: set[str] = set()
    coded: set[str] = set()  # tensors that a node on codes makes
    wanted: dict[str, None] = {}  # tensors that get codes, in order

    def rectified(node: onnx.NodeProto) -> str:
        """Return what a node on codes gives, behind the rectifier that follows it if one does."""
        taker = _only(consumers, node.output[0], outputs)
        if taker is None or taker.name in quiet or not _rectifies(taker, model):
            return str(node.output[0])
        rectifiers[taker.name] = node.name
        return str(taker.output[0])

    for node in model.graph.node:
        if node.name in by_node:
            layer = by_node[node.name]
            wanted[layer.input] = None
            result = rectified(node)
            if layer.op == "Conv" or result != layer.output:
                wanted[result] = None
            coded.add(result)
        elif node.name in quiet:
            continue
        elif node.op_type in _ELEMENTWISE:
            if all(i in coded for i in node.input) and not constants & set(node.input):
                elementwise.add(node.name)
                result = rectified(node)
                wanted.update(dict.fromkeys([*node.input, result]))
                coded.add(result)
        elif _keeps_codes(node, model) and node.input[0] in wanted and node.input[0] in coded:
            shuffles.add(node.name)
            wanted[node.output[0]] = None
            coded.add(node.output[0])
    return StaticPlan(
        layers=tuple(layers),
        elementwise=frozenset(elementwise),
        shuffles=frozenset(shuffles),
        rectifiers=rectifiers,
        tensors=tuple(wanted),
    )


def quantize_static(
    model: onnx.ModelProto,
    feeds: Iterable[Feeds],
    *,
    method: Method = "minmax",
    codes: WeightCode = "s8",
    layer_codes: Mapping[str, WeightCode] | None = None,
    keep_float: Collection[str] = (),
) -> onnx.ModelProto:
    """Calibrate on `feeds` and quantize: see `calibrate`, `plan_static` and `write_static`."""
    plan = plan_static(model, keep_float=keep_float)
    ranges = calibrate(model, feeds, plan.tensors, method=method)
    return write_static(model, plan, ranges, codes=codes, layer_codes=layer_codes)


def write_static(
    model: onnx.ModelProto,
    plan: StaticPlan,
    ranges: Mapping[str, Range],
    *,
    codes: WeightCode = "s8",
    layer_codes: Mapping[str, WeightCode] | None = None,
) -> onnx.ModelProto:
    """Return the graph with codes: u8 activations per tensor, weights per output channel.

    Args:
        model: float graph.
        plan: made of the same graph.
        ranges: of every tensor of the plan.
        codes: of the weights.
        layer_codes: node -> codes of its weights, where they differ from `codes`.
    """
    return _Writer(model, plan, ranges, codes, layer_codes or {}).write()


def weight_codes(
    weight: FloatArray,
    axis: int,
    codes: WeightCode,
    *,
    smallest: npt.NDArray[np.float64] | float = 0.0,
) -> tuple[npt.NDArray[Any], FloatArray, int]:
    """Return a weight's codes, its scale per channel of `axis`, and the zero point of all.

    Symmetric: the largest absolute value of a channel gets the largest code, unless its scale
    would be below `smallest`, shape (channels,). -128 is never used: ARM cores overflow on
    pairs of it, without dot products everywhere and with them in depthwise convolutions.
    """
    largest = _LARGEST[codes]
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.maximum(np.abs(weight).max(axis=others) / largest, smallest)
    scale = np.maximum(scale, _SMALLEST_SCALE).astype(np.float32)  # (channels,)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    rounded = np.clip(np.rint(weight / scale.reshape(shape)), -largest, largest)
    if codes == "u8":
        return (rounded + 128).astype(np.uint8), scale, 128
    return rounded.astype(np.int8), scale, 0


def activation_scale(value_range: Range) -> tuple[float, int]:
    """Return scale and zero point of u8 codes over a range that holds 0."""
    scale = max((value_range.high - value_range.low) / 255, _SMALLEST_SCALE)
    scale = float(np.float32(scale))
    return scale, int(np.clip(np.rint(-value_range.low / scale), 0, 255))


class _Writer:
    """One graph on its way to codes."""

    def __init__(
        self,
        model: onnx.ModelProto,
        plan: StaticPlan,
        ranges: Mapping[str, Range],
        codes: WeightCode,
        layer_codes: Mapping[str, WeightCode],
    ) -> None:
        self.model = copy_model(model)
        self.plan, self.codes, self.layer_codes = plan, codes, layer_codes
        self.layers = {layer.node: layer for layer in plan.layers}
        self.initializers = {t.name: t for t in self.model.graph.initializer}
        self.scales = {name: activation_scale(ranges[name]) for name in plan.tensors}
        # (weight, axis) -> the scales below which a bias would leave int32
        self.smallest: dict[tuple[str, int], npt.NDArray[np.float64]] = {}
        self.added: dict[str, TensorProto] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.renamed: dict[str, str] = {}  # a tensor -> its version that went through codes
        self.side_pairs: set[str] = set()

    def write(self) -> onnx.ModelProto:
        graph = self.model.graph
        self._share_scales()
        self._make_room_for_biases()
        follow = {layer: node for node, layer in self.plan.rectifiers.items()}
        by_name = {node.name: node for node in graph.node}
        outputs = {value.name for value in graph.output}
        for node in graph.node:
            if node.name in self.plan.rectifiers:
                continue
            if node.name in self.layers:
                self._layer(node)
                self._rectify(node, follow, by_name)
                self._emit(node, coded=node.output[0] in self.scales, outputs=outputs)
            elif node.name in self.plan.elementwise or node.name in self.plan.shuffles:
                count = 1 if node.name in self.plan.shuffles else len(node.input)
                for i in range(count):
                    node.input[i] = self._coded(node.input[i])
                self._rectify(node, follow, by_name)
                self._emit(node, coded=True, outputs=outputs)
            else:
                for i, name in enumerate(node.input):
                    node.input[i] = self.renamed.get(name, name)
                self.nodes.append(node)
        del graph.node[:]
        graph.node.extend(self.nodes)
        self._settle_initializers()
        return self.model

    def _rectify(
        self,
        node: onnx.NodeProto,
        follow: Mapping[str, str],
        by_name: Mapping[str, onnx.NodeProto],
    ) -> None:
        """Let a node give what the rectifier behind it gave: codes below 0 there are none."""
        if node.name in follow:
            node.output[0] = by_name[follow[node.name]].output[0]

    def _share_scales(self) -> None:
        """Give what a shuffle returns the scale of what it is given: the codes are the same."""
        for node in self.model.graph.node:
            if node.name in self.plan.shuffles:
                self.scales[node.output[0]] = self.scales[node.input[0]]

    def _make_room_for_biases(self) -> None:
        """Find the smallest scales of weights with which every bias fits in int32.

        A bias counts in steps of the input's scale times the weight's: beside weights of 0, as of
        a channel that was pruned or that BatchNorm switched off, it would be cut down to 0.
        """
        for node in self.model.graph.node:
            layer = self.layers.get(node.name)
            bias = None if layer is None else self._bias(node, layer)
            if layer is None or bias is None:
                continue
            key = layer.weight, layer.axis
            needed = np.abs(bias) / (self.scales[layer.input][0] * _LARGEST_BIAS)
            self.smallest[key] = np.maximum(needed, self.smallest.get(key, 0.0))

    def _emit(self, node: onnx.NodeProto, *, coded: bool, outputs: Collection[str]) -> None:
        """Append a node that works on codes; where `coded`, everyone after reads its codes."""
        name = node.output[0]
        if not coded:
            self.nodes.append(node)
            return
        if name in outputs:  # the graph's output keeps its name, behind the codes
            node.output[0] = f"{name}_float"
            self.nodes.append(node)
            self._pair(f"{name}_float", name, self.scales[name])
            self.renamed[name] = name
            return
        self.nodes.append(node)
        self._pair(name, f"{name}_dequantized", self.scales[name])
        self.renamed[name] = f"{name}_dequantized"

    def _coded(self, tensor: str) -> str:
        """Return a tensor's version that went through codes, made here if nobody has yet."""
        if tensor in self.renamed:
            return self.renamed[tensor]
        if tensor not in self.scales:
            return tensor
        # made by a float node: whoever else reads it keeps the float
        coded = f"{tensor}_dequantized"
        if tensor not in self.side_pairs:
            self.side_pairs.add(tensor)
            self._pair(tensor, coded, self.scales[tensor])
        return coded

    def _pair(self, source: str, target: str, scale: tuple[float, int]) -> None:
        scale_name = self._constant(f"{source}_scale", np.array(scale[0], np.float32))
        zero_name = self._constant(f"{source}_zero_point", np.array(scale[1], np.uint8))
        quantized = f"{source}_quantized"
        self.nodes += [
            helper.make_node(
                "QuantizeLinear", [source, scale_name, zero_name], [quantized],
                name=f"{source}_QuantizeLinear",
            ),
            helper.make_node(
                "DequantizeLinear", [quantized, scale_name, zero_name], [target],
                name=f"{source}_DequantizeLinear",
            ),
        ]  # fmt: skip

    def _layer(self, node: onnx.NodeProto) -> None:
        """Point a layer's inputs at codes: activation, weight, bias."""
        layer = self.layers[node.name]
        node.input[0] = self._coded(layer.input)
        codes = self.layer_codes.get(layer.node, self.codes)
        node.input[1], scale = self._weight(layer, codes)
        bias = self._bias(node, layer)
        if bias is None:
            return
        if layer.op == "Gemm" and attribute(node, "beta", 1.0) != 1.0:
            next(a for a in node.attribute if a.name == "beta").f = 1.0
        bias_scale = (np.float32(self.scales[layer.input][0]) * scale).astype(np.float32)
        bias_scale = np.maximum(bias_scale, np.float32(_SMALLEST_SCALE))
        rounded = np.clip(np.rint(bias / bias_scale), -(2**31), 2**31 - 1).astype(np.int32)
        node.input[2] = self._dequantized(f"{node.name}_bias", rounded, bias_scale, None, 0)

    def _bias(self, node: onnx.NodeProto, layer: Layer) -> npt.NDArray[np.float64] | None:
        """Return what a layer adds to each channel, shape (channels,).

        None where it adds nothing, or something else to each row, which has to stay float.
        """
        if not layer.bias:
            return None
        bias = numpy_helper.to_array(self.initializers[layer.bias]).astype(np.float64)
        channels = self.initializers[layer.weight].dims[layer.axis]
        if bias.size != 1 and (bias.size != channels or bias.shape[-1] != channels):
            return None
        factor = attribute(node, "beta", 1.0) if layer.op == "Gemm" else 1.0
        return np.broadcast_to(bias.reshape(-1) * factor, (channels,))

    def _weight(self, layer: Layer, codes: WeightCode) -> tuple[str, FloatArray]:
        weight = numpy_helper.to_array(self.initializers[layer.weight])
        smallest = self.smallest.get((layer.weight, layer.axis), 0.0)
        coded, scale, zero_point = weight_codes(weight, layer.axis, codes, smallest=smallest)
        base = f"{layer.weight}_axis{layer.axis}_{codes}"
        name = f"{base}_dequantized"
        if f"{base}_codes" not in self.added:
            zeros = np.full(scale.shape, zero_point, coded.dtype)
            name = self._dequantized(base, coded, scale, zeros, layer.axis)
        return name, scale

    def _dequantized(
        self,
        base: str,
        codes: npt.NDArray[Any],
        scale: FloatArray,
        zeros: npt.NDArray[Any] | None,
        axis: int,
    ) -> str:
        """Append a DequantizeLinear of constant codes; return the name of what it gives."""
        inputs = [self._constant(f"{base}_codes", codes), self._constant(f"{base}_scale", scale)]
        if zeros is not None:
            inputs.append(self._constant(f"{base}_zero_point", zeros))
        name = f"{base}_dequantized"
        self.nodes.append(
            helper.make_node(
                "DequantizeLinear", inputs, [name], name=f"{base}_DequantizeLinear", axis=axis
            )
        )
        return name

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        self.added[name] = numpy_helper.from_array(value, name)
        return name

    def _settle_initializers(self) -> None:
        """Drop the float weights that nobody reads any more and add the codes."""
        graph = self.model.graph
        used = {name for node in graph.node for name in node.input}
        used |= {value.name for value in graph.output}
        kept = [t for t in graph.initializer if t.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        graph.initializer.extend(self.added.values())


def _consumers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    return consumers


def _only(
    consumers: Mapping[str, list[onnx.NodeProto]], tensor: str, outputs: Collection[str]
) -> onnx.NodeProto | None:
    """Return the one node that reads a tensor; None where there are more, or it is an output."""
    takers = consumers.get(tensor, [])
    return takers[0] if len(takers) == 1 and tensor not in outputs else None


def _keeps_codes(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Tell whether a node only moves values; a Pad may put zeros beside them."""
    if node.op_type != "Pad" or len(node.input) < 3 or not node.input[2]:
        return node.op_type in _SHUFFLES
    value = next((t for t in model.graph.initializer if t.name == node.input[2]), None)
    return value is not None and float(numpy_helper.to_array(value)) == 0.0


def _rectifies(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Tell whether a range that begins at 0 does all that a node does.

    Clip's upper bound needs no look: no calibrated value lies above it.
    """
    if node.op_type == "Relu":
        return True
    if node.op_type != "Clip" or len(node.input) < 2:
        return False
    low = next((t for t in model.graph.initializer if t.name == node.input[1]), None)
    return low is not None and float(numpy_helper.to_array(low)) == 0.0
