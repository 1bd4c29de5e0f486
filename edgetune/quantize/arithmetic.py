"""What a CPU without, or with, dot-product instructions answers for a quantized graph.

onnxruntime on x86 without VNNI multiplies u8 activations by s8 weights with VPMADDUBSW: the
products of the neighbouring reduction indices 2j and 2j + 1 are added in saturating int16, the
pairs then in int32. VNNI and ARM add every product in int32, and so does x86 where the weights
are u8, where the activations are s8, in depthwise Conv and in ConvInteger. So both answers can
be had on any CPU: the sum of u8 x u8 codes is exact everywhere, and the saturating sum is

    sum_j clamp(p_j, -32768, 32767) = sum_j p_j - sum_j [max(p_j - 32767, 0) - max(-32768 - p_j, 0)]
    p_j = a_2j w_2j + a_2j+1 w_2j+1          (a: 0..255, raw codes, no zero point taken off)

where only the few pairs of weights with one sign and |w_2j| + |w_2j+1| >= 129 can saturate
(255 x 128 < 32767). The reduction of MatMul and Gemm runs along K, that of Conv over (kernel
position, input channel of the group), channel fastest, and padding is the activation's zero
point.

Which nodes are integer is for onnxruntime to say: its own optimizer fuses the graph first, up to
the level that is the same on every CPU, and the fused nodes are rewritten.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PMADDUBSW; MLAS (the kernels
of onnxruntime), seen through its answers with VNNI and with VNNI hidden.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetune.errors import ConfigError
from edgetune.quantize.layers import Feeds, arrays, attribute
from edgetune.runtime.device import int8_arithmetic
from edgetune.runtime.ort import run_session

Arithmetic = Literal["saturates", "exact"]
IntArray = npt.NDArray[np.int64]

# |w0| + |w1| from which a pair can leave int16: 255 x 129 = 32895 > 32767, 255 x 128 = 32640 is not
_SMALLEST_SUM = 129
# (operator, position of its weights); everything else that multiplies integers is refused
_WEIGHT_INPUT = {
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "ConvInteger": 1,
}
_UNKNOWN = {"QAttention": 1, "DynamicQuantizeLSTM": 1}
_CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
# operators that pass codes on as they are
_MOVES = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "MaxPool",
    "Gather", "Pad",
)  # fmt: skip
# a float32 sum of excesses (each <= 255 x 256 - 32767 = 32513) is exact up to 2^24
_PAIRS_PER_SUM = 512
_PAIRS_AT_ONCE = 16384  # bounds the memory that one step takes
_BLOCK = 32  # output channels that share a dense sum over their pairs


@dataclass(frozen=True, kw_only=True)
class LayerSaturation:
    """How often one layer with s8 weights saturated on the feeds.

    node: the node's name in the quantized model.
    candidate_pairs: pairs of weights that could saturate at all.
    pair_sums: how many sums of such pairs were evaluated.
    saturated: how many of them saturated.
    outputs_hit: share of the layer's output elements with a saturated pair, 0 to 1.
    worst_error: largest |saturated - exact| of an accumulator, in int32 units.
    """

    node: str
    candidate_pairs: int
    pair_sums: int
    saturated: int
    outputs_hit: float
    worst_error: int


def host_arithmetic() -> Arithmetic:
    """Return how this machine's CPU adds u8 x s8 products."""
    return int8_arithmetic()


