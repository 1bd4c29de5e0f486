"""Hypothesis strategies for bundles that somebody made to do harm.

A case is what JSON can hold, so that it can be sent to worker.py and kept in a file:

    {"form": "zip", "data": base64}
    {"form": "folder", "items": [[name, kind, payload], ...]}

Most begin as a good bundle, to which few things are done; then its hashes and its digest are put
right again, as an attacker would, so that what is wrong is reached.
"""

import base64
import copy
import functools
import hashlib
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

Files = dict[str, bytes]
Case = dict[str, Any]
Strategy = st.SearchStrategy

EDGE_INTEGERS = [
    0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE,
    0xFFFFFFFF, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**31), -(2**63),
]  # fmt: skip
NAMES = [
    b"", b".", b"..", b"/", b"/etc/passwd", b"../evil", b"..\\evil", b"a/b", b"a/",
    b"./weights.bin", b"C:\\evil", b"\\\\host\\share", b"weights.bin\0.txt", b"\0",
    b"model.onnx ", b" model.onnx", b"model.onnx.", b"Model.onnx", b"MODEL.ONNX",
    b"MANIFEST.JSON", b"manifest.json", b"weights.bin", b"con", b"NUL.txt", b"lpt1", b"aux.bin",
    b"-rf", b"~", b"$HOME", b"%00", b"a" * 128, b"a" * 129, b"a" * 65535, "\u0141.bin".encode(),
    "\u202egnp.exe".encode(), b"\xff\xfe", b"\xc0\xae\xc0\xae", b"\x1b[2J", b"a\nb",
    b"model.onnx:stream", b"._model.onnx", b"goldens.npz", b"tokenizer.json", b"bundle.zip",
]  # fmt: skip


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def digest(mapping: dict[str, Any]) -> str:
    """Return the digest that goes with a manifest, by the page that describes the format."""
    rest = {k: v for k, v in mapping.items() if k != "digest"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def sealed(files: Files, mapping: dict[str, Any] | None = None) -> Files:
    """Return the files with a manifest whose sizes, hashes and digest are theirs."""
    mapping = json.loads(files["manifest.json"]) if mapping is None else dict(mapping)
    if isinstance(mapping.get("files"), dict):
        mapping["files"] = {
            **{
                name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in files.items()
                if name != "manifest.json"
            }
        }
    mapping["digest"] = digest(mapping)
    return {**files, "manifest.json": json.dumps(mapping).encode()}


def read_folder(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def as_folder(files: Files) -> Case:
    return {
        "form": "folder",
        "items": [[name, "file", encoded(data)] for name, data in files.items()],
    }


def as_zip(files: Files) -> Case:
    return {"form": "zip", "data": encoded(Zip.of(files).build())}


# -- bytes ---------------------------------------------------------------------------------------


@st.composite
def mutated(draw: st.DrawFn, data: bytes, *, most: int = 4) -> bytes:
    """Flip, cut, splice, repeat and overwrite."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, len(changed)))
        end = min(len(changed), place + draw(st.integers(0, 40)))
        match draw(st.integers(0, 6)):
            case 0 if place < len(changed):
                changed[place] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del changed[place:]
            case 2:
                del changed[place:end]
            case 3:
                changed[place:end] = draw(st.binary(max_size=8))
            case 4:  # from elsewhere
                start = draw(st.integers(0, len(changed)))
                changed[place:place] = changed[start : start + draw(st.integers(1, 200))]
            case 5:
                value = draw(st.sampled_from(EDGE_INTEGERS)) & 2**64 - 1
                width = draw(st.sampled_from([1, 2, 4, 8]))
                changed[place : place + width] = value.to_bytes(8, "little")[:width]
            case _:
                changed[place:end] = changed[place:end] * draw(st.integers(2, 5))
    return bytes(changed)


# -- zips ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file in a zip, and all that its two headers say of it; None is the truth."""

    data: bytes
    name: bytes
    local_name: bytes | None = None
    method: int = 0
    local_method: int | None = None
    flags: int = 0
    local_flags: int | None = None
    crc: int | None = None
    local_crc: int | None = None
    size: int | None = None
    local_size: int | None = None
    packed: int | None = None
    local_packed: int | None = None
    extra: bytes = b""
    local_extra: bytes | None = None
    comment: bytes = b""
    disk: int = 0
    made_by: int = 3 << 8 | 20
    needed: int = 20
    attributes: int = 0o100644 << 16
    header: int | None = None
    gap: bytes = b""
    descriptor: bytes = b""
    name_length: int | None = None
    local_name_length: int | None = None
    extra_length: int | None = None
    local_extra_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Zip:
    """A zip, and all that its end says of it; None is the truth."""

    entries: tuple[Entry, ...]
    prefix: bytes = b""
    suffix: bytes = b""
    comment: bytes = b""
    comment_length: int | None = None
    disk: int = 0
    start_disk: int = 0
    count_here: int | None = None
    count: int | None = None
    directory_size: int | None = None
    directory_start: int | None = None
    before_directory: bytes = b""
    after_directory: bytes = b""

    @staticmethod
    def of(files: Files) -> "Zip":
        return Zip(entries=tuple(Entry(name=n.encode(), data=d) for n, d in files.items()))

    def build(self) -> bytes:
        body = bytearray(self.prefix)
        directory = bytearray()
        for entry in self.entries:
            body += entry.gap
            here = len(body)
            raw = deflated(entry.data) if entry.method == 8 else entry.data
            truth = (checksum(entry.data), len(raw), len(entry.data))
            stated = [
                _said(said, true)
                for said, true in zip((entry.crc, entry.packed, entry.size), truth, strict=True)
            ]
            local = [
                _said(said, true)
                for said, true in zip(
                    (entry.local_crc, entry.local_packed, entry.local_size), stated, strict=True
                )
            ]
            name = _said(entry.local_name, entry.name)
            extra = _said(entry.local_extra, entry.extra)
            body += struct.pack(
                "<4s5H3L2H", b"PK\3\4", entry.needed & 0xFFFF,
                _said(entry.local_flags, entry.flags) & 0xFFFF,
                _said(entry.local_method, entry.method) & 0xFFFF, 0, 0x21,
                *(n & 0xFFFFFFFF for n in local),
                _said(entry.local_name_length, len(name)) & 0xFFFF,
                _said(entry.local_extra_length, len(extra)) & 0xFFFF,
            )  # fmt: skip
            body += name + extra + raw + entry.descriptor
            directory += struct.pack(
                "<4s6H3L5H2L", b"PK\1\2", entry.made_by & 0xFFFF, entry.needed & 0xFFFF,
                entry.flags & 0xFFFF, entry.method & 0xFFFF, 0, 0x21,
                *(n & 0xFFFFFFFF for n in stated),
                _said(entry.name_length, len(entry.name)) & 0xFFFF,
                _said(entry.extra_length, len(entry.extra)) & 0xFFFF,
                len(entry.comment) & 0xFFFF, entry.disk & 0xFFFF, 0,
                entry.attributes & 0xFFFFFFFF, _said(entry.header, here) & 0xFFFFFFFF,
            )  # fmt: skip
            directory += entry.name + entry.extra + entry.comment
        body += self.before_directory
        start = len(body)
        body += directory + self.after_directory
        count = len(self.entries)
        body += struct.pack(
            "<4s4H2LH", b"PK\5\6", self.disk & 0xFFFF, self.start_disk & 0xFFFF,
            _said(self.count_here, count) & 0xFFFF, _said(self.count, count) & 0xFFFF,
            _said(self.directory_size, len(directory)) & 0xFFFFFFFF,
            _said(self.directory_start, start) & 0xFFFFFFFF,
            _said(self.comment_length, len(self.comment)) & 0xFFFF,
        )  # fmt: skip
        return bytes(body + self.comment + self.suffix)


@functools.lru_cache(maxsize=64)
def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


@functools.lru_cache(maxsize=64)
def checksum(data: bytes) -> int:
    return zlib.crc32(data)


def _said(said: Any, true: Any) -> Any:
    return true if said is None else said


ZIP64_END = struct.pack(
    "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 2**40, 2**40
) + struct.pack("<4sLQL", b"PK\6\7", 0, 2**40, 1)
EXTRAS = [
    struct.pack("<HHQQ", 1, 16, 2**40, 2**40), struct.pack("<HHQQQ", 1, 24, 5, 5, 0),
    struct.pack("<HHBL", 0x7075, 12, 1, 0) + b"../evil", struct.pack("<HH", 0xD935, 4) + b"\0" * 4,
    struct.pack("<HH", 0xD935, 65535), b"\1\0\0", b"\0" * 4000, b"UT\5\0\1\0\0\0\0",
    struct.pack("<HH", 0x9901, 7) + b"\1\0AE\3\0\0",
]  # fmt: skip
integers = st.sampled_from(EDGE_INTEGERS) | st.integers(0, 2**16)
names = st.sampled_from(NAMES) | st.binary(max_size=12)
blobs = st.sampled_from([b"", b"\0", b"PK\3\4", b"PK\1\2", b"PK\5\6" + b"\0" * 18, ZIP64_END]) | (
    st.binary(max_size=30)
)
KINDS = [0o120777, 0o040755, 0o010644, 0o020644, 0o060644, 0o140755, 0o104755, 0o100000, 0]
ENTRY_FIELDS: dict[str, Strategy[Any]] = {
    "name": names, "local_name": names,
    "method": st.sampled_from([8, 9, 12, 14, 93, 95, 97, 98, 99, 1, 0xFFFF]),
    "local_method": st.sampled_from([8, 0xFFFF]),
    "flags": st.sampled_from([1, 8, 9, 0x40, 0x800, 0x2000, 0x2001, 0xFFFF]),
    "local_flags": st.sampled_from([1, 8, 0x800, 0xFFFF]),
    "crc": integers, "local_crc": integers, "size": integers, "local_size": integers,
    "packed": integers, "local_packed": integers,
    "extra": st.sampled_from(EXTRAS) | blobs, "local_extra": st.sampled_from(EXTRAS) | blobs,
    "comment": blobs, "disk": integers, "made_by": integers, "needed": integers,
    "attributes": st.sampled_from(KINDS).map(lambda kind: kind << 16)
    | st.sampled_from([0x10, 0x08, 0x20, 0xFFFFFFFF]),
    "header": integers, "gap": blobs,
    "descriptor": blobs | st.just(b"PK\7\10" + b"\0" * 12),
    "data": blobs, "name_length": integers, "local_name_length": integers,
    "extra_length": integers, "local_extra_length": integers,
}  # fmt: skip
END_FIELDS: dict[str, Strategy[Any]] = {
    "prefix": blobs | st.just(b"#!/bin/sh\n"), "suffix": blobs, "comment": blobs,
    "comment_length": integers, "disk": integers, "start_disk": integers, "count_here": integers,
    "count": integers, "directory_size": integers, "directory_start": integers,
    "before_directory": blobs, "after_directory": blobs | st.just(ZIP64_END),
}  # fmt: skip


@st.composite
def zips(draw: st.DrawFn, bundles: Sequence[Files]) -> Case:
    """A bundle's zip of which fields lie, and whose files are repeated, nested or out of order."""
    archive = Zip.of(draw(st.sampled_from(bundles)))
    for _ in range(draw(st.integers(1, 4))):
        entries = list(archive.entries)
        index = draw(st.integers(0, len(entries) - 1))
        match draw(st.integers(0, 11)):
            case 0:
                entries.insert(draw(st.integers(0, len(entries))), entries[index])
            case 1:
                entries.append(replace(entries[index], name=draw(names)))
            case 2 if len(entries) > 1:
                del entries[index]
            case 3:
                entries.reverse()
            case 4:
                entries.append(Entry(name=b"inner.zip", data=archive.build()))
            case 5:
                number = draw(st.sampled_from([60, 61, 64, 65, 300, 3000]))
                entries += [Entry(name=b"f%d" % i, data=b"") for i in range(number)]
            case 6 | 7:
                name = draw(st.sampled_from(sorted(END_FIELDS)))
                archive = replace(archive, **{name: draw(END_FIELDS[name])})
            case _:
                name = draw(st.sampled_from(sorted(ENTRY_FIELDS)))
                entries[index] = replace(entries[index], **{name: draw(ENTRY_FIELDS[name])})
        archive = replace(archive, entries=tuple(entries))
    return {"form": "zip", "data": encoded(archive.build())}


def damaged_zips(bundles: Sequence[Files]) -> Strategy[Case]:
    """A good zip with some of its bytes changed, most often where its headers are."""
    whole = [Zip.of(files).build() for files in bundles]
    ends = [data[data.index(b"PK\1\2") :] for data in whole]

    def of(index: int) -> Strategy[bytes]:
        start = whole[index][: -len(ends[index])]
        return mutated(whole[index]) | mutated(ends[index]).map(lambda end: start + end)

    return (
        st.sampled_from(range(len(whole)))
        .flatmap(of)
        .map(lambda data: {"form": "zip", "data": encoded(data)})
    )


# -- manifests -----------------------------------------------------------------------------------

STRINGS = [
    "", "\0", "\n", "\ud800", "\udcff", "\x1b[2J", "../x", "/etc/passwd", "a" * 10**5, "9" * 5000,
    "1." + "9" * 5000, "nan", "\u0663.\u0664", "-1", "1e999", "CPUExecutionProvider",
    "AzureExecutionProvider", "TensorrtExecutionProvider", "\u202e", "\ufeff", "{}", "image",
    "logits", "text-classification", "image-classification",
]  # fmt: skip
NUMBERS = [
    *EDGE_INTEGERS, 10**400, -(10**400), 10**4200, 0.0, -0.0, 0.5, 1.0, 1e308, -1e308, 5e-324, 1024,
    1025, 2**20, 2**31,
]  # fmt: skip
scalars: Strategy[Any] = (
    st.sampled_from(STRINGS)
    | st.sampled_from(NUMBERS)
    | st.none()
    | st.booleans()
    | st.text(max_size=8)
)
values: Strategy[Any] = (
    scalars
    | st.lists(scalars, max_size=3)
    | st.dictionaries(st.sampled_from(STRINGS) | st.text(max_size=5), scalars, max_size=3)
    | st.sampled_from([[], {}, [[]], [{}], ["a"] * 10**4, list(range(5000))])
)
# text put into the file, which no parsed value could be written as
TEXTS = [
    '"x": ' + "[" * 40 + "]" * 40, '"x": ' + "[" * 10**5, '"x": ' + "[" * 10**5 + "]" * 10**5,
    '"x": NaN', '"x": -Infinity', '"x": 1e999', '"x": ' + "1" * 5000, '"x": -' + "9" * 10**5,
    '"x": 0.' + "1" * 10**5, '"x": 1, "x": 2', '"name": "again"', '"release": 01', '"x": "\\ud800"',
    '"x": "\\u0000"', '"x": "\t"', "'x': 1", "x: 1", '"x": 1,', "// no", '"x": ' + "-" * 1000,
    '"x": [' + "{}," * 200_000 + "0]", '"x": [' + "0," * 10**5 + "0]", '"' + "k" * 10**6 + '": 1',
    "".join(f'"k{i}": 1, ' for i in range(20_000)) + '"x": 1', '"__class__": "os.system"',
    '"x": {"$ref": "file:///etc/passwd"}', '"schema_version": 1',
]  # fmt: skip


@st.composite
def manifests(draw: st.DrawFn, bundles: Sequence[Files]) -> Case:
    """A good bundle whose manifest has other values, more keys, or is no JSON any more."""
    files = draw(st.sampled_from(bundles))
    mapping = json.loads(files["manifest.json"])
    for _ in range(draw(st.integers(0, 3))):
        _change(draw, mapping, values)
    if draw(st.booleans()) and isinstance(mapping.get("files"), dict):
        entry = {"size": 0, "sha256": "0" * 64}
        name = draw(names).decode(errors="replace")
        mapping["files"][name] = {**entry, "size": draw(st.sampled_from(NUMBERS))}
    mapping["digest"] = digest(mapping)
    data = json.dumps(mapping).encode()
    match draw(st.integers(0, 9)):
        case 0 | 1 | 2:
            text = draw(st.sampled_from(TEXTS)).encode()
            data = data.replace(b"{", b"{" + text + b", ", 1)
        case 3:
            text = draw(st.sampled_from(TEXTS)).encode()
            data = data.replace(b'"options": {', b'"options": {' + text, 1)
        case 4:
            data = draw(mutated(data))
        case 5:
            data = draw(st.sampled_from([b"\xef\xbb\xbf", b" " * 10**6, b"\0"])) + data
        case 6:
            codec = draw(st.sampled_from(["utf-16", "utf-32", "utf-16-be"]))
            data = data.decode().encode(codec)
        case _:
            pass
    form = draw(st.sampled_from([as_folder, as_zip]))
    return form({**files, "manifest.json": data})


def _change(draw: st.DrawFn, mapping: Any, replacements: Strategy[Any]) -> None:
    """Change a value, anywhere in a tree of dicts and lists, in place."""
    spot, key = {"": mapping}, ""
    while isinstance(spot[key], dict | list) and spot[key] and draw(st.integers(0, 3)):
        spot = spot[key]
        keys: list[Any] = sorted(spot) if isinstance(spot, dict) else list(range(len(spot)))
        key = draw(st.sampled_from(keys))
    if spot is None or key == "":
        return
    match draw(st.integers(0, 6)):
        case 0:
            del spot[key]
        case 1 if isinstance(spot, dict):
            new = draw(st.sampled_from(STRINGS) | st.text(max_size=6))
            spot[new] = copy.deepcopy(spot[key])
        case 2 if isinstance(spot, list):
            spot.append(copy.deepcopy(spot[key]))
        case _:
            spot[key] = copy.deepcopy(draw(replacements))  # it may be changed in its turn


# -- folders -------------------------------------------------------------------------------------

LINKS = [
    "BOX/sentinel.txt", "/etc/passwd", "/dev/zero", "/dev/stdin", "model.onnx", "weights.bin", ".",
    "..", "gone", "/proc/self/mem", "BOX/bundle/model.onnx",
]  # fmt: skip
ODD_NAMES = [
    ".hidden", "con", "a b", "\u0142", "a\nb", "\x1b[2J", "\udcff\udcfe", "x" * 255, "Model.onnx",
    "manifest.json~", "weights.bin.part",
]  # fmt: skip


@st.composite
def folders(draw: st.DrawFn, bundles: Sequence[Files]) -> Case:
    """A folder in which something lies that is no plain file, or nothing, or a great deal."""
    case = as_folder(draw(st.sampled_from(bundles)))
    items = case["items"]
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, len(items) - 1))
        name = items[index][0] if draw(st.booleans()) else draw(st.sampled_from(ODD_NAMES))
        kind = draw(
            st.sampled_from(
                ["link", "hard link", "fifo", "socket", "folder", "unreadable", "sparse", "many",
                 "file", "gone"]
            )
        )  # fmt: skip
        payload: Any = None
        if kind == "link":
            payload = draw(st.sampled_from(LINKS))
        elif kind == "sparse":
            payload = draw(st.sampled_from([0, 36, 2**22 + 1, 2**30 + 1, 2**40]))
        elif kind == "many":
            name, payload = "n", draw(st.sampled_from([60, 3000]))
        elif kind == "file":
            payload = encoded(draw(st.binary(max_size=40)))
        items[:] = [item for item in items if item[0] != name]
        if kind != "gone" or not items:
            items.append([name, kind if kind != "gone" else "folder", payload])
    return case


