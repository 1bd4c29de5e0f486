import json
import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result
from PIL import Image

from edgetune.cli.data import group
from edgetune.errors import ConfigError, DataError


def run(*args: str) -> Result:
    return CliRunner().invoke(group, ["check", *args])


def table(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return str(path)


TEXT = ("--task", "text-classification")
GOOD = [(f"{label} {i}", label) for label in ("ham", "spam") for i in range(10)]


def test_good_data_are_summed_up(tmp_path):
    result = run(table(tmp_path / "t.csv", GOOD), *TEXT)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0] == f"{tmp_path}/t.csv: text, classes: 2"
    assert lines[1] == "samples: train 16, val 4 (held out of the training data)"
    assert "ham        8    2" in lines
    assert "characters    5       5     6    6" in lines
    assert lines[-1] == "no problems found"


def test_errors_are_printed_and_then_raised(tmp_path):
    path = table(tmp_path / "t.csv", [*GOOD, ("", "ham"), ("x", "Ham"), ("y", "Ham")])
    result = run(path, *TEXT, "--min-per-class", "1")
    assert isinstance(result.exception, DataError)
    assert str(result.exception) == (
        f"{path}: empty, label-variants; correct the data, or accept with --allow empty"
        " --allow label-variants"
    )
    assert "error: empty: 1 text blank\n    fill or remove them\n    t.csv:22\n" in result.output


def test_allowed_errors_are_shown_and_not_raised(tmp_path):
    path = table(tmp_path / "t.csv", [*GOOD, ("", "ham")])
    result = run(path, *TEXT, "--allow", "empty")
    assert result.exit_code == 0
    assert "allowed: empty:" in result.output


def test_help_keeps_the_lines_of_the_examples():
    lines = run("--help").output.splitlines()
    assert "    edgetune data check flowers/ --task image-classification" in lines
    assert "    edgetune data check reviews.tsv --task text-classification \\" in lines


def test_an_unknown_kind_is_refused_before_anything_is_read(tmp_path):
    result = run(str(tmp_path / "absent.csv"), *TEXT, "--allow", "emty")
    assert isinstance(result.exception, ConfigError)
    assert "did you mean 'empty'?" in str(result.exception)


def test_long_class_tables_are_cut_unless_all_are_asked_for(tmp_path):
    rows = [(f"text {label} {i}", f"c{label:02}") for label in range(33) for i in range(4)]
    path = table(tmp_path / "t.csv", rows)
    short, full = run(path, *TEXT).output, run(path, *TEXT, "--all").output
    assert "... and 3 more (--all lists them)" in short
    assert "c29" in short
    assert "c30" not in short
    assert "c32" in full
    assert "more (--all" not in full


def test_labels_that_would_break_a_line_are_quoted(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"text": f"{i}", "label": "two\nlines" if i % 2 else ""} for i in range(8)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = run(str(path), *TEXT).output.splitlines()
    assert r"'two\nlines'      3    1" in lines
    assert "(no label)        4    0" in lines


def test_json_is_one_object(tmp_path):
    train = table(tmp_path / "t.csv", [*GOOD, ("", "ham"), ("", "spam")])
    val = table(tmp_path / "v.csv", [("new", "ham"), ("newer", "spam")])
    result = run(train, *TEXT, "--val", val, "--json")
    record = json.loads(result.stdout)
    assert record["ok"] is False
    assert record["labels"] == ["ham", "spam"]
    assert record["samples"] == {"train": 22, "val": 2}
    assert record["text"]["words"] == {"minimum": 1, "median": 2, "p95": 2, "maximum": 2}
    (problem,) = record["problems"]
    assert problem["kind"] == "empty"
    assert problem["samples"] == ["t.csv:22", "t.csv:23"]
    assert problem["refused"] is True
    assert isinstance(result.exception, DataError)


def test_images_show_sizes_modes_formats_and_ignored_files(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(4):
            Image.new("RGB", (20 + i, 30), (i, ord(label), 0)).save(tmp_path / label / f"{i}.png")
    (tmp_path / "a/.hidden").touch()
    (tmp_path / "a/notes.txt").touch()
    output = run(str(tmp_path), "--task", "image-classification").output
    assert "width px    20      21    23   23" in output
    assert "modes: RGB 8\nformats: PNG 8\n" in output
    assert "ignored files: 2 (hidden 1, .txt 1)\n" in output
    assert f"  {tmp_path}/a/notes.txt\n" in output


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgetune.cli.main", "data", "check", *args],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip


def test_exit_codes_are_3_for_data_and_2_for_flags(tmp_path):
    good = table(tmp_path / "good.csv", GOOD)
    bad = table(tmp_path / "bad.csv", [*GOOD, ("", "ham")])
    assert command(good, *TEXT).returncode == 0
    refused = command(bad, *TEXT, "--json")
    assert refused.returncode == 3
    assert json.loads(refused.stdout)["ok"] is False
    assert refused.stderr.startswith("error: ")
    absent = command(str(tmp_path / "absent"), *TEXT)
    assert (absent.returncode, absent.stdout) == (3, "")
    assert command(good, *TEXT, "--allow", "nonsense").returncode == 2
    assert command(good).returncode == 2


def test_reading_data_imports_no_torch():
    code = "import sys, edgetune.cli.data; assert not {'torch', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
