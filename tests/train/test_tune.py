"""Searches of small real runs: the grid, resuming, pruning, processes, and what is left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from edgetune.config import TrainConfig, load_config
from edgetune.errors import ConfigError
from edgetune.train.run import read_run
from edgetune.train.study import new_record, read_tune
from edgetune.train.tune import TuneEvent, tune


def base(switches, model, output, **changes):
    keys = {
        "task": "text-classification", "model": model, "data": str(switches),
        "output": str(output), "method": "full", "epochs": 1, "batch_size": 16, "lr": 5e-3,
        "cpu": True, "seed": 0, "patience": 0, "metric": "accuracy",
        **changes,
    }  # fmt: skip
    return TrainConfig(**keys)


class Ctrl_C:  # noqa: N801
    """Sends SIGINT to this process when the n-th event of a kind comes."""

    def __init__(self, kind, count):
        self.kind, self.left = kind, count
        self.events: list[TuneEvent] = []

    def __call__(self, event):
        self.events.append(event)
        self.left -= event.kind == self.kind
        if self.left == 0:
            self.left = -1
            os.kill(os.getpid(), signal.SIGINT)


GRID = {"lr": [1e-3, 5e-3], "batch_size": [16, 32]}


@pytest.fixture(scope="module")
def grid(switches, tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune") / "grid"
    config = base(switches, tiny_bert, folder, metric="loss")
    return tune(config, search=GRID, sampler="grid", pruner="none"), config, folder


def test_a_grid_search_visits_each_point_once(grid):
    record, _, folder = grid
    points = sorted((t.params["lr"], t.params["batch_size"]) for t in record.trials)
    assert points == [(1e-3, 16), (1e-3, 32), (5e-3, 16), (5e-3, 32)]
    assert record.status == "finished"
    for trial in record.trials:
        config, run = read_run(folder / "trials" / f"{trial.number:04}")
        assert (config.lr, config.batch_size) == (trial.params["lr"], trial.params["batch_size"])
        assert run.status == "finished"
        assert trial.value == run.metrics["val_loss"]


def test_the_best_config_is_the_best_trial_s(grid):
    record, config, folder = grid
    values = [t.value for t in record.trials]
    best = record.trials[values.index(min(values))]
    assert record.best == best.number
    loaded = load_config(folder / "best.toml", {})
    assert {n: getattr(loaded, n) for n in best.params} == best.params
    assert (loaded.model, loaded.epochs, loaded.seed) == (config.model, 1, 0)
    assert load_config(folder / "best.toml", {"output": "run"}).output == "run"
    assert read_tune(folder) == record


def test_pictures_show_history_and_importance(grid):
    record, _, folder = grid
    assert set(record.importance) == {"lr", "batch_size"}
    assert sum(record.importance.values()) == pytest.approx(1.0)
    for name in ("history.png", "importance.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_a_finished_search_does_nothing_more(grid):
    record, config, folder = grid
    before = (folder / "trials" / "0003" / "run.json").stat().st_mtime_ns
    events = []
    again = tune(config, search=GRID, sampler="grid", pruner="none", on_event=events.append)
    assert again == record
    assert [e.kind for e in events] == ["plan", "finished"]
    assert (folder / "trials" / "0003" / "run.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "search", "sampler", "message"),
    [
        ({"epochs": 2}, GRID, "grid", "epochs is 1 there, 2 now"),
        ({}, {**GRID, "lr": [1e-3, 2e-3]}, "grid", r"search of lr is \[0.001, 0.005\] there"),
        ({}, {"lr": [1e-3, 5e-3]}, "grid", "search of batch_size is .* there, not there now"),
        ({}, GRID, "random", "sampler is 'grid' there, 'random' now"),
    ],
)
def test_another_search_is_refused_by_what_differs(
    grid, switches, tiny_bert, changes, search, sampler, message
):
    record, _, folder = grid
    config = base(switches, tiny_bert, folder, **{"metric": "loss", **changes})
    with pytest.raises(ConfigError, match=message):
        tune(config, search=search, sampler=sampler, pruner="none")
    assert read_tune(folder) == record


@pytest.mark.parametrize(
    ("task", "metric", "objective", "direction"),
    [
        ("text-classification", "auto", "accuracy", "maximize"),
        ("image-classification", "f1_macro", "f1_macro", "maximize"),
        ("text-classification", "loss", "loss", "minimize"),
        ("image-regression", "auto", "loss", "minimize"),
        ("image-regression", "mae", "mae", "minimize"),
    ],
)
def test_the_metric_says_which_way_is_better(task, metric, objective, direction):
    config = TrainConfig(task=task, model="m", data="d", output="o", metric=metric)
    record = new_record(config, {}, sampler="tpe", pruner="none", wanted=1)
    assert (record.metric, record.direction) == (objective, direction)


def test_a_folder_with_something_else_in_it_is_refused(switches, tiny_bert, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already and is no study"):
        tune(base(switches, tiny_bert, tmp_path), search=GRID)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_stopped_search_goes_on_to_what_it_would_have_been(switches, tiny_bert, tmp_path):
    search = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "weight_decay": [0.0, 0.1]}
    options = {"search": search, "sampler": "tpe", "trials": 3}
    whole = tune(base(switches, tiny_bert, tmp_path / "whole"), **options)
    config = base(switches, tiny_bert, tmp_path / "stopped")
    handler = signal.getsignal(signal.SIGINT)
    stopped = tune(config, on_event=Ctrl_C("begin", 2), **options)
    assert signal.getsignal(signal.SIGINT) is handler
    assert stopped.status == "interrupted"
    assert [t.status for t in stopped.trials] == ["complete", "waiting"]
    events = []
    resumed = tune(config, on_event=events.append, **options)
    assert [e.values["number"] for e in events if e.kind == "begin"] == [1, 2]
    assert [(t.params, t.value) for t in resumed.trials] == [
        (t.params, t.value) for t in whole.trials
    ]
    more = tune(config, **{**options, "trials": 4})
    assert [t.status for t in more.trials] == ["complete"] * 4


def test_a_hopeless_trial_is_stopped_and_its_disk_freed(switches, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr("edgetune.train.study._MEDIAN_TRIALS", 2)
    # seed 2 puts the rate that diverges behind the two that do not
    lrs = [0.5, 1e-4, 1e-3]
    config = base(switches, tiny_bert, tmp_path / "s", epochs=3, metric="loss", seed=2)
    threads = threading.active_count()
    record = tune(config, search={"lr": lrs}, sampler="grid", pruner="median")
    assert threading.active_count() == threads
    pruned = [t for t in record.trials if t.status == "pruned"]
    assert [t.params["lr"] for t in pruned] == [0.5]
    assert pruned[0].epochs == 2
    assert record.direction == "minimize"
    folder = tmp_path / "s" / "trials" / f"{pruned[0].number:04}"
    names = {p.name for p in folder.iterdir()}
    assert {"run.json", "config.toml", "metrics.jsonl"} <= names
    assert not {"checkpoints", "best.safetensors", "cache"} & names
    assert read_run(folder)[1].status == "interrupted"
    assert record.importance == {}  # nothing to tell from two complete trials
    assert not (tmp_path / "s" / "importance.png").exists()
    assert record.ranked()[-1] == pruned[0]


def test_a_trial_that_breaks_is_noted_and_the_others_go_on(switches, tiny_bert, tmp_path):
    config = base(switches, tiny_bert, tmp_path / "s", optimizer="sgd", grad_clip=0.0)
    record = tune(config, search={"lr": [1e-2, 1e30]}, sampler="grid")
    by_lr = {t.params["lr"]: t for t in record.trials}
    assert by_lr[1e-2].status == "complete"
    assert by_lr[1e30].status == "failed"
    assert "lower lr" in by_lr[1e30].reason
    assert record.best == by_lr[1e-2].number


def test_a_mistake_of_the_config_ends_the_search_at_once(switches, tmp_path):
    config = base(switches, "./no-such-model", tmp_path / "s")
    with pytest.raises(ConfigError, match="no such folder"):
        tune(config, search=GRID)
    assert [t.status for t in read_tune(tmp_path / "s").trials] in ([], ["waiting"])


def test_time_that_is_up_leaves_the_trial_to_go_on(switches, tiny_bert, tmp_path):
    config = base(switches, tiny_bert, tmp_path / "s", epochs=200)
    record = tune(config, search={"lr": [1e-3]}, minutes=0.05)
    assert record.status == "interrupted"
    assert [t.status for t in record.trials] == ["waiting"]


def test_processes_share_the_trials_and_one_that_dies_costs_its_trial(
    switches, tiny_bert, tmp_path
):
    config = base(switches, tiny_bert, tmp_path / "s")
    began = []

    def kill_first(event):
        if event.kind == "begin":
            began.append(event.values)
            if len(began) == 1:
                os.kill(event.values["pid"], signal.SIGKILL)

    record = tune(
        config, search={"lr": [1e-3, 5e-3, 1e-2], "batch_size": [16, 32]}, sampler="grid",
        trials=3, jobs=2, on_event=kill_first,
    )  # fmt: skip
    assert sorted(b["number"] for b in began) == [0, 1, 2]
    assert os.getpid() not in {b["pid"] for b in began}
    assert len({tuple(t.params.values()) for t in record.trials}) == 3
    assert record.status == "finished"
    dead = record.trials[began[0]["number"]]
    assert dead.status == "failed"
    assert "ended with code -9" in dead.reason
    assert [t.status for t in record.trials if t is not dead] == ["complete"] * 2


def test_a_killed_search_finishes_the_count(switches, tiny_bert, tmp_path):
    folder = tmp_path / "s"
    config = base(switches, tiny_bert, folder)
    options = {"search": {"lr": [1e-3, 2e-3, 5e-3]}, "sampler": "grid"}
    code = (
        "import json, sys; from edgetune.config import TrainConfig; from edgetune.train.tune"
        " import tune; tune(TrainConfig(**json.loads(sys.argv[1])), **json.loads(sys.argv[2]))"
    )
    arguments = [json.dumps(config.__dict__), json.dumps(options)]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    until = time.monotonic() + 60
    while not (folder / "trials" / "0001" / "run.json").is_file():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    record = tune(config, **options)
    assert [(t.number, t.status) for t in record.trials] == [
        (0, "complete"), (1, "complete"), (2, "complete"),
    ]  # fmt: skip
    assert sorted(t.params["lr"] for t in record.trials) == [1e-3, 2e-3, 5e-3]
