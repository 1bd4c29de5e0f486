"""`edgetune-rt doctor`: is this device able to run this bundle."""

import json
import sys
import textwrap
from pathlib import Path

import click

from edgetune.runtime.cli.lazy import printable
from edgetune.runtime.cli.options import BUNDLE, JSON
from edgetune.runtime.records import to_mapping

WIDTH = 100
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command("doctor")
@BUNDLE
@JSON
@click.option("--no-goldens", is_flag=True, help="Load the bundle, but replay no goldens.")
def command(bundle: Path, as_json: bool, no_goldens: bool) -> None:
    """Say whether this device is able to run a bundle, and what to do where it is not.

    Exits with 0 if there is no problem; warnings are none. Else with the worst problem's code:
    6, the bundle is damaged or answers wrongly here; then 2, something is to be installed or
    exported anew; then 4, memory is short or a file cannot be read; then 1, anything else.
    """
    from edgetune.runtime.doctor.rules import examine

    diagnosis = examine(bundle, goldens=not no_goldens)
    if as_json:
        click.echo(json.dumps(to_mapping(diagnosis), indent=2, ensure_ascii=False))
        sys.exit(diagnosis.exit_code)
    names = max(len(check.name) for check in diagnosis.checks)
    margin = len("problem") + names + 4
    for check in diagnosis.checks:
        status = click.style(f"{check.status:<7}", fg=COLOURS[check.status])
        lines = _wrap(printable(check.found), WIDTH - margin)
        lines += _wrap(printable(f"-> {check.cure}"), WIDTH - margin) if check.cure else []
        rest = "".join(f"\n{' ' * margin}{line}" for line in lines[1:])
        click.echo(f"{status}  {check.name:<{names}}  {lines[0]}{rest}")
    click.echo(_summary([check.status for check in diagnosis.checks]))
    sys.exit(diagnosis.exit_code)


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _summary(statuses: list[str]) -> str:
    counts = {status: statuses.count(status) for status in ("problem", "warning")}
    said = [f"{n} {status}{'s' if n > 1 else ''}" for status, n in counts.items() if n]
    able = "cannot" if counts["problem"] else "can"
    return f"this device {able} run the bundle" + (f": {', '.join(said)}" if said else "")
