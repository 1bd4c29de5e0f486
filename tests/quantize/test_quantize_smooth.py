from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetune.errors import ConfigError, DataError
from edgetune.quantize.calibrate import run_tensors
from edgetune.quantize.smooth import smooth, smoothing_scale

WIDTH, HEADS, INNER = 8, 2, 16


def block(*, post_norm: bool) -> onnx.ModelProto:
    """One transformer layer, x (batch, tokens, 8) -> y, with two channels far larger than others.

    Before each part (pre-norm: the sum x goes on around the norm), or after it as in BERT
    (post-norm: the norm's output goes on too).
    """
    rng = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {"to3": np.array([0, 0, WIDTH], np.int64)}
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, *shape: int) -> str:
        constants[name] = rng.normal(size=shape).astype(np.float32) / 2
        return name

    def add(op: str, inputs: list[str], output: str, domain: str = "") -> str:
        node = helper.make_node(op, inputs, [output], name=f"node_{output}", domain=domain)
        if op == "MultiHeadAttention":
            node.attribute.append(helper.make_attribute("num_heads", HEADS))
        nodes.append(node)
        return output

    def linear(x: str, name: str, inputs: int, outputs: int) -> str:
        product = add("MatMul", [x, constant(f"{name}_w", inputs, outputs)], f"{name}_product")
        return add("Add", [product, constant(f"{name}_b", outputs)], name)

    def norm(x: str, name: str) -> str:
        constant(f"{name}_w", WIDTH)
        constants[f"{name}_w"][:2] = 30
        return add("LayerNormalization", [x, f"{name}_w", constant(f"{name}_b", WIDTH)], name)

    residual = norm("x", "norm0") if post_norm else "x"
    h = residual if post_norm else norm("x", "norm1")
    q, k, v = (linear(h, name, WIDTH, WIDTH) for name in "qkv")
    v = add("Reshape", [v, "to3"], "v3")
    mixed = add("MultiHeadAttention", [q, k, v], "mixed", "com.microsoft")
    projected = linear(add("Reshape", [mixed, "to3"], "mixed3"), "out", WIDTH, WIDTH)
    total = add("Add", [projected, residual], "sum1")
    h = norm(total, "norm2")
    inner = linear(h, "inner", WIDTH, INNER)
    active = add("Mul", [inner, add("Sigmoid", [inner], "gate")], "active")  # SiLU
    total = add("Add", [linear(active, "outer", INNER, WIDTH), h if post_norm else total], "y")
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", "tokens", WIDTH))],
        [helper.make_tensor_value_info(total, TensorProto.FLOAT, (None, None, WIDTH))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


@pytest.fixture(scope="module")
def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(2, 5, WIDTH)).astype(np.float32)} for _ in range(3)]


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray], tensor: str) -> np.ndarray:
    return next(run_tensors(model, [feed], [tensor]))[tensor]


def muls(model: onnx.ModelProto) -> list[str]:
    return [n.input[0] for n in model.graph.node if n.name.endswith("_smooth")]


def spread(values: np.ndarray) -> float:
    largest = np.abs(values).max(axis=(0, 1))
    return float(largest.max() / np.median(largest))


def test_the_scale_is_the_papers_equation_4():
    # 16^0.5 / 4^0.5 = 2, 9^0.5 / 1 = 3; silent channels and rows of zeros keep 1
    x, w = np.float32([16, 9, 0, 5]), np.float32([4, 1, 2, 0])
    np.testing.assert_allclose(smoothing_scale(x, w, 0.5), [2, 3, 1, 1])
    np.testing.assert_allclose(smoothing_scale(x[:2], w[:2], 1.0), [16, 9])
    np.testing.assert_allclose(smoothing_scale(x[:2], w[:2], 0.0), [1 / 4, 1])


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_the_function_stays_the_same(
    post_norm: bool, alpha: float, feeds: list[dict[str, np.ndarray]]
):
    model = block(post_norm=post_norm)
    smoothed = smooth(model, feeds, alpha=alpha)
    onnx.checker.check_model(smoothed)
    other = {"x": np.random.default_rng(7).normal(size=(1, 9, WIDTH)).astype(np.float32)}
    for feed in (feeds[0], other):
        want = run(model, feed, "y")
        scale = np.abs(want).max()
        np.testing.assert_allclose(run(smoothed, feed, "y") / scale, want / scale, atol=1e-5)
    assert model == block(post_norm=post_norm)


