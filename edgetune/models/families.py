"""Model families: the rows of families.toml."""

import functools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from torch import nn

from edgetune.errors import ConfigError
from edgetune.runtime.records import from_mapping


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row; families.toml says what each key means."""

    name: str
    source: Literal["transformers", "torchvision"]
    match: tuple[str, ...]
    blocks: tuple[str, ...]
    head: tuple[str, ...]
    output: str
    tail: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    lora_regex: str = ""
    ffn: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    head_size: str = ""
    int8: Literal["dynamic", "static"]


@functools.cache
def families() -> tuple[Family, ...]:
    """Return every row.

    Raises:
        ConfigError: a row has an unknown key or lacks one.
    """
    text = resources.files("edgetune.models").joinpath("families.toml").read_text("utf-8")
    return tuple(
        from_mapping(Family, {"name": name, **row}, where=f"families.toml: {name}")
        for name, row in tomllib.loads(text).items()
    )


def find_family(source: str, kind: str) -> Family:
    """Return the family of a transformers model type or a torchvision model name.

    Raises:
        ConfigError: no row matches.
    """
    for family in families():
        if family.source != source:
            continue
        if kind in family.match or (source == "torchvision" and kind.startswith(family.match)):
            return family
    known = ", ".join(sorted(m for f in families() if f.source == source for m in f.match))
    raise ConfigError(f"{source} model {kind!r} is of no known family; known: {known}")


def blocks(network: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    """Return the network's blocks as (name, module), from the input to the output."""
    return [
        (f"{container}.{name}", child)
        for container, module in present(network, family.blocks)
        for name, child in module.named_children()
    ]


def present(network: nn.Module, paths: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of those paths that the network has."""
    for path in paths:
        try:
            module = network.get_submodule(path)
        except AttributeError:
            continue
        yield path, module
