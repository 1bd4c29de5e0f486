"""One HTML page that says how well several labels at once, or numbers, are told.

As `edgetune.bench.report` is of one class: self-contained, no script; equal input gives equal
bytes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetune.bench import page
from edgetune.bench.answers import LabelAnswers, ValueAnswers
from edgetune.config import SelectionMetric
from edgetune.runtime.files import write_atomic
from edgetune.tasks.curves import (
    BLUE,
    MUTED,
    History,
    best_epoch,
    curves_figure,
    figure_style,
)
from edgetune.tasks.metrics import Interval
from edgetune.tasks.multilabel import LabelReport
from edgetune.tasks.regression import RegressionReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# more points make the page large and show nothing new
_DRAWN_POINTS = 3000
_LONGEST_TEXT = 400


def write_target_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    answers: LabelAnswers | ValueAnswers,
    mistakes: Sequence[Mapping[str, Any]],
    history: History | None,
    metric: SelectionMetric = "auto",
) -> None:
    """Write a self-contained HTML report; whole or not at all.

    Args:
        path: the file; one that exists is replaced. Its folder must exist.
        title: heading of the page.
        facts: what was measured, on what and when, in the order to print.
        answers: what was predicted.
        mistakes: of `edgetune.bench.evaluate.worst_mistakes`, in the order to show.
        history: one mapping an epoch, as `curves_figure` takes it; None or empty for none.
        metric: what chose the best epoch.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ResourceError: the file cannot be written.
    """
    if isinstance(answers, LabelAnswers):
        report = answers.report()
        own = [_label_summary(report), page.facts("What was measured", facts)]
        own += [_training(history, metric), _labels(report)]
        glossary = _LABEL_GLOSSARY
    else:
        values = answers.report()
        own = [_value_summary(values), page.facts("What was measured", facts)]
        own += [_training(history, metric), _scatter(answers)]
        glossary = _VALUE_GLOSSARY
    sections = [*own, _mistakes(mistakes), glossary]
    content = page.document(title=title, kicker="Evaluation report", sections=sections, style="")
    write_atomic(path, content.encode("utf-8"))


def _label_summary(report: LabelReport) -> str:
    rows = [
        ("Accuracy, all labels right", report.accuracy),
        ("Precision, micro", report.precision_micro),
        ("Recall, micro", report.recall_micro),
        ("F1, micro", report.f1_micro),
        ("F1, macro", report.f1_macro),
    ]
    if report.mean_average_precision is not None:
        rows.append(("Mean average precision", report.mean_average_precision))
    right = round(report.accuracy.value * report.samples)
    tiles = "".join(
        page.tile(name, page.percent(found.value), "", f"95% interval<br>{_share_span(found)}")
        for name, found in (("All labels right", report.accuracy), ("Micro F1", report.f1_micro))
    )
    sentence = (
        f"Of {page.count(report.samples, 'sample')} <strong>{right:,}</strong> have every label"
        " right."
    )
    cells = [(name, page.percent(i.value), _share_span(i)) for name, i in rows]
    return _summary(tiles, sentence, cells)


def _value_summary(report: RegressionReport) -> str:
    rows = [
        ("Mean absolute error", report.mae),
        ("Root mean squared error", report.rmse),
        ("Variance explained (R2)", report.r2),
        ("Pearson's correlation", report.pearson),
        ("Mean error (predicted less true)", report.bias),
    ]
    tiles = page.tile(
        "Mean absolute error", _number(report.mae.value), "", f"95% interval<br>{_span(report.mae)}"
    ) + page.tile(
        "R2", _number(report.r2.value), "", "1 is best; 0 is what<br>the mean would do"
    )  # fmt: skip
    sentence = (
        f"Half of {page.count(report.samples, 'sample')} are off by"
        f" <strong>{_number(report.median_error)}</strong> or less, in the unit of the values."
    )
    return _summary(tiles, sentence, [(name, _number(i.value), _span(i)) for name, i in rows])


def _summary(tiles: str, sentence: str, cells: Sequence[tuple[str, str, str]]) -> str:
    body = "\n".join(
        f'<tr><th scope="row">{name}</th><td class="n">{value}</td><td class="n">{span}</td></tr>'
        for name, value, span in cells
    )
    return f"""<section aria-label="Summary">
