"""One HTML page that says how good a classifier is, to be mailed, printed and archived.

The page needs nothing outside itself: style, figures (SVG) and images (data URIs) are
inline, there is no script, and a content security policy forbids loading anything. Equal
input gives equal bytes.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgetune.bench import page
from edgetune.config import SelectionMetric
from edgetune.errors import DataError
from edgetune.runtime.files import write_atomic
from edgetune.tasks.calibration import (
    BoolArray,
    ReliabilityBin,
    SelectiveCurve,
    reliability,
    selective_curve,
)
from edgetune.tasks.curves import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    VERMILION,
    History,
    best_epoch,
    curves_figure,
    figure_style,
)
from edgetune.tasks.metrics import ClassificationReport, ClassScores, FloatArray, Interval
from edgetune.tasks.slices import Group, SliceReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from edgetune.bench.evaluate import Kept
    from edgetune.bench.explain import Explanation

# largest numbers of classes whose confusion matrix is drawn, and whose counts are printed
DRAWN_CLASSES = 40
COUNTED_CLASSES = 20

_PAIRS_BESIDE_FIGURE = 5
_PAIRS_WITHOUT_FIGURE = 30
_LONGEST_TEXT = 400
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A sample that the model got wrong.

    Attributes:
        shown: the text itself, or the name of the image's file.
        image_png: the image as PNG, preferably a thumbnail; None where there is none.
        truth: the true class's name.
        predicted: the predicted class's name.
        confidence: the probability the model gave its prediction, in [0, 1].
    """

    shown: str
    image_png: bytes | None
    truth: str
    predicted: str
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """How sure the model was of each answer.

    scores: probability of the predicted class, (samples,). right: whether that was the true one.
    kept: what a bundle that abstains makes of it.
    """

    scores: FloatArray
    right: BoolArray
    kept: "Kept | None" = None


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A mistake that is explained, and the class that would have been right."""

    explanation: "Explanation"
    truth: str


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    report: ClassificationReport,
    labels: Sequence[str],
    mistakes: Sequence[Mistake],
    history: History | None,
    metric: SelectionMetric = "accuracy",
    confidence: Confidence | None = None,
    slices: Sequence[SliceReport] = (),
    explained: Sequence[Explained] = (),
) -> None:
    """Write a self-contained HTML report; whole or not at all.

    Args:
        path: the file; one that exists is replaced. Its folder must exist.
        title: heading of the page.
        facts: what was measured, on what and when, in the order to print.
        report: the measurements.
        labels: the classes' names, as `report` has them.
        mistakes: shown with the most confident first.
        history: one mapping an epoch, as `curves_figure` takes it; None or empty for none.
        metric: what chose the best epoch.
        confidence: how sure it was, drawn against how right it was.
        slices: groups of samples, one section a column.
        explained: mistakes, in the order to show.

    Raises:
        DataError: `labels` are not those of `report`, a mistake's image is not PNG, or
            `history` has nothing to draw.
        MissingExtraError: matplotlib is not installed.
        OSError: the file can't be written.
    """
    if tuple(labels) != tuple(scores.label for scores in report.per_class):
        raise DataError(
            f"labels: expected the report's {len(report.per_class)} classes in its order,"
            f" got {len(labels)} labels that differ"
        )
    sections = [
        _summary(report),
        page.facts("What was measured", facts),
        _training(history, metric) if history else "",
        _confusion(report, labels),
        _classes(report),
        *[_slices(s) for s in slices],
        _confidence(confidence) if confidence is not None else "",
        _mistakes(mistakes, report),
        _explanations(explained),
        _GLOSSARY,
    ]
    style = ""
    if explained:
        from edgetune.bench.explain_page import STYLE as style  # noqa: N811
    content = page.document(title=title, kicker="Evaluation report", sections=sections, style=style)
    write_atomic(path, content.encode("utf-8"))


def _summary(report: ClassificationReport) -> str:
    correct = _correct(report)
    sentences = [
        f"Of {page.count(report.samples, 'sample')} the model got <strong>{correct:,}</strong>"
        " right.",
        _meaning(report, correct),
        _weakest(report),
    ]
    tiles = [
        _share_tile("Accuracy", report.accuracy),
        _share_tile("Macro F1", report.f1_macro),
    ]
    if report.expected_calibration_error is not None:
        points = 100.0 * report.expected_calibration_error
        note = "mean gap between<br>confidence and accuracy"
        tiles.append(page.tile("Calibration error", f"{points:.1f}", " points", note))
    if report.log_loss is not None:
        tiles.append(
            page.tile("Log loss", f"{report.log_loss:.3f}", "", "natural logarithm,<br>0 is best")
        )
    rows = [
        ("Accuracy", report.accuracy),
        ("Precision, macro", report.precision_macro),
        ("Recall, macro", report.recall_macro),
        ("F1, macro", report.f1_macro),
        ("Precision, weighted", report.precision_weighted),
        ("Recall, weighted", report.recall_weighted),
        ("F1, weighted", report.f1_weighted),
    ]
    low, high = _axis([interval for _, interval in rows])
    body = "\n".join(
        f'<tr><th scope="row">{name}</th><td class="n">{page.percent(interval.value)}</td>'
        f'<td class="n">{_range(interval)}</td>'
        f'<td class="wide">{_whisker(interval, low, high)}</td></tr>'
        for name, interval in rows
    )
    return f"""<section aria-label="Summary">
