"""The other end of worker.py: sends it cases, and starts another one where one dies or hangs."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
# wall-clock: other tests may run beside this one; the CPU time is bounded by the worker itself
HANGS_AFTER_SECONDS = 60


class Worker:
    """A process that opens bundles, and the cases that it has seen."""

    def __init__(self, good: list[dict[str, Any]]) -> None:
        """Remember `good`, cases that must load: what they need is imported before any other."""
        # memory as a disk, where there is one: each case writes some files, and flushes them
        self._place = tempfile.TemporaryDirectory(
            prefix="edgetune-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        )
        self._good = good
        self._process: subprocess.Popen[bytes] | None = None
        self.cases = 0
        self.loaded = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop()
        self._place.cleanup()

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """Return the verdict on a case: `failures`, none if all is well, and `outcome`."""
        if self._process is None:
            self._start()
        verdict = self._ask(case)
        self.cases += 1
        self.loaded += any(o == "load: done" for o in verdict["outcome"])
        return verdict

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), self._place.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=HERE.parents[1],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(HERE.parents[1]),
                # a backtrace reads more debug information than the limit of memory allows
                "RUST_BACKTRACE": "0",
            },
        )
        for _ in range(2):
            for case in self._good:
                verdict = self._ask(case)
                if verdict["failures"] or "load: done" not in verdict["outcome"]:
                    raise RuntimeError(f"a good bundle is refused: {verdict}")
        self._ask({"form": "limit"})

    def _ask(self, case: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        said_before = os.fstat(self._log.fileno()).st_size
        try:
            process.stdin.write(json.dumps(case).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            return self._died(said_before)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(HANGS_AFTER_SECONDS):
                self._stop()
                return {"failures": [f"hangs for {HANGS_AFTER_SECONDS} s"], "outcome": ["hangs"]}
        line = process.stdout.readline()
        if not line:
            return self._died(said_before)
        verdict: dict[str, Any] = json.loads(line)
        return verdict

    def _died(self, said_before: int) -> dict[str, Any]:
        process, log = self._process, self._log
        assert process is not None
        code = process.wait()
        log.seek(said_before)
        said = log.read().decode(errors="replace")[-2000:]
        self._stop()
        return {"failures": [f"the process died with code {code}: {said}"], "outcome": ["died"]}

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):  # the pipe to a dead process
                    stream.close()
