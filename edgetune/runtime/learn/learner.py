"""Tier 0: a head on frozen features that learns from labelled samples, exactly and at once.

Samples become features, features go into sums (the Gram matrix, class sums, counts), and a head
is solved from the sums: so classes can be added, samples taken out again, and other devices' sums
added, in any order, with one and the same result. The factory's own sums travel in the bundle.

Nothing that is given changes an answer before `commit`, and `commit` changes it only where the
guard finds nothing against the candidate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, DataError, IntegrityError
from edgetune.runtime.learn.guard import Evidence, Rules
from edgetune.runtime.learn.guarded import (
    HOLDOUT_SHARE,
    MAX_CLASSES,
    Guarded,
    Receipt,
    SetAside,
    check_label,
    check_samples,
    default_rules,
    is_held_out,
    open_store,
)
from edgetune.runtime.learn.material import Material, read_material
from edgetune.runtime.learn.outliers import MIN_CLEAN, Flood, FloodRules, Screen, fit_screen
from edgetune.runtime.learn.ridge import Head, choose, fit_temperature, regularisation, solve
from edgetune.runtime.learn.samples import (
    Forgetting,
    Merging,
    Record,
    Removal,
    Role,
    Sample,
    Void,
    effective,
    sample_id,
    to_payload,
)
from edgetune.runtime.learn.state import State, index_of
from edgetune.runtime.learn.statistics import (
    Statistics,
    add,
    dump,
    expand,
    forget,
    load,
    merge,
    subtract,
    with_label,
    within,
)
from edgetune.runtime.learn.store import Generation, Store
from edgetune.runtime.proportions import tango_bound

if TYPE_CHECKING:
    from edgetune.runtime.model import EdgeModel

Float32Array = npt.NDArray[np.float32]

KIND = "head"
# accuracy that learning may cost beyond what a head solved anew does
HEAD_ALLOWANCE = 0.015
# fewer held-out samples than this choose no ridge: the bundle's own factor does
FEWEST_TO_CHOOSE = 30


@dataclass(frozen=True, kw_only=True)
class Added:
    """What became of samples that were given.

    ids: one a sample, in order; `remove` takes them. learned, held_out: how many went into the
    statistics, and how many are kept apart to judge by.
    """

    ids: tuple[str, ...]
    learned: int
    held_out: int
    aside: tuple[SetAside, ...]


class Learner(Guarded):
    """Teaches one model's head; `EdgeModel.learner` opens it. See `Guarded`."""

    KIND = KIND

    def __init__(
        self,
        model: "EdgeModel",
        store: Store,
        material: Material,
        *,
        rules: Rules,
        balance: float,
        screen: bool,
        flood: FloodRules | None,
    ) -> None:
        """Take up what the store holds; `Learner.open` is the way in."""
        super().__init__(model, store, rules)
        self._material, self._balance = material, balance
        self._screening = screen
        self._flood = None if flood is None else Flood(flood)
        self._screen: Screen | None = None
        self._given = 0.0
        self._take_up()

    @classmethod
    def open(
        cls,
        model: "EdgeModel",
        store: str | Path | None = None,
        *,
        rules: Rules | None = None,
        balance: float = 1.0,
        screen: bool = True,
        flood: FloodRules | None = None,
    ) -> Self:
        """Open the store of a model, or make one; the model answers with its live state now.

        Args:
            model: any whose bundle carries learn.npz.
            store: its folder; default: the bundle's name with ".learned", beside it.
            rules: what a candidate may lose; default: what the bundle's canary can prove.
            balance: 1: every class weighs the same, however many samples it has; 0: as seen.
            screen: set outliers and samples of another class's looks aside.
            flood: limits on how much of one label may come in; None: no limit.

        Raises:
            ConfigError: the bundle cannot learn, or the store is another bundle's, or holds
                tensors that a trainer trained.
            IntegrityError: the store is damaged.
            ResourceError: another process learns there, or the disk fails.
        """
        material = read_material(model.bundle)
        opened = open_store(model.bundle, store, KIND)
        try:
            return cls(
                model, opened, material, rules=rules or head_rules(material), balance=balance,
                screen=screen, flood=flood,
            )  # fmt: skip
        except BaseException:
            opened.close()
            raise

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that a commit would answer with."""
        return self._stats.labels

    @property
    def statistics(self) -> Statistics:
        """The sums that the next commit solves: the factory's and this device's."""
        return self._stats

    @property
    def learned(self) -> dict[str, int]:
        """How many samples of each label this device has learned, less what was removed."""
        counts: dict[str, int] = {}
        for sample in self._samples.values():
            if sample.role == "train":
                counts[sample.label] = counts.get(sample.label, 0) + 1
        return counts

    def add(
        self, samples: Sequence[Any], labels: Sequence[str] | str, *, now: float = 0.0
    ) -> Added:
        """Take labelled samples in.

        The fifth of each class, and every fifth after it, is kept apart to judge by.

        Args:
            samples: raw ones, as `predict` takes them.
            labels: one a sample, or one for all; a new one makes a class.
            now: seconds on any clock, for the limits on floods.

        Raises:
            DataError: a sample is not what the task takes, or the numbers differ. Nothing is
                taken in then.
            ResourceError: the disk is full.
        """
        names = check_samples(samples, labels, self._stats.labels)
        if not names:
            return Added(ids=(), learned=0, held_out=0, aside=())
        features, answers = self._look(samples)
        return self._take(features, names, answers, now)

    def add_class(self, label: str, samples: Sequence[Any]) -> Added:
        """Take samples of a new class in.

        Raises:
            DataError: there is such a class already, or as `add`.
        """
        if label in self._stats.labels:
            raise DataError(f"label {label!r}: there is such a class; add takes more samples of it")
        return self.add(samples, label)

    def remove(self, samples: Sequence[Any]) -> int:
        """Take samples out as if they had never been; return how many there were.

        Exact: the next commit's head is that of the statistics without them. Their features stay
        in the journal until `factory_reset(forget=True)`.

        Args:
            samples: their ids, or the raw samples themselves.

        Raises:
            DataError: one of them was not learned here.
        """
        wanted = list(samples)
        if all(isinstance(s, str) and s in self._samples for s in wanted):
            ids = [str(s) for s in wanted]
        else:
            ids = [self._find(features) for features in self._look(wanted)[0]]
        for name in ids:
            if name not in self._samples:
                raise DataError(f"sample {name!r:.80} was not learned here, or is removed already")
        if ids:
            self._write([Removal(ids=tuple(dict.fromkeys(ids)))])
        return len(set(ids))

    def forget_class(self, label: str) -> None:
        """Take a class out: no answer names it from the next commit on.

        What this device learned of it goes exactly; of a factory class its mean and its share of
        the scatter within classes go, as the bundle does not carry its own.

        Raises:
            DataError: there is no such class, or it is the last but one.
        """
        if label not in self._stats.labels:
            raise DataError(f"label {label!r}: there is no such class")
        if len(self._stats.labels) < 3:
            raise DataError(f"label {label!r}: a classifier needs two classes")
        self._write([Forgetting(label=label)])

    def merge(self, statistics: Statistics, *, id: str) -> bool:
        """Add what another device learned; return False where it was merged before.

        Args:
            statistics: its increments, without the factory's.
            id: that tells this file from others; one merged before is not added again.

        Raises:
            DataError: they are of other features.
        """
        if id in self._merged:
            return False
        if statistics.width != self._stats.width:
            raise DataError(
                f"statistics of {statistics.width} features; this bundle has {self._stats.width}"
            )
        self._write([Merging(id=id, data=dump(statistics))])
        return True

    def increments(self) -> Statistics:
        """Return the sums of what this device itself learned, without the factory's."""
        own = Statistics(
            labels=(), gram=np.zeros_like(self._stats.gram),
            sums=np.zeros((0, self._stats.width)), counts=np.zeros(0),
        )  # fmt: skip
        by_label: dict[str, list[Float32Array]] = {}
        for sample in self._samples.values():
            if sample.role == "train":
                by_label.setdefault(sample.label, []).append(sample.features)
        for label, rows in by_label.items():
            own = with_label(own, label)
            features = self._placed(np.stack(rows))
            own = add(own, features, np.full(len(rows), len(own.labels) - 1))
        return own

    def candidate(self) -> State:
        """Solve the head that the next commit would put in place."""
        index = index_of(self._stats.labels)
        held = [s for s in self._samples.values() if s.role == "holdout" and s.label in index]
        features = self._placed_rows(held)
        classes = np.array([index[s.label] for s in held], np.int64)
        if len(held) >= FEWEST_TO_CHOOSE:
            head, _ = choose(self._stats, features, classes, balance=self._balance)
        else:
            ridge = regularisation(self._stats) * self._material.ridge_factor
            head = solve(self._stats, ridge=ridge, balance=self._balance)
        head = self._with_temperature(head, features, classes, index)
        return State(labels=self._stats.labels, head=head, projection=self._material.projection)

    def commit(self) -> Receipt:
        """Put a head of all that was given in place, if the guard finds nothing against it.

        One that is refused is dropped with what was given since the last commit; the receipt says
        why. Either way the receipt stays in the store.

        Raises:
            DataError: nothing was given since the last commit.
            ResourceError: the disk fails; the live state stays as it was.
        """
        if not self._pending:
            raise DataError("nothing to commit: nothing was added or removed since the last commit")
        end = self._store.journal.end
        ranges = [*self._ranges, (self._begin, end)]
        return self._settle(
            self.candidate(), self.learned, files={},
            grounds={"ranges": ranges, "journal_end": end},
        )  # fmt: skip

    def _drop(self, reasons: Sequence[str]) -> None:
        self._write([Void(reason="; ".join(reasons))])

    def _rebuild(self) -> None:
        """Read the journal: what the live generation was made of, and what came since."""
        live = self._store.live
        journal = self._store.journal
        where = str(journal.path)
        ends = [_end_of(generation) for generation in self._store.history()]
        self._ranges = [] if live is None else _ranges_of(live)
        self._begin = max(ends, default=0)
        spans = [*self._ranges, (self._begin, journal.end)]
        records = effective(journal.records(), spans, where)
        self._pending = bool(effective(journal.records(), spans[-1:], where))
        self._stats = expand(self._material.prior)
        self._samples: dict[str, Sample] = {}
        self._merged: dict[str, Statistics] = {}
        self._screen = None
        for batch in _batches(records):
            self._apply(batch, where)

    def _apply(self, records: Sequence[Record], where: str) -> None:
        """Bring statistics and samples up to date with records, samples all together."""
        samples = [r for r in records if isinstance(r, Sample)]
        if samples:
            self._learn(samples)
        for record in records:
            if isinstance(record, Removal):
                self._unlearn([self._samples.pop(i) for i in record.ids if i in self._samples])
            elif isinstance(record, Forgetting):
                self._forget(record.label)
            elif isinstance(record, Merging) and record.id not in self._merged:
                self._merged[record.id] = load(record.data, where)
                self._stats = merge(self._stats, self._merged[record.id])

    def _learn(self, samples: Sequence[Sample]) -> None:
        fresh = [s for s in samples if s.id not in self._samples]
        self._samples |= {s.id: s for s in fresh if s.role != "aside"}
        for label in dict.fromkeys(s.label for s in fresh if s.role == "train"):
            if label not in self._stats.labels:
                self._stats = with_label(self._stats, label)
        self._change([s for s in fresh if s.role == "train"], add)

    def _unlearn(self, samples: Sequence[Sample]) -> None:
        self._change([s for s in samples if s.role == "train"], subtract)
        # a class that this device made goes with its last sample
        factory = set(self._material.prior.labels)
        for label in {s.label for s in samples} - factory:
            place = index_of(self._stats.labels).get(label)
            if place is not None and self._stats.counts[place] == 0:
                self._stats = forget(self._stats, label)

    def _change(
        self, samples: Sequence[Sample], how: Callable[[Statistics, Any, Any], Statistics]
    ) -> None:
        if samples:
            index = index_of(self._stats.labels)
            classes = np.array([index[s.label] for s in samples], np.int64)
            self._stats = how(self._stats, self._placed_rows(samples), classes)

    def _forget(self, label: str) -> None:
        if label not in self._stats.labels:
            return
        own = [s for s in self._samples.values() if s.label == label]
        self._samples = {i: s for i, s in self._samples.items() if s.label != label}
        self._unlearn(own)
        if label in self._stats.labels:
            self._stats = forget(self._stats, label)

    def _write(self, records: Sequence[Record]) -> None:
        self._store.journal.extend([to_payload(r) for r in records])
        if any(isinstance(r, Void) for r in records):
            self._rebuild()
        else:
            self._pending = True
            self._apply(records, str(self._store.journal.path))

    def _take(
        self,
        features: Float32Array,
        names: Sequence[str],
        answers: Sequence[str],
        now: float,
    ) -> Added:
        """Decide on each sample's role, write all to the journal, learn them."""
        reasons: list[str | None] = [None] * len(names)
        if self._flood is not None:
            reasons = self._flood.admit(features, names, now)
        open_ = [i for i, reason in enumerate(reasons) if reason is None]
        for i, reason in zip(
            open_, self._screened(features[open_], [names[i] for i in open_]), strict=True
        ):
            reasons[i] = reason
        seen = dict.fromkeys(names, 0)
        for sample in self._samples.values():
            if sample.label in seen:
                seen[sample.label] += 1
        records: list[Sample] = []
        known = set(self._samples)
        ids = []
        for row, label in enumerate(names):
            name = sample_id(label, features[row])
            ids.append(name)
            if name in known:
                reasons[row] = reasons[row] or "it was learned before"
                continue
            known.add(name)
            role: Role = "aside"
            if reasons[row] is None:
                seen[label] += 1
                role = "holdout" if is_held_out(seen[label]) else "train"
            records.append(
                Sample(
                    id=name, label=label, role=role, features=features[row],
                    answer=answers[row], reason=reasons[row] or "",
                )
            )  # fmt: skip
        if records:
            self._write(records)
        return Added(
            ids=tuple(ids),
            learned=sum(r.role == "train" for r in records),
            held_out=sum(r.role == "holdout" for r in records),
            aside=tuple(
                SetAside(place=i, id=ids[i], label=names[i], reason=reason)
                for i, reason in enumerate(reasons)
                if reason is not None
            ),
        )

    def _screened(self, features: Float32Array, names: Sequence[str]) -> list[str | None]:
        """Return a reason for each sample that looks unlike its label."""
        if not self._screening or not len(features):
            return [None] * len(names)
        if self._screen is None:
            self._screen = self._fit_screen()
        if self._screen is None:
            return [None] * len(names)
        known = [n for n, c in zip(self._stats.labels, self._stats.counts, strict=True) if c > 0]
        index = index_of(self._stats.labels)
        rows = [index[n] for n in known]
        screen = self._screen.with_classes(self._stats.means[rows], self._stats.counts[rows], known)
        places = index_of(known)
        new = {n: -1 - i for i, n in enumerate(dict.fromkeys(n for n in names if n not in places))}
        classes = np.array([places.get(n, new.get(n, -1)) for n in names], np.int64)
        earlier: dict[int, npt.NDArray[Any]] = {}
        for name in set(names):
            own = [s for s in self._samples.values() if s.label == name and s.role == "train"]
            if own:
                earlier[places.get(name, new.get(name, -1))] = self._placed_rows(own)
        return screen.check(self._placed(features), classes, earlier=earlier)

    def _fit_screen(self) -> Screen | None:
        """Return a screen of the factory's classes; None where too few samples tell its limits."""
        material = self._material
        prior = expand(material.prior)
        enough = prior.counts[material.canary_classes] >= 4
        clean = self._placed(material.canary_features[enough])
        if len(clean) < MIN_CLEAN:
            return None
        free = max(prior.samples - len(prior.labels), 1.0)
        # with fewer samples than features the covariance knows few directions
        ridge = 0.1 if prior.samples > 2 * prior.width else 0.5
        return fit_screen(
            prior.means, prior.counts, within(prior) / free, prior.labels,
            clean=clean, clean_classes=material.canary_classes[enough], ridge=ridge,
        )  # fmt: skip

    def _look(self, samples: Sequence[Any]) -> tuple[Float32Array, list[str]]:
        """Return features (n, d) and what the factory state answers."""
        rows, answers = [], []
        for sample in samples:
            outputs = self._model.outputs(sample)
            if "features" not in outputs:
                raise ConfigError(
                    f"{self._model.bundle.where}: this graph gives no features to learn from"
                )
            features = outputs["features"][0].astype(np.float32)
            if not np.isfinite(features).all():
                raise DataError("a sample's features are infinite or no number")
            rows.append(features)
            answers.append(self._model.manifest.labels[int(outputs["logits"][0].argmax())])
        return np.stack(rows), answers

    def _find(self, features: Float32Array) -> str:
        """Return the id of the sample with these features."""
        for sample in self._samples.values():
            if np.allclose(sample.features, features, rtol=1e-4, atol=1e-5):
                return sample.id
        return ""

    def _placed(self, features: npt.NDArray[Any]) -> Float32Array:
        projection = self._material.projection
        return features.astype(np.float32) if projection is None else projection.apply(features)

    def _placed_rows(self, samples: Sequence[Sample]) -> Float32Array:
        if not samples:
            return np.zeros((0, self._stats.width), np.float32)
        return self._placed(np.stack([s.features for s in samples]))

    def _with_temperature(
        self,
        head: Head,
        features: Float32Array,
        classes: npt.NDArray[np.int64],
        index: Mapping[str, int],
    ) -> Head:
        """Fit the temperature to canary and holdout together, so that scores mean what they say."""
        material = self._material
        factory = np.array([index.get(n, -1) for n in material.prior.labels], np.int64)
        known = factory[material.canary_classes]
        rows = self._placed(material.canary_features[known >= 0])
        scores = head.scores(np.concatenate([rows, features]))
        truth = np.concatenate([known[known >= 0], classes])
        return replace(head, temperature=fit_temperature(scores, truth)) if len(truth) else head

    def _canary(self, candidate: State) -> Evidence | None:
        material, index = self._material, index_of(candidate.labels)
        factory = np.array([index.get(n, -1) for n in material.prior.labels], np.int64)
        truth = factory[material.canary_classes]
        kept = truth >= 0  # a class that was forgotten cannot be lost
        if not kept.any():
            return None
        features = material.canary_features[kept]
        answers = factory[material.canary_answers[kept]]
        before = self._live_answers(features, index, answers)
        after = candidate.head_logits(features).argmax(axis=1)
        return Evidence(truth=truth[kept], before=before, after=after, factory=answers)

    def _holdout(self, candidate: State) -> Evidence | None:
        index = index_of(candidate.labels)
        held = [s for s in self._samples.values() if s.role == "holdout" and s.label in index]
        if not held:
            return None
        features = np.stack([s.features for s in held])
        truth = np.array([index[s.label] for s in held], np.int64)
        answers = np.array([index.get(s.answer, -1) for s in held], np.int64)
        before = self._live_answers(features, index, answers)
        live = set(self._model.labels)
        before[[s.label not in live for s in held]] = -1
        after = candidate.head_logits(features).argmax(axis=1)
        return Evidence(truth=truth, before=before, after=after)

    def _live_answers(
        self, features: Float32Array, index: Mapping[str, int], factory: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Return what the live state answers, as places in a candidate's labels."""
        state = self._live
        if state is None:
            return factory.copy()
        found = state.head_logits(features).argmax(axis=1)
        places = np.array([index.get(n, -1) for n in state.labels], np.int64)
        result: npt.NDArray[np.int64] = places[found]
        return result


def _ranges_of(generation: Generation) -> list[tuple[int, int]]:
    try:
        return [(int(a), int(b)) for a, b in generation.receipt["ranges"]]
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"generation {generation.number}: its receipt names no ranges"
        ) from error


