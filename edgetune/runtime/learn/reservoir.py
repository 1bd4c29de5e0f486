"""A bounded memory of samples in which rare classes keep their place.

Class-balancing reservoir sampling (Chrysakis and Moens 2020, Online Continual Learning from
Imbalanced Data, algorithm 1), with a bound in bytes instead of samples.
"""

import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import IntegrityError
from edgetune.runtime.learn.latents import Labelled, labelled
from edgetune.runtime.npz import load_arrays

RESERVOIR_NAME = "reservoir.npz"
MAX_BYTES = 2**28
VERSION = 1


class Reservoir:
    """Samples up to a number of bytes; `offer` brings more.

    limit: in bytes of arrays. items: what is held. nbytes: their size. counts: how many of each
    label are held. seen: how many of each were offered. full: labels that once were the largest
    when there was no room left.
    """

    def __init__(self, limit: int, items: Iterable[Labelled] = ()) -> None:
        """Hold these, which may be too many: `shrink` drops some."""
        self.limit = limit
        self.items: list[Labelled] = []
        self.nbytes = 0
        self.counts: dict[str, int] = {}
        self.seen: dict[str, int] = {}
        self.full: set[str] = set()
        for item in items:
            self._hold(item)

    def copy(self) -> "Reservoir":
        """Return one that holds the same and changes on its own."""
        other = Reservoir(self.limit, self.items)
        other.seen, other.full = {**self.seen}, {*self.full}
        return other

    def offer(self, sample: Labelled, rng: np.random.Generator) -> bool:
        """Take a sample, or leave it out; return whether it was taken.

        While there is room, all are taken. Then one of a class that never was the largest takes
        the place of some of the largest class; another takes that of some of its own class, so
        that each sample of that class has had the same chance to be held.
        """
        label = sample.label
        self.seen[label] = self.seen.get(label, 0) + 1
        if sample.nbytes > self.limit:
            return False
        if self.nbytes + sample.nbytes > self.limit:
            most = max(self.counts.values())
            self.full |= {name for name, count in self.counts.items() if count == most}
            own = label in self.full
            if own and rng.random() >= self.counts.get(label, 0) / self.seen[label]:
                return False
            while self.nbytes + sample.nbytes > self.limit:
                # samples differ in size: its class may have none left to give
                self._evict(label if own and label in self.counts else self._largest(), rng)
        self._hold(sample)
        return True

    def shrink(self, rng: np.random.Generator) -> None:
        """Drop samples of the largest classes until the limit holds."""
        while self.nbytes > self.limit:
            self._evict(self._largest(), rng)

    def _hold(self, item: Labelled) -> None:
        self.items.append(item)
        self.nbytes += item.nbytes
        self.counts[item.label] = self.counts.get(item.label, 0) + 1

    def _largest(self) -> str:
        return max(sorted(self.counts), key=lambda name: self.counts[name])

    def _evict(self, label: str, rng: np.random.Generator) -> None:
        places = [i for i, item in enumerate(self.items) if item.label == label]
        item = self.items.pop(places[int(rng.integers(len(places)))])
        self.nbytes -= item.nbytes
        self.counts[label] -= 1
        if not self.counts[label]:
            del self.counts[label]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a device keeps of the samples it was given, to rehearse and to judge by.

    given: label -> how many samples of it there were. learned: those of them that were trained on.
    """

    train: Reservoir
    holdout: Reservoir
    given: dict[str, int]
    learned: dict[str, int]

    def copy(self) -> "Memory":
        """Return one that holds the same and changes on its own."""
        return Memory(
            train=self.train.copy(), holdout=self.holdout.copy(),
            given={**self.given}, learned={**self.learned},
        )  # fmt: skip


def empty_memory(limit: int, holdout_share: int) -> Memory:
    """Return a memory of `limit` bytes, one in `holdout_share` of them for the holdout."""
    kept = limit // holdout_share
    return Memory(train=Reservoir(limit - kept), holdout=Reservoir(kept), given={}, learned={})


def dump_memory(memory: Memory) -> bytes:
    """Return a memory's bytes."""
    parts = {"train": memory.train, "holdout": memory.holdout}
    head: dict[str, Any] = {
        "version": VERSION, "given": memory.given, "learned": memory.learned,
        **{
            name: {
                "labels": [item.label for item in part.items],
                "seen": part.seen,
                "full": sorted(part.full),
            }
            for name, part in parts.items()
        },
    }  # fmt: skip
    arrays: dict[str, Any] = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8)}
    for name, part in parts.items():
        arrays |= _pack(name, part.items)
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


