"""`edgetune-rt run`: predict for what stands on the command line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from edgetune.runtime.cli.lazy import printable
from edgetune.runtime.cli.lines import lines
from edgetune.runtime.cli.options import ALL_SCORES, BUNDLE, JSON, LEARNED, WATCH
from edgetune.runtime.records import to_mapping


@click.command("run")
@BUNDLE
@click.argument("inputs", nargs=-1, required=True)
@ALL_SCORES
@WATCH
@LEARNED
@JSON
def command(
    bundle: Path,
    inputs: tuple[str, ...],
    all_scores: bool,
    watch: Path | None,
    learned: Path | None,
    as_json: bool,
) -> None:
    """Predict for INPUTS: texts, or paths of images; "-" reads one a line from standard input."""
    from edgetune.runtime.model import EdgeModel

    with EdgeModel.load(bundle, watch=watch, learned=learned) as model:
        for sample in _samples(inputs):
            result = model.predict(sample, all_scores=all_scores)
            if as_json:
                click.echo(json.dumps({"input": sample, **to_mapping(result)}, ensure_ascii=False))
                continue
            mark = "\tabstained" if getattr(result, "abstained", None) else ""
            click.echo(f"{_shown(result)}\t{printable(sample)}{mark}")
            if all_scores and (scores := getattr(result, "scores", None)):
                for label, score in sorted(scores.items(), key=lambda item: -item[1]):
                    click.echo(f"    {printable(label)}\t{score:.4f}")


def _shown(result: Any) -> str:
    """Return a class and its score, the labels with theirs, or a value."""
    if hasattr(result, "label"):
        return f"{printable(result.label)}\t{result.score:.4f}"
    if hasattr(result, "value"):
        return f"{result.value:.6g}"
    given = [f"{printable(label)} {result.scores[label]:.4f}" for label in result.labels]
    return ", ".join(given) or "(no label)"


def _samples(inputs: tuple[str, ...]) -> Iterator[str]:
    for value in inputs:
        if value == "-":
            yield from lines()
        else:
            yield value
