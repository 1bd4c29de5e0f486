"""Where a run begins, or goes on: from a config or a run folder to the loop."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from edgetune.config import TrainConfig
from edgetune.data import (
    Dataset,
    Scale,
    accept,
    check_dataset,
    class_counts,
    load_dataset,
    scale_of,
)
from edgetune.errors import ConfigError, ResourceError
from edgetune.models.adapt import adapt, frozen_sha256, parameter_counts
from edgetune.models.families import Family
from edgetune.models.load import load_model
from edgetune.runtime.files import write_atomic
from edgetune.runtime.records import to_mapping
from edgetune.tasks import (
    TaskModel,
    open_task,
    selection_metric,
    task_kind,
)
from edgetune.train.batch_size import LARGEST, batch_size_note, find_batch_size, free_unused
from edgetune.train.batches import BatchOrder
from edgetune.train.engine import Engine
from edgetune.train.events import Event, OnEvent, note, silent
from edgetune.train.feeding import Feeder
from edgetune.train.loop import Loop
from edgetune.train.lr_finder import find_lr, lr_files, lr_note
from edgetune.train.machine import (
    Machine,
    default_workers,
    open_machine,
)
from edgetune.train.optim import learning_rate
from edgetune.train.run import (
    RunRecord,
    data_source,
    read_run,
    run_dataset_of,
    versions,
    write_config,
    write_record,
)

# fewest steps of an epoch with a batch size that is to be found
STEPS_PER_EPOCH = 10


def train(config: TrainConfig, *, on_event: OnEvent | None = None) -> RunRecord:
    """Fine-tune as `config` says and write the run folder `config.output`.

    Launched by torchrun or `accelerate launch` it is called in every process; the first one
    writes and speaks.

    Args:
        config: from `load_config`.
        on_event: called with what happens, to show it.

    Returns:
        the run's record; its status is "interrupted" where Ctrl-C or SIGTERM ended it.

    Raises:
        ConfigError: the output exists, or the config does not fit the model.
        DataError: the data check found what would waste the run.
        ResourceError: memory or disk ran out.
    """
    config = _resolved(config)
    folder = Path(config.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"output {folder}: exists already; name another folder, or go on with:"
            f" edgetune train --resume {folder}"
        )
    dataset = load_dataset(data_source(config))
    report = check_dataset(dataset, min_per_class=config.min_per_class)
    dataset, left_out = accept(dataset, report, config.allow)
    machine = open_machine(config)
    say = _speaker(machine, on_event)
    for problem in report.problems:
        say(note(f"data: {problem.message}"))
    config, files = _searched(config, dataset, machine, say)
    scale = scale_of(dataset.splits["train"])
    task, family = _adapted(config, dataset.labels, scale)
    trainable, total = parameter_counts(task.network)
    record = RunRecord(
        status="running",
        task=config.task,
        labels=dataset.labels,
        trainable_parameters=trainable,
        parameters=total,
        frozen_sha256=frozen_sha256(task.network),
        scale=scale,
        left_out=left_out,
        versions=versions(),
    )
    machine.wait()
    if machine.is_main:
        files |= task.device_files() | {
            "data.json": json.dumps(to_mapping(report), indent=2).encode()
        }
        _create(folder, config, record, files)
    machine.wait()
    return Loop(config, folder, task, family, dataset, record, machine, say).run()


def resume(folder: Path, *, on_event: OnEvent | None = None) -> RunRecord:
    """Go on with an interrupted run from its newest whole checkpoint.

    Raises:
        ConfigError: the folder is no run, the run is finished, or base model or data changed.
        IntegrityError: no checkpoint is whole.
    """
    config, record = read_run(folder)
    if record.status == "finished":
        raise ConfigError(f"{folder}: is finished; train anew with another output")
    config = dataclasses.replace(config, output=str(folder))
    dataset = run_dataset_of(config, record)
    machine = open_machine(config)
    task, family = _adapted(config, record.labels, record.scale)
    if frozen_sha256(task.network) != record.frozen_sha256:
        raise ConfigError(
            f"model {config.model!r} is not the one that {folder} began with: its weights changed"
        )
    say = _speaker(machine, on_event)
    loop = Loop(config, folder, task, family, dataset, record, machine, say)
    loop.restore()
    return loop.run()


def _speaker(machine: Machine, on_event: OnEvent | None) -> OnEvent:
    return on_event if on_event is not None and machine.is_main else silent


def _resolved(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on other keys, and make local paths absolute.

    A run can then be resumed, measured and exported from any folder.
    """
    local: dict[str, Any] = {
        key: str(Path(value).expanduser().absolute())
        for key in ("data", "val", "test", "model", "weights", "output")
        if (value := getattr(config, key))
        and (key == "output" or Path(value).expanduser().exists())
    }
    metric = selection_metric(config)
    return dataclasses.replace(config, lr=learning_rate(config), metric=metric, **local)


