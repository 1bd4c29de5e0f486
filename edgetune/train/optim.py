"""Optimizer and schedule, by name."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from edgetune.config import TrainConfig
from edgetune.models.adapt import DEFAULT_LR


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer over the trainable parameters.

    Weight decay falls on matrices and kernels only, not on biases and norms.
    """
    trainable = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return _OPTIMIZERS[config.optimizer]([g for g in groups if g["params"]], config)


def learning_rate(config: TrainConfig) -> float:
    """Return the peak learning rate: the one given, or the method's own."""
    return config.lr if config.lr is not None else DEFAULT_LR[config.method]


def lr_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Return the share of the peak learning rate at `step` of `steps`: warm-up, then schedule."""
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return _SCHEDULES[config.schedule](min(1.0, progress))


def _adamw(groups: Iterable[dict[str, object]], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=learning_rate(config), fused=True)


def _sgd(groups: Iterable[dict[str, object]], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=learning_rate(config), momentum=config.momentum)


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw, "sgd": _sgd}

_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,  # noqa: ARG005
}
