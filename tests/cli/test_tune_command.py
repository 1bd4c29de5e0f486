"""`edgetune tune` as a person meets it."""

import json

import pytest
from click.testing import CliRunner

from edgetune.cli.tune import command
from edgetune.config import load_config
from edgetune.errors import ConfigError


@pytest.fixture
def config(switches, tiny_bert, tmp_path):
    path = tmp_path / "base.toml"
    path.write_text(
        f'task = "text-classification"\nmodel = "{tiny_bert}"\ndata = "{switches}"\n'
        'method = "head"\nepochs = 1\nbatch_size = 32\nlr = 0.001\ncpu = true\n'
        'metric = "accuracy"\n'
    )
    return path


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments])


def test_a_search_prints_its_plan_its_trials_and_the_best(config, tmp_path):
    folder = tmp_path / "study"
    flags = ("--config", config, "--output", folder, "--sampler", "grid")
    done = run(*flags, "--search-key", "lr=1e-3,1e-2", "--pruner", "none")
    assert done.exit_code == 0, done.output
    assert "2 trials for the highest accuracy" in done.stderr
    assert "trial   1  complete  accuracy" in done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["rank", "trial", "status", "accuracy", "epochs", "s", "lr"]
    assert [row.split()[0] for row in rows[1:3]] == ["1", "2"]
    assert f"edgetune train --config {folder / 'best.toml'} --output RUN" in done.stdout
    assert load_config(folder / "best.toml", {}).lr in (1e-3, 1e-2)

    again = run(*flags, "--search-key", "lr=1e-3,1e-2", "--pruner", "none", "--json")
    assert "resuming   2 trials are done" in again.stderr
    record = json.loads(again.stdout)
    assert record["status"] == "finished"
    assert [t["status"] for t in record["trials"]] == ["complete", "complete"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--search-key", "learning-rate=1,2"), "did you mean 'lr'"),
        (("--search-key", "lr=1,2", "--search", "s.toml"), "expected one of them, got both"),
        (("--search", "nowhere.toml"), "nowhere.toml: cannot be read"),
        (("--sampler", "grid"), "lr: a grid needs a list of values or a step"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(flags, message, config, tmp_path):
    done = run("--config", config, "--output", tmp_path / "study", *flags)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
    assert not (tmp_path / "study").exists()
