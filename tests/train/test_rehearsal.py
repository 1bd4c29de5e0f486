"""A rehearsal shows memory and time, and a run with one is bit for bit a run without."""

from collections import Counter

import numpy as np
import pytest
import torch

from edgetune.config import TrainConfig
from edgetune.data import load_dataset
from edgetune.models.adapt import adapt
from edgetune.models.load import load_model
from edgetune.runtime.bundle import file_sha256
from edgetune.tasks import open_task, task_kind
from edgetune.train import train
from edgetune.train.batch_size import free_unused
from edgetune.train.batches import BatchOrder
from edgetune.train.engine import Engine
from edgetune.train.feeding import Feeder
from edgetune.train.machine import open_machine
from edgetune.train.rehearsal import (
    CLEAR_REFS,
    Rehearsal,
    longest_samples,
    middles,
    rehearse,
    watch_peak,
    worst_batch,
)
from edgetune.train.run import data_source

STEPS = 6
CPU = torch.device("cpu")


def text_config(data, model, **changes) -> TrainConfig:
    values = {
        "task": "text-classification", "model": model, "data": str(data), "output": "unused",
        "epochs": 2, "batch_size": 8, "lr": 5e-3, "seed": 1, "cpu": True,
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def image_config(data, **changes) -> TrainConfig:
    values = {
        "task": "image-classification", "model": "torchvision:mobilenet_v3_small",
        "weights": "none", "data": str(data), "output": "unused", "image_size": 32,
        "epochs": 2, "batch_size": 8, "lr": 1e-3, "seed": 1, "cpu": True,
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def engine_for(config) -> tuple[Engine, Feeder, Feeder]:
    dataset = load_dataset(data_source(config))
    torch.manual_seed(config.seed)
    loaded = load_model(
        config.model, kind=task_kind(config.task), labels=dataset.labels, weights=config.weights
    )
    adapt(loaded.network, loaded.family, config)
    task = open_task(config.task, loaded, dataset.labels, config)
    counts = Counter(dataset.splits["train"].labels)
    machine = open_machine(config)
    engine = Engine(config, task, loaded.family, machine, [counts[x] for x in dataset.labels])
    feeds = []
    for name in ("train", "val"):
        samples = task.samples(dataset.splits[name], training=name == "train")
        order = BatchOrder(
            len(samples), config.batch_size, lengths=samples.lengths, shuffle=name == "train",
            seed=config.seed,
        )  # fmt: skip
        feeds.append(Feeder(samples, order, device=machine.device))
    return engine, *feeds


def weights_after(config, *, rehearsed: bool) -> dict[str, torch.Tensor]:
    """Train a few steps, with a rehearsal before each or none at all."""
    engine, feed, val = engine_for(config)
    drawn = []
    for batch in feed.epoch(0):
        if batch.number == STEPS:
            break
        if rehearsed:
            rehearse(engine, feed, validation=val)
        engine.train_mode(0)
        drawn.append(torch.get_rng_state())
        engine.accumulate(batch, epoch=0, rows=batch.rows, last=True)
        engine.update(1.0, batch.number, 20)
    tensors = {f"{g}/{n}": t for g, group in engine.groups().items() for n, t in group.items()}
    tensors |= {f"all/{n}": t for n, t in engine.plain.state_dict().items()}
    return tensors | {f"random/{i}": state for i, state in enumerate(drawn)}


def assert_same_bits(config) -> None:
    without, with_one = (weights_after(config, rehearsed=r) for r in (False, True))
    assert without.keys() == with_one.keys()
    for name, tensor in without.items():
        assert torch.equal(tensor, with_one[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full", "ema_decay": 0.9, "class_weights": "balanced"},
        {"method": "lora", "lora_dropout": 0.3},
        {"method": "adalora", "lora_r": 2, "lora_dropout": 0.3},
        {"method": "full", "unfreeze_every": 1},
        {"method": "full", "token_dropout": 0.3},
    ],
)
def test_training_text_goes_on_as_if_nothing_was_rehearsed(switches, tiny_bert, changes):
    assert_same_bits(text_config(switches, tiny_bert, **changes))


@pytest.mark.parametrize(
    "changes",
    [{"method": "full", "ema_decay": 0.9, "mixup": 0.4}, {"method": "norm", "augment": "none"}],
)
def test_training_images_goes_on_as_if_nothing_was_rehearsed(colours, changes):
    # MobileNet has BatchNorm statistics and dropout in its head
    assert_same_bits(image_config(colours, **changes))


def test_a_whole_run_is_the_same_without_its_rehearsal(switches, tiny_bert, tmp_path, monkeypatch):
    config = text_config(switches, tiny_bert, method="lora", output=str(tmp_path / "with"))
    train(config)
    monkeypatch.setattr(
        "edgetune.train.loop.rehearse",
        lambda *_, **__: Rehearsal(seconds_per_step=1.0, memory_mib=1.0),
    )
    train(text_config(switches, tiny_bert, method="lora", output=str(tmp_path / "without")))
    digests = {file_sha256(tmp_path / n / "best.safetensors") for n in ("with", "without")}
    assert len(digests) == 1


def test_an_error_in_it_leaves_no_gradient_and_the_statistics(colours, monkeypatch):
    engine, feed, _ = engine_for(image_config(colours, method="full"))
    before = {n: b.clone() for n, b in engine.plain.named_buffers()}
    accumulate = engine.accumulate

    def failing(*given, **named):
        accumulate(*given, **named)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine, "accumulate", failing)
    with pytest.raises(torch.OutOfMemoryError):
        rehearse(engine, feed)
    assert all(torch.equal(before[n], b) for n, b in engine.plain.named_buffers())
    assert all(p.grad is None for p in engine.plain.parameters())


# -- which batches -------------------------------------------------------------------------


class Lengths:
    """Samples that know their lengths."""

    views = 1

    def __init__(self, lengths, *, alike=False):
        self.lengths = None if alike else lengths
        self.number = len(lengths)

    def __len__(self):
        return self.number


def test_the_longest_samples_come_longest_first():
    assert longest_samples(Lengths([3, 9, 1, 9, 5]), 3).tolist() == [1, 3, 4]
    assert longest_samples(Lengths([3, 9, 1]), 8).tolist() == [1, 0, 2]


def test_samples_of_one_length_are_as_good_as_each_other():
    assert longest_samples(Lengths([1] * 5, alike=True), 3).tolist() == [0, 1, 2]


def test_the_worst_batch_is_as_large_as_the_runs_and_no_smaller(switches, tiny_bert):
    _, feed, _ = engine_for(text_config(switches, tiny_bert))
    batch = worst_batch(feed)
    assert batch.tensors["input_ids"].shape == (8, max(feed.samples.lengths))


@pytest.mark.parametrize(
    ("number", "count", "expected"),
    # middles of [0, 4), [4, 8), [8, 12); of [0, 1/3), ... only one number is there
    [(12, 3, [2, 6, 10]), (3, 3, [0, 1, 2]), (1, 3, [0]), (2, 3, [0, 1])],
)
def test_timed_batches_stand_for_equal_shares_of_an_epoch(number, count, expected):
    assert middles(number, count) == expected


def test_at_most_four_batches_are_trained_and_one_predicted(switches, tiny_bert, monkeypatch):
    engine, feed, val = engine_for(text_config(switches, tiny_bert))
    sizes = []
    accumulate = engine.accumulate

    def counted(batch, **named):
        sizes.append(batch.tensors["input_ids"].shape)
        return accumulate(batch, **named)

    monkeypatch.setattr(engine, "accumulate", counted)
    found = rehearse(engine, feed, validation=val)
    assert len(sizes) == 4
    assert sizes[0][1] == max(feed.samples.lengths)
    assert found.validation_seconds > 0
    assert rehearse(engine, feed).validation_seconds == 0


# -- numbers -------------------------------------------------------------------------------


def clock_by_tokens(engine, monkeypatch):
    """Let the clock tell the tokens that the engine has seen, padding included."""
    seen = [0.0]
    accumulate = engine.accumulate

    def counted(batch, **named):
        seen[0] += batch.tensors["input_ids"].numel()
        return accumulate(batch, **named)

    monkeypatch.setattr(engine, "accumulate", counted)
    monkeypatch.setattr("edgetune.train.rehearsal.time.perf_counter", lambda: seen[0])


def test_seconds_a_step_are_the_mean_over_mixed_lengths(tiny_bert, tmp_path, monkeypatch):
    # 18 short texts of 4 tokens (with [CLS], [SEP]), 18 of 12 and 18 of 22: nine batches of 6,
    # each of one length; a step of 4, 12 or 22 times 6 tokens, in the mean 76
    path = tmp_path / "mixed.csv"
    words = ["lamp", "light", "door"]
    rows = []
    for number in range(54):
        length = (2, 10, 20)[number % 3]
        filler = [words[(number >> b) % 3] for b in range(length - 1)]
        rows.append(f"{' '.join(filler)} {('on', 'off')[number % 2]},{('on', 'off')[number % 2]}")
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "val.csv").write_text("text,label\nlamp on,on\nlamp off,off\n")
    config = text_config(path, tiny_bert, batch_size=6, val=str(tmp_path / "val.csv"))
    engine, feed, _ = engine_for(config)
    assert len(feed) == 9
    clock_by_tokens(engine, monkeypatch)
    assert rehearse(engine, feed).seconds_per_step == pytest.approx(76.0)
    assert rehearse(engine, feed, 2).seconds_per_step == pytest.approx(152.0)


