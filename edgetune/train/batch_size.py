"""The largest batch that fits in memory, found by trying: 4, 8, 16, ...

What decides, `largest_that_fits`, is a pure function around a trial; a trial is a whole step of
the longest samples, with the optimizer's state, and a validation batch as large as the loop's.
"""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from edgetune.errors import ResourceError
from edgetune.runtime.measure import rss_mib
from edgetune.tasks import Samples
from edgetune.train.batches import share_of
from edgetune.train.engine import Engine
from edgetune.train.feeding import Batch
from edgetune.train.machine import Machine, free_memory_bytes
from edgetune.train.rehearsal import longest_samples, predict, watch_peak

FIRST = 4
LARGEST = 1024
# below, a normalisation over the batch has nothing to normalise
FEWEST_ROWS = 2
# of a GPU's memory: left to fragments, to other programs and to longer samples yet
HEAD_ROOM = 0.1
# of free memory: what a step may take on a CPU, where there is no error to go by but the
# system's end
CPU_SHARE = 0.8
# on CPUs: how much faster twice the batch has to be
GAIN = 0.05
# steps a trial: the first makes what later ones find made; the fastest counts, among more
# where they are short and easily disturbed
STEPS, MOST_STEPS, SECONDS = 3, 20, 1.0
# batches of validation are this many times as large, as in the loop
VALIDATION_FACTOR = 2
# of a run, for methods that go by the step: long enough that nothing is due at the first
_STEPS_OF_RUN = 1000

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")

