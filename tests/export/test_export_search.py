import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.errors import ConfigError
from edgetune.export.search import (
    LACKS,
    NOISE,
    Budgets,
    Facts,
    best,
    check_allowed,
    closest,
    lacks,
    pareto_front,
    still_worth,
)

FP32 = Facts(
    rung="fp32", shape="fp32", size_mib=90.0, latency_p50_ms=10.0, latency_p95_ms=12.0,
    peak_rss_mib=300.0, accuracy=0.95, gate="reference", gate_sentence="", estimated=False,
)  # fmt: skip
INT8 = dataclasses.replace(
    FP32, rung="int8", shape="int8", size_mib=23.0, latency_p50_ms=6.0, latency_p95_ms=8.0,
    peak_rss_mib=120.0, gate="pass", gate_sentence="loses at most 1 %",
)  # fmt: skip


def facts(name: str = "int8", **changes: object) -> Facts:
    return dataclasses.replace(INT8, rung=name, **changes)


# what a candidate lacks


def test_a_candidate_within_every_budget_lacks_nothing():
    budgets = Budgets(max_latency_ms=8, max_size_mib=23, max_rss_mib=120)
    assert lacks(INT8, FP32, budgets) == {}
    assert lacks(INT8, FP32, Budgets()) == {}
    assert lacks(FP32, FP32, Budgets()) == {}


def test_latency_is_judged_by_the_95th_percentile():
    found = lacks(facts(latency_p50_ms=1, latency_p95_ms=8.1), FP32, Budgets(max_latency_ms=8))
    assert found == {"latency": "p95 is 8.1 ms, allowed 8"}
    assert lacks(facts(latency_p50_ms=7.9), FP32, Budgets(max_latency_ms=8)) == {}


def test_an_estimated_latency_says_so():
    found = lacks(facts(estimated=True), FP32, Budgets(max_latency_ms=7.5))
    assert found == {"latency": "p95 is 8 ms (an estimate), allowed 7.5"}
    found = lacks(facts(estimated=True, latency_p50_ms=20), FP32, Budgets())
    assert "20 against 10 ms (an estimate)" in found["speed"]


def test_size_and_memory_are_judged_each():
    budgets = Budgets(max_size_mib=22.99, max_rss_mib=119)
    assert lacks(INT8, FP32, budgets) == {
        "size": "the bundle is 23 MiB, allowed 22.99",
        "memory": "peak memory is 120 MiB, allowed 119",
    }


def test_memory_that_was_not_measured_is_not_lacking():
    assert lacks(facts(peak_rss_mib=None), FP32, Budgets(max_rss_mib=1)) == {}


@pytest.mark.parametrize(("gate", "kind"), [("fail", "accuracy"), ("cannot tell", "samples")])
def test_the_gates_sentence_is_the_reason(gate: str, kind: str):
    found = lacks(facts(gate=gate, gate_sentence="loses 5 %"), FP32, Budgets())
    assert found == {kind: "loses 5 %"}


def test_slower_than_fp32_counts_beyond_the_noise_of_timing():
    assert lacks(facts(latency_p50_ms=10 * (1 + NOISE)), FP32, Budgets()) == {}
    found = lacks(facts(latency_p50_ms=10.31), FP32, Budgets())
    assert found == {"speed": "slower than fp32: 10.3 against 10 ms, and its size is not needed"}


def test_slower_is_fine_where_fp32_would_be_too_large():
    slow = facts(latency_p50_ms=30)
    assert lacks(slow, FP32, Budgets(max_size_mib=89.9)) == {}
    assert set(lacks(slow, FP32, Budgets(max_size_mib=90))) == {"speed"}


def test_everything_that_is_lacking_is_named_at_once():
    budgets = Budgets(max_latency_ms=1, max_size_mib=100, max_rss_mib=1)
    found = lacks(facts(gate="fail", latency_p50_ms=50), FP32, budgets)
    assert set(found) == {"accuracy", "latency", "memory", "speed"}


def test_fp32_has_budgets_too():
    assert set(lacks(FP32, FP32, Budgets(max_size_mib=50))) == {"size"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_drop", -0.1), ("max_drop", 1.5), ("max_drop", float("nan")), ("max_class_drop", 2.0),
     ("max_latency_ms", 0.0), ("max_size_mib", -1.0), ("max_rss_mib", float("nan"))],
)  # fmt: skip
def test_budgets_out_of_bounds_are_refused(name: str, value: float):
    with pytest.raises(ConfigError, match=f"^{name}: expected .*, got {value:g}$"):
        Budgets(**{name: value})


# what to try next

LADDER = [("a", "one"), ("b", "one"), ("c", "two"), ("d", "one"), ("e", "two")]


def test_all_are_worth_trying_at_first():
    assert list(still_worth(LADDER, {}, {})) == [(name, "") for name, _ in LADDER]


