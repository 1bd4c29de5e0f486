"""A run's folder: what training writes, and what evaluation and export read.

config.toml          the resolved config
run.json             this module's RunRecord
data.json            what the data check found
tokenizer.json       text only
metrics.jsonl        one line an epoch
curves.png
best.safetensors     the trained tensors of the best epoch
checkpoints/         to resume from
lr_finder.png, .json where the learning rate was to be found
tensorboard/, ...    what --track reports to
cache/               kept activations, while it runs and they are on disk
.lock                held while its process lives
"""

import dataclasses
import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from edgetune.config import TrainConfig, load_config
from edgetune.data import Dataset, DataSource, Scale, accept, check_dataset, load_dataset
from edgetune.errors import ConfigError, IntegrityError
from edgetune.models.adapt import adapt, frozen_sha256, load_trainable, merge_adapters
from edgetune.models.families import Family
from edgetune.models.load import load_model
from edgetune.runtime.files import write_atomic
from edgetune.runtime.records import from_mapping, to_mapping
from edgetune.tasks import TaskModel, open_task, task_kind, task_target

RECORD_NAME = "run.json"
BEST_NAME = "best.safetensors"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run is and how far it came.

    frozen_sha256: of the frozen base parameters, which the run does not store.
    scale: of a regression, how its values are learned.
    left_out: where the samples lie that an allowed data problem took out.
    energy_wh: of the whole run; None where nothing measures it.
    """

    status: Literal["running", "interrupted", "finished"]
    task: str
    labels: tuple[str, ...]
    trainable_parameters: int
    parameters: int
    frozen_sha256: str
    scale: Scale | None = None
    left_out: tuple[str, ...] = ()
    best_epoch: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    energy_wh: float | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """An opened run: its record, its data source and its task with the best weights in it."""

    folder: Path
    config: TrainConfig
    record: RunRecord
    family: Family
    task: TaskModel


def data_source(config: TrainConfig) -> DataSource:
    """Return what the config says of the data."""
    return DataSource(
        kind=task_kind(config.task),
        data=config.data,
        val=config.val,
        test=config.test,
        input_column=config.input_column,
        label_column=config.label_column,
        val_fraction=config.val_fraction,
        seed=config.seed,
        target=task_target(config.task),
        label_separator=config.label_separator,
    )


def run_dataset(run: Run) -> Dataset:
    """Read an opened run's data again, as training saw it; see `run_dataset_of`."""
    return run_dataset_of(run.config, run.record)


def run_dataset_of(config: TrainConfig, record: RunRecord) -> Dataset:
    """Read a run's data again, as training saw it.

    Raises:
        DataError: it is gone.
        ConfigError: its labels are no longer the run's.
    """
    dataset = load_dataset(data_source(config))
    if record.left_out:
        report = check_dataset(dataset, min_per_class=config.min_per_class)
        dataset, _ = accept(dataset, report, config.allow)
    if dataset.labels != record.labels:
        raise ConfigError(
            f"{config.data}: its labels are no longer those of the run"
            f" ({len(dataset.labels)} now, {len(record.labels)} then)"
        )
    return dataset


def open_run(folder: Path) -> Run:
    """Open a run and put its best weights into its model; LoRA comes merged.

    Raises:
        ConfigError: the folder is no run, has no trained weights yet, or the base model is not
            the one it was trained on.
        IntegrityError: a file of the run is damaged.
    """
    config, record = read_run(folder)
    if not (folder / BEST_NAME).is_file():
        raise ConfigError(
            f"{folder}: no epoch was finished yet; go on with: edgetune train --resume {folder}"
        )
    loaded = load_model(
        config.model,
        kind=task_kind(config.task),
        labels=record.labels,
        weights=config.weights,
    )
    adapt(loaded.network, loaded.family, config)
    if frozen_sha256(loaded.network) != record.frozen_sha256:
        raise ConfigError(
            f"model {config.model!r} is not the one that {folder} was trained on:"
            " its weights have changed; restore them, or train again"
        )
    load_trainable(loaded.network, _read_best(folder))
    merge_adapters(loaded.network)
    loaded.network.eval().requires_grad_(False)
    task = open_task(config.task, loaded, record.labels, config, scale=record.scale)
    return Run(folder=folder, config=config, record=record, family=loaded.family, task=task)


def read_run(folder: Path) -> tuple[TrainConfig, RunRecord]:
    """Read a run's config and record.

    Raises:
        ConfigError: the folder is no run.
        IntegrityError: its record is damaged.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        raise ConfigError(f"{folder}: is no run of edgetune train (it has no {RECORD_NAME})")
    try:
        mapping: Any = json.loads(path.read_text())
    except ValueError as error:
        raise IntegrityError(f"{path}: is damaged: {error}") from error
    record = from_mapping(RunRecord, mapping, where=str(path), error=IntegrityError)
    return load_config(folder / "config.toml", {}), record


def write_record(folder: Path, record: RunRecord) -> None:
    """Write run.json."""
    write_atomic(folder / RECORD_NAME, json.dumps(to_mapping(record), indent=2).encode())


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the resolved config."""
    import tomli_w

    write_atomic(folder / "config.toml", tomli_w.dumps(to_mapping(config)).encode())


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = (
        "edgetune", "torch", "torchvision", "transformers", "peft", "accelerate", "bitsandbytes",
    )  # fmt: skip
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _read_best(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        state: dict[str, torch.Tensor] = load_file(folder / BEST_NAME)
    except Exception as error:  # safetensors raises its own
        raise IntegrityError(f"{folder / BEST_NAME}: is damaged: {error}") from error
    return state
