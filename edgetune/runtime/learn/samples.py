"""Labelled samples that a device was given, as records of its store's journal.

A record is one JSON line and, of a sample, its features behind it. What is effective of a
journal are the ranges that the live generation was made of, and what came after the last commit.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgetune.errors import IntegrityError

Float32Array = npt.NDArray[np.float32]
# "train" goes into the statistics, "holdout" judges them, "aside" is kept out with a reason
Role = Literal["train", "holdout", "aside"]
_ROLES = ("train", "holdout", "aside")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A labelled sample.

    id: of label and features, so that the same sample given twice is one. features: float32
    (d,), before projection. answer: what the factory state predicts. reason: why it is aside.
    """

    id: str
    label: str
    role: Role
    features: Float32Array
    answer: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Samples that are to be as if they had never been."""

    ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """A class that is to be no more."""

    label: str


@dataclass(frozen=True, kw_only=True)
class Merging:
    """Statistics of another device; see `statistics.dump`."""

    id: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Void:
    """What was given since the last commit is dropped, as a candidate with it was refused."""

    reason: str


Record = Sample | Removal | Forgetting | Merging | Void


def sample_id(label: str, features: Float32Array) -> str:
    """Return the id of a sample: 16 hex digits."""
    return hashlib.sha256(label.encode() + b"\0" + features.tobytes()).hexdigest()[:16]


def to_payload(record: Record) -> bytes:
    """Return a record's bytes."""
    match record:
        case Sample():
            head: dict[str, Any] = {
                "op": "sample", "id": record.id, "label": record.label, "role": record.role,
                "answer": record.answer, "reason": record.reason,
            }  # fmt: skip
            tail = record.features.astype("<f4").tobytes()
        case Removal():
            head, tail = {"op": "remove", "ids": list(record.ids)}, b""
        case Forgetting():
            head, tail = {"op": "forget", "label": record.label}, b""
        case Merging():
            head, tail = {"op": "merge", "id": record.id}, record.data
        case Void():
            head, tail = {"op": "void", "reason": record.reason}, b""
    return json.dumps(head, ensure_ascii=False).encode() + b"\n" + tail


def from_payload(payload: bytes, where: str) -> Record:
    """Return the record in those bytes.

    Raises:
        IntegrityError: they are none.
    """
    line, _, tail = payload.partition(b"\n")
    try:
        head = json.loads(line)
        op = head.pop("op")
        if op == "sample":
            features = np.frombuffer(tail, "<f4").astype(np.float32)
            if head["role"] not in _ROLES or not np.isfinite(features).all():
                raise ValueError("a sample of an unknown role, or of no numbers")
            return Sample(features=features, **head)
        if op == "remove":
            return Removal(ids=tuple(head["ids"]))
        if op == "forget":
            return Forgetting(**head)
        if op == "merge":
            return Merging(data=tail, **head)
        if op == "void":
            return Void(**head)
        raise ValueError(f"unknown operation {op!r:.80}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{where}: a record cannot be read: {error}") from error


def effective(
    records: Iterable[tuple[int, bytes]], ranges: Sequence[tuple[int, int]], where: str
) -> list[Record]:
    """Return the records that begin within one of the ranges, less what a `Void` behind voids.

    Raises:
        IntegrityError: one cannot be read.
    """
    kept: list[list[Record]] = [[] for _ in ranges]
    for offset, payload in records:
        for place, (begin, end) in enumerate(ranges):
            if begin <= offset < end:
                record = from_payload(payload, where)
                if isinstance(record, Void):
                    kept[place].clear()
                else:
                    kept[place].append(record)
    return [record for part in kept for record in part]
