import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, log_loss

from edgetune.errors import ConfigError, DataError
from edgetune.runtime.proportions import (
    mcnemar_p,
    samples_affording,
    samples_needed,
    tango_bound,
)
from edgetune.runtime.records import from_mapping, to_mapping
from edgetune.tasks.metrics import classification_report
from edgetune.tasks.paired import Comparison, compare, paired_bootstrap, verdict
from edgetune.tasks.proportions import tango_interval

Z_95 = 1.6448536269514722  # one-sided 95 %, from tables
TABLES = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 60)).filter(sum)


def sure(predicted, classes=3, confidence=0.9):
    """Probabilities whose largest is that of `predicted`."""
    probabilities = np.full((len(predicted), classes), (1 - confidence) / (classes - 1))
    probabilities[np.arange(len(predicted)), predicted] = confidence
    return probabilities


def answers(samples, lost=0, gained=0, classes=3):
    """Truth and predictions of two models; each mistake takes a class for the next."""
    truth = np.arange(samples) % classes
    reference, candidate = truth.copy(), truth.copy()
    candidate[:lost] = (truth[:lost] + 1) % classes
    reference[lost : lost + gained] = (truth[lost : lost + gained] + 1) % classes
    return truth, reference, candidate


def compared(samples, lost=0, gained=0):
    truth, reference, candidate = answers(samples, lost, gained)
    return compare(truth, sure(reference), sure(candidate), ["a", "b", "c"], resamples=300)


def by_grid(lost, gained, samples, z, points=4001):
    """Differences that the score test keeps; the likelihood is maximised by brute force.

    For each difference d, q = P(gained) runs over a fine grid and lost has P = q + d.
    """
    kept = []
    for d in np.linspace(-1, 1, points)[1:-1]:
        q = np.linspace(max(0.0, -d), (1 - d) / 2, 4001)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = [
                np.where(count > 0, count * np.log(probability), 0.0)
                for count, probability in (
                    (gained, q), (lost, q + d), (samples - lost - gained, 1 - 2 * q - d)
                )
            ]  # fmt: skip
        likelihood = np.nan_to_num(sum(terms), nan=-np.inf)  # the rounding of a zero
        best = q[np.argmax(likelihood)]
        variance = samples * (2 * best + d - d * d)
        if abs(lost - gained - samples * d) <= z * math.sqrt(variance):
            kept.append(d)
    return min(kept), max(kept)


@pytest.mark.parametrize(
    ("lost", "gained", "samples", "confidence", "low", "high", "digits"),
    [
        pytest.param(9, 3, 32, 0.95, -0.027, 0.390, 3, id="Tango 1998, cross-over"),
        pytest.param(0, 1, 44, 0.90, -0.096, 0.037, 3, id="Tango 1998, lenses"),
        pytest.param(16, 8, 86, 0.95, -0.020, 0.207, 3, id="Agresti & Min 2005"),
        pytest.param(6, 16, 161, 0.95, -0.1240, -0.0054, 4, id="Fagerland 2017, Cavo"),
        # R, PropCIs::scoreci.mp(25, 28, 618, 0.90), which subtracts the other way round
        pytest.param(28, 25, 618, 0.90, -0.0148, 0.0247, 4, id="PropCIs"),
    ],
)
def test_the_score_interval_is_the_published_one(
    lost, gained, samples, confidence, low, high, digits
):
    interval = tango_interval(lost, gained, samples, confidence)
    assert interval.value == pytest.approx((lost - gained) / samples)
    assert (round(interval.low, digits), round(interval.high, digits)) == (low, high)


@pytest.mark.parametrize(
    ("lost", "gained", "samples"), [(5, 0, 20), (0, 5, 20), (7, 2, 40), (1, 30, 60), (3, 3, 9)]
)
def test_the_score_interval_is_what_a_grid_search_keeps(lost, gained, samples):
    low, high = by_grid(lost, gained, samples, 1.959964, points=801)
    interval = tango_interval(lost, gained, samples)
    assert interval.low == pytest.approx(low, abs=0.004)
    assert interval.high == pytest.approx(high, abs=0.004)


@pytest.mark.parametrize("samples", [1, 178, 268, 100_000])
def test_models_that_agree_are_bounded_by_z2_over_n_plus_z2(samples):
    expected = Z_95**2 / (samples + Z_95**2)
    assert tango_bound(0, 0, samples) == pytest.approx(expected, rel=1e-9)


