"""Batches: every sample once an epoch, alike in length, the same for the same seed."""

import numpy as np

from edgetune.train.batches import BatchOrder, share_of

LENGTHS = np.random.default_rng(0).integers(5, 60, 2000).tolist()


def padding(order: BatchOrder, epoch: int = 0) -> int:
    return sum(
        len(b) * max(LENGTHS[i] for i in b) - sum(LENGTHS[i] for i in b)
        for b in order.batches(epoch)
    )


def test_every_sample_comes_once_an_epoch():
    batches = BatchOrder(len(LENGTHS), 32, lengths=LENGTHS, seed=3).batches(1)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(LENGTHS)))
    # 2,000 samples are 62 batches of 32 and one of 16
    assert sorted(len(b) for b in batches) == [16, *[32] * 62]


def test_the_order_is_a_function_of_seed_and_epoch():
    first = [b.tolist() for b in BatchOrder(100, 8, seed=1).batches(2)]
    assert first == [b.tolist() for b in BatchOrder(100, 8, seed=1).batches(2)]
    assert first != [b.tolist() for b in BatchOrder(100, 8, seed=1).batches(3)]
    assert first != [b.tolist() for b in BatchOrder(100, 8, seed=2).batches(2)]


def test_batches_of_like_length_spare_most_of_the_padding():
    alike = BatchOrder(len(LENGTHS), 32, lengths=LENGTHS)
    random = BatchOrder(len(LENGTHS), 32)
    assert padding(alike) < 0.1 * padding(random)


def test_long_and_short_batches_are_mixed():
    widths = [max(LENGTHS[i] for i in b) for b in BatchOrder(2000, 32, lengths=LENGTHS).batches(0)]
    assert widths != sorted(widths)
    assert widths != sorted(widths, reverse=True)


def test_in_order_means_in_order():
    batches = BatchOrder(10, 4, shuffle=False).batches(5)
    assert [b.tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_last_sample_alone_joins_the_batch_before():
    order = BatchOrder(9, 4, shuffle=False)
    assert [b.tolist() for b in order.batches(0)] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert len(order) == 2
    assert len(BatchOrder(1, 4).batches(0)) == len(BatchOrder(1, 4)) == 1
    assert len(BatchOrder(3, 1).batches(0)) == len(BatchOrder(3, 1)) == 3


def test_processes_deal_a_batch_out_like_cards():
    batch = np.array([4, 8, 15, 16, 23])
    assert share_of(batch, 0, 2).tolist() == [4, 15, 23]
    assert share_of(batch, 1, 2).tolist() == [8, 16]
    assert share_of(batch[:1], 1, 2).tolist() == []
