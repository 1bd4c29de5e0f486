"""Embedding tables as 8-bit codes: in a small encoder the vocabulary is half of all weights."""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetune.quantize.layers import FloatArray, attribute, copy_model, preprocessing_nodes

Codes = npt.NDArray[np.uint8]

# below this a table costs less than the nodes that would unpack it
SMALLEST_BYTES = 64 * 1024


def quantize_embeddings(
    model: onnx.ModelProto, *, keep_float: Collection[str] = ()
) -> onnx.ModelProto:
    """Store every large table that rows are looked up in as codes with a scale for each row.

    Only the rows looked up become float again: Gather (codes, scales, zero points) -> Cast ->
    Sub -> Mul, operators that every onnxruntime has. A row's values change by half a step at
    most, a step being (largest - smallest, 0 among them) / 255 of that row.

    Left alone: tables smaller than 64 KiB, of other than two dimensions, or that another node
    reads as float too (an output layer tied to the embedding).

    Args:
        model: float graph.
        keep_float: names of Gather nodes to leave.
    """
    result = copy_model(model)
    graph = result.graph
    tables = _tables(model, keep_float)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if _is_lookup(node) and node.input[0] in tables:
            nodes += _lookup(node)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    stored: list[TensorProto] = []
    for tensor in graph.initializer:
        if tensor.name in tables:
            stored += _stored(tensor)
        else:
            stored.append(tensor)
    del graph.initializer[:]
    graph.initializer.extend(stored)
    return result


def row_codes(table: FloatArray) -> tuple[Codes, FloatArray, Codes]:
    """Return codes (rows, columns), scales and zero points (rows, 1): real = scale (code - zero).

    The range of a row includes 0; a row of zeros has scale 0.
    """
    low = np.minimum(table.min(axis=1, keepdims=True), 0)
    high = np.maximum(table.max(axis=1, keepdims=True), 0)
    scale = ((high - low) / 255).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    zero_point = np.clip(np.rint(-low * inverse), 0, 255)
    codes = np.clip(np.rint(table * inverse) + zero_point, 0, 255)
    return codes.astype(np.uint8), scale, zero_point.astype(np.uint8)


def _tables(model: onnx.ModelProto, keep_float: Collection[str]) -> set[str]:
    """Return the initializers that only lookups read, large enough to be worth it."""
    large = {
        t.name
        for t in model.graph.initializer
        if t.data_type == TensorProto.FLOAT
        and len(t.dims) == 2
        and 4 * t.dims[0] * t.dims[1] >= SMALLEST_BYTES
    }
    left_out = {*keep_float, *preprocessing_nodes(model)}
    looked_up: set[str] = set()
    otherwise = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if _is_lookup(node) and node.name not in left_out:
            looked_up.add(node.input[0])
            otherwise.add(node.input[1])
        else:
            otherwise.update(node.input)
    return (large & looked_up) - otherwise


def _is_lookup(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gather" and node.domain == "" and attribute(node, "axis", 0) == 0


def _lookup(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return the nodes that give what the lookup gave, from codes."""
    table, indices = node.input
    base = node.name or node.output[0]
    nodes = []
    for part in ("codes", "zero_point", "scale"):
        row = f"{base}_{part}"
        nodes.append(helper.make_node("Gather", [f"{table}_{part}", indices], [row], name=row))
    for part in ("codes", "zero_point"):
        row = f"{base}_{part}"
        nodes.append(
            helper.make_node(
                "Cast", [row], [f"{row}_float"], name=f"{row}_float", to=TensorProto.FLOAT
            )
        )
    inputs = [f"{base}_codes_float", f"{base}_zero_point_float"]
    centred = f"{base}_centred"
    nodes.append(helper.make_node("Sub", inputs, [centred], name=centred))
    nodes.append(
        helper.make_node("Mul", [centred, f"{base}_scale"], [node.output[0]], name=node.name)
    )
    return nodes


def _stored(table: TensorProto) -> list[TensorProto]:
    codes, scale, zero_point = row_codes(numpy_helper.to_array(table))
    return [
        numpy_helper.from_array(codes, f"{table.name}_codes"),
        numpy_helper.from_array(scale, f"{table.name}_scale"),
        numpy_helper.from_array(zero_point, f"{table.name}_zero_point"),
    ]
