"""Several processes that work on one study, each with its share of the machine.

A process hears its orders on standard input and tells what happens on standard output, a line
of JSON each. When the input ends, the one who started it is gone, and it ends too.
"""

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from edgetune import errors
from edgetune.errors import EdgetuneError, ResourceError
from edgetune.runtime.records import to_mapping
from edgetune.train.study import Study, read_tune, trial_folder
from edgetune.train.tune import OnTuneEvent, Stop, TuneEvent, free_disk, work

# processes that may die, one after the other with no trial ended between them
MOST_DEATHS = 3
_POLL_SECONDS = 0.2
_ORPHANED = 3


@dataclass(kw_only=True)
class _Job:
    """A process at work, and the trial that it is at."""

    index: int
    process: "subprocess.Popen[str]"
    number: int | None = None
    error: EdgetuneError | None = None


def work_in_parallel(study: Study, stop: Stop, say: OnTuneEvent, jobs: int) -> None:
    """Let `jobs` processes run trials until all are taken or `stop` says so.

    A process that dies (for want of memory, say) has its trial failed and is replaced.

    Raises:
        EdgetuneError: what broke one of them and would break the others.
        ResourceError: process after process died.
    """
    heard: queue.Queue[tuple[_Job, dict[str, Any] | None]] = queue.Queue()
    environments = [_environment(i, jobs, cpu=bool(study.record.base["cpu"])) for i in range(jobs)]
    running = [_start(study, stop, i, environments[i], heard) for i in range(jobs)]
    deaths, told, error = 0, False, None
    try:
        while running:
            if (stop.requested() or error) and not told:
                told = True
                for job in running:
                    _order(job, "stop")
            try:
                job, message = heard.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if message is not None:
                error = _hear(job, message, say) or error
                if message["kind"] == "end":
                    deaths = 0
                continue
            running.remove(job)
            code = _end(job)
            error = error or job.error
            if code == 0 or job.error is not None:
                continue
            deaths += 1
            _bury(study, job, code, say)
            if deaths >= MOST_DEATHS:
                error = error or ResourceError(
                    f"{deaths} processes died in a row, the last with code {code}; see"
                    f" {_log_path(study.folder, job.index)}"
                )
            elif not told:
                running.append(_start(study, stop, job.index, environments[job.index], heard))
    finally:
        for job in running:
            job.process.kill()
            _end(job)
    if error is not None:
        raise error


def main() -> None:
    """Work on a study as the orders say: the process that `work_in_parallel` starts."""
    orders = json.loads(sys.stdin.readline())
    # what libraries print must not mix with the lines of JSON
    lines = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    writing = threading.Lock()

    def send(kind: str, values: Mapping[str, Any]) -> None:
        with writing:
            lines.write(json.dumps({"kind": kind, "values": values}, default=str) + "\n")

    seconds = orders["seconds"]
    stop = Stop(deadline=math.inf if seconds is None else time.monotonic() + seconds)
    threading.Thread(target=_obey, args=(stop,), daemon=True).start()
    folder = Path(orders["folder"])
    try:
        with Study(folder, read_tune(folder)) as study, stop.listening():
            work(study, stop, lambda event: send(event.kind, event.values))
    except EdgetuneError as error:
        send("error", {"type": type(error).__name__, "text": str(error)})
        sys.exit(error.exit_code)


def _obey(stop: Stop) -> None:
    for line in sys.stdin:
        if line.strip() == "stop":
            stop.asked = True
    os._exit(_ORPHANED)


def _start(
    study: Study, stop: Stop, index: int, environment: dict[str, str],
    heard: "queue.Queue[tuple[_Job, dict[str, Any] | None]]",
) -> _Job:  # fmt: skip
    code = "from edgetune.train.tune_jobs import main; main()"
    with _log_path(study.folder, index).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
            text=True, encoding="utf-8",
            # Ctrl-C is for this process, which tells the others once
            start_new_session=True,
        )  # fmt: skip
    job = _Job(index=index, process=process)
    left = None if math.isinf(stop.deadline) else max(0.0, stop.deadline - time.monotonic())
    _order(job, json.dumps({"folder": str(study.folder.absolute()), "seconds": left}))
    assert process.stdout is not None
    threading.Thread(target=_listen, args=(job, process.stdout, heard), daemon=True).start()
    return job


def _listen(
    job: _Job, lines: IO[str], heard: "queue.Queue[tuple[_Job, dict[str, Any] | None]]"
) -> None:
    with lines:
        for line in lines:
            with contextlib.suppress(ValueError):  # a line that the process's death cut
                heard.put((job, json.loads(line)))
    heard.put((job, None))


def _hear(job: _Job, message: Mapping[str, Any], say: OnTuneEvent) -> EdgetuneError | None:
    """Pass on what a process tells; return what broke it."""
    values = message["values"]
    if message["kind"] == "error":
        kind = getattr(errors, values["type"], EdgetuneError)
        job.error = EdgetuneError(values["text"])
        if kind.__init__ is Exception.__init__:  # others are made of something else than a text
            job.error = kind(values["text"])
        return job.error
    if message["kind"] == "begin":
        job.number = values["number"]
    if message["kind"] == "end":
        job.number = None
    say(TuneEvent(kind=message["kind"], values=values))
    return None


def _bury(study: Study, job: _Job, code: int, say: OnTuneEvent) -> None:
    """Fail the trial of a process that died, with what it left."""
    text = f"its process ended with code {code} (see {_log_path(study.folder, job.index)})"
    if job.number is not None and study.abandon(job.number, text):
        free_disk(trial_folder(study.folder, job.number))
        say(TuneEvent(kind="end", values=to_mapping(study.trial(job.number))))
    else:
        say(TuneEvent(kind="note", values={"text": f"job {job.index}: {text}"}))


def _order(job: _Job, text: str) -> None:
    assert job.process.stdin is not None
    with contextlib.suppress(OSError):  # it is dead: heard soon
        job.process.stdin.write(text + "\n")
        job.process.stdin.flush()


def _end(job: _Job) -> int:
    code = job.process.wait()
    assert job.process.stdin is not None
    with contextlib.suppress(OSError):  # an order that it did not live to read
        job.process.stdin.close()
    return code


def _log_path(folder: Path, index: int) -> Path:
    return folder / f"job-{index}.log"


def _environment(index: int, jobs: int, *, cpu: bool) -> dict[str, str]:
    """Return the environment of a process: its GPU, its share of the CPU's threads."""
    environment = dict(os.environ)
    threads = int(environment.get("OMP_NUM_THREADS") or _cores())
    environment["OMP_NUM_THREADS"] = str(max(1, threads // jobs))
    if not cpu and torch.cuda.is_available():
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = (
            visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        )
        environment["CUDA_VISIBLE_DEVICES"] = names[index % len(names)].strip()
    return environment


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
