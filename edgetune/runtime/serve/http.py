"""HTTP/1.1 with limits: h11 knows the grammar, asyncio waits, nothing here knows a model.

Every wait has an end and every buffer a bound: a client that is slow, silent or hostile costs a
few KiB for some seconds. Connections that have not sent a whole request head give way to newer
ones when there are too many, so a crowd of them cannot keep others out.

Source: RFC 9110 (semantics), RFC 9112 (HTTP/1.1).
"""

import asyncio
import contextlib
import http
import json
import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from edgetune.errors import MissingExtraError

try:
    import h11
except ImportError as missing:
    raise MissingExtraError("h11", "server") from missing

log = logging.getLogger("edgetune.serve")

HEAD_CHUNK_BYTES = 4 * 2**10
BODY_CHUNK_BYTES = 16 * 2**10
# of a chunked body; each chunk costs time, so a crowd of tiny ones is refused
FREE_CHUNKS = 1000
MEAN_CHUNK_BYTES = 64
# so old a connection without a request may be closed for a new one: long enough for a request
# that is on its way, as many clients may come at once
GIVES_WAY_AFTER_S = 0.25
CLOSE = ("Connection", "close")
# what is sent after a grace period ran out
LAST_WORDS_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds for all clients together and each alone; times in seconds.

    `head_s` is for a request's line and headers from their first byte, `body_s` for its body,
    `idle_s` for the next request on a connection that stays open. `bodies_bytes` is for the
    bodies of all requests that are being read or answered.
    """

    connections: int = 64
    bodies_bytes: int = 64 * 2**20
    head_bytes: int = 16 * 2**10
    head_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 60.0
    write_s: float = 30.0
    linger_s: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Response:
    """What goes back: a status, a body, and headers beside those of every response."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


class Refusal(Exception):  # noqa: N818 - no error of ours, an answer
    """A request that is answered with an error: its status, and a message for the client."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str]) -> None:
        """Take the status, what the client is told, and headers that belong to the status."""
        super().__init__(message)
        self.response = json_response(status, {"error": message}, *headers)


def json_response(status: int, answer: object, *headers: tuple[str, str]) -> Response:
    """Return a response with `answer` as JSON in UTF-8."""
    text = json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n"
    # a lone surrogate becomes \udxxx, which is JSON's own way to write it
    body = text.encode("utf-8", "backslashreplace")
    return Response(status=status, body=body, headers=headers)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One request and its answer, for logs and counters; None where the head was unreadable."""

    client: str
    method: str | None
    path: str | None
    status: int
    seconds: float


class Request:
    """A request whose head has arrived; `body` reads the rest."""

    def __init__(self, event: h11.Request, connection: "_Connection") -> None:
        """Split the target of h11's event into path, query and host.

        Raises:
            Refusal: the target is of no form that a server answers, or a body has two lengths.
        """
        self._headers = event.headers
        self._connection = connection
        self.method = event.method.decode("ascii")
        target = event.target.decode("latin-1")
        host = self.header("host")
        if target[:7].lower() == "http://":  # RFC 9112 3.2.2: this host stands above the header's
            host, slash, rest = target[7:].partition("/")
            target = slash + rest
        self.host = host
        self.path, _, self.query = target.partition("?")
        if event.http_version not in {b"1.0", b"1.1"}:
            raise Refusal(505, "expected HTTP/1.1", CLOSE)
        chunked = self.header("transfer-encoding") is not None
        if chunked and (event.http_version == b"1.0" or self.header("content-length")):
            # RFC 9112 6.1: a proxy before us may have seen the request end elsewhere, so nothing
            # that follows on this connection can be trusted
            raise Refusal(400, "Transfer-Encoding needs HTTP/1.1 and no Content-Length", CLOSE)
        if not self.path.startswith("/"):
            raise Refusal(400, 'the request target does not start with "/"')

    def header(self, name: str) -> str | None:
        """Return the value of header `name` (in lower case), or None.

        Raises:
            Refusal: it stands there more than once.
        """
        found = [value for key, value in self._headers if key == name.encode()]
        if len(found) > 1:
            raise Refusal(400, f"header {name} stands there {len(found)} times, expected once")
        return found[0].decode("latin-1") if found else None

    async def body(self, limit: int) -> bytes:
        """Return the body, at most `limit` bytes.

        Raises:
            Refusal: it has no length, is too large, too slow, or too much waits already.
            h11.RemoteProtocolError: it is malformed or ends early.
        """
        length = self.header("content-length")
        if length is None and self.header("transfer-encoding") is None:
            raise Refusal(411, "expected a body with Content-Length")
        if length is not None and int(length) > limit:
            raise Refusal(413, f"expected a body of at most {limit} bytes, got {int(length)}")
        return await self._connection.read_body(limit)

    def is_abandoned(self) -> bool:
        """Say whether the client has closed its side: nobody waits for the answer."""
        return self._connection.is_abandoned()


Handler = Callable[[Request], Awaitable[Response]]


class HttpServer:
    """Listens, reads requests, sends what `handle` returns. Everything runs on one event loop."""

    def __init__(
        self, handle: Handler, *, limits: Limits, observe: Callable[[Exchange], None]
    ) -> None:
        """Take what answers a request, and what is told of each exchange."""
        self.handle = handle
        self.limits = limits
        self.observe = observe
        self.stopping = False
        self.bodies_bytes = 0
        self.overflows = 0
        self._connections: dict[_Connection, asyncio.Task[Any]] = {}  # the oldest first
        self._server: asyncio.Server | None = None

    @property
    def connections(self) -> int:
        """The number of connections that are open."""
        return len(self._connections)

    async def start(self, listener: socket.socket) -> None:
        """Accept connections of a bound socket."""
        self._server = await asyncio.start_server(self._connected, sock=listener, limit=2**14)

    def stop_accepting(self) -> None:
        """Close the socket and every connection on which nothing of a request has arrived."""
        self.stopping = True
        if self._server:
            self._server.close()
        for connection, task in self._connections.items():
            if connection.idle:
                task.cancel()

    async def finish(self, seconds: float) -> int:
        """Wait for the requests that have begun; return how many have not ended."""
        if not self._connections:
            return 0
        _, left = await asyncio.wait(self._connections.values(), timeout=max(0.0, seconds))
        return len(left)

    async def abort(self) -> None:
        """Close what is still open."""
        for task in self._connections.values():
            task.cancel()
        await self.finish(LAST_WORDS_S)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(self, reader, writer)
        full = False
        while len(self._connections) >= self.limits.connections and not full:
            full = not self._displace()
        if self.stopping:
            writer.transport.abort()
            return
        self._connections[connection] = task
        try:
            if full:
                self.overflows += 1
                await connection.turn_away()
            else:
                await connection.run()
        except asyncio.CancelledError:
            writer.transport.abort()
        except OSError:  # the client went away, or does not read its answer
            writer.transport.abort()
        except Exception:
            log.exception("a connection failed")
            writer.transport.abort()
        finally:
            await connection.close()
            self._connections.pop(connection, None)

    def _displace(self) -> bool:
        """Close the oldest connection that waits for a request; say whether there was one."""
        for connection, task in self._connections.items():
            if connection.waiting_since < time.monotonic() - GIVES_WAY_AFTER_S:
                del self._connections[connection]
                connection.writer.transport.abort()
                task.cancel()
                return True
        return False


