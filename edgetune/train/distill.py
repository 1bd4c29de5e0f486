"""A short training of a student network to answer as its teacher does (Hinton et al. 2015).

The student is what pruning or fake quantization made of the fine-tuned model, or the same model
at a smaller image size; the data is the run's own. Like the training loop, order and schedule are
functions of settings and step, so that an interrupted distillation goes on to the same bytes.
"""

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.config import TrainConfig
from edgetune.data import Split
from edgetune.errors import ConfigError, DataError, IntegrityError, ResourceError
from edgetune.models.adapt import set_train_mode
from edgetune.models.preprocessing import Preprocess
from edgetune.models.prune import taylor
from edgetune.runtime.files import replace_atomic
from edgetune.runtime.records import from_mapping, to_mapping
from edgetune.tasks import Samples, TaskModel
from edgetune.train.batches import BatchOrder
from edgetune.train.events import Event, OnEvent
from edgetune.train.fake_quant import has_static_ranges, is_prepared, observing
from edgetune.train.loop import EVENT_SECONDS
from edgetune.train.optim import make_optimizer
from edgetune.train.schedules import lr_factor

CHECKPOINT_NAME = "distill.safetensors"
# batches that settle static ranges before the first validation
OBSERVED_BATCHES = 8
GRAD_CLIP = 1.0


