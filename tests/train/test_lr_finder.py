"""A range test suggests what a hand finds on curves of known shape, and a run takes it."""

import dataclasses
import itertools
import json
import math
import tomllib
from collections import Counter

import numpy as np
import pytest
import torch

from edgetune.config import TrainConfig
from edgetune.data import load_dataset
from edgetune.errors import ResourceError
from edgetune.models.adapt import DEFAULT_LR, adapt
from edgetune.models.load import load_model
from edgetune.runtime.bundle import file_sha256
from edgetune.tasks import open_task
from edgetune.train import Event, read_run, resume, train
from edgetune.train.batches import BatchOrder
from edgetune.train.engine import Engine
from edgetune.train.feeding import Feeder
from edgetune.train.lr_finder import (
    DIVERGED,
    SKIP,
    LrCurve,
    find_lr,
    lr_files,
    power,
    rates_around,
    smooth,
    steps_of,
    suggest,
)
from edgetune.train.machine import open_machine
from edgetune.train.run import data_source

RATES = [float(r) for r in np.geomspace(1e-6, 1.0, 100)]


def config_for(data, model, output, **changes) -> TrainConfig:
    config = TrainConfig(
        task="text-classification", model=model, data=str(data), output=str(output),
        method="full", epochs=2, batch_size=8, seed=1, cpu=True, find_lr=True,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def engine_for(config: TrainConfig) -> tuple[Engine, Feeder]:
    dataset = load_dataset(data_source(config))
    torch.manual_seed(config.seed)
    loaded = load_model(config.model, kind="text", labels=dataset.labels, weights=config.weights)
    adapt(loaded.network, loaded.family, config)
    task = open_task(config.task, loaded, dataset.labels, config)
    counts = Counter(dataset.splits["train"].labels)
    machine = open_machine(config)
    engine = Engine(config, task, loaded.family, machine, [counts[x] for x in dataset.labels])
    samples = task.samples(dataset.splits["train"], training=True)
    order = BatchOrder(
        len(samples), config.batch_size, lengths=samples.lengths, seed=config.seed
    )  # fmt: skip
    return engine, Feeder(samples, order, device=machine.device)


# -- the arithmetic ------------------------------------------------------------------------


def test_smoothing_is_adams_corrected_average():
    # by hand: 0.1 * 4 / 0.1 = 4; (0.9 * 0.4 + 0.1 * 2) / 0.19 = 0.56 / 0.19;
    # (0.9 * 0.56 + 0.1 * 1) / 0.271 = 0.604 / 0.271
    assert smooth([4.0, 2.0, 1.0]) == pytest.approx([4.0, 0.56 / 0.19, 0.604 / 0.271])


def test_a_constant_loss_is_left_alone_by_smoothing():
    assert smooth([0.7] * 50) == pytest.approx([0.7] * 50)


def test_rates_span_three_decades_either_way_within_what_is_a_rate():
    rates = rates_around(1e-3, 61)
    assert rates[0] == pytest.approx(1e-6)
    assert rates[-1] == pytest.approx(1.0)
    # 60 intervals over 6 decades: ten of them make a decade
    assert rates[40] == pytest.approx(1e-2)
    assert rates_around(1e-5, 40)[0] == pytest.approx(1e-7)
    assert rates_around(0.5, 40)[-1] == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("batches", "accumulation", "steps"),
    [(1, 1, 40), (13, 1, 40), (20, 1, 60), (20, 2, 40), (51, 2, 78), (1000, 1, 100)],
)
def test_small_data_sets_take_fewer_steps(batches, accumulation, steps):
    # three passes, of between 40 and 100 steps
    assert steps_of(batches, accumulation) == steps


def test_the_steepest_point_of_a_step_in_the_loss_is_suggested():
    # 2.0 up to step 59, then a line down to step 98, where it turns: no noise. Its slope is
    # the same everywhere, its average gets steeper till the turn, so the guard decides: the
    # lowest smoothed point is the turn or right after it
    losses = [2.0] * 60 + [2.0 - 0.04 * i for i in range(1, 40)] + [3.0]
    lr, reason = suggest(RATES, losses)
    assert reason == ""
    assert lr == float(f"{RATES[98] / 10:.2g}")


def test_a_steep_place_far_before_the_minimum_is_suggested():
    # a sudden fall at step 40, then hardly any until the end: an average falls the most in the
    # very step of a sudden fall; the slope by central differences is the mean of the falls
    # before and after a point, largest at 40: (v0 + v1) / 2 with v1 = 0.9 v0, against
    # (0 + v0) / 2 at 39 and (0.9 + 0.81) / 2 v0 at 41
    losses = [2.0] * 40 + [1.0 - 0.001 * i for i in range(60)]
    lr, reason = suggest(RATES, losses)
    assert (lr, reason) == (float(f"{RATES[40]:.2g}"), "")
    assert lr < RATES[99] / 10


