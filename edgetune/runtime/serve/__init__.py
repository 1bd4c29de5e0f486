"""`serve(model)`: predictions over HTTP, on the device itself.

The HTTP grammar is h11's (pure Python, no dependencies of its own, extra `[server]`), because
parsing hostile input by hand is how servers get hurt; the sockets are asyncio's, because a slow
client then costs a few KiB and not a thread. The standard library's http.server has no limits
and says itself that it is not for production; frameworks take more memory and time to start
than a small board has to spare.

    POST /predict    a sample in, a label out; see `bodies.CARRIERS` for what a body may be
    GET /healthz     200, or 503 while it stops or hangs
    GET /metrics     Prometheus' text format

Predictions run on `workers` threads; up to `queue` more wait in line, and what comes on top is
told to come back later. No request can name a file.
"""

from edgetune.runtime.serve.server import Model, Server
from edgetune.runtime.serve.service import serve
from edgetune.runtime.serve.settings import ServeSettings, read_token

__all__ = ["Model", "ServeSettings", "Server", "read_token", "serve"]