@pytest.mark.parametrize("missing", [{"accuracy"}, {"samples"}, {"accuracy", "samples"}, set()])
def test_a_loss_of_accuracy_leaves_others_of_the_shape_worth_trying(missing: set):
    found = list(still_worth(LADDER, {"a": frozenset(missing)}, {"a": "one"}))
    assert found == [("b", ""), ("c", ""), ("d", ""), ("e", "")]


@pytest.mark.parametrize("cost", ["latency", "size", "memory", "speed"])
def test_others_of_a_shape_that_costs_too_much_are_skipped(cost: str):
    tried = {"a": frozenset({cost, "accuracy"})}
    why = f"costs what a costs, which failed on {cost}"
    assert list(still_worth(LADDER, tried, {"a": "one"})) == [
        ("b", why), ("c", ""), ("d", why), ("e", ""),
    ]  # fmt: skip


def test_all_costs_that_failed_are_named():
    tried = {"c": frozenset({"speed", "size"})}
    found = dict(still_worth(LADDER, tried, {"c": "two"}))
    assert found["e"] == "costs what c costs, which failed on size and speed"


def test_fp32_which_has_no_shape_rules_nothing_out():
    found = list(still_worth(LADDER, {"fp32": frozenset({"size"})}, {}))
    assert [reason for _, reason in found] == [""] * 5


# which one to take


def test_the_fastest_is_best():
    slow, fast = facts("slow", size_mib=1), facts("fast", latency_p50_ms=5)
    assert best([slow, fast]) is fast
    assert best([fast, slow]) is fast


def test_of_equally_fast_ones_the_smaller_is_best():
    one = facts("one", latency_p50_ms=5.0, size_mib=23)
    two = facts("two", latency_p50_ms=5.1, size_mib=20)  # 2 % slower
    three = facts("three", latency_p50_ms=5.2, size_mib=1)  # 4 % slower
    assert best([one, two, three]) is two
    faster = facts("faster", latency_p50_ms=4.95, size_mib=23)
    assert best([one, faster]) is faster


FACTS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), max_size=12
).map(
    lambda rows: [
        facts(str(i), latency_p50_ms=float(ms), accuracy=share / 4, size_mib=float(mib))
        for i, (ms, share, mib) in enumerate(rows)
    ]
)


@given(FACTS)
def test_the_front_is_what_nothing_dominates(candidates: list[Facts]):
    def dominates(a: Facts, b: Facts) -> bool:
        as_good = (
            a.latency_p50_ms <= b.latency_p50_ms
            and a.accuracy >= b.accuracy
            and a.size_mib <= b.size_mib
        )
        better = (
            a.latency_p50_ms < b.latency_p50_ms
            or a.accuracy > b.accuracy
            or a.size_mib < b.size_mib
        )
        return as_good and better

    front = [c.rung for c in candidates if not any(dominates(other, c) for other in candidates)]
    assert pareto_front(candidates) == front
    assert bool(front) == bool(candidates)


def test_the_closest_lacks_the_fewest_things():
    missing = {
        "two": {"latency": "", "size": ""},
        "accuracy": {"accuracy": ""},
        "none": {"accuracy": "", "samples": ""},
    }
    assert closest(missing) == "accuracy"
    assert closest(missing | {"speed": {"speed": ""}}) == "speed"
    # more samples could still show that it is good
    assert closest(missing | {"speed": {"speed": ""}, "samples": {"samples": ""}}) == "samples"


# what may be waved through


def test_allowed_words_come_in_one_order_and_once():
    assert check_allowed(["size", "accuracy", "size"]) == ("accuracy", "size")
    assert check_allowed([]) == ()
    assert check_allowed(LACKS) == LACKS


def test_an_unknown_word_is_refused_with_the_nearest():
    with pytest.raises(ConfigError) as error:
        check_allowed(["accuracy", "latencies"])
    assert str(error.value) == (
        "allow: expected one of accuracy, samples, latency, size, memory, speed,"
        " got 'latencies'; did you mean 'latency'?"
    )


# lines of students

LINE = {"half": ("depth", 0.5), "third": ("depth", 0.33), "most": ("depth", 0.67)}
STUDENTS = [("half", "half"), ("third", "third"), ("most", "most"), ("other", "other")]


def test_a_student_that_keeps_more_is_not_tried_after_one_that_passed():
    found = dict(still_worth(STUDENTS, {"half": frozenset()}, {"half": "half"}, LINE))
    assert found == {
        "third": "", "other": "", "most": "half keeps less, is faster, and meets every budget",
    }  # fmt: skip


@pytest.mark.parametrize("missing", ["accuracy", "samples"])
def test_a_student_that_keeps_less_is_not_tried_after_one_that_lost_too_much(missing: str):
    found = dict(still_worth(STUDENTS, {"half": frozenset({missing})}, {"half": "half"}, LINE))
    assert found == {
        "third": "keeps less than half, which loses too much", "most": "", "other": "",
    }  # fmt: skip


def test_a_student_that_cost_too_much_says_nothing_of_smaller_ones():
    found = dict(still_worth(STUDENTS, {"half": frozenset({"latency"})}, {"half": "half"}, LINE))
    assert [found["third"], found["most"]] == ["", ""]
