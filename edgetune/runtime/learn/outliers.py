"""Labelled samples are looked at before they teach: outliers, wrong labels, floods.

What is found is *set aside*, with a reason for a person to read, not thrown away: a label that
looks wrong may be the lesson. `Screen` knows what the classes look like; `Flood` counts what
comes in. Neither reads a clock or a file.

Distances are squared Mahalanobis distances: of features whitened by the covariance within
classes, the same for all classes. Features of networks are not normal and have heavy tails, so
no limit is a chi-square's; each is a quantile of what clean samples gave (see `fit_screen`).

What can't be found: a wrong label between classes that lie close together, or that the
features don't tell apart; a class taught wrong from its first samples on, or in most of them;
anything of a class of which there are fewer than five samples.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, DataError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.integer[Any]]

# clean samples that a limit needs at the least
MIN_CLEAN = 50
# samples that a class needs before its mean decides anything; younger ones are looked at as a group
SETTLED = 30
# others that a sample of a young class is compared with, at the least
OTHERS = 4
# from so many on, one sample more or less doesn't move a median
_MANY = 32
_TAIL = 0.1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Squared distances, and differences of them, that clean samples seldom exceed.

    far: to the nearest class. flip: to the claimed class, less that to the nearest. The same of
    a young class, whose centre is the median of few samples: group_far, to that centre, and
    group_flip, less that to the nearest other class; infinite where there were too few clean
    samples to tell. group_spread: median of the distance to such a centre. noise: what a
    centre of n samples adds to a distance, times n.
    """

    far: float
    flip: float
    group_far: float
    group_flip: float
    group_spread: float
    noise: float


