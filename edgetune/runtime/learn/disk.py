"""The one place where the learning store touches the file system.

Few verbs, each of a known sequence of system calls; every call but `close` goes through
`Disk._do`, so that a test can count them, fail one, or cut the power at any of them. What is
promised is what POSIX and Windows promise, no more:

- a file's content is on the disk once `fsync` returned; before that any part of it may be there;
- a name (of a new, renamed or removed file or folder) is on the disk once its folder's `fsync`
  returned; before that it may be there or not. Windows has no such call and needs none;
- a rename is never seen half done.
"""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_BINARY = getattr(os, "O_BINARY", 0)
# what a file system answers that has no way to flush a folder
_NO_FOLDER_FSYNC = (errno.EINVAL, errno.ENOTSUP)


class Lock(Protocol):
    """What `Disk.lock` returns: held until closed, or until the process ends."""

    def close(self) -> None:
        """Let others have it."""


class Disk:
    """The file system.

    bytes_written: contents handed to the file system so far, without its own metadata.
    syncs: how often a file or a folder was flushed; on flash each costs milliseconds and a page.
    """

    def __init__(self) -> None:
        """Start counting at zero."""
        self.bytes_written = 0
        self.syncs = 0

    def make_folder(self, path: Path) -> None:
        """Make an empty folder; `fsync_folder(path.parent)` makes it last.

        Raises:
            OSError: something is there (FileExistsError), or it cannot be made.
        """
        self._do(os.mkdir, path)

    def write_new(self, path: Path, data: bytes) -> None:
        """Make a file that is not there yet, write all of it and flush it: open, write, fsync.

        Raises:
            OSError: something is there (FileExistsError), or it cannot be written.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY
        self._write(self._do(os.open, path, flags, 0o666), data)

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        """Write into a file that is there, at `offset`, and flush it: open, lseek, write, fsync.

        Bytes before `offset` and behind the end of `data` stay as they are.

        Raises:
            OSError: it is not there, or cannot be written.
        """
        self._write(self._do(os.open, path, os.O_WRONLY | _BINARY), data, offset)

    def truncate(self, path: Path, size: int) -> None:
        """Cut a file off after `size` bytes and flush it: open, ftruncate, fsync.

        Raises:
            OSError: it is not there, or cannot be written.
        """
        handle = self._do(os.open, path, os.O_RDWR | _BINARY)
        try:
            self._do(os.ftruncate, handle, size)
            self._fsync(handle)
        finally:
            os.close(handle)

    def fsync(self, path: Path) -> None:
        """Flush what anyone has written to a file: open, fsync.

        Raises:
            OSError: it is not there, or cannot be written.
        """
        handle = self._do(os.open, path, os.O_RDWR | _BINARY)
        try:
            self._fsync(handle)
        finally:
            os.close(handle)

    def fsync_folder(self, path: Path) -> None:
        """Flush a folder's names: open, fsync; nothing where there is no way to (Windows).

        Raises:
            OSError: it is not there, or cannot be written.
        """
        if os.name == "nt":
            return
        handle = self._do(os.open, path, os.O_RDONLY)
        try:
            self._fsync(handle)
        except OSError as error:
            if error.errno not in _NO_FOLDER_FSYNC:
                raise
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or a folder within its folder, over a file that may be there: rename.

        Raises:
            OSError: it cannot be done.
        """
        self._do(os.replace, source, target)

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with all in it: stat, unlink; listdir, rmdir.

        Raises:
            OSError: it is not there, or cannot be removed.
        """
        if not stat.S_ISDIR(self._do(os.lstat, path).st_mode):
            self._do(os.unlink, path)
            return
        for name in self.names(path):
            self.remove(path / name)
        self._do(os.rmdir, path)

    def open(self, path: Path) -> BinaryIO:
        """Open a file for reading: open, then a read for each of its buffers.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        return os.fdopen(self._do(os.open, path, os.O_RDONLY | _BINARY), "rb")

    def read(self, path: Path, most: int) -> bytes:
        """Return the first bytes of a file, `most` at most.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        with self.open(path) as file:
            return file.read(most)

    def names(self, folder: Path) -> list[str]:
        """Return the names in a folder, sorted: listdir.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        listed: list[str] = self._do(os.listdir, folder)
        return sorted(listed)

    def exists(self, path: Path) -> bool:
        """Say whether anything has this name: lstat.

        Raises:
            OSError: it cannot be told.
        """
        try:
            self._do(os.lstat, path)
        except FileNotFoundError:
            return False
        return True

    def lock(self, path: Path) -> Lock:
        """Make a file, if it is not there, and hold it for this process alone: open, flock.

        Raises:
            BlockingIOError: another process (or another `lock` of this one) holds it.
            OSError: it cannot be made, or the file system has no locks.
        """
        file = os.fdopen(self._do(os.open, path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666), "r+b")
        try:
            if sys.platform == "win32":
                import msvcrt

                try:
                    self._do(msvcrt.locking, file.fileno(), msvcrt.LK_NBLCK, 1)
                except PermissionError as error:
                    raise BlockingIOError(*error.args) from error
            else:
                import fcntl

                self._do(fcntl.flock, file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            file.close()
            raise
        return file

    def _write(self, handle: int, data: bytes, offset: int = 0) -> None:
        try:
            if offset:
                self._do(os.lseek, handle, offset, os.SEEK_SET)
            rest = memoryview(data)
            while rest:
                written = self._do(os.write, handle, rest)
                self.bytes_written += written
                rest = rest[written:]
            self._fsync(handle)
        finally:
            os.close(handle)

    def _fsync(self, handle: int) -> None:
        self._do(os.fsync, handle)
        self.syncs += 1

    def _do(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make one system call: the seam at which tests fail, tear or cut it."""
        return call(*args, **kwargs)


def remove_if_there(disk: Disk, path: Path) -> None:
    """Remove a file or a folder that may not be there.

    Raises:
        OSError: it is there and cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        disk.remove(path)
