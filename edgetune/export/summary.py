"""What an export found, as the record that the report, the card and --json show."""

import platform
from collections.abc import Collection, Sequence

import onnxruntime

from edgetune import __version__
from edgetune.export.candidate import Candidate
from edgetune.export.climb import Climb
from edgetune.export.records import (
    Attempt,
    AttemptStatus,
    LayerDamage,
    LayerSaturationRow,
    SearchReport,
)
from edgetune.export.rungs import FP32, Rung
from edgetune.export.search import Lack, closest, pareto_front
from edgetune.profile import DeviceProfile
from edgetune.runtime.device import cpu_model


def search_report(
    climb: Climb, chosen: Candidate | None, *, name: str, seconds: float
) -> SearchReport:
    """Return the whole search as a record.

    Args:
        climb: what was asked, tried and passed over.
        chosen: the one that is shipped, if any.
        name: of the bundle.
        seconds: what all of it took.
    """
    tried, passed_over = climb.tried, climb.passed_over
    profile, allowed = climb.shop.profile, climb.request.allowed
    front = pareto_front([c.facts() for c in tried])
    attempts = [_attempt(c, chosen, allowed, front) for c in tried]
    attempts += [
        Attempt(
            rung=rung.name, description=rung.about, precision=rung.precision,
            status="skipped", reason=reason,
        )
        for rung, reason in passed_over
    ]  # fmt: skip
    probed = next((c for c in (chosen, *reversed(tried)) if c and c.built.damage), None)
    repaired = next((c for c in (chosen, *reversed(tried)) if c and c.built.saturation), None)
    return SearchReport(
        name=name,
        profile=profile.name,
        budgets=climb.request.budgets,
        attempts=tuple(attempts),
        layers=() if probed is None else _layers(probed),
        saturation=() if repaired is None else _saturation(repaired),
        verdict=verdict_sentence(tried, passed_over, chosen, profile, allowed),
        notes=tuple(climb.notes),
        facts=_facts(profile, tried[0]),
        overrides=()
        if chosen is None
        else tuple(f"{kind}: {sentence}" for kind, sentence in chosen.missing.items()),
        search=climb.request.search,
        seconds=seconds,
    )


def verdict_sentence(
    tried: Sequence[Candidate],
    passed_over: Sequence[tuple[Rung, str]],
    chosen: Candidate | None,
    profile: DeviceProfile,
    allowed: Collection[Lack],
) -> str:
    """Return what came of the search, in one sentence."""
    if chosen is None:
        missing = {
            c.rung.name: {k: s for k, s in c.missing.items() if k not in allowed}
            # of those that lack equally much, the smallest is the nearest
            for c in sorted(tried, key=lambda c: c.size_bytes)
        }
        if not missing[FP32.name]:  # it lacks nothing, but was not asked for
            del missing[FP32.name]
        if not missing:
            return f"nothing was tried for {profile.name}: {passed_over[0][1]}"
        nearest = closest(missing)
        lacking = "; ".join(sentence.rstrip(".") for sentence in missing[nearest].values())
        return (
            f"no candidate for {profile.name} meets every budget; the nearest of {len(tried)} is"
            f" {nearest}: {lacking}"
        )
    if chosen.verdict is None:
        return f"{chosen.rung.name} is shipped: the trained model as it is"
    good = [c for c in tried if not set(c.missing) - set(allowed)]
    why = f", the fastest of {len(good)} that meet every budget" if len(good) > 2 else ""
    return f"{chosen.rung.name} is shipped{why}. {chosen.verdict.sentence}"


def _attempt(
    candidate: Candidate, chosen: Candidate | None, allowed: Collection[Lack], front: list[str]
) -> Attempt:
    counted = [s for kind, s in candidate.missing.items() if kind not in allowed]
    status: AttemptStatus = "failed" if counted else "passed"
    if chosen is not None and candidate.rung is chosen.rung:
        status = "chosen"
    reason = "; ".join(sentence.rstrip(".") for sentence in counted)
    if not reason and candidate.verdict is not None:
        reason = candidate.verdict.sentence
    return Attempt(
        rung=candidate.rung.name,
        description=candidate.rung.about,
        precision=candidate.precision,
        status=status,
        reason=reason,
        size_mib=candidate.size_bytes / 2**20,
        latency_p50_ms=candidate.cost.latency_p50_ms,
        latency_p95_ms=candidate.cost.latency_p95_ms,
        latency_basis=candidate.cost.basis,
        peak_rss_mib=candidate.cost.peak_rss_mib,
        accuracy=candidate.gated.accuracy,
        comparison=candidate.comparison,
        arithmetic=candidate.arithmetic,
        seconds=candidate.seconds,
        cached=candidate.cached,
        pareto=candidate.rung.name in front,
        session_config=dict(candidate.built.session),
    )


def _layers(candidate: Candidate) -> tuple[LayerDamage, ...]:
    kept = set(candidate.built.kept_float)
    repairs = candidate.built.repairs
    return tuple(
        LayerDamage(
            layer=node,
            op=op,
            parameters=parameters,
            sqnr_db=sqnr_db,
            kept="float" if node in kept else repairs.get(node, candidate.precision),
        )
        for node, op, parameters, sqnr_db in candidate.built.damage
    )


def _saturation(candidate: Candidate) -> tuple[LayerSaturationRow, ...]:
    return tuple(
        LayerSaturationRow(
            layer=node,
            candidate_pairs=pairs,
            saturated_share=share,
            worst_error=error,
            repair=candidate.built.repairs.get(node, "none"),
        )
        for node, pairs, share, error in candidate.built.saturation
    )


def _facts(profile: DeviceProfile, reference: Candidate) -> dict[str, str]:
    facts = {
        "profile": f"{profile.name}: {profile.description}",
        "measured on": cpu_model(),
        "gate": f"{len(reference.gated.truth)} samples of the {reference.gated.split.name} split",
        "versions": f"edgetune {__version__}, onnxruntime {onnxruntime.__version__}, Python"
        f" {platform.python_version()}",
    }
    if reference.cost.basis == "estimate":
        facts["latency and memory"] = f"estimates: {reference.cost.note}, not {profile.name}'s"
    return facts
