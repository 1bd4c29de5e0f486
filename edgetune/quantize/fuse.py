"""Fewer, larger nodes for transformers: GELU, head reshapes, joint products.

onnxruntime's optimizer knows such fusions too, but not in the shape that torch's exporter
leaves the graph in, nor after quantization. Gelu is com.microsoft's, which every onnxruntime
that a profile names has. A residual sum stays apart from its layer norm: on CPUs
SkipLayerNormalization is slower than the two.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgetune.quantize.layers import arrays, attribute, copy_model, preprocessing_nodes

MICROSOFT = "com.microsoft"


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with what can be fused fused; its answers differ by rounding only."""
    graph = _Graph(copy_model(model))
    _fuse_gelu(graph)
    _drop_reshapes(graph)
    _join_products(graph)
    return graph.finished()


class _Graph:
    """A graph that is being rewritten, and who makes and who reads each tensor of it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants: dict[str, npt.NDArray[Any]] = arrays(model)
        self.outputs = {value.name for value in model.graph.output}
        self.apart = set(preprocessing_nodes(model))
        self.look()

    def look(self) -> None:
        """Find makers and readers anew, after a change."""
        self.maker = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def scalar(self, name: str) -> float | None:
        """Return the value of a constant of one element that adds no dimension to others."""
        value = self.constants.get(name)
        fits = value is not None and value.size == 1 and value.ndim <= 1
        return float(value.reshape(-1)[0]) if value is not None and fits else None

    def alone(self, name: str) -> bool:
        """Tell whether exactly one node reads a tensor, and nobody outside."""
        return len(self.readers.get(name, [])) == 1 and name not in self.outputs

    def other(self, node: onnx.NodeProto, scalar: float) -> str | None:
        """Return the input of a two-input node whose other input is that constant."""
        for i in (0, 1):
            value = self.scalar(node.input[i])
            if value is not None and abs(value - scalar) < 1e-4:
                return str(node.input[1 - i])
        return None

    def replace(self, gone: Iterable[onnx.NodeProto], *new: onnx.NodeProto) -> None:
        """Put nodes where the last of those that go stood."""
        gone = list(gone)
        _inherit(gone, new)
        names = {id(node) for node in gone}
        last = max(i for i, node in enumerate(self.nodes) if id(node) in names)
        kept = [n for n in self.nodes[: last + 1] if id(n) not in names]
        self.nodes = [*kept, *new, *self.nodes[last + 1 :]]
        self.look()

    def rename(self, old: str, new: str) -> None:
        """Have everyone read `new` in place of `old`."""
        for node in self.readers.get(old, []):
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new
        self.look()

    def drop(self, gone: onnx.NodeProto) -> None:
        """Take a node out; it would count as a reader of its inputs."""
        self.nodes = [node for node in self.nodes if node is not gone]
        self.look()

    def add_constant(self, name: str, value: npt.NDArray[Any]) -> str:
        self.constants[name] = value
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def finished(self) -> onnx.ModelProto:
        """Return the model, without what nobody reads any more."""
        graph = self.model.graph
        while True:
            read = Counter(name for node in self.nodes for name in node.input)
            live = [
                n for n in self.nodes if any(read[o] or o in self.outputs for o in n.output if o)
            ]
            if len(live) == len(self.nodes):
                break
            self.nodes = live
        del graph.node[:]
        graph.node.extend(self.nodes)
        kept = [t for t in graph.initializer if read[t.name] or t.name in self.outputs]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        domains = {node.domain for node in self.nodes}
        if MICROSOFT in domains and MICROSOFT not in {o.domain for o in self.model.opset_import}:
            self.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        return self.model


def _fuse_gelu(graph: _Graph) -> None:
    """Make one Gelu(x) of x * 0.5 * (1 + erf(x / sqrt 2)), its products in any order."""
    for erf in [n for n in graph.nodes if n.op_type == "Erf" and n.name not in graph.apart]:
        scaled = graph.maker.get(erf.input[0])
        if scaled is None or scaled.op_type not in ("Div", "Mul"):
            continue
        source = graph.other(scaled, 2**0.5 if scaled.op_type == "Div" else 0.5**0.5)
        if source is None or (scaled.op_type == "Div" and scaled.input[0] != source):
            continue
        one = _only_reader(graph, erf.output[0], "Add")
        if one is None or graph.other(one, 1.0) is None:
            continue
        first = _only_reader(graph, one.output[0], "Mul")
        if first is None:
            continue
        gone = [scaled, erf, one, first]
        if source in first.input:  # (x * (1 + erf)) * 0.5
            last = _only_reader(graph, first.output[0], "Mul")
            whole = last is not None and graph.other(last, 0.5) is not None
        elif graph.other(first, 0.5) is not None:  # x * (0.5 * (1 + erf))
            last = _only_reader(graph, first.output[0], "Mul")
            whole = last is not None and source in last.input
        else:  # (0.5 * x) * (1 + erf)
            last = first
            half = next((i for i in first.input if i != one.output[0]), "")
            maker = graph.maker.get(half)
            whole = (
                maker is not None and maker.op_type == "Mul" and graph.other(maker, 0.5) == source
            )
        if not whole or last is None or not graph.alone(scaled.output[0]):
            continue
        if last is not first:
            gone.append(last)
        gelu = helper.make_node(
            "Gelu", [source], [last.output[0]], name=f"{erf.name}_gelu", domain=MICROSOFT
        )
        graph.replace(gone, gelu)


def _drop_reshapes(graph: _Graph) -> None:
    """Reshape(Reshape(x)) becomes one; one that gives (batch, tokens, hidden) as it was, none."""
    for node in [n for n in graph.nodes if n.op_type == "Reshape" and n.name not in graph.apart]:
        before = graph.maker.get(node.input[0])
        if before is not None and before.op_type == "Reshape" and not _copies(graph, node):
            node.input[0] = before.input[0]
            graph.look()
    widths = _widths(graph)
    for node in [n for n in graph.nodes if n.op_type == "Reshape" and n.name not in graph.apart]:
        source = node.input[0]
        width = widths.get(source)
        if width is None or node.output[0] in graph.outputs:
            continue
        if _same_shape(graph, node.input[1], width):
            graph.rename(node.output[0], source)
            graph.drop(node)


def _join_products(graph: _Graph) -> None:
    """Several MatMul + Add of one input become one and a Split; the input is quantized once."""
    groups: dict[str, list[tuple[onnx.NodeProto, onnx.NodeProto]]] = {}
    for node in graph.nodes:
        if node.op_type != "MatMul" or node.name in graph.apart:
            continue
        weight = graph.constants.get(node.input[1])
        add = _only_reader(graph, node.output[0], "Add")
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32 or add is None:
            continue
        bias = graph.constants.get(_bias_of(add, node))
        if bias is not None and bias.shape == (weight.shape[1],):
            groups.setdefault(node.input[0], []).append((node, add))
    for source, pairs in groups.items():
        if len(pairs) < 2:
            continue
        weights = [graph.constants[node.input[1]] for node, _ in pairs]
        biases = [graph.constants[_bias_of(add, node)] for node, add in pairs]
        base = f"{pairs[0][0].name or pairs[0][0].output[0]}_joint"
        joint = graph.add_constant(f"{base}_weight", np.concatenate(weights, axis=1))
        joint_bias = graph.add_constant(f"{base}_bias", np.concatenate(biases))
        sizes = graph.add_constant(
            f"{base}_sizes", np.array([w.shape[1] for w in weights], np.int64)
        )
        new = (
            helper.make_node("MatMul", [source, joint], [f"{base}_product"], name=base),
            helper.make_node(
                "Add", [f"{base}_product", joint_bias], [f"{base}_sum"], name=f"{base}_add"
            ),
            helper.make_node(
                "Split", [f"{base}_sum", sizes], [add.output[0] for _, add in pairs],
                name=f"{base}_split", axis=-1,
            ),
        )  # fmt: skip
        _replace_first(graph, [n for pair in pairs for n in pair], new)


def _replace_first(
    graph: _Graph, gone: list[onnx.NodeProto], new: tuple[onnx.NodeProto, ...]
) -> None:
    """Put nodes where the first of those that go stood: others may read their outputs early."""
    _inherit(gone, new)
    names = {id(node) for node in gone}
    first = min(i for i, node in enumerate(graph.nodes) if id(node) in names)
    kept = [n for n in graph.nodes[first:] if id(n) not in names]
    graph.nodes = [*graph.nodes[:first], *new, *kept]
    graph.look()


def _inherit(gone: Iterable[onnx.NodeProto], new: Iterable[onnx.NodeProto]) -> None:
    """Give new nodes the marks of one that they stand for."""
    marks = next(list(n.metadata_props) for n in gone)
    for node in new:
        node.metadata_props.extend(marks)


def _only_reader(graph: _Graph, name: str, op: str) -> onnx.NodeProto | None:
    readers = graph.readers.get(name, [])
    if not graph.alone(name) or readers[0].op_type != op:
        return None
    return readers[0]


def _bias_of(add: onnx.NodeProto, product: onnx.NodeProto) -> str:
    return str(add.input[1] if add.input[0] == product.output[0] else add.input[0])


def _copies(graph: _Graph, reshape: onnx.NodeProto) -> bool:
    """Tell whether a Reshape may copy a dimension of its input: then the input's shape counts."""
    shape = graph.constants.get(reshape.input[1])
    if shape is not None:
        return bool((shape == 0).any())
    concat = graph.maker.get(reshape.input[1])
    if concat is None or concat.op_type != "Concat":
        return True
    return any(_may_be_zero(graph, name) for name in concat.input)


