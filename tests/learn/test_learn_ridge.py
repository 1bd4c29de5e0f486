"""A ridge head from statistics is the one that the samples themselves give."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, log_loss

from edgetune.errors import ConfigError, DataError
from edgetune.runtime.learn import ridge as ridge_module
from edgetune.runtime.learn.ridge import (
    DEFAULT_TEMPERATURE,
    FACTORS,
    NEVER,
    RATIOS,
    Head,
    balanced_accuracy,
    choose,
    coefficients,
    fit_temperature,
    regularisation,
    shrinkage,
    solve,
)
from edgetune.runtime.learn.statistics import (
    Statistics,
    add,
    empty,
    forget,
    merge,
    subtract,
    with_label,
    within,
)

LABELS = ("ant", "bee", "cat")


def samples(counts, *, width=6, seed=0, gap=1.0):
    draw = np.random.default_rng(seed)
    mixing = draw.normal(size=(width, width))
    means = gap * draw.normal(size=(len(counts), width)) + 3
    classes = draw.permutation(np.repeat(np.arange(len(counts)), counts))
    features = draw.normal(size=(len(classes), width)) @ mixing + means[classes]
    return features.astype(np.float32), classes


def statistics(features, classes, labels=LABELS):
    return add(empty(features.shape[1], labels), features, classes)


def one_hot(classes, count=3):
    return np.eye(count)[classes]


def test_a_head_of_four_samples_is_the_one_computed_by_hand():
    stats = statistics(np.float32([[0], [2], [4], [6]]), np.array([0, 0, 1, 1]), ("a", "b"))
    # means 1 and 5, m = 3; S / n = 1, between = 4, T = 5; K = 1/2 (-2, 2); with ridge 1: W = K / 6
    weights, bias = coefficients(stats, ridge=1)
    np.testing.assert_allclose(weights, [[-1 / 6, 1 / 6]])
    np.testing.assert_allclose(bias, [1, 0], atol=1e-15)
    head = solve(stats, ridge=1)
    found = head.logits(np.array([[3], [9]]))
    np.testing.assert_allclose(found, np.array([[0.5, 0.5], [-0.5, 1.5]]) / 0.1, rtol=1e-6)
    assert found.dtype == head.weights.dtype == head.bias.dtype == np.float32
    assert head.labels == ("a", "b")


@pytest.mark.parametrize("ridge", [1e-3, 0.3, 20])
def test_balance_0_is_least_squares_on_the_augmented_system(ridge):
    features, classes = samples([30, 8, 50])
    count, width = features.shape
    # rows of samples, then rows that pull the weights, but not the intercept, to 0
    augmented = np.zeros((count + width, width + 1))
    augmented[:count, :width] = features
    augmented[:count, width] = 1
    augmented[count:, :width] = math.sqrt(count * ridge) * np.eye(width)
    targets = np.concatenate([one_hot(classes), np.zeros((width, 3))])
    expected, *_ = np.linalg.lstsq(augmented, targets, rcond=None)
    weights, bias = coefficients(statistics(features, classes), ridge=ridge, balance=0)
    np.testing.assert_allclose(weights, expected[:width], rtol=0, atol=1e-9)
    np.testing.assert_allclose(bias, expected[width], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("width", "count"), [(6, 90), (60, 30)])
def test_balance_0_is_scikit_learns_ridge_with_few_samples_too(width, count):
    features, classes = samples([count // 3] * 3, width=width)
    expected = Ridge(alpha=0.2 * count).fit(features.astype(float), one_hot(classes))
    weights, bias = coefficients(statistics(features, classes), ridge=0.2, balance=0)
    np.testing.assert_allclose(weights, expected.coef_.T, rtol=0, atol=1e-9)
    np.testing.assert_allclose(bias, expected.intercept_, rtol=0, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_streamed_split_and_merged_samples_give_the_head_of_the_batch(data):
    features, classes = samples([9, 5, 14], seed=data.draw(st.integers(0, 99)))
    order = np.array(data.draw(st.permutations(range(28))))
    cut = data.draw(st.integers(0, 28))
    blank = empty(6, LABELS)
    devices = [add(blank, features[part], classes[part]) for part in (order[:cut], order[cut:])]
    expected = coefficients(statistics(features, classes), ridge=0.1)
    for found, wanted in zip(coefficients(merge(*devices), ridge=0.1), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=28, max_size=28))
def test_unlearned_samples_leave_the_head_of_those_that_stay(chosen):
    features, classes = samples([9, 5, 14])
    gone = np.array(chosen)
    gone[:2] = False
    left = subtract(statistics(features, classes), features[gone], classes[gone])
    expected = coefficients(statistics(features[~gone], classes[~gone]), ridge=0.1)
    for found, wanted in zip(coefficients(left, ridge=0.1), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_any_balance_is_the_formula_on_the_samples_themselves(balance):
    features, classes = samples([40, 4, 15])
    x = features.astype(float)
    counts = np.array([40, 4, 15])
    shares = counts ** (1 - balance) / np.sum(counts ** (1 - balance))
    means = np.stack([x[classes == c].mean(axis=0) for c in range(3)])
    mean = shares @ means
    total = (x - means[classes]).T @ (x - means[classes]) / len(x)
    for share, row in zip(shares, means, strict=True):
        total += share * np.outer(row - mean, row - mean)
    between = np.stack([share * (row - mean) for share, row in zip(shares, means, strict=True)])
    expected = np.linalg.inv(total + 0.7 * np.eye(6)) @ between.T
    weights, bias = coefficients(statistics(features, classes), ridge=0.7, balance=balance)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(bias, shares - expected.T @ mean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_where_classes_scatter_alike_balance_is_scikit_learns_weighting_of_samples(balance):
    offsets = np.random.default_rng(0).normal(size=(8, 4))
    offsets -= offsets.mean(axis=0)
    means = np.random.default_rng(1).normal(size=(3, 4)) * 2
    repeats = np.array([1, 5, 20])
    features = np.concatenate(
        [np.tile(mean + offsets, (n, 1)) for mean, n in zip(means, repeats, strict=True)]
    )
    classes = np.repeat(np.arange(3), 8 * repeats)
    shares = repeats ** (1 - balance) / np.sum(repeats ** (1 - balance))
    weights = (shares / (8 * repeats))[classes]  # sum 1
    expected = Ridge(alpha=0.3).fit(features, one_hot(classes), sample_weight=weights)
    found, bias = coefficients(statistics(features, classes), ridge=0.3, balance=balance)
    np.testing.assert_allclose(found, expected.coef_.T, rtol=0, atol=1e-9)
    np.testing.assert_allclose(bias, expected.intercept_, rtol=0, atol=1e-9)


def test_two_balanced_classes_have_the_direction_of_linear_discriminant_analysis():
    features, classes = samples([25, 25])
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(features.astype(float), classes)
    weights, _ = coefficients(statistics(features, classes, ("a", "b")), ridge=1e-12)
    found, wanted = weights[:, 1] - weights[:, 0], expected.coef_[0]
    cosine = found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted)
    assert cosine > 1 - 1e-9


def test_a_class_a_hundred_times_rarer_is_recalled_as_the_others_are():
    train, classes = samples([2000, 2000, 20], gap=2.5, seed=4)
    both, truth = samples([2500, 2500, 520], gap=2.5, seed=4)
    test, truth = both[-1500:], truth[-1500:]
    stats = statistics(train, classes)
    recalls = {}
    for balance in (0.0, 1.0):
        found = solve(stats, ridge=0.1, balance=balance).scores(test).argmax(axis=1)
        recalls[balance] = [np.mean(found[truth == c] == c) for c in range(3)]
    assert recalls[0.0][2] < 0.1
    assert min(recalls[1.0]) > 0.8
    assert np.mean(recalls[1.0]) > np.mean(recalls[0.0]) + 0.2


def test_a_class_without_samples_is_never_predicted():
    features, classes = samples([20, 20])
    stats = with_label(statistics(features, classes, ("a", "b")), "c")
    weights, bias = coefficients(stats, ridge=0.1)
    np.testing.assert_array_equal(weights[:, 2], np.zeros(6))
    assert bias[2] == NEVER
    head = solve(stats, ridge=0.1)
    extreme = np.float32([[1e20] * 6, [-1e20] * 6])
    assert (head.logits(extreme).argmax(axis=1) < 2).all()
    assert np.isfinite(replace(head, temperature=1e-3).logits(features)).all()
    alone = coefficients(statistics(features, classes, ("a", "b")), ridge=0.1)
    np.testing.assert_allclose(weights[:, :2], alone[0], rtol=1e-12)
    np.testing.assert_allclose(bias[:2], alone[1], rtol=1e-12)


def test_a_single_class_is_always_predicted():
    stats = add(empty(3, LABELS), np.ones((4, 3), np.float32), np.ones(4, int))
    head = solve(stats, ridge=regularisation(stats))
    np.testing.assert_array_equal(head.scores(np.float32([[9, -9, 9]])).argmax(axis=1), [1])


def test_scatter_that_a_forgotten_class_took_with_it_is_borne():
    # only "wide" scatters; "point" forgotten without its Gram matrix takes half of that scatter
    draw = np.random.default_rng(0)
    features = np.concatenate([draw.normal(size=(20, 3)), np.full((20, 3), 8), [[4, 0, 0]]])
    classes = np.repeat([0, 1, 2], [20, 20, 1])
    stats = forget(statistics(features, classes, ("wide", "point", "other")), "point")
    left = subtract(stats, features[:18], classes[:18])
    assert np.linalg.eigvalsh(within(left)).min() < -1
    means = left.sums / left.counts[:, None]
    away = means - means.mean(axis=0)
    total = within(left) / left.counts.sum() + away.T @ away / 2
    values, vectors = np.linalg.eigh(total)
    assert values[0] < -0.01
    # (T + ridge I)^-1, of T without what is below 0
    inverse = vectors / (np.maximum(values, 0) + 1e-3) @ vectors.T
    weights, _ = coefficients(left, ridge=1e-3)
    np.testing.assert_allclose(weights, inverse @ away.T / 2, rtol=1e-9)
    assert solve(left, ridge=1e-3).scores(np.array([[4, 0, 0]])).argmax() == 1


def test_shrinkage_is_the_published_formula():
    # S = diag(3, 1), n = 10: (1 - 1) 10 + 16 over (10 + 1 - 1)(10 - 8)
    assert shrinkage(np.diag([3.0, 1.0]), 10) == pytest.approx(16 / 20)
    # S = diag(4, 1, 1), n = 20: (1/3) 18 + 36 over (21 - 2/3)(18 - 12)
    assert shrinkage(np.diag([4.0, 1.0, 1.0]), 20) == pytest.approx(42 / (61 / 3 * 6))
    assert shrinkage(np.diag([8.0, 2.0, 2.0]) * 1e-9, 20) == pytest.approx(42 / (61 / 3 * 6))


@pytest.mark.parametrize("matrix", [np.eye(3), np.zeros((3, 3)), np.ones((1, 1))])
def test_a_covariance_that_tells_of_no_direction_is_shrunk_entirely(matrix):
    assert shrinkage(matrix, 50) == 1


def test_shrinkage_is_scikit_learns_but_for_terms_of_two_over_the_width():
    # scikit-learn leaves 2 / p out of both parts of eq. 23
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(120, 200)) * np.geomspace(1, 0.05, 200)
    _, expected = oas(rows, assume_centered=True)
    found = shrinkage(rows.T @ rows / 120, 120)
    assert found == pytest.approx(expected, rel=2 / 200)
    squares = np.sum((rows.T @ rows) ** 2)
    trace = np.sum(rows**2) ** 2
    above = squares + trace - 2 / 200 * squares
    below = (121 - 2 / 200) * (squares - trace / 200)
    assert found == pytest.approx(above / below, rel=1e-12)


def test_the_ridge_from_statistics_is_the_shrinkage_of_the_samples_about_their_means():
    features, classes = samples([40, 30, 50], width=100)
    x = features.astype(float)
    # the same scatter as rows of known mean: 120 samples less 3 means estimated
    complete, _ = np.linalg.qr(one_hot(classes), mode="complete")
    rows = complete[:, 3:].T @ x
    _, rho = oas(rows, assume_centered=True)
    variance = np.mean([np.sum((x[:, j] - _own_means(x[:, j], classes)) ** 2) for j in range(100)])
    expected = rho / (1 - rho) * variance / 120
    assert regularisation(statistics(features, classes)) == pytest.approx(expected, rel=0.03)


def _own_means(column, classes):
    return np.array([column[classes == c].mean() for c in classes])


def test_the_ridge_goes_with_the_square_of_the_features_scale():
    features, classes = samples([10, 10, 10])
    one, ten = (regularisation(statistics(features * k, classes)) for k in (1.0, 16.0))
    assert ten == pytest.approx(256 * one, rel=1e-9)


def test_the_ridge_stays_within_its_bounds():
    draw = np.random.default_rng(0)
    # pairs along each axis: the covariance within is exactly a multiple of the identity
    round_ = statistics(np.repeat([[2.0, 0], [-2, 0], [0, 2], [0, -2]], 9, 0), np.zeros(36, int))
    assert regularisation(round_) == pytest.approx(RATIOS[1] * 2)
    line = np.zeros((60, 50))
    line[:, 0] = draw.normal(size=60)
    many = 10**7
    stats = add(empty(50, LABELS), line, np.zeros(60, int), np.full(60, many))
    variance = np.var(line[:, 0]) / 50
    assert regularisation(stats) == pytest.approx(RATIOS[0] * variance)


def test_one_sample_of_each_class_has_a_ridge_of_the_spread_of_the_means():
    stats = statistics(np.float32([[1, 5], [3, 5]]), np.array([0, 1]), ("a", "b"))
    assert regularisation(stats) == pytest.approx(0.5)
    single = statistics(np.float32([[3, 5]]), np.array([0]))
    assert regularisation(single) == pytest.approx((9 + 25) / 2)
    nothing = statistics(np.zeros((3, 2), np.float32), np.arange(3))
    assert regularisation(nothing) == 1
    for stats in (single, nothing):
        assert np.isfinite(solve(stats, ridge=regularisation(stats)).weights).all()


def test_the_chosen_ridge_has_the_best_balanced_accuracy_on_the_holdout():
    better = 0
    for seed in range(8):
        features, classes = samples([30, 200, 120], width=40, seed=seed, gap=0.6)
        train, held = slice(0, 40), slice(40, None)
        stats = statistics(features[train], classes[train])
        head, ridge = choose(stats, features[held], classes[held])
        middle = regularisation(stats)
        accuracies = [
            balanced_accuracy_score(
                classes[held], solve(stats, ridge=f * middle).scores(features[held]).argmax(axis=1)
            )
            for f in FACTORS
        ]
        worth = 1 / len(classes[held])
        good = [f for f, a in zip(FACTORS, accuracies, strict=True) if a > max(accuracies) - worth]
        assert ridge / middle == pytest.approx(min(good, key=lambda f: (abs(math.log10(f)), -f)))
        np.testing.assert_array_equal(head.weights, solve(stats, ridge=ridge).weights)
        better += ridge != middle
    assert better  # else this shows nothing


def test_a_ridge_that_is_less_than_a_sample_better_is_not_worth_leaving_the_middle():
    features, classes = samples([30, 30, 30], gap=30)
    stats = statistics(features, classes)
    head, ridge = choose(stats, features[:9], classes[:9])
    assert ridge == regularisation(stats)
    assert head.temperature != DEFAULT_TEMPERATURE


def test_without_a_holdout_the_statistics_choose():
    stats = statistics(*samples([5, 5, 5]))
    head, ridge = choose(stats, np.zeros((0, 6), np.float32), np.zeros(0, int), balance=0.5)
    assert ridge == regularisation(stats)
    assert head.temperature == DEFAULT_TEMPERATURE
    np.testing.assert_array_equal(head.bias, solve(stats, ridge=ridge, balance=0.5).bias)


def test_balanced_accuracy_is_scikit_learns():
    draw = np.random.default_rng(0)
    scores, classes = draw.normal(size=(50, 4)), draw.choice([0, 1, 3], 50)
    scores[:, 2] = -9
    expected = balanced_accuracy_score(classes, scores.argmax(axis=1))
    assert balanced_accuracy(scores, classes) == pytest.approx(expected)


def smoothed_loss(scores, classes, temperature):
    """scikit-learn's log loss, of targets smoothed by one sample: weights of repeated samples."""
    count, width = scores.shape
    logits = scores / temperature
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    targets = np.concatenate([classes, np.repeat(np.arange(width), count)])
    weights = np.repeat([count, 1 / width], [count, count * width]) / (count + 1)
    with np.errstate(under="ignore"):
        every = np.concatenate([chances, np.tile(chances, (width, 1))])
    return log_loss(targets, every, sample_weight=weights, labels=np.arange(width))


