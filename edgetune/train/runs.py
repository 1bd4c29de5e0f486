"""Runs on the disk: found, told apart, compared and cleaned up.

What is read is read leniently, so that runs of other versions are listed too; what is removed is
removed strictly: only what training wrote and can do without.
"""

import dataclasses
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgetune.config import TrainConfig, read_toml
from edgetune.errors import ConfigError, IntegrityError, ResourceError
from edgetune.runtime.learn.disk import Disk, Lock
from edgetune.runtime.records import to_mapping
from edgetune.tasks import MINIMIZED
from edgetune.train.history import HISTORY_NAME, read_history
from edgetune.train.run import BEST_NAME, RECORD_NAME
from edgetune.train.track import IDS_NAME

Status = Literal["running", "interrupted", "finished"]
Cleaning = Literal["checkpoints", "failed"]

LOCK_NAME = ".lock"
CHECKPOINTS, CACHE = "checkpoints", "cache"
_ATTEMPTS = 5
# what training, its trackers and an export write into a run's folder
_FILES = (
    "config.toml", "data.json", "tokenizer.json", HISTORY_NAME, "curves.png", BEST_NAME,
    "lr_finder.png", "lr_finder.json", IDS_NAME, LOCK_NAME,
)  # fmt: skip
_FOLDERS = (CHECKPOINTS, CACHE, "tensorboard", "wandb", "export-cache")
# what decides which samples a run is validated on
_VALIDATION_KEYS = ("task", "data", "val", "val_fraction", "input_column", "label_column")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run as a list shows it.

    name: where it lies below the folder that was searched.
    status: as recorded; "interrupted" too where the record says that it runs and the process
        that trained it is known to be gone.
    known: whether "running" is known; else it is only what the record says.
    epochs, epochs_planned: how many are done, of how many.
    metric: what picked the best epoch, as "accuracy".
    metrics: of the best epoch, by names as "val_loss"; {} before the first.
    changed: when it was last written, seconds since 1970.
    config: every key, as in config.toml.
    history: the lines of metrics.jsonl.
    """

    name: str
    folder: Path
    status: Status
    known: bool
    task: str
    epochs: int
    epochs_planned: int
    best_epoch: int
    metric: str
    metrics: Mapping[str, float]
    trainable_parameters: int
    seconds: float
    energy_wh: float | None
    changed: float
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]

    @property
    def value(self) -> float | None:
        """The metric that picked the best epoch; None before the first."""
        return self.metrics.get(f"val_{self.metric}")

    @property
    def rank(self) -> float:
        """The same, higher for better; minus infinity before the first."""
        if self.value is None:
            return float("-inf")
        return -self.value if self.metric in MINIMIZED else self.value


@dataclass(frozen=True, kw_only=True)
class Found:
    """Runs, by name, and a line for each folder that holds a run.json and can't be read."""

    runs: tuple[RunSummary, ...]
    damaged: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs beside each other: key -> a value a run, None where it has none.

    config: the keys that differ.
    results: what came out.
    notes: why results may not compare.
    """

    config: Mapping[str, tuple[Any, ...]]
    results: Mapping[str, tuple[Any, ...]]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What can be removed of a run.

    what: in words.
    paths: files and folders, in the order in which to remove them.
    """

    folder: Path
    name: str
    what: str
    paths: tuple[Path, ...]
    size_bytes: int


# -- who trains it -----------------------------------------------------------------------------


@contextmanager
def hold_run(folder: Path) -> Iterator[None]:
    """Mark a run as being trained, until the end or the death of this process.

    Where the file system has no locks, nothing is marked.

    Raises:
        ConfigError: another process trains it.
    """
    path = folder / LOCK_NAME
    try:
        lock = _lock(path)
    except BlockingIOError as error:
        raise ConfigError(
            f"{folder}: another process trains it right now; wait for it or stop it"
        ) from error
    except OSError:
        yield
        return
    try:
        # other machines may not see the lock: they shall not take the run for dead
        with suppress(OSError):  # Windows: what is locked can't be written
            path.write_text(socket.gethostname())
        yield
    finally:
        lock.close()


def _lock(path: Path) -> Lock:
    """Take the lock; `is_held` of another process may have it for a moment."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return Disk().lock(path)
        except BlockingIOError:
            time.sleep(0.05)
    return Disk().lock(path)


def is_held(folder: Path) -> bool | None:
    """Return whether a process trains the run; None where that can't be known."""
    path = folder / LOCK_NAME
    try:
        host = path.read_text() if path.is_file() else None
    except OSError:
        host = ""
    if host is None:
        return None
    try:
        Disk().lock(path).close()
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False if host == socket.gethostname() else None


# -- find --------------------------------------------------------------------------------------


