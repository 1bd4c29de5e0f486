"""Small, fast and still right? edgetune's quantization beside onnxruntime's and Optimum's.

    python benchmarks/quantization.py                      four cases, about 3.5 hours on 2 cores
    python benchmarks/quantization.py --only resnet20      may be given again; sst2 only by name
    python benchmarks/quantization.py --keep /tmp/ladder   keeps runs: a second call trains nothing
    python benchmarks/quantization.py --quick --only resnet20      a minute: shows that it works

One checkpoint a case, one machine, one thread. Estimates of a case, without the Pareto search:
banking77 30 minutes (training 10), sst2 30 (training 10), mobilenet 20 (training 3), resnet20 10,
resnet56 15 minutes; the search adds up to --time-budget and the candidate that it is at then.
Progress goes to stderr, Markdown to stdout.
"""

import argparse
import dataclasses
import functools
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# nothing here is fetched but, where asked for, Optimum: the models are local folders
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# read when onnxruntime is imported, which its quantization module below does
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import numpy.typing as npt
import onnx
import torch
from _common import (
    BANKING77,
    CIFAR10,
    FLOWERS,
    MOBILENET_V2,
    SHARED,
    SST2,
    first_rows,
    last_line,
    optimum_python,
    percent,
    points,
    print_heading,
    print_table,
    quit_unable,
    say,
    shared_data,
    text_model,
    thin_out,
    unpack,
    vnni_hider,
    warn_if_busy,
    workplace,
)
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.nn import functional

from edgetune.config import TrainConfig
from edgetune.data import Dataset, DataSource, Split, load_dataset
from edgetune.errors import EdgetuneError
from edgetune.export.bundle import ExportResult, Search, export_run
from edgetune.export.graph import export_graph
from edgetune.export.search import LACKS, NOISE, Budgets
from edgetune.export.workshop import CALIBRATION_SAMPLES, spread
from edgetune.models.families import Family
from edgetune.models.load import Loaded
from edgetune.models.preprocessing import Preprocessing
from edgetune.profile import DeviceProfile, load_profile
from edgetune.quantize.layers import preprocessing_nodes
from edgetune.runtime.bundle import GRAPH_NAME, WEIGHTS_NAME, open_bundle
from edgetune.runtime.measure import peak_rss_mib, summarize, time_calls
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.tasks import DeviceTask
from edgetune.tasks import GraphSpec
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.metrics import Interval, classification_report
from edgetune.tasks.proportions import tango_interval
from edgetune.train import Event, resume, train
from edgetune.train.run import Run, RunRecord, open_run, read_run, run_dataset, versions

IntArray = npt.NDArray[np.int64]
Feeds = dict[str, Any]

EQUAL = 0.003  # accuracies no further apart count as equal, and an int8 may lose as much
CLOSE = 0.01  # the Pareto search is compared with peers that lose no more against it
PARETO_SPEEDUP = 2.0
MINILM_MB = 24.0  # 10^6 bytes, the whole bundle
TIMED_SAMPLES = 32
SST2_ROWS = 6000  # of each class; all 60 599 phrases would only cost time

TEXT = f"""\
All rows of a case are made of one checkpoint. *onnxruntime fp32* is the graph that edgetune
exports, and what onnxruntime's own `quantize_*` is given; static ranges come from the same
{CALIBRATION_SAMPLES} training samples on all sides. *defaults* are those of the function; *tuned*
is what its documentation advises for this CPU (pre-processed graph, per channel, u8 activations,
7-bit weights where there is no VNNI). The image preprocessing that edgetune puts into the graph is
left in float for all of them, since other exporters leave it outside; *preprocessing too* shows
the call on the graph as it is. Optimum exports the same weights with its own exporter and
quantizes with its presets, dynamically; *O2, then quantize_dynamic* is what gets both its fusions
and int8. Its image graphs have no preprocessing: they run behind the one that edgetune exports, in
the same timed call.

Accuracy is of the test split, which neither training nor the gate has seen, with its 95 %
bootstrap interval; *lost* is paired, against onnxruntime fp32, in points, with the 95 % score
interval (Tango). Size is of the model's files. Times are of one sample a call on one thread, from
encoded arrays (no tokenizing, no decoding) to logits: every row in a process of its own, the rows
taking turns; medians over the rounds. Memory is that process's peak. edgetune chooses by its
validation split with `max_drop` as given; *first* is `edgetune export`'s default."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is done: the whole thing, or just enough to see that it works.

    samples: of each class and split; None for all. epochs: of training.
    rounds: timing processes of each row; runs, seconds: calls timed in each, and their limit.
    """

    samples: int | None
    epochs: int
    rounds: int
    runs: int
    seconds: float


