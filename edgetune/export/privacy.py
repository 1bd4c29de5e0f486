"""What noise on a device's statistics proves, by an accountant of differential privacy.

Google's `dp-accounting` (the extra `privacy`) does the sums: the analytic Gaussian mechanism of
Balle and Wang 2018 (arXiv:1805.06530), which is exact. Several releases of the same samples with
Gaussian noise are as private as one with 1 / sigma^2 = sum 1 / sigma_i^2, as their
log-likelihood ratio is the sum of normal ones; that is exact too.
"""

import math
from collections.abc import Sequence
from typing import Any

from edgetune.errors import ConfigError, MissingExtraError

DELTA = 1e-6


def epsilon_of(noise_multipliers: Sequence[float], delta: float = DELTA) -> float:
    """Return the epsilon of releases of the same samples, of add-or-remove-one-sample adjacency.

    Args:
        noise_multipliers: standard deviations over sensitivity, one a release.
        delta: between 0 and 1; less than 1 / samples to mean anything.

    Raises:
        ConfigError: a number out of range.
        MissingExtraError: dp-accounting is not installed.
    """
    if not noise_multipliers or not all(0 < s < math.inf for s in noise_multipliers):
        raise ConfigError("noise multiplier: expected finite numbers above 0")
    _check_delta(delta)
    together = 1 / math.sqrt(sum(s**-2 for s in noise_multipliers))
    return float(_accounting().get_epsilon_gaussian(together, delta))


def noise_multiplier_for(epsilon: float, delta: float = DELTA, *, releases: int = 1) -> float:
    """Return the noise multiplier that each of so many releases needs.

    Raises:
        ConfigError: a number out of range.
        MissingExtraError: dp-accounting is not installed.
    """
    if not 0 < epsilon < math.inf:
        raise ConfigError(f"epsilon = {epsilon:g}; expected a finite number above 0")
    if releases < 1:
        raise ConfigError(f"releases: expected 1 or more, got {releases}")
    _check_delta(delta)
    one = float(_accounting().get_sigma_gaussian(epsilon, delta))
    return one * math.sqrt(releases)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta = {delta:g}; expected a number between 0 and 1")


def _accounting() -> Any:
    try:
        import dp_accounting
    except ModuleNotFoundError as error:
        raise MissingExtraError("dp-accounting", "privacy") from error
    return dp_accounting
