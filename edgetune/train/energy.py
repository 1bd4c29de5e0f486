"""The energy that this machine took: counters of its processors and of its graphics cards.

Both count all that the chip did, for this process and for others. Processors count in RAPL (Intel
SDM vol. 3B, 16.10; AMD has the same), which Linux shows as /sys/class/powercap/intel-rapl:N;
cards count in NVML, the library of NVIDIA's driver. Nothing is estimated: where a counter is
absent or may not be read (Linux shows RAPL to root alone), there is no number.
"""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
JOULES_PER_WATT_HOUR = 3600.0
# a counter of 65 kJ, the smallest that is built, holds 160 s at 400 W
POLL_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy taken, Wh, and what counted it, as "RAPL packages" or "NVML, GPU board"."""

    watt_hours: float
    source: str


class Counter(Protocol):
    """Something that counts energy."""

    def joules(self) -> float:
        """Return the energy since the counter was made.

        Raises:
            OSError: it can't be read (any longer).
        """


class EnergyMeter:
    """Counts energy from `start` to `read`; a thread reads the counters before they overflow.

    No method raises: where nothing counts, `read` returns None.
    """

    def __init__(
        self, *, powercap: Path = POWERCAP, gpus: Sequence[str] = (), nvml: str = NVML
    ) -> None:
        """Find the counters.

        Args:
            powercap: Linux' folder of RAPL counters.
            gpus: UUIDs of the cards to count, as from `gpus_in_use`.
            nvml: name or path of NVIDIA's library.
        """
        self._counters: dict[str, Sequence[Counter]] = {}
        self._zero: dict[str, float] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        with contextlib.suppress(OSError, ValueError):
            self._counters["RAPL packages"] = rapl_packages(powercap)
        if gpus:
            boards = "NVML, GPU board" + ("s" if len(gpus) > 1 else "")
            with contextlib.suppress(OSError, AttributeError):  # of a library too old
                self._counters[boards] = nvml_boards(gpus, nvml)

    def start(self) -> Self:
        """Count from here; a second call begins anew."""
        with self._lock:
            self._zero = self._totals()
        if self._counters and self._thread is None:
            self._thread = threading.Thread(target=self._poll, name="energy", daemon=True)
            self._thread.start()
        return self

    def read(self) -> Energy | None:
        """Return the energy since `start`; None where nothing counted all the time."""
        with self._lock:
            totals = self._totals()
        joules = {name: total - self._zero[name] for name, total in totals.items()
                  if name in self._zero}  # fmt: skip
        if not joules:
            return None
        return Energy(
            watt_hours=sum(joules.values()) / JOULES_PER_WATT_HOUR, source=" + ".join(joules)
        )

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        """Start counting."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the thread."""
        self.close()

    def _totals(self) -> dict[str, float]:
        """Read the counters, J; those that fail are dropped, since part of a sum is no sum."""
        totals = {}
        for name, counters in list(self._counters.items()):
            try:
                totals[name] = sum(counter.joules() for counter in counters)
            except (OSError, ValueError):
                del self._counters[name]
        return totals

    def _poll(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            with self._lock:
                self._totals()


def gpus_in_use() -> tuple[str, ...]:
    """Return the UUIDs of the cards that this run trains on in this machine; () without any."""
    import torch

    if not torch.cuda.is_available():
        return ()
    # under torchrun each process has the card of its number
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    numbers = range(processes) if processes > 1 else (torch.cuda.current_device(),)
    properties = [torch.cuda.get_device_properties(number) for number in numbers]
    if any(not hasattr(p, "uuid") for p in properties):  # AMD's, and older versions of torch
        return ()
    return tuple(f"GPU-{p.uuid}" for p in properties)


def rapl_packages(powercap: Path) -> tuple[Counter, ...]:
    """Return a counter for each processor package.

    Their cores and graphics are parts of them, and "psys" is the machine around them: neither
    is added.

    Raises:
        OSError: there is none, or one can't be read.
        ValueError: one holds something else than a number.
    """
    zones = sorted(
        zone for zone in powercap.glob("intel-rapl:*")
        if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package")
    )  # fmt: skip
    if not zones:
        raise OSError(f"{powercap}: has no processor package")
    return tuple(_RaplPackage(zone) for zone in zones)


def nvml_boards(gpus: Sequence[str], library: str = NVML) -> tuple[Counter, ...]:
    """Return a counter for each card: its own where it has one (Volta and later), else of power.

    Raises:
        OSError: no driver, no such card, or a card that measures nothing.
        AttributeError: the library is not NVML.
    """
    nvml = ctypes.CDLL(library)
    _check(nvml.nvmlInit_v2(), "nvmlInit")
    return tuple(_nvml_board(nvml, gpu) for gpu in gpus)


class _RaplPackage:
    """One package, uJ, from 0 to its range and from 0 again."""

    def __init__(self, zone: Path) -> None:
        self._path = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._last = self._read()
        self._total = 0

    def joules(self) -> float:
        now = self._read()
        self._total += now - self._last + (self._range if now < self._last else 0)
        self._last = now
        return self._total / 1e6

    def _read(self) -> int:
        return int(self._path.read_text())


class _BoardEnergy:
    """A card's own counter, mJ since the driver was loaded."""

    def __init__(self, read_mj: Callable[[], int]) -> None:
        self._read_mj = read_mj
        self._first = read_mj()

    def joules(self) -> float:
        return (self._read_mj() - self._first) / 1e3


class _BoardPower:
    """A card's power, mW, summed over time by the trapezoidal rule."""

    def __init__(self, read_mw: Callable[[], int], clock: Callable[[], float]) -> None:
        self._read_mw, self._clock = read_mw, clock
        self._last, self._at = read_mw(), clock()
        self._total = 0.0

    def joules(self) -> float:
        power, now = self._read_mw(), self._clock()
        self._total += (power + self._last) / 2e3 * (now - self._at)
        self._last, self._at = power, now
        return self._total


def _nvml_board(nvml: ctypes.CDLL, gpu: str) -> Counter:
    device = ctypes.c_void_p()
    _check(nvml.nvmlDeviceGetHandleByUUID(gpu.encode(), ctypes.byref(device)), gpu)

    def read_mj() -> int:
        value = ctypes.c_ulonglong()
        _check(nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(value)), gpu)
        return value.value

    def read_mw() -> int:
        value = ctypes.c_uint()
        _check(nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(value)), gpu)
        return value.value

    try:
        return _BoardEnergy(read_mj)
    except (OSError, AttributeError):
        return _BoardPower(read_mw, time.monotonic)


def _check(code: int, what: str) -> None:
    if code:  # nvml.h: NVML_SUCCESS is 0
        raise OSError(f"{what}: NVML answers with error {code}")
