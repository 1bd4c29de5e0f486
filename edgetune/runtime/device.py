"""What this machine is: CPU, features that inference uses, memory. Standard library only."""

import os
import platform
from pathlib import Path
from typing import Literal

# features that change which kernels run, as Linux names them
RELEVANT_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16",
    "amx_int8", "amx_bf16",
    "asimd", "asimddp", "asimdhp", "fphp", "i8mm", "bf16", "sve",
)  # fmt: skip


def cpu_features() -> tuple[str, ...]:
    """Return the relevant CPU features, in a fixed order; () where they can't be read."""
    words: set[str] = set()
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip().lower() in {"flags", "features"}:
            words |= set(value.split())
    return tuple(f for f in RELEVANT_FEATURES if f in words)


def int8_arithmetic() -> Literal["saturates", "exact"]:
    """Return how this CPU sums u8 x s8 products: x86 without VNNI saturates in int16 pairs."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "exact"
    return "exact" if {"avx512_vnni", "avx_vnni"} & set(cpu_features()) else "saturates"


def cpu_model() -> str:
    """Return the CPU's or board's name, or the architecture where neither is known."""
    try:
        return Path("/proc/device-tree/model").read_text(errors="replace").rstrip("\0\n")
    except OSError:
        pass  # no board
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip().lower() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def memory_mib() -> tuple[int, int]:
    """Return (total, available) memory in MiB; (0, 0) where it can't be read."""
    values: dict[str, int] = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, _, rest = line.partition(":")
            values[key] = int(rest.split()[0]) // 1024
    except OSError:
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        except (AttributeError, ValueError):  # Windows has no sysconf, some systems not the names
            return 0, 0
        return total, total
    return values.get("MemTotal", 0), values.get("MemAvailable", 0)


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []
