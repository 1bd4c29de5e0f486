import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import ConfigError, IntegrityError, ResourceError
from edgetune.runtime.learn.disk import Disk
from edgetune.runtime.learn.store import Store

BINDING = {"bundle": "commands", "digest": "ab" * 32}
POINTER_BYTES = 8 + 4 * 8 + 4 + 2 * 32 + 4


def noon() -> datetime:
    # 13:00 in Berlin
    return datetime(2026, 3, 1, 13, 0, 0, tzinfo=timezone(timedelta(hours=1)))


to_close: list[Store] = []


@pytest.fixture(autouse=True)
def closed_at_the_end() -> Iterator[None]:
    yield
    while to_close:
        to_close.pop().close()


def opened(folder: Path, *, readonly: bool = False, **changes: str) -> Store:
    store = Store.open(folder, binding=BINDING | changes, readonly=readonly, clock=noon)
    to_close.append(store)
    return store


def with_generations(folder: Path, count: int) -> Store:
    store = opened(folder)
    for number in range(1, count + 1):
        store.commit({"head.bin": b"head %d" % number}, {"accuracy": number / 8})
    return store


def live_number(store: Store) -> int:
    live = store.live
    return live.number if live else 0


def pointer(folder: Path, slot: int) -> tuple[Any, ...]:
    """(magic, sequence, live, highest, parent, forgetting, digest, parent's digest)"""
    data = (folder / f"pointer-{slot}").read_bytes()
    assert len(data) == POINTER_BYTES
    *fields, crc = struct.unpack("<8sQQQQL32s32sL", data)
    assert crc == zlib.crc32(data[:-4])
    return tuple(fields)


def flip_a_bit(path: Path, position: int, bit: int = 0) -> None:
    changed = bytearray(path.read_bytes())
    changed[position] ^= 1 << bit
    path.write_bytes(changed)


def test_a_new_store_is_in_the_factory_state(tmp_path: Path):
    with opened(tmp_path / "a" / "b" / "store") as store:
        assert store.live is None
        assert store.history() == ()
        assert list(store.journal.records()) == []
    said = json.loads((tmp_path / "a" / "b" / "store" / "store.json").read_text())
    assert said == {"schema_version": 1, "binding": BINDING}


def test_a_reader_of_a_folder_that_is_not_there_sees_the_factory_state(tmp_path: Path):
    store = opened(tmp_path / "store", readonly=True)
    assert store.live is None
    assert store.history() == ()
    assert list(store.journal.records()) == []
    assert not (tmp_path / "store").exists()