def test_the_suggestion_is_never_above_a_tenth_of_the_rate_of_the_lowest_loss():
    losses = [2.0] * 80 + [1.0] * 5 + [5.0] * 15
    lr, _ = suggest(RATES, losses)
    lowest = int(np.argmin(smooth(losses)))
    assert lr == pytest.approx(RATES[lowest] / 10, rel=0.05)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([2.0] * 100, "does not fall"),
        ([2.0 + 0.01 * i for i in range(100)], "does not fall"),
        # falls by 2 %: less than is looked at
        ([2.0 - 0.0004 * i for i in range(100)], "no further than it scatters"),
        ([2.0] * 5, "was no number after 5 steps"),
        ([], "was no number after 0 steps"),
    ],
)
def test_no_fall_gives_no_suggestion(losses, words):
    lr, reason = suggest(RATES[: len(losses)], losses)
    assert lr is None
    assert words in reason


def test_noise_alone_is_rarely_taken_for_a_fall():
    rng = np.random.default_rng(0)
    found = [suggest(RATES, rng.normal(0.7, 0.2, 100).tolist())[0] for _ in range(200)]
    assert sum(lr is not None for lr in found) <= 10  # 5 %


def test_a_real_fall_is_found_through_the_noise():
    rng = np.random.default_rng(1)
    # half a loss lost around 1e-3, all of it and more back from 1e-1 on
    clean = [
        1.0 - 0.5 / (1 + (1e-3 / r) ** 1.5) + 4.0 / (1 + (0.3 / r) ** 3) for r in RATES
    ]  # fmt: skip
    for _ in range(20):
        lr, _ = suggest(RATES, (np.array(clean) + rng.normal(0, 0.05, 100)).tolist())
        assert lr is not None
        assert 1e-4 < lr < 1e-2


@pytest.mark.parametrize(("rate", "name"), [(1e-3, "1e-3"), (1e-12, "1e-12"), (10.0, "1e1")])
def test_axis_labels_are_short(rate, name):
    assert power(rate) == name


# -- the files -----------------------------------------------------------------------------


def curve(**changes) -> LrCurve:
    losses = [2.0] * 60 + [2.0 - 0.04 * i for i in range(1, 41)]
    values = {
        "lrs": tuple(RATES), "losses": tuple(losses), "smoothed": tuple(smooth(losses)),
        "suggestion": 0.07, "reason": "", "default": 1e-3,
    }  # fmt: skip
    return LrCurve(**(values | changes))


def test_figure_and_record_are_the_same_bytes_for_the_same_curve():
    files = lr_files(curve())
    assert files["lr_finder.png"][:8] == b"\x89PNG\r\n\x1a\n"
    assert files == lr_files(curve())
    record = json.loads(files["lr_finder.json"])
    assert record["suggestion"] == 0.07
    assert record["lrs"] == RATES


