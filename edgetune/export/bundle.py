"""Export: a run becomes a bundle, or an error says why it must not."""

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from edgetune.bench.evaluate import Answers, answer_bundle, answer_run
from edgetune.bench.latency import BenchReport, bench
from edgetune.data import Dataset, Split
from edgetune.errors import ConfigError, GateError, ResourceError
from edgetune.export.card import model_card
from edgetune.export.graph import export_graph
from edgetune.export.pack import (
    CARD_NAME,
    discard,
    publish,
    write_draft,
    write_goldens,
    write_manifest,
)
from edgetune.export.quantize import CALIBRATION_SAMPLES, QUANTIZERS
from edgetune.profile import DeviceProfile, load_profile
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.manifest import Goldens
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.tasks import DeviceTask
from edgetune.tasks import task_kind
from edgetune.tasks.metrics import PairedDrop, paired_drop
from edgetune.train.run import Run, open_run, run_dataset

Precision = Literal["fp32", "int8"]
Stage = Callable[[str], None]

# the fp32 graph must give torch's logits to this, absolute and relative to the largest logit:
# float32 sums in another order, nothing more
PARITY_TOLERANCE = 1e-3
PARITY_SAMPLES = 32
GOLDEN_SAMPLES = 4
# share of the largest golden logit that a device's logits may be off. float kernels differ in
# the order of sums; int8 rounding turns such a difference into whole steps
GOLDEN_TOLERANCE = {"fp32": 1e-3, "int8": 0.05}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One graph that was built and measured.

    gated: its answers on the validation split, which the gate compares.
    answers: on the test split where the run has one, else on the validation split again.
    Latency is of one sample, on the machine that exported.
    """

    precision: Precision
    folder: Path
    size_bytes: int
    gated: Answers
    answers: Answers
    latency_p50_ms: float
    latency_p95_ms: float
    peak_rss_mib: float | None


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export made and measured.

    parity: largest difference of a logit between torch and the fp32 graph.
    torch: its answers on the split that the candidates' `answers` are of.
    drop: of the bundle against fp32 on the validation split; None for an fp32 bundle.
    notes: what the user should know.
    """

    bundle: Path
    precision: Precision
    profile: str
    size_bytes: int
    parity: float
    torch: Answers
    torch_latency_ms: float
    torch_size_bytes: int
    candidates: tuple[Candidate, ...]
    drop: PairedDrop | None
    notes: tuple[str, ...]


def export(
    run_folder: Path,
    *,
    profile: str = "host",
    output: Path | None = None,
    precision: Precision = "int8",
    max_drop: float = 0.02,
    name: str = "",
    release: int = 1,
    on_stage: Stage | None = None,
) -> ExportResult:
    """Turn a run into a bundle for a device.

    LoRA is merged, preprocessing goes into the graph, the fp32 graph is held against torch on
    real validation samples, then quantized, and both are measured through the device runtime.

    Args:
        run_folder: written by `edgetune.train`.
        profile: name of a device profile, or path of one.
        output: the bundle's folder; must not exist. Default: bundles/NAME-PROFILE.
        precision: "int8", or "fp32" to leave the weights as they are.
        max_drop: largest loss of validation accuracy against fp32, a share in [0, 1].
        name: the bundle's name; default: the run folder's.
        release: the bundle's release counter, 1 or more.
        on_stage: called with what is being done.

    Raises:
        ConfigError: an argument is wrong or the output exists.
        GateError: the graph differs from torch, or int8 loses more than `max_drop`, or a
            budget of the profile is not met. Nothing is written.
    """
    say = on_stage or _silent
    device = load_profile(profile)
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", run_folder.resolve().name)
    output = output or Path("bundles") / f"{name}-{device.name}"
    _check_arguments(device, output, precision, max_drop, release)
    say("opening the run")
    run = open_run(run_folder)
    dataset = run_dataset(run)
    # torch's deterministic graph belongs to the CPU, wherever the run was trained
    run.task.network.cpu()
    output.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        exporter = _Exporter(run, dataset, device, workplace, name, release, say)
        return exporter.export(precision, max_drop, output)
    except OSError as error:
        raise ResourceError(f"{output}: cannot be written: {error}") from error
    finally:
        discard(workplace)


