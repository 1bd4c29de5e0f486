"""One optimizer step, for every task, method, precision and number of processes.

Every random choice is a function of the seed, the epoch, the batch and the process, so that
nothing of it needs saving. Nothing is fetched from the device within a step.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError
from edgetune.models.adapt import (
    activate,
    after_step,
    frozen_prefix,
    layer_depths,
    load_method_state,
    load_trainable,
    method_state,
    regularization,
    set_train_mode,
    trainable_state,
    trained_parameters,
    unfrozen_parameters,
)
from edgetune.models.families import Family
from edgetune.tasks import TaskModel
from edgetune.train.activations import KEY, Cut
from edgetune.train.checkpoint import (
    Tensors,
    like,
    optimizer_tensors,
    restore_optimizer,
    whole,
)
from edgetune.train.dropout import Masks, use_fast_dropout
from edgetune.train.ema import Ema
from edgetune.train.feeding import Batch
from edgetune.train.folding import fold_frozen_norms
from edgetune.train.losses import Loss, make_loss
from edgetune.train.machine import Machine
from edgetune.train.mix import mix
from edgetune.train.optim import make_optimizer, set_lr
from edgetune.train.sharding import reshard, shard, wants_sharding

# networks with at least so many convolutions compute with the channels last: kernels of CPUs
# and of GPUs with tensor cores want them so
CONVOLUTIONS = 4


class Engine:
    """A network with what trains it."""

    def __init__(
        self, config: TrainConfig, task: TaskModel, family: Family, machine: Machine,
        class_counts: list[int], samples: int | None = None,
    ) -> None:  # fmt: skip
        """Put the network on its device and make optimizer, loss and average for it.

        `class_counts`: training samples of each label; `samples`: of all, where a sample may have
        several labels or none.
        """
        self.config, self.task, self.machine = config, task, machine
        self.plain: nn.Module = task.network
        self.family = family
        self._trains = trained_parameters(self.plain)
        if not self._trains:
            raise ConfigError(f"method {config.method!r} leaves nothing to train in this network")
        self.prefix = frozen_prefix(self.plain, family, self._trains)
        self.masks: Masks | None = None
        if machine.device.type == "cpu":
            self.masks = use_fast_dropout(self.plain)
        depths = layer_depths(self.plain, family) if config.layer_decay < 1 else None
        self.sharded = wants_sharding(config, self.plain, machine)
        if self.sharded:
            shard(self.plain, family, machine)
            self.network: nn.Module = self.plain
            self.optimizer = make_optimizer(self.plain, config, depths=depths)
            self._wrapped = self.optimizer
        else:
            self.plain.to(machine.device)
            self.optimizer = make_optimizer(self.plain, config, depths=depths)
            with warnings.catch_warnings():
                # its successor from torch 2.13 on is none of accelerate's words yet
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
                prepared = machine.accelerator.prepare(self.plain, self.optimizer)
            self.network, self._wrapped = prepared
        self.loss: Loss = make_loss(
            config, target=task.target, class_counts=class_counts, samples=samples
        ).to(machine.device)
        self.ema = Ema(self.plain, config.ema_decay) if config.ema_decay else None
        self.cut: Cut | None = None
        convolutions = sum(isinstance(m, nn.Conv2d) for m in self.plain.modules())
        self._channels_last = convolutions >= CONVOLUTIONS and not self.sharded
        if self._channels_last:
            self.plain.to(memory_format=torch.channels_last)
        self._active: frozenset[str] = frozenset()
        self._parameters: list[nn.Parameter] = []
        self._weights = torch.zeros((), device=machine.device)
        self._rows = 0

    # -- modes -----------------------------------------------------------------------------

    def train_mode(self, epoch: int) -> None:
        """Free what `epoch` trains; frozen layers below it run without dropout."""
        active = self._trains
        if self.config.unfreeze_every:
            active = frozenset(unfrozen_parameters(self.plain, self.family, self.config, epoch))
        if active != self._active:
            self._active = active
            if self.machine.processes == 1:
                activate(self.plain, active)  # several wait for each other's gradients, of all
            self._parameters = [p for n, p in self.plain.named_parameters() if n in active]
        prefix = frozen_prefix(self.plain, self.family, self._active)
        set_train_mode(self.plain, prefix, self._active)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the network is the one that is measured and kept: averaged, no dropout."""
        self.share_statistics()
        with self.ema.applied() if self.ema else nullcontext():
            self.network.eval()
            yield

    def share_statistics(self) -> None:
        """Give all processes the mean of their running statistics; all of them call it.

        Each has those of its own rows. Means are linear, as what moves the statistics is, so it
        matters nothing how often this happens.
        """
        if self.machine.processes == 1:
            return
        names = {n for n, _ in self.plain.named_buffers()}
        kept = [t for n, t in trainable_state(self.plain).items() if n in names]
        if self.ema is not None:
            kept += [t for n, t in self.ema.state().items() if n in names]
        floats = [t for t in kept if t.is_floating_point()]
        if floats:
            flat = self.machine.sum(torch.cat([t.flatten().double() for t in floats]))
            means = torch.split(flat / self.machine.processes, [t.numel() for t in floats])
            for tensor, mean in zip(floats, means, strict=True):
                tensor.copy_(mean.view_as(tensor))

    def fold(self, batch: Batch) -> int:
        """Fold BatchNorms that never train into their convolutions; return how many."""
        if not self.prefix or self.sharded:
            return 0
        tensors = {n: t for n, t in batch.tensors.items() if n != "labels"}
        self.network.eval()
        return fold_frozen_norms(self.plain, self.prefix, lambda: self.logits(tensors))

    # -- a step ----------------------------------------------------------------------------

    def logits(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return logits, (batch, labels), of a batch without its labels."""
        inputs = dict(tensors)
        if self._channels_last:
            inputs = {n: _channels_last(t) if t.ndim == 4 else t for n, t in inputs.items()}
        activation = inputs.pop(KEY, None)
        if activation is None:
            return self.task.logits(self.network, inputs)
        assert self.cut is not None
        with self.cut.behind(activation):
            return self.task.logits(self.network, inputs)

    def accumulate(
        self, batch: Batch, *, epoch: int, rows: int, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Add a batch's gradients to the step's.

        Args:
            batch: this process's share.
            epoch: that it is of.
            rows: samples of the whole step, over its batches and all processes.
            last: whether the step ends with it, so that processes exchange gradients.

        Returns:
            numerator and denominator of the loss, float32 scalars, of this process's rows.
        """
        seed = step_seed(self.config.seed, epoch, batch.number, self.machine.rank)
        torch.manual_seed(seed)
        if self.masks is not None:
            self.masks.seed(seed)
        tensors = dict(batch.tensors)
        targets = tensors.pop("labels")
        if self.config.mixup or self.config.cutmix:
            generator = torch.Generator().manual_seed(seed)
            tensors["pixels"], targets = mix(
                tensors["pixels"], targets, len(self.task.labels), self.config, generator
            )
        with self._exchange(last):
            with self._autocast():
                logits = self.logits(tensors)
            losses, weights = self.loss(logits.float(), targets)
            total, weight = losses.sum(), weights.sum()
            if not batch.counts:
                total, weight = total * 0.0, weight * 0.0
            # processes average their gradients; the sum over all rows is wanted
            value = total * (self.machine.processes / rows)
            extra = regularization(self.plain)
            if extra is not None:
                value = value + extra * (batch.rows / rows)
            self.machine.accelerator.backward(value)
        self._weights += weight.detach()
        self._rows = rows
        return total.detach(), weight.detach()

    def update(self, factor: float, step: int, steps: int) -> None:
        """Take the step that the accumulated gradients give, at `factor` of the peak rate."""
        set_lr(self.optimizer, factor)
        parameters = self._parameters
        if self.config.class_weights != "none":
            # weighted rows do not count 1 each: the loss is over the sum of their weights
            scale = self._rows / self.machine.sum(self._weights)
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, scale)
        self._weights.zero_()
        if self.config.unfreeze_every and self.machine.processes > 1:
            for name, parameter in self.plain.named_parameters():
                if name in self._trains and name not in self._active:
                    parameter.grad = None
        if self.config.grad_clip:
            if self.sharded:
                norm = nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
                del norm
            else:
                self.machine.accelerator.clip_grad_norm_(parameters, self.config.grad_clip)
        self._wrapped.step()
        # fp16 leaves a step out whose gradients are not finite
        if not getattr(self._wrapped, "step_was_skipped", False):
            after_step(self.plain, step, steps)
        self._wrapped.zero_grad()
        if self.ema is not None:
            self.ema.update(step)

    def forget(self) -> None:
        """Drop what was accumulated."""
        self._weights.zero_()

    # -- what is kept ----------------------------------------------------------------------

    def trained(self) -> Tensors:
        """Return what training changes, whole and on the CPU; all processes call it."""
        if self.sharded:
            reshard(self.plain)
        return {n: whole(t) for n, t in trainable_state(self.plain).items()}

    def groups(self) -> dict[str, Tensors]:
        """Return all that a checkpoint keeps; all processes call it."""
        scaler = self.machine.accelerator.scaler
        scale: Tensors = {}
        if scaler is not None:
            state = scaler.state_dict()
            scale = {k: torch.tensor(float(v)) for k, v in state.items()}
        return {
            "weights": self.trained(),
            "optimizer": optimizer_tensors(self.plain, self.optimizer),
            "ema": {n: whole(t) for n, t in self.ema.state().items()} if self.ema else {},
            "method": {n: whole(t) for n, t in method_state(self.plain).items()},
            "scaler": scale,
        }

    def restore(self, groups: Mapping[str, Tensors]) -> None:
        """Put `groups` back."""
        current = trainable_state(self.plain)
        weights = groups["weights"]
        load_trainable(
            self.plain, {n: like(t, current[n]) if n in current else t for n, t in weights.items()}
        )
        restore_optimizer(self.plain, self.optimizer, groups.get("optimizer", {}))
        if self.ema is not None:
            own = self.ema.state()
            saved = groups.get("ema", {})
            self.ema.load({n: like(t, own[n]) if n in own else t for n, t in saved.items()})
        load_method_state(self.plain, groups.get("method", {}))
        scaler = self.machine.accelerator.scaler
        if scaler is not None and "scaler" in groups:
            saved_scaler = {k: float(v) for k, v in groups["scaler"].items()}
            tracker = int(saved_scaler["_growth_tracker"])
            scaler.load_state_dict({**saved_scaler, "_growth_tracker": tracker})

    # -- details ---------------------------------------------------------------------------

    def _autocast(self) -> Any:
        if self.sharded and self.machine.precision != "no":
            dtype = torch.bfloat16 if self.machine.precision == "bf16" else torch.float16
            return torch.autocast(self.machine.device.type, dtype)
        return nullcontext()  # the prepared network has its own

    def _exchange(self, last: bool) -> Any:
        if last or self.machine.processes == 1 or self.sharded:
            return nullcontext()
        return self.machine.accelerator.no_sync(self.network)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def step_seed(seed: int, epoch: int, batch: int, rank: int) -> int:
    """Return the seed of a batch's random choices in one process, 63 bits."""
    state = np.random.SeedSequence((seed, epoch, batch, rank)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
