"""`edgetune-rt pack` and `unpack`: a bundle as one file, and as a folder."""

from pathlib import Path

import click

from edgetune.runtime.cli.options import BUNDLE

OUTPUT = click.argument("output", type=click.Path(path_type=Path))


@click.command("pack")
@BUNDLE
@OUTPUT
def pack(bundle: Path, output: Path) -> None:
    """Write the folder BUNDLE to the zip OUTPUT, which every command takes in its place.

    It is not compressed: a device reads it where it lies.
    """
    from edgetune.runtime.packing import pack as make

    packed = make(bundle, output)
    click.echo(f"{output}: {packed.where.stat().st_size / 2**20:.1f} MiB")


@click.command("unpack")
@BUNDLE
@OUTPUT
def unpack(bundle: Path, output: Path) -> None:
    """Write the zip BUNDLE to the new folder OUTPUT, every hash checked."""
    from edgetune.runtime.packing import unpack as make

    unpacked = make(bundle, output)
    click.echo(f"{output}: {len(unpacked.manifest.files)} files match their SHA-256")
