"""The socket to listen on, and the hosts that it answers to."""

import ipaddress
import socket

from edgetune.errors import ConfigError, ResourceError
from edgetune.runtime.serve.settings import ServeSettings


def listen(settings: ServeSettings) -> tuple[socket.socket, tuple[str, int]]:
    """Return a bound socket and its address.

    Raises:
        ConfigError: the name is unknown, or anybody could connect and there is no token.
        ResourceError: the address is not to be had.
    """
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {settings.host!r}: is no address: {error}") from error
    # localhost is often ::1 as well; who writes it means the address that everything knows
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    family, _, _, _, address = found[0]
    name = str(address[0])
    if settings.token is None and not ipaddress.ip_address(name.partition("%")[0]).is_loopback:
        raise ConfigError(
            f"{settings.host}: can be reached from outside, so a token is needed: put one into the"
            " environment variable EDGETUNE_TOKEN, or into a file for --token-file"
        )
    both = family == socket.AF_INET6 and name == "::" and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            address,  # of IPv6 with its scope: fe80::1%eth0
            family=family,
            backlog=128,
            dualstack_ipv6=both,
        )
    except OSError as error:
        raise ResourceError(
            f"{settings.host}:{settings.port}: cannot be listened on: {error.strerror or error}"
        ) from error
    bound = listener.getsockname()
    return listener, (str(bound[0]), int(bound[1]))


def without_port(host: str) -> str:
    """Return the host of `host:port`, in lower case; an IPv6 address keeps its brackets."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdecimal() else host.lower()
