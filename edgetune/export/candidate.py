"""One graph of the ladder, drafted as a bundle, measured and judged."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from edgetune.bench.answers import LabelAnswers, ValueAnswers, thresholds_of
from edgetune.bench.database import find, graph_key, host_ratio
from edgetune.bench.evaluate import Answers, AnyAnswers, answer_bundle, answers_of
from edgetune.bench.latency import bench
from edgetune.data import Split
from edgetune.export.cache import code_key, key_of, model_key, split_key, structure_key
from edgetune.export.learning import compile_learning
from edgetune.export.pack import write_draft, write_goldens, write_manifest
from edgetune.export.records import Arithmetic, LatencyBasis
from edgetune.export.rungs import X64_PRECISION, Rung
from edgetune.export.search import Budgets, Facts, Lack
from edgetune.export.workshop import Built, Source, Workshop, spread
from edgetune.profile import DeviceProfile, host_profile
from edgetune.quantize.arithmetic import emulate, host_arithmetic
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.device import cpu_model
from edgetune.runtime.manifest import Goldens, Manifest
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.tasks import DeviceTask
from edgetune.tasks.paired import Comparison, GatedMetric, Verdict, compare, verdict
from edgetune.tasks.paired_targets import compare_labels, compare_values, value_verdict

# the end of a draft's name whose graph is another CPU's arithmetic written out
EMULATED = "-emulated"
GOLDEN_SAMPLES = 4
# share of the largest golden logit that a device's logits may be off. float kernels differ in
# the order of sums; int8 rounding turns such a difference into whole steps. With calibrated ranges
# residual sums are rounded to codes as well, where x86 and ARM differ in a tie (docs/arm.md): a
# MobileNetV2 was off by 3.6 %
GOLDEN_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2}
INTEGER_TOLERANCE = 0.05
CALIBRATED_TOLERANCE = 0.1
# longest time for the calls that are timed in one process, and for the warm-up before them
TIMING_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Latency of one sample a call in ms and peak memory in MiB, and what they rest on."""

    latency_p50_ms: float
    latency_p95_ms: float
    peak_rss_mib: float | None
    basis: LatencyBasis
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A graph that was made and measured.

    Attributes:
        rung: its row.
        built: the graph and what was found while making it.
        source: the float graph it was made of.
        folder: its draft, a bundle that can be run; of the shipped one, where that lies.
        size_bytes: of the bundle.
        gated: its answers on the validation split, computed as the profile's CPU would.
        arithmetic: how they were computed: "native", or "emulated: ...".
        cost: latency and memory.
        comparison, verdict: against fp32; None for fp32 itself. Of numbers there is only a
            verdict.
        missing: what it lacks: kind -> sentence.
        seconds: what making and measuring it took now.
        cached: everything had been made and measured before.
        answers: on the test split where the run has one, else `gated`; fp32 and the chosen only.
    """

    rung: Rung
    built: Built
    source: Source
    folder: Path
    size_bytes: int
    gated: AnyAnswers
    arithmetic: Arithmetic
    cost: Cost
    comparison: Comparison | None = None
    verdict: Verdict | None = None
    missing: Mapping[Lack, str] = dataclasses.field(default_factory=dict)
    seconds: float
    cached: bool
    answers: AnyAnswers | None = None

    @property
    def precision(self) -> str:
        """Of most of its weights."""
        return self.built.precision

    def facts(self) -> Facts:
        """Return what the search decides by."""
        return Facts(
            rung=self.rung.name,
            shape=self.rung.shape,
            size_mib=self.size_bytes / 2**20,
            latency_p50_ms=self.cost.latency_p50_ms,
            latency_p95_ms=self.cost.latency_p95_ms,
            peak_rss_mib=self.cost.peak_rss_mib,
            accuracy=self.gated.quality,
            gate="reference" if self.verdict is None else self.verdict.status,
            gate_sentence="" if self.verdict is None else self.verdict.sentence,
            estimated=self.cost.basis == "estimate",
        )


class Laboratory:
    """Drafts bundles, measures them, and compares them with fp32."""

    def __init__(self, shop: Workshop, workplace: Path, name: str, release: int) -> None:
        """Write drafts below `workplace`."""
        self.shop, self.workplace, self.name, self.release = shop, workplace, name, release
        self.val = shop.dataset.splits["val"]
        # the validation split chose the best epoch, so an honest number comes from another
        self.shown = shop.dataset.splits.get("test", self.val)
        self._split_keys: dict[str, str] = {}

    def measure(
        self, rung: Rung, source: Source, built: Built, *, made_from_cache: bool
    ) -> Candidate:
        """Draft a bundle of a graph and measure it; the comparison with fp32 comes after."""
        begin = time.monotonic()
        built = self._learnable(built)
        answering, arithmetic = self._as_on_device(built)
        folder = self._draft(rung.name, built.model, built, source)
        faithful = folder
        if answering is not built.model:
            faithful = self._draft(f"{rung.name}{EMULATED}", answering, built, source)
        self._add_goldens(folder, faithful, built)
        gated, known = self.answer(faithful, answering, self.val)
        cost, timed = self._cost(folder, built.model)
        return Candidate(
            rung=rung,
            built=built,
            source=source,
            folder=folder,
            size_bytes=open_bundle(folder).size_bytes,
            gated=gated,
            arithmetic=arithmetic,
            cost=cost,
            seconds=time.monotonic() - begin,
            cached=made_from_cache and known and timed,
        )

    def _learnable(self, built: Built) -> Built:
        """Return the graph with what is to learn as inputs, and its training step."""
        if self.shop.learn is None:
            return built
        compiled = compile_learning(self.shop.learn, built.model)
        return dataclasses.replace(built, model=compiled.model, compiled=compiled)

    def with_answers(self, candidate: Candidate) -> Candidate:
        """Return the candidate with its answers on the split that is shown."""
        if self.shown is self.val:
            return dataclasses.replace(candidate, answers=candidate.gated)
        answering, _ = self._as_on_device(candidate.built)
        answers, _ = self.answer(self.faithful(candidate), answering, self.shown)
        return dataclasses.replace(candidate, answers=answers)

    def faithful(self, candidate: Candidate) -> Path:
        """Return the draft that answers here as the candidate does on the profile's CPU."""
        if candidate.arithmetic == "native":
            return candidate.folder
        return self.workplace / f"{candidate.rung.name}{EMULATED}"

    def answer(self, folder: Path, model: onnx.ModelProto, split: Split) -> tuple[AnyAnswers, bool]:
        """Return a bundle's answers on a split, and whether they were known."""
        labels = self.shop.run.record.labels
        edge = EdgeModel.load(folder)
        key = key_of(
            code_key(), model_key(model), self._split_key(split), dict(edge.manifest.options),
            list(labels), onnxruntime.__version__, cpu_model(),
        )  # fmt: skip

        def make() -> Any:
            self.shop.say(f"answering {len(split.labels)} {split.name} samples: {folder.name}")
            return answer_bundle(edge, split).raw

        raw, known = self.shop.cache.array("answers", key, make)
        return answers_of(raw, split, labels, threshold=thresholds_of(edge.manifest)), known

    def device_task(self, built: Built, source: Source) -> DeviceTask:
        """Return the device half of the task, by way of a first draft."""
        return EdgeModel.load(self._draft("task", built.model, built, source)).task

    def _as_on_device(self, built: Built) -> tuple[onnx.ModelProto, Arithmetic]:
        """Return the graph that answers here as the profile's CPU answers."""
        wanted = self.shop.profile.cpu.int8
        if built.session.get(X64_PRECISION) == "1":
            wanted = "exact"
        if built.precision not in ("int8", "int4") or wanted == host_arithmetic():
            return built.model, "native"
        emulated = emulate(built.model, wanted)
        if emulated is built.model:
            return built.model, "native"  # nothing in it that the CPUs do differently
        return emulated, "emulated: exact" if wanted == "exact" else "emulated: saturates"

    def _draft(self, name: str, model: onnx.ModelProto, built: Built, source: Source) -> Path:
        folder = self.workplace / name
        if not folder.exists():
            write_draft(
                folder,
                model,
                name=self.name,
                release=self.release,
                task=self.shop.run.config.task,
                labels=self.shop.run.record.labels,
                precision=built.precision,
                profile=self.shop.profile,
                options=source.task.device_options(),
                files=source.task.device_files(),
                max_batch=built.max_batch,
                session_config=built.session,
            )
        return folder

    def _add_goldens(self, folder: Path, faithful: Path, built: Built) -> None:
        """Store what the profile's CPU answers, for the device to compare with."""
        edge = EdgeModel.load(faithful)
        samples = [
            raw_sample(edge.task, self.val, i) for i in spread(len(self.val.inputs), GOLDEN_SAMPLES)
        ]
        encoded = [edge.task.encode(sample) for sample in samples]
        logits = np.concatenate([edge.run(edge.task.stack([e]))["logits"] for e in encoded])
        write_goldens(folder, samples, encoded, logits)
        tolerance = golden_share(built) * max(1.0, float(np.abs(logits).max()))
        manifest = open_bundle(folder).manifest
        goldens = Goldens(count=len(samples), tolerance=round(tolerance, 6))
        write_manifest(folder, dataclasses.replace(manifest, goldens=goldens))

    def _cost(self, folder: Path, model: onnx.ModelProto) -> tuple[Cost, bool]:
        manifest = open_bundle(folder).manifest
        threads = _threads(self.shop.profile)
        key = key_of(
            structure_key(model), dict(manifest.session.config), cpu_model(), str(threads),
            onnxruntime.__version__, code_key(),
        )  # fmt: skip

        def make() -> Any:
            self.shop.say(f"timing {folder.name} in a fresh process, {threads} threads")
            # other work on the machine only ever adds to a time: the better of two counts
            runs = [_bench(folder, threads) for _ in range(2)]
            return [min(r[0] for r in runs), min(r[1] for r in runs), runs[0][2]]

        (p50, p95, rss), known = self.shop.cache.json("cost", key, make)
        return cost_on(self.shop.profile, manifest, p50, p95, rss), known

    def _split_key(self, split: Split) -> str:
        if split.name not in self._split_keys:
            self._split_keys[split.name] = split_key(split)
        return self._split_keys[split.name]