def test_the_temperature_is_where_scikit_learns_log_loss_is_least_on_a_grid():
    draw = np.random.default_rng(0)
    classes = draw.integers(4, size=300)
    scores = one_hot(classes, 4) * 0.3 + draw.normal(size=(300, 4)) * 0.2
    found = fit_temperature(scores, classes)
    grid = np.geomspace(found / 4, found * 4, 401)
    losses = [smoothed_loss(scores, classes, t) for t in grid]
    assert grid[int(np.argmin(losses))] == pytest.approx(found, rel=0.004)


@pytest.mark.parametrize(("right", "wrong"), [(1, 0), (8, 0), (9, 3), (500, 20)])
def test_the_temperature_of_two_equal_scores_is_the_one_computed_by_hand(right, wrong):
    # all samples have scores (1, 0): the share q of smoothed targets on the first class is
    # sigmoid(1 / T), so T = 1 / log(q / (1 - q))
    count = right + wrong
    share = (right + 0.5) / (count + 1)
    scores = np.tile([1.0, 0.0], (count, 1))
    classes = np.repeat([0, 1], [right, wrong])
    assert fit_temperature(scores, classes) == pytest.approx(
        1 / math.log(share / (1 - share)), rel=1e-6
    )


def test_scores_that_are_worse_than_none_are_flattened_within_bounds():
    found = fit_temperature(np.tile([0.0, 1.0], (50, 1)), np.zeros(50, int))
    assert 990 < found <= 1000.001
    assert 0.000999 <= fit_temperature(np.tile([1e-9, 0], (50, 1)), np.zeros(50, int)) < 0.00101


