"""Frozen linear layers kept in 4 or 8 bits while adapters beside them train (QLoRA).

nf4 is bitsandbytes' own layer. int8 keeps bitsandbytes' codes and computes with what they
stand for: its own int8 layer rounds activations too, so that an adapter would be trained on
sums that no exported model makes.

Source: Dettmers et al. 2023 (QLoRA, arXiv:2305.14314).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError, MissingExtraError
from edgetune.models.families import Family, present


class Int8Linear(nn.Linear):
    """A frozen linear layer: weight = codes * scales, one scale per output.

    weight holds the int8 codes, shape (out, in); scales float32, shape (out, 1).
    """

    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        outputs, inputs = codes.shape
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        kept = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", kept)
        self.register_buffer("scales", scales)

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.T + bias; shapes (..., in) and (..., out)."""
        result: Tensor = _Int8Product.apply(input, self.weight, self.scales, self.bias)
        return result


class _Int8Product(torch.autograd.Function):
    """A linear map that keeps the codes, not the dequantized weight, for its gradient."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.dtype = values.dtype
        weight = (codes * scales).to(values.dtype)
        return functional.linear(values, weight, None if bias is None else bias.to(values.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scales = ctx.saved_tensors
        (grad,) = grads
        return (grad @ (codes * scales).to(grad.dtype)).to(ctx.dtype), None, None, None


def quantize_linears(network: nn.Module, family: Family, config: TrainConfig) -> None:
    """Replace the linear layers outside the head by quantized ones, in place.

    They are quantized on the CPU, whatever device trains: so their codes are the same wherever
    the run is opened again.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ConfigError: there is no such layer, or bitsandbytes cannot train it on this machine.
    """
    try:
        import bitsandbytes
    except ModuleNotFoundError as error:
        raise MissingExtraError("bitsandbytes", "qlora") from error

    kept = {m for _, top in present(network, family.head) for m in top.modules()}
    kept |= {m for parent in network.modules() if _reads_weights(parent) for m in parent.children()}
    # not subclasses: nn.MultiheadAttention reads the weight of its own kind of Linear itself
    found = [
        (path, module)
        for path, module in network.named_modules()
        if type(module) is nn.Linear and module not in kept
    ]
    if not found:
        raise ConfigError(
            f"method 'qlora': this {family.name} has no linear layer outside its head to"
            " quantize; use method lora"
        )
    make = _LAYERS[config.quant_type]
    try:
        if config.cpu or not torch.cuda.is_available():
            _try_to_train(make, config)
        layers = {path: make(module, config) for path, module in found}
    except (RuntimeError, NotImplementedError, AssertionError, ValueError, AttributeError) as error:
        other = " or quant_type int8" if config.quant_type == "nf4" else ""
        raise ConfigError(
            f"method 'qlora': bitsandbytes {bitsandbytes.__version__} cannot train"
            f" {config.quant_type} here ({str(error).splitlines()[0] if str(error) else error!r});"
            f" update it, or use method lora{other}, or a GPU"
        ) from error
    for path, layer in layers.items():
        network.set_submodule(path, layer)


def dequantized(module: nn.Module) -> nn.Linear | None:
    """Return the plain layer that computes what a quantized one does, or None for any other."""
    if isinstance(module, Int8Linear):
        return _plain(module.weight * module.scales, module.bias)
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None or not isinstance(module, nn.Linear):
        return None
    from bitsandbytes.functional import dequantize_4bit

    return _plain(dequantize_4bit(module.weight.data, state), module.bias)


def element_count(parameter: nn.Parameter) -> int:
    """Return how many numbers a parameter stands for: 4-bit ones lie two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def scale_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return what the codes of quantized layers need to be read, by name; {} where none is."""
    found: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        if isinstance(module, Int8Linear):
            found[f"{path}.scales"] = module.scales
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if state is not None:
            entries: dict[str, Tensor] = state.as_dict(packed=True)
            found.update({f"{path}.weight.{n}": t for n, t in entries.items()})
    return found


def _reads_weights(module: nn.Module) -> bool:
    """Return whether a module takes its linear layers' weights instead of calling the layers."""
    # torchvision's Swin
    return type(module).__name__.startswith("ShiftedWindowAttention")


def _nf4(linear: nn.Linear, config: TrainConfig) -> nn.Linear:
    import bitsandbytes as bnb

    layer: Any = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        # else the layer rounds its bias for good to the type of its first input
        compute_dtype=torch.float32,
        compress_statistics=config.double_quant,
        quant_type="nf4",
        device="meta",
    )
    weight = bnb.nn.Params4bit(
        linear.weight.detach().clone(),
        requires_grad=False,
        compress_statistics=config.double_quant,
        quant_type="nf4",
        module=layer,
    )
    layer.weight = weight.to("cpu")  # this quantizes
    layer.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), False)
    # else the first prediction on a CPU with AVX512-BF16 repacks the codes for good, and neither
    # a gradient nor a hash of them can be had afterwards
    layer.support_avx512bf16_for_cpu = False
    result: nn.Linear = layer
    return result


def _int8(linear: nn.Linear, config: TrainConfig) -> nn.Linear:  # noqa: ARG001
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, largest, _ = int8_vectorwise_quant(linear.weight.detach().to(torch.float16))
    scales = largest.float().reshape(-1, 1) / 127  # (out, 1)
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return Int8Linear(codes, scales, bias)


_LAYERS: dict[str, Callable[[nn.Linear, TrainConfig], nn.Linear]] = {"nf4": _nf4, "int8": _int8}


def _try_to_train(make: Callable[[nn.Linear, TrainConfig], nn.Linear], config: TrainConfig) -> None:
    """Run a small layer forward and backward, so that what fails fails before the run."""
    # not initialised: that would draw from the generator of the run
    linear = nn.Linear(64, 64, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.fill_(0.5)
    values = torch.ones(2, 64, requires_grad=True)
    torch.autograd.backward(make(linear, config)(values).sum())


def _plain(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer
