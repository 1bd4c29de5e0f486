"""The server as a process: signals, and what systemd wants to hear."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable

from edgetune.runtime.serve.server import Model, Server
from edgetune.runtime.serve.settings import ServeSettings

log = logging.getLogger("edgetune.serve")


def serve(
    model: Model,
    settings: ServeSettings | None = None,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> int:
    """Answer until SIGTERM or SIGINT, then finish what has begun.

    A second signal ends the process at once. Tells systemd when it is ready, where that asks.
    `Server` is for programs that have an event loop of their own.

    Args:
        model: answers; stays open.
        settings: where and how; None serves on 127.0.0.1:8080.
        on_ready: is given the address as soon as it answers, "http://127.0.0.1:8080".

    Returns:
        How many predictions still ran when the grace period was over. They go on in daemon
        threads.

    Raises:
        ConfigError: an address that is not loopback has no token, or the task has no form that
            a request can carry.
        MissingExtraError: decoding needs a package that is not installed.
        ResourceError: the address cannot be listened on.
    """
    return asyncio.run(_serve(model, settings or ServeSettings(), on_ready))


async def _serve(
    model: Model, settings: ServeSettings, on_ready: Callable[[str], None] | None
) -> int:
    stop = asyncio.Event()

    def stop_on(number: int) -> None:
        if stop.is_set():  # told twice: as if there were no handler
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        log.info("stopping")
        stop.set()

    loop = asyncio.get_running_loop()
    async with Server(model, settings) as server:
        if threading.current_thread() is threading.main_thread():
            with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C stops at once
                loop.add_signal_handler(signal.SIGTERM, stop_on, signal.SIGTERM)
                loop.add_signal_handler(signal.SIGINT, stop_on, signal.SIGINT)
        notify("READY=1")
        watchdog = asyncio.create_task(_watchdog(server))
        if on_ready:
            on_ready(server.url)
        await stop.wait()
        notify("STOPPING=1")
        left = await server.stop()
        watchdog.cancel()
    return left


def notify(state: str) -> None:
    """Tell systemd, where it asked to be told (Type=notify); see sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        try:
            channel.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            channel.sendall(state.encode())
        except OSError as error:
            log.warning("systemd cannot be told %s: %s", state, error)


async def _watchdog(server: Server) -> None:
    """Tell systemd's watchdog, twice as often as it asks, that the server is not stuck."""
    period_us = os.environ.get("WATCHDOG_USEC", "")
    if not period_us.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(
        os.getpid()
    ):
        return
    while True:
        if not server.stuck:
            notify("WATCHDOG=1")
        await asyncio.sleep(int(period_us) / 2e6)