@pytest.mark.parametrize(
    "scores", [np.zeros((0, 3)), np.zeros((5, 3)), np.ones((5, 1)), np.full((5, 3), NEVER)]
)
def test_without_anything_to_fit_the_temperature_is_the_default(scores):
    assert fit_temperature(scores, np.zeros(len(scores), int)) == DEFAULT_TEMPERATURE


def test_classes_that_cannot_be_predicted_do_not_change_the_temperature():
    draw = np.random.default_rng(0)
    classes = draw.integers(2, size=60)
    scores = one_hot(classes, 2) + draw.normal(size=(60, 2))
    among = np.insert(scores, 1, NEVER, axis=1)
    odd = np.concatenate([among, [[9.0, NEVER, -9]]]), np.concatenate([classes * 2, [1]])
    assert fit_temperature(*odd) == fit_temperature(scores, classes)


def test_heads_and_temperatures_change_none_of_their_arguments():
    features, classes = samples([9, 9, 9])
    stats = statistics(features, classes)
    scores = solve(stats, ridge=1).scores(features)
    for array in (features, classes, scores, stats.gram, stats.sums, stats.counts):
        array.flags.writeable = False
    first = choose(stats, features, classes)
    again = choose(stats, features, classes)
    assert first[1] == again[1]
    assert (
        first[0].temperature
        == again[0].temperature
        == fit_temperature(first[0].scores(features), classes)
    )


