"""What both command lines share: commands loaded one at a time, and the one `except`."""

import contextlib
import importlib
import io
import signal
import sys
from collections.abc import Mapping
from typing import Any

import click

from edgetune.errors import EdgetuneError, ResourceError
from edgetune.runtime.records import nearest

# name -> (where its click command lies, the line that --help shows)
Commands = Mapping[str, tuple[str, str]]


class LazyGroup(click.Group):
    """A group that imports a command's module when that command is asked for, not before."""

    def __init__(self, *arguments: Any, table: Commands, **options: Any) -> None:
        """Take the table of commands, in the order that --help lists them."""
        super().__init__(*arguments, **options)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the commands in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return the command of that name."""
        if cmd_name not in self.table:
            return None
        module, _, attribute = self.table[cmd_name][0].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.table.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command when one is unknown."""
        if args and args[0] not in self.table and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{nearest(args[0], self.table)}")
        return super().resolve_command(ctx, args)


def printable(text: str) -> str:
    """Return `text` with what is no letter, sign or space escaped: it could steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _end(number: int, frame: object) -> None:  # noqa: ARG001
    sys.exit(128 + number)


def run_command_line(group: click.Group) -> None:
    """Run a command line; an edgetune error becomes one line and its exit code."""
    # a path or label that the terminal's encoding lacks is shown escaped
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _end)  # as Ctrl-C does: what was begun is tidied up
    try:
        group.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except EdgetuneError as error:
        click.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # disk, device or network; where the code knew better it raised an error of its own
        click.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(ResourceError.exit_code)
