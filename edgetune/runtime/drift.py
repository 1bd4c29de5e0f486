"""Does a device still see what its model was made for? Statistics of a window of predictions.

The exporter stores in `drift.npz` what the bundle's own features and scores look like on samples
that it was not trained on, and how far each statistic of a window may go before it is an alarm
(`edgetune.export.drift`). All but `classes` are taken given the predicted class, so that a device
that sees other classes more often than the exporter did raises no alarm for that alone.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import IntegrityError
from edgetune.runtime.bundle import DRIFT_NAME, Bundle
from edgetune.runtime.npz import load_arrays

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# of all its arrays; the exporter writes about a hundred KiB
MAX_BYTES = 2**24
MAX_WINDOW = 4096
SCHEMA_VERSION = 1
# of the inputs; these alarm together at the stated rate
MEAN, INSIDE, OUTSIDE, DOUBT, SCORES = "mean", "inside", "outside", "doubt", "scores"
# of the mix of classes, at a rate of its own: it may well change while the inputs don't
CLASSES = "classes"
STATISTICS = (MEAN, INSIDE, OUTSIDE, DOUBT, SCORES, CLASSES)
# what stands for infinite and for no number, which JSON lacks
MAX_STATISTIC = 1e9
# keeps the logarithm of a squared distance finite, in units of the variance inside the subspace
NEAREST = 1e-9
# and that of a doubt; surer than this is as sure as can be told from float32
LEAST_DOUBT = 1e-4


@dataclass(frozen=True, kw_only=True)
class Means:
    """A mean for each class, drawn towards the mean of all where a class is rare.

    Empirical Bayes: class means scatter around the common one with 1/`pull` of the variance that
    a sample has around its class mean. What is left of that variance in a mean of `counts[c]`
    samples is 1/(counts[c] + pull), for a class never seen too.

    values: (classes, width). counts: samples of each class, (classes,). pull: more than 0.
    """

    values: FloatArray
    counts: FloatArray
    pull: float

    def variance(self, mix: FloatArray) -> float:
        """Return the variance of the mean expected of a mix of classes, in units of a sample's.

        Args:
            mix: share of each class, (classes,).
        """
        return float(np.sum(mix**2 / (self.counts + self.pull)))


@dataclass(frozen=True, kw_only=True)
class Space:
    """What features look like: a subspace in which they vary within classes, and the rest.

    mean: (features,). basis: orthonormal rows, (rank, features). scale: standard deviation
    within a class along each row, (rank,). centres: class means in that basis, in units of
    `scale`, width rank. energies: mean log squared distance from the class mean inside the
    subspace and from the subspace, width 2. spread: standard deviations of the two, (2,).
    """

    mean: FloatArray
    basis: FloatArray
    scale: FloatArray
    centres: Means
    energies: Means
    spread: FloatArray

    def place(self, features: npt.NDArray[Any], classes: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return where samples lie from their class mean, and their log energies.

        Returns:
            Shape (samples, rank), in standard deviations, and (samples, 2).
        """
        centred = features.astype(np.float64) - self.mean
        along = centred @ self.basis.T  # (samples, rank)
        off = np.sum(centred**2, axis=1) - np.sum(along**2, axis=1)
        along = along / self.scale - self.centres.values[classes]
        inside = np.sum(along**2, axis=1)
        unit = float(np.mean(self.scale**2))
        energies = np.stack([inside, np.maximum(off, 0) / unit], axis=1)
        return along, np.log(energies + NEAREST)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What the bundle gave when it was exported, and from where on a window is an alarm.

    window: predictions that a statistic is taken over. samples: how many it was made from.
    false_alarms: share of windows that alarm although nothing has changed. doubts: mean log
    doubt, width 1. doubt_spread: its standard deviation within classes. edges: between the bins
    of the score, (bins - 1,). bins: shares of the bins, width bins. shares: of the predicted
    classes, (classes,). space: None for a graph without features. thresholds: statistic ->
    largest value that is no alarm.
    """

    window: int
    samples: int
    false_alarms: float
    doubts: Means
    doubt_spread: float
    edges: FloatArray
    bins: Means
    shares: FloatArray
    space: Space | None
    thresholds: Mapping[str, float]

    def measure(
        self, features: npt.NDArray[Any] | None, scores: npt.NDArray[Any], classes: IntArray
    ) -> dict[str, float]:
        """Return the statistics of a window.

        Args:
            features: (samples, features); None where the graph has none.
            scores: probability of the predicted class, (samples,).
            classes: index of the predicted class, (samples,).

        Returns:
            `mean`: squared distance of the mean place from the class means, over what it would
            be by chance: about 1 (Hotelling's T-squared over the rank). `inside`, `outside`: how
            many standard errors the mean log energy in the subspace and off it is away. `doubt`:
            the same of the mean log of 1 - score. `scores`, `classes`: population stability index.
        """
        # features of no number give statistics of no number, which are limited below
        with np.errstate(all="ignore"):
            placed = None
            if self.space is not None and features is not None:
                placed = self.space.place(features, classes)
            return self.statistics(placed, scores, classes)

    def statistics(
        self,
        placed: tuple[FloatArray, FloatArray] | None,
        scores: npt.NDArray[Any],
        classes: IntArray,
    ) -> dict[str, float]:
        """Return what `measure` returns, given what `Space.place` did."""
        count = len(scores)
        seen = np.bincount(classes, minlength=len(self.shares))
        mix = seen / count
        found: dict[str, float] = {}
        if placed is not None and self.space is not None:
            space, (along, energies) = self.space, placed
            moved = along.mean(axis=0)
            found[MEAN] = float(np.mean(moved**2)) / (1 / count + space.centres.variance(mix))
            away = np.abs((energies - space.energies.values[classes]).mean(axis=0))
            errors = space.spread * np.sqrt(1 / count + space.energies.variance(mix))
            found[INSIDE], found[OUTSIDE] = (away / errors).tolist()
        doubts = log_doubts(scores) - self.doubts.values[classes, 0]
        error = self.doubt_spread * math.sqrt(1 / count + self.doubts.variance(mix))
        found[DOUBT] = abs(float(doubts.mean())) / error
        bins = np.searchsorted(self.edges, scores, side="right")
        binned = np.bincount(bins, minlength=len(self.edges) + 1)
        found[SCORES] = psi(binned, mix @ self.bins.values)
        found[CLASSES] = psi(seen, self.shares)
        return {
            name: MAX_STATISTIC if math.isnan(value) else min(value, MAX_STATISTIC)
            for name, value in found.items()
        }

    def alarms(self, statistics: Mapping[str, float]) -> tuple[str, ...]:
        """Return the names of the statistics that are above their threshold."""
        return tuple(n for n, value in statistics.items() if value > self.thresholds[n])


def log_doubts(scores: npt.NDArray[Any]) -> FloatArray:
    """Return the logarithms of 1 - score, bounded where a score is 1."""
    return np.log(1 - scores.astype(np.float64) + LEAST_DOUBT)


def psi(counts: npt.NDArray[Any], shares: FloatArray) -> float:
    """Return the population stability index, sum of (p - q) ln(p / q).

    One sample more, spread as expected, keeps it finite where a bin is empty.

    Args:
        counts: of a window's bins, (bins,).
        shares: q, what is expected of each, more than 0, sum 1, (bins,).
    """
    found = (counts + shares) / (counts.sum() + 1)
    return float(np.sum((found - shares) * np.log(found / shares)))


def dump_baseline(baseline: Baseline) -> bytes:
    """Return the bytes of drift.npz; same baseline, same bytes."""
    arrays: dict[str, Any] = {
        "version": SCHEMA_VERSION,
        "window": baseline.window,
        "samples": baseline.samples,
        "false_alarms": baseline.false_alarms,
        "edges": baseline.edges.astype(np.float32),
        "shares": baseline.shares.astype(np.float32),
        "statistics": np.array(list(baseline.thresholds)),
        "thresholds": np.array(list(baseline.thresholds.values()), np.float64),
        "doubt_spread": np.float32(baseline.doubt_spread),
        **_dump_means("doubts", baseline.doubts),
        **_dump_means("bins", baseline.bins),
    }
    if baseline.space is not None:
        space = baseline.space
        for name in ("mean", "basis", "scale", "spread"):
            arrays[name] = getattr(space, name).astype(np.float32)
        arrays |= _dump_means("centres", space.centres) | _dump_means("energies", space.energies)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read_baseline(data: bytes, *, where: str) -> Baseline:
    """Return the baseline in the bytes of a drift.npz.

    Raises:
        IntegrityError: they are none, or of an unknown version.
    """
    try:
        arrays = load_arrays(data, MAX_BYTES)
        version = int(arrays["version"])
        baseline = _baseline(arrays) if version == SCHEMA_VERSION else None
    except KeyError as error:
        raise IntegrityError(f"{where}: is no drift baseline: it lacks {error}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise IntegrityError(f"{where}: is no drift baseline: {error!s:.200}") from error
    if baseline is None:
        raise IntegrityError(
            f"{where}: drift baseline of version {version}; this edgetune reads {SCHEMA_VERSION}"
        )
    return baseline


def bundle_baseline(bundle: Bundle) -> Baseline | None:
    """Return the baseline that a bundle carries; None if it carries none.

    Raises:
        IntegrityError: it can't be read, or is another graph's.
    """
    manifest = bundle.manifest
    if DRIFT_NAME not in manifest.files:
        return None
    where = f"{bundle.where}: {DRIFT_NAME}"
    baseline = read_baseline(bundle.read(DRIFT_NAME), where=where)
    shapes = {spec.name: spec.shape for spec in manifest.outputs}
    given = shapes.get("features", ())[-1:]
    wanted = baseline.space.mean.shape if baseline.space else given
    if len(baseline.shares) != len(manifest.labels) or wanted != given:
        raise IntegrityError(
            f"{where}: is of {len(baseline.shares)} labels and {wanted} features; the graph has"
            f" {len(manifest.labels)} and {given}"
        )
    return baseline


def _baseline(arrays: Mapping[str, npt.NDArray[Any]]) -> Baseline:
    """Return the baseline of a drift.npz's arrays; a ValueError where their shapes disagree."""
    names = tuple(arrays["statistics"].tolist())
    classes, bins = len(arrays["shares"]), len(arrays["edges"]) + 1
    space: Space | None = None
    measured: tuple[str, ...] = (DOUBT, SCORES, CLASSES)
    if "basis" in arrays:
        measured = STATISTICS
        rank, features = arrays["basis"].shape
        space = Space(
            mean=_real(arrays, "mean", (features,)),
            basis=_real(arrays, "basis", (rank, features)),
            scale=_real(arrays, "scale", (rank,), positive=True),
            centres=_read_means(arrays, "centres", classes, rank),
            energies=_read_means(arrays, "energies", classes, 2),
            spread=_real(arrays, "spread", (2,), positive=True),
        )
    if set(names) != set(measured):
        raise ValueError(f"thresholds of {', '.join(names)}, expected of {', '.join(measured)}")
    thresholds = _real(arrays, "thresholds", (len(measured),))
    window = int(arrays["window"])
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"a window of {window}, allowed 1 to {MAX_WINDOW}")
    false_alarms = float(arrays["false_alarms"])
    if not 0 < false_alarms < 1:
        raise ValueError(f"a share of {false_alarms} false alarms")
    edges = _real(arrays, "edges", (bins - 1,))
    if (np.diff(edges) < 0).any():
        raise ValueError("edges that do not ascend")
    return Baseline(
        window=window,
        samples=int(arrays["samples"]),
        false_alarms=false_alarms,
        doubts=_read_means(arrays, "doubts", classes, 1),
        doubt_spread=float(_real(arrays, "doubt_spread", (), positive=True)),
        edges=edges,
        bins=_read_means(arrays, "bins", classes, bins),
        shares=_real(arrays, "shares", (classes,), positive=True),
        space=space,
        thresholds=dict(zip(names, thresholds.tolist(), strict=True)),
    )


def _dump_means(name: str, means: Means) -> dict[str, Any]:
    return {
        name: means.values.astype(np.float32),
        f"{name}_counts": means.counts.astype(np.float32),
        f"{name}_pull": np.float32(means.pull),
    }


def _read_means(
    arrays: Mapping[str, npt.NDArray[Any]], name: str, classes: int, width: int
) -> Means:
    counts = _real(arrays, f"{name}_counts", (classes,))
    if (counts < 0).any():
        raise ValueError(f"{name}_counts: less than nothing")
    return Means(
        values=_real(arrays, name, (classes, width)),
        counts=counts,
        pull=float(_real(arrays, f"{name}_pull", (), positive=True)),
    )


def _real(
    arrays: Mapping[str, npt.NDArray[Any]],
    name: str,
    shape: tuple[int, ...],
    *,
    positive: bool = False,
) -> FloatArray:
    array = arrays[name].astype(np.float64)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers of shape {shape}, got {array.shape}")
    if positive and not (array > 0).all():
        raise ValueError(f"{name}: expected numbers above 0")
    return array
