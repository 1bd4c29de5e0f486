"""The learning rate over a run, as a share of its peak: pure functions of the step.

Every schedule but one_cycle is a linear warm-up times a curve. Nothing is remembered but the
plateau's counters, so a resumed run is where an unbroken one would be.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from edgetune.config import TrainConfig

# one_cycle: the peak over the start, and the start over the end (Smith & Topin 2017,
# arXiv:1708.07120; the numbers are torch.optim.lr_scheduler.OneCycleLR's)
RISE = 25.0
FALL = 1e4


def lr_factor(
    config: TrainConfig, step: int, steps: int, *, steps_per_epoch: int, plateau_drops: int = 0
) -> float:
    """Return the share of the peak learning rate at a step.

    Args:
        config: schedule, warmup_fraction, schedule_gamma, schedule_epochs.
        step: steps done before this one, 0 at first.
        steps: steps of the whole run.
        steps_per_epoch: steps of an epoch; "step" drops after every schedule_epochs of them.
        plateau_drops: `Plateau.drops` so far.
    """
    if config.schedule == "one_cycle":
        return _one_cycle(step, steps, config.warmup_fraction)
    warmup = round(config.warmup_fraction * steps)
    rise = min(1.0, (step + 1) / (warmup + 1))
    if config.schedule == "plateau":
        return rise * config.schedule_gamma**plateau_drops
    if config.schedule == "step":
        return rise * config.schedule_gamma ** (step // (config.schedule_epochs * steps_per_epoch))
    progress = max(0, step - warmup) / max(1, steps - warmup)
    return rise * _CURVES[config.schedule](min(1.0, progress), config.schedule_gamma)


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """What the plateau schedule remembers from epoch to epoch; kept in the checkpoint.

    best: the best value so far; None before the first epoch.
    stale: epochs since the best value or the last drop.
    drops: drops of the learning rate so far.
    """

    best: float | None = None
    stale: int = 0
    drops: int = 0

    def after(
        self, value: float, better: Callable[[float, float], bool], patience: int
    ) -> "Plateau":
        """Return what is remembered after an epoch.

        torch's ReduceLROnPlateau with threshold 0 and patience one less.

        Args:
            value: the epoch's; NaN is never better.
            better: (value, best) -> whether the value is better than the best.
            patience: epochs without a better value that make a drop.
        """
        if not math.isnan(value) and (self.best is None or better(value, self.best)):
            return Plateau(best=value, stale=0, drops=self.drops)
        if self.stale + 1 < patience:
            return Plateau(best=self.best, stale=self.stale + 1, drops=self.drops)
        return Plateau(best=self.best, stale=0, drops=self.drops + 1)


_CURVES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, gamma: 0.5 * (1 + math.cos(math.pi * progress)),  # noqa: ARG005
    "linear": lambda progress, gamma: 1 - progress,  # noqa: ARG005
    "constant": lambda progress, gamma: 1.0,  # noqa: ARG005
    "exponential": lambda progress, gamma: gamma**progress,
}


def _one_cycle(step: int, steps: int, rising: float) -> float:
    """Return OneCycleLR's rate over its max_lr: a cosine up, then a cosine down to nearly 0.

    As there the peak lies at step `rising * steps - 1`, between two steps in general.
    """
    start, end = 1 / RISE, 1 / RISE / FALL
    peak = rising * steps - 1
    last = steps - 1
    if step <= peak:
        return _anneal(start, 1.0, step / peak if peak > 0 else 1.0)
    return _anneal(1.0, end, min(1.0, (step - peak) / (last - peak)) if last > peak else 1.0)


def _anneal(first: float, last: float, progress: float) -> float:
    return last + (first - last) / 2 * (1 + math.cos(math.pi * progress))
