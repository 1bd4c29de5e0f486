"""One HTML page that says how good a classifier is, to be mailed, printed and archived.

The page needs nothing outside itself: style, figures (SVG) and images (data URIs) are
inline, there is no script, and a content security policy forbids loading anything. Equal
input gives equal bytes.
"""

import base64
import html
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgetune.config import SelectionMetric
from edgetune.errors import DataError
from edgetune.tasks.curves import (
    BLUE,
    INK,
    History,
    best_epoch,
    curves_figure,
    figure_style,
    write_whole,
)
from edgetune.tasks.metrics import ClassificationReport, ClassScores, Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# largest numbers of classes whose confusion matrix is drawn, and whose counts are printed
DRAWN_CLASSES = 40
COUNTED_CLASSES = 20

_PAIRS_BESIDE_FIGURE = 5
_PAIRS_WITHOUT_FIGURE = 30
_LONGEST_TEXT = 400
_LONGEST_TICK = 20
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
        _facts(facts),
        _training(history, metric) if history else "",
        _confusion(report, labels),
        _classes(report),
        _mistakes(mistakes, report),
        _GLOSSARY,
    ]
    page = _PAGE.format(
        title=_text(title), style=_STYLE, sections="\n".join(s for s in sections if s)
    )
    write_whole(path, page.encode("utf-8"))


def _summary(report: ClassificationReport) -> str:
    correct = _correct(report)
    sentences = [
        f"Of {_count(report.samples, 'sample')} the model got <strong>{correct:,}</strong> right.",
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
        tiles.append(_tile("Calibration error", f"{points:.1f}", " points", note))
    if report.log_loss is not None:
        tiles.append(
            _tile("Log loss", f"{report.log_loss:.3f}", "", "natural logarithm,<br>0 is best")
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
        f'<tr><th scope="row">{name}</th><td class="n">{_percent(interval.value)}</td>'
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
            f" three, accuracy on all data of this kind is likely above {_percent(bound)}."
        )
    return (
        "These samples are only some of those the model will meet: on all data of this kind its"
        f" accuracy is likely between {_percent(report.accuracy.low)} and"
        f" {_percent(report.accuracy.high)} (95% bootstrap interval)."
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
        f"The weakest class is <strong>{_name(weakest.label)}</strong>: {found:,} of its"
        f" {_count(weakest.support, 'sample')} found, F1 {_percent(weakest.f1)}."
    )


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{_name(key)}</th><td>{_name(value)}</td></tr>'
        for key, value in facts.items()
    )
    return _section("What was measured", f'<table class="facts"><tbody>\n{rows}\n</tbody></table>')


def _training(history: History, metric: SelectionMetric) -> str:
    figure = _svg(curves_figure(history, metric=metric), "curves", "Training curves")
    epochs = _count(len(history), "epoch")
    best = best_epoch(history, metric=metric)
    caption = f"{epochs}; the best is epoch {best} (dashed line)." if best else f"{epochs}."
    return _section("Training", _figure(figure, caption))


def _confusion(report: ClassificationReport, labels: Sequence[str]) -> str:
    drawn = len(labels) <= DRAWN_CLASSES
    pairs = _confused_pairs(report, _PAIRS_BESIDE_FIGURE if drawn else _PAIRS_WITHOUT_FIGURE)
    parts = []
    if drawn:
        figure = _svg(_confusion_figure(report, labels), "confusion", "Confusion matrix")
        caption = "Colour is the share of the true class, so that each row adds to 100%."
        if len(labels) <= COUNTED_CLASSES:
            caption += " Numbers are samples; an empty cell has none."
        parts.append(_figure(figure, caption))
    if pairs:
        rows = "\n".join(
            f"<tr><td>{_name(labels[row])}</td><td>{_name(labels[column])}</td>"
            f'<td class="n">{count:,}</td><td class="n">{_percent(share)}</td></tr>'
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
    return _section("Confusion matrix" if drawn else "Most often confused", "\n".join(parts))


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
        f'<tr class="absent"><th scope="row">{_name(s.label)}</th><td class="n">0</td>'
        '<td colspan="4">never true, never predicted</td></tr>'
        for s in absent
    ]
    body = "\n".join(rows)
    return _section(
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
        f'<tr><th scope="row">{_name(scores.label)}</th><td class="n">{scores.support:,}</td>'
        f'<td class="n">{_percent(scores.precision)}</td>'
        f'<td class="n">{_percent(scores.recall)}</td>'
        f'<td class="n">{_percent(scores.f1)}</td><td class="wide"><span class="track">'
        f'<span class="bar" style="width:{_css(scores.f1)}"></span></span></td></tr>'
    )


def _mistakes(mistakes: Sequence[Mistake], report: ClassificationReport) -> str:
    if not mistakes:
        return ""
    wrong = report.samples - _correct(report)
    worst_first = sorted(mistakes, key=lambda m: -m.confidence)
    cards = "\n".join(_card(m) for m in worst_first)
    shown = f"{len(mistakes):,} of {_count(wrong, 'mistake')}, the most confident first."
    return _section("Worst mistakes", f'<p>{shown}</p>\n<div class="cards">\n{cards}\n</div>')


