"""Two processes train as one does: the same curve, one writer, one voice, exact ends."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgetune.config import TrainConfig
from edgetune.train import Event, open_run, resume, train
from edgetune.train.history import read_history
from edgetune.train.run import run_dataset

HERE = Path(__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
# float32 sums in another order, over two dozen steps
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def bert(tiny_bert, tmp_path_factory) -> str:
    """The tiny BERT without dropout, whose masks differ from process to process."""
    folder = tmp_path_factory.mktemp("plain-bert") / "model"
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def uneven(switches, tmp_path_factory) -> dict[str, str]:
    """97 samples to train on, 55 on and 42 off: the last batch of 8 has one row for two."""
    with switches.open() as file:
        rows = list(csv.DictReader(file))
    by_label = {k: [r["text"] for r in rows if r["label"] == k] for k in ("on", "off")}
    folder = tmp_path_factory.mktemp("uneven")
    for name, first, last in (("data", 0, None), ("val", None, 60)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            for label, count in (("on", 55), ("off", 42)):
                part = slice(first, count) if last is None else slice(count, last)
                writer.writerows((text, label) for text in by_label[label][part])
    return {name: str(folder / f"{name}.csv") for name in ("data", "val")}


def settings(bert: str, uneven: Mapping[str, str], **changes: Any) -> dict[str, Any]:
    return {
        "task": "text-classification", "model": bert, **uneven, "method": "full", "epochs": 2,
        "batch_size": 8, "lr": 1e-3, "seed": 2, "cpu": True, "lora_dropout": 0.0,
        "metric": "accuracy", **changes,
    }  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation, balanced": {"grad_accumulation": 3, "class_weights": "balanced"},
    "adalora": {"method": "adalora", "lr": 3e-3, "epochs": 3},
    "activations kept": {"method": "freeze", "last_blocks": 1, "activation_cache": "memory"},
    "unfreezing, average": {"unfreeze_every": 1, "ema_decay": 0.9},
    "sharded": {"sharding": "on"},
    "sharded, accumulation, balanced, average": {
        "sharding": "on", "grad_accumulation": 3, "class_weights": "balanced", "ema_decay": 0.9},
}  # fmt: skip


@pytest.fixture(scope="module")
def launched(bert, uneven, colours, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """All jobs of two processes in one launch; the folder and what each process saw."""
    folder = tmp_path_factory.mktemp("launched")
    jobs: dict[str, dict[str, Any]] = {
        name: {"config": settings(bert, uneven, **changes, output=str(folder / name))}
        for name, changes in VARIANTS.items()
    }
    jobs["interrupted"] = {
        "config": settings(bert, uneven, output=str(folder / "interrupted")), "stop_at": 14,
    }  # fmt: skip
    jobs["interrupted, sharded"] = {
        "config": settings(
            bert, uneven, output=str(folder / "interrupted, sharded"), sharding="on"
        ),
        "stop_at": 14,
    }
    one = TrainConfig(**settings(bert, uneven, output=str(folder / "begun by one")))
    assert train(one, on_event=StopAt(14)).status == "interrupted"
    jobs["begun by one"] = {"folder": str(folder / "begun by one")}
    jobs["saving often"] = {
        "config": settings(
            bert, uneven, output=str(folder / "saving often"), checkpoint_minutes=2e-3
        ),
        "slow_clock": True,
    }
    jobs["batch norm"] = {
        "config": {
            "task": "image-classification", "model": "torchvision:shufflenet_v2_x0_5",
            "weights": "none", "data": str(colours), "method": "full", "epochs": 2,
            "batch_size": 16, "image_size": 32, "workers": 0, "cpu": True, "lr": 1e-3,
            "metric": "accuracy",
            "checkpoint_steps": 1, "output": str(folder / "batch norm"),
        }
    }  # fmt: skip
    path = folder / "jobs"
    path.write_text(json.dumps(jobs))
    launch(HERE / "process_runs.py", path)
    return folder, [json.loads(Path(f"{path}.{rank}.json").read_text()) for rank in (0, 1)]


def launch(program: Path, *arguments: object) -> None:
    done = subprocess.run(
        [*TORCHRUN, str(program), *map(str, arguments)], env=environment(), timeout=240,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}


class StopAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, event: Event) -> None:
        if event.kind == "step" and event.values["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True, scope="module")
def _every_step_is_shown():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgetune.train.loop.EVENT_SECONDS", 0.0)
        yield


def curve(folder: Path) -> list[tuple[float, float]]:
    return [(line["train_loss"], line["val_loss"]) for line in read_history(folder)]


def assert_same_curve(a: Path, b: Path) -> None:
    assert len(curve(a)) == len(curve(b)) > 0
    for one, other in zip(curve(a), curve(b), strict=True):
        assert one == pytest.approx(other, rel=TOLERANCE)


def assert_close_weights(a: Path, b: Path) -> None:
    one, other = load_file(a / "best.safetensors"), load_file(b / "best.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if ".key.bias" not in name:  # softmax does not see it: its gradient is rounding
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_draw_the_curve_of_one(launched, bert, uneven, tmp_path, name):
    folder, (first, second) = launched
    assert (first[name]["status"], second[name]["status"]) == ("finished", "finished")
    changes = VARIANTS[name]
    train(TrainConfig(**settings(bert, uneven, **changes, output=str(tmp_path / "one"))))
    assert_same_curve(folder / name, tmp_path / "one")
    assert_close_weights(folder / name, tmp_path / "one")
    assert first[name]["trained"] == second[name]["trained"]


def test_only_the_first_process_speaks(launched):
    _, (first, second) = launched
    assert all(
        "finished" in seen["events"] for seen in first.values() if seen["status"] == "finished"
    )
    assert all(seen["events"] == [] for seen in second.values())


@pytest.mark.parametrize("name", ["interrupted", "interrupted, sharded"])
def test_one_process_goes_on_with_what_two_began(launched, name, tmp_path):
    folder, seen = launched
    assert [s[name]["status"] for s in seen] == ["interrupted", "interrupted"]
    run = tmp_path / "run"
    shutil.copytree(folder / name, run)
    assert resume(run).status == "finished"
    assert_same_curve(run, folder / "plain")
    assert_close_weights(run, folder / "plain")


def test_two_processes_go_on_with_what_one_began(launched):
    folder, seen = launched
    assert [s["begun by one"]["status"] for s in seen] == ["finished", "finished"]
    assert_same_curve(folder / "begun by one", folder / "plain")
    assert_close_weights(folder / "begun by one", folder / "plain")


def test_checkpoints_by_the_clock_are_one_decision_and_leave_the_curve_alone(launched):
    folder, seen = launched
    assert [s["saving often"]["status"] for s in seen] == ["finished", "finished"]
    assert curve(folder / "saving often") == curve(folder / "plain")


def test_running_statistics_that_are_kept_are_those_that_were_measured(launched):
    folder, (first, second) = launched
    assert first["batch norm"]["trained"] == second["batch norm"]["trained"]
    run = open_run(folder / "batch norm")
    samples = run.task.samples(run_dataset(run).splits["val"], training=False)
    batch = samples.batch(range(len(samples)))
    with torch.no_grad():
        logits = run.task.logits(run.task.network, batch)
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
    assert float(loss) == pytest.approx(run.record.metrics["val_loss"], rel=1e-5)


# -- the command -------------------------------------------------------------------------------


def flags(values: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        name = "--" + key.replace("_", "-")
        found += [name] if value is True else [name, str(value)]
    return found


LAUNCHERS = {
    "torchrun": (*TORCHRUN, "-m", "edgetune.cli.main"),
    "accelerate": (
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m",
        "edgetune.cli.main",
    ),
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_same_command_trains_under_a_launcher(launched, launcher, bert, uneven, tmp_path):
    output = tmp_path / "run"
    done = subprocess.run(
        [*LAUNCHERS[launcher], "train", *flags(settings(bert, uneven, output=str(output)))],
        env=environment(), timeout=120, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_curve(output, launched[0] / "plain")
    # one voice: the folder is printed once, and so is each epoch
    assert done.stdout.split() == [str(output)]
    assert done.stderr.count("epoch   1/2") == done.stderr.count("epoch   2/2") == 1
    assert "Warning" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_sigterm_to_torchrun_ends_all_with_a_checkpoint(bert, uneven, tmp_path):
    output = tmp_path / "run"
    config = settings(bert, uneven, output=str(output), epochs=1000, patience=0, workers=0)
    process = subprocess.Popen(
        [*LAUNCHERS["torchrun"], "train", *flags(config)], env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("epoch   2/"):
            break
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert "everything is saved" in rest, rest
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "interrupted"
    newest = sorted((output / "checkpoints").iterdir())[-1]
    assert json.loads((newest / "state.json").read_text())["position"]["step"] > 13


def test_processes_that_do_not_find_each_other_are_refused(bert, uneven, tmp_path):
    config = settings(bert, uneven, output=str(tmp_path / "run"))
    # a job of an operator that sets WORLD_SIZE, and a command without a launcher
    done = subprocess.run(
        [sys.executable, "-m", "edgetune.cli.main", "train", *flags(config)],
        env={**environment(), "WORLD_SIZE": "2", "RANK": "0", "PMI_SIZE": "1"},
        timeout=60, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "WORLD_SIZE" in done.stderr
    assert not (tmp_path / "run").exists()
