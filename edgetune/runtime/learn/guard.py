"""May a candidate replace the live state? Only if it isn't worse, on samples kept apart.

Pure functions of counts: who predicts, and on what, is the caller's business. Two sets judge:
the *canary*, signed samples of the factory's classes that ship with the bundle, and the
*holdout*, labelled samples that the device itself has set aside. Both states answer the same
samples, so that only those count on which they differ (see edgetune.runtime.proportions).

Three rules, in words:

1. A large set has to *prove* that at most `margin` of the accuracy is lost: the one-sided upper
   bound of the loss (Tango 1998) is at most `margin`. The canary always has to.
2. A small holdout can't prove that (with 5 samples the bound is 35 points even where the states
   agree on all), so it only *objects*: where more than `slack` samples are lost, net of those
   gained. It is small where `slack` lost samples and no other difference would fail rule 1: so
   a holdout that grows never tolerates less of a candidate that only loses.
   3 lost and none gained is also about where a loss stops looking like chance (z = 1.73).
3. In no class is more than `class_floor` of its samples lost, nor more than `slack`, both net.
   One or two odd samples thus decide nothing, and a class of 2 samples or less is not guarded.

What new classes gain can't pay for what old ones lose: a sample whose class the live state
doesn't know can't be lost by it, and is left out.

What it costs and what it can't see, at the defaults (a margin of 2 points, 95 %):

- A canary passes an equal candidate from 133 samples on if the states agree everywhere; from 222
  if 1 sample is lost, 300 for 2, 373 for 3 (none gained). A smaller canary lets nothing through;
  `fewest_samples` says so beforehand.
- A candidate just as good that differs on some samples, as often to the better as to the worse,
  passes on a canary of 300, 500 and 1000 samples with a chance of 86, 97 and 100 % where it
  differs on 1 % of them, 69, 89 and 99 % on 2 %, 48, 69 and 91 % on 4 %, 28, 39 and 65 % on 10 %.
- A candidate that truly loses the margin passes 1 time in 20, each time one is tried. Losses of
  less than the margin pass often, and add up over many promotions: against that the canary is
  judged a second time against the factory state, with a margin of its own.
- A small holdout refuses 1 in 8 of the equal candidates that differ on 3 of its samples, and
  lets those pass that lose no more than 2 of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, DataError
from edgetune.runtime.proportions import (
    check_share,
    samples_affording,
    samples_needed,
    tango_bound,
)

IntArray = npt.NDArray[np.integer[Any]]
# what is compared with the limit of a test: the upper bound of the loss, or the loss as counted
Rule = Literal["bound", "count"]

CANARY, FACTORY, HOLDOUT = "canary", "canary against the factory state", "holdout"
UNKNOWN = -1
# a loss of exactly the limit is not over it for the last bit of a division
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the states answer on the same samples; indices are into the candidate's labels.

    truth: classes, shape (n,). before: classes that the live state predicts, shape (n,); -1
    where the live state doesn't know the sample's class: such samples are not counted. -1 may
    also stand for a prediction that is no label of the candidate's. after: classes that the
    candidate predicts, shape (n,). factory: as `before`, of the factory state; None where the
    candidate is not to be compared with it.
    """

    truth: IntArray
    before: IntArray
    after: IntArray
    factory: IntArray | None = None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a candidate may lose. Shares lie in [0, 1].

    margin: largest loss of accuracy against the live state. factory_margin: the same against
    the factory state, on the canary. confidence: one-sided, of the bounds. class_floor: largest
    loss of a class's recall, as counted. slack: samples, net, whose loss is taken for chance in
    a small holdout and in a class.
    """

    margin: float = 0.02
    factory_margin: float = 0.05
    confidence: float = 0.95
    class_floor: float = 0.15
    slack: int = 2


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """One comparison of two states on the same samples.

    name: of the set, and of the class where the test is of one. rule: "bound" if `bound` may be
    at most `limit`, "count" if `drop` may. samples: how many counted. lost: that only the state
    in place gets right. gained: that only the candidate gets right. drop: (lost - gained) /
    samples. bound: its one-sided upper bound. limit: a share of the samples.
    """

    name: str
    rule: Rule
    samples: int
    lost: int
    gained: int
    drop: float
    bound: float
    limit: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a candidate may replace the live state, and why, in sentences.

    reasons: what speaks against it; of an accepted one, what spoke for it. tests: all that were
    made; of a set's classes only the worst.
    """

    accepted: bool
    reasons: tuple[str, ...]
    tests: tuple[PairedTest, ...]


