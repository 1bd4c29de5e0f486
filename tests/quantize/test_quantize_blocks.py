import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetune.errors import ConfigError
from edgetune.quantize.blocks import (
    block_codes,
    block_values,
    pack,
    quantize_blocks,
    quantize_weights,
)
from edgetune.quantize.calibrate import run_tensors

PROJECTION = "encoder.layer.0.intermediate.dense.weight"


def linear(weight: np.ndarray, *, bias: np.ndarray | None = None) -> onnx.ModelProto:
    """x W as a MatMul, or as a Gemm with W transposed where there is a bias."""
    if bias is None:
        node = helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")
        constants = {"w": weight}
    else:
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="linear", transB=1)
        constants = {"w": np.ascontiguousarray(weight.T), "b": bias}
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("rows", len(weight)))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("rows", weight.shape[1]))],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


def result(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return next(run_tensors(model, [{"x": x}], ["y"]))["y"]


def unpack(column: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8 or column.dtype != np.uint8:
        return column
    return np.array([half for byte in column for half in (byte % 16, byte // 16)])


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def real_weight(minilm: str) -> np.ndarray:
    """Of MiniLM's first feed-forward layer, (384, 1536)."""
    from safetensors.numpy import load_file

    return np.ascontiguousarray(load_file(f"{minilm}/model.safetensors")[PROJECTION].T)


def test_codes_of_a_block_match_a_hand_computation():
    # range -1..2 in 15 steps of 0.2, so 0 is code 5; 14 zeros fill the block of 16 up
    codes, scale, zero_point = block_codes(
        np.float32([[-1.0], [2.0]]), bits=4, block_size=16, method="rtn"
    )
    np.testing.assert_array_equal(codes, [[[0, 15, *[5] * 14]]])
    np.testing.assert_allclose(scale, [[0.2]], rtol=1e-6)
    np.testing.assert_array_equal(zero_point, [[5]])


def test_the_first_of_two_codes_is_in_the_low_half_of_a_byte():
    np.testing.assert_array_equal(pack(np.uint8([1, 2, 15]), 4), [0x21, 0x0F])
    np.testing.assert_array_equal(pack(np.uint8([1, 200]), 8), [1, 200])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(96, 7), (50, 3), (384, 64)])
def test_rounding_to_nearest_writes_what_onnxruntimes_own_quantizer_writes(
    bits: int, shape: tuple[int, int]
):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = linear(normal(*shape))
    theirs = MatMulNBitsQuantizer(
        onnx.ModelProto.FromString(model.SerializeToString()), bits=bits, block_size=32,
        is_symmetric=False, accuracy_level=4,
    )  # fmt: skip
    theirs.process()
    ours = quantize_blocks(model, bits=bits).graph
    (node,), (their_node,) = ours.node, theirs.model.model.graph.node
    assert {a.name: a.i for a in node.attribute} == {a.name: a.i for a in their_node.attribute}
    want = {t.name: numpy_helper.to_array(t) for t in theirs.model.model.graph.initializer}
    got = {t.name: numpy_helper.to_array(t) for t in ours.initializer}
    for name, their_name in zip(node.input[1:], their_node.input[1:], strict=True):
        # half bytes that fill a column up are nobody's: they are 8 there, and a code for 0 here
        counts = -(-shape[0] // 32) if "zero_point" in name else shape[0]
        columns = [v.reshape(shape[1], -1) for v in (got[name], want[their_name])]
        for ours_, theirs_ in zip(*columns, strict=True):
            np.testing.assert_array_equal(
                unpack(ours_, bits)[:counts], unpack(theirs_, bits)[:counts]
            )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_the_operator_multiplies_by_the_values_the_codes_stand_for(bits: int, method: str):
    weight, x = normal(80, 24), normal(5, 80)
    model = quantize_blocks(linear(weight), bits=bits, method=method, accuracy_level=0)
    codes, scale, zero_point = block_codes(weight, bits=bits, block_size=32, method=method)
    stands_for = block_values(codes, scale, zero_point, 80)
    np.testing.assert_allclose(result(model, x), x @ stands_for, atol=1e-4)
    # half a step of a range of about 5 sigma
    assert np.abs(stands_for - weight).max() < 6 / (2**bits - 1)


def test_int8_accumulation_stays_close():
    weight, x = normal(64, 48), normal(5, 64)
    exact = result(quantize_blocks(linear(weight), accuracy_level=0), x)
    fast = result(quantize_blocks(linear(weight), accuracy_level=4), x)
    assert np.linalg.norm(fast - exact) < 0.02 * np.linalg.norm(exact)


def test_a_gemm_keeps_its_bias_and_its_transposed_weight():
    weight, bias, x = normal(64, 9), normal(9), normal(5, 64)
    model = quantize_blocks(linear(weight, bias=bias), bits=8, accuracy_level=0)
    assert [n.op_type for n in model.graph.node] == ["MatMulNBits", "Add"]
    want = result(quantize_blocks(linear(weight), bits=8, accuracy_level=0), x) + bias
    np.testing.assert_allclose(result(model, x), want, atol=1e-5)


def test_half_quadratic_scales_lower_the_objective_in_every_block():
    heavy = np.random.default_rng(0).standard_t(3, (384, 64)).astype(np.float32)
    rtn, hqq = (
        np.abs(block_values(*block_codes(heavy, bits=4, block_size=32, method=m), 384) - heavy)
        ** 0.7
        for m in ("rtn", "hqq")
    )
    by_block = [error.reshape(12, 32, 64).sum(axis=1) for error in (rtn, hqq)]
    assert (by_block[1] <= by_block[0] * (1 + 1e-6)).all()
    assert hqq.sum() < 0.97 * rtn.sum()


def test_half_quadratic_scales_lower_the_output_error_on_real_weights(real_weight: np.ndarray):
    x = normal(16, 384)
    want = x @ real_weight
    rtn, hqq = (
        np.linalg.norm(
            result(quantize_blocks(linear(real_weight), method=m, accuracy_level=0), x) - want
        )
        for m in ("rtn", "hqq")
    )
    assert hqq < 0.985 * rtn
    assert rtn < 0.15 * np.linalg.norm(want)


def test_plain_int8_weights_need_no_operator_of_onnxruntime():
    weight, bias, x = normal(64, 9), normal(9), normal(5, 64)
    weight[:, 4] = 0
    for model in (linear(weight), linear(weight, bias=bias)):
        small = quantize_weights(model)
        onnx.checker.check_model(small, full_check=True)
        assert small.graph.node[0].op_type == "DequantizeLinear"
        stored = {t.name: numpy_helper.to_array(t) for t in small.graph.initializer}
        (codes,) = [v for v in stored.values() if v.dtype == np.int8]
        assert np.abs(codes.astype(int)).max() == 127
        # every weight moves by half a step of its column at most
        half_step = np.abs(weight).max(axis=0) / 127 / 2
        bound = np.abs(x).sum(axis=1, keepdims=True) * half_step
        assert (np.abs(result(small, x) - result(model, x)) <= bound + 1e-5).all()


def test_excluded_nodes_and_the_model_itself_stay_as_they_are():
    model = linear(normal(64, 9))
    assert quantize_blocks(model, keep_float=["linear"]) == model
    assert quantize_weights(model, keep_float=["linear"]) == model
    quantize_blocks(model)
    assert model == linear(normal(64, 9))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 3}, "bits: expected 4 or 8, got 3"),
        ({"block_size": 48}, "block_size: expected a power of two from 16, got 48"),
        ({"accuracy_level": 5}, "accuracy_level: expected 0 to 4, got 5"),
    ],
)
def test_options_the_operator_does_not_have_are_refused(options: dict[str, int], said: str):
    with pytest.raises(ConfigError, match=said):
        quantize_blocks(linear(normal(64, 9)), **options)