class _Connection:
    def __init__(
        self, server: HttpServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.server = server
        self.limits = server.limits
        self.reader = reader
        self.writer = writer
        self.idle = True
        self.waiting_since = time.monotonic()  # for a request's head; infinity where it has one
        self.parser = h11.Connection(h11.SERVER, max_incomplete_event_size=self.limits.head_bytes)
        self._held_bytes = 0
        peer = writer.get_extra_info("peername")
        self._client = str(peer[0]) if isinstance(peer, tuple) else "local"

    async def run(self) -> None:
        while await self._exchange():
            self.parser.start_next_cycle()

    async def turn_away(self) -> None:
        """Answer that there are too many connections, whatever the request is."""
        self.idle = False
        refusal = Refusal(503, "too many connections", ("Retry-After", "1"))
        await self._send(refusal.response, with_body=True)
        self._tell(None, refusal.response, time.monotonic())
        await self._linger()

    async def close(self) -> None:
        """Close; a client that does not take the rest of its answer is cut off."""
        self.writer.close()
        try:
            async with asyncio.timeout(self.limits.write_s):
                await self.writer.wait_closed()
        except (OSError, TimeoutError, asyncio.CancelledError):
            self.writer.transport.abort()

    def is_abandoned(self) -> bool:
        return self.reader.at_eof() or self.writer.transport.is_closing()

    async def read_body(self, limit: int) -> bytes:
        if self.parser.they_are_waiting_for_100_continue:
            carry_on = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.writer.write(self.parser.send(carry_on) or b"")
        body, chunks = bytearray(), 0
        try:
            async with asyncio.timeout(self.limits.body_s):
                while not isinstance(
                    event := await self._event(BODY_CHUNK_BYTES), h11.EndOfMessage
                ):
                    assert isinstance(event, h11.Data)
                    self._hold(len(event.data))
                    body += event.data
                    chunks += 1
                    if chunks > FREE_CHUNKS + len(body) // MEAN_CHUNK_BYTES:
                        raise Refusal(400, "the body's chunks are too small")
                    if len(body) > limit:
                        raise Refusal(413, f"expected a body of at most {limit} bytes, got more")
        except TimeoutError:
            raise Refusal(408, f"expected the whole body within {self.limits.body_s:g} s") from None
        return bytes(body)

    def _hold(self, size: int) -> None:
        if self.server.bodies_bytes + size > self.limits.bodies_bytes:
            raise Refusal(503, "too many large requests at once", ("Retry-After", "1"))
        self._held_bytes += size
        self.server.bodies_bytes += size

    async def _exchange(self) -> bool:
        """Answer one request; say whether another may follow on this connection."""
        request: Request | None = None
        with_body = True
        begin = time.monotonic()
        try:
            event = await self._head()
            if event is None:
                return False
            begin = time.monotonic()
            with_body = event.method != b"HEAD"
            request = Request(event, self)
            response = await self.server.handle(request)
        except Refusal as refusal:
            response = refusal.response
        except h11.RemoteProtocolError as error:
            response = Refusal(_status(error), f"no valid request: {error}").response
        except OSError:  # of the connection; handlers keep their own
            raise
        except Exception:
            log.exception("a request failed")
            response = Refusal(500, "internal error; the server's log says more").response
        finally:
            self.server.bodies_bytes -= self._held_bytes
            self._held_bytes = 0
        self._end_request()
        await self._send(response, with_body=with_body)
        self._tell(request, response, begin)
        again = self.parser.their_state is h11.DONE and self.parser.our_state is h11.DONE
        if not again:
            await self._linger()
        return again and not self.server.stopping

    async def _head(self) -> h11.Request | None:
        """Return the next request's line and headers; None where the client has no more."""
        self.idle = True
        self.waiting_since = time.monotonic()
        event = self.parser.next_event()
        if event is h11.NEED_DATA:
            try:
                async with asyncio.timeout(self.limits.idle_s):
                    data = await self.reader.read(HEAD_CHUNK_BYTES)
            except TimeoutError:
                return None
            self.idle = False
            self.parser.receive_data(data)
            try:
                async with asyncio.timeout(self.limits.head_s):
                    event = await self._event(HEAD_CHUNK_BYTES)
            except TimeoutError:
                seconds = f"{self.limits.head_s:g}"
                raise Refusal(408, f"expected the whole request head within {seconds} s") from None
        self.idle = False
        self.waiting_since = math.inf
        return event if isinstance(event, h11.Request) else None

    async def _event(self, chunk: int) -> Any:
        while (event := self.parser.next_event()) is h11.NEED_DATA:
            await asyncio.sleep(0)  # a read that need not wait would let no other client in
            self.parser.receive_data(await self.reader.read(chunk))
        return event

    def _end_request(self) -> None:
        """Take the end of a request without a body, so that the connection can stay open."""
        if self.parser.their_state is h11.SEND_BODY:
            with contextlib.suppress(h11.RemoteProtocolError):
                self.parser.next_event()

    async def _send(self, response: Response, *, with_body: bool) -> None:
        """Send a response.

        Raises:
            OSError, TimeoutError: the client is gone or does not read.
        """
        again = self.parser.their_state is h11.DONE and not self.server.stopping
        closing = CLOSE in response.headers
        headers = [
            ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(response.body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            *response.headers,
            *(() if again or closing else (CLOSE,)),
        ]
        reason = http.HTTPStatus(response.status).phrase
        head = h11.Response(status_code=response.status, headers=headers, reason=reason)
        data = self.parser.send(head) or b""
        if with_body:
            data += self.parser.send(h11.Data(data=response.body)) or b""
        data += self.parser.send(h11.EndOfMessage()) or b""
        self.writer.write(data)
        async with asyncio.timeout(self.limits.write_s):
            await self.writer.drain()

    async def _linger(self) -> None:
        """Read on for a moment: closing over unread bytes would destroy the answer on its way."""
        self.waiting_since = -math.inf
        try:
            self.writer.write_eof()
            async with asyncio.timeout(self.limits.linger_s):
                while await self.reader.read(BODY_CHUNK_BYTES):
                    pass
        except (OSError, TimeoutError):
            pass

    def _tell(self, request: Request | None, response: Response, begin: float) -> None:
        self.server.observe(
            Exchange(
                client=self._client,
                method=request.method if request else None,
                path=request.path if request else None,
                status=response.status,
                seconds=time.monotonic() - begin,
            )
        )


def _status(error: h11.RemoteProtocolError) -> int:
    status = error.error_status_hint
    return status if status in {400, 431, 501} else 400


def retry_after(seconds: float) -> tuple[str, str]:
    """Return the header Retry-After, in whole seconds from 1 to 60."""
    return ("Retry-After", str(min(60, max(1, math.ceil(seconds)))))
