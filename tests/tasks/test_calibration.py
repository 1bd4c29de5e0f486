import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax as scipy_log_softmax
from scipy.stats import beta

from edgetune.errors import ConfigError, DataError, GateError
from edgetune.tasks.calibration import (
    log_probabilities,
    log_softmax,
    reliability,
    selective_curve,
    temperature_of,
    threshold_for,
)
from edgetune.tasks.proportions import exact_bound, exact_interval, tail


def overconfident(samples=600, classes=4, factor=3.0, seed=0):
    """Logits that are probabilities once divided by `factor`: truths are drawn of them."""
    rng = np.random.default_rng(seed)
    true_logits = rng.normal(size=(samples, classes)) * 1.5
    shares = torch.tensor(true_logits).softmax(-1).numpy()
    truth = np.array([rng.choice(classes, p=p) for p in shares])
    return true_logits * factor, truth


# -- temperature ----------------------------------------------------------------------------------


def test_the_temperature_minimises_the_log_loss_as_scipy_finds_it():
    logits, truth = overconfident()
    samples, classes = logits.shape
    # targets smoothed by one sample's worth, as the fit's docstring says
    targets = np.full(logits.shape, 1 / (samples + 1) / classes)
    targets[np.arange(samples), truth] += samples / (samples + 1)

    def loss(log_temperature):
        return -(targets * scipy_log_softmax(logits / np.exp(log_temperature), axis=1)).sum()

    expected = np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)
    found = temperature_of(logits, truth)
    assert found.temperature == pytest.approx(expected, rel=1e-4)
    assert found.temperature == pytest.approx(3.0, rel=0.15)  # what made them overconfident


def test_it_is_near_the_temperature_that_torch_finds_by_gradients():
    logits, truth = overconfident(samples=2000)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            torch.tensor(logits) / scale.exp(), torch.tensor(truth)
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    assert temperature_of(logits, truth).temperature == pytest.approx(scale.exp().item(), rel=0.01)


def test_a_temperature_lowers_loss_and_error_of_samples_held_out():
    logits, truth = overconfident()
    found = temperature_of(logits, truth)
    assert found.helps
    assert found.loss_after < found.loss_before
    assert found.error_after < found.error_before / 3


def test_scores_that_are_probabilities_already_are_left_alone():
    # of 10 samples of each two-class score 0.8, 8 are right: temperature 1 is the best there is
    logits = np.tile([np.log(0.8), np.log(0.2)], (100, 1))
    truth = np.tile([0, 0, 0, 0, 1, 0, 0, 0, 0, 1], 10)
    found = temperature_of(logits, truth)
    assert found.temperature == pytest.approx(1.0, abs=0.02)
    assert found.error_before == pytest.approx(0.0, abs=1e-12)
    assert not found.helps


def test_too_few_samples_fit_nothing():
    assert temperature_of(np.zeros((19, 2)), np.zeros(19, np.int64)) is None


def test_log_probabilities_serve_as_logits():
    logits, truth = overconfident(samples=200)
    shares = torch.tensor(logits, dtype=torch.float32).softmax(-1).numpy()
    assert temperature_of(log_probabilities(shares), truth).temperature == pytest.approx(
        temperature_of(logits, truth).temperature, rel=1e-4
    )


def test_log_softmax_is_that_of_scipy():
    logits = np.array([[1000.0, 0.0, -1000.0], [0.5, 0.25, 0.0]])
    expected = scipy_log_softmax(logits / 2.0, axis=1)
    np.testing.assert_allclose(log_softmax(logits, 2.0), expected, atol=1e-12)


def test_wrong_shapes_are_refused():
    with pytest.raises(DataError, match=r"logits: expected shape \(30, classes\), got \(20, 2\)"):
        temperature_of(np.zeros((20, 2)), np.zeros(30, np.int64))