def load_memory(data: bytes, limit: int, holdout_share: int, *, where: str) -> Memory:
    """Return the memory in those bytes, with limits of its own that may be smaller.

    Raises:
        IntegrityError: they are none.
    """
    try:
        arrays = load_arrays(data, MAX_BYTES)
        head = json.loads(arrays["head"].tobytes().decode())
        if head["version"] != VERSION:
            raise ValueError(f"version {head['version']!r:.20}, this edgetune reads {VERSION}")
        kept = limit // holdout_share
        memory = Memory(
            train=_read(arrays, head, "train", limit - kept),
            holdout=_read(arrays, head, "holdout", kept),
            given=_whole_numbers(head["given"]),
            learned=_whole_numbers(head["learned"]),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{where}: cannot be read: {error}") from error
    for part in (memory.train, memory.holdout):
        part.shrink(np.random.default_rng(0))
    return memory


def _read(
    arrays: Mapping[str, npt.NDArray[Any]], head: Mapping[str, Any], name: str, limit: int
) -> Reservoir:
    about = head[name]
    if not all(isinstance(x, str) for x in [*about["labels"], *about["full"]]):
        raise ValueError("a label that is no text")
    part = Reservoir(limit, _unpack(arrays, name, about["labels"]))
    part.seen, part.full = _whole_numbers(about["seen"]), set(about["full"])
    return part


def _pack(name: str, items: Iterable[Labelled]) -> dict[str, npt.NDArray[Any]]:
    """Return arrays of any shapes one after the other, and their shapes."""
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    for item in items:
        for key, array in item.arrays.items():
            columns.setdefault(key, []).append(array)
    packed = {}
    for key, values in columns.items():
        packed[f"{name}_values_{key}"] = np.concatenate([v.ravel() for v in values])
        packed[f"{name}_shapes_{key}"] = np.array([v.shape for v in values], np.int32)
    return packed


def _unpack(arrays: Mapping[str, npt.NDArray[Any]], name: str, labels: list[str]) -> list[Labelled]:
    prefix = f"{name}_values_"
    columns = {}
    for key in (k.removeprefix(prefix) for k in arrays if k.startswith(prefix)):
        joined, shapes = arrays[prefix + key], arrays[f"{name}_shapes_{key}"]
        if shapes.ndim != 2 or len(shapes) != len(labels) or shapes.dtype.kind != "i":
            raise ValueError(f"{key}: expected a shape for each of {len(labels)} samples")
        if joined.ndim != 1 or (shapes < 0).any():
            raise ValueError(f"{key}: malformed")
        sizes = [math.prod(shape) for shape in shapes.tolist()]
        if sum(sizes) != len(joined):
            raise ValueError(f"{key}: its shapes do not add up")
        parts = np.split(joined, np.cumsum(sizes)[:-1])
        # copies: a view would hold on to all of them
        columns[key] = [p.reshape(s).copy() for p, s in zip(parts, shapes.tolist(), strict=True)]
    if labels and not columns:
        raise ValueError("labels without samples")
    return [
        labelled(label, {key: values[i] for key, values in columns.items()})
        for i, label in enumerate(labels)
    ]


def _whole_numbers(table: Mapping[str, Any]) -> dict[str, int]:
    if not all(type(n) is int and n >= 0 for n in table.values()):
        raise ValueError("a count that is none")
    return dict(table)
