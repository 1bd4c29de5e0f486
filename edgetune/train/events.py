"""What training says while it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something to show; what `values` holds goes by the kind."""

    kind: Literal["preparing", "plan", "step", "epoch", "note", "interrupted", "finished"]
    values: Mapping[str, Any]


OnEvent = Callable[[Event], None]


def silent(event: Event) -> None:
    """Show nothing."""


def note(text: str) -> Event:
    """Return a line for the user."""
    return Event(kind="note", values={"text": text})
