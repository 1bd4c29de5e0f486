"""Tiers 1 and 2: what the bundle marks as trainable learns by gradients, with train.onnx.

What the frozen part of the network makes of a sample is computed once and kept (latent replay,
Pellegrini et al. 2020, arXiv:1912.01100); each epoch mixes new samples with samples of before, from
the bundle and from the device's own memory, so that what was known is not forgotten.

Nothing that is fitted changes an answer before `commit`, and `commit` changes it only where the
guard finds nothing against the candidate.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, DataError, IntegrityError
from edgetune.runtime.bundle import STEP_NAME
from edgetune.runtime.learn.course import Course, Lessons, Settings, StepReport, answers, batch_of
from edgetune.runtime.learn.defaults import read_defaults
from edgetune.runtime.learn.growth import grow
from edgetune.runtime.learn.guard import Evidence, Rules
from edgetune.runtime.learn.guarded import (
    HOLDOUT_SHARE,
    Guarded,
    Receipt,
    SetAside,
    check_samples,
    default_rules,
    is_held_out,
    open_store,
)
from edgetune.runtime.learn.latents import Labelled, labelled, layout_of, pools_of
from edgetune.runtime.learn.material import Material, read_material
from edgetune.runtime.learn.reservoir import (
    RESERVOIR_NAME,
    Memory,
    dump_memory,
    empty_memory,
    load_memory,
)
from edgetune.runtime.learn.state import State, index_of
from edgetune.runtime.learn.step import Descent, Rate, StepSession
from edgetune.runtime.learn.store import Store
from edgetune.runtime.manifest import TrainingStep
from edgetune.runtime.measure import peak_rss_mib
from edgetune.runtime.ort import RunLimit, run_session

if TYPE_CHECKING:
    from edgetune.runtime.model import EdgeModel

Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

KIND = "tensors"
DEFAULT_REPLAY_BYTES = 8 * 2**20
# method -> learning rate of AdamW; the others' is that of biases and scales
LEARNING_RATES = {"head": 1e-2, "last": 1e-4, "lora": 1e-3}
OTHER_RATE = 1e-3
# momentum adds up ten gradients, and a gradient is not brought to the size of 1
SGD_FACTOR = 10.0


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What a fit did.

    losses: mean cross-entropy on what each epoch trained on. holdout_losses: on samples that are
    not trained on, of all classes alike, before the first epoch and after each; empty where there
    is none of a class that was given. best_epoch: whose tensors the candidate has; 0 is what the
    fit started from; without holdout_losses the last. stopped_early: whether they ended it.
    learned, held_out: how many of the given samples were trained on, and kept apart. rehearsed:
    samples of before that each epoch had besides. ms_per_step: median. peak_rss_mib: of the
    process so far; None where the system does not tell.
    """

    labels: tuple[str, ...]
    losses: tuple[float, ...]
    holdout_losses: tuple[float, ...]
    best_epoch: int
    stopped_early: bool
    steps: int
    learned: int
    held_out: int
    rehearsed: int
    aside: tuple[SetAside, ...]
    ms_per_step: float
    peak_rss_mib: float | None


