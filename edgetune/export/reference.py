"""Run an ONNX graph with torch's own operators, so that torch's autograd can differentiate it.

The training graph's backward pass is derived on ONNX nodes; this is the other, independent
derivation that it is checked against. So every operator here is torch's function of that name,
with the semantics of opset 18, and nothing here knows a gradient but the straight-through
estimator's: rounding has the gradient of the identity (Bengio et al. 2013, arXiv:1308.3432).

What a quantizing operator makes of an activation is carried as float64 numbers that are whole,
so that values are exactly the codes' and autograd can go through them:

- QuantizeLinear -> DequantizeLinear: the gradient passes where the rounded code is inside its
  range, ends included, and is zero elsewhere, as in torch.fake_quantize_per_tensor_affine.
- DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul: the range is the data's own, so the
  gradient passes everywhere; scale and zero point count as constants.

Constant codes, token ids, shapes and masks are plain integer tensors.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from onnx import TensorProto, numpy_helper
from torch import Tensor

from edgetune.errors import EdgetuneError

Attributes = Mapping[str, Any]
# an absent optional input is None, or is not passed at all
Operator = Callable[..., Tensor | tuple[Tensor, ...]]

DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}
MICROSOFT = "com.microsoft"
# what onnxruntime adds to the scores of masked keys
MASK_FILTER_VALUE = -10000.0


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A node, ready to run."""

    name: str
    operator: Operator
    attributes: Attributes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class TorchGraph:
    """An ONNX graph as a differentiable function of its inputs and its initializers."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Read a model whose weights are inside it.

        Raises:
            EdgetuneError: an operator of the graph is not known here.
        """
        self.initializers = {t.name: _tensor(t) for t in model.graph.initializer}
        self._steps = [_step(node) for node in model.graph.node]
        self._makers = {
            name: i for i, step in enumerate(self._steps) for name in step.outputs if name
        }

    def run(
        self,
        feeds: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor] | None = None,
        *,
        outputs: Sequence[str],
    ) -> dict[str, Tensor]:
        """Return the tensors of those names, whether or not they are the graph's outputs.

        Args:
            feeds: values of graph inputs; a value of an intermediate tensor cuts the graph there.
            parameters: stand in for initializers of the same names.
            outputs: which tensors; only nodes that lead to them are run.

        Raises:
            EdgetuneError: a name is unknown, an input is missing, or torch cannot run a node.
        """
        parameters = {} if parameters is None else parameters
        if unknown := sorted(parameters.keys() - self.initializers.keys()):
            raise EdgetuneError(f"the graph has no initializer {unknown[0]!r}")
        values = {**self.initializers, **parameters, **feeds}
        for i in self._needed(outputs, values.keys()):
            step = self._steps[i]
            given = [_value(values, name, step.name) if name else None for name in step.inputs]
            try:
                made = step.operator(step.attributes, *given)
            except EdgetuneError:
                raise
            except Exception as error:  # torch's: RuntimeError, IndexError, TypeError
                raise EdgetuneError(f"torch cannot run node {step.name}: {error}") from error
            made = made if isinstance(made, tuple) else (made,)
            # optional outputs that nothing here makes are missed when they are asked for
            values.update((name, v) for name, v in zip(step.outputs, made, strict=False) if name)
        return {name: _value(values, name, "the caller") for name in outputs}

    def _needed(self, outputs: Sequence[str], known: Any) -> list[int]:
        """Return the nodes between what is known and the outputs, in the graph's order."""
        found: set[int] = set()
        open_names = [name for name in outputs if name not in known]
        while open_names:
            i = self._makers.get(open_names.pop())
            if i is not None and i not in found:
                found.add(i)
                open_names.extend(name for name in self._steps[i].inputs if name not in known)
        return sorted(found)


def _value(values: Mapping[str, Tensor], name: str, reader: str) -> Tensor:
    if name not in values:
        raise EdgetuneError(f"no value for {name!r}, which {reader} reads; feed it")
    return values[name]


