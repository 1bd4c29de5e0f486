"""docs/train.md names every key of the training config, with the default that it has."""

import dataclasses
import re
from pathlib import Path

import pytest

from edgetune.config import TrainConfig, choices
from edgetune.models.adapt import DEFAULT_LR

PAGE = (Path(__file__).parents[1] / "docs" / "train.md").read_text(encoding="utf-8")
FIELDS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
# between the cells of a Markdown table; "\|" stands for the character itself
CELL = re.compile(r"(?<!\\)\|")


def rows(section: str) -> dict[str, list[str]]:
    """Return the table rows of a section by the code in their first cell."""
    _, _, after = PAGE.partition(f"\n## {section}\n")
    assert after, f"no section {section!r}"
    text = after.partition("\n## ")[0]
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| `") and not line.startswith("| `--"):
            first, *others = (c.strip().replace("\\|", "|") for c in CELL.split(line)[1:-1])
            key = first.strip("`")
            assert key not in found, f"{key} is there twice"
            found[key] = others
    return found


KEYS = rows("All keys")


def test_every_key_and_no_other_has_a_row():
    assert KEYS.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_the_default_that_is_written_is_the_one_that_is_taken(name):
    default, written = FIELDS[name], KEYS[name][0]
    if default is None or default in ("", ()):
        assert written, "say in words what is taken instead"
    elif isinstance(default, bool):
        assert written == f"`{str(default).lower()}`"
    elif isinstance(default, int | float):
        assert float(written.strip("`")) == default
    else:
        assert written == f"`{default}`"


@pytest.mark.parametrize("name", [name for name in FIELDS if choices(name)])
def test_every_word_that_a_key_may_have_is_named(name):
    words = re.findall(r"\w+", " ".join(KEYS[name]))
    assert set(choices(name)) <= set(words)


def test_every_method_stands_with_its_learning_rate():
    written = {name: float(cells[1]) for name, cells in rows("Methods").items()}
    assert written == DEFAULT_LR
