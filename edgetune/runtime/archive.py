"""A bundle as one file: a flat, uncompressed zip that is read where it lies.

Any program that reads zips can read one; this reader takes only what `write_archive` writes: no
compression, no folders, links, comments, data descriptors or zip64, names in the local header
as in the directory, and not a byte that belongs to no file. So there is nothing that two readers
could understand differently, and nothing that grows when it is read.

Format: APPNOTE.TXT of PKWARE, 4.3.7 (local header), 4.3.12 (directory), 4.3.16 (its end).
"""

import contextlib
import mmap
import os
import stat
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgetune.errors import EdgetuneError, IntegrityError, ResourceError
from edgetune.runtime.bundle import open_plain
from edgetune.runtime.manifest import FILE_NAME

MAX_FILES = 64
# files begin on a page, so that their contents can be mapped into memory
PAGE = 4096
_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_UTF8 = 0x800
UNIX = 3  # the system that a writer says it ran on
# the extra field that holds nothing but room, as Android's zipalign writes it
_PADDING = 0xD935
# a folder or the label of a disk, as DOS marks them
_DOS_SPECIAL = 0x18


@dataclass(frozen=True, kw_only=True)
class Member:
    """Where a file's bytes lie in the archive."""

    offset: int
    size: int


class Archive:
    """An open archive; its bytes are mapped, not read."""

    def __init__(self, path: Path) -> None:
        """Open `path` and find its members.

        Raises:
            IntegrityError: it is no archive that `write_archive` could have written.
            ResourceError: it cannot be read.
        """
        self.where = path
        try:
            with open_plain(path) as file:
                status = os.fstat(file.fileno())
                self.identity = (status.st_dev, status.st_ino)
                if status.st_size < _END.size:
                    raise IntegrityError(f"{path}: is no bundle: neither a folder nor a zip")
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError) as error:  # it may shrink, or exceed 32 bits
            reason = getattr(error, "strerror", None) or error
            raise ResourceError(f"{path}: cannot be read: {reason}") from error
        try:
            self.members: Mapping[str, Member] = _directory(self._bytes)
        except (ValueError, struct.error) as error:
            raise IntegrityError(
                f"{path}: is no bundle, or a damaged one: {error}; a bundle's zip is made with"
                " edgetune-rt pack"
            ) from error

    def names(self) -> set[str]:
        """Return the names of its files."""
        return set(self.members)

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None if there is none of that name."""
        return self.members[name].size if name in self.members else None

    def view(self, name: str) -> memoryview:
        """Return a file's bytes, not copied; release it before `close`."""
        member = self.members[name]
        if self._bytes.closed:
            raise EdgetuneError(f"{self.where}: was closed")
        return memoryview(self._bytes)[member.offset : member.offset + member.size]

    def check_unchanged(self) -> None:
        """Check that the path still names the file that was opened, as others open it by name.

        Raises:
            IntegrityError: it does not.
        """
        try:
            status = self.where.stat()
        except OSError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self.identity:
            raise IntegrityError(f"{self.where}: was replaced while it was being opened; try again")

    def close(self) -> None:
        """Unmap it; where a view is still in use, with the last of them."""
        with contextlib.suppress(BufferError):
            self._bytes.close()