Stop = Literal["memory", "speed", "data", "largest"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a batch size took.

    memory_bytes: the most in any process; None where it ran out.
    samples_per_s: in training, over all processes; 0 where memory ran out.
    """

    batch_size: int
    memory_bytes: int | None
    samples_per_s: float


@dataclass(frozen=True, kw_only=True)
class FoundBatchSize:
    """The batch size to take.

    stop: why no larger one: of memory, it is no faster, it is more than the data has, or none
        larger is tried.
    trials: in the order in which they were made.
    """

    batch_size: int
    memory_mib: float
    limit_mib: float
    samples_per_s: float
    stop: Stop
    trials: tuple[Trial, ...]


def find_batch_size(
    engine: Engine,
    train: Samples,
    val: Samples,
    *,
    limit_bytes: int | None = None,
    largest: int = LARGEST,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], None] | None = None,
) -> FoundBatchSize:
    """Find the largest power of two that trains in memory; every process calls it.

    The engine's optimizer has state afterwards: make one for this, and throw it away.

    Args:
        engine: of the config whose batch size is looked for.
        train: training samples; a size is never more than they are.
        val: validation samples.
        limit_bytes: what this process may take in all; None for what is free now, less a
            tenth of a GPU's memory, or a fifth of what is free on a CPU.
        largest: size to end at.
        clock: seconds.
        progress: called with a size before it is tried.

    Raises:
        ResourceError: not even the smallest fits.
    """
    machine = engine.machine
    limit = memory_limit_bytes(machine) if limit_bytes is None else limit_bytes
    fewest = FEWEST_ROWS * _power_of_two(machine.processes)
    free_unused(machine.device)

    def attempt(batch_size: int) -> Trial:
        if progress is not None:
            progress(batch_size)
        return _attempt(engine, train, val, batch_size, clock)

    on_gpu = machine.device.type == "cuda"
    return largest_that_fits(
        attempt,
        first=max(FIRST, fewest),
        fewest=fewest,
        largest=largest,
        samples=len(train),
        limit_bytes=min(machine.gather(limit)),
        base_bytes=max(machine.gather(_used_bytes(machine.device))),
        # processes that wait for each other within a step cannot survive an error in one
        careful=engine.sharded or not on_gpu,
        until_no_faster=not on_gpu,
    )


def largest_that_fits(
    attempt: Callable[[int], Trial],
    *,
    first: int,
    fewest: int,
    largest: int,
    samples: int,
    limit_bytes: int,
    base_bytes: int,
    careful: bool,
    until_no_faster: bool,
) -> FoundBatchSize:
    """Double the batch size from `first` on as long as it fits; halve it where that does not.

    Args:
        attempt: makes a trial.
        first: size to begin with; halved where there are fewer samples.
        fewest: smallest size to go down to.
        largest: size to end at.
        samples: that there are; no size is above it.
        limit_bytes: the most that a trial may take.
        base_bytes: what is taken before the first trial.
        careful: do not try a size that the last two lead to expect above the limit.
        until_no_faster: end where twice the size is less than `GAIN` faster.

    Raises:
        ResourceError: `fewest` does not fit.
    """

    def fits(trial: Trial) -> bool:
        return trial.memory_bytes is not None and trial.memory_bytes <= limit_bytes

    def result(best: Trial, stop: Stop) -> FoundBatchSize:
        return FoundBatchSize(
            batch_size=best.batch_size,
            memory_mib=(best.memory_bytes or 0) / 2**20,
            limit_mib=limit_bytes / 2**20,
            samples_per_s=best.samples_per_s,
            stop=stop,
            trials=tuple(trials),
        )

    size = first
    while size > max(1, samples):
        size //= 2
    best = attempt(size)
    trials = [best]
    while not fits(best):
        if best.batch_size // 2 < fewest:
            raise ResourceError(
                f"out of memory at batch size {best.batch_size}, the smallest tried"
                f" ({limit_bytes / 2**20:,.0f} MiB may be taken); lower max_length or"
                " image_size, or train less of the model (method lora or head)"
            )
        best = attempt(best.batch_size // 2)
        trials.append(best)
    if len(trials) > 1:
        return result(best, "memory")
    while True:
        size = 2 * best.batch_size
        if size > samples:
            return result(best, "data")
        if size > largest:
            return result(best, "largest")
        if careful and _expected_bytes(trials, base_bytes) > limit_bytes:
            return result(best, "memory")
        trial = attempt(size)
        trials.append(trial)
        if not fits(trial):
            return result(best, "memory")
        if until_no_faster and trial.samples_per_s < (1 + GAIN) * best.samples_per_s:
            return result(best, "speed")
        best = trial


def batch_size_note(found: FoundBatchSize, samples: int) -> str:
    """Return the line that tells the user what was found, for `samples` training samples."""
    size = found.batch_size
    why = {
        "memory": f"{2 * size} does not fit",
        "speed": f"{2 * size} is less than {GAIN:.0%} faster",
        "data": f"{2 * size} is more than the training data has",
        "largest": "larger ones are not tried",
    }[found.stop]
    return (
        f"batch size {size}: {found.memory_mib:,.0f} MiB of {found.limit_mib:,.0f} MiB,"
        f" {found.samples_per_s:,.3g} samples/s, {-(-samples // size)} batches an epoch; {why}"
    )


def memory_limit_bytes(machine: Machine) -> int:
    """Return what this process may take in all, what it has already included."""
    if machine.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(machine.device)
        reserved = torch.cuda.memory_reserved(machine.device)
        return int(free + reserved - HEAD_ROOM * total)
    # torchrun and accelerate say how many processes share this machine
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", str(machine.processes)))
    free = free_memory_bytes(machine.device)
    return _used_bytes(machine.device) + int(CPU_SHARE * free / sharing)


def free_unused(device: torch.device) -> None:
    """Give back the memory of what is no longer there, to the device or the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _expected_bytes(trials: list[Trial], base_bytes: int) -> int:
    """Return what twice the last size is expected to take: memory is linear in the size.

    From one trial alone all above `base_bytes` is taken to grow, which is too much rather than
    too little.
    """
    last = trials[-1].memory_bytes or 0
    if len(trials) == 1:
        return 2 * last - base_bytes
    # from half the size to the size it grew by half of what it will grow by
    grown = last - (trials[-2].memory_bytes or 0)
    return last + max(0, 2 * grown)


def _attempt(
    engine: Engine, train: Samples, val: Samples, batch_size: int, clock: Callable[[], float]
) -> Trial:
    """Train and validate one worst batch; the result is the same in every process."""
    machine = engine.machine
    free_unused(machine.device)
    peak_mib = watch_peak(machine.device)
    seconds, first = float("inf"), clock()
    for number in range(MOST_STEPS):
        # processes step together, whatever their clocks say
        if number >= STEPS and machine.same(clock() - first >= SECONDS):
            break
        begin = clock()
        fits = _train(engine, train, batch_size)
        if not fits:
            break
        seconds = min(seconds, clock() - begin)
    fits = fits and _together(
        machine, lambda: predict(engine, _worst(engine, val, VALIDATION_FACTOR * batch_size))
    )
    memory = int(peak_mib() * 2**20)
    for parameter in engine.plain.parameters():
        parameter.grad = None
    engine.forget()
    free_unused(machine.device)
    if not fits:
        return Trial(batch_size=batch_size, memory_bytes=None, samples_per_s=0.0)
    slowest = max(machine.gather(seconds))
    return Trial(
        batch_size=batch_size,
        memory_bytes=max(machine.gather(memory)),
        samples_per_s=min(batch_size, len(train)) / max(1e-9, slowest),
    )


def _train(engine: Engine, samples: Samples, batch_size: int) -> bool:
    """Take a step of size 0, which changes no weight; return whether it fits."""
    # where all is freed that ever trains
    engine.train_mode(engine.config.epochs - 1)

    def forward_and_backward() -> None:
        batch = _worst(engine, samples, batch_size)
        # gradients are not exchanged: where one process has no memory the others would wait
        engine.accumulate(batch, epoch=0, rows=batch.rows, last=False)
        _wait(engine.machine.device)

    def update() -> None:
        engine.update(0.0, 0, _STEPS_OF_RUN)
        _wait(engine.machine.device)

    return _together(engine.machine, forward_and_backward) and _together(engine.machine, update)


def _together(machine: Machine, part: Callable[[], None]) -> bool:
    """Run a part of a trial; return whether memory sufficed in every process."""
    try:
        part()
        fits = True
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        fits = False
    return all(machine.gather(fits))


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # the CPU's allocator and the libraries below torch have no class of their own
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def _worst(engine: Engine, samples: Samples, count: int) -> Batch:
    """Return this process's share of a batch of the longest samples, on its device."""
    machine = engine.machine
    indices = longest_samples(samples, count)
    share = share_of(indices, machine.rank, machine.processes)
    loaded = share if len(share) else indices[:1]
    # pixels need not be real to take their room, but they need to take it
    tensors = samples.outline(np.asarray(loaded).tolist())
    return Batch(
        tensors={k: v.contiguous().to(machine.device) for k, v in tensors.items()},
        indices=share,
        counts=len(share) > 0,
        rows=len(indices),
        number=0,
    )


def _used_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int((rss_mib() or 0.0) * 2**20)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
