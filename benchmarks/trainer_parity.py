"""Is edgetune's training as good as the usual tools'? Against transformers' Trainer and peft.

    python benchmarks/trainer_parity.py                    all cases, three seeds, 90 minutes
    python benchmarks/trainer_parity.py --only commands    one of them
    python benchmarks/trainer_parity.py --quick            one seed, a few samples: does it work

The same model, the same training, validation and test rows, the same learning rate, batch size,
epochs, schedule, warm-up, weight decay, clipping and LoRA, and the same choice of the best epoch.
Every training runs in a process of its own; the contenders take turns within a seed, and who
begins changes from seed to seed. Progress goes to stderr, Markdown to stdout.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import gzip
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# nothing here is fetched: the models are local folders
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _common import (
    BANKING77,
    COMMANDS,
    FLOWERS,
    MOBILENET_V2,
    SHARED,
    SST2,
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

from edgetune.config import TrainConfig
from edgetune.data import Dataset, Split, accept, check_dataset, load_dataset
from edgetune.runtime.measure import peak_rss_mib
from edgetune.train.run import data_source

TEXT = """\
Test accuracy over seeds, and speed. *Trainer* is transformers' `Trainer` used as its examples use
it: dynamic padding (`DataCollatorWithPadding`), fused AdamW, evaluation after each epoch, no
checkpoints, no logging, no reports; LoRA through `peft.get_peft_model`, the head in
`modules_to_save`; images decoded once and kept, cropped and mirrored at random with torchvision,
then the model's own image processor. The third contender is *Trainer* with what someone who knows
would add by hand: batches of like length (`group_by_length`) for texts; for the convolutional net,
frozen BatchNorm left in evaluation mode and BatchNorm's momentum at PyTorch's 0.1 (transformers'
MobileNetV2 has TensorFlow's 0.997, which in PyTorch means that the last batch decides). All keep
the epoch with the best validation accuracy, Trainer in memory (edgetune writes it, a checkpoint
and its curves to disk after every epoch). Left as each tool has it: edgetune's first step already
learns, Trainer's has a learning rate of 0; Trainer's weight decay spares biases and LayerNorm,
edgetune's every vector; edgetune batches texts of like length, sets BatchNorm right and tells
glibc to keep freed memory.

*train samples/s* is of the passes over the training data alone, with what edgetune does before the
first of them (what frozen layers hand over is made once and kept, where nothing augments it);
*from epoch 2* leaves the first pass out. *run* is all of it: reading, data check (edgetune),
tokenizing or decoding, loading the model, training, validation, writing. All are medians over the
seeds. The difference's interval covers both the choice of the seed and that
of the test samples (Welch-Satterthwaite)."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One training: which test samples it got right, and what it took.

    correct: in the order of the test table. samples: rows of a pass over the training data.
    pass_seconds: of each such pass; the first includes what is made once before it.
    """

    correct: tuple[bool, ...]
    best_epoch: int
    samples: int
    pass_seconds: tuple[float, ...]
    run_seconds: float
    peak_rss_mib: float

    @property
    def accuracy(self) -> float:
        """Share of the test samples that it got right."""
        return sum(self.correct) / len(self.correct)

    @property
    def samples_per_s(self) -> float:
        """Training samples a second, passes over the training data alone."""
        return len(self.pass_seconds) * self.samples / sum(self.pass_seconds)

    @property
    def later_samples_per_s(self) -> float:
        """The same without the first pass; NaN where there is no other."""
        later = self.pass_seconds[1:]
        return len(later) * self.samples / sum(later) if later else math.nan


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: the data is in `config` (three tables), the seed and output are not yet."""

    title: str
    config: TrainConfig
    tuned: str


def main() -> None:
    """Run the cases and print a section for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, default=SHARED, help=f"shared data [{SHARED}]")
    parser.add_argument("--only", choices=CASES, action="append", help="may be given again")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each contender [3]")
    parser.add_argument("--plain", action="store_true", help="leave the third contender out")
    parser.add_argument("--gpu", action="store_true", help="on the GPU, in bf16  [CPU, fp32]")
    parser.add_argument("--quick", action="store_true", help="a few samples; no usable figures")
    given = parser.parse_args()
    names = given.only or list(CASES)
    seeds = range(1 if given.quick else given.seeds)
    needed = {path for name in names for path in NEEDS[name]}
    data = shared_data(given.shared, *needed) if needed else Path()
    warn_if_busy()
    print_heading("Quality and speed of training, against transformers' Trainer", TEXT)
    with workplace(None) as folder:
        for name in names:
            case = CASES[name](data, folder / name, given.quick)
            machine = {"precision": "bf16"} if given.gpu else {"precision": "fp32", "cpu": True}
            config = dataclasses.replace(case.config, **machine)
            _run_case(dataclasses.replace(case, config=config), seeds, tuned=not given.plain)


# -- the cases -----------------------------------------------------------------------------


def commands_case(data: Path, folder: Path, quick: bool) -> Case:  # noqa: ARG001
    """Return examples/device-commands: 17 kinds of commands to devices, 1 187 + 360 rows."""
    return _text_case(
        f"Text: device commands ({COMMANDS.relative_to(COMMANDS.parent.parent)}), MiniLM-L6, LoRA",
        COMMANDS / "train.csv",
        COMMANDS / "test.csv",
        label_column="intent",
        folder=folder,
        most=4 if quick else None,
        epochs=1 if quick else 8,
    )


def banking_case(data: Path, folder: Path, quick: bool) -> Case:
    """Return Banking77's 77 intents, 40 training rows of each, and its test rows."""
    return _text_case(
        "Text: Banking77, 40 training rows of each intent, MiniLM-L6, LoRA",
        *(data / path for path in BANKING77),
        label_column="category",
        folder=folder,
        most=4 if quick else 40,
        epochs=1 if quick else 6,
    )


def _text_case(
    title: str,
    train: Path,
    test: Path,
    *,
    label_column: str,
    folder: Path,
    most: int | None,
    epochs: int,
    lora_r: int = 16,
    input_column: str = "",
) -> Case:
    config = TrainConfig(
        task="text-classification",
        model=text_model(),
        data=str(train),
        test=str(test),
        label_column=label_column,
        input_column=input_column,
        output=str(folder / "run"),
        method="lora",
        lora_r=lora_r,
        lora_alpha=2 * lora_r,
        lr=2e-3,
        epochs=epochs,
        max_length=64,
        patience=0,
    )
    tuned = "Trainer, group_by_length"
    return Case(title=title, config=_fix_splits(config, folder / "data", most), tuned=tuned)


def phrases_case(data: Path, folder: Path, quick: bool) -> Case:
    """Return SST-2's phrases, 13 tokens on average: 1 500 training rows a class, its dev rows."""
    tables = []
    folder.mkdir(parents=True, exist_ok=True)
    for path in SST2:
        with gzip.open(data / path, "rt", encoding="utf-8") as file:
            lines = file.readlines()
        tables.append(folder / path.name.removesuffix(".gz"))
        tables[-1].write_text("".join(lines), encoding="utf-8")
    return _text_case(
        "Text: SST-2 phrases, 1 500 training rows of each class, MiniLM-L6, LoRA r 8",
        *tables,
        label_column="label",
        folder=folder,
        most=16 if quick else 1500,
        epochs=1 if quick else 3,
        lora_r=8,
        input_column="sentence",
    )


def flowers_case(data: Path, folder: Path, quick: bool) -> Case:
    """Return flowers5: 550 images to train and validate on, 150 to test, at 128 pixels."""
    return _flowers_case(
        "Image: flowers5, MobileNetV2 at 128 px, last 4 blocks and head trained",
        data, folder, quick, last_blocks=4, augment="standard",
    )  # fmt: skip


def kept_case(data: Path, folder: Path, quick: bool) -> Case:
    """Return flowers5 without augmentation, where frozen layers need to run only once."""
    return _flowers_case(
        "Image: flowers5, the same without augmentation",
        data, folder, quick, last_blocks=4, augment="none",
    )  # fmt: skip


def block_case(data: Path, folder: Path, quick: bool) -> Case:
    """Return flowers5 without augmentation, with less to train."""
    return _flowers_case(
        "Image: flowers5, without augmentation, last block and head trained",
        data, folder, quick, last_blocks=1, augment="none",
    )  # fmt: skip


def _flowers_case(
    title: str, data: Path, folder: Path, quick: bool, *, last_blocks: int, augment: Any
) -> Case:
    flowers = unpack(data / FLOWERS, folder / "flowers")
    config = TrainConfig(
        task="image-classification",
        model=str(data / MOBILENET_V2),
        data=str(flowers / "train"),
        test=str(flowers / "val"),
        output=str(folder / "run"),
        method="freeze",
        last_blocks=last_blocks,
        augment=augment,
        image_size=128,
        lr=1e-3,
        epochs=1 if quick else 5,
        patience=0,
    )
    return Case(
        title=title,
        config=_fix_splits(config, folder / "data", 8 if quick else None),
        tuned="Trainer, BatchNorm set right",
    )


CASES: dict[str, Callable[[Path, Path, bool], Case]] = {
    "commands": commands_case,
    "banking77": banking_case,
    "phrases": phrases_case,
    "flowers": flowers_case,
    "flowers-kept": kept_case,
    "flowers-block": block_case,
}
NEEDS: dict[str, tuple[Path, ...]] = {
    "commands": (),
    "banking77": BANKING77,
    "phrases": SST2,
    "flowers": (FLOWERS, MOBILENET_V2),
    "flowers-kept": (FLOWERS, MOBILENET_V2),
    "flowers-block": (FLOWERS, MOBILENET_V2),
}


def _fix_splits(config: TrainConfig, folder: Path, most: int | None) -> TrainConfig:
    """Write training, validation and test rows as tables, so that all train on the same.

    What is held out does not change with the seed, and the data check has already had its say.

    Args:
        config: says where the data is.
        folder: where the tables go.
        most: rows of each class to take of the training data (and, for a quick run, the test
            data is thinned out alike); None for all.
    """
    dataset = load_dataset(data_source(config))
    report = check_dataset(dataset, min_per_class=config.min_per_class)
    kinds = tuple({problem.kind for problem in report.errors})
    dataset, _ = accept(dataset, report, kinds)
    folder.mkdir(parents=True)
    column = "text" if dataset.kind == "text" else "image"
    for name in ("train", "val", "test"):
        with _table(folder, name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow((column, "label"))
            writer.writerows(_rows(dataset, name, most))
    train, val, test = (str(_table(folder, name)) for name in ("train", "val", "test"))
    return dataclasses.replace(
        config, data=train, val=val, test=test, input_column=column, label_column="label"
    )


def _rows(dataset: Dataset, name: str, most: int | None) -> list[tuple[str, str]]:
    split: Split = dataset.splits[name]
    rows = list(zip(split.inputs, split.labels, strict=True))
    if most is None or (name == "test" and most >= 20):
        return rows
    seen: Counter[str] = Counter()
    kept = []
    for text, label in rows:
        seen[label] += 1
        if seen[label] <= most:
            kept.append((text, label))
    return kept


def _table(folder: Path, name: str) -> Path:
    return folder / f"{name}.csv"


# -- one case ------------------------------------------------------------------------------


def _run_case(case: Case, seeds: Iterable[int], *, tuned: bool) -> None:
    say(case.title)
    contenders: dict[str, Callable[[TrainConfig], Outcome]] = {
        "edgetune": train_with_edgetune,
        "Trainer": functools.partial(train_with_trainer, tuned=False),
    }
    if tuned:
        contenders[case.tuned] = functools.partial(train_with_trainer, tuned=True)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contenders}
    for seed in seeds:
        order = list(contenders)
        order = order[seed % len(order) :] + order[: seed % len(order)]
        for name in order:
            output = f"{case.config.output}-{name.split(',')[0]}-{seed}"
            config = dataclasses.replace(case.config, seed=seed, output=output)
            found = _alone(contenders[name], config)
            outcomes[name].append(found)
            say(
                f"seed {seed}, {name}: test accuracy {found.accuracy:.4f},"
                f" {found.samples_per_s:.1f} samples/s, {found.run_seconds:.0f} s"
            )
    _print_case(case, outcomes)


def _alone(call: Callable[[TrainConfig], Outcome], config: TrainConfig) -> Outcome:
    """Call in a fresh process: no caches, allocator settings or threads of an earlier training."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(call, config).result()


def _print_case(case: Case, outcomes: dict[str, list[Outcome]]) -> None:
    config = case.config
    print(f"### {case.title}\n")
    sizes = [len(_read(Path(path))) for path in _tables(config).values()]
    print(f"- {sizes[0]} training, {sizes[1]} validation, {sizes[2]} test rows")
    adapter = (
        f"LoRA r {config.lora_r}, alpha {config.lora_alpha:g}, dropout {config.lora_dropout:g}"
        if config.method == "lora"
        else f"last {config.last_blocks} blocks and head"
    )
    print(
        f"- {adapter}; lr {config.lr:g}, {config.schedule}, warm-up"
        f" {percent(config.warmup_fraction)} %; batch {config.batch_size}, {config.epochs} epochs;"
        f" weight decay {config.weight_decay:g}; clipped at {config.grad_clip:g};"
        f" {config.precision}{', CPU' if config.cpu else ''}\n"
    )
    rows = []
    for name, found in outcomes.items():
        accuracies = [outcome.accuracy for outcome in found]
        spread = statistics.stdev(accuracies) if len(found) > 1 else math.nan
        rows.append(
            (
                name,
                ", ".join(percent(a) for a in accuracies),
                percent(statistics.mean(accuracies)),
                f"{100 * spread:.2f}",
                ", ".join(str(outcome.best_epoch) for outcome in found),
                f"{statistics.median(o.samples_per_s for o in found):.1f}",
                f"{statistics.median(o.later_samples_per_s for o in found):.1f}",
                f"{statistics.median(o.run_seconds for o in found):.1f}",
                f"{max(o.peak_rss_mib for o in found):.0f}",
            )
        )
    print_table(
        (
            "trained with", "test accuracy %, by seed", "mean", "SD", "best epochs",
            "train samples/s", "from epoch 2", "run s", "peak RSS MiB",
        ),
        rows,
    )  # fmt: skip
    ours = outcomes["edgetune"]
    for name, theirs in outcomes.items():
        if name == "edgetune":
            continue
        difference, low, high = difference_interval(
            [o.correct for o in ours], [o.correct for o in theirs]
        )
        print(
            f"- edgetune - {name}: {points(difference)} points (95 % interval {points(low)} to"
            f" {points(high)}); training {_ratio(ours, theirs, lambda o: o.samples_per_s)} times as"
            f" fast, from epoch 2 {_ratio(ours, theirs, lambda o: o.later_samples_per_s)}, whole"
            f" run {_ratio(ours, theirs, lambda o: 1 / o.run_seconds)}"
        )
    print(flush=True)


def _ratio(
    ours: Sequence[Outcome], theirs: Sequence[Outcome], speed: Callable[[Outcome], float]
) -> str:
    """Return the ratio of the median speeds, and that of the slowest and fastest seed."""
    ratio = statistics.median(map(speed, ours)) / statistics.median(map(speed, theirs))
    each = [speed(a) / speed(b) for a, b in zip(ours, theirs, strict=True)]
    return f"{ratio:.2f} ({min(each):.2f} to {max(each):.2f})"


def difference_interval(
    ours: Sequence[Sequence[bool]], theirs: Sequence[Sequence[bool]]
) -> tuple[float, float, float]:
    """Return the difference of mean accuracies and its 95 % interval.

    Three things could have come out otherwise: our seeds, their seeds, the test samples. Their
    variances add up; Student's t has the Welch-Satterthwaite degrees of freedom. With one seed
    only the test samples count.

    Args:
        ours: right or wrong, shape (seeds, test samples).
        theirs: the same of the other trainer.
    """
    import numpy as np
    from scipy import stats

    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = float(a.mean() - b.mean())
    each = a.mean(axis=0) - b.mean(axis=0)  # (test samples,): paired, what both miss cancels
    parts = [(each.var(ddof=1) / each.size, each.size - 1)]
    parts += [(x.mean(axis=1).var(ddof=1) / len(x), len(x) - 1) for x in (a, b) if len(x) > 1]
    variance = sum(v for v, _ in parts)
    if variance == 0:
        return difference, difference, difference
    freedom = variance**2 / sum(v**2 / n for v, n in parts)
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return difference, difference - reach, difference + reach


# -- edgetune ------------------------------------------------------------------------------


def train_with_edgetune(config: TrainConfig) -> Outcome:
    """Train as `edgetune train` does; measure the best epoch on the test rows."""
    _preload()
    from edgetune.bench.evaluate import answer_run
    from edgetune.train import Event, train
    from edgetune.train.run import open_run, run_dataset

    samples = 0
    passes: list[float] = []
    prepared: list[float] = []

    def watch(event: Event) -> None:
        nonlocal samples
        if event.kind == "preparing":
            prepared.append(event.values["seconds"])
        elif event.kind == "plan":
            samples = event.values["train"]
        elif event.kind == "epoch":
            passes.append(event.values["pass_seconds"])

    with contextlib.redirect_stdout(sys.stderr):
        begin = time.monotonic()
        record = train(config, on_event=watch)
        run_seconds = time.monotonic() - begin
        run = open_run(Path(config.output))
        answers = answer_run(run.task, run_dataset(run).splits["test"], record.labels)
    return Outcome(
        correct=tuple((answers.predicted == answers.truth).tolist()),
        best_epoch=record.best_epoch,
        samples=samples,
        pass_seconds=(passes[0] + max(prepared, default=0.0), *passes[1:]),
        run_seconds=run_seconds,
        peak_rss_mib=peak_rss_mib() or math.nan,
    )


# -- transformers' Trainer and peft --------------------------------------------------------


def train_with_trainer(config: TrainConfig, *, tuned: bool) -> Outcome:
    """Train with transformers' Trainer, set up from the same config; see the section's text."""
    _preload()
    import transformers
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    class Passes(TrainerCallback):  # type: ignore[misc]
        """Times the passes over the training data."""

        seconds: list[float] = []  # noqa: RUF012

        def on_epoch_begin(self, *_: object, **__: object) -> None:
            self.begin = time.monotonic()

        def on_epoch_end(self, *_: object, **__: object) -> None:
            self.seconds.append(time.monotonic() - self.begin)

    class KeepBest(TrainerCallback):  # type: ignore[misc]
        """Keeps what training changed at the best epoch: accuracy first, then loss."""

        best: tuple[float, float] | None = None
        epoch = evaluations = 0
        state: dict[str, Any] = {}  # noqa: RUF012

        def on_evaluate(self, *_: object, metrics: Any, model: Any, **__: object) -> None:
            self.evaluations += 1
            value = (metrics["eval_accuracy"], -metrics["eval_loss"])
            if self.best is None or value > self.best:
                self.best, self.epoch = value, self.evaluations
                self.state = {
                    name: tensor.detach().clone() for name, tensor in _changing(model).items()
                }

    begin = time.monotonic()
    rows = {name: _read(Path(p)) for name, p in _tables(config).items()}
    labels = sorted({label for _, label in rows["train"]})
    transformers.set_seed(config.seed)
    model, datasets, collator, processing = _PARTS[config.task](config, rows, labels, tuned)
    steps = config.epochs * math.ceil(len(rows["train"]) / config.batch_size)
    workers = 0 if (os.cpu_count() or 1) <= 2 else min(8, (os.cpu_count() or 1) - 1)
    passes, keep_best = Passes(), KeepBest()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=config.output,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=2 * config.batch_size,
            learning_rate=config.lr,
            lr_scheduler_type=config.schedule,
            warmup_steps=round(config.warmup_fraction * steps),
            weight_decay=config.weight_decay,
            max_grad_norm=config.grad_clip,
            optim="adamw_torch_fused",
            train_sampling_strategy=(
                "group_by_length" if tuned and config.method == "lora" else "random"
            ),
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            dataloader_pin_memory=not config.cpu,
            remove_unused_columns=False,
            label_names=["labels"],
            seed=config.seed,
            use_cpu=config.cpu,
            bf16=config.precision == "bf16",
        ),
        train_dataset=datasets["train"],
        eval_dataset=datasets["val"],
        data_collator=collator,
        processing_class=processing,
        compute_metrics=_accuracy,
        callbacks=[passes, keep_best],
    )
    trainer.remove_callback(PrinterCallback)
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
        model.load_state_dict(keep_best.state, strict=False)
        run_seconds = time.monotonic() - begin
        predicted = trainer.predict(datasets["test"])
    return Outcome(
        correct=tuple((predicted.predictions.argmax(-1) == predicted.label_ids).tolist()),
        best_epoch=keep_best.epoch,
        samples=len(rows["train"]),
        pass_seconds=tuple(passes.seconds),
        run_seconds=run_seconds,
        peak_rss_mib=peak_rss_mib() or math.nan,
    )


Rows = dict[str, list[tuple[str, str]]]


def _text_parts(config: TrainConfig, rows: Rows, labels: list[str], tuned: bool) -> Any:  # noqa: ARG001
    """Return MiniLM with LoRA and a trained head, tokenized splits, collator, tokenizer."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
    )

    tokenizer = AutoTokenizer.from_pretrained(config.model)
    network = AutoModelForSequenceClassification.from_pretrained(
        config.model,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        dtype=torch.float32,
    )
    model = get_peft_model(
        network,
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=["query", "value"],
            modules_to_save=["pooler", "classifier"],
        ),
    )
    datasets = {}
    for name, split in rows.items():
        encoded = tokenizer(
            [text for text, _ in split], truncation=True, max_length=config.max_length
        )
        datasets[name] = [
            {key: values[i] for key, values in encoded.items()} | {"labels": labels.index(label)}
            for i, (_, label) in enumerate(split)
        ]
    return model, datasets, DataCollatorWithPadding(tokenizer), tokenizer


