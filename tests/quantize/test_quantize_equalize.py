import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetune.errors import DataError
from edgetune.quantize.calibrate import run_tensors
from edgetune.quantize.equalize import correct_bias, equalize, equalizing_scale
from edgetune.quantize.qdq import quantize_static


def chain(activation: str, *, bias: bool = True) -> onnx.ModelProto:
    """Conv 3->8, depthwise Conv 8, Conv 8->4, an activation after the first two.

    The weights of the first differ between channels by a factor of 1000, as do in the other
    direction those of the second and third, so that no channel of an activation is far from
    the others.
    """
    rng = np.random.default_rng(0)
    uneven = np.logspace(-1.5, 1.5, 8).reshape(8, 1, 1, 1)
    weights = {
        "w0": rng.normal(size=(8, 3, 1, 1)) * uneven / 3,
        "w1": rng.normal(size=(8, 1, 3, 3)) / uneven / 3,
        "w2": rng.normal(size=(4, 8, 1, 1)),
    }
    constants = {name: value.astype(np.float32) for name, value in weights.items()}
    constants |= {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    nodes, x = [], "x"
    for i, channels in enumerate((8, 8, 4)):
        inputs = [x, f"w{i}"]
        if bias:
            constants[f"b{i}"] = rng.normal(size=channels).astype(np.float32)
            inputs.append(f"b{i}")
        depthwise = {"group": 8, "pads": [1, 1, 1, 1]} if i == 1 else {}
        nodes.append(helper.make_node("Conv", inputs, [f"c{i}"], name=f"conv{i}", **depthwise))
        x = f"c{i}"
        if i < 2 and activation != "none":
            bounds = ["low", "high"] if activation == "Clip" else []
            name = f"act{i}"
            nodes.append(helper.make_node(activation, [x, *bounds], [f"a{i}"], name=name))
            x = f"a{i}"
    if activation != "Clip":
        del constants["low"], constants["high"]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 3, "h", "w"))],
        [helper.make_tensor_value_info("c2", TensorProto.FLOAT, (None, 4, None, None))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


def constants_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.fixture(scope="module")
def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(0.5, 1, (2, 3, 6, 5)).astype(np.float32)} for _ in range(8)]


