"""What is set aside: by hand for small numbers, by rate for many normal ones."""

import numpy as np
import pytest

from edgetune.errors import ConfigError, DataError
from edgetune.runtime.learn.outliers import Flood, FloodRules, Limits, Screen, fit_screen

WIDTH, CLASSES, SEPARATION = 12, 4, 9.0


class World:
    """Normal classes whose covariance is known, `SEPARATION` standard deviations apart."""

    def __init__(self, seed=0, tails=None):
        self.random = np.random.default_rng(seed)
        self.tails = tails
        mixing = self.random.normal(size=(WIDTH, WIDTH)) + 2 * np.eye(WIDTH)
        self.mixing = mixing  # covariance mixing mixing'
        # corners of a simplex lie sqrt(2) apart
        corners = np.eye(CLASSES + 1, WIDTH) * SEPARATION / np.sqrt(2)
        self.means = corners @ mixing.T + 5.0

    def draw(self, classes):
        noise = self.random.normal(size=(len(classes), WIDTH))
        if self.tails is not None:
            noise /= np.sqrt(self.random.chisquare(self.tails, len(classes)) / self.tails)[:, None]
        return self.means[classes] + noise @ self.mixing.T

    def labels(self, count):
        return np.arange(count) % CLASSES

    def fit(self, clean=2000, train=4000, **options):
        classes = self.labels(train)
        features = self.draw(classes)
        means = np.stack([features[classes == c].mean(axis=0) for c in range(CLASSES)])
        within = features - means[classes]
        covariance = within.T @ within / (train - CLASSES)
        held_out = self.labels(clean)
        return fit_screen(
            means,
            np.bincount(classes),
            covariance,
            "abcd",
            clean=self.draw(held_out),
            clean_classes=held_out,
            **options,
        )


def share(reasons, text=""):
    return np.mean([reason is not None and text in reason for reason in reasons])


@pytest.fixture
def plain():
    """Two classes on a line with unit covariance, at 0 and 10, all limits set by hand."""
    return Screen(
        origin=np.zeros(2),
        whitener=np.eye(2),
        centres=np.array([[0.0, 0.0], [10.0, 0.0]]),
        counts=np.array([100.0, 100.0]),
        labels=("left", "right"),
        limits=Limits(
            far=9.0, flip=4.0, group_far=16.0, group_flip=4.0, group_spread=1.0, noise=0.0
        ),
    )


@pytest.mark.parametrize(
    ("place", "claimed", "expected"),
    [
        # squared distances to left and right
        ((2.9, 0), 0, None),  # 8.41
        ((0, 3.1), 0, "far"),  # 9.61
        ((7, 0), 1, None),  # 9 to its own
        ((6.9, 0), 1, "far"),
        ((9, 0), 1, None),
        ((9, 0), 0, "lies with 'right': squared distances 81 and 1;"),
        ((0, 0), 1, "lies with 'left': squared distances 100 and 0;"),
        ((-2, 2), 0, None),
    ],
)
def test_a_sample_of_a_settled_class_is_judged_by_hand(plain, place, claimed, expected):
    (reason,) = plain.check(np.array([place], np.float32), np.array([claimed]))
    assert reason is None if expected is None else expected in reason


def test_a_difference_of_up_to_the_limit_is_no_flip(plain):
    # x^2 - (10 - x)^2 = 20 x - 100 is 4 at 5.2; (far is set out of the way)
    near = Screen(**(vars(plain) | {"limits": Limits(**(vars(plain.limits) | {"far": 99.0}))}))
    places = np.array([[5.19, 0], [5.21, 0]])
    assert [r is None for r in near.check(places, np.array([0, 0]))] == [True, False]


def test_features_that_are_no_numbers_are_set_aside(plain):
    reasons = plain.check(np.array([[np.nan, 0], [np.inf, 0], [0, 0]]), np.array([0, -1, 0]))
    assert [r is None for r in reasons] == [False, False, True]
    assert "not finite" in reasons[0]


def test_a_group_shows_the_one_that_lies_elsewhere_whichever_comes_first(plain):
    fellows = np.array([[5, 20], [5, 21], [6, 20], [4, 20], [5, 19.5]])
    for place in range(6):
        group = np.insert(fellows, place, (10, 0.5), axis=0)
        reasons = plain.check(group, np.full(6, -1))
        assert [r is None for r in reasons] == [row != place for row in range(6)]
        assert "a new class but lies with 'right'" in reasons[place]
        # the median of the others is (5, 20), so 5^2 + 19.5^2
        assert "405.2 to its 5 fellows and 0.25" in reasons[place]


