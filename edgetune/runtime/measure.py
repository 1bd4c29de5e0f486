"""Measure a bundle in this process: latency, throughput, load time, memory.

    python -m edgetune.runtime.measure BUNDLE --runs 200 --seconds 10

prints one JSON object, a `Measurement`. It needs what the runtime needs and no more, so it
runs on the device itself. A process that has loaded other things before gives memory and
import figures that are not the bundle's own: start a fresh one for those.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.errors import ConfigError, EdgetuneError
from edgetune.runtime.device import cpu_features, cpu_model
from edgetune.runtime.records import to_mapping

# fewer say nothing of a 95th percentile; so many are done even where `seconds` ran out
MIN_RUNS = 10


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a measurement was taken on; None where this system does not tell.

    `load_average` (1, 5 and 15 minutes) is from before the measurement: near or above `cores`
    it says that others were working. `cpu_mhz` and `temperature_c` are from right after the
    last run, of the fastest core and the hottest sensor: `cpu_mhz` far below `cpu_max_mhz` on
    a hot machine is throttling. `throttled` says that the firmware or the CPU itself reported
    that during the measurement. `governor` is Linux's policy for the clock; several where cores
    differ.
    """

    cpu_model: str
    cpu_features: tuple[str, ...]
    cores: int
    system: str
    python: str
    onnxruntime: str
    load_average: tuple[float, ...] | None = None
    cpu_mhz: float | None = None
    cpu_max_mhz: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None
    governor: str | None = None


