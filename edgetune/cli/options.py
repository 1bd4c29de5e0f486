"""Command-line options made from the training config's fields."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

import click

from edgetune.config import TrainConfig, choices

F = Callable[..., Any]


def config_options(function: F) -> F:
    """Add one option a field of `TrainConfig`: same word, dashes for underscores.

    An option that is not given is None (or (), where it may be repeated), so that the config
    file's value stands.
    """
    hints = get_type_hints(TrainConfig)
    for field in reversed(dataclasses.fields(TrainConfig)):
        function = _option(field, hints[field.name])(function)
    return function


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {
        k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v not in (None, ())
    }


def _option(field: "dataclasses.Field[Any]", hint: Any) -> Callable[[F], F]:
    flag = "--" + field.name.replace("_", "-")
    text = field.metadata["help"]
    if field.default not in (None, "", ()):
        shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
        text += f"  [default: {shown}]"
    if hint is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=text)
    words = choices(field.name)
    many = get_origin(hint) is tuple
    if words and many:
        return click.option(
            flag, field.name, type=click.Choice(words), multiple=True, default=None,
            help=text + " (may be repeated)",
        )  # fmt: skip
    if words:
        return click.option(flag, field.name, type=click.Choice(words), default=None, help=text)
    types = [a for a in (*get_args(hint), hint) if a in (int, float, str)]
    return click.option(
        flag,
        field.name,
        type=types[0] if types else str,
        multiple=many,
        default=None,
        help=text + (" (may be repeated)" if many else ""),
    )
