"""The gradient of every operator, against torch's autograd of torch's own operator.

A case is x -> Mul(x, p) = h -> the operator -> y -> a fixed product -> logits. p has h's shape but
for the batch, so that its gradient tells every element of h's, and which sample it was of.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import edgetune.runtime.ort  # noqa: F401 - before onnxruntime: it turns telemetry off
from edgetune.autodiff.convolution import ALL_RULES
from edgetune.autodiff.step import compile_step
from edgetune.errors import EdgetuneError
from edgetune.runtime.ort import onnxruntime

MICROSOFT = "com.microsoft"
CLASSES = 3
IMAGE = (4, 6, 5)  # channels, height, width
# batch and tokens of the two runs that shapes are learnt from, and of the test
SIZES = ((2, 5), (3, 7), (4, 6))


def op(kind: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    domain = MICROSOFT if kind in ("FusedMatMul", "Gelu", "QuickGelu") else ""
    return helper.make_node(
        kind, inputs.split(), outputs.split(), name=outputs.split()[0], domain=domain, **attributes
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """nodes lead from h and the parameters to y, and so does the function of torch.

    shape: of h without the batch; "t" is free. pool: axes of y to sum over before the product.
    positive: values from 0.5 to 1.5. constants: integers are int64, others float32.
    """

    nodes: Sequence[onnx.NodeProto]
    torch: Callable[..., Tensor]
    shape: tuple[Any, ...] = (5,)
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    pool: tuple[int, ...] = ()
    positive: bool = False
    inner: tuple[str, ...] = ()
    scale: float = 1.0


def unary(kind: str, function: Callable[..., Tensor], **settings: Any) -> Case:
    attributes = settings.pop("attributes", {})
    return Case(nodes=[op(kind, "h", **attributes)], torch=function, **settings)


def binary(kind: str, function: Callable[..., Tensor], other: tuple[int, ...]) -> Case:
    """h (batch, 2, 3) and a parameter that is broadcast to it."""
    return Case(
        nodes=[op(kind, "h w")], torch=function, shape=(2, 3), parameters={"w": other},
        positive=True,
    )  # fmt: skip


def convolution(shape: tuple[int, ...], weight: tuple[int, ...], **attributes: Any) -> Case:
    """Kernel (out, in / groups, kh, kw) with a bias; pads top, left, bottom, right."""
    inner = ("y",) if attributes.pop("as_product", False) else ()
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))

    def reference(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(
            F.pad(h, (left, right, top, bottom)), w, b, attributes.get("strides", 1),
            dilation=attributes.get("dilations", 1), groups=attributes.get("group", 1),
        )  # fmt: skip

    return Case(
        nodes=[op("Conv", "h w b", kernel_shape=weight[2:], **attributes)], torch=reference,
        shape=shape, parameters={"w": weight, "b": weight[:1]}, inner=inner,
    )  # fmt: skip


CASES: dict[str, Case] = {
    "Cast": unary("Cast", lambda h: h, attributes={"to": TensorProto.FLOAT}),
    "Clip": Case(
        nodes=[op("Clip", "h low high")], torch=lambda h: F.hardtanh(h, -0.5, 0.7), shape=(20,),
        constants={"low": -0.5, "high": 0.7},
    ),
    "Clip, relu6": Case(
        nodes=[op("Clip", "h low high")], torch=F.relu6, shape=(20,), scale=5.0,
        constants={"low": 0.0, "high": 6.0},
    ),
    "Clip, below only": Case(
        nodes=[op("Clip", "h low")], torch=lambda h: h.clamp(min=0.1), constants={"low": 0.1},
        shape=(20,),
    ),
    "Dropout": unary("Dropout", lambda h: h),
    "Erf": unary("Erf", torch.erf),
    "Exp": unary("Exp", torch.exp),
    "Gelu": unary("Gelu", F.gelu, shape=(20,), scale=2.0),
    "HardSigmoid": unary(
        "HardSigmoid", lambda h: (0.3 * h + 0.4).clamp(0, 1), shape=(20,), scale=2.0,
        attributes={"alpha": 0.3, "beta": 0.4},
    ),
    "HardSwish": unary("HardSwish", F.hardswish, shape=(20,), scale=3.0),
    "Identity": unary("Identity", lambda h: h),
    "LeakyRelu": unary("LeakyRelu", lambda h: F.leaky_relu(h, 0.3), attributes={"alpha": 0.3}),
    "Log": unary("Log", torch.log, positive=True),
    "Neg": unary("Neg", torch.neg),
    "QuickGelu": unary("QuickGelu", lambda h: h * torch.sigmoid(1.702 * h)),
    "Relu": unary("Relu", F.relu, shape=(20,)),
    "Sigmoid": unary("Sigmoid", torch.sigmoid),
    "Sqrt": unary("Sqrt", torch.sqrt, positive=True),
    "Tanh": unary("Tanh", torch.tanh),
    "Pow, of 3": Case(
        nodes=[op("Pow", "h e")], torch=lambda h: h**3, constants={"e": 3.0}
    ),
    "Pow, of -1/2": Case(
        nodes=[op("Pow", "h e")], torch=lambda h: h**-0.5, constants={"e": -0.5}, positive=True
    ),
    # arithmetic that broadcasts
    **{
        f"{kind} {other}": binary(kind, function, other)
        for kind, function in {
            "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div,
        }.items()
        for other in ((2, 3), (3,), (2, 1), (1, 1, 3), (1,), ())
    },
    "Sub, h second": Case(
        nodes=[op("Sub", "w h")], torch=lambda h, w: w - h, shape=(2, 3), parameters={"w": (3,)}
    ),
    "Div, h second": Case(
        nodes=[op("Div", "w h")], torch=lambda h, w: w / h, shape=(2, 3), parameters={"w": (2, 1)},
        positive=True,
    ),
    "Mul with itself": Case(nodes=[op("Mul", "h h")], torch=lambda h: h * h),
    "Div, h smaller than w": Case(
        nodes=[op("Div", "h w")], torch=torch.div, shape=(1, 3), parameters={"w": (2, 3)},
        positive=True,
    ),
    "Where": Case(
        nodes=[op("Greater", "h zero", "c"), op("Where", "c h w")], constants={"zero": 0.0},
        torch=lambda h, w: torch.where(h > 0, h, w), shape=(2, 3), parameters={"w": (3,)},
    ),
    "Where, h second and condition small": Case(
        nodes=[op("Greater", "k zero", "c"), op("Where", "c w h")],
        constants={"zero": 0.0, "k": [1.0, -1.0, 1.0]},
        torch=lambda h, w: torch.where(torch.tensor([True, False, True]), w, h), shape=(2, 3),
        parameters={"w": (2, 1)},
    ),
    # products
    "MatMul": Case(
        nodes=[op("MatMul", "h w")], torch=torch.matmul, shape=("t", 5), pool=(1,),
        parameters={"w": (5, 4)},
    ),
    "MatMul of matrices": Case(
        nodes=[op("MatMul", "h w")], torch=torch.matmul, parameters={"w": (5, 4)}
    ),
    "MatMul of stacks": Case(
        nodes=[op("Transpose", "h", "u", perm=[0, 1, 3, 2]), op("MatMul", "h u")],
        torch=lambda h: h @ h.mT, shape=(2, "t", 5), pool=(2, 3),
    ),
    "MatMul, right broadcast": Case(
        nodes=[op("MatMul", "h w")], torch=torch.matmul, shape=(2, 3, 5),
        parameters={"w": (2, 5, 4)},
    ),
    "MatMul, left broadcast": Case(
        nodes=[op("MatMul", "w h")], torch=lambda h, w: w @ h, shape=(2, 3, 5),
        parameters={"w": (2, 4, 3)},
    ),
    "MatMul, left a matrix": Case(
        nodes=[op("MatMul", "w h")], torch=lambda h, w: w @ h, shape=(3, 5),
        parameters={"w": (4, 3)},
    ),
    "MatMul, both broadcast": Case(
        nodes=[op("MatMul", "h w")], torch=torch.matmul, shape=(1, 3, 5),
        parameters={"w": (1, 2, 5, 4)},
    ),
    "FusedMatMul": Case(
        nodes=[op("FusedMatMul", "h w", alpha=0.5)], torch=lambda h, w: 0.5 * h @ w,
        shape=("t", 5), pool=(1,), parameters={"w": (5, 4)},
    ),
    "FusedMatMul, transposed": Case(
        nodes=[op("FusedMatMul", "h w", transB=1, alpha=2.0)], torch=lambda h, w: 2 * h @ w.mT,
        shape=("t", 5), pool=(1,), parameters={"w": (4, 5)},
    ),
    "FusedMatMul of stacks": Case(
        nodes=[op("FusedMatMul", "h h", transB=1, alpha=0.3)], torch=lambda h: 0.3 * h @ h.mT,
        shape=(2, "t", 5), pool=(2, 3),
    ),
    "Gemm": Case(
        nodes=[op("Gemm", "h w b")], torch=lambda h, w, b: h @ w + b,
        parameters={"w": (5, 4), "b": (4,)},
    ),
    "Gemm, transposed and scaled": Case(
        nodes=[op("Gemm", "h w b", transB=1, alpha=2.0, beta=0.5)],
        torch=lambda h, w, b: 2 * h @ w.mT + b / 2, parameters={"w": (4, 5), "b": (1, 4)},
    ),
    "Gemm without a bias": Case(
        nodes=[op("Gemm", "h w")], torch=torch.matmul, parameters={"w": (5, 4)}
    ),
    # norms, softmax and reductions
    "LayerNormalization": Case(
        nodes=[op("LayerNormalization", "h w b", axis=-1, epsilon=1e-3)],
        torch=lambda h, w, b: F.layer_norm(h, (5,), w, b, 1e-3), shape=("t", 5), pool=(1,),
        parameters={"w": (5,), "b": (5,)},
    ),
    "LayerNormalization without a bias": Case(
        nodes=[op("LayerNormalization", "h w", axis=2)],
        torch=lambda h, w: F.layer_norm(h, (5,), w), shape=(3, 5), parameters={"w": (5,)},
    ),
    "Softmax": unary("Softmax", lambda h: h.softmax(-1), shape=(3, 5)),
    "Softmax over another axis": unary(
        "Softmax", lambda h: h.softmax(1), shape=(4, 5), attributes={"axis": 1},
    ),
    "ReduceMean of a free axis": Case(
        nodes=[op("ReduceMean", "h a", keepdims=0)], torch=lambda h: h.mean(1), shape=("t", 5),
        constants={"a": [1]},
    ),
    "ReduceMean, axes kept": Case(
        nodes=[op("ReduceMean", "h a", keepdims=1)], torch=lambda h: h.mean((2, 3), keepdim=True),
        shape=IMAGE, constants={"a": [-2, -1]},
    ),
    "ReduceMean of a fixed axis": Case(
        nodes=[op("ReduceMean", "h a", keepdims=0)], torch=lambda h: h.mean(2), shape=IMAGE,
        constants={"a": [-2]},
    ),
    "ReduceSum": Case(
        nodes=[op("ReduceSum", "h a", keepdims=0)], torch=lambda h: h.sum((1, 3)), shape=IMAGE,
        constants={"a": [1, -1]},
    ),
    "GlobalAveragePool": unary(
        "GlobalAveragePool", lambda h: h.mean((2, 3), keepdim=True), shape=IMAGE
    ),
    # places
    "Flatten": unary("Flatten", lambda h: h.flatten(1), shape=IMAGE),
    "Reshape": Case(
        nodes=[op("Reshape", "h s")], torch=lambda h: h.reshape(len(h), 3, -1), shape=(2, 6),
        constants={"s": [0, 3, -1]},
    ),
    "Reshape beside a free axis": Case(
        nodes=[op("Reshape", "h s")], torch=lambda h: h.unflatten(2, (2, 3)), shape=("t", 6),
        constants={"s": [0, 0, 2, 3]}, pool=(1,),
    ),
    "Reshape that joins free axes": Case(
        nodes=[
            op("Reshape", "h s", "r"), op("Tanh", "r", "z"), op("Shape", "h", "k"),
            op("Reshape", "z k"),
        ],
        torch=torch.tanh, shape=("t", 6), constants={"s": [-1, 3]}, pool=(1,),
    ),
    "Squeeze": Case(
        nodes=[op("Squeeze", "h a")], torch=lambda h: h.squeeze(1), shape=(1, 5),
        constants={"a": [1]},
    ),
    "Unsqueeze": Case(
        nodes=[op("Unsqueeze", "h a")], torch=lambda h: h[:, None, :, None], constants={"a": [1, 3]}
    ),
    "Transpose": unary(
        "Transpose", lambda h: h.permute(0, 3, 1, 2), shape=IMAGE, attributes={"perm": [0, 3, 1, 2]}
    ),
    "Expand": Case(
        nodes=[op("Expand", "h s")], torch=lambda h: h.expand(-1, 4, 5), shape=(1, 5),
        constants={"s": [1, 4, 1]},
    ),
    "Expand of a parameter": Case(
        nodes=[op("Shape", "h", "s"), op("Expand", "w s", "e"), op("Mul", "h e")],
        torch=lambda h, w: h * w.expand_as(h), shape=(3, 5), parameters={"w": (3, 1)},
    ),
    "Concat": Case(
        nodes=[op("Tanh", "h", "z"), op("Concat", "h z h", axis=-2)],
        torch=lambda h: torch.cat([h, h.tanh(), h], -2), shape=(2, 5),
    ),
    "Concat of a parameter": Case(
        nodes=[op("Shape", "h", "n", start=0, end=1), op("Concat", "n tail", "s", axis=0),
               op("Expand", "w s", "e"), op("Concat", "e h", axis=1)],
        torch=lambda h, w: torch.cat([w.expand(len(h), 1, 5), h], 1), shape=(2, 5),
        parameters={"w": (1, 1, 5)}, constants={"tail": [1, 5]},
    ),
    "Split": Case(
        nodes=[op("Split", "h s", "a b c", axis=-1), op("Tanh", "c", "z"), op("Concat", "z a",
               axis=1)],
        torch=lambda h: torch.cat([h[:, 3:].tanh(), h[:, :2]], 1), constants={"s": [2, 1, 2]},
    ),
    "Slice": Case(
        nodes=[op("Slice", "h b e a")], torch=lambda h: h[:, :, 1:-1, 2:], shape=IMAGE,
        constants={"b": [1, -3], "e": [-1, 99], "a": [2, -1]},
    ),
    "Slice, begin far before": Case(
        nodes=[op("Slice", "h b e a")], torch=lambda h: h[:, :2], shape=(5,),
        constants={"b": [-99], "e": [2], "a": [1]},
    ),
    **{
        f"Gather of place {place} of axis {axis}": Case(
            nodes=[op("Gather", "h i", axis=axis)], shape=("t", 4, 5),
            pool=() if axis == 1 else (1,), constants={"i": place},
            torch=lambda h, axis=axis, place=place: h.select(axis, place),
        )
        for axis, place in ((1, 0), (1, -1), (2, 2), (-1, -2))
    },
    "Gather that keeps its axis": Case(
        nodes=[op("Gather", "h i", axis=1)], torch=lambda h: h[:, 1:2], shape=("t", 5),
        constants={"i": [1]},
    ),
    "Pad": Case(
        nodes=[op("Pad", "h p_")], torch=lambda h: F.pad(h, (0, 2, 3, 1)), shape=IMAGE,
        constants={"p_": [0, 0, 3, 0, 0, 0, 1, 2]},
    ),
    "Pad of named axes": Case(
        nodes=[op("Pad", "h p_ v a")], torch=lambda h: F.pad(h, (1, 2), value=0.5), shape=IMAGE,
        constants={"p_": [1, 2], "v": 0.5, "a": [-1]},
    ),
    # convolutions; both ways of a depthwise one
    "Conv 1x1": convolution(IMAGE, (3, 4, 1, 1)),
    "Conv 1x1 of one place": convolution((4, 1, 1), (3, 4, 1, 1)),
    "Conv 1x1 stride 2": convolution(IMAGE, (3, 4, 1, 1), strides=[2, 2]),
    "Conv 1x1 stride 2 to one place": convolution((4, 2, 2), (3, 4, 1, 1), strides=[2, 2]),
    "Conv 3x3": convolution(IMAGE, (3, 4, 3, 3), pads=[1, 1, 1, 1]),
    "Conv 3x3 stride 2": convolution(IMAGE, (3, 4, 3, 3), pads=[1, 1, 1, 1], strides=[2, 2]),
    "Conv 3x3 stride 2, uneven pads": convolution(
        IMAGE, (3, 4, 3, 3), pads=[0, 0, 1, 1], strides=[2, 2]
    ),
    "Conv 3x3 stride (1, 2), dilated": convolution(
        IMAGE, (3, 4, 3, 3), pads=[2, 1, 0, 3], strides=[1, 2], dilations=[2, 1]
    ),
    "Conv 2x3 of a stride over its kernel": convolution(IMAGE, (3, 4, 2, 3), strides=[3, 4]),
    "Conv 5x5": convolution((2, 7, 7), (3, 2, 5, 5), pads=[2, 2, 2, 2], strides=[2, 2]),
    "Conv of groups": convolution(
        IMAGE, (6, 2, 3, 3), pads=[1, 1, 1, 1], strides=[2, 2], group=2
    ),
    "Conv 1x1 of groups": convolution(IMAGE, (6, 2, 1, 1), group=2),
    "Conv, two outputs a channel": convolution(IMAGE, (8, 1, 3, 3), pads=[1, 1, 1, 1], group=4),
    **{
        f"Conv depthwise, {title}{', as a product' if product else ''}": convolution(
            IMAGE, (4, 1, *kernel), group=4, as_product=product, **attributes
        )
        for title, kernel, attributes in (
            ("3x3", (3, 3), {"pads": [1, 1, 1, 1]}),
            ("3x3 stride 2", (3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
            ("3x3 uneven pads", (3, 3), {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
            ("5x5", (5, 5), {"pads": [2, 2, 2, 2]}),
            ("5x5 stride 2", (5, 5), {"pads": [2, 2, 2, 2], "strides": [2, 2]}),
            ("3x3 dilated", (3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
            ("2x3 unpadded", (2, 3), {"strides": [1, 2]}),
        )
        for product in (False, True)
    },
    "MaxPool": unary(
        "MaxPool", lambda h: F.max_pool2d(h, 3, 2, 1), shape=IMAGE,
        attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    ),
    "MaxPool, ceil_mode": unary(
        "MaxPool", lambda h: F.max_pool2d(h, 3, 2, ceil_mode=True), shape=IMAGE,
        attributes={"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    ),
    # after a Relu most windows have several largest places, all of them 0
    "MaxPool of ties": Case(
        nodes=[op("Sub", "h one", "s"), op("Relu", "s", "z"),
               op("MaxPool", "z", kernel_shape=[3, 3], strides=[1, 1]), ],
        torch=lambda h: F.max_pool2d((h - 1).relu(), 3, 1), shape=IMAGE, constants={"one": 1.0},
    ),
    "AveragePool": unary(
        "AveragePool", lambda h: F.avg_pool2d(h, (2, 3), (2, 1)), shape=IMAGE,
        attributes={"kernel_shape": [2, 3], "strides": [2, 1]},
    ),
    "AveragePool, padded": unary(
        "AveragePool", lambda h: F.avg_pool2d(h, 3, 2, 1), shape=IMAGE,
        attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1],
                    "count_include_pad": 1},
    ),
}  # fmt: skip


def sized(shape: Sequence[Any], tokens: int) -> tuple[int, ...]:
    return tuple(tokens if size == "t" else size for size in shape)


def numbers(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> np.ndarray:
    if case.positive:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return (case.scale * rng.normal(size=shape)).astype(np.float32)


def array(value: Any) -> np.ndarray:
    found = np.asarray(value)
    return found if found.dtype.kind == "i" or found.dtype.itemsize == 1 else found.astype("f4")


class Graphs:
    """A case as an ONNX graph, and the same in torch."""

    def __init__(self, case: Case, quantized: Mapping[str, np.ndarray] | None = None) -> None:
        rng = np.random.default_rng(0)
        self.case = case
        fixed = tuple(1 if size == "t" else size for size in case.shape)
        self.values = {"p": numbers(rng, fixed, case)} | {
            name: numbers(rng, shape, case) for name, shape in case.parameters.items()
        }
        example = case.torch(
            torch.ones(2, *sized(case.shape, 5)),
            *(torch.tensor(v) for v in self._others().values()),
        )
        width = example.sum(case.pool).flatten(1).shape[1] if case.pool else example[0].numel()
        self.projection = (rng.normal(size=(width, CLASSES)) / width**0.5).astype(np.float32)
        constants = {name: array(value) for name, value in case.constants.items()}
        constants |= {"projection": self.projection, "flat": np.array([-1, width])}
        constants |= {"pool": np.array(case.pool, np.int64)} if case.pool else {}
        constants |= dict(quantized or {})
        nodes = [op("Mul", "x p", "h"), *case.nodes]
        pooled = "y"
        if case.pool:
            nodes.append(op("ReduceSum", "y pool", "pooled", keepdims=0))
            pooled = "pooled"
        nodes += [
            op("Reshape", f"{pooled} flat", "rows"),
            op("MatMul", "rows projection", "logits"),
        ]
        shape = ["batch", *("tokens" if size == "t" else size for size in case.shape)]
        graph = helper.make_graph(
            nodes, "case", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
            [numpy_helper.from_array(v, n) for n, v in {**self.values, **constants}.items()],
        )  # fmt: skip
        self.model = helper.make_model(
            graph, ir_version=8,
            opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)],
        )  # fmt: skip
        self.batches = [numbers(rng, (b, *sized(case.shape, t)), case) for b, t in SIZES]
        self.targets = np.eye(CLASSES, dtype=np.float32)[[0, 2, 1, 2]]
        self.weights = np.float32([1.0, 0.5, 2.0, 0.0])
        self.begun = {
            n: rng.normal(size=v.shape).astype(np.float32) for n, v in self.values.items()
        }

    def _others(self) -> dict[str, np.ndarray]:
        return {n: v for n, v in self.values.items() if n != "p"}

    def compiled(self, **options: Any) -> dict[str, np.ndarray]:
        """The loss and NAME.grad.out of a batch, after gradients that were there before."""
        step = compile_step(
            self.model, list(self.values), [{"x": x} for x in self.batches[:2]],
            inner=self.case.inner, **options,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(
            step.model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        zeros = {f"{n}.{m}": np.zeros_like(v) for n, v in self.values.items() for m in "mv"}
        feeds = {
            "x": self.batches[2], "targets": self.targets, "sample_weight": self.weights,
            **dict.fromkeys(("weight_sum", "t"), np.float32(1)),
            **dict.fromkeys(("lr", "weight_decay"), np.float32(0)),
            **self.values, **{f"{n}.grad": v for n, v in self.begun.items()}, **zeros,
        }  # fmt: skip
        names = {i.name for i in session.get_inputs()}
        wanted = ["loss", *(f"{n}.grad.out" for n in self.values)]
        found = session.run(wanted, {n: np.asarray(v) for n, v in feeds.items() if n in names})
        return dict(zip(wanted, found, strict=True))

    def torch(self) -> dict[str, np.ndarray]:
        values = {n: torch.tensor(v, requires_grad=True) for n, v in self.values.items()}
        others = [values[n] for n in self._others()]
        y = self.case.torch(torch.tensor(self.batches[2]) * values["p"], *others)
        y = y.sum(self.case.pool) if self.case.pool else y
        logits = y.flatten(1) @ torch.tensor(self.projection)
        each = F.cross_entropy(logits, torch.tensor(self.targets), reduction="none")
        loss = (torch.tensor(self.weights) * each).sum()
        gradients = torch.autograd.grad(loss, list(values.values()))
        made = {f"{n}.grad.out": g.numpy() for n, g in zip(values, gradients, strict=True)}
        return {"loss": loss.detach().numpy(), **made}


def assert_gradients_match(graphs: Graphs, tolerance: float = 2e-6) -> None:
    found, wanted = graphs.compiled(), graphs.torch()
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5)
    for name, begun in graphs.begun.items():
        gradient = wanted[f"{name}.grad.out"]
        scale = np.abs(gradient).max()
        assert scale > 1e-4, f"{name} has next to no gradient: the case shows nothing"
        np.testing.assert_allclose(
            found[f"{name}.grad.out"], begun + gradient, rtol=0, atol=tolerance * (1 + scale)
        )


@pytest.mark.parametrize("title", CASES)
def test_a_gradient_is_that_of_torch(title: str):
    assert_gradients_match(Graphs(CASES[title]))


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    return value.detach() + surrogate - surrogate.detach()


@pytest.mark.parametrize(("code", "zero"), [(np.uint8, 100), (np.int8, -7)])
def test_quantized_activations_pass_gradients_inside_their_range(code: type, zero: int):
    limits = np.iinfo(code)
    case = Case(
        nodes=[op("QuantizeLinear", "h scale zero", "q"), op("DequantizeLinear", "q scale zero")],
        torch=lambda h: torch.fake_quantize_per_tensor_affine(
            h, 0.02, zero, int(limits.min), int(limits.max)
        ),
        shape=(40,), scale=2.0, constants={"scale": 0.02},
    )  # fmt: skip
    graphs = Graphs(case, quantized={"zero": np.array(zero, code)})
    assert_gradients_match(graphs)
    flows = np.abs(graphs.torch()["p.grad.out"]) > 0
    assert 3 < flows.sum() < 40  # some were cut off at both ends


def integer_product(code: type) -> tuple[Case, dict[str, np.ndarray]]:
    """Two products of one quantized activation, as quantize_dynamic writes them."""
    rng = np.random.default_rng(5)
    low, high = np.iinfo(code).min, np.iinfo(code).max
    constants: dict[str, np.ndarray] = {}
    nodes = [op("DynamicQuantizeLinear", "h", "q s z")]
    real = {}
    for name, width in (("u", 6), ("v", 3)):
        codes = rng.integers(low, high + 1, (8, width)).astype(code)
        zero = rng.integers(110, 140, width) if code is np.uint8 else np.zeros(width)
        scale = rng.uniform(0.01, 0.03, width).astype(np.float32)
        constants |= {f"{name}_q": codes, f"{name}_s": scale, f"{name}_z": zero.astype(code)}
        real[name] = torch.tensor((codes.astype(np.float32) - zero.astype(np.float32)) * scale)
        nodes += [
            op("MatMulInteger", f"q {name}_q z {name}_z", f"{name}_sums"),
            op("Cast", f"{name}_sums", f"{name}_cast", to=TensorProto.FLOAT),
            op("Mul", f"s {name}_s", f"{name}_scales"),
            op("Mul", f"{name}_cast {name}_scales", f"{name}_y"),
        ]
    nodes.append(op("Concat", "u_y v_y", axis=-1))

    def reference(h: Tensor) -> Tensor:
        low, high = h.min().clamp(max=0).detach(), h.max().clamp(min=0).detach()
        scale = (high - low) / 255
        zero = (-low / scale).round().clamp(0, 255)
        codes = ((h / scale).round() + zero).clamp(0, 255)
        rounded = straight_through(scale * (codes - zero), h)
        return torch.cat([rounded @ real["u"], rounded @ real["v"]], -1)

    return Case(nodes=nodes, torch=reference, shape=("t", 8), pool=(1,)), constants


@pytest.mark.parametrize("code", [np.int8, np.uint8])
def test_a_product_of_codes_has_the_gradient_of_its_real_weights(code: type):
    assert_gradients_match(Graphs(*integer_product(code)), tolerance=1e-5)


@pytest.mark.parametrize("code", [np.int8, np.uint8])
def test_a_gradient_in_integers_is_near_that_in_floats(code: type):
    graphs = Graphs(*integer_product(code))
    exact = graphs.compiled()["p.grad.out"] - graphs.begun["p"]
    rough = graphs.compiled(gradients="int8")["p.grad.out"] - graphs.begun["p"]
    off = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-5 < off < 0.02


def test_every_rule_has_a_case():
    quantized = {"FakeQuantize", "QuantizedMatMul"}
    met = {node.op_type for case in CASES.values() for node in case.nodes}
    assert set(ALL_RULES) - met == quantized


REFUSED = {
    "operator Sin has no gradient": Case(nodes=[op("Sin", "h")], torch=torch.sin),
    "a Slice with steps": Case(
        nodes=[op("Slice", "h b e a s")], torch=lambda h: h[:, :5:2],
        constants={"b": [0], "e": [5], "a": [1], "s": [2]},
    ),
    "a Gather of more than one place has no gradient yet, so h": Case(
        nodes=[op("Gather", "h i", axis=1)], torch=lambda h: h[:, [0, 2]], constants={"i": [0, 2]}
    ),
    "operator Pow has no gradient for its h": Case(
        nodes=[op("Pow", "e h")], torch=lambda h: 2.0**h, constants={"e": 2.0}
    ),
    "a Pad that is not constant": Case(
        nodes=[op("Pad", "h b", mode="reflect")], torch=lambda h: F.pad(h, (1, 1), mode="reflect"),
        constants={"b": [0, 1, 0, 1]},
    ),
    "a Pad that crops": Case(
        nodes=[op("Pad", "h b")], torch=lambda h: F.pad(h, (-1, 1)), constants={"b": [0, -1, 0, 1]}
    ),
    "AveragePool that leaves padding out": Case(
        nodes=[op("AveragePool", "h", kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
        torch=lambda h: F.avg_pool2d(h, 3, 1, 1, count_include_pad=False), shape=IMAGE,
    ),
    "a layer norm over more than the last axis": Case(
        nodes=[op("LayerNormalization", "h k", axis=1)], torch=lambda h: F.layer_norm(h, (2, 5)),
        shape=(2, 5), constants={"k": np.ones((2, 5))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_gradient_is_refused_by_name(reason: str):
    with pytest.raises(EdgetuneError, match=reason):
        Graphs(REFUSED[reason]).compiled()
