"""What every HTML page of edgetune is made of: the frame, its style, and small pieces.

A page needs nothing outside itself: style, figures (SVG) and images (data URIs) are inline,
there is no script, and a content security policy forbids loading anything. Equal input gives
equal bytes. Functions return HTML. What a user wrote goes through `text` or `name`, which
escape it, unless a docstring says that an argument is escaped.
"""

import html
import io
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgetune.tasks.curves import figure_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST_TICK = 20


def document(*, title: str, kicker: str, sections: Sequence[str], style: str = "") -> str:
    """Return a whole page.

    Args:
        title: the heading, as the user wrote it.
        kicker: what kind of page it is, a word or two above the heading; HTML.
        sections: HTML, in order; empty ones are left out.
        style: CSS rules beyond those that every page has.
    """
    return _PAGE.format(
        title=text(title),
        kicker=kicker,
        style=f"{_STYLE}\n{style}" if style else _STYLE,
        sections="\n".join(s for s in sections if s),
    )


def section(heading: str, body: str) -> str:
    """Return a section whose heading is escaped and whose body is HTML."""
    return f"<section>\n<h2>{text(heading)}</h2>\n{body}\n</section>"


def facts(heading: str, pairs: Mapping[str, str]) -> str:
    """Return a section with a table of names and values, both escaped; "" without any."""
    if not pairs:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{name(key)}</th><td>{name(value)}</td></tr>'
        for key, value in pairs.items()
    )
    return section(heading, f'<table class="facts"><tbody>\n{rows}\n</tbody></table>')


def tile(label: str, value: str, unit: str, note: str) -> str:
    """Return one large number with its label above and a note below, all HTML."""
    return (
        f'<div class="tile"><span class="label">{label}</span><span class="value">{value}'
        f'<small>{unit}</small></span><span class="note">{note}</span></div>'
    )


def svg(figure: "Figure", prefix: str, description: str) -> str:
    """Return the figure as an <svg> element whose ids start with `prefix`."""
    content = io.StringIO()
    with figure_style(), warnings.catch_warnings():
        # the reader's browser has the glyphs that matplotlib's font lacks
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(content, format="svg", metadata=none)
    element = content.getvalue()
    element = element[element.index("<svg") :]
    # matplotlib's style would apply to the whole page; _STYLE says the same of figures
    element = re.sub(r"<style\b.*?</style>", "", element, count=1, flags=re.DOTALL)
    element = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\1{prefix}-", element)
    width_pt = 72.0 * float(figure.get_figwidth())
    attributes = (
        f'role="img" aria-label="{text(description)}"'
        f' style="min-width:min(34rem,{width_pt:.0f}pt)"'  # a phone scrolls rather than shrinks
    )
    return element.replace("<svg", f"<svg {attributes}", 1).rstrip()


def captioned(element: str, caption: str) -> str:
    """Return an <svg> element as a figure on white paper; the caption is escaped."""
    return (
        f'<figure><div class="paper">{element}</div>\n'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def percent(share: float) -> str:
    """Format a share with one decimal; only none at all is 0%, and only all is 100%."""
    shown = f"{100.0 * share:.1f}%"
    if shown == "0.0%":
        return "&lt;0.1%" if share > 0.0 else "0%"
    if shown == "100.0%":
        return "&gt;99.9%" if share < 1.0 else "100%"
    return shown


def css(share: float) -> str:
    """Return a share as a length in CSS."""
    return f"{100.0 * share:.2f}%"


def count(number: int, noun: str) -> str:
    """Return "1 sample", "2,000 samples"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def name(words: str) -> str:
    """Return the user's text as HTML, its direction of writing kept to itself."""
    return f"<bdi>{text(words)}</bdi>"


def text(words: str) -> str:
    """Return the user's text as HTML."""
    return html.escape(printable(words))


def printable(words: str) -> str:
    """Replace what HTML and UTF-8 can't hold: control characters and lone surrogates."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(c) in {"Cc", "Cs"} and c not in "\t\n\r"
        else c
        for c in words
    )


def shortened(label: str, longest: int = _LONGEST_TICK) -> str:
    """Shorten a name for a figure, keeping both ends, where names differ; not escaped."""
    line = " ".join(printable(label).split())
    if len(line) <= longest:
        return line
    return f"{line[: longest - 8].rstrip()}…{line[-7:].lstrip()}"


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
<p class="kicker">{kicker}</p>
<h1>{title}</h1>
</header>
{sections}
</main>
</body>
</html>
"""

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