def test_a_commit_is_live_and_its_files_and_receipt_are_as_described(tmp_path: Path):
    with opened(tmp_path) as store:
        made = store.commit(
            {"head.bin": b"\x01\x02", "state.json": b"{}"}, {"why": "better", "pair": (1, None)}
        )
        assert store.live == made
        assert store.read(made, "head.bin") == b"\x01\x02"
        assert made.receipt == {"why": "better", "pair": [1, None]}
    on_disk = (tmp_path / "gen-000001" / "receipt.json").read_bytes()
    said = json.loads(on_disk)
    digest = said.pop("digest")
    assert said == {
        "schema_version": 1,
        "number": 1,
        "parent": 0,
        "parent_digest": "0" * 64,
        "time": "2026-03-01T12:00:00Z",
        "files": {
            name: {"size": 2, "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in (("head.bin", b"\x01\x02"), ("state.json", b"{}"))
        },
        "receipt": {"why": "better", "pair": [1, None]},
    }
    rest = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    assert digest == made.digest == hashlib.sha256(rest).hexdigest()
    assert opened(tmp_path, readonly=True).live == made


def test_pointers_alternate_and_name_the_live_receipt_and_its_parent(tmp_path: Path):
    store = opened(tmp_path)
    factory = (0, 0, 0, 0, bytes(32), bytes(32))
    assert pointer(tmp_path, 0) == (b"edgeptr\x01", 1, *factory)
    assert pointer(tmp_path, 1) == (b"edgeptr\x01", 2, *factory)
    first = store.commit({}, {})
    second = store.commit({}, {})
    digests = [bytes.fromhex(g.digest) for g in (first, second)]
    assert pointer(tmp_path, 0)[1:] == (3, 1, 1, 0, 0, digests[0], bytes(32))
    assert pointer(tmp_path, 1)[1:] == (4, 2, 2, 1, 0, digests[1], digests[0])
    store.undo()
    assert pointer(tmp_path, 0)[1:] == (5, 1, 2, 0, 0, digests[0], bytes(32))


def test_undo_walks_back_to_the_factory_state_and_no_further(tmp_path: Path):
    store = with_generations(tmp_path, 2)
    back = store.undo()
    assert back is not None
    assert (back.number, live_number(store)) == (1, 1)
    assert store.read(back, "head.bin") == b"head 1"
    assert store.undo() is None
    assert store.live is None
    with pytest.raises(ConfigError, match="factory state is live, nothing to undo"):
        store.undo()


def test_a_commit_after_undo_continues_from_what_is_live_under_a_new_number(tmp_path: Path):
    store = with_generations(tmp_path, 3)
    store.undo()
    store.undo()
    made = store.commit({}, {})
    assert (made.number, made.parent) == (4, 1)
    assert [g.number for g in store.history()] == [4, 3, 2, 1]
    back = store.undo()
    assert back is not None
    assert back.number == 1


def test_history_tells_the_receipts_newest_first(tmp_path: Path):
    store = with_generations(tmp_path, 3)
    assert [g.receipt["accuracy"] for g in store.history()] == [0.375, 0.25, 0.125]
    three, two, one = store.history()
    assert (three.parent_digest, two.parent_digest) == (two.digest, one.digest)


def test_factory_reset_keeps_generations_and_their_numbers(tmp_path: Path):
    store = with_generations(tmp_path, 2)
    store.journal.append(b"seen")
    store.factory_reset()
    assert store.live is None
    assert [g.number for g in store.history()] == [2, 1]
    assert [p for _, p in store.journal.records()] == [b"seen"]
    made = store.commit({}, {})
    assert (made.number, made.parent) == (3, 0)
    assert store.undo() is None


def test_forgetting_leaves_no_generation_and_no_record_but_never_gives_a_number_again(
    tmp_path: Path,
):
    store = with_generations(tmp_path, 2)
    journal = store.journal
    journal.append(b"seen")
    store.factory_reset(forget=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "lock", "pointer-0", "pointer-1", "store.json",
    ]  # fmt: skip
    assert [pointer(tmp_path, slot)[2:6] for slot in (0, 1)] == [(0, 2, 0, 0)] * 2
    with pytest.raises(ConfigError, match="closed"):
        journal.append(b"late")
    assert list(store.journal.records()) == []
    assert store.commit({}, {}).number == 3


def test_forgetting_a_store_in_the_factory_state_empties_its_journal(tmp_path: Path):
    with opened(tmp_path) as store:
        store.journal.append(b"seen")
        store.factory_reset(forget=True)
    with opened(tmp_path) as store:
        assert list(store.journal.records()) == []


def test_a_reset_of_the_factory_state_writes_nothing(tmp_path: Path):
    store = opened(tmp_path)
    written = store.disk.bytes_written
    store.factory_reset()
    assert store.disk.bytes_written == written


@pytest.mark.parametrize(
    ("keep", "removed", "kept"),
    [
        (0, (1, 2, 3, 5), [4]),
        (1, (1, 2, 5), [4, 3]),
        (2, (1, 5), [4, 3, 2]),
        (9, (5,), [4, 3, 2, 1]),
    ],
)
def test_prune_keeps_the_live_generation_and_its_newest_ancestors(
    tmp_path: Path, keep: int, removed: tuple[int, ...], kept: list[int]
):
    store = with_generations(tmp_path, 5)
    store.undo()
    assert store.prune(keep) == removed
    assert [g.number for g in store.history()] == kept
    # neither pointer names what is gone
    assert {pointer(tmp_path, slot)[2] for slot in (0, 1)} == {4}
    assert store.prune(keep) == ()
    assert store.commit({}, {}).number == 6


def test_prune_in_the_factory_state_removes_all(tmp_path: Path):
    store = with_generations(tmp_path, 2)
    store.factory_reset()
    assert store.prune(5) == (1, 2)
    assert store.history() == ()
    with pytest.raises(ConfigError, match="expected 0 or more ancestors, got -1"):
        store.prune(-1)


def test_undo_to_a_pruned_parent_says_what_is_left(tmp_path: Path):
    store = with_generations(tmp_path, 2)
    store.prune(0)
    with pytest.raises(ConfigError, match=r"generation 1, .* was pruned; factory_reset"):
        store.undo()
    store.factory_reset()
    assert store.live is None


def test_another_bundle_is_told_apart_by_writers_and_readers(tmp_path: Path):
    opened(tmp_path).close()
    for readonly in (True, False):
        with pytest.raises(ConfigError, match="belongs to a bundle with bundle 'commands'; expect"):
            opened(tmp_path, bundle="flowers", readonly=readonly)
        with pytest.raises(ConfigError, match=r"with release None; expected release '2'"):
            opened(tmp_path, release="2", readonly=readonly)
    opened(tmp_path).close()


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path: Path):
    script = (
        "import sys; from edgetune.runtime.learn.store import Store;"
        f"s = Store.open(sys.argv[1], binding={BINDING!r}); print('open', flush=True);"
        "sys.stdin.read(); s.commit({}, {})"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline().strip() == b"open"
    with pytest.raises(ResourceError, match=r"lock: another process has this store open"):
        opened(tmp_path)
    reader = opened(tmp_path, readonly=True)
    assert reader.live is None
    other.communicate()
    assert other.returncode == 0
    assert live_number(reader) == 1
    with opened(tmp_path) as store, pytest.raises(ResourceError, match="another process"):
        opened(store.folder)
    opened(tmp_path).close()


def test_readers_and_closed_stores_change_nothing(tmp_path: Path):
    store = with_generations(tmp_path, 2)
    journal = store.journal
    store.close()
    reader = opened(tmp_path, readonly=True)
    for unwilling in (store, reader):
        for change in (
            lambda s: s.commit({}, {}),
            Store.undo,
            Store.factory_reset,
            lambda s: s.prune(0),
            lambda s: s.journal.append(b"x"),
        ):
            with pytest.raises(ConfigError, match="closed or open for reading only"):
                change(unwilling)
        assert live_number(unwilling) == 2
    assert list(journal.records()) == []


def test_a_reader_sees_what_is_committed_later(tmp_path: Path):
    reader = opened(tmp_path / "store", readonly=True)
    store = with_generations(tmp_path / "store", 1)
    assert live_number(reader) == 1
    store.undo()
    assert reader.live is None


@pytest.mark.parametrize(
    "name", ["", "../head", "a/b", ".hidden", "receipt.json", "Receipt.JSON", "nul.txt", "a\n"]
)
def test_names_that_are_no_plain_file_are_refused(tmp_path: Path, name: str):
    store = opened(tmp_path)
    with pytest.raises(ConfigError, match="is no name that a generation's file may have"):
        store.commit({name: b""}, {})
    with pytest.raises(ConfigError, match="differ only in upper and lower case"):
        store.commit({"head": b"", "HEAD": b""}, {})
    assert store.live is None


@pytest.mark.parametrize("value", [float("nan"), b"bytes", {1, 2}, object()])
def test_a_receipt_that_json_cannot_hold_is_refused_and_nothing_written(
    tmp_path: Path, value: object
):
    store = opened(tmp_path)
    written = store.disk.bytes_written
    with pytest.raises(ConfigError, match="as JSON has them"):
        store.commit({}, {"value": value})
    with pytest.raises(ConfigError, match="at most 1048576 fit"):
        store.commit({}, {"value": "x" * 2**20})
    assert store.disk.bytes_written == written


def test_a_file_that_a_generation_does_not_have_is_named_with_those_it_has(tmp_path: Path):
    store = with_generations(tmp_path, 1)
    live = store.live
    assert live is not None
    with pytest.raises(ConfigError, match=r"generation 1 has no 'tail.bin'; it has head.bin"):
        store.read(live, "tail.bin")


def test_what_is_written_per_change_is_counted(tmp_path: Path):
    store = opened(tmp_path)
    for _ in range(2):
        written, syncs = store.disk.bytes_written, store.disk.syncs
        store.commit({"a": b"12345", "b": b"123"}, {})
        receipt = (tmp_path / f"gen-{live_number(store):06d}" / "receipt.json").stat().st_size
        assert store.disk.bytes_written - written == 5 + 3 + receipt + POINTER_BYTES
        # three files, two folders, one pointer
        assert store.disk.syncs - syncs == 6
    written, syncs = store.disk.bytes_written, store.disk.syncs
    store.undo()
    assert store.disk.bytes_written - written == POINTER_BYTES
    assert store.disk.syncs - syncs == 1


def test_what_an_interrupted_commit_left_is_removed_and_nothing_else(tmp_path: Path):
    with_generations(tmp_path, 2).close()
    before = {p.name for p in tmp_path.iterdir()}
    for leftover in (".gen-000003.partial", ".gen-000001.removed", "gen-000003"):
        shutil.copytree(tmp_path / "gen-000002", tmp_path / leftover)
    for leftover in (".journal.bin.partial", ".store.json.partial"):
        (tmp_path / leftover).write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("somebody's")
    assert [g.number for g in opened(tmp_path, readonly=True).history()] == [2, 1]
    with opened(tmp_path) as store:
        assert {p.name for p in tmp_path.iterdir()} == before | {"notes.txt"}
        assert store.commit({}, {}).number == 3


# -- damage


@pytest.mark.parametrize("bit", [0, 5])
def test_a_bit_flipped_in_the_newer_pointer_brings_back_the_state_before(tmp_path: Path, bit: int):
    template = tmp_path / "template"
    with_generations(template, 2).close()  # pointer-1 holds
    for position in range(POINTER_BYTES):
        folder = tmp_path / str(position)
        shutil.copytree(template, folder)
        flip_a_bit(folder / "pointer-1", position, bit)
        assert live_number(opened(folder, readonly=True)) == 1
        with opened(folder) as store:
            assert live_number(store) == 1
            # generation 2 may have been live: its number is not given again
            assert store.commit({}, {}).number == 3
        assert pointer(folder, 0)[2] == 3 or pointer(folder, 1)[2] == 3


@pytest.mark.parametrize("bit", [0, 5])
def test_a_bit_flipped_in_the_older_pointer_changes_nothing(tmp_path: Path, bit: int):
    template = tmp_path / "template"
    with_generations(template, 2).close()
    for position in range(POINTER_BYTES):
        folder = tmp_path / str(position)
        shutil.copytree(template, folder)
        flip_a_bit(folder / "pointer-0", position, bit)
        assert live_number(opened(folder, readonly=True)) == 2
        with opened(folder) as store:
            assert live_number(store) == 2
        assert {pointer(folder, slot)[2] for slot in (0, 1)} == {2}  # mended


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "gone"])
def test_with_both_pointers_damaged_only_a_factory_reset_goes_on(tmp_path: Path, damage: str):
    with_generations(tmp_path, 2).close()
    for slot in (0, 1):
        path = tmp_path / f"pointer-{slot}"
        data = path.read_bytes()
        if damage == "flipped":
            flip_a_bit(path, 20)
        elif damage == "gone":
            path.unlink()
        else:
            path.write_bytes(data[:-1] if damage == "short" else b"")
    for readonly in (True, False):
        with opened(tmp_path, readonly=readonly) as store:
            for ask in (lambda s: s.live, lambda s: s.history()):
                with pytest.raises(IntegrityError, match=r"both damaged .*; factory_reset repairs"):
                    ask(store)
    with opened(tmp_path) as store:
        for change in (lambda s: s.commit({}, {}), Store.undo, lambda s: s.prune(0)):
            with pytest.raises(IntegrityError, match="factory_reset repairs"):
                change(store)
        store.factory_reset()
        assert store.live is None
        assert store.commit({}, {}).number == 3
    pointer(tmp_path, 0)
    pointer(tmp_path, 1)


