"""A fixed random layer in front of a ridge head: more features, the same on every device.

Random features with a nonlinearity let a linear head separate what it can't in the backbone's
own features (RanPAC, McDonnell et al. 2023, arXiv:2307.02251). Only `width_in`,
`width` and `seed` are stored.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import DataError

Float32Array = npt.NDArray[np.float32]

# 64-bit words drawn at a time: 256 KiB of them, and 2 MiB of bits
CHUNK = 2**15


@dataclass(frozen=True, kw_only=True)
class Projection:
    """relu(x R / sqrt(width_in)), with R of +1 and -1, (width_in, width).

    Entry (i, j) of R is bit i * width + j of the words of PCG64 seeded with `seed`, the least
    significant bit of a word first; 1 stands for +1 and 0 for -1. numpy keeps the words of a bit
    generator the same in all its versions, which it does not of what it makes from them
    (NEP 19), and the scale is applied afterwards, so that R has no rounding.
    """

    width_in: int
    width: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse sizes and seeds that there are none of."""
        if self.width_in < 1 or self.width < 1 or self.seed < 0:
            raise DataError(
                f"projection from {self.width_in} to {self.width} features with seed {self.seed};"
                " expected 1 or more features and a seed of 0 or more"
            )

    @cached_property
    def signs(self) -> Float32Array:
        """R, (width_in, width), float32: 4 bytes an entry, held from the first use on.

        3 MiB from 384 to 2048 features, 20 MiB from 1280 to 4096. float32 because a product with
        int8 has no fast routine in numpy, and turning it to float32 costs as much as one sample.
        """
        words = np.random.PCG64(self.seed)
        signs = np.empty(self.width_in * self.width, np.float32)
        for start in range(0, signs.size, 64 * CHUNK):
            part = signs[start : start + 64 * CHUNK]
            drawn = words.random_raw(-(-part.size // 64)).astype("<u8").view(np.uint8)
            part[...] = np.unpackbits(drawn, count=part.size, bitorder="little")
        signs *= 2
        signs -= 1
        return signs.reshape(self.width_in, self.width)

    def apply(self, features: npt.NDArray[Any]) -> Float32Array:
        """Return the projected features, (n, width), 0 or more.

        Args:
            features: (n, width_in), any real type.

        Raises:
            DataError: they are of another shape.
        """
        if features.ndim != 2 or features.shape[1] != self.width_in:
            raise DataError(
                f"features: expected shape (samples, {self.width_in}), got {features.shape}"
            )
        projected: Float32Array = features.astype(np.float32) @ self.signs  # (n, width)
        projected *= np.float32(1 / math.sqrt(self.width_in))
        return np.maximum(projected, 0, out=projected)
