"""What can be found out about a device and a bundle on it; `runtime.doctor` judges it."""

import importlib.util
import os
import platform
import re
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgetune import __version__
from edgetune.errors import EdgetuneError, ResourceError
from edgetune.runtime.bundle import open_bundle, verify_files
from edgetune.runtime.device import int8_arithmetic, memory_mib
from edgetune.runtime.doctor.limits import Limits, read_limits
from edgetune.runtime.doctor.trial import Trial, try_bundle
from edgetune.runtime.manifest import Manifest
from edgetune.runtime.measure import (
    Machine,
    load_average_now,
    read_throttling,
    this_machine,
    was_throttled,
)

_MODULES = {"tokenizers": "tokenizers", "pillow": "PIL"}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found; None where the system does not tell.

    `onnxruntime` is the version that is installed, read without importing it; `packages` those of
    tokenizers and pillow that are there. `fault` is what is wrong with the bundle's files, of the
    kind of `fault_code`; `trial` is None where there is one. `clock_s` and `installed_s` (of
    edgetune's own files) are seconds since 1970. `open_to_all` names what any user may write.
    """

    bundle: str
    edgetune: str
    arch: str
    machine: Machine
    int8: Literal["saturates", "exact"] | None
    onnxruntime: str | None
    packages: tuple[str, ...]
    memory_total_mib: int | None
    memory_available_mib: int | None
    limits: Limits
    disk_free_mib: int | None
    read_only: bool
    open_to_all: tuple[str, ...] | None
    clock_s: float
    installed_s: float | None
    cpufreq_driver: str | None
    firmware_flags: int | None
    fault: str = ""
    fault_code: int = 0
    trial: Trial | None = None


def collect_facts(path: str | Path, *, goldens: bool = True) -> Facts:
    """Look at this device and at the bundle at `path`; takes as long as its goldens do.

    Args:
        path: the bundle.
        goldens: replay them.
    """
    fault, fault_code = _fault(path)
    trial = None if fault else try_bundle(path, goldens=goldens)
    throttling = read_throttling()
    onnxruntime = (trial.onnxruntime if trial else "") or _installed_onnxruntime()
    machine = this_machine(
        onnxruntime=onnxruntime or "",
        load_average=load_average_now(),
        throttled=was_throttled(throttling, throttling),
    )
    arch = machine_name(platform.machine())
    total, available = memory_mib()
    return Facts(
        bundle=str(path),
        edgetune=__version__,
        arch=arch,
        machine=machine,
        # an x86 CPU whose features can't be read is none without VNNI
        int8=int8_arithmetic() if machine.cpu_features or arch == "aarch64" else None,
        onnxruntime=onnxruntime,
        packages=tuple(name for name, module in _MODULES.items() if _origin(module)),
        memory_total_mib=total or None,
        memory_available_mib=available or None,
        limits=read_limits(),
        disk_free_mib=_disk_free_mib(path),
        read_only=_read_only(path),
        open_to_all=_open_to_all(Path(path)),
        clock_s=time.time(),
        installed_s=_modified_s(),
        cpufreq_driver=_cpufreq_driver(),
        firmware_flags=throttling.flags,
        fault=fault,
        fault_code=fault_code,
        trial=trial,
    )


def read_manifest(path: str | Path) -> Manifest | None:
    """Return the manifest of the bundle at `path`; None if that cannot be opened."""
    try:
        return open_bundle(path).manifest
    except (EdgetuneError, OSError):
        return None


def machine_name(name: str) -> str:
    """Return a machine's name as Linux has it: "AMD64" -> "x86_64", "arm64" -> "aarch64"."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name.lower(), name.lower())


def _fault(path: str | Path) -> tuple[str, int]:
    """Say what is wrong with a bundle's files, and the exit code of that; ("", 0): nothing."""
    try:
        verify_files(open_bundle(path))
    except EdgetuneError as error:
        return str(error), error.exit_code
    except OSError as error:
        return str(error), ResourceError.exit_code
    return "", 0


def _installed_onnxruntime() -> str | None:
    """Return onnxruntime's version from its source: importing it can end the process."""
    origin = _origin("onnxruntime")
    if origin is None:
        return None
    try:
        source = origin.read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"""^__version__\s*=\s*["']([^"']+)""", source, re.MULTILINE)
    return match.group(1) if match else None


def _origin(module: str) -> Path | None:
    """Return the file that an import of `module` would run."""
    spec = importlib.util.find_spec(module)
    return Path(spec.origin) if spec and spec.origin else None


def _disk_free_mib(path: str | Path) -> int | None:
    try:
        return shutil.disk_usage(path).free // 2**20
    except OSError:
        return None


def _read_only(path: str | Path) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except (OSError, AttributeError):  # AttributeError: Windows
        return False


def _open_to_all(path: Path) -> tuple[str, ...] | None:
    """Return which of a bundle's folder and files every user may write to."""
    if os.name != "posix":
        return None
    try:
        entries = [path, *(sorted(path.iterdir()) if path.is_dir() else ())]
        modes = {entry.name: entry.lstat().st_mode for entry in entries}
    except OSError:
        return None
    # a link's own mode says nothing
    return tuple(n for n, m in modes.items() if m & stat.S_IWOTH and not stat.S_ISLNK(m))


def _modified_s() -> float | None:
    """Return when edgetune's files were written, by the clock of that time."""
    try:
        return Path(__file__).stat().st_mtime
    except OSError:
        return None


def _cpufreq_driver() -> str | None:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver").read_text().strip()
    except OSError:
        return None
