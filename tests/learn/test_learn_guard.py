"""What a candidate may lose: each rule at its edge, counted by hand."""

import json

import numpy as np
import pytest

from edgetune.errors import ConfigError, DataError
from edgetune.runtime.learn.guard import (
    CANARY,
    FACTORY,
    HOLDOUT,
    Evidence,
    PairedTest,
    Rules,
    Verdict,
    fewest_samples,
    judge,
)
from edgetune.runtime.records import from_mapping, to_mapping

RULES = Rules()


def evidence(samples, lost=0, gained=0, classes=1):
    """The first samples are lost, the next gained; a wrong answer is the next class."""
    truth = np.arange(samples) % classes
    before, after = truth.copy(), truth.copy()
    after[:lost] += 1
    before[lost : lost + gained] += 1
    return Evidence(truth=truth, before=before, after=after)


def of_class(support, lost, gained=0, *, rest=1000):
    """Class 1 with `support` samples; `rest` of class 0, on which nothing changes."""
    found = evidence(support, lost, gained)
    same = np.zeros(rest, int)
    return Evidence(
        truth=np.concatenate((same, found.truth + 1)),
        before=np.concatenate((same, found.before + 1)),
        after=np.concatenate((same, found.after + 1)),
    )


def named(verdict, name):
    (test,) = [test for test in verdict.tests if test.name == name]
    return test


@pytest.mark.parametrize(
    ("samples", "lost", "accepted"),
    [
        # docs/guide.md has the table; 1.645^2 / (n + 1.645^2) is 0.02 at n = 132.6
        (132, 0, False), (133, 0, True), (221, 1, False), (222, 1, True),
        (299, 2, False), (300, 2, True), (372, 3, False), (373, 3, True),
    ],
)  # fmt: skip
def test_a_canary_has_to_prove_that_the_margin_holds(samples, lost, accepted):
    assert judge(evidence(samples, lost), None, RULES).accepted is accepted


def test_a_canary_is_judged_by_the_published_bound():
    # Tango 1998, lenses: 0 and 1 of 44 differ, 90 % interval (two-sided) from -0.096 to 0.037
    lenses = evidence(44, lost=0, gained=1)
    assert named(judge(lenses, None, RULES), CANARY).bound == pytest.approx(0.037, abs=0.0005)
    assert judge(lenses, None, Rules(margin=0.0375)).accepted
    assert not judge(lenses, None, Rules(margin=0.0365)).accepted


def test_fewest_samples_are_those_that_an_identical_candidate_passes_with():
    assert fewest_samples(RULES) == 133
    assert fewest_samples(Rules(margin=0.01)) == 268
    assert fewest_samples(Rules(margin=0.0)) is None


def test_a_test_counts_what_a_person_counts():
    found = judge(evidence(1000, lost=5, gained=3), None, RULES)
    (test,) = [test for test in found.tests if test.name == CANARY]
    assert (test.rule, test.samples, test.lost, test.gained) == ("bound", 1000, 5, 3)
    assert (test.drop, test.limit, test.passed) == (0.002, 0.02, True)


def test_what_both_get_wrong_is_no_loss():
    wrong = np.ones(200, int)
    both = Evidence(truth=np.zeros(200, int), before=wrong, after=wrong + 1)
    assert judge(both, None, RULES).accepted


@pytest.mark.parametrize(
    ("samples", "lost", "gained", "accepted"),
    [
        (1, 1, 0, True), (5, 0, 0, True), (5, 2, 0, True), (5, 3, 0, False), (5, 3, 1, True),
        (299, 2, 0, True), (299, 3, 0, False), (299, 30, 28, True), (299, 30, 27, False),
    ],
)  # fmt: skip
def test_a_small_holdout_objects_only_to_more_than_two_lost_net(samples, lost, gained, accepted):
    found = judge(evidence(400), evidence(samples, lost, gained), RULES)
    assert found.accepted is accepted
    assert named(found, HOLDOUT).rule == "count"


