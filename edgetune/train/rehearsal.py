"""A run's steps tried without taking them: what memory and time will they need?"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgetune.config import TrainConfig
from edgetune.runtime.measure import rss_mib
from edgetune.tasks import Samples
from edgetune.train.batches import IntArray
from edgetune.train.engine import Engine
from edgetune.train.feeding import Batch, Feeder
from edgetune.train.machine import default_workers, peak_memory_mib

# batches that are timed
TIMED = 3
# Linux: writing 5 sets the peak of resident memory back to what is resident now (proc(5))
CLEAR_REFS = Path("/proc/self/clear_refs")
# what optimizers remember of a parameter: (tensors, bytes an element; None: the parameter's)
_STATES: dict[str, tuple[int, int | None]] = {
    "adamw": (2, None),
    "adam": (2, None),
    "sgd": (1, None),
    "lion": (1, None),
    "adamw_8bit": (2, 1),
}


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a run will take.

    seconds_per_step: mean over an epoch's steps, loading included.
    memory_mib: the most: allocated on the GPU, else resident in this process.
    validation_seconds: of one pass over the validation data; 0 where none was given.
    """

    seconds_per_step: float
    memory_mib: float
    validation_seconds: float = 0.0


def rehearse(
    engine: Engine, feed: Feeder, accumulation: int = 1, *, validation: Feeder | None = None
) -> Rehearsal:
    """Run the longest batch and a few usual ones forward and backward; nothing is learned.

    The longest shows the most memory, in the epoch in which the most trains, and that the run
    will not end for want of it in the middle; what the optimizer will remember is added to it.
    Usual ones are taken from among the cheap, the middling and the dear of an epoch, so that
    their mean is the epoch's. Weights, statistics and random states are as before; the network
    is in the mode of epoch 0. Every process of a run calls it.

    Args:
        engine: before the run, or at any step of it.
        feed: of the training data.
        accumulation: batches a step.
        validation: feed of the validation data, of which one batch is run.
    """
    longest = worst_batch(feed)
    device = engine.machine.device
    with rehearsing(engine):
        engine.train_mode(engine.config.epochs - 1)  # where all is freed that ever trains
        peak_mib = watch_peak(device)
        _run(engine, longest)
        memory = peak_mib() + _coming_state_bytes(engine) / 2**20
        engine.train_mode(0)
        seconds = [_time_batch(engine, feed, indices) for indices in _spread(feed, TIMED)]
        of_validation = 0.0 if validation is None else _time_validation(engine, validation)
    # among equal batches one that was disturbed is left out; among unequal ones each stands
    # for its share of the epoch
    usual = np.median if feed.samples.lengths is None else np.mean
    return Rehearsal(
        seconds_per_step=accumulation * float(usual(seconds)),
        memory_mib=memory,
        validation_seconds=of_validation,
    )


@contextmanager
def rehearsing(engine: Engine) -> Iterator[None]:
    """Within it gradients come to nothing; buffers and torch's random state are put back.

    It ends in the mode of epoch 0.
    """
    device = engine.machine.device
    engine.train_mode(0)
    buffers = {n: b.clone() for n, b in engine.plain.named_buffers()}
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            _drop_gradients(engine)
            engine.forget()
            engine.train_mode(0)
            with torch.no_grad():
                for name, buffer in engine.plain.named_buffers():
                    buffer.copy_(buffers[name])


def worst_batch(feed: Feeder) -> Batch:
    """Return the batch of the longest samples."""
    return feed.batch_of(longest_samples(feed.samples, feed.order.batch_size))


def longest_samples(samples: Samples, count: int) -> IntArray:
    """Return the indices of the `count` longest samples, or of all; the longest first."""
    if samples.lengths is None:
        return np.arange(min(count, len(samples)))
    return np.argsort(-np.asarray(samples.lengths), kind="stable")[:count]


def watch_peak(device: torch.device) -> Callable[[], float]:
    """Begin to watch memory; the function returned gives the most since then, MiB.

    Allocated on a GPU, else resident in this process. Where a system cannot forget an earlier
    peak of resident memory, it is what is resident at the end. What `peak_memory_mib` says
    starts anew.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: peak_memory_mib(device)
    try:
        CLEAR_REFS.write_text("5")
    except OSError:  # no Linux, or one that does not let us
        return lambda: rss_mib() or 0.0
    return lambda: peak_memory_mib(device)


def _coming_state_bytes(engine: Engine) -> int:
    """Return what the optimizer will keep after its first step; 0 where it has it already."""
    if engine.optimizer.state:
        return 0
    tensors, bytes_each = _states_of(engine.config)
    parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return sum(tensors * p.numel() * (bytes_each or p.element_size()) for p in local)


def _states_of(config: TrainConfig) -> tuple[int, int | None]:
    if config.optimizer == "sgd" and config.momentum == 0:
        return 0, None
    return _STATES[config.optimizer]


def _spread(feed: Feeder, count: int) -> list[IntArray]:
    """Return the batches of epoch 0 in the middle of each of `count` equal ranges of cost."""
    batches = sorted(feed.order.batches(0), key=lambda indices: _cost(feed, indices))
    return [batches[i] for i in middles(len(batches), count)]


def middles(number: int, count: int) -> list[int]:
    """Return the positions in the middle of `count` equal parts of `number`, each once."""
    return sorted({int((part + 0.5) * number / count) for part in range(count)})


def _cost(feed: Feeder, indices: IntArray) -> int:
    """Return how much a batch is: its rows times the longest, as it is padded."""
    lengths = feed.samples.lengths
    return len(indices) * (1 if lengths is None else max(lengths[i] for i in indices))


def _time_batch(engine: Engine, feed: Feeder, indices: IntArray) -> float:
    """Return the seconds that a batch takes from the samples to its gradients."""
    begin = time.perf_counter()
    batch = feed.batch_of(indices)
    loaded = time.perf_counter()
    _run(engine, batch)
    loading, computing = loaded - begin, time.perf_counter() - loaded
    given = engine.config.workers
    workers = default_workers() if given is None else given
    return max(computing, loading / workers) if workers else loading + computing


def _time_validation(engine: Engine, feed: Feeder) -> float:
    """Return the seconds of a pass over the data, judged by a batch in the middle of it."""
    batches = feed.order.batches(0)
    middle = batches[len(batches) // 2]
    begin = time.perf_counter()
    predict(engine, feed.batch_of(middle))
    seconds = time.perf_counter() - begin
    return seconds * sum(_cost(feed, b) for b in batches) / _cost(feed, middle)


def predict(engine: Engine, batch: Batch) -> None:
    """Run a batch as validation does, and wait for the device."""
    tensors = {name: tensor for name, tensor in batch.tensors.items() if name != "labels"}
    with engine.evaluating(), torch.no_grad():
        float(engine.logits(tensors).float().sum())


def _run(engine: Engine, batch: Batch) -> None:
    loss, _ = engine.accumulate(batch, epoch=0, rows=batch.rows, last=True)
    float(loss)  # waits for the device
    _drop_gradients(engine)


def _drop_gradients(engine: Engine) -> None:
    for parameter in engine.plain.parameters():
        parameter.grad = None