FULL = Effort(samples=None, epochs=5, rounds=5, runs=200, seconds=4.0)
QUICK = Effort(samples=8, epochs=1, rounds=1, runs=10, seconds=0.5)
QUICK_TIME_BUDGET_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for.

    hider: the library that hides VNNI, or None. hidden: whether times are taken, and accuracy is
    judged, as without VNNI. optimum: the Python that has it, or None and `no_optimum` says why.
    """

    data: Path
    effort: Effort
    max_drop: float
    time_budget_s: float
    hider: Path | None
    hidden: bool
    optimum: Path | None
    no_optimum: str

    def environment(self, *, hidden: bool) -> dict[str, str]:
        """Return a child's environment, in which it sees VNNI or does not."""
        kept = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "PYTHONPATH")}
        kept |= {"ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        return {**kept, "LD_PRELOAD": str(self.hider)} if hidden and self.hider else kept


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fine-tuned model and its data; `checkpoint` says whether transformers can save it."""

    title: str
    run: Run
    dataset: Dataset
    checkpoint: bool

    @property
    def test(self) -> Split:
        """The samples that are shown."""
        return self.dataset.splits["test"]

    @property
    def truth(self) -> IntArray:
        """Indices of the test samples' labels."""
        return np.array([self.dataset.labels.index(label) for label in self.test.labels], np.int64)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table, as far as it has come.

    side: whose it is; "reference" for the float graph that all are held against.
    model: the ONNX file; None for torch, or where there is none because it `failed`.
    before: a graph to run first, or None. config: session options of the bundle's own.
    size_bytes: of the model's files; bundle_bytes: of the whole bundle.
    predicted: its answers to the test samples; other: those of the other arithmetic.
    """

    name: str
    side: Literal["torch", "reference", "peer", "edgetune"]
    model: Path | None = None
    before: Path | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    bundle_bytes: int = 0
    failed: str = ""
    predicted: IntArray | None = None
    other: IntArray | None = None
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    peak_mib: float = 0.0

    def accuracy(self, truth: IntArray) -> float:
        """Share of the test samples that it got right."""
        return float(np.mean(self.predicted == truth))


def main() -> None:
    """Run the cases and print a section for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=SHARED, help=f"shared data [{SHARED}]")
    parser.add_argument("--only", choices=CASES, action="append", help="may be given again")
    parser.add_argument("--keep", type=Path, help="folder for runs and graphs, which stay")
    parser.add_argument("--optimum-venv", type=Path, help="an environment that has optimum-onnx")
    parser.add_argument("--no-optimum", action="store_true", help="leave its rows out")
    parser.add_argument("--max-drop", type=float, default=0.02, help="of the gate, a share [0.02]")
    parser.add_argument(
        "--time-budget", type=float, default=1800, help="of the Pareto search, seconds [1800]"
    )
    parser.add_argument(
        "--hide-vnni", action="store_true", help="time and judge as on a CPU without VNNI"
    )
    parser.add_argument("--quick", action="store_true", help="a few samples; no usable figures")
    given = parser.parse_args()
    names = given.only or DEFAULT_CASES
    # advice of onnxruntime's quantizer, a page of it for every graph
    logging.getLogger().setLevel(logging.ERROR)
    data = shared_data(given.shared, *{path for name in names for path in NEEDS[name]})
    warn_if_busy()
    with workplace(given.keep, may_exist=True) as folder:
        hider, no_hiding = vnni_hider(folder)
        if given.hide_vnni and hider is None:
            quit_unable(no_hiding)
        wants_optimum = not given.no_optimum and any(name not in RESNETS for name in names)
        optimum, no_optimum = (
            optimum_python(given.optimum_venv, folder) if wants_optimum else (None, "")
        )
        settings = Settings(
            data=data,
            effort=QUICK if given.quick else FULL,
            max_drop=given.max_drop,
            time_budget_s=QUICK_TIME_BUDGET_S if given.quick else given.time_budget,
            hider=hider,
            hidden=given.hide_vnni,
            optimum=optimum,
            no_optimum=no_optimum,
        )
        if given.hide_vnni:  # for processes that edgetune and multiprocessing start, too
            os.environ["LD_PRELOAD"] = str(hider)
        print_heading("Quantization, against onnxruntime's own and Optimum's", TEXT)
        if no_hiding:
            print(f"- accuracy without VNNI: n/a, {no_hiding}\n")
        for name in names:
            _run_case(name, folder / (f"{name}-quick" if given.quick else name), settings)


# -- the cases -----------------------------------------------------------------------------


def banking_case(data: Path, folder: Path, effort: Effort) -> Case:
    """Return MiniLM on Banking77: 77 intents, 10 003 training and 1 531 test sentences."""
    tables = [data / path for path in BANKING77]
    if effort.samples is not None:
        most = (effort.samples, 1)  # of 77 classes
        tables = [first_rows(t, folder / "data", n) for t, n in zip(tables, most, strict=True)]
    config = _text_config(*tables, folder=folder, epochs=effort.epochs)
    config = dataclasses.replace(config, label_column="category", max_length=64)
    return _trained("Banking77, MiniLM-L6", config)


