"""What a run runs on: devices, processes, precision, memory."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One process of a run and its place among the others.

    precision: "no" (float32), "bf16" or "fp16", accelerate's words.
    """

    accelerator: Any
    device: torch.device
    rank: int
    processes: int
    precision: str

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.processes > 1:
            self.accelerator.wait_for_everyone()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes."""
        if self.processes == 1:
            return value
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    def same(self, value: Any) -> Any:
        """Return the main process's value to all; what a clock decides has to be one decision."""
        if self.processes == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in their order."""
        if self.processes == 1:
            return [value]
        found: list[Any] = [None] * self.processes
        torch.distributed.all_gather_object(found, value)
        return found


def open_machine(config: TrainConfig) -> Machine:
    """Return this process, a member of the group that torchrun or accelerate launched.

    Raises:
        ConfigError: the precision is none of this device's, or the launched processes did not
            find each other.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    precision = mixed_precision(config)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # where blocks are freed one after the other, some have no gradient at first
    unused = DistributedDataParallelKwargs(
        find_unused_parameters=config.unfreeze_every > 0, broadcast_buffers=False
    )
    try:
        # without a GPU accelerate takes several processes for one each, unless told
        cpu = config.cpu or (launched > 1 and not torch.accelerator.is_available())
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[unused])
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"precision {config.precision!r} does not work on this machine:"
            f" {str(error).splitlines()[0]}; use precision fp32"
        ) from error
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"WORLD_SIZE is {launched}, but this process found {accelerator.num_processes} to"
            " train with; launch with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    return Machine(
        accelerator=accelerator,
        device=accelerator.device,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        precision=precision,
    )


def is_main_process() -> bool:
    """Return whether this is the first of the launched processes; needs no group yet."""
    return int(os.environ.get("RANK", "0")) == 0


def mixed_precision(config: TrainConfig) -> str:
    """Return accelerate's word for the config's precision; "auto" looks at the machine."""
    if config.precision != "auto":
        return "no" if config.precision == "fp32" else config.precision
    if config.cpu or not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def default_workers() -> int:
    """Return how many processes load data: none where they would take the cores of training."""
    cores = os.cpu_count() or 1
    return 0 if cores <= 2 else min(8, cores - 1)


def free_memory_bytes(device: torch.device) -> int:
    """Return how much memory could still be taken, on a GPU there, else of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil  # type: ignore[import-untyped]  # accelerate brings it

    return min(int(psutil.virtual_memory().available), _free_in_container())


def _free_in_container(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Return what a container's limit leaves (cgroup v2), or a very large number without one."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        return max(0, int(limit) - used) if limit != "max" else 2**62
    except (OSError, ValueError):
        return 2**62


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory so far: allocated on the GPU, else resident in this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**20)
    from edgetune.runtime.measure import peak_rss_mib

    return peak_rss_mib() or 0.0


def keep_freed_memory() -> None:
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
