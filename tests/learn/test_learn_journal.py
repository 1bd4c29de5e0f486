import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import ConfigError, DataError, IntegrityError, ResourceError
from edgetune.runtime.learn.disk import Disk
from edgetune.runtime.learn.journal import MAX_PAYLOAD_BYTES, Journal

PAYLOADS = [b"first", b"", b"\x00\xff" * 9, b"fourth of them"]


def by_hand(*batches: list[bytes]) -> bytes:
    """A journal's bytes as the module's docstring describes them."""
    start = b"edgejrnl" + struct.pack("<L", 1)
    out = start + struct.pack("<L", zlib.crc32(start))
    for batch in batches:
        for i, payload in enumerate(batch):
            magic = b"rec\x01" if i + 1 < len(batch) else b"rec\x00"
            fields = magic + struct.pack("<LL", len(payload), zlib.crc32(payload))
            out += fields + struct.pack("<L", zlib.crc32(fields)) + payload
    return out


def ends(*batches: list[bytes]) -> list[int]:
    """Up to which byte a journal is whole: 16 for the header, 16 and the payload per record."""
    found = [16]
    for batch in batches:
        found.append(found[-1] + sum(16 + len(p) for p in batch))
    return found


def opened(path: Path, *, writable: bool = True) -> Journal:
    return Journal.open(Disk(), path, writable=writable)


def payloads(journal: Journal) -> list[bytes]:
    return [payload for _, payload in journal.records()]


def test_a_journal_has_the_bytes_that_its_description_says(tmp_path: Path):
    journal = opened(tmp_path / "j")
    for payload in PAYLOADS:
        journal.append(payload)
    journal.extend([b"a", b"bc"])
    assert journal.path.read_bytes() == by_hand(*[[p] for p in PAYLOADS], [b"a", b"bc"])


def test_records_come_back_in_order_with_the_offsets_that_append_returned(tmp_path: Path):
    journal = opened(tmp_path / "j")
    offsets = [journal.append(PAYLOADS[0]), *journal.extend(PAYLOADS[1:])]
    assert offsets == [16, 37, 53, 87]
    assert list(journal.records()) == list(zip(offsets, PAYLOADS, strict=True))
    for writable in (True, False):
        again = opened(tmp_path / "j", writable=writable)
        assert list(again.records()) == list(zip(offsets, PAYLOADS, strict=True))
        assert again.dropped == 0


def test_a_record_is_read_while_others_are_appended(tmp_path: Path):
    journal = opened(tmp_path / "j")
    journal.extend([b"a", b"b"])
    reading = journal.records()
    assert next(reading)[1] == b"a"
    journal.append(b"c")
    assert [payload for _, payload in reading] == [b"b"]
    assert payloads(journal) == [b"a", b"b", b"c"]


def test_a_reader_neither_makes_nor_mends_a_journal(tmp_path: Path):
    path = tmp_path / "j"
    journal = opened(path, writable=False)
    assert payloads(journal) == []
    assert not path.exists()
    torn = by_hand([b"one"], [b"two"])[:-1]
    path.write_bytes(torn)
    journal = opened(path, writable=False)
    assert payloads(journal) == [b"one"]
    assert journal.dropped == 16 + 2
    assert path.read_bytes() == torn
    with pytest.raises(ConfigError, match="for reading only"):
        journal.append(b"x")


def test_an_append_costs_one_write_and_one_flush(tmp_path: Path):
    disk = Disk()
    journal = Journal.open(disk, tmp_path / "j", writable=True)
    written, syncs = disk.bytes_written, disk.syncs
    journal.extend([b"12345"] * 10)
    assert disk.bytes_written - written == 10 * (16 + 5)
    assert disk.syncs - syncs == 1
    assert journal.extend([]) == []
    assert disk.syncs - syncs == 1


