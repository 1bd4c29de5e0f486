"""`edgetune data`: what is in a data set, and what is wrong with it."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from edgetune.cli.output import echo_json, echo_table
from edgetune.data import (
    REMEDIES,
    DataReport,
    Dataset,
    DataSource,
    Kind,
    Problem,
    Spread,
    Target,
    ValueSpread,
    check_dataset,
    check_kinds,
    load_dataset,
)
from edgetune.data.split import LABEL_SEPARATOR
from edgetune.errors import DataError
from edgetune.runtime.records import to_mapping

# what the samples of each task are, and what their labels
TASKS: Mapping[str, tuple[Kind, Target]] = {
    "image-classification": ("image", "classes"),
    "image-multilabel-classification": ("image", "multilabel"),
    "image-regression": ("image", "values"),
    "text-classification": ("text", "classes"),
    "text-multilabel-classification": ("text", "multilabel"),
    "text-regression": ("text", "values"),
}
SHOWN_CLASSES = 30
SHOWN_IGNORED = 5


@click.group("data")
def group() -> None:
    """Look at a data set: what is there, what is wrong."""


@group.command("check")
@click.argument("path")
@click.option("--task", type=click.Choice(list(TASKS)), required=True, help="what the data is for")
@click.option("--val", default="", help="validation data; else what PATH holds, else held out")
@click.option("--test", default="", help="test data; else what PATH holds")
@click.option(
    "--input-column", default="", help="column with the text or image path (default: text or image)"
)
@click.option("--label-column", default="label", show_default=True, help="column with the label")
@click.option(
    "--label-separator",
    default=LABEL_SEPARATOR,
    show_default=True,
    help="multilabel: what stands between two labels of a sample",
)
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 0.9, min_open=True),
    default=0.15,
    show_default=True,
    help="share of the training data held out where there is no validation data",
)
@click.option(
    "--min-per-class",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="fewest training samples a class may have",
)
@click.option(
    "--allow", multiple=True, metavar="KIND", help="a kind of error to accept; repeatable"
)
@click.option("--all", "all_classes", is_flag=True, help="list every class")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object and nothing else")
def check(
    path: str,
    task: str,
    val: str,
    test: str,
    input_column: str,
    label_column: str,
    label_separator: str,
    val_fraction: float,
    min_per_class: int,
    allow: tuple[str, ...],
    all_classes: bool,
    as_json: bool,
) -> None:
    """Check the data at PATH before training on it.

    PATH is a folder of class folders of images; a folder with train/, and optionally val/ and
    test/, of such folders; a CSV, TSV, JSONL or Parquet file; or a folder with train.csv, and
    optionally val.csv and test.csv. Several labels a sample, and numbers, take a table.

    Every image is decoded and every text compared: unreadable files, missing labels, classes
    with too few samples, labels spelt in several ways, and samples that are in the training
    data and in the validation or test data too.

    \b
    Kinds of errors, and what it means to allow them:
      unreadable, empty, missing-label, unknown-label    training leaves the samples out
      one-class, few-samples, leak, label-variants       training uses the data as they are
      constant-value                                     nothing: training refuses such data

    Exits 0 where there is nothing worse than warnings, and 3 where there are errors.

    \b
    Examples:
      edgetune data check flowers/ --task image-classification
      edgetune data check train.csv --test test.csv --task text-classification
      edgetune data check reviews.tsv --task text-classification \\
          --input-column sentence --label-column stars
      edgetune data check photos/ --task image-classification --allow unreadable
    """  # noqa: D301  click wants the control character
    check_kinds(allow)
    kind, target = TASKS[task]
    source = DataSource(
        kind=kind,
        data=path,
        val=val,
        test=test,
        input_column=input_column,
        label_column=label_column,
        val_fraction=val_fraction,
        target=target,
        label_separator=label_separator,
    )
    dataset = load_dataset(source)
    report = check_dataset(
        dataset, min_per_class=min_per_class, progress=_progress() if not as_json else None
    )
    refused = [p for p in report.errors if p.kind not in allow]
    if as_json:
        echo_json(_as_json(dataset, report, refused))
    else:
        _print_report(path, dataset, report, allow, None if all_classes else SHOWN_CLASSES)
    if refused:
        kinds = list(dict.fromkeys(p.kind for p in refused))
        raise DataError(
            f"{path}: {', '.join(kinds)}; correct the data, or accept with"
            f" {' '.join(f'--allow {k}' for k in kinds)}"
        )


def _print_report(
    path: str, dataset: Dataset, report: DataReport, allow: tuple[str, ...], shown: int | None
) -> None:
    held = {"val": " (held out of the training data)"} if report.held_out else {}
    counts = ", ".join(f"{name} {n}{held.get(name, '')}" for name, n in report.samples.items())
    what = {
        "classes": f"classes: {len(dataset.labels)}",
        "multilabel": f"labels: {len(dataset.labels)}, any number of them a sample",
        "values": "numbers",
    }[report.target]
    click.echo(f"{path}: {report.kind}, {what}")
    click.echo(f"samples: {counts}\n")
    if report.values is not None:
        _print_values(report.values)
    else:
        _print_classes(dataset, report, shown)
    _print_sizes(report)
    _print_ignored(report)
    _print_problems(report, allow)


def _print_values(values: Mapping[str, ValueSpread]) -> None:
    echo_table(
        ["values", "min", "median", "95 %", "max", "mean", "std"],
        [
            [name, *(f"{x:.6g}" for x in (v.minimum, v.median, v.p95, v.maximum, v.mean, v.std))]
            for name, v in values.items()
        ],
    )
    click.echo()


def _print_classes(dataset: Dataset, report: DataReport, shown: int | None) -> None:
    names = sorted({label for row in report.classes.values() for label in row})
    splits = list(report.classes)
    rows: list[list[object]] = [
        [_printable(label), *(report.classes[s].get(label, 0) for s in splits)]
        for label in names[:shown]
    ]
    blank = [sum(not names for names in dataset.splits[s].names) for s in splits]
    if any(blank):
        rows.append(["(no label)", *blank])
    echo_table(["label" if report.target == "multilabel" else "class", *splits], rows)
    if shown is not None and len(names) > shown:
        click.echo(f"... and {len(names) - shown} more (--all lists them)")
    click.echo()


def _print_sizes(report: DataReport) -> None:
    spreads: dict[str, Spread] = {}
    if report.text is not None:
        spreads = {"characters": report.text.characters, "words": report.text.words}
    elif report.image is not None:
        spreads = {"width px": report.image.width, "height px": report.image.height}
    if spreads:
        echo_table(
            ["size", "min", "median", "95 %", "max"],
            [[name, s.minimum, s.median, s.p95, s.maximum] for name, s in spreads.items()],
        )
        click.echo()
    if report.image is not None:
        for title, table in (("modes", report.image.modes), ("formats", report.image.formats)):
            click.echo(f"{title}: " + ", ".join(f"{name} {n}" for name, n in table.items()))
        click.echo()


def _print_ignored(report: DataReport) -> None:
    if not report.ignored:
        return
    types = Counter(_type_of(path) for path in report.ignored)
    listed = ", ".join(f"{name} {n}" for name, n in types.most_common())
    click.echo(f"ignored files: {len(report.ignored)} ({listed})")
    for path in report.ignored[:SHOWN_IGNORED]:
        click.echo(f"  {_printable(path)}")
    if len(report.ignored) > SHOWN_IGNORED:
        click.echo(f"  ... and {len(report.ignored) - SHOWN_IGNORED} more")
    click.echo()


def _print_problems(report: DataReport, allow: tuple[str, ...]) -> None:
    if not report.problems:
        click.echo("no problems found")
    for problem in report.problems:
        severity: str = problem.severity
        if severity == "error" and problem.kind in allow:
            severity = "allowed"
        click.echo(f"{severity}: {problem.kind}: {problem.message}")
        click.echo(f"    {REMEDIES[problem.kind]}")
        for where in problem.examples:
            click.echo(f"    {_printable(where)}")
        more = problem.count - len(problem.examples)
        if problem.samples and more > 0:
            click.echo(f"    ... and {more} more")


def _as_json(dataset: Dataset, report: DataReport, refused: list[Problem]) -> dict[str, Any]:
    """Return the report as plain values, the samples of a problem by `where`."""
    plain = to_mapping(report)
    for record, problem in zip(plain["problems"], report.problems, strict=True):
        record["samples"] = [dataset.splits[name].where[i] for name, i in problem.samples]
        record["refused"] = problem in refused
    return {"ok": not refused, "labels": list(dataset.labels), **plain}


def _progress() -> Callable[[int, int], None] | None:
    """Return what shows progress on a terminal, at most 10 times a second, after a second."""
    if not sys.stderr.isatty():
        return None
    start = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total and last > start:
            click.echo("\r\033[K", nl=False, err=True)
        elif now - start > 1 and now - last > 0.1:
            last = now
            click.echo(f"\rlooking at images: {done} of {total}", nl=False, err=True)

    return show


def _type_of(path: str) -> str:
    name = Path(path).name
    if name.startswith("."):
        return "hidden"
    return "folder" if path.endswith("/") else Path(name).suffix.lower() or "no suffix"


def _printable(text: str) -> str:
    """Return `text`, or its repr where it would break the line it is printed on."""
    return text if text.isprintable() else repr(text)
