"""What a ridge head needs to know of its training samples: sums, and nothing of one sample.

For features x (a row, width d), classes c and weights w, statistics are the Gram matrix
G = sum w x^T x, the class sums s_c = sum_{i in c} w x and the class counts n_c = sum_{i in c} w.
They are sums: samples may come in any order and in parts, those of two devices are added, and
samples are unlearned by subtraction. All is float64, and no function changes its arguments.

A factory prior says the same in few bytes: exact counts, float32 means, and the scatter within
classes as factors of low rank with an exact diagonal (`compress`, `expand`).
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, DataError, IntegrityError
from edgetune.runtime.npz import load_arrays

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

SCHEMA_VERSION = 1
# of all arrays of a statistics file; 4096 features and 4096 classes take 192 MiB
MAX_BYTES = 2**28
# a float64 counts by ones up to here
MAX_COUNT = 2.0**53
# a count that is no sample but what rounding leaves when fractional weights are subtracted
ROUNDING = 1e-6
# samples turned into float64 at a time
CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Sums over samples; `labels` gives the order of the classes.

    gram: symmetric, (d, d). sums: (classes, d). counts: weighted samples, (classes,). A class
    without samples has count 0 and sum 0.
    """

    labels: tuple[str, ...]
    gram: FloatArray
    sums: FloatArray
    counts: FloatArray

    @property
    def width(self) -> int:
        """How many features a sample has, d."""
        return len(self.gram)

    @property
    def samples(self) -> float:
        """How many samples there are, by weight."""
        return float(self.counts.sum())

    @property
    def means(self) -> FloatArray:
        """Class means, (classes, d); 0 for a class without samples."""
        return self.sums / np.where(self.counts > 0, self.counts, 1)[:, None]


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Statistics in few bytes; see `expand` for what they stand for.

    counts: (classes,). means: (classes, d). deviations: standard deviation of each feature
    within classes, (d,). factor: in units of the deviations, float16 or float32, (rank, d).
    """

    labels: tuple[str, ...]
    counts: FloatArray
    means: Float32Array
    deviations: Float32Array
    factor: npt.NDArray[Any]


def empty(width: int, labels: Sequence[str] = ()) -> Statistics:
    """Return the statistics of no samples.

    Raises:
        DataError: a width below 1, or a label twice.
    """
    if width < 1:
        raise DataError(f"statistics of {width} features; expected 1 or more")
    names = tuple(labels)
    if len(set(names)) != len(names):
        raise DataError(f"the same label twice in {_some(names)}; a label names one class")
    return Statistics(
        labels=names,
        gram=np.zeros((width, width)),
        sums=np.zeros((len(names), width)),
        counts=np.zeros(len(names)),
    )


def add(
    stats: Statistics,
    features: npt.NDArray[Any],
    classes: npt.NDArray[Any],
    weights: npt.NDArray[Any] | None = None,
) -> Statistics:
    """Return the statistics with samples added.

    Args:
        stats: of the samples before.
        features: (n, d), any real type.
        classes: indices into the labels, (n,).
        weights: 0 or more, (n,); 1 each if not given. Weight 2 is the sample given twice.

    Raises:
        DataError: shapes that disagree, numbers that are not finite float32, a negative weight,
            or a class that isn't there.
    """
    return merge(stats, _sums(stats, features, classes, weights))


def subtract(
    stats: Statistics,
    features: npt.NDArray[Any],
    classes: npt.NDArray[Any],
    weights: npt.NDArray[Any] | None = None,
) -> Statistics:
    """Return the statistics as if samples had never been added, but for rounding.

    Samples that never were in the statistics can't be told from those that were, as long as
    there are enough of their class: the caller has to know what it added.

    Args:
        stats: with the samples.
        features: as they were added, (n, d).
        classes: as they were added, (n,).
        weights: as they were added, (n,).

    Raises:
        DataError: as `add`, or more samples of a class than there are.
    """
    return difference(stats, _sums(stats, features, classes, weights))


def with_label(stats: Statistics, label: str) -> Statistics:
    """Return the statistics with one class more, the last, of no samples yet.

    Raises:
        DataError: there is such a class.
    """
    if label in stats.labels:
        raise DataError(f"the label {label!r} is there already; expected a new one")
    return with_labels(stats, (*stats.labels, label))


def with_labels(stats: Statistics, labels: Sequence[str]) -> Statistics:
    """Return the statistics with the classes in the order of `labels`.

    Classes that are new have no samples. Only classes without samples can be left out;
    `forget` drops the others.

    Raises:
        DataError: a label twice, or a class with samples is left out.
    """
    wanted = empty(stats.width, labels)
    places = {label: place for place, label in enumerate(wanted.labels)}
    lost = [
        label
        for label, count in zip(stats.labels, stats.counts, strict=True)
        if label not in places and count > 0
    ]
    if lost:
        raise DataError(
            f"there are samples of {_some(lost)}, no class among {_some(wanted.labels)};"
            " forget these first"
        )
    kept = [place for place, label in enumerate(stats.labels) if label in places]
    into = [places[stats.labels[place]] for place in kept]
    wanted.sums[into] = stats.sums[kept]
    wanted.counts[into] = stats.counts[kept]
    return replace(wanted, gram=stats.gram)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics of the samples of both: a's labels in their order, then b's new ones.

    Raises:
        DataError: they are of features of different width.
    """
    _check_widths(a, b)
    labels = _joined(a.labels, b.labels)
    a, b = with_labels(a, labels), with_labels(b, labels)
    return Statistics(
        labels=labels,
        gram=a.gram + b.gram,
        sums=a.sums + b.sums,
        counts=a.counts + b.counts,
    )