def golden_share(built: Built) -> float:
    """Return the share of the largest golden logit that a device's logits may be off."""
    types = {node.op_type for node in built.model.graph.node}
    calibrated = "QuantizeLinear" in types and "DynamicQuantizeLinear" not in types
    integer = CALIBRATED_TOLERANCE if calibrated else INTEGER_TOLERANCE
    return GOLDEN_TOLERANCE.get(built.precision, integer)


def cost_on(
    profile: DeviceProfile, manifest: Manifest, p50_ms: float, p95_ms: float, rss_mib: float | None
) -> Cost:
    """Return what a bundle costs on a profile's device, given what it costs here.

    The profile `host` is this machine. For another, a measurement on the device counts
    (`edgetune bench --target`); else this machine's figures serve as an estimate, scaled where
    some graph was measured on both.
    """
    if profile.name == "host":
        return Cost(
            latency_p50_ms=p50_ms,
            latency_p95_ms=p95_ms,
            peak_rss_mib=rss_mib,
            basis="measured here",
        )
    measured = find(graph_key(manifest), profile=profile.name)
    if measured is not None:
        return Cost(
            latency_p50_ms=measured.latency_p50_ms,
            latency_p95_ms=measured.latency_p95_ms,
            peak_rss_mib=measured.peak_rss_mib if measured.peak_rss_mib is not None else rss_mib,
            basis="measured on target",
            note=f"{measured.target}, {measured.threads} threads",
        )
    ratio = host_ratio(profile.name)
    factor = ratio.ratio if ratio else 1.0
    return Cost(
        latency_p50_ms=p50_ms * factor,
        latency_p95_ms=p95_ms * factor,
        peak_rss_mib=rss_mib,
        basis="estimate",
        note=f"this machine's times {factor:.2f}, seen on {ratio.graphs} graphs"
        if ratio
        else "this machine's",
    )


