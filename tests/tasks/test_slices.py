"""Groups of samples, against scikit-learn group by group; and columns from table to split."""

import csv
import json

import numpy as np
import pytest
from scipy.stats import beta
from sklearn.metrics import accuracy_score, f1_score

from edgetune.data import DataSource, load_dataset, read_split
from edgetune.errors import ConfigError, DataError
from edgetune.tasks.slices import BLANK, slice_report

LABELS = ["a", "b", "c"]


def answers(samples=400, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, samples)
    sites = rng.choice(["north", "south", "east"], samples, p=[0.5, 0.45, 0.05])
    wrong = rng.random(samples) < np.where(sites == "south", 0.4, 0.1)
    return truth, np.where(wrong, (truth + 1) % 3, truth), sites


def test_each_group_has_the_metrics_of_scikit_learn():
    truth, predicted, sites = answers()
    found = slice_report("site", list(sites), truth, predicted, LABELS, resamples=50)
    assert {g.value for g in found.groups} == {"north", "south", "east"}
    for group in found.groups:
        chosen = sites == group.value
        right, count = int((truth == predicted)[chosen].sum()), int(chosen.sum())
        accuracy = accuracy_score(truth[chosen], predicted[chosen])
        assert (group.samples, group.accuracy.value) == (count, pytest.approx(accuracy))
        f1 = f1_score(truth[chosen], predicted[chosen], average="macro")
        assert group.f1_macro.value == pytest.approx(f1)
        assert group.f1_macro.low <= f1 <= group.f1_macro.high
        assert group.accuracy.low == pytest.approx(beta.ppf(0.025, right, count - right + 1))


def test_the_gap_is_between_best_and_worst_of_those_that_are_large_enough():
    truth, predicted, sites = answers()
    found = slice_report("site", list(sites), truth, predicted, LABELS)
    assert [g.value for g in found.groups if g.small] == ["east"]
    assert (found.gap.best, found.gap.worst) == ("north", "south")
    shares = {s: np.mean((truth == predicted)[sites == s]) for s in ("north", "south")}
    counts = {s: (sites == s).sum() for s in shares}
    difference = shares["north"] - shares["south"]
    assert found.gap.difference.value == pytest.approx(difference)
    # the normal approximation (Wald), which a bootstrap of so many samples is near
    error = 1.96 * np.sqrt(sum(shares[s] * (1 - shares[s]) / counts[s] for s in shares))
    assert found.gap.difference.low == pytest.approx(difference - error, abs=0.02)
    assert found.gap.difference.high == pytest.approx(difference + error, abs=0.02)
    assert found.gap.p_value == pytest.approx(1 / 1001)


def test_groups_that_differ_by_chance_only_are_not_called_different():
    truth = np.zeros(400, np.int64)
    rng = np.random.default_rng(3)
    values = [str(v) for v in rng.integers(0, 4, 400)]
    p_values = [
        slice_report(
            "x", values, truth, (np.random.default_rng(seed).random(400) < 0.2).astype(np.int64),
            LABELS, resamples=200, min_samples=1,
        ).gap.p_value
        for seed in range(40)
    ]  # fmt: skip
    # uniform: mean 1/2 with a standard error of 1 / sqrt(12 * 40) = 0.046
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.14)


def test_one_group_has_no_gap_and_a_blank_has_a_name():
    found = slice_report("x", ["", ""], np.array([0, 1]), np.array([0, 0]), LABELS, min_samples=1)
    assert (found.gap, found.groups[0].value) == (None, BLANK)


def test_equal_input_gives_equal_reports():
    truth, predicted, sites = answers()
    first, second = (slice_report("site", list(sites), truth, predicted, LABELS) for _ in range(2))
    assert first == second


def test_what_does_not_fit_is_refused():
    zeros = np.zeros(2, np.int64)
    with pytest.raises(DataError, match="x: expected 2 values, got 1"):
        slice_report("x", ["a"], zeros, zeros, LABELS)
    with pytest.raises(ConfigError, match="min_samples: expected 1 or more"):
        slice_report("x", ["a", "b"], zeros, zeros, LABELS, min_samples=0)


# -- columns --------------------------------------------------------------------------------------

ROWS = [("lamp on", "on", "kitchen", 1), ("lamp off", "off", "", 2), ("now on", "on", "hall", 3)]
NAMES = ("text", "label", "room", "volume")


@pytest.fixture(params=["csv", "tsv", "jsonl", "parquet"])
def table(request, tmp_path):
    path = tmp_path / f"train.{request.param}"
    if request.param in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            delimiter = "\t" if request.param == "tsv" else ","
            csv.writer(file, delimiter=delimiter).writerows([NAMES, *ROWS])
    elif request.param == "jsonl":
        lines = [json.dumps(dict(zip(NAMES, row, strict=True))) for row in ROWS]
        path.write_text("\n".join(lines))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = dict(zip(NAMES, map(list, zip(*ROWS, strict=True)), strict=True))
        pq.write_table(pa.table(columns), path)
    return path


def read(path, *columns):
    return read_split(
        path, kind="text", input_column="text", label_column="label", name="test", columns=columns
    )


def test_columns_come_with_the_samples(table):
    found = read(table, "room", "volume", "label")
    assert found.columns == {
        "room": ("kitchen", "", "hall"), "volume": ("1", "2", "3"), "label": ("on", "off", "on"),
    }  # fmt: skip
    assert found.take([2, 0]).columns["room"] == ("hall", "kitchen")
    assert read(table).columns == {}


def test_a_column_that_is_not_there_is_an_error(table):
    with pytest.raises(DataError, match=r"no column 'rooms'; .*did you mean 'room'.*--slices"):
        read(table, "rooms")


def test_columns_go_with_samples_that_are_held_out(tmp_path):
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as file:
        rows = [(f"text {i}", "ab"[i % 2], f"group {i}") for i in range(40)]
        csv.writer(file).writerows([("text", "label", "group"), *rows])
    dataset = load_dataset(DataSource(kind="text", data=str(path), columns=("group",)))
    for split in dataset.splits.values():
        assert split.columns["group"] == tuple(x.replace("text", "group") for x in split.inputs)


def test_a_folder_has_no_columns(colours):
    with pytest.raises(ConfigError, match="is a folder, which has no column 'camera'"):
        read_split(
            colours, kind="image", input_column="", label_column="label", name="test",
            columns=("camera",),
        )  # fmt: skip