def _step(node: onnx.NodeProto) -> _Step:
    domain = "" if node.domain == "ai.onnx" else node.domain
    name = f"{node.name or node.output[0]} ({node.op_type})"
    operator = OPERATORS.get((domain, node.op_type))
    if operator is None:
        raise EdgetuneError(
            f"operator {node.op_type} of domain {domain or 'ai.onnx'!r} has no torch counterpart"
            f" in the reference interpreter; node {name}"
        )
    attributes = {a.name: _attribute(a) for a in node.attribute}
    return _Step(
        name=name,
        operator=operator,
        attributes=attributes,
        inputs=tuple(node.input),
        outputs=tuple(node.output),
    )


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return _tensor(value) if isinstance(value, TensorProto) else value


def _tensor(tensor: TensorProto) -> Tensor:
    if tensor.data_type not in DTYPES:
        kind = TensorProto.DataType.Name(tensor.data_type)
        raise EdgetuneError(f"tensor {tensor.name!r} is of type {kind}, which torch has not")
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def _ints(tensor: Tensor) -> list[int]:
    return [int(v) for v in tensor.reshape(-1).tolist()]


def _plain(function: Callable[..., Tensor]) -> Operator:
    """Return an operator of no attributes."""
    return lambda _, *inputs: function(*inputs)


# arithmetic


