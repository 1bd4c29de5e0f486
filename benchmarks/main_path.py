"""The main path, timed and measured: train -> export -> eval, one image and one text case.

    python benchmarks/main_path.py                  both cases, about 15 minutes on 2 cores
    python benchmarks/main_path.py --only image
    python benchmarks/main_path.py --quick          a few samples: shows that the script works

Calls what the commands `edgetune train`, `edgetune export --profile host` and `edgetune eval`
call. The validation split is held out of the training data and picks the best epoch; the test
split is data that neither training nor selection nor calibration has seen. Progress goes to
stderr, Markdown to stdout.
"""

import argparse
import csv
import gzip
import itertools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# nothing here is fetched: the models are local folders
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _common import (
    BANKING77,
    FLOWERS,
    MOBILENET_V2,
    SHARED,
    cores,
    percent,
    points,
    print_heading,
    print_table,
    say,
    shared_data,
    text_model,
    unpack,
    warn_if_busy,
    workplace,
)

from edgetune.bench.evaluate import Answers, evaluate
from edgetune.bench.latency import bench
from edgetune.config import TrainConfig
from edgetune.errors import GateError
from edgetune.export import ExportResult, export
from edgetune.tasks.metrics import PairedDrop, paired_drop
from edgetune.train import Event, train

TEXT = """\
Accuracy is of the test split, with its 95 % bootstrap interval; the drop is paired (same test
samples), in percentage points. Size is of the whole bundle; for torch, of the parameters.
Latency is of one sample a call, from raw sample to label, through the device runtime in a fresh
process: the medians over alternating processes; torch's is the export's own brief measurement,
without preprocessing."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is done: the whole thing, or just enough to see that it works.

    samples: of each class and split; None for all.
    rounds: latency processes per graph and thread count.
    runs: calls timed in each.
    """

    samples: int | None
    rounds: int
    runs: int


FULL = Effort(samples=None, rounds=5, runs=200)
QUICK = Effort(samples=8, rounds=1, runs=10)


class Stopwatch:
    """Wall time of named stages, in the order in which they began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._begin = "", 0.0

    def begin(self, stage: str) -> None:
        """End the stage that is running, and begin `stage`; "" only ends."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = now - self._begin
        self._stage, self._begin = stage, now
        if stage:
            say(stage)


