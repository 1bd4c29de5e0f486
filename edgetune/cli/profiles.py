"""`edgetune profiles`: the devices that edgetune knows."""

import json
import textwrap
from collections.abc import Mapping
from typing import Any

import click

from edgetune.cli.output import echo_json, echo_table
from edgetune.errors import ConfigError
from edgetune.profile import DeviceProfile, load_profile, profile_names
from edgetune.runtime.records import to_mapping


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> None:
    """List the device profiles, or show the one of that NAME (or TOML file) in full.

    What is shown is TOML: redirect it to a file to begin a profile of your own, and give that
    file's path wherever a profile's name is asked for.
    """
    if name is not None:
        profile = load_profile(name)
        if as_json:
            echo_json(profile)
        else:
            click.echo(format_toml(to_mapping(profile)))
        return
    profiles = _load_all()
    if as_json:
        echo_json([to_mapping(p) for p in profiles])
        return
    header = ("name", "CPU", "arch", "cores", "memory MiB", "int8", "threads")
    echo_table(header, [_row(p) for p in profiles])


def format_toml(mapping: Mapping[str, Any]) -> str:
    """Return `mapping` (scalars, lists, tables one level deep) as TOML."""
    lines = [f"{k} = {_value(v)}" for k, v in mapping.items() if not isinstance(v, Mapping)]
    for key, table in mapping.items():
        if isinstance(table, Mapping) and table:
            lines += ["", f"[{key}]", *(f"{k} = {_value(v)}" for k, v in table.items())]
    return "\n".join(lines)


def _load_all() -> list[DeviceProfile]:
    profiles = []
    for name in profile_names():
        try:
            profiles.append(load_profile(name))
        except ConfigError as error:
            if name != "host":
                raise
            # a machine that edgetune has no profile for can still list the others
            click.echo(f"note: {error}", err=True)
    return profiles


def _row(profile: DeviceProfile) -> tuple[object, ...]:
    return (
        profile.name,
        textwrap.shorten(profile.cpu.model, 44, placeholder=" ..."),
        profile.cpu.arch,
        profile.cpu.cores,
        profile.memory.total_mib,
        profile.cpu.int8 if profile.precision.int8 else "not used",
        profile.runtime.intra_op_threads,
    )


def _value(value: object) -> str:
    # TOML writes strings, booleans, whole numbers and lists of them as JSON does
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
