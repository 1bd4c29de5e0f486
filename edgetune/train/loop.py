"""The training loop: one for every task, method and number of GPUs, on accelerate.

An epoch's order, its augmentation and its schedule are functions of the config and the step,
so a checkpoint holds only tensors, the random state and a few counters, and a resumed run
goes on with the very batches that were left.
"""

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgetune.config import TrainConfig
from edgetune.data import Dataset, accept, check_dataset, load_dataset
from edgetune.errors import ConfigError, DataError, ResourceError
from edgetune.models.adapt import (
    adapt,
    frozen_sha256,
    parameter_counts,
    set_train_mode,
    trainable_state,
)
from edgetune.models.load import load_model
from edgetune.runtime.files import replace_atomic, write_atomic
from edgetune.runtime.records import to_mapping
from edgetune.tasks import TaskModel, open_task, task_kind
from edgetune.tasks.curves import write_curves
from edgetune.tasks.metrics import classification_report
from edgetune.train.batches import EpochBatches
from edgetune.train.checkpoint import Position, load_checkpoint, save_checkpoint
from edgetune.train.optim import learning_rate, lr_factor, make_optimizer
from edgetune.train.run import (
    BEST_NAME,
    RunRecord,
    data_source,
    read_run,
    run_dataset_of,
    versions,
    write_config,
    write_record,
)

EVENT_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something to show: "plan", "step", "epoch", "note", "interrupted" or "finished"."""

    kind: Literal["plan", "step", "epoch", "note", "interrupted", "finished"]
    values: Mapping[str, Any]


OnEvent = Callable[[Event], None]


def train(config: TrainConfig, *, on_event: OnEvent | None = None) -> RunRecord:
    """Fine-tune as `config` says and write the run folder `config.output`.

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
    say = on_event or _silent
    for problem in report.problems:
        say(Event(kind="note", values={"text": f"data: {problem.message}"}))
    # torch's generator decides the fresh head, LoRA's start and dropout
    torch.manual_seed(config.seed)
    task, output = _adapted(config, dataset.labels)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    write_atomic(folder / "data.json", json.dumps(to_mapping(report), indent=2).encode())
    for name, data in task.device_files().items():
        write_atomic(folder / name, data)
    trainable, total = parameter_counts(output)
    record = RunRecord(
        status="running",
        task=config.task,
        labels=dataset.labels,
        trainable_parameters=trainable,
        parameters=total,
        frozen_sha256=frozen_sha256(output),
        left_out=left_out,
        versions=versions(),
    )
    write_record(folder, record)
    return _Loop(config, folder, task, dataset, record, say).run()


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
    torch.manual_seed(config.seed)
    task, network = _adapted(config, record.labels)
    if frozen_sha256(network) != record.frozen_sha256:
        raise ConfigError(
            f"model {config.model!r} is not the one that {folder} began with: its weights changed"
        )
    loop = _Loop(config, folder, task, dataset, record, on_event or _silent)
    loop.restore()
    return loop.run()


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
    return dataclasses.replace(config, lr=learning_rate(config), **local)


def _adapted(config: TrainConfig, labels: tuple[str, ...]) -> tuple[TaskModel, nn.Module]:
    loaded = load_model(
        config.model, kind=task_kind(config.task), labels=labels, weights=config.weights
    )
    adapt(loaded.network, loaded.family, config)
    return open_task(config.task, loaded, labels, config), loaded.network