@st.composite
def vast(draw: st.DrawFn, bundles: Sequence[Files]) -> Case:
    """A folder with files whose size is a claim: the manifest says it and so does the disk."""
    files = draw(st.sampled_from(bundles))
    mapping = json.loads(files["manifest.json"])
    name = draw(st.sampled_from(sorted(mapping["files"])) | st.just("extra.bin"))
    sizes = [2**36 + 1, 2**42, 2**63 - 2**20, 2**64]
    # weights of a gibibyte are a bundle's good right, and hashing them takes seconds
    if name not in ("weights.bin", "goldens.npz"):
        sizes.append(2**30 + 1)
    size = draw(st.sampled_from(sizes))
    mapping["files"][name] = {"size": size, "sha256": "0" * 64}
    mapping["digest"] = digest(mapping)
    case = as_folder({**files, "manifest.json": json.dumps(mapping).encode()})
    case["items"] = [item for item in case["items"] if item[0] != name] + [
        [name, "sparse", min(size, 2**42)]
    ]
    return case


# -- graphs --------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    digits = bytearray()
    value &= 2**64 - 1
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def message(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def nested(path: Sequence[int], core: bytes, depth: int) -> bytes:
    """Put `core` into messages of the fields `path`, `depth` times."""
    for _ in range(depth):
        for number in reversed(path):
            core = message(number, core)
    return core


def external(entries: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A float tensor of shape (3, 3) whose values are elsewhere."""
    listed = b"".join(message(13, message(1, k) + message(2, v)) for k, v in entries)
    return b"\x08\x03\x08\x03\x10\x01" + message(8, b"identity") + listed + b"\x70\x01"


KEYS = [
    b"location",
    b"offset",
    b"length",
    b"checksum",
    b"basepath",
    b"prepacked_0",
    b"",
    b"Location",
]
PLACES = [
    b"weights.bin", b"../sentinel.txt", b"/etc/passwd", b"./weights.bin", b"weights.bin\0", b"",
    b".", b"*/_ORT_MEM_ADDR_/*", b"manifest.json", b"goldens.npz", b"bundle.zip", b"\xff", b"0",
    b"36", b"-1",
    b"1" * 5000, b"18446744073709551615", b"9223372036854775807", b" 1", b"0x10", "\u0663".encode(),
    b"location",
]  # fmt: skip


@st.composite
def pieces(draw: st.DrawFn) -> bytes:
    """Some bytes to be put at the end of a model: protobuf merges them into what is there."""
    tensor = external(
        draw(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(PLACES)), max_size=4))
    )
    depth = draw(st.sampled_from([1, 2, 30, 70, 500]))
    attribute = message(1, b"value") + message(5, tensor) + b"\xa0\x01\x04"
    node = message(2, b"c") + message(4, b"Constant")
    return draw(
        st.sampled_from(
            [
                message(7, message(5, tensor)),
                message(7, message(1, node + message(5, attribute))),
                # one attribute with two tensors, which a reader merges
                message(7, message(1, node + message(5, attribute + message(5, tensor)))),
                message(7, nested([1, 5, 6], message(5, tensor), depth)),
                message(7, nested([1, 5, 6], b"", depth)),
                message(7, message(15, message(1, tensor) + message(2, tensor))),
                message(20, message(1, message(5, tensor))),
                message(25, message(1, b"F") + message(7, node)),
                message(8, message(1, b"com.evil") + b"\x10\x01"),
                message(8, message(1, b"com.microsoft") + b"\x10\x01"),
                message(8, b"\x0a\xff\xff\xff\xff\x0f"),
                message(14, message(1, b"ort_config") + message(2, b'{"session_options":{}}')),
                varint(7 << 3 | 2) + varint(2**63 - 1),
                varint(7 << 3 | 2) + b"\xff" * 11,
                varint(9 << 3 | 3) + message(1, b"location") + varint(9 << 3 | 4),
                message(7, message(5, b"location" * 2000)),
                message(7, b"\x0a\x00" * 20_000),
            ]
        )
    )


@st.composite
def graphs(draw: st.DrawFn, bundles: Sequence[Files]) -> Case:
    """A good bundle with a hostile graph, or weights of another size."""
    files = dict(draw(st.sampled_from(bundles)))
    graph = files["model.onnx"]
    match draw(st.integers(0, 5)):
        case 0 | 1:
            graph = draw(mutated(graph))
        case 2 | 3:
            graph += draw(pieces())
        case 4:
            graph = draw(pieces()) + draw(st.sampled_from([b"", graph]))
        case _:
            graph = draw(
                st.sampled_from(
                    [b"\x08\x00\x00\x00ORTM" + graph, b"", b"\x12\x80\x80\x01ORTM" + graph]
                )
            )
    files["model.onnx"] = graph
    if draw(st.integers(0, 5)) == 0:
        files["weights.bin"] = draw(st.binary(max_size=50))
    return draw(st.sampled_from([as_folder, as_zip]))(sealed(files))


# -- goldens -------------------------------------------------------------------------------------


BOMB = bytes(2**26)
MANY = tuple(Entry(name=b"a%d.npy" % i, data=b"") for i in range(5000))


class Harm:
    """Would run a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        import os

        return os.system, ("touch ../harm",)


SHAPES = [
    "()", "(2, 3)", "(2, 2)", "(1, 1, 3)", "(2**40,)", f"({2**40},)", f"({2**62}, {2**62})",
    "(-1,)", "(0,)", f"({2**31},)", "(True,)", "(1.5,)", "'a'", "(" * 150 + ")" * 150,
    "(0, 99999999999)",
]  # fmt: skip
TYPES = [
    "'<f4'", "'|u1'", "'<U4'", "'<U500000000'", "'|O'", "'|V2147483647'", "'|V0'", "'<M8[ns]'",
    "'<c16'", "'|S3'", "'U'", "[('a', '<f4')]", "[('a', '|O')]", "'f4,' * 999", "['a']", "{}",
    "'>f4'", "{'names': ['a'], 'formats': ['O']}", "('<f4', (99999, 99999))", "'__import__'",
]  # fmt: skip
HEADERS = [
    "__import__('os').system('touch harm')", "{" * 3000, "-" * 9000 + "1", "(" * 5000, "",
    "\0" * 50, "{'descr': '<f4'}", "{'descr': '<f4', 'fortran_order': 1, 'shape': ()}", "[1]",
    "9" * 9000, "{'a':" * 90 + "1" + "}" * 90, "'" * 9999,
]  # fmt: skip


@st.composite
def arrays(draw: st.DrawFn) -> bytes:
    """What is in a file ending in .npy: an array whose header lies, or no array."""
    if draw(st.integers(0, 4)) == 0:
        return draw(
            st.sampled_from([b"", b"/etc/passwd", pickle.dumps(Harm()), b"\x93NUMPY", b"PK\3\4"])
        )
    order = draw(st.sampled_from(["True", "False"]))
    header = draw(
        st.sampled_from(HEADERS)
        | st.tuples(st.sampled_from(TYPES), st.sampled_from(SHAPES)).map(
            lambda t: f"{{'descr': {t[0]}, 'fortran_order': {order}, 'shape': {t[1]}}}"
        )
    ).encode()
    version = draw(st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]))
    length = len(header) if draw(st.integers(0, 5)) else draw(st.sampled_from(EDGE_INTEGERS))
    size = (
        struct.pack("<H", length & 0xFFFF)
        if version == (1, 0)
        else struct.pack("<L", length & 0xFFFFFFFF)
    )
    body = (
        pickle.dumps(Harm()) if b"|O" in header else bytes(draw(st.sampled_from([0, 4, 24, 600])))
    )
    return b"\x93NUMPY" + bytes(version) + size + header + body


