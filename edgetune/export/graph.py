"""Write a task's graph as ONNX: lowest opset that serves, dynamic sizes, one weights file."""

import ast
import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, external_data_helper

from edgetune.errors import EdgetuneError
from edgetune.quantize.layers import PREPROCESS_SCOPE, SCOPE_KEY
from edgetune.runtime.bundle import WEIGHTS_NAME
from edgetune.runtime.manifest import TensorSpec
from edgetune.tasks import GraphSpec

# 18 is the lowest that torch's exporter writes; IR 8 goes with it. onnxruntime reads both from
# 1.14 on.
OPSET = 18
IR_VERSION = 8
OUTPUT_NAMES = ("logits", "features")
# tensors of at least this many bytes go to weights.bin, each on a page of its own start, so
# that onnxruntime can map them instead of reading them
EXTERNAL_BYTES = 1024
PAGE = 4096


def export_graph(spec: GraphSpec) -> onnx.ModelProto:
    """Return the task's module as an ONNX model, weights inside.

    Raises:
        EdgetuneError: torch cannot export the module.
    """
    names = list(spec.inputs)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: dict.fromkeys(spec.free[name], dynamic) for name in names}
    spec.module.eval()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                spec.module,
                (),
                kwargs=dict(spec.inputs),
                dynamo=True,
                input_names=names,
                output_names=list(OUTPUT_NAMES[: _outputs(spec)]),
                dynamic_shapes=shapes,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # torch.onnx raises its own, RuntimeError and more
        first_line = str(error).strip().splitlines()[0]
        raise EdgetuneError(f"torch cannot export this model: {first_line}") from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _clean(model, spec)
    onnx.checker.check_model(model)
    return model


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write `path` and, beside it, weights.bin; the same model gives the same bytes."""
    save_graphs({path.name: model}, path.parent)


def save_graphs(models: Mapping[str, onnx.ModelProto], folder: Path) -> None:
    """Write graphs that share one weights.bin: equal tensors are there once.

    Args:
        models: file name -> graph, weights inside; they stay as they are.
        folder: must exist.
    """
    copies = {name: _copy(model) for name, model in models.items()}
    places: dict[bytes, int] = {}
    with (folder / WEIGHTS_NAME).open("wb") as file:
        for model in copies.values():
            for tensor in sorted(model.graph.initializer, key=lambda t: t.name):
                data = tensor_bytes(tensor)
                if len(data) < EXTERNAL_BYTES:
                    continue
                key = hashlib.sha256(data).digest()
                if key not in places:
                    file.seek(-(-file.tell() // PAGE) * PAGE)
                    places[key] = file.tell()
                    file.write(data)
                tensor.ClearField("raw_data")
                _clear_typed_data(tensor)
                _set_external(tensor, places[key], len(data))
    for name, model in copies.items():
        for node in model.graph.node:
            del node.metadata_props[:]  # they told quantization and learning what is what
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))


def tensor_specs(model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the graph's inputs and outputs as the manifest describes them."""
    constants = {t.name for t in model.graph.initializer}  # an input that has a default is none
    return (
        tuple(_spec(v) for v in model.graph.input if v.name not in constants),
        tuple(_spec(v) for v in model.graph.output),
    )


def tensor_bytes(tensor: TensorProto) -> bytes:
    """Return a tensor's values as little-endian bytes, row by row."""
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    return np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)).tobytes()


def _outputs(spec: GraphSpec) -> int:
    with torch.no_grad():
        # an exportable-only attention answers zeros here; only the count matters
        return len(spec.module(**spec.inputs))


def _clean(model: onnx.ModelProto, spec: GraphSpec) -> None:
    """Strip what depends on the machine or the exporter, and name free dimensions."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "edgetune", ""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    # intermediate shapes from the example contradict other sizes and break later passes
    del graph.value_info[:]
    graph.doc_string = ""
    del graph.metadata_props[:]
    for node in graph.node:
        scope = _scope(node)
        del node.metadata_props[:]
        node.doc_string = ""
        if scope:
            node.metadata_props.add(key=SCOPE_KEY, value=scope)
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""
    for value in graph.input:
        del value.metadata_props[:]
        for axis, name in spec.free[value.name].items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    for value in graph.output:
        del value.metadata_props[:]
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


def _scope(node: onnx.NodeProto) -> str:
    """Return the path of the module that made a node."""
    for prop in node.metadata_props:
        if prop.key == "pkg.torch.onnx.name_scopes":
            scopes = ast.literal_eval(prop.value)
            if PREPROCESS_SCOPE in scopes:
                return PREPROCESS_SCOPE
            return str(scopes[-2]) if len(scopes) > 1 else ""  # the last is the node's own
    return ""


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_param or int(d.dim_value) for d in tensor.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)


def _set_external(tensor: TensorProto, offset: int, length: int) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", WEIGHTS_NAME), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    assert external_data_helper.uses_external_data(tensor)


def _clear_typed_data(tensor: TensorProto) -> None:
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(field)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's advice to its own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