def test_a_damaged_live_generation_names_undo_and_undo_repairs_it(tmp_path: Path):
    with_generations(tmp_path, 2).close()
    receipt = tmp_path / "gen-000002" / "receipt.json"
    whole = receipt.read_bytes()
    for position in range(len(whole)):
        receipt.write_bytes(whole)
        flip_a_bit(receipt, position)
        with pytest.raises(IntegrityError, match=r"receipt\.json: .*; undo goes back to generat"):
            _ = opened(tmp_path, readonly=True).live
    with opened(tmp_path) as store:
        back = store.undo()
        assert back is not None
        assert live_number(store) == 1
        with pytest.raises(IntegrityError, match="prune removes it"):
            store.history()
        assert store.prune(0) == (2,)
        assert [g.number for g in store.history()] == [1]


@pytest.mark.parametrize("damage", ["flipped", "short", "long", "gone"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str):
    store = with_generations(tmp_path, 1)
    path = tmp_path / "gen-000001" / "head.bin"
    if damage == "flipped":
        flip_a_bit(path, 3)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "short" else b"more than there was")
    live = store.live
    assert live is not None
    with pytest.raises(IntegrityError, match=r"head\.bin: .*undo or factory_reset"):
        store.read(live, "head.bin")
    assert store.undo() is None


