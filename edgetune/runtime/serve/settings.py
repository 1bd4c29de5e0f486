"""How to serve: addresses, bounds, the token."""

from dataclasses import dataclass, field

from edgetune.errors import ConfigError

MIN_TOKEN_CHARACTERS = 16


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How to serve.

    Attributes:
        host: address or name to listen on; anything but loopback needs a token.
        port: 0 takes a free one.
        token: what clients send as `Authorization: Bearer ...`; None asks for nothing.
        workers: predictions at a time. One uses all threads of the model's session.
        queue: predictions that may wait for a worker.
        max_body_mib: largest body; None takes what suits the task (`CARRIERS`).
        max_megapixels: largest image, since a small file can hold a huge one.
        timeout_s: from a request's arrival to its answer, time in the queue included.
        read_s: for a request's body to arrive.
        grace_s: for what has begun when the server is told to stop.
        connections: open at a time.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = field(default=None, repr=False)
    workers: int = 1
    queue: int = 16
    max_body_mib: float | None = None
    max_megapixels: float = 32.0
    timeout_s: float = 30.0
    read_s: float = 30.0
    grace_s: float = 10.0
    connections: int = 64

    def __post_init__(self) -> None:
        """Check the bounds of every setting.

        Raises:
            ConfigError: one is out of bounds, or the token is too short.
        """
        bounds: dict[str, tuple[float, float]] = {
            "port": (0, 65535),
            "workers": (1, 64),
            "queue": (0, 10_000),
            "max_body_mib": (0.001, 1024),
            "max_megapixels": (0.001, 1000),
            "timeout_s": (0.001, 3600),
            "read_s": (0.001, 3600),
            "grace_s": (0, 3600),
            "connections": (1, 10_000),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name}: expected {low:g} to {high:g}, got {value:g}")
        if self.token is not None:
            _check_token(self.token)


def read_token(text: str, *, where: str) -> str:
    """Return the token in `text`, blanks around it left out.

    Raises:
        ConfigError: it is too short, or has letters that a header cannot carry.
    """
    token = text.strip()
    _check_token(token, where=where)
    return token


def _check_token(token: str, *, where: str = "token") -> None:
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise ConfigError(
            f"{where}: expected a token of at least {MIN_TOKEN_CHARACTERS} characters, got"
            f" {len(token)}; openssl rand -hex 32 makes one"
        )
    if not all("!" <= character <= "~" for character in token):
        raise ConfigError(f"{where}: expected a token of visible ASCII characters, no blanks")
