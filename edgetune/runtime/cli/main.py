"""The table of `edgetune-rt`'s commands."""

import click

from edgetune import __version__
from edgetune.runtime.cli.lazy import LazyGroup, run_command_line

COMMANDS = {
    "info": ("edgetune.runtime.cli.info:command", "Say what a bundle is and what it needs."),
    "verify": ("edgetune.runtime.cli.verify:command", "Check every hash, replay the goldens."),
    "doctor": ("edgetune.runtime.cli.doctor:command", "Say whether this device can run it."),
    "run": ("edgetune.runtime.cli.run:command", "Predict for texts or images."),
    "serve": ("edgetune.runtime.cli.serve:command", "Answer over HTTP."),
    "serve-stdin": ("edgetune.runtime.cli.serve_stdin:command", "Answer line by line."),
    "learn": ("edgetune.runtime.cli.learn:command", "Teach it samples and classes."),
    "export-learned": (
        "edgetune.runtime.cli.export_learned:command",
        "Write what it learned to a file, to send home.",
    ),
    "drift": ("edgetune.runtime.cli.drift:command", "Say what a device has seen of late."),
    "pack": ("edgetune.runtime.cli.pack:pack", "Make one file of a bundle's folder."),
    "unpack": ("edgetune.runtime.cli.pack:unpack", "Make a folder of a bundle's file."),
}


@click.group(
    cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="edgetune-rt")
def cli() -> None:
    """Run edgetune bundles on a device."""


def main() -> None:
    """Run `edgetune-rt`."""
    run_command_line(cli)