def emulate(model: onnx.ModelProto, arithmetic: Arithmetic) -> onnx.ModelProto:
    """Return a graph that gives, on every CPU, the integers of a CPU with that arithmetic.

    The integer layers' outputs are reproduced bit for bit; float operators between them are left
    as they are and round as the host's kernels do.

    Args:
        model: quantized, as QDQ or with the integer operators of ONNX and onnxruntime; weights
            inside.
        arithmetic: the CPU to answer for.

    Returns:
        The graph after onnxruntime's "extended" optimizations (so with its own operators), in
        which layers that could saturate are replaced; the others stay as they were. Where no
        layer could, every CPU gives the same integers, and the model comes back as it is.

    Raises:
        ConfigError: onnxruntime refuses the model, or a layer that could saturate has a form
            that is not known here.
    """
    fused = _fused(model)
    layers = {_key(layer.node): layer for layer in _integer_layers(fused) if layer.pairs.count}
    if not layers:
        return model
    graph = _Graph(fused)
    nodes: list[onnx.NodeProto] = []
    for node in fused.graph.node:
        layer = layers.get(_key(node))
        if layer is None:
            nodes.append(node)
            continue
        if arithmetic == "exact":
            graph.unsigned_weights(layer)
        else:
            graph.saturating(layer)
        nodes += graph.take()
    return graph.finished(nodes)


def saturation(model: onnx.ModelProto, feeds: Iterable[Feeds]) -> list[LayerSaturation]:
    """Count, layer by layer, what saturates on a CPU without dot products.

    Each layer sees the activations of such a CPU, the earlier layers' saturation included.

    Args:
        model: as for `emulate`.
        feeds: the graph's inputs by name, one run each.

    Returns:
        One entry per integer layer with s8 weights, in the graph's order.

    Raises:
        ConfigError: as for `emulate`.
    """
    fused = _fused(model)
    found = _integer_layers(fused)
    layers = {_key(layer.node): layer for layer in found}
    graph = _Graph(fused)
    nodes: list[onnx.NodeProto] = []
    counts: dict[str, list[str]] = {}
    for node in fused.graph.node:
        layer = layers.get(_key(node))
        if layer is None or not layer.pairs.count:
            nodes.append(node)
            continue
        counts[_key(node)] = graph.saturating(layer, count=True)
        nodes += graph.take()
    counting = graph.finished(nodes)
    del counting.graph.output[:]
    names = [name for outputs in counts.values() for name in outputs]
    counting.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.INT64, []) for name in names
    )
    totals = {key: np.zeros(4, np.int64) for key in counts}
    if names:
        session = _session(counting)
        for feed in feeds:
            values = [int(v) for v in run_session(session, names, feed)]
            for index, total in enumerate(totals.values()):
                saturated, hit, worst, outputs = values[4 * index : 4 * index + 4]
                total[:2] += saturated, hit
                total[2] = max(total[2], worst)
                total[3] += outputs
    original = _OriginalNames(model)
    reports = [_report(layer, totals.get(_key(layer.node)), original) for layer in found]
    order = {node.name: index for index, node in enumerate(model.graph.node)}
    return sorted(reports, key=lambda r: order.get(r.node, len(order)))


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """The pairs of one layer that can saturate, ordered by output channel.

    output: output channel, shape (pairs,).
    rows: the two rows of the unfolded activations, shape (pairs, 2).
    weights: magnitudes of the two weights, shape (pairs, 2).
    sign: +1 or -1, of both weights, shape (pairs,).
    outputs: the layer's number of output channels.
    """

    output: IntArray
    rows: IntArray
    weights: IntArray
    sign: IntArray
    outputs: int

    @property
    def count(self) -> int:
        return len(self.output)

    def chosen(self, which: IntArray) -> "_Pairs":
        return _Pairs(
            output=self.output[which],
            rows=self.rows[which],
            weights=self.weights[which],
            sign=self.sign[which],
            outputs=self.outputs,
        )

    def chunks(self) -> Iterator["_Pairs"]:
        """Yield parts that are small enough, at most _PAIRS_PER_SUM of each output channel."""
        first = np.searchsorted(self.output, self.output)  # where each pair's channel begins
        round_ = (np.arange(self.count) - first) // _PAIRS_PER_SUM
        for number in range(int(round_.max(initial=-1)) + 1):
            which = np.flatnonzero(round_ == number)
            for start in range(0, len(which), _PAIRS_AT_ONCE):
                yield self.chosen(which[start : start + _PAIRS_AT_ONCE])


