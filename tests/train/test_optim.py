"""Schedules by hand."""

import pytest
import torch

from edgetune.config import TrainConfig
from edgetune.train.optim import lr_factor, make_optimizer


@pytest.mark.parametrize(
    ("schedule", "expected"),
    # 100 steps, 10 of warm-up; half way between is step 55
    [("linear", (1.0, 0.5)), ("cosine", (1.0, 0.5)), ("constant", (1.0, 1.0))],
)
def test_schedule_after_warmup(schedule, expected):
    config = TrainConfig(schedule=schedule, warmup_fraction=0.1)
    assert lr_factor(config, 10, 100) == pytest.approx(expected[0])
    assert lr_factor(config, 55, 100) == pytest.approx(expected[1])


def test_warmup_rises_evenly_and_never_is_zero():
    config = TrainConfig(warmup_fraction=0.1)
    found = [lr_factor(config, step, 100) for step in range(10)]
    assert found == pytest.approx([(i + 1) / 11 for i in range(10)])


def test_cosine_at_a_quarter():
    # 0.5 (1 + cos(pi / 4)) = 0.853553
    assert lr_factor(TrainConfig(warmup_fraction=0.0), 25, 100) == pytest.approx(0.853553, abs=1e-6)


def test_biases_and_norms_do_not_decay():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    groups = make_optimizer(network, TrainConfig(weight_decay=0.3)).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.3, 1), (0.0, 3)]


def test_sgd_takes_its_momentum():
    network = torch.nn.Linear(3, 4)
    config = TrainConfig(optimizer="sgd", momentum=0.7)
    assert make_optimizer(network, config).param_groups[0]["momentum"] == 0.7
