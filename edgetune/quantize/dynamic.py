"""Dynamic quantization: weights as codes, activations scaled as they come, for matrix products.

x -> DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul(scale of x * scales of w) [-> Add]

onnxruntime fuses the chain into one node. Nothing has to be calibrated; the price is a pass
over every activation for its extremes.
"""

from collections.abc import Collection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetune.quantize.layers import FloatArray, Layer, attribute, copy_model, weight_layers
from edgetune.quantize.qdq import weight_codes

DynamicCode = Literal["u8", "s8"]


def quantize_dynamic(
    model: onnx.ModelProto, *, codes: DynamicCode = "u8", keep_float: Collection[str] = ()
) -> onnx.ModelProto:
    """Quantize every MatMul and Gemm with constant weights, but for the nodes in `keep_float`.

    Args:
        model: float graph.
        codes: "u8" takes each output channel's own range, and its products with u8
            activations are summed exactly on every CPU; "s8" is symmetric, and x86 without VNNI
            saturates on it.
        keep_float: names of nodes.
    """
    layers = {
        layer.node: layer
        for layer in weight_layers(model, exclude=keep_float)
        if layer.op in ("MatMul", "Gemm")
    }
    return _Writer(model, layers, codes).write()


class _Writer:
    """One graph on its way to codes."""

    def __init__(
        self, model: onnx.ModelProto, layers: dict[str, Layer], codes: DynamicCode
    ) -> None:
        self.model = copy_model(model)
        self.layers, self.codes = layers, codes
        self.initializers = {t.name: t for t in self.model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.added: dict[str, TensorProto] = {}
        self.quantized: set[str] = set()

    def write(self) -> onnx.ModelProto:
        graph = self.model.graph
        for node in graph.node:
            if node.name in self.layers:
                begin = len(self.nodes)
                self._layer(node, self.layers[node.name])
                for new in self.nodes[begin:]:  # they are of the same module
                    new.metadata_props.extend(node.metadata_props)
            else:
                self.nodes.append(node)
        del graph.node[:]
        graph.node.extend(self.nodes)
        used = {name for node in graph.node for name in node.input}
        kept = [t for t in graph.initializer if t.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        graph.initializer.extend(self.added.values())
        return self.model

    def _layer(self, node: onnx.NodeProto, layer: Layer) -> None:
        source, name = layer.input, layer.node
        coded, scale, zero = (f"{source}_{end}" for end in ("quantized", "scale", "zero_point"))
        if source not in self.quantized:
            self.quantized.add(source)
            self._node("DynamicQuantizeLinear", [source], [coded, scale, zero], source)
        weight, weight_scale, weight_zero = self._weight(layer)
        self._node("MatMulInteger", [coded, weight, zero, weight_zero], [f"{name}_sums"], name)
        self.nodes.append(
            helper.make_node(
                "Cast",
                [f"{name}_sums"],
                [f"{name}_cast"],
                name=f"{name}_Cast",
                to=TensorProto.FLOAT,
            )
        )
        self._node("Mul", [scale, weight_scale], [f"{name}_scale"], f"{name}_scales")
        bias = self._bias(node)
        result = f"{name}_product" if bias else layer.output
        self._node("Mul", [f"{name}_cast", f"{name}_scale"], [result], f"{name}_output")
        if bias:
            self._node("Add", [result, bias], [layer.output], f"{name}_bias")

    def _node(self, op: str, inputs: list[str], outputs: list[str], name: str) -> None:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{name}_{op}"))

    def _weight(self, layer: Layer) -> tuple[str, str, str]:
        """Return the names of a weight's codes (in, out), scales and zero points (out,)."""
        transposed = layer.axis == 0
        base = f"{layer.weight}_{'t_' if transposed else ''}{self.codes}"
        names = (f"{base}_codes", f"{base}_scale", f"{base}_zero_point")
        if names[0] not in self.added:
            weight = numpy_helper.to_array(self.initializers[layer.weight])
            matrix = weight.T if transposed else weight  # (in, out)
            values = range_codes(matrix) if self.codes == "u8" else _symmetric(matrix)
            for name, value in zip(names, values, strict=True):
                self.added[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return names

    def _bias(self, node: onnx.NodeProto) -> str:
        if node.op_type != "Gemm" or len(node.input) < 3 or not node.input[2]:
            return ""
        factor = attribute(node, "beta", 1.0)
        if factor == 1.0:
            return str(node.input[2])
        scaled = f"{node.name}_bias_scaled"
        constant = f"{node.name}_beta"
        self.added[constant] = numpy_helper.from_array(np.array(factor, np.float32), constant)
        self._node("Mul", [node.input[2], constant], [scaled], f"{node.name}_beta")
        return scaled


def range_codes(
    weight: FloatArray,
) -> tuple[npt.NDArray[np.uint8], FloatArray, npt.NDArray[np.uint8]]:
    """Return u8 codes (in, out), scale and zero point (out,) over each column's own range."""
    low = np.minimum(weight.min(axis=0), 0).astype(np.float64)
    high = np.maximum(weight.max(axis=0), 0).astype(np.float64)
    scale = np.where(high > low, (high - low) / 255, 1.0).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    codes = np.clip(np.rint(weight / scale) + zero, 0, 255)
    return codes.astype(np.uint8), scale, zero.astype(np.uint8)


def _symmetric(weight: FloatArray) -> tuple[npt.NDArray[Any], FloatArray, npt.NDArray[np.int8]]:
    codes, scale, _ = weight_codes(weight, 1, "s8")
    return codes, scale, np.zeros(scale.shape, np.int8)
