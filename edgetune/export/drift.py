"""What a bundle's features and scores look like, and from where on a window of them is an alarm.

The samples must be none that the model was trained on. Half of them give the space: centre,
principal directions, class means. The other half gives what is measured in it, and the windows
that the thresholds are set by. So the space that a device uses is the very one that was seen on
fresh samples; were it fitted again to all of them, each would lie nearer to it than any a device
sees, and every window there would look like drift. A window is compared with the means of the
rest of its half, as a device's windows are none of the exporter's samples; and it is drawn without
replacement, since repeats would let it scatter more than a device's does. Which half is which is
chance: thresholds come from several such splits together, the device gets the first.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.data import Split
from edgetune.errors import ConfigError
from edgetune.export.workshop import spread
from edgetune.runtime.bundle import DRIFT_NAME
from edgetune.runtime.drift import (
    CLASSES,
    Baseline,
    FloatArray,
    IntArray,
    Means,
    Space,
    dump_baseline,
    log_doubts,
)
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.tasks.classification import softmax

# of windows; the mix of classes has as much for itself
FALSE_ALARMS = 0.01
MAX_SAMPLES = 2000
# predictions; the largest that the samples suffice for is taken
WINDOWS = (64, 32)
SAMPLES_PER_WINDOW = 8
MAX_RANK = 32
SAMPLES_PER_RANK = 8
# wide features must not bloat a small bundle
MAX_BASIS_BYTES = 96 * 2**10
SCORE_BINS = 10
SPLITS = 8
WINDOWS_PER_SPLIT = 400
MIN_PULL, MAX_PULL = 1e-2, 1e6
# of log energies and doubts, and of any statistic: where nothing scatters, what float32 rounds off
# must not look like drift
LEAST_SPREAD = 1e-2
LEAST_LIMIT = 1e-2


def write_baseline(
    folder: Path, edge: EdgeModel, split: Split, *, temperature: float = 1.0
) -> str | None:
    """Write drift.npz into a draft bundle; its manifest has to be written after.

    Args:
        folder: of the draft.
        edge: the draft, or a bundle that answers as the device will.
        split: samples that the model was not trained on.
        temperature: that the device divides logits by for its scores.

    Returns:
        None, or why nothing was written.
    """
    names = {spec.name for spec in edge.manifest.outputs}
    if "logits" not in names:
        return f"a graph of task {edge.manifest.task} gives no scores to watch"
    least = min(WINDOWS) * SAMPLES_PER_WINDOW
    if len(split.inputs) < least:
        return f"{len(split.inputs)} {split.name} samples, and drift can be told from {least} on"
    found = [edge.outputs(split.inputs[i]) for i in spread(len(split.inputs), MAX_SAMPLES)]
    outputs = {
        name: np.concatenate([o[name] for o in found]) for name in names & {"logits", "features"}
    }
    if not all(np.isfinite(array).all() for array in outputs.values()):
        return "the graph gives features that are infinite or no number"
    (folder / DRIFT_NAME).write_bytes(dump_baseline(baseline_of(outputs, temperature=temperature)))
    return None


def baseline_of(
    outputs: Mapping[str, npt.NDArray[Any]],
    *,
    window: int | None = None,
    false_alarms: float = FALSE_ALARMS,
    seed: int = 0,
    temperature: float = 1.0,
) -> Baseline:
    """Return the baseline of a graph's outputs on samples that it was not trained on.

    Args:
        outputs: `logits`, (samples, labels), and `features`, (samples, features), where the
            graph gives them.
        window: predictions that a statistic is taken over; default: what the samples allow.
        false_alarms: share of windows that may alarm although nothing has changed.
        seed: of the halves and of the windows drawn.
        temperature: that logits are divided by for scores.

    Raises:
        ConfigError: there are less than 8 samples for each prediction of the window, or the
            share is not between 0 and 1.
    """
    if not 0 < false_alarms < 1:
        raise ConfigError(f"false_alarms: expected a share between 0 and 1, got {false_alarms:g}")
    probabilities = softmax(np.asarray(outputs["logits"], np.float32), temperature)
    scores, classes = probabilities.max(axis=1), probabilities.argmax(axis=1)
    samples, labels = probabilities.shape
    if window is None:
        window = next((w for w in WINDOWS if samples >= w * SAMPLES_PER_WINDOW), min(WINDOWS))
    if samples < window * SAMPLES_PER_WINDOW:
        raise ConfigError(
            f"a window of {window} predictions takes {window * SAMPLES_PER_WINDOW} samples, got"
            f" {samples}"
        )
    rng = np.random.default_rng(seed)
    halves = [_halve(outputs.get("features"), scores, classes, labels, rng) for _ in range(SPLITS)]
    seen = [half.draw(window, rng) for half in halves for _ in range(WINDOWS_PER_SPLIT)]
    return dataclasses.replace(
        halves[0].baseline(),
        window=window,
        samples=samples,
        false_alarms=false_alarms,
        thresholds=thresholds_of(seen, false_alarms),
    )


def thresholds_of(seen: list[dict[str, float]], false_alarms: float) -> dict[str, float]:
    """Return thresholds that the stated share of windows exceeds.

    Those of the inputs are set together: each is exceeded as often as every other, and any of
    them by `false_alarms` of the windows, however they hang together. `classes` has as much for
    itself.

    Args:
        seen: the statistics of windows in which nothing has changed.
        false_alarms: a share.
    """
    names = list(seen[0])
    values = np.array([[window[name] for name in names] for window in seen])  # (windows, names)
    own = names.index(CLASSES)
    # share of windows with as much or more: of the rarest statistic, least over the inputs
    tails = (-values).argsort(axis=0).argsort(axis=0) / len(seen)
    rarest = np.delete(tails, own, axis=1).min(axis=1)
    tail = np.quantile(rarest, false_alarms)
    limits = np.quantile(values, 1 - tail, axis=0)
    limits[own] = np.quantile(values[:, own], 1 - false_alarms)
    return dict(zip(names, np.maximum(limits, LEAST_LIMIT).tolist(), strict=True))


def fit_space(features: npt.NDArray[Any], classes: IntArray, labels: int) -> Space:
    """Return the space of features; its energies are of no use before they are measured.

    Args:
        features: (samples, features).
        classes: predicted, (samples,).
        labels: how many there are.
    """
    features = features.astype(np.float64)
    samples, width = features.shape
    rank = min(MAX_RANK, samples // SAMPLES_PER_RANK, width, MAX_BASIS_BYTES // 4 // width)
    mean = _stored(features.mean(axis=0))
    centred = features - mean
    within = centred - class_means(centred, classes, labels).values[classes]
    # the right singular vectors are the principal directions
    basis = _stored(np.linalg.svd(within, full_matrices=False)[2][: max(rank, 1)])
    along = centred @ basis.T
    deviation = _within(along, classes, labels)
    # a direction in which nothing moves must not be divided by 0
    scale = _stored(np.maximum(deviation, max(1e-3 * deviation.max(), 1e-12)))
    none = Means(values=np.zeros((labels, 2)), counts=np.zeros(labels), pull=1.0)
    return Space(
        mean=mean,
        basis=basis,
        scale=scale,
        centres=class_means(along / scale, classes, labels),
        energies=none,
        spread=np.ones(2),
    )


def class_means(values: FloatArray, classes: IntArray, labels: int) -> Means:
    """Return each class's mean, drawn towards the common mean as far as it is uncertain.

    The pull is the ratio of the variance within classes to that of class means, both estimated by
    the analysis of variance of unbalanced classes with random effects (Searle, Casella and
    McCulloch 1992, Variance Components), summed over the columns.

    Args:
        values: (samples, width).
        classes: (samples,).
        labels: how many classes there are.
    """
    samples, _ = values.shape
    counts = np.bincount(classes, minlength=labels).astype(np.float64)
    sums = np.zeros((labels, values.shape[1]))
    np.add.at(sums, classes, values)
    common = values.mean(axis=0)
    means = sums / np.maximum(counts, 1)[:, None]
    groups = int(np.count_nonzero(counts))
    within = float(np.sum((values - means[classes]) ** 2)) / max(samples - groups, 1)
    between = float(counts @ np.sum((means - common) ** 2, axis=1))
    size = samples - float(counts @ counts) / samples
    excess = between - (groups - 1) * within  # what the scatter of class means adds
    pull = within * size / excess if excess > 0 else MAX_PULL
    pull = float(np.clip(pull, MIN_PULL, MAX_PULL))
    return Means(values=(sums + pull * common) / (counts + pull)[:, None], counts=counts, pull=pull)


@dataclass(frozen=True, kw_only=True)
class _Half:
    """The samples that the space was not fitted to: where they lie in it, scores and classes."""

    space: Space | None
    placed: tuple[FloatArray, FloatArray] | None
    scores: npt.NDArray[np.float32]
    classes: IntArray
    labels: int
    edges: FloatArray
    bins: FloatArray  # (samples, bins), one 1 a row

    def draw(self, window: int, rng: np.random.Generator) -> dict[str, float]:
        """Return the statistics of a window drawn at random, against the rest."""
        shuffled = rng.permutation(len(self.scores))
        chosen, rest = shuffled[:window], shuffled[window:]
        placed = self.placed and (self.placed[0][chosen], self.placed[1][chosen])
        return self.baseline(rest).statistics(placed, self.scores[chosen], self.classes[chosen])

    def baseline(self, chosen: IntArray | slice = slice(None)) -> Baseline:
        """Return what is measured of the chosen samples; its thresholds are still to come."""
        classes, space = self.classes[chosen], self.space
        count = len(classes)
        if space is not None and self.placed is not None:
            energies = self.placed[1][chosen]
            means = class_means(energies, classes, self.labels)
            scatter = np.maximum(_within(energies, classes, self.labels), LEAST_SPREAD)
            space = dataclasses.replace(space, energies=means, spread=scatter)
        doubts = log_doubts(self.scores[chosen])[:, None]
        bins = class_means(self.bins[chosen], classes, self.labels)
        # a bin or a class that no sample fell into isn't impossible
        even = 1 / (len(self.edges) + 1)
        bins = dataclasses.replace(bins, values=(bins.values * count + even) / (count + 1))
        seen = np.bincount(classes, minlength=self.labels)
        return Baseline(
            window=1,
            samples=count,
            false_alarms=1.0,
            doubts=class_means(doubts, classes, self.labels),
            doubt_spread=max(float(_within(doubts, classes, self.labels)[0]), LEAST_SPREAD),
            edges=self.edges,
            bins=bins,
            shares=_stored((seen + 0.5) / (count + 0.5 * self.labels)),
            space=space,
            thresholds={},
        )


def _halve(
    features: npt.NDArray[Any] | None,
    scores: npt.NDArray[np.float32],
    classes: IntArray,
    labels: int,
    rng: np.random.Generator,
) -> _Half:
    """Fit the space to one half of the samples and return the other."""
    fitted, held = np.array_split(rng.permutation(len(scores)), 2)
    space, placed = None, None
    if features is not None:
        space = fit_space(features[fitted], classes[fitted], labels)
        placed = space.place(features[held], classes[held])
    scores, classes = scores[held], classes[held]
    # quantiles; several are one where scores are alike, as the 1.0 of a sure model
    shares = np.linspace(0, 1, SCORE_BINS + 1)[1:-1]
    edges = _stored(np.unique(np.quantile(scores, shares).astype(np.float32)))
    bins = np.eye(len(edges) + 1)[np.searchsorted(edges, scores, side="right")]
    return _Half(
        space=space, placed=placed, scores=scores, classes=classes, labels=labels, edges=edges,
        bins=bins,
    )  # fmt: skip


def _within(values: FloatArray, classes: IntArray, labels: int) -> FloatArray:
    """Return the standard deviation around class means of each column."""
    counts = np.bincount(classes, minlength=labels)
    sums = np.zeros((labels, values.shape[1]))
    np.add.at(sums, classes, values)
    residual = values - (sums / np.maximum(counts, 1)[:, None])[classes]
    free = max(len(values) - int(np.count_nonzero(counts)), 1)
    deviation: FloatArray = np.sqrt(np.sum(residual**2, axis=0) / free)
    return deviation


def _stored(values: npt.NDArray[Any]) -> FloatArray:
    """Return values as the file will hold them."""
    return values.astype(np.float32).astype(np.float64)
