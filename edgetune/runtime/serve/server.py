"""The endpoint: routes, who may ask, what is answered."""

import functools
import hmac
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, Self

from edgetune.errors import DataError, PredictionTimeout
from edgetune.runtime.manifest import Manifest
from edgetune.runtime.records import to_mapping
from edgetune.runtime.serve.address import listen, without_port
from edgetune.runtime.serve.bodies import carrier_of, read_query
from edgetune.runtime.serve.http import (
    LAST_WORDS_S,
    Exchange,
    HttpServer,
    Limits,
    Refusal,
    Request,
    Response,
    json_response,
    retry_after,
)
from edgetune.runtime.serve.metrics import Metrics
from edgetune.runtime.serve.pool import Late, Pool
from edgetune.runtime.serve.prometheus import CONTENT_TYPE, exposition, gauge
from edgetune.runtime.serve.settings import ServeSettings

log = logging.getLogger("edgetune.serve")

# bodies of all requests together, in units of the largest allowed
BODIES_IN_MEMORY = 4
# how late a prediction has to be for the server to call itself stuck: systemd's watchdog or a
# probe restarts it then
STUCK_S = 30.0
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Model(Protocol):
    """What is served: an `EdgeModel`, or whatever answers like one from several threads."""

    manifest: Manifest

    def predict(self, value: Any, *, all_scores: bool = False, timeout: float | None = None) -> Any:
        """Return a result for one sample, a list of them for a list; see `EdgeModel.predict`."""


@dataclass(frozen=True, kw_only=True)
class _Answer:
    body: bytes
    labels: list[str]
    seconds: float


