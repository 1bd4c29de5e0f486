import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
)
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from edgetune.errors import ConfigError, DataError
from edgetune.runtime.records import from_mapping, to_mapping
from edgetune.tasks import metrics
from edgetune.tasks.metrics import (
    ClassificationReport,
    Interval,
    classification_report,
    confusion_matrix,
    paired_drop,
)

AVERAGED = ("precision", "recall", "f1")


def names(classes):
    return [f"class {i}" for i in range(classes)]


def noisy_predictions(seed, classes, samples, right=0.7):
    random = np.random.default_rng(seed)
    truth = random.integers(0, classes, samples)
    predicted = np.where(
        random.random(samples) < right, truth, random.integers(0, classes, samples)
    )
    return truth, predicted


def random_probabilities(seed, classes, samples, dtype=np.float64):
    logits = np.random.default_rng(seed).normal(0.0, 2.0, (samples, classes))
    shares = np.exp(logits)
    return (shares / shares.sum(axis=1, keepdims=True)).astype(dtype)


def assert_agrees_with_sklearn(truth, predicted, classes):
    report = classification_report(truth, predicted, names(classes), resamples=5)
    assert report.samples == len(truth)
    assert report.accuracy.value == pytest.approx(accuracy_score(truth, predicted))
    for average in ("macro", "weighted"):
        expected = precision_recall_fscore_support(
            truth, predicted, average=average, zero_division=0
        )
        got = [getattr(report, f"{name}_{average}").value for name in AVERAGED]
        assert got == pytest.approx(expected[:3])
    each = precision_recall_fscore_support(
        truth, predicted, labels=range(classes), average=None, zero_division=0
    )
    for scores, expected in zip(report.per_class, zip(*each, strict=True), strict=True):
        got = (scores.precision, scores.recall, scores.f1, scores.support)
        assert got == pytest.approx(expected)
    np.testing.assert_array_equal(
        report.confusion, sklearn_confusion_matrix(truth, predicted, labels=range(classes))
    )


def test_confusion_matrix_has_the_truth_in_rows():
    got = confusion_matrix(np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 0, 0]), 4)
    np.testing.assert_array_equal(got, [[1, 1, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]])


def test_scores_match_hand_computed_values():
    # cat: 2 true, 3 predicted, 2 right; dog: 2 true, 1 predicted, 1 right
    report = classification_report(
        np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1], np.int32), ["cat", "dog"]
    )
    cat, dog = report.per_class
    assert (cat.label, cat.precision, cat.recall, cat.f1, cat.support) == pytest.approx(
        ("cat", 2 / 3, 1.0, 4 / 5, 2)
    )
    assert (dog.label, dog.precision, dog.recall, dog.f1, dog.support) == pytest.approx(
        ("dog", 1.0, 1 / 2, 2 / 3, 2)
    )
    assert report.accuracy.value == 0.75
    assert report.f1_macro.value == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert report.confusion == ((2, 0), (1, 1))
    assert report.log_loss is None
    assert report.expected_calibration_error is None


@pytest.mark.parametrize(("classes", "samples"), [(2, 30), (5, 200), (12, 60), (40, 45)])
def test_agrees_with_sklearn_on_random_predictions(classes, samples):
    assert_agrees_with_sklearn(*noisy_predictions(classes, classes, samples), classes)


@pytest.mark.parametrize(
    ("truth", "predicted"),
    [
        pytest.param([0, 1, 2, 2], [0, 1, 1, 0], id="a class is never predicted"),
        pytest.param([0, 1, 1, 0], [0, 1, 2, 2], id="a class is never true"),
        pytest.param([0, 0, 1], [0, 1, 1], id="a class never occurs"),
        pytest.param([0, 0, 0], [1, 2, 1], id="none is right"),
        pytest.param([1, 1, 1], [1, 1, 1], id="one class and all are right"),
        pytest.param([2], [0], id="one sample"),
    ],
)
def test_agrees_with_sklearn_on_degenerate_inputs(truth, predicted):
    assert_agrees_with_sklearn(np.array(truth), np.array(predicted), 3)


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40),
)
def test_agrees_with_sklearn_whatever_the_predictions(pairs):
    truth, predicted = np.array(pairs).T
    assert_agrees_with_sklearn(truth, predicted, 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_loss_agrees_with_sklearn(dtype):
    truth, predicted = noisy_predictions(1, 6, 150)
    probabilities = random_probabilities(1, 6, 150, dtype)
    report = classification_report(
        truth, predicted, names(6), probabilities=probabilities, resamples=5
    )
    expected = log_loss(truth, probabilities, labels=range(6))
    assert report.log_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_log_loss_of_certain_and_wrong_is_clipped_at_the_types_epsilon(dtype):
    report = classification_report(
        np.array([0, 1]), np.array([1, 1]), names(2), resamples=5,
        probabilities=np.array([[0.0, 1.0], [0.0, 1.0]], dtype),
    )  # fmt: skip
    epsilon = float(np.finfo(dtype).eps)
    assert report.log_loss == pytest.approx(-(math.log(epsilon) + math.log(1 - epsilon)) / 2)


def test_calibration_error_matches_hand_computed_bins():
    # bins ending at 6/15, 12/15, 15/15: (1 right, .35), (1 right, .75), (1 of 2 right, .95 each)
    truth, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])
    probabilities = np.array(
        [[0.35, 0.33, 0.32], [0.75, 0.25, 0.0], [0.95, 0.05, 0.0], [0.95, 0.05, 0.0]]
    )
    report = classification_report(
        truth, predicted, names(3), probabilities=probabilities, resamples=5
    )
    assert report.expected_calibration_error == pytest.approx((0.65 + 0.25 + 0.9) / 4)


