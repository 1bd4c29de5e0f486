"""`edgetune merge`: what devices learned becomes the next release of their bundle."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.output import echo_json, echo_table
from edgetune.runtime.cli.lazy import printable

if TYPE_CHECKING:
    from edgetune.export.merge import Weights

WEIGHTS: "tuple[Weights, ...]" = ("samples", "equal")
SHOWN_DEVICES = 20


@click.command("merge")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--release", type=int, help="Release counter.  [default: the bundle's and one]")
@click.option(
    "--max-drop", type=float,
    help="Largest loss of accuracy on the bundle's canary, a share, with 95 % confidence."
    "  [default: what the canary can prove]",
)  # fmt: skip
@click.option(
    "--weights", type=click.Choice(WEIGHTS), default="samples", show_default=True,
    help="samples: every sample weighs the same; equal: every device.",
)  # fmt: skip
@click.option("--delta", type=float, default=1e-6, show_default=True, help="Of what noise proves.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    bundle: Path, files: tuple[Path, ...], output: Path, release: int | None,
    max_drop: float | None, weights: "Weights", delta: float, as_json: bool,
) -> None:  # fmt: skip
    """Merge FILES, which devices made of BUNDLE with edgetune-rt export-learned, into a new bundle.

    Sums of samples are added, which is exact; trained tensors are averaged. Of a folder all .npz
    files are taken; of a device, its last generation.

    \b
    Example:
      edgetune merge bundles/intents fleet/ --output bundles/intents-2

    Exits with 5, and writes no bundle, where the new model may be worse on the bundle's canary.
    """  # noqa: D301
    from edgetune.export.merge import merge_bundle

    result = merge_bundle(
        bundle, files, output=output, release=release, max_drop=max_drop, weights=weights,
        delta=delta,
    )  # fmt: skip
    if as_json:
        from edgetune.runtime.records import to_mapping

        echo_json({**to_mapping(result), "bundle": str(result.bundle)})
        return
    rows = [
        (printable(c.where), c.generation, round(c.samples, 1), c.noise)
        for c in result.contributions[:SHOWN_DEVICES]
    ]
    echo_table(("device", "generation", "samples", "noise"), rows)
    if len(result.contributions) > SHOWN_DEVICES:
        click.echo(f"... and {len(result.contributions) - SHOWN_DEVICES} more")
    click.echo(f"\ncanary, right: {result.canary[0]:.1%} before, {result.canary[1]:.1%} after")
    for reason in result.reasons:
        click.echo(printable(reason))
    for note in result.notes:
        click.echo(f"note: {printable(note)}")
    new = ", ".join(map(printable, result.new_labels)) or "none"
    click.echo(f"new labels: {new}\nbundle: {result.bundle}, release {result.release}")
