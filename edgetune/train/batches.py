"""Which samples make a batch, in which order: a function of (seed, epoch) and nothing else.

Being a function, the order needs no saving: a resumed run asks for the rest of the epoch.
"""

from collections.abc import Iterator, Sequence

import numpy as np

# batches are formed of like lengths among this many batches' worth of shuffled samples:
# enough to spare nearly all padding, few enough to keep the order random
WINDOW = 50


class EpochBatches:
    """A batch sampler of (epoch, index) keys; set `epoch` and `start` before iterating."""

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
        self.epoch = 0
        self.start = 0
        self.batch_size = batch_size
        self.drop_last = False  # accelerate reads both
        self._samples = samples
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._shuffle = shuffle
        self._seed = seed

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, less those before `start`."""
        return -(-self._samples // self.batch_size) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the epoch's batches from number `start` on."""
        for batch in self._batches()[self.start :]:
            yield [(self.epoch, int(i)) for i in batch]

    def _batches(self) -> list[np.ndarray]:
        rng = np.random.default_rng((self._seed, self.epoch))
        order = rng.permutation(self._samples) if self._shuffle else np.arange(self._samples)
        if self._lengths is not None:
            window = self.batch_size * (WINDOW if self._shuffle else len(order))
            pieces = [order[i : i + window] for i in range(0, len(order), window)]
            order = np.concatenate([p[np.argsort(self._lengths[p], kind="stable")] for p in pieces])
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self._shuffle and self._lengths is not None:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches
