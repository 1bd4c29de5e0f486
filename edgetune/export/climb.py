"""The climb: rung after rung made, measured and judged, until one will do or the time is up."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgetune.errors import ConfigError, DataError, GateError
from edgetune.export.candidate import Candidate, Laboratory, judged
from edgetune.export.rungs import FP32, Rung, build
from edgetune.export.search import Budgets, Lack, best, closest, lacks, still_worth
from edgetune.export.students import student
from edgetune.export.workshop import Source
from edgetune.tasks.proportions import samples_needed

Search = Literal["first", "pareto"]

# a student gets this part of the time that is left
STUDENTS_TO_COME = 3


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a climb.

    allowed: lacks that keep nothing from being shipped.
    search: "first" ends at the first candidate that lacks nothing, "pareto" tries all.
    named: rungs that were asked for by name, tried whatever their place on the ladder.
    deadline: of `time.monotonic`; nothing is begun after it.
    fp32_will_do: the trained model as it is may be shipped where nothing else may.
    """

    budgets: Budgets
    allowed: tuple[Lack, ...]
    search: Search
    named: frozenset[str]
    deadline: float
    fp32_will_do: bool


class Climb:
    """One climb, and what it found.

    tried: every candidate, fp32 first. passed_over: rungs that were not tried, and why.
    notes: what the user should know of the choice.
    """

    def __init__(self, laboratory: Laboratory, request: Request) -> None:
        """Begin at the bottom; nothing is measured yet."""
        self.laboratory, self.shop, self.request = laboratory, laboratory.shop, request
        self.say = self.shop.say
        self.tried: list[Candidate] = []
        self.passed_over: list[tuple[Rung, str]] = []
        self.notes: list[str] = []

    def measure_fp32(self, source: Source) -> Candidate:
        """Measure the fp32 graph, which every other is compared with."""
        built = FP32.make(self.shop, source)
        self.shop.use_device_task(self.laboratory.device_task(built, source))
        reference = self.laboratory.measure(FP32, source, built, made_from_cache=True)
        missing = lacks(reference.facts(), reference.facts(), self.request.budgets)
        reference = dataclasses.replace(reference, missing=missing)
        self.tried.append(reference)
        return reference

    def climb(self, rungs: list[Rung], reference: Candidate) -> None:
        """Try one rung after the other, until one lacks nothing or the time is up."""
        if self.request.search == "pareto":
            rungs = sorted(rungs, key=lambda rung: rung.fallback)  # stable
        for rung in rungs:
            reason = self._skips(rung, rungs)
            candidate = None
            if not reason:
                try:
                    candidate = self._judged(self._try(rung), reference)
                except (ConfigError, DataError, GateError) as error:
                    # a rung may not suit a model (no such parts, values beyond float16)
                    reason = f"cannot be made: {error}"
                    self.say(f"{rung.name}: {reason}")
            if candidate is None:
                self.passed_over.append((rung, reason))
                continue
            self.tried.append(candidate)
            self.say(f"{rung.name}: {self._said(candidate)}")
            if self.request.search == "first" and not self._counted(candidate):
                return

    def _skips(self, rung: Rung, rungs: Sequence[Rung]) -> str:
        """Return why a rung is not worth trying; "" where it is."""
        tried = {c.rung.name: frozenset(self._counted(c)) for c in self.tried}
        shapes = {c.rung.name: c.rung.shape for c in self.tried if c.rung is not FP32}
        lines = {r.name: (r.line, r.kept) for r in rungs if r.line}
        for _, reason in still_worth([(rung.name, rung.shape)], tried, shapes, lines):
            if reason:
                return reason
        if hopeless := self._hopeless():
            return hopeless
        if rung.fallback and rung.name not in self.request.named:
            for candidate in self.tried:
                whole = candidate.rung.source == "run" and candidate.rung is not FP32
                if whole and not {"accuracy", "samples"} & set(self._counted(candidate)):
                    return f"mends a loss that {candidate.rung.name} does not have"
        if rung.explore and rung.name not in self.request.named and not self._explores():
            return "only tried where the others cost too much, or with --search pareto"
        if time.monotonic() > self.request.deadline:
            return "the time budget was spent"
        return ""

    def _judged(self, candidate: Candidate, reference: Candidate) -> Candidate:
        """Return the candidate with its comparison with fp32, the verdict, and what it lacks."""
        by_f1 = self.shop.run.config.metric == "f1_macro"
        budgets = self.request.budgets
        candidate = judged(candidate, reference, budgets, "f1_macro" if by_f1 else "accuracy")
        missing = lacks(candidate.facts(), reference.facts(), budgets)
        return dataclasses.replace(candidate, missing=missing)

    def _hopeless(self) -> str:
        """Return why no candidate at all could be shown to be good enough; "" where it could."""
        if self.laboratory.val.target == "values":
            return ""  # how many samples it takes depends on how errors scatter
        limit = self.request.budgets.max_drop
        needed = samples_needed(limit)
        samples = len(self.laboratory.val.labels)
        if "samples" in self.request.allowed or (needed is not None and needed <= samples):
            return ""
        enough = "no number" if needed is None else f"{needed}"
        return (
            f"{samples} validation samples cannot show a loss of at most {100 * limit:g} points,"
            f" {enough} would, even without one mistake"
        )

    def _explores(self) -> bool:
        """Tell whether a smaller network is wanted: what was tried costs too much."""
        if self.request.search == "pareto":
            return True
        costly = {"latency", "size", "memory"}
        return bool(self.tried) and all(costly & set(self._counted(c)) for c in self.tried)

    def _try(self, rung: Rung) -> Candidate:
        self.say(f"{rung.name}: {rung.about}")
        begin = time.monotonic()
        source = self.shop.source(
            rung.source,
            lambda: student(self.shop, rung.source, seconds=self._share_of_time()),
        )
        built, cached = build(self.shop, rung, source)
        candidate = self.laboratory.measure(rung, source, built, made_from_cache=cached)
        return dataclasses.replace(candidate, seconds=time.monotonic() - begin)

    def _share_of_time(self) -> float:
        """Return the seconds that a student may take: others are to follow."""
        return (self.request.deadline - time.monotonic()) / STUDENTS_TO_COME

    def _counted(self, candidate: Candidate) -> list[Lack]:
        """Return what a candidate lacks and nobody allowed."""
        return [kind for kind in candidate.missing if kind not in self.request.allowed]

    def _said(self, candidate: Candidate) -> str:
        for kind in self._counted(candidate):
            return candidate.missing[kind].rstrip(".")
        return "meets every budget"

    def choose(self) -> Candidate | None:
        """Return the candidate to ship, or None; fp32 is the last resort."""
        good = [c for c in self.tried if not self._counted(c)]
        others = [c for c in good if c.rung is not FP32]
        if others:
            fastest = best([c.facts() for c in others]).rung
            return next(c for c in others if c.rung.name == fastest)
        if good and self.request.fp32_will_do:
            if hopeless := self._hopeless():
                self.notes.append(f"fp32 is shipped: {hopeless}")
            elif len(self.tried) > 1:
                nearest_one = self._nearest([c for c in self.tried if c.rung is not FP32])
                self.notes.append(
                    f"fp32 is shipped, since no smaller graph was good enough: the closest,"
                    f" {nearest_one.rung.name}: {self._said(nearest_one)}"
                )
            return good[0]
        return None

    def _nearest(self, candidates: list[Candidate]) -> Candidate:
        name = closest(
            {c.rung.name: {k: c.missing[k] for k in self._counted(c)} for c in candidates}
        )
        return next(c for c in candidates if c.rung.name == name)
