"""The gradient of each operator, as ONNX nodes.

Of a unit y = f(x, ...) a rule is given dy, the gradient of the loss with respect to y, and gives
each input that wants one its own. Rules keep little of the forward pass alive and write few, large
nodes: on small CPUs both cost more than arithmetic.
"""

import math

import numpy as np
import onnx

from edgetune.autodiff.backward import Backward, Rule
from edgetune.autodiff.lower import Unit
from edgetune.errors import EdgetuneError
from edgetune.quantize.layers import attribute


def _same(g: Backward, u: Unit, dy: str) -> None:
    g.give(u.inputs[0], dy)


def _reshaped(g: Backward, u: Unit, dy: str) -> None:
    g.give(u.inputs[0], g.reshape_like(dy, u.outputs[0], u.inputs[0]))


def _add(g: Backward, u: Unit, dy: str) -> None:
    for name in u.inputs:
        if g.wants(name):
            g.give(name, g.unbroadcast(dy, u.outputs[0], name))


def _sub(g: Backward, u: Unit, dy: str) -> None:
    a, b = u.inputs
    if g.wants(a):
        g.give(a, g.unbroadcast(dy, u.outputs[0], a))
    if g.wants(b):
        g.give(b, g.b.node("Neg", g.unbroadcast(dy, u.outputs[0], b)))


def _mul(g: Backward, u: Unit, dy: str) -> None:
    a, b = u.inputs
    for name, other in ((a, b), (b, a)):
        if g.wants(name):
            g.give(name, g.unbroadcast(g.b.mul(dy, other), u.outputs[0], name))


def _div(g: Backward, u: Unit, dy: str) -> None:
    a, b = u.inputs
    da = g.b.div(dy, b)
    if g.wants(a):
        g.give(a, g.unbroadcast(da, u.outputs[0], a))
    if g.wants(b):  # -dy a / b^2 = -(dy / b) y
        db = g.b.node("Neg", g.b.mul(da, u.outputs[0]))
        g.give(b, g.unbroadcast(db, u.outputs[0], b))


def _pow(g: Backward, u: Unit, dy: str) -> None:
    x, exponent = u.inputs
    slope = g.b.node("Pow", x, g.b.sub(exponent, g.b.constant(1.0)))
    g.give(x, g.b.mul(dy, g.b.mul(exponent, slope)))


def _sqrt(g: Backward, u: Unit, dy: str) -> None:
    g.give(u.inputs[0], g.b.div(g.b.scale(dy, 0.5), u.outputs[0]))


def _exp(g: Backward, u: Unit, dy: str) -> None:
    g.give(u.inputs[0], g.b.mul(dy, u.outputs[0]))


def _log(g: Backward, u: Unit, dy: str) -> None:
    g.give(u.inputs[0], g.b.div(dy, u.inputs[0]))


def _neg(g: Backward, u: Unit, dy: str) -> None:
    g.give(u.inputs[0], g.b.node("Neg", dy))


def _erf(g: Backward, u: Unit, dy: str) -> None:
    x = u.inputs[0]
    bell = g.b.node("Exp", g.b.node("Neg", g.b.mul(x, x)))
    g.give(x, g.b.mul(dy, g.b.scale(bell, 2 / math.sqrt(math.pi))))


def _tanh(g: Backward, u: Unit, dy: str) -> None:
    y = u.outputs[0]
    g.give(u.inputs[0], g.b.mul(dy, g.b.sub(g.b.constant(1.0), g.b.mul(y, y))))


def _sigmoid(g: Backward, u: Unit, dy: str) -> None:
    y = u.outputs[0]
    g.give(u.inputs[0], g.b.mul(dy, g.b.mul(y, g.b.sub(g.b.constant(1.0), y))))


def _relu(g: Backward, u: Unit, dy: str) -> None:
    # y is never negative, so its sign is the slope; x need not be kept
    g.give(u.inputs[0], g.b.mul(dy, g.b.node("Sign", u.outputs[0])))


def _leaky_relu(g: Backward, u: Unit, dy: str) -> None:
    above = g.b.node("Greater", u.outputs[0], g.b.constant(0.0))
    slope = g.b.constant(attribute(u.node, "alpha", 0.01))
    g.give(u.inputs[0], g.b.mul(dy, g.b.node("Where", above, g.b.constant(1.0), slope)))


def _clip(g: Backward, u: Unit, dy: str) -> None:
    """1 strictly between the limits, as torch's hardtanh and relu6 have it."""
    y = u.outputs[0]
    if len(u.inputs) > 1 and u.inputs[1]:
        dy = g.b.mul(dy, g.b.node("Sign", g.b.sub(y, u.inputs[1])))
    if len(u.inputs) > 2 and u.inputs[2]:
        dy = g.b.mul(dy, g.b.node("Sign", g.b.sub(u.inputs[2], y)))
    g.give(u.inputs[0], dy)


