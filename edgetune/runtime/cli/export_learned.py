"""`edgetune-rt export-learned`: a file of what this device learned, to send home."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.errors import ConfigError
from edgetune.runtime.cli.lazy import printable
from edgetune.runtime.cli.options import BUNDLE, JSON

if TYPE_CHECKING:
    from edgetune.runtime.learn.exchange import Exported

SHOWN_CLASSES = 20


@click.command("export-learned")
@BUNDLE
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--learned", type=click.Path(path_type=Path), metavar="DIR",
    help="Folder that it was learned in.  [default: BUNDLE.learned]",
)  # fmt: skip
@click.option(
    "--min-count", type=int, default=2, show_default=True,
    help="Leave out classes with fewer samples: the mean of one sample is that sample.",
)  # fmt: skip
@click.option(
    "--noise-multiplier", type=float, metavar="S",
    help="Add noise that hides single samples; edgetune privacy finds S for an epsilon.",
)  # fmt: skip
@click.option(
    "--clip", type=float, metavar="C",
    help="Longest features, with noise.  [default: what 9 of 10 canary samples keep to]",
)  # fmt: skip
@click.option(
    "--label", "labels", multiple=True,
    help="With noise: a label to send, which anyone may know; others are left out. May be"
    " repeated.  [default: the bundle's]",
)  # fmt: skip
@JSON
def command(
    bundle: Path, output: Path, learned: Path | None, min_count: int,
    noise_multiplier: float | None, clip: float | None, labels: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Write what was learned of BUNDLE to the new file OUTPUT, for `edgetune merge`.

    It holds sums or trained tensors of what was committed, and no sample. docs/fleet.md says
    what it can tell of the samples all the same.
    """
    from edgetune.runtime.files import write_atomic
    from edgetune.runtime.learn.exchange import dump_fleet_file, export_learned

    if output.exists():
        raise ConfigError(f"output {output}: exists already; name another file")
    exported = export_learned(
        bundle, learned, min_count=min_count, noise_multiplier=noise_multiplier, clip=clip,
        labels=labels,
    )  # fmt: skip
    data = dump_fleet_file(exported.file)
    write_atomic(output, data)
    if as_json:
        click.echo(json.dumps(_as_json(exported, output, len(data)), ensure_ascii=False))
        return
    _show(exported)
    click.echo(f"{output}: {len(data) / 1024:.0f} KiB")


def _show(exported: "Exported") -> None:
    file = exported.file
    what = (
        f"sums of {file.statistics.width} features"
        if file.statistics is not None
        else f"{len(file.tensors)} trained tensors"
    )
    click.echo(f"{printable(file.bundle)}, generation {file.generation}: {what}; no sample")
    about = "about " if file.privacy else ""
    counted = list(zip(file.labels, file.counts, strict=True))
    for label, count in counted[:SHOWN_CLASSES]:
        click.echo(f"    {printable(label)}\t{about}{count:.0f}")
    if len(counted) > SHOWN_CLASSES:
        click.echo(f"    ... and {len(counted) - SHOWN_CLASSES} more")
    for label, count in sorted(exported.left_out.items()):
        click.echo(f"left out: {printable(label)} ({count})")
    if file.privacy:
        click.echo(
            f"noise of {file.privacy.noise_multiplier:g} times the sensitivity, features clipped"
            f" to {file.privacy.clip:.4g} ({exported.clipped:.1%} were longer); edgetune privacy"
            f" --noise-multiplier {file.privacy.noise_multiplier:g} says what that proves"
        )
    else:
        click.echo(
            "without noise: sums of few samples can tell much of them; see docs/fleet.md and"
            " --noise-multiplier"
        )


def _as_json(exported: "Exported", output: Path, size: int) -> dict[str, object]:
    from edgetune.runtime.records import to_mapping

    file = exported.file
    return {
        "output": str(output),
        "bytes": size,
        "kind": file.kind,
        "id": file.id,
        "source": file.source,
        "generation": file.generation,
        "counts": dict(zip(file.labels, file.counts.tolist(), strict=True)),
        "left_out": exported.left_out,
        "privacy": None if file.privacy is None else to_mapping(file.privacy),
    }
