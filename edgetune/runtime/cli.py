"""The `edgetune-rt` command: what a device needs, and nothing of the cloud side."""

import dataclasses
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from edgetune import __version__
from edgetune.errors import DataError, EdgetuneError, ResourceError
from edgetune.runtime.bundle import open_bundle, verify_files
from edgetune.runtime.records import to_mapping

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgetune-rt")
def cli() -> None:
    """Run edgetune bundles on a device."""


@cli.command()
@BUNDLE
@JSON
def info(bundle: Path, as_json: bool) -> None:
    """Say what a bundle is: task, labels, size, accuracy, what it needs."""
    opened = open_bundle(bundle)
    manifest = opened.manifest
    if as_json:
        click.echo(json.dumps(to_mapping(manifest), indent=2, ensure_ascii=False))
        return
    labels = ", ".join(manifest.labels[:12]) + (", ..." if len(manifest.labels) > 12 else "")
    rows = {
        "name": f"{manifest.name}, release {manifest.release}",
        "task": manifest.task,
        "labels": f"{len(manifest.labels)}: {labels}",
        "precision": manifest.precision,
        "profile": manifest.profile,
        "size": f"{opened.size_bytes / 2**20:.1f} MiB in {len(manifest.files)} files",
        "onnxruntime": f"{manifest.compatibility.onnxruntime_min} or newer"
        f" (opset {manifest.compatibility.opset}, IR {manifest.compatibility.ir_version})",
        "threads": str(manifest.session.intra_op_threads),
    }
    for name, metric in manifest.evaluation.metrics.items():
        rows[name] = (
            f"{metric.value:.4f} ({metric.low:.4f} to {metric.high:.4f}, 95 %;"
            f" {manifest.evaluation.samples} {manifest.evaluation.split} samples)"
        )
    if manifest.overrides:
        rows["overrides"] = ", ".join(manifest.overrides)
    width = max(map(len, rows))
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")


@cli.command()
@BUNDLE
@JSON
def verify(bundle: Path, as_json: bool) -> None:
    """Check every hash and replay the goldens; exit 6 if anything differs."""
    opened = open_bundle(bundle)
    verify_files(opened)
    from edgetune.runtime.model import EdgeModel

    worst = EdgeModel(opened).self_test()
    manifest = opened.manifest
    if as_json:
        result = {
            "files": len(manifest.files),
            "goldens": manifest.goldens.count,
            "largest_difference": worst,
            "tolerance": manifest.goldens.tolerance,
        }
        click.echo(json.dumps(result))
        return
    click.echo(f"{len(manifest.files)} files match their SHA-256")
    click.echo(
        f"{manifest.goldens.count} goldens answered as expected"
        f" (largest difference {worst:.2g}, allowed {manifest.goldens.tolerance:.2g})"
    )


@cli.command()
@BUNDLE
@click.argument("inputs", nargs=-1, required=True)
@click.option("--all-scores", is_flag=True, help="Give the score of every label.")
@JSON
def run(bundle: Path, inputs: tuple[str, ...], all_scores: bool, as_json: bool) -> None:
    """Predict for INPUTS: texts, or paths of images; "-" reads one a line from standard input."""
    from edgetune.runtime.model import EdgeModel

    model = EdgeModel.load(bundle)
    for sample in _samples(inputs):
        result = model.predict(sample, all_scores=all_scores)
        if as_json:
            click.echo(json.dumps({"input": sample, **_plain(result)}, ensure_ascii=False))
            continue
        click.echo(f"{result.label}\t{result.score:.4f}\t{sample}")
        if result.scores:
            for label, score in sorted(result.scores.items(), key=lambda item: -item[1]):
                click.echo(f"    {label}\t{score:.4f}")


@cli.command("serve-stdin")
@BUNDLE
@click.option("--all-scores", is_flag=True, help="Give the score of every label.")
def serve_stdin(bundle: Path, all_scores: bool) -> None:
    """Answer each line of standard input with one line of JSON, until it ends.

    A line is a text, or the path of an image; or a JSON object {"id": ..., "input": ...},
    whose id comes back; a blank one is skipped. A sample that can't be answered gives
    {"error": ...} and the next line is read.
    """
    from edgetune.runtime.model import EdgeModel

    model = EdgeModel.load(bundle)
    for text in _lines():
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
            answer.update(_plain(model.predict(sample, all_scores=all_scores)))
            answer["milliseconds"] = round((time.perf_counter() - start) * 1e3, 3)
        except EdgetuneError as error:
            answer["error"] = str(error)
        click.echo(json.dumps(answer, ensure_ascii=False))
        sys.stdout.flush()


def run_command_line(group: click.Group) -> None:
    """Run a command line; an edgetune error becomes one line and its exit code."""
    # a path or label that the terminal's encoding lacks is shown escaped
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        group.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except EdgetuneError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # disk, device or network; where the code knew better it raised an error of its own
        click.echo(f"error: {error}", err=True)
        sys.exit(ResourceError.exit_code)


def main() -> None:
    """Run `edgetune-rt`."""
    run_command_line(cli)


def _samples(inputs: tuple[str, ...]) -> Iterator[str]:
    for value in inputs:
        if value == "-":
            yield from _lines()
        else:
            yield value


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that are not blank; a byte that is no UTF-8 is kept."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\r\n")


def _parse_request(text: str) -> dict[str, Any]:
    try:
        request: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no valid JSON: {error}") from error
    return request


def _plain(result: Any) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(result).items() if v is not None}


if __name__ == "__main__":
    main()
