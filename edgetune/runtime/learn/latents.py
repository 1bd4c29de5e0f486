"""What a training step is fed, sample by sample: kept small, padded and put into batches."""

import hashlib
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.runtime.manifest import Manifest, TensorSpec

Array = npt.NDArray[Any]
# raw inputs that say which tokens are padding, and those that padding has an id of its own in
MASK, IDS = "attention_mask", "input_ids"
# batches are cut from so many batches' worth of samples in the order of their lengths
POOL_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A labelled sample as the step takes it.

    id: of label and arrays, so that the same sample given twice is one. arrays: raw inputs and
    latents without their batch axis; floats as float16 where that can hold them.
    """

    id: str
    label: str
    arrays: Mapping[str, Array]

    @property
    def nbytes(self) -> int:
        """Size of the arrays."""
        return sum(a.nbytes for a in self.arrays.values())


def labelled(label: str, arrays: Mapping[str, Array]) -> Labelled:
    """Return a sample of arrays in any types that fit the step's."""
    small = {name: compact(arrays[name]) for name in sorted(arrays)}
    digest = hashlib.sha256(label.encode())
    for name, array in small.items():
        digest.update(f"\0{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return Labelled(id=digest.hexdigest()[:16], label=label, arrays=small)


def compact(array: Array) -> Array:
    """Return the array in fewer bytes where that loses little: codes and flags stay."""
    if array.dtype.kind == "i":
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        for kind in (np.int8, np.int16, np.int32):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return array.astype(kind)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        return half if np.isfinite(half).all() else array.astype(np.float32)
    return np.ascontiguousarray(array)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How samples become batches.

    specs: of what the step takes, batch axis first. padded: names of axes along which a mask says
    what is padding; samples that differ in another one share no batch. fill: name -> what its
    padding is, 0 where none is named.
    """

    specs: tuple[TensorSpec, ...]
    padded: frozenset[str]
    fill: Mapping[str, int]

    def group(self, sample: Labelled) -> Hashable:
        """Return a key; samples of equal key can share a batch."""
        return tuple(
            size
            for spec in self.specs
            for axis, size in zip(spec.shape[1:], sample.arrays[spec.name].shape, strict=True)
            if axis not in self.padded
        )

    def length(self, sample: Labelled) -> int:
        """Return the largest size that would be padded to, 0 where none is."""
        return max(
            (
                size
                for spec in self.specs
                for axis, size in zip(spec.shape[1:], sample.arrays[spec.name].shape, strict=True)
                if axis in self.padded
            ),
            default=0,
        )

    def stack(self, samples: Sequence[Labelled]) -> dict[str, Array]:
        """Join samples of one group, axis 0 added, in the types that the step takes."""
        batch = {}
        for spec in self.specs:
            rows = [s.arrays[spec.name] for s in samples]
            # an axis of length 0 breaks graphs
            shape = tuple(
                max(1, *sizes) if len(rows) > 1 else max(1, sizes[0])
                for sizes in zip(*(r.shape for r in rows), strict=True)
            )
            joined = np.full((len(rows), *shape), self.fill.get(spec.name, 0), spec.dtype)
            for place, row in enumerate(rows):
                joined[place][tuple(slice(n) for n in row.shape)] = row
            batch[spec.name] = joined
        return batch

    def fits(self, sample: Labelled) -> bool:
        """Say whether a sample's arrays are those that the step takes."""
        return sample.arrays.keys() == {spec.name for spec in self.specs} and all(
            _fits(sample.arrays[spec.name], spec) for spec in self.specs
        )


def layout_of(manifest: Manifest) -> Layout:
    """Return the layout of the bundle's training step."""
    training = manifest.training
    assert training is not None
    raw = {spec.name: spec for spec in manifest.inputs}
    mask = raw.get(MASK)
    pad = manifest.options.get("pad_id")
    return Layout(
        specs=(*(raw[name] for name in training.inputs), *training.latents),
        padded=frozenset(d for d in mask.shape[1:] if isinstance(d, str)) if mask else frozenset(),
        fill={IDS: pad} if isinstance(pad, int) else {},
    )


def batches(
    samples: Sequence[Labelled], layout: Layout, size: int, rng: np.random.Generator | None = None
) -> list[list[int]]:
    """Return places of samples by batches, each of one group and of like lengths.

    Args:
        samples: any.
        layout: says what can share a batch.
        size: of a batch, at most.
        rng: shuffles samples among batches, and batches; None leaves the order as it may be.
    """
    order = np.arange(len(samples)) if rng is None else rng.permutation(len(samples))
    pool = size * POOL_BATCHES if rng is not None else max(1, len(samples))
    found = []
    for begin in range(0, len(order), pool):
        groups: dict[Hashable, list[int]] = {}
        for place in order[begin : begin + pool].tolist():
            groups.setdefault(layout.group(samples[place]), []).append(place)
        for places in groups.values():
            places.sort(key=lambda place: layout.length(samples[place]))  # stable
            found += [places[i : i + size] for i in range(0, len(places), size)]
    if rng is not None:
        found = [found[i] for i in rng.permutation(len(found))]
    return found


def draw(
    pools: Mapping[str, Sequence[Labelled]], count: int, rng: np.random.Generator
) -> list[Labelled]:
    """Return samples of all classes in turn, none twice; fewer than `count` where they run out."""
    shuffled = [
        [pool[i] for i in rng.permutation(len(pool))] for _, pool in sorted(pools.items()) if pool
    ]
    shuffled = [shuffled[i] for i in rng.permutation(len(shuffled))]
    turns = max((len(pool) for pool in shuffled), default=0)
    found = [pool[turn] for turn in range(turns) for pool in shuffled if turn < len(pool)]
    return found[:count]


def pools_of(
    samples: Sequence[Labelled], leaving_out: Collection[str] = ()
) -> dict[str, list[Labelled]]:
    """Return samples by label, each once, less those of some ids."""
    pools: dict[str, list[Labelled]] = {}
    seen = set(leaving_out)
    for sample in samples:
        if sample.id not in seen:
            seen.add(sample.id)
            pools.setdefault(sample.label, []).append(sample)
    return pools


def _fits(array: Array, spec: TensorSpec) -> bool:
    kind = np.dtype(spec.dtype).kind
    return (
        array.ndim == len(spec.shape) - 1
        and array.dtype.kind == kind
        and (kind != "f" or bool(np.isfinite(array).all()))
        and all(
            isinstance(d, str) or d == n for d, n in zip(spec.shape[1:], array.shape, strict=True)
        )
    )
