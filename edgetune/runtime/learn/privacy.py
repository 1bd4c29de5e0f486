"""Noise that hides whether one sample is among those that statistics are sums of.

The Gaussian mechanism on a Gram matrix, class sums and counts at once. Needs numpy only; what
epsilon a noise multiplier stands for is said where an accountant is installed
(`edgetune.export.privacy`).

What is protected is one sample among those that the statistics are of. Which samples a device
took in at all (its screen, its holdout, its guard) was decided by looking at others, and that
is outside of the guarantee.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, DataError
from edgetune.runtime.learn.statistics import Statistics

FloatArray = npt.NDArray[np.float64]

# of `release_vector`: three parts, each of which one sample changes by a vector no longer than 1
SENSITIVITY = math.sqrt(3)


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """How a release was made private.

    clip: L2 norm that no sample's features exceed, C. noise_multiplier: standard deviation of
    the noise over the sensitivity, sigma.
    """

    clip: float
    noise_multiplier: float

    def check(self) -> None:
        """Refuse what is no clip or no multiplier.

        Raises:
            ConfigError: one is not above 0, or not finite.
        """
        for name, value in (("clip", self.clip), ("noise multiplier", self.noise_multiplier)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value:g}; expected a finite number above 0")

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on a count."""
        return self.noise_multiplier * SENSITIVITY


def clip_rows(features: npt.NDArray[Any], clip: float) -> FloatArray:
    """Return the features, (n, d), scaled down where a row is longer than `clip`."""
    rows = features.astype(np.float64)
    lengths = np.sqrt(np.sum(rows**2, axis=1))
    # a little less, so that no rounding leaves a row longer
    scales = np.where(lengths > clip, clip / np.maximum(lengths, clip) * (1 - 1e-12), 1.0)
    clipped: FloatArray = rows * scales[:, None]
    return clipped


def release_vector(stats: Statistics, clip: float) -> FloatArray:
    """Return statistics as the vector that noise is added to.

    With S the Gram matrix, s_c the class sums, n_c the counts and C the clip, its parts are

        S_jj / C^2 and sqrt(2) S_jk / C^2 for j < k,    s_c / C,    n_c.

    Adding or removing one sample x of class c, |x| <= C, changes the first part by a vector of
    length |x x^T|_F / C^2 = |x|^2 / C^2 <= 1 (each entry off the diagonal stands for two of
    x x^T, so its square has to count twice), the second by one of length |x| / C <= 1, the
    third by one of length 1: the whole by sqrt(3) at most, whatever the class.
    """
    places = np.triu_indices(stats.width)
    scales = np.where(places[0] == places[1], 1.0, math.sqrt(2)) / clip**2
    return np.concatenate([stats.gram[places] * scales, (stats.sums / clip).ravel(), stats.counts])


def from_release_vector(
    vector: FloatArray, clip: float, width: int, labels: Sequence[str]
) -> Statistics:
    """Return the statistics of a vector; counts may be negative, the Gram matrix indefinite."""
    names = tuple(labels)
    places = np.triu_indices(width)
    cut = np.cumsum([len(places[0]), len(names) * width])
    upper, sums, counts = np.split(vector, cut)
    gram = np.zeros((width, width))
    gram[places] = upper * np.where(places[0] == places[1], 1.0, 1 / math.sqrt(2)) * clip**2
    gram += np.triu(gram, k=1).T
    return Statistics(
        labels=names, gram=gram, sums=sums.reshape(len(names), width) * clip, counts=counts
    )


def perturb(stats: Statistics, privacy: Privacy, key: bytes) -> Statistics:
    """Return statistics with noise; same statistics and same key, same noise.

    They are private towards all who do not know the key, under add-or-remove-one-sample
    adjacency: the Gaussian mechanism of sensitivity `SENSITIVITY` (see `release_vector`). The
    noise is of float64, and its rounding is not accounted for (Mironov 2012).

    Args:
        stats: of features no longer than the clip; their labels must be known to anyone: a label
            that is there only because of a sample tells of it.
        privacy: the clip and the noise.
        key: secret; never the same for other statistics.

    Raises:
        ConfigError: a clip or noise that is none.
    """
    privacy.check()
    vector = release_vector(stats, privacy.clip)
    noise = gaussians(key, len(vector)) * privacy.deviation
    return from_release_vector(vector + noise, privacy.clip, stats.width, stats.labels)


def gaussians(key: bytes, count: int) -> FloatArray:
    """Return standard normal numbers that no one can tell from chance without the key.

    SHAKE-256 of the key gives uniform numbers, the Box-Muller transform makes them normal. numpy's
    generators are fast, not secret, and may give other numbers in its next version.

    Raises:
        DataError: the key is too short to be a secret.
    """
    if len(key) < 16:
        raise DataError(f"a key of {len(key)} bytes; expected 16 or more")
    pairs = -(-count // 2)
    words = np.frombuffer(hashlib.shake_256(key).digest(16 * pairs), "<u8").reshape(2, pairs)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53  # in (0, 1]
    radius = np.sqrt(-2 * np.log(uniform[0]))
    angle = 2 * np.pi * uniform[1]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return both[:count]
