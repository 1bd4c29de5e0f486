"""Weight-only codes, one scale and zero point per block of a column: small weights, float work.

Right where reading the weights is what takes the time, as in a language model's token by token;
an encoder over a whole sentence is faster with integer activations. The operator is
com.microsoft's MatMulNBits (onnxruntime's ContribOperators.md); 4 bits run on onnxruntime 1.17
and newer, 8 bits are refused by 1.17, so there is also a form in plain ONNX.

Notation: real w = scale (code - zero point). Blocks have the shape (N, blocks, block size), for
a weight of K inputs and N outputs.
"""

from collections.abc import Collection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgetune.errors import ConfigError
from edgetune.quantize.layers import FloatArray, Layer, arrays, attribute, copy_model, weight_layers

Method = Literal["rtn", "hqq"]
Codes = npt.NDArray[np.uint8]

DOMAIN = "com.microsoft"
# half-quadratic quantization: norm of the error, weight of the split and its growth, steps
_NORM, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20


def quantize_blocks(
    model: onnx.ModelProto,
    *,
    bits: Literal[4, 8] = 4,
    block_size: int = 32,
    method: Method = "rtn",
    accuracy_level: int = 4,
    keep_float: Collection[str] = (),
) -> onnx.ModelProto:
    """Replace every MatMul and Gemm of a constant weight by MatMulNBits.

    Args:
        model: float graph.
        bits: of a code. onnxruntime 1.17 cannot load 8; 1.31 runs it.
        block_size: inputs that share a scale: a power of two from 16.
        method: "rtn" rounds to the nearest code of the block's whole range; "hqq" fits the scale
            so that most weights come out closer and a few large ones less so.
        accuracy_level: what the activations may be rounded to for the product: 0 or 1 nothing
            (float32), 2 float16, 3 bfloat16, 4 int8 per block.
        keep_float: names of nodes to leave.

    Raises:
        ConfigError: bits, block_size or accuracy_level is not one of those.
    """
    _check(bits, block_size, accuracy_level)
    layers = _products(model, keep_float)
    weights = arrays(model)
    result = copy_model(model)
    graph = result.graph
    nodes: list[onnx.NodeProto] = []
    done: dict[tuple[str, int], list[str]] = {}
    for node in graph.node:
        layer = layers.get(node.name)
        if layer is None:
            nodes.append(node)
            continue
        key = (layer.weight, layer.axis)
        if key not in done:
            weight = weights[layer.weight].T if layer.axis == 0 else weights[layer.weight]
            done[key] = _store(graph, layer, weight, bits, block_size, method)
        shape = weights[layer.weight].shape
        inputs, outputs = shape[1 - layer.axis], shape[layer.axis]
        made = f"{layer.output}_product" if layer.bias else layer.output
        nodes.append(
            helper.make_node(
                "MatMulNBits", [layer.input, *done[key]], [made], name=layer.node, domain=DOMAIN,
                K=inputs, N=outputs, bits=bits, block_size=block_size,
                accuracy_level=accuracy_level,
            )
        )  # fmt: skip
        if layer.bias:
            nodes.append(_add(layer, made))
    _settle(graph, nodes)
    if done and all(o.domain != DOMAIN for o in result.opset_import):
        result.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return result


def quantize_weights(
    model: onnx.ModelProto, *, keep_float: Collection[str] = ()
) -> onnx.ModelProto:
    """Store the weight of every MatMul and Gemm as int8 codes behind a DequantizeLinear.

    Plain ONNX, read by every runtime; one symmetric scale per output channel. The file gets
    smaller, and nothing else by the standard: the float weight is made anew. onnxruntime 1.31
    turns it into MatMulNBits with 8 bits, which may round activations to int8 too.
    """
    layers = _products(model, keep_float)
    weights = arrays(model)
    result = copy_model(model)
    nodes: list[onnx.NodeProto] = []
    done: set[tuple[str, int]] = set()
    for node in result.graph.node:
        layer = layers.get(node.name)
        if layer is not None:
            name = f"{layer.weight}_axis{layer.axis}"
            if (layer.weight, layer.axis) not in done:
                done.add((layer.weight, layer.axis))
                nodes.append(_dequantized(result.graph, layer, weights[layer.weight], name))
            node.input[1] = f"{name}_dequantized"
        nodes.append(node)
    _settle(result.graph, nodes)
    return result


