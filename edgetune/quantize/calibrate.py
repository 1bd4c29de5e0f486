"""Which values a tensor takes on real samples, and the range that quantization should cover.

Samples stream: one feed is in memory at a time, and of a tensor only its extremes or a
histogram is kept, so memory does not grow with the number of samples.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

import edgetune.runtime.ort as _telemetry_off  # noqa: F401  (before onnxruntime is imported)
from edgetune.errors import DataError
from edgetune.quantize.layers import Feeds, copy_model

import onnxruntime  # isort: skip

Method = Literal["minmax", "percentile", "entropy", "mse"]
Counts = npt.NDArray[np.int64]

BINS = 2048
LEVELS = 256
# share of a tensor's values that the percentile method leaves outside, both ends together
OUTSIDE = 1e-4
# the entropy method tries so many shares of the whole range
SHRINKS = np.linspace(1.0, 0.25, 76)


@dataclass(frozen=True, kw_only=True)
class Range:
    """What the codes of a tensor are to cover, in real units; 0 is inside."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of a tensor's values in equal bins over [low, high]."""

    low: float
    high: float
    counts: Counts


def calibrate(
    model: onnx.ModelProto,
    feeds: Iterable[Feeds],
    tensors: Sequence[str],
    *,
    method: Method = "minmax",
) -> dict[str, Range]:
    """Return the range of each of `tensors` over all feeds.

    Args:
        model: float graph.
        feeds: inputs of the graph; gone through once by minmax, else twice, so a
            list or anything else that starts anew when iterated.
        tensors: names of float tensors in the graph.
        method: "minmax" covers all that was seen; "percentile" leaves the outermost 0.01 % of
            the values out; "entropy" takes the range whose 256 levels lose the least information
            (smallest Kullback-Leibler divergence; Migacz, GTC 2017); "mse" the one with the
            smallest squared error.

    Raises:
        DataError: there are no feeds, a tensor is not finite on one of them, or the second time
            there are fewer or more of them.
    """
    if not tensors:
        return {}
    extremes, count = _extremes(model, feeds, tensors)
    if method == "minmax":
        return {name: _with_zero(low, high) for name, (low, high) in extremes.items()}
    choose = _METHODS[method]
    histograms, again = _histograms(model, feeds, extremes)
    if again != count:
        raise DataError(
            f"calibration: {count} samples the first time and {again} the second; {method} goes"
            " through them twice: pass a list, or another iterable that starts anew"
        )
    return {name: choose(histogram) for name, histogram in histograms.items()}


