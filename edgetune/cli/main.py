"""The `edgetune` command: the table of commands, loaded one at a time, and the one `except`."""

import importlib
import os
import sys

import click

from edgetune import __version__
from edgetune.errors import MissingExtraError
from edgetune.runtime.cli import run_command_line
from edgetune.runtime.records import nearest

# name -> (where its click command lies, the line that --help shows)
COMMANDS = {
    "demo": ("edgetune.cli.demo:command", "Take real data to a device, start to end."),
    "data": ("edgetune.cli.data:group", "Look at a data set: what is there, what is wrong."),
    "train": ("edgetune.cli.train:command", "Fine-tune a pretrained model."),
    "eval": ("edgetune.cli.eval:command", "Measure a run or a bundle on labelled data."),
    "export": ("edgetune.cli.export:command", "Turn a run into a bundle for a device."),
    "bench": ("edgetune.cli.bench:command", "Measure a bundle's latency, start and memory."),
    "profiles": ("edgetune.cli.profiles:command", "List the device profiles, or show one."),
    "doctor": ("edgetune.cli.doctor:command", "Say what this machine has and what is wrong."),
}


# what the base install, a device's, does not bring
CLOUD_PACKAGES = (
    "torch", "torchvision", "transformers", "peft", "accelerate", "safetensors", "onnx",
    "onnxscript", "pyarrow", "matplotlib", "rich", "tomli_w",
)  # fmt: skip


class LazyGroup(click.Group):
    """A group that imports a command's module when that command is asked for, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the commands in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return the command of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command when one is unknown."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgetune")
def cli() -> None:
    """Fine-tune a pretrained model, export it for an edge device, and run it there."""


def main() -> None:
    """Run the command line; an edgetune error becomes one line and its exit code."""
    # libraries that report progress or advice of their own would bury ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run_command_line(cli)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in CLOUD_PACKAGES:
            raise
        missing = MissingExtraError(package, "train")
        click.echo(f"error: {missing}", err=True)
        sys.exit(missing.exit_code)


if __name__ == "__main__":
    main()
