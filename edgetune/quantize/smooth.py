"""SmoothQuant: move the spread between an activation's channels into the weights.

Xiao et al. 2022 (arXiv:2211.10438). One scale has to serve all channels of an activation, and
in transformers a few channels are far larger than the others. Dividing channel j by s_j and
multiplying row j of the weights by it changes no result, and evens the channels out.

The division costs nothing where it can go into what made the activation:

- a LayerNormalization that only these layers read: into its scale and bias;
- a linear layer, through attention's values (attention mixes tokens, never channels), Relu and
  Reshape: into that layer's output channels.

Else it is a Mul of its own. So it is after GELU, which is no multiple of its input (a factor in
its constants would keep onnxruntime from fusing it), and after a LayerNormalization that a
residual Add reads too, as all do in BERT.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgetune.errors import ConfigError, DataError
from edgetune.quantize.calibrate import run_tensors
from edgetune.quantize.layers import Feeds, FloatArray, Layer, arrays, copy_model, weight_layers


def smooth(
    model: onnx.ModelProto,
    feeds: Iterable[Feeds],
    *,
    alpha: float = 0.5,
    exclude: Collection[str] = (),
) -> onnx.ModelProto:
    """Return a float graph of the same function, with activations that are easier to quantize.

    Layers that read the same activation share one s.

    Args:
        model: float graph.
        feeds: samples that show how large each channel gets; gone through once.
        alpha: how much of the spread the weights take over, from 0 (none) to 1 (all).
        exclude: names of nodes whose weights must stay as they are.

    Raises:
        ConfigError: alpha is not between 0 and 1.
        DataError: there are no feeds, or an activation is not finite on one of them.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: expected 0 to 1, got {alpha}")
    graph = _Graph(copy_model(model), exclude)
    groups = graph.groups()
    largest, ranks = _largest(model, feeds, list(groups), graph.values_of_attention())
    weights = arrays(model)
    for tensor, layers in groups.items():
        rows = [np.abs(weights[layer.weight]).max(axis=layer.axis) for layer in layers]
        s = smoothing_scale(largest[tensor], np.max(rows, axis=0), alpha)
        graph.multiply_rows(layers, s)
        graph.divide(tensor, layers, s, ranks)
    return graph.write()


def smoothing_scale(activation: FloatArray, weight: FloatArray, alpha: float) -> FloatArray:
    """Return s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), 1 where either is zero.

    Args:
        activation: max|X_j|, shape (channels,).
        weight: max|W_j| over the row of every layer that reads X, shape (channels,).
        alpha: from 0 to 1.

    Source: Xiao et al. 2022, eq. 4.
    """
    usable = (activation > 0) & (weight > 0)
    x = np.where(usable, activation, 1).astype(np.float64)
    w = np.where(usable, weight, 1).astype(np.float64)
    # a channel that was silent on the samples is no reason for a factor of a million
    scale: FloatArray = np.clip(x**alpha / w ** (1 - alpha), 1e-4, 1e4).astype(np.float32)
    return scale


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """A constant weight, and the bias added to its product: "" where there is none."""

    layer: Layer
    bias: str


