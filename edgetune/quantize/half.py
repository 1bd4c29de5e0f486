"""float16 weights and arithmetic, for hardware that has it: GPUs, NPUs, recent ARM cores.

On onnxruntime's CPU provider it saves space and no time.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgetune.errors import GateError
from edgetune.quantize.calibrate import open_model, run_tensors
from edgetune.quantize.layers import Feeds, attribute, copy_model, preprocessing_nodes

LARGEST = float(np.finfo(np.float16).max)  # 65504

# sums and powers leave float16's range or its 11 bits long before their results do.
# LayerNormalization sums in float32 by itself (stash_type), and so do kernels of Softmax
_WIDE = ("ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "Pow", "Exp", "CumSum")
# have no float16 in the standard or in onnxruntime, or none at opset 18; or work on positions,
# which 11 bits cannot count
_FLOAT32_ONLY = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Resize", "GridSample", "Range",
    "NonMaxSuppression", "RoiAlign", "TopK", "RandomNormal", "RandomUniform", "RandomNormalLike",
    "RandomUniformLike",
)  # fmt: skip


def to_fp16(
    model: onnx.ModelProto, *, feeds: Iterable[Feeds] = (), keep_float: Collection[str] = ()
) -> onnx.ModelProto:
    """Return the graph in float16, but for its inputs, its outputs, preprocessing and long sums.

    A value between two float32 nodes is never rounded: onnxruntime's own converter
    (transformers.float16) sends it through float16 and back.

    Args:
        model: float graph.
        feeds: samples; with them what the nodes compute is checked too, not only the weights.
        keep_float: names of nodes to leave in float32.

    Raises:
        GateError: a weight, or a value that a node computes on `feeds`, is beyond 65504 and
            would become infinite.
    """
    kept = {*keep_float, *preprocessing_nodes(model)}
    kept |= {node.name for node in model.graph.node if _needs_float32(node)}
    _check_constants(model, kept)
    _check_values(model, feeds, kept)
    return _Writer(model, kept).write()


class _Writer:
    """One graph on its way to float16."""

    def __init__(self, model: onnx.ModelProto, kept: Collection[str]) -> None:
        self.model, self.kept = copy_model(model), kept
        self.initializers = {t.name: t for t in self.model.graph.initializer}
        # float tensor -> the precision it is made in
        self.made = dict.fromkeys(_float_tensors(model), TensorProto.FLOAT)
        self.cast: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.added: list[TensorProto] = []

    def write(self) -> onnx.ModelProto:
        graph = self.model.graph
        ends = [value.name for value in graph.output if value.name in self.made]
        renamed: dict[str, str] = {}
        for node in graph.node:
            half = node.name not in self.kept
            precision = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            for i, name in enumerate(node.input):
                current = renamed.get(name, name)
                node.input[i] = self._as(current, precision) if current in self.made else current
            for i, name in enumerate(node.output):
                if half and name in ends:
                    renamed[name] = node.output[i] = f"{name}_float16"
                if name in self.made:
                    self.made[node.output[i]] = precision
            if half:
                _halve_attributes(node)
            self.nodes.append(node)
        for name, half_name in renamed.items():
            self.nodes.append(_cast(half_name, name, TensorProto.FLOAT))
        del graph.node[:]
        graph.node.extend(self.nodes)
        self._settle_initializers()
        del graph.value_info[:]
        return self.model

    def _as(self, tensor: str, precision: int) -> str:
        """Return the name of a tensor's version in a precision, made here if nobody has yet."""
        if self.made[tensor] == precision:
            return tensor
        key = (tensor, precision)
        if key not in self.cast:
            suffix = "float16" if precision == TensorProto.FLOAT16 else "float32"
            self.cast[key] = f"{tensor}_as_{suffix}"
            if tensor in self.initializers:
                value = numpy_helper.to_array(self.initializers[tensor]).astype(np.float16)
                self.added.append(numpy_helper.from_array(value, self.cast[key]))
            else:
                self.nodes.append(_cast(tensor, self.cast[key], precision))
        return self.cast[key]

    def _settle_initializers(self) -> None:
        graph = self.model.graph
        used = {name for node in graph.node for name in node.input}
        used |= {value.name for value in graph.output}
        kept = [t for t in graph.initializer if t.name in used]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *self.added])


def _needs_float32(node: onnx.NodeProto) -> bool:
    if node.op_type == "LayerNormalization":
        return bool(attribute(node, "stash_type", 1) != TensorProto.FLOAT)
    return node.op_type in _WIDE or node.op_type in _FLOAT32_ONLY


def _halve_attributes(node: onnx.NodeProto) -> None:
    """Turn what a node makes float32 by an attribute into float16."""
    for found in node.attribute:
        if found.name in ("to", "dtype") and found.i == TensorProto.FLOAT:
            found.i = TensorProto.FLOAT16
        elif found.HasField("t") and found.t.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(found.t).astype(np.float16)
            found.t.CopyFrom(numpy_helper.from_array(value, found.t.name))
    if node.op_type == "ConstantOfShape" and not node.attribute:
        zero = numpy_helper.from_array(np.zeros(1, np.float16))
        node.attribute.append(helper.make_attribute("value", zero))


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=to)


def _check_constants(model: onnx.ModelProto, kept: Collection[str]) -> None:
    initializers = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.name in kept:
            continue
        constants = [(name, initializers[name]) for name in node.input if name in initializers]
        constants += [(a.name, a.t) for a in node.attribute if a.HasField("t")]
        for name, tensor in constants:
            if tensor.data_type == TensorProto.FLOAT:
                _check(numpy_helper.to_array(tensor), f"constant {name!r}", [node.name])


def _check_values(model: onnx.ModelProto, feeds: Iterable[Feeds], kept: Collection[str]) -> None:
    around: dict[str, list[str]] = {}  # tensor -> nodes in float16 that make or read it
    for node in model.graph.node:
        if node.name not in kept:
            for name in (*node.input, *node.output):
                around.setdefault(name, []).append(node.name)
    made = [n for node in model.graph.node for n in node.output if n in around]
    for values in run_tensors(model, feeds, made):
        for name, value in values.items():
            if value.dtype == np.float32:
                _check(value, f"tensor {name!r} on a sample", around[name])


def _check(values: npt.NDArray[Any], what: str, nodes: list[str]) -> None:
    beyond = np.abs(values[np.isfinite(values)]).max(initial=0)
    if beyond > LARGEST:
        raise GateError(
            f"{what} reaches {beyond:g}; float16 ends at {LARGEST:g}; keep in float32:"
            f" {', '.join(nodes)}"
        )


def _float_tensors(model: onnx.ModelProto) -> list[str]:
    """Return the names of all float32 tensors, of what nodes make as onnxruntime infers it.

    onnx's own inference stops at operators of other domains.
    """
    names = [n for node in model.graph.node for n in node.output if n]
    probed = copy_model(model)
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with TemporaryDirectory(prefix="edgetune-") as folder:
        session = open_model(probed, Path(folder))
        ends = [*session.get_inputs(), *session.get_outputs()]
        found = [end.name for end in ends if end.type == "tensor(float)"]
    return found + [t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