<div class="tiles">{"".join(tiles)}</div>
<p>{" ".join(s for s in sentences if s)}</p>
<div class="scroll"><table>
<thead><tr><th scope="col">Metric</th><th scope="col" class="n">Value</th>
<th scope="col" class="n">95% interval</th><th scope="col" class="wide axis">
<span>{low:.0%}</span><span>{high:.0%}</span></th></tr></thead>
<tbody>
{body}
</tbody></table></div>
</section>"""


def _correct(report: ClassificationReport) -> int:
    return sum(row[i] for i, row in enumerate(report.confusion))


def _meaning(report: ClassificationReport, correct: int) -> str:
    """Say in words what the accuracy's interval means."""
    if correct in (0, report.samples):
        # the bootstrap sees no variation here; 3 / n is the 95% bound of an event never seen
        # (Hanley & Lippman-Hand 1983)
        bound = max(0.0, 1.0 - 3.0 / report.samples)
        if correct == 0:
            return "None was right, so no interval can be estimated from resampling."
        return (
            "With no mistake seen, resampling can't tell how rare mistakes are; by the rule of"
            f" three, accuracy on all data of this kind is likely above {page.percent(bound)}."
        )
    return (
        "These samples are only some of those the model will meet: on all data of this kind its"
        f" accuracy is likely between {page.percent(report.accuracy.low)} and"
        f" {page.percent(report.accuracy.high)} (95% bootstrap interval)."
    )


def _weakest(report: ClassificationReport) -> str:
    present = [s for s in report.per_class if s.support > 0]
    if len(present) < 2:
        return ""
    weakest = min(present, key=lambda s: s.f1)
    if weakest.f1 == max(s.f1 for s in present):
        return ""
    index = report.per_class.index(weakest)
    found = report.confusion[index][index]
    return (
        f"The weakest class is <strong>{page.name(weakest.label)}</strong>: {found:,} of its"
        f" {page.count(weakest.support, 'sample')} found, F1 {page.percent(weakest.f1)}."
    )


def _training(history: History, metric: SelectionMetric) -> str:
    figure = page.svg(curves_figure(history, metric=metric), "curves", "Training curves")
    epochs = page.count(len(history), "epoch")
    best = best_epoch(history, metric=metric)
    caption = f"{epochs}; the best is epoch {best} (dashed line)." if best else f"{epochs}."
    return page.section("Training", page.captioned(figure, caption))


def _confusion(report: ClassificationReport, labels: Sequence[str]) -> str:
    drawn = len(labels) <= DRAWN_CLASSES
    pairs = _confused_pairs(report, _PAIRS_BESIDE_FIGURE if drawn else _PAIRS_WITHOUT_FIGURE)
    parts = []
    if drawn:
        figure = page.svg(_confusion_figure(report, labels), "confusion", "Confusion matrix")
        caption = "Colour is the share of the true class, so that each row adds to 100%."
        if len(labels) <= COUNTED_CLASSES:
            caption += " Numbers are samples; an empty cell has none."
        parts.append(page.captioned(figure, caption))
    if pairs:
        rows = "\n".join(
            f"<tr><td>{page.name(labels[row])}</td><td>{page.name(labels[column])}</td>"
            f'<td class="n">{count:,}</td><td class="n">{page.percent(share)}</td></tr>'
            for row, column, count, share in pairs
        )
        if drawn:
            parts.append("<h3>Most often confused</h3>")
        parts.append(f"""<div class="scroll"><table>
<thead><tr><th scope="col">True class</th><th scope="col">Predicted as</th>
<th scope="col" class="n">Samples</th><th scope="col" class="n">Of the true class</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>""")
    if not parts:
        parts.append("<p>No class was taken for another.</p>")
    return page.section("Confusion matrix" if drawn else "Most often confused", "\n".join(parts))


