"""Order is a function of seed and epoch; nothing is lost, padding is little."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgetune.train.batches import EpochBatches


def indices(batches: EpochBatches) -> list[list[int]]:
    return [[i for _, i in batch] for batch in batches]


@given(
    samples=st.integers(1, 300), size=st.integers(1, 40), epoch=st.integers(0, 5),
    by_length=st.booleans(),
)  # fmt: skip
def test_an_epoch_holds_every_sample_once(samples, size, epoch, by_length):
    lengths = [i % 17 for i in range(samples)] if by_length else None
    batches = EpochBatches(samples, size, lengths=lengths, seed=3)
    batches.epoch = epoch
    found = indices(batches)
    assert sorted(i for batch in found for i in batch) == list(range(samples))
    assert len(found) == len(batches) == -(-samples // size)


def test_the_rest_of_an_epoch_is_what_an_unbroken_one_had_left():
    whole = EpochBatches(100, 8, lengths=list(range(100)), seed=1)
    whole.epoch = 4
    rest = EpochBatches(100, 8, lengths=list(range(100)), seed=1)
    rest.epoch, rest.start = 4, 5
    assert indices(rest) == indices(whole)[5:]
    assert len(rest) == len(whole) - 5


def test_epochs_and_seeds_differ():
    orders = set()
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        batches = EpochBatches(64, 8, seed=seed)
        batches.epoch = epoch
        orders.add(str(indices(batches)))
    assert len(orders) == 3


def test_like_lengths_share_a_batch():
    lengths = np.random.default_rng(0).integers(1, 100, 3200).tolist()
    batches = EpochBatches(3200, 32, lengths=lengths, seed=0)
    padded = sum(max(lengths[i] for i in b) * len(b) for b in indices(batches))
    assert padded < 1.06 * sum(lengths)
