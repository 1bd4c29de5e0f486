"""`edgetune-rt serve`: answer over HTTP."""

import logging
import os
import sys
from pathlib import Path

import click

from edgetune.errors import ConfigError
from edgetune.runtime.cli.lazy import printable
from edgetune.runtime.cli.options import BUNDLE, WATCH

TOKEN_VARIABLE = "EDGETUNE_TOKEN"


@click.command("serve")
@BUNDLE
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, help="0 takes a free one.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help=f"File with the token that clients have to send; or set {TOKEN_VARIABLE}.",
)
@click.option("--workers", default=1, show_default=True, help="Predictions at a time.")
@click.option("--queue", default=16, show_default=True, help="Predictions that may wait.")
@click.option(
    "--max-body-mib", type=float, help="Largest request.  [default: 16 for images, 1 for texts]"
)
@click.option("--max-megapixels", default=32.0, show_default=True, help="Largest image.")
@click.option("--timeout", default=30.0, show_default=True, help="Seconds until an answer.")
@click.option("--read-timeout", default=30.0, show_default=True, help="Seconds for a body.")
@click.option("--grace", default=10.0, show_default=True, help="Seconds to finish when stopped.")
@click.option("--connections", default=64, show_default=True, help="Open at a time.")
@click.option("--threads", type=int, help="Threads a prediction.  [default: the bundle's]")
@WATCH
@click.option("--access-log", is_flag=True, help="One line a request on standard error.")
def command(
    bundle: Path,
    host: str,
    port: int,
    token_file: Path | None,
    workers: int,
    queue: int,
    max_body_mib: float | None,
    max_megapixels: float,
    timeout: float,
    read_timeout: float,
    grace: float,
    connections: int,
    threads: int | None,
    watch: Path | None,
    access_log: bool,
) -> None:
    """Answer POST /predict, GET /healthz and GET /metrics until SIGTERM or Ctrl-C.

    An address that others can reach needs a token. See docs/serve.md.
    """
    from edgetune.runtime.serve import ServeSettings, serve

    settings = ServeSettings(
        host=host,
        port=port,
        token=_token(token_file),
        workers=workers,
        queue=queue,
        max_body_mib=max_body_mib,
        max_megapixels=max_megapixels,
        timeout_s=timeout,
        read_s=read_timeout,
        grace_s=grace,
        connections=connections,
    )
    level = logging.INFO if access_log else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr)
    from edgetune.runtime.model import EdgeModel

    def announce(url: str) -> None:
        click.echo(printable(f"serving {manifest.name}, release {manifest.release}, on {url}"))
        sys.stdout.flush()

    with EdgeModel.load(bundle, threads=threads, watch=watch) as model:
        manifest = model.manifest
        for sample in model.goldens()[:1]:
            model.outputs(sample)  # the first run allocates; no client should wait for it
        if serve(model, settings, on_ready=announce):
            # a prediction hangs inside onnxruntime, which must not be taken apart meanwhile
            model.flush_watch()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def _token(path: Path | None) -> str | None:
    from edgetune.runtime.serve import read_token

    if path is not None:
        try:
            text = path.read_text("ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: expected a file with a token: {error}") from error
        return read_token(text, where=str(path))
    if TOKEN_VARIABLE in os.environ:
        return read_token(os.environ[TOKEN_VARIABLE], where=TOKEN_VARIABLE)
    return None
