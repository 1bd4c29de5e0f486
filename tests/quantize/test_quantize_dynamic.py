from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from edgetune.quantize.dynamic import quantize_dynamic, range_codes
from edgetune.quantize.layers import arrays


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_onnxruntime(model: onnx.ModelProto, folder: Path, codes: str) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as theirs

    onnx.save(model, folder / "float.onnx")
    kind = {"u8": QuantType.QUInt8, "s8": QuantType.QInt8}[codes]
    theirs(folder / "float.onnx", folder / "int8.onnx", per_channel=True, weight_type=kind)
    return onnx.load(folder / "int8.onnx")


@pytest.fixture
def two_layers(build) -> onnx.ModelProto:
    """A MatMul with a bias after it, and a Gemm: x (n, 24) -> y (n, 5)."""
    rows = [("MatMul", "x w -> p"), ("Add", "p b -> h"), ("Gemm", "h v c -> y", {"transB": 1})]
    constants = {"w": normal(0, 24, 16), "b": normal(1, 16), "v": normal(2, 5, 16),
                 "c": normal(3, 5)}  # fmt: skip
    return build(rows, constants, {"x": ["n", 24]}, ["y"])


def test_range_codes_match_a_hand_computation():
    # columns: -1..4.1 in steps of 0.02, so 0 is code 50; 0..2.55; -2.55..0; nothing
    matrix = np.float32([[-1, 1, -1, 0], [4.1, 2.55, -2.55, 0]])
    codes, scale, zero_point = range_codes(matrix)
    np.testing.assert_allclose(scale[:3], [0.02, 0.01, 0.01], rtol=1e-6)
    np.testing.assert_array_equal(zero_point, [50, 0, 255, 0])
    np.testing.assert_array_equal(codes, [[0, 100, 155, 0], [255, 255, 0, 0]])
    assert codes.dtype == zero_point.dtype == np.uint8
    assert np.isfinite(1 / scale).all()


@pytest.mark.parametrize("codes", ["u8", "s8"])
def test_the_answers_are_those_of_onnxruntimes_own_quantizer(
    two_layers: onnx.ModelProto, run, tmp_path: Path, codes: str
):
    x = {"x": normal(4, 7, 24)}
    theirs = run(by_onnxruntime(two_layers, tmp_path, codes), x, "DISABLE_ALL")[0]
    ours = run(quantize_dynamic(two_layers, codes=codes), x, "DISABLE_ALL")[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert not np.allclose(ours, run(two_layers, x)[0], atol=1e-4)


@pytest.mark.parametrize("codes", ["u8", "s8"])
def test_onnxruntime_fuses_each_layer_into_one_node(
    two_layers: onnx.ModelProto, run, kernels, codes: str, sqnr_db
):
    quantized = quantize_dynamic(two_layers, codes=codes)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(quantized), full_check=True)
    found = kernels(quantized)
    assert found.count("DynamicQuantizeMatMul") + found.count("MatMulIntegerToFloat") == 2
    assert "MatMulInteger" not in found
    assert "Gemm" not in found
    x = {"x": normal(4, 7, 24)}
    fused, plain = run(quantized, x)[0], run(quantized, x, "DISABLE_ALL")[0]
    if codes == "u8":  # of s8, some CPUs' sums saturate
        np.testing.assert_allclose(fused, plain, atol=2e-2 * np.abs(plain).max())
    assert sqnr_db(fused, run(two_layers, x)[0]) > 25


@pytest.mark.parametrize("codes", ["u8", "s8"])
@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("beta", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 1), None])
def test_a_gemm_of_any_form_is_quantized(build, run, codes, turned, beta, shape, sqnr_db):
    weight = normal(0, 5, 24) if turned else normal(0, 24, 5)
    constants = {"w": weight} | ({} if shape is None else {"b": normal(1, *shape)})
    wires = "x w -> y" if shape is None else "x w b -> y"
    row = ("Gemm", wires, {"transB": turned, "beta": beta})
    model = build([row], constants, {"x": ["n", 24]}, ["y"])
    x = {"x": normal(2, 7, 24)}
    quantized = quantize_dynamic(model, codes=codes)
    assert "Gemm" not in {n.op_type for n in quantized.graph.node}
    found, wanted = run(quantized, x, "DISABLE_ALL")[0], run(model, x)[0]
    assert sqnr_db(found, wanted) > 30