def _confused_pairs(report: ClassificationReport, limit: int) -> list[tuple[int, int, int, float]]:
    """Return (true class, predicted class, samples, share of the true class), most first."""
    confusion = np.array(report.confusion)  # (classes, classes)
    np.fill_diagonal(confusion, 0)
    rows, columns = np.nonzero(confusion)
    counts = confusion[rows, columns]
    shares = counts / np.array([report.per_class[row].support for row in rows])
    order = np.lexsort((columns, rows, -shares, -counts))[:limit]
    return [(int(rows[i]), int(columns[i]), int(counts[i]), float(shares[i])) for i in order]


def _classes(report: ClassificationReport) -> str:
    predicted = np.array(report.confusion).sum(axis=0)  # (classes,)
    scored: list[ClassScores] = []
    absent: list[ClassScores] = []
    for scores, times in zip(report.per_class, predicted, strict=True):
        (scored if scores.support or times else absent).append(scores)
    rows = [_class_row(s) for s in sorted(scored, key=lambda s: s.f1)]
    rows += [
        f'<tr class="absent"><th scope="row">{page.name(s.label)}</th><td class="n">0</td>'
        '<td colspan="4">never true, never predicted</td></tr>'
        for s in absent
    ]
    body = "\n".join(rows)
    return page.section(
        "Classes, weakest first",
        f"""<div class="scroll"><table>
<thead><tr><th scope="col">Class</th><th scope="col" class="n">Samples</th>
<th scope="col" class="n">Precision</th><th scope="col" class="n">Recall</th>
<th scope="col" class="n">F1</th><th scope="col" class="wide axis"><span>0%</span>
<span>100%</span></th></tr></thead>
<tbody>
{body}
</tbody></table></div>""",
    )


def _class_row(scores: ClassScores) -> str:
    return (
        f'<tr><th scope="row">{page.name(scores.label)}</th><td class="n">{scores.support:,}</td>'
        f'<td class="n">{page.percent(scores.precision)}</td>'
        f'<td class="n">{page.percent(scores.recall)}</td>'
        f'<td class="n">{page.percent(scores.f1)}</td><td class="wide"><span class="track">'
        f'<span class="bar" style="width:{page.css(scores.f1)}"></span></span></td></tr>'
    )


def _slices(report: SliceReport) -> str:
    intervals = [g.accuracy for g in report.groups]
    low, high = _axis(intervals)
    rows = "\n".join(_group_row(g, low, high) for g in report.groups)
    small = sum(g.small for g in report.groups)
    sentences = [_gap(report)]
    if small:
        sentences.append(
            f"{page.count(small, 'group')} of fewer than {page.count(report.min_samples, 'sample')}"
            " (in grey) took no part in that comparison."
        )
    return page.section(
        f"Groups by {report.column}, weakest first",
        f"""<p>{" ".join(s for s in sentences if s)}</p>
<div class="scroll"><table>
<thead><tr><th scope="col">Group</th><th scope="col" class="n">Samples</th>
<th scope="col" class="n">Accuracy</th><th scope="col" class="n">95% interval</th>
<th scope="col" class="n">Macro F1</th><th scope="col" class="n">95% interval</th>
<th scope="col" class="wide axis"><span>{low:.0%}</span><span>{high:.0%}</span></th></tr></thead>
<tbody>
{rows}
</tbody></table></div>""",
    )


def _group_row(group: Group, low: float, high: float) -> str:
    kind = ' class="absent"' if group.small else ""
    return (
        f'<tr{kind}><th scope="row">{page.name(group.value)}</th>'
        f'<td class="n">{group.samples:,}</td>'
        f'<td class="n">{page.percent(group.accuracy.value)}</td>'
        f'<td class="n">{_range(group.accuracy)}</td>'
        f'<td class="n">{page.percent(group.f1_macro.value)}</td>'
        f'<td class="n">{_range(group.f1_macro)}</td>'
        f'<td class="wide">{_whisker(group.accuracy, low, high)}</td></tr>'
    )


def _gap(report: SliceReport) -> str:
    gap = report.gap
    if gap is None:
        return "Fewer than two groups are large enough to be compared."
    d = gap.difference
    return (
        f"Accuracy on <strong>{page.name(gap.best)}</strong> is {100 * d.value:.1f} points above"
        f" that on <strong>{page.name(gap.worst)}</strong> (95% bootstrap interval"
        f" {100 * d.low:.1f} to {100 * d.high:.1f}). Were all groups answered equally well, chance"
        f" would part them so far in {page.percent(gap.p_value)} of cases."
    )