<div class="tiles">{tiles}</div>
<p>{sentence}</p>
<div class="scroll"><table>
<thead><tr><th scope="col">Metric</th><th scope="col" class="n">Value</th>
<th scope="col" class="n">95% interval</th></tr></thead>
<tbody>
{body}
</tbody></table></div>
</section>"""


def _training(history: History | None, metric: SelectionMetric) -> str:
    if not history:
        return ""
    figure = page.svg(curves_figure(history, metric=metric), "curves", "Training curves")
    best = best_epoch(history, metric=metric)
    epochs = page.count(len(history), "epoch")
    caption = f"{epochs}; the best is epoch {best} (dashed line)." if best else f"{epochs}."
    return page.section("Training", page.captioned(figure, caption))


def _labels(report: LabelReport) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{page.name(s.label)}</th>'
        f'<td class="n">{page.percent(s.precision)}</td><td class="n">{page.percent(s.recall)}</td>'
        f'<td class="n">{page.percent(s.f1)}</td>'
        f'<td class="n">{_optional(s.average_precision)}</td><td class="n">{s.support:,}</td></tr>'
        for s in sorted(report.per_label, key=lambda s: s.f1)
    )
    return page.section(
        "Labels, weakest first",
        f"""<div class="scroll"><table>
<thead><tr><th scope="col">Label</th><th scope="col" class="n">Precision</th>
<th scope="col" class="n">Recall</th><th scope="col" class="n">F1</th>
<th scope="col" class="n">Average precision</th><th scope="col" class="n">Samples</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>""",
    )


def _scatter(answers: ValueAnswers) -> str:
    element = page.svg(_scatter_figure(answers), "scatter", "Predicted against true values")
    samples = len(answers.truth)
    drawn = min(samples, _DRAWN_POINTS)
    caption = "A point a sample; on the line, what is predicted is true."
    if drawn < samples:
        caption += f" {drawn:,} of {samples:,} samples are drawn."
    return page.section("Predicted and true", page.captioned(element, caption))


def _scatter_figure(answers: ValueAnswers) -> "Figure":
    chosen = np.linspace(0, len(answers.truth) - 1, min(len(answers.truth), _DRAWN_POINTS))
    rows = chosen.round().astype(np.int64)
    truth, predicted = answers.truth[rows], answers.predicted[rows]
    low = float(min(truth.min(), predicted.min()))
    high = float(max(truth.max(), predicted.max()))
    with figure_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.4, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel("true")
        axes.set_ylabel("predicted")
        axes.plot([low, high], [low, high], color=MUTED, linewidth=1.0, linestyle=(0, (3, 3)))
        axes.scatter(truth, predicted, s=12, color=BLUE, alpha=0.5, linewidths=0)
    return figure


def _mistakes(mistakes: Sequence[Mapping[str, Any]]) -> str:
    if not mistakes:
        return ""
    rows = "\n".join(
        f"<tr><td>{page.name(m['where'])}</td><td>{page.name(m['input'][:_LONGEST_TEXT])}</td>"
        f"<td>{page.name(m['truth'] or '(no label)')}</td>"
        f'<td class="wrong">{page.name(m["predicted"] or "(no label)")}</td></tr>'
        for m in mistakes
    )
    return page.section(
        "Furthest off",
        f"""<div class="scroll"><table>
<thead><tr><th scope="col">Where</th><th scope="col">Input</th><th scope="col">True</th>
<th scope="col">Predicted</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>""",
    )


def _optional(share: float | None) -> str:
    return "&ndash;" if share is None else page.percent(share)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _span(found: Interval) -> str:
    return f"{_number(found.low)} to {_number(found.high)}"


def _share_span(found: Interval) -> str:
    return f"{page.percent(found.low)} to {page.percent(found.high)}"


_INTERVAL = """<dt>95% interval</dt><dd>Percentile bootstrap: the range of the middle 95% of values
when the samples are drawn again, with replacement. It covers chance in these samples, not data of
another kind.</dd>"""

_LABEL_GLOSSARY = f"""<section class="glossary">
<h2>How to read this page</h2>
<dl>
<dt>Accuracy</dt><dd>Share of all samples of which every label is right, and none too many.</dd>
<dt>Precision</dt><dd>Of the samples given a label, the share that have it.</dd>
<dt>Recall</dt><dd>Of the samples with a label, the share that were given it.</dd>
<dt>F1</dt><dd>Harmonic mean of precision and recall; low when either is low.</dd>
<dt>Micro, macro</dt><dd>Over all decisions together (micro), or the mean over the labels
(macro).</dd>
<dt>Average precision</dt><dd>Area under the precision-recall curve, whatever the threshold.</dd>
{_INTERVAL}
</dl>
</section>"""

_VALUE_GLOSSARY = f"""<section class="glossary">
<h2>How to read this page</h2>
<dl>
<dt>Mean absolute error</dt><dd>How far predictions are off on average, in the unit of the
values.</dd>
<dt>Root mean squared error</dt><dd>The same, with large errors counting more.</dd>
<dt>R2</dt><dd>Share of the values' variance that is explained; 0 for always saying their mean.</dd>
<dt>Pearson's correlation</dt><dd>From -1 to 1; it does not see a wrong scale or offset.</dd>
{_INTERVAL}
</dl>
</section>"""
