"""The training loop: one for every task, method and number of GPUs.

An epoch's order, its augmentation, its dropout and its schedule are functions of the config and
the step, so a checkpoint holds only tensors and a few counters, and a resumed run goes on with
the very batches that were left.
"""

import dataclasses
import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edgetune.config import TrainConfig
from edgetune.data import (
    Dataset,
    class_counts,
)
from edgetune.errors import ConfigError, DataError, ResourceError
from edgetune.models.families import Family
from edgetune.runtime.files import replace_atomic
from edgetune.runtime.records import to_mapping
from edgetune.tasks import (
    MINIMIZED,
    Samples,
    TaskModel,
    selection_metric,
)
from edgetune.tasks.curves import write_curves
from edgetune.train.activations import Refused
from edgetune.train.batches import BatchOrder
from edgetune.train.checkpoint import Position, load_checkpoint, save_checkpoint
from edgetune.train.energy import EnergyMeter, gpus_in_use
from edgetune.train.engine import Engine
from edgetune.train.events import Event, OnEvent, note
from edgetune.train.feeding import Feeder
from edgetune.train.history import read_history, write_history
from edgetune.train.keeping import Kept, keep_frozen, refusal_of
from edgetune.train.machine import (
    Machine,
    default_workers,
    keep_freed_memory,
    peak_memory_mib,
)
from edgetune.train.optim import learning_rate
from edgetune.train.rehearsal import rehearse
from edgetune.train.run import (
    BEST_NAME,
    RunRecord,
    write_record,
)
from edgetune.train.runs import hold_run
from edgetune.train.schedules import lr_factor
from edgetune.train.track import open_trackers
from edgetune.train.validation import Measured, measure

EVENT_SECONDS = 0.2
CACHE_FOLDER = "cache"
# samples that show which BatchNorm follows which convolution
FOLDING_SAMPLES = 4
# batches after which processes agree on what a signal or the clock said to one of them
AGREE_EVERY = 10
AGREE_SECONDS = 2.0
# of a time budget: what is spent before the length of the run is settled
SETTLE_SHARE = 0.05
# steps from which compiling is expected to pay back, on a GPU
COMPILE_STEPS = 2000