def test_a_large_holdout_has_to_prove_as_the_canary_does():
    assert judge(evidence(400), evidence(300, lost=2), RULES).accepted
    assert not judge(evidence(400), evidence(300, lost=3), RULES).accepted
    assert not judge(evidence(400), evidence(300, lost=8, gained=7), RULES).accepted
    assert named(judge(evidence(400), evidence(300), RULES), HOLDOUT).rule == "bound"


@pytest.mark.parametrize("margin", [0.01, 0.02, 0.1])
def test_a_holdout_that_grows_never_tolerates_fewer_lost_samples(margin):
    rules = Rules(margin=margin, class_floor=1.0)
    canary = evidence(1000)

    def tolerated(samples):
        lost = 0
        while lost < samples and judge(canary, evidence(samples, lost + 1), rules).accepted:
            lost += 1
        return lost

    # proof takes over at 602, 300 and 58
    sizes = (3, 10, 57, 58, 120, 133, 299, 300, 400, 601, 602)
    found = [tolerated(samples) for samples in sizes]
    assert found == sorted(found)
    assert found[:3] == [2, 2, 2]


def test_a_holdout_cannot_make_up_for_a_canary():
    lost = evidence(400, lost=20)
    assert judge(lost, evidence(400, gained=300), RULES).reasons == judge(lost, None, RULES).reasons


def test_without_a_canary_the_holdout_has_to_prove():
    assert not judge(None, evidence(50), RULES).accepted
    assert judge(None, evidence(133), RULES).accepted


def test_without_any_sample_nothing_is_accepted():
    for nothing in (None, evidence(0)):
        found = judge(nothing, nothing, RULES)
        assert (found.accepted, found.tests) == (False, ())
        assert "no sample to judge" in found.reasons[0]


