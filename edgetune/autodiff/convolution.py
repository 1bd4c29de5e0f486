"""Gradients of convolution and pooling, by the cheapest nodes that onnxruntime has for each kind.

Shapes: x (N, C, H, W), weights (O, C / g, kh, kw), y (N, O, H', W').
"""

import math
from dataclasses import dataclass
from typing import Any

from edgetune.autodiff.backward import Backward, Rule
from edgetune.autodiff.lower import Unit
from edgetune.autodiff.rules import RULES
from edgetune.errors import EdgetuneError
from edgetune.quantize.layers import attribute


@dataclass(frozen=True, kw_only=True)
class _Window:
    """A two-dimensional window's attributes; pads are (top, left, bottom, right)."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]


def _window(node: Any, kernel: tuple[int, ...]) -> _Window:
    if len(kernel) != 2:
        raise EdgetuneError(f"{node.op_type} over {len(kernel)} dimensions has no gradient yet")
    if attribute(node, "auto_pad", b"NOTSET") != b"NOTSET" or attribute(node, "ceil_mode", 0):
        raise EdgetuneError(f"{node.op_type} with auto_pad or ceil_mode has no gradient yet")
    return _Window(
        kernel=(kernel[0], kernel[1]),
        strides=tuple(attribute(node, "strides", (1, 1))),
        pads=tuple(attribute(node, "pads", (0, 0, 0, 0))),
        dilations=tuple(attribute(node, "dilations", (1, 1))),
    )


def _conv(g: Backward, u: Unit, dy: str) -> None:
    x, w = u.inputs[:2]
    shape = g.fixed(w)
    window = _window(u.node, shape[2:])
    groups = attribute(u.node, "group", 1)
    if g.wants(x):
        g.give(x, _to_input(g, u, dy, window, groups))
    if g.wants(w):
        g.give(w, _to_weights(g, u, dy, window, groups))
    if len(u.inputs) > 2 and u.inputs[2] and g.wants(u.inputs[2]):
        g.give(u.inputs[2], g.b.sum(dy, 0, 2, 3))


def _to_input(g: Backward, u: Unit, dy: str, window: _Window, groups: int) -> str:
    """Return dx: a convolution with the weights turned round, or a transposed one."""
    x, w = u.inputs[:2]
    outputs, per_group, kh, kw = g.fixed(w)
    height, width = g.size(x, 2), g.size(x, 3)
    (sh, sw), (dh, dw) = window.strides, window.dilations
    top, left, bottom, right = window.pads
    plain = (sh, sw) == (1, 1) and (dh, dw) == (1, 1)
    if plain and groups == 1 and (kh, kw) == (1, 1) and not any(window.pads):
        return g.b.node("Conv", dy, g.b.transpose(w, 1, 0, 2, 3), kernel_shape=[1, 1])
    depthwise = per_group == 1 and groups == outputs and (dh, dw) == (1, 1)
    # what of the input no window reached
    rest_h = height + top + bottom - ((g.size(u.outputs[0], 2) - 1) * sh + kh)
    rest_w = width + left + right - ((g.size(u.outputs[0], 3) - 1) * sw + kw)
    if depthwise and kh > top and kw > left and kh + rest_h > bottom and kw + rest_w > right:
        # onnxruntime's transposed convolution goes group by group: many groups of one are slow
        turned = g.b.node(
            "Slice", w, g.b.ints(-1, -1), g.b.ints(-kh - 1, -kw - 1), g.b.ints(2, 3),
            g.b.ints(-1, -1),
        )  # fmt: skip
        wide = _with_gaps(g, dy, u.outputs[0], sh, sw)
        pads = [kh - 1 - top, kw - 1 - left, kh - 1 - bottom + rest_h, kw - 1 - right + rest_w]
        return g.b.node("Conv", wide, turned, kernel_shape=[kh, kw], pads=pads, group=groups)
    rest_h = height + top + bottom - ((g.size(u.outputs[0], 2) - 1) * sh + (kh - 1) * dh + 1)
    rest_w = width + left + right - ((g.size(u.outputs[0], 3) - 1) * sw + (kw - 1) * dw + 1)
    full = g.b.node(
        "ConvTranspose", dy, w, kernel_shape=[kh, kw], strides=[sh, sw], dilations=[dh, dw],
        group=groups, pads=[top, left, max(bottom - rest_h, 0), max(right - rest_w, 0)],
    )  # fmt: skip
    after = [max(rest_h - bottom, 0), max(rest_w - right, 0)]
    if any(after):
        full = g.b.node("Pad", full, g.b.ints(0, 0, 0, 0, 0, 0, *after))
    return full


def _with_gaps(g: Backward, dy: str, like: str, sh: int, sw: int) -> str:
    """Put s - 1 zeros between neighbours: (H', W') becomes ((H' - 1) sh + 1, (W' - 1) sw + 1)."""
    if (sh, sw) == (1, 1):
        return dy
    channels, height, width = (g.size(like, axis) for axis in (1, 2, 3))
    apart = g.b.reshape(dy, -1, height, 1, width, 1)
    apart = g.b.node("Pad", apart, g.b.ints(0, 0, 0, 0, 0, 0, 0, sh - 1, 0, sw - 1))
    wide = g.b.reshape(apart, -1, channels, height * sh, width * sw)
    ends = g.b.ints((height - 1) * sh + 1, (width - 1) * sw + 1)
    return g.b.node("Slice", wide, g.b.ints(0, 0), ends, g.b.ints(2, 3))


def _to_weights(g: Backward, u: Unit, dy: str, window: _Window, groups: int) -> str:
    """Return dw: per sample dy (O, H'W') times the windows' contents (H'W', C kh kw), summed."""
    x, w, y = u.inputs[0], u.inputs[1], u.outputs[0]
    outputs, per_group, kh, kw = g.fixed(w)
    if per_group == 1 and groups == outputs and kh * kw > 1:
        return _to_depthwise_weights(g, x, w, y, dy, window)
    channels = per_group * groups
    places = g.size(y, 2) * g.size(y, 3)
    seen_once = places == g.size(x, 2) * g.size(x, 3) == 1
    if groups == 1 and seen_once and kh * kw == 1:  # of squeeze-and-excite: one product
        left, right = (g.b.reshape(a, 0, -1) for a in (dy, x))
        return g.b.reshape(g.b.matmul(left, right, transpose_a=True), -1, channels, 1, 1)
    columns = _columns(g, x, y, window)  # (N, C, kh kw, H'W')
    if groups == 1:  # of a last layer there may be more outputs than the weights have now
        seen = g.b.reshape(columns, -1, channels * kh * kw, places)
        d = g.b.reshape(dy, 0, 0, places)
    else:
        seen = g.b.reshape(columns, -1, groups, per_group * kh * kw, places)
        d = g.b.reshape(dy, -1, groups, outputs // groups, places)
    each = g.b.matmul(d, seen, transpose_b=True)  # (N, [g,] O / g, C / g kh kw)
    return g.b.reshape(g.b.sum(each, 0), -1, per_group, kh, kw)


def _to_depthwise_weights(g: Backward, x: str, w: str, y: str, dy: str, window: _Window) -> str:
    """Return dw of a depthwise convolution: x convolved with dy as if dy were the weights.

    All samples of a channel are one tall image, below each other with the padding between them,
    so that one convolution with C groups sums over them; its kernel is as tall as all of dy.
    """
    channels, _, kh, kw = g.fixed(w)
    (sh, sw), (dh, dw) = window.strides, window.dilations
    top, left, bottom, right = window.pads
    height, width = g.size(y, 2), g.size(y, 3)
    rows = g.size(x, 2) + top + bottom
    # rows between two samples' first must be whole strides, or dy's rows would not meet x's
    more = -rows % sh
    tall = g.b.node("Pad", x, g.b.ints(0, 0, top, left, 0, 0, bottom + more, right))
    per_sample = (rows + more) // sh
    image = g.b.reshape(
        g.b.transpose(tall, 1, 0, 2, 3), 1, channels, -1, g.size(x, 3) + left + right
    )
    # the kernel's lower rows look beyond the last sample
    image = g.b.node("Pad", image, g.b.ints(0, 0, 0, 0, 0, 0, (kh - 1) * dh, 0))
    kernel = g.b.node("Pad", dy, g.b.ints(0, 0, 0, 0, 0, 0, per_sample - height, 0))
    kernel = g.b.reshape(g.b.transpose(kernel, 1, 0, 2, 3), channels, 1, -1, width)
    found = g.b.node("Conv", image, kernel, dilations=[sh, sw], strides=[dh, dw], group=channels)
    # (1, C, rows, columns): what is over is no place of the kernel
    found = g.b.node("Slice", found, g.b.ints(0, 0), g.b.ints(kh, kw), g.b.ints(2, 3))
    return g.b.reshape(found, channels, 1, kh, kw)


def _columns(g: Backward, x: str, y: str, window: _Window) -> str:
    """Return what each of the kernel's places sees: (N, C, kh kw, H'W')."""
    channels, places = g.size(x, 1), g.size(y, 2) * g.size(y, 3)
    kh, kw = window.kernel
    (sh, sw), (dh, dw) = window.strides, window.dilations
    if (kh, kw, sh, sw) == (1, 1, 1, 1) and not any(window.pads):
        return g.b.reshape(x, -1, channels, 1, places)
    top, left, bottom, right = window.pads
    padded = x
    if any(window.pads):
        padded = g.b.node("Pad", x, g.b.ints(0, 0, top, left, 0, 0, bottom, right))
    height, width = g.size(y, 2), g.size(y, 3)
    seen = []
    for i in range(kh):
        for j in range(kw):
            begin = g.b.ints(i * dh, j * dw)
            end = g.b.ints(i * dh + (height - 1) * sh + 1, j * dw + (width - 1) * sw + 1)
            part = g.b.node("Slice", padded, begin, end, g.b.ints(2, 3), g.b.ints(sh, sw))
            seen.append(g.b.reshape(part, -1, channels, 1, places))
    return g.b.node("Concat", *seen, axis=2) if len(seen) > 1 else seen[0]


def _max_pool(g: Backward, u: Unit, dy: str) -> None:
    """Give each window's gradient to the place that was its largest; the node can tell which."""
    x, node = u.inputs[0], u.node
    if attribute(node, "storage_order", 0):
        raise EdgetuneError("MaxPool with storage_order has no gradient yet")
    while len(node.output) < 2:
        node.output.append(g.b.fresh("places"))
    shape = g.b.node("Shape", x)
    zeros = g.b.reshape(g.b.node("Expand", g.b.constant([0.0]), shape), -1)
    flat = g.b.node(
        "ScatterElements", zeros, g.b.reshape(node.output[1], -1), g.b.reshape(dy, -1), axis=0,
        reduction="add",
    )  # fmt: skip
    g.give(x, g.b.node("Reshape", flat, shape))


def _average_pool(g: Backward, u: Unit, dy: str) -> None:
    """Spread each window's gradient evenly: a depthwise transposed convolution by 1 / (kh kw)."""
    x, y = u.inputs[0], u.outputs[0]
    kernel = tuple(attribute(u.node, "kernel_shape", ()))
    window = _window(u.node, kernel)
    if any(window.pads) and not attribute(u.node, "count_include_pad", 0):
        raise EdgetuneError("AveragePool that leaves padding out has no gradient yet")
    channels = g.size(x, 1)
    even = g.b.constant([[[[1 / math.prod(kernel)] * kernel[1]] * kernel[0]]] * channels)
    top, left, bottom, right = window.pads
    rest = [
        g.size(x, 2) + top + bottom - ((g.size(y, 2) - 1) * window.strides[0] + kernel[0]),
        g.size(x, 3) + left + right - ((g.size(y, 3) - 1) * window.strides[1] + kernel[1]),
    ]
    wide = _with_gaps(g, dy, y, *window.strides)
    pads = [
        kernel[0] - 1 - top, kernel[1] - 1 - left,
        kernel[0] - 1 - bottom + rest[0], kernel[1] - 1 - right + rest[1],
    ]  # fmt: skip
    g.give(x, g.b.node("Conv", wide, even, kernel_shape=list(kernel), pads=pads, group=channels))


ALL_RULES: dict[str, Rule] = {
    **RULES,
    "AveragePool": _average_pool,
    "Conv": _conv,
    "MaxPool": _max_pool,
}
