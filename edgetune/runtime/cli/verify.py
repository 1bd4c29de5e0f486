"""`edgetune-rt verify`: is it whole, and does this device answer as the exporter did."""

import json
from pathlib import Path

import click

from edgetune.runtime.bundle import open_bundle, verify_files
from edgetune.runtime.cli.options import BUNDLE, JSON


@click.command("verify")
@BUNDLE
@JSON
def command(bundle: Path, as_json: bool) -> None:
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
