from collections.abc import Collection

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgetune.quantize.dynamic import quantize_dynamic
from edgetune.quantize.layers import Layer, copy_model, weight_layers
from edgetune.quantize.qdq import quantize_static
from edgetune.quantize.sensitivity import Damage, layer_damage, worst_layers


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def damage(name: str, parameters: int, noise: float) -> Damage:
    layer = Layer(node=name, op="MatMul", input="", output="", weight="", axis=1, bias="")
    return Damage(layer=layer, parameters=parameters, noise=noise)


@pytest.fixture
def outlier(build) -> onnx.ModelProto:
    """Three products; the second has large weights on a channel that is always 0."""
    constants = {f"w{i}": normal(i, 16, 16) for i in range(3)}
    constants["w0"][:, 5] = 0
    constants["w1"][5] = 300
    rows = [("MatMul", "x w0 -> a"), ("MatMul", "a w1 -> b"), ("MatMul", "b w2 -> logits")]
    return build(rows, constants, {"x": ["n", 16]}, ["logits"])


def test_the_noise_of_single_layers_matches_a_hand_computation(build):
    # x W V with W = V = the unit matrix; quantizing W makes it 1.1, quantizing V 0.7 at one place
    rows = [("MatMul", "x w -> h"), ("MatMul", "h v -> logits")]
    constants = {"w": np.eye(2, dtype=np.float32), "v": np.eye(2, dtype=np.float32)}
    model = build(rows, constants, {"x": ["n", 2]}, ["logits"])

    def quantize(keep: Collection[str]) -> onnx.ModelProto:
        changed = copy_model(model)
        for number, node in enumerate(changed.graph.node):
            if node.name not in keep:
                value = np.float32([[1.1, 0], [0, 1]] if number == 0 else [[1, 0], [0, 0.7]])
                name = changed.graph.initializer[number].name
                changed.graph.initializer[number].CopyFrom(numpy_helper.from_array(value, name))
        return changed

    done = []
    found = layer_damage(
        model, quantize, [{"x": np.float32([[1, 2]])}, {"x": np.float32([[3, 1], [0, 1]])}],
        on_layer=lambda *numbers: done.append(numbers),
    )  # fmt: skip
    # squares of x: 1 + 9 + 0 in the first column, 4 + 1 + 1 in the second; 16 together
    assert [d.layer.node for d in found] == ["node_logits", "node_h"]
    assert found[0].noise == pytest.approx(0.3**2 * 6 / 16, rel=1e-5)
    assert found[1].noise == pytest.approx(0.1**2 * 10 / 16, rel=1e-5)
    assert found[1].sqnr_db == pytest.approx(22.0412, abs=1e-3)  # 10 log10(160)
    assert [d.parameters for d in found] == [4, 4]
    assert done == [(1, 2), (2, 2)]


@pytest.mark.parametrize("kind", ["dynamic u8", "dynamic s8", "static"])
def test_the_layer_with_outlying_weights_comes_first(outlier: onnx.ModelProto, kind: str):
    feeds = [{"x": normal(10 + i, 4, 16)} for i in range(3)]

    def quantize(keep: Collection[str]) -> onnx.ModelProto:
        if kind == "static":
            return quantize_static(outlier, feeds, codes="u8", keep_float=keep)
        return quantize_dynamic(outlier, codes=kind.split()[1], keep_float=keep)

    found = layer_damage(outlier, quantize, feeds)
    assert found[0].layer == weight_layers(outlier)[1]
    assert found[0].noise > 20 * found[1].noise
    assert found[1].sqnr_db > 30
    assert worst_layers(found, share=0.1, most_parameters=0.5) == ["node_b"]


def test_layers_that_are_not_quantized_are_not_among_them(build):
    rows = [("Conv", "x k -> c"), ("MatMul", "c w -> logits")]
    constants = {"k": normal(0, 3, 3, 1, 1), "w": normal(1, 8, 8)}
    model = build(rows, constants, {"x": ["n", 3, 8, 8]}, ["logits"])
    found = layer_damage(
        model,
        lambda keep: quantize_dynamic(model, keep_float=keep),
        [{"x": normal(2, 1, 3, 8, 8)}],
    )
    assert [d.layer.node for d in found] == ["node_logits"]


def test_another_output_can_be_compared(outlier: onnx.ModelProto):
    # behind the second layer nothing of the third is heard
    feeds = [{"x": normal(10, 4, 16)}]
    found = layer_damage(
        outlier, lambda keep: quantize_dynamic(outlier, keep_float=keep), feeds, output="b"
    )
    noise = {d.layer.node: d.noise for d in found}
    assert noise["node_logits"] == 0
    assert noise["node_a"] > 0
    assert next(d for d in found if d.noise == 0).sqnr_db == float("inf")


def test_layers_of_equal_damage_stay_in_the_graphs_order(outlier: onnx.ModelProto):
    same_answers = copy_model(outlier)
    same_answers.doc_string = "changed"
    found = layer_damage(outlier, lambda _: same_answers, [{"x": normal(10, 4, 16)}])
    assert [d.layer.node for d in found] == ["node_a", "node_b", "node_logits"]


def test_the_worst_share_is_chosen_and_at_least_one():
    damages = [damage(f"l{i}", 10, 1 / (i + 1)) for i in range(10)]
    assert worst_layers(damages, share=0.3, most_parameters=1) == ["l0", "l1", "l2"]
    assert worst_layers(damages, share=0.01, most_parameters=1) == ["l0"]
    assert worst_layers([], share=0.1, most_parameters=1) == []


def test_layers_too_large_to_stay_float_are_passed_over():
    damages = [damage("huge", 600, 9), damage("a", 100, 8), damage("large", 200, 7),
               damage("b", 50, 6), damage("c", 50, 5)]  # fmt: skip
    # of 1000 parameters 250 may stay float: a, not large beside it, b and c
    assert worst_layers(damages, share=0.6, most_parameters=0.25) == ["a", "b", "c"]
    assert worst_layers(damages, share=0.4, most_parameters=0.25) == ["a", "b"]
    assert worst_layers(damages, share=0.4, most_parameters=0.3) == ["a", "large"]
    assert worst_layers(damages, share=1, most_parameters=0) == []
