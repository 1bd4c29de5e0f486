"""Export: a run becomes a bundle, or an error says why it must not."""

import dataclasses
import re
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from edgetune.autodiff.learnable import DEFAULT_RANK, LearnRequest, parse_request
from edgetune.autodiff.step import Optimizer
from edgetune.bench.evaluate import Answers, AnyAnswers, answer_run
from edgetune.bench.learning import bench_learning
from edgetune.data import Dataset, Split
from edgetune.errors import ConfigError, GateError, ResourceError
from edgetune.export.cache import FOLDER_NAME, Cache
from edgetune.export.candidate import Candidate, Laboratory
from edgetune.export.card import model_card
from edgetune.export.climb import Climb, Request, Search
from edgetune.export.drift import write_baseline
from edgetune.export.learning import (
    canary_note,
    check_learning,
    check_projection,
    describe_learning,
    plan_learning,
    save_learning,
    write_material,
)
from edgetune.export.pack import CARD_NAME, discard, publish, write_manifest
from edgetune.export.records import SearchReport
from edgetune.export.report import ladder_markdown, write_reports
from edgetune.export.rungs import FP32, Rung, rungs_for
from edgetune.export.scores import abstention_sentence, calibrated, fit_abstention, fit_calibration
from edgetune.export.search import Budgets, check_allowed
from edgetune.export.summary import search_report
from edgetune.export.workshop import Say, Workshop, spread
from edgetune.profile import DeviceProfile, load_profile
from edgetune.runtime.bundle import DRIFT_NAME, LEARN_NAME, open_bundle
from edgetune.runtime.manifest import Abstention, Calibration, TrainingStep
from edgetune.runtime.model import EdgeModel
from edgetune.tasks.calibration import check_abstain
from edgetune.tasks.paired import Comparison
from edgetune.train.run import Run, open_run, run_dataset

# what a bundle learns without a training step, and that it learns nothing
STATISTICS, NOTHING = "statistics", "none"

PrecisionChoice = Literal["auto", "fp32", "fp16", "int8", "int4"]

# the fp32 graph must give torch's logits to this, absolute and relative to the largest logit:
# float32 sums in another order, nothing more
PARITY_TOLERANCE = 1e-3
PARITY_SAMPLES = 32


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export made and measured.

    parity: largest difference of a logit between torch and the fp32 graph.
    torch: its answers on the split that the candidates' `answers` are of.
    candidates: fp32 first, then every other that was tried, in the order of trying.
    chosen: the one that was shipped.
    calibration: of its scores; None where they are as the network gives them.
    abstention: from which score on it answers; None where that was not asked for.
    report: what `report.html` shows.
    report_path: where it lies.
    notes: what the user should know.
    """

    bundle: Path
    profile: str
    size_bytes: int
    parity: float
    torch: AnyAnswers
    torch_latency_ms: float
    torch_size_bytes: int
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    calibration: Calibration | None = None
    abstention: Abstention | None = None
    report: SearchReport
    report_path: Path
    notes: tuple[str, ...]

    @property
    def precision(self) -> str:
        """Of most of the bundle's weights."""
        return self.chosen.precision

    @property
    def comparison(self) -> Comparison | None:
        """The bundle against fp32 on the validation split; None for an fp32 bundle."""
        return self.chosen.comparison