def test_undo_does_not_go_back_to_what_is_damaged(tmp_path: Path):
    store = with_generations(tmp_path, 2)
    flip_a_bit(tmp_path / "gen-000001" / "head.bin", 0)
    with pytest.raises(IntegrityError, match=r"a damaged generation 1 .*; factory_reset"):
        store.undo()
    assert live_number(store) == 2


def test_a_receipt_of_another_generation_in_its_place_is_found(tmp_path: Path):
    store = with_generations(tmp_path, 2)
    with opened(tmp_path / "other") as other:
        other.commit({}, {})
        other.commit({}, {"accuracy": 1.0})
    shutil.copy(tmp_path / "other" / "gen-000002" / "receipt.json", tmp_path / "gen-000002")
    with pytest.raises(IntegrityError, match="expected digest"):
        _ = store.live
    shutil.copy(tmp_path / "gen-000001" / "receipt.json", tmp_path / "gen-000002")
    with pytest.raises(IntegrityError, match="was changed"):
        _ = store.live


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"schema_version":1}', b'{"schema_version":2,"binding":{}}']
)
def test_a_damaged_description_is_refused_with_what_to_do(tmp_path: Path, content: bytes):
    opened(tmp_path).close()
    (tmp_path / "store.json").write_bytes(content)
    for readonly in (True, False):
        with pytest.raises(IntegrityError, match=r"store\.json: "):
            opened(tmp_path, readonly=readonly)