def difference(a: Statistics, b: Statistics) -> Statistics:
    """Return a's statistics without b's, as if they had never been merged, but for rounding.

    The labels are a's: those that came with b stay, without samples (`with_labels` drops them).
    A class of which no more than 1e-6 samples are left has none.

    Raises:
        DataError: different widths, or b has more samples of a class than a.
    """
    _check_widths(a, b)
    labels = _joined(a.labels, b.labels)
    b = with_labels(b, labels)
    there = with_labels(a, labels).counts
    if (b.counts > there + ROUNDING).any():
        place = int(np.argmax(b.counts > there + ROUNDING))
        raise DataError(
            f"{b.counts[place]:g} samples of {labels[place]!r} to subtract, and there are"
            f" {there[place]:g}; expected samples that were added"
        )
    kept = len(a.labels)
    left = a.counts - b.counts[:kept]
    some = left > ROUNDING
    return Statistics(
        labels=a.labels,
        gram=(a.gram - b.gram) if some.any() else np.zeros_like(a.gram),
        sums=np.where(some[:, None], a.sums - b.sums[:kept], 0),
        counts=np.where(some, left, 0),
    )


def forget(stats: Statistics, label: str, gram: FloatArray | None = None) -> Statistics:
    """Return the statistics without a class.

    Its sum and count are dropped, which is exact. Its part of the Gram matrix is exact only if
    it is given. Without it n_c mu_c^T mu_c is subtracted, which is exact, and of the scatter
    within all classes the class's share of samples, n_c / n, as if it scattered as all classes
    together do: the covariance within classes stays what it was. What the class's scatter had of
    its own stays in that covariance; and samples of other classes, subtracted later, may then
    take more scatter than was left for them, which `ridge.solve` bears.

    Args:
        stats: with the class.
        label: of the class.
        gram: sum of w x^T x over the class's own samples, (d, d).

    Raises:
        DataError: there is no such class, or the Gram matrix isn't one of this width.
    """
    if label not in stats.labels:
        raise DataError(f"no class {label!r} to forget; expected one of {_some(stats.labels)}")
    place = stats.labels.index(label)
    if gram is None:
        gram = _class_gram(stats, place)
    elif gram.shape != stats.gram.shape or not np.isfinite(gram).all():
        raise DataError(
            f"Gram matrix of {label!r}: expected finite numbers of shape {stats.gram.shape}, got"
            f" {gram.shape}"
        )
    counts = np.delete(stats.counts, place)
    return Statistics(
        labels=tuple(name for name in stats.labels if name != label),
        gram=(stats.gram - gram) if counts.any() else np.zeros_like(stats.gram),
        sums=np.delete(stats.sums, place, axis=0),
        counts=counts,
    )


def within(stats: Statistics) -> FloatArray:
    """Return the scatter within classes, G - sum_c s_c^T s_c / n_c, symmetric, (d, d)."""
    seen = stats.counts > 0
    rows = stats.sums[seen] / np.sqrt(stats.counts[seen])[:, None]
    scatter: FloatArray = stats.gram - rows.T @ rows  # numpy makes a.T @ a symmetric to the bit
    return scatter


