"""A loss of power at any system call leaves the old or the new state, readable, and writable.

Three ways to lose power, from the crude to the cruel: a process is killed (all that it wrote
stays); a call fails or is torn; a machine goes off, and of what was not flushed any part is gone.
"""

import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from edgetune.errors import ConfigError, EdgetuneError, ResourceError
from edgetune.runtime.learn.disk import Disk
from edgetune.runtime.learn.store import Store

# of what was not flushed nothing, all or only the newest survives, or chance decides; more of
# the latter find nothing more
FATES = ["lost", "kept", "last", *["some"] * int(os.environ.get("EDGETUNE_POWER_CUT_ROLLS", "2"))]
BINDING = {"bundle": "commands", "digest": "ab" * 32}
# more than one buffer of a reader, so that a tear leaves a part
CONTENTS = {n: {"head.bin": bytes([n]) * 300, "counts.bin": b"%d" % n} for n in range(1, 9)}


def noon() -> datetime:
    return datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def open_store(folder: Path, disk: Disk, *, readonly: bool = False) -> Store:
    return Store.open(folder, binding=BINDING, disk=disk, readonly=readonly, clock=noon)


def commit(store: Store, content: int) -> int:
    return store.commit(CONTENTS[content], {"content": content}).number


def three_generations(store: Store) -> None:
    store.journal.extend([b"one", b"two"])
    for content in (1, 2, 3):
        commit(store, content)


def two_of_them_undone(store: Store) -> None:
    three_generations(store)
    store.undo()
    store.undo()


def a_commit_whose_pointer_is_torn(store: Store) -> None:
    three_generations(store)
    commit(store, 4)
    store.disk.write_at(store.folder / "pointer-1", 50, b"torn")


