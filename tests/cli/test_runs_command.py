"""`edgetune runs`: what it prints, what it asks, what it refuses."""

import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgetune.cli.runs import group
from edgetune.errors import ConfigError

sys.path.append(str(Path(__file__).parents[1] / "train"))
from run_folders import write_run


def runs(*args: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(group, [str(a) for a in args], input=answer)


@pytest.fixture
def two(tmp_path):
    """Run b is a day older, and worse."""
    folder = tmp_path / "runs"
    write_run(folder / "a", method="head", model="org/tiny", energy_wh=0.25)
    write_run(folder / "b", accuracies=(0.25,), status="interrupted", epochs=4)
    for name in ("run.json", "metrics.jsonl"):
        path = folder / "b" / name
        os.utime(path, (path.stat().st_mtime - 90_000,) * 2)
    return folder


def first_cells(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [line.split()[0] for line in result.stdout.splitlines()[2:] if line]


def test_runs_are_listed_newest_first(two):
    result = runs("list", two)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][:7] == ["run", "status", "task", "model", "method", "epochs", "best"]
    assert lines[2][:9] == [
        "a", "finished", "text-classification", "tiny", "head", "3/10", "accuracy", "0.7500",
        "0.2500",
    ]  # fmt: skip
    assert lines[2][9:11] == ["3.0", "0.25"]
    assert lines[3][:7] == [
        "b", "interrupted", "text-classification", "tiny", "lora", "1/4", "accuracy",
    ]  # fmt: skip
    assert lines[3][9:] == ["1.0", "-", "1", "d"]


def test_list_may_be_left_out_and_looks_in_runs(two, monkeypatch):
    monkeypatch.chdir(two.parent)
    listed = runs("list", two).stdout
    assert runs().stdout == runs("runs").stdout == runs(two).stdout == listed


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("age", "ab"), ("name", "ab"), ("metric", "ab"), ("loss", "ab"), ("minutes", "ba"),
        ("energy", "ab"),
    ],
)  # fmt: skip
def test_runs_are_sorted(two, sort, order):
    assert first_cells(runs(two, "--sort", sort)) == list(order)


def test_json_holds_every_value(two):
    write_run(two / "c")
    (two / "c" / "run.json").write_text("{")
    plain = json.loads(runs(two, "--sort", "metric", "--json").stdout)
    assert [(r["name"], r["value"], r["status"]) for r in plain["runs"]] == [
        ("a", 0.75, "finished"), ("b", 0.25, "interrupted"),
    ]  # fmt: skip
    assert plain["runs"][0]["metrics"] == {"val_accuracy": 0.75, "val_loss": 0.25}
    assert len(plain["damaged"]) == 1


def test_a_damaged_run_is_a_note(two):
    (two / "a" / "run.json").write_text("{")
    result = runs(two)
    assert first_cells(result) == ["b"]
    assert result.stderr.startswith(f"note: {two}/a/run.json: is damaged")


def test_a_run_that_may_run_has_a_question_mark(tmp_path):
    write_run(tmp_path / "a", status="running")
    assert runs(tmp_path).stdout.splitlines()[2].split()[1] == "running?"


def test_a_folder_without_runs_says_so(tmp_path):
    assert runs(tmp_path).stdout == f"{tmp_path}: holds no run\n"


def test_a_mistyped_command_is_told_the_right_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runs("comapre")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == "comapre: is no folder; did you mean 'compare'?"
    assert "name one that holds runs" in str(runs().exception)


def test_help_of_the_group_and_of_a_command():
    assert "compare" in runs("--help").stdout
    assert "--sort" in runs("list", "--help").stdout


def test_runs_are_compared_side_by_side(two):
    result = runs("compare", two / "a", two / "b")
    rows = {
        line.split("  ")[0].strip(): line.split()[-2:]
        for line in result.stdout.splitlines()[2:]
        if line
    }
    assert rows["model"] == ["org/tiny", "tiny"]
    assert rows["method"] == ["head", "lora"]
    assert rows["epochs"] == ["3", "1"]  # of results, the last of the two rows
    assert rows["val_accuracy"] == ["0.75", "0.25"]
    assert rows["energy_wh"] == ["0.25", "-"]
    assert "output" not in rows


def test_a_comparison_is_drawn(two, tmp_path):
    figure = tmp_path / "c.png"
    result = runs("compare", two / "a", two / "b", "--plot", figure)
    assert result.stdout.splitlines()[-1] == f"curves: {figure}"
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    again = runs("compare", two / "a", two / "b", "--plot", figure)
    assert "exists already" in str(again.exception)
    other = runs("compare", two / "a", two / "b", "--plot", tmp_path / "c.svg")
    assert "ends in .png" in str(other.exception)


def test_a_comparison_as_json(two):
    plain = json.loads(runs("compare", two / "a", two / "b", "--json").stdout)
    assert plain["runs"] == ["a", "b"]
    assert plain["config"]["method"] == ["head", "lora"]
    assert plain["results"]["best_epoch"] == [2, 1]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name in ("x", "y"):
        write_run(tmp_path / name / "run")
    result = runs("compare", tmp_path / "x" / "run", tmp_path / "y" / "run")
    assert result.stdout.splitlines()[0].split() == ["x/run", "y/run"]
    assert "the configs are the same" in result.stdout


def test_one_run_twice_is_no_comparison(two):
    assert "got one twice" in str(runs("compare", two / "a", two / "a").exception)
    assert "is no run" in str(runs("compare", two / "a", two).exception)


def test_cleaning_shows_asks_and_takes_no_for_an_answer(two):
    result = runs("clean", two, answer="n\n")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[2].split() == ["a", "checkpoints", "1.0", "KiB"]
    assert "nothing was removed" in result.stdout
    assert (two / "a" / "checkpoints").is_dir()
    assert runs("clean", two, answer="").exit_code == 1, "no answer is no yes"
    assert (two / "a" / "checkpoints").is_dir()


def test_cleaning_removes_after_a_yes(two):
    assert runs("clean", two, answer="y\n").stdout.endswith("removed 1.0 KiB\n")
    assert not (two / "a" / "checkpoints").exists()
    assert (two / "a" / "best.safetensors").is_file()
    assert (two / "b" / "checkpoints").is_dir(), "an interrupted run can be gone on with"
    assert runs("clean", two).stdout == f"{two}: nothing to remove\n"


def test_cleaning_of_one_kind_without_asking(two):
    write_run(two / "c", accuracies=(), checkpoint=False, status="interrupted")
    assert runs("clean", two, "--failed", "--yes").exit_code == 0
    assert not (two / "c").exists()
    assert (two / "a" / "checkpoints").is_dir()
    assert runs("clean", two, "--checkpoints", "--yes").exit_code == 0
    assert not (two / "a" / "checkpoints").exists()
