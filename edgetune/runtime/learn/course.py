"""Epochs of training over samples that are kept as a step takes them, and answers of the same step.

Pure but for the session: what is trained is returned, and nothing is written.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError
from edgetune.runtime.learn.latents import Labelled, Layout, batches, draw
from edgetune.runtime.learn.state import index_of
from edgetune.runtime.learn.step import Batch, Descent, Rate, StepSession, blanks_of

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# share of the steps in which the learning rate grows to its full size
WARM_UP = 0.1


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step of the optimizer, of `steps` at most. loss: mean of its batch. ms: what it took."""

    epoch: int
    step: int
    steps: int
    loss: float
    ms: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; `Trainer.fit` says what each is. size, part: samples of a step and of a run."""

    epochs: int
    size: int
    part: int
    lr: float
    weight_decay: float
    patience: int
    rehearsal: float
    balance: float


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What to train on.

    labels: in the order of the logits. fresh: new samples. pools: label -> samples of before.
    held: samples that say when to stop.
    """

    labels: tuple[str, ...]
    fresh: Sequence[Labelled]
    pools: Mapping[str, Sequence[Labelled]]
    held: Sequence[Labelled]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of it; `FitReport` has the words. tensors: of the best epoch."""

    tensors: Mapping[str, Float32Array]
    losses: tuple[float, ...]
    holdout_losses: tuple[float, ...]
    best_epoch: int
    stopped_early: bool
    steps: int
    rehearsed: int
    ms_per_step: float


class Course:
    """One training; `train` runs it."""

    def __init__(
        self,
        session: StepSession,
        layout: Layout,
        lessons: Lessons,
        settings: Settings,
        *,
        at_once: int,
        rng: np.random.Generator,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        """Make ready.

        Args:
            session: of the bundle's step.
            layout: of the same.
            lessons: what to train on.
            settings: how.
            at_once: samples that are judged at a time.
            rng: of every choice.
            on_step: is told of every step.
        """
        self._session, self._layout, self._at_once = session, layout, at_once
        self._lessons, self._settings = lessons, settings
        self._rng, self._on_step = rng, on_step
        self._walls: list[float] = []
        self._rehearsed = 0

    def train(self, tensors: Mapping[str, Float32Array]) -> Trained:
        """Train from these values on, and return the best of what came.

        Raises:
            ConfigError: the loss became infinite.
        """
        held, settings = self._lessons.held, self._settings
        descent = Descent(self._session, tensors)
        losses: list[float] = []
        holdout = [self._holdout_loss(descent)] if held else []
        best, best_epoch, stopped = dict(tensors), 0, False
        for epoch in range(1, settings.epochs + 1):
            losses.append(self._epoch(descent, epoch))
            if not held:
                best, best_epoch = descent.tensors, epoch
                continue
            holdout.append(self._holdout_loss(descent))
            if holdout[-1] < min(holdout[:-1]):
                best, best_epoch = descent.copy(), epoch
            elif epoch - best_epoch >= settings.patience:
                stopped = epoch < settings.epochs
                break
        return Trained(
            tensors=best,
            losses=tuple(losses),
            holdout_losses=tuple(holdout),
            best_epoch=best_epoch,
            stopped_early=stopped,
            steps=descent.steps,
            rehearsed=self._rehearsed,
            ms_per_step=1e3 * statistics.median(self._walls),
        )

    def _epoch(self, descent: Descent, epoch: int) -> float:
        """Train on each new sample once, and on some of before; return the mean loss."""
        settings, fresh, pools = self._settings, self._lessons.fresh, self._lessons.pools
        count = 0
        if settings.rehearsal > 0:
            count = max(math.ceil(settings.rehearsal * len(fresh)), len(pools))
        old = draw(pools, count, self._rng)
        self._rehearsed = len(old)
        mixed = [*fresh, *old]
        weights = class_weights([s.label for s in mixed], settings.balance)
        plan = batches(mixed, self._layout, settings.size, self._rng)
        total = 0.0
        for places in plan:
            begin = time.perf_counter()
            pieces = np.array_split(np.array(places), -(-len(places) // settings.part))
            parts = [
                batch_of(self._layout, [mixed[i] for i in p], self._lessons.labels, weights[p])
                for p in pieces
            ]
            number, most = descent.steps + 1, len(plan) * settings.epochs
            warm = min(1.0, number / max(1.0, WARM_UP * most))
            rate = Rate(lr=settings.lr * warm, weight_decay=settings.weight_decay)
            loss = descent.step(parts, rate)
            self._walls.append(time.perf_counter() - begin)
            if not math.isfinite(loss):
                raise ConfigError(
                    f"learning_rate: with {settings.lr:g} the loss is {loss} at step {number};"
                    " try a tenth of it"
                )
            total += loss * float(weights[places].sum())
            if self._on_step is not None:
                ms = 1e3 * self._walls[-1]
                self._on_step(StepReport(epoch=epoch, step=number, steps=most, loss=loss, ms=ms))
        return total / float(weights.sum())

    def _holdout_loss(self, descent: Descent) -> float:
        """Return the mean loss on the samples kept apart, each class weighing the same."""
        held = self._lessons.held
        weights = class_weights([s.label for s in held], 1.0)
        loss = 0.0
        for places in batches(held, self._layout, self._at_once):
            rows = [held[i] for i in places]
            batch = batch_of(self._layout, rows, self._lessons.labels, weights[places])
            loss += self._session.loss_and_logits(batch, descent.tensors, descent.blanks)[0]
        return loss / float(weights.sum())


def answers(
    session: StepSession,
    layout: Layout,
    samples: Sequence[Labelled],
    tensors: Mapping[str, Float32Array],
    labels: Sequence[str],
    *,
    at_once: int,
) -> IntArray:
    """Return which of the labels the tensors answer, places, by the step's own forward pass."""
    found = np.full(len(samples), -1, np.int64)
    blanks = blanks_of(tensors)
    for places in batches(samples, layout, at_once):
        rows = [samples[i] for i in places]
        batch = batch_of(layout, rows, labels, np.ones(len(rows)))
        found[places] = session.loss_and_logits(batch, tensors, blanks)[1].argmax(axis=1)
    return found


def batch_of(
    layout: Layout, samples: Sequence[Labelled], labels: Sequence[str], weights: Float64Array
) -> Batch:
    """Return samples as the step takes them; one of none of the labels has no target."""
    index = index_of(labels)
    targets = np.zeros((len(samples), len(labels)), np.float32)
    for row, sample in enumerate(samples):
        if sample.label in index:
            targets[row, index[sample.label]] = 1
    return Batch(inputs=layout.stack(samples), targets=targets, weights=weights.astype(np.float32))


def class_weights(labels: Sequence[str], balance: float) -> Float64Array:
    """Return a weight for each sample, 1 on average.

    Args:
        labels: of the samples.
        balance: 1: every class weighs the same, however many samples it has; 0: as seen; between:
            weights are those of 1, to that power.
    """
    _, classes, counts = np.unique(np.array(labels), return_inverse=True, return_counts=True)
    weights = (len(labels) / (len(counts) * counts[classes])) ** balance
    found: Float64Array = weights / weights.mean()
    return found