def checked_samples(
    features: npt.NDArray[Any], classes: npt.NDArray[Any], *, width: int, labels: Sequence[str]
) -> IntArray:
    """Return the classes as int64; raise a DataError if samples aren't what they should be.

    Args:
        features: (n, width), real and finite in float32.
        classes: indices into the labels, (n,).
        width: of the features.
        labels: of the classes.
    """
    if features.ndim != 2 or features.shape[1] != width or features.dtype.kind not in "fiu":
        raise DataError(
            f"features: expected real numbers of shape (samples, {width}), got"
            f" {features.dtype!s:.80} of shape {features.shape}"
        )
    if classes.shape != (len(features),) or (len(features) and classes.dtype.kind not in "iu"):
        raise DataError(
            f"classes: expected integers of shape ({len(features)},), got"
            f" {classes.dtype!s:.80} of shape {classes.shape}"
        )
    good = _finite(features)
    if not good.all():
        row = int(np.argmin(good.all(axis=1)))
        raise DataError(f"features: sample {row} has numbers that are not finite float32")
    unknown = (classes < 0) | (classes >= len(labels))
    if unknown.any():
        raise DataError(
            f"classes: {classes[unknown][0]} is no class; expected an index of the {len(labels)}"
            f" labels {_some(labels)}"
        )
    return classes.astype(np.int64)


