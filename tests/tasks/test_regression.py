"""Numbers: what is encoded, measured and compared."""

import re

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from edgetune.data import Scale, Split, encode_targets, scale_of
from edgetune.errors import ConfigError, DataError
from edgetune.tasks.paired_targets import compare_values, value_verdict
from edgetune.tasks.regression import regression_report
from edgetune.tasks.targets import plain_losses, scale_options, target_tensor


def split_of(*labels: str) -> Split:
    return Split(
        name="train", inputs=tuple(str(i) for i in range(len(labels))), labels=labels,
        where=tuple(f"t.csv:{i + 2}" for i in range(len(labels))), target="values",
    )  # fmt: skip


@pytest.fixture
def measured():
    """300 values about 1000, and predictions with an offset and noise."""
    rng = np.random.default_rng(0)
    truth = 1000 + 30 * rng.standard_normal(300)
    return truth, truth + 2 + 5 * rng.standard_normal(300)


def test_values_are_learned_with_mean_0_and_deviation_1():
    split = split_of("1", "2.5", "1e1", "-3")
    scale = scale_of(split)
    # by hand: the squares of -1.625, -0.125, 7.375 and -5.625 sum to 88.6875
    assert scale == Scale(mean=2.625, std=pytest.approx((88.6875 / 4) ** 0.5))
    found = target_tensor(split, ("value",), scale)
    assert found.dtype == torch.float32
    assert found.mean() == pytest.approx(0, abs=1e-6)
    assert found.std(correction=0) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(encode_targets(split, ("value",)), [1, 2.5, 10, -3])
    assert scale_options(scale) == {"mean": scale.mean, "std": scale.std}
    assert scale_options(None) == {}


def test_values_that_are_all_the_same_cannot_be_learned():
    with pytest.raises(DataError, match=r"train: all values are 0\.1"):
        scale_of(split_of("0.1", "0.1", "0.1"))


def test_a_missing_value_is_refused_with_its_place():
    with pytest.raises(DataError, match=r"t\.csv:3: expected a number as the label, got none"):
        encode_targets(split_of("1", ""), ("value",))


def test_metrics_are_those_of_scikit_learn_and_scipy(measured):
    truth, predicted = measured
    report = regression_report(truth, predicted, resamples=10)
    expected = {
        "mae": sklearn.metrics.mean_absolute_error(truth, predicted),
        "rmse": sklearn.metrics.root_mean_squared_error(truth, predicted),
        "r2": sklearn.metrics.r2_score(truth, predicted),
        "pearson": scipy.stats.pearsonr(truth, predicted).statistic,
        "bias": np.mean(predicted - truth),
    }
    assert {name: getattr(report, name).value for name in expected} == pytest.approx(expected)
    median = sklearn.metrics.median_absolute_error(truth, predicted)
    assert report.median_error == pytest.approx(median)


def test_intervals_are_those_of_scipys_bootstrap(measured):
    truth, predicted = measured
    report = regression_report(truth, predicted, resamples=4000)
    for name, metric in (
        ("mae", sklearn.metrics.mean_absolute_error), ("r2", sklearn.metrics.r2_score),
    ):  # fmt: skip
        rows = np.arange(len(truth))
        drawn = scipy.stats.bootstrap(
            (rows,), lambda i, m=metric: m(truth[i], predicted[i]), vectorized=False,
            n_resamples=1000, method="percentile", rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        found = getattr(report, name)
        width = drawn.high - drawn.low
        assert abs(found.low - drawn.low) < 0.15 * width
        assert abs(found.high - drawn.high) < 0.15 * width


def test_equal_values_have_no_variance_to_explain():
    report = regression_report(np.array([0.1, 0.1, 0.1]), np.array([0.1, 0.2, 0.3]), resamples=5)
    assert (report.r2.value, report.pearson.value) == (0.0, 0.0)
    assert regression_report(np.full(3, 0.1), np.full(3, 0.1), resamples=5).r2.value == 1.0
    # predictions that do not vary have no correlation
    assert regression_report(np.arange(4.0), np.full(4, 2.0), resamples=5).pearson.value == 0.0


@pytest.mark.parametrize(
    ("truth", "predicted", "what"),
    [
        (np.zeros(0), np.zeros(0), "no samples"),
        (np.zeros(2), np.zeros(3), r"expected truth and predictions of shape \(samples,\)"),
        (np.zeros(2), np.array([0.0, np.nan]), "finite"),
    ],
)
def test_what_are_no_values_is_refused(truth, predicted, what):
    with pytest.raises(DataError, match=what):
        regression_report(truth, predicted)


def test_the_rise_of_the_error_is_a_share_of_the_references():
    truth = np.zeros(4)
    found = compare_values(truth, np.array([1.0, -1, 1, -1]), np.array([1.5, -1, 1, -1.5]))
    assert (found.samples, found.reference_mae, found.candidate_mae) == (4, 1.0, 1.25)
    assert (found.rise.value, found.largest_change) == (0.25, 0.5)
    # from no sample that got worse to all
    assert (found.rise.low, found.rise.high) == (0.0, 0.5)


def test_the_bound_is_near_that_of_the_normal_distribution():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(4000)
    before = truth + 1 + rng.random(4000)  # errors of 1 to 2
    after = before + 0.1 * rng.standard_normal(4000)
    found = compare_values(truth, before, after, resamples=4000)
    first, second = np.abs(before - truth), np.abs(after - truth)
    ratio = second.mean() / first.mean()
    # delta method for a ratio of means
    error = (second - ratio * first).std() / first.mean() / np.sqrt(4000)
    assert found.bound == pytest.approx(ratio - 1 + 1.645 * error, abs=0.1 * error)


def test_a_reference_without_error_allows_none():
    truth = np.arange(40.0)
    assert compare_values(truth, truth, truth).rise.value == 0.0
    found = compare_values(truth, truth, truth + 0.001)
    assert found.rise.value == np.inf
    assert value_verdict(found, 1.0).status == "fail"


def worse_by(share: float, samples: int, spread: float) -> tuple[np.ndarray, ...]:
    """Values, a reference with errors of about 1, and a candidate with a share more on average."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(samples)
    errors = 1 + share + spread * (noise - noise.mean())
    return np.zeros(samples), np.ones(samples), errors


@pytest.mark.parametrize(
    ("share", "samples", "spread", "status", "words"),
    [
        (0.01, 400, 0.01, "pass", "rises by 1 %, from 1 to 1.01, on 400 samples, and with 95 %"),
        (-0.02, 400, 0.01, "pass", "falls by 2 %, .* it does not rise on all data of this kind"),
        (0.05, 400, 0.01, "fail", r"rises by 5 %.*\(95 % interval .*, more than the 2 % allowed"),
        (0.01, 50, 0.2, "cannot tell", "cannot show a rise below 2 %.*about .* samples would"),
        (0.0, 20, 0.0, "cannot tell", "of which 30 are the fewest to judge by"),
    ],
)
def test_the_verdict_goes_by_the_bound(share, samples, spread, status, words):
    found = value_verdict(compare_values(*worse_by(share, samples, spread)), 0.02)
    assert found.status == status
    assert re.search(words, found.sentence), found.sentence


def test_a_margin_is_a_share():
    with pytest.raises(ConfigError, match="max_drop"):
        value_verdict(compare_values(*worse_by(0.0, 40, 0.1)), 1.5)


def test_plain_losses_are_squared_errors():
    found = plain_losses(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0]), "values")
    assert found.tolist() == [1.0, 4.0]
