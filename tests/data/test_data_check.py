import time

import pytest

from edgetune.data import (
    REMEDIES,
    Dataset,
    Problem,
    Split,
    Spread,
    accept,
    check_dataset,
    check_kinds,
)
from edgetune.errors import ConfigError, DataError


def texts(name: str, rows: list[tuple[str, str]]) -> Split:
    return Split(
        name=name,
        inputs=tuple(text for text, _ in rows),
        labels=tuple(label for _, label in rows),
        where=tuple(f"{name}.csv:{i}" for i in range(2, len(rows) + 2)),
    )


def dataset(train, val=None, test=None, held_out=False) -> Dataset:
    splits = {"train": texts("train", train)}
    splits["val"] = texts("val", val if val is not None else [("v a", "a"), ("v b", "b")])
    if test is not None:
        splits["test"] = texts("test", test)
    labels = tuple(sorted({label for _, label in train if label.strip()}))
    return Dataset(kind="text", labels=labels, splits=splits, held_out=held_out)


def numbered(label: str, count: int) -> list[tuple[str, str]]:
    return [(f"{label} text {i}", label) for i in range(count)]


GOOD = numbered("a", 3) + numbered("b", 3)


def problems(data: Dataset, **options) -> dict[str, Problem]:
    return {p.kind: p for p in check_dataset(data, **options).problems}


def test_good_data_has_no_problems():
    report = check_dataset(dataset(GOOD))
    assert report.problems == ()
    assert report.samples == {"train": 6, "val": 2}
    assert report.classes == {"train": {"a": 3, "b": 3}, "val": {"a": 1, "b": 1}}


def test_sizes_are_order_statistics_over_all_splits():
    # 20 texts of 1 to 20 letters: the lower median is 10, the 95th percentile the 19th value
    rows = [("x" * n, "ab"[n % 2]) for n in range(1, 19)]
    data = dataset(rows, val=[("x" * 19, "a"), ("x" * 17 + " xy", "b")])
    report = check_dataset(data)
    assert report.text is not None
    assert report.text.characters == Spread(minimum=1, median=10, p95=19, maximum=20)
    assert report.text.words == Spread(minimum=1, median=1, p95=1, maximum=2)


def test_blank_texts_and_missing_labels_are_errors_of_single_samples():
    data = dataset([*GOOD, (" \n", "a"), ("text", ""), ("other", " ")], val=[("", "a"), ("w", "b")])
    found = problems(data)
    assert found["empty"].severity == "error"
    assert found["empty"].samples == (("train", 6), ("val", 0))
    assert found["empty"].examples == ("train.csv:8", "val.csv:2")
    assert found["missing-label"].count == 2
    assert found["missing-label"].examples == ("train.csv:9", "train.csv:10")


def test_at_most_five_examples_are_given():
    found = problems(dataset([*GOOD, *[("", "a")] * 7]))["empty"]
    assert found.count == 7
    assert len(found.examples) == 5
    assert len(found.samples) == 7


def test_a_single_class_is_an_error():
    found = problems(dataset(numbered("a", 4), val=[("x", "a")]))
    assert found["one-class"].message.endswith("and has only 'a'")


def test_classes_with_too_few_usable_samples_are_named():
    data = dataset([*GOOD, ("one", "c"), ("", "c"), ("d 1", "d"), ("d 2", "d")])
    found = problems(data)["few-samples"]
    assert (found.severity, found.count) == ("error", 1)
    assert "fewer than 2 training samples: 'c' (1)" in found.message
    assert found.examples == ("train.csv:8", "train.csv:9")
    assert "'c' (1), 'd' (2)" in problems(data, min_per_class=3)["few-samples"].message
    assert "few-samples" not in problems(data, min_per_class=1)


