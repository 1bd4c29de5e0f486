"""What commands print: aligned tables and JSON."""

import json
from collections.abc import Sequence

import click

from edgetune.runtime.records import to_mapping


def echo_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header, columns aligned; numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *cells]) for i in range(len(header))]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        for i in range(len(header))
    ]
    click.echo(_line(header, widths, numeric))
    click.echo("  ".join("-" * w for w in widths))
    for row in cells:
        click.echo(_line(row, widths, numeric))


def echo_json(record: object) -> None:
    """Print a dataclass or a plain value as indented JSON."""
    plain = to_mapping(record) if hasattr(record, "__dataclass_fields__") else record
    click.echo(json.dumps(plain, indent=2, ensure_ascii=False))


def _line(row: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    parts = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
    return "  ".join(parts).rstrip()
