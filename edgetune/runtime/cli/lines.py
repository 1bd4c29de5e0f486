"""Standard input, line by line."""

import io
import sys
from collections.abc import Iterator


def lines() -> Iterator[str]:
    """Yield the lines of standard input that are not blank; a byte that is no UTF-8 is kept."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\r\n")
