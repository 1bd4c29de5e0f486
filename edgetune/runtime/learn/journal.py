r"""Records appended to one file, none of which is ever read torn.

    file:   b"edgejrnl", version, CRC-32 of these 12 bytes; then records
    record: b"rec\x00" or b"rec\x01", length, CRC-32 of the payload, CRC-32 of these 12 bytes;
            then the payload, opaque bytes

Numbers are 32-bit little-endian; CRC-32 is zlib's. The fourth byte of a record is 1 if more of
the same batch follow: a batch counts only once its last record is whole, so it is there entirely
or not at all. Reading ends before the first record that is not whole; what follows cannot be
trusted, and opening for writing cuts it off.
"""

import contextlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from edgetune.errors import ConfigError, DataError, IntegrityError, ResourceError
from edgetune.runtime.learn.disk import Disk, remove_if_there

VERSION = 1
# of one payload; also what a damaged length could make a reader allocate
MAX_PAYLOAD_BYTES = 2**24
_START = struct.pack("<8sL", b"edgejrnl", VERSION)
_HEADER = _START + struct.pack("<L", zlib.crc32(_START))
_FIELDS = struct.Struct("<4sLL")
_CRC = struct.Struct("<L")
_RECORD_BYTES = _FIELDS.size + _CRC.size
_LAST, _MORE = b"rec\x00", b"rec\x01"


class Journal:
    """An open journal; not for several threads at once.

    path: the file. end: its length in bytes up to which it is whole. dropped: how many bytes
    behind that were found on opening (cut off if it was opened for writing).
    """

    def __init__(self, disk: Disk, path: Path, *, end: int, dropped: int, writable: bool) -> None:
        """Take a file whose first `end` bytes were found whole; `Journal.open` finds out."""
        self.path = path
        self.end = end
        self.dropped = dropped
        self._disk = disk
        self._writable = writable
        self._torn = False

    @classmethod
    def open(cls, disk: Disk, path: Path, *, writable: bool) -> "Journal":
        """Open a journal; one that is not there is empty, and made if `writable`.

        Raises:
            IntegrityError: the file is no journal, or its first bytes are damaged.
            ResourceError: it cannot be read, or cannot be written.
        """
        with _disk_errors(path):
            try:
                with disk.open(path) as file:
                    end, size = _whole(file, path)
            except FileNotFoundError:
                end = size = 0
            if writable:
                if not end:
                    _create(disk, path)
                    dropped, end = size, len(_HEADER)
                    return cls(disk, path, end=end, dropped=dropped, writable=True)
                if end < size:
                    disk.truncate(path, end)
                # what a killed process wrote may be in memory only; what is read from here on
                # must not be gone after a power cut
                disk.fsync(path)
                disk.fsync_folder(path.parent)
        return cls(disk, path, end=end, dropped=size - end, writable=writable)

    def append(self, payload: bytes) -> int:
        """Add a record and return its offset: on the disk when this returns, else not there.

        Raises:
            ConfigError: the journal is read-only or closed.
            DataError: the payload exceeds MAX_PAYLOAD_BYTES.
            ResourceError: the disk is full or fails; the journal is as it was.
        """
        return self.extend([payload])[0]

    def extend(self, payloads: Iterable[bytes]) -> list[int]:
        """Add records with one write and one flush, all or none; return their offsets.

        Raises:
            ConfigError: the journal is read-only or closed.
            DataError: a payload exceeds MAX_PAYLOAD_BYTES.
            ResourceError: the disk is full or fails; the journal is as it was.
        """
        if not self._writable:
            raise ConfigError(f"{self.path}: is closed or open for reading only; open it to write")
        batch = list(payloads)
        for payload in batch:
            if len(payload) > MAX_PAYLOAD_BYTES:
                raise DataError(
                    f"{self.path}: a record of {len(payload)} bytes; at most {MAX_PAYLOAD_BYTES}"
                    " fit: split it"
                )
        if not batch:
            return []
        records = [_record(p, more=True) for p in batch[:-1]] + [_record(batch[-1], more=False)]
        offsets = [self.end]
        for record in records[:-1]:
            offsets.append(offsets[-1] + len(record))
        with _disk_errors(self.path):
            if self._torn:
                self._cut()
            try:
                self._disk.write_at(self.path, self.end, b"".join(records))
            except BaseException:  # a Ctrl-C too: a later, shorter record must not leave its tail
                self._torn = True
                with contextlib.suppress(OSError):
                    self._cut()
                raise
        self.end = offsets[-1] + len(records[-1])
        return offsets

    def records(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, payload) of every record that is there now, in order.

        Raises:
            IntegrityError: a record that was whole on opening no longer is.
            ResourceError: the file cannot be read.
        """
        end, reached = self.end, len(_HEADER)
        if end <= reached:
            return
        with _disk_errors(self.path), self._disk.open(self.path) as file:
            file.seek(reached)
            for offset, payload, _ in _scan(file, reached):
                if offset >= end:
                    break
                reached = offset + _RECORD_BYTES + len(payload)
                yield offset, payload
        if reached != end:
            raise IntegrityError(
                f"{self.path}: the record at byte {reached} was damaged since it was opened;"
                " open the journal again to go on with those before it"
            )

    def close(self) -> None:
        """End writing; what was read stays readable."""
        self._writable = False

    def _cut(self) -> None:
        self._disk.truncate(self.path, self.end)
        self._torn = False


def _create(disk: Disk, path: Path) -> None:
    """Make an empty journal, or put one in the place of a file that has not even a header."""
    temporary = path.with_name(f".{path.name}.partial")
    remove_if_there(disk, temporary)
    disk.write_new(temporary, _HEADER)
    disk.rename(temporary, path)
    disk.fsync_folder(path.parent)


def _whole(file: BinaryIO, path: Path) -> tuple[int, int]:
    """Return up to which byte the file is whole (0 if its header is cut short) and its size."""
    size = file.seek(0, 2)
    file.seek(0)
    header = file.read(len(_HEADER))
    if len(header) < len(_HEADER) and _HEADER.startswith(header):
        return 0, size
    if header != _HEADER:
        raise IntegrityError(
            f"{path}: expected a journal of version {VERSION}, which begins with"
            f" {_HEADER[:12].hex()}, got {header[:12].hex()}; move it away to start an empty one"
        )
    end = len(_HEADER)
    for offset, payload, last in _scan(file, end):
        if last:
            end = offset + _RECORD_BYTES + len(payload)
    return end, size


def _scan(file: BinaryIO, offset: int) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (offset, payload, is it the last of its batch) until a record is not whole."""
    while len(head := file.read(_RECORD_BYTES)) == _RECORD_BYTES:
        magic, length, payload_crc = _FIELDS.unpack_from(head)
        if _CRC.unpack_from(head, _FIELDS.size)[0] != zlib.crc32(head[: _FIELDS.size]):
            return
        if magic not in (_LAST, _MORE) or length > MAX_PAYLOAD_BYTES:
            return
        payload = file.read(length)
        if len(payload) < length or zlib.crc32(payload) != payload_crc:
            return
        yield offset, payload, magic == _LAST
        offset += _RECORD_BYTES + length


def _record(payload: bytes, *, more: bool) -> bytes:
    fields = _FIELDS.pack(_MORE if more else _LAST, len(payload), zlib.crc32(payload))
    return fields + _CRC.pack(zlib.crc32(fields)) + payload


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ResourceError(
            f"{path}: cannot be read or written: {reason}; make room, or check the disk and its"
            " permissions"
        ) from error