@dataclass(frozen=True, kw_only=True)
class Throttling:
    """What a machine tells of throttling at one moment; None where it does not.

    `flags` is the Raspberry Pi firmware's bit field. `events` counts, since boot, how often a
    core or a package of an x86 CPU became too hot.
    """

    flags: int | None
    events: int | None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one process measured of one bundle, one sample a call.

    Latencies are wall time from raw sample to result. `import_ms` is None where onnxruntime
    had been imported before. `peak_rss_mib` is the process's, Python and all; None where the
    system does not tell.
    """

    threads: int
    samples: int
    warmup: int
    runs: int
    latency_p50_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    latency_mean_ms: float
    latency_min_ms: float
    throughput_per_s: float
    import_ms: float | None = None
    load_ms: float
    first_predict_ms: float
    rss_before_load_mib: float | None = None
    peak_rss_mib: float | None = None
    machine: Machine


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Order statistics of wall times in milliseconds, and answers a second."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float
    throughput_per_s: float


def measure(
    path: str | Path,
    *,
    runs: int = 200,
    warmup: int = 20,
    seconds: float = 10.0,
    threads: int | None = None,
    sample: Any = None,
) -> Measurement:
    """Load the bundle at `path` in this process and measure it.

    Args:
        path: the bundle's folder, or its zip.
        runs: how many timed calls, at least 10.
        warmup: how many calls before those, untimed; they end after `seconds` too.
        seconds: longest time for the timed calls; 10 of them are done however long they take.
        threads: overrides the number of threads that the manifest names.
        sample: one raw sample to predict instead of the bundle's goldens. An image given as a
            path is decoded in every call.

    Raises:
        ConfigError: a number is out of bounds, the bundle has no goldens and there is no
            `sample`, or this onnxruntime cannot run the bundle.
        IntegrityError: the bundle is not what its manifest says.
        DataError: `sample` is not what the task takes.
    """
    _check_bounds(runs=runs, warmup=warmup, seconds=seconds, threads=threads)
    load_average = load_average_now()
    throttling = read_throttling()
    imported_before = "onnxruntime" in sys.modules
    begin = time.perf_counter()
    from edgetune.runtime.model import EdgeModel
    from edgetune.runtime.ort import version

    import_ms = None if imported_before else _ms_since(begin)

    rss_before_load = rss_mib()
    begin = time.perf_counter()
    model = EdgeModel.load(path, threads=threads)
    load_ms = _ms_since(begin)

    samples = [sample] if sample is not None else model.goldens()
    if not samples:
        raise ConfigError(f"{path}: the bundle has no goldens to measure with; give a sample")
    begin = time.perf_counter()
    model.predict(samples[0])
    first_predict_ms = _ms_since(begin)

    warmed, durations_s = time_calls(
        model.predict, samples, runs=runs, warmup=warmup, seconds=seconds
    )
    throttled = was_throttled(throttling, read_throttling())
    latency = summarize(durations_s)
    return Measurement(
        threads=threads or model.manifest.session.intra_op_threads,
        samples=len(samples),
        warmup=warmed,
        runs=len(durations_s),
        latency_p50_ms=latency.p50_ms,
        latency_p95_ms=latency.p95_ms,
        latency_p99_ms=latency.p99_ms,
        latency_mean_ms=latency.mean_ms,
        latency_min_ms=latency.min_ms,
        throughput_per_s=latency.throughput_per_s,
        import_ms=import_ms,
        load_ms=load_ms,
        first_predict_ms=first_predict_ms,
        rss_before_load_mib=rss_before_load,
        peak_rss_mib=peak_rss_mib(),
        machine=this_machine(onnxruntime=version(), load_average=load_average, throttled=throttled),
    )


def time_calls(
    predict: Callable[[Any], object],
    samples: Sequence[Any],
    *,
    runs: int,
    warmup: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[int, list[float]]:
    """Call `predict` on the samples in turn; return (warm-up calls done, durations in seconds).

    The warm-up ends after `warmup` calls or `seconds`, the timed calls after `runs` calls or
    `seconds` but not before `MIN_RUNS`.

    Args:
        predict: what to time.
        samples: raw samples, at least one; the timed calls begin with the first.
        runs: timed calls.
        warmup: untimed calls before them.
        seconds: limit of each of the two.
        clock: seconds that only rise.
    """
    warmed = 0
    begin = clock()
    for sample in itertools.islice(itertools.cycle(samples), warmup):
        if clock() - begin >= seconds:
            break
        predict(sample)
        warmed += 1
    durations: list[float] = []
    begin = clock()
    for sample in itertools.islice(itertools.cycle(samples), runs):
        start = clock()
        if len(durations) >= MIN_RUNS and start - begin >= seconds:
            break
        predict(sample)
        durations.append(clock() - start)
    return warmed, durations


def summarize(durations_s: Sequence[float]) -> Latency:
    """Return the statistics of wall times given in seconds; percentiles interpolate linearly.

    Throughput is calls over their summed time: one caller, one sample a call, no pause.
    """
    import numpy as np

    milliseconds = np.asarray(durations_s, np.float64) * 1e3
    p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99], method="linear").tolist()
    return Latency(
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        mean_ms=float(milliseconds.mean()),
        min_ms=float(milliseconds.min()),
        throughput_per_s=float(len(milliseconds) / milliseconds.sum() * 1e3),
    )


def rss_mib() -> float | None:
    """Return this process's resident memory in MiB; its peak so far where only that is known."""
    return _status_mib("VmRSS") or peak_rss_mib()


def peak_rss_mib() -> float | None:
    """Return this process's peak resident memory in MiB, or None where it can't be read.

    Linux: VmHWM, which starts anew with each program; getrusage's figure can be the parent's.
    """
    if peak := _status_mib("VmHWM"):
        return peak
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def read_throttling() -> Throttling:
    """Ask the Raspberry Pi's firmware and the x86 CPU's counters."""
    counts = _readings(
        Path("/sys/devices/system/cpu"), "cpu[0-9]*/thermal_throttle/*_throttle_count"
    )
    return Throttling(flags=_firmware_flags(), events=sum(counts) if counts else None)


