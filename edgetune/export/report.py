"""The report of an export: a page, a table for the model card, and the same as JSON.

What was estimated and not measured says so wherever it stands.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.bench import page
from edgetune.export.pareto import accuracy_floor, pareto_figure, pareto_png, points_of
from edgetune.export.records import Attempt, LayerDamage, LayerSaturationRow, SearchReport
from edgetune.runtime.files import write_atomic
from edgetune.runtime.records import to_mapping
from edgetune.tasks.metrics import Interval

__all__ = ["ladder_markdown", "pareto_png", "search_html", "search_json", "write_reports"]

# rows of the tables of layers; the rest is summed up in a line
_LAYERS_SHOWN = 30
_ABSENT = "–"


def write_reports(report: SearchReport, output: Path) -> Path:
    """Write the page and the JSON beside a bundle, each whole or not at all.

    They lie beside and not in it because a search that found nothing to ship has no bundle,
    and because a device has no use for them.

    Args:
        report: what to show.
        output: the bundle's folder, which need not exist; its parent must.

    Returns:
        The page, OUTPUT.report.html; the JSON is OUTPUT.search.json, and a Pareto search has its
        plot in OUTPUT.pareto.png. Files that exist are replaced.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: a file can't be written.
    """
    shown = output.with_name(f"{output.name}.report.html")
    write_atomic(shown, search_html(report).encode("utf-8"))
    data = output.with_name(f"{output.name}.search.json")
    write_atomic(data, search_json(report).encode("utf-8"))
    if report.search == "pareto" and points_of(report):
        write_atomic(output.with_name(f"{output.name}.pareto.png"), pareto_png(report))
    return shown


def search_html(report: SearchReport) -> str:
    """Return one self-contained HTML page; equal input gives equal text.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    sections = [
        _summary(report),
        _ladder(report),
        _gate(report),
        _pareto(report),
        _layers(report.layers),
        _saturation(report.saturation),
        _session(report.attempts),
        page.facts("What was asked and where", _facts(report)),
        _GLOSSARY,
    ]
    return page.document(title=report.name, kicker="Export report", sections=sections, style=_STYLE)


def search_json(report: SearchReport) -> str:
    """Return the report as JSON; a number that is not finite becomes null."""
    return json.dumps(_finite(to_mapping(report)), indent=2, allow_nan=False) + "\n"