class Trainer(Guarded):
    """Trains one model's own tensors; `EdgeModel.trainer` opens it. See `Guarded`."""

    KIND = KIND

    def __init__(
        self,
        model: "EdgeModel",
        store: Store,
        material: Material,
        training: TrainingStep,
        *,
        rules: Rules,
        replay_bytes: int,
        seed: int,
        threads: int | None,
    ) -> None:
        """Take up what the store holds; `Trainer.open` is the way in."""
        super().__init__(model, store, rules)
        self._labels: tuple[str, ...] = ()
        self._tensors: Mapping[str, Float32Array] = {}
        self._memory = empty_memory(replay_bytes, HOLDOUT_SHARE)
        self._pending = False
        self._training, self._layout = training, layout_of(model.manifest)
        self._replay_bytes, self._seed, self._threads = replay_bytes, seed, threads
        self._session: StepSession | None = None
        self._factory_answers: IntArray | None = None
        labels, where = material.prior.labels, str(model.bundle.where)
        self._centre = (
            material.canary_features.mean(axis=0) if len(material.canary_features) else None
        )
        self._canary_samples = self._given_by(
            material.canary_latents, material.canary_classes, labels, where
        )
        self._replay, self._watched = _split(
            self._given_by(material.replay_latents, material.replay_classes, labels, where)
        )
        self._take_up()

    @classmethod
    def open(
        cls,
        model: "EdgeModel",
        store: str | Path | None = None,
        *,
        rules: Rules | None = None,
        replay_bytes: int = DEFAULT_REPLAY_BYTES,
        seed: int = 0,
        threads: int | None = None,
    ) -> Self:
        """Open the store of a model, or make one; the model answers with its live state now.

        Args:
            model: any whose bundle carries train.onnx and learn.npz.
            store: its folder; default: the bundle's name with ".learned", beside it.
            rules: what a candidate may lose; default: what the bundle's canary can prove.
            replay_bytes: how much the device keeps of what it was given, to rehearse and to judge
                by; a store that keeps more drops some.
            seed: of every choice at random.
            threads: overrides the number of threads that the manifest names.

        Raises:
            ConfigError: the bundle has no training step, or the store is another bundle's, or
                holds a head that a learner solved.
            IntegrityError: the store or the bundle is damaged.
            ResourceError: another process learns there, or the disk fails.
        """
        training = model.manifest.training
        if training is None:
            raise ConfigError(
                f"{model.bundle.where}: this bundle cannot train: it has no {STEP_NAME}; export it"
                " with --learn head, lora, last:N, norm or bias"
            )
        if replay_bytes < 0:
            raise ConfigError(f"replay_bytes: expected 0 or more, got {replay_bytes}")
        if seed < 0:
            raise ConfigError(f"seed: expected 0 or more, got {seed}")
        material = read_material(model.bundle)
        opened = open_store(model.bundle, store, KIND)
        try:
            return cls(
                model, opened, material, training, rules=rules or default_rules(material),
                replay_bytes=replay_bytes, seed=seed, threads=threads,
            )  # fmt: skip
        except BaseException:
            opened.close()
            raise

    def close(self) -> None:
        """Give the store free and the session back; what was not committed is gone."""
        self._session = None
        super().close()

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that a commit would answer with."""
        return self._labels

    @property
    def learned(self) -> dict[str, int]:
        """How many samples of each label this device has trained on."""
        return dict(self._memory.learned)

    def candidate(self) -> State:
        """Return the state that the next commit would put in place."""
        return State(labels=self._labels, tensors=self._tensors)

    def fit(
        self,
        samples: Sequence[Any],
        labels: Sequence[str] | str,
        *,
        epochs: int = 3,
        batch_size: int = 8,
        accumulate: int = 1,
        learning_rate: float | None = None,
        weight_decay: float = 0.01,
        patience: int = 2,
        rehearsal: float = 1.0,
        balance: float = 0.5,
        micro_batch: int | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> FitReport:
        """Train on labelled samples, going on from what was fitted or committed before.

        The fifth of each class, and every fifth after it, is kept apart to judge by.

        Args:
            samples: raw ones, as `predict` takes them.
            labels: one a sample, or one for all; a new one makes a class.
            epochs: at most.
            batch_size: samples of a batch.
            accumulate: batches of a step of the optimizer.
            learning_rate: None: what suits what the bundle trains, see LEARNING_RATES.
            weight_decay: of matrices and kernels.
            patience: epochs without a lower loss on samples that are not trained on, the device's
                and some of the bundle's, before it ends.
            rehearsal: samples of before that each epoch has besides, for each new one; with more
                than 0, at least one of each class.
            balance: 1: every class of an epoch weighs the same, however many samples it has; 0:
                as seen; between: weights are those of 1, to that power.
            micro_batch: samples in memory at a time, at most; None: a batch. Fewer take longer
                and learn the same.
            on_step: is told of every step; what it raises ends the fit without a trace.

        Raises:
            DataError: a sample is not what the task takes, the numbers differ, or there is
                nothing to learn.
            ConfigError: a setting is out of bounds, or the loss became infinite.
            ResourceError: memory ran out. As with any error, what was fitted before stays.
        """
        part = batch_size if micro_batch is None else micro_batch
        _check_counts(
            epochs=epochs, batch_size=batch_size, accumulate=accumulate, patience=patience,
            micro_batch=part,
        )  # fmt: skip
        settings = Settings(
            epochs=epochs, size=batch_size * accumulate, part=min(batch_size, part),
            lr=self._default_rate() if learning_rate is None else learning_rate,
            weight_decay=weight_decay, patience=patience, rehearsal=rehearsal, balance=balance,
        )  # fmt: skip
        _check_settings(settings)
        names = check_samples(samples, labels, self._labels)
        given = self._look(samples, names)
        memory = self._memory.copy()
        fresh, kept_apart, aside = _sort(given, memory)
        if not fresh:
            raise DataError("nothing to learn: all samples given are kept apart to judge by")
        new = [s.label for s in fresh if s.label not in self._labels]
        labels_after = (*self._labels, *dict.fromkeys(new))
        held = [s for s in [*memory.holdout.items, *kept_apart] if s.label in labels_after]
        others = [*memory.train.items, *self._replay]
        # a loss that does not see what is taught would stop at once; one that sees nothing else
        # would pick the epoch that has forgotten most
        told = {s.label for s in fresh} <= {s.label for s in held}
        rng = np.random.default_rng([self._seed, sum(memory.given.values())])
        course = Course(
            self._step(), self._layout,
            Lessons(
                labels=labels_after, fresh=fresh, held=[*held, *self._watched] if told else [],
                pools=pools_of(others, {s.id for s in [*fresh, *held]}),
            ),
            settings, at_once=self._at_once, rng=rng, on_step=on_step,
        )  # fmt: skip
        trained = course.train(self._grown(labels_after, samples, given, fresh))
        _remember(memory, fresh, kept_apart, rng)
        self._labels, self._tensors, self._memory = labels_after, trained.tensors, memory
        self._pending = True
        return FitReport(
            labels=labels_after,
            losses=trained.losses,
            holdout_losses=trained.holdout_losses,
            best_epoch=trained.best_epoch,
            stopped_early=trained.stopped_early,
            steps=trained.steps,
            learned=len(fresh),
            held_out=len(kept_apart),
            rehearsed=trained.rehearsed,
            aside=aside,
            ms_per_step=trained.ms_per_step,
            peak_rss_mib=peak_rss_mib(),
        )

    def commit(self) -> Receipt:
        """Put what was fitted in place, if the guard finds nothing against it.

        A candidate that is refused is dropped, with what was fitted since the last commit; the
        receipt says why.

        Raises:
            DataError: nothing was fitted since the last commit.
            ResourceError: the disk fails; the live state stays as it was.
        """
        if not self._pending:
            raise DataError("nothing to commit: nothing was fitted since the last commit")
        return self._settle(
            self.candidate(), self.learned,
            files={RESERVOIR_NAME: dump_memory(self._memory)},
            grounds={"method": self._training.method},
        )  # fmt: skip

    def _drop(self, reasons: Sequence[str]) -> None:  # noqa: ARG002 - the receipt has them
        self._rebuild()

    def time_steps(
        self, samples: Sequence[Any], labels: Sequence[str], steps: int
    ) -> tuple[float, float]:
        """Take steps on one batch and forget them; return the median wall ms, the mean CPU ms.

        Raises:
            DataError: as `fit`, or a label is new.
        """
        given = self._look(samples, check_samples(samples, labels, self._labels))
        if not given or any(s.label not in self._labels for s in given) or steps < 1:
            raise DataError("expected a step or more, and samples of known labels")
        descent = Descent(self._step(), self._tensors)
        batch = batch_of(self._layout, given, self._labels, np.ones(len(given)))
        rate = Rate(lr=self._default_rate(), weight_decay=0.01)
        descent.step([batch], rate)  # the first run plans its memory
        walls, cpu = [], time.process_time()
        for _ in range(steps):
            begin = time.perf_counter()
            descent.step([batch], rate)
            walls.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(walls), 1e3 * (time.process_time() - cpu) / steps

    def _rebuild(self) -> None:
        """Go on from the live state: its tensors and its memory."""
        live = self._store.live
        if self._live is None or live is None:
            factory = self._factory()
            self._labels, self._tensors = factory.labels, factory.tensors
            self._memory = empty_memory(self._replay_bytes, HOLDOUT_SHARE)
        else:
            self._labels, self._tensors = self._live.labels, self._live.tensors
            where = f"{self._store.folder}: generation {live.number}: {RESERVOIR_NAME}"
            self._memory = load_memory(
                self._store.read(live, RESERVOIR_NAME), self._replay_bytes, HOLDOUT_SHARE,
                where=where,
            )  # fmt: skip
            kept = [*self._memory.train.items, *self._memory.holdout.items]
            if not all(self._layout.fits(s) and s.label in self._labels for s in kept):
                raise IntegrityError(f"{where}: has samples that this bundle cannot have kept")
        self._pending = False

    def _canary(self, candidate: State) -> Evidence | None:
        samples = self._canary_samples
        if not samples:
            return None
        index = index_of(candidate.labels)
        if self._factory_answers is None:
            self._factory_answers = self._answers(samples, self._factory())
        labels = self._model.manifest.labels
        return Evidence(
            truth=np.array([index[s.label] for s in samples], np.int64),
            before=self._live_answers(samples, index),
            after=self._answers(samples, candidate),
            factory=_placed(self._factory_answers, labels, index),
        )

    def _holdout(self, candidate: State) -> Evidence | None:
        index = index_of(candidate.labels)
        held = [s for s in self._memory.holdout.items if s.label in index]
        if not held:
            return None
        live = self._model.manifest.labels if self._live is None else self._live.labels
        before = self._live_answers(held, index)
        before[[s.label not in live for s in held]] = -1
        return Evidence(
            truth=np.array([index[s.label] for s in held], np.int64),
            before=before,
            after=self._answers(held, candidate),
        )

    def _live_answers(self, samples: Sequence[Labelled], index: Mapping[str, int]) -> IntArray:
        """Return what the live state answers, as places in a candidate's labels."""
        state = self._live or self._factory()
        return _placed(self._answers(samples, state), state.labels, index)

    def _answers(self, samples: Sequence[Labelled], state: State) -> IntArray:
        return answers(
            self._step(), self._layout, samples, state.tensors, state.labels,
            at_once=self._at_once,
        )  # fmt: skip

    def _factory(self) -> State:
        """Return the factory's state; it is read anew, as it is seldom wanted and may be large."""
        tensors = read_defaults(self._model.bundle, self._training.trainable)
        return State(labels=self._model.manifest.labels, tensors=tensors)

    def _step(self) -> StepSession:
        if self._session is None:
            self._session = StepSession(self._model.bundle, threads=self._threads)
        return self._session

    @property
    def _at_once(self) -> int:
        # as in inference, where a graph may answer for one sample by its neighbours too
        return self._model.manifest.session.max_batch

    def _default_rate(self) -> float:
        rate = LEARNING_RATES.get(self._training.method.partition(":")[0], OTHER_RATE)
        return rate * (SGD_FACTOR if self._training.optimizer == "sgd" else 1.0)

    def _look(self, samples: Sequence[Any], names: Sequence[str]) -> list[Labelled]:
        """Return what the step takes of each sample, its latents by the frozen part alone."""
        model, latents = self._model, [spec.name for spec in self._training.latents]
        limit = RunLimit(None)
        limit.options.only_execute_path_to_fetches = True
        found = []
        for sample, label in zip(samples, names, strict=True):
            inputs = model.task.stack([model.task.encode(sample)])
            made = run_session(model.session, latents, inputs, limit) if latents else []
            arrays = {name: inputs[name] for name in self._training.inputs}
            arrays |= dict(zip(latents, made, strict=True))
            kept = labelled(label, {name: array[0] for name, array in arrays.items()})
            if not self._layout.fits(kept):
                raise DataError(
                    "a sample's latents are infinite or no number, or of another shape than the"
                    " manifest says"
                )
            found.append(kept)
        return found

    def _grown(
        self,
        labels: Sequence[str],
        samples: Sequence[Any],
        given: Sequence[Labelled],
        fresh: Sequence[Labelled],
    ) -> Mapping[str, Float32Array]:
        """Return the tensors with a row for each new label, turned towards its samples."""
        new = labels[len(self._labels) :]
        if not new:
            return self._tensors
        trained = {s.id for s in fresh}
        raw: dict[str, list[Any]] = {label: [] for label in new}
        for sample, kept in zip(samples, given, strict=True):
            if kept.label in raw and kept.id in trained:
                raw[kept.label].append(sample)
        means = [self._mean_features(own) for own in raw.values()]
        return grow(self._tensors, self._training.trainable, means, self._centre)

    def _mean_features(self, samples: Sequence[Any]) -> Float32Array | None:
        model = self._model
        if self._centre is None or all(s.name != "features" for s in model.manifest.outputs):
            return None
        rows = []
        for sample in samples:
            inputs = model.task.stack([model.task.encode(sample)])
            # as the labels that there are see it
            inputs |= self._tensors
            rows.append(run_session(model.session, ["features"], inputs)[0][0])
        mean: Float32Array = np.array(np.mean(rows, axis=0, dtype=np.float64), np.float32)
        return mean if mean.shape == self._centre.shape and np.isfinite(mean).all() else None

    def _given_by(
        self,
        latents: Mapping[str, Sequence[npt.NDArray[Any]]],
        classes: IntArray,
        labels: Sequence[str],
        where: str,
    ) -> list[Labelled]:
        """Return samples of the bundle's."""
        if not latents:
            return []
        found = [
            labelled(labels[c], {name: values[i] for name, values in latents.items()})
            for i, c in enumerate(classes)
        ]
        if not all(self._layout.fits(s) for s in found):
            raise IntegrityError(f"{where}: its latents to learn from are not what its step takes")
        return found


