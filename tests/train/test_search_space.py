"""What may be searched: read strictly, checked before anything runs."""

import dataclasses

import optuna
import pytest

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError
from edgetune.train.search_space import (
    SearchKey,
    check_search,
    default_space,
    grid_of,
    grid_size,
    parse_search,
    read_search,
    suggest,
)

BASE = TrainConfig(task="text-classification", model="m", data="d", output="o", method="lora")


def test_a_file_and_flags_say_the_same(tmp_path):
    path = tmp_path / "search.toml"
    path.write_text(
        "[search]\nlr = {low = 1e-5, high = 1e-2, log = true}\nlora_r = [4, 8]\n"
        'batch_size = {low = 8, high = 32, step = 8}\noptimizer = ["adamw", "lion"]\n'
        "double_quant = [true, false]\n"
    )
    flags = (
        "lr=log:1e-5..1e-2", "lora-r=4,8", "batch_size=8..32:8", "optimizer=adamw,lion",
        "double_quant=true,false",
    )  # fmt: skip
    space = read_search(path, BASE)
    assert space == parse_search(flags, BASE)
    assert space["lr"] == SearchKey(low=1e-5, high=1e-2, log=True)
    assert space["lora_r"].choices == (4, 8)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("learning_rate=1e-4,1e-3", "did you mean 'lr'"),
        ("lora_rr=4,8", "did you mean 'lora_r'"),
        ("seed=1,2", "seed: is the same in all trials"),
        ("data=a,b", "data: is the same in all trials"),
        ("lora_r=4,8.5", "expected a whole number, got '8.5'"),
        ("lr=high", "expected a number, got 'high'"),
        ("lr=0..1", "lr: expected more than 0, got 0"),
        ("lora_dropout=0..1", "lora_dropout: expected at most 0.95, got 1"),
        ("lora_r=0,4", "lora_r: expected at least 1, got 0"),
        ("lr=1e-2..1e-5", "expected low below high"),
        ("weight_decay=log:0..0.1", "log needs low above 0"),
        ("batch_size=8..31:8", "expected a step that leads from 8 to 31"),
        ("optimizer=adamw,sdg", "did you mean 'sgd'"),
        ("optimizer=a..b", "expected one of 'adamw'"),
        ("lora_r=4,4", "a value is there twice"),
        ("lora_r", "expected KEY=A,B,C"),
        ("lora_targets=query,value", "lora_targets is a list; search it in a file"),
        ("double_quant=yes,no", "expected true or false, got 'yes'"),
        ("last_blocks=1,2", "belong to method 'freeze', got 'lora'"),
        ("lr=nan,1", "expected a finite number, got nan"),
    ],
)
def test_a_mistake_is_named(flag, message):
    with pytest.raises(ConfigError, match=r"--search-key") as caught:
        parse_search([flag], BASE)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[search]\nlr = 0.1\n", "expected a list of values or {low"),
        ("[search]\nlr = {low = 1e-5}\n", "expected low and high, got low"),
        ("[search]\nlr = {low = 1e-5, hihg = 1.0}\n", "did you mean 'high'"),
        ("[search]\nlora_r = {low = 4.0, high = 8.0}\n", "expected a whole number"),
        ("[search]\n", "expected at least one key"),
        ("lr = [0.1]\n", "got 'lr' beside it"),
        ("", "has no table [search]"),
        ("[search]\noptimizer = {low = 1, high = 2}\n", "optimizer: is no number"),
        ("[search]\nlora_r = [4, '8']\n", "expected a whole number, got '8'"),
    ],
)
def test_a_mistake_in_a_file_is_named(content, message, tmp_path):
    (tmp_path / "s.toml").write_text(content)
    with pytest.raises(ConfigError, match=r"s\.toml") as caught:
        read_search(tmp_path / "s.toml", BASE)
    assert message in str(caught.value)


def test_values_that_contradict_each_other_are_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="unfreeze_every 1: unfreeze_every belong to method"):
        check_search({"method": ["full", "lora"], "unfreeze_every": [0, 1]}, BASE)


def test_the_default_space_goes_by_method_and_task():
    text = default_space(BASE)
    # LoRA's own rate is 1e-3
    assert (text["lr"].low, text["lr"].high, text["lr"].log) == (1e-4, 1e-2, True)
    assert text["batch_size"].choices == (16, 32, 64)
    assert set(text) == {"lr", "batch_size", "weight_decay", "lora_r", "lora_alpha"}
    image = dataclasses.replace(BASE, task="image-classification", method="bitfit", lr=0.02)
    assert set(default_space(image)) == {"lr", "batch_size", "augment"}
    assert default_space(image)["lr"].high == pytest.approx(0.2)
    for config in (BASE, image):
        plain = {n: dataclasses.asdict(k) for n, k in default_space(config).items()}
        check_search({n: _table(k) for n, k in plain.items()}, config)


def _table(key):
    return key["choices"] or {k: v for k, v in key.items() if v}


def test_a_grid_counts_the_steps_of_a_range():
    space = parse_search(["lora_dropout=0..0.3:0.1", "lora_r=3..5", "lr=1e-3,1e-2"], BASE)
    grid = grid_of(space)
    assert grid["lora_dropout"].choices == (0.0, 0.1, 0.2, 0.3)
    assert grid["lora_r"].choices == (3, 4, 5)
    assert grid_size(grid) == 4 * 3 * 2
    with pytest.raises(ConfigError, match="weight_decay: a grid needs a list of values or a step"):
        grid_of(parse_search(["weight_decay=0..0.1"], BASE))


def test_lists_are_drawn_as_lists():
    space = check_search({"lora_targets": [["query"], ["query", "value"]]}, BASE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = {tuple(suggest(study.ask(), space)["lora_targets"]) for _ in range(20)}
    assert drawn == {("query",), ("query", "value")}


def test_drawn_values_have_the_config_s_types_and_stay_in_range():
    space = parse_search(["lora_r=2..9", "lr=log:1e-5..1e-2", "lora_alpha=8,16"], BASE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(30):
        values = suggest(study.ask(), space)
        assert type(values["lora_r"]) is int
        assert 2 <= values["lora_r"] <= 9
        assert 1e-5 <= values["lr"] <= 1e-2
        assert values["lora_alpha"] in (8.0, 16.0)
