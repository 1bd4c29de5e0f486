"""The learning rate range test: raise the rate from step to step and watch the loss.

Too low a rate leaves the loss where it is, a good one makes it fall, too high a one makes it
rise again. The rate where the smoothed loss falls most steeply is suggested.

Source: Smith 2017 (arXiv:1506.01186), section 3.3; smoothing and the rules for choosing as in
fastai's `lr_find` (Howard & Gugger 2020, arXiv:2002.04688).
"""

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgetune.errors import ResourceError
from edgetune.tasks.curves import BLUE, GRID, MUTED, VERMILION, figure_style
from edgetune.train.engine import Engine
from edgetune.train.feeding import Batch, Feeder
from edgetune.train.optim import learning_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_NAME = "lr_finder.png"
RECORD_NAME = "lr_finder.json"

# rates tried: the method's own times and over this, within what is a rate at all
SPAN = 1e3
LOWEST, HIGHEST = 1e-7, 10.0
# steps: as many as make so many passes over the data, between these
PASSES = 3
FEWEST, MOST = 40, 100
# share of the smoothed loss so far that each step keeps
KEEP = 0.9
# points before the smoothed loss is a mean of enough to go by
SKIP = 10
# the test ends where the smoothed loss is so many times its lowest
DIVERGED = 4.0
# a suggestion is at most the rate of the lowest loss over this: fastai's "minimum / 10"
BELOW_LOWEST = 10.0
# a fall counts where it is this share of the loss and this many standard errors
LEAST_FALL = 0.05
STANDARD_ERRORS = 6.0
# of a run, for methods that go by the step: AdaLoRA takes no rank away in its first tenth
_STEPS_OF_RUN = 100 * MOST


@dataclass(frozen=True, kw_only=True)
class LrCurve:
    """What a range test saw, and what follows from it.

    lrs: rate of each step, rising.
    losses: mean loss of each step's samples, before its update.
    smoothed: their exponential moving average, without its bias to 0.
    suggestion: rate to train with, to two digits; None where the curve does not say.
    reason: why there is no suggestion; "" where there is one.
    default: rate that a run takes without a suggestion.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    reason: str
    default: float

    @property
    def lr(self) -> float:
        """The suggestion, or else the default."""
        return self.default if self.suggestion is None else self.suggestion


def find_lr(
    engine: Engine, feed: Feeder, *, progress: Callable[[int, int], None] | None = None
) -> LrCurve:
    """Train for a few dozen steps, each at a higher rate; every process calls it.

    The rates are equally spaced on a log axis, around the config's. Where layers have rates of
    their own, these are of the head's. The engine is of no use afterwards: make one for this,
    and throw it away.

    Args:
        engine: of the config whose rate is looked for.
        feed: of the training data, which is passed several times where it is small.
        progress: called with steps done and steps in all.

    Raises:
        ResourceError: memory ran out.
    """
    config = engine.config
    default = learning_rate(config)
    steps = steps_of(len(feed), config.grad_accumulation)
    rates = rates_around(default, steps)
    lrs: list[float] = []
    losses: list[float] = []
    # where all is freed that ever trains: the rate is for all
    engine.train_mode(config.epochs - 1)
    try:
        for step, (rate, batches) in enumerate(
            zip(rates, _steps(feed, config.grad_accumulation), strict=False)
        ):
            loss = _loss(engine, batches)
            if not math.isfinite(loss):
                break
            lrs.append(rate)
            losses.append(loss)
            smoothed = smooth(losses)
            if step >= SKIP and smoothed[-1] > DIVERGED * min(smoothed):
                break
            engine.update(rate / default, step, _STEPS_OF_RUN)
            if progress is not None:
                progress(step + 1, steps)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"out of memory at batch_size {config.batch_size}; lower batch_size and raise"
            " grad_accumulation by as much, or let --batch-size 0 find one"
        ) from error
    suggestion, reason = suggest(lrs, losses)
    return LrCurve(
        lrs=tuple(lrs), losses=tuple(losses), smoothed=tuple(smooth(losses)),
        suggestion=suggestion, reason=reason, default=default,
    )  # fmt: skip


def suggest(lrs: Sequence[float], losses: Sequence[float]) -> tuple[float | None, str]:
    """Return the rate of the steepest fall, to two digits, or None; and why there is none.

    The slope is that of the smoothed loss over the step, which is over log lr; the first
    `SKIP` steps have no say. The suggestion is not above a tenth of the rate with the lowest
    loss: where the fall is short, the steepest point is too near to where the loss turns.

    Args:
        lrs: of each step, equally spaced on a log axis.
        losses: of each step, finite.
    """
    if len(losses) < SKIP + 3:
        return None, f"the loss was no number after {len(losses)} steps"
    smoothed = np.asarray(smooth(losses))
    lowest = SKIP + int(np.argmin(smoothed[SKIP:]))
    fall = float(smoothed[SKIP] - smoothed[lowest])
    # around a level that does not move, an average that keeps a share k of itself has
    # (1 - k) / (1 + k) of the variance of what it averages
    noise = float(np.std(np.asarray(losses)[: lowest + 1] - smoothed[: lowest + 1]))
    error = noise * math.sqrt((1 - KEEP) / (1 + KEEP))
    if fall <= 0:
        return None, "the loss does not fall at any rate"
    if fall < LEAST_FALL * abs(smoothed[SKIP]) or fall < STANDARD_ERRORS * error:
        return None, "the loss falls no further than it scatters"
    slopes = np.gradient(smoothed)
    steepest = SKIP + int(np.argmin(slopes[SKIP : lowest + 1]))
    rate = min(lrs[steepest], lrs[lowest] / BELOW_LOWEST)
    return float(f"{rate:.2g}"), ""


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the exponential moving average, corrected for its start at 0.

    Source: Kingma & Ba 2015 (arXiv:1412.6980), section 3.
    """
    averages: list[float] = []
    average = 0.0
    for count, loss in enumerate(losses, start=1):
        average = KEEP * average + (1 - KEEP) * loss
        averages.append(average / (1 - KEEP**count))
    return averages


