"""What this process may use of the machine: its control group, its resource limits, its cores.

A container's memory is that of its control group and not that of /proc/meminfo.

Source: Linux, admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst, scheduler/sched-bwc.rst;
man 7 cgroups for /proc/self/cgroup.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# version 1 writes "no limit" as the largest multiple of a page
_NO_LIMIT_BYTES = 2**60


@dataclass(frozen=True, kw_only=True)
class Limits:
    """None where there is no limit or the system does not tell.

    `memory_mib` is the lowest limit of the control group and those that it is in, and
    `memory_free_mib` what is left under the fullest of them, page cache counted as free.
    `address_space_mib` is RLIMIT_AS. `cores` is on how many CPUs the process may be scheduled,
    `core_quota` how much CPU time it gets, in cores.
    """

    memory_mib: float | None = None
    memory_free_mib: float | None = None
    address_space_mib: float | None = None
    cores: int | None = None
    core_quota: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Names:
    """How the two versions call the same files, and under which controller they lie."""

    memory: str
    limits: tuple[str, ...]
    used: str
    cache: str
    cpu: tuple[str, ...]


_V1 = _Names(
    memory="memory",
    limits=("memory.limit_in_bytes",),
    used="memory.usage_in_bytes",
    cache="total_inactive_file",
    cpu=("cpu", "cpu,cpuacct", "cpuacct,cpu"),
)
_V2 = _Names(
    memory="",
    # above `high` a process is slowed until it gives memory back: of no more use than `max`
    limits=("memory.max", "memory.high"),
    used="memory.current",
    cache="inactive_file",
    cpu=("",),
)


def read_limits(root: Path = Path("/")) -> Limits:
    """Read the limits of this process.

    Args:
        root: where proc/self/cgroup and sys/fs/cgroup lie.
    """
    limits: list[float] = []
    free: list[float] = []
    quotas: list[float] = []
    for names, controller, folder in _groups(root):
        if controller == names.memory:
            lowest = min((v for n in names.limits if (v := _bytes(folder / n))), default=None)
            if lowest is not None:
                limits.append(lowest)
                used = _bytes(folder / names.used)
                if used is not None:
                    free.append(lowest - max(0, used - _cache_bytes(folder, names.cache)))
        if controller in names.cpu and (quota := _quota(folder)) is not None:
            quotas.append(quota)
    return Limits(
        memory_mib=min(limits) / 2**20 if limits else None,
        memory_free_mib=max(0.0, min(free)) / 2**20 if free else None,
        address_space_mib=_address_space_mib(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        core_quota=min(quotas) if quotas else None,
    )


def _groups(root: Path) -> Iterator[tuple[_Names, str, Path]]:
    """Yield (version, controller, folder) of each control group that this process is in.

    Each group's parents are among them. Where a container sees another path than the kernel
    names, its own group is the mount itself, which is yielded in any case.
    """
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = _V2 if number == "0" else _V1
        for controller in [""] if names is _V2 else sorted({*controllers.split(","), controllers}):
            mounts = ["", "unified"] if names is _V2 else [controller]
            for mount in mounts:
                base = root / "sys/fs/cgroup" / mount
                parts = [p for p in PurePosixPath(path).parts if p not in ("/", "..")]
                for depth in range(len(parts), -1, -1):
                    yield names, controller, base.joinpath(*parts[:depth])


def _quota(folder: Path) -> float | None:
    """Return a group's CPU time in cores: "50000 100000" microseconds are half a core."""
    words = " ".join(_lines(folder / "cpu.max")).split()  # version 2
    if not words:
        quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
        words = [*_lines(quota), *_lines(period)]
    try:
        allowed, every = map(int, words)
    except ValueError:  # "max", or nothing
        return None
    return allowed / every if allowed > 0 and every > 0 else None


def _cache_bytes(folder: Path, key: str) -> int:
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == key and value.isdecimal():
            return int(value)
    return 0


def _bytes(path: Path) -> int | None:
    lines = _lines(path)
    if not lines or not lines[0].isdecimal():  # "max"
        return None
    value = int(lines[0])
    return value if value < _NO_LIMIT_BYTES else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").split("\n")[:-1]
    except OSError:
        return []


def _address_space_mib() -> float | None:
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, AttributeError):  # Windows; a system without this limit
        return None
    return None if soft == resource.RLIM_INFINITY else soft / 2**20
