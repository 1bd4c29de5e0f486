"""Files written whole or not at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from edgetune.errors import ResourceError


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`: after a crash the file is the old one or the new one.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    replace_atomic(path, write)


def replace_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file beside `path`, flush it to disk and move it to `path`.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error}") from error
    finally:  # of an error, or a Ctrl-C
        with contextlib.suppress(OSError):
            temporary.unlink()


def flush(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no way to, and needs none
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