class _Exporter:
    """One export: the run, the device, and a folder for what is made on the way."""

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        profile: DeviceProfile,
        workplace: Path,
        name: str,
        release: int,
        say: Stage,
    ) -> None:
        self.run, self.dataset, self.profile = run, dataset, profile
        self.workplace, self.name, self.release, self.say = workplace, name, release, say
        self.val = dataset.splits["val"]
        # the validation split chose the best epoch, so an honest number comes from another
        self.shown = dataset.splits.get("test", self.val)

    def export(self, precision: Precision, max_drop: float, output: Path) -> ExportResult:
        self.say("writing the graph")
        model = export_graph(self.run.task.graph(self.run.family.output))
        texts = task_kind(self.run.config.task) == "text"
        fp32_folder = self.draft(model, "fp32", max_batch=8 if texts else 1)
        self.say("comparing the graph with torch")
        parity = check_parity(self.run, EdgeModel.load(fp32_folder), self.val)
        self.say(f"measuring torch on {len(self.shown.labels)} {self.shown.name} samples")
        in_torch = answer_run(self.run.task, self.shown, self.run.record.labels)
        candidates = [self.measure("fp32", fp32_folder)]
        drop = None
        notes: list[str] = []
        if precision == "int8":
            kind = self.run.family.int8
            self.say(f"quantizing to int8 ({kind})")
            quantize, max_batch = QUANTIZERS[kind]
            task = EdgeModel.load(fp32_folder).task
            quantized = quantize(model, self.profile, self.calibration(task), self.workplace)
            candidates.append(self.measure("int8", self.draft(quantized, "int8", max_batch)))
            drop = gate(candidates[0].gated, candidates[1].gated, max_drop)
            notes += _speed_note(candidates[0], candidates[1])
        chosen = candidates[-1]
        self.check_budget(chosen)
        self.say("writing the bundle")
        size = self.finish(chosen, candidates[0].answers, in_torch, parity, output)
        return ExportResult(
            bundle=output,
            precision=precision,
            profile=self.profile.name,
            size_bytes=size,
            parity=parity,
            torch=in_torch,
            torch_latency_ms=_torch_latency_ms(self.run, self.val),
            torch_size_bytes=sum(
                p.numel() * p.element_size() for p in self.run.task.network.parameters()
            ),
            candidates=tuple(
                dataclasses.replace(c, folder=output) if c is chosen else c for c in candidates
            ),
            drop=drop,
            notes=tuple(notes),
        )

    def draft(self, model: onnx.ModelProto, precision: Precision, max_batch: int) -> Path:
        """Write a bundle that can be run, with its goldens."""
        folder = self.workplace / precision
        manifest = write_draft(
            folder,
            model,
            name=self.name,
            release=self.release,
            task=self.run.config.task,
            labels=self.run.record.labels,
            precision=precision,
            profile=self.profile,
            options=self.run.task.device_options(),
            files=self.run.task.device_files(),
            max_batch=max_batch,
        )
        edge = EdgeModel.load(folder)
        samples = [self.raw(edge.task, i) for i in _spread(len(self.val.inputs), GOLDEN_SAMPLES)]
        logits = np.concatenate([edge.outputs(s)["logits"] for s in samples])
        write_goldens(folder, samples, logits)
        tolerance = GOLDEN_TOLERANCE[precision] * max(1.0, float(np.abs(logits).max()))
        goldens = Goldens(count=len(samples), tolerance=round(tolerance, 6))
        write_manifest(folder, dataclasses.replace(manifest, goldens=goldens))
        return folder

    def raw(self, task: DeviceTask, index: int) -> Any:
        """Return a validation sample as a golden stores it: a text, or decoded pixels."""
        value = self.val.inputs[index]
        encoded = task.encode(value)
        return encoded.get("image", value)

    def calibration(self, task: DeviceTask) -> Iterator[dict[str, Any]]:
        """Yield training samples, encoded, one a batch."""
        inputs = self.dataset.splits["train"].inputs
        for index in _spread(len(inputs), CALIBRATION_SAMPLES):
            yield task.stack([task.encode(inputs[index])])

    def measure(self, precision: Precision, folder: Path) -> Candidate:
        self.say(f"measuring {precision} through the device runtime")
        model = EdgeModel.load(folder)
        gated = answer_bundle(model, self.val)
        answers = gated if self.shown is self.val else answer_bundle(model, self.shown)
        cost = _bench(folder, self.profile)
        return Candidate(
            precision=precision,
            folder=folder,
            size_bytes=open_bundle(folder).size_bytes,
            gated=gated,
            answers=answers,
            latency_p50_ms=cost.measurement.latency_p50_ms,
            latency_p95_ms=cost.measurement.latency_p95_ms,
            peak_rss_mib=cost.measurement.peak_rss_mib,
        )

    def check_budget(self, chosen: Candidate) -> None:
        """Hold size and memory against the profile's budget.

        Raises:
            GateError: one is over.
        """
        budget, size = self.profile.budget, chosen.size_bytes / 2**20
        if budget.max_size_mib is not None and size > budget.max_size_mib:
            raise GateError(
                f"the bundle is {size:.1f} MiB, profile {self.profile.name} allows"
                f" {budget.max_size_mib:.1f}; choose a smaller model"
            )
        rss = chosen.peak_rss_mib
        if budget.max_rss_mib is not None and rss is not None and rss > budget.max_rss_mib:
            raise GateError(
                f"the bundle takes {rss:.0f} MiB of memory, profile {self.profile.name} allows"
                f" {budget.max_rss_mib:.0f}; choose a smaller model"
            )

    def finish(
        self, chosen: Candidate, reference: Answers, torch: Answers, parity: float, output: Path
    ) -> int:
        """Complete the chosen draft and move it to its place; return its size in bytes."""
        manifest = dataclasses.replace(
            open_bundle(chosen.folder).manifest,
            evaluation=chosen.answers.evaluation(),
            reference=reference.evaluation(),
        )
        card = model_card(
            manifest,
            base_model=self.run.config.model.rstrip("/").rsplit("/", 1)[-1],
            method=self.run.config.method,
            torch=torch.evaluation(),
            parity=parity,
        )
        (chosen.folder / CARD_NAME).write_text(card, encoding="utf-8")
        write_manifest(chosen.folder, manifest)
        EdgeModel.load(chosen.folder, check="full").self_test()
        size = open_bundle(chosen.folder).size_bytes
        publish(chosen.folder, output)
        return size


