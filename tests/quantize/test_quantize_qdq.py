import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from edgetune.quantize.calibrate import Range
from edgetune.quantize.layers import arrays
from edgetune.quantize.qdq import (
    activation_scale,
    plan_static,
    quantize_static,
    weight_codes,
    write_static,
)

LEVELS = ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fed(*arrays: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"x": array} for array in arrays]


def dequantizer(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    (node,) = (n for n in model.graph.node if tensor in n.output)
    assert node.op_type == "DequantizeLinear"
    return node


def node_named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (node,) = (n for n in model.graph.node if n.name == name)
    return node


NET_ROWS = [
    ("Conv", "x w0 b0 -> c0", {"pads": [1, 1, 1, 1]}),
    ("Relu", "c0 -> r0"),
    ("Conv", "r0 w1 b1 -> c1", {"pads": [1, 1, 1, 1], "group": 8}),
    ("Clip", "c1 low high -> r1"),
    ("Conv", "r1 w2 -> c2"),
    ("Add", "c2 r0 -> sum"),
    ("MaxPool", "sum -> pooled", {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ("Conv", "pooled w3 b3 -> c3", {"group": 2}),
    ("Flatten", "c3 -> flat"),
    ("Gemm", "flat w4 b4 -> y", {"transB": 1}),
]


@pytest.fixture(scope="module")
def net_constants() -> dict[str, np.ndarray]:
    shapes = {
        "w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 1, 3, 3), "b1": (8,), "w2": (8, 8, 1, 1),
        "w3": (6, 4, 1, 1), "b3": (6,), "w4": (5, 54), "b4": (5,),
    }  # fmt: skip
    made = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        inputs = int(np.prod(shape[1:]))
        made[name] = normal(seed, *shape) / np.float32(np.sqrt(max(inputs, 4)))
    return made | {"low": np.float32(0), "high": np.float32(6)}


@pytest.fixture
def net(build, net_constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A small convolution net with all that has integer kernels; 6x6 pixels in."""
    return build(NET_ROWS, net_constants, {"x": ["n", 3, 6, 6]}, ["y"])


@pytest.fixture(scope="module")
def images() -> list[dict[str, np.ndarray]]:
    return fed(*(normal(seed, 2, 3, 6, 6) for seed in range(100, 108)))


# the arithmetic of one weight or activation


def test_weight_codes_match_a_hand_computation():
    weight = np.float32([[2.54, -1.27, 0.01], [0.5, 1.0, -0.25]])
    codes, scale, zero_point = weight_codes(weight, 0, "s8")
    # steps of 2.54 / 127 = 0.02 and 1 / 127
    np.testing.assert_allclose(scale, [0.02, 1 / 127], rtol=1e-6)
    np.testing.assert_array_equal(codes, [[127, -64, 0], [64, 127, -32]])  # -63.5 and 63.5: even
    assert (codes.dtype, zero_point) == (np.int8, 0)
    codes, scale, zero_point = weight_codes(weight, 1, "s7")
    np.testing.assert_allclose(scale, np.float32([2.54, 1.27, 0.25]) / 63, rtol=1e-6)
    np.testing.assert_array_equal(codes, [[63, -63, 3], [12, 50, -63]])
    assert (codes.dtype, zero_point) == (np.int8, 0)


def test_u8_codes_are_s8_codes_plus_128_of_the_same_reals():
    weight = normal(0, 16, 4, 3, 3)
    signed, scale, _ = weight_codes(weight, 0, "s8")
    unsigned, same_scale, zero_point = weight_codes(weight, 0, "u8")
    assert (unsigned.dtype, zero_point) == (np.uint8, 128)
    np.testing.assert_array_equal(scale, same_scale)
    np.testing.assert_array_equal(unsigned.astype(int) - 128, signed)


@pytest.mark.parametrize(("codes", "largest"), [("s8", 127), ("u8", 127), ("s7", 63)])
def test_codes_are_symmetric_and_minus_128_is_never_used(codes: str, largest: int):
    weight = normal(0, 40, 6)
    weight[:20] = -np.abs(weight[:20])  # the largest value is negative
    found, _, zero_point = weight_codes(weight, 0, codes)
    found = found.astype(int) - zero_point
    np.testing.assert_array_equal(np.abs(found).max(axis=1), [largest] * 40)


def test_a_channel_of_zeros_has_codes_of_zero_and_a_finite_scale():
    weight = normal(0, 2, 3)
    weight[1] = 0
    codes, scale, _ = weight_codes(weight, 0, "s8")
    np.testing.assert_array_equal(codes[1], [0, 0, 0])
    assert np.isfinite(1 / scale).all()


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0, 5.1, 0.02, 0),
        (-5.1, 0, 0.02, 255),
        (-1, 4.1, 0.02, 50),
        (-1.014, 4.086, 0.02, 51),
    ],
)
def test_activation_codes_match_a_hand_computation(
    low: float, high: float, scale: float, zero_point: int
):
    found, point = activation_scale(Range(low=low, high=high))
    assert found == pytest.approx(scale, rel=1e-6)
    assert point == zero_point


def test_a_range_of_nothing_has_a_finite_scale():
    scale, zero_point = activation_scale(Range(low=0, high=0))
    assert scale > 0
    assert np.isfinite(np.float32(1) / np.float32(scale))
    assert zero_point == 0


# the plan


def test_the_plan_of_a_net(net: onnx.ModelProto):
    plan = plan_static(net)
    assert [layer.node for layer in plan.layers] == [
        "node_c0", "node_c1", "node_c2", "node_c3", "node_y",
    ]  # fmt: skip
    assert dict(plan.rectifiers) == {"node_r0": "node_c0", "node_r1": "node_c1"}
    assert plan.elementwise == {"node_sum"}
    assert plan.shuffles == {"node_pooled", "node_flat"}
    # no codes for what a Relu or Clip eats, nor for the last product
    assert set(plan.tensors) == {"x", "r0", "r1", "c2", "sum", "pooled", "c3", "flat"}


# whole graphs


@pytest.mark.parametrize("codes", ["s8", "u8", "s7"])
def test_a_net_is_integer_throughout(net: onnx.ModelProto, images, kernels, codes: str):
    found = kernels(quantize_static(net, images, codes=codes))
    layout = ("Reshape", "Flatten", "Transpose")
    assert [op.removeprefix("Nhwc") for op in found if op not in layout] == [
        "QuantizeLinear", "QLinearConv", "QLinearConv", "QLinearConv", "QLinearAdd", "MaxPool",
        "QLinearConv", "QGemm",
    ]  # fmt: skip


@pytest.mark.parametrize("codes", ["s8", "u8"])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_net_keeps_25_db(net: onnx.ModelProto, images, run, codes: str, method: str, sqnr_db):
    quantized = quantize_static(net, images, codes=codes, method=method)
    found = np.concatenate([run(quantized, feed)[0] for feed in images])
    wanted = np.concatenate([run(net, feed)[0] for feed in images])
    assert sqnr_db(found, wanted) > 25


def fake_quant(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    scale = (high - low) / 255
    point = round(-low / scale)
    codes = torch.clamp(torch.round(values / scale) + point, 0, 255)
    return (codes - point) * scale


def fake_quant_weight(weight: np.ndarray, largest: int) -> torch.Tensor:
    values = torch.from_numpy(weight).double()
    scale = values.flatten(1).abs().amax(1).reshape(-1, *[1] * (values.ndim - 1)) / largest
    return torch.round(values / scale) * scale


def net_in_torch(constants, x: np.ndarray, ranges=None, largest=127) -> dict[str, torch.Tensor]:
    """The net in float64 by tensor's name; with `ranges`, quantized and dequantized by hand."""

    def q(name: str, value: torch.Tensor) -> torch.Tensor:
        seen[name] = value if ranges is None else fake_quant(value, *ranges[name])
        return seen[name]

    def w(name: str) -> torch.Tensor:
        if ranges is None or name.startswith("b"):
            return torch.from_numpy(constants[name]).double()
        return fake_quant_weight(constants[name], largest)

    seen: dict[str, torch.Tensor] = {}
    h = q("x", torch.from_numpy(x).double())
    first = q("r0", functional.conv2d(h, w("w0"), w("b0"), padding=1).relu())
    h = q("r1", functional.conv2d(first, w("w1"), w("b1"), padding=1, groups=8).clamp(0, 6))
    h = q("sum", q("c2", functional.conv2d(h, w("w2"))) + first)
    h = functional.max_pool2d(h, 2, 2)
    h = q("c3", functional.conv2d(h, w("w3"), w("b3"), groups=2)).flatten(1)
    seen["y"] = functional.linear(h, w("w4"), w("b4"))
    return seen


# u8 and s7 are exact on every CPU; s8 saturates in some x86 kernels, so in float only
@pytest.mark.parametrize(
    ("codes", "largest", "level"),
    [("s8", 127, "DISABLE_ALL"), *(("u8", 127, level) for level in LEVELS),
     *(("s7", 63, level) for level in LEVELS)],
)  # fmt: skip
def test_the_answers_are_those_of_quantizing_by_hand(
    net: onnx.ModelProto, net_constants, images, run, codes: str, largest: int, level: str
):
    x = np.concatenate([feed["x"] for feed in images])
    real = net_in_torch(net_constants, x)
    ranges = {k: (min(v.min().item(), 0), max(v.max().item(), 0)) for k, v in real.items()}
    wanted = net_in_torch(net_constants, x, ranges, largest)["y"].numpy()
    found = run(quantize_static(net, images, codes=codes), {"x": x}, level)[0]
    # a value in the middle between two codes may fall to the other side, and move an answer by
    # less than a step of the Gemm's input times its largest weight, or two
    step = (ranges["c3"][1] - ranges["c3"][0]) / 255 * np.abs(net_constants["w4"]).max()
    difference = np.abs(found - wanted)
    assert difference.max() < 2 * step
    assert np.median(difference) < 0.1 * step


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_optimization_has_the_same_answers(
    net: onnx.ModelProto, images, run, level: str, sqnr_db
):
    quantized = quantize_static(net, images, codes="u8")
    found = run(quantized, images[0], level)[0]
    assert sqnr_db(found, run(quantized, images[0], "DISABLE_ALL")[0]) > 45


def test_the_bytes_are_the_same_again_and_the_float_graph_stays(net: onnx.ModelProto, images):
    before = net.SerializeToString(deterministic=True)
    first = quantize_static(net, images).SerializeToString(deterministic=True)
    assert quantize_static(net, images).SerializeToString(deterministic=True) == first
    assert net.SerializeToString(deterministic=True) == before


def test_the_graph_is_valid_and_its_float_weights_are_gone(net: onnx.ModelProto, images):
    quantized = quantize_static(net, images)
    shaped = onnx.shape_inference.infer_shapes(quantized, strict_mode=True)
    onnx.checker.check_model(shaped, full_check=True)
    names = set(arrays(quantized))
    assert not names & {"w0", "b0", "w1", "b1", "w2", "w3", "b3", "w4", "b4", "low", "high"}
    floats = [v for v in arrays(quantized).values() if v.dtype == np.float32]
    assert max(v.size for v in floats) <= 8  # scales


def test_shuffled_tensors_share_their_codes(net: onnx.ModelProto, images):
    constants = arrays(quantize_static(net, images))
    for before, after in (("sum", "pooled"), ("c3", "flat")):
        assert constants[f"{before}_scale"] == constants[f"{after}_scale"]
        assert constants[f"{before}_zero_point"] == constants[f"{after}_zero_point"]


# parts of graphs


@pytest.mark.parametrize(
    ("activation", "absorbed"),
    [(("Relu", "c -> r"), True), (("Clip", "c zero six -> r"), True),
     (("Clip", "c one six -> r"), False), (("Clip", "c  -> r"), False),
     (("LeakyRelu", "c -> r"), False)],
)  # fmt: skip
def test_a_range_from_0_does_the_work_of_relu_and_clip(
    build, run, kernels, activation, absorbed, sqnr_db
):
    rows = [("Conv", "x w -> c"), activation, ("Conv", "r v -> y")]
    constants = {"w": normal(0, 4, 3, 1, 1) * 4, "v": normal(1, 4, 4, 1, 1)}
    constants |= {"zero": np.float32(0), "one": np.float32(1), "six": np.float32(6)}
    used = {name: v for name, v in constants.items() if any(name in r[1].split() for r in rows)}
    model = build(rows, used, {"x": ["n", 3, "h", "w"]}, ["y"])
    feeds = fed(normal(2, 2, 3, 5, 5))
    quantized = quantize_static(model, feeds, codes="u8")
    assert (activation[0] not in {n.op_type for n in quantized.graph.node}) == absorbed
    assert kernels(quantized).count("QLinearConv") == 2
    assert sqnr_db(run(quantized, feeds[0])[0], run(model, feeds[0])[0]) > 25


@pytest.mark.parametrize("product", [("Gemm", "x w b -> c"), ("MatMul", "x w -> c")])
@pytest.mark.parametrize("last", [("Softmax", "r -> y"), ("MatMul", "r x2 -> y")])
def test_relu_of_a_product_that_floats_take_still_clips(build, run, product, last, sqnr_db):
    constants = {"w": normal(0, 8, 4), "b": normal(1, 4), "x2": normal(2, 1, 4, 3)}
    used = {k: v for k, v in constants.items() if k in (product[1] + " " + last[1]).split()}
    model = build([product, ("Relu", "c -> r"), last], used, {"x": ["n", 8]}, ["y"])
    feeds = fed(normal(3, 6, 8))
    found = run(quantize_static(model, feeds, codes="u8"), feeds[0])[0]
    assert sqnr_db(found, run(model, feeds[0])[0]) > 30


def test_relu_whose_input_others_need_stays(build, run, sqnr_db):
    rows = [("Conv", "x w -> c"), ("Relu", "c -> r"), ("Sub", "c r -> y")]
    model = build(rows, {"w": normal(0, 4, 3, 1, 1)}, {"x": ["n", 3, "h", "w"]}, ["y"])
    feeds = fed(normal(1, 1, 3, 4, 4))
    quantized = quantize_static(model, feeds, codes="u8")
    assert node_named(quantized, "node_r").op_type == "Relu"
    found = run(quantized, feeds[0])[0]
    assert found.min() < 0
    assert sqnr_db(found, run(model, feeds[0])[0]) > 30


def test_outputs_keep_their_names_and_have_codes(build, run, kernels, sqnr_db):
    rows = [("Conv", "x w -> c"), ("Conv", "c v -> d"), ("Relu", "d -> r"), ("Neg", "c -> n")]
    constants = {"w": normal(0, 4, 3, 1, 1), "v": normal(1, 2, 4, 1, 1)}
    model = build(rows, constants, {"x": ["n", 3, "h", "w"]}, ["c", "r", "n"])
    feeds = fed(normal(2, 1, 3, 4, 4))
    quantized = quantize_static(model, feeds, codes="u8")
    assert [value.name for value in quantized.graph.output] == ["c", "r", "n"]
    found, wanted = run(quantized, feeds[0]), run(model, feeds[0])
    for one, other in zip(found, wanted, strict=True):
        assert sqnr_db(one, other) > 30
        assert len(np.unique(one)) <= 256
    np.testing.assert_array_equal(found[0], -found[2])
    assert kernels(quantized).count("QLinearConv") == 2


def test_a_float_made_by_a_float_node_stays_float_for_others(build, run):
    rows = [("Sigmoid", "x -> s"), ("MatMul", "s w -> m"), ("Exp", "s -> y")]
    model = build(rows, {"w": normal(0, 4, 4)}, {"x": ["n", "t", 4]}, ["m", "y"])
    feeds = fed(normal(1, 2, 3, 4))
    quantized = quantize_static(model, feeds)
    assert node_named(quantized, "node_y").input[0] == "s"
    found, wanted = run(quantized, feeds[0]), run(model, feeds[0])
    np.testing.assert_array_equal(found[1], wanted[1])
    assert 0 < np.abs(found[0] - wanted[0]).max() < 0.1


def test_one_tensor_of_two_layers_gets_codes_once(build):
    rows = [("Sigmoid", "x -> s"), ("MatMul", "s w -> a"), ("MatMul", "s v -> b")]
    constants = {"w": normal(0, 4, 4), "v": normal(1, 4, 4)}
    model = build(rows, constants, {"x": ["n", "t", 4]}, ["a", "b"])
    quantized = quantize_static(model, fed(normal(1, 2, 3, 4)))
    assert [n.op_type for n in quantized.graph.node].count("QuantizeLinear") == 1


def test_nodes_kept_in_float_are_as_they_were(net: onnx.ModelProto, images, kernels):
    keep = ["node_c2", "node_y", "node_r0"]
    quantized = quantize_static(net, images, keep_float=keep)
    constants = arrays(quantized)
    for name, weight in (("node_c2", "w2"), ("node_y", "w4")):
        assert node_named(quantized, name).input[1] == weight
        np.testing.assert_array_equal(constants[weight], arrays(net)[weight])
    assert node_named(quantized, "node_r0").op_type == "Relu"
    # the sum has a float input now, and is float
    assert node_named(quantized, "node_sum").op_type == "Add"
    assert "node_sum" not in plan_static(net, keep_float=keep).elementwise
    found = kernels(quantized)
    assert found.count("QLinearConv") == 3
    assert "QLinearAdd" not in found
    assert "QGemm" not in found


def test_with_every_layer_kept_the_graph_is_as_it_was(net: onnx.ModelProto, images):
    keep = [layer.node for layer in plan_static(net).layers]
    assert quantize_static(net, images, keep_float=keep) == net


def test_preprocessing_is_left_alone(build, images):
    rows = [("Conv", "x w -> c"), ("Relu", "c -> r"), ("Conv", "r v -> y")]
    constants = {"w": normal(0, 4, 3, 1, 1), "v": normal(1, 2, 4, 1, 1)}
    model = build(rows, constants, {"x": ["n", 3, "h", "w"]}, ["y"])
    for node in model.graph.node[:2]:
        node.metadata_props.add(key="edgetune.scope", value="preprocess")
    quantized = quantize_static(model, images)
    assert list(quantized.graph.node[:2]) == list(model.graph.node[:2])
    assert arrays(quantized)["w"].dtype == np.float32
    assert "v" not in arrays(quantized)


def test_one_layer_may_have_codes_of_its_own(net: onnx.ModelProto, images, run):
    quantized = quantize_static(net, images, codes="s8", layer_codes={"node_c1": "u8"})
    constants = arrays(quantized)
    kinds = {}
    for name in ("node_c0", "node_c1", "node_c2", "node_c3", "node_y"):
        source = dequantizer(quantized, node_named(quantized, name).input[1])
        kinds[name] = constants[source.input[0]].dtype
        assert constants[source.input[2]].dtype == kinds[name]
    assert kinds.pop("node_c1") == np.uint8
    assert set(kinds.values()) == {np.dtype(np.int8)}
    # the same reals: without integer kernels, the same answers
    other = quantize_static(net, images, codes="s8")
    for feed in images:
        np.testing.assert_array_equal(
            run(quantized, feed, "DISABLE_ALL")[0], run(other, feed, "DISABLE_ALL")[0]
        )


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (1,), ()])
def test_a_gemm_of_any_form_is_integer(build, run, kernels, turned, beta, shape, sqnr_db):
    weight = normal(0, 5, 8) if turned else normal(0, 8, 5)
    bias = normal(1, *shape) if shape else np.float32(0.7)
    attributes = {"transB": turned, "beta": beta}
    model = build([("Gemm", "x w b -> y", attributes)], {"w": weight, "b": bias},
                  {"x": ["n", 8]}, ["y"])  # fmt: skip
    x = normal(2, 6, 8)
    quantized = quantize_static(model, fed(x), codes="u8")
    assert kernels(quantized) == ["QuantizeLinear", "QGemm"]
    wanted = x @ (weight.T if turned else weight) + np.float32(beta) * bias
    for level in LEVELS:
        assert sqnr_db(run(quantized, {"x": x}, level)[0], wanted) > 30, level


@pytest.mark.parametrize("shape", [(6, 5), (6, 1)])
def test_a_gemm_that_adds_another_value_to_each_row_is_right(build, run, shape, sqnr_db):
    bias = normal(1, *shape)
    model = build([("Gemm", "x w b -> y", {"beta": 2.0})], {"w": normal(0, 8, 5), "b": bias},
                  {"x": ["n", 8]}, ["y"])  # fmt: skip
    x = normal(2, 6, 8)
    quantized = quantize_static(model, fed(x), codes="u8")
    for level in LEVELS:
        found = run(quantized, {"x": x}, level)[0]
        assert sqnr_db(found, x @ normal(0, 8, 5) + 2 * bias) > 30, level


def test_a_bias_is_counted_in_steps_of_input_times_weight(build):
    weight, bias = np.float32([[1.27, 0], [0, 2.54]]), np.float32([1, -3])
    model = build([("Gemm", "x w b -> y", {"beta": 0.5})], {"w": weight, "b": bias},
                  {"x": ["n", 2]}, ["y"])  # fmt: skip
    ranges = {"x": Range(low=0, high=5.1)}
    quantized = write_static(model, plan_static(model), ranges)
    node = node_named(quantized, "node_y")
    source = dequantizer(quantized, node.input[2])
    codes, scale = (arrays(quantized)[name] for name in source.input)
    # input steps of 0.02, weight steps of 0.01 and 0.02; beta 0.5 goes into the bias
    np.testing.assert_allclose(scale, [0.0002, 0.0004], rtol=1e-6)
    np.testing.assert_array_equal(codes, [2500, -3750])
    assert codes.dtype == np.int32
    assert onnx.helper.get_attribute_value(node.attribute[0]) == 1.0


@pytest.mark.parametrize("op", ["Conv", "Gemm"])
@pytest.mark.parametrize("weak", [0.0, 1e-12, 1e-7])
def test_a_bias_beside_weights_of_nothing_is_kept(build, run, op: str, weak: float, sqnr_db):
    # what pruning or BatchNorm switched off still adds its bias
    weight = normal(0, 4, 3)
    weight[1] *= np.float32(weak)
    bias = np.float32([1, 2, -3, 4])
    if op == "Conv":
        row, inputs = ("Conv", "x w b -> y"), {"x": ["n", 3, "h", "w"]}
        weight, x = weight.reshape(4, 3, 1, 1), normal(1, 2, 3, 3, 3)
    else:
        row, inputs = ("Gemm", "x w b -> y", {"transB": 1}), {"x": ["n", 3]}
        x = normal(1, 6, 3)
    model = build([row], {"w": weight, "b": bias}, inputs, ["y"])
    quantized = quantize_static(model, fed(x), codes="u8")
    for level in LEVELS:
        found = run(quantized, {"x": x}, level)[0]
        np.testing.assert_allclose(found[:, 1], 2, atol=0.03, err_msg=level)
        assert sqnr_db(found, run(model, {"x": x})[0]) > 30, level


def test_a_layer_whose_input_was_always_0_returns_its_bias(build, run):
    rows = [("Conv", "x w b -> c"), ("Relu", "c -> r"), ("Conv", "r v d -> y")]
    constants = {"w": normal(0, 4, 3, 1, 1), "b": np.full(4, -1000, np.float32),
                 "v": normal(1, 2, 4, 1, 1), "d": np.float32([1, -2])}  # fmt: skip
    model = build(rows, constants, {"x": ["n", 3, "h", "w"]}, ["y"])
    feeds = fed(normal(2, 1, 3, 4, 4))
    quantized = quantize_static(model, feeds)
    for level in LEVELS:
        found = run(quantized, feeds[0], level)[0]
        np.testing.assert_allclose(found[:, 0], 1, atol=0.01, err_msg=level)
        np.testing.assert_allclose(found[:, 1], -2, atol=0.01, err_msg=level)


def test_a_weight_of_two_nodes_is_written_once(build, run, sqnr_db):
    rows = [("MatMul", "x w -> a"), ("MatMul", "a w -> b"), ("MatMul", "b w -> y")]
    model = build(rows, {"w": normal(0, 8, 8)}, {"x": ["n", "t", 8]}, ["y"])
    feeds = fed(normal(1, 2, 3, 8))
    quantized = quantize_static(model, feeds, keep_float=["node_y"])
    large = [name for name, v in arrays(quantized).items() if v.size == 64]
    assert len(large) == 2  # codes, and the float for the node that is kept
    assert sqnr_db(run(quantized, feeds[0])[0], run(model, feeds[0])[0]) > 30


def test_a_weight_of_two_nodes_that_read_it_differently_has_scales_for_each(build, run, sqnr_db):
    # columns differ by a factor of 10,000: one scale a row would leave nothing of most
    weight = normal(0, 8, 8) * np.float32(np.logspace(-2, 2, 8))
    rows = [("Gemm", "x w -> a"), ("Gemm", "x w -> b", {"transB": 1})]
    model = build(rows, {"w": weight}, {"x": ["n", 8]}, ["a", "b"])
    feeds = fed(normal(1, 6, 8))
    found = run(quantize_static(model, feeds, codes="u8"), feeds[0])
    for one, other in zip(found, run(model, feeds[0]), strict=True):
        columns = [sqnr_db(one[:, i], other[:, i]) for i in range(8)]
        assert min(columns) > 30


def test_products_of_three_axes_are_integer(build, run, kernels, sqnr_db):
    rows = [("MatMul", "x w -> p"), ("Add", "p b -> y")]
    model = build(rows, {"w": normal(0, 8, 4), "b": normal(1, 4)}, {"x": ["n", "t", 8]}, ["y"])
    feeds = fed(normal(2, 2, 5, 8))
    quantized = quantize_static(model, feeds, codes="u8")
    assert kernels(quantized) == ["QuantizeLinear", "MatMulIntegerToFloat", "Add"]
    assert sqnr_db(run(quantized, feeds[0])[0], run(model, feeds[0])[0]) > 30


def test_a_product_of_two_axes_and_a_sum_are_right(build, run, sqnr_db):
    # onnxruntime makes a Gemm of the two, which with a float bias has no integer kernel
    rows = [("MatMul", "x w -> p"), ("Add", "p b -> y")]
    model = build(rows, {"w": normal(0, 8, 4), "b": normal(1, 4)}, {"x": ["n", 8]}, ["y"])
    feeds = fed(normal(2, 6, 8))
    quantized = quantize_static(model, feeds, codes="u8")
    for level in LEVELS:
        assert sqnr_db(run(quantized, feeds[0], level)[0], run(model, feeds[0])[0]) > 30


def test_an_add_of_a_constant_or_of_a_float_stays_float(build):
    rows = [("Conv", "x w -> c"), ("Add", "c k -> a"), ("Sigmoid", "c -> s"), ("Add", "c s -> y")]
    constants = {"w": normal(0, 4, 3, 1, 1), "k": normal(1, 4, 1, 1)}
    model = build(rows, constants, {"x": ["n", 3, "h", "w"]}, ["a", "y"])
    assert plan_static(model).elementwise == frozenset()


@pytest.mark.parametrize(
    "rows",
    [
        [("Transpose", "c -> s", {"perm": [0, 2, 3, 1]})],
        [("Reshape", "c shape -> s")],
        [("Unsqueeze", "c axes -> u"), ("Squeeze", "u axes -> s")],
    ],
)
def test_shuffles_between_layers_keep_codes(build, run, kernels, rows, sqnr_db):
    last = [("Conv", "s v -> y")] if rows[0][0] == "Unsqueeze" else [("MatMul", "s v -> y")]
    every = [("Conv", "x w -> c"), *rows, *last]
    constants = {
        "w": normal(0, 4, 3, 1, 1), "shape": np.array([0, 0, 16], np.int64),
        "axes": np.array([1], np.int64),
        "v": {"Transpose": normal(1, 4, 2), "Reshape": normal(1, 16, 2)}.get(
            rows[0][0], normal(1, 2, 4, 1, 1)
        ),
    }  # fmt: skip
    used = {k: v for k, v in constants.items() if any(k in r[1].split() for r in every)}
    model = build(every, used, {"x": ["n", 3, 4, 4]}, ["y"])
    feeds = fed(normal(2, 2, 3, 4, 4))
    quantized = quantize_static(model, feeds, codes="u8")
    assert kernels(quantized).count("QuantizeLinear") == 1
    assert sqnr_db(run(quantized, feeds[0])[0], run(model, feeds[0])[0]) > 30
