import numpy as np
import pytest

from edgetune.errors import IntegrityError
from edgetune.runtime.learn.latents import Labelled, labelled
from edgetune.runtime.learn.reservoir import Reservoir, dump_memory, empty_memory, load_memory

ONE = 100  # bytes of a sample


def sample(label: str, number: int, size: int = ONE) -> Labelled:
    values = np.full(size, number % 251, np.uint8)
    values[:4] = np.frombuffer(np.int32(number).tobytes(), np.uint8)
    return labelled(label, {"x": values})


def filled(stream, limit=20 * ONE, seed=0) -> Reservoir:
    rng = np.random.default_rng(seed)
    reservoir = Reservoir(limit)
    for number, label in enumerate(stream):
        reservoir.offer(sample(label, number), rng)
    return reservoir


def test_all_is_taken_while_there_is_room():
    reservoir = filled("a" * 15 + "b" * 5)
    assert [item.label for item in reservoir.items] == ["a"] * 15 + ["b"] * 5
    assert reservoir.nbytes == 20 * ONE
    assert reservoir.counts == {"a": 15, "b": 5}


def test_classes_that_come_late_get_an_equal_share():
    # 1000 of a, then 30 of b, then 10 of c: a plain reservoir would hold none or one of c
    reservoir = filled("a" * 1000 + "b" * 30 + "c" * 10, limit=18 * ONE)
    assert reservoir.counts == {"a": 6, "b": 6, "c": 6}
    assert reservoir.seen == {"a": 1000, "b": 30, "c": 10}


def test_rare_classes_are_held_whole_in_a_mixed_stream():
    rng = np.random.default_rng(1)
    stream = rng.permutation(list("a" * 900 + "b" * 90 + "c" * 5))
    counts = filled(stream, limit=45 * ONE).counts
    assert counts["c"] == 5
    assert counts["a"] == counts["b"] == 20


def test_each_sample_of_a_full_class_has_the_same_chance():
    # 5 places for 40 samples: each is held with a chance of 1/8; 3 deviations are 0.05
    held = np.zeros(40)
    for seed in range(400):
        for item in filled("a" * 40, limit=5 * ONE, seed=seed).items:
            held[int(item.arrays["x"][:4].view(np.int32)[0])] += 1 / 400
    assert held.sum() == pytest.approx(5)
    assert np.abs(held - 1 / 8).max() < 0.06


def test_never_more_bytes_than_allowed_whatever_the_sizes():
    rng = np.random.default_rng(2)
    reservoir = Reservoir(1000)
    for number in range(300):
        label = "ab"[number % 2]
        reservoir.offer(sample(label, number, int(rng.integers(4, 400))), rng)
        assert sum(item.nbytes for item in reservoir.items) == reservoir.nbytes <= 1000
    assert set(reservoir.counts) == {"a", "b"}


def test_what_is_larger_than_the_whole_memory_is_left_out():
    reservoir = filled("aa")
    assert not reservoir.offer(sample("b", 9, 21 * ONE), np.random.default_rng(0))
    assert reservoir.counts == {"a": 2}


def test_no_memory_holds_nothing():
    assert filled("abc", limit=0).items == []


def test_the_same_seed_holds_the_same():
    stream = "abac" * 50
    first, second, other = (filled(stream, seed=seed) for seed in (3, 3, 4))
    assert [i.id for i in first.items] == [i.id for i in second.items]
    assert [i.id for i in first.items] != [i.id for i in other.items]


def test_a_copy_changes_on_its_own():
    reservoir = filled("ab")
    other = reservoir.copy()
    other.offer(sample("c", 7), np.random.default_rng(0))
    assert reservoir.counts == {"a": 1, "b": 1}
    assert reservoir.seen == {"a": 1, "b": 1}


def test_a_memory_comes_back_as_it_was():
    rng = np.random.default_rng(0)
    memory = empty_memory(10_000, 5)
    for number in range(6):
        arrays = {
            "hidden": rng.normal(size=(number + 1, 4)).astype(np.float32),
            "large": np.float32([1e9, number]),
            "codes": rng.integers(0, 255, (2, number + 1), dtype=np.uint8),
            "ids": rng.integers(-2, 1000, number + 2),
        }
        part = memory.holdout if number == 5 else memory.train
        assert part.offer(labelled("ab"[number % 2], arrays), rng)
    memory.given.update(a=3, b=3)
    memory.learned.update(a=3, b=2)
    again = load_memory(dump_memory(memory), 10_000, 5, where="test")
    assert (again.given, again.learned) == (memory.given, memory.learned)
    for part, read in ((memory.train, again.train), (memory.holdout, again.holdout)):
        assert [i.id for i in read.items] == [i.id for i in part.items]
        assert (read.seen, read.full, read.nbytes) == (part.seen, part.full, part.nbytes)
    first = again.train.items[0].arrays
    assert {n: a.dtype.name for n, a in first.items()} == {
        "codes": "uint8", "hidden": "float16", "ids": "int16", "large": "float32",
    }  # fmt: skip


def test_a_smaller_memory_drops_of_the_largest_class():
    memory = empty_memory(10_000, 5)
    for number, label in enumerate("aaaaaabb"):
        memory.train.offer(sample(label, number), np.random.default_rng(0))
    again = load_memory(dump_memory(memory), 500, 5, where="test")  # 400 of them to rehearse
    assert again.train.counts == {"a": 2, "b": 2}


@pytest.mark.parametrize("damage", [b"", b"PK", b"x" * 100])
def test_what_is_no_memory_is_refused(damage):
    with pytest.raises(IntegrityError, match="gen 3: cannot be read"):
        load_memory(damage, 1000, 5, where="gen 3")