def find_runs(folder: Path) -> Found:
    """Return the runs in `folder` and below, by name; hidden folders are passed over.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; name one that holds runs")
    runs: list[RunSummary] = []
    damaged: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if RECORD_NAME not in files:
            continue
        folders.clear()  # what lies in a run belongs to it
        path = Path(place)
        name = str(path.relative_to(folder)) if path != folder else path.resolve().name
        try:
            runs.append(summarize(path, name=name))
        except (ConfigError, IntegrityError) as error:
            damaged.append(str(error))
    return Found(runs=tuple(runs), damaged=tuple(damaged))


def summarize(folder: Path, *, name: str = "") -> RunSummary:
    """Read a run.

    Args:
        folder: the run.
        name: to show; the folder's own where it is "".

    Raises:
        ConfigError: the folder is no run of edgetune, or its config can't be read.
        IntegrityError: its record or history is damaged.
    """
    record = _read_record(folder)
    try:
        history = read_history(folder)
        epochs = max((int(line["epoch"]) for line in history), default=0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / HISTORY_NAME}: is damaged: {error}") from error
    config = _defaults() | read_toml(folder / "config.toml")
    held = is_held(folder) if record["status"] == "running" else False
    metrics = {k: float(v) for k, v in record["metrics"].items()}
    return RunSummary(
        name=name or folder.resolve().name,
        folder=folder,
        status="interrupted" if record["status"] == "running" and held is False
        else record["status"],
        known=held is not None,
        task=record["task"],
        epochs=epochs,
        epochs_planned=int(config["epochs"]),
        best_epoch=int(record["best_epoch"]),
        metric=_metric_of(str(config["metric"]), metrics),
        metrics=metrics,
        trainable_parameters=int(record["trainable_parameters"]),
        seconds=float(record["seconds"]),
        energy_wh=record["energy_wh"],
        changed=max(
            (folder / file).stat().st_mtime
            for file in (RECORD_NAME, HISTORY_NAME)
            if (folder / file).is_file()
        ),
        config=config,
        history=history,
    )  # fmt: skip


def _read_record(folder: Path) -> dict[str, Any]:
    """Return run.json with the keys that are needed, of their types; more keys stand it."""
    path = folder / RECORD_NAME
    if not path.is_file():
        raise ConfigError(f"{folder}: is no run of edgetune train (it has no {RECORD_NAME})")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: is damaged: {error}") from error
    marks = ("status", "task", "labels", "frozen_sha256")
    if not isinstance(record, dict) or any(mark not in record for mark in marks):
        raise ConfigError(f"{path}: is of no run of edgetune train")
    if record["status"] not in get_args(Status):
        raise IntegrityError(
            f"{path}: status: expected one of {', '.join(get_args(Status))},"
            f" got {record['status']!r}"
        )
    record = {"best_epoch": 0, "metrics": {}, "seconds": 0.0, "energy_wh": None,
              "trainable_parameters": 0, **record}  # fmt: skip
    numbers = [record[k] for k in ("best_epoch", "seconds", "trainable_parameters")]
    if not isinstance(record["metrics"], dict) or not isinstance(record["task"], str):
        raise IntegrityError(f"{path}: is damaged: task or metrics are of another type")
    numbers += [*record["metrics"].values(), record["energy_wh"] or 0.0]
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise IntegrityError(f"{path}: is damaged: expected numbers, got {numbers}")
    return record


def _metric_of(metric: str, metrics: Mapping[str, float]) -> str:
    """Return the metric that picks; of "auto", as in configs that were not resolved, a guess."""
    if metric != "auto":
        return metric
    return next((m for m in ("accuracy", "loss") if f"val_{m}" in metrics), "accuracy")


def _defaults() -> dict[str, Any]:
    """Return the config that a run of an earlier version had where it lacks a key."""
    return {
        f.name: list(f.default) if isinstance(f.default, tuple) else f.default
        for f in dataclasses.fields(TrainConfig)
    }


# -- compare -----------------------------------------------------------------------------------


def compare_runs(runs: Sequence[RunSummary]) -> Comparison:
    """Return what differs in the configs of two or more runs, and what came out.

    Raises:
        ConfigError: there are fewer than two.
    """
    if len(runs) < 2:
        raise ConfigError(f"expected two runs or more to compare, got {len(runs)}")
    config = {}
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = tuple(run.config.get(key) for run in runs)
        if key != "output" and any(value != values[0] for value in values):
            config[key] = values
    results: dict[str, tuple[Any, ...]] = {
        "status": tuple(run.status for run in runs),
        "epochs": tuple(run.epochs for run in runs),
        "best_epoch": tuple(run.best_epoch or None for run in runs),
    }
    for key in dict.fromkeys(key for run in runs for key in run.metrics):
        results[key] = tuple(run.metrics.get(key) for run in runs)
    results["train_loss"] = tuple(_of_best(run, "train_loss") for run in runs)
    results["trainable_parameters"] = tuple(run.trainable_parameters for run in runs)
    results["minutes"] = tuple(run.seconds / 60 for run in runs)
    for key in ("samples_per_s", "peak_memory_mib"):
        results[key] = tuple(run.history[-1].get(key) if run.history else None for run in runs)
    results["energy_wh"] = tuple(run.energy_wh for run in runs)
    results = {k: v for k, v in results.items() if any(x is not None for x in v)}
    return Comparison(config=config, results=results, notes=_notes(config, runs))


def _notes(differing: Mapping[str, tuple[Any, ...]], runs: Sequence[RunSummary]) -> tuple[str, ...]:
    keys = [key for key in _VALIDATION_KEYS if key in differing]
    # without validation data of its own, the seed decides what is held out
    if "seed" in differing and not keys and not all(run.config["val"] for run in runs):
        keys.append("seed")
    if not keys:
        return ()
    return (
        f"{', '.join(keys)} differ: where that changes what the runs were validated on, their"
        " metrics don't compare",
    )


def _of_best(run: RunSummary, key: str) -> float | None:
    return next((line.get(key) for line in run.history if line["epoch"] == run.best_epoch), None)


def plain_summary(run: RunSummary) -> dict[str, Any]:
    """Return a run as JSON holds it, without config and history."""
    plain = to_mapping(run)
    plain = {k: v for k, v in plain.items() if k not in ("config", "history", "known", "folder")}
    extra = {key: run.config[key] for key in ("model", "method")}
    value = {} if run.value is None else {"value": run.value}
    return {"folder": str(run.folder), **plain, **extra, **value}


# -- clean -------------------------------------------------------------------------------------


def find_removals(
    found: Found, kinds: Sequence[Cleaning]
) -> tuple[tuple[Removal, ...], tuple[str, ...]]:
    """Return what can be removed of runs, and a line for what is left alone though it looks so.

    Args:
        found: from `find_runs`; damaged runs are never touched.
        kinds: "checkpoints": those of finished runs, which can't be resumed, and kept
            activations, which are computed anew; "failed": runs that reached neither an epoch
            nor a checkpoint. Runs that train, or may, are left alone.
    """
    removals: list[Removal] = []
    notes: list[str] = []
    for run in found.runs:
        if run.status == "running":
            notes.append(f"{run.name}: {'is' if run.known else 'may be'} running: left alone")
            continue
        has_checkpoint = any((run.folder / CHECKPOINTS).glob("step-*"))
        failed = not (run.epochs or has_checkpoint or (run.folder / BEST_NAME).is_file())
        if failed and run.status != "finished":
            if "failed" in kinds:
                _plan_whole(run, removals, notes)
            continue
        if "checkpoints" in kinds:
            parts = ((CHECKPOINTS,) if run.status == "finished" else ()) + (CACHE,)
            words = {CHECKPOINTS: "checkpoints", CACHE: "kept activations"}
            for part in parts:
                path = run.folder / part
                if path.is_symlink():
                    notes.append(f"{run.name}: {part} is a link: left alone")
                elif path.is_dir():
                    removals.append(_removal(run, words[part], (path,)))
    return tuple(removals), tuple(notes)


def _plan_whole(run: RunSummary, removals: list[Removal], notes: list[str]) -> None:
    if (run.folder.parent.parent / "study.db").is_file():
        notes.append(f"{run.name}: is a trial of a search, which keeps count of it: left alone")
        return
    own: list[Path] = []
    others: list[Path] = []
    for path in sorted(run.folder.iterdir()):
        if path.name == RECORD_NAME:
            continue
        is_partial = path.name.startswith(".") and path.name.endswith(".partial")
        is_own = path.name in (_FOLDERS if path.is_dir() else _FILES) or is_partial
        (own if is_own and not path.is_symlink() else others).append(path)
    if others:
        names = ", ".join(path.name for path in others)
        notes.append(f"{run.name}: holds what training did not write ({names}): left alone")
        return
    # the record last: what is cut short is found again
    removals.append(_removal(run, "run without an epoch", (*own, run.folder / RECORD_NAME)))


def remove(removal: Removal) -> None:
    """Remove it, and the run's folder where nothing is left in it.

    Raises:
        ConfigError: a process trains the run by now.
        ResourceError: something can't be removed.
    """
    if is_held(removal.folder):
        raise ConfigError(f"{removal.folder}: a process began to train it: left alone")
    try:
        for path in removal.paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if not any(removal.folder.iterdir()):
            removal.folder.rmdir()
    except OSError as error:
        raise ResourceError(f"{removal.folder}: can't be removed: {error}") from error


def _removal(run: RunSummary, what: str, paths: tuple[Path, ...]) -> Removal:
    size = sum(_size_bytes(path) for path in paths)
    return Removal(folder=run.folder, name=run.name, what=what, paths=paths, size_bytes=size)


def _size_bytes(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(
        (Path(place) / name).lstat().st_size
        for place, _, names in os.walk(path)
        for name in names
    )  # fmt: skip
