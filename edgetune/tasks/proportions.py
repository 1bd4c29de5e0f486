"""Proportions of samples, and differences of two of them, with their intervals.

The arithmetic of differences is the device's too and lies in edgetune.runtime.proportions.
"""

import math

import numpy as np

from edgetune.errors import ConfigError, DataError
from edgetune.runtime.proportions import (
    CONFIDENCE,
    mcnemar_p,
    samples_needed,
    tango_bound,
    tango_limits,
)
from edgetune.tasks.metrics import Floats, Interval

__all__ = [
    "exact_bound", "exact_interval", "mcnemar_p", "samples_needed", "tail", "tango_bound",
    "tango_interval",
]  # fmt: skip

_BISECTIONS = 60


def tango_interval(
    lost: float, gained: float, samples: float, confidence: float = CONFIDENCE
) -> Interval:
    """Return (lost - gained) / samples with its score interval; see `tango_limits`.

    Raises:
        DataError: a count is negative, or `lost` + `gained` exceed `samples`.
        ConfigError: `confidence` is out of range.

    Source: Tango 1998, Statistics in Medicine 17:891-908.
    """
    low, high = tango_limits(lost, gained, samples, confidence)
    return Interval(value=(lost - gained) / samples, low=low, high=high)


def exact_interval(right: int, samples: int, confidence: float = CONFIDENCE) -> Interval:
    """Return right / samples with its two-sided exact interval.

    Raises:
        DataError: there are no samples, or `right` is none of 0 to `samples`.
        ConfigError: `confidence` is out of range.

    Source: Clopper & Pearson 1934, Biometrika 26:404-413.
    """
    one_sided = (1.0 + confidence) / 2.0
    return Interval(
        value=right / max(samples, 1),
        low=exact_bound(right, samples, one_sided),
        high=1.0 - exact_bound(samples - right, samples, one_sided),
    )


def exact_bound(right: int, samples: int, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided exact lower bound of right / samples.

    It is the share p at which `right` or more of `samples` are as rare as 1 - confidence; 0 where
    none is right.

    Raises:
        DataError: there are no samples, or `right` is none of 0 to `samples`.
        ConfigError: `confidence` is out of range.

    Source: Clopper & Pearson 1934, Biometrika 26:404-413.
    """
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence: expected a number between 0 and 1, got {confidence}")
    if samples < 1 or not 0 <= right <= samples:
        raise DataError(f"expected 0 to {samples} right of 1 sample or more, got {right}")
    if right == 0:
        return 0.0
    low, high = 0.0, right / samples
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        if tail(right, samples, middle) <= 1.0 - confidence:
            low = middle
        else:
            high = middle
    return low


def tail(right: int, samples: int, share: float) -> float:
    """Return the probability that `right` or more of `samples` are right, each with `share`."""
    if right <= 0 or share >= 1.0:
        return 1.0
    if share <= 0.0:
        return 0.0
    wrong = np.arange(samples - right + 1)  # as likely as so many wrong ones or fewer
    logs = (
        _log_choose(samples, samples - right)
        + (samples - wrong) * math.log(share)
        + wrong * math.log1p(-share)
    )
    largest = float(logs.max())
    return min(1.0, math.exp(largest) * float(np.exp(logs - largest).sum()))


def _log_choose(samples: int, most: int) -> Floats:
    """Return ln C(samples, k) for k = 0 .. most, shape (most + 1,)."""
    k = np.arange(1, most + 1)
    steps: Floats = np.log((samples - k + 1) / k)
    return np.concatenate([[0.0], np.cumsum(steps)])
