"""A random layer that every device makes alike."""

import dataclasses

import numpy as np
import pytest

from edgetune.errors import DataError
from edgetune.runtime.learn import projection
from edgetune.runtime.learn.projection import Projection

# numpy.random.PCG64(7).random_raw(3)
WORDS = (0xA00641A9F1E54A8B, 0xE5AFCDBCAF266A95, 0xC693565F940AF962)
# O'Neill 2014, the multiplier of the 128-bit generator
MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645


def pcg64(seed, count):
    """PCG XSL RR 128/64 in plain integers, from numpy's state for a seed."""
    state, increment = np.random.PCG64(seed).state["state"].values()
    for _ in range(count):
        state = (state * MULTIPLIER + increment) % 2**128
        folded, turn = (state >> 64) ^ (state % 2**64), state >> 122
        yield (folded >> turn | folded << (64 - turn)) % 2**64


def test_the_words_are_those_of_pcg64_wherever_they_are_made():
    assert tuple(np.random.PCG64(7).random_raw(3).tolist()) == WORDS
    assert tuple(pcg64(7, 3)) == WORDS


def test_the_first_signs_are_the_lowest_bits_of_the_first_word():
    signs = Projection(width_in=2, width=70, seed=7).signs
    # ...8B is 1000 1011: from the lowest bit 1 1 0 1 0 0 0 1; ...4A is 0100 1010
    np.testing.assert_array_equal(signs[0, :8], [1, 1, -1, 1, -1, -1, -1, 1])
    np.testing.assert_array_equal(signs[0, 8:16], [-1, 1, -1, 1, -1, -1, 1, -1])
    # entries 64 to 67 are the lowest bits of ...95, 0101
    np.testing.assert_array_equal(signs[0, 64:68], [1, -1, 1, -1])
    # row 1 starts at bit 70, which is bit 6 of that word: 1001 0101 >> 6 = 10
    np.testing.assert_array_equal(signs[1, :2], [-1, 1])


@pytest.mark.parametrize("chunk", [1, 3, 2**15])
def test_all_signs_are_bits_of_the_words_in_order(monkeypatch, chunk):
    monkeypatch.setattr(projection, "CHUNK", chunk)
    made = Projection(width_in=37, width=53, seed=2**40 + 1)
    words = list(pcg64(2**40 + 1, -(-37 * 53 // 64)))
    expected = [2 * (words[i // 64] >> i % 64 & 1) - 1 for i in range(37 * 53)]
    assert made.signs.dtype == np.float32
    np.testing.assert_array_equal(made.signs, np.reshape(expected, (37, 53)))


def test_the_projection_of_two_samples_is_the_one_computed_by_hand():
    made = Projection(width_in=4, width=2, seed=7)
    # the bits 1 1 | 0 1 | 0 0 | 0 1
    np.testing.assert_array_equal(made.signs, [[1, 1], [-1, 1], [-1, -1], [-1, 1]])
    features = np.float64([[1, 2, 3, 4], [5, 0, 0, -2]])
    projected = made.apply(features)
    # [1-2-3-4, 1+2-3+4] / 2 and [5+2, 5-2] / 2
    np.testing.assert_array_equal(projected, np.float32([[0, 2], [3.5, 1.5]]))
    assert projected.dtype == np.float32
    np.testing.assert_array_equal(features, [[1, 2, 3, 4], [5, 0, 0, -2]])


def test_another_seed_gives_other_signs_and_about_as_many_of_each():
    one, other = (Projection(width_in=64, width=512, seed=seed).signs for seed in (0, 1))
    assert 0.48 < np.mean(one == other) < 0.52
    assert 0.48 < np.mean(one == 1) < 0.52
    assert set(np.unique(one)) == {-1, 1}


def test_signs_are_made_once_and_no_part_of_what_is_compared():
    made = Projection(width_in=4, width=8, seed=1)
    assert made.signs is made.signs
    assert made == Projection(width_in=4, width=8, seed=1)
    assert dataclasses.asdict(made) == {"width_in": 4, "width": 8, "seed": 1}


def test_features_of_another_width_are_refused():
    made = Projection(width_in=4, width=8, seed=1)
    for wrong in (np.zeros((2, 5)), np.zeros(4)):
        with pytest.raises(DataError, match=r"expected shape \(samples, 4\)"):
            made.apply(wrong)
    assert made.apply(np.zeros((0, 4))).shape == (0, 8)


@pytest.mark.parametrize("wrong", [{"width_in": 0}, {"width": 0}, {"seed": -1}])
def test_a_projection_of_nothing_is_refused(wrong):
    with pytest.raises(DataError, match="projection from"):
        Projection(**({"width_in": 4, "width": 8, "seed": 1} | wrong))
