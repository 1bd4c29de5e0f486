"""Device profiles: what is known of a class of devices, as data.

A profile is a TOML file. The ones that edgetune ships lie in `profiles/`; a path to one
of your own serves everywhere a name does; `host` is this machine, read when asked for.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgetune.config import read_toml
from edgetune.errors import ConfigError
from edgetune.runtime.device import cpu_features, cpu_model, int8_arithmetic, memory_mib
from edgetune.runtime.records import from_mapping, nearest

Int8Arithmetic = Literal["saturates", "exact"]


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """The processor.

    `features` are the names Linux prints in /proc/cpuinfo. `int8` says how u8 x s8 products
    are summed: "saturates" in int16 pairs (x86 without VNNI), "exact" in int32. `active_watts` is
    what the board takes with all cores busy, as published or measured; None where not known.
    """

    arch: Literal["x86_64", "aarch64"]
    model: str
    cores: int
    features: tuple[str, ...]
    int8: Int8Arithmetic
    active_watts: float | None = None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory in MiB: of the device, and what an application can count on."""

    total_mib: int
    available_mib: int


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """Which onnxruntime the device has and how it is to run.

    `allow_spinning` lets idle threads burn CPU time to answer a little sooner; `arena` lets
    onnxruntime keep the memory that it once took.
    """

    onnxruntime_min: str
    onnxruntime_excluded: tuple[str, ...] = ()
    execution_providers: tuple[str, ...] = ("CPUExecutionProvider",)
    intra_op_threads: int
    allow_spinning: bool = False
    arena: bool = True


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings:
    """Which precisions are worth trying."""

    fp16: bool = False
    int8: bool = True


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a bundle for this device may cost; None where nothing is said."""

    max_size_mib: float | None = None
    max_rss_mib: float | None = None
    max_latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """One class of devices."""

    name: str
    description: str
    cpu: Cpu
    memory: Memory
    runtime: RuntimeSettings
    precision: PrecisionSettings = PrecisionSettings()
    budget: Budget = Budget()

    def __post_init__(self) -> None:
        """Check what a type can't say.

        Raises:
            ConfigError: a count is below 1, or a budget is not above 0.
        """
        counts = {
            "cpu: cores": self.cpu.cores,
            "runtime: intra_op_threads": self.runtime.intra_op_threads,
        }
        for key, count in counts.items():
            if count < 1:
                raise ConfigError(f"profile {self.name!r}: {key}: expected at least 1, got {count}")
        for key in ("max_size_mib", "max_rss_mib", "max_latency_ms"):
            limit = getattr(self.budget, key)
            if limit is not None and not limit > 0:
                raise ConfigError(
                    f"profile {self.name!r}: budget: {key}: expected more than 0, got {limit:g}"
                )


def profile_names() -> list[str]:
    """Return the names of the shipped profiles and `host`."""
    return ["host", *sorted(p.stem for p in _folder().glob("*.toml"))]


def load_profile(name: str) -> DeviceProfile:
    """Return the profile of that name, or of the TOML file at that path.

    Raises:
        ConfigError: there is none, or the file is not a valid profile.
    """
    if name == "host":
        return host_profile()
    path = Path(name) if name.endswith(".toml") else _folder() / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"no profile {name!r}{nearest(name, profile_names())}")
    profile = from_mapping(DeviceProfile, read_toml(path), where=str(path))
    if not name.endswith(".toml") and profile.name != name:
        raise ConfigError(f"{path}: expected name = {name!r}, got {profile.name!r}")
    return profile


def host_profile() -> DeviceProfile:
    """Describe this machine as a profile.

    Raises:
        ConfigError: the machine is neither x86-64 nor 64-bit ARM.
    """
    arch = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}.get(
        platform.machine().lower()
    )
    if arch is None:
        raise ConfigError(f"profile 'host': expected x86-64 or ARM64, got {platform.machine()!r}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total, available = memory_mib()
    return DeviceProfile(
        name="host",
        description=f"this machine, {cpu_model()}",
        cpu=Cpu(
            arch="x86_64" if arch == "x86_64" else "aarch64",
            model=cpu_model(),
            cores=cores or 1,
            features=cpu_features(),
            int8=int8_arithmetic(),
        ),
        memory=Memory(total_mib=total, available_mib=available),
        runtime=RuntimeSettings(onnxruntime_min="1.17.0", intra_op_threads=cores or 1),
    )


def _folder() -> Path:
    """Find profiles/: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parent
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"