def _split(samples: Sequence[Labelled]) -> tuple[list[Labelled], list[Labelled]]:
    """Return the bundle's samples to rehearse, and every fifth of a class, to watch."""
    seen: dict[str, int] = {}
    parts: tuple[list[Labelled], list[Labelled]] = ([], [])
    for sample in samples:
        seen[sample.label] = seen.get(sample.label, 0) + 1
        parts[is_held_out(seen[sample.label])].append(sample)
    return parts


def _sort(
    given: Sequence[Labelled], memory: Memory
) -> tuple[list[Labelled], list[Labelled], tuple[SetAside, ...]]:
    """Say what is trained on, what is newly kept apart, and what is neither.

    `memory.given` counts on. A sample that was given before keeps its part.
    """
    held = {s.id for s in memory.holdout.items}
    known = {s.id for s in memory.train.items}
    fresh: dict[str, Labelled] = {}
    new: list[Labelled] = []
    aside = []
    for place, sample in enumerate(given):
        if sample.id in held:
            reason = "it is kept apart to judge by"
        elif sample.id in fresh:
            reason = "it was given twice"
        else:
            if sample.id not in known:
                memory.given[sample.label] = memory.given.get(sample.label, 0) + 1
                if is_held_out(memory.given[sample.label]):
                    held.add(sample.id)
                    new.append(sample)
                    continue
            fresh[sample.id] = sample
            continue
        aside.append(SetAside(place=place, id=sample.id, label=sample.label, reason=reason))
    return list(fresh.values()), new, tuple(aside)