def test_generations_without_a_description_are_not_taken_for_this_bundles(tmp_path: Path):
    with_generations(tmp_path, 1).close()
    (tmp_path / "store.json").unlink()
    for readonly in (True, False):
        with pytest.raises(IntegrityError, match="is missing, so which bundle"):
            opened(tmp_path, readonly=readonly)
    assert (tmp_path / "gen-000001").exists()


def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path):
    class Full(Disk):
        full = False

        def _do(self, call: Any, *args: Any, **kwargs: Any) -> Any:
            if self.full and call is os.write:
                raise OSError(28, "No space left on device")
            return super()._do(call, *args, **kwargs)

    disk = Full()
    with Store.open(tmp_path, binding=BINDING, disk=disk) as store:
        store.commit({"head.bin": b"1"}, {})
        disk.full = True
        with pytest.raises(ResourceError, match=r"No space left on device; make room, or prune"):
            store.commit({"head.bin": b"2"}, {})
        assert live_number(store) == 1
        assert not list(tmp_path.glob(".*"))
        disk.full = False
        assert store.commit({"head.bin": b"2"}, {}).number == 2


def test_times_are_utc_by_default(tmp_path: Path):
    before = datetime.now(UTC).replace(microsecond=0)
    with Store.open(tmp_path, binding=BINDING) as store:
        made = datetime.fromisoformat(store.commit({}, {}).time)
    assert before <= made <= datetime.now(UTC)