def test_what_gives_no_head_is_refused():
    stats = statistics(*samples([5, 5, 5]))
    for ridge in (0, -1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="ridge = "):
            solve(stats, ridge=ridge)
    for balance in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="balance = "):
            solve(stats, ridge=1, balance=balance)
    for nothing in (empty(3), empty(3, LABELS)):
        with pytest.raises(DataError, match="no samples"):
            solve(nothing, ridge=1)
        with pytest.raises(DataError, match="no samples"):
            regularisation(nothing)
    with pytest.raises(DataError, match="is no class"):
        choose(stats, np.zeros((1, 6)), np.array([3]))
    with pytest.raises(DataError, match=r"expected shape \(samples, 6\)"):
        solve(stats, ridge=1).logits(np.zeros((1, 7)))
    with pytest.raises(DataError, match="is no class"):
        fit_temperature(np.zeros((2, 2)), np.array([0, 2]))


def test_a_ridge_that_rounding_loses_is_refused():
    problem = ridge_module._Problem(
        total=np.ones((2, 2)),
        between=np.ones((2, 1)),
        mean=np.zeros(2),
        shares=np.ones(1),
        seen=np.ones(1, bool),
    )
    with pytest.raises(ConfigError, match="1e-40 is lost in rounding"):
        ridge_module._solution(problem, 1e-40)


@pytest.mark.parametrize("size", [1e160, 1e300])
def test_statistics_of_absurd_numbers_give_an_error_and_no_warning(size):
    stats = Statistics(
        labels=("a", "b"),
        gram=np.full((2, 2), size),
        sums=np.array([[size, -size], [0, 1]]),
        counts=np.ones(2),
    )
    with pytest.raises(DataError, match="too large"):
        solve(stats, ridge=1)
    with pytest.raises(DataError, match="too large"):
        regularisation(stats)


def test_a_head_says_what_it_computes():
    head = Head(
        labels=("a", "b"),
        weights=np.float32([[1, 2], [3, 4]]),
        bias=np.float32([10, 20]),
        temperature=2,
    )
    np.testing.assert_array_equal(head.logits(np.array([[1, 1]], np.uint8)), [[7, 13]])
    np.testing.assert_array_equal(head.scores(np.array([[1, 1]], np.uint8)), [[14, 26]])