# -- proportions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "samples"), [(0, 10), (1, 10), (9, 10), (10, 10), (970, 1000)])
def test_exact_intervals_are_those_of_the_beta_distribution(right, samples):
    low = beta.ppf(0.025, right, samples - right + 1) if right else 0.0
    high = beta.ppf(0.975, right + 1, samples - right) if right < samples else 1.0
    found = exact_interval(right, samples)
    assert (found.value, found.low, found.high) == pytest.approx((right / samples, low, high))
    lower = beta.ppf(0.05, right, samples - right + 1) if right else 0.0
    assert exact_bound(right, samples) == pytest.approx(lower)


def test_the_tail_of_two_coins():
    assert [tail(k, 2, 0.5) for k in (0, 1, 2)] == pytest.approx([1.0, 0.75, 0.25])


@pytest.mark.parametrize(("right", "samples"), [(3, 2), (-1, 2), (0, 0)])
def test_counts_that_are_none_are_refused(right, samples):
    with pytest.raises(DataError, match="expected 0 to"):
        exact_bound(right, samples)


# -- abstaining -----------------------------------------------------------------------------------


def test_the_threshold_is_the_smallest_whose_bound_reaches_the_accuracy():
    rng = np.random.default_rng(1)
    confidence = np.sort(rng.uniform(0.3, 1.0, 500))
    right = rng.random(500) < confidence
    found = threshold_for(0.9, confidence, right)
    bounds = [
        beta.ppf(0.05, right[i:].sum(), (~right[i:]).sum() + 1) for i in range(len(confidence) - 5)
    ]
    first = next(i for i, bound in enumerate(bounds) if bound >= 0.9)
    assert found.threshold == confidence[first]
    assert (found.answered, found.right) == (500 - first, right[first:].sum())
    assert found.low == pytest.approx(bounds[first])
    assert found.coverage == pytest.approx((500 - first) / 500)


def test_a_model_that_is_good_enough_answers_everything():
    # 59 without a mistake show 95 %, as 0.95^59 < 0.05
    found = threshold_for(0.95, np.linspace(0.5, 1, 59), np.ones(59, bool))
    assert (found.threshold, found.coverage) == (0.0, 1.0)
    with pytest.raises(GateError):
        threshold_for(0.95, np.linspace(0.5, 1, 58), np.ones(58, bool))


def test_answers_of_one_score_are_kept_or_left_together():
    confidence = np.repeat([0.9, 0.5], 100)
    right = np.r_[np.ones(100, bool), np.ones(50, bool), np.zeros(50, bool)]
    found = threshold_for(0.9, confidence, right)
    assert (found.threshold, found.answered) == (0.9, 100)


def test_an_accuracy_out_of_reach_is_an_error_that_names_the_best():
    # the best bound: 40 right of 40, 0.05^(1/40) = 0.9278
    confidence = np.linspace(1.0, 0.5, 80)
    right = np.r_[np.ones(40, bool), np.zeros(40, bool)]
    with pytest.raises(GateError, match=r"80 samples; .* is 92\.78 %, by the 40 answers of score"):
        threshold_for(0.98, confidence, right)
    assert threshold_for(0.9278, confidence, right).answered == 40


@pytest.mark.parametrize("accuracy", [0.0, 1.0, 98.0, float("nan")])
def test_an_accuracy_that_is_none_is_refused(accuracy):
    with pytest.raises(ConfigError, match="abstain: expected an accuracy between 0 and 1"):
        threshold_for(accuracy, np.ones(3), np.ones(3, bool))


def test_the_curve_of_five_answers_by_hand():
    confidence = np.array([0.9, 0.6, 0.6, 0.8, 0.5])
    right = np.array([True, False, True, True, False])
    curve = selective_curve(confidence, right)
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.6, 0.5]
    assert curve.coverage == pytest.approx([0.2, 0.4, 0.8, 1.0])
    assert curve.accuracy == pytest.approx([1.0, 1.0, 0.75, 0.6])
    assert curve.area == pytest.approx((0 + 0 + 0.25 + 0.25 + 0.4) / 5)


def test_reliability_bins_by_hand():
    bins = reliability(np.array([0.95, 0.97, 0.5]), np.array([True, False, True]))
    assert [(b.confidence, b.accuracy, b.samples) for b in bins] == [
        (0.5, 1.0, 1), (pytest.approx(0.96), 0.5, 2),
    ]  # fmt: skip