def nothing(store: Store) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is there before, and the operation that is cut off."""

    before: Callable[[Store], None] | None
    operation: Callable[[Store], Any]


CASES = {
    "first opening": Case(before=None, operation=nothing),
    "first commit": Case(before=nothing, operation=lambda s: commit(s, 4)),
    "commit": Case(before=three_generations, operation=lambda s: commit(s, 4)),
    "commit after undo": Case(before=two_of_them_undone, operation=lambda s: commit(s, 4)),
    "recovery": Case(before=a_commit_whose_pointer_is_torn, operation=nothing),
    "undo": Case(before=three_generations, operation=lambda s: s.undo()),
    "reset": Case(before=three_generations, operation=lambda s: s.factory_reset()),
    "forget": Case(before=three_generations, operation=lambda s: s.factory_reset(forget=True)),
    "prune": Case(before=three_generations, operation=lambda s: s.prune(0)),
    "append": Case(before=three_generations, operation=lambda s: s.journal.append(b"three" * 50)),
    "first append": Case(before=nothing, operation=lambda s: s.journal.append(b"three" * 50)),
    "batch": Case(
        before=three_generations, operation=lambda s: s.journal.extend([b"3" * 40, b"4" * 40, b"5"])
    ),
}
# where the file system is real: what the others do, and more
ON_FILES = ["first opening", "first commit", "commit", "undo", "forget", "prune", "batch"]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """All that a store shows: the live number and its files, the numbers kept, the journal."""

    live: int
    files: Mapping[str, bytes]
    kept: tuple[int, ...]
    records: tuple[bytes, ...]


def look(store: Store) -> Seen:
    """Read all there is; anything damaged raises."""
    live, kept = store.live, store.history()
    by_number = {g.number: g for g in kept}
    assert [g.number for g in kept] == sorted(by_number, reverse=True)
    for generation in kept:
        store.verify(generation)
        content = generation.receipt["content"]
        assert {n: store.read(generation, n) for n in generation.files} == CONTENTS[content]
        if generation.parent in by_number:
            assert by_number[generation.parent].digest == generation.parent_digest
    assert live is None or live in kept
    return Seen(
        live=live.number if live else 0,
        files={n: store.read(live, n) for n in live.files} if live else {},
        kept=tuple(by_number),
        records=tuple(payload for _, payload in store.journal.records()),
    )


def check(seen: Seen, name: str, old: Seen, new: Seen, *, whole: bool = True) -> None:
    """Assert that a store shows the old or the new state; `whole`: it was opened for writing."""
    if name == "prune":
        assert seen.live == old.live
        assert seen.files == old.files
        assert set(new.kept) <= set(seen.kept) <= set(old.kept)
        assert seen.records == old.records
    elif name == "forget" and not whole:
        assert (seen.live, seen.files) in ((old.live, old.files), (0, {}))
    else:
        assert seen in (old, new)


def check_all(folder: Path, disk: Disk, name: str, old: Seen, new: Seen) -> None:
    """Read as a reader and as a writer would, then go on working."""
    check(look(open_store(folder, disk, readonly=True)), name, old, new, whole=False)
    with open_store(folder, disk) as store:
        seen = look(store)
        check(seen, name, old, new)
        number = commit(store, 7)
        assert number > max([0, *old.kept, *seen.kept])
        store.journal.append(b"more")
    with open_store(folder, disk) as store:
        after = look(store)
        assert (after.live, after.files) == (number, CONTENTS[7])
        assert after.kept == (number, *seen.kept)
        assert after.records == (*seen.records, b"more")
        assert store.journal.dropped == 0
        back = store.undo()
        assert (back.number if back else 0) == seen.live


class PowerCut(BaseException):
    """The machine goes off: no `except Exception` may go on."""


class Soft(Disk):
    """The real file system without waiting for flushes, which here nothing depends on."""

    def _do(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return None if call is os.fsync else super()._do(call, *args, **kwargs)


CHANGING = (os.write, os.mkdir, os.ftruncate, os.replace, os.unlink, os.rmdir)


class Faulty(Soft):
    """A disk that fails at the k-th of the calls that it counts.

    how: "cut" or "cut torn": the power goes before the k-th call that changes anything, or after
    half of the k-th write. "full" or "full torn": any call, reading too, finds no room, or a
    write half of it. "failing late": a call that changes anything has done so, and fails.
    "failing on": a call that would change anything fails, and so does all that follows.
    """

    def __init__(self, at: int, how: str) -> None:
        super().__init__()
        self.at, self.how = at, how
        self.calls = 0
        self.mended = False

    def _do(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.calls == self.at and self.how in ("cut", "cut torn", "failing on"):
            if not self.mended:
                raise self._fault()
        elif self._counts(call, args):
            self.calls += 1
            if self.calls == self.at:
                if "torn" in self.how:
                    handle, data = args
                    super()._do(call, handle, data[: len(data) // 2])
                elif self.how == "failing late":
                    super()._do(call, *args, **kwargs)
                raise self._fault()
        return super()._do(call, *args, **kwargs)

    def _counts(self, call: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        if "torn" in self.how:
            return call is os.write
        creates = call is os.open and bool(args[1] & os.O_CREAT)
        if self.how == "failing late":
            return call is os.fsync or call in CHANGING
        flushes = call is os.fsync and self.how == "failing on"
        return self.how == "full" or creates or flushes or call in CHANGING

    def _fault(self) -> BaseException:
        if self.how.startswith("cut"):
            return PowerCut()
        code = errno.ENOSPC if self.how.startswith("full") else errno.EIO
        return OSError(code, os.strerror(code))


@dataclass
class File:
    """Content as programs see it, as the disk has it, and the writes between the two."""

    now: bytes = b""
    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def write(self, offset: int, data: bytes | None) -> None:
        """None cuts the file off."""
        self.pending.append((offset, data))
        self.now = _written(self.now, offset, data)


@dataclass
class Folder:
    """Names as programs see them, as the disk has them, and the changes between the two."""

    now: dict[str, "File | Folder"] = field(default_factory=dict)
    durable: dict[str, "File | Folder"] = field(default_factory=dict)
    # (name that goes, name that comes, what it names)
    pending: list[tuple[str | None, str | None, "File | Folder | None"]] = field(
        default_factory=list
    )

    def change(self, gone: str | None, new: str | None, node: "File | Folder | None") -> None:
        self.pending.append((gone, new, node))
        _renamed(self.now, gone, new, node)


def _written(content: bytes, offset: int, data: bytes | None) -> bytes:
    if data is None:
        return content[:offset].ljust(offset, b"\0")
    return content[:offset].ljust(offset, b"\0") + data + content[offset + len(data) :]


def _renamed(
    names: dict[str, Any], gone: str | None, new: str | None, node: "File | Folder | None"
) -> None:
    if gone is not None:
        names.pop(gone, None)
    if new is not None:
        names[new] = node


class MemoryDisk(Disk):
    """A machine with a cache: what was not flushed is there until the power goes.

    Flushing a file keeps its content, not its name; flushing a folder keeps its names, not what
    they name. That is all that POSIX promises; most file systems do better.
    """

    def __init__(self, root: Folder | None = None) -> None:
        super().__init__()
        self.root = root or Folder()
        self.cut_at: int | None = None
        self.steps = 0
        self.locked = False

    def _step(self) -> None:
        self.steps += 1
        if self.cut_at is not None and self.steps >= self.cut_at:
            raise PowerCut

    def _node(self, path: Path) -> File | Folder:
        node: File | Folder = self.root
        for part in path.parts[1:]:
            if not isinstance(node, Folder):
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
            if part not in node.now:
                raise FileNotFoundError(errno.ENOENT, "not there", str(path))
            node = node.now[part]
        return node

    def _file(self, path: Path) -> File:
        node = self._node(path)
        if not isinstance(node, File):
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        return node

    def _folder(self, path: Path) -> Folder:
        node = self._node(path)
        if not isinstance(node, Folder):
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
        return node

    def _add(self, path: Path, node: File | Folder) -> None:
        parent = self._folder(path.parent)
        if path.name in parent.now:
            raise FileExistsError(errno.EEXIST, "is there", str(path))
        self._step()
        parent.change(None, path.name, node)

    def make_folder(self, path: Path) -> None:
        self._add(path, Folder())

    def write_new(self, path: Path, data: bytes) -> None:
        self._add(path, File())
        self.write_at(path, 0, data)

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        file = self._file(path)
        self._step()
        file.write(offset, data)
        self.bytes_written += len(data)
        self.fsync(path)

    def truncate(self, path: Path, size: int) -> None:
        file = self._file(path)
        self._step()
        file.write(size, None)
        self.fsync(path)

    def fsync(self, path: Path) -> None:
        file = self._file(path)
        self._step()
        file.durable, file.pending = file.now, []
        self.syncs += 1

    def fsync_folder(self, path: Path) -> None:
        folder = self._folder(path)
        self._step()
        folder.durable, folder.pending = dict(folder.now), []
        self.syncs += 1

    def rename(self, source: Path, target: Path) -> None:
        assert source.parent == target.parent
        node = self._node(source)
        self._step()
        self._folder(source.parent).change(source.name, target.name, node)

    def remove(self, path: Path) -> None:
        node = self._node(path)
        for name in sorted(node.now) if isinstance(node, Folder) else ():
            self.remove(path / name)
        self._step()
        self._folder(path.parent).change(path.name, None, None)

    def open(self, path: Path) -> BinaryIO:
        return io.BytesIO(self._file(path).now)

    def names(self, folder: Path) -> list[str]:
        return sorted(self._folder(folder).now)

    def exists(self, path: Path) -> bool:
        try:
            self._node(path)
        except FileNotFoundError:
            return False
        return True

    def lock(self, path: Path) -> "MemoryDisk":
        if self.locked:
            raise BlockingIOError
        if not self.exists(path):
            self._add(path, File())
        self.locked = True
        return self

    def close(self) -> None:
        self.locked = False

    def after_power_cut(self, fate: str, dice: random.Random) -> "MemoryDisk":
        """Return the machine switched on again; `fate` says what of the unflushed is there."""
        return MemoryDisk(_survivor(self.root, fate, dice, {}))


def _survivors(pending: list[Any], fate: str) -> list[Any]:
    """Return what may survive of changes to one file or folder: they need not keep their order."""
    return {"lost": [], "last": pending[-1:]}.get(fate, pending)


def _survivor(node: File | Folder, fate: str, dice: random.Random, done: dict[int, Any]) -> Any:
    if id(node) in done:
        return done[id(node)]
    if isinstance(node, File):
        content = node.durable
        for offset, data in _survivors(node.pending, fate):
            if fate == "some" and data is not None and dice.random() < 0.5:  # torn
                data = data[: dice.randrange(len(data) + 1)]
            luck = dice.random() if fate == "some" else 0
            if luck < 0.6:
                content = _written(content, offset, data)
            elif data is not None and luck < 0.8:  # its length, and not its content
                content = content.ljust(offset + len(data), b"\0")
        done[id(node)] = File(now=content, durable=content)
        return done[id(node)]
    names = dict(node.durable)
    for change in _survivors(node.pending, fate):
        if fate != "some" or dice.random() < 0.6:
            _renamed(names, *change)
    folder = done[id(node)] = Folder()
    folder.now = {name: _survivor(inner, fate, dice, done) for name, inner in names.items()}
    folder.durable = dict(folder.now)
    return folder


@pytest.mark.parametrize("name", ON_FILES)
@pytest.mark.parametrize("how", ["cut", "cut torn"])
def test_a_cut_at_any_call_leaves_the_old_or_the_new_state(name: str, how: str, tmp_path: Path):
    template, old, new = prepared(name, tmp_path)
    for at in range(1, 1000):
        folder = copied(template, tmp_path / str(at))
        if not cut(folder, name, Faulty(at, how)):
            assert at > 1 or name == "first opening"
            break
        check_all(folder, Soft(), name, old, new)
        shutil.rmtree(folder.parent)
    with open_store(folder, Soft()) as store:
        assert look(store) == new


@pytest.mark.parametrize("name", ON_FILES)
@pytest.mark.parametrize("how", ["full", "full torn", "failing late", "failing on"])
def test_a_call_that_fails_leaves_the_old_state_or_has_done_its_work(
    name: str, how: str, tmp_path: Path
):
    template, old, new = prepared(name, tmp_path)
    for at in range(1, 1000):
        folder = copied(template, tmp_path / str(at))
        disk = Faulty(at, how)
        try:
            store = open_store(folder, disk)
        except EdgetuneError as error:
            assert isinstance(error, ResourceError)
        else:
            try:
                CASES[name].operation(store)
                failed = False
            except ResourceError:
                failed = True
            disk.mended = True
            if disk.calls < at:
                store.close()
                assert not failed
                break
            # the same process goes on: it sees what it was told
            seen = look(store)
            if name in ("prune", "forget"):
                check(seen, name, old, new, whole=False)
            else:
                assert seen == (old if failed else new)
            store.close()
        if how != "full" or at % 3 == 0:  # as in the other ways, but for calls that only read
            check_all(folder, Soft(), name, old, new)
        shutil.rmtree(folder.parent)
    assert at > 1 or name == "first opening"
    with open_store(folder, Soft()) as store:
        assert look(store) == new


def prepared(name: str, tmp_path: Path) -> tuple[Path, Seen, Seen]:
    """Return the folder as it is before the operation, and what is seen before and after."""
    case, template = CASES[name], tmp_path / "template" / "store"
    template.parent.mkdir()
    if case.before:
        with open_store(template, Soft()) as store:
            case.before(store)
    seen = []
    for operation in (nothing, case.operation):
        folder = copied(template, tmp_path / f"seen-{len(seen)}")
        with open_store(folder, Soft()) as store:
            operation(store)
            seen.append(look(store))
    return template, seen[0], seen[1]


def copied(template: Path, parent: Path) -> Path:
    shutil.copytree(template.parent, parent)
    return parent / template.name


def cut(folder: Path, name: str, disk: Disk) -> bool:
    """Do the operation; say whether the power went off meanwhile."""
    store = None
    try:
        store = open_store(folder, disk)
        CASES[name].operation(store)
    except PowerCut:
        return True
    finally:
        if store:
            store.close()  # as the system does for a process that ends
    return False


@pytest.mark.parametrize("name", CASES)
def test_whatever_was_not_flushed_may_be_gone(name: str):
    dice = random.Random(name)
    folder = Path("/data/learned/store")
    template = MemoryDisk(Folder(now=(data := {"data": Folder()}), durable=dict(data)))
    if before := CASES[name].before:
        with open_store(folder, template) as store:
            before(store)

    def fresh(cut_at: int | None = None) -> MemoryDisk:
        disk = template.after_power_cut("lost", dice)
        disk.cut_at = cut_at
        return disk

    seen = []
    for operation in (nothing, CASES[name].operation):
        disk = fresh()
        with open_store(folder, disk) as store:
            operation(store)
        # what was done is done: a loss of everything that was not flushed changes nothing
        seen.append(look(open_store(folder, disk.after_power_cut("lost", dice), readonly=True)))
    old, new = seen

    for at in range(1, 1000):
        disk = fresh(at)
        if not cut(folder, name, disk):
            break
        disk.cut_at = None
        for fate in FATES:
            check_all(folder, disk.after_power_cut(fate, dice), name, old, new)
            # the power goes again while the device recovers
            again = disk.after_power_cut(fate, dice)
            again.cut_at = dice.randrange(1, 12)
            cut(folder, name if name in ("forget", "prune") else "first opening", again)
            check_all(folder, again.after_power_cut("some", dice), name, old, new)
        # killed, started again, and then the power goes: what a writer was shown stays
        disk.locked = False
        with open_store(folder, disk) as store:
            for fate in ("last", "some"):
                with open_store(folder, disk.after_power_cut(fate, dice)) as again:
                    check(look(again), name, old, new)
            shown = look(store)
            check(shown, name, old, new)
            for fate in FATES:
                with open_store(folder, disk.after_power_cut(fate, dice)) as again:
                    assert look(again) == shown
            number = commit(store, 7)
            store.journal.append(b"more")
        after = look(open_store(folder, disk.after_power_cut("lost", dice), readonly=True))
        assert (after.live, after.records) == (number, (*shown.records, b"more"))
    assert at > 3


def test_a_store_that_was_opened_is_bound_to_its_bundle_whatever_happens():
    disk = MemoryDisk(Folder(now=(data := {"data": Folder()}), durable=dict(data)))
    open_store(Path("/data/store"), disk).close()
    disk = disk.after_power_cut("lost", random.Random(0))
    with pytest.raises(ConfigError, match="belongs to a bundle"):
        Store.open(Path("/data/store"), binding={"bundle": "another"}, disk=disk)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from edgetune.runtime.learn.disk import Disk
from edgetune.runtime.learn.store import Store

class Deadly(Disk):
    calls = 0

    def _do(self, call, *args):
        self.calls += 1
        if self.calls == at:
            if call is os.write:
                os.write(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._do(call, *args)

def work(folder):
    disk = Deadly()
    with Store.open(folder, binding=BINDING, disk=disk) as store:
        store.journal.extend([b"three", b"four"])
        store.commit({"head.bin": b"4" * 300}, {"content": 4})
        store.undo()

template, parent = Path(sys.argv[1]), Path(sys.argv[2])
for at in range(1, 1000):
    folder = parent / str(at)
    shutil.copytree(template, folder)
    child = os.fork()
    if not child:
        work(folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        print(at, os.WEXITSTATUS(status))
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to be killed")
def test_a_process_killed_at_any_call_leaves_a_store_that_goes_on(tmp_path: Path):
    template = tmp_path / "template"
    with open_store(template, Disk()) as store:
        three_generations(store)
    killed = tmp_path / "killed"
    killed.mkdir()
    script = KILLED.replace("BINDING", json.dumps(BINDING))
    done = subprocess.run(
        [sys.executable, "-c", script, str(template), str(killed)],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    last, code = map(int, done.stdout.split())
    assert code == 0
    assert last > 60

    # (live, records): nothing yet, the batch, the commit; then undone
    order = [(3, 2), (3, 4), (4, 4), (3, 4)]
    reached = 0
    for at in range(1, last + 1):
        with open_store(killed / str(at), Disk()) as store:
            live = store.live
            assert live is not None
            for generation in store.history():
                store.verify(generation)
            state = (live.number, len(list(store.journal.records())))
            while order[reached] != state:  # never back
                reached += 1
            # never again the number of what was live
            assert store.commit({"head.bin": b"new"}, {}).number > (4 if reached >= 2 else 3)
    assert reached == 3
