"""Put a new head, or new values of trained tensors, into a graph that is finished."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetune.errors import ConfigError
from edgetune.quantize.layers import copy_model
from edgetune.runtime.learn.projection import Projection

LOGITS, FEATURES = "logits", "features"
PREFIX = "merged."


def replace_head(
    model: onnx.ModelProto,
    weights: npt.NDArray[Any],
    bias: npt.NDArray[Any],
    *,
    projection: Projection | None = None,
) -> onnx.ModelProto:
    """Return the graph with logits = features @ weights + bias, in float32.

    Whatever made the logits before, quantized or not, is gone where nothing else needs it, with
    its weights and trainable inputs.

    Args:
        model: weights inside; has the outputs `features`, (batch, d), and `logits`.
        weights: (d, classes), the temperature divided out.
        bias: (classes,).
        projection: what the features go through first; d is its width then.

    Raises:
        ConfigError: the graph has no such outputs, or something reads its logits.
    """
    outputs = {value.name for value in model.graph.output}
    if not {LOGITS, FEATURES} <= outputs:
        raise ConfigError(
            f"expected a graph with the outputs {FEATURES} and {LOGITS}, got"
            f" {', '.join(sorted(outputs))}"
        )
    if any(LOGITS in node.input for node in model.graph.node):
        raise ConfigError("something in the graph reads its logits; its head cannot be replaced")
    model = copy_model(model)
    _keep_what_makes(model, outputs - {LOGITS})
    graph = model.graph
    source = FEATURES
    if projection is not None:
        codes = projection.signs.astype(np.int8)
        scale = np.float32(1 / np.sqrt(projection.width_in))
        _add_constant(graph, "signs", codes)
        _add_constant(graph, "scale", np.array(scale))
        graph.node.extend(
            [
                _node("Cast", ["signs"], "real_signs", to=TensorProto.FLOAT),
                helper.make_node("MatMul", [source, f"{PREFIX}real_signs"], [f"{PREFIX}wide"]),
                _node("Mul", ["wide", "scale"], "scaled"),
                _node("Relu", ["scaled"], "placed"),
            ]
        )
        source = f"{PREFIX}placed"
    _add_constant(graph, "weight", weights.astype(np.float32))
    _add_constant(graph, "bias", bias.astype(np.float32))
    graph.node.append(helper.make_node("MatMul", [source, f"{PREFIX}weight"], [f"{PREFIX}product"]))
    graph.node.append(
        helper.make_node("Add", [f"{PREFIX}product", f"{PREFIX}bias"], [LOGITS], name=LOGITS)
    )
    for value in graph.output:
        if value.name == LOGITS:
            dim = value.type.tensor_type.shape.dim[1]
            dim.Clear()
            dim.dim_value = len(bias)
    return model


def set_defaults(
    model: onnx.ModelProto, values: Mapping[str, npt.NDArray[np.float32]]
) -> onnx.ModelProto:
    """Return the graph with other values of initializers, whose shape may be another.

    Raises:
        ConfigError: it has no such initializer.
    """
    model = copy_model(model)
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, value in values.items():
        if name not in found:
            raise ConfigError(f"the graph has no initializer {name!r}")
        found[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return model


def only(model: onnx.ModelProto, outputs: Iterable[str]) -> onnx.ModelProto:
    """Return the part of a graph that some of its outputs come of; inputs go with it."""
    model = copy_model(model)
    wanted = set(outputs)
    kept = [value for value in model.graph.output if value.name in wanted]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    _keep_what_makes(model, wanted)
    read = {name for node in model.graph.node for name in node.input}
    inputs = [value for value in model.graph.input if value.name in read]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model


def depends(model: onnx.ModelProto, output: str, names: Iterable[str]) -> bool:
    """Say whether a tensor of the graph comes of one of the named ones."""
    sources = {name for node in only_nodes(model, {output}) for name in node.input}
    return not sources.isdisjoint(names)


def only_nodes(model: onnx.ModelProto, names: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes that the named tensors come of, in order."""
    needed, kept = set(names), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    return kept[::-1]


def _keep_what_makes(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Drop nodes that none of the named tensors come of, in place, and what only they read."""
    graph = model.graph
    kept = only_nodes(model, names)
    del graph.node[:]
    graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    gone = {tensor.name for tensor in graph.initializer} - read
    for part in (graph.initializer, graph.input):
        left = [value for value in part if value.name not in gone]
        del part[:]
        part.extend(left)


def _add_constant(graph: onnx.GraphProto, name: str, value: npt.NDArray[Any]) -> None:
    tensor = numpy_helper.from_array(np.ascontiguousarray(value), PREFIX + name)
    graph.initializer.append(tensor)


def _node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    names = [PREFIX + name for name in inputs]
    return helper.make_node(kind, names, [PREFIX + output], **attributes)