@dataclass(frozen=True, kw_only=True)
class Screen:
    """What the classes look like, and how far from that a clean sample lies; see `fit_screen`.

    origin: (d,). whitener: rows that make the covariance within classes the unit matrix,
    (d, d). centres: whitened class means, (classes, d). counts: samples of each, (classes,).
    labels: names of the classes.
    """

    origin: FloatArray
    whitener: FloatArray
    centres: FloatArray
    counts: FloatArray
    labels: tuple[str, ...]
    limits: Limits

    def check(
        self,
        features: npt.NDArray[Any],
        classes: IntArray,
        earlier: Mapping[int, npt.NDArray[Any]] | None = None,
    ) -> list[str | None]:
        """Say of each sample why it should be set aside; None where nothing speaks against it.

        A class with at least `SETTLED` samples is known by its mean. A sample of it is set
        aside if it lies far from every class, or much farther from the claimed class than from
        another. A new or young class is known by its samples only, those given here and the
        `earlier` ones: each is compared with the median of the others, and set aside if it
        lies much nearer to another class, or much farther out than is usual for this group.
        So a minority of wrong samples can't hide, and no single one, the first included, says
        what the class is. With fewer than five samples nothing is said.

        Args:
            features: (n, d).
            classes: what the samples are labelled as, (n,): an index into `labels`, or a number
                below 0 for a new class, another for each.
            earlier: class -> features of it accepted before, (m, d); of new and young classes.

        Raises:
            DataError: shapes disagree, or there is no such class.
        """
        width = len(self.origin)
        if features.ndim != 2 or features.shape[1] != width or classes.shape != features.shape[:1]:
            raise DataError(
                f"expected features (n, {width}) and n classes, got {features.shape} and"
                f" {classes.shape}"
            )
        if len(classes) and classes.max() >= len(self.labels):
            raise DataError(f"no class {classes.max()}: there are {len(self.labels)}")
        for wanted, known in (earlier or {}).items():
            if known.ndim != 2 or known.shape[1] != width or not np.isfinite(known).all():
                raise DataError(
                    f"earlier features of class {wanted}: expected finite numbers (m, {width}),"
                    f" got {known.shape}"
                )
        reasons: list[str | None] = [None] * len(features)
        finite = np.isfinite(features).all(axis=1)
        for row in np.flatnonzero(~finite).tolist():
            reasons[row] = "its features are not finite numbers"
        placed = self._place(np.where(finite[:, None], features, 0.0))
        distances = self._distances(placed)  # (n, classes)
        for wanted in np.unique(classes[finite]).tolist():
            rows = np.flatnonzero(finite & (classes == wanted))
            if wanted >= 0 and self.counts[wanted] >= SETTLED:
                found = self._of_settled(wanted, distances[rows])
            else:
                others = (earlier or {}).get(wanted)
                found = self._of_group(wanted, placed[rows], distances[rows], others)
            for row, reason in zip(rows.tolist(), found, strict=True):
                reasons[row] = reason
        return reasons

    def with_classes(
        self, means: FloatArray, counts: FloatArray, labels: Sequence[str]
    ) -> "Screen":
        """Return a screen of other classes, with the same whitening and limits.

        Args:
            means: (classes, d).
            counts: samples that each was taken over, (classes,).
            labels: names of the classes.
        """
        return replace(
            self,
            centres=(means - self.origin) @ self.whitener.T,
            counts=np.asarray(counts, np.float64),
            labels=tuple(labels),
        )

    def _place(self, features: npt.NDArray[Any]) -> FloatArray:
        return (features.astype(np.float64) - self.origin) @ self.whitener.T

    def _distances(self, placed: FloatArray) -> FloatArray:
        """Return squared distances to the class means, (n, classes).

        A mean of n samples is off by noise / n, which is taken off. Infinite to a class with
        too few samples.
        """
        counts = np.maximum(self.counts, 1)
        distances = _squared(placed, self.centres) - self.limits.noise / counts
        return np.where(self.counts >= OTHERS, distances, np.inf)

    def _of_settled(self, wanted: int, distances: FloatArray) -> list[str | None]:
        nearest = distances.argmin(axis=1)
        label = self.labels[wanted]
        reasons: list[str | None] = []
        for to, best in zip(distances, nearest.tolist(), strict=True):
            reason = None
            if to[best] > self.limits.far:
                reason = (
                    f"it is far from everything seen: its squared distance to the nearest class,"
                    f" {self.labels[best]!r}, is {to[best]:.4g}; up to {self.limits.far:.4g} is"
                    " usual"
                )
            elif to[wanted] - to[best] > self.limits.flip:
                reason = (
                    f"it is labelled {label!r} but lies with {self.labels[best]!r}: squared"
                    f" distances {to[wanted]:.4g} and {to[best]:.4g}; up to"
                    f" {self.limits.flip:.4g} more is usual"
                )
            reasons.append(reason)
        return reasons

    def _of_group(
        self,
        wanted: int,
        placed: FloatArray,
        distances: FloatArray,
        earlier: npt.NDArray[Any] | None,
    ) -> list[str | None]:
        count = len(placed)
        group = placed if earlier is None else np.concatenate((placed, self._place(earlier)))
        if len(group) <= OTHERS:
            return [None] * count
        limits = self.limits
        centres, others = _centres_of_others(group)
        away = np.sum((group - centres) ** 2, axis=1) - limits.noise / others  # (group,)
        # a class unlike those of the factory may well be wider than they are
        wider = max(1.0, float(np.median(away)) / limits.group_spread)
        elsewhere = distances.copy()
        if wanted >= 0:
            elsewhere[:, wanted] = np.inf
        nearest = elsewhere.argmin(axis=1)
        name = repr(self.labels[wanted]) if wanted >= 0 else "a new class"
        reasons: list[str | None] = []
        for to, best, own in zip(elsewhere, nearest.tolist(), away[:count].tolist(), strict=True):
            reason = None
            if own - to[best] > max(limits.group_flip, 0.0):
                reason = (
                    f"it is labelled {name} but lies with {self.labels[best]!r}: squared distances"
                    f" {own:.4g} to its {others} fellows and {to[best]:.4g}; up to"
                    f" {max(limits.group_flip, 0.0):.4g} more is usual"
                )
            elif own > limits.group_far * wider:
                reason = (
                    f"it is far from its {others} fellows of {name}: squared distance {own:.4g};"
                    f" up to {limits.group_far * wider:.4g} is usual for them"
                )
            reasons.append(reason)
        return reasons


