"""Small float graphs, and what onnxruntime makes of a graph."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgetune.runtime.ort  # noqa: F401  its telemetry is off before onnxruntime comes in

import onnxruntime  # isort: skip

LEVELS = onnxruntime.GraphOptimizationLevel


def _session(model: onnx.ModelProto, level: str, saved: str = "") -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(LEVELS, f"ORT_{level}")
    options.optimized_model_filepath = saved
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )


@pytest.fixture(scope="session")
def build() -> Callable[..., onnx.ModelProto]:
    """Write a graph of rows ("Conv", "x w b -> y", {"group": 2}); a node is named "node_y"."""

    def build(
        rows: Sequence[tuple[str, str, Mapping[str, Any]] | tuple[str, str]],
        constants: Mapping[str, Any],
        inputs: Mapping[str, Sequence[Any]],
        outputs: Sequence[str],
    ) -> onnx.ModelProto:
        nodes = []
        for op, wires, *attributes in rows:
            sources, targets = (side.split() for side in wires.split("->"))
            name = f"node_{targets[0]}"
            given = attributes[0] if attributes else {}
            nodes.append(helper.make_node(op, sources, targets, name=name, **given))
        graph = helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
        )
        opset = [helper.make_opsetid("", 18)]
        return helper.make_model(graph, opset_imports=opset, ir_version=8)

    return build


@pytest.fixture(scope="session")
def run() -> Callable[..., list[np.ndarray]]:
    """Run a graph, optimized to a level of onnxruntime's; return all its outputs."""

    def run(model: onnx.ModelProto, feed: Mapping[str, Any], level: str = "ENABLE_ALL"):
        return _session(model, level).run(None, dict(feed))

    return run


@pytest.fixture
def kernels(tmp_path: Path) -> Callable[[onnx.ModelProto], list[str]]:
    """Return the operators that onnxruntime runs a graph with, after all its fusions."""

    def kernels(model: onnx.ModelProto) -> list[str]:
        path = tmp_path / "optimized.onnx"
        _session(model, "ENABLE_ALL", str(path))
        return [node.op_type for node in onnx.load(path).graph.node]

    return kernels


@pytest.fixture(scope="session")
def sqnr_db() -> Callable[[np.ndarray, np.ndarray], float]:
    """Signal to noise of what was found, in decibel; 200 and more where there is no noise."""

    def sqnr_db(found: np.ndarray, wanted: np.ndarray) -> float:
        signal = float((wanted**2).mean())
        noise = max(float(((found - wanted) ** 2).mean()), 1e-20 * signal)
        return float(10 * np.log10(signal / noise))

    return sqnr_db
