"""Several labels at once, and numbers: how they are read, held out and checked."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edgetune.data import DataSource, accept, check_dataset, class_counts, load_dataset, read_split
from edgetune.errors import ConfigError, DataError


def read(path: Path, target: str, separator: str = "|"):
    return read_split(
        path, kind="text", input_column="", label_column="label", name="train", target=target,
        separator=separator,
    )  # fmt: skip


def table(path: Path, *labels: str) -> Path:
    lines = [f'text {i},"{label}"\n' for i, label in enumerate(labels)]
    path.write_text("text,label\n" + "".join(lines))
    return path


def load(path: Path, target: str, **options):
    return load_dataset(DataSource(kind="text", data=str(path), target=target, **options))


def kinds(dataset) -> dict[str, str]:
    return {p.kind: p.severity for p in check_dataset(dataset).problems}


def test_labels_stand_between_separators_and_nothing_is_no_label(tmp_path):
    split = read(table(tmp_path / "t.csv", "a|b", "", "c d"), "multilabel")
    assert split.labels == ("a|b", "", "c d")
    assert split.names == (("a", "b"), (), ("c d",))
    split = read(table(tmp_path / "t.csv", "a;b|c"), "multilabel", ";")
    assert split.names == (("a", "b|c"),)


def test_lists_are_labels_too(tmp_path):
    rows = [{"text": "x", "label": ["b", "a"]}, {"text": "y", "label": []}, {"text": "z"}]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path, "multilabel").names == (("b", "a"), (), ())
    columns = {"text": ["x", "y"], "label": [["b", "a"], None]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", "multilabel").names == (("b", "a"), ())


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("a||b", r"t\.csv:2: label: a label is blank in 'a\|\|b'"),
        ("a|", r"t\.csv:2: label: a label is blank"),
        (" ", r"t\.csv:2: label: a label is blank"),
        ("a|b|a", r"t\.csv:2: label: a label is there twice"),
    ],
)
def test_labels_that_are_blank_or_repeated_are_refused_with_their_place(tmp_path, label, message):
    with pytest.raises(DataError, match=message):
        read(table(tmp_path / "t.csv", label), "multilabel")


def test_a_listed_label_that_holds_the_separator_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "x", "label": ["a|b"]}\n')
    with pytest.raises(DataError, match=r"'a\|b' holds the separator '\|'.*--label-separator"):
        read(path, "multilabel")
    assert read(path, "multilabel", ";").names == (("a|b",),)
    with pytest.raises(ConfigError, match="label_separator: expected at least one character"):
        read(path, "multilabel", "")


def test_numbers_stay_as_they_were_written(tmp_path):
    split = read(table(tmp_path / "t.csv", "1", "-2.50", "3e-1", ""), "values")
    assert split.labels == ("1", "-2.50", "3e-1", "")
    assert split.names == ((), (), (), ())
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "x", "label": 0.1}\n{"text": "y", "label": 7}\n')
    assert read(path, "values").labels == ("0.1", "7")


@pytest.mark.parametrize("label", ["two", "1,5", "nan", "inf", "1_000", "1e999", "0x10"])
def test_what_is_no_finite_number_is_refused_with_its_place(tmp_path, label):
    path = table(tmp_path / "t.csv", "1", label)
    with pytest.raises(DataError, match=r"t\.csv:3: label: expected a finite number, got"):
        read(path, "values")


@pytest.mark.parametrize("label", ["true", "[1]", '{"a": 1}'])
def test_a_json_value_that_is_no_number_is_refused(tmp_path, label):
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"text": "x", "label": {label}}}\n')
    with pytest.raises(DataError, match=r"t\.jsonl:1: label: expected a finite number"):
        read(path, "values")


@pytest.mark.parametrize("target", ["multilabel", "values"])
def test_class_folders_hold_neither_several_labels_nor_numbers(tmp_path, target):
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match=r"no train\.csv, \.tsv, \.jsonl or \.parquet"):
        load_dataset(DataSource(kind="image", data=str(tmp_path), target=target))


def test_each_labels_share_is_held_out(tmp_path):
    rng = np.random.default_rng(0)
    shares = {"common": 0.6, "half": 0.3, "rare": 0.05}
    labels = ["|".join(n for n, s in shares.items() if rng.random() < s) for _ in range(400)]
    data = load(table(tmp_path / "t.csv", *labels), "multilabel", val_fraction=0.2)
    whole = Counter(n for x in labels for n in x.split("|") if n)
    held = Counter(n for names in data.splits["val"].names for n in names)
    assert data.labels == ("common", "half", "rare")
    assert len(data.splits["val"].labels) == pytest.approx(80, abs=2)
    for name, count in whole.items():
        assert held[name] == pytest.approx(0.2 * count, abs=1.5), name
    assert class_counts(data) == [whole[n] - held[n] for n in data.labels]
    # no label at all is shared out too
    assert 0 < sum(not names for names in data.splits["val"].names) < labels.count("")
    assert load(tmp_path / "t.csv", "multilabel", val_fraction=0.2) == data
    assert load(tmp_path / "t.csv", "multilabel", val_fraction=0.2, seed=1) != data


def test_equal_texts_stay_on_one_side(tmp_path):
    path = tmp_path / "t.csv"
    rows = [f"text {i // 2},{'a' if i // 2 % 2 else 'a|b'}\n" for i in range(80)]
    path.write_text("text,label\n" + "".join(rows))
    splits = load(path, "multilabel", val_fraction=0.3).splits
    assert not set(splits["val"].inputs) & set(splits["train"].inputs)
    assert splits["val"].inputs


def test_values_are_held_out_from_low_to_high(tmp_path):
    values = np.random.default_rng(0).permutation(200)
    data = load(table(tmp_path / "t.csv", *map(str, values)), "values", val_fraction=0.1)
    held = sorted(int(x) for x in data.splits["val"].labels)
    # two of each tenth by rank
    assert [x // 20 for x in held] == [i for i in range(10) for _ in range(2)]
    assert data.labels == ("value",)


def test_several_labels_are_counted_by_themselves(tmp_path):
    path = tmp_path / "train.csv"
    table(path, *["a|b", "a", "", "b"] * 5, "lonely|a")
    table(tmp_path / "val.csv", "a", "b|neu")
    (tmp_path / "val.csv").write_text((tmp_path / "val.csv").read_text().replace("text", "other"))
    (tmp_path / "val.csv").write_text(
        (tmp_path / "val.csv").read_text().replace("other,label", "text,label")
    )
    data = load(tmp_path, "multilabel")
    report = check_dataset(data)
    found = {p.kind: p for p in report.problems}
    assert report.classes["train"] == {"a": 11, "b": 10, "lonely": 1}
    assert report.target == "multilabel"
    assert set(found) == {"few-samples", "unknown-label", "unlabelled-class-in-val"}
    assert "'lonely' (1)" in found["few-samples"].message
    assert found["unknown-label"].samples == (("val", 1),)
    left, where = accept(data, report, ("few-samples", "unknown-label"))
    assert where == ("val.csv:3",)
    assert left.labels == ("a", "b", "lonely")


def test_one_label_is_enough_to_learn_and_none_is_not(tmp_path):
    few = load(table(tmp_path / "t.csv", *["a", ""] * 20), "multilabel")
    assert "one-class" not in kinds(few)
    none = load(table(tmp_path / "t.csv", *[""] * 20), "multilabel")
    assert kinds(none)["one-class"] == "error"


def test_labels_in_another_order_are_no_conflict(tmp_path):
    path = tmp_path / "t.csv"
    rows = [f"text {i},a|b\n" for i in range(20)]
    path.write_text("text,label\n" + "".join(rows) + "same,a|b\nsame,b|a\nother,a\nOTHER,b\n")
    report = check_dataset(load(path, "multilabel"))
    found = {p.kind: p for p in report.problems}
    assert found["conflicting-labels"].count == 2
    assert found["conflicting-labels"].examples == ("t.csv:24", "t.csv:25")


def test_numbers_have_no_classes_to_be_wrong(tmp_path):
    values = [str(v) for v in range(50)]
    data = load(table(tmp_path / "t.csv", *values), "values")
    report = check_dataset(data)
    assert report.problems == ()
    assert report.classes == {"train": {}, "val": {}}
    train = [float(x) for x in data.splits["train"].labels]
    spread = report.values["train"]
    assert (spread.minimum, spread.maximum) == (min(train), max(train))
    assert spread.mean == pytest.approx(np.mean(train))
    assert spread.std == pytest.approx(np.std(train))


def test_what_is_wrong_with_numbers_is_said(tmp_path):
    same = load(table(tmp_path / "t.csv", *["5", "5.0"] * 20), "values")
    assert kinds(same)["constant-value"] == "error"
    # quartiles of 0..99 are about 25 and 75: from -125 to 225 is not far
    values = [str(v) for v in range(100)]
    near = load(table(tmp_path / "t.csv", *values, "200"), "values")
    assert "far-value" not in kinds(near)
    far = load(table(tmp_path / "t.csv", *values, "5000"), "values")
    assert kinds(far)["far-value"] == "warning"
    missing = load(table(tmp_path / "t.csv", *values, ""), "values")
    assert kinds(missing)["missing-label"] == "error"