class Server:
    """The endpoint, as an async context manager: bound and answering inside, stopped after."""

    def __init__(self, model: Model, settings: ServeSettings | None = None) -> None:
        """Check what can be checked before a socket is opened; see `serve` for the errors."""
        settings = settings or ServeSettings()
        self.model = model
        self.settings = settings
        self.carrier = carrier_of(model.manifest.task)
        limit = settings.max_body_mib or self.carrier.max_body_mib
        self.max_body_bytes = int(limit * 2**20)
        self._token = settings.token.encode() if settings.token else None
        self._metrics = Metrics(model.manifest)
        self._pool = Pool(settings.workers, settings.queue)
        self._http = HttpServer(
            self._handle,
            limits=Limits(
                connections=settings.connections,
                bodies_bytes=BODIES_IN_MEMORY * self.max_body_bytes,
                body_s=settings.read_s,
            ),
            observe=self._observe,
        )
        self._routes: dict[str, dict[str, Callable[[Request], Coroutine[Any, Any, Response]]]] = {
            "/predict": {"POST": self._predict},
            "/healthz": {"GET": self._health, "HEAD": self._health},
            "/metrics": {"GET": self._scrape, "HEAD": self._scrape},
        }
        self._hosts = LOOPBACK_NAMES
        self.url = ""

    async def __aenter__(self) -> Self:
        """Listen and answer."""
        listener, bound = listen(self.settings)
        host = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        self._hosts = LOOPBACK_NAMES | {host}
        self.url = f"http://{host}:{bound[1]}"
        self._pool.start()
        await self._http.start(listener)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop, if that has not been done."""
        await self.stop()

    @property
    def stuck(self) -> bool:
        """Whether a prediction is so late that it will hardly end."""
        return self._pool.most_late_s() > STUCK_S

    async def stop(self) -> int:
        """Stop accepting, finish what has begun within the grace period, then close.

        Returns:
            How many predictions have not ended: they can't be interrupted.
        """
        if not self._http.stopping:
            self._http.stop_accepting()
            if await self._http.finish(self.settings.grace_s):
                self._pool.give_up(_stopping())
                if left := await self._http.finish(LAST_WORDS_S):
                    log.warning("stopped with %d requests unanswered", left)
            await self._http.abort()
            self._pool.stop()
        return self._pool.busy

    # -- routes ---------------------------------------------------------------------------------

    async def _handle(self, request: Request) -> Response:
        self._authorize(request)
        methods = self._routes.get(request.path)
        if methods is None:
            raise Refusal(404, f"no such path; known: {', '.join(self._routes)}")
        if request.method not in methods:
            allowed = ", ".join(methods)
            raise Refusal(405, f"expected method {allowed}", ("Allow", allowed))
        return await methods[request.method](request)

    def _authorize(self, request: Request) -> None:
        if self._token is None:
            # a web page whose name was made to mean 127.0.0.1 (DNS rebinding) sends that name
            if without_port(request.host or "") not in self._hosts:
                raise Refusal(421, "this server answers to localhost and 127.0.0.1 only")
            return
        scheme, _, given = (request.header("authorization") or "").partition(" ")
        if scheme.lower() != "bearer":
            raise Refusal(401, "expected a bearer token", ("WWW-Authenticate", "Bearer"))
        if not hmac.compare_digest(given.strip().encode("latin-1"), self._token):
            invalid = ("WWW-Authenticate", 'Bearer error="invalid_token"')
            raise Refusal(401, "this bearer token is not the right one", invalid)

    async def _health(self, request: Request) -> Response:  # noqa: ARG002
        manifest = self.model.manifest
        state = "stopping" if self._http.stopping else "stuck" if self.stuck else "ok"
        answer = {
            "status": state,
            "bundle": manifest.name,
            "release": manifest.release,
            "digest": manifest.digest,
        }
        return json_response(200 if state == "ok" else 503, answer)

    async def _scrape(self, request: Request) -> Response:  # noqa: ARG002
        pool = self._pool
        families = [
            *self._metrics.families(),
            gauge("edgetune_queue_depth", "Predictions that wait for a worker.", pool.depth),
            gauge("edgetune_predictions_in_flight", "Predictions that run.", pool.busy),
            gauge("edgetune_http_connections", "Open connections.", self._http.connections),
        ]
        return Response(status=200, body=exposition(families), content_type=CONTENT_TYPE)

    async def _predict(self, request: Request) -> Response:
        all_scores = read_query(request.query)
        self._check_content_type(request)
        if self._http.stopping:
            raise _stopping()
        self._check_room()  # before the body comes, for nothing
        body = await request.body(self.max_body_bytes)
        deadline = time.monotonic() + self.settings.timeout_s
        self._check_room()
        if self._http.stopping:
            raise _stopping()
        work = functools.partial(self._answer, body, all_scores)
        try:
            done: _Answer = await self._pool.run(work, deadline, request.is_abandoned)
        except Late:
            self._metrics.rejected.add("late")
            raise Refusal(503, "no worker was free in time", self._retry_after()) from None
        except PredictionTimeout:
            seconds = f"{self.settings.timeout_s:g}"
            raise Refusal(504, f"the prediction took longer than {seconds} s") from None
        self._metrics.predicted(done.labels, done.seconds)
        return Response(status=200, body=done.body)

    def _check_content_type(self, request: Request) -> None:
        # a page in a browser may send text/plain, form-urlencoded or nothing to any address
        # without asking; what we take it may not
        kind = (request.header("content-type") or "").partition(";")[0].strip().lower()
        family = kind.partition("/")[0] + "/*"
        if kind not in self.carrier.content_types and family not in self.carrier.content_types:
            expected = " or ".join(self.carrier.content_types)
            raise Refusal(415, f"expected Content-Type {expected}, got {kind or 'none'!r}")
        if request.header("content-encoding") not in {None, "identity"}:
            raise Refusal(415, "expected a body without Content-Encoding")

    def _check_room(self) -> None:
        if self._pool.is_full:
            self._metrics.rejected.add("queue_full")
            raise Refusal(503, "too many predictions wait already", self._retry_after())

    def _retry_after(self) -> tuple[str, str]:
        ahead = (self._pool.depth + self._pool.busy) / self.settings.workers
        return retry_after(ahead * self._metrics.usual_s)

    def _answer(self, body: bytes, all_scores: bool, timeout_s: float) -> _Answer:
        """Predict, on a worker thread."""
        begin = time.perf_counter()
        value = self.carrier.read(body, self.settings)
        try:
            result = self.model.predict(value, all_scores=all_scores, timeout=timeout_s)
        except DataError as error:
            raise Refusal(422, str(error)) from error
        seconds = time.perf_counter() - begin
        many = isinstance(value, list)
        mappings = [to_mapping(one) for one in (result if many else [result])]
        answer: dict[str, Any] = {"results": mappings} if many else dict(mappings[0])
        answer["milliseconds"] = round(seconds * 1e3, 3)
        labels = [label for one in mappings for label in self._counted(one)]
        return _Answer(body=json_response(200, answer).body, labels=labels, seconds=seconds)

    def _counted(self, answer: dict[str, Any]) -> list[str]:
        """Return the labels that an answer counts for; a value counts for the one output."""
        if "label" in answer:
            return [answer["label"]]
        return list(answer.get("labels", self.model.manifest.labels if "value" in answer else ()))

    def _observe(self, exchange: Exchange) -> None:
        known = exchange.path if exchange.path in self._routes else "other"
        assert known is not None
        self._metrics.requests.add(known, str(exchange.status))
        if known == "/predict":
            self._metrics.request_seconds.observe(exchange.seconds)
        overflows = self._http.overflows
        self._http.overflows = 0
        if overflows:
            self._metrics.rejected.add("connections", by=overflows)
        log.info(
            "%s %s %s %d %.1f ms",
            exchange.client,
            exchange.method or "-",
            exchange.path or "-",
            exchange.status,
            exchange.seconds * 1e3,
        )


def _stopping() -> Refusal:
    return Refusal(503, "the server is stopping", ("Retry-After", "1"))
