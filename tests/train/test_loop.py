"""The loop on small real runs: it learns, resumes to the same bytes, and loses nothing."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from edgetune.config import TrainConfig
from edgetune.data import load_dataset
from edgetune.errors import ConfigError, DataError, IntegrityError
from edgetune.runtime.bundle import file_sha256
from edgetune.train import Event, open_run, read_run, resume, train
from edgetune.train.run import data_source


def config_for(switches: Path, model: str, output: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        task="text-classification", model=model, data=str(switches), output=str(output),
        method="full", epochs=4, batch_size=8, lr=5e-3, seed=1, cpu=True,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


class StopAt:
    """Sends SIGINT to this process, as Ctrl-C does, when a step is reached."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.sent = False
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "step" and event.values["step"] >= self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def finished(switches, tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train(config_for(switches, tiny_bert, folder)), folder


@pytest.fixture(autouse=True)
def _every_step_is_shown(monkeypatch):
    monkeypatch.setattr("edgetune.train.loop.EVENT_SECONDS", 0.0)


def test_a_run_learns_and_leaves_what_it_promises(finished):
    record, folder = finished
    assert record.status == "finished"
    assert record.metrics["val_accuracy"] == 1.0
    for name in ("config.toml", "run.json", "data.json", "tokenizer.json", "metrics.jsonl"):
        assert (folder / name).is_file()
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["epoch"] for x in lines] == [1, 2, 3, 4]
    assert read_run(folder)[1] == record


def test_an_interrupted_run_resumes_to_the_same_weights(finished, switches, tiny_bert, tmp_path):
    _, whole = finished
    folder = tmp_path / "broken"
    # 102 training samples, 13 steps an epoch: step 20 is in the middle of the second
    record = train(config_for(switches, tiny_bert, folder), on_event=StopAt(20))
    assert record.status == "interrupted"
    assert resume(folder, on_event=StopAt(10**9)).status == "finished"
    assert file_sha256(folder / "best.safetensors") == file_sha256(whole / "best.safetensors")

    def losses(path: Path) -> list[float]:
        text = (path / "metrics.jsonl").read_text()
        return [json.loads(line)["train_loss"] for line in text.splitlines()]

    assert losses(folder) == losses(whole)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(switches, tiny_bert, tmp_path):
    folder = tmp_path / "run"
    train(config_for(switches, tiny_bert, folder), on_event=StopAt(30))
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    watch = StopAt(10**9)
    assert resume(folder, on_event=watch).status == "finished"
    notes = [e.values["text"] for e in watch.events if e.kind == "note"]
    assert any("is damaged" in text and newest.name in text for text in notes)


def test_no_whole_checkpoint_is_said(switches, tiny_bert, tmp_path):
    folder = tmp_path / "run"
    train(config_for(switches, tiny_bert, folder), on_event=StopAt(5))
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{")
    with pytest.raises(IntegrityError, match="holds no whole checkpoint"):
        resume(folder)


def test_a_finished_run_is_not_resumed(finished):
    with pytest.raises(ConfigError, match="is finished"):
        resume(finished[1])


def test_an_existing_output_is_left_alone(switches, tiny_bert, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        train(config_for(switches, tiny_bert, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_data_that_would_waste_the_run_is_refused_before_anything_is_written(tiny_bert, tmp_path):
    data = tmp_path / "one.csv"
    data.write_text("text,label\n" + "".join(f"turn on {i},on\n" for i in range(20)))
    output = tmp_path / "run"
    with pytest.raises(DataError, match="one-class"):
        train(config_for(data, tiny_bert, output))
    assert not output.exists()


def test_a_changed_base_model_is_refused(switches, tiny_bert, tmp_path):
    import shutil

    import torch
    from safetensors.torch import save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_bert, model)
    train(config_for(switches, str(model), tmp_path / "run", epochs=1, method="lora"))
    state = load_file(model / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    save_file({**state, name: state[name] + torch.tensor(0.01)}, model / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ConfigError, match=r"is not the one that .* was trained on"):
        open_run(tmp_path / "run")


def test_early_stopping_waits_for_its_patience_and_keeps_the_best(switches, tiny_bert, tmp_path):
    # a learning rate that rounds to no change at all: no epoch after the first is better
    config = config_for(switches, tiny_bert, tmp_path / "run", epochs=9, patience=2, lr=1e-30)
    watch = StopAt(10**9)
    record = train(config, on_event=watch)
    best = [e.values["best"] for e in watch.events if e.kind == "epoch"]
    assert best == [True, False, False]
    assert (record.status, record.best_epoch) == ("finished", 1)


def test_gradient_accumulation_steps_once_for_its_batches(switches, tiny_bert, tmp_path):
    config = config_for(switches, tiny_bert, tmp_path / "run", epochs=1, grad_accumulation=4)
    watch = StopAt(10**9)
    train(config, on_event=watch)
    # 102 samples are 13 batches of 8: three steps of four batches and one of the last
    assert [e.values["step"] for e in watch.events if e.kind == "step"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("method", "workers"), [("full", 0), ("head", 0), ("freeze", 0), ("freeze", 2), ("lora", 0)]
)
def test_every_method_trains_images_and_resumes_exactly(colours, tmp_path, method, workers):
    def config(output: Path) -> TrainConfig:
        return TrainConfig(
            task="image-classification", model="torchvision:squeezenet1_1", weights="none",
            data=str(colours), output=str(output), method=method, epochs=2, batch_size=16,
            image_size=32, workers=workers, cpu=True, lr=1e-3,
            last_blocks=2 if method == "freeze" else None,
        )  # fmt: skip

    whole = train(config(tmp_path / "whole"))
    record = train(config(tmp_path / "broken"), on_event=StopAt(2))
    assert record.status == "interrupted"
    assert resume(tmp_path / "broken").metrics == whole.metrics
    same = (tmp_path / "broken/best.safetensors").read_bytes()
    assert same == (tmp_path / "whole/best.safetensors").read_bytes()


def test_the_resolved_config_names_absolute_paths_and_the_learning_rate(finished, switches):
    config, _ = read_run(finished[1])
    assert config.data == str(switches.absolute())
    assert config.lr == 5e-3
    assert load_dataset(data_source(config)).labels == ("off", "on")
