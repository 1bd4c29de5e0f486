import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetune.errors import GateError
from edgetune.quantize.calibrate import run_tensors
from edgetune.quantize.half import to_fp16

F16 = TensorProto.FLOAT16


def model_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    outputs: tuple[str, ...],
    *,
    rank: int = 2,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 4))],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, (None,) * rank) for o in outputs],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


def two_layers() -> onnx.ModelProto:
    """x + 2049 (preprocessing) -> - 2049 (preprocessing) -> MatMul -> features -> MatMul."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Add", ["x", "offset"], ["a"], name="add"),
        helper.make_node("Sub", ["a", "offset"], ["b"], name="sub"),
        helper.make_node("MatMul", ["b", "w"], ["features"], name="first"),
        helper.make_node("ReduceSum", ["features", "axes"], ["sum"], name="sum", keepdims=1),
        helper.make_node("Mul", ["features", "sum"], ["scaled"], name="scale"),
        helper.make_node("MatMul", ["scaled", "w"], ["logits"], name="second"),
    ]
    for node in nodes[:2]:
        node.metadata_props.add(key="edgetune.scope", value="preprocess")
    constants = {
        "offset": np.float32([2049.0]),  # between two float16
        "w": rng.normal(size=(4, 4)).astype(np.float32),
        "axes": np.array([1], np.int64),
    }
    return model_of(nodes, constants, ("features", "logits"))


def test_weights_and_products_are_float16_and_the_graphs_ends_float32():
    half = to_fp16(two_layers())
    onnx.checker.check_model(half, full_check=True)
    types = {t.name: t.data_type for t in half.graph.initializer}
    assert types == {"offset": TensorProto.FLOAT, "w_as_float16": F16, "axes": TensorProto.INT64}
    ends = [*half.graph.input, *half.graph.output]
    assert {e.type.tensor_type.elem_type for e in ends} == {TensorProto.FLOAT}
    (made,) = run_tensors(
        half, [{"x": np.ones((1, 4), np.float32)}], ["b", "features_float16", "sum", "scaled"]
    )
    dtypes = [str(v.dtype) for v in made.values()]
    assert dtypes == ["float32", "float16", "float32", "float16"]


def test_answers_agree_to_the_precision_of_float16():
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    (want,) = run_tensors(two_layers(), [{"x": x}], ["features", "logits"])
    (got,) = run_tensors(to_fp16(two_layers()), [{"x": x}], ["features", "logits"])
    for name in want:
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], atol=scale * 2**-8)
        assert np.abs(got[name] - want[name]).max() > 0


def test_preprocessing_is_not_rounded():
    x = np.float32([[1.25, 0.5, -0.75, 3.0]])
    (values,) = run_tensors(to_fp16(two_layers()), [{"x": x}], ["b"])
    np.testing.assert_array_equal(values["b"], x)  # in float16, x + 2049 has steps of 2


def test_a_constant_beyond_float16_is_refused_by_name():
    nodes = [helper.make_node("Add", ["x", "mask"], ["y"], name="hide")]
    model = model_of(nodes, {"mask": np.float32([-1e6])}, ("y",))
    with pytest.raises(GateError, match=r"constant 'mask' reaches 1e\+06.*keep in float32: hide"):
        to_fp16(model)
    assert len(to_fp16(model, keep_float=["hide"]).graph.node) == 1


def test_a_value_beyond_float16_on_a_sample_is_refused_by_name():
    nodes = [helper.make_node("Mul", ["x", "x"], ["y"], name="square")]
    model = model_of(nodes, {}, ("y",))
    to_fp16(model, feeds=[{"x": np.full((1, 4), 255, np.float32)}])  # 65025
    with pytest.raises(GateError, match=r"'y' on a sample reaches 65536; .*: square"):
        to_fp16(model, feeds=[{"x": np.full((1, 4), 256, np.float32)}])


def test_operators_of_onnxruntime_are_converted_too():
    # onnx's type inference does not know what MultiHeadAttention gives
    attention = helper.make_node(
        "MultiHeadAttention", ["x3", "x3", "x3"], ["mixed"], name="attention", num_heads=2,
        domain="com.microsoft",
    )  # fmt: skip
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axes"], ["x3"], name="unsqueeze"),
        attention,
        helper.make_node("LayerNormalization", ["mixed", "one"], ["y"], name="norm"),
    ]
    constants = {"axes": np.array([0], np.int64), "one": np.ones(4, np.float32)}
    model = model_of(nodes, constants, ("y",), rank=3)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    x = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    (want,) = run_tensors(model, [{"x": x}], ["y"])
    (got,) = run_tensors(to_fp16(model), [{"x": x}], ["y", "mixed"])
    assert got["mixed"].dtype == np.float16
    np.testing.assert_allclose(got["y"], want["y"], atol=0.02)
