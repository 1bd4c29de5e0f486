"""What a device learned, kept so that a loss of power leaves the old or the new state.

    store.json             which bundle the store belongs to
    gen-000001/            a generation: immutable files and receipt.json, which lists them
    pointer-0, pointer-1   which generation is live; 0 is the factory state, the bundle alone
    journal.bin            what the device saw (edgetune.runtime.learn.journal)
    lock                   held by the process that writes
    .*.partial, .*.removed what an interrupted change left; removed before the next one

A generation is written under another name, flushed and renamed; only then does a pointer name it.
The pointers are two records of fixed size; the whole one with the higher sequence number holds,
and a change overwrites the other one in its place, with one write and one flush. That needs less
of the file system than a renamed file does: no atomic rename (FAT on an SD card has none), no
order between two flushes, no free block on a full disk, so that `undo` works there. A write that
is cut off tears only the record that did not hold, and its CRC-32 tells.

A store is read anew by every call, so that a reader sees what another process commits. One thread
at a time may use one `Store`.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from edgetune.errors import ConfigError, EdgetuneError, IntegrityError, ResourceError
from edgetune.runtime.learn.disk import Disk, Lock, remove_if_there
from edgetune.runtime.learn.journal import Journal
from edgetune.runtime.manifest import DEVICE_NAME, FILE_NAME, FileEntry
from edgetune.runtime.records import from_mapping, to_mapping

SCHEMA_VERSION = 1
STORE_NAME = "store.json"
RECEIPT_NAME = "receipt.json"
JOURNAL_NAME = "journal.bin"
LOCK_NAME = "lock"
POINTER_NAMES = ("pointer-0", "pointer-1")
MAX_JSON_BYTES = 2**20
# stands for the receipt that the factory state has not
NO_DIGEST = "0" * 64
_GENERATION = re.compile(r"gen-([0-9]{6,18})")
_LEFTOVER = re.compile(r"\.(?:gen-[0-9]{6,18}|store\.json|journal\.bin)\.(?:partial|removed)")
# magic, sequence, generation, highest, parent, forgetting, digest, parent's digest
_POINTER = struct.Struct("<8sQQQQL32s32s")
_MAGIC = b"edgeptr\x01"
_CRC = struct.Struct("<L")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A learned state that was live once, as its receipt.json says.

    number: 1 and up, never given twice. parent: the generation that it replaced, 0 the factory
    state. time: UTC by the device's clock, which may be wrong. files: what it holds. receipt:
    what the caller of `commit` wrote down. digest: SHA-256 of the rest in canonical JSON.
    """

    schema_version: int
    number: int
    parent: int
    parent_digest: str
    time: str
    files: dict[str, FileEntry]
    receipt: dict[str, Any]
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class _Pointer:
    """Which generation is live, its parent, and the highest number that ever was live.

    forget: all generations and the journal are being removed.
    """

    sequence: int
    number: int
    highest: int
    parent: int = 0
    forget: bool = False
    digest: str = NO_DIGEST
    parent_digest: str = NO_DIGEST


