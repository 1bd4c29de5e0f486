"""`edgetune export`: a run becomes a bundle for a device."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.output import echo_json, echo_table

if TYPE_CHECKING:
    from edgetune.export import ExportResult


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--profile", default="host", show_default=True, help="Device (edgetune profiles).")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--precision", type=click.Choice(["int8", "fp32"]), default="int8", show_default=True,
    help="Of weights and arithmetic.",
)  # fmt: skip
@click.option(
    "--max-drop", type=float, default=0.02, show_default=True,
    help="Largest loss of validation accuracy against fp32, as a share.",
)  # fmt: skip
@click.option("--name", default="", help="The bundle's name.  [default: the run's]")
@click.option("--release", type=int, default=1, show_default=True, help="Release counter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    run: Path, profile: str, output: Path | None, precision: str, max_drop: float, name: str,
    release: int, as_json: bool,
) -> None:  # fmt: skip
    """Turn a run into a bundle: merged, quantized, checked and measured.

    \b
    Examples:
      edgetune export runs/intents --profile raspberry-pi-5
      edgetune export runs/photos --profile x86-64-avx2 --max-drop 0.01 --output bundles/photos

    Exits with 5, and writes nothing, where the graph does not answer as the trained model does.
    """  # noqa: D301
    from edgetune.cli.progress import stage_lines
    from edgetune.export import export

    with stage_lines() as say:
        result = export(
            run, profile=profile, output=output,
            precision="fp32" if precision == "fp32" else "int8",
            max_drop=max_drop, name=name, release=release, on_stage=say,
        )  # fmt: skip
    rows = comparison_rows(result)
    if as_json:
        echo_json(
            {
                "bundle": str(result.bundle),
                "profile": result.profile,
                "parity": result.parity,
                "drop": result.drop and {
                    "value": result.drop.drop.value,
                    "low": result.drop.drop.low,
                    "high": result.drop.drop.high,
                    "samples": result.drop.samples,
                    "agreement": result.drop.agreement,
                },
                "candidates": [dict(zip(COMPARISON, row, strict=True)) for row in rows],
                "notes": list(result.notes),
            }
        )  # fmt: skip
        return
    echo_comparison(result)
    if result.drop is not None:
        drop = result.drop
        click.echo(
            f"int8 against fp32 on the validation split: {100 * drop.drop.value:+.2f} points lost"
            f" (95 % interval {100 * drop.drop.low:+.2f} to {100 * drop.drop.high:+.2f}),"
            f" same answer on {100 * drop.agreement:.1f} % of {drop.samples} samples"
        )
    for note in result.notes:
        click.echo(f"note: {note}")
    if result.profile != "host":
        click.echo(f"latency is this machine's, not {result.profile}'s")
    click.echo(f"bundle: {result.bundle}")


def echo_comparison(result: "ExportResult") -> None:
    """Print torch and the graphs side by side."""
    shown = result.torch.split
    click.echo(f"on {len(shown.labels)} {shown.name} samples:")
    echo_table(COMPARISON, comparison_rows(result))


COMPARISON = ("model", "accuracy", "95 % interval", "size MiB", "latency p50 ms")


def comparison_rows(result: "ExportResult") -> list[tuple[object, ...]]:
    """Return one row for torch and one for each graph: accuracy, size, latency."""
    torch = result.torch.report().accuracy
    rows: list[tuple[object, ...]] = [
        (
            "fp32 torch", round(torch.value, 4), f"{torch.low:.4f} to {torch.high:.4f}",
            round(result.torch_size_bytes / 2**20, 1), round(result.torch_latency_ms, 2),
        )
    ]  # fmt: skip
    for candidate in result.candidates:
        accuracy = candidate.answers.report().accuracy
        rows.append(
            (
                f"{candidate.precision} onnx", round(accuracy.value, 4),
                f"{accuracy.low:.4f} to {accuracy.high:.4f}",
                round(candidate.size_bytes / 2**20, 1), round(candidate.latency_p50_ms, 2),
            )
        )  # fmt: skip
    return rows
