"""Training curves: losses, validation metrics and, where it varies, the learning rate.

matplotlib is imported only when something is drawn, through its object interface, so no
window system and no global figure are involved.
"""

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.config import SelectionMetric
from edgetune.errors import DataError, MissingExtraError
from edgetune.runtime.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]

_Series = tuple[tuple[str, str, str], ...]  # (key in history, name in the legend, colour)

# ink and grid of every figure, and four series colours that colour-blind readers can tell
# apart (Okabe & Ito 2008)
INK, MUTED, GRID = "#1f2328", "#59636e", "#e6e8eb"
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#a0548a"

# matplotlib types its keys as one long Literal
STYLE: dict[Any, object] = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#c8ccd1",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#c8ccd1",
    "ytick.color": "#c8ccd1",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "text.color": INK,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # a dollar sign in a class name is a dollar sign
    "text.parse_math": False,
    # the same bytes for the same figure; text stays text, in the reader's own font
    "svg.hashsalt": "edgetune",
    "svg.fonttype": "none",
}

_LOSSES: _Series = (("train_loss", "training", BLUE), ("val_loss", "validation", VERMILION))
_METRICS: _Series = (
    ("val_accuracy", "accuracy", GREEN),
    ("val_f1_macro", "macro F1", PURPLE),
    ("val_r2", "variance explained (R2)", GREEN),
)
_RATE: _Series = (("lr", "learning rate", MUTED),)
_SELECTED_BY: dict[SelectionMetric, str] = {
    "accuracy": "val_accuracy",
    "f1_macro": "val_f1_macro",
    "loss": "val_loss",
    "mae": "val_mae",
    "r2": "val_r2",
}
_MINIMIZED = ("val_loss", "val_mae")


def curves_figure(history: History, *, metric: SelectionMetric = "accuracy") -> "Figure":
    """Draw a training run: losses, validation metrics, and the learning rate if it varies.

    Args:
        history: one mapping an epoch, with keys among epoch (from 1; else the position),
            train_loss, val_loss, val_accuracy, val_f1_macro and lr. Other keys are not
            drawn; a value that is absent or not finite leaves a gap.
        metric: what chose the best epoch, which is marked; see `best_epoch`.

    Returns:
        A figure with one panel for each kind of curve that `history` has. Save it within
        `figure_style()`.

    Raises:
        DataError: `history` has nothing to draw.
        MissingExtraError: matplotlib is not installed.
    """
    panels = [
        (title, series)
        for title, series in (("Loss", _LOSSES), ("Validation", _METRICS))
        if any(_finite(history, key) for key, _, _ in series)
    ]
    rates = set(_finite(history, "lr").values())
    if len(rates) > 1:
        panels.append(("Learning rate", _RATE))
    if not panels:
        raise DataError(
            "history: expected a loss or a metric in at least one epoch, got none of"
            f" {', '.join(key for key, _, _ in _LOSSES + _METRICS)} in {len(history)} epochs"
        )
    widths = [2.0 if title == "Learning rate" else 3.4 for title, _ in panels]
    best = best_epoch(history, metric=metric)
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(sum(widths), 2.9), layout="constrained")
        row = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
        for axes, (title, series) in zip(row, panels, strict=True):
            _draw_panel(axes, title, series, history, best)
    return figure


def best_epoch(history: History, *, metric: SelectionMetric = "accuracy") -> int | None:
    """Return the epoch with the best `metric` on the validation data; None without any.

    Of equals the first is best. Where `history` lacks the metric, the first of accuracy,
    macro F1 and loss that it has decides.
    """
    for name in (_SELECTED_BY.get(metric, "val_accuracy"), *_SELECTED_BY.values()):
        values = _finite(history, name)
        if values:
            sign = -1.0 if name in _MINIMIZED else 1.0
            return max(values, key=lambda epoch: sign * values[epoch])
    return None


def write_curves(path: Path, history: History, *, metric: SelectionMetric = "accuracy") -> None:
    """Write `curves_figure` as a PNG at 160 dots an inch; whole or not at all.

    Args:
        path: the file; one that exists is replaced. Its folder must exist.
        history: see `curves_figure`.
        metric: see `curves_figure`.

    Raises:
        DataError: `history` has nothing to draw.
        MissingExtraError: matplotlib is not installed.
        OSError: the file can't be written.
    """
    figure = curves_figure(history, metric=metric)
    content = io.BytesIO()
    with figure_style():
        figure.savefig(content, format="png", dpi=160, metadata={"Software": None})
    write_atomic(path, content.getvalue())


@contextlib.contextmanager
def figure_style() -> Iterator[None]:
    """Set matplotlib's defaults plus `STYLE`, whatever the user's own are, and restore them.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise MissingExtraError("matplotlib", "train") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _draw_panel(
    axes: "Axes",
    title: str,
    series: _Series,
    history: History,
    best: int | None,
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title)
    axes.set_xlabel("epoch")
    bins = 4 if title == "Learning rate" else 8
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=bins, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    epochs = [_epoch(entry, position) for position, entry in enumerate(history)]
    # less than one epoch of margin, so that no tick says epoch 0
    margin = min(0.9, 0.5 + 0.02 * (max(epochs) - min(epochs)))
    axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
    marker = "o" if len(epochs) <= 30 else ""
    for key, name, colour in series:
        values = _finite(history, key)
        if values:
            points = [values.get(epoch, math.nan) for epoch in epochs]
            alone = "o" if len(values) == 1 else marker
            axes.plot(epochs, points, color=colour, label=name, marker=alone, markersize=3.5)
    _mark_best(axes, series, history, best)
    if len(series) > 1:
        axes.legend(loc="best", fontsize=9)
    if title == "Validation":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    if title == "Learning rate":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def _mark_best(
    axes: "Axes",
    series: _Series,
    history: History,
    best: int | None,
) -> None:
    if best is None:
        return
    axes.axvline(
        best, color=MUTED, linewidth=1.0, linestyle=(0, (3, 3)), zorder=1,
        label=f"best: epoch {best}",
    )  # fmt: skip
    for key, _, colour in series:
        value = _finite(history, key).get(best)
        if value is not None:
            axes.plot(
                [best], [value], "o", color="white", markeredgecolor=colour,
                markeredgewidth=1.8, markersize=7.0, zorder=3,
            )  # fmt: skip


def _finite(history: History, key: str) -> dict[int, float]:
    """Return epoch -> value where `key` is there and finite."""
    return {
        _epoch(entry, position): float(entry[key])
        for position, entry in enumerate(history)
        if key in entry and math.isfinite(entry[key])
    }


def _epoch(entry: Mapping[str, float], position: int) -> int:
    return int(entry.get("epoch", position + 1))