def _image_parts(config: TrainConfig, rows: Rows, labels: list[str], tuned: bool) -> Any:
    """Return MobileNetV2 with its last blocks free, the images, collator, image processor."""
    import torch
    from torch import nn
    from transformers import (
        AutoImageProcessor,
        AutoModelForImageClassification,
        default_data_collator,
    )

    model = AutoModelForImageClassification.from_pretrained(
        config.model,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )
    model.requires_grad_(False)
    body = model.mobilenet_v2
    for part in (*body.layer[-config.last_blocks :], body.conv_1x1, model.classifier):
        part.requires_grad_(True)
    if tuned:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
                if not module.weight.requires_grad:
                    module.eval()
                    module.train = lambda mode=True, module=module: module  # noqa: ARG005
    processor = AutoImageProcessor.from_pretrained(config.model)
    if config.image_size is not None:
        shorter = round(processor.size["shortest_edge"] * config.image_size / _crop(processor))
        processor.size = {"shortest_edge": shorter}
        processor.crop_size = {"height": config.image_size, "width": config.image_size}
    datasets = {
        name: _Photos(
            split, labels, processor, augment=name == "train" and config.augment != "none"
        )
        for name, split in rows.items()
    }
    return model, datasets, default_data_collator, processor


def _crop(processor: Any) -> int:
    return int(processor.crop_size["height"])


