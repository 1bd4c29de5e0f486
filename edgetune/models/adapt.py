"""Which tensors train: the methods full, head, freeze and lora, one row each."""

import fnmatch
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError
from edgetune.models.families import Family, blocks, present

# peak learning rate where none is given: what each method is usually trained with
DEFAULT_LR = {"full": 5e-5, "head": 1e-3, "freeze": 5e-4, "lora": 1e-3}


def adapt(network: nn.Module, family: Family, config: TrainConfig) -> None:
    """Set `requires_grad` on the network's parameters (and inject LoRA), in place.

    Raises:
        ConfigError: a pattern or a LoRA target names no part of this network, or there are
            fewer blocks than asked for.
    """
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    _METHODS[config.method](network, family, config)
    for _, module in present(network, family.head):
        module.requires_grad_(True)


def merge_adapters(network: nn.Module) -> None:
    """Fold LoRA into the weights it adapts and take its layers out, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            layer.merge(safe_merge=True)
            network.set_submodule(name, layer.get_base_layer())


def set_train_mode(network: nn.Module) -> None:
    """Put the network in training mode, but leave frozen BatchNorm with its statistics."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not _trains(module):
            module.eval()


def trainable_state(network: nn.Module) -> dict[str, Tensor]:
    """Return what training changes: trainable parameters, and buffers of modules that have any."""
    state = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
    for prefix, module in network.named_modules():
        if _trains(module):
            dot = f"{prefix}." if prefix else ""
            state.update({dot + n: b for n, b in module.named_buffers(recurse=False)})
    return state


def load_trainable(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Put `trainable_state` back.

    Raises:
        ConfigError: the names or shapes are not those of this network.
    """
    current = trainable_state(network)
    if current.keys() != state.keys():
        odd = sorted(current.keys() ^ state.keys())[:3]
        raise ConfigError(f"the saved weights do not fit the model: {', '.join(odd)}")
    with torch.no_grad():
        for name, tensor in current.items():
            if tensor.shape != state[name].shape:
                raise ConfigError(
                    f"the saved weights do not fit the model: {name}: expected shape"
                    f" {tuple(tensor.shape)}, got {tuple(state[name].shape)}"
                )
            tensor.copy_(state[name])


def frozen_sha256(network: nn.Module) -> str:
    """Return the SHA-256 over names and values of the frozen parameters.

    A run stores only what it trained; this shows later that the base it is put back on is
    the one it was trained on.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(network.named_parameters()):
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def parameter_counts(network: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def _full(network: nn.Module, family: Family, config: TrainConfig) -> None:  # noqa: ARG001
    network.requires_grad_(True)


def _head(network: nn.Module, family: Family, config: TrainConfig) -> None:
    """Train nothing but the head, which `adapt` frees for every method."""


def _freeze(network: nn.Module, family: Family, config: TrainConfig) -> None:
    if config.last_blocks is not None:
        found = blocks(network, family)
        if config.last_blocks > len(found):
            raise ConfigError(
                f"last_blocks: this {family.name} has {len(found)} blocks, got {config.last_blocks}"
            )
        for _, module in found[-config.last_blocks :]:
            module.requires_grad_(True)
        for _, module in present(network, family.tail):
            module.requires_grad_(True)
    names = [n for n, _ in network.named_parameters()]
    for pattern in config.train_patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ConfigError(
                f"train_patterns: {pattern!r} matches no parameter; they are named like"
                f" {names[0]}, {names[len(names) // 2]}, {names[-1]}"
            )
        for name in matching:
            network.get_parameter(name).requires_grad_(True)


def _lora(network: nn.Module, family: Family, config: TrainConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    targets: str | list[str] = list(config.lora_targets or family.lora) or family.lora_regex
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
    )
    try:
        inject_adapter_in_model(settings, network)
    except ValueError as error:
        raise ConfigError(f"lora_targets: {str(error).splitlines()[0]}") from error
    _keep_geometry(network)


def _keep_geometry(network: nn.Module) -> None:
    """Let an adapted convolution still say its stride and kernel.

    transformers' MobileNets read them off the layer to pad as TensorFlow does; peft's wrapper
    does not pass them on.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            wrapped: Any = module
            base = wrapped.get_base_layer()
            if isinstance(base, nn.Conv2d):
                for name in ("stride", "kernel_size", "padding", "dilation", "groups"):
                    if not hasattr(wrapped, name):
                        setattr(wrapped, name, getattr(base, name))


_METHODS: dict[str, Callable[[nn.Module, Family, TrainConfig], None]] = {
    "full": _full,
    "head": _head,
    "freeze": _freeze,
    "lora": _lora,
}


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))