def check_parity(run: Run, edge: EdgeModel, split: Split) -> float:
    """Return the largest difference of a logit between torch and the graph on real samples.

    Both start from the raw sample: torch through the training pipeline, the graph through the
    device runtime, so preprocessing is compared too.

    Raises:
        GateError: it exceeds the tolerance.
    """
    samples = run.task.samples(split, training=False)
    worst, scale = 0.0, 1.0
    with torch.inference_mode():
        for index in _spread(len(samples), PARITY_SAMPLES):
            batch = run.task.collate([samples[0, index]])
            batch.pop("labels")
            expected = run.task.logits(run.task.network, batch)[0].numpy()
            found = edge.outputs(split.inputs[index])["logits"][0]
            worst = max(worst, float(np.abs(found - expected).max()))
            scale = max(scale, float(np.abs(expected).max()))
    if not worst <= PARITY_TOLERANCE * scale:
        raise GateError(
            f"the exported graph differs from torch by {worst:.3g} in a logit, allowed"
            f" {PARITY_TOLERANCE * scale:.3g}; this model cannot be exported faithfully"
        )
    return worst


def gate(reference: Answers, candidate: Answers, max_drop: float) -> PairedDrop:
    """Compare a candidate with fp32 on the same samples.

    Raises:
        GateError: its accuracy is lower by more than `max_drop`.
    """
    drop = paired_drop(reference.truth, reference.predicted, candidate.predicted, reference.labels)
    if drop.drop.value > max_drop:
        raise GateError(
            f"int8 loses {100 * drop.drop.value:.2f} points of accuracy against fp32"
            f" (95 % interval {100 * drop.drop.low:.2f} to {100 * drop.drop.high:.2f},"
            f" {drop.samples} samples; worst class {drop.worst_class!r}), allowed"
            f" {100 * max_drop:.2f}; export with --precision fp32, or raise --max-drop"
        )
    return drop


def _check_arguments(
    profile: DeviceProfile, output: Path, precision: Precision, max_drop: float, release: int
) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output {output}: exists already; name another folder")
    if not 0 <= max_drop <= 1:
        raise ConfigError(f"max_drop: expected a share between 0 and 1, got {max_drop:g}")
    if release < 1:
        raise ConfigError(f"release: expected 1 or more, got {release}")
    if precision == "int8" and not profile.precision.int8:
        raise ConfigError(f"profile {profile.name} has no int8; export with --precision fp32")


def _bench(folder: Path, profile: DeviceProfile) -> BenchReport:
    """Measure briefly, in a fresh process, with as many of the profile's threads as there are."""
    cores = load_profile("host").cpu.cores
    threads = min(profile.runtime.intra_op_threads, cores)
    return bench(folder, runs=100, warmup=5, seconds=3.0, threads=threads, cold_starts=0)


def _torch_latency_ms(run: Run, split: Split, runs: int = 20) -> float:
    """Return the median time of torch on one sample, from encoded sample to logits."""
    import time

    samples = run.task.samples(split, training=False)
    times = []
    with torch.inference_mode():
        for index in _spread(len(samples), runs):
            start = time.perf_counter()
            batch = run.task.collate([samples[0, index]])
            batch.pop("labels")
            run.task.logits(run.task.network, batch)
            times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def _speed_note(fp32: Candidate, int8: Candidate) -> list[str]:
    if int8.latency_p50_ms <= fp32.latency_p50_ms:
        return []
    return [
        f"int8 is slower than fp32 on this machine ({int8.latency_p50_ms:.2f} against"
        f" {fp32.latency_p50_ms:.2f} ms); it is smaller, and may be faster on the device:"
        " measure there"
    ]


def _spread(count: int, most: int) -> list[int]:
    """Return up to `most` indices, evenly over range(count)."""
    if count <= most:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, most).round()]


def _silent(text: str) -> None:
    """Say nothing."""
