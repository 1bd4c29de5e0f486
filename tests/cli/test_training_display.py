"""What a person sees of training: plain lines, a live terminal, and the terminal afterwards."""

import os
import re
import signal
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from edgetune.cli.progress import TrainingDisplay
from edgetune.train import Event

PLAN = {
    "model": "tiny", "method": "lora", "trainable": 25, "parameters": 1000, "train": 90, "val": 30,
    "labels": 2, "processes": 1, "device": "cpu", "steps": 20, "batch_size": 8, "lr": 5e-3,
    "precision": "fp32", "steps_done": 0,
}  # fmt: skip
STEP = {"step": 5, "steps": 20, "epoch": 1, "epochs": 2, "batch": 5, "batches": 10, "loss": 0.5}
EPOCH = {
    "epoch": 1, "epochs": 2, "step": 10, "train_loss": 0.6, "val_loss": 0.7, "val_accuracy": 0.8,
    "val_f1_macro": 0.75, "seconds": 61.6, "best": True,
}  # fmt: skip
FINISHED = {
    "best_epoch": 2, "epochs": 2, "stopped_early": False, "folder": "runs/a", "seconds": 90.2,
    "val_accuracy": 0.9, "val_f1_macro": 0.85,
}  # fmt: skip


def shown(*events: tuple[str, dict], terminal: bool, term: str = "xterm", height: int = 24) -> str:
    file = StringIO()
    console = Console(
        file=file, force_terminal=terminal, width=100, height=height, highlight=False,
        color_system=None, _environ={"TERM": term},
    )  # fmt: skip
    with TrainingDisplay(console) as display:
        for kind, values in events:
            display.show(Event(kind=kind, values=values))
    return file.getvalue()


def what_stays(output: str) -> str:
    """Return what a terminal shows in the end of lines of which only whole ones are erased."""
    lines = [""]
    for part in re.split(r"(\x1b\[\?25[lh]|\x1b\[\d*[AK]|\x1b\[2K|\r|\n)", output):
        if part == "\n":
            lines.append("")
        elif part == "\x1b[2K":
            lines[-1] = ""
        elif re.fullmatch(r"\x1b\[\d*A", part):
            assert lines.pop() == "", "only lines that were erased are gone back over"
        elif part not in ("\r", "\x1b[?25l", "\x1b[?25h"):
            lines[-1] += part
    return "\n".join(lines)


def test_elsewhere_than_on_a_terminal_an_epoch_is_a_line(capsys):
    second = {**EPOCH, "epoch": 2, "best": False, "seconds": 90.2}
    output = shown(
        ("plan", PLAN), ("step", STEP), ("epoch", EPOCH), ("note", {"text": "[x] is odd"}),
        ("epoch", second), ("finished", FINISHED), terminal=False,
    )  # fmt: skip
    assert output.splitlines() == [
        "model      tiny",
        "method     lora: 25 of 1,000 parameters train (2.50 %)",
        "data       90 train, 30 val, 2 classes",
        "steps      20 of 8 samples, lr 0.005, fp32 on cpu",
        "epoch   1/2  loss 0.6000  val loss 0.7000  accuracy 0.8000  F1 0.7500  62 s  best",
        "note: [x] is odd",
        "epoch   2/2  loss 0.6000  val loss 0.7000  accuracy 0.8000  F1 0.7500  90 s",
        "done after 2 epochs, 90 s; best epoch 2: accuracy 0.9000, F1 0.8500",
    ]
    assert capsys.readouterr().out == "runs/a\n"


def test_estimates_are_shown_as_far_as_there_are_any():
    both = {**PLAN, "memory_mib": 1234.4, "minutes": 1.5, "steps_done": 7}
    lines = shown(("plan", both), terminal=False).splitlines()
    assert lines[-2:] == ["estimate   1,234 MiB, 1 min 30 s", "resuming   at step 7"]
    memory = {**PLAN, "memory_mib": 310, "minutes": None}
    assert shown(("plan", memory), terminal=False).splitlines()[-1] == "estimate   310 MiB"


def test_energy_is_said_where_it_was_measured(capsys):
    measured = {**FINISHED, "energy_wh": 1.25}
    (line,) = shown(("finished", measured), terminal=False).splitlines()
    assert line.startswith("done after 2 epochs, 90 s, 1.25 Wh; best epoch 2:")
    (line,) = shown(("finished", {**FINISHED, "energy_wh": None}), terminal=False).splitlines()
    assert "Wh" not in line
    capsys.readouterr()


def test_a_terminal_shows_numbers_and_a_bar_while_training():
    step = {**STEP, "lr": 1.5e-3, "samples_per_s": 431.7}
    output = shown(("plan", PLAN), ("step", step), terminal=True)
    assert "epoch 1/2  loss 0.5000  lr 0.0015  432 samples/s" in output
    assert "5/20" in output