class Loop:
    """One run in memory."""

    def __init__(
        self, config: TrainConfig, folder: Path, task: TaskModel, family: Family,
        dataset: Dataset, record: RunRecord, machine: Machine, say: OnEvent,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.task, self.record = config, folder, task, record
        self.machine, self.say = machine, say
        self.samples: dict[str, Samples] = {
            name: task.samples(dataset.splits[name], training=name == "train")
            for name in ("train", "val")
        }
        self.engine = Engine(
            config, task, family, machine, class_counts(dataset), len(self.samples["train"])
        )
        keep_freed_memory()
        self.train_feed = self._feeder("train")
        self.val_feed = self._feeder("val")
        self.steps_per_epoch = -(-len(self.train_feed) // config.grad_accumulation)
        self.position = Position(steps=config.epochs * self.steps_per_epoch)
        self.settled = config.time_budget == 0
        self.stop_signal = 0
        self.saved_at = self.started = time.monotonic()
        self.seconds_before = 0.0
        self.energy_before: float | None = 0.0
        self.shown_at = 0.0
        self.agree_every = AGREE_EVERY
        self.pass_seconds = self.samples_per_s = 0.0
        self.cached = ""
        self.meter = EnergyMeter(gpus=gpus_in_use() if machine.device.type == "cuda" else ())

    # -- the run ---------------------------------------------------------------------------

    def restore(self) -> None:
        """Go back to the newest whole checkpoint; without one, begin at the beginning."""
        folder = self.folder / "checkpoints"
        if not folder.is_dir() or not any(folder.glob("step-*")):
            self.say(note("no checkpoint yet: from the beginning"))
            return
        self.position, groups, skipped = load_checkpoint(folder)
        if len(set(self.machine.gather(self.position.step))) > 1:
            raise ResourceError(
                f"{folder}: processes see different checkpoints; its file system is behind, try"
                " again in a minute"
            )
        self.engine.restore(groups)
        for line in skipped:
            self.say(note(line))
        self.settled = self.config.time_budget == 0 or self.position.epoch > 0
        self.seconds_before = self.position.seconds
        self.energy_before = self.position.energy_wh
        if self.machine.is_main:
            history = [h for h in read_history(self.folder) if h["epoch"] <= self.position.epoch]
            write_history(self.folder, history)

    def run(self) -> RunRecord:
        """Train from where the position is to the end, early stopping or an interrupt."""
        with ExitStack() as stack:
            stack.callback(self._close)
            if self.machine.is_main:
                stack.enter_context(hold_run(self.folder))
            stack.enter_context(self._interruptible())
            self._follow(stack)
            self.started = time.monotonic()
            self.meter.start()
            few = self.train_feed.order.batches(0)[0][:FOLDING_SAMPLES]
            self.engine.fold(self.train_feed.batch_of(few))
            self._keep_activations()
            self._compile()
            self._say_plan()
            while self._is_unfinished():
                finished = self._epoch()
                self._clock()
                if not finished:
                    return self._interrupted()
                self._validate()
                self._save()
                if any(self.machine.gather(self.stop_signal)) and self._is_unfinished():
                    return self._interrupted()
            return self._finished()
        raise AssertionError  # the stack swallows nothing

    def _is_unfinished(self) -> bool:
        stale = 0 < self.config.patience <= self.position.stale_epochs
        left = self.position.step < self.position.steps
        return left and self.position.epoch < self.config.epochs and not stale

    def _epoch(self) -> bool:
        """Train the rest of the current epoch; return False where an interrupt cut it short."""
        accumulation = self.config.grad_accumulation
        epoch, begin = self.position.epoch, self.position.batch
        sizes = [len(b) for b in self.train_feed.order.batches(epoch)]
        self.engine.train_mode(epoch)
        # summed where it is computed, so that no step waits for the device
        loss_sum, weight_sum = (
            torch.tensor(value, dtype=torch.float64, device=_sum_device(self.machine))
            for value in (self.position.loss_sum, self.position.loss_weight)
        )
        step, began = self.position.step, time.monotonic()
        for batch in self.train_feed.epoch(epoch, begin):
            done = batch.number + 1
            first = batch.number // accumulation * accumulation
            is_step = done % accumulation == 0 or done == len(sizes)
            loss, weight = self.engine.accumulate(
                batch, epoch=epoch, rows=sum(sizes[first : first + accumulation]), last=is_step
            )
            loss_sum += loss
            weight_sum += weight
            if not is_step:
                continue
            self._update(step)
            step += 1
            self._settle(step, (step - self.position.step) / (time.monotonic() - began))
            samples = sum(sizes[begin:done])
            self._show(step, done, len(sizes), (loss_sum, weight_sum), samples, began)
            is_last = done == len(sizes) or step >= self.position.steps
            stopping = self._agreed_stop(step)
            if (stopping or self._is_save_due(step)) and not is_last:
                self._note_losses(loss_sum, weight_sum)
                loss_sum.fill_(self.position.loss_sum)  # from here on, of all processes
                weight_sum.fill_(self.position.loss_weight)
                self._move(step=step, batch=done)
                self._save()
                began, begin = time.monotonic(), done
                if stopping:
                    return False
            if is_last:
                break
        self._note_losses(loss_sum, weight_sum)
        self._move(step=step, batch=len(sizes))
        self.pass_seconds = max(1e-9, time.monotonic() - began)
        self.samples_per_s = sum(sizes[begin:]) / self.pass_seconds
        return True

    def _update(self, step: int) -> None:
        factor = lr_factor(
            self.config, step, self.position.steps, steps_per_epoch=self.steps_per_epoch,
            plateau_drops=self.position.plateau.drops,
        )  # fmt: skip
        self.engine.update(factor, step, self.position.steps)

    def _validate(self) -> None:
        """End the epoch: measure, keep the best, write history and curves."""
        train_loss = self.position.loss_sum / max(1e-12, self.position.loss_weight)
        self._check_finite(train_loss)
        epoch = self.position.epoch + 1
        with self.engine.evaluating():
            measured = measure(self.engine, self.val_feed)
            better = self._is_better(measured)
            if better and (self.machine.is_main or self.engine.sharded):
                self._save_best()
        self._clock()
        line = {
            "epoch": epoch,
            "step": self.position.step,
            "train_loss": round(train_loss, 6),
            **{f"val_{k}": round(v, 6) for k, v in measured.values.items()},
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            "seconds": round(self.position.seconds, 3),
            "pass_seconds": round(self.pass_seconds, 3),
            "samples_per_s": round(self.samples_per_s, 2),
            "peak_memory_mib": round(peak_memory_mib(self.machine.device), 1),
        }
        if self.position.energy_wh is not None:
            line["energy_wh"] = round(self.position.energy_wh, 4)
        if self.machine.is_main:
            history = [h for h in read_history(self.folder) if h["epoch"] < epoch]
            write_history(self.folder, [*history, line])
            write_curves(
                self.folder / "curves.png", [*history, line], metric=selection_metric(self.config)
            )
        value = self._selection(measured)
        self._move(
            epoch=epoch,
            batch=0,
            loss_sum=0.0,
            loss_weight=0.0,
            best_epoch=epoch if better else self.position.best_epoch,
            best_value=value if better else self.position.best_value,
            best_loss=measured.values["loss"] if better else self.position.best_loss,
            stale_epochs=0 if better else self.position.stale_epochs + 1,
            plateau=self.position.plateau.after(
                value, lambda new, best: new > best, self.config.schedule_epochs
            ),
        )
        if better:
            metrics = {f"val_{k}": v for k, v in measured.values.items()}
            self.record = dataclasses.replace(self.record, best_epoch=epoch, metrics=metrics)
        self.say(Event(kind="epoch", values={**line, "best": better, "epochs": self._epochs()}))

    # -- before the first step -------------------------------------------------------------

    def _keep_activations(self) -> None:
        """Keep what the frozen first layers hand over, where that pays and changes nothing."""
        # a resumed run does as it began: kept activations differ by rounding
        wanted = self.position.kept or self.config.activation_cache
        if wanted == "off":
            return
        refusal = refusal_of(self.config, self.engine, self.samples["train"])
        kept: Kept | None = None
        if refusal is None:
            try:
                kept = keep_frozen(
                    self.engine, self.config, self.samples, self.folder / CACHE_FOLDER,
                    "disk" if wanted == "disk" else "memory", progress=self._show_preparing,
                )  # fmt: skip
            except Refused as reason:
                refusal = str(reason)
        if kept is not None:
            self.samples, self.engine.cut = dict(kept.samples), kept.cut
            self.train_feed, self.val_feed = self._feeder("train"), self._feeder("val")
            self.cached = f"{kept.nbytes / 2**20:.0f} MiB in {kept.place}"
        if not self.position.kept:
            self._move(kept="off" if kept is None else kept.place)
        if refusal is not None and (wanted != "auto" or self.config.augment_views):
            self.say(note(f"activations are not kept: {refusal}"))

    def _show_preparing(self, done: int, samples: int, seconds: float) -> None:
        now = time.monotonic()
        if now - self.shown_at >= EVENT_SECONDS or done == samples:
            self.shown_at = now
            values = {
                "done": done, "of": samples, "text": "frozen layers, once", "seconds": seconds,
            }  # fmt: skip
            self.say(Event(kind="preparing", values=values))

    def _compile(self) -> None:
        mode = self.config.compile
        on_gpu = self.machine.device.type == "cuda"
        if mode == "off" or (mode == "auto" and not (on_gpu and self._is_long())):
            return
        if self.engine.cut is not None:
            if mode == "on":
                self.say(note("not compiled: activations are kept (--activation-cache off)"))
            return
        self.engine.network.compile(dynamic=True if self.samples["train"].lengths else None)

    def _is_long(self) -> bool:
        # of the whole run: a resumed one is compiled if it was before
        return self.position.steps >= COMPILE_STEPS

    def _follow(self, stack: ExitStack) -> None:
        """Report to the trackers too."""
        if not self.config.track or not self.machine.is_main:
            return
        shown = self.say
        trackers = open_trackers(
            self.config.track, self.folder, self.config, to_mapping(self.record),
            steps_done=self.position.step, note=lambda text: shown(note(text)),
        )  # fmt: skip
        stack.callback(trackers.close)

        def both(event: Event) -> None:
            shown(event)
            trackers(event)

        self.say = both

    def _feeder(self, name: str) -> Feeder:
        samples, config = self.samples[name], self.config
        training = name == "train"
        order = BatchOrder(
            len(samples),
            config.batch_size * (1 if training else 2),
            lengths=samples.lengths,
            shuffle=training,
            seed=config.seed,
        )
        kept = self.engine.cut is not None or samples.lengths is not None
        workers = config.workers if config.workers is not None else default_workers()
        return Feeder(
            samples, order, device=self.machine.device, rank=self.machine.rank,
            processes=self.machine.processes, workers=0 if kept else workers,
        )  # fmt: skip

    # -- ends ------------------------------------------------------------------------------

    def _interrupted(self) -> RunRecord:
        self._write_record("interrupted")
        values = {"step": self.position.step, "steps": self.position.steps, "folder": self.folder}
        self.say(Event(kind="interrupted", values=values))
        return self.record

    def _finished(self) -> RunRecord:
        self._write_record("finished")
        if self.machine.is_main:
            shutil.rmtree(self.folder / CACHE_FOLDER, ignore_errors=True)
        self.say(
            Event(
                kind="finished",
                values={
                    "best_epoch": self.record.best_epoch,
                    "epochs": self.position.epoch,
                    "stopped_early": self.position.step < self.position.steps,
                    "folder": self.folder,
                    "seconds": self.position.seconds,
                    "energy_wh": self.position.energy_wh,
                    **self.record.metrics,
                },
            )
        )
        return self.record

    def _close(self) -> None:
        self.meter.close()
        self.train_feed.close()
        self.val_feed.close()

    # -- time ------------------------------------------------------------------------------

    def _clock(self) -> None:
        read = self.meter.read()
        energy = None
        if read is not None and self.energy_before is not None:
            energy = self.energy_before + read.watt_hours
        self._move(seconds=self._used(), energy_wh=energy)

    def _used(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _settle(self, step: int, steps_per_s: float) -> None:
        """Fit the run's length to the time budget: once early on, and where it runs out."""
        budget = 60 * self.config.time_budget
        if not budget:
            return
        if self.machine.processes > 1 and step % self.agree_every:
            return
        per_step = 1 / steps_per_s
        # a pass forward is about a third of a step
        share = len(self.samples["val"]) / max(1, len(self.samples["train"]))
        validation = self.steps_per_epoch * per_step * share / 3
        used = self._used()
        most = self.config.epochs * self.steps_per_epoch
        steps = self.position.steps
        is_due = used > SETTLE_SHARE * budget or step % self.steps_per_epoch == 0
        if self.settled and used + validation > budget:
            steps = min(steps, step)
        elif not self.settled and is_due:
            left = max(0.0, budget - used - validation)
            fitting = int(left / (per_step + validation / self.steps_per_epoch))
            steps = min(most, max(step + 1, step + fitting))
        steps, settled = self.machine.same((steps, self.settled or is_due))
        if settled and not self.settled and steps < most:
            epochs = steps / self.steps_per_epoch
            self.say(note(f"{self.config.time_budget:g} minutes allow {epochs:.1f} epochs"))
        self.settled = settled
        self._move(steps=steps)

    def _is_save_due(self, step: int) -> bool:
        if self.config.checkpoint_steps:
            return step % self.config.checkpoint_steps == 0
        overdue = time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes
        if self.machine.processes == 1:
            return overdue
        return step % self.agree_every == 0 and bool(self.machine.same(overdue))

    def _agreed_stop(self, step: int) -> bool:
        if self.machine.processes == 1:
            return self.stop_signal != 0
        if step % self.agree_every:
            return False
        return any(self.machine.gather(self.stop_signal))

    # -- details ---------------------------------------------------------------------------

    def _say_plan(self) -> None:
        found = rehearse(
            self.engine, self.train_feed, self.config.grad_accumulation, validation=self.val_feed
        )
        # launchers wait half a minute for an end; agreeing costs little beside a slow step
        often = int(AGREE_SECONDS / max(1e-6, found.seconds_per_step))
        self.agree_every = self.machine.same(max(1, min(AGREE_EVERY, often)))
        left = self.position.steps - self.position.step
        passes = self._epochs() - self.position.epoch
        minutes = (found.seconds_per_step * left + (found.validation_seconds or 0) * passes) / 60
        if self.config.time_budget:
            minutes = min(minutes, self.config.time_budget)
        self.say(
            Event(
                kind="plan",
                values={
                    "model": self.config.model,
                    "method": self.config.method,
                    "trainable": self.record.trainable_parameters,
                    "parameters": self.record.parameters,
                    "labels": len(self.record.labels),
                    "train": len(self.samples["train"]),
                    "val": len(self.samples["val"]),
                    "steps": self.position.steps,
                    "steps_done": self.position.step,
                    "epochs": self.config.epochs,
                    "device": str(self.machine.device),
                    "processes": self.machine.processes,
                    "precision": self.machine.precision.replace("no", "fp32"),
                    "lr": learning_rate(self.config),
                    "batch_size": self.config.batch_size,
                    "memory_mib": found.memory_mib,
                    "minutes": minutes,
                    "kept": self.cached,
                },
            )
        )

    def _show(
        self, step: int, batch: int, batches: int, losses: tuple[Tensor, Tensor], samples: int,
        began: float,
    ) -> None:  # fmt: skip
        """Report progress a few times a second; only then is the loss fetched."""
        now = time.monotonic()
        if now - self.shown_at < EVENT_SECONDS:
            return
        self.shown_at = now
        loss = float(losses[0]) / max(1e-12, float(losses[1]))
        if self.machine.processes == 1:
            self._check_finite(loss)
        values = {
            "step": step,
            "steps": self.position.steps,
            "epoch": self.position.epoch + 1,
            "epochs": self._epochs(),
            "batch": batch,
            "batches": batches,
            "loss": loss,
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            "samples_per_s": samples / max(1e-9, now - began),
        }
        self.say(Event(kind="step", values=values))

    def _epochs(self) -> int:
        return min(self.config.epochs, -(-self.position.steps // self.steps_per_epoch))

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise DataError(
                f"the training loss is {loss} in epoch {self.position.epoch + 1};"
                f" lower lr (now {learning_rate(self.config):g}) or use precision fp32"
            )

    def _note_losses(self, loss_sum: Tensor, weight_sum: Tensor) -> None:
        """Put the epoch's losses into the position; each process keeps the sum over all."""
        own = torch.stack([loss_sum, weight_sum])
        if self.machine.processes > 1:
            # what was summed before a resume is in every process already
            before = torch.tensor(
                [self.position.loss_sum, self.position.loss_weight], dtype=own.dtype
            ).to(own.device)
            own = before + self.machine.sum(own - before)
        self._move(loss_sum=float(own[0]), loss_weight=float(own[1]))

    def _selection(self, measured: Measured) -> float:
        metric = selection_metric(self.config)
        return measured.values[metric] * (-1 if metric in MINIMIZED else 1)

    def _is_better(self, measured: Measured) -> bool:
        best, best_loss = self.position.best_value, self.position.best_loss
        if best is None or best_loss is None:
            return True
        value = self._selection(measured)
        return value > best or (value == best and measured.values["loss"] < best_loss)

    def _move(self, **changes: Any) -> None:
        self.position = dataclasses.replace(self.position, **changes)

    def _save(self) -> None:
        self._clock()
        self.engine.share_statistics()
        if self.machine.is_main or self.engine.sharded:
            groups = self.engine.groups()
            if self.machine.is_main:
                # killed between the two, an epoch is done again rather than its record lost
                self._write_record("running")
                save_checkpoint(self.folder / "checkpoints", groups, self.position)
        self.saved_at = time.monotonic()

    def _save_best(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        state = self.engine.trained()
        if not self.machine.is_main:
            return

        def write(path: Path) -> None:
            try:
                save_file(state, path)
            except SafetensorError as error:  # its own for a full disk
                raise OSError(str(error)) from error

        replace_atomic(self.folder / BEST_NAME, write)

    def _write_record(self, status: Literal["running", "interrupted", "finished"]) -> None:
        self.record = dataclasses.replace(
            self.record,
            status=status,
            seconds=round(self.position.seconds, 3),
            energy_wh=self.position.energy_wh,
        )
        if self.machine.is_main:
            write_record(self.folder, self.record)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM end the run after its step; a second ends it at once."""

        def handle(number: int, frame: object) -> None:  # noqa: ARG001
            # a launcher may send SIGTERM twice; only a person who presses again means it
            if self.stop_signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = number
            self.say(note("stopping after this step"))

        try:
            previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, which alone gets signals
            previous = {}
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of memory at batch_size {self.config.batch_size}; lower batch_size and"
                " raise grad_accumulation by as much, or let --batch-size 0 find one"
            ) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                "BatchNorm was given one sample of one pixel: raise batch_size (of one process)"
                " or image_size"
            ) from error
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _sum_device(machine: Machine) -> torch.device:
    """Return where losses are summed in float64; Apple's GPUs have none."""
    return torch.device("cpu") if machine.device.type == "mps" else machine.device