def run(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    return np.concatenate([values[name] for values in run_tensors(model, feeds, [name])])


def test_the_scale_is_the_papers_equation_11():
    # r1 = 8, r2 = 2: s = 2, and 8 / 2 = 2 * 2
    scale = equalizing_scale(np.float32([8, 1, 0, 3]), np.float32([2, 4, 5, 0]))
    np.testing.assert_allclose(scale, [2, 0.5, 1, 1])


@pytest.mark.parametrize("activation", ["Relu", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_function_stays_the_same(
    activation: str, bias: bool, feeds: list[dict[str, np.ndarray]]
):
    model = chain(activation, bias=bias)
    equalized = equalize(model)
    onnx.checker.check_model(equalized, full_check=True)
    want = run(model, feeds, "c2")
    np.testing.assert_allclose(run(equalized, feeds, "c2"), want, atol=1e-5 * np.abs(want).max())
    assert model == chain(activation, bias=bias)


def test_both_sides_of_a_channel_end_with_the_same_range():
    w = constants_of(equalize(chain("Relu")))
    first = np.abs(w["w0"]).max(axis=(1, 2, 3))
    depthwise = np.abs(w["w1"]).max(axis=(1, 2, 3))
    last = np.abs(w["w2"]).max(axis=(0, 2, 3))
    np.testing.assert_allclose(first, depthwise, rtol=0.01)
    np.testing.assert_allclose(depthwise, last, rtol=0.01)
    # the product of the three has not changed, so each is its cube root
    before = constants_of(chain("Relu"))
    product = (
        np.abs(before["w0"]).max(axis=(1, 2, 3))
        * np.abs(before["w1"]).max(axis=(1, 2, 3))
        * np.abs(before["w2"]).max(axis=(0, 2, 3))
    )
    np.testing.assert_allclose(first, np.cbrt(product), rtol=0.01)


def test_grouped_input_channels_are_matched_to_their_group(feeds: list[dict[str, np.ndarray]]):
    model = chain("Relu")
    rng = np.random.default_rng(3)
    for tensor in model.graph.initializer:
        if tensor.name == "w1":  # two groups of four channels in, three out
            value = rng.normal(size=(6, 4, 3, 3)).astype(np.float32)
        elif tensor.name == "b1":
            value = rng.normal(size=6).astype(np.float32)
        elif tensor.name == "w2":
            value = rng.normal(size=(4, 6, 1, 1)).astype(np.float32)
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    conv = next(n for n in model.graph.node if n.name == "conv1")
    next(a for a in conv.attribute if a.name == "group").i = 2
    equalized = equalize(model)
    assert not np.allclose(constants_of(equalized)["w1"], constants_of(model)["w1"], rtol=0.1)
    want = run(model, feeds, "c2")
    np.testing.assert_allclose(run(equalized, feeds, "c2"), want, atol=1e-5 * np.abs(want).max())


def test_relu6_is_kept_unless_asked_for_and_then_becomes_relu(feeds: list[dict[str, np.ndarray]]):
    model = chain("Clip")
    assert equalize(model) == model
    as_relu = equalize(model, relu6="relu")
    onnx.checker.check_model(as_relu, full_check=True)
    assert [n.op_type for n in as_relu.graph.node] == ["Conv", "Relu", "Conv", "Relu", "Conv"]
    want = run(chain("Relu"), feeds, "c2")
    np.testing.assert_allclose(run(as_relu, feeds, "c2"), want, atol=1e-5 * np.abs(want).max())


def test_what_others_read_and_what_is_excluded_stays_as_it_is():
    watched = chain("Relu")
    for name in ("a0", "c1"):
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, (None,) * 4)
        watched.graph.output.append(value)
    assert equalize(watched) == watched
    model = chain("Relu")
    assert equalize(model, exclude=["conv1"]) == model


def test_equalisation_repairs_int8_of_one_scale_a_weight(feeds: list[dict[str, np.ndarray]]):
    """Nagel et al. 2019, table 1: a net that one scale for a weight ruins."""

    def error(model: onnx.ModelProto) -> float:
        rounded = onnx.ModelProto.FromString(model.SerializeToString())
        for tensor in rounded.graph.initializer:
            if tensor.name.startswith("w"):
                value = numpy_helper.to_array(tensor)
                step = np.abs(value).max() / 127
                tensor.CopyFrom(
                    numpy_helper.from_array(
                        (np.rint(value / step) * step).astype(np.float32), tensor.name
                    )
                )
        want = run(model, feeds, "c2")
        return float(np.linalg.norm(run(rounded, feeds, "c2") - want) / np.linalg.norm(want))

    assert error(equalize(chain("Relu"))) < error(chain("Relu")) / 2


@pytest.mark.parametrize("activation", ["Relu", "Clip", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_after_correction_every_layers_mean_is_the_float_layers(
    activation: str, bias: bool, feeds: list[dict[str, np.ndarray]]
):
    model = chain(activation, bias=bias)
    quantized = quantize_static(model, feeds, codes="s7")
    corrected = correct_bias(model, quantized, feeds)
    onnx.checker.check_model(corrected)
    for i in range(3):
        node = next(n for n in corrected.graph.node if n.name == f"conv{i}")
        want, before, after = (
            run(m, feeds, name).mean(axis=(0, 2, 3))
            for m, name in (
                (model, f"c{i}"),
                (quantized, next(n for n in quantized.graph.node if n.name == node.name).output[0]),
                (corrected, node.output[0]),
            )
        )
        scale = constants_of(corrected)[bias_scale(corrected, node)]
        # half a step of the bias's int32 codes, and float32's own
        bound = 0.51 * scale + 1e-5 * np.abs(want).max()
        assert (np.abs(after - want) <= bound).all()
        assert (np.abs(before - want) > bound).any()


def bias_scale(model: onnx.ModelProto, conv: onnx.NodeProto) -> str:
    """The scale of a bias that comes from int32 codes."""
    dequantizer = next(n for n in model.graph.node if n.output[0] == conv.input[2])
    assert constants_of(model)[dequantizer.input[0]].dtype == np.int32
    return dequantizer.input[1]


def test_correction_changes_nothing_but_biases(feeds: list[dict[str, np.ndarray]]):
    model = chain("Relu")
    quantized = quantize_static(model, feeds)
    before = quantized.SerializeToString()
    corrected = correct_bias(model, quantized, feeds)
    assert quantized.SerializeToString() == before
    assert list(corrected.graph.node) == list(quantized.graph.node)
    old, new = constants_of(quantized), constants_of(corrected)
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed == {f"conv{i}_bias_codes" for i in range(3)}
    assert set(old) == set(new)


def test_layers_without_codes_keep_their_bias(feeds: list[dict[str, np.ndarray]]):
    model = chain("Relu")
    quantized = quantize_static(model, feeds, keep_float=["conv2"])
    corrected = constants_of(correct_bias(model, quantized, feeds))
    np.testing.assert_array_equal(corrected["b2"], constants_of(model)["b2"])


def test_correction_needs_samples(feeds: list[dict[str, np.ndarray]]):
    model = chain("Relu")
    with pytest.raises(DataError, match="at least one sample"):
        correct_bias(model, quantize_static(model, feeds), [])