def sst2_case(data: Path, folder: Path, effort: Effort) -> Case:
    """Return MiniLM on SST-2: 12 000 of the training phrases, 872 test sentences."""
    # two classes: a handful of each would leave nothing to hold out
    most = SST2_ROWS if effort.samples is None else 8 * effort.samples
    train_table, test_table = (first_rows(data / path, folder / "data", most) for path in SST2)
    config = _text_config(
        train_table, test_table, folder=folder, epochs=3 if effort is FULL else effort.epochs
    )
    allow = ("duplicates", "conflicting-labels")
    config = dataclasses.replace(config, input_column="sentence", allow=allow)
    return _trained("SST-2, MiniLM-L6", config)


def _text_config(train_table: Path, test_table: Path, *, folder: Path, epochs: int) -> TrainConfig:
    return TrainConfig(
        task="text-classification",
        model=text_model(),
        data=str(train_table),
        test=str(test_table),
        output=str(folder / "run"),
        method="lora",
        lora_r=16,
        lora_alpha=32,
        lr=2e-3,
        epochs=epochs,
        patience=0,
    )


def mobilenet_case(data: Path, folder: Path, effort: Effort) -> Case:
    """Return MobileNetV2 on flowers5: 550 images, a third of them to validate; 150 to test."""
    flowers = folder / "data"
    if not flowers.exists():
        unpack(data / FLOWERS, flowers)
        if effort.samples is not None:
            thin_out(flowers, effort.samples)
    config = TrainConfig(
        task="image-classification",
        model=str(data / MOBILENET_V2),
        data=str(flowers / "train"),
        test=str(flowers / "val"),
        output=str(folder / "run"),
        # the gate can tell a loss of 2 points only from a good number of samples
        val_fraction=0.35,
        method="freeze",
        last_blocks=4,
        lr=1e-3,
        epochs=effort.epochs,
        patience=0,
    )
    return _trained("flowers5, MobileNetV2 (224 px)", config)


def _trained(title: str, config: TrainConfig) -> Case:
    """Return the run that lies there, trained to its end, or train it."""
    folder = Path(config.output)
    if not (folder / "run.json").is_file():
        say("training")
        train(config, on_event=_show)
    elif read_run(folder)[1].status != "finished":
        resume(folder, on_event=_show)
    run = open_run(folder)
    return Case(title=title, run=run, dataset=run_dataset(run), checkpoint=True)


def resnet_case(data: Path, folder: Path, effort: Effort, *, depth: int) -> Case:
    """Return a CIFAR-10 ResNet as published: nothing is trained.

    It has seen all training images. "test" is the 498 lossless test images, "val", which the gate
    judges by, 2 000 other test images that were JPEG once: harder, as unseen.
    """
    from safetensors.torch import load_file

    images = folder / "data"
    if not images.exists():
        say("writing the images")
        _write_cifar(data, images, effort.samples)
    dataset = load_dataset(DataSource(kind="image", data=str(images)))
    network = CifarResNet(depth)
    network.load_state_dict(load_file(data / _resnet_weights(depth)))
    network.eval().requires_grad_(False)
    name = f"resnet{depth}-cifar10"
    family = Family(
        name=name,
        source="torchvision",  # its forward takes the pixels as the first argument, as theirs
        match=(name,),
        blocks=("layer1", "layer2", "layer3"),
        head=("linear",),
        output="linear",
        int8="static",
    )
    config = TrainConfig(
        task="image-classification",
        model=name,
        data=str(images),
        output=str(folder / "run"),
        method="full",
    )
    parameters = sum(p.numel() for p in network.parameters())
    record = RunRecord(
        status="finished",
        task=config.task,
        labels=dataset.labels,
        trainable_parameters=parameters,
        parameters=parameters,
        frozen_sha256="",
        versions=versions(),
    )
    # mean and std are the defaults, ImageNet's, with which these were trained
    preprocessing = Preprocessing(input_size=32, resize_size=32)
    loaded = Loaded(network=network, family=family, preprocessing=preprocessing)
    task = ImageClassification(loaded, dataset.labels, config)
    run = Run(folder=Path(config.output), config=config, record=record, family=family, task=task)
    run.folder.mkdir(parents=True, exist_ok=True)
    return Case(title=f"CIFAR-10, ResNet-{depth}", run=run, dataset=dataset, checkpoint=False)


def _write_cifar(data: Path, folder: Path, most: int | None) -> None:
    """Write train/ and test/ as PNG, val/ as the JPEG files they are; `most` of each class."""
    from PIL import Image

    lossless, jpeg = (data / path for path in CIFAR10)
    seen: Counter[tuple[str, str]] = Counter()

    def place(split: str, label: str, limit: int | None, suffix: str) -> Path | None:
        number = seen[split, label]
        seen[split, label] += 1
        if limit is not None and number >= limit:
            return None
        path = folder / split / label / f"{number:04d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    with np.load(lossless) as stored:
        classes = [str(name) for name in stored["classes"]]
        for split in ("train", "test"):
            for pixels, label in zip(stored[f"x_{split}"], stored[f"y_{split}"], strict=True):
                if path := place(split, classes[label], most, ".png"):
                    Image.fromarray(pixels).save(path)
    with zipfile.ZipFile(jpeg) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".jpg")):
            if path := place("val", Path(name).parent.name, most or 200, ".jpg"):
                path.write_bytes(archive.read(name))


