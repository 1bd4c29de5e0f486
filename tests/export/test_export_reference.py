"""The reference interpreter: onnxruntime's values, torch's gradients."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import edgetune.runtime.ort  # noqa: F401  its telemetry is off before onnxruntime comes in
from edgetune.errors import EdgetuneError
from edgetune.export.graph import export_graph
from edgetune.export.reference import TorchGraph
from edgetune.quantize.dynamic import quantize_dynamic
from edgetune.quantize.fuse import fuse
from edgetune.tasks import GraphSpec
from edgetune.tasks.graph import SplitClassifier

import onnxruntime  # isort: skip

MICROSOFT = "com.microsoft"


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def u8(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def s8(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-64, 64, shape, dtype=np.int8)


def one_node(
    op: str, inputs: list[np.ndarray | None], attributes: dict[str, Any], outputs: int, domain: str
) -> onnx.ModelProto:
    """A graph of one node; an input that is not there is None, all others are fed."""
    names = ["" if value is None else f"x{i}" for i, value in enumerate(inputs)]
    results = [f"y{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, results, domain=domain, **attributes)],
        "test",
        [
            helper.make_tensor_value_info(
                f"x{i}", helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
            )
            for i, value in enumerate(inputs)
            if value is not None
        ],
        [helper.make_empty_tensor_value_info(name) for name in results],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def by_onnxruntime(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def tensors(feeds: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in feeds.items()}


X, IMAGE, MATRIX = normal(0, 2, 3, 4), normal(1, 2, 4, 7, 6), normal(2, 3, 5)
POSITIVE = np.abs(X) + np.float32(0.1)
INTS = np.array([[-7, 5], [3, -2]], np.int64)
FLAGS = X > 0
QUERY, KEY, VALUE = normal(3, 2, 5, 8), normal(4, 2, 6, 8), normal(5, 2, 6, 8)
PADDING = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], np.int32)
F32 = np.float32
# operator, inputs, attributes, and where it is not one: the number of outputs
CASES: list[tuple[Any, ...]] = [
    ("MatMul", [X, normal(3, 2, 4, 5)], {}),
    ("MatMul", [X, normal(3, 4)], {}),
    ("Gemm", [MATRIX, normal(3, 5, 2), normal(4, 2)], {"alpha": 0.5, "beta": 2.0}),
    ("Gemm", [MATRIX, normal(3, 2, 3)], {"transA": 1, "transB": 1}),
    ("Conv", [normal(3, 2, 4, 9), normal(4, 6, 4, 3), normal(5, 6)],
     {"pads": [2, 0], "strides": [2], "dilations": [2]}),
    ("Conv", [IMAGE, normal(4, 6, 2, 3, 2), normal(5, 6)],
     {"group": 2, "pads": [0, 1, 2, 0], "strides": [2, 1], "kernel_shape": [3, 2]}),
    ("Conv", [IMAGE, normal(4, 4, 1, 3, 3)], {"group": 4, "pads": [0, 0, 1, 1], "strides": [2, 2]}),
    ("ConvTranspose", [IMAGE, normal(4, 4, 3, 3, 2), normal(5, 6)],
     {"group": 2, "pads": [0, 1, 2, 0], "strides": [2, 3], "output_padding": [1, 2]}),
    ("ConvTranspose", [normal(3, 2, 4, 9), normal(4, 4, 3, 3)], {"dilations": [2]}),
    ("Add", [X, normal(3, 3, 1)], {}),
    ("Add", [INTS, i64(1)], {}),
    ("Sub", [X, normal(3, 4)], {}),
    ("Mul", [X, normal(3, 1)], {}),
    ("Div", [X, POSITIVE], {}),
    ("Div", [INTS, i64(2)], {}),
    ("Mod", [INTS, i64(4)], {}),
    ("Mod", [X, F32([0.7])], {"fmod": 1}),
    ("Neg", [X], {}), ("Abs", [X], {}), ("Sign", [X], {}), ("Reciprocal", [POSITIVE], {}),
    ("Floor", [X], {}), ("Ceil", [X], {}),
    ("Round", [F32([0.5, 1.5, 2.5, -0.5, -1.5, 0.3])], {}),
    ("Pow", [POSITIVE, F32(1.7)], {}), ("Pow", [X, i64(3)], {}),
    ("Sqrt", [POSITIVE], {}), ("Exp", [X], {}), ("Log", [POSITIVE], {}), ("Erf", [X], {}),
    ("Sin", [X], {}), ("Cos", [X], {}), ("Tanh", [X], {}), ("Sigmoid", [X], {}),
    ("Softplus", [X], {}),
    ("HardSigmoid", [X * 4], {}), ("HardSigmoid", [X * 4], {"alpha": 1 / 6, "beta": 0.4}),
    ("HardSwish", [X * 4], {}), ("Relu", [X], {}),
    ("LeakyRelu", [X], {}), ("LeakyRelu", [X], {"alpha": 0.3}),
    ("Elu", [X], {}), ("Elu", [X], {"alpha": 0.3}), ("PRelu", [X, normal(3, 4)], {}),
    ("Clip", [X], {}), ("Clip", [X, F32(-0.3), F32(0.6)], {}), ("Clip", [X, None, F32(0.6)], {}),
    ("Min", [X, normal(3, 4), F32([0.2])], {}), ("Max", [X, normal(3, 4)], {}),
    ("Max", [INTS, i64(0)], {}), ("Sum", [X, normal(3, 4), F32([0.2])], {}),
    ("Softmax", [X], {}), ("Softmax", [X], {"axis": 1}),
    ("LogSoftmax", [X], {}), ("LogSoftmax", [X], {"axis": 0}),
    ("LayerNormalization", [X, normal(3, 4), normal(4, 4)], {"epsilon": 1e-3}),
    ("LayerNormalization", [X, normal(3, 3, 4)], {"axis": 1}),
    ("BatchNormalization",
     [IMAGE, normal(3, 4), normal(4, 4), normal(5, 4), np.abs(normal(6, 4))], {"epsilon": 1e-3}),
    ("InstanceNormalization", [IMAGE, normal(3, 4), normal(4, 4)], {"epsilon": 1e-3}),
    ("GlobalAveragePool", [IMAGE], {}), ("GlobalMaxPool", [IMAGE], {}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 2]}),
    ("AveragePool", [IMAGE],
     {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 0, 1], "count_include_pad": 1}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 1, 0]}),
    ("AveragePool", [IMAGE], {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("AveragePool", [IMAGE],
     {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1}),
    ("AveragePool", [normal(3, 2, 4, 9)], {"kernel_shape": [3], "strides": [2]}),
    ("MaxPool", [IMAGE - 5], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 1, 0]}),
    ("MaxPool", [IMAGE],
     {"kernel_shape": [2, 2], "dilations": [2, 1], "strides": [2, 3], "ceil_mode": 1}),
    ("ReduceMean", [X, i64(-1)], {}), ("ReduceMean", [IMAGE, i64(2, 3)], {"keepdims": 0}),
    ("ReduceMean", [X], {}), ("ReduceMean", [X], {"noop_with_empty_axes": 1}),
    ("ReduceSum", [X, i64(0, 2)], {"keepdims": 0}), ("ReduceSum", [INTS, i64(1)], {}),
    ("ReduceMax", [X, i64(1)], {}), ("ReduceMin", [X, i64(1, 2)], {}),
    ("ReduceL2", [X, i64(1)], {"keepdims": 0}), ("ArgMax", [X], {"axis": -1, "keepdims": 0}),
    ("Reshape", [X, i64(0, -1)], {}), ("Reshape", [X, i64(4, 6)], {"allowzero": 1}),
    ("Flatten", [IMAGE], {}), ("Flatten", [X], {"axis": 0}), ("Flatten", [IMAGE], {"axis": -1}),
    ("Transpose", [X], {}), ("Transpose", [IMAGE], {"perm": [0, 2, 3, 1]}),
    ("Gather", [MATRIX, INTS % 3], {}), ("Gather", [X, i64(-1, 0)], {"axis": 2}),
    ("Gather", [X, np.array(1, np.int64)], {"axis": 1}), ("Gather", [u8(3, 5, 2), i64(4, -5)], {}),
    ("GatherElements", [MATRIX, i64(0, -1, 2, 3, 4).reshape(1, 5)[:, ::-1] % 3], {}),
    ("GatherElements", [MATRIX, np.array([[0, -1], [2, 4], [1, 1]])], {"axis": 1}),
    ("GatherND", [X, np.array([[0, 1], [1, 2]])], {}),
    ("Slice", [X, i64(1), i64(1000), i64(2), i64(2)], {}),
    ("Slice", [X, i64(0, -3), i64(-1, -1), i64(0, -1)], {}),
    ("Slice", [X, i64(0, 1), i64(1, 3)], {}),
    ("Slice", [X, i64(-1), i64(-(2**62)), i64(2), i64(-1)], {}),
    ("Concat", [X, normal(3, 2, 1, 4)], {"axis": 1}), ("Concat", [i64(1), i64(2, 3)], {"axis": 0}),
    ("Split", [X, i64(1, 3)], {"axis": -1}, 2),
    ("Split", [MATRIX], {"axis": 1, "num_outputs": 3}, 3),
    ("Pad", [X, i64(0, 1, 2, 1, 0, -1), F32(0.5)], {}),
    ("Pad", [X, i64(1, 2), None, i64(-1)], {}),
    ("Squeeze", [normal(3, 1, 4, 1), i64(-1)], {}), ("Squeeze", [normal(3, 1, 4, 1)], {}),
    ("Unsqueeze", [X, i64(0, -1)], {}), ("Unsqueeze", [X, i64(2)], {}),
    ("Expand", [normal(3, 3, 1), i64(2, 1, 4)], {}), ("Expand", [X, i64(1)], {}),
    ("Tile", [MATRIX, i64(2, 3)], {}),
    ("Shape", [X], {}), ("Shape", [X], {"start": 1}), ("Shape", [X], {"start": -2, "end": -1}),
    ("Constant", [], {"value": numpy_helper.from_array(X)}), ("Constant", [], {"value_int": 3}),
    ("Constant", [], {"value_floats": [1.5, 2.5]}),
    ("ConstantOfShape", [i64(2, 3)], {}),
    ("ConstantOfShape", [i64(2)], {"value": numpy_helper.from_array(i64(7))}),
    ("Cast", [X * 5], {"to": TensorProto.INT32}), ("Cast", [INTS], {"to": TensorProto.FLOAT}),
    ("Cast", [INTS], {"to": TensorProto.BOOL}), ("Cast", [u8(3, 4)], {"to": TensorProto.FLOAT}),
    ("Where", [FLAGS, X, normal(3, 4)], {}),
    ("Equal", [INTS, i64(5)], {}), ("Less", [X, normal(3, 4)], {}),
    ("Greater", [X, normal(3, 4)], {}), ("GreaterOrEqual", [INTS, i64(3)], {}),
    ("LessOrEqual", [INTS, i64(3)], {}), ("Not", [FLAGS], {}),
    ("And", [FLAGS, FLAGS[:1]], {}), ("Or", [FLAGS, FLAGS[:1]], {}), ("Identity", [X], {}),
    ("Range", [np.array(v, np.int64) for v in (2, 11, 3)], {}),
    ("Range", [F32(v) for v in (0.5, 3, 0.5)], {}),
    ("Dropout", [X, F32(0.5)], {}, 2),
    ("QuantizeLinear", [X * 100, F32(0.7), np.uint8(100)], {}),
    ("QuantizeLinear", [F32([0.5, 1.5, 2.5, -0.5, 300, -300]), F32(1)], {}),
    ("QuantizeLinear", [X, F32([0.01, 0.1, 0.5]), np.int8([-3, 0, 50])], {"axis": 1}),
    ("QuantizeLinear", [X, F32([0.01, 0.1, 0.5, 1]), np.int8([-3, 0, 50, 1])], {"axis": -1}),
    ("DequantizeLinear", [u8(3, 2, 3), F32(0.03), np.uint8(100)], {}),
    ("DequantizeLinear", [s8(3, 4, 3), normal(4, 4), s8(5, 4)], {"axis": 0}),
    ("DequantizeLinear", [np.int32([70000, -3, 2**30 + 1]), normal(4, 3)], {"axis": 0}),
    ("DynamicQuantizeLinear", [X], {}, 3), ("DynamicQuantizeLinear", [POSITIVE], {}, 3),
    ("DynamicQuantizeLinear", [np.zeros((2, 3), F32)], {}, 3),
    ("MatMulInteger", [u8(3, 2, 4, 9), u8(4, 9, 5), np.uint8(7), u8(5, 5)], {}),
    ("MatMulInteger", [u8(3, 4, 9), s8(4, 9, 5), np.uint8(7), np.int8(3)], {}),
    ("MatMulInteger", [u8(3, 4, 9), s8(4, 9, 5)], {}),
    ("com.microsoft.Gelu", [X], {}), ("com.microsoft.FastGelu", [X], {}),
    ("com.microsoft.FastGelu", [X, normal(3, 4)], {}),
    ("com.microsoft.QuickGelu", [X], {}), ("com.microsoft.QuickGelu", [X], {"alpha": 1.0}),
    ("com.microsoft.FusedMatMul", [X, normal(3, 2, 5, 4)], {"transB": 1, "alpha": 0.3}),
    ("com.microsoft.FusedMatMul", [X, normal(3, 2, 3, 5)], {"transA": 1}),
    ("com.microsoft.MultiHeadAttention", [QUERY, KEY, VALUE], {"num_heads": 2}),
    ("com.microsoft.MultiHeadAttention",
     [QUERY, KEY, VALUE, normal(6, 24), PADDING, normal(7, 1, 2, 5, 6)],
     {"num_heads": 2, "scale": 0.3}),
    ("com.microsoft.MultiHeadAttention",
     [QUERY, KEY, VALUE, None, PADDING * np.int32([[1], [0]])], {"num_heads": 4}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_an_operator_answers_as_onnxruntime_does(case: tuple[Any, ...]):
    title, inputs, attributes, *count = case
    domain, _, op = title.rpartition(".")
    model = one_node(op, inputs, attributes, count[0] if count else 1, domain)
    feeds = {f"x{i}": np.asarray(v) for i, v in enumerate(inputs) if v is not None}
    expected = by_onnxruntime(model, feeds)
    names = [f"y{i}" for i in range(len(expected))]
    found = TorchGraph(model).run(tensors(feeds), outputs=names)
    for name, want in zip(names, expected, strict=True):
        got = found[name].numpy()
        assert got.shape == want.shape
        # what an operator makes of an activation's codes is carried as float64
        carried = op.endswith(("QuantizeLinear", "Integer")) and want.dtype.kind in "iu"
        assert got.dtype == want.dtype or (carried and got.dtype == np.float64)
        tolerance = 1e-5 if want.dtype.kind == "f" else 0
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def graph_of(
    rows: list[tuple[str, str]], constants: dict[str, np.ndarray], given: list[Any]
) -> onnx.ModelProto:
    nodes = []
    for op, wires in rows:
        sources, targets = (side.split() for side in wires.split("->"))
        nodes.append(helper.make_node(op, sources, targets, name=targets[0]))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_static_quantization_has_the_gradient_of_torch_fake_quantize():
    scale, zero = 0.05, 30
    model = graph_of(
        [("QuantizeLinear", "x s z -> q"), ("DequantizeLinear", "q s z -> y")],
        {"s": F32(scale), "z": np.uint8(zero)},
        ["n"],
    )
    values = np.linspace(-4.003, 14, 501, dtype=np.float32)  # inside is -1.5 to 11.25
    ours, theirs = (torch.from_numpy(values).requires_grad_() for _ in range(2))
    found = TorchGraph(model).run({"x": ours}, outputs=["y"])["y"]
    expected = torch.fake_quantize_per_tensor_affine(theirs, scale, zero, 0, 255)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-7)
    assert (ours.grad == 0).sum() > 100


@pytest.mark.parametrize("function", [nn.functional.relu6, nn.functional.hardtanh])
def test_a_clip_has_the_gradient_of_torch_activations_at_its_bounds_too(function):
    low, high = (0, 6) if function is nn.functional.relu6 else (-1, 1)
    model = graph_of([("Clip", "x low high -> y")], {"low": F32(low), "high": F32(high)}, ["n"])
    ours, theirs = (torch.tensor([low, high, 0.5, -5, 9.0]).requires_grad_() for _ in range(2))
    TorchGraph(model).run({"x": ours}, outputs=["y"])["y"].sum().backward()
    function(theirs).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_dynamic_quantization_has_the_gradient_of_the_dequantized_product():
    weight, scales, zeros = s8(0, 6, 4), np.abs(normal(1, 4)) / 50, s8(2, 4)
    model = graph_of(
        [
            ("DynamicQuantizeLinear", "x -> q s z"), ("MatMulInteger", "q w z wz -> sums"),
            ("Identity", "sums -> same"), ("Mul", "s ws -> scale"), ("Cast", "same -> float"),
            ("Mul", "float scale -> y"),
        ],
        {"w": weight, "wz": zeros, "ws": scales},
        ["n", 6],
    )  # fmt: skip
    model.graph.node[4].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    x = torch.from_numpy(normal(3, 5, 6)).requires_grad_()
    found = TorchGraph(model).run({"x": x}, outputs=["y"])["y"]
    np.testing.assert_allclose(
        found.detach().numpy(),
        by_onnxruntime(model, {"x": x.detach().numpy()})[0],
        rtol=1e-5,
        atol=1e-6,
    )
    outer = normal(4, 5, 4)
    found.backward(torch.from_numpy(outer))
    real = scales * (weight.astype(np.float64) - zeros)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), outer @ real.T, rtol=1e-4, atol=1e-6)


def test_an_unknown_operator_is_named():
    model = one_node("NonZero", [X], {}, 1, "")
    with pytest.raises(EdgetuneError, match="NonZero"):
        TorchGraph(model)


def test_a_missing_input_is_named():
    model = one_node("Relu", [X], {}, 1, "")
    with pytest.raises(EdgetuneError, match="'x0'"):
        TorchGraph(model).run({}, outputs=["y0"])


def test_a_fed_intermediate_cuts_the_graph():
    rows = [("Exp", "x -> hidden"), ("Mul", "hidden two -> y")]
    graph = TorchGraph(graph_of(rows, {"two": F32(2)}, ["n"]))
    found = graph.run({"hidden": torch.ones(3)}, outputs=["y"])["y"]
    torch.testing.assert_close(found, torch.full((3,), 2.0))


def test_fed_codes_are_dequantized_as_made_ones_are():
    rows = [("QuantizeLinear", "x s z -> q"), ("DequantizeLinear", "q s z -> y")]
    graph = TorchGraph(graph_of(rows, {"s": F32(0.5), "z": np.uint8(3)}, ["n"]))
    codes = torch.tensor([0, 3, 255], dtype=torch.uint8)
    found = graph.run({"q": codes}, outputs=["y"])["y"]
    torch.testing.assert_close(found, torch.tensor([-1.5, 0.0, 126.0]), rtol=0, atol=0)


# whole networks


class Text(nn.Module):
    def __init__(self, classifier: SplitClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask)


class Image(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self.network(image),)


def random_weights(network: nn.Module, deviation: float) -> nn.Module:
    """As made, weights are so small that attention is even, and biases are zeros."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        mean = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
        parameter.data.normal_(mean, deviation, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, onnx.ModelProto, dict[str, Tensor]]:
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=3, max_position_embeddings=32,
    )  # fmt: skip
    config._attn_implementation = "eager"
    network = random_weights(transformers.BertForSequenceClassification(config), 0.15)
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, 99, (3, 9)))
    mask = torch.ones_like(ids)
    mask[-1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    free = {name: {0: "batch", 1: "tokens"} for name in inputs}
    spec = GraphSpec(module=Text(SplitClassifier(network, "classifier")), inputs=inputs, free=free)
    return network, export_graph(spec), inputs


def same_parameters(graph: TorchGraph, network: nn.Module) -> dict[str, tuple[str, bool]]:
    """Initializers that are a parameter, as it is or transposed: name -> (its name, which)."""
    found = {}
    for name, value in graph.initializers.items():
        for theirs, parameter in network.named_parameters():
            if value.shape == parameter.shape and torch.equal(value, parameter):
                found[name] = (theirs, False)
            elif value.ndim == 2 and torch.equal(value.T, parameter):
                found[name] = (theirs, True)
    return found


def loss_of(logits: Tensor) -> Tensor:
    target = torch.linspace(0.1, 1, logits.numel()).reshape(logits.shape).softmax(-1)
    return -(target * logits.log_softmax(-1)).sum()


@pytest.mark.parametrize("rewrite", [lambda model: model, fuse], ids=["as exported", "fused"])
def test_an_encoder_has_the_logits_and_gradients_of_its_torch_module(bert, rewrite):
    network, model, inputs = bert
    graph = TorchGraph(rewrite(model))
    places = same_parameters(graph, network)
    # query, key and value are joined where the graph is fused
    # where the graph is fused, query, key and value of two layers are joined: 6 of each are gone
    assert len(places) == len(list(network.parameters())) - (12 if rewrite is fuse else 0)
    parameters = {name: graph.initializers[name].clone().requires_grad_() for name in places}
    logits = graph.run(inputs, parameters, outputs=["logits"])["logits"]
    expected = network(**inputs).logits
    assert expected.std() > 1e-2
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    found = torch.autograd.grad(loss_of(logits), list(parameters.values()))
    network.zero_grad()
    loss_of(expected).backward()
    theirs = dict(network.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    for (name, transposed), gradient in zip(places.values(), found, strict=True):
        want = theirs[name].grad
        got = gradient.T if transposed else gradient
        # a key's bias has none: there are roundings only, of the size of the others'
        scale = max(float(want.abs().max()), 1e-2 * largest)
        assert float((got - want).abs().max()) <= 1e-5 * scale, name


def test_a_dynamically_quantized_encoder_answers_as_onnxruntime_and_has_a_gradient(bert):
    _, model, inputs = bert
    quantized = quantize_dynamic(fuse(model))
    assert "MatMulInteger" in {node.op_type for node in quantized.graph.node}
    graph = TorchGraph(quantized)
    (name,) = (n for n in graph.initializers if n.endswith("embeddings.LayerNorm.weight"))
    scale = graph.initializers[name].clone().requires_grad_()
    logits = graph.run(inputs, {name: scale}, outputs=["logits"])["logits"]
    expected = by_onnxruntime(quantized, {k: v.numpy() for k, v in inputs.items()})[0]
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=0, atol=1e-4)

    # eight bits move the gradient of the float graph by percents, no more
    whole = TorchGraph(model)
    exact = whole.initializers[name].clone().requires_grad_()
    loss_of(whole.run(inputs, {name: exact}, outputs=["logits"])["logits"]).backward()
    loss_of(logits).backward()
    assert scale.grad is not None
    assert exact.grad is not None
    cosine = torch.nn.functional.cosine_similarity(scale.grad, exact.grad, dim=0)
    assert float(cosine) > 0.98


def test_a_mobilenet_has_the_logits_and_gradients_of_its_torch_module():
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    # MobileNetV3-small's own blocks 1, 2, 3, 4 and 7: with and without squeeze-excitation,
    # residual sum and hard swish
    rows = [
        (16, 3, 16, 16, True, "RE", 2), (16, 3, 72, 24, False, "RE", 2),
        (24, 3, 88, 24, False, "RE", 1), (24, 5, 96, 40, True, "HS", 2),
        (40, 5, 120, 48, True, "HS", 1),
    ]  # fmt: skip
    blocks = [InvertedResidualConfig(*row, 1, 1) for row in rows]
    network = random_weights(MobileNetV3(blocks, last_channel=64, num_classes=5), 0.1)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():  # statistics that say something
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    image = torch.from_numpy(normal(0, 2, 3, 64, 64))
    spec = GraphSpec(module=Image(network), inputs={"image": image}, free={"image": {0: "batch"}})
    model = export_graph(spec)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    fused = fuse_batch_norms(network)
    graph = TorchGraph(model)
    # biases may be equal by chance of their making; a weight is itself
    parameters = {
        name: value.clone().requires_grad_()
        for name, value in graph.initializers.items()
        if value.is_floating_point() and value.ndim in (2, 4)
    }
    ours, theirs = (image.clone().requires_grad_() for _ in range(2))
    logits = graph.run({"image": ours}, parameters, outputs=["logits"])["logits"]
    expected = network(theirs)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    loss_of(logits).backward()
    loss_of(expected).backward()
    close(ours.grad, theirs.grad, "image")

    loss_of(fused(image)).backward()
    weights = [p for p in fused.parameters() if p.ndim in (2, 4)]
    # by hand: stem 1, blocks 4 + 3 + 3 + 5 + 5, last convolution 1, classifier 2
    assert len(weights) == len(parameters) == 24
    for name, parameter in parameters.items():
        (twin,) = (
            p
            for p in weights
            if p.shape == parameter.shape and torch.allclose(p, parameter, rtol=1e-5, atol=1e-7)
        )
        close(parameter.grad, twin.grad, name)


def close(found: Tensor | None, expected: Tensor | None, name: str) -> None:
    assert found is not None
    assert expected is not None
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), name


def fuse_batch_norms(network: nn.Module) -> nn.Module:
    """The same network, its batch normalizations gone into the convolutions before them."""
    import copy

    network = copy.deepcopy(network)
    for block in list(network.modules()):
        if isinstance(block, nn.Sequential) and len(block) > 1:
            conv, norm = block[0], block[1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                block[0], block[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return network
