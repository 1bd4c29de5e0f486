"""Trackers, read back with their own readers: what is reported, once, and on resume too."""

import dataclasses
import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError, MissingExtraError, ResourceError
from edgetune.train import Event, resume, train
from edgetune.train.track import Trackers, open_trackers

CONFIG = TrainConfig(
    task="text-classification", model="tiny", data="t.csv", output="runs/a", lr=5e-3
)
RECORD = {"parameters": 1000, "task": "text-classification", "labels": ["a", "b"]}

# of packages under MLflow
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
needs_mlflow = pytest.mark.skipif(
    not (find_spec("mlflow") and find_spec("sqlalchemy")),
    reason="mlflow (extra mlflow) and sqlalchemy are not installed",
)
needs_wandb = pytest.mark.skipif(
    not find_spec("wandb"), reason="wandb (extra wandb) is not installed"
)


def step(number: int, loss: float = 0.5, steps: int = 40) -> Event:
    values = {"step": number, "steps": steps, "loss": loss, "lr": 1e-3, "samples_per_s": 100.0}
    return Event(kind="step", values=values)


def epoch(number: int, *, at: int, loss: float = 1.0, accuracy: float = 0.5) -> Event:
    values = {
        "epoch": number, "epochs": 4, "step": at, "train_loss": loss, "val_loss": 2 * loss,
        "val_accuracy": accuracy, "val_f1_macro": 0.25, "lr": 1e-3, "best": True,
        "samples_per_s": 80.0, "energy_wh": 0.5, "peak_memory_mib": 300.0, "seconds": 3.0,
    }  # fmt: skip
    return Event(kind="epoch", values=values)


def report(names: tuple[str, ...], folder: Path, *events: Event, steps_done: int = 0) -> list[str]:
    notes: list[str] = []
    trackers = open_trackers(
        names, folder, CONFIG, RECORD, steps_done=steps_done, note=notes.append
    )
    for event in events:
        trackers(event)
    trackers.close()
    return notes


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a run's event files with TensorBoard's own reader: name -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "tensors": 0})
    reader.Reload()
    return {
        name: [(e.step, e.value) for e in reader.Scalars(name)]
        for name in reader.Tags()["scalars"]
    }  # fmt: skip


# -- TensorBoard -------------------------------------------------------------------------------


def test_tensorboard_gets_steps_and_epochs(tmp_path):
    report(("tensorboard",), tmp_path, step(1, 0.75), step(2, 0.5), epoch(1, at=2, loss=0.25))
    found = scalars(tmp_path)
    assert found["train/loss"] == [(1, 0.75), (2, 0.5)]
    assert found["val/loss"] == [(2, 0.5)]
    assert found["val/accuracy"] == [(2, 0.5)]
    assert found["val/f1_macro"] == [(2, 0.25)]
    assert found["energy_wh"] == [(2, 0.5)]
    assert found["peak_memory_mib"] == [(2, 300.0)]
    assert found["epoch"] == [(2, 1.0)]
    assert found["samples_per_s"] == [(1, 100.0), (2, 100.0)]
    assert [at for at, _ in found["lr"]] == [1, 2]


def test_an_epoch_between_two_reported_steps_is_a_point_of_the_loss(tmp_path):
    report(("tensorboard",), tmp_path, step(1, 0.75), epoch(1, at=3, loss=0.25), step(4, 0.5))
    assert scalars(tmp_path)["train/loss"] == [(1, 0.75), (3, 0.25), (4, 0.5)]


def test_a_resumed_run_drops_what_was_reported_of_steps_that_are_done_again(tmp_path):
    first = (step(10, 0.9), epoch(1, at=10, accuracy=0.5), step(15, 0.8), epoch(2, at=20))
    report(("tensorboard",), tmp_path, *first)
    # the newest checkpoint is that of the end of epoch 1
    report(("tensorboard",), tmp_path, step(12, 0.7), epoch(2, at=20, accuracy=0.75), steps_done=10)
    found = scalars(tmp_path)
    assert found["val/accuracy"] == [(10, 0.5), (20, 0.75)]
    assert [at for at, _ in found["train/loss"]] == [10, 12, 20]