def _searched(
    config: TrainConfig, dataset: Dataset, machine: Machine, say: OnEvent
) -> tuple[TrainConfig, dict[str, bytes]]:
    """Settle the batch size and the learning rate where the config leaves them to be found.

    Returns:
        the config, and what the run keeps of the search, by the name of the file.
    """
    files: dict[str, bytes] = {}
    if config.batch_size == 0:
        config = _with_batch_size(config, dataset, machine, say)
        free_unused(machine.device)
    if config.find_lr:
        config, files = _with_lr(config, dataset, machine, say)
        free_unused(machine.device)
    return config, files


def _with_batch_size(
    config: TrainConfig, dataset: Dataset, machine: Machine, say: OnEvent
) -> TrainConfig:
    with _on_trial(config, dataset, machine) as (engine, task):
        train_samples = task.samples(dataset.splits["train"], training=True)
        val_samples = task.samples(dataset.splits["val"], training=False)
        samples = len(train_samples)
        # larger batches leave an epoch too few steps to learn in
        largest = max(4, min(LARGEST, samples // STEPS_PER_EPOCH))

        def progress(size: int) -> None:
            values = {"done": size, "of": largest, "text": "batch sizes"}
            say(Event(kind="preparing", values=values))

        found = find_batch_size(
            engine, train_samples, val_samples, largest=largest, progress=progress
        )
    say(note(batch_size_note(found, samples)))
    return dataclasses.replace(config, batch_size=found.batch_size)


def _with_lr(
    config: TrainConfig, dataset: Dataset, machine: Machine, say: OnEvent
) -> tuple[TrainConfig, dict[str, bytes]]:
    # an average of the weights has no part in it
    with _on_trial(dataclasses.replace(config, ema_decay=0.0), dataset, machine) as (engine, task):
        samples = task.samples(dataset.splits["train"], training=True)
        order = BatchOrder(
            len(samples), config.batch_size, lengths=samples.lengths, seed=config.seed
        )
        workers = config.workers if config.workers is not None else default_workers()
        feed = Feeder(
            samples, order, device=machine.device, rank=machine.rank, processes=machine.processes,
            workers=0 if samples.lengths is not None else workers,
        )  # fmt: skip

        def progress(done: int, steps: int) -> None:
            values = {"done": done, "of": steps, "text": "learning rates"}
            say(Event(kind="preparing", values=values))

        try:
            curve = find_lr(engine, feed, progress=progress)
        finally:
            feed.close()
    say(note(lr_note(curve)))
    return dataclasses.replace(config, lr=machine.same(curve.lr), find_lr=False), lr_files(curve)


@contextmanager
def _on_trial(
    config: TrainConfig, dataset: Dataset, machine: Machine
) -> Iterator[tuple[Engine, TaskModel]]:
    """Give an engine to try things on; the run's own is made anew and knows nothing of it."""
    scaler = machine.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else None
    train = dataset.splits["train"]
    task, family = _adapted(config, dataset.labels, scale_of(train))
    counts = class_counts(dataset)
    try:
        yield Engine(config, task, family, machine, counts, len(train.labels)), task
    finally:
        machine.accelerator.free_memory()
        if scaler is not None:
            scaler.load_state_dict(scale)


def _adapted(
    config: TrainConfig, labels: tuple[str, ...], scale: Scale | None
) -> tuple[TaskModel, Family]:
    # torch's generator decides the fresh head and the adapters' start
    torch.manual_seed(config.seed)
    loaded = load_model(
        config.model, kind=task_kind(config.task), labels=labels, weights=config.weights
    )
    adapt(loaded.network, loaded.family, config)
    return open_task(config.task, loaded, labels, config, scale=scale), loaded.family


def _create(
    folder: Path, config: TrainConfig, record: RunRecord, files: Mapping[str, bytes]
) -> None:
    """Make the run folder, whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_config(partial, config)
        for name, data in files.items():
            write_atomic(partial / name, data)
        write_record(partial, record)
        if folder.exists():  # an empty folder that the user made
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ResourceError(f"output {folder}: cannot be written: {error}") from error