def main() -> None:
    """Run the cases and print a section for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, default=SHARED, help=f"shared data [{SHARED}]")
    parser.add_argument("--only", choices=CASES, help="one case instead of both")
    parser.add_argument("--keep", type=Path, help="folder for runs and bundles, which stay")
    parser.add_argument("--quick", action="store_true", help="a few samples; no usable figures")
    given = parser.parse_args()
    effort = QUICK if given.quick else FULL
    data = shared_data(given.shared, FLOWERS, MOBILENET_V2, *BANKING77)
    warn_if_busy()
    print_heading("Main path: train, export, eval", TEXT)
    with workplace(given.keep) as folder:
        for name in [given.only] if given.only else CASES:
            config = CASES[name](data, folder / name, effort)
            _run_case(name, config, folder / name, effort)


# -- the cases -----------------------------------------------------------------------------


def image_case(data: Path, folder: Path, effort: Effort) -> TrainConfig:
    """Return flowers5 for MobileNetV2: 550 images to train on, val/ (150) as the test split."""
    flowers = unpack(data / FLOWERS, folder / "data")
    if effort.samples is not None:
        _thin_out(flowers, effort.samples)
    return TrainConfig(
        task="image-classification",
        model=str(data / MOBILENET_V2),
        data=str(flowers / "train"),
        test=str(flowers / "val"),
        output=str(folder / "run"),
        method="freeze",
        last_blocks=4,
        lr=1e-3,
        epochs=5 if effort is FULL else 1,
        patience=0,
    )


def text_case(data: Path, folder: Path, effort: Effort) -> TrainConfig:
    """Return Banking77 for MiniLM: 77 intents, 10 003 training and 1 531 test sentences."""
    tables = [data / path for path in BANKING77]
    if effort.samples is not None:
        tables = [_first_rows(path, folder / "data", effort.samples) for path in tables]
    return TrainConfig(
        task="text-classification",
        model=text_model(),
        data=str(tables[0]),
        test=str(tables[1]),
        label_column="category",
        output=str(folder / "run"),
        method="lora",
        lora_r=16,
        lora_alpha=32,
        lr=2e-3,
        epochs=5 if effort is FULL else 1,
        max_length=64,
        patience=0,
    )


CASES = {"image": image_case, "text": text_case}
TITLES = {"image": "Image: flowers5, MobileNetV2 (224 px)", "text": "Text: Banking77, MiniLM-L6"}


def _thin_out(root: Path, most: int) -> None:
    """Leave `most` images in each class folder of each split."""
    for folder in root.glob("*/*"):
        for path in sorted(folder.iterdir())[most:]:
            path.unlink()


def _first_rows(table: Path, folder: Path, most: int) -> Path:
    """Copy the header and the first `most` rows of each class to a plain CSV."""
    seen: dict[str, int] = defaultdict(int)
    target = folder / table.name.removesuffix(".gz")
    target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(table, "rt", encoding="utf-8", newline="") as source:
        header, *rows = csv.reader(source)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            seen[row[-1]] += 1
            if seen[row[-1]] <= most:
                writer.writerow(row)
    return target


# -- one case ------------------------------------------------------------------------------


def _run_case(name: str, config: TrainConfig, folder: Path, effort: Effort) -> None:
    watch = Stopwatch()
    run = Path(config.output)
    watch.begin("train")
    record = train(config, on_event=_show)
    int8, refusal = _export_int8(run, folder, watch, effort)
    watch.begin("export --precision fp32, all of it")
    fp32 = export(run, profile="host", precision="fp32", output=folder / "fp32")
    watch.begin("eval RUN")
    in_torch = evaluate(run).answers
    watch.begin("eval BUNDLE")
    on_device = evaluate(int8.bundle, data=config.test, label_column=config.label_column).answers
    watch.begin("latency")
    threads = sorted({1, cores()})
    latency = _latency([fp32.bundle, int8.bundle], threads, effort)
    watch.begin("")

    print(f"### {TITLES[name]}\n")
    print(_described(config))
    print(
        f"- {record.trainable_parameters:,} of {record.parameters:,} parameters trained; best epoch"
        f" {record.best_epoch} of {config.epochs}, validation accuracy"
        f" {percent(record.metrics['val_accuracy'])} %"
    )
    print(f"- {len(in_torch.truth)} {in_torch.split.name} samples, {len(record.labels)} classes")
    graphs = {"fp32": int8.candidates[0].answers, "int8": int8.chosen.answers}
    assert graphs["fp32"] is not None and graphs["int8"] is not None
    print(f"- int8 against fp32 ONNX, test split: {_drop(graphs['fp32'], graphs['int8'])}")
    print(f"- fp32 ONNX against torch, test split: {_drop(in_torch, graphs['fp32'])}")
    print(f"- gate, validation split: {refusal or int8.report.verdict}")
    print(f"- parity: a logit of the fp32 graph is at most {int8.parity:.2g} from torch's")
    same = float((on_device.predicted == graphs["int8"].predicted).mean())
    print(
        f"- `edgetune eval BUNDLE`: accuracy {_accuracy(on_device)[0]} %, the answer that was"
        f" measured during the export on {percent(same)} % of the samples\n"
    )
    _print_graphs(in_torch, int8, fp32, latency, threads, refused=bool(refusal))
    stages = {**watch.seconds, "**all**": sum(watch.seconds.values())}
    print_table(("stage", "wall s"), [(stage, f"{s:.1f}") for stage, s in stages.items()])


def _export_int8(
    run: Path, folder: Path, watch: Stopwatch, effort: Effort
) -> tuple[ExportResult, str]:
    """Export as a user would; where the gate refuses int8, say so and export it regardless.

    What the gate refused is still worth a row in the table, marked as refused.
    """

    def attempt(prefix: str, allow: tuple[str, ...] = ()) -> ExportResult:
        return export(
            run,
            profile="host",
            precision="int8",
            output=folder / "int8",
            allow=allow,
            on_stage=lambda text: watch.begin(f"{prefix}: {_stage(text)}"),
        )

    regardless = ("accuracy", "samples", "speed")
    if effort is QUICK:  # a few samples say nothing of a drop
        return attempt("export", regardless), ""
    try:
        return attempt("export"), ""
    except GateError as error:
        say(f"refused: {error}")
        return attempt("export again, gate set aside", regardless), f"REFUSED: {error}"


def _stage(text: str) -> str:
    """Return a stage's name without its numbers and findings."""
    return text.partition(":")[0]


