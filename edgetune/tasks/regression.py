"""How well numbers are told, with an interval around every headline number.

Intervals are percentile bootstraps over samples (Efron & Tibshirani 1993, ch. 13). Every metric
here is a function of a few sums over samples, so a resample costs a matrix product.
"""

from dataclasses import dataclass

import numpy as np

from edgetune.errors import DataError
from edgetune.tasks.metrics import FloatArray, Floats, Interval, percentile_interval, resample


@dataclass(frozen=True, kw_only=True)
class RegressionReport:
    """What `regression_report` measures.

    mae, rmse: mean absolute and root mean squared error, in the unit of the values. r2: share of
    the variance that is explained, at most 1; below 0 it is worse than always saying the mean.
    pearson: correlation in [-1, 1]. median_error: of the absolute errors. bias: mean of predicted
    less true.
    """

    samples: int
    mae: Interval
    rmse: Interval
    r2: Interval
    pearson: Interval
    bias: Interval
    median_error: float


def regression_report(
    truth: FloatArray, predicted: FloatArray, *, seed: int = 0, resamples: int = 1000
) -> RegressionReport:
    """Measure a regression on samples whose value is known.

    R2 and Pearson's correlation of values that are all equal are 0 (R2 is 1 where all are
    predicted exactly), as scikit-learn has it for R2.

    Args:
        truth: shape (samples,).
        predicted: the same shape.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        DataError: there are no samples, shapes disagree, or a number is not finite.
        ConfigError: `resamples` is below 1.
    """
    truth, predicted = check_values(truth, predicted)
    samples = len(truth)
    ones = np.ones((1, samples))
    values = _metrics(truth, predicted, ones)
    drawn = [
        _metrics(truth, predicted, weights.astype(np.float64))
        for weights in resample(np.ones(samples, np.int64), seed, resamples)
    ]
    intervals = {
        name: percentile_interval(float(value[0]), np.concatenate([d[name] for d in drawn]), 0.95)
        for name, value in values.items()
    }
    return RegressionReport(
        samples=samples,
        **intervals,
        median_error=float(np.median(np.abs(predicted - truth))),
    )


def check_values(truth: FloatArray, predicted: FloatArray) -> tuple[Floats, Floats]:
    """Return both as float64.

    Raises:
        DataError: there are no samples, shapes disagree, or a number is not finite.
    """
    if truth.ndim != 1 or predicted.shape != truth.shape:
        raise DataError(
            f"expected truth and predictions of shape (samples,), got {truth.shape} and"
            f" {predicted.shape}"
        )
    if not len(truth):
        raise DataError("truth: no samples; metrics need at least one")
    if not (np.isfinite(truth).all() and np.isfinite(predicted).all()):
        raise DataError("expected finite values, got one that is infinite or no number")
    return truth.astype(np.float64), predicted.astype(np.float64)


def _metrics(truth: Floats, predicted: Floats, weights: Floats) -> dict[str, Floats]:
    """Return metrics of resamples, each (resamples,); weights: (resamples, samples)."""
    error = predicted - truth
    # about the mean, so that no digits are lost where the mean is large
    y, x = truth - truth.mean(), predicted - predicted.mean()
    count = weights.sum(axis=1)
    squares = weights @ error**2
    spread_y = np.maximum(weights @ y**2 - (weights @ y) ** 2 / count, 0.0)
    spread_x = np.maximum(weights @ x**2 - (weights @ x) ** 2 / count, 0.0)
    shared = weights @ (x * y) - (weights @ x) * (weights @ y) / count
    # what rounding leaves of a variance of 0
    flat = spread_y <= 1e-12 * np.maximum(1.0, weights @ truth**2)
    width = np.sqrt(spread_x * spread_y)
    return {
        "mae": weights @ np.abs(error) / count,
        "rmse": np.sqrt(squares / count),
        "r2": np.where(
            flat, (squares == 0).astype(np.float64), 1.0 - squares / np.where(flat, 1.0, spread_y)
        ),
        "pearson": np.where(
            flat | (width == 0), 0.0, np.clip(shared / np.where(width == 0, 1.0, width), -1.0, 1.0)
        ),
        "bias": weights @ error / count,
    }
