"""A validation split held out of the training data: stratified, seeded, free of leaks."""

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgetune.data.split import Kind, Split
from edgetune.errors import ConfigError, DataError


def hold_out(split: Split, *, kind: Kind, fraction: float, seed: int) -> tuple[Split, Split]:
    """Split `split` into a training and a validation part; each keeps the order of `split`.

    Of n samples of a class, floor(fraction * n + 1/2) are held out, but at least 1 and at most
    n - 1 where n >= 2. Samples with the same input (texts that `text_key` calls the same,
    image files of the same bytes) stay on one side. Samples without an input or a label,
    and same inputs with different labels, stay in the training part.

    Args:
        split: the training data.
        kind: of the inputs.
        fraction: share to hold out, 0 < fraction < 1.
        seed: of `numpy.random.default_rng`.

    Raises:
        ConfigError: `fraction` is out of range.
        DataError: no class has two different samples, so that nothing can be held out.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"val_fraction: expected more than 0 and less than 1, got {fraction:g}")
    groups: dict[str, list[int]] = defaultdict(list)  # key -> samples with that input
    for i, key in enumerate(_keys(split.inputs, kind)):
        if key and split.labels[i].strip():
            groups[key].append(i)
    strata: dict[str, list[list[int]]] = defaultdict(list)  # label -> groups that can move
    for indices in groups.values():
        labels = {split.labels[i] for i in indices}
        if len(labels) == 1:
            strata[labels.pop()].append(indices)
    sizes = Counter(split.labels)
    rng = np.random.default_rng(seed)
    held: set[int] = set()
    for label in sorted(strata):
        members = strata[label]
        shuffled = [members[i] for i in rng.permutation(len(members))]
        held.update(_choose(shuffled, sizes[label], fraction))
    if not held:
        raise DataError(
            "no class has two different samples, so none can be held out for validation;"
            " add samples, or name validation data with --val"
        )
    everything = range(len(split.labels))
    val = split.take(i for i in everything if i in held)
    return (
        split.take(i for i in everything if i not in held),
        replace(val, name="val", ignored=(), empty_classes=()),
    )


def text_key(text: str) -> str:
    """Return what two texts share that differ in case and white space only."""
    return " ".join(text.casefold().split())


def _choose(groups: list[list[int]], size: int, fraction: float) -> list[int]:
    """Return the samples of the `groups` to hold out of a class of `size` samples."""
    target = min(max(math.floor(fraction * size + 0.5), 1), size - 1)
    chosen: list[int] = []
    for group in groups:
        if len(chosen) + len(group) <= target:
            chosen += group
    movable = sum(map(len, groups))
    if not chosen and (len(groups) >= 2 or movable < size):
        return min(groups, key=len)
    return chosen


def _keys(inputs: Sequence[str], kind: Kind) -> list[str]:
    return [text_key(t) for t in inputs] if kind == "text" else _file_keys(inputs)


def _file_keys(paths: Sequence[str]) -> list[str]:
    """Return the SHA-256 of each file whose size another has too, else its path."""
    sizes = {p: _size(p) for p in set(paths)}
    shared = Counter(sizes.values())
    keys = {p: _sha256(p) if size > 0 and shared[size] > 1 else p for p, size in sizes.items()}
    return [keys[p] for p in paths]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:  # an absent file is for the check to report
        return -1


def _sha256(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return path
