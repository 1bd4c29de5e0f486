"""The largest batch that fits: what decides is a pure function, tried on devices made up here."""

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch

from edgetune.config import TrainConfig
from edgetune.data import load_dataset
from edgetune.errors import ResourceError
from edgetune.models.adapt import adapt
from edgetune.models.load import load_model
from edgetune.runtime.bundle import file_sha256
from edgetune.tasks import open_task
from edgetune.train import read_run, train
from edgetune.train.batch_size import (
    Trial,
    batch_size_note,
    find_batch_size,
    largest_that_fits,
    memory_limit_bytes,
)
from edgetune.train.engine import Engine
from edgetune.train.machine import open_machine
from edgetune.train.run import data_source

MIB = 2**20


class Device:
    """A device with a base of 100 bytes and 10 more a sample, and a speed for each size."""

    def __init__(self, *, full_above=10**9, speed=lambda size: float(size)):
        self.full_above, self.speed = full_above, speed
        self.tried = []

    def __call__(self, size):
        self.tried.append(size)
        if size > self.full_above:
            return Trial(batch_size=size, memory_bytes=None, samples_per_s=0.0)
        return Trial(batch_size=size, memory_bytes=100 + 10 * size, samples_per_s=self.speed(size))


def search(device, **changes):
    rules = {
        "first": 4, "fewest": 2, "largest": 1024, "samples": 5000, "limit_bytes": 10**9,
        "base_bytes": 100, "careful": False, "until_no_faster": False,
    }  # fmt: skip
    return largest_that_fits(device, **(rules | changes))


# -- what decides --------------------------------------------------------------------------


def test_the_size_before_the_one_that_ran_out_is_taken():
    device = Device(full_above=50)
    found = search(device)
    assert (found.batch_size, found.stop) == (32, "memory")
    assert device.tried == [4, 8, 16, 32, 64]
    assert [t.memory_bytes for t in found.trials] == [140, 180, 260, 420, None]


def test_head_room_is_left_by_the_limit():
    # 64 takes 740 bytes, 128 takes 1,380
    assert search(Device(), limit_bytes=1379).batch_size == 64
    assert search(Device(), limit_bytes=1380).batch_size == 128


def test_a_careful_search_never_tries_what_would_be_too_much():
    device = Device(full_above=64)
    found = search(device, careful=True, limit_bytes=1379)
    assert (found.batch_size, found.stop) == (64, "memory")
    assert max(device.tried) == 64


def test_growth_is_extrapolated_from_the_last_two_trials():
    # a fixed cost of 1,000 in each trial beside the base: 8 -> 1,180 from 4 -> 1,140 gives
    # 1,260 for 16, though twice all above the base would be 2,260
    device = Device()

    def costly(size):
        trial = device(size)
        return dataclasses.replace(trial, memory_bytes=1000 + trial.memory_bytes)

    # before 8 there is one trial: 2 * 1,140 - 100 = 2,180 is expected of it
    assert search(costly, careful=True, limit_bytes=2179).batch_size == 4
    # 16 takes 1,260, 32 takes 1,420, 64 takes 1,740, 128 takes 2,380
    assert search(costly, careful=True, limit_bytes=2180).batch_size == 64


def test_a_search_ends_at_the_data_and_at_the_largest():
    found = search(Device(), samples=102)
    assert (found.batch_size, found.stop) == (64, "data")
    assert search(Device(), samples=128).batch_size == 128
    found = search(Device())
    assert (found.batch_size, found.stop) == (1024, "largest")


@pytest.mark.parametrize(("samples", "first"), [(3, 2), (2, 2), (1, 1)])
def test_fewer_samples_than_the_first_size_begin_lower(samples, first):
    device = Device()
    assert search(device, samples=samples).batch_size == first
    assert device.tried == [first]


def test_sizes_that_are_hardly_faster_only_cost_memory():
    speeds = {4: 100.0, 8: 150.0, 16: 160.0, 32: 167.9, 64: 300.0}
    found = search(Device(speed=speeds.__getitem__), until_no_faster=True, samples=100)
    # 160 * 1.05 = 168
    assert (found.batch_size, found.stop) == (16, "speed")
    assert search(Device(speed=speeds.__getitem__), samples=100).batch_size == 64


