"""Is this data fit to train on? Look at all of it, say what is wrong, and accept or refuse."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from edgetune.data.class_problems import CLASS_FINDERS
from edgetune.data.contents import read_contents
from edgetune.data.dataset import Dataset
from edgetune.data.evidence import gather
from edgetune.data.report import REMEDIES, SAMPLE_KINDS, DataReport, Problem
from edgetune.data.sample_problems import SAMPLE_FINDERS
from edgetune.data.split import labels_of
from edgetune.data.value_problems import VALUE_FINDERS, value_spreads
from edgetune.errors import ConfigError, DataError
from edgetune.runtime.records import nearest


def check_dataset(
    dataset: Dataset,
    *,
    min_per_class: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Look at every sample of `dataset`; decodes every image once.

    Args:
        dataset: what to check.
        min_per_class: fewest usable training samples a class may have.
        progress: called with (done, total) image files, from the calling thread.

    Raises:
        MissingExtraError: the data are images and Pillow is not installed.
    """
    contents = read_contents(dataset, progress)
    evidence = gather(dataset, contents, min_per_class)
    finders = VALUE_FINDERS if dataset.target == "values" else CLASS_FINDERS
    problems = [p for find in (*SAMPLE_FINDERS, *finders) for p in find(evidence)]
    splits = dataset.splits
    return DataReport(
        kind=dataset.kind,
        held_out=dataset.held_out,
        samples={name: len(s.inputs) for name, s in splits.items()},
        classes={
            name: dict(sorted(Counter(x for names in s.names for x in names).items()))
            for name, s in splits.items()
        },
        text=contents.text,
        image=contents.image,
        ignored=tuple(path for s in splits.values() for path in s.ignored),
        problems=tuple(sorted(problems, key=lambda p: p.severity != "error")),
        target=dataset.target,
        values=value_spreads(evidence) if dataset.target == "values" else None,
    )


def accept(
    dataset: Dataset, report: DataReport, allow: Sequence[str]
) -> tuple[Dataset, tuple[str, ...]]:
    """Return the data to train on, or refuse it.

    Args:
        dataset: what was checked.
        report: what `check_dataset` said of it.
        allow: kinds of errors to go on with. For kinds that concern single samples
            (`SAMPLE_KINDS`) these samples are left out; the others change nothing.

    Returns:
        The data set without the samples left out, and the `where` of each of those.

    Raises:
        ConfigError: `allow` names an unknown kind.
        DataError: there are errors that are not allowed, or nothing of a split is left.
    """
    check_kinds(allow)
    refused = [p for p in report.errors if p.kind not in allow]
    if refused:
        lines = [_refusal(p) for p in refused]
        heading = "" if len(lines) == 1 else f"{len(lines)} problems in the data\n  "
        raise DataError(heading + "\n  ".join(lines))
    bad: dict[str, set[int]] = defaultdict(set)
    for problem in report.errors:
        for name, index in problem.samples:
            bad[name].add(index)
    if not bad:
        return dataset, ()
    splits = dict(dataset.splits)
    left_out: list[str] = []
    for name, split in dataset.splits.items():
        indices = bad[name]
        left_out += (split.where[i] for i in sorted(indices))
        splits[name] = split.take(i for i in range(len(split.inputs)) if i not in indices)
        if not splits[name].inputs:
            raise DataError(f"{name}: none of its {len(split.inputs)} samples can be used")
    return replace(dataset, labels=labels_of(splits["train"]), splits=splits), tuple(left_out)


def check_kinds(allow: Sequence[str]) -> None:
    """Check that each word names a kind of problem.

    Raises:
        ConfigError: one does not.
    """
    for kind in allow:
        if kind not in REMEDIES:
            raise ConfigError(f"allow: no kind of data problem {kind!r}{nearest(kind, REMEDIES)}")


def _refusal(problem: Problem) -> str:
    leave_out = problem.kind in SAMPLE_KINDS
    first = next(iter(problem.examples), "")
    shown = "" if first in problem.message else f" (such as {first})"
    return (
        f"{problem.kind}: {problem.message}{shown}; {REMEDIES[problem.kind]}, or"
        f" {'leave them out' if leave_out else 'accept it'} with --allow {problem.kind}"
    )
