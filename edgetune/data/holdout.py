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

    Of values, tenths by rank stand in for classes. Several labels at once are shared out by
    iterative stratification (Sechidis et al. 2011, ECML PKDD, algorithm 1): the rarest label
    first, each sample to the part that lacks most of it.

    Args:
        split: the training data.
        kind: of the inputs.
        fraction: share to hold out, 0 < fraction < 1.
        seed: of `numpy.random.default_rng`.

    Raises:
        ConfigError: `fraction` is out of range.
        DataError: no class has two different samples, so that nothing can be held out; of values
            and several labels at once, there are no two different samples.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"val_fraction: expected more than 0 and less than 1, got {fraction:g}")
    groups: dict[str, list[int]] = defaultdict(list)  # key -> samples with that input
    for i, key in enumerate(_keys(split.inputs, kind)):
        if key and (split.labels[i].strip() or split.target == "multilabel"):
            groups[key].append(i)
    rng = np.random.default_rng(seed)
    if split.target == "multilabel":
        held = _hold_labels(split, [g for g in groups.values() if _agree(split, g)], fraction, rng)
    else:
        held = _hold_strata(split, list(groups.values()), fraction, rng)
    if not held:
        lacking = "no class has" if split.target == "classes" else "there are no"
        raise DataError(
            f"{lacking} two different samples, so none can be held out for validation;"
            " add samples, or name validation data with --val"
        )
    everything = range(len(split.labels))
    val = split.take(i for i in everything if i in held)
    return (
        split.take(i for i in everything if i not in held),
        replace(val, name="val", ignored=(), empty_classes=()),
    )


def _hold_strata(
    split: Split, groups: list[list[int]], fraction: float, rng: np.random.Generator
) -> set[int]:
    """Choose a share of each class's groups, or of each tenth of the values."""
    names = split.labels if split.target == "classes" else _tenths(split.labels)
    strata: dict[str, list[list[int]]] = defaultdict(list)  # label -> groups that can move
    for indices in groups:
        if _agree(split, indices):
            strata[names[indices[0]]].append(indices)
    sizes = Counter(names)
    held: set[int] = set()
    for label in sorted(strata):
        members = strata[label]
        shuffled = [members[i] for i in rng.permutation(len(members))]
        held.update(_choose(shuffled, sizes[label], fraction))
    return held


def _tenths(values: Sequence[str]) -> list[str]:
    """Return in which part by rank each value is; parts have 10 values or more, and are 10."""
    given = [i for i, value in enumerate(values) if value]
    order = sorted(given, key=lambda i: float(values[i]))
    parts = max(1, min(10, len(order) // 10))
    names = [""] * len(values)
    for rank, i in enumerate(order):
        names[i] = str(rank * parts // len(order))
    return names


def _hold_labels(
    split: Split, groups: list[list[int]], fraction: float, rng: np.random.Generator
) -> set[int]:
    """Choose groups so that each label's share is held out, as near as can be."""
    if len(groups) < 2:
        return set()
    sets = [split.names[g[0]] for g in groups]
    counts = Counter({n: 0 for names in sets for n in names})
    for names, group in zip(sets, groups, strict=True):
        counts.update(dict.fromkeys(names, len(group)))
    shares = (1 - fraction, fraction)
    wanted = [{n: share * c for n, c in counts.items()} for share in shares]
    room = [share * sum(map(len, groups)) for share in shares]  # samples of either part
    left = set(range(len(groups)))
    place = rng.permutation(len(groups))  # breaks ties
    held: set[int] = set()

    def give(number: int, name: str | None) -> None:
        group, names = groups[number], sets[number]
        keys = [(0.0 if name is None else w[name], r) for w, r in zip(wanted, room, strict=True)]
        part = 1 if keys[1] > keys[0] else 0
        room[part] -= len(group)
        for n in names:
            wanted[part][n] -= len(group)
            counts[n] -= len(group)
        left.discard(number)
        if part:
            held.update(group)

    with_name: dict[str, list[int]] = defaultdict(list)
    for number in sorted(left, key=lambda i: int(place[i])):
        for n in sets[number]:
            with_name[n].append(number)
    while any(counts.values()):
        rarest = min((n for n, c in counts.items() if c), key=lambda n: (counts[n], n))
        for number in with_name[rarest]:
            if number in left:
                give(number, rarest)
    for number in sorted(left, key=lambda i: int(place[i])):
        give(number, None)
    smallest: list[int] = min(groups, key=len)
    return held or set(smallest)


def _agree(split: Split, indices: Sequence[int]) -> bool:
    """Say whether samples of one input have one label."""
    return len({meaning(split, i) for i in indices}) == 1


def meaning(split: Split, index: int) -> object:
    """Return what is equal for labels that say the same: "1" and "1.0", "a|b" and "b|a"."""
    label = split.labels[index]
    if split.target == "multilabel":
        return frozenset(split.names[index])
    return float(label) if split.target == "values" and label else label


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
