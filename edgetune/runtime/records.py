"""Strict reading of JSON and TOML into frozen dataclasses, and back.

One mechanism for the manifest, profiles, configs and run records: every key must be
known, every value must have its declared type, and nothing is converted silently
(except int -> float and list -> tuple, which lose nothing).
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from edgetune.errors import ConfigError, EdgetuneError

T = TypeVar("T")
_LONGEST_WORD = 200


def from_mapping(
    cls: type[T],
    mapping: Mapping[str, object],
    *,
    where: str,
    error: type[EdgetuneError] = ConfigError,
    aliases: Mapping[str, str] | None = None,
) -> T:
    """Build the dataclass `cls` from `mapping`.

    Args:
        cls: a dataclass whose annotations are str, int, float, bool, Literal, X | None,
            tuple[X, ...], dict[str, X] or other such dataclasses.
        mapping: parsed JSON or TOML.
        where: what is being read, for messages ("train.toml", "manifest.json").
        error: the error to raise.
        aliases: names that people use for a key, to suggest the right one.

    Raises:
        error: a key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise error(f"{where}: expected a table of keys, got {_describe(mapping)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = _hints(cls)  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            raise error(f"{where}: unknown key {_cut(repr(key))}{nearest(key, fields, aliases)}")
    values: dict[str, object] = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], f"{where}: {name}", error)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"{where}: key {name!r} is missing")
    return cls(**values)


def to_mapping(record: object) -> dict[str, Any]:
    """Turn a dataclass instance into plain dicts, lists and scalars; None is left out."""
    return {
        f.name: _plain(value)
        for f in dataclasses.fields(record)  # type: ignore[arg-type]
        if (value := getattr(record, f.name)) is not None
    }


def nearest(
    word: str, known: typing.Iterable[str], aliases: Mapping[str, str] | None = None
) -> str:
    """Return "; did you mean 'x'?" for the known name nearest to `word`, or the list of names."""
    import difflib  # only an error needs it; a device starts without

    names = sorted(known)
    if aliases and word in aliases:
        return f"; did you mean {aliases[word]!r}?"
    if len(word) > _LONGEST_WORD:  # difflib takes seconds for megabytes
        return f"; known: {', '.join(names)}"
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}"


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _convert(hint: Any, value: object, where: str, error: type[EdgetuneError]) -> object:
    if hint is Any:
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, where, error)
            except error:
                continue
        return _convert(options[-1], value, where, error)
    if origin is Literal:
        if value not in args or type(value) not in {type(a) for a in args}:
            hint_text = _short(nearest(value, args)) if isinstance(value, str) else ""
            listed = ", ".join(map(repr, args))
            raise error(f"{where}: expected one of {listed}, got {_cut(repr(value))}{hint_text}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise error(f"{where}: expected a list, got {_describe(value)}")
        return tuple(_convert(args[0], v, f"{where}[{i}]", error) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise error(f"{where}: expected a table of keys, got {_describe(value)}")
        return {str(k): _convert(args[1], v, f"{where}.{k}", error) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, where=where, error=error)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise error(f"{where}: {_cut(repr(value))} is too large") from None
    if hint is bool or isinstance(value, bool):
        correct = hint is bool and isinstance(value, bool)
    else:
        correct = isinstance(value, hint)
    if not correct:
        raise error(f"{where}: expected {_TYPE_NAMES.get(hint, str(hint))}, got {_describe(value)}")
    return value


_TYPE_NAMES: dict[Any, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def _short(text: str) -> str:
    return text if "did you mean" in text else ""


def _describe(value: object) -> str:
    return f"{_cut(repr(value))} ({type(value).__name__})"


def _cut(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
