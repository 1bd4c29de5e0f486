"""Finders of what is wrong with samples: their inputs, alone and against each other. No I/O."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from edgetune.data.evidence import (
    EXAMPLES,
    Evidence,
    counted,
    examples,
    listed,
    sample_error,
    splits_of,
)
from edgetune.data.holdout import meaning
from edgetune.data.report import Problem
from edgetune.data.split import Split

LEAK_SHARE = 0.01  # of a split; above, a leak is an error
TINY_SIDE = 16  # pixels


def _unreadable(evidence: Evidence) -> Iterator[Problem]:
    faults = evidence.contents.faults
    bad = [(s.name, i) for s in splits_of(evidence) for i, f in enumerate(faults[s.name]) if f]
    if bad:
        name, index = bad[0]
        split = evidence.dataset.splits[name]
        where, path = Path(split.where[index]), Path(split.inputs[index])
        first = str(where) if where.name == path.name else f"{where} ({path})"
        message = f"{counted(len(bad), 'image')} cannot be read; {first}: {faults[name][index]}"
        yield sample_error("unreadable", message, bad, evidence)


def _empty(evidence: Evidence) -> Iterator[Problem]:
    contents = evidence.contents
    bad = [
        (split.name, i)
        for split in splits_of(evidence)
        for i, key in enumerate(contents.keys[split.name])
        if not key and not contents.faults[split.name][i]
    ]
    if bad:
        noun = evidence.dataset.kind
        what = "blank" if noun == "text" else "without a path or of 0 bytes"
        message = f"{counted(len(bad), noun)} {what}"
        yield sample_error("empty", message, bad, evidence)


def _missing_label(evidence: Evidence) -> Iterator[Problem]:
    bad = [
        (split.name, i)
        for split in splits_of(evidence)
        for i, label in enumerate(split.labels)
        if not label.strip() and split.target != "multilabel"
    ]
    if bad:
        message = f"{counted(len(bad), 'sample')} without a label"
        yield sample_error("missing-label", message, bad, evidence)


def _leak(evidence: Evidence) -> Iterator[Problem]:
    keys = evidence.contents.keys
    seen: dict[str, int] = {}
    for i, key in enumerate(keys["train"]):
        seen.setdefault(key, i)
    for split in splits_of(evidence)[1:]:
        bad = [i for i, key in enumerate(keys[split.name]) if key and key in seen]
        if bad:
            share = len(bad) / len(split.inputs)
            twin = evidence.dataset.splits["train"].where[seen[keys[split.name][bad[0]]]]
            yield Problem(
                kind="leak",
                severity="error" if share > LEAK_SHARE else "warning",
                count=len(bad),
                message=f"{split.name}: {counted(len(bad), 'sample')} of {len(split.inputs)}"
                f" ({share:.1%}) {'is' if len(bad) == 1 else 'are'} in the training data too;"
                f" {split.where[bad[0]]} is the same as {twin}",
                examples=examples(split, bad),
            )


def _conflicting_labels(evidence: Evidence) -> Iterator[Problem]:
    for split in splits_of(evidence):
        yield from _conflicting_labels_in(split, evidence)


def _conflicting_labels_in(split: Split, evidence: Evidence) -> Iterator[Problem]:
    found = [
        group
        for group in _same_inputs(evidence, split)
        if len({meaning(split, i) for i in group if _is_labelled(split, i)}) > 1
    ]
    if found:
        first = listed(found[0], lambda i: f"{split.where[i]} {split.labels[i]!r}")
        yield Problem(
            kind="conflicting-labels",
            severity="warning",
            count=sum(map(len, found)),
            message=f"{split.name}: {counted(len(found), 'input')} with different labels,"
            f" such as {first}",
            examples=examples(split, [i for group in found for i in group]),
        )


def _duplicates(evidence: Evidence) -> Iterator[Problem]:
    for split in splits_of(evidence):
        copies = [i for group in _same_inputs(evidence, split) for i in group[1:]]
        if copies:
            yield Problem(
                kind="duplicates",
                severity="warning",
                count=len(copies),
                message=f"{split.name}: {counted(len(copies), 'sample')} of {len(split.inputs)}"
                f" {'repeats' if len(copies) == 1 else 'repeat'} an earlier one",
                examples=examples(split, sorted(copies)),
            )


def _mixed_modes(evidence: Evidence) -> Iterator[Problem]:
    sizes = evidence.contents.image
    if sizes is not None and len(sizes.modes) > 1:
        modes = [f"{mode} ({n})" for mode, n in sizes.modes.items()]
        yield Problem(
            kind="mixed-modes",
            severity="warning",
            count=sum(sizes.modes.values()) - max(sizes.modes.values()),
            message=f"the images are of several modes: {listed(modes)}",
        )


def _tiny_images(evidence: Evidence) -> Iterator[Problem]:
    sides = evidence.contents.sides
    tiny = [
        (split, i)
        for split in splits_of(evidence)
        for i, side in enumerate(sides.get(split.name, ()))
        if 0 < side < TINY_SIDE
    ]
    if tiny:
        yield Problem(
            kind="tiny-images",
            severity="warning",
            count=len(tiny),
            message=f"{counted(len(tiny), 'image')} with a side of less than {TINY_SIDE} pixels",
            examples=tuple(split.where[i] for split, i in tiny[:EXAMPLES]),
        )


def _is_labelled(split: Split, index: int) -> bool:
    return bool(split.labels[index].strip()) or split.target == "multilabel"


def _same_inputs(evidence: Evidence, split: Split) -> list[list[int]]:
    """Return the samples that share their input, in groups of two and more."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(evidence.contents.keys[split.name]):
        if key:
            groups[key].append(i)
    return [group for group in groups.values() if len(group) > 1]


SAMPLE_FINDERS: tuple[Callable[[Evidence], Iterable[Problem]], ...] = (
    _unreadable,
    _empty,
    _missing_label,
    _leak,
    _conflicting_labels,
    _duplicates,
    _mixed_modes,
    _tiny_images,
)