def run_tensors(
    model: onnx.ModelProto, feeds: Iterable[Feeds], tensors: Sequence[str]
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Run the graph on each feed and yield the values of `tensors`, whatever their place in it."""
    probed = copy_model(model)
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        session = open_model(probed, Path(folder))
        for feed in feeds:
            yield dict(zip(tensors, session.run(list(tensors), feed), strict=True))


def open_model(model: onnx.ModelProto, folder: Path) -> Any:
    """Return an onnxruntime session of a model in memory, by way of a file in `folder`.

    Level "basic": nothing that fuses a tensor away or packs for this CPU is needed for a look.
    """
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=model.ByteSize() > 2**30)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))
    options.log_severity_level = 3
    # what a tensor looked like in one run must not stay in memory until the next
    options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _extremes(
    model: onnx.ModelProto, feeds: Iterable[Feeds], tensors: Sequence[str]
) -> tuple[dict[str, tuple[float, float]], int]:
    extremes: dict[str, tuple[float, float]] = {}
    samples = 0
    for values in run_tensors(model, feeds, tensors):
        samples += 1
        for name, value in values.items():
            low, high = float(value.min()), float(value.max())
            if not (np.isfinite(low) and np.isfinite(high)):
                raise DataError(f"calibration: tensor {name!r} is not finite on a sample")
            before = extremes.get(name, (low, high))
            extremes[name] = (min(low, before[0]), max(high, before[1]))
    if not samples:
        raise DataError("calibration: expected at least one sample, got none")
    return extremes, samples


def _histograms(
    model: onnx.ModelProto, feeds: Iterable[Feeds], extremes: dict[str, tuple[float, float]]
) -> tuple[dict[str, Histogram], int]:
    counts = {name: np.zeros(BINS, np.int64) for name in extremes}
    samples = 0
    for values in run_tensors(model, feeds, list(extremes)):
        samples += 1
        for name, value in values.items():
            low, high = extremes[name]
            if high > low:
                counts[name] += np.histogram(value, bins=BINS, range=(low, high))[0]
    histograms = {
        name: Histogram(low=low, high=high, counts=counts[name])
        for name, (low, high) in extremes.items()
    }
    return histograms, samples


def percentile_range(histogram: Histogram) -> Range:
    """Leave out the outermost `OUTSIDE` share of the values, half of it at each end."""
    total = int(histogram.counts.sum())
    if total == 0:
        return _with_zero(histogram.low, histogram.high)
    edges = np.linspace(histogram.low, histogram.high, BINS + 1)
    below = np.cumsum(histogram.counts) / total  # share at or below the upper edge of each bin
    first = int(np.searchsorted(below, OUTSIDE / 2, side="right"))
    last = int(np.searchsorted(below, 1 - OUTSIDE / 2, side="left"))
    return _with_zero(float(edges[first]), float(edges[min(last, BINS - 1) + 1]))


def entropy_range(histogram: Histogram) -> Range:
    """Shrink the range, both ends by one factor, to where 256 levels lose the least information.

    The reference distribution has what lies outside added to its outermost bins; the candidate
    is the inside, averaged within each level over the bins that are not empty. The bin of 0 is
    left out: 0 has a code of its own, and after ReLU its mass would hide all else.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017.
    """
    if not histogram.counts.any():
        return _with_zero(histogram.low, histogram.high)
    centres = histogram.low + (np.arange(BINS) + 0.5) * (histogram.high - histogram.low) / BINS
    counts = _without_zero(histogram, centres)
    best, best_loss = 1.0, np.inf
    for shrink in SHRINKS:
        low, high = shrink * min(histogram.low, 0.0), shrink * max(histogram.high, 0.0)
        loss = _information_lost(counts, centres, low, high)
        if loss < best_loss - 1e-12:
            best, best_loss = float(shrink), loss
    return _with_zero(best * histogram.low, best * histogram.high)


def error_range(histogram: Histogram) -> Range:
    """Shrink the range, both ends by one factor, to where the squared error is smallest.

    What lies inside is off by a step's uniform error, step^2 / 12; what lies outside by its
    distance to the end; 0, of which ReLU makes many, by nothing.
    """
    centres = histogram.low + (np.arange(BINS) + 0.5) * (histogram.high - histogram.low) / BINS
    counts = _without_zero(histogram, centres)
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    shrinks = SHRINKS[:, None]  # (candidates, 1)
    outside = np.maximum(centres - shrinks * high, 0) + np.maximum(shrinks * low - centres, 0)
    step = shrinks * (high - low) / (LEVELS - 1)
    errors = (counts * np.where(outside > 0, outside**2, step**2 / 12)).sum(axis=1)
    best = float(SHRINKS[int(errors.argmin())])
    return _with_zero(best * histogram.low, best * histogram.high)


def _information_lost(
    counts: Counts, centres: npt.NDArray[np.float64], low: float, high: float
) -> float:
    """Return the divergence of the quantized from the clipped distribution, in nats."""
    inside = (centres >= low) & (centres <= high)
    if not inside.any():
        return np.inf
    first, last = np.flatnonzero(inside)[[0, -1]]
    kept = counts[first : last + 1].astype(np.float64)
    reference = kept.copy()
    reference[0] += counts[:first].sum()
    reference[-1] += counts[last + 1 :].sum()
    step = (high - low) / (LEVELS - 1)
    level = np.rint((centres[first : last + 1] - low) / step).astype(np.int64)
    filled = reference > 0
    sums = np.bincount(level, weights=kept, minlength=LEVELS)
    bins = np.bincount(level, weights=filled.astype(np.float64), minlength=LEVELS)
    candidate = np.where(filled, (sums / np.maximum(bins, 1))[level], 0.0)
    if not candidate.any():
        return np.inf
    p = reference[filled] / reference.sum()
    q = np.maximum(candidate[filled] / candidate.sum(), 1e-9)
    return float((p * np.log(p / q)).sum())


def _without_zero(histogram: Histogram, centres: npt.NDArray[np.float64]) -> Counts:
    """Return the counts but for the bin of 0, which has a code of its own."""
    counts = histogram.counts.copy()
    if histogram.low <= 0 <= histogram.high:
        counts[np.abs(centres).argmin()] = 0
    return counts


def _with_zero(low: float, high: float) -> Range:
    """Widen a range to hold 0: padding and ReLU's zeros must have a code of their own."""
    return Range(low=min(low, 0.0), high=max(high, 0.0))


_METHODS: dict[str, Callable[[Histogram], Range]] = {
    "percentile": percentile_range,
    "entropy": entropy_range,
    "mse": error_range,
}