def judged(
    candidate: Candidate, reference: Candidate, budgets: Budgets, metric: GatedMetric
) -> Candidate:
    """Return the candidate with its comparison with fp32 and the verdict.

    Several labels at once are judged by the samples of which all are right, numbers by their mean
    absolute error; see docs/adr/0014.
    """
    before, after = reference.gated, candidate.gated
    if isinstance(before, ValueAnswers):
        found = compare_values(before.truth, before.predicted, after.raw)
        return dataclasses.replace(candidate, verdict=value_verdict(found, budgets.max_drop))
    if isinstance(before, LabelAnswers):
        metric = "accuracy"
        comparison = compare_labels(
            before.truth, before.probabilities, after.raw, before.labels,
            thresholds=before.threshold,
        )  # fmt: skip
    else:
        assert isinstance(before, Answers)
        comparison = compare(before.truth, before.probabilities, after.raw, after.labels)
    decision = verdict(comparison, budgets.max_drop, metric, budgets.max_class_drop)
    return dataclasses.replace(candidate, comparison=comparison, verdict=decision)


def raw_sample(task: DeviceTask, split: Split, index: int) -> Any:
    """Return a sample as a golden stores it: a text, or decoded pixels."""
    value = split.inputs[index]
    return task.encode(value).get("image", value)


def _bench(folder: Path, threads: int) -> tuple[float, float, float | None]:
    """Return p50 and p95 in ms and peak memory in MiB of a fresh process."""
    report = bench(
        folder, runs=100, warmup=5, seconds=TIMING_SECONDS, threads=threads, cold_starts=0
    )
    found = report.measurement
    return found.latency_p50_ms, found.latency_p95_ms, found.peak_rss_mib


def _threads(profile: DeviceProfile) -> int:
    """Return as many of the profile's threads as this machine has."""
    return min(profile.runtime.intra_op_threads, host_profile().cpu.cores)