def test_where_the_first_does_not_fit_smaller_ones_are_tried():
    device = Device(full_above=3)
    found = search(device)
    assert (found.batch_size, found.stop) == (2, "memory")
    assert device.tried == [4, 2]


def test_no_size_at_all_is_an_error_that_says_what_helps():
    with pytest.raises(ResourceError, match=r"batch size 2, the smallest tried .*max_length"):
        search(Device(full_above=1))


def test_the_note_says_what_was_found_and_why_no_more():
    found = search(
        Device(full_above=64, speed=lambda size: 200.0 + size), limit_bytes=4096 * MIB
    )  # fmt: skip
    found = dataclasses.replace(found, memory_mib=812.3)
    assert batch_size_note(found, 1000) == (
        "batch size 64: 812 MiB of 4,096 MiB, 264 samples/s, 16 batches an epoch; 128 does not fit"
    )


# -- on an engine --------------------------------------------------------------------------


def config_for(data, model, output, **changes) -> TrainConfig:
    config = TrainConfig(
        task="text-classification", model=model, data=str(data), output=str(output),
        method="full", epochs=1, batch_size=0, lr=1e-3, seed=1, cpu=True,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def engine_for(config):
    dataset = load_dataset(data_source(config))
    loaded = load_model(config.model, kind="text", labels=dataset.labels, weights=config.weights)
    adapt(loaded.network, loaded.family, config)
    task = open_task(config.task, loaded, dataset.labels, config)
    counts = Counter(dataset.splits["train"].labels)
    engine = Engine(
        config, task, loaded.family, open_machine(config), [counts[x] for x in dataset.labels]
    )
    return engine, *(task.samples(dataset.splits[n], training=n == "train")
                     for n in ("train", "val"))  # fmt: skip


class Full(torch.nn.Module):
    """Stands in for a device on which batches above a size do not fit."""

    def __init__(self, network, *, training=10**9, predicting=10**9, error=None):
        super().__init__()
        self.network = network
        self.most = {True: training, False: predicting}
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        self.seen = []

    def forward(self, **inputs):
        rows, tokens = inputs["input_ids"].shape
        training = self.network.training
        self.seen.append((training, rows, tokens))
        if rows > self.most[training]:
            raise self.error
        return self.network(**inputs)


def ticking(seconds=1.0):
    """A clock that moves on with each look at it, so that twice the batch is twice as fast."""
    ticks = itertools.count()
    return lambda: seconds * next(ticks)


PLENTY = 2**60


@pytest.fixture
def parts(switches, tiny_bert, tmp_path):
    return engine_for(config_for(switches, tiny_bert, tmp_path / "run"))


def test_a_size_at_which_training_runs_out_is_not_taken(parts):
    engine, train_samples, val = parts
    engine.network = Full(engine.network, training=20)
    found = find_batch_size(engine, train_samples, val, limit_bytes=PLENTY, clock=ticking())
    assert (found.batch_size, found.stop) == (16, "memory")
    assert [t.batch_size for t in found.trials] == [4, 8, 16, 32]
    assert found.trials[-1].memory_bytes is None


def test_a_size_whose_validation_runs_out_is_not_taken(parts):
    # batches of validation are twice as large: 8 for training means 16, of 18 samples
    engine, train_samples, val = parts
    assert len(val) == 18
    engine.network = Full(engine.network, predicting=15)
    found = find_batch_size(engine, train_samples, val, limit_bytes=PLENTY, clock=ticking())
    assert found.batch_size == 4


def test_every_trial_has_the_longest_samples(parts):
    engine, train_samples, val = parts
    engine.network = watched = Full(engine.network)
    find_batch_size(engine, train_samples, val, limit_bytes=PLENTY, clock=ticking())
    # 102 samples: up to 64
    assert {rows for training, rows, _ in watched.seen if training} == {4, 8, 16, 32, 64}
    longest = max(train_samples.lengths)
    assert all(tokens == longest for training, _, tokens in watched.seen if training)
    assert {rows for training, rows, _ in watched.seen if not training} == {8, 16, 18}


def test_the_allocators_other_words_for_full_memory_are_understood(parts):
    engine, train_samples, val = parts
    words = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
    engine.network = Full(engine.network, training=8, error=RuntimeError(words))
    found = find_batch_size(engine, train_samples, val, limit_bytes=PLENTY, clock=ticking())
    assert found.batch_size == 8


def test_another_error_is_not_taken_for_full_memory(parts):
    engine, train_samples, val = parts
    engine.network = Full(engine.network, training=8, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        find_batch_size(engine, train_samples, val, limit_bytes=PLENTY, clock=ticking())


def test_a_limit_below_what_is_taken_already_is_an_error(parts):
    engine, train_samples, val = parts
    with pytest.raises(ResourceError, match="out of memory at batch size 2"):
        find_batch_size(engine, train_samples, val, limit_bytes=MIB, clock=ticking())


def test_trials_change_no_weight_and_make_the_optimizers_state(parts):
    engine, train_samples, val = parts
    before = {n: t.clone() for n, t in engine.plain.state_dict().items()}
    find_batch_size(engine, train_samples, val, limit_bytes=PLENTY, clock=ticking())
    after = engine.plain.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    # step, first and second moment of each trained tensor
    assert len(engine.groups()["optimizer"]) == 3 * sum(1 for _ in engine.plain.parameters())
    assert all(p.grad is None for p in engine.plain.parameters())


def test_samples_a_second_are_those_of_the_fastest_step(parts):
    engine, train_samples, val = parts
    found = find_batch_size(
        engine, train_samples, val, limit_bytes=PLENTY, largest=4, clock=ticking(0.5)
    )  # fmt: skip
    # each step begins and ends with a look at the clock: 4 samples in half a second
    assert found.trials[0].samples_per_s == pytest.approx(8.0)


def test_on_a_cpu_a_fifth_of_the_free_memory_is_left(parts, monkeypatch):
    monkeypatch.setattr("edgetune.train.batch_size.free_memory_bytes", lambda _: 1000 * MIB)
    monkeypatch.setattr("edgetune.train.batch_size.rss_mib", lambda: 300.0)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    machine = parts[0].machine
    assert memory_limit_bytes(machine) == 1100 * MIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # which share it
    assert memory_limit_bytes(machine) == 500 * MIB


# -- in a run ------------------------------------------------------------------------------


def test_a_run_with_what_was_found_given_has_the_very_same_weights(
    switches, tiny_bert, tmp_path, monkeypatch
):
    monkeypatch.setattr("edgetune.train.batch_size.SECONDS", 0.0)  # what is found does not matter
    folder, events = tmp_path / "found", []
    config = config_for(switches, tiny_bert, folder, find_lr=True, epochs=2)
    record = train(config, on_event=events.append)
    assert record.status == "finished"
    written = read_run(folder)[0]
    assert written.batch_size in (4, 8, 16, 32, 64)
    assert math.log2(written.batch_size).is_integer()
    notes = [e.values["text"] for e in events if e.kind == "note"]
    sizes = [n for n in notes if n.startswith(f"batch size {written.batch_size}: ")]
    assert len(sizes) == 1
    # the rate is looked for at the size that was found
    assert notes.index(sizes[0]) < next(i for i, n in enumerate(notes) if "learning rate" in n)
    again = tmp_path / "given"
    train(dataclasses.replace(
        config, output=str(again), batch_size=written.batch_size, lr=written.lr, find_lr=False
    ))  # fmt: skip
    assert file_sha256(again / "best.safetensors") == file_sha256(folder / "best.safetensors")


def test_images_need_no_decoding_to_be_tried(colours, tmp_path, monkeypatch):
    # nothing is left to decode with
    monkeypatch.setattr("edgetune.tasks.image_classification.decode_image", None)
    config = TrainConfig(
        task="image-classification", model="torchvision:mobilenet_v3_small", weights="none",
        data=str(colours), output=str(tmp_path / "run"), method="full", image_size=32,
        batch_size=0, lr=1e-3, cpu=True,
    )  # fmt: skip
    dataset = load_dataset(data_source(config))
    loaded = load_model(config.model, kind="image", labels=dataset.labels, weights="none")
    adapt(loaded.network, loaded.family, config)
    task = open_task(config.task, loaded, dataset.labels, config)
    engine = Engine(config, task, loaded.family, open_machine(config), [1, 1, 1])
    found = find_batch_size(
        engine, task.samples(dataset.splits["train"], training=True),
        task.samples(dataset.splits["val"], training=False), limit_bytes=PLENTY, largest=8,
        clock=ticking(),
    )  # fmt: skip
    assert (found.batch_size, found.stop) == (8, "largest")