def judge(
    canary: Evidence | None,
    holdout: Evidence | None,
    rules: Rules,
    labels: Sequence[str] = (),
) -> Verdict:
    """Say whether a candidate may replace the live state; the module's docstring has the rules.

    Without a canary a holdout that is small can't be enough: then it has to prove what the
    canary would, and if there is no holdout either, nothing is accepted.

    Args:
        canary: answers on the bundle's canary samples; None if it has none.
        holdout: answers on the device's own; None if there are none.
        rules: what may be lost.
        labels: the candidate's class names, for the sentences; index i is labels[i].

    Raises:
        DataError: shapes disagree, or an index can't be.
        ConfigError: a rule is out of range.
    """
    _check_rules(rules)
    judged: list[tuple[PairedTest, str]] = []
    canary_counted = False
    if canary is not None:
        counted = _counted(canary)
        canary_counted = len(counted.truth) > 0
        if canary_counted:
            judged.append(_overall(CANARY, counted, rules, rules.margin))
            if counted.factory is not None:
                against = Evidence(truth=counted.truth, before=counted.factory, after=counted.after)
                judged.append(_overall(FACTORY, against, rules, rules.factory_margin))
            judged += _worst_class(CANARY, counted, rules, labels)
    if holdout is not None:
        counted = _counted(holdout)
        if len(counted.truth):
            proof = not canary_counted or not _is_small(len(counted.truth), rules)
            judged.append(
                _overall(HOLDOUT, counted, rules, rules.margin)
                if proof
                else _objection(counted, rules)
            )
            judged += _worst_class(HOLDOUT, counted, rules, labels)
    if not judged:
        return Verdict(
            accepted=False,
            reasons=(
                "There is no sample to judge the candidate by: neither the canary nor the"
                " holdout has one of a class that the live state knows.",
            ),
            tests=(),
        )
    against_it = tuple(sentence for test, sentence in judged if not test.passed)
    for_it = tuple(sentence for _, sentence in judged)
    return Verdict(
        accepted=not against_it,
        reasons=against_it or for_it,
        tests=tuple(test for test, _ in judged),
    )


def fewest_samples(rules: Rules) -> int | None:
    """Return how many canary samples an identical candidate needs to pass; None if none will do.

    Raises:
        ConfigError: a rule is out of range.
    """
    _check_rules(rules)
    return samples_needed(rules.margin, confidence=rules.confidence)


def _overall(name: str, evidence: Evidence, rules: Rules, margin: float) -> tuple[PairedTest, str]:
    """Ask for proof that at most `margin` is lost."""
    lost, gained = _differences(evidence)
    test = _test(name, "bound", len(evidence.truth), lost, gained, margin, rules)
    finding = f"On {_set(name, test.samples)} the candidate {_loses(test)}"
    known = f"with {100 * rules.confidence:g} % confidence {_at_most(test.bound)}"
    if test.passed:
        return test, f"{finding}; {known}, and {_points(margin)} may be lost."
    if test.drop > margin + _ROUNDING:
        return test, f"{finding}; {_points(margin)} may be lost."
    needed = samples_needed(
        margin, lost=lost, gained=gained, samples=test.samples, confidence=rules.confidence
    )
    advice = f"; about {needed:,} samples like these would show it" if needed is not None else ""
    return test, (
        f"{finding}, but that does not show a loss of at most the {_points(margin)} allowed:"
        f" {known}{advice}."
    )


def _objection(evidence: Evidence, rules: Rules) -> tuple[PairedTest, str]:
    """Ask a small holdout whether it objects."""
    lost, gained = _differences(evidence)
    count = len(evidence.truth)
    test = _test(HOLDOUT, "count", count, lost, gained, min(1.0, rules.slack / count), rules)
    full = samples_affording(rules.margin, rules.slack, confidence=rules.confidence)
    fewer = f" of fewer than {full:,}" if full is not None else ""
    return test, (
        f"On {_set(HOLDOUT, count)} the candidate {_loses(test)}; a holdout{fewer} objects where"
        f" more than {rules.slack} are lost, net."
    )