def test_what_was_done_before_a_resume_does_not_count_as_speed():
    file = StringIO()
    console = Console(file=file, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with TrainingDisplay(console) as display:
        display.show(Event(kind="plan", values={**PLAN, "steps_done": 15}))
        display.show(Event(kind="step", values={**STEP, "step": 16}))
        (task,) = display._progress.tasks
        # one step is no interval: a speed of 16 steps in no time would be one
        assert sum(sample.completed for sample in task._progress) == 1


def test_a_terminal_keeps_the_epochs_as_a_table_and_nothing_of_the_bar(capsys):
    second = {**EPOCH, "epoch": 2, "step": 20, "val_accuracy": 0.9, "seconds": 90.2}
    output = shown(
        ("plan", PLAN), ("step", STEP), ("epoch", EPOCH), ("step", {**STEP, "step": 15}),
        ("note", {"text": "odd"}), ("epoch", second), ("finished", FINISHED), terminal=True,
    )  # fmt: skip
    lines = [" ".join(line.split()) for line in what_stays(output).splitlines()]
    assert lines[4:] == [
        "note: odd",
        "epoch loss val loss accuracy F1 time",
        "1/2 0.6000 0.7000 0.8000 0.7500 1 min 02 s",
        "2/2 0.6000 0.7000 0.9000 0.7500 1 min 30 s best",
        "done after 2 epochs, 90 s; best epoch 2: accuracy 0.9000, F1 0.8500",
    ]
    capsys.readouterr()


def test_more_epochs_than_fit_leave_the_oldest_out_while_live_and_stay_in_the_end():
    events = [("epoch", {**EPOCH, "epoch": n, "epochs": 40, "step": 10 * n}) for n in range(1, 41)]
    output = shown(("plan", PLAN), ("step", STEP), *events, terminal=True, height=12)
    assert "... 33 epochs before" in output  # of 12 rows 7 are for epochs
    rows = re.findall(r"^ *(\d+)/40 ", what_stays(output), flags=re.MULTILINE)
    assert rows == [str(n) for n in range(1, 41)]


def test_metrics_of_other_tasks_have_columns_of_their_own():
    numbers = {"epoch": 1, "epochs": 3, "step": 1, "train_loss": 0.5, "val_mae": 2.0, "val_r2": 0.9}
    assert shown(("epoch", numbers), terminal=False) == (
        "epoch   1/3  loss 0.5000  MAE 2.0000  R2 0.9000\n"
    )
    stays = what_stays(shown(("epoch", numbers), terminal=True))
    assert "epoch loss MAE R2 time" in " ".join(stays.split())


@pytest.mark.parametrize("terminal", [True, False])
def test_keys_that_are_missing_break_nothing(terminal, capsys):
    bare = {"best_epoch": 0, "epochs": 0, "stopped_early": True, "folder": "r", "seconds": 0.0}
    output = shown(
        ("preparing", {"done": 1, "of": 4}), ("plan", PLAN), ("step", STEP),
        ("epoch", {"epoch": 1, "epochs": 2, "step": 3}), ("finished", bare), terminal=terminal,
    )  # fmt: skip
    assert "done after 0 epochs (stopped early), 0 s; best epoch 0\n" in output
    capsys.readouterr()


def test_preparations_are_a_bar_of_their_own():
    output = shown(
        ("preparing", {"done": 30, "of": 90, "text": "frozen layers, once"}), terminal=True
    )
    assert "frozen layers, once" in output
    assert "30/90" in output
    assert what_stays(output).strip() == ""


def test_a_terminal_that_can_not_go_back_gets_plain_lines():
    assert "\x1b" not in shown(("step", STEP), ("epoch", EPOCH), terminal=True, term="dumb")


SCRIPT = f"""
import os, signal, sys, time
from edgetune.cli.progress import TrainingDisplay
from edgetune.train.events import Event
with TrainingDisplay() as display:
    display.show(Event(kind="step", values={STEP!r}))
    display.show(Event(kind="epoch", values={EPOCH!r}))
    display.show(Event(kind="step", values={STEP!r}))
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals of this kind")
def test_ctrl_c_gives_the_terminal_back():
    import pty
    import termios

    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "24"},
    )  # fmt: skip
    output = b""
    try:
        while b"KeyboardInterrupt" not in output:
            output += os.read(ours, 4096)
        assert process.wait(timeout=30) == -signal.SIGINT
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
    assert output.count(b"\x1b[?25l") == output.count(b"\x1b[?25h") == 1  # cursor hidden, shown
    assert b"1 min 02 s" in output[output.index(b"\x1b[?25h") :]