def _confidence(confidence: Confidence) -> str:
    curve = selective_curve(confidence.scores, confidence.right)
    bins = reliability(confidence.scores, confidence.right)
    kept = confidence.kept
    figure = _confidence_figure(bins, curve, kept)
    element = page.svg(figure, "confidence", "Reliability, and accuracy of the surest answers")
    caption = (
        "Left: accuracy of the answers of like confidence; on the line, confidence is a"
        " probability. Right: accuracy of the surest answers, by the share of samples that are"
        f" answered; area under the risk-coverage curve {curve.area:.4f} (0 is best)."
    )
    text = ""
    if kept is not None:
        text = (
            f"<p>This bundle abstains below score {kept.threshold:.4f}:"
            f" {page.percent(kept.coverage)} of these samples are answered"
        )
        if kept.accuracy is not None:
            text += (
                f", {page.percent(kept.accuracy.value)} of them rightly (95% interval"
                f" {_range(kept.accuracy)}; {page.percent(kept.wanted)} was asked for)"
            )
        text += ".</p>\n"
    return page.section("Confidence", text + page.captioned(element, caption))


def _confidence_figure(
    bins: Sequence[ReliabilityBin], curve: SelectiveCurve, kept: "Kept | None"
) -> "Figure":
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.8, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.set_title("Reliability")
        left.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=(0, (3, 3)))
        most = max(b.samples for b in bins)
        left.plot(
            [b.confidence for b in bins], [b.accuracy for b in bins], color=BLUE, linewidth=1.0
        )
        left.scatter(
            [b.confidence for b in bins], [b.accuracy for b in bins], color=BLUE,
            s=[8 + 60 * b.samples / most for b in bins], zorder=3,
        )  # fmt: skip
        left.set_xlabel("confidence")
        left.set_ylabel("accuracy")
        left.set_xlim(0, 1.03)
        left.set_ylim(0, 1.03)
        right.set_title("Accuracy of the surest answers")
        right.plot(curve.coverage, curve.accuracy, color=GREEN, drawstyle="steps-post")
        right.set_xlabel("share answered")
        right.set_xlim(0, 1.03)
        lowest = float(curve.accuracy.min())
        right.set_ylim(max(0.0, lowest - 0.1), 1.0 + 0.03 * (1.1 - lowest))
        if kept is not None:
            right.axvline(
                kept.coverage, color=VERMILION, linewidth=1.0, linestyle=(0, (3, 3)),
                label=f"score {kept.threshold:.3f}",
            )  # fmt: skip
            right.axhline(
                kept.wanted, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), label="asked for"
            )
            right.legend(loc="best", fontsize=9)
        for axis in (left.xaxis, left.yaxis, right.xaxis, right.yaxis):
            axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    return figure


def _explanations(explained: Sequence[Explained]) -> str:
    if not explained:
        return ""
    from edgetune.bench.explain_page import cards

    return cards([e.explanation for e in explained], [e.truth for e in explained])


def _mistakes(mistakes: Sequence[Mistake], report: ClassificationReport) -> str:
    if not mistakes:
        return ""
    wrong = report.samples - _correct(report)
    worst_first = sorted(mistakes, key=lambda m: -m.confidence)
    cards = "\n".join(_card(m) for m in worst_first)
    shown = f"{len(mistakes):,} of {page.count(wrong, 'mistake')}, the most confident first."
    return page.section("Worst mistakes", f'<p>{shown}</p>\n<div class="cards">\n{cards}\n</div>')


def _card(mistake: Mistake) -> str:
    if mistake.image_png is None:
        shown = mistake.shown[:_LONGEST_TEXT]
        more = len(mistake.shown) - len(shown)
        rest = f' <em class="more">… {page.count(more, "more character")}</em>' if more else ""
        content = f'<blockquote dir="auto">{page.text(shown)}{rest}</blockquote>'
    else:
        if not mistake.image_png.startswith(_PNG_SIGNATURE):
            raise DataError(f"mistake {mistake.shown!r}: expected its image as PNG bytes")
        data = base64.b64encode(mistake.image_png).decode("ascii")
        content = (
            f'<img alt="{page.text(mistake.shown)}" src="data:image/png;base64,{data}">'
            f'<p class="file">{page.name(mistake.shown)}</p>'
        )
    return f"""<article class="card">{content}
<dl><dt>True class</dt><dd>{page.name(mistake.truth)}</dd>
<dt>Predicted</dt><dd class="wrong">{page.name(mistake.predicted)}</dd>
<dt>Confidence</dt><dd>{page.percent(mistake.confidence)}</dd></dl></article>"""