def fit_screen(
    means: FloatArray,
    counts: FloatArray,
    covariance: FloatArray,
    labels: Sequence[str],
    *,
    clean: npt.NDArray[Any],
    clean_classes: IntArray,
    ridge: float = 0.1,
    far_rate: float = 0.001,
    flip_rate: float = 0.01,
) -> Screen:
    """Return a screen whose limits are those of clean samples.

    A limit is the smallest of the clean samples' values that a further clean sample exceeds
    with a chance of at most its rate: the ceil((n + 1) (1 - rate))-th of n (the quantile of
    conformal prediction, Vovk et al. 2005). Where n + 1 < 1 / rate there is none. Then the
    limits of "far" are drawn out from the largest tenth as an exponential tail of the squared
    distance (peaks over a threshold, Pickands 1975), never below the largest: with 75, 150, 300
    and 600 samples of the texts below that set aside 0.5, 0.3, 0.2 and 0.1 % of others where 0.1 %
    was asked, and the largest alone 1.6, 0.8, 0.4 and 0.2 %. A chi-square's limit would set
    aside many, a Pareto tail almost none. Every other limit is the largest, so that its rate
    is 1 / (n + 1).

    The flip rate is the larger for a reason. What limits it are clean samples that lie with
    another class, and the tenth of a per cent that do so most are the hardest or themselves
    labelled wrongly. With features that were made for other intents (77 classes, 384 features,
    the nearest mean right for 82 %) a limit at 0.1 % finds 49 % of the flips to a random other
    class, at 1 % 80 %, and at 2 % 89 %. Unlike the ratio of the two distances their difference
    doesn't fade in many dimensions: it is the log likelihood ratio of normal classes, twice.

    Args:
        means: class means, (classes, d).
        counts: samples that each was taken over, (classes,).
        covariance: pooled within classes, (d, d), float64.
        labels: names of the classes.
        clean: features of samples that are not among those of the statistics, (n, d), such as
            the canary's; of samples that are, distances would come out too small.
        clean_classes: their true classes, (n,).
        ridge: share of the mean variance that is added to all, so that directions in which the
            samples happened not to vary aren't taken for ones in which none can. 0.01 does
            with many more samples than features, 0.5 with fewer.
        far_rate: share of clean samples that "far from everything" may set aside.
        flip_rate: the same of "lies with another class".

    Raises:
        DataError: shapes disagree, numbers are not finite, a clean sample's class has too few
            samples, or there are fewer than `MIN_CLEAN` of them.
        ConfigError: `ridge` or a rate is out of range.

    Time grows with d^3, memory with d^2: 32 MiB at 2048 features.
    """
    _check_fit(means, counts, covariance, labels, clean, clean_classes)
    for name, rate in (("far_rate", far_rate), ("flip_rate", flip_rate)):
        if not 0.0 < rate < 1.0:
            raise ConfigError(f"{name}: expected a share between 0 and 1, got {rate}")
    origin = means.mean(axis=0)
    unlimited = Limits(
        far=np.inf, flip=np.inf, group_far=np.inf, group_flip=np.inf, group_spread=1.0, noise=0.0
    )
    screen = Screen(
        origin=origin,
        whitener=_whitener(covariance, ridge),
        centres=np.empty((0, 0)),
        counts=np.empty(0),
        labels=(),
        limits=unlimited,
    ).with_classes(means, counts, labels)
    placed = screen._place(clean)
    groups = _groups(placed, screen.centres, clean_classes)
    noise = 0.0
    if len(groups.rows) >= MIN_CLEAN:
        noise = max(0.0, OTHERS * float(np.median(groups.away - groups.own)))
    screen = replace(screen, limits=replace(unlimited, noise=noise))
    distances = screen._distances(placed)
    nearest = distances.min(axis=1)
    claimed = distances[np.arange(len(clean)), clean_classes]
    limits = replace(
        screen.limits,
        far=_tail_limit(nearest, far_rate),
        flip=_limit(claimed - nearest, flip_rate),
    )
    if len(groups.rows) >= MIN_CLEAN:
        away = groups.away - noise / OTHERS
        elsewhere = distances[groups.rows]
        elsewhere[np.arange(len(groups.rows)), clean_classes[groups.rows]] = np.inf
        limits = replace(
            limits,
            group_far=_tail_limit(away, far_rate),
            group_flip=_limit(away - elsewhere.min(axis=1), flip_rate),
            group_spread=float(np.median(away)),
        )
    return replace(screen, limits=limits)