class CifarResNet(nn.Module):
    """ResNet of 6 n + 2 layers for 32 x 32 pixels; shortcuts pad with zeros (option A).

    Source: He et al. 2016 (arXiv:1512.03385), section 4.2.
    """

    def __init__(self, depth: int, classes: int = 10) -> None:
        """Make the network; the names of its parts are those of the published weights."""
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) -> logits (batch, classes)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # (batch, 64, 8, 8)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class _ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.grows = channels - channels_in
        self.conv1 = nn.Conv2d(
            channels_in, channels, 3, stride=2 if self.grows else 1, padding=1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.grows:
            half = self.grows // 2
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        return functional.relu(x + y)


def _stage(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
    widths = [channels_in, *[channels] * (blocks - 1)]
    return nn.Sequential(*(_ResidualBlock(width, channels) for width in widths))


def _resnet_weights(depth: int) -> Path:
    return Path(f"weights/resnet{depth}-cifar10/model.safetensors")


CASES: dict[str, Callable[[Path, Path, Effort], Case]] = {
    "banking77": banking_case,
    "sst2": sst2_case,
    "mobilenet": mobilenet_case,
    "resnet20": functools.partial(resnet_case, depth=20),
    "resnet56": functools.partial(resnet_case, depth=56),
}
NEEDS: dict[str, tuple[Path, ...]] = {
    "banking77": BANKING77,
    "sst2": SST2,
    "mobilenet": (FLOWERS, MOBILENET_V2),
    "resnet20": (*CIFAR10, _resnet_weights(20)),
    "resnet56": (*CIFAR10, _resnet_weights(56)),
}
RESNETS = ("resnet20", "resnet56")
DEFAULT_CASES = ("banking77", "mobilenet", "resnet20", "resnet56")


# -- one case ------------------------------------------------------------------------------


def _run_case(name: str, folder: Path, settings: Settings) -> None:
    say(f"{name}: opening")
    case = CASES[name](settings.data, folder, settings.effort)
    graphs = folder / ("graphs-without-vnni" if settings.hidden else "graphs")
    shutil.rmtree(graphs, ignore_errors=True)  # quickly made again: edgetune's are in its cache
    fp32 = _exported(case, graphs / "fp32", settings, precision="fp32")
    device_task = EdgeModel.load(fp32.bundle).task
    _write_samples(case, device_task, graphs)
    say(f"{name}: edgetune")
    ours, notes = _edgetune_rows(case, graphs, settings)
    say(f"{name}: peers")
    rows = [
        Row(
            name="torch fp32",
            side="torch",
            size_bytes=fp32.torch_size_bytes,
            predicted=fp32.torch.predicted,
        ),
        _bundle_row("onnxruntime fp32", "reference", fp32),
        *_stock_rows(case, device_task, fp32.bundle / GRAPH_NAME, graphs / "stock"),
        *_optimum_rows(case, graphs / "optimum", settings),
        *ours,
    ]
    rows = [_answered(row, graphs, settings) for row in rows]
    rows = _timed(rows, name, folder, graphs, settings)
    _print_case(case, fp32, rows, notes, settings)


def _exported(case: Case, output: Path, settings: Settings, **choices: Any) -> ExportResult:
    """Call what `edgetune export --profile host` calls, for one thread.

    Without VNNI, the profile says so, and what was measured has a folder of its own: the cache
    does not know that these times are another CPU's.
    """
    profile = load_profile("host")
    runtime = dataclasses.replace(profile.runtime, intra_op_threads=1)
    profile = dataclasses.replace(profile, runtime=runtime)
    run = case.run
    if settings.hidden:
        profile = _without_vnni(profile)
        run = dataclasses.replace(run, folder=run.folder.with_name("run-without-vnni"))
    return export_run(
        run,
        case.dataset,
        profile,
        output=output,
        name=case.run.folder.parent.name,
        budgets=Budgets(max_drop=settings.max_drop),
        # a few samples say nothing of a loss
        allow=LACKS if settings.effort is QUICK else (),
        on_stage=say,
        **choices,
    )


def _without_vnni(profile: DeviceProfile) -> DeviceProfile:
    hidden = ("avx512", "avx_vnni", "amx")
    features = tuple(f for f in profile.cpu.features if not f.startswith(hidden))
    cpu = dataclasses.replace(profile.cpu, int8="saturates", features=features)
    return dataclasses.replace(profile, cpu=cpu)


def _write_samples(case: Case, task: DeviceTask, graphs: Path) -> None:
    """Write the encoded test samples, all and those to time with, as answers.npz and timing.npz."""
    encoded = [task.stack([task.encode(value)]) for value in case.test.inputs]
    few = [encoded[i] for i in spread(len(encoded), TIMED_SAMPLES)]
    for name, samples in (("answers", encoded), ("timing", few)):
        arrays = {f"{i}/{key}": v for i, feeds in enumerate(samples) for key, v in feeds.items()}
        np.savez(graphs / f"{name}.npz", **arrays)


def _edgetune_rows(case: Case, graphs: Path, settings: Settings) -> tuple[list[Row], list[str]]:
    """Export as a user would, and with the Pareto search; return rows and what to say of them."""
    rows, notes = [], []
    searches: dict[Search, dict[str, Any]] = {
        "first": {},
        "pareto": {"time_budget_s": settings.time_budget_s},
    }
    for search, choices in searches.items():
        name = f"edgetune {search}"
        try:
            result = _exported(case, graphs / search, settings, search=search, **choices)
        except Exception as error:
            if not isinstance(error, EdgetuneError):  # a fault, but the peers' rows still count
                sys.excepthook(type(error), error, error.__traceback__)
            rows.append(Row(name=name, side="edgetune", failed=_first_line(error)))
            continue
        rows.append(_bundle_row(f"{name}: {result.chosen.rung.name}", "edgetune", result))
        notes.append(
            f"{name}: {len(result.candidates) - 1} candidates beside fp32 in"
            f" {result.report.seconds:.0f} s; {result.report.verdict}"
        )
    return rows, notes


def _bundle_row(name: str, side: Literal["reference", "edgetune"], result: ExportResult) -> Row:
    files = [result.bundle / part for part in (GRAPH_NAME, WEIGHTS_NAME)]
    return Row(
        name=name,
        side=side,
        model=files[0],
        config=open_bundle(result.bundle).manifest.session.config,
        size_bytes=sum(path.stat().st_size for path in files if path.is_file()),
        bundle_bytes=result.size_bytes,
    )


# -- onnxruntime's own ---------------------------------------------------------------------


class _Reader(quantization.CalibrationDataReader):
    """The training samples that edgetune calibrates on, as onnxruntime asks for them."""

    def __init__(self, task: DeviceTask, split: Split) -> None:
        chosen = spread(len(split.inputs), CALIBRATION_SAMPLES)
        self._feeds = (task.stack([task.encode(split.inputs[i])]) for i in chosen)

    def get_next(self) -> Feeds | None:
        """Return the next sample, None after the last."""
        return next(self._feeds, None)


def _stock_rows(case: Case, task: DeviceTask, graph: Path, folder: Path) -> Iterator[Row]:
    """Yield onnxruntime's quantizations of edgetune's fp32 graph."""
    folder.mkdir()
    source = folder / "fp32.onnx"  # the quantizers write files of their own beside their input
    model = onnx.load(graph)
    onnx.save(model, source)
    pixels = preprocessing_nodes(model)
    kind = case.run.family.int8
    exact = load_profile("host").cpu.int8 == "exact" and "LD_PRELOAD" not in os.environ

    def reader() -> _Reader:
        return _Reader(task, case.dataset.splits["train"])

    def static(target: Path, model: Path = source, **settings: Any) -> None:
        settings = {"nodes_to_exclude": pixels, **settings}
        quantization.quantize_static(model, target, reader(), **settings)

    def tuned(target: Path) -> None:
        prepared = folder / "prepared.onnx"
        # symbolic shapes fail on onnxruntime's attention operator, and the types behind it are
        # unknown to the quantizer: its error names the option
        quant_pre_process(source, prepared, skip_symbolic_shape=kind == "dynamic")
        settings: dict[str, Any] = {"per_channel": True, "reduce_range": not exact}
        if kind == "dynamic":
            settings["extra_options"] = {"DefaultTensorType": onnx.TensorProto.FLOAT}
            quantization.quantize_dynamic(prepared, target, **settings)
        else:
            static(target, prepared, activation_type=quantization.QuantType.QUInt8, **settings)

    makers: dict[str, Callable[[Path], object]] = {
        "quantize_dynamic, defaults": lambda target: quantization.quantize_dynamic(source, target),
        "quantize_static, defaults": static,
        "quantize_static, per channel": lambda target: static(target, per_channel=True),
        f"quantize_{kind}, tuned": tuned,
    }
    if pixels:
        makers["quantize_static, defaults, preprocessing too"] = lambda target: static(
            target, nodes_to_exclude=None
        )
    for number, (name, make) in enumerate(makers.items()):
        say(name)
        target = folder / f"{number}.onnx"
        try:
            make(target)
        except Exception as error:  # whatever it is, that it fails is the result
            yield Row(name=f"onnxruntime {name}", side="peer", failed=_first_line(error))
        else:
            yield _file_row(f"onnxruntime {name}", target)


def _file_row(name: str, model: Path, before: Path | None = None) -> Row:
    """Return the row of an ONNX file and of the files beside it that begin with its name."""
    size = sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))
    return Row(name=name, side="peer", model=model, before=before, size_bytes=size)