@dataclass(frozen=True, kw_only=True)
class _IntegerLayer:
    """A fused node with constant s8 weights: codes as stored, zero point, what can saturate."""

    node: onnx.NodeProto
    weight: str
    codes: npt.NDArray[np.int8]
    zero_point: npt.NDArray[np.int8]
    pairs: _Pairs


def _integer_layers(model: onnx.ModelProto) -> list[_IntegerLayer]:
    """Return the layers of a fused graph that have s8 weights, in its order.

    Raises:
        ConfigError: a layer could saturate in a way that is not known here.
    """
    constants = arrays(model)
    types = _activation_types(model)
    layers = []
    for node in model.graph.node:
        for inner in _subgraph_nodes(node):
            if inner.op_type in _WEIGHT_INPUT or inner.op_type in _UNKNOWN:
                raise _refused(inner, f"is integer and inside the {node.op_type} {node.name!r}")
        if node.op_type in _UNKNOWN:
            weights = constants.get(node.input[_UNKNOWN[node.op_type]])
            if weights is None or weights.dtype == np.int8:
                raise _refused(node, "has s8 weights in a kernel that is not known here")
        if node.op_type not in _WEIGHT_INPUT:
            continue
        weight = node.input[_WEIGHT_INPUT[node.op_type]]
        codes = constants.get(weight)
        if codes is None:
            point = constants.get(_input(node, _weight_zero_point(node)))
            if (types.get(weight) if point is None else point.dtype) != np.uint8:
                raise _refused(node, "multiplies by s8 codes that are no constant")
        elif codes.dtype == np.int8:
            layers.append(_integer_layer(node, codes, constants, types))
    return layers


def _integer_layer(
    node: onnx.NodeProto,
    codes: npt.NDArray[np.int8],
    constants: dict[str, npt.NDArray[Any]],
    types: dict[str, Any],
) -> _IntegerLayer:
    name = _input(node, _weight_zero_point(node))
    if name and name not in constants:
        raise _refused(node, "has a weight zero point that is no constant")
    layer = _IntegerLayer(
        node=node,
        weight=node.input[_WEIGHT_INPUT[node.op_type]],
        codes=codes,
        zero_point=constants[name] if name else np.array(0, np.int8),
        pairs=_node_pairs(node, codes),
    )
    if not layer.pairs.count:
        return layer
    activation = _activation_type(node, constants, types)
    if activation == np.int8:
        return _without_pairs(layer)
    if activation != np.uint8:
        raise _refused(node, "has an input whose type is not known")
    if attribute(node, "channels_last", 0):
        raise _refused(node, "has its channels last")
    if attribute(node, "transA", 0):
        raise _refused(node, "transposes its input")
    if attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise _refused(node, "has auto_pad; write its padding as numbers")
    return layer


def _without_pairs(layer: _IntegerLayer) -> _IntegerLayer:
    return _IntegerLayer(
        node=layer.node,
        weight=layer.weight,
        codes=layer.codes,
        zero_point=layer.zero_point,
        pairs=layer.pairs.chosen(np.zeros(0, np.int64)),
    )


def _node_pairs(node: onnx.NodeProto, codes: npt.NDArray[np.int8]) -> _Pairs:
    """Return what can saturate, with the rows of the unfolded activations that it reads."""
    if node.op_type == "QLinearConv":
        outputs, channels = codes.shape[:2]  # channels of one group
        groups = attribute(node, "group", 1)
        reduced = np.moveaxis(codes, 1, -1).reshape(outputs, -1)  # (out, taps x channels)
        if channels == 1 and outputs == groups:  # depthwise kernels are exact
            return _pairs(reduced[:, :0])
        pairs = _pairs(reduced)
        group = pairs.output[:, None] // (outputs // groups)
        tap, channel = np.divmod(pairs.rows, channels)
        rows = tap * (channels * groups) + group * channels + channel
        return _Pairs(
            output=pairs.output,
            rows=rows,
            weights=pairs.weights,
            sign=pairs.sign,
            outputs=outputs,
        )
    if node.op_type == "ConvInteger":  # weights are the left factor there: exact
        return _pairs(codes.reshape(len(codes), -1)[:, :0])
    if codes.ndim != 2:
        raise _refused(node, f"has weights of shape {codes.shape}, expected two axes")
    return _pairs(codes if attribute(node, "transB", 0) else codes.T)