class _EpochKeys(BatchOrder):
    """A batch sampler of (epoch, index) keys; set `epoch` before iterating."""

    epoch = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches(self.epoch):
            yield [(self.epoch, int(i)) for i in batch]


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """What a distillation depends on.

    temperature, alpha: of `distillation_loss`.
    feature_weight: of the mean squared difference between the two networks' features, which
        must be as wide in both; 0 for none.
    augmentation: "task" has the student see the task's augmented inputs, and the teacher the
        very same ones, at its own size; "none" plain inputs, whose teacher's answers are
        computed once and kept.
    seconds: wall time after which training stops, whole epochs where it can; None for no limit.
    """

    epochs: int = 5
    lr: float = 5e-5
    batch_size: int = 32
    temperature: float = 2.0
    alpha: float = 0.9
    feature_weight: float = 0.0
    augmentation: Literal["none", "task"] = "none"
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    seed: int = 0
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            ConfigError: a value lies outside its bounds.
        """
        for name, lowest in (("epochs", 0), ("batch_size", 1), ("feature_weight", 0)):
            if getattr(self, name) < lowest:
                raise ConfigError(
                    f"{name}: expected at least {lowest}, got {getattr(self, name):g}"
                )
        for name in ("lr", "temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected more than 0, got {getattr(self, name):g}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha: expected 0 to 1, got {self.alpha:g}")


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What came of it.

    best_epoch: whose weights the student has now; 0 is as it was given.
    start_accuracy, accuracy, loss: on the validation split, before training and of the best.
    epochs: trained, the last one perhaps in part, where time ran out.
    history: one mapping an epoch, epoch 0 first.
    """

    best_epoch: int
    start_accuracy: float
    accuracy: float
    loss: float
    epochs: int
    seconds: float
    history: tuple[dict[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """Where a distillation is, kept in its checkpoint."""

    epoch: int = 0
    step: int = 0
    planned_epochs: int = 0
    finished: bool = False
    best_epoch: int = 0
    best_accuracy: float = -1.0
    best_loss: float = 0.0
    seconds: float = 0.0
    history: tuple[dict[str, float], ...] = ()


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, alpha: float
) -> Tensor:
    """Return alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy, a mean over samples.

    The divergence is between softmax(teacher / T) and softmax(student / T); T^2 gives its
    gradient the size of the cross-entropy's.

    Args:
        student: logits, shape (batch, labels).
        teacher: logits, shape (batch, labels).
        labels: true indices, int64 (batch,).
        temperature: T > 0.
        alpha: share of the soft targets, 0 to 1.

    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2.
    """
    soft = functional.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    hard = functional.cross_entropy(student, labels)
    return alpha * temperature**2 * soft + (1 - alpha) * hard


def student_of(task: TaskModel, network: nn.Module, *, image_size: int | None = None) -> TaskModel:
    """Return `task` around another network; `task` is left as it is.

    Args:
        task: the fine-tuned model's.
        network: the student.
        image_size: side of the student's input in pixels; None for the task's own.

    Raises:
        ConfigError: `image_size` is given and the task has no images.
    """
    student: Any = copy.copy(task)
    student.network = network
    if image_size is not None:
        preprocess = getattr(task, "preprocess", None)
        if not isinstance(preprocess, Preprocess):
            raise ConfigError("image_size: this task has no images")
        student.preprocess = Preprocess(preprocess.spec.at_size(image_size))
    found: TaskModel = student
    return found


def taylor_of(
    task: TaskModel, split: Split, *, samples: int = 256, batch_size: int = 32, seed: int = 0
) -> dict[str, Tensor]:
    """Return `edgetune.models.prune.taylor` of a task's network on some samples of a split.

    The loss is the cross-entropy with the true labels; samples are drawn by `seed`, batches of
    like length.
    """
    encoded = task.samples(split, training=False)
    batches = _EpochKeys(len(encoded), batch_size, lengths=encoded.lengths, seed=seed)
    chosen = list(batches)[: max(1, samples // batch_size)]
    device = _device()
    home = next(task.network.parameters()).device

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        return functional.cross_entropy(task.logits(network, inputs), batch["labels"].to(device))

    found = taylor(
        task.network.to(device), (task.collate([encoded[k] for k in keys]) for keys in chosen), loss
    )
    task.network.to(home)
    return {name: tensor.to(home) for name, tensor in found.items()}


def distill(
    student: TaskModel,
    teacher: TaskModel,
    train: Split,
    val: Split,
    settings: DistillSettings,
    *,
    output: str = "",
    checkpoint: Path | None = None,
    workers: int = 0,
    on_event: OnEvent | None = None,
) -> Distilled:
    """Train the student's network in place, and leave it with its best weights, in eval mode.

    The best is by accuracy on `val`, then by loss, of every epoch and of the student as given: it
    never gets worse than it was. Parameters that require gradients train, or all where none
    does; afterwards none does. A network prepared by `fake_quant.prepare` keeps BatchNorm's
    statistics, any other moves them on.

    Args:
        student: its network has the teacher's labels.
        teacher: its network is not changed.
        train: the run's training data.
        val: the run's validation data.
        settings: what to do.
        output: the family's last layer, needed for `feature_weight` only.
        checkpoint: folder for the state after each epoch; a state of the same settings and
            student that lies there is gone on with.
        workers: processes that load data.
        on_event: called with what happens ("step", "epoch", "note"), as the training loop does.

    Raises:
        ConfigError: the checkpoint is of another student or other settings.
        IntegrityError: the checkpoint is damaged.
        DataError: the loss is no number.
        ResourceError: memory ran out, or the checkpoint cannot be written.
    """
    if student.labels != teacher.labels:
        raise ConfigError("the student's labels are not the teacher's")
    if settings.feature_weight and not output:
        raise ConfigError("feature_weight: needs the name of the networks' last layer in `output`")
    homes = [next(t.network.parameters()).device for t in (student, teacher)]
    trained = [p.requires_grad for p in teacher.network.parameters()]
    if not any(p.requires_grad for p in student.network.parameters()):
        student.network.requires_grad_(True)
    taps = _Taps(student.network, teacher.network, output if settings.feature_weight else "")
    device = _device()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return _Distillation(
                student, teacher, train, val, settings,
                taps=taps, checkpoint=checkpoint, workers=workers, say=on_event or _silent,
            ).run()  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"out of memory at batch_size {settings.batch_size}; lower batch_size"
        ) from error
    finally:
        taps.close()
        student.network.to(homes[0]).eval().requires_grad_(False)
        teacher.network.to(homes[1])
        for parameter, flag in zip(teacher.network.parameters(), trained, strict=True):
            parameter.requires_grad_(flag)


class _Distillation:
    """One distillation in memory."""

    def __init__(
        self,
        student: TaskModel,
        teacher: TaskModel,
        train: Split,
        val: Split,
        settings: DistillSettings,
        *,
        taps: "_Taps",
        checkpoint: Path | None,
        workers: int,
        say: OnEvent,
    ) -> None:
        self.started = time.monotonic()
        self.shown_at = 0.0
        self.student, self.teacher, self.settings = student, teacher, settings
        self.checkpoint, self.say = checkpoint, say
        self.device = _device()
        self.network = student.network.to(self.device)
        self.identity = _identity(self.network, settings, len(train.labels), len(val.labels))
        self.teacher_network = teacher.network.to(self.device).eval().requires_grad_(False)
        augmented = settings.augmentation == "task"
        own = student.samples(train, training=augmented)
        theirs = teacher.samples(train, training=augmented)
        self.batches = _EpochKeys(
            len(own), settings.batch_size, lengths=own.lengths, seed=settings.seed
        )
        val_samples = student.samples(val, training=False)
        in_order = _EpochKeys(
            len(val_samples), 2 * settings.batch_size, lengths=val_samples.lengths, shuffle=False
        )
        self.train_loader = self._loader(own, theirs if augmented else None, self.batches, workers)
        self.val_loader = self._loader(val_samples, None, in_order, workers)
        self.taps = taps
        self.config = TrainConfig(
            optimizer="adamw", lr=settings.lr, weight_decay=settings.weight_decay,
            schedule="cosine", warmup_fraction=settings.warmup_fraction,
        )  # fmt: skip
        self.optimizer = make_optimizer(self.network, self.config)
        self.progress = _Progress(planned_epochs=settings.epochs)
        self.best: dict[str, Tensor] = {}
        self.seconds_before = 0.0
        resumed = self._restore()
        # kept answers: (samples, labels), and the features behind them
        self.soft: Tensor | None = None
        self.soft_features: Tensor | None = None
        if not augmented and not self.progress.finished:
            self.soft, self.soft_features = self._teach(theirs, teacher, workers)
        if not resumed:
            self._observe()
            self._judge(0, train_loss=0.0, lr=0.0)

    def run(self) -> Distilled:
        while self.progress.epoch < self.progress.planned_epochs and not self.progress.finished:
            self._epoch()
            self._save()
        self.network.load_state_dict(self.best)
        p = self.progress
        return Distilled(
            best_epoch=p.best_epoch,
            start_accuracy=p.history[0]["val_accuracy"],
            accuracy=p.best_accuracy,
            loss=p.best_loss,
            epochs=p.epoch,
            seconds=round(p.seconds, 3),
            history=p.history,
        )

    # -- an epoch --------------------------------------------------------------------------

    def _epoch(self) -> None:
        epoch = self.progress.epoch
        # dropout's randomness is the epoch's own, so that no generator needs saving
        torch.manual_seed(self.settings.seed * 1_000_003 + epoch)
        self.batches.epoch = epoch
        steps_per_epoch = len(self.train_loader)
        steps = self.progress.planned_epochs * steps_per_epoch
        self._train_mode()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        count, lr, out_of_time = 0, 0.0, False
        for number, (index, batch, theirs) in enumerate(self.train_loader):
            step = epoch * steps_per_epoch + number
            lr = self.settings.lr * lr_factor(
                self.config, step, steps, steps_per_epoch=steps_per_epoch
            )
            loss = self._step(index, batch, theirs, lr)
            loss_sum += loss * len(index)
            count += len(index)
            self._show(step + 1, steps, loss_sum, count)
            out_of_time = self._seconds_left() <= 0
            if out_of_time:
                break
        train_loss = float(loss_sum) / max(1, count)
        if train_loss != train_loss:
            raise DataError(
                f"the distillation's loss is {train_loss} in epoch {epoch + 1};"
                f" lower lr (now {self.settings.lr:g})"
            )
        self._judge(epoch + 1, train_loss=train_loss, lr=lr)
        self._plan(out_of_time)

    def _step(
        self, index: Tensor, batch: dict[str, Tensor], theirs: dict[str, Tensor] | None, lr: float
    ) -> Tensor:
        """Update the student by a batch; return its loss, detached."""
        batch = _moved(batch, self.device)
        labels = batch.pop("labels")
        if theirs is not None:
            soft, soft_features = self._ask(self.teacher, _moved(theirs, self.device))
        else:
            assert self.soft is not None
            soft = self.soft[index].to(self.device)
            soft_features = (
                None if self.soft_features is None else self.soft_features[index].to(self.device)
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self._autocast():
            logits = self.student.logits(self.network, batch).float()
        loss = distillation_loss(
            logits, soft, labels,
            temperature=self.settings.temperature, alpha=self.settings.alpha,
        )  # fmt: skip
        if soft_features is not None:
            loss = loss + self.settings.feature_weight * functional.mse_loss(
                self.taps.student().float(), soft_features
            )
        torch.autograd.backward(loss)
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        nn.utils.clip_grad_norm_(trainable, GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _judge(self, epoch: int, *, train_loss: float, lr: float) -> None:
        """Measure on the validation split, and keep the state where it is the best so far."""
        self.network.eval()
        right = count = 0
        loss_sum = 0.0
        with torch.inference_mode():
            for _, batch, _ in self.val_loader:
                batch = _moved(batch, self.device)
                labels = batch.pop("labels")
                logits = self.student.logits(self.network, batch).float()
                loss_sum += float(functional.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(-1) == labels).sum())
                count += len(labels)
        accuracy, loss = right / count, loss_sum / count
        p = self.progress
        better = accuracy > p.best_accuracy or (accuracy == p.best_accuracy and loss < p.best_loss)
        line = {
            "epoch": epoch,
            "train_loss": train_loss,
            "val_loss": loss,
            "val_accuracy": accuracy,
            "lr": lr,
        }
        self._move(
            epoch=epoch,
            step=epoch * len(self.train_loader),
            best_epoch=epoch if better else p.best_epoch,
            best_accuracy=accuracy if better else p.best_accuracy,
            best_loss=loss if better else p.best_loss,
            seconds=self._seconds(),
            history=(*p.history, line),
        )
        if better:
            self.best = {n: t.detach().clone() for n, t in self.network.state_dict().items()}
        shown = {"best": better, "epochs": p.planned_epochs, "seconds": self.progress.seconds}
        self.say(Event(kind="epoch", values={**line, **shown}))

    def _plan(self, out_of_time: bool) -> None:
        """Leave out the epochs that time will not suffice for; the schedule then ends sooner."""
        p = self.progress
        if out_of_time:
            self._move(finished=True)
        elif self.settings.seconds is not None and p.epoch < p.planned_epochs:
            each = p.seconds / p.epoch
            fitting = p.epoch + int(self._seconds_left() / each)
            if fitting < p.planned_epochs:
                self._move(planned_epochs=fitting)
        if self.progress.epoch >= self.progress.planned_epochs:
            self._move(finished=True)

    # -- the teacher -----------------------------------------------------------------------

    def _teach(
        self, samples: Samples, teacher: TaskModel, workers: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return the teacher's logits of all samples, and its features where they are asked for."""
        order = _EpochKeys(
            len(samples), 2 * self.settings.batch_size, lengths=samples.lengths, shuffle=False
        )
        loader = self._loader(samples, None, order, workers, collate=teacher)
        soft = torch.zeros(len(samples), len(teacher.labels))
        features: Tensor | None = None
        for index, batch, _ in loader:
            logits, behind = self._ask(teacher, _moved(batch, self.device))
            soft[index] = logits.cpu()
            if behind is not None:
                if features is None:
                    features = torch.zeros(len(samples), behind.shape[-1])
                features[index] = behind.cpu()
        return soft, features

    def _ask(self, teacher: TaskModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad(), self._autocast():
            logits = teacher.logits(self.teacher_network, inputs)
        return logits.float(), self.taps.teacher().float() if self._features() else None

    # -- details ---------------------------------------------------------------------------

    def _loader(
        self,
        samples: Samples,
        theirs: Samples | None,
        order: _EpochKeys,
        workers: int,
        collate: TaskModel | None = None,
    ) -> Any:
        from torch.utils.data import DataLoader

        pairs: Any = _Pairs(samples, theirs)
        return DataLoader(
            pairs,
            batch_sampler=order,
            collate_fn=_Collate(collate or self.student, self.teacher),
            num_workers=workers,
            # each pass draws a seed; from the global generator it would shift dropout
            generator=torch.Generator(),
        )

    def _observe(self) -> None:
        """Let static ranges settle before the student is first judged."""
        if not has_static_ranges(self.network):
            return
        self.network.eval()
        with torch.no_grad(), observing(self.network):
            for number, (_, batch, _) in enumerate(self.train_loader):
                if number == OBSERVED_BATCHES:
                    break
                inputs = {k: v for k, v in _moved(batch, self.device).items() if k != "labels"}
                self.student.logits(self.network, inputs)

    def _train_mode(self) -> None:
        set_train_mode(self.network)
        if is_prepared(self.network):
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def _features(self) -> bool:
        return self.settings.feature_weight > 0

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _seconds_left(self) -> float:
        limit = self.settings.seconds
        return float("inf") if limit is None else limit - self._seconds()

    def _move(self, **changes: Any) -> None:
        self.progress = dataclasses.replace(self.progress, **changes)

    def _show(self, step: int, steps: int, loss_sum: Tensor, count: int) -> None:
        now = time.monotonic()
        if now - self.shown_at < EVENT_SECONDS:
            return
        self.shown_at = now
        values = {
            "step": step, "steps": steps, "epoch": self.progress.epoch + 1,
            "epochs": self.progress.planned_epochs, "loss": float(loss_sum) / max(1, count),
        }  # fmt: skip
        self.say(Event(kind="step", values=values))

    # -- the checkpoint --------------------------------------------------------------------

    def _save(self) -> None:
        """Write one file, whole or not at all: tensors, and the progress in its header."""
        if self.checkpoint is None:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self.checkpoint.mkdir(parents=True, exist_ok=True)
        self._move(seconds=self._seconds())
        tensors = {f"best.{n}": t for n, t in self.best.items()}
        tensors |= {f"network.{n}": t for n, t in self.network.state_dict().items()}
        for number, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{n}": torch.as_tensor(t) for n, t in entries.items()}
        # a copy of each, as no two tensors of the file may share memory
        whole = {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}
        header = {
            "identity": self.identity,
            "progress": json.dumps(to_mapping(self.progress)),
            "digest": _digest(whole),
        }

        def write(path: Path) -> None:
            try:
                save_file(whole, path, metadata=header)
            except SafetensorError as error:  # its own error for a full disk
                raise OSError(str(error)) from error

        replace_atomic(self.checkpoint / CHECKPOINT_NAME, write)

    def _restore(self) -> bool:
        """Go back to the checkpoint; return whether there was one."""
        if self.checkpoint is None or not (self.checkpoint / CHECKPOINT_NAME).is_file():
            return False
        path = self.checkpoint / CHECKPOINT_NAME
        header, tensors = _read(path)
        if header["identity"] != self.identity:
            raise ConfigError(
                f"{path}: is of another student, data or settings; remove it to begin anew"
            )
        self.progress = from_mapping(
            _Progress, json.loads(header["progress"]), where=str(path), error=IntegrityError
        )
        self.seconds_before = self.progress.seconds
        parts: dict[str, dict[str, Tensor]] = {"best": {}, "network": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.best = {n: t.to(self.device) for n, t in parts["best"].items()}
        self.network.load_state_dict(parts["network"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        text = f"distillation goes on after epoch {self.progress.epoch}"
        self.say(Event(kind="note", values={"text": text}))
        return True


class _Pairs:
    """A sample's index, the student's sample and, where asked for, the teacher's of the same."""

    def __init__(self, own: Samples, theirs: Samples | None) -> None:
        self._own, self._theirs = own, theirs

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, dict[str, Any], Any]:
        theirs = None if self._theirs is None else self._theirs[key]
        return key[1], self._own[key], theirs


class _Collate:
    """Joins pairs into (indices, student's batch, teacher's batch or None)."""

    def __init__(self, student: TaskModel, teacher: TaskModel) -> None:
        # without their networks, which worker processes have no use for
        self._student, self._teacher = student_of(student, _NOTHING), student_of(teacher, _NOTHING)

    def __call__(
        self, pairs: Sequence[tuple[int, dict[str, Any], Any]]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor] | None]:
        indices, own, theirs = zip(*pairs, strict=True)
        batch = None if theirs[0] is None else self._teacher.collate(theirs)
        return torch.tensor(indices), self._student.collate(own), batch


_NOTHING = nn.Identity()


class _Taps:
    """What goes into the two networks' last layers, as of their latest batch."""

    def __init__(self, student: nn.Module, teacher: nn.Module, output: str) -> None:
        self._seen: dict[str, Tensor] = {}
        self._hooks = (
            [
                network.get_submodule(output).register_forward_pre_hook(self._keep(name))
                for name, network in (("student", student), ("teacher", teacher))
            ]
            if output
            else []
        )

    def student(self) -> Tensor:
        """Return features, shape (batch, features)."""
        return self._seen.pop("student").flatten(1)

    def teacher(self) -> Tensor:
        """Return features, shape (batch, features)."""
        return self._seen.pop("teacher").flatten(1)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._seen[name] = inputs[0]

        return keep


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in batch.items()}


def _identity(network: nn.Module, settings: DistillSettings, train: int, val: int) -> str:
    """Return what a checkpoint must share with the distillation that goes on with it."""
    # the time limit may differ: a rerun of what was killed has less time left, or more
    mapping = {k: v for k, v in to_mapping(settings).items() if k != "seconds"}
    state = {n: t.detach().cpu().contiguous() for n, t in network.state_dict().items()}
    flags = [n for n, p in network.named_parameters() if p.requires_grad]
    return hashlib.sha256(
        json.dumps([mapping, train, val, flags, _digest(state)]).encode()
    ).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own
        raise IntegrityError(f"{path}: is damaged: {error}; remove it to begin anew") from error
    if header.get("digest") != _digest(tensors):
        raise IntegrityError(f"{path}: is damaged; remove it to begin anew")
    return header, tensors


def _silent(event: Event) -> None:
    """Show nothing."""