def test_a_gemm_may_add_what_another_node_computes(build, run, sqnr_db):
    rows = [("Exp", "x -> e"), ("Gemm", "x w e -> y", {"beta": 0.5})]
    model = build(rows, {"w": normal(0, 8, 8)}, {"x": ["n", 8]}, ["y"])
    x = {"x": normal(2, 7, 8)}
    assert sqnr_db(run(quantize_dynamic(model), x)[0], run(model, x)[0]) > 30


@pytest.mark.parametrize("codes", ["u8", "s8"])
def test_outlying_channels_have_scales_of_their_own(build, run, codes: str, sqnr_db):
    weight = normal(0, 24, 6) * np.float32([1e-3, 1, 1, 1e3, 1, 0])
    model = build([("MatMul", "x w -> y")], {"w": weight}, {"x": ["n", "t", 24]}, ["y"])
    x = {"x": normal(1, 2, 9, 24)}
    found, wanted = run(quantize_dynamic(model, codes=codes), x)[0], run(model, x)[0]
    for column in range(5):
        assert sqnr_db(found[..., column], wanted[..., column]) > 25
    np.testing.assert_array_equal(found[..., 5], 0)


def test_an_input_of_several_layers_is_quantized_once(build):
    rows = [("MatMul", f"x w{i} -> y{i}") for i in range(3)]
    constants = {f"w{i}": normal(i, 8, 8) for i in range(3)}
    model = build(rows, constants, {"x": ["n", 8]}, ["y0", "y1", "y2"])
    found = [n.op_type for n in quantize_dynamic(model).graph.node]
    assert found.count("DynamicQuantizeLinear") == 1
    assert found.count("MatMulInteger") == 3


def test_a_weight_read_both_ways_is_right_both_ways(build, run, sqnr_db):
    rows = [("Gemm", "x w -> a"), ("Gemm", "x w -> b", {"transB": 1}), ("MatMul", "x w -> c")]
    weight = normal(0, 8, 8) * np.float32(np.logspace(-2, 2, 8))
    model = build(rows, {"w": weight}, {"x": ["n", 8]}, ["a", "b", "c"])
    x = {"x": normal(1, 7, 8)}
    quantized = quantize_dynamic(model)
    stored = [t for t in quantized.graph.initializer if t.data_type == TensorProto.UINT8]
    assert sum(t.dims == [8, 8] for t in stored) == 2
    for found, wanted in zip(run(quantized, x), run(model, x), strict=True):
        columns = [sqnr_db(found[:, i], wanted[:, i]) for i in range(8)]
        assert min(columns) > 25


def test_nodes_kept_in_float_convolutions_and_preprocessing_stay(build):
    rows = [("Conv", "x k -> c"), ("MatMul", "c w -> d"), ("MatMul", "d v -> e"),
            ("MatMul", "e w -> y")]  # fmt: skip
    constants = {"k": normal(0, 3, 3, 1, 1), "w": normal(1, 8, 8), "v": normal(2, 8, 8)}
    model = build(rows, constants, {"x": ["n", 3, 8, 8]}, ["y"])
    model.graph.node[2].metadata_props.add(key="edgetune.scope", value="preprocess")
    quantized = quantize_dynamic(model, keep_float=["node_d"])
    found = [n.op_type for n in quantized.graph.node]
    assert found.count("MatMulInteger") == 1
    assert [n for n in quantized.graph.node if n.op_type in ("Conv", "MatMul")] == list(
        model.graph.node[:3]
    )
    kept = arrays(quantized)
    for name in "kwv":  # w: coded for one node, float for another
        np.testing.assert_array_equal(kept[name], constants[name])


def test_float_weights_nobody_reads_are_gone_and_the_bytes_are_the_same_again(
    two_layers: onnx.ModelProto,
):
    before = two_layers.SerializeToString(deterministic=True)
    quantized = quantize_dynamic(two_layers)
    assert not {"w", "v"} & {t.name for t in quantized.graph.initializer}
    again = quantize_dynamic(two_layers)
    assert again.SerializeToString(deterministic=True) == quantized.SerializeToString(
        deterministic=True
    )
    assert two_layers.SerializeToString(deterministic=True) == before
