"""Work done ahead of its consumer: one thread, so much and no more, order kept."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from edgetune.errors import EdgetuneError

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

    Args:
        work: done in the thread.
        source: what it is done to.
        queue_size: how many items may be taken ahead of the one that the consumer has.
    """
    waiting: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    room = threading.Semaphore(queue_size)
    ended = threading.Event()

    def taken() -> Iterator[Any]:
        """Yield the source's items, each when there is room for it and not before."""
        items = iter(source)
        while True:
            while not room.acquire(timeout=POLL_S):
                if ended.is_set():
                    return
            if ended.is_set():
                return
            try:
                item = next(items)
            except StopIteration:
                return
            yield item

    def produce() -> None:
        try:
            for item in taken():
                try:
                    made: Any = work(item)
                except EdgetuneError as error:
                    made = error
                waiting.put(("item", made))
        except BaseException as error:  # the source's own: the consumer's business
            waiting.put(("error", error))
        else:
            waiting.put(("end", None))

    def consume() -> Iterator[T | EdgetuneError]:
        while True:
            try:
                kind, value = waiting.get(timeout=POLL_S)  # so that Ctrl-C is seen on Windows
            except queue.Empty:
                continue
            if kind == "error":
                raise value
            if kind == "end":
                return
            room.release()
            yield value

    thread = threading.Thread(target=produce, name="edgetune-stream", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        ended.set()