def _div(_: Attributes, a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def _mod(at: Attributes, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if at.get("fmod", 0) else torch.remainder(a, b)


def _clip(
    _: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    # torch.clamp's gradient at a bound is 0, 1/2 or 1, by the kind of its bounds; here it is 0,
    # as in relu, relu6 and hardtanh, which exporters write as Clip
    if low is not None:
        x = torch.where(x <= low, low, x)
    if high is not None:
        x = torch.where(x >= high, high, x)
    return x


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda _, *inputs: functools.reduce(function, inputs)


def _hard_sigmoid(at: Attributes, x: Tensor) -> Tensor:
    line = at.get("alpha", 0.2) * x + at.get("beta", 0.5)
    return _clip(at, line, torch.zeros_like(line), torch.ones_like(line))


def _prelu(_: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _gelu(at: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=at.get("approximate", "none"))


def _fast_gelu(_: Attributes, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _quick_gelu(at: Attributes, x: Tensor) -> Tensor:
    return x * torch.sigmoid(at.get("alpha", 1.702) * x)


# matrix products and convolutions


def _gemm(at: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.mT if at.get("transA", 0) else a
    b = b.mT if at.get("transB", 0) else b
    y: Tensor = at.get("alpha", 1.0) * (a @ b)
    return y if c is None else y + at.get("beta", 1.0) * c


def _fused_matmul(at: Attributes, a: Tensor, b: Tensor) -> Tensor:
    if at.get("transBatchA", 0) or at.get("transBatchB", 0):
        raise EdgetuneError("FusedMatMul: only transBatchA = transBatchB = 0 is known here")
    a = a.mT if at.get("transA", 0) and a.ndim > 1 else a
    b = b.mT if at.get("transB", 0) and b.ndim > 1 else b
    y: Tensor = at.get("alpha", 1.0) * (a @ b)
    return y


def _pads(at: Attributes, rank: int) -> list[int]:
    """Return the pads as F.pad wants them: last axis first, begin and end in turn."""
    if at.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise EdgetuneError(f"auto_pad {at['auto_pad']} is not known here; write out the pads")
    pads = at.get("pads", [0] * (2 * rank))
    return [pads[axis + side * rank] for axis in reversed(range(rank)) for side in (0, 1)]


def _conv(at: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    rank = x.ndim - 2
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return convolve(
        F.pad(x, _pads(at, rank)),
        w,
        b,
        stride=at.get("strides", [1] * rank),
        dilation=at.get("dilations", [1] * rank),
        groups=at.get("group", 1),
    )


def _conv_transpose(at: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    if "output_shape" in at:
        raise EdgetuneError("ConvTranspose: output_shape is not known here; write out the pads")
    rank = x.ndim - 2
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    y = convolve(
        x,
        w,
        b,
        stride=at.get("strides", [1] * rank),
        output_padding=at.get("output_padding", [0] * rank),
        dilation=at.get("dilations", [1] * rank),
        groups=at.get("group", 1),
    )
    return F.pad(y, [-p for p in _pads(at, rank)])  # pads of a transposed convolution crop


def _max_pool(at: Attributes, x: Tensor) -> Tensor:
    rank = x.ndim - 2
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    pads = _pads(at, rank)
    return pool(
        F.pad(x, pads, value=-math.inf) if any(pads) else x,
        at["kernel_shape"],
        at.get("strides", [1] * rank),
        dilation=at.get("dilations", [1] * rank),
        ceil_mode=bool(at.get("ceil_mode", 0)),
    )


def _average_pool(at: Attributes, x: Tensor) -> Tensor:
    rank = x.ndim - 2
    pads = _pads(at, rank)

    def mean(values: Tensor) -> Tensor:
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
        return pool(
            F.pad(values, pads),
            at["kernel_shape"],
            at.get("strides", [1] * rank),
            ceil_mode=bool(at.get("ceil_mode", 0)),
        )

    # without the padding: by the share of each window that lies on the input
    return mean(x) if at.get("count_include_pad", 0) else mean(x) / mean(torch.ones_like(x))


def _global_average_pool(_: Attributes, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def _global_max_pool(_: Attributes, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


# normalization and attention


def _layer_norm(at: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    shape = x.shape[at.get("axis", -1) % x.ndim :]
    shift = None if bias is None else bias.expand(shape)
    return F.layer_norm(x, shape, scale.expand(shape), shift, at.get("epsilon", 1e-5))


def _batch_norm(
    at: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    if at.get("training_mode", 0):
        raise EdgetuneError("BatchNormalization: training_mode is not known here")
    return F.batch_norm(x, mean, variance, scale, bias, eps=at.get("epsilon", 1e-5))


def _instance_norm(at: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=at.get("epsilon", 1e-5))


def _multi_head_attention(
    at: Attributes,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *past: Tensor | None,
) -> Tensor:
    """Take query (B, T, C), key and value (B, S, C), bias (3C,), padding_mask (B, S)."""
    if any(p is not None for p in past) or key.ndim != 3:
        raise EdgetuneError("MultiHeadAttention: packed or past keys are not known here")
    heads = at["num_heads"]
    channels = query.shape[-1]
    if bias is not None:
        shifts = bias.split_with_sizes([channels, channels, bias.shape[0] - 2 * channels])
        query, key, value = query + shifts[0], key + shifts[1], value + shifts[2]
    q, k, v = (torch.unflatten(x, -1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scale = at.get("scale", 0.0) or q.shape[-1] ** -0.5
    scores = scale * (q @ k.mT)  # (B, heads, T, S)
    if padding_mask is not None:
        if padding_mask.shape != key.shape[:2]:
            raise EdgetuneError("MultiHeadAttention: only a mask of (batch, keys) is known here")
        filtered = at.get("mask_filter_value", MASK_FILTER_VALUE)
        scores = scores + filtered * (padding_mask == 0).to(scores.dtype)[:, None, None]
    if attention_bias is not None:
        scores = scores + attention_bias
    mixed: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)  # (B, T, C)
    return mixed


# reductions


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def operator(at: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        # opset 18 has axes as an input, before that they were an attribute
        dims = at.get("axes", []) if axes is None else _ints(axes)
        if not dims and at.get("noop_with_empty_axes", 0):
            return x
        return function(x, tuple(dims) or tuple(range(x.ndim)), bool(at.get("keepdims", 1)))

    return operator


def _norm2(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, 2, dims, keep)
    return norm


def _cum_sum(at: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    if at.get("exclusive", 0) or at.get("reverse", 0):
        raise EdgetuneError("CumSum: exclusive or reverse is not known here")
    return x.cumsum(int(axis.item()), dtype=x.dtype)


def _arg_max(at: Attributes, x: Tensor) -> Tensor:
    return x.argmax(at.get("axis", 0), bool(at.get("keepdims", 1)))


# shapes and places


def _reshape(at: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    wanted = _ints(shape)
    if not at.get("allowzero", 0):
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return x.reshape(wanted)


def _flatten(at: Attributes, x: Tensor) -> Tensor:
    axis = at.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(at: Attributes, x: Tensor) -> Tensor:
    return x.permute(at.get("perm", list(reversed(range(x.ndim)))))


def _axis_indices(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + x.shape[axis], indices)


def _gather(at: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = at.get("axis", 0) % x.ndim
    chosen = x.index_select(axis, _axis_indices(x, indices, axis).reshape(-1))
    return chosen.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_elements(at: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = at.get("axis", 0) % x.ndim
    return x.gather(axis, _axis_indices(x, indices, axis))


def _gather_nd(at: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    if at.get("batch_dims", 0):
        raise EdgetuneError("GatherND: only batch_dims = 0 is known here")
    return x[indices.to(torch.int64).unbind(-1)]


def _slice(
    _: Attributes,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = _ints(starts), _ints(ends)
    dims = list(range(len(first))) if axes is None else _ints(axes)
    strides = [1] * len(first) if steps is None else _ints(steps)
    for start, end, axis, stride in zip(first, last, dims, strides, strict=True):
        # Python's slices clamp as ONNX's do; torch's know no negative steps
        places = range(*slice(start, end, stride).indices(x.shape[axis]))
        x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return x


def _concat(at: Attributes, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, at["axis"])


def _split(at: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = at.get("axis", 0)
    if sizes is not None:
        return tuple(x.split_with_sizes(_ints(sizes), axis))
    total, count = x.shape[axis], int(at["num_outputs"])
    part = -(-total // count)  # the last one is smaller where it doesn't divide
    return tuple(x.split_with_sizes([part] * (count - 1) + [total - part * (count - 1)], axis))


def _pad(
    at: Attributes,
    x: Tensor,
    pads: Tensor,
    fill: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    if at.get("mode", "constant") != "constant":
        raise EdgetuneError(f"Pad: mode {at['mode']} is not known here, only constant")
    amounts = _ints(pads)
    dims = list(range(x.ndim)) if axes is None else [a % x.ndim for a in _ints(axes)]
    both = [(0, 0)] * x.ndim
    for i, axis in enumerate(dims):
        both[axis] = (amounts[i], amounts[i + len(dims)])
    flat = [amount for pair in reversed(both) for amount in pair]
    return F.pad(x, flat, value=0 if fill is None else fill.item())


def _squeeze(_: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_ints(axes)))


def _unsqueeze(_: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(a % rank for a in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _expand(_: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.broadcast_to(np.broadcast_shapes(tuple(x.shape), tuple(_ints(shape))))


def _tile(_: Attributes, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(_ints(repeats))


def _shape(at: Attributes, x: Tensor) -> Tensor:
    sizes = list(x.shape)[at.get("start", 0) : at.get("end", x.ndim)]
    return torch.tensor(sizes, dtype=torch.int64)


def _constant(at: Attributes) -> Tensor:
    ((kind, value),) = at.items()
    if isinstance(value, Tensor):
        return value
    if kind in ("value_int", "value_ints"):
        return torch.tensor(value, dtype=torch.int64)
    if kind in ("value_float", "value_floats"):
        return torch.tensor(value, dtype=torch.float32)
    raise EdgetuneError(f"Constant: {kind} is not known here")


def _constant_of_shape(at: Attributes, shape: Tensor) -> Tensor:
    value: Tensor = at.get("value", torch.zeros(1))
    return value.reshape(()).expand(_ints(shape)).clone()


def _cast(at: Attributes, x: Tensor) -> Tensor:
    if at["to"] not in DTYPES:
        kind = TensorProto.DataType.Name(at["to"])
        raise EdgetuneError(f"Cast: to {kind} is not known here")
    return x.to(DTYPES[at["to"]])


def _range(_: Attributes, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _dropout(_: Attributes, x: Tensor, *__: Tensor | None) -> tuple[Tensor, Tensor]:
    return x, torch.ones_like(x, dtype=torch.bool)


# quantization: codes are whole float64 numbers, see the head of this file


def _straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return exactly `value`, with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def _along(parameter: Tensor, x: Tensor, axis: int) -> Tensor:
    """Reshape a scale or zero point of one axis so that it broadcasts against x."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    shape = [1] * x.ndim
    shape[axis % x.ndim] = -1
    return parameter.reshape(shape)


def _quantize(at: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    zero = torch.zeros((), dtype=torch.uint8) if zero is None else zero
    limits = torch.iinfo(zero.dtype)
    axis = at.get("axis", 1)
    steps = (x / _along(scale, x, axis)).double()
    codes = _straight_through(steps.round(), steps) + _along(zero, x, axis).double()
    # not torch.clamp, whose gradient is 0 at the ends
    codes = torch.where(codes < limits.min, limits.min, codes)
    return torch.where(codes > limits.max, limits.max, codes)


def _dequantize(at: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    axis = at.get("axis", 1)
    centred = x.double() if zero is None else x.double() - _along(zero, x, axis).double()
    return centred.to(scale.dtype) * _along(scale, x, axis)


def _quantize_dynamic(_: Attributes, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    fixed = x.detach()
    low, high = fixed.min().clamp(max=0), fixed.max().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).clamp(0, 255).round()
    steps = (x / scale).double()
    codes = (steps.round() + zero).clamp(0, 255)
    return _straight_through(codes, steps), scale, zero.to(torch.uint8)


def _matmul_integer(
    _: Attributes, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    a, b = a.double(), b.double()  # sums of at most 2^53 are exact
    if a_zero is not None:  # () or one per row
        a = a - (a_zero.double() if a_zero.ndim != 1 else a_zero.double()[:, None])
    if b_zero is not None:  # () or one per column
        b = b - b_zero.double()
    return a @ b


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pow": lambda x, y: torch.pow(x, y).to(x.dtype),
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Where": torch.where,
}
_STANDARD: dict[str, Operator] = {
    **{op: _plain(function) for op, function in _PLAIN.items()},
    "ArgMax": _arg_max,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "CumSum": _cum_sum,
    "DequantizeLinear": _dequantize,
    "Div": _div,
    "Dropout": _dropout,
    "DynamicQuantizeLinear": _quantize_dynamic,
    "Elu": lambda at, x: F.elu(x, at.get("alpha", 1.0)),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "HardSigmoid": _hard_sigmoid,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda at, x: F.leaky_relu(x, at.get("alpha", 0.01)),
    "LogSoftmax": lambda at, x: F.log_softmax(x, at.get("axis", -1)),
    "MatMulInteger": _matmul_integer,
    "Max": _variadic(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _variadic(torch.minimum),
    "Mod": _mod,
    "PRelu": _prelu,
    "Pad": _pad,
    "QuantizeLinear": _quantize,
    "Range": _range,
    "ReduceL2": _reduce(_norm2),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Softmax": lambda at, x: F.softmax(x, at.get("axis", -1)),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sum": _variadic(torch.add),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
_CONTRIBUTED: dict[str, Operator] = {
    "FastGelu": _fast_gelu,
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu,
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": _quick_gelu,
}
OPERATORS: dict[tuple[str, str], Operator] = {
    **{("", op): operator for op, operator in _STANDARD.items()},
    **{(MICROSOFT, op): operator for op, operator in _CONTRIBUTED.items()},
}