class _Graph:
    """One graph whose weights are being rescaled."""

    def __init__(self, model: onnx.ModelProto, exclude: Collection[str]) -> None:
        self.model = model
        self.constants = arrays(model)
        self.changed: dict[str, FloatArray] = {}
        self.outputs = {value.name for value in model.graph.output}
        self.producers = {name: node for node in model.graph.node for name in node.output if name}
        self.readers: dict[str, list[str]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node.name)
        self.layers = {
            layer.node: layer
            for layer in weight_layers(model, exclude=exclude)
            if layer.op != "Conv" and self._is_own(layer.weight)
        }
        self.before: dict[str, onnx.NodeProto] = {}  # first reader -> the Mul in front of it

    def groups(self) -> dict[str, list[Layer]]:
        """Return the layers that read an activation, for each that any reads."""
        groups: dict[str, list[Layer]] = {}
        for layer in self.layers.values():
            groups.setdefault(layer.input, []).append(layer)
        return groups

    def values_of_attention(self) -> list[str]:
        nodes = self.model.graph.node
        return sorted({node.input[2] for node in nodes if _only_mixes_tokens(node)})

    def multiply_rows(self, layers: list[Layer], s: FloatArray) -> None:
        for layer in layers:
            self._scale(layer.weight, np.expand_dims(s, layer.axis))

    def divide(
        self, tensor: str, layers: list[Layer], s: FloatArray, ranks: dict[str, tuple[int, ...]]
    ) -> None:
        """Divide the channels of `tensor` by s, for `layers` only."""
        inverse = (1 / s).astype(np.float32)
        readers = {layer.node for layer in layers}
        if tensor not in self.outputs and set(self.readers[tensor]) == readers:
            norm = self._norm(tensor, len(s))
            if norm:
                for name in norm:
                    self._scale(name, inverse)
                return
            linear = self._linear(tensor, len(s), ranks)
            if linear is not None:
                self._scale(linear.layer.weight, np.expand_dims(inverse, 1 - linear.layer.axis))
                if linear.bias:
                    self._scale(linear.bias, inverse)
                return
        smoothed, factor = f"{tensor}_smoothed", f"{tensor}_smoothing"
        self.changed[factor] = inverse
        self.before[layers[0].node] = helper.make_node(
            "Mul", [tensor, factor], [smoothed], name=f"{tensor}_smooth"
        )
        for node in self.model.graph.node:
            if node.name in readers:
                node.input[0] = smoothed

    def write(self) -> onnx.ModelProto:
        graph = self.model.graph
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            if node.name in self.before:
                nodes.append(self.before[node.name])
            nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
        for tensor in graph.initializer:
            if tensor.name in self.changed:
                value = self.changed.pop(tensor.name)
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        added = [numpy_helper.from_array(v, name) for name, v in self.changed.items()]
        graph.initializer.extend(added)
        return self.model

    def _norm(self, tensor: str, channels: int) -> list[str]:
        """Return scale and bias of the LayerNormalization that makes a tensor, if they are free."""
        node = self.producers.get(tensor)
        if node is None or node.op_type != "LayerNormalization" or node.output[0] != tensor:
            return []
        names = [name for name in node.input[1:] if name]
        return names if all(self._is_vector(name, channels) for name in names) else []

    def _linear(
        self, tensor: str, channels: int, ranks: dict[str, tuple[int, ...]]
    ) -> _Linear | None:
        """Return the linear layer whose output channels are those of a tensor, if there is one.

        Reshape keeps the order of the elements, so where the last axis is `channels` long at both
        ends of the path, channel j stays channel j.
        """
        while True:
            node = self.producers.get(tensor)
            if node is None:
                return None
            if node.op_type in ("Reshape", "Relu"):
                tensor = node.input[0]
            elif _only_mixes_tokens(node):
                tensor = node.input[2]
                shape = ranks[tensor]
                if len(shape) != 3 or shape[-1] != channels:
                    return None
            else:
                return self._linear_at(node, channels)
            if len(self.readers[tensor]) != 1 or tensor in self.outputs:
                return None

    def _linear_at(self, node: onnx.NodeProto, channels: int) -> _Linear | None:
        bias = ""
        if node.op_type == "Add":
            bias = next((n for n in node.input if n in self.constants), "")
            product = next((n for n in node.input if n not in self.constants), "")
            made_by = self.producers.get(product)
            # a Gemm that something constant is added to has a bias twice
            if made_by is None or made_by.op_type != "MatMul" or not bias:
                return None
            if len(self.readers[product]) != 1 or product in self.outputs:
                return None
            node = made_by
        elif node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
            bias = node.input[2]
        layer = self.layers.get(node.name)
        if layer is None or self.constants[layer.weight].shape[layer.axis] != channels:
            return None
        if bias and not self._is_vector(bias, channels):
            return None
        return _Linear(layer=layer, bias=bias)

    def _is_vector(self, name: str, channels: int) -> bool:
        value = self.constants.get(name)
        return value is not None and value.shape == (channels,) and self._is_own(name)

    def _is_own(self, name: str) -> bool:
        """Tell whether only one node reads a constant."""
        return len(self.readers[name]) == 1 and name not in self.outputs

    def _scale(self, name: str, factor: npt.NDArray[Any]) -> None:
        value = self.changed.get(name, self.constants[name])
        self.changed[name] = (value * factor).astype(np.float32)


def _only_mixes_tokens(node: onnx.NodeProto) -> bool:
    """Tell whether a node is attention that adds nothing to the values and hands none on."""
    if node.op_type != "MultiHeadAttention" or len(node.input) < 3 or not node.input[2]:
        return False
    optional = dict(enumerate(node.input))
    # 3 is a bias, 6 and 7 are a cache of keys and values
    return not any(optional.get(i) for i in (3, 6, 7)) and not any(node.output[1:])


def _largest(
    model: onnx.ModelProto, feeds: Iterable[Feeds], activations: list[str], values: list[str]
) -> tuple[dict[str, FloatArray], dict[str, tuple[int, ...]]]:
    """Return max|X_j| of each activation (channels,), and the shape of each of `values`."""
    largest: dict[str, FloatArray] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for found in run_tensors(model, feeds, list(dict.fromkeys([*activations, *values]))):
        for name in activations:
            array = found[name]
            if not np.isfinite(array).all():
                raise DataError(f"smoothing: tensor {name!r} is not finite on a sample")
            channels = np.abs(array).max(axis=tuple(range(array.ndim - 1)))
            largest[name] = np.maximum(largest.get(name, channels), channels)
        shapes |= {name: found[name].shape for name in values}
    if activations and not largest:
        raise DataError("smoothing needs at least one sample, got none")
    return largest, shapes
