"""`edgetune eval`: measure a run or a bundle on labelled data."""

import datetime
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.output import echo_json, echo_table
from edgetune.cli.progress import counter
from edgetune.runtime.records import to_mapping

if TYPE_CHECKING:
    from edgetune.bench.evaluate import Evaluated
    from edgetune.bench.report import Mistake

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
MOST_CLASSES_PRINTED = 40
MOST_COLUMNS_PRINTED = 20
THUMBNAIL_SIDE = 160


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--split", default="", help="train, val or test.  [default: test, else val]")
@click.option("--data", default="", help="Labelled data to measure on; a bundle needs it.")
@click.option("--input-column", default="", help="Of --data, where it is a table.")
@click.option("--label-column", default="", help="Of --data, where it is a table.")
@click.option(
    "--report", type=click.Path(path_type=Path), help="HTML file to write, self-contained."
)
@click.option("--predictions", type=click.Path(path_type=Path), help="CSV of every answer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    path: Path, split: str, data: str, input_column: str, label_column: str,
    report: Path | None, predictions: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure PATH, a run (through torch) or a bundle (through the device runtime).

    \b
    Examples:
      edgetune eval runs/intents --report report.html
      edgetune eval runs/intents --split val
      edgetune eval bundles/intents --data test.csv --label-column intent
    """  # noqa: D301
    from edgetune.bench.evaluate import evaluate

    with counter("measuring") as progress:
        result = evaluate(
            path, split=split, data=data, progress=progress, input_column=input_column,
            label_column=label_column,
        )  # fmt: skip
    if report is not None:
        _write_report(report, result)
    if predictions is not None:
        _write_predictions(predictions, result)
    if as_json:
        echo_json({"facts": dict(result.facts), **to_mapping(result.report)})
        return
    for name, value in result.facts.items():
        click.echo(f"{name + ':':<18} {value}")
    click.echo(f"{'samples:':<18} {result.report.samples}\n")
    _print(result)
    if report is not None:
        click.echo(f"\nreport: {report}")
    if predictions is not None:
        click.echo(f"predictions: {predictions}")


def _print(result: "Evaluated") -> None:
    report = result.report
    rows: list[tuple[object, ...]] = []
    for title, attribute in HEADLINES:
        interval = getattr(report, attribute)
        rows.append((title, f"{interval.value:.4f}", f"{interval.low:.4f} to {interval.high:.4f}"))
    echo_table(("metric", "value", "95 % interval"), rows)
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
    labels = result.answers.labels
    if len(labels) <= MOST_COLUMNS_PRINTED:
        click.echo("\nconfusion matrix (rows: truth, columns: predicted, in the same order)")
        echo_table(
            ("", *[str(i) for i in range(len(labels))]),
            [
                (f"{i} {label}", *row)
                for i, (label, row) in enumerate(zip(labels, report.confusion, strict=True))
            ],
        )


def _write_report(path: Path, result: "Evaluated") -> None:
    from edgetune.bench.evaluate import worst_mistakes
    from edgetune.bench.report import write_report

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

    answers = result.answers
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("where", "input", "truth", "predicted", "score"))
        for i, predicted in enumerate(answers.predicted):
            writer.writerow(
                (
                    answers.split.where[i], answers.split.inputs[i],
                    answers.labels[answers.truth[i]], answers.labels[predicted],
                    json.dumps(round(float(answers.probabilities[i, predicted]), 6)),
                )
            )  # fmt: skip