def _card(mistake: Mistake) -> str:
    if mistake.image_png is None:
        shown = mistake.shown[:_LONGEST_TEXT]
        more = len(mistake.shown) - len(shown)
        rest = f' <em class="more">… {_count(more, "more character")}</em>' if more else ""
        content = f'<blockquote dir="auto">{_text(shown)}{rest}</blockquote>'
    else:
        if not mistake.image_png.startswith(_PNG_SIGNATURE):
            raise DataError(f"mistake {mistake.shown!r}: expected its image as PNG bytes")
        data = base64.b64encode(mistake.image_png).decode("ascii")
        content = (
            f'<img alt="{_text(mistake.shown)}" src="data:image/png;base64,{data}">'
            f'<p class="file">{_name(mistake.shown)}</p>'
        )
    return f"""<article class="card">{content}
<dl><dt>True class</dt><dd>{_name(mistake.truth)}</dd>
<dt>Predicted</dt><dd class="wrong">{_name(mistake.predicted)}</dd>
<dt>Confidence</dt><dd>{_percent(mistake.confidence)}</dd></dl></article>"""


def _confusion_figure(report: ClassificationReport, labels: Sequence[str]) -> "Figure":
    confusion = np.array(report.confusion)  # (classes, classes)
    support = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(support, 1)
    classes = len(labels)
    ticks = [_tick(label) for label in labels]
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


def _svg(figure: "Figure", prefix: str, description: str) -> str:
    """Return the figure as an <svg> element whose ids start with `prefix`."""
    content = io.StringIO()
    with figure_style(), warnings.catch_warnings():
        # the reader's browser has the glyphs that matplotlib's font lacks
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(content, format="svg", metadata=none)
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    # matplotlib's style would apply to the whole page; _STYLE says the same of figures
    svg = re.sub(r"<style\b.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\1{prefix}-", svg)
    width_pt = 72.0 * float(figure.get_figwidth())
    attributes = (
        f'role="img" aria-label="{_text(description)}"'
        f' style="min-width:min(34rem,{width_pt:.0f}pt)"'  # a phone scrolls rather than shrinks
    )
    return svg.replace("<svg", f"<svg {attributes}", 1).rstrip()


def _figure(svg: str, caption: str) -> str:
    caption = f"<figcaption>{_text(caption)}</figcaption>"
    return f'<figure><div class="paper">{svg}</div>\n{caption}</figure>'


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{_text(heading)}</h2>\n{body}\n</section>"


def _share_tile(name: str, interval: Interval) -> str:
    return _tile(name, _percent(interval.value), "", f"95% interval<br>{_range(interval)}")


def _tile(name: str, value: str, unit: str, note: str) -> str:
    return (
        f'<div class="tile"><span class="label">{name}</span><span class="value">{value}'
        f'<small>{unit}</small></span><span class="note">{note}</span></div>'
    )


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
    left = _css((interval.low - low) * scale)
    width = _css((interval.high - interval.low) * scale)
    at = _css((interval.value - low) * scale)
    return (
        f'<span class="track"><span class="range" style="left:{left};width:{width}"></span>'
        f'<span class="dot" style="left:{at}"></span></span>'
    )


def _range(interval: Interval) -> str:
    if interval.low == interval.high:
        return "no spread"
    return f"{_percent(interval.low)} to {_percent(interval.high)}"


def _percent(share: float) -> str:
    """Format a share with one decimal; only none at all is 0%, and only all is 100%."""
    text = f"{100.0 * share:.1f}%"
    if text == "0.0%":
        return "&lt;0.1%" if share > 0.0 else "0%"
    if text == "100.0%":
        return "&gt;99.9%" if share < 1.0 else "100%"
    return text


def _css(share: float) -> str:
    return f"{100.0 * share:.2f}%"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _name(text: str) -> str:
    """Return the user's text as HTML, its direction of writing kept to itself."""
    return f"<bdi>{_text(text)}</bdi>"


def _text(text: str) -> str:
    return html.escape(_printable(text))


def _printable(text: str) -> str:
    """Replace what HTML and UTF-8 can't hold: control characters and lone surrogates."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(c) in {"Cc", "Cs"} and c not in "\t\n\r"
        else c
        for c in text
    )


def _tick(label: str) -> str:
    """Shorten a class name for a figure's axis, keeping both ends, where names differ."""
    line = " ".join(_printable(label).split())
    if len(line) <= _LONGEST_TICK:
        return line
    return f"{line[: _LONGEST_TICK - 8].rstrip()}…{line[-7:].lstrip()}"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
<header>
<p class="kicker">Evaluation report</p>
<h1>{title}</h1>
</header>
{sections}
</main>
</body>
</html>
"""

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
</dl>
</section>"""

