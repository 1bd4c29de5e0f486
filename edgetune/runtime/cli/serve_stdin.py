"""`edgetune-rt serve-stdin`: one line in, one line of JSON out."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.errors import DataError, EdgetuneError
from edgetune.runtime.cli.lines import lines
from edgetune.runtime.cli.options import ALL_SCORES, BUNDLE, WATCH
from edgetune.runtime.records import to_mapping

if TYPE_CHECKING:
    from edgetune.runtime.model import EdgeModel


@click.command("serve-stdin")
@BUNDLE
@ALL_SCORES
@WATCH
def command(bundle: Path, all_scores: bool, watch: Path | None) -> None:
    """Answer each line of standard input with one line of JSON, until it ends.

    A line is a text, or the path of an image; or a JSON object {"id": ..., "input": ...},
    whose id comes back; a blank one is skipped. A sample that can't be answered gives
    {"error": ...} and the next line is read.
    """
    from edgetune.runtime.model import EdgeModel

    with EdgeModel.load(bundle, watch=watch) as model:
        for text in lines():
            click.echo(json.dumps(_answer(model, text, all_scores), ensure_ascii=False))
            sys.stdout.flush()


def _answer(model: "EdgeModel", text: str, all_scores: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    try:
        sample: Any = text
        if text.startswith("{"):
            request = _parse_request(text)
            if "id" in request:
                answer["id"] = request["id"]
            sample = request.get("input")
            if not isinstance(sample, str):
                raise DataError('expected a key "input" with a string')
        start = time.perf_counter()
        answer.update(to_mapping(model.predict(sample, all_scores=all_scores)))
        answer["milliseconds"] = round((time.perf_counter() - start) * 1e3, 3)
    except EdgetuneError as error:
        answer["error"] = str(error)
    return answer


def _parse_request(text: str) -> dict[str, Any]:
    try:
        request: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no valid JSON: {error}") from error
    return request