# -- Optimum -------------------------------------------------------------------------------

# runs in the environment that has Optimum
OPTIMUM = """\
import json, sys, traceback
from functools import partial
from pathlib import Path
import onnx
from onnxruntime.quantization import quantize_dynamic
from optimum.onnxruntime import ORTModelForImageClassification as Image
from optimum.onnxruntime import ORTModelForSequenceClassification as Text
from optimum.onnxruntime import ORTOptimizer, ORTQuantizer
from optimum.onnxruntime.configuration import AutoOptimizationConfig, AutoQuantizationConfig
checkpoint, output = sys.argv[1], Path(sys.argv[2])
model_class = {"text-classification": Text, "image-classification": Image}[sys.argv[3]]

def export(name):
    model_class.from_pretrained(checkpoint, export=True).save_pretrained(output / name)

def optimize(name):
    optimizer = ORTOptimizer.from_pretrained(output / "fp32")
    config = AutoOptimizationConfig.O2()
    optimizer.optimize(optimization_config=config, save_dir=output / name, file_suffix="")

def quantize(name):
    quantizer = ORTQuantizer.from_pretrained(output / "fp32")
    config = getattr(AutoQuantizationConfig, name)(is_static=False)
    quantizer.quantize(quantization_config=config, save_dir=output / name, file_suffix="")

def quantize_fused(name):  # the presets fail on O2's operators: this option is not among theirs
    (output / name).mkdir()
    quantize_dynamic(
        output / "O2" / "model.onnx", output / name / "model.onnx", per_channel=True,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )

steps = {"fp32": export, "O2": optimize}
steps |= dict.fromkeys(("avx2", "avx512_vnni", "arm64"), quantize)
steps["O2, then quantize_dynamic"] = quantize_fused
failed = {}
for name, step in steps.items():
    try:
        step(name)
    except Exception as error:
        traceback.print_exc()
        failed[name] = f"{type(error).__name__}: {error}"
    (output / "result.json").write_text(json.dumps([list(steps), failed]))
"""