_STYLE = """:root {
  color-scheme: light dark;
  --ground: #ffffff; --raised: #f6f7f9; --ink: #1f2328; --muted: #59636e; --line: #dde1e6;
  --accent: #0072b2; --soft: #7fbce0; --wrong: #b3400a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171a; --raised: #1e2226; --ink: #e6e9ec; --muted: #9aa4ae; --line: #343a41;
    --accent: #56b4e9; --soft: #2f6f99; --wrong: #ff9d66;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans",
    Arial, sans-serif;
}
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
.kicker { margin: 0; color: var(--muted); font-size: .875rem; }
h1 { margin: .1rem 0 1.75rem; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .9rem; font-size: 1.3rem; line-height: 1.3; break-after: avoid; }
h3 { margin: 1.75rem 0 .6rem; font-size: 1rem; break-after: avoid; }
p { margin: 0 0 1rem; max-width: 42rem; }
.tiles {
  display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr));
  margin-bottom: 1.5rem;
}
.tile, .card { background: var(--raised); border: 1px solid var(--line); border-radius: .5rem; }
.tile { display: flex; flex-direction: column; padding: .9rem 1rem; break-inside: avoid; }
.label { color: var(--muted); font-size: .875rem; }
.value { font-size: 2rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.value small { font-size: .95rem; font-weight: 400; color: var(--muted); }
.note { margin-top: auto; color: var(--muted); font-size: .8125rem; line-height: 1.4; }
.track { position: relative; display: block; height: .5rem; border-radius: .25rem;
  background: var(--line); }
.range, .bar, .dot { position: absolute; top: 0; bottom: 0; border-radius: .25rem; }
.range { background: var(--soft); min-width: 3px; }
.bar { left: 0; background: var(--accent); }
.dot { width: 4px; margin-left: -2px; top: -3px; bottom: -3px; background: var(--accent); }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .9375rem; line-height: 1.4; }
th, td { padding: .42rem .75rem .42rem 0; text-align: left; vertical-align: middle;
  border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-size: .8125rem; font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; overflow-wrap: anywhere; min-width: 7rem; }
tr { break-inside: avoid; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
thead .n { white-space: normal; }
.wide { width: 32%; min-width: 7rem; padding-left: .75rem; }
.wide:last-child { padding-right: 3px; }
.axis span:last-child { float: right; }
.absent, .absent th { color: var(--muted); font-weight: 400; }
.facts th { width: 11rem; min-width: 0; color: var(--muted); font-weight: 400;
  vertical-align: top; }
.facts td { overflow-wrap: anywhere; }
figure { margin: 0; break-inside: avoid; }
.paper { overflow-x: auto; padding: .9rem; background: #ffffff; border: 1px solid var(--line);
  border-radius: .5rem; text-align: center; }
.paper svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.paper svg * { stroke-linejoin: round; stroke-linecap: butt; }
.paper svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  "Noto Sans", Arial, sans-serif !important; }
figcaption { margin-top: .5rem; color: var(--muted); font-size: .875rem; }
.cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.card { display: flex; flex-direction: column; padding: .9rem 1rem; break-inside: avoid; }
.card img { display: block; width: 100%; height: 11rem; object-fit: contain; background: #808080;
  border-radius: .25rem; }
.file { margin: .4rem 0 0; color: var(--muted); font-size: .8125rem; overflow-wrap: anywhere; }
blockquote { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.more { color: var(--muted); font-size: .875rem; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .75rem; margin: auto 0 0;
  padding-top: .75rem; font-size: .875rem; }
.card img ~ dl { margin-top: 0; }
.card dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.card dd { font-weight: 500; }
.card .wrong { color: var(--wrong); }
.glossary { color: var(--muted); font-size: .875rem; }
.glossary h2 { font-size: 1rem; color: var(--ink); }
.glossary dl { display: grid; grid-template-columns: 9rem 1fr; gap: .3rem 1rem; margin: 0; }
.glossary dt { color: var(--ink); }
@media (max-width: 34rem) {
  main { padding-top: 1.5rem; }
  h1 { font-size: 1.5rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile { padding: .75rem; }
  .value { font-size: 1.6rem; }
  .glossary dl { display: block; }
  .glossary dd { margin-bottom: .5rem; }
  .facts th { width: 7rem; }
  .wide { display: none; }
  table { font-size: .875rem; }
  th, td { padding-right: .5rem; }
  tbody th { min-width: 5.5rem; }
}
@media print {
  :root { --ground: #ffffff; --raised: #f6f7f9; --ink: #000000; --muted: #444444; --line: #cccccc;
    --accent: #0072b2; --soft: #7fbce0; --wrong: #8a3000; color-scheme: light; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  html { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  .scroll, .paper { overflow: visible; }
  .paper svg { min-width: 0 !important; }
}
@page { margin: 16mm; }"""