def write_archive(path: Path, files: Mapping[str, Path]) -> None:
    """Write `files`, name -> where it lies, to `path`, in their order; same files, same bytes.

    Raises:
        OSError: a file cannot be read, or `path` not written.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name, source in files.items():
            info = zipfile.ZipInfo(name)  # dated 1980: the same files give the same bytes
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.create_system = UNIX  # whatever this is
            assert archive.fp is not None
            begin = archive.fp.tell() + _LOCAL.size + len(name) + 4
            info.extra = struct.pack("<HH", _PADDING, -begin % PAGE) + bytes(-begin % PAGE)
            info.file_size = source.stat().st_size
            with source.open("rb") as reader, archive.open(info, "w") as writer:
                while block := reader.read(2**20):
                    writer.write(block)


def _directory(data: mmap.mmap) -> dict[str, Member]:
    """Return the members of the archive `data`.

    Raises:
        ValueError, struct.error: it is none, or says anything that `write_archive` doesn't.
    """
    end = len(data) - _END.size
    sign, disk, first, here, count, size, start, comment = _END.unpack_from(data, end)
    _expect(sign == b"PK\5\6", "no end of a directory")
    _expect(disk == first == comment == 0 and here == count, "several disks, or a comment")
    _expect(1 <= count <= MAX_FILES, f"{count} files, allowed 1 to {MAX_FILES}")
    _expect(start + size == end, "a directory of another size, or zip64")
    members: dict[str, Member] = {}
    place, expected = start, 0
    for _ in range(count):
        name, member, header, place = _member(data, place, start)
        _expect(header == expected, "bytes of no file, or of two")
        _expect(name not in members, f"{name!r} is there twice")
        members[name] = member
        expected = member.offset + member.size
    _expect(place == end and expected == start, "bytes of no file")
    return members


def _member(data: mmap.mmap, place: int, limit: int) -> tuple[str, Member, int, int]:
    """Read a directory entry and its local header.

    Returns:
        name, place of its bytes, place of its local header, place of the next entry.
    """
    (sign, made_by, _, flags, method, _, _, checksum, packed, size, name_size, extra_size,
     comment_size, disk, _, attributes, header) = _ENTRY.unpack_from(data, place)  # fmt: skip
    _expect(sign == b"PK\1\2", "no directory entry")
    name = _text(data, place + _ENTRY.size, name_size)
    kind = stat.S_IFMT(attributes >> 16) if made_by >> 8 == UNIX else 0
    plain = kind in (0, stat.S_IFREG) and not attributes & _DOS_SPECIAL
    _expect(plain, f"{name!r:.200} is no plain file")
    _expect(FILE_NAME.fullmatch(name) is not None, f"{name!r:.200} is no name of a bundle's file")
    _expect(flags & ~_UTF8 == 0 and method == 0 and packed == size, f"{name!r} is compressed")
    _expect(comment_size == disk == 0, f"{name!r} has a comment")
    _check_extra(data, place + _ENTRY.size + name_size, extra_size)
    (local_sign, _, local_flags, local_method, _, _, local_checksum, local_packed, local_size,
     local_name_size, local_extra_size) = _LOCAL.unpack_from(data, header)  # fmt: skip
    _expect(local_sign == b"PK\3\4", f"{name!r} has no header")
    _expect(
        (local_flags, local_method, local_checksum, local_packed, local_size)
        == (flags, method, checksum, packed, size),
        f"{name!r}: its header and the directory differ",
    )
    _expect(_text(data, header + _LOCAL.size, local_name_size) == name, f"{name!r} has two names")
    _check_extra(data, header + _LOCAL.size + local_name_size, local_extra_size)
    offset = header + _LOCAL.size + local_name_size + local_extra_size
    _expect(offset + size <= limit, f"{name!r} is cut off")
    following = place + _ENTRY.size + name_size + extra_size
    return name, Member(offset=offset, size=size), header, following


def _check_extra(data: mmap.mmap, place: int, size: int) -> None:
    """Check that an extra field is room: others give a file another name, or another size."""
    end = place + size
    while place < end:
        kind, length = struct.unpack_from("<HH", data, place)
        _expect(kind == _PADDING, f"an extra field {kind:#06x}")
        place += 4 + length
    _expect(place == end, "an extra field that is cut off")


def _text(data: mmap.mmap, place: int, size: int) -> str:
    raw = data[place : place + size]
    _expect(raw.isascii() and len(raw) == size, "a name that is not ASCII")
    return raw.decode()


def _expect(met: bool, otherwise: str) -> None:
    if not met:
        raise ValueError(otherwise)