def test_a_run_of_very_many_steps_reports_two_thousand_of_them(tmp_path):
    events = [step(n, steps=200_000) for n in range(1, 1001)]
    report(("tensorboard",), tmp_path, *events)
    assert [at for at, _ in scalars(tmp_path)["train/loss"]] == list(range(100, 1001, 100))


def test_a_run_reports_what_its_metrics_file_holds_once_though_it_was_interrupted(
    switches, tiny_bert, tmp_path, monkeypatch
):
    monkeypatch.setattr("edgetune.train.loop.EVENT_SECONDS", 0.0)
    folder = tmp_path / "run"
    config = dataclasses.replace(
        CONFIG, model=tiny_bert, data=str(switches), output=str(folder), method="full", epochs=3,
        batch_size=8, cpu=True, track=("tensorboard",),
    )  # fmt: skip

    def stop_in_the_second_epoch(event: Event) -> None:
        if event.kind == "step" and event.values["step"] == 20:
            os.kill(os.getpid(), signal.SIGINT)

    assert train(config, on_event=stop_in_the_second_epoch).status == "interrupted"
    assert resume(folder).status == "finished"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = scalars(folder)
    assert len(lines) == 3
    for name, key in (("val/loss", "val_loss"), ("val/accuracy", "val_accuracy")):
        assert [at for at, _ in found[name]] == [line["step"] for line in lines]
        assert [v for _, v in found[name]] == pytest.approx([line[key] for line in lines], rel=1e-6)
    steps = [at for at, _ in found["train/loss"]]
    assert steps == sorted(set(steps))
    assert {20, 21, lines[-1]["step"]} <= set(steps)


# -- what fails --------------------------------------------------------------------------------