@pytest.mark.parametrize(
    ("support", "lost", "gained", "accepted"),
    [
        # 15 % of 40 is 6; of 10 it is 1.5, but two may be chance
        (40, 6, 0, True), (40, 7, 0, False), (40, 7, 1, True),
        (10, 1, 0, True), (10, 2, 0, True), (10, 3, 0, False),
        (3, 3, 0, False), (2, 2, 0, True), (1, 1, 0, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["canary", "holdout"])
def test_no_class_falls_through_its_floor(support, lost, gained, accepted, where):
    judged = of_class(support, lost, gained)
    sets = (judged, None) if where == "canary" else (evidence(400), judged)
    found = judge(*sets, RULES, ("rest", "rare"))
    assert found.accepted is accepted
    test = named(found, f"{where}, class 'rare'")
    assert (test.passed, test.samples, test.lost, test.gained) == (accepted, support, lost, gained)


def test_a_class_that_fails_is_named_before_one_that_loses_a_larger_share():
    # both of class 0's two samples, 7 of the 40 of class 1
    truth = np.repeat([0, 1, 2], [2, 40, 1000])
    after = truth.copy()
    after[:9] = 2
    found = judge(Evidence(truth=truth, before=truth, after=after), None, RULES)
    assert [test.name for test in found.tests] == ["canary", "canary, class '1'"]
    assert not found.accepted


def test_all_classes_that_fall_through_are_counted():
    truth = np.repeat([0, 1, 2, 3], [40, 40, 40, 2000])
    after = truth.copy()
    after[[*range(7), *range(40, 48), *range(80, 87)]] = 3
    (reason,) = judge(Evidence(truth=truth, before=truth, after=after), None, RULES, "abcd").reasons
    assert "class 'b'" in reason
    assert "and 2 more classes lose too many" in reason


def test_what_a_new_class_gains_cannot_pay_for_what_old_ones_lose():
    old = evidence(20, lost=3)
    new = np.full(30, 2)
    both = Evidence(
        truth=np.concatenate((old.truth, new)),
        before=np.concatenate((old.before, np.full(30, -1))),
        after=np.concatenate((old.after, new)),
    )
    found = judge(evidence(400), both, RULES)
    assert not found.accepted
    assert named(found, HOLDOUT).samples == 20


def test_losses_that_each_pass_do_not_add_up_against_the_factory_state():
    truth = np.zeros(1000, int)
    factory, before, after = (truth.copy() for _ in range(3))
    before[:40] = 1  # 40 lost by earlier updates
    after[:45] = 1
    against_live = Evidence(truth=truth, before=before, after=after)
    assert judge(against_live, None, RULES).accepted
    both = Evidence(truth=truth, before=before, after=after, factory=factory)
    found = judge(both, None, RULES)
    assert [test.passed for test in found.tests if test.name == FACTORY] == [False]
    assert not found.accepted
    assert judge(both, None, Rules(factory_margin=0.06)).accepted


def test_candidates_that_lose_the_margin_pass_about_1_time_in_20():
    random = np.random.default_rng(5)
    tables = random.multinomial(600, (0.03, 0.01, 0.96), size=400)
    rules = Rules(class_floor=1.0)
    passed = [judge(evidence(600, int(b), int(c)), None, rules).accepted for b, c, _ in tables]
    assert np.mean(passed) == pytest.approx(0.05, abs=0.025)


def test_an_equal_candidate_passes_as_often_as_the_docstring_says():
    # 500 samples, 2 % differ: 89 %
    random = np.random.default_rng(6)
    tables = random.multinomial(500, (0.01, 0.01, 0.98), size=400)
    passed = [judge(evidence(500, int(b), int(c)), None, RULES).accepted for b, c, _ in tables]
    assert np.mean(passed) == pytest.approx(0.89, abs=0.05)


def test_reasons_say_what_was_got_and_what_is_allowed():
    (reason,) = judge(evidence(500, lost=20), None, RULES).reasons
    assert reason == (
        "On the 500 samples in the canary the candidate loses 20 samples and gains 0, a loss of"
        " 4 points; 2 points may be lost."
    )
    (reason,) = judge(evidence(100), None, RULES).reasons
    assert "gets the same samples right" in reason
    assert "the loss is at most 2.64 points; about 133 samples" in reason  # 2.7055 / 102.7055
    reasons = judge(evidence(400), evidence(9, lost=4, gained=1), RULES, ["ok"]).reasons
    assert reasons[0] == (
        "On the 9 samples in the holdout the candidate loses 4 samples and gains 1, a loss of"
        " 33.33 points; a holdout of fewer than 300 objects where more than 2 are lost, net."
    )
    assert "the 9 samples of class 'ok' in the holdout" in reasons[1]
    assert len(reasons) == 2  # the canary has nothing against it


def test_an_accepted_candidate_has_its_reasons_too():
    found = judge(evidence(400), evidence(9), RULES)
    assert len(found.reasons) == 2
    assert "2 points may be lost" in found.reasons[0]


def test_a_verdict_goes_into_a_receipt_and_comes_back():
    found = judge(of_class(40, 7), evidence(9, lost=1), RULES)
    text = json.dumps(to_mapping(found), allow_nan=False)
    assert from_mapping(Verdict, json.loads(text), where="receipt") == found
    assert all(isinstance(test, PairedTest) for test in found.tests)


def test_answers_are_not_changed():
    given = of_class(40, 7)
    columns = [given.truth, given.before, given.after]
    copies = [column.copy() for column in columns]
    judge(given, given, RULES)
    for column, copy in zip(columns, copies, strict=True):
        np.testing.assert_array_equal(column, copy)


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("after", np.zeros(4, int), "after: expected 5 class indices"),
        ("after", np.full(5, -1), "after: expected indices of 0"),
        ("before", np.full(5, -2), "before: expected indices of -1"),
        ("truth", np.zeros(5), "float64"),
        ("truth", np.full(5, -1), "truth: expected indices of 0"),
        ("factory", np.zeros((5, 1), int), "factory: expected 5"),
    ],
)
def test_answers_that_cannot_be_are_refused(name, column, message):
    columns = {key: np.zeros(5, int) for key in ("truth", "before", "after")}
    with pytest.raises(DataError, match=message):
        judge(None, Evidence(**(columns | {name: column})), RULES)


@pytest.mark.parametrize(
    "rules",
    [
        Rules(margin=-0.1), Rules(factory_margin=2.0), Rules(class_floor=float("nan")),
        Rules(confidence=95), Rules(slack=-1),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_are_refused(rules):
    with pytest.raises(ConfigError):
        judge(evidence(5), None, rules)