def _hard_sigmoid(g: Backward, u: Unit, dy: str) -> None:
    y, slope = u.outputs[0], attribute(u.node, "alpha", 0.2)
    inside = g.b.node("Sign", g.b.mul(y, g.b.sub(g.b.constant(1.0), y)))
    g.give(u.inputs[0], g.b.mul(dy, g.b.scale(inside, slope)))


def _hard_swish(g: Backward, u: Unit, dy: str) -> None:
    """With y = x h(x), h = clip(x / 6 + 1/2, 0, 1): dy/dx = h + x h'."""
    x = u.inputs[0]
    gate = g.b.node("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    inside = g.b.node("Sign", g.b.mul(gate, g.b.sub(g.b.constant(1.0), gate)))
    g.give(x, g.b.mul(dy, g.b.add(gate, g.b.mul(g.b.scale(x, 1 / 6), inside))))


def _gelu(g: Backward, u: Unit, dy: str) -> None:
    """With z = x / sqrt 2: dy/dx = (1 + erf(z) + 2 / sqrt(pi) z exp(-z^2)) / 2."""
    if attribute(u.node, "approximate", b"none") != b"none":
        raise EdgetuneError("operator Gelu by tanh has no gradient yet")
    z = g.b.scale(u.inputs[0], math.sqrt(0.5))
    bell = g.b.node("Exp", g.b.node("Neg", g.b.mul(z, z)))
    slope = g.b.add(g.b.node("Erf", z), g.b.mul(g.b.scale(z, 2 / math.sqrt(math.pi)), bell))
    slope = g.b.add(slope, g.b.constant(1.0))
    g.give(u.inputs[0], g.b.mul(g.b.scale(dy, 0.5), slope))


def _quick_gelu(g: Backward, u: Unit, dy: str) -> None:
    """With y = x s, s = sigmoid(a x): dy/dx = s + a y (1 - s)."""
    x, alpha = u.inputs[0], attribute(u.node, "alpha", 1.702)
    gate = g.b.node("Sigmoid", g.b.scale(x, alpha))
    rest = g.b.mul(g.b.scale(u.outputs[0], alpha), g.b.sub(g.b.constant(1.0), gate))
    g.give(x, g.b.mul(dy, g.b.add(gate, rest)))


def _where(g: Backward, u: Unit, dy: str) -> None:
    condition, a, b = u.inputs
    zero = g.b.constant(0.0)
    if g.wants(a):
        g.give(a, g.unbroadcast(g.b.node("Where", condition, dy, zero), u.outputs[0], a))
    if g.wants(b):
        g.give(b, g.unbroadcast(g.b.node("Where", condition, zero, dy), u.outputs[0], b))


def _softmax(g: Backward, u: Unit, dy: str) -> None:
    """Give dx = y (dy - sum(dy y))."""
    y = u.outputs[0]
    axis = attribute(u.node, "axis", -1) % len(g.dims(y))
    product = g.b.mul(dy, y)
    total = g.b.sum(product, axis, keep=True)
    g.give(u.inputs[0], g.b.sub(product, g.b.mul(y, total)))


def _matmul(g: Backward, u: Unit, dy: str) -> None:
    _product(g, u.inputs[0], u.inputs[1], u.outputs[0], dy)


def _fused_matmul(g: Backward, u: Unit, dy: str) -> None:
    if any(attribute(u.node, name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        raise EdgetuneError("operator FusedMatMul with transA or transBatch has no gradient yet")
    _product(
        g, u.inputs[0], u.inputs[1], u.outputs[0], dy,
        transposed=bool(attribute(u.node, "transB", 0)), factor=attribute(u.node, "alpha", 1.0),
    )  # fmt: skip


def _product(
    g: Backward, a: str, b: str, y: str, dy: str, *, transposed: bool = False, factor: float = 1.0
) -> None:
    """Of y = factor a b, b transposed first where `transposed`."""
    if len(g.dims(a)) < 2 or len(g.dims(b)) < 2:
        raise EdgetuneError("a product with a vector has no gradient yet")
    batch = g.dims(y)[:-2]
    if g.wants(a):
        da = g.b.matmul(dy, b, transpose_b=not transposed, factor=factor)
        g.give(a, g.reduce_to(da, (*batch, *g.dims(a)[-2:]), g.dims(a)))
    if not g.wants(b):
        return
    x, d = a, dy
    if len(g.dims(b)) == 2:  # as one product of matrices, whatever else the others go over
        x, d = (g.b.reshape(n, -1, g.size(of, -1)) if batch else n for n, of in ((a, a), (dy, y)))
        batch = ()
    left, right = (d, x) if transposed else (x, d)
    db = g.b.matmul(left, right, transpose_a=True, factor=factor)
    g.give(b, g.reduce_to(db, (*batch, *g.dims(b)[-2:]), g.dims(b)))


def _gemm(g: Backward, u: Unit, dy: str) -> None:
    a, b = u.inputs[:2]
    node = u.node
    if attribute(node, "transA", 0):
        raise EdgetuneError("operator Gemm with transA has no gradient yet")
    _product(
        g, a, b, u.outputs[0], dy,
        transposed=bool(attribute(node, "transB", 0)), factor=attribute(node, "alpha", 1.0),
    )  # fmt: skip
    if len(u.inputs) > 2 and g.wants(u.inputs[2]):
        dc = g.b.scale(dy, attribute(node, "beta", 1.0))
        g.give(u.inputs[2], g.unbroadcast(dc, u.outputs[0], u.inputs[2]))


def _quantized_matmul(g: Backward, u: Unit, dy: str) -> None:
    """Of y = x W with both quantized: dx = dy W^T with W's real values, W = s (q - z).

    Scales and zero points go into dy, so that the codes are used as they are, less a common
    middle c: dx = (dy s) (q - c)^T - (dy s) (z - c).
    """
    x, codes, scales, zero_points = u.inputs
    d = g.b.mul(dy, scales)
    zeros = np.array(g.values(zero_points) if zero_points else [0])
    middle = 0
    if g.gradients == "int8":
        # codes far from 0 would carry the roundings of d far beyond what they add up to
        middle = int(np.rint(zeros.mean()))
        dx = _integer_product(g, d, codes, middle, x)
    else:
        dx = g.b.matmul(d, g.b.node("Cast", codes, to=onnx.TensorProto.FLOAT), transpose_b=True)
    if (zeros != middle).any():
        columns = np.broadcast_to(
            zeros - middle, g.size(scales, 0) if zeros.size == 1 else zeros.shape
        )
        offset = g.b.node("MatMul", d, g.b.constant(columns.reshape(-1, 1)))  # (..., 1)
        dx = g.b.sub(dx, offset)
    g.give(x, dx)


def _integer_product(g: Backward, d: str, codes: str, middle: int, like: str) -> str:
    """Return d (q - middle)^T, shaped as the tensor `like`, with d in codes row by row.

    A row's scale is that of its own largest value. Of some samples and tokens the gradient is a
    hundred times that of others: with one scale for all, little would be left of it in the lower
    layers.
    """
    width = g.size(codes, 1)
    rows = g.b.reshape(d, -1, width)
    peak = g.b.node("ReduceMax", g.b.node("Abs", rows), g.b.ints(1), keepdims=1)
    step = g.b.node("Max", g.b.scale(peak, 1 / 127), g.b.constant(1e-30))  # (rows, 1)
    steps = g.b.reshape(step, -1)
    zeros = g.b.node("Expand", g.b.constant([128], np.uint8), g.b.node("Shape", steps))
    quantized = g.b.node("QuantizeLinear", rows, steps, zeros, axis=0)
    turned = g.b.node("Transpose", codes, perm=[1, 0])  # once, when a session is opened
    middles = [g.b.constant(middle, g.dtype(codes))] if middle else []
    zero = g.b.constant(128, np.uint8)
    sums = g.b.node("MatMulInteger", quantized, turned, zero, *middles)
    real = g.b.mul(g.b.node("Cast", sums, to=onnx.TensorProto.FLOAT), step)
    if len(g.dims(like)) == 2:
        return real
    return g.b.node("Reshape", real, g.b.node("Shape", like))


def _fake_quantize(g: Backward, u: Unit, dy: str) -> None:
    """1 where x was inside the codes' range: there it moved by half a step at most."""
    x, scale = u.inputs[:2]
    moved = g.b.node("Abs", g.b.sub(x, u.outputs[0]))
    inside = g.b.node("LessOrEqual", moved, g.b.scale(scale, 0.5 + 1e-3))
    g.give(x, g.b.node("Where", inside, dy, g.b.constant(0.0)))


def _layer_norm(g: Backward, u: Unit, dy: str) -> None:
    """Give dx = r (d - mean(d) - n mean(d n)), with n = (x - mean) r and d = dy gamma.

    Ba, Kiros, Hinton 2016 (arXiv:1607.06450), differentiated.
    """
    x, gamma = u.inputs[:2]
    beta = u.inputs[2] if len(u.inputs) > 2 else ""
    rank = len(g.dims(x))
    if attribute(u.node, "axis", -1) % rank != rank - 1:
        raise EdgetuneError("a layer norm over more than the last axis has no gradient yet")
    mean, spread = _statistics(g, u)
    normal = g.b.mul(g.b.sub(x, mean), spread)
    if g.wants(gamma):
        g.give(gamma, g.unbroadcast(g.b.mul(dy, normal), u.outputs[0], gamma))
    if beta and g.wants(beta):
        g.give(beta, g.unbroadcast(dy, u.outputs[0], beta))
    if not g.wants(x):
        return
    d = g.b.mul(dy, gamma)
    axes = [rank - 1]
    level = _mean(g, d, *axes)
    slope = _mean(g, g.b.mul(d, normal), *axes)
    centred = g.b.sub(g.b.sub(d, level), g.b.mul(normal, slope))
    g.give(x, g.b.mul(centred, spread))


def _statistics(g: Backward, u: Unit) -> tuple[str, str]:
    """Return mean and reciprocal deviation of a layer norm, which the node itself can give."""
    node = u.node
    while len(node.output) < 3:
        node.output.append(g.b.fresh("norm"))
    return node.output[1], node.output[2]


def _mean(g: Backward, x: str, *axes: int) -> str:
    return g.b.node("ReduceMean", x, g.b.ints(*axes), keepdims=1)


def _reduce_mean(g: Backward, u: Unit, dy: str) -> None:
    x, y = u.inputs[0], u.outputs[0]
    axes = _axes(g, u)
    sizes = [g.dims(x)[a] for a in axes]
    if all(isinstance(s, int) for s in sizes):
        dy = g.b.scale(dy, 1 / math.prod(s for s in sizes if isinstance(s, int)))
    else:
        count = g.b.div(_elements(g, x), _elements(g, y))
        dy = g.b.div(dy, count)
    _spread(g, u, dy, axes)


def _reduce_sum(g: Backward, u: Unit, dy: str) -> None:
    _spread(g, u, dy, _axes(g, u))


def _elements(g: Backward, x: str) -> str:
    return g.b.node("Cast", g.b.node("Size", x), to=onnx.TensorProto.FLOAT)


def _spread(g: Backward, u: Unit, dy: str, axes: list[int]) -> None:
    """Give every element that was summed the gradient of the sum."""
    x = u.inputs[0]
    if not attribute(u.node, "keepdims", 1):
        dy = g.b.node("Unsqueeze", dy, g.b.ints(*axes))
    g.give(x, g.b.node("Expand", dy, g.b.node("Shape", x)))


def _axes(g: Backward, u: Unit) -> list[int]:
    """Return the axes that a reduction goes over."""
    x, y = g.dims(u.inputs[0]), g.dims(u.outputs[0])
    if attribute(u.node, "keepdims", 1):
        return [i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b]
    axes = attribute(u.node, "axes", None)
    if axes is None:
        axes = g.values(u.inputs[1]) if len(u.inputs) > 1 and u.inputs[1] else range(len(x))
    return sorted(int(a) % len(x) for a in axes)


def _global_average(g: Backward, u: Unit, dy: str) -> None:
    x = u.inputs[0]
    size = math.prod(g.size(x, axis) for axis in range(2, len(g.dims(x))))
    g.give(x, g.b.node("Expand", g.b.scale(dy, 1 / size), g.b.node("Shape", x)))


def _transpose(g: Backward, u: Unit, dy: str) -> None:
    rank = len(g.dims(u.inputs[0]))
    perm = list(attribute(u.node, "perm", range(rank - 1, -1, -1)))
    g.give(u.inputs[0], g.b.transpose(dy, *(perm.index(i) for i in range(rank))))


def _concat(g: Backward, u: Unit, dy: str) -> None:
    axis = attribute(u.node, "axis", 0)
    begin = 0
    for name in u.inputs:
        size = g.size(name, axis)
        if g.wants(name):
            g.give(name, _slice(g, dy, axis, begin, begin + size))
        begin += size


def _slice(g: Backward, x: str, axis: int, begin: int, end: int, step: int = 1) -> str:
    return g.b.node("Slice", x, g.b.ints(begin), g.b.ints(end), g.b.ints(axis), g.b.ints(step))


def _split(g: Backward, u: Unit, dy: str) -> None:  # noqa: ARG001 - it has several outputs
    x, axis = u.inputs[0], attribute(u.node, "axis", 0)
    parts = []
    for name in u.outputs:
        gradient = g.gradient(name)
        if not gradient:  # nobody reads that part
            zero = g.b.constant([0.0])
            gradient = g.b.node("Expand", zero, g.b.node("Shape", name))
        parts.append(gradient)
    g.give(x, g.b.node("Concat", *parts, axis=axis % len(g.dims(x))))


def _slice_rule(g: Backward, u: Unit, dy: str) -> None:
    """Pad with zeros what was cut off."""
    x, y = u.inputs[0], u.outputs[0]
    rank = len(g.dims(x))
    begins = g.values(u.inputs[1])
    axes = g.values(u.inputs[3]) if len(u.inputs) > 3 and u.inputs[3] else range(len(begins))
    steps = g.values(u.inputs[4]) if len(u.inputs) > 4 and u.inputs[4] else [1] * len(begins)
    if any(s != 1 for s in steps):
        raise EdgetuneError("a Slice with steps has no gradient yet")
    before, after = [0] * rank, [0] * rank
    for axis, begin in zip(axes, begins, strict=True):
        axis %= rank
        size = g.size(x, axis)
        begin = max(begin + size, 0) if begin < 0 else min(begin, size)
        before[axis] = begin
        after[axis] = size - begin - g.size(y, axis)
    g.give(x, g.b.node("Pad", dy, g.b.ints(*before, *after)))


def _gather(g: Backward, u: Unit, dy: str) -> None:
    """Of one place along an axis: put it back among zeros."""
    x, indices = u.inputs
    rank = len(g.dims(x))
    axis = attribute(u.node, "axis", 0) % rank
    if not g.is_constant(indices) or len(g.values(indices)) != 1 or len(g.dims(indices)) > 1:
        raise EdgetuneError(
            f"a Gather of more than one place has no gradient yet, so {x} cannot be trained"
        )
    (place,) = g.values(indices)
    if len(g.dims(u.outputs[0])) < rank:
        dy = g.b.node("Unsqueeze", dy, g.b.ints(axis))
    size = g.b.node("Shape", x, start=axis, end=axis + 1)
    before = g.b.ints(place) if place >= 0 else g.b.add(size, g.b.ints(place))
    after = g.b.sub(g.b.sub(size, g.b.ints(1)), before)
    left, right = (g.b.ints(*([0] * n)) if n else "" for n in (axis, rank - axis - 1))
    pads = [part for part in (left, before, right, left, after, right) if part]
    g.give(x, g.b.node("Pad", dy, g.b.node("Concat", *pads, axis=0)))


def _pad(g: Backward, u: Unit, dy: str) -> None:
    x = u.inputs[0]
    if attribute(u.node, "mode", b"constant") != b"constant":
        raise EdgetuneError("a Pad that is not constant has no gradient yet")
    pads, rank = g.values(u.inputs[1]), len(g.dims(x))
    axes = g.values(u.inputs[3]) if len(u.inputs) > 3 and u.inputs[3] else list(range(rank))
    for i, axis in enumerate(axes):
        before, after = pads[i], pads[i + len(axes)]
        if min(before, after) < 0:
            raise EdgetuneError("a Pad that crops has no gradient yet")
        if before or after:
            dy = _slice(g, dy, axis, before, before + g.size(x, axis))
    g.give(x, dy)


def _expand(g: Backward, u: Unit, dy: str) -> None:
    g.give(u.inputs[0], g.unbroadcast(dy, u.outputs[0], u.inputs[0]))


RULES: dict[str, Rule] = {
    "Add": _add,
    "Cast": _same,
    "Clip": _clip,
    "Concat": _concat,
    "Div": _div,
    "Dropout": _same,
    "Erf": _erf,
    "Exp": _exp,
    "Expand": _expand,
    "FakeQuantize": _fake_quantize,
    "Flatten": _reshaped,
    "FusedMatMul": _fused_matmul,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": _same,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky_relu,
    "Log": _log,
    "MatMul": _matmul,
    "Mul": _mul,
    "Neg": _neg,
    "Pad": _pad,
    "Pow": _pow,
    "QuantizedMatMul": _quantized_matmul,
    "QuickGelu": _quick_gelu,
    "ReduceMean": _reduce_mean,
    "ReduceSum": _reduce_sum,
    "Relu": _relu,
    "Reshape": _reshaped,
    "Sigmoid": _sigmoid,
    "Slice": _slice_rule,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _sqrt,
    "Squeeze": _reshaped,
    "Sub": _sub,
    "Tanh": _tanh,
    "Transpose": _transpose,
    "Unsqueeze": _reshaped,
    "Where": _where,
}