def block_codes(
    weight: FloatArray, *, bits: int, block_size: int, method: Method
) -> tuple[Codes, FloatArray, Codes]:
    """Return codes, scales and zero points of a weight's blocks.

    Args:
        weight: (K, N), K inputs; the last block of a column is filled up with zeros.
        bits: of a code.
        block_size: inputs in a block.
        method: see `quantize_blocks`.

    Returns:
        Codes (N, blocks, block_size), scales and zero points (N, blocks). A block of zeros has
        scale 0.
    """
    largest = 2**bits - 1
    inputs, outputs = weight.shape
    padded = np.pad(weight, ((0, -inputs % block_size), (0, 0)))
    blocks = np.ascontiguousarray(padded.T).reshape(outputs, -1, block_size)
    scale, zero_point = _whole_range(blocks, largest)
    if method == "hqq":
        scale = _half_quadratic(blocks, scale, zero_point, largest)
    codes = _codes(blocks, scale, zero_point, largest)
    return codes.astype(np.uint8), scale[..., 0], zero_point[..., 0].astype(np.uint8)


def block_values(codes: Codes, scale: FloatArray, zero_point: Codes, inputs: int) -> FloatArray:
    """Return the weight (inputs, N) that such codes stand for."""
    centred = codes.astype(np.float32) - zero_point[..., None].astype(np.float32)
    return (centred * scale[..., None]).reshape(len(codes), -1)[:, :inputs].T


def pack(codes: Codes, bits: int) -> Codes:
    """Return codes as bytes along the last axis, the first code in the lowest bits.

    4 bits: two codes a byte, an odd last one alone; 8 bits: as they are.
    """
    if bits == 8:
        return codes
    even = np.concatenate([codes, np.zeros_like(codes[..., : codes.shape[-1] % 2])], axis=-1)
    packed: Codes = even[..., 0::2] | (even[..., 1::2] << 4)
    return packed


def _whole_range(blocks: FloatArray, largest: int) -> tuple[FloatArray, FloatArray]:
    """Return scale and zero point (N, blocks, 1) that cover a block's values and 0."""
    low = np.minimum(blocks.min(axis=-1, keepdims=True), 0)
    high = np.maximum(blocks.max(axis=-1, keepdims=True), 0)
    scale = ((high - low) / largest).astype(np.float32)
    zero_point = np.floor(-low * _inverse(scale) + np.float32(0.5))
    return scale, np.clip(zero_point, 0, largest)


def _codes(
    blocks: FloatArray, scale: FloatArray, zero_point: FloatArray, largest: int
) -> FloatArray:
    # halves go up, as in onnxruntime's own quantizer: the sum is never below zero
    codes: FloatArray = np.floor(blocks * _inverse(scale) + zero_point + np.float32(0.5))
    return np.clip(codes, 0, largest)


def _inverse(scale: FloatArray) -> FloatArray:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)


def _half_quadratic(
    blocks: FloatArray, scale: FloatArray, zero_point: FloatArray, largest: int
) -> FloatArray:
    """Return scales with a smaller sum of |error|^0.7 in every block, or the given ones.

    Half-quadratic quantization (Badri & Shaji 2023, "Half-Quadratic Quantization of Large
    Machine Learning Models"): with an auxiliary e, minimise |e|^p + beta/2 (w - w_q - e)^2 by
    turns, e by shrinkage (eq. 4), the quantizer by least squares (eq. 6). There the zero point is
    what is fitted, and is a fraction; onnxruntime multiplies integers only by whole zero points,
    and rounded it never moves, so here the scale is fitted. Errors are counted in steps of the
    first scale, so that beta means the same for every block.
    """
    unit = np.maximum(scale, np.finfo(np.float32).tiny)
    best, least = scale, _error(blocks, scale, zero_point, largest)
    beta = _BETA
    for _ in range(_STEPS):
        centred = _codes(blocks, scale, zero_point, largest) - zero_point
        error = (blocks - centred * scale) / unit
        size = np.abs(error)
        shrunk = np.maximum(size - (size + 1e-8) ** (_NORM - 1) / beta, 0)
        target = blocks - np.sign(error) * shrunk * unit
        power = (centred * centred).sum(axis=-1, keepdims=True)
        fitted = (centred * target).sum(axis=-1, keepdims=True) / np.maximum(power, 1)
        scale = np.where((power > 0) & (fitted > 0), fitted, scale).astype(np.float32)
        found = _error(blocks, scale, zero_point, largest)
        best = np.where(found < least, scale, best)
        least = np.minimum(found, least)
        beta *= _GROWTH
    return best