def export(
    run_folder: Path,
    *,
    profile: str = "host",
    output: Path | None = None,
    precision: PrecisionChoice = "auto",
    rungs: Collection[str] = (),
    max_drop: float = 0.02,
    max_class_drop: float | None = None,
    max_latency_ms: float | None = None,
    max_size_mib: float | None = None,
    max_rss_mib: float | None = None,
    search: Search = "first",
    time_budget_s: float | None = None,
    allow: Collection[str] = (),
    learn: str = STATISTICS,
    learn_rank: int = DEFAULT_RANK,
    learn_optimizer: Optimizer = "adamw",
    learn_projection: int | None = None,
    calibrate: bool = True,
    abstain: float | None = None,
    name: str = "",
    release: int = 1,
    on_stage: Say | None = None,
) -> ExportResult:
    """Turn a run into a bundle for a device: the fastest graph that answers as the model does.

    LoRA is merged, preprocessing goes into the graph, the fp32 graph is held against torch on
    real validation samples. Then the ladder's rungs are tried, each made, measured and compared
    with fp32 on the validation split, as the profile's arithmetic would answer. All of it is kept
    in the run's folder, so that a second export repeats nothing.

    Args:
        run_folder: written by `edgetune.train`.
        profile: name of a device profile, or path of one.
        output: the bundle's folder; must not exist. Default: bundles/NAME-PROFILE.
        precision: "auto" tries all that the profile has and falls back to fp32; a precision
            named is the only one that is shipped.
        rungs: names of the rungs to try; default: all that suit.
        max_drop: largest loss of validation accuracy against fp32, a share in [0, 1]; the loss
            must be no larger with 95 % confidence.
        max_class_drop: largest loss of recall of any class, a share.
        max_latency_ms: largest 95th percentile of one sample's latency.
        max_size_mib: largest bundle.
        max_rss_mib: largest peak memory of the process. Where one of the three is not given,
            the profile's own budget counts.
        search: "first" takes the first rung that meets every budget, "pareto" tries all that the
            time allows, students too, and takes the fastest.
        time_budget_s: no rung is begun after so many seconds.
        allow: lacks that do not keep a bundle from being shipped: "accuracy", "samples",
            "latency", "size", "memory", "speed". The manifest and the card name them.
        learn: what the bundle can learn on the device: "statistics", the default, new samples and
            classes on frozen features; besides, "head", "last:N" (blocks), "norm", "bias" or
            "lora", each of these three for the last N blocks with ":N", by a training step; "none".
        learn_rank: of LoRA.
        learn_optimizer: of the training step, "adamw" or "sgd" with momentum.
        learn_projection: features go through a fixed random projection to so many, and a ReLU,
            before their statistics are taken; None for no projection.
        calibrate: fit a temperature to the bundle's answers on the validation split, which makes
            its scores probabilities; left out where it does not help. Labels stay the same.
        abstain: accuracy, in (0, 1), that answers must have with 95 % confidence on the
            validation split; those of too low a score are marked as abstained. None: no mark.
        name: the bundle's name; default: the run folder's.
        release: the bundle's release counter, 1 or more.
        on_stage: called with what is being done.

    Raises:
        ConfigError: an argument is wrong or the output exists.
        GateError: the graph differs from torch, no candidate meets every budget, or no score
            keeps answers as accurate as `abstain`. No bundle is written, but the report is.
    """
    # mistakes that can be told at once come before the work
    device = load_profile(profile)
    budgets = Budgets(
        max_drop=max_drop,
        max_class_drop=max_class_drop,
        max_latency_ms=max_latency_ms,
        max_size_mib=max_size_mib,
        max_rss_mib=max_rss_mib,
    )
    check_allowed(allow)
    _learn_request(learn, learn_rank)
    check_projection(learn_projection)
    check_abstain(abstain)
    if output is not None:
        _check_arguments(output, release, time_budget_s)
    run = open_run(run_folder)
    return export_run(
        run,
        run_dataset(run),
        device,
        output=output,
        precision=precision,
        rungs=rungs,
        budgets=budgets,
        search=search,
        time_budget_s=time_budget_s,
        allow=allow,
        learn=learn,
        learn_rank=learn_rank,
        learn_optimizer=learn_optimizer,
        learn_projection=learn_projection,
        calibrate=calibrate,
        abstain=abstain,
        name=name,
        release=release,
        on_stage=on_stage,
    )