@dataclass(frozen=True, kw_only=True)
class FloodRules:
    """How much of one thing may come in.

    window: accepted samples that are remembered. most: of these, samples of one label. period_s:
    after so many seconds an accepted sample is forgotten. near: distance of two samples of a
    label, as a share of the longer one's length, up to which they count as the same.

    The same picture again, coded anew, is within 0.05. One taken a moment later isn't: moved by
    two pixels it is 0.1 to 0.4 away in a MobileNetV2's features, in which other pictures of
    the class begin at 0.4; there 0.2 would stop bursts. Short texts of one intent begin at 0.05.
    """

    window: int = 50
    most: int = 40
    period_s: float = 86_400.0
    near: float = 0.05


class Flood:
    """Counts what comes in, so that no label drowns the others and no sample teaches twice.

    A label that has all its places waits until samples of other labels push its own out of the
    window, or until they are old. A new class can thus be taught in one go, of up to `most`
    samples. The clock is the caller's; it may be set back, which shortens no wait and
    lengthens it by a period at most. What isn't remembered across a restart is only this window.
    """

    def __init__(self, rules: FloodRules) -> None:
        """Begin with nothing seen.

        Raises:
            ConfigError: a rule is out of range.
        """
        if not 1 <= rules.most <= rules.window:
            raise ConfigError(
                f"most: expected 1 to {rules.window}, which is the window, got {rules.most}"
            )
        if not (rules.period_s > 0 and 0 <= rules.near < 1):
            raise ConfigError(
                "period_s: expected more than 0, near: expected 0 or more and below 1, got"
                f" {rules.period_s} and {rules.near}"
            )
        self.rules = rules
        # time, label, features; the oldest first
        self._recent: deque[tuple[float, str, FloatArray]] = deque(maxlen=rules.window)

    def admit(
        self, features: npt.NDArray[Any], labels: Sequence[str], now_s: float
    ) -> list[str | None]:
        """Accept samples one after the other; say of those set aside why, None of the others.

        Args:
            features: (n, d).
            labels: of each sample, n.
            now_s: seconds since any fixed moment.

        Raises:
            DataError: there are not as many labels as features.
        """
        if features.ndim != 2 or len(labels) != len(features):
            raise DataError(f"expected a label for each of {features.shape}, got {len(labels)}")
        if any(time > now_s for time, _, _ in self._recent):  # the clock was set back
            kept = [(min(time, now_s), label, old) for time, label, old in self._recent]
            self._recent = deque(kept, maxlen=self.rules.window)
        while self._recent and self._recent[0][0] <= now_s - self.rules.period_s:
            self._recent.popleft()
        reasons: list[str | None] = []
        for sample, label in zip(features.astype(np.float64), labels, strict=True):
            reason = self._against(sample, label, now_s)
            if reason is None:
                self._recent.append((now_s, label, sample))
            reasons.append(reason)
        return reasons

    def _against(self, sample: FloatArray, label: str, now_s: float) -> str | None:
        rules = self.rules
        alike = [(time, old) for time, name, old in self._recent if name == label]
        if not alike:
            return None
        known = np.stack([old for _, old in alike])  # (m, d)
        longer = np.maximum(np.linalg.norm(known, axis=1), np.linalg.norm(sample))
        away = np.linalg.norm(known - sample, axis=1)
        if (away <= rules.near * longer).any():
            share = float(np.min(away / np.maximum(longer, np.finfo(np.float64).tiny)))
            return (
                f"it is nearly the same as a sample of {label!r} accepted before: {share:.1%} of"
                f" its length away; more than {rules.near:.1%} is asked"
            )
        if len(alike) >= rules.most:
            wait_min = math.ceil((alike[0][0] + rules.period_s - now_s) / 60)
            return (
                f"{len(alike)} of the last {len(self._recent)} samples accepted are {label!r}, and"
                f" no more than {rules.most} of {rules.window} may be: add samples of other"
                f" labels, or wait {wait_min} minutes"
            )
        return None


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """Clean samples as if their class were known by few others only.

    rows: which samples, (m,). own: distance to the class mean, (m,). away: to the median of
    `OTHERS` others of the class, (m,).
    """

    rows: IntArray
    own: FloatArray
    away: FloatArray


