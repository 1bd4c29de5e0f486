"""Explanations as HTML and PNG: coloured tokens, and a map over an image.

Blue speaks for the label that is explained, orange against it; the strongest part has full
colour, so that colours of two explanations are not of one scale.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetune.bench import page
from edgetune.bench.explain import Explanation, FloatArray
from edgetune.runtime.files import write_atomic
from edgetune.runtime.tasks.image_classification import Pixels

# the colours for and against, as in edgetune.tasks.curves
FOR, AGAINST = (0, 114, 178), (213, 94, 0)
# most of the colour that lies over a token, and over an image
TOKEN_OPACITY, IMAGE_OPACITY = 0.6, 0.75
# cells that a finer map is averaged over before it is drawn: single pixels are noise to the eye
CELLS = 28
# tokens in the table beside a text
MOST_TOKENS = 8
SIDE = 320

MEANINGS = {
    "integrated-gradients": "Integrated gradients: each part's share of the difference between"
    " this logit and that of an empty input (padding, or the mean colour).",
    "gradcam": "Grad-CAM: where the last feature maps speak for the label.",
    "occlusion": "Occlusion: what the logit loses without the token, or with the patch painted in"
    " the image's mean colour.",
}


def write_explanations(
    path: Path, explanations: Sequence[Explanation], *, title: str, facts: Mapping[str, str]
) -> None:
    """Write a self-contained page; whole or not at all.

    Args:
        path: the file; one that exists is replaced. Its folder must exist.
        explanations: of any number of samples.
        title: heading of the page.
        facts: what was explained, in the order to print.

    Raises:
        OSError: the file can't be written.
    """
    sections = [cards(explanations), page.facts("What was explained", facts)]
    content = page.document(title=title, kicker="Explanations", sections=sections, style=STYLE)
    write_atomic(path, content.encode("utf-8"))


def cards(explanations: Sequence[Explanation], truths: Sequence[str] = ()) -> str:
    """Return a section of explanations; `truths` are the true labels, where they are known."""
    if not explanations:
        return ""
    methods = "\n".join(
        f"<p>{page.text(MEANINGS[m])}</p>" for m in dict.fromkeys(e.method for e in explanations)
    )
    known = [*truths, *[""] * (len(explanations) - len(truths))]
    body = "\n".join(_card(e, truth) for e, truth in zip(explanations, known, strict=True))
    legend = (
        '<p><span class="for">Blue</span> speaks for the label, <span class="against">orange'
        "</span> against it.</p>"
    )
    return page.section("Explanations", f"{methods}\n{legend}\n{body}")


def overlay(pixels: Pixels, values: FloatArray) -> Pixels:
    """Return the image in grey with the map's colours over it.

    Args:
        pixels: uint8 (height, width, 3).
        values: (rows, columns), any number of each.

    Returns:
        uint8 (height, width, 3).
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    shares = shares_of(coarse(values, CELLS)).astype(np.float32)
    spread = Image.fromarray(shares).resize((width, height), Image.Resampling.BILINEAR)
    share = np.asarray(spread, np.float64)[..., None]  # (height, width, 1)
    grey = pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    opacity = IMAGE_OPACITY * np.abs(share)
    colour = np.where(share > 0, np.array(FOR, np.float64), np.array(AGAINST, np.float64))
    mixed = (1 - opacity) * grey[..., None] + opacity * colour
    result: Pixels = mixed.round().clip(0, 255).astype(np.uint8)
    return result


def coarse(values: FloatArray, cells: int) -> FloatArray:
    """Return the map averaged to at most so many cells along each edge."""
    for axis in (0, 1):
        if values.shape[axis] > cells:
            parts = np.array_split(values, cells, axis=axis)
            values = np.stack([p.mean(axis=axis) for p in parts], axis=axis)
    return values


def shares_of(values: FloatArray) -> FloatArray:
    """Return values over the largest magnitude, in [-1, 1]."""
    largest = float(np.abs(values).max(initial=0.0))
    return values / largest if largest > 0 else np.zeros_like(values)


