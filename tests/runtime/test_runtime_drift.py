"""Statistics of a window, worked out by hand; what a damaged baseline is answered with."""

import dataclasses
import io
import math

import numpy as np
import pytest

from edgetune.errors import IntegrityError
from edgetune.runtime.drift import (
    Baseline,
    Means,
    Space,
    dump_baseline,
    log_doubts,
    psi,
    read_baseline,
)


def means(values, counts=(4, 4), pull=4.0):
    return Means(values=np.array(values, float), counts=np.array(counts, float), pull=pull)


@pytest.fixture
def baseline():
    """Two classes, three features, of which the first spans the subspace."""
    space = Space(
        mean=np.array([1.0, 0.0, 0.0]),
        basis=np.array([[1.0, 0.0, 0.0]]),
        scale=np.array([2.0]),
        centres=means([[0.0], [1.0]]),
        energies=means([[0.0, 0.0], [math.log(4), 0.0]]),
        spread=np.array([0.5, 1.0]),
    )
    limits = {"mean": 2.0, "inside": 3.0, "outside": 3.0, "doubt": 3.0, "scores": 1.0}
    return Baseline(
        window=4,
        samples=8,
        false_alarms=0.01,
        doubts=means([[math.log(0.5)], [math.log(0.5)]]),
        doubt_spread=2.0,
        edges=np.array([0.5]),
        bins=means([[0.5, 0.5], [0.25, 0.75]]),
        shares=np.array([0.5, 0.5]),
        space=space,
        thresholds=limits | {"classes": 0.5},
    )


def test_psi_matches_a_hand_computation():
    # (3 + 0.5) / 5 = 0.7 and 0.3 against halves: 0.2 ln(1.4) - 0.2 ln(0.6)
    assert psi(np.array([3, 1]), np.array([0.5, 0.5])) == pytest.approx(0.2 * math.log(0.7 / 0.3))


def test_psi_is_zero_for_what_was_expected_and_finite_for_an_empty_bin():
    assert psi(np.array([2, 6]), np.array([0.25, 0.75])) == pytest.approx(0, abs=1e-15)
    assert 0 < psi(np.array([0, 8]), np.array([0.5, 0.5])) < 10


def test_a_mean_never_seen_is_as_uncertain_as_class_means_scatter():
    # half the window of a class with 3 samples, half of one with none: 0.25 / 4 + 0.25 / 1
    assert means([[0], [0]], counts=(3, 0), pull=1.0).variance(np.array([0.5, 0.5])) == 0.3125


def test_statistics_match_a_hand_computation(baseline):
    features = np.array([[3, 1, 0], [5, 0, 1], [3, 1, 0], [7, 0, 1]], np.float32)
    scores = np.array([0.4, 0.6, 0.9, 0.9], np.float32)
    classes = np.array([0, 0, 1, 1])
    # along the basis, in its scale: 1, 2, 1, 3; less the class means 0, 0, 1, 1: 1, 2, 0, 2.
    # variance of their mean: 1/4, and 2 * 0.25 / (4 + 4) for the class means
    variance = 1 / 4 + 1 / 16
    # squared: 1, 4, 0, 4; logs less those expected, ln 4 of the second class. The distance from
    # the line is 1 for all, in units of the variance 4 inside it
    away = (0 + math.log(4) + math.log(1e-9) - math.log(4) + 0) / 4
    doubt = np.log([0.6001, 0.4001, 0.1001, 0.1001]).mean() - math.log(0.5)
    expected = {
        "mean": 1.25**2 / variance,
        "inside": abs(away) / (0.5 * math.sqrt(variance)),
        "outside": abs(math.log(1 / 4)) / math.sqrt(variance),
        "doubt": abs(doubt) / (2 * math.sqrt(variance)),
        # expected of two of each class: 0.375 and 0.625; seen 1 and 3
        "scores": psi(np.array([1, 3]), np.array([0.375, 0.625])),
        "classes": 0.0,
    }
    found = baseline.measure(features, scores, classes)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert baseline.alarms(found) == ("mean", "inside")