def written(array: Any) -> bytes:
    stored = io.BytesIO()
    np.save(stored, array)
    return stored.getvalue()


SAMPLES = [
    np.array("/etc/passwd"), np.array("good"), np.array("x" * 10**5), np.array(b"/etc/passwd"),
    np.array("\ud800"), np.array(""), np.float32(1), np.zeros((1, 1, 3), np.uint8), np.array(True),
    np.zeros((0, 3, 3), np.uint8), np.zeros((2, 2), np.uint8), np.zeros((1, 1, 4), np.uint16),
    np.zeros((1, 2, 3, 4), np.uint8), np.array("2000-01-01", "M8[D]"), np.array(1 + 2j),
]  # fmt: skip


@st.composite
def goldens(draw: st.DrawFn, bundles: Sequence[Files]) -> Case:
    """A good bundle with a hostile self-test."""
    files = dict(draw(st.sampled_from(bundles)))
    with zipfile.ZipFile(io.BytesIO(files["goldens.npz"])) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(
            st.sampled_from(["logits.npy", "input_0.npy", "input_1.npy", "logits", "input_9.npy"])
        )
        match draw(st.integers(0, 4)):
            case 0:
                members.pop(name, None)
            case 1:
                members[name] = written(draw(st.sampled_from(SAMPLES)))
            case 2:
                fill = draw(st.sampled_from([np.nan, np.inf, 3e38, 0.0]))
                shape = draw(st.sampled_from([(2, 3), (2, 2), (0, 3), (2, 0), (3,)]))
                members[name] = written(np.full(shape, fill, np.float32))
            case _:
                members[name] = draw(arrays())
    archive = Zip.of(members)
    match draw(st.integers(0, 15)):
        case 0:  # a bomb, that says so or does not
            entry = replace(archive.entries[0], method=8, data=BOMB)
            size = draw(st.sampled_from([None, 10, 2**28 + 1, 0xFFFFFFFF]))
            archive = replace(archive, entries=(replace(entry, size=size), *archive.entries[1:]))
        case 1:
            archive = replace(archive, entries=(*archive.entries, *MANY))
        case 2 | 3 | 4:
            chosen = draw(st.lists(st.sampled_from(sorted(ENTRY_FIELDS)), max_size=2))
            changed = {name: draw(ENTRY_FIELDS[name]) for name in chosen}
            entries = (replace(archive.entries[0], **changed), *archive.entries[1:])
            archive = replace(archive, entries=entries)
        case 5 | 6:
            name = draw(st.sampled_from(sorted(END_FIELDS)))
            archive = replace(archive, **{name: draw(END_FIELDS[name])})
        case 7 | 8:
            archive = replace(archive, entries=tuple(replace(e, method=8) for e in archive.entries))
        case _:
            pass
    data = archive.build() if archive.entries else b""
    if draw(st.integers(0, 4)) == 0:
        data = draw(mutated(data))
    files["goldens.npz"] = data
    mapping = json.loads(files["manifest.json"])
    if draw(st.integers(0, 5)) == 0:
        count = draw(st.sampled_from([0, 1, 3, 10**6, 2**62]))
        mapping["goldens"] = {"count": count, "tolerance": draw(st.sampled_from([0, 1e-3, 1e308]))}
    if draw(st.integers(0, 9)) == 0:
        mapping["labels"] = draw(st.sampled_from([[], ["a"], [str(i) for i in range(999)]]))
    return draw(st.sampled_from([as_folder, as_zip]))(sealed(files, mapping))


