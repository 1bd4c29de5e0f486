"""What of a float graph can be quantized: the nodes with constant weights."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

# marks of nodes, which a saved graph has no more: the path of the module that made one, and that it
# is to learn on the device and so must stay in float
SCOPE_KEY = "edgetune.scope"
LEARN_KEY = "edgetune.learn"
PREPROCESS_SCOPE = "preprocess"

FloatArray = npt.NDArray[np.float32]
Feeds = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One Conv, Gemm or MatMul whose weights are an initializer.

    node, op: its name and operator.
    input, output: the names of its activation tensors.
    weight: the initializer; Conv (out, in / groups, ...), Gemm (out, in) where transB else
        (in, out), MatMul (in, out).
    axis: the weight's axis of output channels.
    bias: the initializer that the node itself adds; "" where it has none. A MatMul's bias is an
        Add of its own and not meant here.
    """

    node: str
    op: Literal["Conv", "Gemm", "MatMul"]
    input: str
    output: str
    weight: str
    axis: int
    bias: str


def weight_layers(model: onnx.ModelProto, *, exclude: Collection[str] = ()) -> list[Layer]:
    """Return the layers in the graph's order, but for the nodes named in `exclude`.

    The preprocessing's nodes are never among them: it works on pixels and sizes.
    """
    left_out = {*exclude, *preprocessing_nodes(model)}
    initializers = {t.name: t for t in model.graph.initializer}
    layers = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.name in left_out:
            continue
        weight = initializers.get(node.input[1])
        if weight is None or weight.data_type != onnx.TensorProto.FLOAT:
            continue
        if node.op_type == "MatMul" and len(weight.dims) != 2:
            continue
        if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0:
            continue
        bias = node.input[2] if len(node.input) > 2 else ""
        layers.append(
            Layer(
                node=node.name,
                op=node.op_type,
                input=node.input[0],
                output=node.output[0],
                weight=weight.name,
                axis=_channel_axis(node),
                bias=bias if bias in initializers else "",
            )
        )
    return layers


def preprocessing_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that the `preprocess` module made, or that are to learn."""
    return [
        node.name
        for node in model.graph.node
        if mark(node, SCOPE_KEY) == PREPROCESS_SCOPE or mark(node, LEARN_KEY)
    ]


def mark(node: onnx.NodeProto, key: str) -> str:
    """Return a node's mark of that key; "" where it has none."""
    return next((p.value for p in node.metadata_props if p.key == key), "")


def set_mark(node: onnx.NodeProto, key: str, value: str) -> None:
    """Mark a node, in place."""
    kept = [p for p in node.metadata_props if p.key != key]
    del node.metadata_props[:]
    node.metadata_props.extend(kept)
    node.metadata_props.add(key=key, value=value)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return a node's attribute, or `default` where it has none of that name."""
    for found in node.attribute:
        if found.name == name:
            return onnx.helper.get_attribute_value(found)
    return default


def arrays(model: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    """Return every initializer by name, as arrays that must not be written to."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def copy_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a deep copy."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _channel_axis(node: onnx.NodeProto) -> int:
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1
