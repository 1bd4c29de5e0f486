"""Pictures of a search: what every trial reached, and which keys decided it."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.runtime.files import write_atomic
from edgetune.tasks.curves import BLUE, GREEN, MUTED, VERMILION, figure_style
from edgetune.train.study import TuneRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HISTORY_NAME, IMPORTANCE_NAME = "history.png", "importance.png"


def write_figures(folder: Path, record: TuneRecord) -> None:
    """Write history.png and importance.png, as far as there is something to draw.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: a file can't be written.
    """
    figures = {
        HISTORY_NAME: history_figure(record) if _has_values(record) else None,
        IMPORTANCE_NAME: importance_figure(record) if record.importance else None,
    }
    for name, figure in figures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier state
            continue
        content = io.BytesIO()
        with figure_style():
            figure.savefig(content, format="png", dpi=160, metadata={"Software": None})
        write_atomic(folder / name, content.getvalue())


def history_figure(record: TuneRecord) -> "Figure":
    """Draw each trial's metric by its number, and the best so far."""
    trials = [t for t in record.trials if t.value is not None]
    complete = [t for t in trials if t.status == "complete"]
    pruned = [t for t in trials if t.status == "pruned"]
    with figure_style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.set_title("Trials")
        axes.set_xlabel("trial")
        axes.set_ylabel(f"validation {_metric_name(record)}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if pruned:
            axes.plot(
                [t.number for t in pruned], [t.value or 0.0 for t in pruned], "x", color=MUTED,
                markersize=5, label="pruned",
            )  # fmt: skip
        if complete:
            values = [t.value or 0.0 for t in complete]
            better = max if record.direction == "maximize" else min
            best = [better(values[: i + 1]) for i in range(len(values))]
            numbers = [t.number for t in complete]
            axes.plot(numbers, values, "o", color=BLUE, markersize=4, label="complete")
            axes.step(numbers, best, where="post", color=VERMILION, label="best so far")
        axes.legend(loc="best", fontsize=9)
    return figure


def importance_figure(record: TuneRecord) -> "Figure":
    """Draw the share of each searched key in what tells good trials from others."""
    items = sorted(record.importance.items(), key=lambda item: item[1])
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 1.2 + 0.32 * len(items)), layout="constrained")
        axes = figure.subplots()
        axes.set_title("What decided (PED-ANOVA importance)")
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        bars = axes.barh([name for name, _ in items], [v for _, v in items], color=GREEN)
        axes.bar_label(bars, fmt=lambda v: f"{100 * v:.0f} %", padding=3, fontsize=9)
        axes.set_xlim(0, 1.1 * max(v for _, v in items))
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return figure


def _metric_name(record: TuneRecord) -> str:
    return record.metric.replace("_", " ")


def _has_values(record: TuneRecord) -> bool:
    return any(t.value is not None for t in record.trials)