def _may_be_zero(graph: _Graph, name: str) -> bool:
    """Tell whether an element of a target shape may be 0; one computed from sizes is none."""
    if name in graph.constants:
        return bool((graph.constants[name] == 0).any())
    maker = graph.maker.get(name)
    return maker is None or maker.op_type == "Constant"


def _same_shape(graph: _Graph, shape: str, width: int) -> bool:
    """Tell whether a target is (batch, tokens, width), with one dimension of the three inferred."""
    concat = graph.maker.get(shape)
    if concat is None or concat.op_type != "Concat" or len(concat.input) != 3:
        return False
    batch, tokens, last = concat.input
    if not _is_size(graph, batch, 0):
        return False
    given = graph.constants.get(last)
    if given is None or given.size != 1:
        return False
    size = int(given.reshape(-1)[0])
    # where the last is given, the middle is what is left; else it has to be the tokens
    return size == width or (size == -1 and _is_size(graph, tokens, 1))


def _is_size(graph: _Graph, name: str, axis: int) -> bool:
    """Tell whether a tensor is that dimension of a graph input."""
    node = graph.maker.get(name)
    inputs = {value.name for value in graph.model.graph.input}
    return (
        node is not None
        and node.op_type == "Shape"
        and node.input[0] in inputs
        and attribute(node, "start", 0) == axis
        and attribute(node, "end", None) == axis + 1
    )


