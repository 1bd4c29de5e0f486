"""Which samples make a batch, in which order: a function of (seed, epoch) and nothing else.

Being a function, the order needs no saving: a resumed run asks for the rest of the epoch, and
any number of processes share the same batches, each taking its rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]

# batches are formed of like lengths among this many batches' worth of shuffled samples:
# enough to spare nearly all padding, few enough to keep the order random
WINDOW = 50


class BatchOrder:
    """The batches of every epoch."""

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        lengths: Sequence[int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        """Keep the sizes.

        Args:
            samples: number of samples.
            batch_size: samples a batch; the last may be smaller.
            lengths: of each sample, to batch alike; None where all are equal.
            shuffle: whether the order is random.
            seed: of the order.
        """
        self.batch_size = batch_size
        self._samples = samples
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._shuffle = shuffle
        self._seed = seed

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        size = self.batch_size
        single = self._samples % size == 1 and self._samples > size
        return -(-self._samples // size) - single

    def batches(self, epoch: int) -> list[IntArray]:
        """Return the indices of the samples of each batch of `epoch`."""
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(self._samples) if self._shuffle else np.arange(self._samples)
        if self._lengths is not None:
            window = self.batch_size * (WINDOW if self._shuffle else len(order))
            pieces = [order[i : i + window] for i in range(0, len(order), window)]
            order = np.concatenate([p[np.argsort(self._lengths[p], kind="stable")] for p in pieces])
        batches: list[IntArray] = [
            order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)
        ]
        if len(batches) > len(self):
            # BatchNorm cannot normalise by a batch of one sample, so it joins the one before
            batches[-2:] = [np.concatenate(batches[-2:])]
        if self._shuffle and self._lengths is not None:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches


def share_of(batch: IntArray, rank: int, processes: int) -> IntArray:
    """Return the rows of a batch that process `rank` of `processes` takes.

    They are dealt like cards, so that rows of like length fall to all alike.
    """
    return batch[rank::processes]