def ladder_markdown(report: SearchReport) -> str:
    """Return every attempt as a row of a Markdown table, for the model card."""
    rows = [
        "| # | candidate | result | accuracy | loss, at most | latency p95 | size | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, attempt in enumerate(report.attempts, 1):
        found = attempt.comparison
        result = f"**{attempt.status}**" if attempt.status == "chosen" else attempt.status
        if attempt.status != "chosen" and attempt.reason:
            result += f": {_cell(attempt.reason)}"
        latency = _number(attempt.latency_p95_ms, " ms")
        if attempt.latency_p95_ms is not None and attempt.latency_basis == "estimate":
            latency += " (estimate)"
        cells = [
            str(number),
            f"{_cell(attempt.rung)} ({_cell(attempt.precision)})",
            result,
            f"{100.0 * attempt.accuracy.value:.2f} %" if attempt.accuracy else _ABSENT,
            f"{100.0 * found.drop.value:.2f}, {100.0 * found.bound:.2f} points"
            if found
            else _ABSENT,
            latency,
            _number(attempt.size_mib, " MiB"),
            _number(attempt.peak_rss_mib, " MiB"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _summary(report: SearchReport) -> str:
    parts = [f'<p class="verdict">{page.name(report.verdict)}</p>']
    if report.overrides:
        listed = ", ".join(page.name(limit) for limit in report.overrides)
        parts.append(f'<p class="warning">Limits that were set aside: {listed}.</p>')
    chosen = next((a for a in report.attempts if a.status == "chosen"), None)
    if chosen is not None:
        parts.append(f'<div class="tiles">{_tiles(chosen, _reference(report))}</div>')
    if report.notes:
        items = "\n".join(f"<li>{page.name(note)}</li>" for note in report.notes)
        parts.append(f'<ul class="notes">\n{items}\n</ul>')
    return f'<section aria-label="Summary">\n{"".join(parts)}\n</section>'


def _tiles(chosen: Attempt, reference: Attempt | None) -> str:
    before = reference if reference is not chosen else None
    tiles = []
    if chosen.accuracy is not None:
        note = f"95% interval<br>{_span(chosen.accuracy)}"
        if chosen.comparison is not None:
            note = (
                f"fp32 {page.percent(chosen.comparison.reference_accuracy)}; the loss is at most"
                f" {_points(chosen.comparison.bound)} (95%)"
            )
        tiles.append(page.tile("Accuracy", page.percent(chosen.accuracy.value), "", note))
    if chosen.latency_p95_ms is not None:
        estimated = chosen.latency_basis == "estimate"
        note = page.text(chosen.latency_basis or "")
        if before is not None and before.latency_p95_ms is not None:
            same = "" if before.latency_basis == chosen.latency_basis else " other basis,"
            note += f"<br>fp32{same} {_latency_number(before.latency_p95_ms, before)} ms"
        label = "Latency p95, estimate" if estimated else "Latency p95"
        value = _latency_number(chosen.latency_p95_ms, chosen)
        tiles.append(page.tile(label, value, " ms", note))
    for label, amount, base in (
        ("Size", chosen.size_mib, before.size_mib if before else None),
        ("Peak memory", chosen.peak_rss_mib, before.peak_rss_mib if before else None),
    ):
        if amount is not None:
            note = f"fp32 {_number(base, ' MiB')}" if base is not None else "&nbsp;"
            tiles.append(page.tile(label, _number(amount), " MiB", note))
    return "".join(tiles)


def _gate(report: SearchReport) -> str:
    """Show what the gate saw of the chosen candidate, or of the last one that was refused."""
    compared = [a for a in report.attempts if a.comparison is not None]
    shown = next((a for a in compared if a.status == "chosen"), compared[-1] if compared else None)
    if shown is None or shown.comparison is None:
        return ""
    found = shown.comparison
    drop, f1_drop = found.drop, found.f1_macro_drop
    worst = (
        f"{_points(found.worst_class_drop)} of recall, {found.worst_class},"
        f" {page.count(found.worst_class_support, 'sample')}"
    )
    return page.facts(
        f"The gate: {shown.rung} against fp32",
        {
            "samples": f"{found.samples:,} of the validation split",
            "same answer": f"{100 * found.agreement:.1f} % of them; {found.lost:,} lost,"
            f" {found.gained:,} gained (McNemar p {found.mcnemar_p:.2g})",
            "accuracy lost": f"{_points(drop.value)}, 95 % interval {_points(drop.low)} to"
            f" {_points(drop.high)}; at most {_points(found.bound)} with 95 % confidence",
            "macro F1 lost": f"{_points(f1_drop.value)}; at most {_points(found.f1_macro_bound)}",
            "worst class": worst,
            "calibration error": f"changes by {_points(found.calibration_change)}",
            "log loss": f"changes by {found.log_loss_change:+.4f} nats",
            "largest change of a probability": f"{found.max_probability_difference:.3f}",
        },
    )


def _ladder(report: SearchReport) -> str:
    if not report.attempts:
        return page.section("Candidates", "<p>None was tried.</p>")
    rows = "\n".join(_attempt_row(n, a) for n, a in enumerate(report.attempts, 1))
    return page.section(
        "Candidates",
        f"""<div class="scroll"><table class="ladder">
<thead><tr><th scope="col" class="n">#</th><th scope="col">Candidate</th>
<th scope="col">Result</th><th scope="col" class="n">Accuracy</th>
<th scope="col" class="n">Loss against fp32</th><th scope="col" class="n">Latency p95</th>
<th scope="col" class="n">Size</th><th scope="col" class="n">Peak memory</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>""",
    )


def _attempt_row(number: int, attempt: Attempt) -> str:
    cost = "from an earlier search" if attempt.cached else f"{_duration(attempt.seconds)}"
    details = [page.name(attempt.precision), cost]
    if attempt.arithmetic != "native":
        details.append(page.text(f"arithmetic {attempt.arithmetic}"))
    if attempt.pareto:
        details.append("Pareto front")
    described = f'<span class="sub">{page.name(attempt.description)}</span>'
    reason = f'<span class="sub">{page.name(attempt.reason)}</span>' if attempt.reason else ""
    cells = [
        ("Accuracy", _accuracy_cell(attempt)),
        ("Loss against fp32", _loss_cell(attempt)),
        ("Latency p95", _latency_cell(attempt)),
        ("Size", _number(attempt.size_mib, " MiB")),
        ("Peak memory", _number(attempt.peak_rss_mib, " MiB")),
    ]
    measured = "".join(
        f'<td class="n{" none" if shown == _ABSENT else ""}" data-label="{label}">'
        f"<div>{shown}</div></td>"
        for label, shown in cells
    )
    marked = ' class="chosen"' if attempt.status == "chosen" else ""
    return (
        f'<tr{marked}><td class="n number">{number}</td><th scope="row">{page.name(attempt.rung)}'
        f'{described}<span class="sub">{" · ".join(details)}</span></th>'
        f'<td class="result"><span class="badge {attempt.status}">{attempt.status}</span>'
        f"{reason}</td>{measured}</tr>"
    )


def _accuracy_cell(attempt: Attempt) -> str:
    if attempt.accuracy is None:
        return _ABSENT
    return (
        f'{page.percent(attempt.accuracy.value)}<span class="sub">{_span(attempt.accuracy)}</span>'
    )


def _loss_cell(attempt: Attempt) -> str:
    found = attempt.comparison
    if found is None:
        return _ABSENT
    return (
        f"{_points(found.drop.value)}"
        f'<span class="sub">at most {100.0 * found.bound:.2f}</span>'
        f'<span class="sub">{found.lost:,} lost, {found.gained:,} gained</span>'
    )


def _latency_cell(attempt: Attempt) -> str:
    if attempt.latency_p95_ms is None:
        return _ABSENT
    basis = page.text(attempt.latency_basis or "")
    median = ""
    if attempt.latency_p50_ms is not None:
        number = _latency_number(attempt.latency_p50_ms, attempt)
        median = f'<span class="sub">median {number} ms</span>'
    return (
        f"{_latency_number(attempt.latency_p95_ms, attempt)} ms{median}"
        f'<span class="sub">{basis}</span>'
    )


def _pareto(report: SearchReport) -> str:
    points = points_of(report)
    if not points:
        return ""
    figure = page.svg(pareto_figure(report), "pareto", "Latency and accuracy of the candidates")
    caption = (
        "A marker's number is the candidate's in the table above, its area grows with the"
        " bundle's size. Up and to the left is better."
    )
    if any(p.attempt.latency_basis == "estimate" for p in points):
        caption += " A hollow marker's latency is an estimate."
    missing = len(report.attempts) - len(points)
    if missing:
        caption += f" {page.count(missing, 'candidate')} without both numbers not shown."
    if accuracy_floor(report) is not None:
        caption += (
            " A candidate above the line of accuracy may still fail: the gate asks that its loss"
            " is within the limit with 95% confidence."
        )
    return page.section("Latency against accuracy", page.captioned(figure, caption))


def _layers(layers: Sequence[LayerDamage]) -> str:
    if not layers:
        return ""
    by_noise = any(layer.sqnr_db is not None for layer in layers)
    ranked = sorted(layers, key=lambda layer: (-_damage(layer, by_noise), layer.layer))
    shown, rest = ranked[:_LAYERS_SHOWN], ranked[_LAYERS_SHOWN:]
    most = _damage(ranked[0], by_noise) or 1.0
    rows = "\n".join(_layer_row(layer, by_noise, most) for layer in shown)
    meaning = (
        "The bar is the error of the logits when only this layer is quantized, as a share of the"
        " logits' own size (root mean square)."
        if by_noise
        else "The bar is how far the answers move when only this layer is quantized (mean"
        " Kullback-Leibler divergence, nats)."
    )
    if rest:
        meaning += (
            f" {page.count(len(rest), 'more layer')} below"
            f" {_damage_text(shown[-1], by_noise)} not shown."
        )
    return page.section(
        "Layers, most sensitive first",
        f"""<p>{meaning}</p>
<div class="scroll"><table class="damage">
<thead><tr><th scope="col">Layer</th><th scope="col" class="n">Error</th>
<th scope="col" class="n">Weights</th><th scope="col">Kept as</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>""",
    )


def _layer_row(layer: LayerDamage, by_noise: bool, most: float) -> str:
    width = page.css(min(1.0, _damage(layer, by_noise) / most))
    extra = []
    if by_noise and layer.sqnr_db is not None and math.isfinite(layer.sqnr_db):
        extra.append(f"{layer.sqnr_db:.1f} dB")
    if layer.accuracy_drop is not None:
        extra.append(f"{_points(layer.accuracy_drop)} of accuracy")
    notes = "".join(f'<span class="sub">{note}</span>' for note in extra)
    kind = " float" if layer.kept.startswith("float") else ""
    return (
        f'<tr><th scope="row">{page.name(layer.layer)} <span class="op">{page.name(layer.op)}'
        f'</span><span class="track"><span class="bar{kind}" style="width:{width}"></span></span>'
        f'</th><td class="n">{_damage_text(layer, by_noise)}{notes}</td>'
        f'<td class="n">{layer.parameters:,}</td><td>{page.name(layer.kept)}</td></tr>'
    )


def _damage(layer: LayerDamage, by_noise: bool) -> float:
    """Return the logits' relative error, or the divergence; 0 where nothing is known."""
    if by_noise:
        # 20 log10(signal / noise), both root mean squares
        return 0.0 if layer.sqnr_db is None else 10.0 ** (-layer.sqnr_db / 20.0)
    return max(0.0, layer.mean_kl or 0.0)


def _damage_text(layer: LayerDamage, by_noise: bool) -> str:
    if not by_noise:
        return _ABSENT if layer.mean_kl is None else f"{layer.mean_kl:.2g}"
    return "none" if layer.sqnr_db is None else f"{100.0 * _damage(layer, by_noise):.2g}%"


def _saturation(rows: Sequence[LayerSaturationRow]) -> str:
    if not rows:
        return ""
    ranked = sorted(rows, key=lambda row: (-row.saturated_share, -row.worst_error, row.layer))
    shown, rest = ranked[:_LAYERS_SHOWN], ranked[_LAYERS_SHOWN:]
    body = "\n".join(
        f'<tr><th scope="row">{page.name(row.layer)}</th>'
        f'<td class="n">{row.candidate_pairs:,}</td>'
        f'<td class="n">{_share(row.saturated_share)}</td>'
        f'<td class="n">{row.worst_error:.3g}</td><td>{page.text(row.repair)}</td></tr>'
        for row in shown
    )
    more = f"<p>{page.count(len(rest), 'more layer')} with less not shown.</p>" if rest else ""
    return page.section(
        "Saturation on CPUs without VNNI",
        f"""<div class="scroll"><table>
<thead><tr><th scope="col">Layer</th><th scope="col" class="n">Pairs that can</th>
<th scope="col" class="n">Saturated</th><th scope="col" class="n">Worst error</th>
<th scope="col">Repair</th></tr></thead>
<tbody>
{body}
</tbody></table></div>{more}""",
    )


def _session(attempts: Sequence[Attempt]) -> str:
    chosen = next((a for a in attempts if a.status == "chosen"), None)
    return page.facts("Session options", chosen.session_config) if chosen else ""


def _facts(report: SearchReport) -> dict[str, str]:
    budgets = report.budgets
    limits: list[tuple[str, float | None, str]] = [
        ("loss of accuracy", 100.0 * budgets.max_drop, "points, with 95 % confidence"),
        ("latency p95", budgets.max_latency_ms, "ms"),
        ("size", budgets.max_size_mib, "MiB"),
        ("peak memory", budgets.max_rss_mib, "MiB"),
    ]
    if budgets.max_class_drop is not None:
        limits.insert(1, ("loss of a class", 100.0 * budgets.max_class_drop, "points of recall"))
    asked = {
        name: "no limit" if limit is None else f"at most {limit:g} {unit}"
        for name, limit, unit in limits
    }
    return {
        "profile": report.profile,
        **asked,
        "search": f"{report.search}, {_duration(report.seconds)}",
        **report.facts,
    }


def _reference(report: SearchReport) -> Attempt | None:
    """Return the fp32 graph, which is compared with nothing."""
    return next((a for a in report.attempts if a.accuracy and a.comparison is None), None)


def _span(interval: Interval) -> str:
    return f"{page.percent(interval.low)} to {page.percent(interval.high)}"


def _points(share: float) -> str:
    return f"{100.0 * share + 0.0:.2f} points"


def _share(share: float) -> str:
    """Return a share that may be tiny, in per cent."""
    return f"{100.0 * share:.2g}%" if 0.0 < share < 0.001 else page.percent(share)


def _latency_number(milliseconds: float, attempt: Attempt) -> str:
    sign = "≈ " if attempt.latency_basis == "estimate" else ""
    return f"{sign}{_number(milliseconds)}"


def _number(value: float | None, unit: str = "") -> str:
    """Return three digits or all before the point: 0.123, 12.3, 1,234."""
    if value is None or not math.isfinite(value):
        return _ABSENT
    decimals = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{decimals}f}{unit}"


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 5970 else f"{seconds / 3600.0:.1f} h"


def _cell(words: str) -> str:
    """Return the user's text as one line of a Markdown table's cell, nothing in it special."""
    line = " ".join(page.printable(words).split())
    return "".join(f"\\{c}" if c in "\\|`*_[]<>~#!&$" else c for c in line)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_GLOSSARY = """<section class="glossary">
<h2>How to read this page</h2>
<dl>
<dt>Loss, at most</dt><dd>fp32 and the candidate answered the same samples. "At most" is the
one-sided 95% score bound (Tango 1998) of what the candidate loses on all data of this kind; a
candidate passes only if this bound, not the loss seen, is within the limit.</dd>
<dt>Lost, gained</dt><dd>Samples that only fp32, or only the candidate, got right.</dd>
<dt>Estimate</dt><dd>Not measured: worked out for the device from what was measured elsewhere.
Trust it to rank candidates, not as a promise.</dd>
<dt>Emulated</dt><dd>The answers were computed as the device's CPU would, saturation
included, not on it.</dd>
<dt>Pareto front</dt><dd>Candidates that no other beats in one respect without losing in
another.</dd>
</dl>
</section>"""

_STYLE = """.verdict { margin: -.75rem 0 1.25rem; font-size: 1.2rem; line-height: 1.45;
  overflow-wrap: anywhere; }
.warning { padding: .6rem .9rem; border-left: .25rem solid var(--wrong); background: var(--raised);
  overflow-wrap: anywhere; }
.notes { padding-left: 1.2rem; overflow-wrap: anywhere; }
.sub { display: block; color: var(--muted); font-size: .75rem; font-weight: 400; line-height: 1.4; }
.op { color: var(--muted); font-weight: 400; }
.badge { display: inline-block; padding: 0 .45rem; border: 1px solid currentColor;
  border-radius: .25rem; color: var(--muted); font-size: .8125rem; white-space: nowrap; }
.badge.chosen { background: var(--accent); border-color: var(--accent); color: var(--ground); }
.badge.passed { color: var(--accent); }
.badge.failed, .badge.error { color: var(--wrong); }
.ladder { font-size: .875rem; }
.ladder th, .ladder td { vertical-align: top; padding-right: .6rem; }
.ladder thead th { vertical-align: bottom; }
.ladder tbody th { min-width: 9rem; }
.ladder .number { color: var(--muted); }
.ladder .result { min-width: 8rem; max-width: 15rem; overflow-wrap: anywhere; }
.ladder tr.chosen > * { background: var(--raised); }
.ladder tr.chosen .number { box-shadow: inset .2rem 0 var(--accent); padding-left: .5rem; }
.none { color: var(--muted); }
.damage th .track { margin-top: .3rem; }
.damage .bar.float { background: var(--wrong); }
@media (max-width: 34rem) {
  .ladder, .ladder tbody, .ladder tr, .ladder th, .ladder td { display: block; }
  .ladder thead { display: none; }
  .ladder tr { position: relative; padding: .6rem 0 .6rem 2rem;
    border-bottom: 1px solid var(--line); }
  .ladder tbody th, .ladder td { padding: .1rem .5rem .1rem 0; border: 0; max-width: none; }
  .ladder .result { max-width: none; }
  .ladder .number { position: absolute; left: .3rem; top: .6rem; }
  .ladder tr.chosen { background: var(--raised); box-shadow: inset .2rem 0 var(--accent); }
  .ladder tr.chosen .number { box-shadow: none; padding-left: .2rem; }
  .ladder td[data-label] { display: flex; justify-content: space-between; gap: 1rem;
    white-space: normal; }
  .ladder td[data-label]::before { content: attr(data-label); color: var(--muted); }
  .ladder td.none { display: none; }
}
@media print {
  .ladder { font-size: 7.5pt; }
  .ladder .sub { font-size: 6.5pt; }
  .ladder tbody th { min-width: 0; }
  .ladder .result { min-width: 0; max-width: 9rem; }
}"""
