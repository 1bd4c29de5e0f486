"""The picture of a search: what each candidate costs, and how right it is."""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetune.errors import DataError
from edgetune.export.records import Attempt, SearchReport
from edgetune.tasks.curves import BLUE, GREEN, INK, MUTED, VERMILION, figure_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_COLOURS = {"chosen": VERMILION, "passed": BLUE}
_LEGEND = {"chosen": "chosen", "passed": "within all budgets", "other": "not within them"}
# where a point's number may stand, in dots from its centre, and the next farther ring
_PLACES = [
    (radius * math.cos(angle), radius * math.sin(angle))
    for radius in (1.0, 1.7, 2.4)
    for angle in (math.pi * turn / 8.0 for turn in (2, 6, 14, 10, 0, 8, 4, 12, 1, 3, 5, 7))
]


@dataclass(frozen=True, kw_only=True)
class Point:
    """An attempt that has a place in the figure; `number` is its place in the report, from 1."""

    number: int
    latency_ms: float
    accuracy: float
    attempt: Attempt


def points_of(report: SearchReport) -> list[Point]:
    """Return the attempts that have both a latency and an accuracy."""
    return [
        Point(
            number=number,
            latency_ms=attempt.latency_p95_ms,
            accuracy=attempt.accuracy.value,
            attempt=attempt,
        )
        for number, attempt in enumerate(report.attempts, 1)
        if attempt.accuracy is not None
        and attempt.latency_p95_ms is not None
        and math.isfinite(attempt.accuracy.value)
        and math.isfinite(attempt.latency_p95_ms)
    ]


def pareto_figure(report: SearchReport) -> "Figure":
    """Draw latency (p95) against accuracy; a marker's area grows with the bundle's size.

    A number beside a marker is the attempt's place in the report, from 1. An estimated
    latency gives a hollow marker. The line joins the Pareto front; dashed lines are budgets.

    Raises:
        DataError: no attempt has both a latency and an accuracy.
        MissingExtraError: matplotlib is not installed.
    """
    points = points_of(report)
    if not points:
        raise DataError(
            "expected an attempt with a latency and an accuracy, got none"
            f" among {len(report.attempts)}"
        )
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, 4.3), layout="constrained")
        axes = figure.subplots()
        axes.grid(visible=True, axis="both")
        axes.set_xlabel("latency of one sample, 95th percentile, ms")
        axes.set_ylabel("accuracy")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
        _draw_front(axes, [p for p in points if p.attempt.pareto])
        _draw_points(axes, points)
        _set_limits(axes, report, points)
        _draw_budgets(axes, report)
        axes.legend(
            loc="upper left", bbox_to_anchor=(0.0, 1.13), ncols=5, fontsize=8.5,
            handletextpad=0.3, columnspacing=1.2, borderpad=0.0,
        )  # fmt: skip
        figure.draw_without_rendering()  # numbers are placed in the final layout
        _number_points(axes, points)
    return figure


def pareto_png(report: SearchReport) -> bytes:
    """Return `pareto_figure` as PNG at 160 dots an inch; equal input gives equal bytes.

    Raises:
        DataError: no attempt has both a latency and an accuracy.
        MissingExtraError: matplotlib is not installed.
    """
    figure = pareto_figure(report)
    content = io.BytesIO()
    with figure_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure.savefig(content, format="png", dpi=160, metadata={"Software": None})
    return content.getvalue()


def accuracy_floor(report: SearchReport) -> float | None:
    """Return the accuracy that is `max_drop` below fp32's; None where nothing was compared."""
    for attempt in report.attempts:
        if attempt.comparison is not None:
            return attempt.comparison.reference_accuracy - report.budgets.max_drop
    return None


def _area(point: Point, points: Sequence[Point]) -> float:
    """Return the area of a marker, in square points."""
    largest = max(p.attempt.size_mib or 0.0 for p in points) or 1.0
    return 24.0 + 180.0 * (point.attempt.size_mib or 0.0) / largest


def _draw_front(axes: "Axes", front: Sequence[Point]) -> None:
    # the front has a third side, the size; of those on it only what the two axes show is joined
    ordered: list[tuple[float, float]] = []
    for latency_ms, accuracy in sorted((p.latency_ms, -p.accuracy) for p in front):
        if not ordered or -accuracy > ordered[-1][1]:
            ordered.append((latency_ms, -accuracy))
    if len(ordered) > 1:
        axes.plot(
            [x for x, _ in ordered], [y for _, y in ordered],
            color=GREEN, linewidth=1.4, alpha=0.6, zorder=2, label="Pareto front",
        )  # fmt: skip