def strongest(explanation: Explanation, most: int = MOST_TOKENS) -> list[tuple[str, float]]:
    """Return the tokens of the largest magnitude, without space, each with its value."""
    order = np.argsort(-np.abs(explanation.values), kind="stable")
    places = [int(i) for i in order if explanation.values[i] != 0][:most]
    return [(explanation.tokens[i].strip(), float(explanation.values[i])) for i in places]


def _card(explanation: Explanation, truth: str) -> str:
    e = explanation
    shown = _text(e) if e.pixels is None else _image(e, e.pixels)
    rows = [("True class", truth)] if truth else []
    rows += [("Explained", e.target), ("Predicted", e.predicted)]
    listed = "".join(f"<dt>{name}</dt><dd>{page.name(value)}</dd>" for name, value in rows)
    listed += f"<dt>Score of it</dt><dd>{page.percent(e.probability)}</dd>"
    if e.completeness is not None:
        c = e.completeness
        listed += (
            f"<dt>Adds up</dt><dd>{c.total:+.4f} of {c.difference:+.4f} logits"
            f" (off by {c.delta:+.2g})</dd>"
        )
    return f'<article class="explained">{shown}\n<dl>{listed}</dl></article>'


def _text(explanation: Explanation) -> str:
    e = explanation
    spans = "".join(
        _span(token, share, value, special)
        for token, share, value, special in zip(
            e.tokens, shares_of(e.values), e.values, e.special, strict=True
        )
    )
    read = sum(len(t) for t, special in zip(e.tokens, e.special, strict=True) if not special)
    rest = e.shown[read:].strip()
    cut = (
        f' <em class="more">… {page.count(len(rest), "character")} more, not read</em>'
        if rest
        else ""
    )
    rows = "".join(
        f'<tr><td>{page.name(token)}</td><td class="n">{value:+.4f}</td></tr>'
        for token, value in strongest(e)
    )
    table = f"<table><tbody>{rows}</tbody></table>" if rows else ""
    return f'<blockquote dir="auto">{spans}{cut}</blockquote>{table}'


def _span(token: str, share: float, value: float, special: bool) -> str:
    if special and value == 0:
        return ""
    body = token.lstrip()
    space = token[: len(token) - len(body)]
    red, green, blue = FOR if share > 0 else AGAINST
    colour = f"rgba({red},{green},{blue},{TOKEN_OPACITY * abs(share):.3f})"
    kind = ' class="special"' if special else ""
    return (
        f'{page.text(space)}<span{kind} style="background:{colour}" title="{value:+.4f}">'
        f"{page.text(body)}</span>"
    )


def _image(explanation: Explanation, pixels: Pixels) -> str:
    name = Path(explanation.shown).name
    pictures = "".join(
        f'<img alt="{page.text(alt)}" src="data:image/png;base64,{_png(array)}">'
        for alt, array in (
            (name, pixels),
            (f"{name}, explained", overlay(pixels, explanation.values)),
        )
    )
    return f'<div class="pair">{pictures}</div><p class="file">{page.name(name)}</p>'


def _png(pixels: npt.NDArray[np.uint8]) -> str:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode("ascii")


STYLE = """.explained { background: var(--raised); border: 1px solid var(--line);
  border-radius: .5rem; padding: .9rem 1rem; margin-bottom: .75rem; break-inside: avoid; }
.explained blockquote { font-size: 1.05rem; line-height: 1.9; margin-bottom: .6rem; }
.explained blockquote span { border-radius: .2rem; padding: .1rem 0; }
.explained .special { font-size: .75rem; color: var(--muted); margin: 0 .15rem; }
.explained table { width: auto; margin-bottom: .6rem; font-size: .875rem; }
.explained dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .75rem; margin: 0;
  font-size: .875rem; }
.explained dt { color: var(--muted); }
.pair { display: flex; flex-wrap: wrap; gap: .75rem; }
.pair img { display: block; max-width: 100%; border-radius: .25rem; }
.for { border-bottom: .2rem solid #0072b2; }
.against { border-bottom: .2rem solid #d55e00; }"""
