"""Work done ahead of its consumer: one thread, a bounded queue, order kept."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from edgetune.errors import ConfigError, EdgetuneError

T = TypeVar("T")
# how often a thread that waits for room looks whether anybody still wants it
POLL_S = 0.1


@contextmanager
def ahead(
    work: Callable[[Any], T], source: Iterable[Any], queue_size: int
) -> Iterator[Iterator[T | EdgetuneError]]:
    """Yield an iterator of `work(item)` for each item of `source`, done ahead in a thread.

    An `EdgetuneError` of `work` is given in the item's place; any other error, and any of the
    source, is raised when its turn comes. When the context ends, so does the thread: at once,
    or, where it waits for the source, with the source's next item.

    Raises:
        ConfigError: `queue_size` is less than 1.
    """
    if queue_size < 1:
        raise ConfigError(f"queue_size: expected 1 or more, got {queue_size}")
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(queue_size)
    ended = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not ended.is_set():
            try:
                waiting.put((kind, value), timeout=POLL_S)
            except queue.Full:
                continue
            return

    def produce() -> None:
        try:
            for item in source:
                if ended.is_set():
                    return
                try:
                    made: Any = work(item)
                except EdgetuneError as error:
                    made = error
                put("item", made)
        except BaseException as error:  # the source's own: the consumer's business
            put("error", error)
        else:
            put("end", None)

    def consume() -> Iterator[T | EdgetuneError]:
        while True:
            kind, value = waiting.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value

    thread = threading.Thread(target=produce, name="edgetune-stream", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        ended.set()