def rates_around(default: float, steps: int) -> list[float]:
    """Return rising rates from `default` / SPAN to `default` * SPAN, equal on a log axis."""
    low = min(default, max(LOWEST, default / SPAN))
    high = max(default, min(HIGHEST, default * SPAN))
    return [float(rate) for rate in np.geomspace(low, high, steps)]


def steps_of(batches: int, accumulation: int) -> int:
    """Return how many steps the test takes at `batches` batches an epoch."""
    return max(FEWEST, min(MOST, PASSES * -(-batches // accumulation)))


def lr_files(curve: LrCurve) -> dict[str, bytes]:
    """Return the files that a run keeps of the test: the figure and the numbers, by name.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    record = {
        "suggestion": curve.suggestion,
        "reason": curve.reason,
        "default": curve.default,
        "lrs": curve.lrs,
        "losses": curve.losses,
        "smoothed": curve.smoothed,
    }
    files = {RECORD_NAME: json.dumps(record, indent=2).encode()}
    if curve.lrs:
        content = io.BytesIO()
        figure = lr_figure(curve)
        with figure_style():
            figure.savefig(content, format="png", dpi=160, metadata={"Software": None})
        files[FIGURE_NAME] = content.getvalue()
    return files


def lr_figure(curve: LrCurve) -> "Figure":
    """Draw loss over learning rate, the rate to train with marked.

    Save it within `figure_style()`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with figure_style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter

        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.set_title("Learning rate range test")
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        axes.xaxis.set_major_locator(LogLocator(numticks=12))
        axes.xaxis.set_major_formatter(lambda value, _: power(value))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.plot(
            curve.lrs, curve.losses, "o", color=MUTED, markersize=2.5, alpha=0.5,
            markeredgewidth=0, label="each step",
        )  # fmt: skip
        axes.plot(curve.lrs, curve.smoothed, color=BLUE, label="smoothed")
        given = curve.suggestion is None
        words = f"{'kept' if given else 'suggested'}: {curve.lr:g}"
        colour = MUTED if given else VERMILION
        axes.axvline(
            curve.lr, color=colour, linewidth=1.2, linestyle=(0, (3, 3)), zorder=1, label=words
        )
        if not given:
            height = float(np.interp(math.log(curve.lr), np.log(curve.lrs), curve.smoothed))
            axes.plot(
                [curve.lr], [height], "o", color="white", markeredgecolor=colour,
                markeredgewidth=1.8, markersize=7.0, zorder=3,
            )  # fmt: skip
        axes.set_ylim(*_heights(curve))
        axes.grid(visible=True, axis="x", color=GRID)
        axes.legend(loc="best", fontsize=9)
    return figure


def power(rate: float) -> str:
    """Return a rate as the axis names it: "1e-3"."""
    digits, _, exponent = f"{rate:.0e}".partition("e")
    return f"{digits}e{int(exponent)}"


def lr_note(curve: LrCurve) -> str:
    """Return the line that tells the user what was found."""
    if curve.suggestion is None:
        return (
            f"learning rate {curve.lr:g}: not found, {curve.reason}; what the run would have"
            f" taken is kept (see {FIGURE_NAME})"
        )
    return f"learning rate {curve.lr:g}, found by a range test (see {FIGURE_NAME})"


def _heights(curve: LrCurve) -> tuple[float, float]:
    """Return the loss axis: the fall fills it, and what diverges leaves it at the top."""
    lowest = min(curve.smoothed)
    usual = max(curve.smoothed[: SKIP + 1])
    room = max(0.2 * abs(usual), usual - lowest)
    top = min(max(max(curve.smoothed), usual), usual + 0.5 * room) + 0.1 * room
    return lowest - 0.15 * room, top


def _loss(engine: Engine, batches: Sequence[tuple[int, Batch, int]]) -> float:
    """Accumulate a step's gradients; return its mean loss over all processes."""
    found = torch.zeros(2, device=engine.machine.device)
    for number, (epoch, batch, rows) in enumerate(batches, start=1):
        last = number == len(batches)
        found += torch.stack(engine.accumulate(batch, epoch=epoch, rows=rows, last=last))
    loss, weight = engine.machine.sum(found).tolist()
    return float(loss / weight) if weight else math.nan


def _steps(feed: Feeder, accumulation: int) -> Iterator[list[tuple[int, Batch, int]]]:
    """Yield the (epoch, batch, rows of the step) of each step, epoch after epoch, for ever."""
    epoch = 0
    while True:
        step: list[tuple[int, Batch]] = []
        for batch in feed.epoch(epoch):
            step.append((epoch, batch))
            if len(step) == accumulation or batch.number == len(feed) - 1:
                rows = sum(b.rows for _, b in step)
                yield [(e, b, rows) for e, b in step]
                step = []
        epoch += 1
