"""The strict config: one set of words for files and flags."""

from pathlib import Path

import pytest

from edgetune.config import TrainConfig, load_config
from edgetune.errors import ConfigError

GIVEN = {"task": "text-classification", "model": "m", "data": "d.csv", "output": "o"}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(text)
    return path


def test_flags_win_over_the_file(tmp_path):
    path = write(tmp_path, 'task = "text-classification"\nmodel = "m"\nepochs = 3\n')
    config = load_config(path, {"data": "d", "output": "o", "epochs": 5, "lr": None})
    assert (config.epochs, config.model, config.lr) == (5, "m", None)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rate", "lr"),
        ("epoch", "epochs"),
        ("lora_rank", "lora_r"),
        ("batchsize", "batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, key, nearest):
    path = write(tmp_path, f"{key} = 1\n")
    with pytest.raises(ConfigError, match=rf"unknown key '{key}'; did you mean '{nearest}'\?"):
        load_config(path, GIVEN)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('epochs = "3"', r"epochs: expected a whole number, got '3' \(str\)"),
        ("epochs = 3.5", r"epochs: expected a whole number, got 3.5 \(float\)"),
        ("epochs = true", "epochs: expected a whole number, got True"),
        ("epochs = 0", "epochs: expected at least 1, got 0"),
        ("lr = 0", "lr: expected more than 0, got 0"),
        ("val_fraction = 1.5", "val_fraction: expected at most 0.9, got 1.5"),
        ("cpu = 1", r"cpu: expected true or false, got 1 \(int\)"),
        ('method = "lorra"', "method: expected one of .* did you mean 'lora'"),
        ('lora_targets = "query"', "lora_targets: expected a list, got 'query'"),
        ('method = "freeze"', "needs last_blocks or train_patterns"),
        ("last_blocks = 2", "belong to method 'freeze', got 'lora'"),
        ("epochs = ", "is no valid TOML"),
    ],
)
def test_a_bad_value_says_what_was_got_and_expected(tmp_path, line, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, line + "\n"), GIVEN)


def test_missing_required_keys_are_named_together():
    with pytest.raises(ConfigError, match=r"model, output: not given; .* --model --output"):
        load_config(None, {"task": "text-classification", "data": "d"})


def test_an_integer_serves_as_a_number(tmp_path):
    assert load_config(write(tmp_path, "lr = 1\n"), GIVEN).lr == 1.0


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nope\.toml: cannot be read"):
        load_config(tmp_path / "nope.toml", GIVEN)


def test_the_defaults_are_within_their_own_bounds():
    assert TrainConfig().epochs == 10