class Store:
    """An open store; `Store.open` opens one.

    folder: where it is. disk: how it writes; `disk.bytes_written` and `disk.syncs` tell how much.
    """

    def __init__(
        self, folder: Path, disk: Disk, lock: Lock | None, clock: Callable[[], datetime]
    ) -> None:
        """Take a folder that `Store.open` has checked, and its lock if it is to be written."""
        self.folder = folder
        self.disk = disk
        self._lock = lock
        self._clock = clock
        self._journal: Journal | None = None
        # the slot of a pointer that may be half written, and what is live meanwhile
        self._unsure: tuple[int, _Pointer] | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        binding: Mapping[str, str],
        disk: Disk | None = None,
        readonly: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> "Store":
        """Open the store in `folder`, or make one there unless `readonly`.

        Opening for writing takes the store's lock, and finishes or takes back what a loss of
        power interrupted. A store that is damaged opens all the same: `live` tells, and `undo`
        and `factory_reset` repair it.

        Args:
            folder: for a reader it may be absent: then the factory state is live.
            binding: which bundle the store belongs to, such as its name and digest.
            disk: the file system, unless a test has its own.
            readonly: neither write nor lock.
            clock: gives the time, with its zone, that receipts carry.

        Raises:
            ConfigError: the store belongs to another bundle.
            IntegrityError: store.json is damaged or missing.
            ResourceError: another process writes to it, or the disk is full or fails.
        """
        disk = disk or Disk()
        folder = Path(folder)
        lock = None
        with _disk_errors(folder):
            bound = _read_binding(disk, folder)
            if readonly:
                _check_binding(folder, binding, bound)
                return cls(folder, disk, None, clock)
            if bound is None:
                _make_folders(disk, folder)
            try:
                lock = disk.lock(folder / LOCK_NAME)
            except BlockingIOError as error:
                raise ResourceError(
                    f"{folder / LOCK_NAME}: another process has this store open for writing;"
                    " end it, or open the store with readonly=True"
                ) from error
            try:
                bound = _read_binding(disk, folder)
                _check_binding(folder, binding, bound)
                store = cls(folder, disk, lock, clock)
                if bound is None:
                    store._make(binding)
                else:
                    store._adopt()
            except BaseException:
                lock.close()
                raise
        return store

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End writing and let other processes write; reading still works."""
        if self._journal:
            self._journal.close()
        if self._lock:
            self._lock.close()
            self._lock = None

    @property
    def live(self) -> Generation | None:
        """The live generation; None is the factory state.

        Raises:
            IntegrityError: its receipt or both pointers are damaged; says what repairs it.
            ResourceError: the disk fails.
        """
        with _disk_errors(self.folder):
            pointer = self._current()
            if not pointer.number:
                return None
            try:
                return self._load(pointer.number, pointer.digest)
            except IntegrityError as error:
                back = f"generation {pointer.parent}" if pointer.parent else "the factory state"
                raise IntegrityError(f"{error}; undo goes back to {back}") from error

    @property
    def journal(self) -> Journal:
        """The store's journal, opened on first use; writable if the store is.

        Raises:
            IntegrityError: it is damaged from its first bytes on.
            ResourceError: the disk is full or fails.
        """
        if self._journal is None:
            with _disk_errors(self.folder):
                path = self.folder / JOURNAL_NAME
                if self._lock:
                    self._finish_or_take_back()
                elif self._current().forget:
                    return Journal(self.disk, path, end=0, dropped=0, writable=False)
                self._journal = Journal.open(self.disk, path, writable=self._lock is not None)
        return self._journal

    def read(self, generation: Generation, name: str) -> bytes:
        """Return a file of a generation, checked against its receipt.

        Raises:
            ConfigError: the generation has no such file.
            IntegrityError: the file is missing or damaged.
            ResourceError: the disk fails.
        """
        path = self._path(generation.number) / name
        if name not in generation.files:
            known = ", ".join(generation.files) or "none"
            raise ConfigError(
                f"{path}: generation {generation.number} has no {name!r}; it has {known}"
            )
        entry = generation.files[name]
        repair = "undo or factory_reset goes back to an older state"
        with _disk_errors(self.folder):
            try:
                data = self.disk.read(path, entry.size + 1)
            except FileNotFoundError as error:
                raise IntegrityError(
                    f"{path}: expected {entry.size} bytes, found nothing; {repair}"
                ) from error
        if len(data) != entry.size:
            got = "more" if len(data) > entry.size else len(data)
            raise IntegrityError(f"{path}: expected {entry.size} bytes, got {got}; {repair}")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise IntegrityError(f"{path}: its SHA-256 is not the receipt's; {repair}")
        return data

    def verify(self, generation: Generation) -> None:
        """Read all files of a generation and check them.

        Raises:
            IntegrityError: a file is missing or damaged.
            ResourceError: the disk fails.
        """
        for name in generation.files:
            self.read(generation, name)

    def history(self) -> tuple[Generation, ...]:
        """Return all generations that are kept, newest first; those that were undone too.

        Raises:
            IntegrityError: a receipt is damaged.
            ResourceError: the disk fails.
        """
        with _disk_errors(self.folder):
            pointer = self._current()
            if pointer.forget:
                return ()
            numbers = [n for n in self._numbers() if n <= pointer.highest]
            expected = {pointer.number: pointer.digest, pointer.parent: pointer.parent_digest}
            ancestor = pointer.number
            generations = []
            for number in sorted(numbers, reverse=True):
                try:
                    generation = self._load(number, expected.get(number))
                except IntegrityError as error:
                    raise IntegrityError(
                        f"{error}; prune removes it if it is not live, undo or factory_reset if"
                        " it is"
                    ) from error
                generations.append(generation)
                if number == ancestor:
                    ancestor = generation.parent
                    expected[ancestor] = generation.parent_digest
            return tuple(generations)

    def commit(self, files: Mapping[str, bytes], receipt: Mapping[str, Any]) -> Generation:
        """Write a new generation and make it live.

        Args:
            files: name -> content; names as a bundle's files may have them.
            receipt: why it was promoted: whatever JSON can hold.

        Raises:
            ConfigError: a name cannot be, the receipt is no JSON or too long, or the store is
                closed or read-only.
            IntegrityError: both pointers are damaged.
            ResourceError: the disk is full or fails; the old state is live.
        """
        _check_names(files)
        said = _plain_receipt(receipt)
        with self._change() as pointer:
            generation = _stamp(
                Generation(
                    schema_version=SCHEMA_VERSION,
                    number=pointer.highest + 1,
                    parent=pointer.number,
                    parent_digest=pointer.digest,
                    time=self._clock().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                    files={
                        name: FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
                        for name, data in files.items()
                    },
                    receipt=said,
                )
            )
            written = _canonical(to_mapping(generation))
            if len(written) > MAX_JSON_BYTES:
                raise ConfigError(
                    f"receipt: {len(written)} bytes; at most {MAX_JSON_BYTES} fit: say less"
                )
            self._write_generation(generation.number, {**files, RECEIPT_NAME: written})
            self._flip(pointer, _pointing_at(generation, highest=generation.number))
        return generation

    def undo(self) -> Generation | None:
        """Make the live generation's parent live, and return it; None is the factory state.

        Raises:
            ConfigError: the factory state is live, the parent was pruned, or the store is closed
                or read-only.
            IntegrityError: the parent or both pointers are damaged.
            ResourceError: the disk fails; the old state is live.
        """
        with self._change() as pointer:
            if not pointer.number:
                raise ConfigError(f"{self.folder}: the factory state is live, nothing to undo")
            if not pointer.parent:
                self._flip(pointer, _factory(pointer.highest))
                return None
            if pointer.parent not in self._numbers():
                raise ConfigError(
                    f"{self.folder}: generation {pointer.parent}, which undo would go back to,"
                    " was pruned; factory_reset goes back to the factory state"
                )
            try:
                parent = self._load(pointer.parent, pointer.parent_digest)
                self.verify(parent)
            except IntegrityError as error:
                raise IntegrityError(
                    f"{self.folder}: undo would go back to a damaged generation {pointer.parent}"
                    f" ({error}); factory_reset goes back to the factory state"
                ) from error
            self._flip(pointer, _pointing_at(parent, highest=pointer.highest))
            return parent

    def factory_reset(self, *, forget: bool = False) -> None:
        """Make the factory state live, whatever is damaged.

        Args:
            forget: remove all generations and the journal too. Once this is begun, a loss of
                power only puts the rest off until the store is next opened for writing. Flash may
                keep the old bytes until it needs their blocks.

        Raises:
            ConfigError: the store is closed or read-only.
            ResourceError: the disk is full or fails.
        """
        try:
            with self._change() as pointer:
                old: _Pointer | None = pointer
        except IntegrityError:  # both pointers are damaged
            old = None
        if forget and self._journal:
            self._journal.close()
            self._journal = None
        with _disk_errors(self.folder):
            highest = old.highest if old else max([0, *self._numbers()])
            new = _factory(highest, forget=forget)
            if old is None or old.number or forget:
                self._flip(old, new)
            if old is None:
                self._flip(new, new)  # the other one is damaged too
            if forget:
                self._finish_or_take_back()

    def prune(self, keep: int) -> tuple[int, ...]:
        """Remove all but the live generation and the newest `keep` of its ancestors.

        Returns:
            The numbers of the generations that were removed; each is gone entirely or untouched.

        Raises:
            ConfigError: `keep` is less than 0, or the store is closed or read-only.
            IntegrityError: a receipt of those to keep, or both pointers are damaged.
            ResourceError: the disk fails.
        """
        if keep < 0:
            raise ConfigError(f"keep: expected 0 or more ancestors, got {keep}")
        with self._change() as pointer:
            numbers = self._numbers()
            kept = [pointer.number]
            ancestor, digest = pointer.parent, pointer.parent_digest
            while len(kept) <= keep and ancestor in numbers:
                kept.append(ancestor)
                if len(kept) <= keep:
                    generation = self._load(ancestor, digest)
                    ancestor, digest = generation.parent, generation.parent_digest
            doomed = [n for n in numbers if n not in kept]
            if doomed:
                # should the newer pointer rot, the older one must not name what is gone
                self._flip(pointer, pointer)
                self._remove(doomed)
        return tuple(doomed)

    # -- what is on the disk

    def _path(self, number: int) -> Path:
        return self.folder / f"gen-{number:06d}"

    def _numbers(self) -> list[int]:
        """Return the numbers of the generations that are there."""
        try:
            names = self.disk.names(self.folder)
        except FileNotFoundError:
            return []
        found = [int(m[1]) for name in names if (m := _GENERATION.fullmatch(name))]
        return sorted(n for n in found if n and self._path(n).name in names)

    def _slots(self) -> list[_Pointer | None]:
        return [_read_pointer(self.disk, self.folder / name) for name in POINTER_NAMES]

    def _current(self) -> _Pointer:
        """Return the pointer that holds."""
        if self._unsure:
            return self._unsure[1]
        for _ in range(2):  # a reader may come while both are overwritten, one after the other
            if whole := [p for p in self._slots() if p]:
                return max(whole, key=lambda p: p.sequence)
        if _read_binding(self.disk, self.folder) is None:
            return _factory(0)
        raise IntegrityError(
            f"{self.folder}: {' and '.join(POINTER_NAMES)} are both damaged or missing, so which"
            " generation is live is not known; factory_reset repairs this and makes none live"
        )

    def _load(self, number: int, digest: str | None) -> Generation:
        """Read a receipt; `digest` is the one expected, if another record names it."""
        path = self._path(number) / RECEIPT_NAME
        try:
            data = self.disk.read(path, MAX_JSON_BYTES + 1)
        except FileNotFoundError as error:
            raise IntegrityError(f"{path}: expected a receipt, found nothing") from error
        generation = from_mapping(
            Generation, _parse(data, path), where=str(path), error=IntegrityError
        )
        if _canonical(to_mapping(_stamp(generation))) != data or generation.number != number:
            raise IntegrityError(f"{path}: was changed after it was written")
        if not all(map(_is_file_name, generation.files)):
            raise IntegrityError(f"{path}: names a file that a generation cannot have")
        if digest not in (None, generation.digest):
            raise IntegrityError(f"{path}: expected digest {digest}, got {generation.digest}")
        return generation

    # -- changes

    @contextlib.contextmanager
    def _change(self) -> Iterator[_Pointer]:
        """Give the pointer that holds, with nothing interrupted left; tidy up after a failure."""
        if self._lock is None:
            raise ConfigError(
                f"{self.folder}: is closed or open for reading only; open it without readonly"
            )
        with _disk_errors(self.folder):
            pointer = self._finish_or_take_back()
            try:
                yield pointer
            except OSError:
                with contextlib.suppress(OSError, EdgetuneError):
                    self._finish_or_take_back()  # room for others, if it is the disk that is full
                raise

    def _finish_or_take_back(self) -> _Pointer:
        """Bring what was interrupted to an end, and return the pointer that holds then."""
        if self._unsure:
            slot, old = self._unsure
            self._write_slot(slot, dataclasses.replace(old, sequence=old.sequence + 2))
            self._unsure = None
        pointer = self._current()
        for name in self.disk.names(self.folder):
            number = _GENERATION.fullmatch(name)
            never_live = number and int(number[1]) > pointer.highest
            if never_live or _LEFTOVER.fullmatch(name):
                self.disk.remove(self.folder / name)
        if pointer.forget:
            self._remove(self._numbers())
            remove_if_there(self.disk, self.folder / JOURNAL_NAME)
            self.disk.fsync_folder(self.folder)
            done = dataclasses.replace(pointer, forget=False)
            self._flip(pointer, done)
            self._flip(done, done)  # or the older one would forget again, should the newer rot
            pointer = self._current()
        return pointer

    def _adopt(self) -> None:
        """Make what this process found last, then finish or take back what was interrupted.

        A process that was killed may have left in memory what it had not flushed yet.
        """
        self.disk.fsync_folder(self.folder)
        slots = self._slots()
        for name, pointer in zip(POINTER_NAMES, slots, strict=True):
            if pointer:
                self.disk.fsync(self.folder / name)
        if not any(slots):
            return  # only factory_reset can go on
        seen = self._numbers()
        current = self._finish_or_take_back()
        if None in slots:  # torn; or rotten, and then it may have named the highest that is there
            highest = max([current.highest, *seen])
            self.disk.fsync_folder(self.folder)  # what was removed must not count as kept
            self._flip(current, dataclasses.replace(current, highest=highest))

    def _make(self, binding: Mapping[str, str]) -> None:
        """Fill a new folder; store.json comes last, so that with it all is there."""
        for slot in range(len(POINTER_NAMES)):
            self._write_slot(slot, dataclasses.replace(_factory(0), sequence=slot + 1))
        self.disk.fsync_folder(self.folder)
        temporary = self.folder / f".{STORE_NAME}.partial"
        remove_if_there(self.disk, temporary)
        content = {"schema_version": SCHEMA_VERSION, "binding": dict(binding)}
        self.disk.write_new(temporary, _canonical(content))
        self.disk.rename(temporary, self.folder / STORE_NAME)
        self.disk.fsync_folder(self.folder)

    def _write_generation(self, number: int, files: Mapping[str, bytes]) -> None:
        path = self._path(number)
        temporary = self.folder / f".{path.name}.partial"
        self.disk.make_folder(temporary)
        for name, data in files.items():
            self.disk.write_new(temporary / name, data)
        self.disk.fsync_folder(temporary)
        self.disk.rename(temporary, path)
        self.disk.fsync_folder(self.folder)

    def _flip(self, old: _Pointer | None, new: _Pointer) -> None:
        """Overwrite the pointer that does not hold; `old` is live until that is done."""
        sequences = [p.sequence if p else 0 for p in self._slots()]
        slot = sequences.index(min(sequences))
        record = dataclasses.replace(new, sequence=max(sequences) + 1)
        try:
            self._write_slot(slot, record)
        except BaseException:  # a Ctrl-C too: the record may be there, and not on the disk
            if old:
                self._unsure = slot, dataclasses.replace(old, sequence=max(sequences))
            raise

    def _write_slot(self, slot: int, pointer: _Pointer) -> None:
        path, record = self.folder / POINTER_NAMES[slot], _pointer_record(pointer)
        try:
            self.disk.write_at(path, 0, record)
        except FileNotFoundError:
            self.disk.write_new(path, record)
            self.disk.fsync_folder(self.folder)

    def _remove(self, numbers: list[int]) -> None:
        """Remove generations, each of which is there entirely or not at all at any time."""
        removed = [self.folder / f".{self._path(n).name}.removed" for n in numbers]
        for number, path in zip(numbers, removed, strict=True):
            self.disk.rename(self._path(number), path)
        self.disk.fsync_folder(self.folder)
        for path in removed:
            self.disk.remove(path)


def _make_folders(disk: Disk, folder: Path) -> None:
    """Make a folder and those above it that are missing, and make them last."""
    missing = []
    existing = folder
    while not disk.exists(existing):
        missing.append(existing)
        existing = existing.parent
    with contextlib.suppress(PermissionError):  # not ours to read, so not made by us either
        disk.fsync_folder(existing.parent)
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster; the lock decides
            disk.make_folder(path)
        disk.fsync_folder(path.parent)


def _read_binding(disk: Disk, folder: Path) -> dict[str, str] | None:
    """Return what store.json says; None if the store was never made, or not to its end."""
    path = folder / STORE_NAME
    try:
        data = disk.read(path, MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        try:
            names = disk.names(folder)
        except FileNotFoundError:
            return None
        if any(map(_GENERATION.fullmatch, names)):
            raise IntegrityError(
                f"{path}: is missing, so which bundle these generations belong to is not known;"
                " move the folder away to start from the factory state"
            ) from None
        return None
    content = _parse(data, path)
    version, binding = content.get("schema_version"), content.get("binding")
    if version != SCHEMA_VERSION:
        raise IntegrityError(
            f"{path}: store schema {version!r:.80}; this edgetune reads {SCHEMA_VERSION};"
            " use the edgetune version that wrote it, or a newer one"
        )
    if not isinstance(binding, dict) or not all(isinstance(v, str) for v in binding.values()):
        raise IntegrityError(
            f"{path}: expected words under 'binding', got {binding!r:.80}; move the folder away"
            " to start from the factory state"
        )
    return binding


def _check_binding(
    folder: Path, expected: Mapping[str, str], found: Mapping[str, str] | None
) -> None:
    if found is None or found == dict(expected):
        return
    different = sorted(k for k in {*found, *expected} if found.get(k) != expected.get(k))
    says = ", ".join(f"{k} {found.get(k)!r:.100}" for k in different)
    wanted = ", ".join(f"{k} {expected.get(k)!r:.100}" for k in different)
    raise ConfigError(
        f"{folder}: belongs to a bundle with {says}; expected {wanted}; give this bundle a store"
        " of its own, or move the folder away: what was learned fits only the bundle it was"
        " learned with"
    )


def _check_names(files: Mapping[str, bytes]) -> None:
    for name in files:
        if not _is_file_name(name):
            raise ConfigError(
                f"{name!r:.200} is no name that a generation's file may have; use letters, digits,"
                f" '.', '_' and '-', and not {RECEIPT_NAME}"
            )
    if len({name.lower() for name in files}) < len(files):
        raise ConfigError("two files' names differ only in upper and lower case; rename one")


def _is_file_name(name: str) -> bool:
    if name.lower() == RECEIPT_NAME or DEVICE_NAME.fullmatch(name):
        return False
    return FILE_NAME.fullmatch(name) is not None


def _plain_receipt(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """Return the receipt as it will be read again: tuples are lists, keys are strings."""
    try:
        plain: dict[str, Any] = json.loads(_canonical(dict(receipt)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"receipt: expected numbers, strings, lists and dicts, as JSON has them: {error}"
        ) from error
    return plain


def _canonical(mapping: Mapping[str, Any]) -> bytes:
    text = json.dumps(
        mapping, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":")
    )
    return text.encode()


def _stamp(generation: Generation) -> Generation:
    """Fill in the digest."""
    mapping = to_mapping(generation)
    del mapping["digest"]
    digest = hashlib.sha256(_canonical(mapping)).hexdigest()
    return dataclasses.replace(generation, digest=digest)


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        content = json.loads(data.decode())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: is damaged: {error}") from error
    return content


def _factory(highest: int, *, forget: bool = False) -> _Pointer:
    return _Pointer(sequence=0, number=0, highest=highest, forget=forget)


def _pointing_at(generation: Generation, *, highest: int) -> _Pointer:
    return _Pointer(
        sequence=0,  # `_flip` counts
        number=generation.number,
        highest=highest,
        parent=generation.parent,
        digest=generation.digest,
        parent_digest=generation.parent_digest,
    )


def _pointer_record(pointer: _Pointer) -> bytes:
    fields = _POINTER.pack(
        _MAGIC,
        pointer.sequence,
        pointer.number,
        pointer.highest,
        pointer.parent,
        pointer.forget,
        bytes.fromhex(pointer.digest),
        bytes.fromhex(pointer.parent_digest),
    )
    return fields + _CRC.pack(zlib.crc32(fields))


def _read_pointer(disk: Disk, path: Path) -> _Pointer | None:
    """Return a pointer; None if it is missing or damaged."""
    try:
        data = disk.read(path, _POINTER.size + _CRC.size)
    except FileNotFoundError:
        return None
    if len(data) < _POINTER.size + _CRC.size:
        return None
    magic, sequence, number, highest, parent, forget, digest, parent_digest = _POINTER.unpack_from(
        data
    )
    if (
        magic != _MAGIC
        or zlib.crc32(data[: _POINTER.size]) != _CRC.unpack_from(data, _POINTER.size)[0]
    ):
        return None
    return _Pointer(
        sequence=sequence,
        number=number,
        highest=highest,
        parent=parent,
        forget=bool(forget),
        digest=digest.hex(),
        parent_digest=parent_digest.hex(),
    )


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = (
            "make room, or prune old generations" if full else "check the disk and its permissions"
        )
        where = error.filename or folder
        raise ResourceError(f"{where}: {error.strerror or error}; {advice}") from error