def _widths(graph: _Graph) -> dict[str, int]:
    """Return the last dimension of every tensor that its makers show to be (batch, tokens, width).

    It begins at layer norms whose shape ONNX can infer; ONNX knows nothing of MultiHeadAttention.
    """
    shapes = _inferred(graph.model)
    found: dict[str, int] = {}
    for node in graph.nodes:
        width = _width(graph, node, found, shapes)
        if width is not None:
            found[node.output[0]] = width
        if node.op_type == "Split" and len(node.input) > 1 and node.input[0] in found:
            sizes = graph.constants.get(node.input[1])
            if sizes is not None and attribute(node, "axis", 0) in (-1, 2):
                found.update(zip(node.output, map(int, sizes), strict=True))
    return found


def _width(
    graph: _Graph, node: onnx.NodeProto, found: dict[str, int], shapes: dict[str, list[int]]
) -> int | None:
    """Return the width of a node's output, of the widths found before it."""
    known = found.get(node.input[0]) if node.input else None
    if node.op_type == "LayerNormalization":
        shape = shapes.get(node.output[0])
        if shape is None:
            return known
        # a first dimension that is a number is no batch
        return shape[2] if len(shape) == 3 and shape[0] == 0 and shape[2] > 0 else None
    if node.op_type == "MatMul":
        weight = graph.constants.get(node.input[1])
        return int(weight.shape[1]) if known and weight is not None and weight.ndim == 2 else None
    if node.op_type in ("Add", "Mul"):
        widths = {found.get(i) for i in node.input if i not in graph.constants}
        width = widths.pop() if len(widths) == 1 else None
        fits = all(
            width and _broadcasts(graph.constants[i].shape, width)
            for i in node.input
            if i in graph.constants
        )
        return width if fits else None
    if node.op_type == "MultiHeadAttention":  # (batch, tokens of the query, width of the value)
        return found.get(node.input[2]) if known and len(node.input) > 2 else None
    if node.op_type == "Reshape":
        return known if known and _same_shape(graph, node.input[1], known) else None
    return known if node.op_type in ("Gelu", "Relu", "Tanh") else None


def _broadcasts(shape: tuple[int, ...], width: int) -> bool:
    """Tell whether a constant leaves (batch, tokens, width) what it is."""
    batch = shape[0] if len(shape) == 3 else 1
    return len(shape) <= 3 and batch == 1 and (not shape or shape[-1] in (1, width))


def _inferred(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Return the shapes that ONNX infers; a dimension that is no number is 0."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return {
        value.name: [int(d.dim_value) for d in value.type.tensor_type.shape.dim]
        for value in inferred.graph.value_info
        if value.type.tensor_type.HasField("shape")
    }