def _end_of(generation: Generation) -> int:
    end = generation.receipt.get("journal_end", 0)
    if type(end) is not int or not math.isfinite(end):
        raise IntegrityError(f"generation {generation.number}: its receipt has no end of journal")
    return end


def head_rules(material: Material) -> Rules:
    """Return rules by which a head can be promoted at all.

    A head that is solved anew is not the factory's: it answers some of the canary otherwise before
    it has learned anything. What that costs, with the confidence of the guard, and
    `HEAD_ALLOWANCE` more may be lost, and no less than what the canary can prove.
    """
    prior, projection = expand(material.prior), material.projection
    features = material.canary_features
    if not len(features) or not prior.samples:
        return default_rules(material)
    ridge = regularisation(prior) * material.ridge_factor
    placed = features if projection is None else projection.apply(features)
    answers = solve(prior, ridge=ridge).scores(placed).argmax(axis=1)
    before = material.canary_answers == material.canary_classes
    after = answers == material.canary_classes
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    cost = tango_bound(lost, gained, len(features))
    margin = max(material.margin, math.ceil(1e3 * (cost + HEAD_ALLOWANCE)) / 1e3)
    return Rules(margin=margin, factory_margin=max(0.05, margin))


def _batches(records: Sequence[Record]) -> list[list[Record]]:
    """Group neighbouring samples, so that their sums are taken at once."""
    groups: list[list[Record]] = []
    for record in records:
        if groups and isinstance(record, Sample) and isinstance(groups[-1][-1], Sample):
            groups[-1].append(record)
        else:
            groups.append([record])
    return groups


__all__ = [
    "HOLDOUT_SHARE",
    "KIND",
    "MAX_CLASSES",
    "Added",
    "Learner",
    "Receipt",
    "SetAside",
    "check_label",
]
