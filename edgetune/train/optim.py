"""Optimizers by name, over groups of parameters that share a learning rate and a decay."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError, MissingExtraError
from edgetune.models.adapt import DEFAULT_LR

# where torch has an optimizer step in one kernel, for every float type
FUSED_DEVICES = ("cpu", "cuda")
# factors that peft keeps with two or more dimensions: decay would pull them to 0, off their 1
SCALES = ("ia3_l", "lora_magnitude_vector")

# default rates are Adam's: SGD, which does not normalise, takes larger steps, and Lion, whose
# every step is of size lr, smaller ones (Chen et al. 2023, section 5)
LR_SCALE = {"sgd": 10.0, "lion": 0.2}

_Groups: TypeAlias = list[dict[str, Any]]


def make_optimizer(
    network: nn.Module, config: TrainConfig, *, depths: Mapping[str, int] | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer over the parameters that have `requires_grad`.

    Weight decay falls on matrices and kernels only, not on biases, norms and scales. Groups
    come in the order of their depth, decaying before not decaying, parameters in the
    network's; so a saved state finds its parameters again. Each group keeps its peak rate as
    `initial_lr`, torch's name for it; see `set_lr`.

    Args:
        network: the network.
        config: optimizer, lr, momentum, nesterov, beta1, beta2, weight_decay, layer_decay.
        depths: how many blocks below the head each parameter's block lies, by name; a rate is
            lr * layer_decay ** depth (Howard & Ruder 2018, arXiv:1801.06146, section 3.2). Every
            trainable parameter has one; needed where layer_decay is below 1.

    Raises:
        ConfigError: nothing trains, a key does not fit the optimizer, or adamw_8bit is given
            a sharded network.
        MissingExtraError: adamw_8bit without bitsandbytes.
    """
    if config.nesterov and (config.optimizer != "sgd" or config.momentum == 0):
        raise ConfigError(
            "nesterov belongs to optimizer 'sgd' with momentum above 0, got"
            f" {config.optimizer!r} with momentum {config.momentum:g}"
        )
    if config.layer_decay < 1 and depths is None:
        raise ValueError("layer_decay needs depths")
    grouped: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            depth = depths[name] if depths is not None and config.layer_decay < 1 else 0
            stays = not _decays(name, parameter)
            grouped.setdefault((depth, stays), []).append(parameter)
    if not grouped:
        raise ConfigError(f"method {config.method!r} leaves nothing to train in this network")
    groups: _Groups = []
    for (depth, stays), parameters in sorted(grouped.items(), key=lambda item: item[0]):
        lr = learning_rate(config) * config.layer_decay**depth
        decay = 0.0 if stays else config.weight_decay
        groups.append({"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay})
    return _OPTIMIZERS[config.optimizer](groups, config)


def learning_rate(config: TrainConfig) -> float:
    """Return the peak learning rate: the one given, or the method's own for the optimizer."""
    if config.lr is not None:
        return config.lr
    return DEFAULT_LR[config.method] * LR_SCALE.get(config.optimizer, 1.0)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times its peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, with decoupled weight decay; one state a parameter.

    Source: Chen et al. 2023 (arXiv:2302.06675), algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """Set the defaults of groups that do not say otherwise.

        Args:
            params: parameters or groups of them.
            lr: learning rate; the paper's are 3 to 10 times lower than AdamW's.
            betas: share of the momentum in the update, and what the momentum keeps in a step.
            weight_decay: decay is lr * weight_decay a step; 3 to 10 times higher than AdamW's.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step and return the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            momenta = [self._momentum(p) for p in parameters]
            mix, keep = group["betas"]
            updates = torch._foreach_lerp(momenta, gradients, 1 - mix)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - keep)
        return loss

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        momentum: Tensor = state["exp_avg"]
        return momentum


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and not any(scale in name for scale in SCALES)


def _fused(groups: _Groups) -> bool | None:
    """Return True where torch has the fused kernel, else None: torch's own choice, foreach."""
    parameters = [p for group in groups for p in group["params"]]
    served = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
    return True if served else None


def _sharded(groups: _Groups) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for group in groups for p in group["params"])


def _adamw(groups: _Groups, config: TrainConfig) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, betas=betas, fused=_fused(groups))


def _adam(groups: _Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam with its decay in the gradient (Kingma & Ba 2015; L2, unlike AdamW's)."""
    betas = (config.beta1, config.beta2)
    return torch.optim.Adam(groups, betas=betas, fused=_fused(groups))


def _sgd(groups: _Groups, config: TrainConfig) -> torch.optim.Optimizer:
    # torch's fused SGD does not know sharded parameters, unlike its Adam
    fused = None if _sharded(groups) else _fused(groups)
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, fused=fused)


def _lion(groups: _Groups, config: TrainConfig) -> torch.optim.Optimizer:
    return Lion(
        groups,
        lr=learning_rate(config),
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def _adamw_8bit(groups: _Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW whose state is kept in 8 bits by blocks (Dettmers et al. 2022, arXiv:2110.02861)."""
    if _sharded(groups):
        raise ConfigError(
            "optimizer 'adamw_8bit' cannot train a sharded model; use adamw, or sharding off"
        )
    optimizer: torch.optim.Optimizer = _adamw_8bit_class()(
        groups, betas=(config.beta1, config.beta2)
    )
    return optimizer


@functools.cache
def _adamw_8bit_class() -> Any:
    """Return bitsandbytes' optimizer, its state as flat tensors that share no memory.

    As it comes, the state of a parameter holds a dictionary within a dictionary, code tables
    that all parameters share, and a number that has to be a Python int. The tables are
    constants, so they are left out and put back.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "qlora") from error
    tables = {"qmap1": "dynamic", "qmap2": "udynamic"}

    class FlatAdamW8bit(AdamW8bit):  # type: ignore[misc]
        def state_dict(self) -> dict[str, Any]:
            saved = torch.optim.Optimizer.state_dict(self)
            states = {
                index: {name: value for name, value in state.items() if name not in tables}
                for index, state in saved["state"].items()
            }
            return {**saved, "state": states}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            states = {
                index: {**state, "step": int(state["step"])} if "step" in state else state
                for index, state in state_dict["state"].items()
            }
            super().load_state_dict({**state_dict, "state": states})
            for parameter, state in self.state.items():
                for name, table in tables.items():
                    if state["state1"].dtype == torch.uint8:
                        state[name] = self.name2qmap[table].to(parameter.device)

    return FlatAdamW8bit


_OPTIMIZERS: dict[str, Callable[[_Groups, TrainConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "lion": _lion,
    "adamw_8bit": _adamw_8bit,
}