def test_all_lost_or_all_gained_ends_at_the_edge():
    assert tango_interval(50, 0, 50).high == 1.0
    assert tango_interval(0, 50, 50).low == -1.0
    # q = (1 - d) / 2 is most likely, so n (1 - d) = z^2 (1 + d)
    z2 = 1.959964**2
    assert tango_interval(50, 0, 50).low == pytest.approx((50 - z2) / (50 + z2), rel=1e-6)


@settings(max_examples=80, deadline=None)
@given(TABLES)
def test_the_interval_holds_its_value_and_turns_round_with_the_models(table):
    lost, gained, same = table
    samples = lost + gained + same
    there, back = tango_interval(lost, gained, samples), tango_interval(gained, lost, samples)
    assert -1.0 <= there.low <= there.value <= there.high <= 1.0
    assert (there.low, there.high) == (-back.high, -back.low)
    assert tango_bound(lost, gained, samples) <= there.high


def test_a_one_sided_bound_is_the_end_of_the_wider_two_sided_interval():
    assert tango_bound(7, 2, 400) == pytest.approx(tango_interval(7, 2, 400, 0.90).high)


def test_the_bound_is_missed_about_5_times_in_100():
    # lost with 6 %, gained with 4 %: the drop is 2 points
    random = np.random.default_rng(3)
    tables = random.multinomial(400, (0.06, 0.04, 0.90), size=2000)
    missed = sum(tango_bound(int(b), int(c), 400) < 0.02 for b, c, _ in tables)
    assert missed / 2000 == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize(("lost", "gained", "samples"), [(-1, 0, 5), (0, -1, 5), (3, 3, 5)])
def test_counts_that_cannot_be_are_refused(lost, gained, samples):
    with pytest.raises(DataError, match=f"{lost} lost and {gained} gained"):
        tango_interval(lost, gained, samples)
    with pytest.raises(DataError, match="lost"):
        tango_bound(lost, gained, samples)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, math.nan])
def test_a_confidence_outside_0_to_1_is_refused(confidence):
    with pytest.raises(ConfigError, match="confidence"):
        tango_interval(1, 1, 10, confidence)
    with pytest.raises(ConfigError, match="confidence"):
        tango_bound(1, 1, 10, confidence)


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [
        (6, 16, 0.052479),  # Fagerland 2017, Cavo: exact conditional test
        (0, 5, 2 / 32),
        (1, 4, 2 * 6 / 32),
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_is_twice_the_binomial_tail(lost, gained, expected):
    assert mcnemar_p(lost, gained) == pytest.approx(expected, abs=5e-7)
    assert mcnemar_p(gained, lost) == mcnemar_p(lost, gained)


def test_mcnemar_of_thousands_of_differences_neither_overflows_nor_rounds_to_nothing():
    # normal approximation with continuity correction: z = (200 - 1) / sqrt(20000)
    expected = math.erfc(199 / math.sqrt(20_000) / math.sqrt(2))
    assert mcnemar_p(9900, 10_100) == pytest.approx(expected, rel=0.01)
    assert mcnemar_p(0, 5000) == 0.0


def test_268_samples_without_a_difference_show_a_loss_below_1_point():
    # z^2 (1 - d) / d = 267.85 at d = 0.01
    assert samples_needed(0.01) == 268
    assert samples_needed(0.02) == 133  # 132.57
    assert samples_needed(1.0) == 1


def test_a_higher_confidence_needs_more_samples():
    # 1.959964^2 (1 - 0.02) / 0.02 = 188.2
    assert samples_needed(0.02, confidence=0.975) == 189


def test_samples_affording_are_where_the_bound_crosses_the_drop():
    for lost, expected in ((0, 133), (1, 222), (2, 300), (3, 373)):
        assert samples_affording(0.02, lost) == expected
        assert tango_bound(lost, 0, expected) <= 0.02 < tango_bound(lost, 0, expected - 1)
    assert samples_affording(0.02, 2, confidence=0.975) > 300
    assert samples_affording(1.0, 4) == 4
    assert samples_affording(0.0, 0) is None
    with pytest.raises(DataError, match="-1 lost"):
        samples_affording(0.02, -1)


def test_samples_needed_are_the_fewest_at_the_same_rates():
    # 4 lost and 2 gained of 500, at the rates 0.8 % and 0.4 %
    needed = samples_needed(0.01, lost=4, gained=2, samples=500)
    at = [tango_bound(0.008 * n, 0.004 * n, n) <= 0.01 for n in (needed - 1, needed)]
    assert at == [False, True]


def test_no_number_of_samples_shows_what_is_not_so():
    assert samples_needed(0.0) is None
    assert samples_needed(0.01, lost=3, samples=100) is None
    assert samples_needed(0.01, lost=1, samples=100) is None


def test_a_comparison_counts_what_a_person_counts():
    truth = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 2])
    reference = np.array([0, 0, 0, 1, 1, 1, 1, 0, 0, 2])  # 7 right
    candidate = np.array([0, 0, 1, 0, 1, 0, 0, 2, 0, 2])  # 5 right: lost 1 + 2, gained 1
    found = compare(truth, sure(reference), sure(candidate, confidence=0.5), ["a", "b", "c"])
    assert (found.samples, found.lost, found.gained) == (10, 3, 1)
    assert (found.reference_accuracy, found.candidate_accuracy) == (0.7, 0.5)
    assert found.drop.value == pytest.approx(0.2)
    assert found.agreement == 0.5  # sample 7 is wrong in both, but not the same
    assert found.mcnemar_p == pytest.approx(2 * 5 / 16)
    assert (found.worst_class, found.worst_class_support) == ("b", 5)
    assert found.worst_class_drop == pytest.approx(2 / 5)
    # 9 samples of a balanced set of 3 weigh 1 / (4) + 1 / 5 + 1 / 1
    assert found.effective_samples == pytest.approx(9 / (1 / 4 + 1 / 5 + 1))
    # where they differ, the candidate gives 0.25 to what the reference gives 0.9
    assert found.max_probability_difference == pytest.approx(0.65)
    # says 0.5 and is right 0.5 of the time; said 0.9 and was right 0.7
    assert found.calibration_change == pytest.approx(0.0 - 0.2)
    expected = [
        log_loss(truth, sure(reference), labels=range(3)),
        log_loss(truth, sure(candidate, confidence=0.5), labels=range(3)),
    ]
    assert found.log_loss_change == pytest.approx(expected[1] - expected[0])
    expected = [f1_score(truth, p, average="macro") for p in (reference, candidate)]
    assert found.f1_macro_drop.value == pytest.approx(expected[0] - expected[1])