def export_run(
    run: Run,
    dataset: Dataset,
    profile: DeviceProfile,
    *,
    output: Path | None = None,
    precision: PrecisionChoice = "auto",
    rungs: Collection[str] = (),
    budgets: Budgets | None = None,
    search: Search = "first",
    time_budget_s: float | None = None,
    allow: Collection[str] = (),
    learn: str = STATISTICS,
    learn_rank: int = DEFAULT_RANK,
    learn_optimizer: Optimizer = "adamw",
    learn_projection: int | None = None,
    calibrate: bool = True,
    abstain: float | None = None,
    name: str = "",
    release: int = 1,
    on_stage: Say | None = None,
) -> ExportResult:
    """Export an opened run and its data; see `export`, whose arguments and errors these are."""
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", run.folder.resolve().name)
    output = output or Path("bundles") / f"{name}-{profile.name}"
    allowed = check_allowed(allow)
    _check_arguments(output, release, time_budget_s)
    request = _learn_request(learn, learn_rank)
    check_abstain(abstain)
    if run.task.target != "classes":
        _refuse_of_classes(run, request, learn_projection, abstain)
    if run.task.target == "values" and budgets is not None and budgets.max_class_drop is not None:
        raise ConfigError(f"max_class_drop: {run.config.task} has no classes; leave it out")
    chosen_rungs = rungs_for(
        profile, run.family.int8, precision=precision, only=rungs, learning=request is not None
    )
    # torch's deterministic graph belongs to the CPU, wherever the run was trained
    run.task.network.cpu()
    output.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        shop = Workshop(run, dataset, profile, Cache(run.folder / FOLDER_NAME), on_stage or _silent)
        if request is not None:
            shop.learn = plan_learning(request, learn_optimizer, run.task, run.family)
        wanted = Request(
            budgets=_with_profile(budgets or Budgets(), profile),
            allowed=allowed,
            search=search,
            named=frozenset(r.name for r in chosen_rungs if rungs or precision == "int4"),
            deadline=time.monotonic() + (time_budget_s or float("inf")),
            fp32_will_do=precision in ("auto", "fp32") and (not rungs or "fp32" in rungs),
        )
        exporter = _Exporter(Laboratory(shop, workplace, name, release), wanted, output)
        exporter.learns, exporter.projection = learn != NOTHING, learn_projection
        if run.task.target != "classes" and exporter.learns:
            exporter.learns = False
            exporter.notes.append(
                "a device cannot teach this bundle anything: that takes one class a sample, and"
                f" {run.config.task} has not"
            )
        exporter.calibrates, exporter.abstain = calibrate, abstain
        return exporter.export(chosen_rungs)
    except OSError as error:
        raise ResourceError(f"{output}: cannot be written: {error}") from error
    finally:
        discard(workplace)