def _optimum_rows(case: Case, folder: Path, settings: Settings) -> Iterator[Row]:
    """Yield Optimum's export of the checkpoint and what its presets make of it."""
    if not case.checkpoint or (settings.optimum is None and not settings.no_optimum):
        return
    if settings.optimum is None:
        yield Row(name="Optimum", side="peer", failed=settings.no_optimum)
        return
    say("Optimum's presets")
    network: Any = case.run.task.network
    network.save_pretrained(folder / "checkpoint")
    before = None
    if isinstance(case.run.task, ImageClassification):
        before = folder / "preprocess.onnx"
        onnx.save(_preprocessing_graph(case.run.task), before)
    done = subprocess.run(
        [
            str(settings.optimum), "-c", OPTIMUM,
            str(folder / "checkpoint"), str(folder), case.run.config.task,
        ],
        env=settings.environment(hidden=False), capture_output=True, text=True, check=False,
    )  # fmt: skip
    result = folder / "result.json"
    if not result.is_file():
        yield Row(name="Optimum", side="peer", failed=last_line(done.stderr))
        return
    names, failed = json.loads(result.read_text())
    for name in names:
        if name in failed:
            yield Row(name=f"Optimum {name}", side="peer", failed=_first_line(failed[name]))
        else:
            yield _file_row(f"Optimum {name}", folder / name / "model.onnx", before)


def _preprocessing_graph(task: ImageClassification) -> onnx.ModelProto:
    """Return edgetune's preprocessing alone: `image` -> float pixels."""
    image = torch.zeros((2, 70, 90, 3), dtype=torch.uint8)
    free = {"image": {0: "batch", 1: "height", 2: "width"}}
    module = _Preprocessing(task.preprocess)
    return export_graph(GraphSpec(module=module, inputs={"image": image}, free=free))


class _Preprocessing(nn.Module):
    def __init__(self, preprocess: nn.Module) -> None:
        super().__init__()
        self.preprocess = preprocess

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.preprocess(image),)


# -- measuring -----------------------------------------------------------------------------

# a plain session on one thread, the same for every ONNX file
CHILD = """\
import itertools, json, sys, time
import numpy as np
import onnxruntime as ort
job = json.loads(sys.argv[1])

def open_session(path, config):
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

session = open_session(job["model"], job["config"])
wanted = [value.name for value in session.get_inputs()]
before = open_session(job["before"], {}) if job["before"] else None
samples = []
with np.load(job["samples"]) as stored:
    for key in stored.files:
        number, name = key.split("/")
        if int(number) == len(samples):
            samples.append({})
        samples[-1][name] = stored[key]
if before is None:
    for sample in samples:
        if "token_type_ids" in wanted:
            sample["token_type_ids"] = np.zeros_like(sample["input_ids"])
    answer = lambda sample: session.run(["logits"], sample)[0]
else:
    answer = lambda sample: session.run(["logits"], {wanted[0]: before.run(None, sample)[0]})[0]
if not job["runs"]:
    print(json.dumps([int(answer(sample)[0].argmax()) for sample in samples]))
    sys.exit()
begin = time.perf_counter()
for sample in itertools.islice(itertools.cycle(samples), job["warmup"]):
    answer(sample)
times, begin = [], time.perf_counter()
for sample in itertools.islice(itertools.cycle(samples), job["runs"]):
    start = time.perf_counter()
    if start - begin > job["seconds"] and len(times) >= 10:
        break
    answer(sample)
    times.append(1e3 * (time.perf_counter() - start))
peak = 0.0
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps([*np.percentile(times, [50, 95]).tolist(), peak]))
"""
WARMUP = 20