def was_throttled(before: Throttling, after: Throttling) -> bool | None:
    """Say whether the clock was held down between two readings; None where neither tells.

    Bits 1, 2 and 3 of the firmware's flags say that it is now: frequency capped, throttled,
    soft temperature limit; bits 17, 18 and 19 that it was since boot.

    Source: Raspberry Pi documentation, "vcgencmd", get_throttled; Linux, "Intel thermal
    throttle events reporting".
    """
    answers = []
    if before.flags is not None and after.flags is not None:
        now, since_boot = 0b1110, 0b1110 << 16
        began = after.flags & ~before.flags & since_boot
        answers.append(bool((before.flags | after.flags) & now or began))
    if before.events is not None and after.events is not None:
        answers.append(after.events > before.events)
    return any(answers) if answers else None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the bundle named on the command line, print JSON, return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m edgetune.runtime.measure",
        description="Measure a bundle in this process and print one JSON object.",
    )
    parser.add_argument("bundle", help="the bundle's folder")
    parser.add_argument("--runs", type=int, default=200, help="timed calls, at least 10")
    parser.add_argument("--warmup", type=int, default=20, help="untimed calls before them")
    parser.add_argument("--seconds", type=float, default=10.0, help="longest time for either")
    parser.add_argument("--threads", type=int, help="override the manifest's thread count")
    parser.add_argument("--sample", help="a text or an image's path (default: the goldens)")
    given = parser.parse_args(argv)
    try:
        measurement = measure(
            given.bundle,
            runs=given.runs,
            warmup=given.warmup,
            seconds=given.seconds,
            threads=given.threads,
            sample=given.sample,
        )
    except EdgetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(to_mapping(measurement)))
    return 0


def _check_bounds(*, runs: int, warmup: int, seconds: float, threads: int | None) -> None:
    if runs < MIN_RUNS:
        raise ConfigError(f"runs: expected at least {MIN_RUNS}, got {runs}")
    if warmup < 0:
        raise ConfigError(f"warmup: expected at least 0, got {warmup}")
    if not seconds > 0:
        raise ConfigError(f"seconds: expected more than 0, got {seconds:g}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads: expected at least 1, got {threads}")


def this_machine(
    *, onnxruntime: str, load_average: tuple[float, ...] | None, throttled: bool | None
) -> Machine:
    """Return what this machine is and how it does right now; what was seen before comes in."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpus = Path("/sys/devices/system/cpu")
    khz = _readings(cpus, "cpu[0-9]*/cpufreq/scaling_cur_freq")
    max_khz = _readings(cpus, "cpu[0-9]*/cpufreq/cpuinfo_max_freq")
    millidegrees = _readings(Path("/sys/class/thermal"), "thermal_zone*/temp")
    return Machine(
        cpu_model=cpu_model(),
        cpu_features=cpu_features(),
        cores=cores or 1,
        system=platform.platform(),
        python=platform.python_version(),
        onnxruntime=onnxruntime,
        load_average=load_average,
        cpu_mhz=max(khz) / 1e3 if khz else None,
        cpu_max_mhz=max(max_khz) / 1e3 if max_khz else None,
        temperature_c=max(millidegrees) / 1e3 if millidegrees else None,
        throttled=throttled,
        governor=_governor(cpus),
    )


def _firmware_flags() -> int | None:
    """Return what `vcgencmd get_throttled` prints: "throttled=0x50000"."""
    if not any(Path(folder, "vcgencmd").is_file() for folder in os.get_exec_path()):
        return None
    import subprocess  # only here: its memory is no part of a bundle's

    try:
        done = subprocess.run(
            ["vcgencmd", "get_throttled"], capture_output=True, text=True, check=True, timeout=5
        )
        return int(done.stdout.strip().removeprefix("throttled="), 16)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _governor(cpus: Path) -> str | None:
    governors = set()
    for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_governor"):
        try:
            governors.add(path.read_text().strip())
        except OSError:
            continue
    return ", ".join(sorted(governors)) or None


def load_average_now() -> tuple[float, ...] | None:
    """Return the load of the last 1, 5 and 15 minutes; None where the system does not tell."""
    try:
        return os.getloadavg()
    except (OSError, AttributeError):
        return None


def _readings(folder: Path, pattern: str) -> list[int]:
    """Return the whole numbers in the files that match; a sensor may refuse to be read."""
    values = []
    for path in folder.glob(pattern):
        try:
            values.append(int(path.read_text()))
        except (OSError, ValueError):
            continue
    return values


def _status_mib(key: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) / 1024  # the kernel's "kB" are KiB
    return None


def _ms_since(begin: float) -> float:
    return (time.perf_counter() - begin) * 1e3


if __name__ == "__main__":
    sys.exit(main())
