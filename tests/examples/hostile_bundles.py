"""Bundles that lie, and the exit code that a program owes them.

An edit takes the file's bytes and returns others. `seal` has to follow an edit of goldens.npz, so
that sizes and hashes fit again.
"""

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Edit = Callable[[bytes], bytes]
CONFIG, INTEGRITY = 2, 6
DELETE = object()
LOCAL_OFFSET = 42  # within an entry of a zip's directory
PACKED_SIZE, SIZE = 20, 24


def put(path: str, value: Any) -> Edit:
    """Set one value of a manifest; `path` is like "inputs/0/dtype"."""

    def edit(data: bytes) -> bytes:
        manifest = json.loads(data)
        *parents, last = (int(k) if k.isdigit() else k for k in path.split("/"))
        place = manifest
        for key in parents:
            place = place[key]
        if value is DELETE:
            del place[last]
        else:
            place[last] = value
        return json.dumps(manifest).encode()

    return edit


MANIFESTS: dict[str, tuple[Edit, int]] = {
    "empty": (lambda _: b"", INTEGRITY),
    "cut off": (lambda data: data[: len(data) // 2], INTEGRITY),
    "no object": (lambda _: b"[1]", INTEGRITY),
    "more after it": (lambda data: data + b"{}", INTEGRITY),
    "no UTF-8": (lambda data: data.replace(b'"colors"', b'"\xff"'), INTEGRITY),
    "surrogate in UTF-8": (lambda data: data.replace(b'"colors"', b'"\xed\xa0\x80"'), INTEGRITY),
    "too large": (lambda data: data + b" " * 2**22, INTEGRITY),
    "other schema": (put("schema_version", 2), INTEGRITY),
    "no labels": (put("labels", []), INTEGRITY),
    "labels of a number": (put("labels", [1, 2, 3]), INTEGRITY),
    "another label": (put("labels", ["red", "green", "blue", "grey"]), INTEGRITY),
    "unknown task": (put("task", "object-detection"), CONFIG),
    "other input": (put("inputs", []), INTEGRITY),
    "input of another type": (put("inputs/0/dtype", "float32"), INTEGRITY),
    "no output": (put("outputs", [1]), INTEGRITY),
    "no session": (put("session", DELETE), INTEGRITY),
    "no threads": (put("session/intra_op_threads", 0), INTEGRITY),
    "half a thread": (put("session/intra_op_threads", 1.5), INTEGRITY),
    "too many threads": (put("session/intra_op_threads", 10**9), INTEGRITY),
    "unknown optimization": (put("session/graph_optimization", "__proto__"), INTEGRITY),
    "config of numbers": (put("session/config", {"a": 1}), INTEGRITY),
    "config that onnxruntime refuses": (put("session/config", {"": "1"}), INTEGRITY),
    "another provider": (put("session/execution_providers", ["CUDAExecutionProvider"]), CONFIG),
    "newer onnxruntime": (put("compatibility/onnxruntime_min", "99.0.0"), CONFIG),
    "calibration without a temperature": (put("calibration", {"samples": 40}), INTEGRITY),
    "temperature of 0": (put("calibration", {"temperature": 0}), INTEGRITY),
    "temperature as text": (put("calibration", {"temperature": "2"}), INTEGRITY),
    "calibration of a list": (put("calibration", [2]), INTEGRITY),
    "threshold above 1": (put("abstention", {"threshold": 1.5}), INTEGRITY),
    "negative count": (put("goldens/count", -1), INTEGRITY),
    "count of a billion": (put("goldens/count", 10**9), INTEGRITY),
    "more goldens than stored": (put("goldens/count", 3), INTEGRITY),
    "tolerance as text": (put("goldens/tolerance", "1"), INTEGRITY),
    "negative tolerance": (put("goldens/tolerance", -1), INTEGRITY),
    "a file outside": (put("files", {"../weights.bin": {"size": 1}}), INTEGRITY),
    "a file that is not there": (put("files/other.bin", {"size": 1}), INTEGRITY),
    "another size": (put("files/weights.bin/size", 1), INTEGRITY),
    "no size": (put("files/weights.bin", "36"), INTEGRITY),
    "goldens that are not listed": (put("files/goldens.npz", DELETE), INTEGRITY),
}
# what Python's and C's readers refuse and JavaScript's JSON.parse does not
STRICT_JSON: dict[str, Edit] = {
    "a repeated key": lambda data: data.replace(b'"name"', b'"release": 1, "name"', 1),
    "half a surrogate pair": put("name", "\ud800"),
    "a zero character": put("name", "a\0b"),
    "too large a number": lambda data: data.replace(b"0.001", b"1e999"),
    "deep arrays": lambda data: data.replace(b'"colors"', b"[" * 100000 + b"]" * 100000),
}


def arrays_of(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def with_arrays(**changes: Any) -> Edit:
    """Store other arrays; None drops one."""

    def edit(data: bytes) -> bytes:
        arrays = arrays_of(data) | changes
        stored = io.BytesIO()
        np.savez(stored, **{k: v for k, v in arrays.items() if v is not None})
        return stored.getvalue()

    return edit


def compressed(data: bytes) -> bytes:
    stored = io.BytesIO()
    np.savez_compressed(stored, **arrays_of(data))
    return stored.getvalue()


def with_member(name: str, change: Edit) -> Edit:
    """Change the bytes of one .npy file; its CRC-32 is right."""

    def edit(data: bytes) -> bytes:
        written = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(written, "w") as new:
            for member in old.namelist():
                content = old.read(member)
                new.writestr(member, change(content) if member == f"{name}.npy" else content)
        return written.getvalue()

    return edit


def twice(data: bytes) -> bytes:
    stored = io.BytesIO(data)
    with warnings.catch_warnings(), zipfile.ZipFile(stored, "a") as archive:
        warnings.simplefilter("ignore")  # zipfile says that the name is there already
        archive.writestr("logits.npy", archive.read("logits.npy"))
    return stored.getvalue()


def patch_directory(offset: int, value: int) -> Edit:
    """Overwrite a 32-bit number in each entry of the zip's directory."""

    def edit(data: bytes) -> bytes:
        changed = bytearray(data)
        at = data.index(b"PK\x01\x02")
        while at >= 0:
            struct.pack_into("<I", changed, at + offset, value)
            at = data.find(b"PK\x01\x02", at + 1)
        return bytes(changed)

    return edit


def both(first: Edit, second: Edit) -> Edit:
    return lambda data: second(first(data))


def flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def header(old: bytes, new: bytes) -> Edit:
    """Change the logits' .npy header, its length kept."""
    assert len(old) == len(new)
    return with_member("logits", lambda data: data.replace(old, new))


# what the tiny bundles of colors then answer: softmax of (8, 0, 0) / 2 is 1 / (1 + 2 e^-4) = 0.965
# for red, of (3, 1, 2) / 2 it is 1 / (1 + e^-1 + e^-0.5) = 0.506; the second is below the threshold
CALIBRATION = {"temperature": 2.0, "ece_before": 0.1, "ece_after": 0.05, "samples": 40}
ABSTENTION = {"threshold": 0.6, "accuracy": 0.9, "low": 0.91, "coverage": 0.8, "samples": 40}
CALIBRATED_LINES = [
    "golden 0: label red score 0.96, largest difference 0",
    "golden 1: label red score 0.51 (abstained), largest difference 0",
    "2 goldens, every logit within 0.001",
]

COLOR_LOGITS = np.float32([[8, 0, 0], [3, 1, 2]])
COLOR_GOLDENS: dict[str, Edit] = {
    "empty": lambda _: b"",
    "no zip": lambda _: b"logits",
    "cut off": lambda data: data[: len(data) // 2],
    "cut off by one byte": lambda data: data[:-1],
    "compressed": compressed,
    "no logits": with_arrays(logits=None),
    "logits twice": twice,
    "logits of float64": with_arrays(logits=COLOR_LOGITS.astype(np.float64)),
    "logits of the other byte order": with_arrays(logits=COLOR_LOGITS.astype(">f4")),
    "logits by columns": with_arrays(logits=np.asfortranarray(COLOR_LOGITS)),
    "logits of one row": with_arrays(logits=COLOR_LOGITS[:1]),
    "logits of one axis": with_arrays(logits=COLOR_LOGITS.ravel()),
    "no pixels": with_arrays(input_1=None),
    "pixels with alpha": with_arrays(input_1=np.zeros((2, 2, 4), np.uint8)),
    "pixels without any": with_arrays(input_1=np.zeros((0, 2, 3), np.uint8)),
    "members outside of the file": patch_directory(LOCAL_OFFSET, 2**32 - 1),
    "members that end outside": both(
        patch_directory(SIZE, 2**31), patch_directory(PACKED_SIZE, 2**31)
    ),
    "a damaged pixel": lambda data: data.replace(b"\x03\x01\x02PK", b"\x03\x01\x03PK"),
    "npy of no magic": with_member("logits", lambda data: b"?" + data[1:]),
    "npy that ends early": with_member("logits", lambda data: data[:9]),
    "header that is too long": with_member("logits", lambda d: d[:8] + b"\xff\xff" + d[10:]),
    "header without an end": header(b"}", b" "),
    "shape of a negative": header(b"(2, 3)", b"(-2,3)"),
    "shape beyond the data": header(b"(2, 3)", b"(9, 3)"),
    "shape that overflows": header(b"(2, 3), }" + b" " * 21, b"(9223372036854775807, 3), }   "),
}
WORD_GOLDENS: dict[str, Edit] = {
    "no ids": with_arrays(ids_1=None),
    "ids of int32": with_arrays(ids_1=np.int32([2, 3])),
    "ids of two axes": with_arrays(ids_1=np.int64([[2, 3]])),
    "ids without any": with_arrays(ids_1=np.int64([])),
    "more ids than max_length": with_arrays(ids_1=np.full(7, 2, np.int64)),
}
# what a reader has to take
FRIENDLY_GOLDENS: dict[str, Edit] = {
    "a comment": lambda data: data[:-2] + b"\x05\0hello",
    "npy version 2": with_member(
        "logits", lambda d: d[:6] + b"\x02\0" + d[8:10] + b"\0\0" + d[10:]
    ),
    "an array more": with_arrays(other=np.float64(1)),
}


def mutants(folder: Path, seed: int, count: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield `count` pairs of manifest.json and goldens.npz; one of the two has damaged bytes.

    A manifest states the length of what it comes with.
    """
    rng = np.random.default_rng(seed)
    originals = [(folder / name).read_bytes() for name in ("manifest.json", "goldens.npz")]
    for number in range(count):
        files = [bytearray(data) for data in originals]
        victim = files[number % 2]
        for place in rng.integers(0, len(victim), rng.integers(1, 4)):
            victim[place] = rng.choice([victim[place] ^ (1 << rng.integers(8)), 0, 255, ord("9")])
        yield bytes(files[0]), bytes(files[1])