def test_a_curve_without_a_suggestion_is_drawn_too():
    files = lr_files(curve(suggestion=None, reason="the loss does not fall at any rate"))
    assert files["lr_finder.png"][:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads(files["lr_finder.json"])["suggestion"] is None


def test_a_loss_that_was_never_a_number_leaves_a_record_and_no_figure():
    empty = curve(lrs=(), losses=(), smoothed=(), suggestion=None, reason="the loss was no number")
    assert set(lr_files(empty)) == {"lr_finder.json"}
    assert empty.lr == 1e-3


# -- on an engine --------------------------------------------------------------------------


def test_the_same_config_gives_the_same_curve_which_ends_where_it_diverges(
    switches, tiny_bert, tmp_path
):
    config = config_for(switches, tiny_bert, tmp_path / "run", optimizer="sgd", grad_clip=0.0)
    found = find_lr(*engine_for(config))
    assert found == find_lr(*engine_for(config))
    assert found.default == pytest.approx(10 * DEFAULT_LR["full"])
    assert found.lrs[0] == pytest.approx(found.default / 1e3)
    # 13 batches of 8: three passes are 39 steps, 40 the fewest; of its last step the loss is
    # above four times the lowest, or the rates are through
    assert len(found.lrs) <= 40
    diverged = found.smoothed[-1] > DIVERGED * min(found.smoothed)
    assert diverged or len(found.lrs) == 40
    assert all(x <= DIVERGED * min(found.smoothed[: i + 1])
               for i, x in enumerate(found.smoothed[:-1]) if i >= SKIP)  # fmt: skip


def test_the_first_loss_is_that_of_the_untouched_network(switches, tiny_bert, tmp_path):
    config = config_for(switches, tiny_bert, tmp_path / "run")
    found = find_lr(*engine_for(config))
    engine, feed = engine_for(config)
    engine.train_mode(0)
    batch = next(feed.epoch(0))
    loss, weight = engine.accumulate(batch, epoch=0, rows=batch.rows, last=True)
    assert found.losses[0] == pytest.approx(float(loss / weight))


def test_accumulated_batches_make_one_step(switches, tiny_bert, tmp_path):
    config = config_for(switches, tiny_bert, tmp_path / "run", grad_accumulation=2)
    found = find_lr(*engine_for(config))
    engine, feed = engine_for(config)
    engine.train_mode(0)
    total = weight = 0.0
    for batch in itertools.islice(feed.epoch(0), 2):
        loss, rows = engine.accumulate(batch, epoch=0, rows=16, last=batch.number == 1)
        total, weight = total + float(loss), weight + float(rows)
    assert weight == 16
    assert found.losses[0] == pytest.approx(total / 16)


def test_the_engines_rate_is_the_curves(switches, tiny_bert, tmp_path):
    config = config_for(switches, tiny_bert, tmp_path / "run", layer_decay=0.5)
    engine, feed = engine_for(config)
    seen = []
    step = engine.update

    def watched(factor, number, steps):
        step(factor, number, steps)
        seen.append([g["lr"] for g in engine.optimizer.param_groups])

    engine.update = watched
    found = find_lr(engine, feed)
    # the head's groups come first, at depth 0; below them rates are halves of halves
    assert [lrs[0] for lrs in seen] == pytest.approx(found.lrs[: len(seen)])
    assert min(seen[0]) < max(seen[0]) / 2


def test_methods_that_go_by_the_step_can_be_tested(switches, tiny_bert, tmp_path):
    config = config_for(switches, tiny_bert, tmp_path / "run", method="adalora", lora_r=2)
    assert len(find_lr(*engine_for(config)).lrs) > SKIP


class Full(torch.nn.Module):
    """Stands in for a network on a device whose memory is full."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, **_):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_no_memory_is_said_in_words(switches, tiny_bert, tmp_path):
    engine, feed = engine_for(config_for(switches, tiny_bert, tmp_path / "run"))
    engine.network = Full(engine.network)
    with pytest.raises(ResourceError, match=r"batch_size 8; lower .* --batch-size 0"):
        find_lr(engine, feed)


# -- in a run ------------------------------------------------------------------------------


def notes(events: list[Event]) -> list[str]:
    return [e.values["text"] for e in events if e.kind == "note"]


def test_a_run_with_what_was_found_given_has_the_very_same_weights(switches, tiny_bert, tmp_path):
    folder, events = tmp_path / "found", []
    config = config_for(switches, tiny_bert, folder, lora_dropout=0.1, method="lora")
    train(config, on_event=events.append)
    record = json.loads((folder / "lr_finder.json").read_text())
    written = tomllib.loads((folder / "config.toml").read_text())
    wanted = record["suggestion"] or DEFAULT_LR["lora"]
    assert written["lr"] == wanted
    assert written["find_lr"] is False
    assert any(f"learning rate {wanted:g}" in text for text in notes(events))
    assert (folder / "lr_finder.png").is_file()
    again = tmp_path / "given"
    train(dataclasses.replace(config, output=str(again), find_lr=False, lr=wanted))
    assert not (again / "lr_finder.json").exists()
    assert file_sha256(again / "best.safetensors") == file_sha256(folder / "best.safetensors")


def test_a_rate_that_cannot_be_found_leaves_the_methods_own(switches, tiny_bert, tmp_path):
    # labels without a pattern, and gradients clipped to nothing: no rate makes the loss fall
    folder, events = tmp_path / "run", []
    config = config_for(
        switches, tiny_bert, folder, epochs=1, optimizer="sgd", momentum=0.0, grad_clip=1e-12
    )
    train(config, on_event=events.append)
    assert read_run(folder)[0].lr == pytest.approx(10 * DEFAULT_LR["full"])
    assert any("not found" in text for text in notes(events))
    assert math.isfinite(json.loads((folder / "lr_finder.json").read_text())["losses"][-1])


def test_resuming_searches_no_more(switches, tiny_bert, tmp_path):
    folder = tmp_path / "run"

    class Stopped(Exception):  # noqa: N818 - a crash, not an error of ours
        pass

    def crash(event: Event) -> None:
        if event.kind == "plan":
            raise Stopped

    with pytest.raises(Stopped):
        train(config_for(switches, tiny_bert, folder), on_event=crash)
    found = read_run(folder)[0].lr
    events: list[Event] = []
    resume(folder, on_event=events.append)
    assert read_run(folder)[0].lr == found
    assert not any("range test" in text or "not found" in text for text in notes(events))