def _groups(placed: FloatArray, centres: FloatArray, classes: IntArray) -> _Groups:
    found: list[tuple[IntArray, FloatArray, FloatArray]] = []
    for wanted in np.unique(classes).tolist():
        rows = np.flatnonzero(classes == wanted)
        if len(rows) <= OTHERS:
            continue
        # the next ones, round the class: every sample is compared with as many others
        turns = [np.roll(rows, -turn) for turn in range(1, OTHERS + 1)]
        centre = np.median(np.stack([placed[turn] for turn in turns]), axis=0)
        own = np.sum((placed[rows] - centres[wanted]) ** 2, axis=1)
        found.append((rows, own, np.sum((placed[rows] - centre) ** 2, axis=1)))
    if not found:
        return _Groups(rows=np.empty(0, np.int64), own=np.empty(0), away=np.empty(0))
    rows, own, away = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _Groups(rows=rows, own=own, away=away)


def _centres_of_others(group: FloatArray) -> tuple[FloatArray, int]:
    """Return of each sample the median of the others, (n, d), and how many those are."""
    if len(group) > _MANY:
        return np.median(group, axis=0)[None], len(group)
    centres = [np.median(np.delete(group, row, axis=0), axis=0) for row in range(len(group))]
    return np.stack(centres), len(group) - 1


def _squared(samples: FloatArray, centres: FloatArray) -> FloatArray:
    """Return squared distances of (n, d) to (k, d), (n, k)."""
    lengths = np.sum(samples**2, axis=1)[:, None] + np.sum(centres**2, axis=1)
    squared: FloatArray = lengths - 2.0 * samples @ centres.T
    return np.maximum(squared, 0.0)


def _limit(values: FloatArray, rate: float) -> float:
    """Return what a further value exceeds with a chance of at most `rate`, or the largest."""
    rank = math.ceil((len(values) + 1) * (1.0 - rate))
    return float(np.sort(values)[min(rank, len(values)) - 1])


def _tail_limit(values: FloatArray, rate: float) -> float:
    """Return `_limit`, drawn out beyond the largest where there are too few values."""
    count = len(values)
    if (count + 1) * rate >= 1.0:
        return _limit(values, rate)
    top = max(5, int(_TAIL * count))
    ordered = np.sort(values)
    start = ordered[-top - 1]
    excess = float(np.mean(ordered[-top:] - start))
    return max(float(ordered[-1]), float(start) + excess * math.log(top / (count * rate)))


def _whitener(covariance: FloatArray, ridge: float) -> FloatArray:
    """Return W with W (covariance + ridge * mean variance) W' = 1.

    Raises:
        ConfigError: `ridge` is negative or not finite.
        DataError: the sum is not positive definite.
    """
    if not 0.0 <= ridge < math.inf:
        raise ConfigError(f"ridge: expected a number of 0 or more, got {ridge}")
    width = len(covariance)
    regular = covariance + ridge * np.trace(covariance) / width * np.eye(width)
    try:
        whitener = np.linalg.inv(np.linalg.cholesky(regular))
    except np.linalg.LinAlgError:
        raise DataError(
            "the covariance within classes is not positive definite; a larger ridge than"
            f" {ridge} may help"
        ) from None
    return np.asarray(whitener, np.float64)


def _check_fit(
    means: FloatArray,
    counts: FloatArray,
    covariance: FloatArray,
    labels: Sequence[str],
    clean: npt.NDArray[Any],
    clean_classes: IntArray,
) -> None:
    classes, width = len(labels), covariance.shape[-1]
    shapes = {
        "means": (means, (classes, width)),
        "counts": (counts, (classes,)),
        "covariance": (covariance, (width, width)),
        "clean": (clean, (len(clean_classes), width)),
    }
    for name, (array, shape) in shapes.items():
        if array.shape != shape or not np.isfinite(array).all():
            raise DataError(f"{name}: expected finite numbers {shape}, got {array.shape}")
    if len(clean) < MIN_CLEAN:
        raise DataError(f"expected {MIN_CLEAN} clean samples or more, got {len(clean)}")
    if clean_classes.min() < 0 or clean_classes.max() >= classes:
        raise DataError(f"clean_classes: expected indices of {classes} labels")
    few = [labels[c] for c in np.unique(clean_classes).tolist() if counts[c] < OTHERS]
    if few:
        raise DataError(
            f"class {few[0]!r} has clean samples, but fewer than {OTHERS} in the statistics"
        )