def _placed(answers: IntArray, labels: Sequence[str], index: Mapping[str, int]) -> IntArray:
    """Return answers among some labels as places in a candidate's."""
    places: IntArray = np.array([index.get(name, -1) for name in labels], np.int64)[answers]
    return places


def _remember(
    memory: Memory, fresh: Sequence[Labelled], kept_apart: Sequence[Labelled],
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Offer what was given to the device's memory."""
    known = {s.id for s in memory.train.items}
    for sample in fresh:
        if sample.id not in known:
            memory.learned[sample.label] = memory.learned.get(sample.label, 0) + 1
            memory.train.offer(sample, rng)
    for sample in kept_apart:
        memory.holdout.offer(sample, rng)


def _check_counts(**numbers: int) -> None:
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ConfigError(f"{name}: expected a whole number of 1 or more, got {number!r}")


def _check_settings(settings: Settings) -> None:
    if not (math.isfinite(settings.lr) and settings.lr > 0):
        raise ConfigError(f"learning_rate: expected a number above 0, got {settings.lr!r}")
    for name in ("weight_decay", "rehearsal"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name}: expected 0 or more, got {value!r}")
    if not 0 <= settings.balance <= 1:
        raise ConfigError(
            f"balance: expected 0 (as seen) to 1 (every class the same), got {settings.balance!r}"
        )
