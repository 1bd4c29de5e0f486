import numpy as np
import onnx
import pytest

from edgetune.quantize.layers import (
    Layer,
    arrays,
    attribute,
    copy_model,
    preprocessing_nodes,
    weight_layers,
)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.fixture
def model(build) -> onnx.ModelProto:
    """Conv, pooled, then Gemm, MatMul and products that are none of constant weights."""
    return build(
        [
            ("Conv", "x cw cb -> c", {"group": 2}),
            ("GlobalAveragePool", "c -> pooled"),
            ("Flatten", "pooled -> f"),
            ("Gemm", "f gw gb -> g", {"transB": 1}),
            ("Gemm", "g hw f -> h"),
            ("MatMul", "h mw -> m"),
            ("MatMul", "m h -> square"),
            ("MatMul", "batch m -> left"),
            ("Gemm", "h mw -> turned", {"transA": 1}),
            ("Gemm", "h mw -> doubled", {"alpha": 2.0}),
        ],
        {
            "cw": ones(6, 2, 3, 3),
            "cb": ones(6),
            "gw": ones(5, 6),
            "gb": ones(5),
            "hw": ones(5, 6),
            "mw": ones(6, 6),
            "batch": ones(2, 6, 6),
        },
        {"x": ["n", 4, "h", "w"]},
        ["square", "left", "turned", "doubled"],
    )


def test_layers_are_the_products_with_constant_weights_in_order(model: onnx.ModelProto):
    assert weight_layers(model) == [
        Layer(node="node_c", op="Conv", input="x", output="c", weight="cw", axis=0, bias="cb"),
        Layer(node="node_g", op="Gemm", input="f", output="g", weight="gw", axis=0, bias="gb"),
        # what it adds is no constant
        Layer(node="node_h", op="Gemm", input="g", output="h", weight="hw", axis=1, bias=""),
        Layer(node="node_m", op="MatMul", input="h", output="m", weight="mw", axis=1, bias=""),
    ]


def test_excluded_and_preprocessing_nodes_are_no_layers(model: onnx.ModelProto):
    first = model.graph.node[0]
    first.metadata_props.add(key="edgetune.scope", value="preprocess")
    model.graph.node[3].metadata_props.add(key="edgetune.scope", value="other")
    assert preprocessing_nodes(model) == ["node_c"]
    assert [layer.node for layer in weight_layers(model, exclude=["node_m"])] == [
        "node_g",
        "node_h",
    ]


def test_weights_of_three_axes_or_another_type_are_left(build):
    rows = [("MatMul", "x stack -> s"), ("Cast", "x -> x64", {"to": onnx.TensorProto.DOUBLE})]
    rows += [("MatMul", "x64 wide -> d")]
    constants = {"stack": ones(2, 4, 4), "wide": np.ones((4, 4))}
    assert weight_layers(build(rows, constants, {"x": [3, 4]}, ["s"])) == []


def test_attributes_have_their_value_or_the_default(model: onnx.ModelProto):
    assert attribute(model.graph.node[0], "group", 1) == 2
    assert attribute(model.graph.node[3], "group", 1) == 1


def test_a_copy_shares_nothing(model: onnx.ModelProto):
    copy = copy_model(model)
    assert copy == model
    copy.graph.node[0].name = "other"
    copy.graph.initializer[0].raw_data = b""
    assert model.graph.node[0].name == "node_c"
    np.testing.assert_array_equal(arrays(model)["cw"], ones(6, 2, 3, 3))


def test_arrays_cannot_be_written_to(model: onnx.ModelProto):
    with pytest.raises(ValueError, match="read-only"):
        arrays(model)["cb"][0] = 2
