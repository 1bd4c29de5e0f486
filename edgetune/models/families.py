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
    source: Literal["transformers", "torchvision", "timm"]
    match: tuple[str, ...]
    blocks: tuple[str, ...]
    head: tuple[str, ...]
    output: str
    stem: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    lora_regex: str = ""
    ffn: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    head_size: str = ""
    reserved: int = 0
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
    """Return the family of a transformers model type, or of a torchvision or timm model name.

    Raises:
        ConfigError: no row matches.
    """
    rows = [family for family in families() if family.source == source]
    if source == "transformers":
        found = [family for family in rows if kind in family.match]
    else:
        fits = [(len(p), f) for f in rows for p in f.match if kind.startswith(p)]
        found = [family for _, family in sorted(fits, key=lambda fit: -fit[0])]
    if found:
        return found[0]
    known = ", ".join(sorted(m for f in rows for m in f.match))
    raise ConfigError(f"{source} model {kind!r} is of no known family; known: {known}")


def check_family(network: nn.Module, family: Family, *, name: str) -> None:
    """Check that a network has the parts that its row names.

    A name's prefix says little: timm has a `resnet32ts` that is built unlike its `resnet34`.

    Raises:
        ConfigError: its blocks, head or output are not there.
    """
    parts = (*family.head, family.output)
    lacking = [path for path in parts if not any(present(network, (path,)))]
    if not lacking and not blocks(network, family):
        lacking = [*family.blocks, *family.units]
    if lacking:
        raise ConfigError(
            f"{name} is built unlike the other models of family {family.name}: it has no"
            f" {', '.join(lacking)}; take another of them"
        )


def blocks(network: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    """Return the network's blocks as (name, module), from the input to the output."""
    return [
        *(
            (f"{container}.{name}", child)
            for container, module in present(network, family.blocks)
            for name, child in module.named_children()
        ),
        *present(network, family.units),
    ]


def present(network: nn.Module, paths: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of those paths that the network has."""
    for path in paths:
        try:
            module = network.get_submodule(path)
        except AttributeError:
            continue
        yield path, module