def _pairs(reduced: npt.NDArray[np.int8]) -> _Pairs:
    """Return what can saturate of weights of shape (outputs, reduction)."""
    even = np.pad(reduced.astype(np.int64), ((0, 0), (0, reduced.shape[1] % 2)))
    first, second = even[:, 0::2], even[:, 1::2]
    alike = np.sign(first) == np.sign(second)
    output, pair = np.nonzero(alike & (np.abs(first) + np.abs(second) >= _SMALLEST_SUM))
    weights = np.stack([first[output, pair], second[output, pair]], axis=1)
    return _Pairs(
        output=output,
        rows=np.stack([2 * pair, 2 * pair + 1], axis=1),
        weights=np.abs(weights),
        sign=np.sign(weights[:, 0]),
        outputs=len(reduced),
    )


@dataclass
class _Graph:
    """Nodes and initializers in the making, beside a fused model that stays as it is."""

    model: onnx.ModelProto
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    made: int = 0

    def __post_init__(self) -> None:
        self.types = {t.name: t.data_type for t in self.model.graph.initializer}

    def take(self) -> list[onnx.NodeProto]:
        nodes, self.nodes = self.nodes, []
        return nodes

    def finished(self, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
        """Return the model with these nodes and only the initializers that they use."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        used = {name for node in nodes for name in _names_read(node)}
        used |= {output.name for output in model.graph.output}
        kept = [t for t in model.graph.initializer if t.name in used]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        model.graph.initializer.extend(t for name, t in self.constants.items() if name in used)
        # onnxruntime's optimizer adds every domain that it knows
        known = [*nodes, *(inner for node in nodes for inner in _subgraph_nodes(node))]
        domains = {node.domain for node in known} | {""}
        imports = [o for o in model.opset_import if o.domain in domains]
        del model.opset_import[:]
        model.opset_import.extend(imports)
        return model

    def add(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node of one output; return the output's name."""
        output = self.fresh(op)
        self.nodes.append(
            helper.make_node(op, list(inputs), [output], output, domain=domain, **attributes)
        )
        return output

    def constant(self, value: npt.NDArray[Any]) -> str:
        name = self.fresh("constant")
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def fresh(self, what: str) -> str:
        self.made += 1
        return f"edgetune.arithmetic/{what}_{self.made}"

    def unsigned(self, layer: _IntegerLayer) -> tuple[str, str]:
        """Return weights and their zero point as u8: the same differences, 128 higher."""
        names = (f"{layer.weight}/u8", f"{layer.weight}/u8_zero_point")
        for name, codes in zip(names, (layer.codes, layer.zero_point), strict=True):
            if name not in self.constants:
                shifted = (codes.astype(np.int16) + 128).astype(np.uint8)
                self.constants[name] = numpy_helper.from_array(shifted, name)
        return names

    def unsigned_weights(self, layer: _IntegerLayer) -> None:
        """Append the layer's own node, on u8 weights."""
        node = onnx.NodeProto()
        node.CopyFrom(layer.node)
        at = _weight_zero_point(node)
        node.input.extend([""] * (at + 1 - len(node.input)))
        node.input[_WEIGHT_INPUT[node.op_type]], node.input[at] = self.unsigned(layer)
        self.nodes.append(node)

    def saturating(self, layer: _IntegerLayer, *, count: bool = False) -> list[str]:
        """Append what gives the layer's output as VPMADDUBSW does.

        Returns:
            With `count`, the names of four int64 scalars: pair sums that saturated, outputs that
            have one, the largest error, the number of outputs. Else nothing.
        """
        node = layer.node
        weight, weight_zero_point = self.unsigned(layer)
        if node.op_type == "QLinearConv":
            activation, zero_point = node.input[0], node.input[2]
            point = self.constant(np.array(int(layer.zero_point.reshape(-1)[0]) + 128, np.uint8))
            exact = self.add("ConvInteger", activation, weight, zero_point, point)
            self.nodes[-1].attribute.extend(a for a in node.attribute if a.name in _CONV_ATTRIBUTES)
            columns = self.unfolded(layer)
        else:
            activation, zero_point, scale = self.activation(node)
            factor = weight
            if attribute(node, "transB", 0):
                factor = self.add("Transpose", weight, perm=[1, 0])
            exact = self.add("MatMulInteger", activation, factor, zero_point, weight_zero_point)
            columns = self.as_columns(activation)
        rank = 1 if node.op_type != "QLinearConv" else layer.codes.ndim - 2
        total, counts = exact, []
        for chunk in layer.pairs.chunks():
            slots = _Slots.of(chunk)
            excess = self.excess(columns, chunk, slots, rank)
            lost = self.summed(excess, slots, slots.matrix(chunk, chunk.sign), rank)
            total = self.add("Sub", total, self.like_sums(lost, node, exact))
            if count:
                hits = self.summed(excess, slots, slots.matrix(chunk, np.abs(chunk.sign)), rank)
                counts.append((excess, hits))
        if node.op_type == "QLinearConv":
            result = self.requantized(node, total, rank)
        else:
            result = self.scaled(node, total, scale)
        self.nodes.append(helper.make_node("Identity", [result], [node.output[0]], node.name))
        return self.counted(counts, exact, total) if count else []

    def activation(self, node: onnx.NodeProto) -> tuple[str, str, str]:
        """Return the names of a matrix product's u8 codes, their zero point and scale."""
        if node.op_type == "DynamicQuantizeMatMul":
            codes, scale, point = (self.fresh("DynamicQuantizeLinear") for _ in range(3))
            self.nodes.append(
                helper.make_node(
                    "DynamicQuantizeLinear", [node.input[0]], [codes, scale, point], codes
                )
            )
            return codes, point, scale
        at = {"MatMulInteger": (2, -1), "MatMulIntegerToFloat": (4, 2)}.get(node.op_type, (2, 1))
        point = _input(node, at[0]) or self.constant(np.array(0, np.uint8))
        return node.input[0], point, _input(node, at[1]) if at[1] >= 0 else ""

    def unfolded(self, layer: _IntegerLayer) -> str:
        """Return a Conv's activations unfolded: (N, taps x channels, ...outputs)."""
        node, kernel = layer.node, layer.codes.shape[2:]
        rank = len(kernel)
        pads = list(attribute(node, "pads", [0] * 2 * rank))
        if attribute(node, "auto_pad", b"NOTSET") == b"VALID":
            pads = [0] * 2 * rank
        strides = list(attribute(node, "strides", [1] * rank))
        dilations = list(attribute(node, "dilations", [1] * rank))
        padded = node.input[0]
        if any(pads):
            amounts = np.array([0, 0, *pads[:rank], 0, 0, *pads[rank:]], np.int64)
            padded = self.add("Pad", padded, self.constant(amounts), node.input[2])
        axes = self.constant(np.arange(2, 2 + rank, dtype=np.int64))
        steps = self.constant(np.array(strides, np.int64))
        taps = []
        for tap in np.ndindex(*kernel):
            first = [t * d for t, d in zip(tap, dilations, strict=True)]
            # as many at the end are left to the later taps; none: to the very end
            after = [d * (k - 1 - t) for d, k, t in zip(dilations, kernel, tap, strict=True)]
            last = [-a if a else np.iinfo(np.int64).max for a in after]
            starts, ends = (self.constant(np.array(v, np.int64)) for v in (first, last))
            taps.append(self.add("Slice", padded, starts, ends, axes, steps))
        return taps[0] if len(taps) == 1 else self.add("Concat", *taps, axis=1)

    def as_columns(self, activation: str) -> str:
        """Return (..., K) as (1, K, rows), the layout of an unfolded Conv."""
        width = self.add("Shape", activation, start=-1)
        shape = self.add("Concat", self.constant(np.array([-1], np.int64)), width, axis=0)
        rows = self.add("Reshape", activation, shape)
        columns = self.add("Transpose", rows, perm=[1, 0])
        return self.add("Unsqueeze", columns, self.constant(np.array([0], np.int64)))

    def excess(self, columns: str, pairs: _Pairs, slots: "_Slots", rank: int) -> str:
        """Return how far each pair's |sum| leaves int16: (N, slots, ...), float32 integers."""
        terms = []
        for side in (0, 1):
            rows = self.constant(slots.spread(pairs.rows[:, side], 0))
            codes = self.add("Gather", columns, rows, axis=1)
            real = self.add("Cast", codes, to=TensorProto.FLOAT)
            weights = slots.spread(pairs.weights[:, side], 0)
            terms.append(self.add("Mul", real, self.real(weights, rank)))
        limit = slots.spread(np.where(pairs.sign > 0, 32767, 32768), 32767)
        beyond = self.add("Sub", self.add("Add", *terms), self.real(limit, rank))
        return self.add("Relu", beyond)

    def summed(self, excess: str, slots: "_Slots", matrix: IntArray, rank: int) -> str:
        """Return matrix x excess, block by block: int32 (N, outputs, ...)."""
        weights = matrix.reshape(*matrix.shape, *[1] * rank).astype(np.float32)
        sums = self.add("Conv", excess, self.constant(weights), group=slots.blocks)
        whole = self.add("Cast", sums, to=TensorProto.INT32)
        known = min(slots.blocks * _BLOCK, slots.outputs - slots.first)
        part = self.add("Slice", whole, self.whole(0), self.whole(known), self.whole(1))
        after = slots.outputs - slots.first - known
        if slots.first == after == 0:
            return part
        amounts = [0, slots.first, *[0] * rank, 0, after, *[0] * rank]
        return self.add("Pad", part, self.whole(*amounts))

    def like_sums(self, sums: str, node: onnx.NodeProto, exact: str) -> str:
        """Return (1, outputs, rows) as the matrix product's (..., outputs); a Conv's as it is."""
        if node.op_type == "QLinearConv":
            return sums
        rows = self.add("Transpose", sums, perm=[0, 2, 1])
        return self.add("Reshape", rows, self.add("Shape", exact))

    def requantized(self, node: onnx.NodeProto, total: str, rank: int) -> str:
        """Return a QLinearConv's codes, of int32 sums (N, outputs, ...)."""
        per_channel = self.whole(1, -1, *[1] * rank)
        if bias := _input(node, 8):
            total = self.add("Add", total, self.add("Reshape", bias, per_channel))
        product = self.add("Mul", node.input[1], node.input[4])
        scale = self.add("Div", product, node.input[6])
        return self.codes(total, self.add("Reshape", scale, per_channel), node.input[7])

    def scaled(self, node: onnx.NodeProto, total: str, activation_scale: str) -> str:
        """Return a matrix product's output, of its int32 sums (..., outputs)."""
        if node.op_type == "MatMulInteger":
            return total
        if node.op_type in ("MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
            at = {"MatMulIntegerToFloat": (3, 6), "DynamicQuantizeMatMul": (2, 4)}[node.op_type]
            scale = self.add("Mul", activation_scale, node.input[at[0]])
            real = self.add("Mul", self.add("Cast", total, to=TensorProto.FLOAT), scale)
            bias = _input(node, at[1])
            return self.add("Add", real, bias) if bias else real
        if node.op_type == "QGemm" and (bias := _input(node, 6)):
            total = self.add("Add", total, bias)
        if (alpha := attribute(node, "alpha", 1.0)) != 1.0:
            factor = self.constant(np.array(alpha, np.float32))
            activation_scale = self.add("Mul", factor, activation_scale)
        scale = self.add("Mul", activation_scale, node.input[4])
        at_output = (7, 8) if node.op_type == "QGemm" else (6, 7)
        output_scale, output_point = (_input(node, at) for at in at_output)
        if not output_scale:
            return self.add("Mul", self.add("Cast", total, to=TensorProto.FLOAT), scale)
        return self.codes(total, self.add("Div", scale, output_scale), output_point)

    def codes(self, total: str, scale: str, zero_point: str) -> str:
        """Return int32 sums as 8-bit codes: scaled, rounded half to even, moved, clamped."""
        kind = self.types.get(zero_point, TensorProto.UINT8)
        low, high = (-128.0, 127.0) if kind == TensorProto.INT8 else (0.0, 255.0)
        real = self.add("Mul", self.add("Cast", total, to=TensorProto.FLOAT), scale)
        code = self.add("Round", real)
        if zero_point:
            code = self.add("Add", code, self.add("Cast", zero_point, to=TensorProto.FLOAT))
        bounds = (self.constant(np.array(v, np.float32)) for v in (low, high))
        return self.add("Cast", self.add("Clip", code, *bounds), to=kind)

    def counted(self, parts: list[tuple[str, str]], exact: str, total: str) -> list[str]:
        """Return the names of the four int64 scalars that `saturating` describes."""

        def number(flags: str) -> str:
            ones = self.add("Cast", flags, to=TensorProto.INT64)
            return self.add("ReduceSum", ones, keepdims=0)

        zero = self.constant(np.array(0, np.float32))
        saturated = [number(self.add("Greater", excess, zero)) for excess, _ in parts]
        # a sum over the parts could leave int32 only where the accumulator itself does
        hits = _folded(self, "Add", [hits for _, hits in parts])
        none = self.constant(np.array(0, np.int32))
        error = self.add("Abs", self.add("Sub", exact, total))
        worst = self.add("ReduceMax", error, keepdims=0)
        return [
            _folded(self, "Add", saturated),
            number(self.add("Greater", hits, none)),
            self.add("Cast", worst, to=TensorProto.INT64),
            self.add("Size", exact),
        ]

    def real(self, values: IntArray, rank: int) -> str:
        """Return a float32 constant with one value per slot."""
        return self.constant(values.astype(np.float32).reshape(-1, *[1] * rank))

    def whole(self, *values: int) -> str:
        """Return an int64 constant, shape (values,)."""
        return self.constant(np.array(values, np.int64))


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """Where pairs lie so that a grouped 1x1 Conv adds them up.

    Blocks of _BLOCK output channels, from channel `first` on, have `per_block` slots each.

    index: each pair's slot, shape (pairs,).
    """

    first: int
    blocks: int
    per_block: int
    index: IntArray
    outputs: int

    @classmethod
    def of(cls, pairs: _Pairs) -> "_Slots":
        block = pairs.output // _BLOCK
        low = int(block.min())
        sizes = np.bincount(block - low)
        begins = np.searchsorted(block, block)
        return cls(
            first=low * _BLOCK,
            blocks=len(sizes),
            per_block=int(sizes.max()),
            index=(block - low) * int(sizes.max()) + np.arange(pairs.count) - begins,
            outputs=pairs.outputs,
        )

    def spread(self, values: IntArray, padding: int) -> IntArray:
        """Return one value per slot, `padding` in the slots of no pair."""
        spread = np.full(self.blocks * self.per_block, padding, np.int64)
        spread[self.index] = values
        return spread

    def matrix(self, pairs: _Pairs, values: IntArray) -> IntArray:
        """Return (blocks x _BLOCK, per_block): each pair's value in its output channel's row."""
        matrix = np.zeros((self.blocks * _BLOCK, self.per_block), np.int64)
        matrix[pairs.output - self.first, self.index % self.per_block] = values
        return matrix


def _folded(graph: _Graph, op: str, names: Sequence[str]) -> str:
    result = names[0]
    for name in names[1:]:
        result = graph.add(op, result, name)
    return result


def _report(
    layer: _IntegerLayer, total: IntArray | None, names: "_OriginalNames"
) -> LayerSaturation:
    saturated, hit, worst, outputs = (0, 0, 0, 0) if total is None else map(int, total)
    return LayerSaturation(
        node=names.of(layer),
        candidate_pairs=layer.pairs.count,
        pair_sums=layer.pairs.count * (outputs // layer.pairs.outputs),
        saturated=saturated,
        outputs_hit=hit / outputs if outputs else 0.0,
        worst_error=worst,
    )


class _OriginalNames:
    """Finds the node of the model as it was given that a fused node came from, by its weights."""

    def __init__(self, model: onnx.ModelProto) -> None:
        users = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                users[name].append(node)
        self._names: dict[str, list[str]] = {}
        for tensor in model.graph.initializer:
            found = list(users[tensor.name])
            for node in list(found):
                if node.op_type == "DequantizeLinear":
                    found += users[node.output[0]]
            self._names[tensor.name] = [
                n.name for n in found if n.op_type not in ("DequantizeLinear", "Transpose")
            ]

    def of(self, layer: _IntegerLayer) -> str:
        names = self._names.get(layer.weight, [])
        return layer.node.name if layer.node.name in names or not names else names.pop(0)


def _fused(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model as onnxruntime's optimizer leaves it, the same on every CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    # else s8 activations would become u8 on x86 and stay s8 on ARM
    options.add_session_config_entry("session.qdqisint8allowed", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fused.onnx"
        options.optimized_model_filepath = str(path)
        _session(model, options)
        return onnx.load(path)


def _session(model: onnx.ModelProto, options: Any = None) -> Any:
    import onnxruntime

    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        said = " ".join(str(error).split())
        raise ConfigError(f"the quantized model does not run here: {said}") from error


def _activation_type(
    node: onnx.NodeProto, constants: dict[str, npt.NDArray[Any]], types: dict[str, Any]
) -> Any:
    """Return the dtype of a node's activation codes; None where it can't be told."""
    if node.op_type == "DynamicQuantizeMatMul":
        return np.uint8
    at = {"MatMulInteger": 2, "MatMulIntegerToFloat": 4}.get(node.op_type, 2)
    point = _input(node, at)
    return constants[point].dtype if point in constants else types.get(node.input[0])


def _activation_types(model: onnx.ModelProto) -> dict[str, Any]:
    """Return the dtypes of the graph's inputs and of what its quantizing nodes make."""
    types: dict[str, Any] = {}
    for value in model.graph.input:
        kind = value.type.tensor_type.elem_type
        types[value.name] = helper.tensor_dtype_to_np_dtype(kind) if kind else None
    constants = arrays(model)
    for node in model.graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            types[node.output[0]] = np.dtype(np.uint8)
        if node.op_type == "QuantizeLinear":
            point = constants.get(_input(node, 2))
            types[node.output[0]] = np.dtype(np.uint8) if point is None else point.dtype
        if node.op_type in _MOVES:
            types[node.output[0]] = types.get(node.input[0])
    return types


def _weight_zero_point(node: onnx.NodeProto) -> int:
    """Return the position of the zero point of a node's weights among its inputs."""
    at = {"MatMulInteger": 3, "ConvInteger": 3, "DynamicQuantizeMatMul": 3}
    return at.get(node.op_type, 5)


def _input(node: onnx.NodeProto, at: int) -> str:
    """Return the name of an input, "" where the node has none there."""
    return str(node.input[at]) if at < len(node.input) else ""


def _key(node: onnx.NodeProto) -> str:
    return str(node.output[0])


def _names_read(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for inner in _subgraph_nodes(node):
        yield from inner.input


def _subgraph_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for found in node.attribute:
        for graph in [found.g, *found.graphs]:
            for inner in graph.node:
                yield inner
                yield from _subgraph_nodes(inner)


def _refused(node: onnx.NodeProto, why: str) -> ConfigError:
    return ConfigError(
        f"what saturates in {node.op_type} {node.name!r} can't be computed: it {why};"
        " use u8 weights there, or leave it in float"
    )