class _Exporter:
    """One export: the climb, the choice, the bundle."""

    def __init__(self, laboratory: Laboratory, request: Request, output: Path) -> None:
        self.laboratory, self.shop = laboratory, laboratory.shop
        self.run, self.say = laboratory.shop.run, laboratory.shop.say
        self.request, self.output = request, output
        self.notes: list[str] = []
        self.learns = False
        self.projection: int | None = None
        self.calibrates = True
        self.abstain: float | None = None
        self.calibration: Calibration | None = None
        self.abstention: Abstention | None = None

    def export(self, rungs: list[Rung]) -> ExportResult:
        begin = time.monotonic()
        self.say("writing the graph")
        climb = Climb(self.laboratory, self.request)
        reference = climb.measure_fp32(self.shop.source("run", lambda: self.run.task))
        self.say("comparing the graph with torch")
        parity = check_parity(self.run, EdgeModel.load(reference.folder), self.laboratory.val)
        shown = self.laboratory.shown
        self.say(f"measuring torch on {len(shown.labels)} {shown.name} samples")
        in_torch = answer_run(self.run.task, shown, self.run.record.labels)
        self.run.task.network.cpu()  # where a GPU answered
        climb.climb(rungs, reference)
        chosen = climb.choose()
        report = search_report(
            climb, chosen, name=self.laboratory.name, seconds=time.monotonic() - begin
        )
        report_path = write_reports(report, self.output)
        if chosen is None:
            raise GateError(f"{report.verdict}; what was tried: {report_path}")
        chosen = self.laboratory.with_answers(chosen)
        reference = self.laboratory.with_answers(reference)
        self.say("writing the bundle")
        size = self._finish(chosen, reference, in_torch, parity, report)
        shipped = dataclasses.replace(chosen, folder=self.output, size_bytes=size)
        return ExportResult(
            bundle=self.output,
            profile=self.shop.profile.name,
            size_bytes=size,
            parity=parity,
            torch=in_torch,
            torch_latency_ms=_torch_latency_ms(self.run, self.laboratory.val),
            torch_size_bytes=sum(
                p.numel() * p.element_size() for p in self.run.task.network.parameters()
            ),
            candidates=tuple(
                shipped if c.rung is chosen.rung else reference if c.rung is FP32 else c
                for c in climb.tried
            ),
            chosen=shipped,
            calibration=self.calibration,
            abstention=self.abstention,
            report=report,
            report_path=report_path,
            notes=(*climb.notes, *self.notes),
        )

    def _finish(
        self,
        chosen: Candidate,
        reference: Candidate,
        torch: AnyAnswers,
        parity: float,
        report: SearchReport,
    ) -> int:
        """Complete the chosen draft and move it to its place; return its size in bytes."""
        assert chosen.answers is not None
        assert reference.answers is not None
        self._settle_scores(chosen, chosen.answers)
        draft = open_bundle(chosen.folder).manifest
        manifest = dataclasses.replace(
            draft,
            calibration=self.calibration,
            abstention=self.abstention,
            device=dataclasses.replace(draft.device, peak_rss_mib=chosen.cost.peak_rss_mib),
            evaluation=chosen.answers.evaluation(),
            reference=reference.answers.evaluation(),
            overrides=tuple(f"{kind}: {chosen.missing[kind]}" for kind in chosen.missing),
        )
        card = model_card(
            manifest,
            base_model=self.run.config.model.rstrip("/").rsplit("/", 1)[-1],
            method=self.run.config.method,
            torch=torch.evaluation(),
            parity=parity,
            ladder=ladder_markdown(report),
            verdict=report.verdict,
        )
        (chosen.folder / CARD_NAME).write_text(card, encoding="utf-8")
        self._add_baseline(chosen)
        if self.learns:
            manifest = dataclasses.replace(manifest, training=self._add_learning(chosen))
        write_manifest(chosen.folder, manifest)
        if self.learns:
            self._check_memory(chosen)
        edge = EdgeModel.load(chosen.folder, check="full")
        if chosen.arithmetic == "native":  # else the goldens are another CPU's answers
            edge.self_test()
        size = open_bundle(chosen.folder).size_bytes
        publish(chosen.folder, self.output)
        return size

    def _settle_scores(self, chosen: Candidate, shown: AnyAnswers) -> None:
        """Fit the temperature and, where it was asked for, the threshold; of one class only."""
        if not isinstance(chosen.gated, Answers) or not isinstance(shown, Answers):
            return
        if self.calibrates:
            self.calibration, sentence = fit_calibration(chosen.gated)
            self.notes.append(sentence)
        if self.abstain is not None:
            validated = calibrated(chosen.gated, self.calibration)
            self.abstention = fit_abstention(validated, self.abstain)
            again = calibrated(shown, self.calibration)
            self.notes.append(abstention_sentence(self.abstention, validated, again))

    def _add_learning(self, chosen: Candidate) -> TrainingStep | None:
        """Add what learning on the device needs; return what the manifest says of its step."""
        shop, training = self.shop, None
        compiled = chosen.built.compiled
        if shop.learn is not None and compiled is not None:
            self.say("holding the training step against torch")
            report = check_learning(
                shop.learn, chosen.source.model, compiled, shop.device_task, self.laboratory.val
            )
            training = describe_learning(shop.learn, compiled, report)
        train, val = shop.dataset.splits["train"], self.laboratory.val
        with EdgeModel.load(self.laboratory.faithful(chosen)) as edge:
            lacks = write_material(
                chosen.folder, edge, train, val, training,
                projection=self.projection, say=self.say,
            )  # fmt: skip
        if compiled is not None:
            save_learning(chosen.folder, compiled)
        path, most = chosen.folder / LEARN_NAME, self.request.budgets.max_size_mib
        size = sum(p.stat().st_size for p in chosen.folder.iterdir())
        if lacks is None and most and size > most * 2**20:
            path.unlink()
            lacks = f"it would be larger than {most:g} MiB"
        if lacks and training is not None:
            raise GateError(f"this bundle cannot learn on the device: {lacks}")
        if lacks:
            self.notes.append(f"a device cannot teach this bundle anything: {lacks}")
        elif note := canary_note(len(val.labels)):
            self.notes.append(note)
        return training

    def _check_memory(self, chosen: Candidate) -> None:
        """Say, or refuse, where learning takes more memory than the device has."""
        if not (chosen.folder / LEARN_NAME).exists():
            return
        self.say("measuring what learning takes, in a fresh process")
        cost = bench_learning(chosen.folder, steps=3)
        most = self.shop.profile.memory.available_mib
        peak = cost.peak_rss_mib
        if peak is not None and peak > most:
            sentence = (
                f"learning takes {peak:.0f} MiB here, {self.shop.profile.name} has {most} MiB"
            )
            if "memory" not in self.request.allowed:
                raise GateError(
                    f"{sentence}; train less (--learn last:1), or ship all the same with"
                    " --allow memory"
                )
            self.notes.append(sentence)

    def _add_baseline(self, chosen: Candidate) -> None:
        """Describe what the bundle answers, so that a device can tell drift from it."""
        if not isinstance(chosen.gated, Answers):
            self.notes.append(
                "a device will see no drift with this bundle: that takes one class a sample, and"
                f" {self.run.config.task} has not"
            )
            return
        self.say("describing its answers, to tell drift by")
        edge = EdgeModel.load(self.laboratory.faithful(chosen))
        temperature = 1.0 if self.calibration is None else self.calibration.temperature
        lacks = write_baseline(chosen.folder, edge, self.laboratory.val, temperature=temperature)
        path, most = chosen.folder / DRIFT_NAME, self.request.budgets.max_size_mib
        if lacks is None and most and chosen.size_bytes + path.stat().st_size > most * 2**20:
            path.unlink()
            lacks = f"it would be larger than {most:g} MiB"
        if lacks:
            self.notes.append(f"a device will see no drift of inputs with this bundle: {lacks}")


