"""Worker threads, and the line before them."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from edgetune.errors import PredictionTimeout
from edgetune.runtime.serve.http import Refusal

log = logging.getLogger("edgetune.serve")

# how long after its time limit a prediction is waited for before its client is told
OVERRUN_S = 1.0


class Late(Exception):  # noqa: N818
    """A job whose time ran out before a worker was free."""


class _Job:
    def __init__(
        self, work: Callable[[float], Any], deadline: float, is_abandoned: Callable[[], bool]
    ) -> None:
        self.work = work
        self.deadline = deadline  # of time.monotonic
        self.is_abandoned = is_abandoned
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class Pool:
    """Worker threads and the line before them. All but `_work` runs on the event loop."""

    def __init__(self, workers: int, limit: int) -> None:
        self._workers = workers
        self._limit = limit
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._started: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def busy(self) -> int:
        """How many jobs run."""
        return len(self._running)

    @property
    def depth(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether another job would have to wait with no room to."""
        return self.busy >= self._workers and self.depth >= self._limit

    def most_late_s(self) -> float:
        """Return how long ago the deadline of a running job was, at most; below 0: not yet."""
        now = time.monotonic()
        return max((now - job.deadline for job in self._running), default=0.0)

    def start(self) -> None:
        """Start the threads, on the event loop that is running."""
        self._loop = asyncio.get_running_loop()
        for number in range(self._workers):
            # daemons: a prediction that hangs must not keep the process from ending
            name = f"edgetune-predict-{number}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    async def run(
        self, work: Callable[[float], Any], deadline: float, is_abandoned: Callable[[], bool]
    ) -> Any:
        """Return `work(seconds left)`, run by a worker.

        Raises:
            Late: the deadline passed before it began.
            PredictionTimeout: it passed while it ran.
        """
        job = _Job(work, deadline, is_abandoned)
        self._waiting.append(job)
        self._next()
        try:
            await asyncio.wait({job.future}, timeout=max(0.0, deadline - time.monotonic()))
            if job in self._running:  # it knows its limit and should end by itself
                await asyncio.wait({job.future}, timeout=OVERRUN_S)
            if job.future.done():
                return job.future.result()
            if job in self._running:
                log.error("a prediction does not end; its worker is lost until it does")
                raise PredictionTimeout("a prediction does not end")
            raise Late
        finally:
            job.future.cancel()
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)

    def give_up(self, error: Exception) -> None:
        """End every wait with an error; what runs goes on."""
        for job in (*self._waiting, *self._running):
            if not job.future.done():
                job.future.set_exception(error)
        self._waiting.clear()

    def stop(self) -> None:
        """Let threads end that have nothing to do."""
        for _ in range(self._workers):
            self._started.put(None)

    def _next(self) -> None:
        while self._waiting and self.busy < self._workers:
            job = self._waiting.popleft()
            if job.future.done():
                continue
            if job.is_abandoned():
                # who was in the queue so long that the client gave up costs no work
                job.future.set_exception(ConnectionAbortedError("the client is gone"))
                continue
            self._running.add(job)
            self._started.put(job)

    def _work(self) -> None:
        while (job := self._started.get()) is not None:
            self._do(job)
            del job  # it holds the request's body

    def _do(self, job: _Job) -> None:
        assert self._loop is not None
        result: Any = None
        failure: Exception | None = None
        try:
            result = job.work(max(0.001, job.deadline - time.monotonic()))
        except (Refusal, PredictionTimeout) as error:
            failure = error
        except Exception:
            log.exception("a prediction failed")
            failure = Refusal(500, "the prediction failed; the server's log says more")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._finished, job, result, failure)

    def _finished(self, job: _Job, result: Any, failure: Exception | None) -> None:
        self._running.discard(job)
        if not job.future.done():
            if failure is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(failure)
        self._next()