# -- tokenizers ----------------------------------------------------------------------------------

PARTS: dict[str, list[Any]] = {
    "model": [
        {"type": "WordLevel", "vocab": {}, "unk_token": "[UNK]"},
        {"type": "WordLevel", "vocab": {"a": 0, "b": 0}, "unk_token": "a"},
        {"type": "WordLevel", "vocab": {"[UNK]": 2**32 - 1}, "unk_token": "[UNK]"},
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"], "unk_token": "x"},
        {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"],
         "byte_fallback": True},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 7.5},
        {"type": "Unigram", "vocab": [], "unk_id": 0},
        {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 9},
        {"type": "Unigram", "vocab": [["", 0.0], ["a", 1e308]], "unk_id": 0, "byte_fallback": True},
        {"type": "WordPiece", "vocab": {}, "unk_token": "x", "max_input_chars_per_word": 0,
         "continuing_subword_prefix": ""},
        {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "x",
         "max_input_chars_per_word": 2**63, "continuing_subword_prefix": "##"},
    ],
    "post_processor": [
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[NO]", "type_id": 0}}],
         "pair": [], "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "TemplateProcessing",
         "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}] * 9
         + [{"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
         "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}}},
        {"type": "BertProcessing", "sep": ["x", 2**32 - 1], "cls": ["y", 0]},
        {"type": "RobertaProcessing", "sep": ["", 0], "cls": ["", 0], "trim_offsets": True,
         "add_prefix_space": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Sequence", "processors": []},
    ],
    "normalizer": [
        {"type": "Precompiled", "precompiled_charsmap": ""},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        # a table of 2^32 - 1 entries is not here: tokenizers reserves its memory before it looks,
        # and ends the process where it gets none (README.md: what is not bounded)
        {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8A"},
        {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]},
        {"type": "Prepend", "prepend": "x" * 1000},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
         "strip_accents": None, "lowercase": True},
    ],
    "pre_tokenizer": [
        {"type": "Split", "pattern": {"Regex": "[" }, "behavior": "Removed", "invert": False},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": True},
        {"type": "FixedLength", "length": 0},
        {"type": "Digits", "individual_digits": True},
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "CharDelimiterSplit", "delimiter": "o"},
        {"type": "UnicodeScripts"},
    ],
    "truncation": [
        {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9},
        {"direction": "Left", "max_length": 2**63, "strategy": "OnlySecond", "stride": 2**63},
    ],
    "padding": [
        {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0,
         "pad_type_id": 0, "pad_token": "x"},
    ],
    "added_tokens": [
        [{"id": 2**32 - 1, "content": "", "single_word": False, "lstrip": False, "rstrip": False,
          "normalized": False, "special": True}],
        [{"id": 0, "content": "good", "single_word": True, "lstrip": True, "rstrip": True,
          "normalized": True, "special": False}] * 50,
    ],
    "version": ["0.0", "9.9", None],
}  # fmt: skip