def test_a_group_shows_the_one_that_lies_far_out(plain):
    group = np.array([[0, 50], [0, 51], [1, 50], [-1, 50], [0, 49], [0, 60]])
    reasons = plain.check(group, np.full(6, -1))
    # 10^2; the distances 0, 1, 1, 1, 1, 100 have the median 1, as at the factory
    assert [r is None for r in reasons] == [True] * 5 + [False]
    assert "far from its 5 fellows of a new class: squared distance 100; up to 16" in reasons[5]


def test_a_wide_group_is_measured_by_its_own_width(plain):
    group = 5 * np.array([[0, 50], [0, 51], [1, 50], [-1, 50], [0, 49], [0, 53]])
    # 15^2 = 225 is no more than 16 times the median, 25
    assert plain.check(group, np.full(6, -1)) == [None] * 6


def test_of_fewer_than_five_samples_of_a_new_class_nothing_is_said(plain):
    group = np.array([[0, 50], [0, 51], [0, 50], [500, 0]])
    assert plain.check(group, np.full(4, -1)) == [None] * 4
    earlier = {-1: np.array([[0, 50.5], [1, 50]])}
    reasons = plain.check(group, np.full(4, -1), earlier)
    assert [r is None for r in reasons] == [True, True, True, False]


def test_new_classes_of_a_batch_are_looked_at_apart(plain):
    there, elsewhere = np.full((6, 2), 50.0), np.full((6, 2), -50.0)
    classes = np.repeat([-1, -2], 6)
    assert plain.check(np.concatenate((there, elsewhere)), classes) == [None] * 12


def test_a_young_class_is_known_by_its_samples_not_its_mean(plain):
    # a mean of three wrong samples says that the class lies at (10, 1)
    young = plain.with_classes(
        np.array([[0.0, 0], [10, 0], [10, 1]]), np.array([100, 100, 3]), ["left", "right", "new"]
    )
    good = np.array([[5, 20], [5, 21], [6, 20], [4, 20], [5, 19.5]])
    group = np.concatenate((good, [[10, 0.5]]))
    reasons = young.check(group, np.full(6, 2))
    assert [r is None for r in reasons] == [True] * 5 + [False]
    assert "labelled 'new' but lies with 'right'" in reasons[5]


def test_a_mean_of_few_samples_is_forgiven_its_noise(plain):
    # 5 samples: their mean is off by noise / 5 = 2; so (10, 2) is 4 - 0.1 and (10, 4) - 2 away
    limits = Limits(**(vars(plain.limits) | {"noise": 10.0, "flip": 0.0}))
    screen = Screen(**(vars(plain) | {"limits": limits})).with_classes(
        np.array([[0.0, 0], [10, 0], [10, 4]]), np.array([100, 100, 5]), "abc"
    )
    (reason,) = screen.check(np.array([[10.0, 2.0]]), np.array([1]))
    assert "lies with 'c': squared distances 3.9 and 2;" in reason


def test_distances_are_those_of_the_formula():
    world = World(1)
    classes = world.labels(400)
    features = world.draw(classes)
    means = np.stack([features[classes == c].mean(axis=0) for c in range(CLASSES)])
    within = features - means[classes]
    covariance = within.T @ within / 396
    clean = world.draw(world.labels(60))
    screen = fit_screen(
        means, np.full(CLASSES, 1e12), covariance, "abcd",
        clean=clean, clean_classes=world.labels(60), ridge=0.3,
    )  # fmt: skip
    regular = covariance + 0.3 * np.mean(np.diag(covariance)) * np.eye(WIDTH)
    away = clean[:, None] - means  # (samples, classes, width)
    expected = np.sum(away * np.linalg.solve(regular, away[..., None])[..., 0], axis=2)
    # 60 samples and a rate of 1 in 61: the limit is the largest, from which the reasons begin
    nearest = expected.min(axis=1)
    loose = fit_screen(
        means, np.full(CLASSES, 1e12), covariance, "abcd",
        clean=clean, clean_classes=world.labels(60), ridge=0.3, far_rate=1 / 61,
    )  # fmt: skip
    assert loose.limits.far == pytest.approx(nearest.max(), rel=1e-9)
    assert screen.limits.far > loose.limits.far
    half = fit_screen(
        means, np.full(CLASSES, 1e12), covariance, "abcd",
        clean=clean, clean_classes=world.labels(60), ridge=0.3, far_rate=0.5,
    )  # fmt: skip
    # the ceil(61 / 2)-th
    assert half.limits.far == pytest.approx(np.sort(nearest)[30], rel=1e-9)