def test_what_the_optimizer_will_remember_is_counted(switches, tiny_bert, monkeypatch):
    monkeypatch.setattr("edgetune.train.rehearsal.watch_peak", lambda _: lambda: 0.0)

    def mib(**changes):
        engine, feed, _ = engine_for(text_config(switches, tiny_bert, method="full", **changes))
        before = rehearse(engine, feed).memory_mib
        batch = next(feed.epoch(0))
        engine.train_mode(0)
        engine.accumulate(batch, epoch=0, rows=batch.rows, last=True)
        engine.update(1.0, 0, 10)
        assert rehearse(engine, feed).memory_mib == 0.0  # it is there, and is measured
        state = engine.optimizer.state.values()
        kept = [t for s in state for k, t in s.items() if k != "step" and t is not None]
        assert before * 2**20 == sum(t.nbytes for t in kept)
        return before

    assert mib(optimizer="adamw") == 2 * mib(optimizer="lion") > 0
    assert mib(optimizer="sgd", momentum=0.9) > mib(optimizer="sgd", momentum=0.0) == 0


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="Linux tells a process its own peak")
def test_a_peak_that_is_over_is_seen_and_an_earlier_one_is_forgotten():
    earlier = np.ones(300 * 2**17)  # 300 MiB of float64, touched
    del earlier
    free_unused(CPU)  # the allocator may keep it for what comes
    peak = watch_peak(CPU)
    before = peak()
    block = np.ones(100 * 2**17)
    del block
    assert 90 < peak() - before < 150


def test_where_a_peak_cannot_be_forgotten_what_is_there_at_the_end_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("edgetune.train.rehearsal.CLEAR_REFS", tmp_path)  # a folder: no writing
    peak = watch_peak(CPU)
    monkeypatch.setattr("edgetune.train.rehearsal.rss_mib", lambda: 123.0)
    assert peak() == 123.0
