"""Arguments and options that several commands take."""

from pathlib import Path

import click

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
ALL_SCORES = click.option("--all-scores", is_flag=True, help="Give the score of every label.")
LEARNED = click.option(
    "--learned",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Answer with what was learned there (edgetune-rt learn).",
)
WATCH = click.option(
    "--watch",
    type=click.Path(path_type=Path),
    help="Folder to note counts, latency, scores and drift in; see docs/drift.md.",
)