def dump(stats: Statistics) -> bytes:
    """Return the statistics as an npz; same statistics, same bytes.

    The Gram matrix is stored as its upper triangle, row by row.
    """
    arrays: dict[str, Any] = {
        "version": np.int64(SCHEMA_VERSION),
        "labels": _label_bytes(stats.labels),
        "gram": stats.gram[_upper(stats.width)],
        # the header of an array says how it lies in memory
        "sums": np.ascontiguousarray(stats.sums),
        "counts": np.ascontiguousarray(stats.counts),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def load(data: bytes, where: str) -> Statistics:
    """Return the statistics that `dump` gave.

    Args:
        data: of the npz.
        where: name of the file, for errors.

    Raises:
        IntegrityError: the bytes are no such npz, or its numbers can't be sums of samples.
    """
    try:
        arrays = load_arrays(data, MAX_BYTES)
        version = int(_array(arrays, "version", (), np.int64))
        stats = _statistics(arrays) if version == SCHEMA_VERSION else None
    except KeyError as error:
        raise IntegrityError(f"{where}: no statistics: it lacks {error}") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: no statistics: {error!s:.200}") from error
    if stats is None:
        raise IntegrityError(
            f"{where}: statistics of version {version}; this edgetune reads {SCHEMA_VERSION}"
        )
    return stats


def compress(stats: Statistics, most_bytes: int) -> Prior:
    """Return a prior whose arrays take `most_bytes` at most.

    The covariance within classes is kept as its leading eigenvectors, as many as fit, and its
    diagonal. float16 is precise enough for all but a full set of eigenvectors, which is
    float32 if that fits.

    Raises:
        ConfigError: the means alone take more.
    """
    spread = within(stats) / max(stats.samples, 1e-300)  # (d, d)
    values, vectors = np.linalg.eigh(spread)  # ascending; eigenvectors are columns
    real = values > max(values[-1], 0) * stats.width * np.finfo(np.float64).eps
    deviations = np.sqrt(np.maximum(np.diag(spread), 0))
    bare = Prior(
        labels=stats.labels,
        counts=stats.counts,
        means=stats.means.astype(np.float32),
        deviations=deviations.astype(np.float32),
        factor=np.zeros((0, stats.width), np.float16),
    )
    room = most_bytes - sum(array.nbytes for array in prior_arrays(bare).values())
    if room < 0:
        raise ConfigError(
            f"a prior of {len(stats.labels)} classes and {stats.width} features takes"
            f" {most_bytes - room} bytes without any covariance, allowed {most_bytes}; allow more"
        )
    whole = int(real.sum())
    kind = np.float32 if whole * stats.width * 4 <= room else np.float16
    rank = min(whole, room // (stats.width * np.dtype(kind).itemsize))
    leading = np.arange(stats.width - 1, stats.width - 1 - rank, -1)
    rows = np.sqrt(values[leading])[:, None] * vectors[:, leading].T  # (rank, d)
    # no entry is above its feature's deviation, so that all are within 1 of 0
    units = np.where(deviations > 0, deviations, 1)
    return replace(bare, factor=(rows / units).astype(kind))


def expand(prior: Prior) -> Statistics:
    """Return the statistics that a prior stands for.

    With the factor's columns f_j, no longer than 1, the correlation within classes of features j
    and k is f_j . f_k, and 1 where j = k: what the factor lacks of the variance of a feature is
    taken to be uncorrelated with the others. So the scatter is positive semidefinite, with a
    diagonal as exact as the deviations.
    """
    factor = prior.factor.astype(np.float64)  # (rank, d)
    lengths = np.sqrt(np.sum(factor**2, axis=0))  # above 1 by rounding only
    factor /= np.maximum(lengths, 1)
    correlation = factor.T @ factor
    np.fill_diagonal(correlation, 1)
    deviations = prior.deviations.astype(np.float64)
    scatter = prior.counts.sum() * correlation * np.outer(deviations, deviations)
    means = prior.means.astype(np.float64)
    rows = means * np.sqrt(prior.counts)[:, None]
    return Statistics(
        labels=prior.labels,
        gram=scatter + rows.T @ rows,
        sums=means * prior.counts[:, None],
        counts=prior.counts.astype(np.float64),
    )


def prior_arrays(prior: Prior) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays that `prior_from_arrays` reads, to be stored in an npz."""
    return {
        "prior_labels": _label_bytes(prior.labels),
        "prior_counts": np.ascontiguousarray(prior.counts),
        "prior_means": np.ascontiguousarray(prior.means),
        "prior_deviations": np.ascontiguousarray(prior.deviations),
        "prior_factor": np.ascontiguousarray(prior.factor),
    }


def prior_from_arrays(arrays: Mapping[str, npt.NDArray[Any]], where: str) -> Prior:
    """Return the prior in the arrays of an npz, which may have others.

    Args:
        arrays: name -> array.
        where: name of the file, for errors.

    Raises:
        IntegrityError: an array is missing, or not what it should be.
    """
    try:
        return _prior(arrays)
    except KeyError as error:
        raise IntegrityError(f"{where}: no prior: it lacks {error}") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: no prior: {error!s:.200}") from error


def _sums(
    stats: Statistics,
    features: npt.NDArray[Any],
    classes: npt.NDArray[Any],
    weights: npt.NDArray[Any] | None,
) -> Statistics:
    """Return the statistics of samples alone."""
    places = checked_samples(features, classes, width=stats.width, labels=stats.labels)
    amounts = np.ones(len(features)) if weights is None else _weights(weights, len(features))
    found = empty(stats.width, stats.labels)
    for start in range(0, len(features), CHUNK):
        part = slice(start, start + CHUNK)
        x, y, w = features[part].astype(np.float64), places[part], amounts[part]
        rooted = x * np.sqrt(w)[:, None]
        found.gram[...] += rooted.T @ rooted
        for place in np.unique(y):
            found.sums[place] += w[y == place] @ x[y == place]
    found.counts[...] = np.bincount(places, amounts, len(stats.labels))
    return found


def _weights(weights: npt.NDArray[Any], count: int) -> FloatArray:
    if weights.shape != (count,) or weights.dtype.kind not in "fiu":
        raise DataError(
            f"weights: expected real numbers of shape ({count},), got {weights.dtype!s:.80} of"
            f" shape {weights.shape}"
        )
    bad = ~(_finite(weights) & (weights >= 0))
    if bad.any():
        raise DataError(f"weights: got {weights[bad][0]}; expected finite numbers, 0 or more")
    return weights.astype(np.float64)


def _finite(array: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which numbers are finite in float32: no sum of their squares overflows float64."""
    with np.errstate(over="ignore"):
        return np.isfinite(array.astype(np.float32))


def _class_gram(stats: Statistics, place: int) -> FloatArray:
    """Return what a class's Gram matrix is if it scatters as all classes together do."""
    count = stats.counts[place]
    if count == 0:
        return np.zeros_like(stats.gram)
    row = stats.sums[place] / np.sqrt(count)
    gram: FloatArray = np.outer(row, row) + within(stats) * (count / stats.samples)
    return gram


def _check_widths(a: Statistics, b: Statistics) -> None:
    if a.width != b.width:
        raise DataError(
            f"statistics of {a.width} and of {b.width} features; expected the same backbone"
        )


def _joined(a: Sequence[str], b: Sequence[str]) -> tuple[str, ...]:
    """Return the labels of a, then those of b that a lacks."""
    return tuple(dict.fromkeys((*a, *b)))


def _upper(width: int) -> npt.NDArray[np.bool_]:
    return ~np.tri(width, k=-1, dtype=np.bool_)


def _label_bytes(labels: Sequence[str]) -> npt.NDArray[np.uint8]:
    # an array of strings would lose a zero at the end of one
    return np.frombuffer(json.dumps(list(labels)).encode("ascii"), np.uint8)


def _labels(arrays: Mapping[str, npt.NDArray[Any]], name: str) -> tuple[str, ...]:
    stored = arrays[name]
    if stored.dtype != np.uint8 or stored.ndim != 1:
        raise ValueError(f"{name}: expected the bytes of a JSON array")
    labels = json.loads(stored.tobytes())
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{name}: expected a JSON array of strings")
    if len(set(labels)) != len(labels):
        raise ValueError(f"{name}: the same label twice")
    return tuple(labels)


def _statistics(arrays: Mapping[str, npt.NDArray[Any]]) -> Statistics:
    """Return the statistics of an npz's arrays; a ValueError where they can't be any."""
    labels = _labels(arrays, "labels")
    sums = arrays["sums"]
    width = sums.shape[1] if sums.ndim == 2 else 0
    # before anything of that width is made: an array of no classes may claim any
    if width < 1 or arrays["gram"].shape != (width * (width + 1) // 2,):
        raise ValueError(f"gram of shape {arrays['gram'].shape} and sums of shape {sums.shape}")
    gram = np.zeros((width, width))
    gram[_upper(width)] = _array(arrays, "gram", arrays["gram"].shape, np.float64)
    if (np.diag(gram) < 0).any():
        raise ValueError("gram: a sum of squares below 0")
    counts = _counts(arrays, "counts", len(labels))
    sums = _array(arrays, "sums", (len(labels), width), np.float64)
    if sums[counts == 0].any():
        raise ValueError("sums: of a class without samples")
    return Statistics(labels=labels, gram=gram + np.triu(gram, k=1).T, sums=sums, counts=counts)


def _prior(arrays: Mapping[str, npt.NDArray[Any]]) -> Prior:
    """Return the prior of an npz's arrays; a ValueError where they can't be any."""
    labels = _labels(arrays, "prior_labels")
    factor = arrays["prior_factor"]
    if factor.ndim != 2 or factor.shape[1] < 1 or factor.dtype not in (np.float16, np.float32):
        raise ValueError(f"prior_factor: {factor.dtype!s:.80} of shape {factor.shape}")
    width = factor.shape[1]
    deviations = _array(arrays, "prior_deviations", (width,), np.float32)
    if (deviations < 0).any():
        raise ValueError("prior_deviations: below 0")
    return Prior(
        labels=labels,
        counts=_counts(arrays, "prior_counts", len(labels)),
        means=_array(arrays, "prior_means", (len(labels), width), np.float32),
        deviations=deviations,
        factor=_array(arrays, "prior_factor", factor.shape, factor.dtype),
    )


def _counts(arrays: Mapping[str, npt.NDArray[Any]], name: str, classes: int) -> FloatArray:
    counts: FloatArray = _array(arrays, name, (classes,), np.float64)
    if (counts < 0).any() or (counts > MAX_COUNT).any():
        raise ValueError(f"{name}: expected 0 to {MAX_COUNT:g} samples")
    return counts


def _array(
    arrays: Mapping[str, npt.NDArray[Any]],
    name: str,
    shape: tuple[int, ...],
    kind: npt.DTypeLike,
) -> npt.NDArray[Any]:
    array = arrays[name]
    if array.shape != shape or array.dtype != kind:
        raise ValueError(
            f"{name}: expected {np.dtype(kind)} of shape {shape}, got {array.dtype!s:.80} of"
            f" shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: numbers that are not finite")
    return np.asarray(array, order="C")


def _some(labels: Sequence[str], most: int = 5) -> str:
    """Return the first labels, for one line of an error."""
    named = ", ".join(repr(label) for label in labels[:most])
    return named + (", ..." if len(labels) > most else "") if labels else "none"
