"""`edgetune eval`: measure a run or a bundle on labelled data."""

import datetime
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.output import echo_json, echo_table
from edgetune.cli.progress import counter
from edgetune.errors import ConfigError
from edgetune.runtime.records import to_mapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgetune.bench.answers import LabelAnswers, ValueAnswers
    from edgetune.bench.evaluate import Evaluated, Kept
    from edgetune.bench.report import Explained, Mistake
    from edgetune.tasks.metrics import ClassificationReport
    from edgetune.tasks.multilabel import LabelReport
    from edgetune.tasks.slices import SliceReport

# headline metrics: (title, attribute of the report)
HEADLINES = (
    ("accuracy", "accuracy"),
    ("precision, macro", "precision_macro"),
    ("recall, macro", "recall_macro"),
    ("F1, macro", "f1_macro"),
    ("precision, weighted", "precision_weighted"),
    ("recall, weighted", "recall_weighted"),
    ("F1, weighted", "f1_weighted"),
)
# the same of several labels at once, and of numbers
LABEL_HEADLINES = (
    ("accuracy, all right", "accuracy"),
    ("precision, micro", "precision_micro"),
    ("recall, micro", "recall_micro"),
    ("F1, micro", "f1_micro"),
    ("F1, macro", "f1_macro"),
    ("average precision", "mean_average_precision"),
)
VALUE_HEADLINES = (
    ("mean absolute error", "mae"),
    ("root mean sq. error", "rmse"),
    ("R2", "r2"),
    ("Pearson", "pearson"),
    ("mean error", "bias"),
)
MOST_CLASSES_PRINTED = 40
MOST_COLUMNS_PRINTED = 20
MOST_GROUPS_PRINTED = 40
THUMBNAIL_SIDE = 160


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--split", default="", help="train, val or test.  [default: test, else val]")
@click.option("--data", default="", help="Labelled data to measure on; a bundle needs it.")
@click.option("--input-column", default="", help="Of --data, where it is a table.")
@click.option("--label-column", default="", help="Of --data, where it is a table.")
@click.option(
    "--label-separator", default="",
    help="Of --data: what stands between two labels.  [default: the run's, else |]",
)  # fmt: skip
@click.option(
    "--report", type=click.Path(path_type=Path), help="HTML file to write, self-contained."
)
@click.option("--predictions", type=click.Path(path_type=Path), help="CSV of every answer.")
@click.option(
    "--slices", multiple=True, metavar="COLUMN",
    help="Measure each group of samples that share a value of this column of the table; may be"
    " repeated.",
)  # fmt: skip
@click.option(
    "--min-slice", type=int, default=30, show_default=True,
    help="Groups of fewer samples are marked, and not compared.",
)  # fmt: skip
@click.option(
    "--explain", "explained", type=click.IntRange(min=0), default=0, metavar="N",
    help="Explain the N worst mistakes in --report.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    path: Path, split: str, data: str, input_column: str, label_column: str,
    label_separator: str,
    report: Path | None, predictions: Path | None, slices: tuple[str, ...], min_slice: int,
    explained: int, as_json: bool,
) -> None:  # fmt: skip
    """Measure PATH, a run (through torch) or a bundle (through the device runtime).

    \b
    Examples:
      edgetune eval runs/intents --report report.html
      edgetune eval runs/intents --split val
      edgetune eval bundles/intents --data test.csv --label-column intent
      edgetune eval runs/intents --slices language --slices device
      edgetune eval runs/intents --report report.html --explain 8
    """  # noqa: D301
    if explained and report is None:
        raise ConfigError("--explain: explanations are part of the report; name it with --report")
    from edgetune.bench.evaluate import evaluate

    with counter("measuring") as progress:
        result = evaluate(
            path, split=split, data=data, progress=progress, input_column=input_column,
            label_column=label_column, slices=slices, min_slice=min_slice,
            label_separator=label_separator,
        )  # fmt: skip
    if report is not None:
        _write_report(report, result, _explained(path, result, explained))
    if predictions is not None:
        _write_predictions(predictions, result)
    if as_json:
        found: dict[str, Any] = {"facts": dict(result.facts), **to_mapping(result.report)}
        if result.slices:
            found["slices"] = [to_mapping(s) for s in result.slices]
        if result.kept is not None:
            found["kept"] = to_mapping(result.kept)
        echo_json(found)
        return
    for name, value in result.facts.items():
        click.echo(f"{name + ':':<18} {value}")
    click.echo(f"{'samples:':<18} {result.report.samples}\n")
    _print(result)
    if result.kept is not None:
        _print_kept(result.kept)
    for sliced in result.slices:
        _print_slices(sliced)
    if report is not None:
        click.echo(f"\nreport: {report}")
    if predictions is not None:
        click.echo(f"predictions: {predictions}")


def _print(result: "Evaluated") -> None:
    from edgetune.tasks.multilabel import LabelReport
    from edgetune.tasks.regression import RegressionReport

    report = result.report
    if isinstance(report, RegressionReport):
        _print_headlines(report, VALUE_HEADLINES, "{:.6g}")
        click.echo(f"\nhalf of the samples are off by {report.median_error:.6g} or less")
    elif isinstance(report, LabelReport):
        _print_headlines(report, LABEL_HEADLINES, "{:.4f}")
        _print_labels(report)
    else:
        _print_headlines(report, HEADLINES, "{:.4f}")
        _print_classes(report, result.answers.labels)


def _print_headlines(report: object, headlines: tuple[tuple[str, str], ...], shape: str) -> None:
    rows: list[tuple[object, ...]] = []
    for title, attribute in headlines:
        interval = getattr(report, attribute)
        if interval is not None:
            span = f"{shape.format(interval.low)} to {shape.format(interval.high)}"
            rows.append((title, shape.format(interval.value), span))
    echo_table(("metric", "value", "95 % interval"), rows)


def _print_labels(report: "LabelReport") -> None:
    click.echo()
    labels = sorted(report.per_label, key=lambda s: s.f1)
    echo_table(
        ("label", "precision", "recall", "F1", "average precision", "samples"),
        [
            (
                s.label, f"{s.precision:.4f}", f"{s.recall:.4f}", f"{s.f1:.4f}",
                "" if s.average_precision is None else f"{s.average_precision:.4f}", s.support,
            )
            for s in labels[:MOST_CLASSES_PRINTED]
        ],
    )  # fmt: skip
    if len(labels) > MOST_CLASSES_PRINTED:
        click.echo(f"... and {len(labels) - MOST_CLASSES_PRINTED} better ones (--json for all)")


def _print_classes(report: "ClassificationReport", labels: "Sequence[str]") -> None:
    classes = sorted(report.per_class, key=lambda c: c.f1)
    click.echo()
    echo_table(
        ("class", "precision", "recall", "F1", "samples"),
        [
            (c.label, f"{c.precision:.4f}", f"{c.recall:.4f}", f"{c.f1:.4f}", c.support)
            for c in classes[:MOST_CLASSES_PRINTED]
        ],
    )
    if len(classes) > MOST_CLASSES_PRINTED:
        click.echo(f"... and {len(classes) - MOST_CLASSES_PRINTED} better ones (--json for all)")
    if len(labels) <= MOST_COLUMNS_PRINTED:
        click.echo("\nconfusion matrix (rows: truth, columns: predicted, in the same order)")
        echo_table(
            ("", *[str(i) for i in range(len(labels))]),
            [
                (f"{i} {label}", *row)
                for i, (label, row) in enumerate(zip(labels, report.confusion, strict=True))
            ],
        )


def _print_kept(kept: "Kept") -> None:
    text = (
        f"abstains below score {kept.threshold:.4f}: {100 * kept.coverage:.1f} % of the samples are"
        " answered"
    )
    if kept.accuracy is not None:
        a = kept.accuracy
        text += f", accuracy of those {a.value:.4f} ({a.low:.4f} to {a.high:.4f})"
    click.echo(f"\n{text}; {kept.wanted:g} was asked for")


def _print_slices(report: "SliceReport") -> None:
    click.echo(f"\ngroups by {report.column}, weakest first")
    echo_table(
        (report.column, "samples", "accuracy", "95 % interval", "F1, macro", "95 % interval"),
        [
            (
                f"{g.value} (few)" if g.small else g.value, g.samples, f"{g.accuracy.value:.4f}",
                f"{g.accuracy.low:.4f} to {g.accuracy.high:.4f}", f"{g.f1_macro.value:.4f}",
                f"{g.f1_macro.low:.4f} to {g.f1_macro.high:.4f}",
            )
            for g in report.groups[:MOST_GROUPS_PRINTED]
        ],
    )  # fmt: skip
    if len(report.groups) > MOST_GROUPS_PRINTED:
        click.echo(
            f"... and {len(report.groups) - MOST_GROUPS_PRINTED} better ones (--json for all)"
        )
    small = sum(g.small for g in report.groups)
    if small:
        click.echo(f"(few): fewer than {report.min_samples} samples; not compared")
    if report.gap is None:
        click.echo("gap: fewer than two groups are large enough to be compared")
        return
    gap, d = report.gap, report.gap.difference
    click.echo(
        f"gap: {gap.best} is {100 * d.value:.1f} points above {gap.worst} (95 % interval"
        f" {100 * d.low:.1f} to {100 * d.high:.1f}); by chance alone groups lie so far apart in"
        f" {100 * gap.p_value:.1f} % of cases"
    )