def test_calibration_bins_include_their_upper_edge():
    # 0.6 = 9/15 shares a bin with 0.55, not with 0.65: |1 - 1.15| and |0 - 0.65|
    probabilities = np.array([[0.6, 0.4], [0.55, 0.45], [0.65, 0.35]])
    report = classification_report(
        np.array([0, 1, 1]), np.array([0, 0, 0]), names(2), probabilities=probabilities, resamples=5
    )
    assert report.expected_calibration_error == pytest.approx((0.15 + 0.65) / 3)


def test_accuracy_interval_is_near_the_normal_approximation():
    truth = np.zeros(2000, np.int64)
    predicted = np.where(np.arange(2000) < 1700, 0, 1)  # 85 % right
    accuracy = classification_report(truth, predicted, names(2), resamples=4000).accuracy
    half = 1.959964 * math.sqrt(0.85 * 0.15 / 2000)
    assert accuracy.low == pytest.approx(0.85 - half, abs=0.002)
    assert accuracy.high == pytest.approx(0.85 + half, abs=0.002)


def test_accuracy_interval_covers_the_true_accuracy_about_95_times_in_100():
    random = np.random.default_rng(5)
    truth = np.zeros(300, np.int64)
    covered = 0
    for trial in range(300):
        predicted = (random.random(300) >= 0.8).astype(np.int64)
        interval = classification_report(
            truth, predicted, names(2), seed=trial, resamples=300
        ).accuracy
        covered += interval.low <= 0.8 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98


def test_cells_resample_as_samples_do():
    truth, predicted = noisy_predictions(3, 4, 150)
    got = classification_report(truth, predicted, names(4), resamples=4000).f1_macro
    random = np.random.default_rng(9)
    drawn = []
    for _ in range(400):
        rows = random.integers(0, 150, 150)
        drawn.append(f1_score(truth[rows], predicted[rows], average="macro", zero_division=0))
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert got.low == pytest.approx(low, abs=0.02)
    assert got.high == pytest.approx(high, abs=0.02)


def test_an_interval_without_mistakes_has_no_width():
    truth = np.arange(30) % 3
    report = classification_report(truth, truth, names(3))
    assert report.accuracy == Interval(value=1.0, low=1.0, high=1.0)
    assert report.f1_macro == Interval(value=1.0, low=1.0, high=1.0)


def test_the_seed_decides_the_interval():
    truth, predicted = noisy_predictions(0, 5, 100)
    first, again, other = (
        classification_report(truth, predicted, names(5), seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.f1_macro != other.f1_macro
    assert first.f1_macro.value == other.f1_macro.value


def test_the_size_of_the_chunks_changes_nothing(monkeypatch):
    truth, predicted = noisy_predictions(0, 5, 100)
    whole = classification_report(truth, predicted, names(5), resamples=50)
    drop = paired_drop(truth, truth, predicted, names(5), resamples=50)
    monkeypatch.setattr(metrics, "_CHUNK_ELEMENTS", 70)
    assert classification_report(truth, predicted, names(5), resamples=50) == whole
    assert paired_drop(truth, truth, predicted, names(5), resamples=50) == drop


def test_a_thousand_classes_stay_small_in_memory():
    truth, predicted = noisy_predictions(0, 1000, 3000)
    tracemalloc.start()
    try:
        classification_report(truth, predicted, names(1000), resamples=1000)
        peak_mib = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert peak_mib < 250  # 1000 dense confusion matrices would be 7629


def test_a_report_comes_back_from_its_mapping():
    truth, predicted = noisy_predictions(0, 3, 50)
    report = classification_report(truth, predicted, names(3), resamples=20)
    mapping = to_mapping(report)
    assert from_mapping(ClassificationReport, mapping, where="report.json") == report


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        (np.array([], np.int64), np.array([], np.int64), "no samples"),
        (np.array([0, 1]), np.array([0, 1, 1]), "as many predicted as truth"),
        (np.array([[0, 1]]), np.array([[0, 1]]), r"shape \(samples,\)"),
        (np.array([0.0, 1.0]), np.array([0, 1]), "float64"),
        (np.array([0, 2]), np.array([0, 1]), "from 0 to 1, got 2"),
        (np.array([0, 1]), np.array([0, -1]), "from 0 to 1, got -1"),
    ],
)
def test_wrong_class_indices_are_refused(truth, predicted, message):
    with pytest.raises(DataError, match=message):
        confusion_matrix(truth, predicted, 2)
    with pytest.raises(DataError, match=message):
        classification_report(truth, predicted, ["a", "b"])
    with pytest.raises(DataError, match=message.replace("predicted", "candidate")):
        paired_drop(truth, truth, predicted, ["a", "b"])


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (np.full((3, 2), 0.5), r"\(2, 2\)"),
        (np.array([[1, 0], [0, 1]]), "int64"),
        (np.array([[0.5, 0.5], [2.0, 1.5]]), "row 1 sums to 3.5 .*softmax"),
        (np.array([[1.5, -0.5], [0.5, 0.5]]), "row 0"),
        (np.array([[0.5, 0.5], [np.nan, 0.5]]), "row 1 sums to nan"),
    ],
)
def test_what_is_not_probabilities_is_refused(probabilities, message):
    with pytest.raises(DataError, match=message):
        classification_report(
            np.array([0, 1]), np.array([0, 1]), ["a", "b"], probabilities=probabilities
        )