def _error(
    blocks: FloatArray, scale: FloatArray, zero_point: FloatArray, largest: int
) -> FloatArray:
    values = (_codes(blocks, scale, zero_point, largest) - zero_point) * scale
    total: FloatArray = (np.abs(blocks - values) ** np.float32(_NORM)).sum(axis=-1, keepdims=True)
    return total


def _products(model: onnx.ModelProto, keep_float: Collection[str]) -> dict[str, Layer]:
    """Return the layers by node that are x W, or x W + a constant."""
    gemms = {n.name: n for n in model.graph.node if n.op_type == "Gemm"}
    return {
        layer.node: layer
        for layer in weight_layers(model, exclude=keep_float)
        if layer.op == "MatMul" or (layer.op == "Gemm" and _plain(gemms[layer.node], layer))
    }


def _plain(gemm: onnx.NodeProto, layer: Layer) -> bool:
    no_bias = len(gemm.input) < 3 or not gemm.input[2]
    return no_bias or (bool(layer.bias) and attribute(gemm, "beta", 1.0) == 1.0)


def _store(
    graph: onnx.GraphProto, layer: Layer, weight: FloatArray, bits: int, size: int, method: Method
) -> list[str]:
    """Add the operator's three constants and return their names."""
    codes, scale, zero_point = block_codes(weight, bits=bits, block_size=size, method=method)
    base = f"{layer.weight}_axis{layer.axis}_q{bits}"
    constants: dict[str, npt.NDArray[Any]] = {
        f"{base}_codes": pack(codes, bits),  # (N, blocks, bytes of a block)
        f"{base}_scale": scale.reshape(-1),
        f"{base}_zero_point": pack(zero_point, bits).reshape(-1),  # each column's from a new byte
    }
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items())
    return list(constants)


def _dequantized(
    graph: onnx.GraphProto, layer: Layer, weight: FloatArray, name: str
) -> onnx.NodeProto:
    largest = np.abs(weight).max(axis=1 - layer.axis)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    steps = weight / np.expand_dims(scale, 1 - layer.axis)
    codes = np.clip(np.rint(steps), -127, 127).astype(np.int8)
    graph.initializer.append(numpy_helper.from_array(codes, f"{name}_codes"))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
    return helper.make_node(
        "DequantizeLinear", [f"{name}_codes", f"{name}_scale"], [f"{name}_dequantized"],
        name=f"{name}_DequantizeLinear", axis=layer.axis,
    )  # fmt: skip


def _add(layer: Layer, product: str) -> onnx.NodeProto:
    return helper.make_node("Add", [product, layer.bias], [layer.output], name=f"{layer.node}_bias")


def _settle(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Put the nodes into the graph and drop the weights that nobody reads any more."""
    used = {name for node in nodes for name in node.input} | {v.name for v in graph.output}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _check(bits: int, block_size: int, accuracy_level: int) -> None:
    if bits not in (4, 8):
        raise ConfigError(f"bits: expected 4 or 8, got {bits}")
    if block_size < 16 or block_size & (block_size - 1):
        raise ConfigError(f"block_size: expected a power of two from 16, got {block_size}")
    if accuracy_level not in range(5):
        raise ConfigError(f"accuracy_level: expected 0 to 4, got {accuracy_level}")