def _child(row: Row, samples: Path, settings: Settings, *, hidden: bool, runs: int) -> list[Any]:
    """Run a row's graph in a fresh process; return its answers, or (p50, p95, peak) of `runs`.

    Raises:
        RuntimeError: the process failed; the message is the last line that it wrote.
    """
    job = {
        "model": str(row.model),
        "before": str(row.before or ""),
        "config": dict(row.config),
        "samples": str(samples),
        "runs": runs,
        "warmup": min(WARMUP, runs),
        "seconds": settings.effort.seconds,
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, json.dumps(job)],
        env=settings.environment(hidden=hidden),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(last_line(done.stderr) or f"ended with {done.returncode}")
    found: list[Any] = json.loads(done.stdout)
    return found


def _answered(row: Row, graphs: Path, settings: Settings) -> Row:
    """Return the row with its answers to the test samples, in both arithmetics."""
    if row.model is None:
        return row
    say(f"answers of {row.name}")
    samples = graphs / "answers.npz"
    try:
        predicted = _child(row, samples, settings, hidden=settings.hidden, runs=0)
        row = dataclasses.replace(row, predicted=np.array(predicted, np.int64))
        if settings.hider:
            other = _child(row, samples, settings, hidden=not settings.hidden, runs=0)
            row = dataclasses.replace(row, other=np.array(other, np.int64))
    except RuntimeError as error:
        return dataclasses.replace(row, failed=_first_line(error), predicted=None)
    return row


def _timed(
    rows: Sequence[Row], name: str, folder: Path, graphs: Path, settings: Settings
) -> list[Row]:
    """Return the rows with their times: medians over rounds, in which the rows take turns."""
    effort = settings.effort
    samples = graphs / "timing.npz"
    live = [row for row in rows if not row.failed]
    found: dict[str, list[list[float]]] = defaultdict(list)
    for number in range(effort.rounds):
        say(f"timing, round {number + 1} of {effort.rounds}")
        # who follows whom stays the same, who begins does not
        first = number * len(live) // effort.rounds
        for row in [*live[first:], *live[:first]]:
            if row.side == "torch":
                figures = _time_torch(name, folder, samples, settings)
            else:
                figures = _child(row, samples, settings, hidden=settings.hidden, runs=effort.runs)
            found[row.name].append(figures)
    return [
        dataclasses.replace(
            row, **dict(zip(("p50_ms", "p95_ms", "peak_mib"), medians, strict=True))
        )
        if (medians := [statistics.median(x) for x in zip(*found[row.name], strict=True)])
        else row
        for row in rows
    ]