def _refuse_of_classes(
    run: Run, request: LearnRequest | None, projection: int | None, abstain: float | None
) -> None:
    """Refuse what is only there for one class a sample.

    Raises:
        ConfigError: it was asked for.
    """
    for given, option in (
        (request is not None, f"learn {request}"),
        (projection is not None, "learn_projection"),
        (abstain is not None, "abstain"),
    ):
        if given:
            raise ConfigError(
                f"{option}: needs one class a sample, and {run.config.task} has not; leave it out"
            )


def _learn_request(learn: str, rank: int) -> LearnRequest | None:
    """Return what a training step is to train; None where there is to be none."""
    if learn in (NOTHING, STATISTICS):
        return None
    return parse_request(learn, rank=rank)


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
        for index in spread(len(samples), PARITY_SAMPLES):
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


def _check_arguments(output: Path, release: int, time_budget_s: float | None) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output {output}: exists already; name another folder")
    if release < 1:
        raise ConfigError(f"release: expected 1 or more, got {release}")
    if time_budget_s is not None and not time_budget_s > 0:
        raise ConfigError(f"time_budget: expected more than 0 s, got {time_budget_s:g}")


def _with_profile(budgets: Budgets, profile: DeviceProfile) -> Budgets:
    """Fill in what was not asked for from the profile."""
    own = profile.budget
    return dataclasses.replace(
        budgets,
        max_latency_ms=budgets.max_latency_ms or own.max_latency_ms,
        max_size_mib=budgets.max_size_mib or own.max_size_mib,
        max_rss_mib=budgets.max_rss_mib or own.max_rss_mib,
    )


def _torch_latency_ms(run: Run, split: Split, runs: int = 20) -> float:
    """Return the median time of torch on one sample, from encoded sample to logits."""
    import time

    samples = run.task.samples(split, training=False)
    times = []
    with torch.inference_mode():
        for index in spread(len(samples), runs):
            start = time.perf_counter()
            batch = run.task.collate([samples[0, index]])
            batch.pop("labels")
            run.task.logits(run.task.network, batch)
            times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def _silent(text: str) -> None:
    """Say nothing."""