def _worst_class(
    name: str, evidence: Evidence, rules: Rules, labels: Sequence[str]
) -> list[tuple[PairedTest, str]]:
    """Return the test of the class that loses most; of those that fail, if any does.

    Nothing where no class loses more than it gains.
    """
    truth = evidence.truth
    support = np.bincount(truth)  # (classes,)
    was, is_right = evidence.before == truth, evidence.after == truth
    lost = np.bincount(truth, weights=was & ~is_right).astype(np.int64)
    gained = np.bincount(truth, weights=~was & is_right).astype(np.int64)
    net = lost - gained
    allowed = np.maximum(rules.class_floor * support, rules.slack)
    fails = net > allowed + _ROUNDING * support
    drop = net / np.maximum(support, 1)
    worst = int(np.argmax(np.where(fails, drop + 2.0, drop)))  # a drop is at most 1
    if net[worst] <= 0:
        return []
    count = int(support[worst])
    label = labels[worst] if worst < len(labels) else str(worst)
    test = _test(
        f"{name}, class {label!r}",
        "count",
        count,
        int(lost[worst]),
        int(gained[worst]),
        min(1.0, float(allowed[worst]) / count),
        rules,
    )
    others = int(np.sum(fails)) - 1
    more = f", and {others} more {'class loses' if others == 1 else 'classes lose'} too many"
    return [
        (
            test,
            f"On {_set(name, count, f'of class {label!r} ')} the candidate {_loses(test)}; in a"
            f" class, {_points(rules.class_floor)} or {rules.slack} samples, net, are allowed"
            f"{more if others > 0 else ''}.",
        )
    ]


def _test(
    name: str, rule: Rule, samples: int, lost: int, gained: int, limit: float, rules: Rules
) -> PairedTest:
    drop = (lost - gained) / samples
    bound = tango_bound(lost, gained, samples, rules.confidence)
    measured = bound if rule == "bound" else drop
    return PairedTest(
        name=name,
        rule=rule,
        samples=samples,
        lost=lost,
        gained=gained,
        drop=drop,
        bound=bound,
        limit=limit,
        passed=measured <= limit + _ROUNDING,
    )


def _is_small(holdout: int, rules: Rules) -> bool:
    """Say whether `slack` samples lost, and none gained, would fail as proof."""
    return tango_bound(rules.slack, 0, max(holdout, rules.slack), rules.confidence) > rules.margin


def _differences(evidence: Evidence) -> tuple[int, int]:
    """Return how many samples the candidate loses and gains."""
    was, is_right = evidence.before == evidence.truth, evidence.after == evidence.truth
    return int(np.sum(was & ~is_right)), int(np.sum(~was & is_right))


def _counted(evidence: Evidence) -> Evidence:
    """Return the samples whose class the live state knows.

    Raises:
        DataError: shapes disagree, or an index can't be.
    """
    columns = {"truth": evidence.truth, "before": evidence.before, "after": evidence.after}
    if evidence.factory is not None:
        columns["factory"] = evidence.factory
    for name, column in columns.items():
        if column.shape != (len(evidence.truth),) or column.dtype.kind not in "iu":
            raise DataError(
                f"{name}: expected {len(evidence.truth)} class indices, got shape {column.shape}"
                f" of {column.dtype}"
            )
        least = UNKNOWN if name in ("before", "factory") else 0
        if len(column) and column.min() < least:
            raise DataError(f"{name}: expected indices of {least} or more, got {column.min()}")
    known = evidence.before != UNKNOWN
    return Evidence(
        truth=evidence.truth[known],
        before=evidence.before[known],
        after=evidence.after[known],
        factory=None if evidence.factory is None else evidence.factory[known],
    )


def _check_rules(rules: Rules) -> None:
    for name in ("margin", "factory_margin", "class_floor"):
        check_share(name, getattr(rules, name))
    if not 0.0 < rules.confidence < 1.0:
        raise ConfigError(f"confidence: expected a number between 0 and 1, got {rules.confidence}")
    if rules.slack < 0:
        raise ConfigError(f"slack: expected 0 or more samples, got {rules.slack}")


def _set(name: str, samples: int, detail: str = "") -> str:
    """Return "the 200 samples of class 'ok' in the canary"."""
    return f"the {samples:,} {'sample' if samples == 1 else 'samples'} {detail}in the {name}"


def _loses(test: PairedTest) -> str:
    """Return what was found, "loses 3 samples and gains 1, a loss of 0.4 points"."""
    if test.lost == test.gained == 0:
        return "gets the same samples right"
    change = "a loss" if test.drop > 0 else "a gain"
    size = f", {change} of {_points(abs(test.drop))}" if test.drop else ", which cancel"
    lost = f"{test.lost:,} {'sample' if test.lost == 1 else 'samples'}"
    return f"loses {lost} and gains {test.gained:,}{size}"


def _at_most(bound: float) -> str:
    """Return what a bound says, rounded up so that one over its limit never reads as the limit."""
    if bound <= 0:
        return "nothing is lost"
    return f"the loss is at most {_points(math.ceil(1e4 * bound - 1e-9) / 1e4)}"


def _points(share: float) -> str:
    """Return "1 point", "0.25 points"."""
    number = f"{100 * share:.2f}".rstrip("0").rstrip(".")
    return f"{number} point" if number == "1" else f"{number} points"
