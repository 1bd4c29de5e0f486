"""Several runs in one launch: torchrun starts this program with a file of jobs.

Each process does every job in turn, and writes what it saw to `<file>.<rank>.json`: {name:
{"status", "error", "trained", "events"}}; "trained" is a hash of the weights that it ends with.
"""

import dataclasses
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from edgetune.config import TrainConfig
from edgetune.errors import EdgetuneError
from edgetune.train import Event, loop, resume, train


def main(jobs: Path) -> None:
    loop.EVENT_SECONDS = 0.0
    engines: list[Any] = []
    make = loop.Engine.__init__

    def keeping(self: Any, *arguments: Any) -> None:
        make(self, *arguments)
        engines.append(self)

    loop.Engine.__init__ = keeping  # type: ignore[method-assign]
    seen = {}
    for name, job in json.loads(jobs.read_text()).items():
        seen[name] = _run(job)
        digest = hashlib.sha256()
        for key, tensor in sorted(engines[-1].trained().items()):
            digest.update(key.encode() + tensor.numpy().tobytes())
        seen[name]["trained"] = digest.hexdigest()
    path = jobs.with_name(f"{jobs.name}.{os.environ['RANK']}.json")
    path.write_text(json.dumps(seen))


def _run(job: dict[str, Any]) -> dict[str, Any]:
    events: list[str] = []
    stop_at = job.get("stop_at")

    def on_event(event: Event) -> None:
        events.append(event.kind)
        if event.kind == "step" and event.values["step"] == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    if job.get("slow_clock"):
        _slow_clock()
    try:
        if "config" in job:
            record = train(TrainConfig(**job["config"]), on_event=on_event)
        else:
            record = resume(Path(job["folder"]), on_event=on_event)
    except EdgetuneError as error:
        return {"status": "", "error": f"{type(error).__name__}: {error}", "events": events}
    found = {"status": record.status, "error": "", "events": events}
    return found | {"metrics": dataclasses.asdict(record)["metrics"]}


def _slow_clock() -> None:
    """Let every process find another moment to be the one to save, as real clocks do."""
    import types

    time = loop.time
    rank = int(os.environ["RANK"])
    clock = types.SimpleNamespace(**vars(time))
    clock.monotonic = lambda: time.monotonic() * (1 if rank else 50)
    loop.time = clock  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