@st.composite
def tokenizers(draw: st.DrawFn, bundle: Files) -> Case:
    """A good text bundle with a hostile tokenizer, or hostile options for it."""
    files = dict(bundle)
    tokenizer = json.loads(files["tokenizer.json"])
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            part = draw(st.sampled_from(sorted(PARTS)))
            tokenizer[part] = copy.deepcopy(draw(st.sampled_from(PARTS[part])))
        else:
            _change(draw, tokenizer, values)
    data = json.dumps(tokenizer).encode()
    if draw(st.integers(0, 4)) == 0:
        data = draw(mutated(data) | st.sampled_from([b"", b"[" * 10**5, b"null", b"\xff", b"{}"]))
    files["tokenizer.json"] = data
    mapping = json.loads(files["manifest.json"])
    if draw(st.integers(0, 3)) == 0:
        numbers = st.sampled_from([-1, 0, 1, 2, 6, 2**20, 2**20 + 1, 2**31, 2**63, 10**400])
        mapping["options"] = {"max_length": draw(numbers), "pad_id": draw(numbers)}
    return as_folder(sealed(files, mapping))


# -- all of it -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """Every kind of case, made from two good bundles; a good one of each must load."""

    colors: Files
    words: Files
    strategies: dict[str, Strategy[Case]] = field(init=False)

    def __post_init__(self) -> None:
        both = [self.colors, self.words]
        found = {
            "zips": zips(both),
            "damaged zips": damaged_zips(both),
            "manifests": manifests(both),
            "folders": folders(both),
            "vast files": vast(both),
            "graphs": graphs(both),
            "goldens": goldens(both),
            "tokenizers": tokenizers(self.words),
        }
        object.__setattr__(self, "strategies", found)

    @property
    def good(self) -> list[Case]:
        return [form(files) for files in (self.colors, self.words) for form in (as_folder, as_zip)]
