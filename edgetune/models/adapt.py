"""Which tensors train: the methods, one row each; what a run stores of them.

This is the entry; adapters, quantized layers and stages have modules of their own.
"""

import fnmatch
import functools
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError
from edgetune.models.adapters import (
    after_step,
    inject_adalora,
    inject_ia3,
    inject_lora,
    inject_qlora,
    load_method_state,
    merge_adapters,
    merge_difference,
    method_state,
    regularization,
)
from edgetune.models.families import Family, blocks, present
from edgetune.models.quantized import element_count, scale_tensors
from edgetune.models.stages import (
    activate,
    frozen_prefix,
    layer_depths,
    own_parameters,
    record_trained,
    set_train_mode,
    trained_parameters,
    unfrozen_parameters,
)

__all__ = [
    "DEFAULT_LR",
    "activate",
    "adapt",
    "after_step",
    "frozen_prefix",
    "frozen_sha256",
    "layer_depths",
    "load_method_state",
    "load_trainable",
    "merge_adapters",
    "merge_difference",
    "method_state",
    "parameter_counts",
    "regularization",
    "set_train_mode",
    "trainable_state",
    "trained_parameters",
    "unfrozen_parameters",
]

# peak learning rate where none is given: what each method is usually trained with
DEFAULT_LR = {
    "full": 5e-5,
    "head": 1e-3,
    "freeze": 5e-4,
    "lora": 1e-3,
    "dora": 1e-3,
    "rslora": 5e-4,  # its scale is larger, by sqrt(r)
    "adalora": 1e-3,
    "ia3": 3e-3,
    "bitfit": 1e-3,
    "norm": 1e-3,
    "qlora": 1e-3,
}


def adapt(network: nn.Module, family: Family, config: TrainConfig) -> None:
    """Set `requires_grad` on the network's parameters (and inject adapters), in place.

    The head trains with every method.

    Raises:
        ConfigError: a pattern or a target names no part of this network, there are fewer blocks
            than asked for, or the network has nothing that the method trains.
        MissingExtraError: qlora without bitsandbytes.
    """
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    _METHODS[config.method](network, family, config)
    for _, module in present(network, family.head):
        module.requires_grad_(True)
    record_trained(network)


def trainable_state(network: nn.Module) -> dict[str, Tensor]:
    """Return what training ever changes: parameters, and buffers of modules that have such.

    Also while gradual unfreezing still keeps some of them frozen.
    """
    trained = trained_parameters(network)
    state = {n: p.detach() for n, p in network.named_parameters() if n in trained}
    for path, own in own_parameters(network).items():
        if trained.intersection(own):
            dot = f"{path}." if path else ""
            buffers = network.get_submodule(path).named_buffers(recurse=False)
            state.update({dot + n: b for n, b in buffers})
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
    """Return the SHA-256 over names and values of the parameters that never train.

    Of quantized ones, over their codes and scales. A run stores only what it trained; this shows
    later that the base it is put back on is the one it was trained on.
    """
    trained = trained_parameters(network)
    frozen = {n: p.detach() for n, p in network.named_parameters() if n not in trained}
    digest = hashlib.sha256()
    for name, tensor in sorted((frozen | scale_tensors(network)).items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parameter_counts(network: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters; 4-bit ones count as what they stand for."""
    trained = trained_parameters(network)
    sizes = [(element_count(p), n in trained) for n, p in network.named_parameters()]
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


def _bitfit(network: nn.Module, family: Family, config: TrainConfig) -> None:  # noqa: ARG001
    """Train the biases. Source: Ben Zaken et al. 2021 (BitFit, arXiv:2106.10199)."""
    found = [p for n, p in network.named_parameters() if n.endswith("bias")]
    if not found:
        raise ConfigError(f"method 'bitfit': this {family.name} has no bias; use method lora")
    for parameter in found:
        parameter.requires_grad_(True)


def _norm(network: nn.Module, family: Family, config: TrainConfig) -> None:  # noqa: ARG001
    """Train scale and shift of the normalisations."""
    found = [
        parameter
        for module in network.modules()
        if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm")
        for parameter in module.parameters(recurse=False)
    ]
    if not found:
        raise ConfigError(
            f"method 'norm': this {family.name} has no normalisation that trains; use method lora"
        )
    for parameter in found:
        parameter.requires_grad_(True)


_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)

_METHODS: dict[str, Callable[[nn.Module, Family, TrainConfig], None]] = {
    "full": _full,
    "head": _head,
    "freeze": _freeze,
    "lora": inject_lora,
    "dora": functools.partial(inject_lora, use_dora=True),
    "rslora": functools.partial(inject_lora, use_rslora=True),
    "adalora": inject_adalora,
    "ia3": inject_ia3,
    "bitfit": _bitfit,
    "norm": _norm,
    "qlora": inject_qlora,
}
