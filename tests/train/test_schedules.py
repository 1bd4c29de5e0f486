"""Schedules by hand and against torch.optim.lr_scheduler."""

import operator

import pytest
import torch
from torch.optim import lr_scheduler

from edgetune.config import TrainConfig
from edgetune.train.schedules import Plateau, lr_factor


def curve(config, steps, steps_per_epoch=10):
    return [lr_factor(config, s, steps, steps_per_epoch=steps_per_epoch) for s in range(steps)]


def torchs(make, steps):
    """Return the rates of a torch schedule whose peak is 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "expected"),
    # 100 steps, 10 of warm-up; half way between is step 55
    [("linear", (1.0, 0.5)), ("cosine", (1.0, 0.5)), ("constant", (1.0, 1.0)),
     ("exponential", (1.0, 0.1)), ("plateau", (1.0, 1.0))],
)  # fmt: skip
def test_schedule_after_warmup(schedule, expected):
    config = TrainConfig(schedule=schedule, warmup_fraction=0.1, schedule_gamma=0.01)
    found = curve(config, 100)
    assert found[10] == pytest.approx(expected[0])
    assert found[55] == pytest.approx(expected[1])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "exponential", "plateau"])
def test_warmup_rises_evenly_and_never_is_zero(schedule):
    config = TrainConfig(schedule=schedule, warmup_fraction=0.1)
    assert curve(config, 100)[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])


def test_warmup_is_torchs_linear():
    # LinearLR from 1 / 11 to 1 in 10 steps
    expected = torchs(lambda o: lr_scheduler.LinearLR(o, start_factor=1 / 11, total_iters=10), 40)
    config = TrainConfig(schedule="constant", warmup_fraction=0.25)
    assert curve(config, 40) == pytest.approx(expected)


def test_cosine_at_a_quarter():
    # 0.5 (1 + cos(pi / 4)) = 0.853553
    config = TrainConfig(warmup_fraction=0.0)
    assert curve(config, 100)[25] == pytest.approx(0.853553, abs=1e-6)


@pytest.mark.parametrize(
    ("keys", "make"),
    [
        ({"schedule": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=60)),
        (
            {"schedule": "linear"},
            lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=60),
        ),
        (
            {"schedule": "exponential", "schedule_gamma": 0.05},
            lambda o: lr_scheduler.ExponentialLR(o, gamma=0.05 ** (1 / 60)),
        ),
        (
            {"schedule": "step", "schedule_gamma": 0.3, "schedule_epochs": 2},
            lambda o: lr_scheduler.StepLR(o, step_size=14, gamma=0.3),
        ),
    ],
    ids=["cosine", "linear", "exponential", "step"],
)
def test_curves_are_torchs(keys, make):
    config = TrainConfig(warmup_fraction=0.0, **keys)
    assert curve(config, 60, steps_per_epoch=7) == pytest.approx(torchs(make, 60), abs=1e-9)


@pytest.mark.parametrize("rising", [0.0, 0.06, 0.3, 0.9])
@pytest.mark.parametrize("steps", [7, 60, 101])
def test_one_cycle_is_torchs(rising, steps):
    expected = torchs(
        lambda o: lr_scheduler.OneCycleLR(
            o, max_lr=1.0, total_steps=steps, pct_start=rising, cycle_momentum=False,
            div_factor=25.0, final_div_factor=1e4,
        ),
        steps,
    )  # fmt: skip
    config = TrainConfig(schedule="one_cycle", warmup_fraction=rising)
    assert curve(config, steps) == pytest.approx(expected, abs=1e-9)


def test_one_cycle_of_few_steps_is_finite_where_torchs_divides_by_zero():
    # a peak exactly at step 0
    config = TrainConfig(schedule="one_cycle", warmup_fraction=0.1)
    assert curve(config, 10)[0] == 1.0
    assert 0 < lr_factor(config, 0, 1, steps_per_epoch=1) <= 1


def test_a_drop_within_the_warmup_stays_dropped():
    config = TrainConfig(schedule="step", warmup_fraction=0.5, schedule_epochs=1)
    # 8 steps of 2 epochs: by the hand (1..4) / 5, then 1, all a tenth from step 4 on
    found = curve(config, 8, steps_per_epoch=4)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.1, 0.1, 0.1, 0.1])
    plateau = TrainConfig(schedule="plateau", warmup_fraction=0.5)
    rate = lr_factor(plateau, 1, 8, steps_per_epoch=4, plateau_drops=1)
    assert rate == pytest.approx(0.04)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "exponential", "one_cycle"])
def test_a_step_past_the_end_stays_at_the_end(schedule):
    config = TrainConfig(schedule=schedule)
    rates = [lr_factor(config, s, 50, steps_per_epoch=10) for s in (50, 51, 80)]
    assert rates[0] == rates[1] == rates[2] >= 0


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_plateau_is_torchs(mode, patience):
    values = [0.5, 0.6, 0.6, 0.55, 0.61, 0.6, 0.6, 0.6, float("nan"), 0.5, 0.7, 0.4, 0.4, 0.4, 0.4]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = lr_scheduler.ReduceLROnPlateau(
        optimizer, mode=mode, factor=0.1, patience=patience - 1, threshold=0.0, eps=0.0
    )
    config = TrainConfig(schedule="plateau", warmup_fraction=0.0)
    plateau = Plateau()
    for value in values:
        schedule.step(value)
        plateau = plateau.after(value, operator.gt if mode == "max" else operator.lt, patience)
        found = lr_factor(config, 9, 100, steps_per_epoch=3, plateau_drops=plateau.drops)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"])
    assert plateau.drops > 0


def test_a_first_value_that_is_no_number_is_not_the_best():
    plateau = Plateau().after(float("nan"), operator.gt, 3).after(0.2, operator.gt, 3)
    assert plateau == Plateau(best=0.2, stale=0, drops=0)
