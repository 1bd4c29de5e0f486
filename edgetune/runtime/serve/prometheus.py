"""Counters and histograms in Prometheus' text format.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4).
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One line: what is appended to the family's name, labels, a value."""

    value: float
    labels: Mapping[str, str]
    suffix: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """All samples of one name."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: Sequence[Sample]


class Counter:
    """A number that grows, for each combination of label values. Not thread-safe."""

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        """Start at nothing; `set_zero` makes a combination visible before it is first counted."""
        self.name = name
        self.help = help_text
        self.labels = tuple(labels)
        self._values: dict[tuple[str, ...], float] = {}

    def set_zero(self, *values: str) -> None:
        """Show this combination from the start, as rates need it."""
        self._values.setdefault(values, 0)

    def add(self, *values: str, by: float = 1) -> None:
        """Count for this combination of label values."""
        self._values[values] = self._values.get(values, 0) + by

    def family(self) -> Family:
        """Return what has been counted so far."""
        samples = [
            Sample(value=value, labels=dict(zip(self.labels, values, strict=True)))
            for values, value in sorted(self._values.items())
        ]
        return Family(name=self.name, kind="counter", help=self.help, samples=samples)


class Histogram:
    """How many observations were at most each bound. Not thread-safe."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        """Take the buckets' upper bounds, ascending, without infinity."""
        self.name = name
        self.help = help_text
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self._sum += value

    def family(self) -> Family:
        """Return cumulative buckets, sum and count."""
        samples, total = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self._counts, strict=True):
            total += count
            samples.append(Sample(value=total, labels={"le": _number(bound)}, suffix="_bucket"))
        samples.append(Sample(value=self._sum, labels={}, suffix="_sum"))
        samples.append(Sample(value=total, labels={}, suffix="_count"))
        return Family(name=self.name, kind="histogram", help=self.help, samples=samples)


def gauge(
    name: str, help_text: str, value: float, labels: Mapping[str, str] | None = None
) -> Family:
    """Return a family of one sample: a number that goes up and down."""
    samples = [Sample(value=value, labels=labels or {})]
    return Family(name=name, kind="gauge", help=help_text, samples=samples)


def exposition(families: Iterable[Family]) -> bytes:
    """Return the text that a scrape gets."""
    lines = []
    for family in families:
        lines.append(f"# HELP {family.name} {_escape(family.help)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for sample in family.samples:
            labels = ",".join(
                f'{name}="{_escape(value, quote=True)}"' for name, value in sample.labels.items()
            )
            braces = f"{{{labels}}}" if labels else ""
            lines.append(f"{family.name}{sample.suffix}{braces} {_number(sample.value)}")
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(float(value))


def _escape(text: str, *, quote: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text