def _explained(path: Path, result: "Evaluated", most: int) -> "list[Explained]":
    """Explain the worst mistakes; nothing is opened where none is asked for."""
    from edgetune.bench.evaluate import Answers, worst_mistakes
    from edgetune.bench.report import Explained

    if most and not isinstance(result.answers, Answers):
        raise ConfigError("--explain: only answers of one class a sample are explained")
    mistakes = worst_mistakes(result.answers, most) if most else []
    if not mistakes:
        return []
    from edgetune.bench.explain import explain, open_subject

    subject = open_subject(path)
    try:
        with counter("explaining") as progress:
            found = explain(subject, [m["input"] for m in mistakes], progress=progress)
    finally:
        subject.close()
    return [
        Explained(explanation=e, truth=m["truth"]) for e, m in zip(found, mistakes, strict=True)
    ]


def _write_report(path: Path, result: "Evaluated", explained: "list[Explained]") -> None:
    from edgetune.bench.evaluate import Answers, worst_mistakes
    from edgetune.bench.report import Confidence, write_report
    from edgetune.bench.target_report import write_target_report
    from edgetune.tasks.metrics import ClassificationReport

    answers = result.answers
    if not isinstance(answers, Answers):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_target_report(
            path,
            title=f"{result.facts.get('run') or result.facts.get('bundle')}",
            facts={**result.facts, "date": datetime.date.today().isoformat()},
            answers=answers,
            mistakes=worst_mistakes(answers),
            history=result.history or None,
        )
        return
    assert isinstance(result.report, ClassificationReport)
    kind = "image" if Path(result.answers.split.inputs[0]).is_file() else "text"
    facts = {**result.facts, "date": datetime.date.today().isoformat()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(
        path,
        title=f"{result.facts.get('run') or result.facts.get('bundle')}",
        facts=facts,
        report=result.report,
        labels=result.answers.labels,
        mistakes=[_mistake(m, kind) for m in worst_mistakes(result.answers)],
        history=result.history or None,
        confidence=Confidence(scores=answers.confidence, right=answers.right, kept=result.kept),
        slices=result.slices,
        explained=explained,
    )


def _mistake(found: dict[str, Any], kind: str) -> "Mistake":
    from edgetune.bench.report import Mistake

    picture = None
    if kind == "image":
        from PIL import Image

        from edgetune.runtime.tasks.image_classification import decode_image

        image = Image.fromarray(decode_image(found["input"]))
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        picture = buffer.getvalue()
    return Mistake(
        shown=Path(found["input"]).name if kind == "image" else found["input"],
        image_png=picture,
        truth=found["truth"],
        predicted=found["predicted"],
        confidence=found["confidence"],
    )


def _write_predictions(path: Path, result: "Evaluated") -> None:
    import csv

    from edgetune.bench.evaluate import Answers

    answers = result.answers
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if not isinstance(answers, Answers):
            _write_other_predictions(writer, answers)
            return
        writer.writerow(("where", "input", "truth", "predicted", "score"))
        for i, predicted in enumerate(answers.predicted):
            writer.writerow(
                (
                    answers.split.where[i], answers.split.inputs[i],
                    answers.labels[answers.truth[i]], answers.labels[predicted],
                    json.dumps(round(float(answers.probabilities[i, predicted]), 6)),
                )
            )  # fmt: skip


def _write_other_predictions(writer: Any, answers: "LabelAnswers | ValueAnswers") -> None:
    from edgetune.bench.answers import LabelAnswers

    split = answers.split
    if isinstance(answers, LabelAnswers):
        writer.writerow(("where", "input", "truth", "predicted", "scores"))
        for i, row in enumerate(answers.predicted):
            scores = zip(answers.labels, answers.probabilities[i].tolist(), strict=True)
            writer.writerow(
                (
                    split.where[i], split.inputs[i], answers.named(answers.truth[i]),
                    answers.named(row),
                    json.dumps({k: round(v, 6) for k, v in scores}, ensure_ascii=False),
                )
            )  # fmt: skip
        return
    writer.writerow(("where", "input", "truth", "predicted"))
    for i, value in enumerate(answers.predicted.tolist()):
        writer.writerow((split.where[i], split.inputs[i], split.labels[i], f"{value:.9g}"))