class Unreachable:
    """A tracker whose server goes away after the first epoch."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def step(self, step, scalars):  # noqa: ARG002
        self.calls.append("step")

    def epoch(self, step, scalars):  # noqa: ARG002
        self.calls.append("epoch")
        raise ConnectionError("no route\nto host")

    def close(self, ending):
        self.calls.append(f"close {ending}")


class Reachable(Unreachable):
    def epoch(self, step, scalars):  # noqa: ARG002
        self.calls.append("epoch")


def test_a_tracker_that_fails_is_switched_off_with_one_note_and_the_others_go_on():
    bad, good, notes = Unreachable(), Reachable(), []
    trackers = Trackers({"mlflow": bad, "wandb": good}, notes.append)
    for event in (step(1), epoch(1, at=1), step(2), epoch(2, at=2)):
        trackers(event)
    trackers(Event(kind="finished", values={}))
    trackers.close()
    assert notes == ["mlflow: is switched off, the run goes on: ConnectionError: no route to host"]
    assert bad.calls == ["step", "epoch"]
    assert good.calls == ["step", "epoch", "step", "epoch", "close finished"]


@pytest.mark.parametrize(
    ("kinds", "ending"), [(["interrupted"], "interrupted"), ([], "failed"), (["note"], "failed")]
)
def test_trackers_are_told_how_the_run_ended(kinds, ending):
    tracker = Reachable()
    trackers = Trackers({"x": tracker}, print)
    for kind in kinds:
        trackers(Event(kind=kind, values={}))
    trackers.close()
    assert tracker.calls == [f"close {ending}"]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_names_its_extra(name, tmp_path):
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(MissingExtraError, match=rf"edgetune\[{name}\]"):
        report((name,), tmp_path)


def test_a_tracker_that_can_not_be_opened_ends_the_run_before_it_begins(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where a folder belongs")
    with pytest.raises(
        ResourceError, match=r"^tensorboard: can't be opened: .*--track tensorboard"
    ):
        report(("tensorboard",), tmp_path)


# -- MLflow ------------------------------------------------------------------------------------


@pytest.fixture
def mlflow_client(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(tracking_uri=uri)


def mlflow_run(client, folder: Path):
    known = json.loads((folder / "tracking.json").read_text())["mlflow"]
    return client.get_run(known["run_id"])


@needs_mlflow
def test_mlflow_gets_config_and_epochs(tmp_path, mlflow_client):
    folder = tmp_path / "lora-r8"
    folder.mkdir()
    finished = Event(kind="finished", values={})
    report(("mlflow",), folder, step(1), epoch(1, at=10, accuracy=0.75), finished)
    run = mlflow_run(mlflow_client, folder)
    assert run.info.run_name == "lora-r8"
    assert run.info.status == "FINISHED"
    experiment = mlflow_client.get_experiment_by_name("edgetune")
    assert run.info.experiment_id == experiment.experiment_id
    assert run.data.params["lr"] == "0.005"
    assert run.data.params["run/parameters"] == "1000"
    assert len(run.data.params) == len(dataclasses.fields(TrainConfig)) + 2
    assert run.data.metrics["val/accuracy"] == 0.75
    assert run.data.metrics["epoch"] == 1


@needs_mlflow
def test_mlflow_goes_on_with_the_same_run_and_has_each_epoch_once(
    tmp_path, mlflow_client, monkeypatch
):
    folder = tmp_path / "run"
    folder.mkdir()
    report(("mlflow",), folder, epoch(1, at=10), epoch(2, at=20))
    first = mlflow_run(mlflow_client, folder)
    assert first.info.status == "FAILED"
    # elsewhere, and where nothing but the run says which database it was
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    stopped = Event(kind="interrupted", values={})
    report(("mlflow",), folder, epoch(2, at=20), epoch(3, at=30), stopped, steps_done=10)
    again = mlflow_run(mlflow_client, folder)
    assert again.info.run_id == first.info.run_id
    assert again.info.status == "KILLED"
    points = mlflow_client.get_metric_history(again.info.run_id, "val/loss")
    assert [point.step for point in points] == [10, 20, 30]


@needs_mlflow
def test_a_server_that_is_away_is_an_error_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ResourceError, match=r"^mlflow: can't be opened: "):
        report(("mlflow",), tmp_path)


@needs_mlflow
def test_a_database_without_its_package_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edgetune.train.track.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI to your server"):
        report(("mlflow",), tmp_path)


# -- Weights & Biases --------------------------------------------------------------------------


def leveldb_records(path: Path) -> list[bytes]:
    """Read wandb's file: 7 bytes, then a log in LevelDB's format.

    Source: github.com/google/leveldb/blob/main/doc/log_format.md. Blocks of 32 KiB hold pieces:
    checksum (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last), content.
    """
    data, records, begun = path.read_bytes(), [], b""
    at = 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        begun += data[at + 7 : at + 7 + length]
        if kind in (1, 4):
            records.append(begun)
            begun = b""
        at += 7 + length
    return records


def wandb_records(folder: Path) -> tuple[list[str], list[dict[str, float]]]:
    """Read a run's offline files: ids, and rows of history."""
    from wandb.proto import wandb_internal_pb2

    ids, rows = [], []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                keys = [item.key or "/".join(item.nested_key) for item in items]
                rows.append(dict(zip(keys, (json.loads(i.value_json) for i in items), strict=True)))
    return ids, rows


@needs_wandb
def test_wandb_goes_on_with_the_same_run_and_has_each_epoch_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    report(("wandb",), tmp_path, step(1), epoch(1, at=10, accuracy=0.25))
    report(("wandb",), tmp_path, epoch(1, at=10), epoch(2, at=20, accuracy=0.75), steps_done=10)
    ids, rows = wandb_records(tmp_path)
    assert len(set(ids)) == 1
    assert json.loads((tmp_path / "tracking.json").read_text())["wandb"]["id"] == ids[0]
    assert [(row["_step"], row["val/accuracy"]) for row in rows] == [(10, 0.25), (20, 0.75)]
