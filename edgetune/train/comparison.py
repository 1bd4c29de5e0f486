"""The validation curves of several runs in one figure.

As in `edgetune.tasks.curves`, matplotlib is imported only when something is drawn.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import ConfigError, DataError
from edgetune.runtime.files import write_atomic
from edgetune.tasks import MINIMIZED
from edgetune.tasks.curves import (
    BLUE,
    GREEN,
    PURPLE,
    VERMILION,
    History,
    figure_style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# four colours that colour-blind readers can tell apart, solid and then dashed
_LINES = [
    (colour, style) for style in ("-", (0, (5, 2))) for colour in (BLUE, VERMILION, GREEN, PURPLE)
]
MOST_RUNS = len(_LINES)
_LONGEST_NAME = 28
# of the panel's height, what a label of 9 points needs for itself
_LABEL_HEIGHT = 0.075
_NAMES = {"f1_macro": "macro F1", "mae": "mean absolute error", "r2": "variance explained (R2)"}
_SHARES = ("accuracy", "f1_macro", "r2")


def comparison_figure(runs: Mapping[str, History], *, metric: str = "accuracy") -> "Figure":
    """Draw runs over their epochs: a validation metric and the validation loss, a line a run.

    Args:
        runs: name -> history, as in metrics.jsonl; at most `MOST_RUNS`. Each line is named at
            its end, and its best epoch is marked.
        metric: which; with "loss" the loss alone is drawn.

    Returns:
        A figure; save it within `figure_style()`.

    Raises:
        ConfigError: there are too many runs.
        DataError: no run has an epoch with one of the two.
    """
    if len(runs) > MOST_RUNS:
        raise ConfigError(
            f"expected at most {MOST_RUNS} runs in one figure, got {len(runs)}; name fewer"
        )
    keys = [key for key in dict.fromkeys((f"val_{metric}", "val_loss")) if _has(runs, key)]
    if not keys:
        raise DataError(
            f"expected an epoch with val_{metric} or val_loss, got none in {len(runs)} runs"
        )
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.9 * len(keys), 3.3), layout="constrained")
        for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
            _draw(axes, key, runs)
    return figure


def write_comparison(path: Path, runs: Mapping[str, History], *, metric: str = "accuracy") -> None:
    """Write `comparison_figure` as a PNG at 160 dots an inch; whole or not at all.

    Raises:
        ConfigError, DataError: see `comparison_figure`.
        MissingExtraError: matplotlib is not installed.
        OSError: the file can't be written.
    """
    figure = comparison_figure(runs, metric=metric)
    content = io.BytesIO()
    with figure_style():
        figure.savefig(content, format="png", dpi=160, metadata={"Software": None})
    write_atomic(path, content.getvalue())


def spread(heights: Sequence[float], distance: float) -> list[float]:
    """Move heights apart until no two are nearer than `distance`, none further than needed.

    Args:
        heights: within 0 and 1, in any order.
        distance: smallest distance; lessened where they would not fit.

    Returns:
        the new heights, in the order given, within 0 and 1.
    """
    if len(heights) < 2:
        return list(heights)
    distance = min(distance, 1.0 / (len(heights) - 1))
    # neighbours that are too near become one group about their mean, and so on
    groups: list[list[int]] = []
    for index in sorted(range(len(heights)), key=lambda i: heights[i]):
        groups.append([index])
        while len(groups) > 1 and (
            _ends(groups[-1], heights, distance)[0] - _ends(groups[-2], heights, distance)[1]
            < distance - 1e-12
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [0.0] * len(heights)
    for group in groups:
        low, _ = _ends(group, heights, distance)
        for position, index in enumerate(group):
            placed[index] = low + position * distance
    return placed


def _ends(group: Sequence[int], heights: Sequence[float], distance: float) -> tuple[float, float]:
    """Return the lowest and highest place of a group about its mean, within 0 and 1."""
    length = (len(group) - 1) * distance
    low = sum(heights[i] for i in group) / len(group) - length / 2
    low = min(max(low, 0.0), 1.0 - length)
    return low, low + length


def _draw(axes: "Axes", key: str, runs: Mapping[str, History]) -> None:
    from matplotlib.ticker import MaxNLocator

    name = key.removeprefix("val_")
    axes.set_title(f"Validation {_NAMES.get(name, name.replace('_', ' '))}")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    if name in _SHARES:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    drawn: list[tuple[str, str, tuple[int, float]]] = []
    for (run, history), (colour, style) in zip(runs.items(), _LINES, strict=False):
        points = _points(history, key)
        if not points:
            continue
        marker = "o" if len(points) == 1 else ""
        axes.plot(
            list(points), list(points.values()), color=colour, linestyle=style, label=run,
            marker=marker, markersize=4.0,
        )  # fmt: skip
        sign = -1.0 if name in MINIMIZED else 1.0
        best = max(points, key=lambda epoch, p=points, s=sign: s * p[epoch])  # type: ignore[misc]
        axes.plot(
            [best], [points[best]], "o", color="white", markeredgecolor=colour,
            markeredgewidth=1.6, markersize=6.0, zorder=3,
        )  # fmt: skip
        last = max(points)
        drawn.append((run, colour, (last, points[last])))
    _name_lines(axes, drawn)


def _name_lines(axes: "Axes", drawn: Sequence[tuple[str, str, tuple[int, float]]]) -> None:
    """Write each run's name beside the panel at the height where its line ends."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right)
    heights = spread([(y - low) / (high - low) for _, _, (_, y) in drawn], _LABEL_HEIGHT)
    for (run, colour, (x, y)), height in zip(drawn, heights, strict=True):
        axes.annotate(
            _cut(run), (x, y), xytext=(1.03, height), textcoords="axes fraction",
            color=colour, fontsize=9, fontweight="bold", va="center", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.8, "linestyle": ":",
                "shrinkA": 1.0, "shrinkB": 2.0, "relpos": (0.0, 0.5),
            },
        )  # fmt: skip


def _points(history: History, key: str) -> dict[int, float]:
    """Return epoch -> value where `key` is there and finite."""
    return {
        int(entry.get("epoch", position)): float(entry[key])
        for position, entry in enumerate(history, 1)
        if key in entry and math.isfinite(entry[key])
    }


def _has(runs: Mapping[str, History], key: str) -> bool:
    return any(_points(history, key) for history in runs.values())


def _cut(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    half = (_LONGEST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