class _Loop:
    """One run in memory."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        task: TaskModel,
        dataset: Dataset,
        record: RunRecord,
        say: OnEvent,
    ) -> None:
        from accelerate import Accelerator
        from torch.utils.data import DataLoader

        self.config, self.folder, self.task, self.record = config, folder, task, record
        self.say = say
        self.accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=_mixed_precision(config),
            gradient_accumulation_steps=config.grad_accumulation,
        )
        samples = {
            name: task.samples(dataset.splits[name], training=name == "train")
            for name in ("train", "val")
        }
        self.batches = EpochBatches(
            len(samples["train"]),
            config.batch_size,
            lengths=samples["train"].lengths,
            seed=config.seed,
        )
        in_order = EpochBatches(
            len(samples["val"]), 2 * config.batch_size, lengths=samples["val"].lengths,
            shuffle=False,
        )  # fmt: skip
        workers = config.workers if config.workers is not None else _default_workers()
        loaders: list[Any] = [
            DataLoader(
                samples[name],  # type: ignore[arg-type]
                batch_sampler=sampler,
                collate_fn=task.collate,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=self.accelerator.device.type == "cuda",
                # each pass draws a seed; from the global generator it would shift dropout
                generator=torch.Generator(),
            )
            for name, sampler in (("train", self.batches), ("val", in_order))
        ]
        optimizer = make_optimizer(task.network, config)
        self.peak_lr = [group["lr"] for group in optimizer.param_groups]
        self.network, self.optimizer, self.train_loader, self.val_loader = self.accelerator.prepare(
            task.network, optimizer, *loaders
        )
        _keep_freed_memory()
        self.steps_per_epoch = -(-len(self.train_loader) // config.grad_accumulation)
        self.steps = config.epochs * self.steps_per_epoch
        self.position = Position()
        self.stop_signal = 0
        self.saved_at = self.started = time.monotonic()
        self.shown_at = 0.0
        self.train_samples = len(samples["train"])
        self.val_samples = len(samples["val"])

    # -- the run ---------------------------------------------------------------------------

    def restore(self) -> None:
        """Go back to the newest whole checkpoint; without one, begin at the beginning."""
        folder = self.folder / "checkpoints"
        if not folder.is_dir() or not any(folder.glob("step-*")):
            self.say(Event(kind="note", values={"text": "no checkpoint yet: from the beginning"}))
            return
        plain = self.accelerator.unwrap_model(self.network)
        self.position, skipped = load_checkpoint(folder, plain, self.optimizer.optimizer)
        for line in skipped:
            self.say(Event(kind="note", values={"text": line}))
        history = [h for h in read_history(self.folder) if h["epoch"] <= self.position.epoch]
        _write_history(self.folder, history)

    def run(self) -> RunRecord:
        """Train from where the position is to the end, early stopping or an interrupt."""
        self._say_plan()
        seconds_before = self.position.seconds
        self.started = time.monotonic()
        with self._interruptible():
            while self.position.epoch < self.config.epochs and not self._is_stale():
                finished = self._epoch()
                self._move(seconds=seconds_before + time.monotonic() - self.started)
                if not finished:
                    return self._interrupted()
                self._validate()
                self._save()
                if self.stop_signal and self.position.epoch < self.config.epochs:
                    return self._interrupted()
        return self._finished()

    def _epoch(self) -> bool:
        """Train the rest of the current epoch; return False where an interrupt cut it short."""
        accumulation = self.config.grad_accumulation
        self.batches.epoch, self.batches.start = self.position.epoch, self.position.batch
        set_train_mode(self.network)
        # summed where it is computed, so that no step waits for the device
        loss_sum = torch.tensor(
            self.position.loss_sum, dtype=torch.float64, device=_sum_device(self.accelerator)
        )
        count = self.position.loss_samples
        batch_number, batches = self.position.batch, len(self.train_loader) + self.batches.start
        step = self.position.step
        for batch in self.train_loader:
            batch_number += 1
            labels = batch.pop("labels")
            is_step = batch_number % accumulation == 0 or batch_number == batches
            with self._no_sync_unless(is_step):
                loss = nn.functional.cross_entropy(
                    self.task.logits(self.network, batch).float(), labels
                )
                self.accelerator.backward(loss / self._accumulated(batch_number, batches))
            loss_sum += loss.detach() * len(labels)
            count += len(labels)
            if not is_step:
                continue
            self._step(step)
            step += 1
            self._show(step, batch_number, batches, loss_sum, count)
            overdue = time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes
            if (self.stop_signal or overdue) and batch_number < batches:
                self._move(
                    step=step, batch=batch_number, loss_sum=float(loss_sum), loss_samples=count
                )
                self._save()
                if self.stop_signal:
                    return False
        self._move(step=step, batch=batches, loss_sum=float(loss_sum), loss_samples=count)
        return True

    def _step(self, step: int) -> None:
        """Clip, set the learning rate, update."""
        factor = lr_factor(self.config, step, self.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peak_lr, strict=True):
            group["lr"] = peak * factor
        if self.config.grad_clip:
            trainable = [p for p in self.network.parameters() if p.requires_grad]
            self.accelerator.clip_grad_norm_(trainable, self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _validate(self) -> None:
        """End the epoch: measure, keep the best, write history and curves."""
        loss, truth, predicted = self._predict_validation()
        report = classification_report(truth, predicted, self.task.labels, resamples=1)
        train_loss = self.position.loss_sum / max(1, self.position.loss_samples)
        if not torch.isfinite(torch.tensor(train_loss)):
            raise DataError(
                f"the training loss is {train_loss} after epoch {self.position.epoch + 1};"
                f" lower lr (now {learning_rate(self.config):g}) or use precision fp32"
            )
        epoch = self.position.epoch + 1
        measured = {
            "accuracy": report.accuracy.value,
            "f1_macro": report.f1_macro.value,
            "loss": loss,
        }
        value = measured[self.config.metric] * (-1 if self.config.metric == "loss" else 1)
        better = self._is_better(value, loss)
        line = {
            "epoch": epoch,
            "step": self.position.step,
            "train_loss": round(train_loss, 6),
            "val_loss": round(loss, 6),
            "val_accuracy": round(measured["accuracy"], 6),
            "val_f1_macro": round(measured["f1_macro"], 6),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(self.position.seconds, 3),
        }
        if self.accelerator.is_main_process:
            if better:
                self._save_best()
            history = [h for h in read_history(self.folder) if h["epoch"] < epoch]
            _write_history(self.folder, [*history, line])
            write_curves(self.folder / "curves.png", [*history, line])
        self._move(
            epoch=epoch,
            batch=0,
            loss_sum=0.0,
            loss_samples=0,
            best_epoch=epoch if better else self.position.best_epoch,
            best_value=value if better else self.position.best_value,
            best_loss=loss if better else self.position.best_loss,
            stale_epochs=0 if better else self.position.stale_epochs + 1,
        )
        if better:
            self.record = dataclasses.replace(
                self.record, best_epoch=epoch, metrics={f"val_{k}": v for k, v in measured.items()}
            )
        self.say(Event(kind="epoch", values={**line, "best": better, "epochs": self.config.epochs}))

    def _predict_validation(self) -> tuple[float, Any, Any]:
        """Return the mean loss, and truth and prediction as int64 arrays of shape (samples,)."""
        self.network.eval()
        losses: list[Tensor] = []
        truth: list[Tensor] = []
        predicted: list[Tensor] = []
        with torch.inference_mode():
            for batch in self.val_loader:
                labels = batch.pop("labels")
                logits = self.task.logits(self.network, batch).float()
                loss = nn.functional.cross_entropy(logits, labels, reduction="none")
                gathered = self.accelerator.gather_for_metrics((loss, labels, logits.argmax(-1)))
                for store, tensor in zip((losses, truth, predicted), gathered, strict=True):
                    store.append(tensor)
        return (
            float(torch.cat(losses).double().mean()),
            torch.cat(truth).cpu().numpy(),
            torch.cat(predicted).cpu().numpy(),
        )

    # -- ends ------------------------------------------------------------------------------

    def _interrupted(self) -> RunRecord:
        self._write_record("interrupted")
        self.say(
            Event(
                kind="interrupted",
                values={"step": self.position.step, "steps": self.steps, "folder": self.folder},
            )
        )
        return self.record

    def _finished(self) -> RunRecord:
        self._write_record("finished")
        self.say(
            Event(
                kind="finished",
                values={
                    "best_epoch": self.record.best_epoch,
                    "epochs": self.position.epoch,
                    "stopped_early": self.position.epoch < self.config.epochs,
                    "folder": self.folder,
                    "seconds": self.position.seconds,
                    **self.record.metrics,
                },
            )
        )
        return self.record

    # -- details ---------------------------------------------------------------------------

    def _say_plan(self) -> None:
        self.say(
            Event(
                kind="plan",
                values={
                    "model": self.config.model,
                    "method": self.config.method,
                    "trainable": self.record.trainable_parameters,
                    "parameters": self.record.parameters,
                    "labels": len(self.record.labels),
                    "train": self.train_samples,
                    "val": self.val_samples,
                    "steps": self.steps,
                    "steps_done": self.position.step,
                    "device": str(self.accelerator.device),
                    "processes": self.accelerator.num_processes,
                    "precision": _mixed_precision(self.config).replace("no", "fp32"),
                    "lr": learning_rate(self.config),
                    "batch_size": self.config.batch_size,
                },
            )
        )

    def _show(self, step: int, batch: int, batches: int, loss_sum: Tensor, count: int) -> None:
        """Report progress a few times a second; only then is the loss fetched."""
        now = time.monotonic()
        if now - self.shown_at < EVENT_SECONDS:
            return
        self.shown_at = now
        values = {
            "step": step,
            "steps": self.steps,
            "epoch": self.position.epoch + 1,
            "epochs": self.config.epochs,
            "batch": batch,
            "batches": batches,
            "loss": float(loss_sum) / max(1, count),
        }
        self.say(Event(kind="step", values=values))

    def _is_better(self, value: float, loss: float) -> bool:
        best, best_loss = self.position.best_value, self.position.best_loss
        if best is None or best_loss is None:
            return True
        return value > best or (value == best and loss < best_loss)

    def _is_stale(self) -> bool:
        return 0 < self.config.patience <= self.position.stale_epochs

    def _accumulated(self, batch_number: int, batches: int) -> int:
        """Return how many batches the current step sums over; the last may have fewer."""
        size = self.config.grad_accumulation
        first = (batch_number - 1) // size * size
        return min(size, batches - first)

    @contextmanager
    def _no_sync_unless(self, is_step: bool) -> Iterator[None]:
        if is_step:
            yield
        else:
            with self.accelerator.no_sync(self.network):
                yield

    def _move(self, **changes: Any) -> None:
        self.position = dataclasses.replace(self.position, **changes)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            plain = self.accelerator.unwrap_model(self.network)
            save_checkpoint(
                self.folder / "checkpoints", plain, self.optimizer.optimizer, self.position
            )
            self._write_record("running")
        self.saved_at = time.monotonic()

    def _save_best(self) -> None:
        from safetensors.torch import save_file

        plain = self.accelerator.unwrap_model(self.network)
        state = {n: t.contiguous().cpu() for n, t in trainable_state(plain).items()}

        def write(path: Path) -> None:
            try:
                save_file(state, path)
            except RuntimeError as error:  # safetensors' own error for a full disk
                raise OSError(str(error)) from error

        replace_atomic(self.folder / BEST_NAME, write)

    def _write_record(self, status: Literal["running", "interrupted", "finished"]) -> None:
        self.record = dataclasses.replace(
            self.record, status=status, seconds=round(self.position.seconds, 3)
        )
        if self.accelerator.is_main_process:
            write_record(self.folder, self.record)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM end the run after its step; a second ends it at once."""

        def handle(number: int, frame: object) -> None:  # noqa: ARG001
            if self.stop_signal:
                raise KeyboardInterrupt
            self.stop_signal = number
            self.say(Event(kind="note", values={"text": "stopping after this step"}))

        try:
            previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, which alone gets signals
            previous = {}
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of memory at batch_size {self.config.batch_size}; lower batch_size and"
                " raise grad_accumulation by as much"
            ) from error
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def read_history(folder: Path) -> list[dict[str, float]]:
    """Return metrics.jsonl, one mapping an epoch; [] where there is none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _write_history(folder: Path, history: list[dict[str, float]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in history)
    write_atomic(folder / "metrics.jsonl", text.encode())


def _mixed_precision(config: TrainConfig) -> str:
    """Return accelerate's word for the config's precision; "auto" looks at the machine."""
    if config.precision != "auto":
        return "no" if config.precision == "fp32" else config.precision
    if config.cpu or not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _default_workers() -> int:
    """Return how many processes load data: none where they would take the cores of training."""
    import os

    cores = os.cpu_count() or 1
    return 0 if cores <= 2 else min(8, cores - 1)


def _keep_freed_memory() -> None:
    """Tell glibc not to hand large freed blocks back to the system.

    A step frees and takes the same hundreds of MiB of activations again; given back, every page
    is zeroed and mapped anew each time, which took a third of a convolutional net's step.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def _sum_device(accelerator: Any) -> Any:
    """Return where losses are summed in float64; Apple's GPUs have none."""
    return "cpu" if accelerator.device.type == "mps" else accelerator.device


def _silent(event: Event) -> None:
    """Show nothing."""