def _confusion_figure(report: ClassificationReport, labels: Sequence[str]) -> "Figure":
    confusion = np.array(report.confusion)  # (classes, classes)
    support = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(support, 1)
    classes = len(labels)
    ticks = [page.shortened(label) for label in labels]
    with figure_style():
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure

        counted = classes <= COUNTED_CLASSES
        side = max(2.0, 0.36 * classes if counted else 0.18 * classes)
        size = 9.0 if counted else 7.0
        longest = 0.009 * size * max(len(tick) for tick in ticks)
        figure = Figure(figsize=(side + longest + 1.4, side + longest + 0.6), layout="constrained")
        axes = figure.subplots()
        colours = LinearSegmentedColormap.from_list(
            "shares", ["#ffffff", "#9ecae8", BLUE, "#00375a"]
        )
        mesh = axes.pcolormesh(
            shares, cmap=colours, vmin=0.0, vmax=1.0, edgecolors="#e6e8eb", linewidth=0.6
        )
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.grid(visible=False)
        middle = np.arange(classes) + 0.5
        axes.set_xticks(
            middle, ticks, rotation=45 if counted else 90, rotation_mode="anchor",
            ha="right", va="top" if counted else "center", fontsize=size,
        )  # fmt: skip
        axes.set_yticks(middle, ticks, fontsize=size)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true class")
        if counted:
            for row, column in zip(*np.nonzero(confusion), strict=True):
                axes.text(
                    column + 0.5, row + 0.5, f"{confusion[row, column]}",
                    ha="center", va="center", fontsize=size,
                    color="white" if shares[row, column] > 0.6 else INK,
                )  # fmt: skip
        bar = figure.colorbar(mesh, ax=axes, shrink=0.6, aspect=18, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8.0)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    return figure


def _share_tile(name: str, interval: Interval) -> str:
    return page.tile(name, page.percent(interval.value), "", f"95% interval<br>{_range(interval)}")


def _axis(intervals: Sequence[Interval]) -> tuple[float, float]:
    """Return the bounds, whole tenths at least a fifth apart, that hold all intervals."""
    low = math.floor(10 * min(min(i.low, i.value) for i in intervals))
    high = math.ceil(10 * max(max(i.high, i.value) for i in intervals))
    if high - low < 2:
        low, high = max(0, high - 2), max(2, high)
    return low / 10, high / 10


def _whisker(interval: Interval, low: float, high: float) -> str:
    """Draw the interval on an axis from `low` to `high`."""
    scale = 1.0 / (high - low)
    left = page.css((interval.low - low) * scale)
    width = page.css((interval.high - interval.low) * scale)
    at = page.css((interval.value - low) * scale)
    return (
        f'<span class="track"><span class="range" style="left:{left};width:{width}"></span>'
        f'<span class="dot" style="left:{at}"></span></span>'
    )


def _range(interval: Interval) -> str:
    if interval.low == interval.high:
        return "no spread"
    return f"{page.percent(interval.low)} to {page.percent(interval.high)}"


_GLOSSARY = """<section class="glossary">
<h2>How to read this page</h2>
<dl>
<dt>Accuracy</dt><dd>Share of all samples whose class was predicted rightly.</dd>
<dt>Precision</dt><dd>Of the samples predicted as a class, the share that are of it.</dd>
<dt>Recall</dt><dd>Of the samples of a class, the share that were predicted as it.</dd>
<dt>F1</dt><dd>Harmonic mean of precision and recall; low when either is low.</dd>
<dt>Macro, weighted</dt><dd>Mean over the classes: each class counts the same (macro), or by its
number of samples (weighted).</dd>
<dt>95% interval</dt><dd>Percentile bootstrap: the range of the middle 95% of values when the
samples are drawn again, with replacement. It covers chance in these samples, not data of another
kind.</dd>
<dt>Calibration error</dt><dd>Expected calibration error, 15 bins: by how many percentage points
the stated confidence misses the accuracy, on average.</dd>
<dt>Groups</dt><dd>Intervals of their accuracy are exact (Clopper-Pearson), those of macro F1
bootstraps; macro F1 is the mean over the classes that occur in the group.</dd>
</dl>
</section>"""
