"""The command line as a person meets it: messages, exit codes, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgetune.cli.main import COMMANDS


def edgetune(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgetune.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def one_line(text: str) -> bool:
    return len(text.strip().splitlines()) == 1


def test_help_lists_every_command_without_loading_torch():
    code = (
        "import sys; sys.argv = ['edgetune', '--help']\n"
        "from edgetune.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'onnxruntime'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command):
    done = edgetune(command, "--help")
    assert done.returncode == 0
    assert "Usage: edgetune" in done.stdout or "Usage: python" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["trian"], 2, "did you mean 'train'"),
        (["train"], 2, "task, model, data, output: not given"),
        (["train", "--epochs", "many"], 2, "'many' is not a valid integer"),
        (["train", "--methd", "lora"], 2, "--methd"),
        (["train", "--resume", "nowhere"], 2, "nowhere: is no run"),
        (["train", "--resume", "r", "--epochs", "3"], 2, "leave out --config and --epochs"),
        (["train", "--config", "nope.toml"], 2, "nope.toml: cannot be read"),
        (["export", "nowhere"], 2, "nowhere: is no run"),
        (["export", "nowhere", "--profile", "raspberry-pi-3"], 2, "did you mean 'raspberry-pi-"),
        (["export", "nowhere", "--max-drop", "7"], 2, "max_drop: expected a share"),
        (["eval", "nowhere"], 2, "nowhere: is no run"),
        (["bench", "nowhere"], 2, "nowhere: expected a bundle's folder"),
        (["demo", "--task", "text"], 2, "no demo for 'text'"),
        (["profiles", "toaster"], 2, "no profile 'toaster'"),
    ],
)
def test_a_mistake_gets_a_line_and_its_exit_code(arguments, code, message, tmp_path):
    done = edgetune(*arguments, cwd=tmp_path)
    assert message in done.stderr
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"--task": "text-clasification"}, 2, "did you mean 'text-classification'"),
        ({"--data": "nope.csv"}, 3, "nope.csv"),
        ({"--label-column": "intent"}, 3, "intent"),
        ({"--model": "./nope"}, 2, "no such folder"),
        ({"--model": "torchvision:resnet18"}, 2, "classify images"),
        ({"--lr": "-1"}, 2, "lr: expected more than 0"),
    ],
)
def test_training_refuses_what_cannot_work(switches, tiny_bert, tmp_path, changes, code, message):
    flags = {
        "--task": "text-classification", "--data": switches, "--model": tiny_bert,
        "--output": tmp_path / "run", **changes,
    }  # fmt: skip
    done = edgetune("train", *[x for pair in flags.items() for x in pair])
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert one_line(done.stderr)
    assert not (tmp_path / "run").exists()


def test_train_export_eval_and_run_with_the_words_of_the_readme(switches, tiny_bert, tmp_path):
    config = tmp_path / "train.toml"
    config.write_text(
        f'task = "text-classification"\ndata = "{switches}"\nmodel = "{tiny_bert}"\n'
        'method = "full"\nlr = 5e-3\nbatch_size = 8\nepochs = 9\ncpu = true\n'
    )
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    done = edgetune("train", "--config", config, "--epochs", 4, "--output", run)
    assert done.returncode == 0, done.stderr
    assert "epoch   4/4" in done.stderr
    assert done.stdout.strip() == str(run)
    done = edgetune(
        "export", run, "--output", bundle, "--max-drop", 1, "--allow", "speed", "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [c["model"] for c in result["candidates"]] == [
        "fp32 torch", "fp32 onnx", "int8-dynamic onnx",
    ]  # fmt: skip
    report = tmp_path / "report.html"
    done = edgetune("eval", run, "--split", "train", "--report", report)
    assert "F1, macro" in done.stdout
    assert report.read_text().startswith("<!")
    on_device = edgetune("eval", bundle, "--data", switches, "--json")
    assert json.loads(on_device.stdout)["samples"] == 120
    done = edgetune("bench", bundle, "--runs", 10, "--cold-starts", 1, "--json")
    assert json.loads(done.stdout)["measurement"]["runs"] == 10


def test_ctrl_c_saves_and_the_printed_command_goes_on(switches, tiny_bert, tmp_path):
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "edgetune.cli.main", "train", "--task", "text-classification",
        "--data", str(switches), "--model", tiny_bert, "--method", "full", "--output", str(run),
        "--epochs", "2000", "--patience", "0", "--batch-size", "8", "--cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    history = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not history.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: edgetune train --resume {run}" in errors
    assert "Traceback" not in errors
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"


def test_an_unreadable_output_is_a_resource_error(switches, tiny_bert, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = edgetune(
        "train", "--task", "text-classification", "--data", switches, "--model", tiny_bert,
        "--output", blocker / "run",
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert one_line(done.stderr)
    assert Path(blocker).read_text() == ""
