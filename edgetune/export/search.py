"""Which rung to try next, what a candidate lacks, and which one to take: decisions, no I/O."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgetune.errors import ConfigError
from edgetune.runtime.records import nearest

# what a candidate may lack, and what `--allow` can wave through
Lack = Literal["accuracy", "samples", "latency", "size", "memory", "speed"]
LACKS: tuple[Lack, ...] = ("accuracy", "samples", "latency", "size", "memory", "speed")
# of these, candidates of one shape have the same
COSTS: frozenset[Lack] = frozenset({"latency", "size", "memory", "speed"})
# two timings of one graph differ by as much
NOISE = 0.03


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """What a bundle may cost; None where nothing is asked.

    max_drop: loss of accuracy against fp32, a share; with 95 % confidence it is no larger.
    max_class_drop: loss of any class's recall, a share, as measured.
    Latency is the 95th percentile of one sample a call.
    """

    max_drop: float = 0.02
    max_class_drop: float | None = None
    max_latency_ms: float | None = None
    max_size_mib: float | None = None
    max_rss_mib: float | None = None

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            ConfigError: one is out of bounds.
        """
        for name in ("max_drop", "max_class_drop"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ConfigError(f"{name}: expected a share between 0 and 1, got {share:g}")
        for name in ("max_latency_ms", "max_size_mib", "max_rss_mib"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ConfigError(f"{name}: expected more than 0, got {limit:g}")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a decision needs to know of a measured candidate.

    shape: candidates of one shape cost the same.
    gate: the verdict on its accuracy; "reference" for fp32 itself.
    gate_sentence: why.
    estimated: its latency is no measurement of the profile's device.
    """

    rung: str
    shape: str
    size_mib: float
    latency_p50_ms: float
    latency_p95_ms: float
    peak_rss_mib: float | None
    accuracy: float
    gate: Literal["pass", "fail", "cannot tell", "reference"]
    gate_sentence: str
    estimated: bool


def lacks(facts: Facts, reference: Facts, budgets: Budgets) -> dict[Lack, str]:
    """Return what keeps a candidate from being shipped: kind -> sentence; empty where nothing."""
    found: dict[Lack, str] = {}
    if facts.gate == "fail":
        found["accuracy"] = facts.gate_sentence
    elif facts.gate == "cannot tell":
        found["samples"] = facts.gate_sentence
    about = " (an estimate)" if facts.estimated else ""
    checks: tuple[tuple[Lack, float | None, float | None, str, str], ...] = (
        ("latency", facts.latency_p95_ms, budgets.max_latency_ms, "p95 is", f"ms{about}"),
        ("size", facts.size_mib, budgets.max_size_mib, "the bundle is", "MiB"),
        ("memory", facts.peak_rss_mib, budgets.max_rss_mib, "peak memory is", "MiB"),
    )
    for kind, value, limit, what, unit in checks:
        if value is not None and limit is not None and value > limit:
            found[kind] = f"{what} {value:.4g} {unit}, allowed {limit:.4g}"
    small_enough = budgets.max_size_mib is None or reference.size_mib <= budgets.max_size_mib
    slower = facts.latency_p50_ms > reference.latency_p50_ms * (1 + NOISE)
    if facts.gate != "reference" and slower and small_enough:
        found["speed"] = (
            f"slower than fp32: {facts.latency_p50_ms:.3g} against"
            f" {reference.latency_p50_ms:.3g} ms{about}, and its size is not needed"
        )
    return found


def still_worth(
    rungs: Sequence[tuple[str, str]],
    tried: Mapping[str, frozenset[Lack]],
    shapes: Mapping[str, str],
    lines: Mapping[str, tuple[str, float]] | None = None,
) -> Iterable[tuple[str, str]]:
    """Yield (rung, reason to skip it or "") of those not tried yet, in order.

    Args:
        rungs: (name, shape), cheapest and likeliest first.
        tried: rung -> what it lacked.
        shapes: rung -> shape, of those that were tried.
        lines: rung -> (line, share kept): rungs of a line differ in how much of the network
            they keep, so that less is faster and loses more.
    """
    lines = lines or {}
    dear = {
        shapes[name]: (name, sorted(missing & COSTS))
        for name, missing in tried.items()
        if missing & COSTS and name in shapes
    }
    for name, shape in rungs:
        if name in tried:
            continue
        if shape in dear:
            other, costs = dear[shape]
            yield name, f"costs what {other} costs, which failed on {' and '.join(costs)}"
        else:
            yield name, _settled(name, tried, lines)


def _settled(
    name: str, tried: Mapping[str, frozenset[Lack]], lines: Mapping[str, tuple[str, float]]
) -> str:
    """Return what a rung's line has shown already; "" where only trying tells."""
    if name not in lines:
        return ""
    line, kept = lines[name]
    for other, missing in tried.items():
        other_line, other_kept = lines.get(other, ("", 0.0))
        if other_line != line:
            continue
        if other_kept < kept and not missing:
            return f"{other} keeps less, is faster, and meets every budget"
        if other_kept > kept and missing & {"accuracy", "samples"}:
            return f"keeps less than {other}, which loses too much"
    return ""


def best(candidates: Sequence[Facts]) -> Facts:
    """Return the fastest of candidates that lack nothing; the smaller one where they are even."""
    fastest = min(c.latency_p50_ms for c in candidates)
    even = [c for c in candidates if c.latency_p50_ms <= fastest * (1 + NOISE)]
    return min(even, key=lambda c: (c.size_mib, c.latency_p50_ms))


def pareto_front(candidates: Sequence[Facts]) -> list[str]:
    """Return the rungs that no other beats: in latency, accuracy and size at once."""

    def beaten(a: Facts) -> bool:
        mine = (a.latency_p50_ms, -a.accuracy, a.size_mib)
        return any(
            (other := (b.latency_p50_ms, -b.accuracy, b.size_mib)) != mine
            and all(x <= y for x, y in zip(other, mine, strict=True))
            for b in candidates
        )

    return [a.rung for a in candidates if not beaten(a)]


def closest(missing: Mapping[str, Mapping[Lack, str]]) -> str:
    """Return the rung that lacks the fewest things; a lack of samples weighs less than a loss."""
    weights = {"samples": 0.5, "speed": 0.7}
    return min(missing, key=lambda name: sum(weights.get(kind, 1.0) for kind in missing[name]))


def check_allowed(allow: Iterable[str]) -> tuple[Lack, ...]:
    """Return what `--allow` named.

    Raises:
        ConfigError: a word is none of `LACKS`.
    """
    words = tuple(allow)
    for word in words:
        if word not in LACKS:
            known = ", ".join(LACKS)
            raise ConfigError(f"allow: expected one of {known}, got {word!r}{nearest(word, LACKS)}")
    return tuple(kind for kind in LACKS if kind in words)