@pytest.mark.parametrize("tails", [None, 5], ids=["normal", "student t, 5"])
def test_clean_samples_are_set_aside_at_the_stated_rates(tails):
    world = World(2, tails)
    screen = world.fit(clean=3000, far_rate=0.004, flip_rate=0.02)
    classes = world.labels(20_000)
    reasons = screen.check(world.draw(classes), classes)
    # the limit is the quantile of 3000: its own rate scatters by sqrt(0.004 / 3000) = 0.0012
    assert share(reasons, "far from") == pytest.approx(0.004, abs=0.003)
    assert share(reasons, "lies with") <= 0.03


def test_with_few_clean_samples_the_rate_is_drawn_out():
    aside = []
    for seed in range(12):
        world = World(seed)
        screen = world.fit(clean=200, train=800, far_rate=0.001)
        classes = world.labels(4000)
        aside.append(share(screen.check(world.draw(classes), classes), "far from"))
    # the largest of 200 would let 0.5 % through
    assert np.mean(aside) == pytest.approx(0.001, abs=0.001)


@pytest.mark.parametrize("tails", [None, 5], ids=["normal", "student t, 5"])
def test_flips_between_classes_that_lie_apart_are_found(tails):
    world = World(3, tails)
    screen = world.fit()
    classes = world.labels(2000)
    claimed = (classes + world.random.integers(1, CLASSES, len(classes))) % CLASSES
    assert share(screen.check(world.draw(classes), claimed), "lies with") > 0.95


def test_outliers_are_found():
    world = World(4)
    screen = world.fit()
    classes = world.labels(400)
    unlike = world.draw(classes) + 12 * world.mixing[:, WIDTH - 1]  # where no class lies
    assert share(screen.check(unlike, classes), "far from everything") > 0.99


def test_a_new_class_is_let_in_and_one_stranger_in_it_is_not():
    world = World(5)
    screen = world.fit()
    clean, found, groups = [], [], 60
    for _ in range(groups):
        own = world.draw(np.full(8, CLASSES))  # a class that the screen never saw
        clean += screen.check(own, np.full(8, -1))
        own[0] = world.draw([world.random.integers(CLASSES)])[0]
        reasons = screen.check(own, np.full(8, -1))
        found.append(reasons[0])
    assert share(clean) < 0.02
    assert share(found, "lies with") > 0.95


def test_a_screen_says_the_same_of_a_sample_alone_and_among_others():
    world = World(6)
    screen = world.fit()
    classes = world.labels(64)
    features = world.draw(classes)
    claimed = np.roll(classes, 1)
    together = screen.check(features, claimed)
    alone = [screen.check(features[[row]], claimed[[row]])[0] for row in range(64)]
    assert together == alone
    assert share(together) > 0.95