def _time_torch(name: str, folder: Path, samples: Path, settings: Settings) -> list[float]:
    """Return (p50, p95, peak) of torch on the same arrays, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        job = pool.submit(_torch_figures, name, folder, samples, settings.data, settings.effort)
        return job.result()


def _torch_figures(
    name: str, folder: Path, samples: Path, data: Path, effort: Effort
) -> list[float]:
    torch.set_num_threads(1)
    task = CASES[name](data, folder, effort).run.task
    feeds: dict[int, dict[str, Tensor]] = defaultdict(dict)
    with np.load(samples) as stored:
        for key in stored.files:
            number, tensor = key.split("/")
            feeds[int(number)][tensor] = torch.from_numpy(stored[key])

    def answer(batch: dict[str, Tensor]) -> Tensor:
        if isinstance(task, ImageClassification):
            batch = {"pixels": task.preprocess(batch["image"])}
        return task.logits(task.network, batch)

    with torch.inference_mode():
        _, durations = time_calls(
            answer,
            list(feeds.values()),
            runs=effort.runs,
            warmup=min(WARMUP, effort.runs),
            seconds=effort.seconds,
        )
    latency = summarize(durations)
    return [latency.p50_ms, latency.p95_ms, peak_rss_mib() or 0.0]


# -- what is printed -----------------------------------------------------------------------


def _print_case(
    case: Case, fp32: ExportResult, rows: Sequence[Row], notes: Sequence[str], settings: Settings
) -> None:
    truth = case.truth
    reference = next(row for row in rows if row.side == "reference")
    counts = ", ".join(f"{len(split.labels)} {n}" for n, split in case.dataset.splits.items())
    print(f"### {case.title}\n")
    print(f"- {counts} samples, {len(case.dataset.labels)} classes")
    print(f"- parity: a logit of the fp32 graph is at most {fp32.parity:.2g} from torch's")
    print("\n".join(f"- {note}" for note in notes) + "\n")
    other = "with VNNI %" if settings.hidden else "without VNNI %"
    print_table(
        (
            "model", "accuracy %", "95 % interval", "lost, points", other, "size MiB", "p50 ms",
            "p95 ms", "peak MiB",
        ),
        [_cells(row, reference, truth, case.dataset.labels) for row in rows],
    )  # fmt: skip
    failed = [row for row in rows if row.failed]
    if failed:
        print("\n".join(f"- {row.name} failed: {row.failed}" for row in failed) + "\n")
    text = case.run.family.int8 == "dynamic"
    print("\n".join(f"- {line}" for line in _targets(rows, truth, text=text)) + "\n", flush=True)


def _cells(row: Row, reference: Row, truth: IntArray, labels: Sequence[str]) -> list[str]:
    size = f"{row.size_bytes / 2**20:.2f}" if row.size_bytes else "-"
    if row.predicted is None:
        return [row.name, "failed", "-", "-", "-", size, "-", "-", "-"]
    accuracy = classification_report(truth, row.predicted, labels).accuracy
    lost = _lost(reference, row, truth)
    return [
        row.name,
        percent(accuracy.value),
        f"{percent(accuracy.low)} to {percent(accuracy.high)}",
        f"{points(lost.value)} ({points(lost.low)} to {points(lost.high)})",
        percent(float(np.mean(row.other == truth))) if row.other is not None else "n/a",
        size,
        f"{row.p50_ms:.3f}",
        f"{row.p95_ms:.3f}",
        f"{row.peak_mib:.0f}",
    ]  # fmt: skip


def _lost(reference: Row, row: Row, truth: IntArray) -> Interval:
    """Return what a row loses against the reference, a share, with its interval."""
    before, after = reference.predicted == truth, row.predicted == truth
    lost, gained = int(np.sum(before & ~after)), int(np.sum(~before & after))
    return tango_interval(lost, gained, len(truth))


def _targets(rows: Sequence[Row], truth: IntArray, *, text: bool) -> Iterator[str]:
    """Yield a line for each target: what was found, and whether that meets it."""
    reference = next(row for row in rows if row.side == "reference")
    first, pareto = (row for row in rows if row.side == "edgetune")
    live = [row for row in rows if row.predicted is not None]
    if first.predicted is None:
        yield f"edgetune first: missed, {first.failed}"
    else:
        lost = _lost(reference, first, truth).value
        yield _target(
            f"edgetune first loses at most {points(EQUAL)} points",
            f"{points(lost)}",
            lost <= EQUAL + 1e-9,
        )
        yield _no_slower("than fp32", first, reference)
        peer = _fastest_peer(live, first.accuracy(truth) - EQUAL, truth)
        what = f"than the fastest peer that loses no more than {points(EQUAL)} points against it"
        yield _no_slower(what, first, peer) if peer else f"no slower {what}: met, there is none"
        if text:
            size = first.bundle_bytes / 1e6
            what = f"edgetune first: a bundle of at most {MINILM_MB:g} MB (10^6 bytes)"
            yield _target(what, f"{size:.1f} MB", size <= MINILM_MB)
    what = (
        f"edgetune pareto at most 1/{PARETO_SPEEDUP:g} of the latency of the fastest peer that"
        f" loses no more than {points(CLOSE)} points against it, and no more than that lost against"
        " fp32"
    )
    if pareto.predicted is None:
        yield f"{what}: missed, {pareto.failed}"
        return
    peer = _fastest_peer(live, pareto.accuracy(truth) - CLOSE, truth)
    if peer is None:
        yield f"{what}: met, there is none"
        return
    speedup = peer.p50_ms / pareto.p50_ms
    lost = _lost(reference, pareto, truth).value
    found = (
        f"{pareto.p50_ms:.3f} ms, {peer.name} {peer.p50_ms:.3f} ms: {speedup:.2f} times as fast,"
        f" {points(lost)} points lost against fp32"
    )
    yield _target(what, found, speedup >= PARETO_SPEEDUP and lost <= CLOSE + 1e-9)


def _fastest_peer(rows: Sequence[Row], least: float, truth: IntArray) -> Row | None:
    peers = [
        row for row in rows if row.side in ("peer", "torch") and row.accuracy(truth) >= least - 1e-9
    ]
    return min(peers, key=lambda row: row.p50_ms, default=None)


def _no_slower(what: str, row: Row, other: Row) -> str:
    ratio = row.p50_ms / other.p50_ms
    return _target(
        f"edgetune first no slower {what} (two timings of one graph differ by {NOISE:.0%})",
        f"{row.p50_ms:.3f} ms, {other.name} {other.p50_ms:.3f} ms: {ratio:.2f} times",
        ratio <= 1 + NOISE,
    )


def _target(what: str, found: str, met: bool) -> str:
    return f"{what}: {found}: {'met' if met else 'MISSED'}"


def _first_line(error: object) -> str:
    kind = "" if isinstance(error, str | EdgetuneError) else f"{type(error).__name__}: "
    lines = str(error).strip().splitlines() or [""]
    return _cut(f"{kind}{lines[0]}")


def _cut(line: str, most: int = 240) -> str:
    return line if len(line) <= most else f"{line[:most]} ..."


def _show(event: Event) -> None:
    if event.kind == "epoch":
        values = event.values
        say(
            f"epoch {values['epoch']}: loss {values['train_loss']:.3f}, validation accuracy"
            f" {values['val_accuracy']:.3f}, {values['seconds']:.0f} s"
        )
    elif event.kind == "note":
        say(event.values["text"])


if __name__ == "__main__":
    main()