def test_without_features_scores_and_classes_are_left(baseline):
    blind = dataclasses.replace(baseline, space=None)
    found = blind.measure(None, np.full(4, 0.9, np.float32), np.array([0, 0, 0, 0]))
    assert list(found) == ["doubt", "scores", "classes"]
    assert "classes" in blind.alarms(found)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_features_of_no_number_alarm_and_give_numbers(baseline, value):
    features = np.array([[3, 1, 0], [5, 0, 1], [3, value, 0], [7, 0, 1]], np.float32)
    found = baseline.measure(features, np.full(4, 0.7, np.float32), np.array([0, 0, 1, 1]))
    assert all(math.isfinite(v) for v in found.values())
    assert "outside" in baseline.alarms(found)


def test_a_score_of_one_has_a_finite_doubt():
    assert log_doubts(np.float32([1.0, 0.0])) == pytest.approx([math.log(1e-4), math.log(1.0001)])


@pytest.mark.parametrize("features", [True, False])
def test_a_stored_baseline_measures_the_same(baseline, features):
    if not features:
        limits = {n: v for n, v in baseline.thresholds.items() if n in ("doubt", "scores")}
        limits["classes"] = 0.5
        baseline = dataclasses.replace(baseline, space=None, thresholds=limits)
    data = dump_baseline(baseline)
    again = read_baseline(data, where="drift.npz")
    window = (np.ones((4, 3), np.float32), np.full(4, 0.7, np.float32), np.array([0, 0, 1, 1]))
    assert again.measure(*window) == pytest.approx(baseline.measure(*window), rel=1e-6)
    assert again.thresholds == baseline.thresholds
    assert (again.window, again.samples, again.false_alarms) == (4, 8, 0.01)
    assert dump_baseline(again) == data


def changed(baseline, **arrays):
    with np.load(io.BytesIO(dump_baseline(baseline))) as stored:
        held = {name: stored[name] for name in stored.files}
    held |= arrays
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in held.items() if array is not None})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"version": np.array(2)}, "version 2; this edgetune reads 1"),
        ({"mean": np.zeros(4, np.float32)}, r"mean: expected finite numbers of shape \(3,\)"),
        ({"mean": np.full(3, np.nan, np.float32)}, "mean: expected finite numbers"),
        ({"scale": np.zeros(1, np.float32)}, "scale: expected numbers above 0"),
        ({"bins": None}, "it lacks 'bins'"),
        ({"centres": np.zeros((3, 1), np.float32)}, r"centres: expected .* shape \(2, 1\)"),
        ({"statistics": np.array(["mean", "x"])}, "thresholds of mean, x, expected of mean"),
        ({"window": np.array(0)}, "a window of 0"),
        ({"window": np.array(2**40)}, "a window of 1099511627776, allowed 1 to 4096"),
        ({"doubts_counts": np.full(2, -4.1, np.float32)}, "doubts_counts: less than nothing"),
        ({"false_alarms": np.array(np.nan)}, "a share of nan false alarms"),
        ({"false_alarms": np.array(7.0)}, "a share of 7.0 false alarms"),
        ({"more": np.zeros(2**22)}, "bytes when unpacked, allowed"),
    ],
)
def test_a_baseline_that_does_not_fit_together_is_refused(baseline, arrays, message):
    with pytest.raises(IntegrityError, match=f"^drift.npz: .*{message}"):
        read_baseline(changed(baseline, **arrays), where="drift.npz")


@pytest.mark.parametrize("keep", [0, 10, 200, -20])
def test_a_torn_baseline_is_refused(baseline, keep):
    with pytest.raises(IntegrityError, match=r"^drift.npz: is no drift baseline"):
        read_baseline(dump_baseline(baseline)[:keep], where="drift.npz")


def test_pickled_objects_are_not_loaded(baseline):
    data = changed(baseline, shares=np.array([{}, {}], object))
    with pytest.raises(IntegrityError, match="is no drift baseline"):
        read_baseline(data, where="drift.npz")