class _Photos:
    """Images as the image processor gives them; a torch map-style dataset."""

    def __init__(
        self, rows: list[tuple[str, str]], labels: list[str], processor: Any, *, augment: bool
    ) -> None:
        self.rows, self.labels, self.processor, self.augment = rows, labels, processor, augment
        self.decoded: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image

        path, label = self.rows[index]
        if index not in self.decoded:
            with Image.open(path) as file:
                self.decoded[index] = file.convert("RGB")
        image = self.decoded[index]
        if self.augment:
            image = _crop_and_mirror(image)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.labels.index(label)}


def _crop_and_mirror(image: Any) -> Any:
    """Return a window of 40 to 100 % of the area, mirrored every other time, as edgetune does."""
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms import functional as transforms

    window = RandomResizedCrop.get_params(image, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3))
    image = transforms.crop(image, *window)
    return transforms.hflip(image) if random.random() < 0.5 else image


_PARTS = {"text-classification": _text_parts, "image-classification": _image_parts}


def _changing(model: Any) -> dict[str, Any]:
    """Return trainable parameters and all buffers; BatchNorm's statistics are buffers."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return parameters | dict(model.named_buffers())


def _accuracy(predicted: Any) -> dict[str, float]:
    correct = predicted.predictions.argmax(-1) == predicted.label_ids
    return {"accuracy": float(correct.mean())}


def _tables(config: TrainConfig) -> dict[str, str]:
    return {"train": config.data, "val": config.val, "test": config.test}


def _read(table: Path) -> list[tuple[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return [(row[0], row[1]) for row in list(csv.reader(file))[1:]]


def _preload() -> None:
    """Import what either trainer needs, so that no import is timed and the memory compares."""
    import accelerate  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import torchvision  # noqa: F401
    from transformers import (  # noqa: F401
        AutoImageProcessor,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        Trainer,
    )
    from transformers.models.bert import modeling_bert  # noqa: F401
    from transformers.models.mobilenet_v2 import modeling_mobilenet_v2  # noqa: F401


if __name__ == "__main__":
    main()
