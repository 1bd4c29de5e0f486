"""metrics.jsonl: one line an epoch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.runtime.files import write_atomic

HISTORY_NAME = "metrics.jsonl"


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return a run's metrics, one mapping an epoch; [] where there is none."""
    path = folder / HISTORY_NAME
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def write_history(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write a run's metrics, whole or not at all."""
    text = "".join(json.dumps(line) + "\n" for line in history)
    write_atomic(folder / HISTORY_NAME, text.encode())
