"""Finders of what is wrong with classes: their names, their sizes, where they occur. No I/O."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from edgetune.data.evidence import (
    EXAMPLES,
    Evidence,
    counted,
    examples,
    examples_of_labels,
    label_counts,
    listed,
    sample_error,
    splits_of,
)
from edgetune.data.report import Problem
from edgetune.data.split import Split

TYPO_RATIO = 0.85  # difflib.SequenceMatcher.ratio
IMBALANCE = 20  # largest class over smallest


def _one_class(evidence: Evidence) -> Iterator[Problem]:
    counts = evidence.counts["train"]
    if evidence.dataset.target == "multilabel":
        if not counts:
            message = "the training data needs at least 1 label, and has none"
            yield Problem(kind="one-class", severity="error", count=0, message=message)
    elif len(counts) < 2:
        there = f"only {next(iter(counts))!r}" if counts else "none"
        yield Problem(
            kind="one-class",
            severity="error",
            count=len(counts),
            message=f"the training data needs at least 2 classes, and has {there}",
        )


def _few_samples(evidence: Evidence) -> Iterator[Problem]:
    counts = evidence.counts["train"]
    few = [x for x in evidence.dataset.labels if counts[x] < evidence.min_per_class]
    if few:
        few.sort(key=lambda x: counts[x])
        train = evidence.dataset.splits["train"]
        held = ", after the hold-out for validation" if evidence.dataset.held_out else ""
        yield Problem(
            kind="few-samples",
            severity="error",
            count=len(few),
            message=f"{counted(len(few), 'class')} with fewer than {evidence.min_per_class}"
            f" training samples{held}: {listed(few, lambda x: f'{x!r} ({counts[x]})')}",
            examples=examples(
                train, [i for i, names in enumerate(train.names) if not set(few).isdisjoint(names)]
            ),
        )


def _unknown_label(evidence: Evidence) -> Iterator[Problem]:
    for split in splits_of(evidence)[1:]:
        yield from _unknown_label_in(split, evidence)


def _unknown_label_in(split: Split, evidence: Evidence) -> Iterator[Problem]:
    known = evidence.counts["train"]
    bad = [i for i, names in enumerate(split.names) if any(x not in known for x in names)]
    if bad:
        labels = Counter(x for i in bad for x in split.names[i] if x not in known)
        named = listed(list(labels), lambda x: f"{x!r} ({labels[x]}){_near(x, known)}")
        yield sample_error(
            "unknown-label",
            f"{split.name}: {counted(len(bad), 'sample')} of {counted(len(labels), 'class')}"
            f" that the training data lacks: {named}",
            [(split.name, i) for i in bad],
            evidence,
        )


def _label_variants(evidence: Evidence) -> Iterator[Problem]:
    counts = label_counts(evidence)
    forms: dict[str, list[str]] = defaultdict(list)
    for label in counts:
        forms[label_form(label)].append(label)
    several = [sorted(v, key=lambda x: -counts[x]) for v in forms.values() if len(v) > 1]
    if several:
        rare = {label for variants in several for label in variants[1:]}
        ways = listed(several, lambda v: " / ".join(f"{x!r} ({counts[x]})" for x in v))
        yield Problem(
            kind="label-variants",
            severity="error",
            count=len(several),
            message=f"{counted(len(several), 'class')} spelt in several ways: {ways}",
            examples=examples_of_labels(evidence, rare),
        )


def _label_typo(evidence: Evidence) -> Iterator[Problem]:
    counts = label_counts(evidence)
    for rare, near in find_typos(counts):
        yield Problem(
            kind="label-typo",
            severity="warning",
            count=counts[rare],
            message=f"label {rare!r} ({counts[rare]}) may be a slip for {near!r} ({counts[near]})",
            examples=examples_of_labels(evidence, {rare}),
        )


def find_typos(counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield each rare label that is nearly spelt like a common one, and that one.

    Rare has fewer than max(3, 5 % of the other's samples); common has at least 3. Labels that
    differ in a number ("grade 1", "grade 2") are no slips of each other.
    """
    labels = sorted(counts)
    sizes = np.array([counts[x] for x in labels])
    lengths = np.array([len(x) for x in labels])
    numbers = [re.findall(r"\d+", x) for x in labels]
    letters = np.zeros((len(labels), 64), np.int32)  # how often each letter, modulo 64
    for row, label in zip(letters, labels, strict=True):
        np.add.at(row, [ord(c) % 64 for c in label], 1)
    matcher = difflib.SequenceMatcher(autojunk=False)
    for i, rare in enumerate(labels):
        n = sizes[i]
        common = (sizes > n) & (sizes >= 3) & (n < np.maximum(3, 0.05 * sizes))
        if not common.any():
            continue
        # letters in common bound the ratio from above, and are quick to count
        bound = 2 * np.minimum(letters, letters[i]).sum(axis=1) / (lengths + lengths[i])
        matcher.set_seq2(rare)
        best, ratio = "", TYPO_RATIO
        for j in np.flatnonzero(common & (bound >= TYPO_RATIO)):
            matcher.set_seq1(labels[j])
            if (
                numbers[j] == numbers[i]
                and matcher.ratio() >= ratio
                and label_form(labels[j]) != label_form(rare)
            ):
                best, ratio = labels[j], matcher.ratio()
        if best:
            yield rare, best


def _imbalance(evidence: Evidence) -> Iterator[Problem]:
    counts = evidence.counts["train"].most_common()
    if counts and counts[0][1] > IMBALANCE * counts[-1][1]:
        (large, most), (small, least) = counts[0], counts[-1]
        yield Problem(
            kind="imbalance",
            severity="warning",
            count=len(counts),
            message=f"the largest class has {most / least:.0f} times the samples of the smallest:"
            f" {large!r} ({most}), {small!r} ({least})",
        )


def _unlabelled_class_in_val(evidence: Evidence) -> Iterator[Problem]:
    absent = [x for x in evidence.dataset.labels if not evidence.counts["val"][x]]
    if absent:
        yield Problem(
            kind="unlabelled-class-in-val",
            severity="warning",
            count=len(absent),
            message=f"{counted(len(absent), 'class')} of the training data without a sample in"
            f" val: {listed(absent, repr)}",
        )


def _empty_class(evidence: Evidence) -> Iterator[Problem]:
    folders = [path for split in splits_of(evidence) for path in split.empty_classes]
    if folders:
        yield Problem(
            kind="empty-class",
            severity="warning",
            count=len(folders),
            message=f"{counted(len(folders), 'class folder')} without an image: {listed(folders)}",
            examples=tuple(folders[:EXAMPLES]),
        )


def label_form(label: str) -> str:
    """Return what spellings of a class share that differ in case, spaces, "-" and "_" only."""
    return re.sub(r"[\s_-]+", " ", label.casefold()).strip()


def _near(label: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(label, list(known), n=1, cutoff=0.6)
    return f", near {close[0]!r}" if close else ""


CLASS_FINDERS: tuple[Callable[[Evidence], Iterable[Problem]], ...] = (
    _one_class,
    _few_samples,
    _unknown_label,
    _label_variants,
    _label_typo,
    _imbalance,
    _unlabelled_class_in_val,
    _empty_class,
)
