"""Measure a bundle on this machine, in processes of its own.

Latency and memory come from one fresh process, the cold start from several more: whatever
the caller has loaded (torch, another session) stays out of the figures.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgetune.errors import (
    ConfigError,
    DataError,
    EdgetuneError,
    GateError,
    IntegrityError,
    ResourceError,
)
from edgetune.runtime.bundle import TOKENIZER_NAME, Bundle, open_bundle
from edgetune.runtime.measure import Measurement
from edgetune.runtime.records import from_mapping

# what a small application does: start, load, answer once. Arguments: bundle, threads
# (0: the manifest's), the sample (else the first golden)
FIRST_ANSWER = """\
import sys
from edgetune.errors import EdgetuneError
try:
    from edgetune.runtime import EdgeModel
    model = EdgeModel.load(sys.argv[1], threads=int(sys.argv[2]) or None)
    model.predict(sys.argv[3] if len(sys.argv) > 3 else model.goldens()[0])
except EdgetuneError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
import time
answered = time.monotonic()
from edgetune.runtime.measure import peak_rss_mib
print(answered, peak_rss_mib() or "")
"""

_ERRORS = {
    error.exit_code: error
    for error in (EdgetuneError, ConfigError, DataError, ResourceError, GateError, IntegrityError)
}


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """From the start of a process to its first answer.

    The files are in the system's cache and Python's modules are compiled: what is cold is the
    process, not the disk. `peak_rss_mib` is the largest of the processes' peaks.
    """

    median_ms: float
    each_ms: tuple[float, ...]
    peak_rss_mib: float | None = None


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What a bundle costs on this machine, or on `target` where that is not "".

    `profile_threads` is the thread count that the bundle's profile names, `measurement.threads`
    the one that was measured. `cold_start` is None where none was asked for.
    """

    bundle: str
    task: str
    precision: str
    profile: str
    profile_threads: int
    size_mib: float
    measurement: Measurement
    cold_start: ColdStart | None = None
    target: str = ""


def bench(
    path: str | Path,
    *,
    runs: int = 200,
    warmup: int = 20,
    seconds: float = 10.0,
    threads: int | None = None,
    cold_starts: int = 5,
    sample: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure the bundle at `path` in fresh processes on this machine.

    Args:
        path: the bundle's folder, or its zip.
        runs: timed calls, at least 10.
        warmup: untimed calls before them.
        seconds: longest time for the timed calls.
        threads: overrides the number of threads that the manifest names.
        cold_starts: how many processes to start for the cold start; 0 for none.
        sample: predict this instead of the bundle's goldens: an image's path, or a text, or the
            path of a file that holds the text.
        progress: is told in a line what begins.

    Raises:
        IntegrityError: the bundle is not what its manifest says.
        ConfigError: a number is out of bounds, or this onnxruntime cannot run the bundle.
        DataError: `sample` is not what the task takes.
        ResourceError: a process could not be started, or was killed.
    """
    if cold_starts < 0:
        raise ConfigError(f"cold_starts: expected at least 0, got {cold_starts}")
    bundle = open_bundle(path)
    manifest = bundle.manifest
    text = read_sample(sample, bundle)
    say = progress or (lambda _: None)

    say(f"measuring {manifest.name}: {runs} runs, {seconds:g} s at most")
    options = [f"--runs={runs}", f"--warmup={warmup}", f"--seconds={seconds}"]
    options += [f"--threads={threads}"] if threads is not None else []
    options += [f"--sample={text}"] if text is not None else []
    measurement = _measure(bundle.where, options)

    if cold_starts:
        say(f"starting {cold_starts} fresh processes, each to its first answer")
    starts = [_first_answer(bundle.where, threads, text) for _ in range(cold_starts)]
    return BenchReport(
        bundle=manifest.name,
        task=manifest.task,
        precision=manifest.precision,
        profile=manifest.profile,
        profile_threads=manifest.session.intra_op_threads,
        size_mib=bundle.size_bytes / 2**20,
        measurement=measurement,
        cold_start=summarize_starts(starts) if starts else None,
    )


def read_sample(sample: str | None, bundle: Bundle) -> str | None:
    """Return the text in the file `sample` where the task takes text and there is such a file."""
    if sample is None or TOKENIZER_NAME not in bundle.manifest.files:
        return sample
    try:
        if not Path(sample).is_file():
            return sample
        return Path(sample).read_text(encoding="utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{sample}: is no UTF-8 text: {error}") from error
    except OSError:  # too long for a file's name, so a text
        return sample


def _measure(path: Path, options: list[str]) -> Measurement:
    module = "edgetune.runtime.measure"
    output = run_child(["-m", module, *options, "--", str(path)])
    return from_mapping(Measurement, json.loads(output), where=module)


def _first_answer(
    path: Path, threads: int | None, sample: str | None
) -> tuple[float, float | None]:
    """Return (milliseconds from start to first answer, peak RSS in MiB) of one process."""
    arguments = [str(path), str(threads or 0), *([sample] if sample is not None else [])]
    begin = time.monotonic()  # one clock for all processes of a machine
    answered, _, peak = run_child(["-c", FIRST_ANSWER, *arguments]).strip().partition(" ")
    return (float(answered) - begin) * 1e3, float(peak) if peak else None


def summarize_starts(starts: list[tuple[float, float | None]]) -> ColdStart:
    """Return the cold start of (milliseconds, peak RSS in MiB) of each process."""
    each = tuple(milliseconds for milliseconds, _ in starts)
    peaks = [peak for _, peak in starts if peak is not None]
    return ColdStart(
        median_ms=statistics.median(each),
        each_ms=each,
        peak_rss_mib=max(peaks, default=None),
    )


def run_child(arguments: list[str]) -> str:
    """Run this Python with `arguments` and return what it printed.

    Raises:
        EdgetuneError: it failed; of the class that its exit code stands for, with its last line.
    """
    # -P: a file in the working folder must not stand in for a module
    command = [sys.executable, "-P", *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            env=_environment(),
        )
    except OSError as error:
        raise ResourceError(f"cannot start {sys.executable}: {error}") from error
    if done.returncode:
        raise child_error(done.returncode, done.stderr)
    return done.stdout


def _environment() -> dict[str, str]:
    """Return the environment, less what would have every start compile every module."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def child_error(returncode: int, stderr: str) -> EdgetuneError:
    """Turn a child's exit code and standard error into the error that it stands for."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    last = lines[-1].strip().removeprefix("error: ") if lines else "no message"
    if returncode < 0:
        hint = {
            signal.SIGKILL: "; most often the memory ran out",
            signal.SIGILL: "; this onnxruntime does not suit the CPU (see: edgetune doctor)",
        }.get(-returncode, "")  # type: ignore[call-overload]
        return ResourceError(f"the measuring process died of signal {-returncode}{hint}: {last}")
    return _ERRORS.get(returncode, EdgetuneError)(last)