def _draw_points(axes: "Axes", points: Sequence[Point]) -> None:
    named: set[str] = set()
    for point in sorted(points, key=lambda p: _area(p, points), reverse=True):
        status = point.attempt.status
        kind = str(status) if status in _COLOURS else "other"
        colour = _COLOURS.get(kind, MUTED)
        estimated = point.attempt.latency_basis == "estimate"
        axes.scatter(
            [point.latency_ms], [point.accuracy], s=_area(point, points),
            facecolor="white" if estimated else colour, edgecolor=colour if estimated else "white",
            linewidth=1.6 if estimated else 0.8, alpha=0.95, zorder=4 if kind == "chosen" else 3,
        )  # fmt: skip
        named.add(kind)
        if estimated:
            named.add("estimate")
    for kind, label in _LEGEND.items():
        if kind in named:
            axes.scatter([], [], s=45.0, color=_COLOURS.get(kind, MUTED), label=label)
    if "estimate" in named:
        axes.scatter(
            [], [], s=45.0, facecolor="white", edgecolor=INK, linewidth=1.4,
            label="hollow: estimate",
        )  # fmt: skip


def _set_limits(axes: "Axes", report: SearchReport, points: Sequence[Point]) -> None:
    """Leave room around the points, and for budgets that are not far from them."""
    xs, ys = [p.latency_ms for p in points], [p.accuracy for p in points]
    limit, floor = report.budgets.max_latency_ms, accuracy_floor(report)
    if limit is not None and max(xs) / 3.0 <= limit <= 3.0 * max(xs):
        xs.append(limit)
    span = max(max(ys) - min(ys), 0.02)
    if floor is not None and floor >= min(ys) - span:
        ys.append(floor)
    if min(xs) > 0.0 and max(xs) > 8.0 * min(xs):
        from matplotlib.ticker import NullFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(xs) / 1.3, max(xs) * 1.3)
    else:
        margin = 0.12 * max(max(xs) - min(xs), 0.2 * max(xs), 1e-3)
        axes.set_xlim(max(0.0, min(xs) - margin), max(xs) + margin)
    margin = 0.14 * max(max(ys) - min(ys), 0.01)
    axes.set_ylim(min(ys) - margin, max(ys) + margin)


def _draw_budgets(axes: "Axes", report: SearchReport) -> None:
    dashed = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}
    limit, floor = report.budgets.max_latency_ms, accuracy_floor(report)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    if limit is not None and left <= limit <= right:
        axes.axvline(limit, **dashed)  # type: ignore[arg-type]
        axes.annotate(
            f"at most {limit:g} ms", (limit, bottom), (-3.0, 4.0), textcoords="offset points",
            rotation=90, ha="right", va="bottom", fontsize=8.0, color=INK,
        )  # fmt: skip
    if floor is not None and bottom <= floor <= top:
        axes.axhline(floor, **dashed)  # type: ignore[arg-type]
        points = f"{100.0 * report.budgets.max_drop:g}"
        axes.annotate(
            f"fp32 less {points} point{'' if points == '1' else 's'}", (right, floor), (-3.0, 3.0),
            textcoords="offset points", ha="right", va="bottom", fontsize=8.0, color=INK,
        )  # fmt: skip


def _number_points(axes: "Axes", points: Sequence[Point]) -> None:
    """Write each point's number where it hides no other point or number."""
    from matplotlib.transforms import Bbox

    dots = axes.figure.dpi / 72.0  # for each typographic point
    discs: dict[int, tuple[float, float, float]] = {}  # number -> centre and radius, dots
    for point in points:
        x, y = axes.transData.transform((point.latency_ms, point.accuracy))
        discs[point.number] = (float(x), float(y), dots * math.sqrt(_area(point, points) / math.pi))
    taken: list[Bbox] = []
    order = {"chosen": 0}
    for point in sorted(
        points,
        key=lambda p: (order.get(p.attempt.status, 1), not p.attempt.pareto, p.number),
    ):
        number, chosen = point.number, point.attempt.status == "chosen"
        x, y, radius = discs[number]
        width, height = dots * 5.2 * len(str(number)), dots * 8.0
        best: tuple[float, float, float, Bbox] | None = None
        for across, up in _PLACES:
            reach = radius + dots * 5.5
            at_x, at_y = x + across * reach, y + up * reach
            box = Bbox.from_bounds(at_x - width / 2, at_y - height / 2, width, height)
            cost = 10.0 * sum(bool(box.overlaps(other)) for other in taken)
            cost += sum(_covers(box, disc) for disc in discs.values())
            if not axes.bbox.contains(at_x, at_y):
                cost += 100.0
            if best is None or cost < best[0]:
                best = (cost, at_x, at_y, box)
        if best is None:
            continue
        _, at_x, at_y, box = best
        taken.append(box)
        axes.annotate(
            str(number), (point.latency_ms, point.accuracy), ((at_x - x) / dots, (at_y - y) / dots),
            textcoords="offset points", ha="center", va="center", fontsize=8.5, zorder=5,
            color=VERMILION if chosen else INK,
            fontweight="bold" if chosen else "normal",
        )  # fmt: skip


def _covers(box: "Bbox", disc: tuple[float, float, float]) -> bool:
    x, y, radius = disc
    nearest_x, nearest_y = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
    return math.hypot(nearest_x - x, nearest_y - y) < radius
