"""Rewrite an inference graph into nodes that have a gradient.

Attention becomes the products that it stands for. What quantization has made of one product
(codes, scales, an integer product, a cast) becomes one unit again, since its gradient is that of
the product: the straight-through estimator (Bengio, Leonard, Courville 2013, arXiv:1308.3432).
"""

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgetune.autodiff.builder import MICROSOFT, Builder
from edgetune.autodiff.shapes import Tensor
from edgetune.errors import EdgetuneError
from edgetune.quantize.layers import attribute

# what onnxruntime's MultiHeadAttention adds where the mask is 0
MASKED = -10000.0
# places of a map times places of what comes of it: 7 x 7 to 7 x 7 is 2,401
LARGEST_SPREAD = 4096


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Nodes that are differentiated as one.

    kind: the operator's name, or "QuantizedMatMul", "FakeQuantize" for what several make.
    nodes: those that compute it, in order.
    inputs, outputs: of the unit. QuantizedMatMul: (x, codes, scales, zero points or "");
        FakeQuantize: (x, scale, zero point).
    """

    kind: str
    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def node(self) -> onnx.NodeProto:
        """Its first node: where it is of one, that one."""
        return self.nodes[0]


def expand_attention(nodes: Iterable[onnx.NodeProto], builder: Builder) -> list[onnx.NodeProto]:
    """Return the nodes with every MultiHeadAttention in products and a Softmax."""
    result: list[onnx.NodeProto] = []
    masks: dict[str, str] = {}
    for node in nodes:
        if node.op_type != "MultiHeadAttention":
            result.append(node)
            continue
        given = [name for i, name in enumerate(node.input) if i not in (0, 1, 2, 4) and name]
        if given or not attribute(node, "scale", 0.0):
            raise EdgetuneError(
                "operator MultiHeadAttention with a bias, or without a scale, has no gradient yet"
            )
        begin = len(builder.nodes)
        heads = attribute(node, "num_heads", 1)
        query, key, value = (
            builder.transpose(builder.reshape(name, 0, 0, heads, -1), 0, 2, 1, 3)
            for name in node.input[:3]
        )  # each (batch, heads, tokens, size)
        scores = builder.matmul(query, key, transpose_b=True, factor=attribute(node, "scale", 0.0))
        mask = node.input[4] if len(node.input) > 4 else ""
        if mask:
            if mask not in masks:
                kept = builder.node("Cast", mask, to=onnx.TensorProto.FLOAT)
                gone = builder.sub(kept, builder.constant(1.0))
                added = builder.scale(gone, -attribute(node, "mask_filter_value", MASKED))
                masks[mask] = builder.node("Unsqueeze", added, builder.ints(1, 2))
            scores = builder.add(scores, masks[mask])
        mixed = builder.matmul(builder.node("Softmax", scores, axis=-1), value)
        flat = builder.reshape(builder.transpose(mixed, 0, 2, 1, 3), 0, 0, -1)
        builder.alias(flat, node.output[0])
        for new in builder.nodes[begin:]:
            new.metadata_props.extend(node.metadata_props)
        result.extend(builder.nodes[begin:])
        del builder.nodes[begin:]
    return result


def expand_depthwise(
    nodes: Iterable[onnx.NodeProto],
    builder: Builder,
    tensors: Mapping[str, Tensor],
    names: Collection[str],
) -> list[onnx.NodeProto]:
    """Return the nodes with depthwise convolutions over small maps as products.

    Where the weights are no constant, onnxruntime convolves channel by channel. With each channel's
    kernel written out as the matrix (H W, H' W') that it stands for, forward and both gradients are
    batched products of matrices: much faster on maps of 7 x 7.

    Args:
        nodes: of the graph.
        builder: takes constants.
        tensors: shapes.
        names: outputs of the nodes that may be rewritten.
    """
    result: list[onnx.NodeProto] = []
    for node in nodes:
        spread = _spread(node, tensors) if node.output[0] in names else None
        if spread is None:
            result.append(node)
            continue
        begin = len(builder.nodes)
        channels, places = tensors[node.input[1]].dims[0], spread.shape[0]
        assert isinstance(channels, int)
        height, width = tensors[node.output[0]].dims[2:]
        assert isinstance(height, int)
        assert isinstance(width, int)
        kernels = builder.reshape(node.input[1], channels, places)
        matrices = builder.node("MatMul", kernels, builder.constant(spread))
        matrices = builder.reshape(matrices, channels, -1, height * width)  # (C, H W, H' W')
        inputs = builder.transpose(builder.reshape(node.input[0], 0, channels, -1), 1, 0, 2)
        outputs = builder.transpose(builder.node("MatMul", inputs, matrices), 1, 0, 2)
        whole = builder.reshape(outputs, 0, channels, height, width)
        if len(node.input) > 2 and node.input[2]:
            whole = builder.add(whole, builder.reshape(node.input[2], channels, 1, 1))
        builder.alias(whole, node.output[0])
        for new in builder.nodes[begin:]:
            new.metadata_props.extend(node.metadata_props)
        result.extend(builder.nodes[begin:])
        del builder.nodes[begin:]
    return result


def _spread(node: onnx.NodeProto, tensors: Mapping[str, Tensor]) -> npt.NDArray[Any] | None:
    """Return which weight of a depthwise kernel leads from which place to which: 0 or 1.

    Shape (kh kw, H W H' W'); None for what is no depthwise convolution over a small map.
    """
    if node.op_type != "Conv" or attribute(node, "auto_pad", b"NOTSET") != b"NOTSET":
        return None
    x, w, y = (tensors[name].dims for name in (*node.input[:2], node.output[0]))
    sizes = [d for d in (*w, *x[1:], *y[2:]) if isinstance(d, int)]
    if len(w) != 4 or len(sizes) != 9:
        return None
    outputs, per_group, kh, kw, channels, height, width, rows, columns = sizes
    if per_group != 1 or not outputs == channels == attribute(node, "group", 1) or kh * kw == 1:
        return None
    if height * width * rows * columns > LARGEST_SPREAD:
        return None
    strides, dilations = attribute(node, "strides", (1, 1)), attribute(node, "dilations", (1, 1))
    top, left = attribute(node, "pads", (0, 0, 0, 0))[:2]
    spread = np.zeros((kh, kw, height, width, rows, columns), np.float32)
    for i, j, row, column in itertools.product(range(kh), range(kw), range(rows), range(columns)):
        a = row * strides[0] - top + i * dilations[0]
        b = column * strides[1] - left + j * dilations[1]
        if 0 <= a < height and 0 <= b < width:
            spread[i, j, a, b, row, column] = 1
    return spread.reshape(kh * kw, -1)


def find_units(nodes: Iterable[onnx.NodeProto], constants: Iterable[str]) -> list[Unit]:
    """Return the nodes as units, in an order in which each comes after what it reads."""
    nodes, fixed = list(nodes), set(constants)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    maker = {name: node for node in nodes for name in node.output if name}
    taken: set[int] = set()
    heads: dict[int, Unit] = {}  # by the last of its nodes
    for node in nodes:
        unit = _integer_product(node, maker, readers, fixed) or _fake_quantize(node, maker, fixed)
        if unit:
            heads[id(unit.nodes[-1])] = unit
            taken.update(id(n) for n in unit.nodes)
    units = []
    for node in nodes:
        if id(node) in heads:
            units.append(heads[id(node)])
        elif id(node) not in taken:
            kind = (
                node.op_type if node.domain in ("", MICROSOFT) else f"{node.domain}.{node.op_type}"
            )
            units.append(
                Unit(kind=kind, nodes=(node,), inputs=tuple(node.input), outputs=tuple(node.output))
            )
    return units


def _integer_product(
    node: onnx.NodeProto,
    maker: dict[str, onnx.NodeProto],
    readers: dict[str, list[onnx.NodeProto]],
    fixed: set[str],
) -> Unit | None:
    """Match DynamicQuantizeLinear, MatMulInteger, Cast, Mul(scales), Mul; `node` the second."""
    if node.op_type != "MatMulInteger" or node.input[1] not in fixed:
        return None
    quantize = maker.get(node.input[0])
    if quantize is None or quantize.op_type != "DynamicQuantizeLinear":
        return None
    cast = _reader(readers, node.output[0], "Cast")
    product = _reader(readers, cast.output[0], "Mul") if cast is not None else None
    if cast is None or product is None:
        return None
    other = product.input[1] if product.input[0] == cast.output[0] else product.input[0]
    scale = maker.get(other)
    if scale is None or scale.op_type != "Mul" or quantize.output[1] not in scale.input:
        return None
    weight_scale = scale.input[1] if scale.input[0] == quantize.output[1] else scale.input[0]
    if weight_scale not in fixed:
        return None
    zero_point = node.input[3] if len(node.input) > 3 else ""
    # the quantized input may be read by several products: each unit carries it, it is written once
    return Unit(
        kind="QuantizedMatMul",
        nodes=(quantize, node, cast, scale, product),
        inputs=(quantize.input[0], node.input[1], weight_scale, zero_point),
        outputs=(product.output[0],),
    )


def _fake_quantize(
    node: onnx.NodeProto, maker: dict[str, onnx.NodeProto], fixed: set[str]
) -> Unit | None:
    """Match QuantizeLinear, DequantizeLinear of one fixed scale; `node` the second."""
    if node.op_type != "DequantizeLinear":
        return None
    quantize = maker.get(node.input[0])
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    if list(quantize.input[1:]) != list(node.input[1:]) or not set(node.input[1:]) <= fixed:
        return None
    return Unit(
        kind="FakeQuantize",
        nodes=(quantize, node),
        inputs=tuple(quantize.input),
        outputs=(node.output[0],),
    )


def _reader(readers: dict[str, list[onnx.NodeProto]], name: str, op: str) -> onnx.NodeProto | None:
    found = readers.get(name, [])
    return found[0] if len(found) == 1 and found[0].op_type == op else None