def test_the_worst_class_is_one_that_has_samples():
    truth = np.array([0, 0, 2, 2])
    reference, candidate = np.array([1, 1, 2, 0]), np.array([0, 0, 2, 2])
    found = compare(truth, sure(reference), sure(candidate), ["a", "never true", "c"])
    assert (found.worst_class, found.worst_class_drop) == ("c", -0.5)


def test_the_bootstrap_of_cells_is_that_of_samples():
    random = np.random.default_rng(2)
    truth = random.integers(0, 4, 200)
    reference, candidate = (
        np.where(random.random(200) < right, truth, random.integers(0, 4, 200))
        for right in (0.8, 0.7)
    )
    found = paired_bootstrap(truth, reference, candidate, 4, "f1_macro", resamples=4000)
    drawn = []
    for _ in range(400):
        rows = random.integers(0, 200, 200)
        before, after = (
            f1_score(truth[rows], p[rows], average="macro", zero_division=0)
            for p in (reference, candidate)
        )
        drawn.append(before - after)
    low, high = np.quantile(found.drops, (0.05, 0.95))
    assert low == pytest.approx(np.quantile(drawn, 0.05), abs=0.012)
    assert high == pytest.approx(np.quantile(drawn, 0.95), abs=0.012)


def test_what_both_get_wrong_cancels_in_the_bootstrap():
    random = np.random.default_rng(4)
    truth = random.integers(0, 3, 300)
    wrong = np.where(random.random(300) < 0.6, truth, (truth + 1) % 3)
    found = paired_bootstrap(truth, wrong, wrong, 3, "f1_macro", resamples=50)
    assert (found.value, found.drops.tolist()) == (0.0, [0.0] * 50)
    alone = classification_report(truth, wrong, ["a", "b", "c"], resamples=50).f1_macro
    assert alone.high - alone.low > 0.05


def test_macro_f1_keeps_the_distance_that_a_rare_class_asks_for():
    # 1000 samples, of which 10 are of class b: worth 4 / (1 / 990 + 1 / 10) = 39.6
    truth = np.repeat([0, 1], [990, 10])
    found = compare(truth, sure(truth, 2), sure(truth, 2), ["a", "b"], resamples=20)
    assert found.effective_samples == pytest.approx(39.6, abs=0.01)
    assert found.f1_macro_bound == pytest.approx(Z_95**2 / (39.6 + Z_95**2), rel=1e-4)
    assert found.bound == pytest.approx(Z_95**2 / (1000 + Z_95**2), rel=1e-6)
    assert verdict(found, 0.01).status == "pass"
    assert verdict(found, 0.01, "f1_macro").status == "cannot tell"


