"""Adapters beside frozen weights, by peft: LoRA and its kin, (IA)^3; and folding them in."""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError
from edgetune.models.families import Family, blocks
from edgetune.models.quantized import dequantized, quantize_linears
from edgetune.models.stages import forget_trained

# AdaLoRA: the share of a run before ranks are taken away, and after; its authors' script for
# SST-2 has 6,000 and 22,000 of 50,500 steps, that for RTE 600 and 1,800 of 3,900
INITIAL_SHARE = 1 / 10
FINAL_SHARE = 1 / 2
# how often ranks would be allotted if that went on for the whole run; SST-2: every 100 steps
ALLOCATIONS = 500
# below, ranks would be judged by gradients of the very first step, which are zero for most
MIN_STEPS = 3
_ALLOCATION = "_edgetune_allocation"
_ADAPTER = "default"


def inject_lora(
    network: nn.Module,
    family: Family,
    config: TrainConfig,
    *,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> None:
    """Put LoRA beside the family's target layers, in place.

    Args:
        network: frozen.
        family: its row.
        config: rank, alpha, dropout, targets.
        use_dora: learn direction and magnitude apart (Liu et al. 2024, arXiv:2402.09353).
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).

    Raises:
        ConfigError: the targets name no layer of the network that can be adapted.
    """
    from peft import LoraConfig

    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_lora_targets(family, config),
        use_dora=use_dora,
        use_rslora=use_rslora,
        fan_in_fan_out=_has_conv1d(network),
    )
    _inject(network, settings)


def inject_qlora(network: nn.Module, family: Family, config: TrainConfig) -> None:
    """Quantize the frozen linear layers outside the head, then put LoRA beside the targets.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ConfigError: as `inject_lora` and `quantize_linears`.
    """
    quantize_linears(network, family, config)
    inject_lora(network, family, config)


