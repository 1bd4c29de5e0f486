"""Runs in processes that may be killed: torch is imported once, each run is a fork.

As a program it reads jobs from standard input, a line of JSON each, and answers with a line.
The parent never computes, so its forks start as fresh processes do.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# kinds of `Death`
AT_OPERATION, AT_TORN_FILE, AT_DELAY = "operation", "torn", "delay"


@dataclass(frozen=True)
class Death:
    """When a run is killed with SIGKILL.

    kind "operation": right before its `at`-th call that changes files below the run's folder's
    parent; "torn": in the middle of writing its `at`-th file of tensors; "delay": `at` seconds
    after its first step.
    """

    kind: str
    at: float


@dataclass(frozen=True)
class Outcome:
    """code: 0, an edgetune error's exit code, 1 for any other, -9 where it was killed."""

    code: int
    status: str
    error: str
    notes: tuple[str, ...]
    operations: int
    tensor_files: int
    seconds: float


class Forks:
    """The client of the program below."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def train(self, config: Mapping[str, Any], **options: Any) -> Outcome:
        return self._ask({"config": dict(config), "folder": config["output"], **options})

    def resume(self, folder: Path, **options: Any) -> Outcome:
        return self._ask({"folder": str(folder), **options})

    def _ask(self, job: dict[str, Any]) -> Outcome:
        death = job.pop("death", None)
        if death is not None:
            job["death"] = [death.kind, death.at]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Outcome(**{**answer, "notes": tuple(answer["notes"])})


@contextmanager
def open_forks() -> Iterator[Forks]:
    """Start the program; it ends with the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    try:
        yield Forks(process)
    finally:
        assert process.stdin is not None
        process.stdin.write("\n")  # others may have inherited the pipe: it would not end
        process.stdin.close()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()


# -- the program -------------------------------------------------------------------------------


def _serve() -> None:
    # what forks would import again and again
    for module in (
        "edgetune.train", "matplotlib.backends.backend_agg", "peft.tuners.adalora",
        "torchvision.models", "transformers.models.bert.modeling_bert",
    ):  # fmt: skip
        importlib.import_module(module)
    answers = os.dup(1)
    os.dup2(2, 1)
    while line := sys.stdin.readline().strip():
        os.write(answers, (json.dumps(_fork(json.loads(line))) + "\n").encode())


def _fork(job: dict[str, Any]) -> dict[str, Any]:
    begin = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(job, writing)
    os.close(writing)
    kind, at = job.get("death", ("", 0))
    said: list[dict[str, Any]] = []
    kill_at = None
    buffer = b""
    while True:
        wait = None if kill_at is None else max(0.0, kill_at - time.monotonic())
        ready, _, _ = select.select([reading], [], [], wait)
        if not ready:
            os.kill(pid, signal.SIGKILL)
            kill_at = None
            continue
        found = os.read(reading, 65536)
        if not found:
            break
        *lines, buffer = (buffer + found).split(b"\n")
        for text in lines:
            said.append(json.loads(text))
            if kind == AT_DELAY and said[-1].get("kind") == "step" and kill_at is None:
                kill_at = time.monotonic() + at
    _, status = os.waitpid(pid, 0)
    os.close(reading)
    last = said[-1] if said and "code" in said[-1] else {}
    return {
        "code": os.waitstatus_to_exitcode(status),
        "status": last.get("status", ""),
        "error": last.get("error", ""),
        "notes": [s["text"] for s in said if s.get("kind") == "note"],
        "operations": last.get("operations", 0),
        "tensor_files": last.get("tensor_files", 0),
        "seconds": time.monotonic() - begin,
    }


def _child(job: dict[str, Any], writing: int) -> None:
    from edgetune.config import TrainConfig
    from edgetune.errors import EdgetuneError
    from edgetune.train import Event, loop, resume, train

    # one line of JSON has to stay one write
    def say(values: Mapping[str, Any]) -> None:
        os.write(writing, (json.dumps(values) + "\n").encode())

    said_step = False

    def on_event(event: Event) -> None:
        nonlocal said_step
        if event.kind == "note":
            say({"kind": "note", "text": event.values["text"]})
        elif event.kind == "step" and not said_step:
            said_step = True
            say({"kind": "step"})
        if event.kind == "step" and event.values["step"] == job.get("interrupt_at"):
            number = signal.Signals[job.get("signal", "SIGINT")]
            if job.get("whole_group"):
                os.killpg(0, number)
            else:
                os.kill(os.getpid(), number)

    if job.get("whole_group"):
        os.setpgrp()  # as a shell does for a command, and torchrun for each process
    loop.EVENT_SECONDS = 0.0
    folder = Path(job["folder"])
    counts = _watch(folder.parent, *job.get("death", ("", 0)))
    if "file_bytes" in job:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"], job["file_bytes"]))
    answer: dict[str, Any] = {}
    try:
        if "config" in job:
            answer["status"] = train(TrainConfig(**job["config"]), on_event=on_event).status
        else:
            answer["status"] = resume(folder, on_event=on_event).status
        code = 0
    except EdgetuneError as error:
        answer["error"], code = f"{type(error).__name__}: {error}", error.exit_code
    except BaseException as error:
        traceback.print_exc()
        answer["error"], code = f"{type(error).__name__}: {error}", 1
    say({**answer, **counts, "code": code})
    os._exit(code)


def _watch(folder: Path, kind: str, at: float) -> dict[str, int]:
    """Count what changes files below `folder`, and die at the right moment."""
    import safetensors.torch

    from edgetune.runtime import files
    from edgetune.train import checkpoint

    counts = {"operations": 0, "tensor_files": 0}
    main, below = os.getpid(), str(folder)

    def count(name: str) -> None:
        counts[name] += 1
        if (name, counts[name]) == ({AT_OPERATION: "operations"}.get(kind), at):
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changing = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (
            event == "open" and isinstance(arguments[1], str) and arguments[1] != "r"
        )
        if changing and os.getpid() == main and str(arguments[0]).startswith(below):
            count("operations")

    sys.addaudithook(hook)
    save, fsync = safetensors.torch.save_file, os.fsync

    def counting_fsync(handle: int) -> None:
        count("operations")  # which has no audit event
        fsync(handle)

    def tearing_save(tensors: Any, path: Any, *arguments: Any, **options: Any) -> None:
        save(tensors, path, *arguments, **options)
        counts["tensor_files"] += 1
        if kind == AT_TORN_FILE and counts["tensor_files"] == at:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = files.os.fsync = counting_fsync
    safetensors.torch.save_file = checkpoint.save_file = tearing_save
    return counts


if __name__ == "__main__":
    _serve()
