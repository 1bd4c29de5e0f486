"""Runs are found, told apart, compared; and cleaning takes what it says and nothing else."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import write_run

from edgetune.errors import ConfigError, IntegrityError
from edgetune.train.runs import (
    compare_runs,
    find_removals,
    find_runs,
    hold_run,
    is_held,
    plain_summary,
    remove,
    summarize,
)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def names(folder: Path) -> list[str]:
    return [run.name for run in find_runs(folder).runs]


def edit(run: Path, **changes: object) -> None:
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- find --------------------------------------------------------------------------------------


def test_a_run_is_summed_up(tmp_path):
    write_run(tmp_path / "a", lr=5e-3, epochs=5, energy_wh=1.5)
    run = summarize(tmp_path / "a")
    assert (run.name, run.status, run.task) == ("a", "finished", "text-classification")
    assert (run.epochs, run.epochs_planned, run.best_epoch) == (3, 5, 2)
    assert (run.metric, run.value, run.rank) == ("accuracy", 0.75, 0.75)
    assert run.metrics["val_loss"] == 0.25
    assert (run.seconds, run.energy_wh) == (180.0, 1.5)
    assert run.config["lr"] == 5e-3
    plain = json.loads(json.dumps(plain_summary(run)))
    assert plain["value"] == 0.75
    assert plain["model"] == "tiny"


def test_a_metric_to_lower_ranks_the_other_way_round(tmp_path):
    write_run(tmp_path / "a", metric="loss")
    run = summarize(tmp_path / "a")
    assert (run.value, run.rank) == (0.25, -0.25)
    write_run(tmp_path / "b", accuracies=())
    assert summarize(tmp_path / "b").value is None
    assert summarize(tmp_path / "b").rank == float("-inf")


def test_runs_are_found_at_any_depth_and_not_within_runs_or_hidden_folders(tmp_path):
    write_run(tmp_path / "b")
    write_run(tmp_path / "study" / "trials" / "0007")
    write_run(tmp_path / "b" / "copy")
    write_run(tmp_path / ".trash" / "c")
    assert names(tmp_path) == ["b", "study/trials/0007"]
    assert names(tmp_path / "b") == ["b"]


def test_a_run_of_a_later_version_with_more_keys_is_listed(tmp_path):
    run = write_run(tmp_path / "a")
    edit(run, mood="good")
    (run / "config.toml").write_text((run / "config.toml").read_text() + 'spell = "x"\n')
    assert summarize(run).config["spell"] == "x"


def test_a_run_of_an_earlier_version_has_the_defaults_of_keys_that_it_lacks(tmp_path):
    run = write_run(tmp_path / "a")
    (run / "config.toml").write_text('task = "t"\nmodel = "m"\ndata = "d"\n')
    assert summarize(run).config["lora_r"] == 8


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("run.json", "{", "is damaged"),
        ("run.json", "[]", "is of no run of edgetune"),
        ("run.json", '{"status": "finished", "exit": 0}', "is of no run of edgetune"),
        ("metrics.jsonl", '{"epoch": 1}\n{"ep', "is damaged"),
        ("metrics.jsonl", '{"step": 1}\n', "is damaged"),
        ("config.toml", "a = ", "is no valid TOML"),
    ],
)
def test_a_damaged_run_is_a_line_beside_the_others(tmp_path, name, content, words):
    write_run(tmp_path / "good")
    (write_run(tmp_path / "bad") / name).write_text(content)
    found = find_runs(tmp_path)
    assert [run.name for run in found.runs] == ["good"]
    (line,) = found.damaged
    assert str(tmp_path / "bad" / name) in line
    assert words in line
    assert find_removals(found, ("checkpoints", "failed"))[0][0].name == "good"


@pytest.mark.parametrize(
    "changes",
    [{"status": "lost"}, {"metrics": {"val_loss": "x"}}, {"seconds": None}, {"best_epoch": True}],
)
def test_a_record_with_values_of_another_type_is_damaged(tmp_path, changes):
    edit(write_run(tmp_path / "a"), **changes)
    with pytest.raises(IntegrityError, match=r"run\.json"):
        summarize(tmp_path / "a")


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        find_runs(tmp_path / "absent")


# -- who trains it -----------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from edgetune.train.runs import hold_run
with hold_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_whose_process_was_killed_reads_as_interrupted(tmp_path):
    run = write_run(tmp_path / "a", status="running")
    process = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert is_held(run) is True
        assert (summarize(run).status, summarize(run).known) == ("running", True)
        with pytest.raises(ConfigError, match="another process trains it right now"), hold_run(run):
            pass
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert is_held(run) is False
    assert (summarize(run).status, summarize(run).known) == ("interrupted", True)
    with hold_run(run):
        assert is_held(run) is True
    assert is_held(run) is False


def test_a_run_of_another_machine_or_of_no_lock_is_what_its_record_says(tmp_path):
    run = write_run(tmp_path / "a", status="running")
    assert is_held(run) is None
    assert (summarize(run).status, summarize(run).known) == ("running", False)
    (run / ".lock").write_text("another-" + socket.gethostname())
    assert is_held(run) is None
    assert (summarize(run).status, summarize(run).known) == ("running", False)


# -- compare -----------------------------------------------------------------------------------


def test_a_comparison_has_the_keys_that_differ_and_all_results(tmp_path):
    runs = [
        summarize(write_run(tmp_path / "a", lr=1e-3, method="lora")),
        summarize(write_run(tmp_path / "b", lr=2e-3, method="lora", accuracies=(0.25, 0.875))),
        summarize(write_run(tmp_path / "c", lr=1e-3, accuracies=(), status="interrupted")),
    ]
    comparison = compare_runs(runs)
    assert comparison.config == {"lr": (1e-3, 2e-3, 1e-3)}
    assert comparison.results["status"] == ("finished", "finished", "interrupted")
    assert comparison.results["val_accuracy"] == (0.75, 0.875, None)
    assert comparison.results["best_epoch"] == (2, 2, None)
    assert comparison.results["train_loss"] == (0.25, 0.25, None)
    assert comparison.results["minutes"] == (3.0, 2.0, 0.0)
    assert comparison.results["samples_per_s"] == (100.0, 100.0, None)
    assert "energy_wh" not in comparison.results
    assert comparison.notes == ()


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"data": "u.csv"}, "data"), ({"val_fraction": 0.3}, "val_fraction"), ({"seed": 1}, "seed")],
)
def test_runs_that_were_validated_on_other_samples_are_told_so(tmp_path, changes, key):
    runs = [
        summarize(write_run(tmp_path / "a")), summarize(write_run(tmp_path / "b", **changes))
    ]  # fmt: skip
    (note,) = compare_runs(runs).notes
    assert note.startswith(f"{key} differ:")


def test_the_seed_holds_nothing_out_where_there_is_validation_data(tmp_path):
    runs = [summarize(write_run(tmp_path / str(n), seed=n, val="v.csv")) for n in range(2)]
    assert compare_runs(runs).notes == ()


def test_one_run_is_no_comparison(tmp_path):
    with pytest.raises(ConfigError, match="got 1"):
        compare_runs([summarize(write_run(tmp_path / "a"))])


# -- clean -------------------------------------------------------------------------------------


def clean(folder: Path, *kinds: str) -> tuple[list[tuple[str, str, int]], tuple[str, ...]]:
    removals, notes = find_removals(find_runs(folder), kinds or ("checkpoints", "failed"))
    for removal in removals:
        remove(removal)
    return [(r.name, r.what, r.size_bytes) for r in removals], notes


def test_checkpoints_of_finished_runs_go_and_all_else_stays(tmp_path):
    run = write_run(tmp_path / "a")
    (run / "notes.txt").write_text("mine")
    before = files(run)
    assert clean(tmp_path) == ([("a", "checkpoints", 1024)], ())
    assert before - files(run) == {
        "checkpoints/step-00000010/weights.safetensors", "checkpoints/step-00000010/state.json",
    }  # fmt: skip
    assert (run / "best.safetensors").is_file()
    assert clean(tmp_path) == ([], ())


def test_an_interrupted_run_keeps_its_checkpoints_and_loses_what_is_computed_anew(tmp_path):
    run = write_run(tmp_path / "a", status="interrupted")
    (run / "cache" / "0").mkdir(parents=True)
    (run / "cache" / "0" / "train.bin").write_bytes(b"x" * 2048)
    assert clean(tmp_path) == ([("a", "kept activations", 2048)], ())
    assert not (run / "cache").exists()
    assert (run / "checkpoints" / "step-00000010").is_dir()


def test_a_run_that_reached_nothing_goes_as_a_whole(tmp_path):
    write_run(tmp_path / "a", accuracies=(), checkpoint=False, status="interrupted")
    ((name, what, size),), notes = clean(tmp_path)
    assert (name, what, notes) == ("a", "run without an epoch", ())
    assert size > 0
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_first_epoch_with_a_checkpoint_can_be_gone_on_with_and_stays(tmp_path):
    write_run(tmp_path / "a", accuracies=(), status="interrupted")
    before = files(tmp_path)
    assert clean(tmp_path) == ([], ())
    assert files(tmp_path) == before


def test_a_run_that_holds_what_others_wrote_is_left_alone(tmp_path):
    run = write_run(tmp_path / "a", accuracies=(), checkpoint=False, status="interrupted")
    (run / "bundle").mkdir()
    (run / "bundle" / "manifest.json").write_text("{}")
    before = files(tmp_path)
    removals, notes = clean(tmp_path)
    assert removals == []
    assert notes == ("a: holds what training did not write (bundle): left alone",)
    assert files(tmp_path) == before


def test_a_run_that_trains_or_may_is_left_alone(tmp_path):
    held = write_run(tmp_path / "held", accuracies=(), checkpoint=False, status="running")
    write_run(tmp_path / "unknown", accuracies=(), checkpoint=False, status="running")
    with hold_run(held):
        before = files(tmp_path)
        removals, notes = clean(tmp_path)
        assert files(tmp_path) == before
    assert removals == []
    assert notes == ("held: is running: left alone", "unknown: may be running: left alone")
    assert [name for name, _, _ in clean(tmp_path)[0]] == ["held"], "its process is gone now"


def test_a_run_that_began_to_train_after_the_question_is_left_alone(tmp_path):
    run = write_run(tmp_path / "a", accuracies=(), checkpoint=False, status="interrupted")
    (removal,), _ = find_removals(find_runs(tmp_path), ("failed",))
    before = files(run)
    with hold_run(run), pytest.raises(ConfigError, match="began to train"):
        remove(removal)
    assert files(run) - {".lock"} == before


def test_a_link_is_not_followed(tmp_path):
    run = write_run(tmp_path / "runs" / "a", checkpoint=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (run / "checkpoints").symlink_to(elsewhere)
    assert clean(tmp_path / "runs") == ([], ("a: checkpoints is a link: left alone",))
    assert (elsewhere / "precious").is_file()


def test_a_trial_that_its_search_counts_is_left_alone(tmp_path):
    write_run(
        tmp_path / "s" / "trials" / "0001", accuracies=(), checkpoint=False, status="interrupted"
    )
    (tmp_path / "s" / "study.db").write_bytes(b"")
    removals, (note,) = clean(tmp_path)
    assert removals == []
    assert note.startswith("s/trials/0001: is a trial of a search")


def test_each_kind_is_cleaned_for_itself(tmp_path):
    write_run(tmp_path / "done")
    write_run(tmp_path / "failed", accuracies=(), checkpoint=False, status="interrupted")
    found = find_runs(tmp_path)
    for kind, name in (("checkpoints", "done"), ("failed", "failed")):
        removals, _ = find_removals(found, (kind,))
        assert [r.name for r in removals] == [name]