@pytest.mark.parametrize("resamples", [0, -1])
def test_resamples_below_one_are_refused(resamples):
    classes = np.array([0, 1])
    with pytest.raises(ConfigError, match="resamples"):
        classification_report(classes, classes, ["a", "b"], resamples=resamples)
    with pytest.raises(ConfigError, match="resamples"):
        paired_drop(classes, classes, classes, ["a", "b"], resamples=resamples)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_a_confidence_outside_0_to_1_is_refused(confidence):
    classes = np.array([0, 1])
    with pytest.raises(ConfigError, match="confidence"):
        paired_drop(classes, classes, classes, ["a", "b"], confidence=confidence)


def test_identical_predictions_drop_nothing():
    truth, predicted = noisy_predictions(0, 3, 100)
    drop = paired_drop(truth, predicted, predicted, names(3))
    assert drop.drop == Interval(value=0.0, low=0.0, high=0.0)
    assert drop.agreement == 1.0
    assert drop.worst_class_drop == 0.0
    assert drop.reference == drop.candidate
    assert drop.samples == 100


def test_paired_drop_matches_hand_computed_values():
    truth = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 2])
    reference = np.array([0, 0, 0, 1, 1, 1, 1, 0, 0, 2])  # 7 right
    candidate = np.array([0, 0, 1, 0, 1, 0, 0, 2, 0, 2])  # 5 right: lost 1 + 2, gained 1
    drop = paired_drop(truth, reference, candidate, ["a", "b", "c"])
    assert (drop.reference, drop.candidate) == (0.7, 0.5)
    assert drop.drop.value == pytest.approx(0.2)
    assert drop.agreement == 0.5  # sample 7 is wrong in both, but not the same
    assert drop.worst_class == "b"
    assert drop.worst_class_drop == pytest.approx(2 / 5)


def test_the_worst_class_is_one_that_has_samples():
    # both classes with samples gain; "never true" has none and loses nothing
    truth = np.array([0, 0, 2, 2])
    reference, candidate = np.array([1, 1, 2, 0]), np.array([0, 0, 2, 2])
    drop = paired_drop(truth, reference, candidate, ["a", "never true", "c"])
    assert (drop.worst_class, drop.worst_class_drop) == ("c", -0.5)


def test_drop_interval_is_near_the_paired_normal_approximation():
    # 2000 samples: 120 lost, 60 gained, the rest the same
    truth = np.zeros(2000, np.int64)
    reference, candidate = truth.copy(), truth.copy()
    candidate[:120] = 1
    reference[120:180] = 1
    drop = paired_drop(truth, reference, candidate, names(2), resamples=8000).drop
    half = 1.959964 * math.sqrt((180 / 2000 - (60 / 2000) ** 2) / 2000)
    assert drop.value == pytest.approx(0.03)
    assert drop.low == pytest.approx(0.03 - half, abs=0.0015)
    assert drop.high == pytest.approx(0.03 + half, abs=0.0015)


def test_less_confidence_gives_a_narrower_interval():
    truth, predicted = noisy_predictions(0, 3, 200)
    wide = paired_drop(truth, truth, predicted, names(3), confidence=0.99).drop
    narrow = paired_drop(truth, truth, predicted, names(3), confidence=0.5).drop
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30
    )
)
def test_swapping_the_models_turns_the_drop_round(rows):
    truth, reference, candidate = np.array(rows).T
    there = paired_drop(truth, reference, candidate, names(3), resamples=20)
    back = paired_drop(truth, candidate, reference, names(3), resamples=20)
    assert there.drop.value == -back.drop.value
    assert there.drop.value == pytest.approx(there.reference - there.candidate)
    assert there.agreement == back.agreement
    assert -1.0 <= there.drop.low <= there.drop.high <= 1.0


def test_the_module_needs_neither_torch_nor_sklearn():
    code = (
        "import sys; sys.modules.update(torch=None, sklearn=None, matplotlib=None);"
        "import edgetune.tasks.metrics"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