def inject_adalora(network: nn.Module, family: Family, config: TrainConfig) -> None:
    """Put AdaLoRA beside the target layers: `lora_r` is the mean rank that it ends with.

    The loop calls `after_step` and adds `regularization`.

    Source: Zhang et al. 2023 (AdaLoRA, arXiv:2303.10512).

    Raises:
        ConfigError: the targets name no layer of the network that can be adapted.
    """
    from peft import AdaLoraConfig

    settings = AdaLoraConfig(
        init_r=-(-3 * config.lora_r // 2),  # peft's ratio of 12 to 8
        target_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_lora_targets(family, config),
        fan_in_fan_out=_has_conv1d(network),
        total_step=1,  # peft wants one; `after_step` knows it
    )
    _inject(network, settings)
    setattr(network, _ALLOCATION, _Allocation(network, settings))


def inject_ia3(network: nn.Module, family: Family, config: TrainConfig) -> None:
    """Put (IA)^3's factors on keys, values and the feed-forward's hidden width, in place.

    Where the family's row does not name keys and values, or `lora_targets` names layers, the
    factors are on the outputs of the LoRA targets; a layer out of the feed-forward's hidden
    width has them on its input wherever it is adapted.

    Source: Liu et al. 2022 ((IA)^3, arXiv:2205.05638), section 3.3.

    Raises:
        ConfigError: the targets name no layer of the network that can be adapted.
    """
    from peft import IA3Config

    targets, hidden = _ia3_targets(network, family, config)
    _inject(network, IA3Config(target_modules=targets, feedforward_modules=hidden))


def merge_adapters(network: nn.Module) -> None:
    """Fold adapters into the weights they adapt, in place; what is left are plain torch layers.

    Quantized layers are left as the weights that their codes stand for.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            plain = dequantized(layer.get_base_layer())
            if plain is not None:
                layer.base_layer = plain
            with torch.no_grad():
                layer.merge(safe_merge=True)
            network.set_submodule(name, layer.get_base_layer())
    for name, module in list(network.named_modules()):
        plain = dequantized(module)
        if plain is not None:
            network.set_submodule(name, plain)
    for attribute in ("peft_config", _ALLOCATION):
        network.__dict__.pop(attribute, None)
    forget_trained(network)


def merge_difference(network: nn.Module, call: Callable[[nn.Module], Tensor]) -> float:
    """Return the largest difference that merging makes to an answer.

    Args:
        network: with adapters; left as it is.
        call: returns the logits of a network for some batch.
    """
    training = {path: module.training for path, module in network.named_modules()}
    merged = copy.deepcopy(network)
    merge_adapters(merged)
    with torch.no_grad():
        difference = call(network.eval()) - call(merged.eval())
    for path, module in network.named_modules():
        module.training = training[path]
    return float(difference.abs().max())


def after_step(network: nn.Module, step: int, steps: int) -> None:
    """AdaLoRA: score the singular values by their gradients and clear those over the budget.

    Called after each update, while its gradients are still there, on a network that neither DDP
    nor FSDP wraps; not after an update that was skipped because its gradients were not finite.
    Other methods: nothing.

    Args:
        network: after `adapt`.
        step: the update's number, from 0.
        steps: how many there will be.

    Raises:
        ConfigError: there are too few steps to allot ranks in.
    """
    allocation: _Allocation | None = network.__dict__.get(_ALLOCATION)
    if allocation is not None:
        allocation.update(network, step, steps)


def regularization(network: nn.Module) -> Tensor | None:
    """AdaLoRA: return what to add to the loss, which keeps its factors near orthogonal.

    Half the mean of ||P^T P - I|| and ||Q Q^T - I|| over all adapters: as peft, which takes
    norms where the paper (Zhang et al. 2023) takes their squares. None with other methods.
    """
    allocation: _Allocation | None = network.__dict__.get(_ALLOCATION)
    return None if allocation is None else allocation.regularization(network)


def method_state(network: nn.Module) -> dict[str, Tensor]:
    """Return what a method remembers besides weights; {} for all but AdaLoRA."""
    allocation: _Allocation | None = network.__dict__.get(_ALLOCATION)
    return {} if allocation is None else allocation.state()


def load_method_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put `method_state` back.

    Raises:
        ConfigError: it is of another method or network.
    """
    allocation: _Allocation | None = network.__dict__.get(_ALLOCATION)
    if allocation is not None:
        allocation.load(network, state)
    elif state:
        raise ConfigError(f"the saved state is of another method: it has {min(state)}")


class _Allocation:
    """AdaLoRA's importance scores and, once they are settled, which ranks are kept."""

    def __init__(self, network: nn.Module, settings: Any) -> None:
        from peft.tuners.adalora import RankAllocator

        self.settings = settings
        self.allocator: Any = RankAllocator(network, settings, _ADAPTER)
        # by name of a layer's singular values; shape (r, 1), true where one is kept
        self.masks: dict[str, Tensor] = {}

    def update(self, network: nn.Module, step: int, steps: int) -> None:
        """Do what peft's AdaLoraModel.update_and_allocate does at `step`."""
        if steps < MIN_STEPS:
            raise ConfigError(
                f"method 'adalora' needs {MIN_STEPS} steps or more to allot its ranks, got"
                f" {steps}; train for more epochs or in smaller batches, or use method lora"
            )
        if self.masks:
            with torch.no_grad():
                for name, kept in self.masks.items():
                    values = network.get_parameter(name)
                    self.masks[name] = kept = kept.to(values.device)
                    values.masked_fill_(~kept, 0.0)
            return
        self.settings.total_step = steps
        self.settings.tinit = int(steps * INITIAL_SHARE)
        self.settings.tfinal = int(steps * FINAL_SHARE)
        self.settings.deltaT = max(1, steps // ALLOCATIONS)
        # not only at the very step: the number of steps may have fallen since the last one
        settled = step >= steps - self.settings.tfinal
        _, pattern = self.allocator.update_and_allocate(network, step, force_mask=settled)
        if settled:
            self.masks = {n: torch.tensor(kept).reshape(-1, 1) for n, kept in pattern.items()}
            self.allocator.reset_ipt()

    def regularization(self, network: nn.Module) -> Tensor:
        norms = []
        for name in self.allocator.name_set:
            right = network.get_parameter(name % "lora_A")  # (r, in)
            left = network.get_parameter(name % "lora_B")  # (out, r)
            for gram in (right @ right.T, left.T @ left):
                unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
                norms.append(torch.linalg.matrix_norm(gram - unit))
        weighted: Tensor = self.settings.orth_reg_weight * torch.stack(norms).mean()
        return weighted

    def state(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{name}": tensor.detach()
            for kind, tensors in self._parts().items()
            for name, tensor in tensors.items()
        }

    def load(self, network: nn.Module, state: Mapping[str, Tensor]) -> None:
        self.allocator.reset_ipt()
        self.masks = {}
        parts = self._parts()
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            parameter = dict(network.named_parameters()).get(name)
            if kind not in parts or parameter is None or parameter.shape != tensor.shape:
                raise ConfigError(f"the saved state does not fit the model: {key}")
            parts[kind][name] = tensor.detach().to(parameter.device, copy=True)
        # the latest importance is only read after it is computed anew; peft asks for its key
        for name, tensor in self.allocator.exp_avg_ipt.items():
            self.allocator.ipt[name] = torch.zeros_like(tensor)

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        return {
            "importance": self.allocator.exp_avg_ipt,
            "uncertainty": self.allocator.exp_avg_unc,
            "kept": self.masks,
        }


def _inject(network: nn.Module, settings: Any) -> None:
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(settings, network)
    except ValueError as error:
        raise ConfigError(f"lora_targets: {str(error).splitlines()[0]}") from error
    _keep_geometry(network)


def _has_conv1d(network: nn.Module) -> bool:
    """Return whether linear layers keep their weights (in, out), as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in network.modules())


def _lora_targets(family: Family, config: TrainConfig) -> str | list[str]:
    return list(config.lora_targets or family.lora) or family.lora_regex


def _ia3_targets(
    network: nn.Module, family: Family, config: TrainConfig
) -> tuple[str | list[str], list[str]]:
    """Return (targets, those of them that scale their input) by full module path."""
    modules = {path for path, _ in network.named_modules()}
    tops = [path for path, _ in blocks(network, family)]
    # the rows: into and out of the hidden width; query, key, value, output
    out_of_hidden = {f"{top}.{path}" for top in tops for path in family.ffn[1:2]} & modules
    keys_values = family.attention[1:3] if len(family.attention) == 4 else ()
    found = {f"{top}.{path}" for top in tops for path in keys_values} & modules
    wanted = _lora_targets(family, config)
    if config.lora_targets or not found:
        found = {path for path in modules if _is_target(path, wanted)}
    if not found:
        return wanted, []  # peft says what is wrong
    if not config.lora_targets:
        found |= out_of_hidden
    return sorted(found), sorted(found & out_of_hidden)


def _is_target(path: str, wanted: str | list[str]) -> bool:
    """Return whether peft takes `path` for one of the wanted."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted)


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