def _latency(
    bundles: Sequence[Path], threads: Sequence[int], effort: Effort
) -> dict[tuple[Path, int], tuple[float, float]]:
    """Return (p50, p95) in ms of each bundle and thread count, medians over `effort.rounds`.

    The processes alternate, so that what else the machine does falls on all alike.
    """
    p50, p95 = defaultdict(list), defaultdict(list)
    for _ in range(effort.rounds):
        for key in itertools.product(bundles, threads):
            found = bench(key[0], threads=key[1], runs=effort.runs, seconds=5.0, cold_starts=0)
            p50[key].append(found.measurement.latency_p50_ms)
            p95[key].append(found.measurement.latency_p95_ms)
    return {key: (statistics.median(p50[key]), statistics.median(p95[key])) for key in p50}


def _print_graphs(
    in_torch: Answers,
    int8: ExportResult,
    fp32: ExportResult,
    latency: dict[tuple[Path, int], tuple[float, float]],
    threads: Sequence[int],
    *,
    refused: bool,
) -> None:
    columns = ["model", "accuracy %", "95 % interval", "size MiB"]
    for count in threads:
        columns += [f"p50 ms, {count} thread{'s'[: count > 1]}", f"p95 ms, {count}"]
    size = f"{int8.torch_size_bytes / 2**20:.1f}"
    times = ["-"] * (2 * len(threads) - 2) + [f"{int8.torch_latency_ms:.2f}", "-"]
    rows = [["fp32 torch", *_accuracy(in_torch), size, *times]]
    for result, answers in ((fp32, int8.candidates[0].answers), (int8, int8.chosen.answers)):
        assert answers is not None
        note = " (refused by the gate)" if refused and result is int8 else ""
        times = [f"{ms:.2f}" for count in threads for ms in latency[result.bundle, count]]
        size = f"{result.size_bytes / 2**20:.1f}"
        rows.append([f"{result.chosen.rung.name} ONNX{note}", *_accuracy(answers), size, *times])
    print_table(columns, rows)


# -- words ---------------------------------------------------------------------------------


def _described(config: TrainConfig) -> str:
    method = {
        "freeze": f"freeze, last_blocks {config.last_blocks}",
        "lora": f"lora, r {config.lora_r}, alpha {config.lora_alpha:g}",
    }.get(config.method, config.method)
    model = Path(config.model)
    name = "all-MiniLM-L6-v2" if model.name == "model" else model.name
    return (
        f"- {name}; {method}; lr {config.lr:g}, batch {config.batch_size}, {config.epochs} epochs,"
        f" seed {config.seed}"
    )


def _accuracy(answers: Answers) -> tuple[str, str]:
    accuracy = answers.report().accuracy
    return percent(accuracy.value), f"{percent(accuracy.low)} to {percent(accuracy.high)}"


def _drop(reference: Answers, candidate: Answers) -> str:
    return _lost(
        paired_drop(reference.truth, reference.predicted, candidate.predicted, reference.labels)
    )


def _lost(found: PairedDrop) -> str:
    return (
        f"{points(found.drop.value)} points lost (95 % interval {points(found.drop.low)} to"
        f" {points(found.drop.high)}), the same answer on {percent(found.agreement)} % of"
        f" {found.samples} samples"
    )


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
