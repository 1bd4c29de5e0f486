"""The difference of two proportions of the same samples: its interval, test and planning.

A 2 x 2 table counts, of `samples`, those that only the first model gets right (`lost`, cell
b), and those that only the second does (`gained`, cell c). The difference is
(lost - gained) / samples. Its score interval (Tango 1998) belongs to McNemar's test as
Wilson's interval belongs to the test of one proportion. Unlike a Wald or bootstrap interval it
has a width where the models agree on every sample: then its upper limit is z^2 / (n + z^2).
"""

import functools
import math
from collections.abc import Callable
from statistics import NormalDist

from edgetune.errors import ConfigError, DataError

CONFIDENCE = 0.95

# more samples than this are no advice
MOST_SAMPLES = 100_000_000

_BISECTIONS = 100


def tango_limits(
    lost: float, gained: float, samples: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the ends of the two-sided score interval of (lost - gained) / samples.

    The interval holds every difference d that the score test of "the difference is d" does
    not reject at level 1 - confidence. Counts need not be whole, for planning.

    Args:
        lost: samples that only the first model gets right, b of a 2 x 2 table.
        gained: samples that only the second model gets right, c.
        samples: all samples, n > 0.
        confidence: two-sided coverage, in (0, 1).

    Raises:
        DataError: a count is negative, or `lost` + `gained` exceed `samples`.
        ConfigError: `confidence` is out of range.

    Source: Tango 1998, Statistics in Medicine 17:891-908.
    """
    _check_counts(lost, gained, samples)
    z = _normal_quantile(0.5 + _checked(confidence) / 2.0)
    # the models change places for the lower end
    return -_upper_limit(gained, lost, samples, z), _upper_limit(lost, gained, samples, z)


def tango_bound(
    lost: float, gained: float, samples: float, confidence: float = CONFIDENCE
) -> float:
    """Return the one-sided upper bound of (lost - gained) / samples; see `tango_limits`.

    Raises:
        DataError: a count is negative, or `lost` + `gained` exceed `samples`.
        ConfigError: `confidence` is out of range.
    """
    _check_counts(lost, gained, samples)
    return _upper_limit(lost, gained, samples, _normal_quantile(_checked(confidence)))


def mcnemar_p(lost: int, gained: int) -> float:
    """Return the two-sided exact p-value of McNemar's test.

    Under "both models are equally accurate" the lost are Binomial(lost + gained, 1/2); the
    value is twice the smaller tail, at most 1.

    Raises:
        DataError: a count is negative.

    Source: Fagerland, Lydersen & Laake 2017, Statistical Analysis of Contingency Tables,
        sec. 8.5 (exact conditional test).
    """
    discordant = lost + gained
    _check_counts(lost, gained, discordant)
    tail, ways = 0, 1  # whole numbers of any size: exact
    for successes in range(min(lost, gained) + 1):
        tail += ways
        ways = ways * (discordant - successes) // (successes + 1)
    return min(1.0, 2 * tail / (1 << discordant))


def samples_needed(
    max_drop: float,
    *,
    lost: float = 0,
    gained: float = 0,
    samples: float = 1,
    confidence: float = CONFIDENCE,
) -> int | None:
    """Return how many samples it takes to show a loss of at most `max_drop`.

    The candidate is taken to differ from the reference as often as it did on `samples`: so
    the default is for one that agrees everywhere. `max_drop` 0.01 then takes 268.

    Args:
        max_drop: largest loss of accuracy allowed, a share in [0, 1].
        lost: samples, of `samples`, that only the reference got right.
        gained: samples, of `samples`, that only the candidate got right.
        samples: how many were answered.
        confidence: one-sided, in (0, 1).

    Returns:
        The smallest number whose one-sided upper bound is at most `max_drop`; None where none
        is, or none below a hundred million.

    Raises:
        DataError: a count is negative, or `lost` + `gained` exceed `samples`.
        ConfigError: `max_drop` lies outside [0, 1], or `confidence` is out of range.
    """
    check_share("max_drop", max_drop)
    _check_counts(lost, gained, samples)

    def enough(number: int) -> bool:
        scale = number / samples
        return tango_bound(lost * scale, gained * scale, number, confidence) <= max_drop

    return _smallest(enough)


def samples_affording(max_drop: float, lost: int, *, confidence: float = CONFIDENCE) -> int | None:
    """Return how many samples show a loss of at most `max_drop` although `lost` are, none gained.

    `max_drop` 0.02 takes 133 for none lost, 222 for one and 300 for two.

    Args:
        max_drop: largest loss of accuracy allowed, a share in [0, 1].
        lost: samples that only the reference gets right.
        confidence: one-sided, in (0, 1).

    Returns:
        The smallest number whose one-sided upper bound is at most `max_drop`; None where none
        is, or none below a hundred million.

    Raises:
        DataError: `lost` is negative.
        ConfigError: `max_drop` lies outside [0, 1], or `confidence` is out of range.
    """
    check_share("max_drop", max_drop)
    _check_counts(lost, 0, max(lost, 1))

    def enough(number: int) -> bool:
        return number >= lost and tango_bound(lost, 0, number, confidence) <= max_drop

    return _smallest(enough)


def _upper_limit(lost: float, gained: float, samples: float, z: float) -> float:
    """Return the largest difference d whose score statistic is at least -z, by bisection.

    The statistic, (lost - gained - n d) / sqrt(n (2 q + d (1 - d))), falls with d; q is the
    probability of "gained" that is most likely if the difference is d, the larger root of
    2 n q^2 + B q - gained d (1 - d) = 0 with B = (2 n - lost + gained) d - lost - gained.
    """
    low, high = (lost - gained) / samples, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        b = (2.0 * samples - lost + gained) * middle - lost - gained
        c = gained * middle * (1.0 - middle)
        root = math.sqrt(max(0.0, b * b + 8.0 * samples * c))
        # the form of the root that does not cancel
        q = 2.0 * c / (root + b) if b > 0.0 else (root - b) / (4.0 * samples)
        variance = samples * (2.0 * q + middle * (1.0 - middle))
        excess = lost - gained - samples * middle  # negative above the estimate
        if excess * excess <= z * z * max(0.0, variance):
            low = middle
        else:
            high = middle
    return high


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """Return the smallest number, up to `MOST_SAMPLES`, that is enough, as all above are."""
    high = 1
    while not enough(high):
        if high >= MOST_SAMPLES:
            return None
        high = min(2 * high, MOST_SAMPLES)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@functools.cache
def _normal_quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def _checked(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence: expected a number between 0 and 1, got {confidence}")
    return confidence


def check_share(name: str, share: float) -> None:
    """Refuse what is not in [0, 1].

    Raises:
        ConfigError: `share` is not.
    """
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"{name}: expected a share between 0 and 1, got {share:g}")


def _check_counts(lost: float, gained: float, samples: float) -> None:
    # a hair over is the rounding of counts that were scaled
    if not (min(lost, gained) >= 0 and lost + gained <= samples * (1.0 + 1e-9)):
        raise DataError(
            f"expected lost and gained samples, 0 or more, among all {samples:g}; got"
            f" {lost:g} lost and {gained:g} gained"
        )
