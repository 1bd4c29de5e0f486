"""Quantization-aware training: a network that computes in float on values that codes can hold.

`prepare` puts fake quantization (quantize, then dequantize; Jacob et al. 2018,
arXiv:1712.05877, section 3.1) on weights and inputs of every Conv2d and Linear; gradients pass
straight through the rounding (Bengio et al. 2013, arXiv:1308.3432). `finish` takes it off again and
leaves the trained float weights, for the exporter and the quantizer as they are.

Weights get one scale per output channel. A BatchNorm behind a convolution multiplies each
channel by a number, and so does folding it in: symmetric codes are the same before and after.
Those of a range of its own ("u8") are too where that number is positive; where it is negative
they mirror, and differ by a rounding. BatchNorm must keep its statistics while training, as the
graph has them folded in; `distill` sees to that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgetune.errors import ConfigError

# code -> largest code of a symmetric range; u8 has a range of its own
_LARGEST = {"s8": 127, "s7": 63}
# a channel of zeros still needs a scale
_SMALLEST_SCALE = 1e-8
# share of the newest batch in a static range: torch's MovingAverageMinMaxObserver's
EMA = 0.01

_INPUT = "fake_quant_input"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What is quantized, and what trains.

    weights: codes per output channel: "s8" is symmetric in -127..127, "s7" in -63..63, "u8" has
        each channel's own range, 0 in it. A quantizer's u8 codes of symmetric values are "s8".
    inputs: u8 codes per tensor: "static" has a range that follows the training batches,
        "dynamic" each sample's own (a device's batch is one sample), "float" none.
    trainable: "all" parameters, or "lora": a low-rank change of each quantized weight.
    rank, alpha: of "lora"; the change is alpha / rank * B A (Hu et al. 2021, arXiv:2106.09685).
    exclude: names of modules that stay float.
    seed: of A; B starts at zero.
    """

    weights: Literal["s8", "s7", "u8"]
    inputs: Literal["static", "dynamic", "float"]
    trainable: Literal["all", "lora"] = "all"
    rank: int = 8
    alpha: float = 16.0
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the rank.

        Raises:
            ConfigError: it is below 1.
        """
        if self.rank < 1:
            raise ConfigError(f"rank: expected at least 1, got {self.rank}")


def prepare(network: nn.Module, scheme: Scheme) -> None:
    """Put fake quantization on every Conv2d and Linear of `network`, in place.

    `requires_grad` is set on every parameter as the scheme says. A static range is empty, and its
    input passes as it is, until a batch went through in training mode or in `observing`.

    Raises:
        ConfigError: the network is prepared already, or `exclude` names no such module.
    """
    if is_prepared(network):
        raise ConfigError("the network is prepared already; call finish first")
    layers = _layers(network)
    unknown = sorted(set(scheme.exclude) - layers.keys())
    if unknown:
        raise ConfigError(f"exclude: {unknown[0]!r} is no Conv2d or Linear of the network")
    network.requires_grad_(scheme.trainable == "all")
    generator = torch.Generator().manual_seed(scheme.seed)
    for name, layer in layers.items():
        if name in scheme.exclude:
            continue
        if scheme.trainable == "lora":
            change = _LowRank(layer.weight, scheme.rank, scheme.alpha, generator)
            parametrize.register_parametrization(layer, "weight", change)
        parametrize.register_parametrization(layer, "weight", _FakeQuantWeight(scheme.weights))
        if scheme.inputs != "float":
            kind = _StaticInput if scheme.inputs == "static" else _DynamicInput
            layer.add_module(_INPUT, kind().to(layer.weight.device))
            # first in line, though nothing else is expected there
            layer.register_forward_pre_hook(_fake_quantize_input, prepend=True)


def finish(network: nn.Module) -> None:
    """Take fake quantization off, in place: float weights as trained, LoRA merged, none training.

    A network that isn't prepared stays as it is, but for `requires_grad`.
    """
    for layer in _layers(network).values():
        if parametrize.is_parametrized(layer, "weight"):
            stages: Any = layer.parametrizations
            with torch.no_grad():
                weight = stages.weight.original
                for stage in stages.weight:
                    if isinstance(stage, _LowRank):
                        weight = stage(weight)
                weight = weight.clone()
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            layer.weight.data.copy_(weight)
            # behind the weight again, as it was made: state dicts and optimizers go by the order
            layer._parameters["bias"] = layer._parameters.pop("bias")
        if hasattr(layer, _INPUT):
            delattr(layer, _INPUT)
            for key, hook in list(layer._forward_pre_hooks.items()):
                if hook is _fake_quantize_input:
                    del layer._forward_pre_hooks[key]
    network.requires_grad_(False)


def is_prepared(network: nn.Module) -> bool:
    """Return whether `network` has fake quantization in it."""
    return any(isinstance(m, _FakeQuantWeight) for m in network.modules())


@contextmanager
def observing(network: nn.Module) -> Iterator[None]:
    """Let static ranges follow what passes, though the network is in eval mode."""
    ranges = [m for m in network.modules() if isinstance(m, _StaticInput)]
    for module in ranges:
        module.observing = True
    try:
        yield
    finally:
        for module in ranges:
            module.observing = False


def has_static_ranges(network: nn.Module) -> bool:
    """Return whether batches must pass through `network`, `observing`, before it is itself."""
    return any(isinstance(m, _StaticInput) for m in network.modules())


def fake_quantize_weight(weight: Tensor, codes: Literal["s8", "s7", "u8"]) -> Tensor:
    """Return the weight (channels, ...) as its codes would give it back, one scale per channel.

    The gradient is that of the identity, but nothing where a code was clipped.
    """
    rows = weight.detach().flatten(1)
    if codes == "u8":
        scale, zero_point = _range_codes(rows.amin(1), rows.amax(1))
        low, high = 0, 255
    else:
        high = _LARGEST[codes]
        low = -high
        scale = (rows.abs().amax(1) / high).clamp_min(_SMALLEST_SCALE)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, low, high)


def _range_codes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and int32 zero points of u8 codes over ranges, widened to hold 0."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / 255).clamp_min(_SMALLEST_SCALE)
    return scale, (-low / scale).round().clamp(0, 255).to(torch.int32)


class _FakeQuantWeight(nn.Module):
    def __init__(self, codes: Literal["s8", "s7", "u8"]) -> None:
        super().__init__()
        self.codes: Literal["s8", "s7", "u8"] = codes

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize_weight(weight, self.codes)


class _LowRank(nn.Module):
    """W -> W + alpha / rank * B A, W taken as a matrix (channels, rest)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        size = min(rank, rows, columns)  # a depthwise kernel has but nine columns
        start = torch.empty(size, columns).uniform_(generator=generator)
        bound = columns**-0.5  # as torch's Linear and LoRA's A begin: Kaiming, a = sqrt(5)
        self.a = nn.Parameter(((2 * start - 1) * bound).to(weight.device))  # (rank, columns)
        self.b = nn.Parameter(torch.zeros(rows, size, device=weight.device))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a).view_as(weight)


class _StaticInput(nn.Module):
    """Codes over a range that follows the batches: an exponential mean of their extremes."""

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.observing = False
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.observing:
            with torch.no_grad():
                low, high = torch.aminmax(x.detach().float())
                share = torch.where(self.seen, EMA, 1.0)
                self.low += share * (low - self.low)
                self.high += share * (high - self.high)
                self.seen.fill_(True)
        scale, zero_point = _range_codes(self.low, self.high)
        coded = torch.fake_quantize_per_tensor_affine(x.float(), scale, zero_point, 0, 255)
        return torch.where(self.seen, coded, x.float()).to(x.dtype)


class _DynamicInput(nn.Module):
    """Codes over each sample's own range."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.detach().float().flatten(1)
        scale, zero_point = _range_codes(rows.amin(1), rows.amax(1))
        coded = torch.fake_quantize_per_channel_affine(x.float(), scale, zero_point, 0, 0, 255)
        return coded.to(x.dtype)


def _fake_quantize_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.get_submodule(_INPUT)(inputs[0]), *inputs[1:])


def _layers(network: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