@pytest.mark.parametrize("writable", [False, True])
def test_a_journal_cut_off_at_any_byte_keeps_its_whole_batches(tmp_path: Path, writable: bool):
    batches = [[b"first"], [b""], [b"x" * 20, b"y", b"z" * 5], [b"last"]]
    content, whole = by_hand(*batches), ends(*batches)
    assert whole[-1] == len(content)
    for size in range(len(content) + 1):
        path = tmp_path / str(size)
        path.write_bytes(content[:size])
        journal = opened(path, writable=writable)
        complete = sum(end <= size for end in whole[1:])
        expected = [p for batch in batches[:complete] for p in batch]
        assert payloads(journal) == expected
        assert journal.dropped == (size - whole[complete] if size >= 16 else size)
        if writable:
            assert path.read_bytes() == by_hand(*batches[:complete])
            journal.append(b"more")
            assert payloads(opened(path)) == [*expected, b"more"]


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_bit_ends_the_journal_before_the_batch_that_it_is_in(tmp_path: Path, bit: int):
    batches = [[b"first"], [b"x" * 20, b"y"], [b"last"]]
    content, whole = by_hand(*batches), ends(*batches)
    for position in range(len(content)):
        path = tmp_path / str(position)
        path.write_bytes(flipped(content, position, bit))
        if position < 16:
            for writable in (False, True):
                with pytest.raises(IntegrityError, match="move it away"):
                    opened(path, writable=writable)
            assert path.read_bytes() == flipped(content, position, bit)
            continue
        complete = sum(end <= position for end in whole[1:])
        expected = [p for batch in batches[:complete] for p in batch]
        for writable in (False, True):
            journal = opened(path, writable=writable)
            assert payloads(journal) == expected
            assert journal.dropped == len(content) - whole[complete]
        journal.append(b"more")
        assert payloads(opened(path)) == [*expected, b"more"]


def flipped(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_what_a_failed_append_left_never_comes_back(tmp_path: Path, failures: int):
    class Failing(Disk):
        left = 0

        def _do(self, call: Any, *args: Any, **kwargs: Any) -> Any:
            if self.left and call in (os.fsync, os.ftruncate):
                self.left -= 1
                raise OSError(5, "Input/output error")
            return super()._do(call, *args, **kwargs)

    disk = Failing()
    journal = Journal.open(disk, tmp_path / "j", writable=True)
    journal.append(b"one")
    disk.left = failures
    with pytest.raises(ResourceError, match="Input/output error"):
        journal.extend([b"lost", b"tail"])
    assert payloads(journal) == [b"one"]
    if failures == 3:  # the next one cannot take it back either
        with pytest.raises(ResourceError, match="Input/output error"):
            journal.append(b"next")
    journal.append(b"next")  # as long as "lost": "tail" would follow
    assert payloads(journal) == [b"one", b"next"]
    assert (tmp_path / "j").read_bytes() == by_hand([b"one"], [b"next"])


def test_what_an_interrupted_first_opening_left_is_no_hindrance(tmp_path: Path):
    (tmp_path / ".j.partial").write_bytes(b"edge")
    opened(tmp_path / "j").append(b"one")
    assert [p.name for p in tmp_path.iterdir()] == ["j"]


def test_zeros_behind_the_end_are_no_records(tmp_path: Path):
    """As a file system leaves them that kept a file's length, not its content."""
    path = tmp_path / "j"
    path.write_bytes(by_hand([b"one"]) + bytes(4096))
    journal = opened(path)
    assert payloads(journal) == [b"one"]
    assert journal.dropped == 4096


def test_a_record_that_rots_after_opening_is_told(tmp_path: Path):
    journal = opened(tmp_path / "j")
    journal.extend([b"one", b"two"])
    journal.path.write_bytes(flipped(journal.path.read_bytes(), 16 + 16 + 3 + 16, 0))
    with pytest.raises(IntegrityError, match="byte 35 was damaged"):
        list(journal.records())


def test_a_length_beyond_the_bound_is_no_record(tmp_path: Path):
    fields = b"rec\x00" + struct.pack("<LL", MAX_PAYLOAD_BYTES + 1, 0)
    path = tmp_path / "j"
    path.write_bytes(by_hand([b"one"]) + fields + struct.pack("<L", zlib.crc32(fields)))
    assert payloads(opened(path)) == [b"one"]


def test_a_payload_beyond_the_bound_is_refused_and_nothing_written(tmp_path: Path):
    journal = opened(tmp_path / "j")
    with pytest.raises(DataError, match=r"16777217 bytes; at most 16777216"):
        journal.extend([b"fits", bytes(MAX_PAYLOAD_BYTES + 1)])
    assert payloads(opened(tmp_path / "j")) == []


def test_a_closed_journal_takes_nothing_and_is_still_read(tmp_path: Path):
    journal = opened(tmp_path / "j")
    journal.append(b"one")
    journal.close()
    with pytest.raises(ConfigError, match="is closed"):
        journal.append(b"two")
    assert payloads(journal) == [b"one"]


def test_a_file_of_another_kind_is_left_alone(tmp_path: Path):
    path = tmp_path / "j"
    path.write_bytes(b"somebody else's, and longer than a header")
    with pytest.raises(IntegrityError, match="expected a journal of version 1"):
        opened(path)
    assert path.read_bytes().startswith(b"somebody")


def test_a_folder_that_is_not_there_is_a_resource_error(tmp_path: Path):
    with pytest.raises(ResourceError, match="No such file or directory"):
        opened(tmp_path / "nowhere" / "j")