def test_labels_that_training_lacks_are_errors_with_the_nearest():
    train = numbered("cat", 3) + numbered("dog", 3)
    val = [("1", "cat"), ("2", "dog"), ("3", "cats"), ("4", "")]
    found = problems(dataset(train, val=val, test=[("5", "zebra")]))
    report = check_dataset(dataset(train, val=val, test=[("5", "zebra")]))
    messages = [p.message for p in report.problems if p.kind == "unknown-label"]
    assert messages == [
        "val: 1 sample of 1 class that the training data lacks: 'cats' (1), near 'cat'",
        "test: 1 sample of 1 class that the training data lacks: 'zebra' (1)",
    ]
    assert found["missing-label"].samples == (("val", 3),)


def test_a_leak_of_over_one_percent_is_an_error():
    train = [*numbered("a", 3), ("Some  Text", "b"), ("x", "b")]
    val = [("some text ", "b"), *numbered("w", 99)]
    found = problems(dataset(train, val=val))["leak"]  # 1 of 100 is not over 1 %
    assert (found.severity, found.count, found.examples) == ("warning", 1, ("val.csv:2",))
    assert "val.csv:2 is the same as train.csv:5" in found.message
    assert problems(dataset(train, val=val[:99]))["leak"].severity == "error"  # 1 of 99 is


def test_a_leak_into_the_test_split_is_found():
    found = problems(dataset(GOOD, test=[("a text 0", "a"), ("new", "b")]))["leak"]
    assert found.message.startswith("test: 1 sample of 2 (50.0%) is in the training data")


@pytest.mark.parametrize(
    ("one", "other"),
    [("Cat", "cat"), ("cat", "cat "), ("ice cream", "ice_cream"), ("a - b", "A_b"), ("SS", "ß")],
)  # fmt: skip
def test_spellings_of_one_class_are_an_error(one, other):
    data = dataset([*GOOD, *[(f"{i}", one) for i in range(3)], *[(f"{i}.", other) for i in "12"]])
    found = problems(data)["label-variants"]
    assert (found.severity, found.count) == ("error", 1)
    assert f"{one!r} (3) / {other!r} (2)" in found.message
    assert found.examples == ("train.csv:11", "train.csv:12")


@pytest.mark.parametrize(("one", "other"), [("icecream", "ice cream"), ("c", "c++"), ("a", "á")])
def test_other_labels_are_not_variants(one, other):
    assert "label-variants" not in problems(dataset([("1", one), ("2", other)]))


def test_a_rare_label_near_a_common_one_is_a_warning():
    # ratio 2 * 8 / (9 + 8) = 0.94
    rows = [*numbered("sunflower", 100), ("x", "sunfower"), ("y", "sunfower")]
    found = problems(dataset(rows))["label-typo"]
    assert (found.severity, found.count) == ("warning", 2)
    assert found.message == "label 'sunfower' (2) may be a slip for 'sunflower' (100)"
    assert found.examples == ("train.csv:102", "train.csv:103")


@pytest.mark.parametrize(
    ("other", "count"),
    [
        ("sunfower", 5),  # 5 of 100 is not under 5 %
        ("sun", 1),  # ratio 2 * 3 / 12 = 0.5
        ("sunflower2", 1),  # a number makes it another class
    ],
)
def test_other_labels_are_no_typos(other, count):
    rows = numbered("sunflower", 100) + numbered(other, count)
    assert "label-typo" not in problems(dataset(rows))


def test_same_texts_with_other_labels_conflict_within_a_split():
    rows = [*GOOD, ("Same", "a"), ("same ", "b"), ("twice", "a"), ("twice", "a")]
    found = problems(dataset(rows))
    assert found["conflicting-labels"].count == 2
    assert found["conflicting-labels"].examples == ("train.csv:8", "train.csv:9")
    assert "such as train.csv:8 'a', train.csv:9 'b'" in found["conflicting-labels"].message
    assert found["duplicates"].count == 2
    assert found["duplicates"].examples == ("train.csv:9", "train.csv:11")


def test_imbalance_is_over_twenty_to_one():
    rows = numbered("a", 40) + numbered("b", 2)
    assert "imbalance" not in problems(dataset(rows))
    found = problems(dataset([*rows, ("one more", "a")]))["imbalance"]
    assert "'a' (41), 'b' (2)" in found.message