@pytest.mark.parametrize(
    ("samples", "lost", "gained", "status"),
    [
        (178, 0, 0, "cannot tell"),  # bound 1.50 points
        (267, 0, 0, "cannot tell"),
        (268, 0, 0, "pass"),
        (1000, 4, 0, "pass"),  # bound 0.89
        (1000, 5, 0, "cannot tell"),  # drop 0.5, bound 1.02
        (1000, 10, 0, "cannot tell"),  # a drop of exactly what is allowed
        (1000, 11, 0, "fail"),
        (1000, 0, 40, "pass"),
        (3, 1, 0, "fail"),
    ],
)
def test_a_verdict_passes_what_is_shown_fails_what_is_seen_and_else_cannot_tell(
    samples, lost, gained, status
):
    assert verdict(compared(samples, lost, gained), 0.01).status == status
    # the classes are balanced, so macro F1 moves as accuracy does
    assert verdict(compared(samples - samples % 3, 0, 0), 0.01, "f1_macro").status in {
        "pass" if samples >= 270 else "cannot tell"
    }


def test_the_sentence_says_how_many_samples_would_do():
    sentence = verdict(compared(178), 0.01).sentence
    assert "178 samples cannot show a loss below 1 point" in sentence
    assert "at most 1.5 points" in sentence
    assert "about 268 would" in sentence
    assert "about 2" in verdict(compared(177), 0.01, "f1_macro").sentence


def test_the_sentence_of_a_loss_says_how_large_it_is_and_may_be():
    sentence = verdict(compared(1000, 20), 0.01).sentence
    assert "loses 2 points of accuracy on 1,000 samples" in sentence
    assert "more than the 1 point allowed" in sentence
    assert "loses 0.4 points" in verdict(compared(1000, 4), 0.01).sentence
    assert "at most 0.89 points" in verdict(compared(1000, 4), 0.01).sentence
    assert "gains 4 points" in verdict(compared(1000, 0, 40), 0.01).sentence


def test_a_drop_over_the_limit_never_reads_as_the_limit():
    # 10.01 points against 10
    found = compared(99_900, 10_001)
    assert verdict(found, 0.1001).sentence.startswith("It loses 10.02 points")


def test_a_class_that_loses_too_much_fails_what_else_would_pass():
    found = compared(3000, 3)  # one sample of each class of 1000
    assert verdict(found, 0.01, max_class_drop=0.001).status == "pass"
    failed = verdict(found, 0.01, max_class_drop=0.0005)
    assert failed.status == "fail"
    assert "class 'a' (1,000 samples) loses 0.1 points of recall" in failed.sentence


@pytest.mark.parametrize("limits", [(-0.1, None), (1.5, None), (math.nan, None), (0.01, 2.0)])
def test_a_limit_outside_0_to_1_is_refused(limits):
    with pytest.raises(ConfigError, match="share between 0 and 1"):
        verdict(compared(30), limits[0], max_class_drop=limits[1])


def test_what_is_not_probabilities_is_refused_by_name():
    truth = np.array([0, 1])
    good = sure(truth, 2)
    with pytest.raises(DataError, match=r"candidate probabilities: .*row 1 sums to nan"):
        compare(truth, good, np.array([[0.5, 0.5], [np.nan, 0.5]]), ["a", "b"])
    with pytest.raises(DataError, match=r"reference probabilities: .*\(2, 2\)"):
        compare(truth, good[:1], good, ["a", "b"])
    with pytest.raises(DataError, match="truth: no samples"):
        compare(truth[:0], good[:0], good[:0], ["a", "b"])


def test_the_type_of_the_probabilities_does_not_change_the_log_loss():
    truth = np.array([0, 1, 0])
    sharp = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = compare(truth, sharp, sharp.astype(np.float32), ["a", "b"])
    assert found.log_loss_change == 0.0


def test_a_comparison_comes_back_from_its_mapping():
    found = compared(100, 2, 1)
    assert from_mapping(Comparison, to_mapping(found), where="search.json") == found


def test_the_modules_need_neither_torch_nor_sklearn():
    code = (
        "import sys; sys.modules.update(torch=None, sklearn=None, scipy=None, matplotlib=None);"
        "import edgetune.tasks.paired"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