def test_before_the_layers_the_norm_divides_and_behind_a_residual_norm_a_mul_does(
    feeds: list[dict[str, np.ndarray]],
):
    assert muls(smooth(block(post_norm=False), feeds)) == ["active"]
    assert muls(smooth(block(post_norm=True), feeds)) == ["norm0", "norm2", "active"]


@pytest.mark.parametrize(
    ("post_norm", "before", "after"),
    [
        (False, "norm1", "norm1"),
        (False, "norm2", "norm2"),
        (True, "norm0", "norm0_smoothed"),
        (True, "norm2", "norm2_smoothed"),
    ],
)
def test_channels_of_what_the_layers_read_are_more_even(
    post_norm: bool, before: str, after: str, feeds: list[dict[str, np.ndarray]]
):
    model = block(post_norm=post_norm)
    smoothed = smooth(model, feeds)
    flat, steep = (
        spread(np.concatenate([run(m, f, name) for f in feeds]))
        for m, name in ((smoothed, after), (model, before))
    )
    assert steep > 20
    assert flat < steep / 3


def test_attention_hands_divided_values_on(feeds: list[dict[str, np.ndarray]]):
    model = block(post_norm=True)
    smoothed = smooth(model, feeds)
    weight = next(t for t in model.graph.initializer if t.name == "out_w")
    rows = np.abs(numpy_helper.to_array(weight)).max(axis=1)
    before = np.concatenate([run(model, f, "mixed3") for f in feeds])
    s = np.sqrt(np.abs(before).max(axis=(0, 1)) / rows)  # alpha 0.5
    after = np.concatenate([run(smoothed, f, "mixed3") for f in feeds])
    np.testing.assert_allclose(after, before / s, rtol=1e-3, atol=1e-4)


def test_an_excluded_layer_keeps_its_weights_and_its_input(feeds: list[dict[str, np.ndarray]]):
    model = block(post_norm=False)
    smoothed = smooth(model, feeds, exclude=["node_v_product"])
    weights = [
        {t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, smoothed)
    ]
    for name in ("v_w", "v_b", "norm1_w"):
        np.testing.assert_array_equal(weights[0][name], weights[1][name])
    assert muls(smoothed) == ["norm1", "mixed3", "active"]
    np.testing.assert_allclose(run(smoothed, feeds[0], "y"), run(model, feeds[0], "y"), rtol=1e-3)


def renamed_values(model: onnx.ModelProto) -> None:
    """Let something else read the values too."""
    model.graph.output.append(helper.make_tensor_value_info("v3", TensorProto.FLOAT, (None,) * 3))


def shared_bias(model: onnx.ModelProto) -> None:
    """Let keys and values have one bias."""
    next(n for n in model.graph.node if n.name == "node_k").input[1] = "v_b"


@pytest.mark.parametrize("change", [renamed_values, shared_bias])
def test_values_that_are_not_attentions_alone_are_not_divided(
    change: Callable[[onnx.ModelProto], None], feeds: list[dict[str, np.ndarray]]
):
    model = block(post_norm=False)
    change(model)
    smoothed = smooth(model, feeds)
    assert muls(smoothed) == ["mixed3", "active"]
    want = run(model, feeds[0], "y")
    np.testing.assert_allclose(run(smoothed, feeds[0], "y"), want, atol=1e-5 * np.abs(want).max())


def test_no_samples_and_alpha_out_of_bounds_are_refused(feeds: list[dict[str, np.ndarray]]):
    with pytest.raises(DataError, match="at least one sample"):
        smooth(block(post_norm=True), [])
    with pytest.raises(ConfigError, match=r"alpha: expected 0 to 1, got 1\.5"):
        smooth(block(post_norm=True), feeds, alpha=1.5)