def test_classes_without_enough_clean_samples_leave_groups_alone():
    world = World(7)
    # 60 classes of one clean sample each would do for the settled ones only
    means = world.random.normal(size=(60, 3)) * 50
    screen = fit_screen(
        means, np.full(60, 40), np.eye(3), [str(c) for c in range(60)],
        clean=means + world.random.normal(size=(60, 3)), clean_classes=np.arange(60),
    )  # fmt: skip
    assert screen.limits.group_far == np.inf
    group = np.vstack([np.zeros((7, 3)), means[0]])
    assert screen.check(group, np.full(8, -1)) == [None] * 8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clean": np.zeros((60, 3))}, DataError, "clean: expected finite numbers"),
        ({"means": np.full((2, 2), np.nan)}, DataError, "means"),
        ({"covariance": np.array([[1.0, 2], [2, 1]]), "ridge": 0.0}, DataError, "positive"),
        ({"covariance": np.zeros((2, 2))}, DataError, "larger ridge"),
        ({"counts": np.array([100, 2])}, DataError, "class 'b' has clean samples"),
        ({"clean_classes": np.full(60, 2)}, DataError, "clean_classes"),
        ({"clean": np.zeros((9, 2)), "clean_classes": np.zeros(9, int)}, DataError, "50 clean"),
        ({"ridge": -1.0}, ConfigError, "ridge"),
        ({"far_rate": 0.0}, ConfigError, "far_rate"),
        ({"flip_rate": 1.0}, ConfigError, "flip_rate"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, error, message):
    given = {
        "means": np.array([[0.0, 0], [9, 0]]), "counts": np.array([100, 100]),
        "covariance": np.eye(2), "labels": "ab",
        "clean": np.zeros((60, 2)), "clean_classes": np.arange(60) % 2,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        fit_screen(**(given | change))


@pytest.mark.parametrize(
    ("features", "classes", "earlier", "message"),
    [
        (np.zeros((1, 3)), np.array([0]), None, "expected features"),
        (np.zeros((2, 2)), np.array([0]), None, "n classes"),
        (np.zeros((1, 2)), np.array([2]), None, "no class 2"),
        (np.zeros((1, 2)), np.array([-1]), {-1: np.zeros((4, 3))}, "class -1"),
    ],
)
def test_what_cannot_be_checked_is_refused(plain, features, classes, earlier, message):
    with pytest.raises(DataError, match=message):
        plain.check(features, classes, earlier)


def spread(count, seed=0):
    """Features that are nowhere near each other."""
    return np.random.default_rng(seed).normal(size=(count, 16))


RULES = FloodRules(window=5, most=3, period_s=100.0, near=0.1)


def test_a_label_has_its_places_and_no_more():
    flood = Flood(RULES)
    reasons = flood.admit(spread(4), ["ok"] * 4, 0.0)
    assert reasons[:3] == [None] * 3
    assert reasons[3] == (
        "3 of the last 3 samples accepted are 'ok', and no more than 3 of 5 may be: add samples of"
        " other labels, or wait 2 minutes"  # 100 s
    )


def test_others_make_room_by_pushing_the_oldest_out():
    flood = Flood(RULES)
    assert flood.admit(spread(3), ["ok"] * 3, 0.0) == [None] * 3
    # two fill the window: ok ok ok bad bad
    assert flood.admit(spread(3, 1), ["bad", "bad", "ok"], 1.0)[2] is not None
    # the third pushes the first ok out
    assert flood.admit(spread(3, 2), ["bad", "ok", "ok"], 2.0)[:2] == [None, None]


def test_what_is_old_is_forgotten():
    flood = Flood(RULES)
    flood.admit(spread(3), ["ok"] * 3, 50.0)
    assert flood.admit(spread(1, 1), ["ok"], 149.9)[0] is not None
    assert flood.admit(spread(1, 1), ["ok"], 150.0) == [None]


def test_a_clock_that_was_set_back_holds_nothing_up_for_longer_than_a_period():
    flood = Flood(RULES)
    flood.admit(spread(3), ["ok"] * 3, 1e9)
    assert flood.admit(spread(1, 1), ["ok"], 10.0)[0] is not None
    assert flood.admit(spread(1, 1), ["ok"], 110.0) == [None]


@pytest.mark.parametrize(
    ("second", "label", "same"),
    [
        ([10.0, 0.99], "ok", True),  # 0.99 of 10.05
        ([10.0, 1.01], "ok", False),  # 1.01 of 10.0505 is 10.05 %
        ([11.1, 0.0], "ok", True),  # 1.1 of the longer one's 11.1
        ([11.2, 0.0], "ok", False),
        ([10.0, 0.0], "bad", False),
    ],
)
def test_the_same_sample_does_not_teach_a_label_twice(second, label, same):
    flood = Flood(RULES)
    reasons = flood.admit(np.array([[10.0, 0.0], second], np.float32), ["ok", label], 0.0)
    assert reasons[0] is None
    assert (reasons[1] is not None) is same
    if same:
        assert "nearly the same as a sample of 'ok'" in reasons[1]


def test_what_was_set_aside_takes_no_place():
    flood = Flood(RULES)
    same = np.ones((3, 16))
    assert [r is None for r in flood.admit(same, ["ok"] * 3, 0.0)] == [True, False, False]
    assert flood.admit(spread(2), ["ok"] * 2, 0.0) == [None, None]


def test_features_of_zero_are_the_same_as_each_other():
    flood = Flood(RULES)
    assert [r is None for r in flood.admit(np.zeros((2, 4)), ["a", "a"], 0.0)] == [True, False]


@pytest.mark.parametrize(
    "rules",
    [FloodRules(most=0), FloodRules(most=60), FloodRules(period_s=0.0), FloodRules(near=1.0)],
)
def test_flood_rules_that_cannot_be_are_refused(rules):
    with pytest.raises(ConfigError, match="expected"):
        Flood(rules)


def test_every_sample_needs_a_label():
    with pytest.raises(DataError, match="a label for each"):
        Flood(RULES).admit(spread(2), ["ok"], 0.0)