def test_a_class_without_validation_samples_is_a_warning():
    found = problems(dataset([*GOOD, *numbered("c", 3)]))["unlabelled-class-in-val"]
    assert (found.severity, found.count) == ("warning", 1)
    assert found.message.endswith("val: 'c'")


def test_data_without_any_text_or_label_are_only_errors():
    report = check_dataset(dataset([("", ""), ("", "")], val=[("", "")]))
    assert [p.kind for p in report.problems] == ["empty", "missing-label", "one-class"]
    assert report.text is None


def test_errors_come_before_warnings():
    rows = numbered("a", 41) + numbered("b", 2) + [("", "a")] + [("x", "A"), ("y", "A")]
    severities = [p.severity for p in check_dataset(dataset(rows)).problems]
    assert severities == sorted(severities)
    assert {"error", "warning"} == set(severities)


def test_data_without_errors_are_accepted_as_they_are():
    data = dataset(GOOD)
    assert accept(data, check_dataset(data), ()) == (data, ())


def test_errors_are_refused_in_one_line_each():
    data = dataset([*GOOD, ("", "a"), ("x", "")])
    with pytest.raises(DataError) as caught:
        accept(data, check_dataset(data), ())
    assert str(caught.value).splitlines() == [
        "2 problems in the data",
        "  empty: 1 text blank (such as train.csv:8); fill or remove them, or leave them out with"
        " --allow empty",
        "  missing-label: 1 sample without a label (such as train.csv:9); label or remove them, or"
        " leave them out with --allow missing-label",
    ]
    with pytest.raises(DataError, match=r"^empty: "):
        accept(data, check_dataset(data), ["missing-label"])


def test_allowed_samples_are_left_out_and_listed():
    data = dataset([("", "a"), *GOOD, ("x", ""), ("", "")], val=[("v", "a"), ("w", "z"), ("", "b")])
    allow = ["empty", "missing-label", "unknown-label", "unlabelled-class-in-val"]
    kept, left_out = accept(data, check_dataset(data), allow)
    assert kept.splits["train"].inputs == tuple(text for text, _ in GOOD)
    assert kept.splits["val"].where == ("val.csv:2",)
    assert left_out == ("train.csv:2", "train.csv:9", "train.csv:10", "val.csv:3", "val.csv:4")
    assert kept.labels == ("a", "b")


def test_a_class_of_which_nothing_is_left_is_no_label():
    data = dataset([*GOOD, ("", "c")], val=[("v", "a"), ("w", "c")])
    report = check_dataset(data)
    with pytest.raises(DataError, match="unknown-label"):
        accept(data, report, ["empty", "few-samples"])
    kept, left_out = accept(data, report, ["empty", "few-samples", "unknown-label"])
    assert kept.labels == ("a", "b")
    assert left_out == ("train.csv:8", "val.csv:3")


def test_allowed_kinds_of_whole_data_change_nothing():
    data = dataset([*GOOD, ("x", "A"), ("y", "A")])
    assert accept(data, check_dataset(data), ["label-variants"]) == (data, ())


def test_nothing_left_is_refused():
    data = dataset(GOOD, val=[("", "a")])
    with pytest.raises(DataError, match="val: none of its 1 samples can be used"):
        accept(data, check_dataset(data), ["empty"])


def test_an_unknown_kind_is_a_config_error_with_the_nearest():
    data = dataset(GOOD)
    with pytest.raises(ConfigError, match=r"'unreadble'; did you mean 'unreadable'\?"):
        accept(data, check_dataset(data), ["unreadble"])
    check_kinds(list(REMEDIES))


def test_a_hundred_thousand_texts_take_seconds_at_most():
    rows = [
        (f"this is the text number {i} of very many", f"class {i % 50}") for i in range(100_000)
    ]
    data = dataset(rows[:90_000], val=rows[90_000:])
    start = time.perf_counter()
    report = check_dataset(data)
    assert time.perf_counter() - start < 6  # about 0.5 s on one core of 2024
    assert report.problems == ()
