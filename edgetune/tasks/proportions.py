"""The difference of two proportions of the same samples, with its interval.

The arithmetic is the device's too and lies in edgetune.runtime.proportions.
"""

from edgetune.runtime.proportions import (
    CONFIDENCE,
    mcnemar_p,
    samples_needed,
    tango_bound,
    tango_limits,
)
from edgetune.tasks.metrics import Interval

__all__ = ["mcnemar_p", "samples_needed", "tango_bound", "tango_interval"]


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
