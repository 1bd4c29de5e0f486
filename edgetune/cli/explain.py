"""`edgetune explain`: what a prediction rests on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.output import echo_json
from edgetune.cli.progress import counter
from edgetune.errors import ConfigError

if TYPE_CHECKING:
    from edgetune.bench.explain import Explanation

METHODS = ("auto", "integrated-gradients", "gradcam", "occlusion")
# an image on a terminal: cells along an edge, two characters wide, and their shades
CELLS = 16
SHADES = " ░▒▓█"


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True)
@click.option("--target", default="", metavar="LABEL", help="Explain this one.  [default: the"
              " predicted one]")  # fmt: skip
@click.option(
    "--method", type=click.Choice(METHODS), default="auto", show_default=True,
    help="auto: integrated gradients for texts, Grad-CAM for images of convolutional networks,"
    " occlusion for bundles.",
)  # fmt: skip
@click.option("--steps", type=int, default=50, show_default=True, help="Of integrated gradients.")
@click.option(
    "--patches", type=int, default=12, show_default=True,
    help="Occlusion: patches along each edge of an image.",
)  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="HTML file to write.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    path: Path, inputs: tuple[str, ...], target: str, method: str, steps: int, patches: int,
    output: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Show what answers rest on: which words, or which parts of an image.

    PATH is a run (explained through torch) or a bundle (through the device runtime, so what
    ships is what is explained). INPUTS are texts, or paths of images.

    \b
    Examples:
      edgetune explain runs/intents "turn the lamp off" --output why.html
      edgetune explain runs/flowers rose.jpg --target tulip --output why.html
      edgetune explain bundles/intents "turn the lamp off"
    """  # noqa: D301
    if output is not None and output.is_dir():
        raise ConfigError(f"output {output}: is a folder; name an HTML file")
    from edgetune.bench.explain import explain, open_subject

    subject = open_subject(path)
    try:
        with counter("explaining") as progress:
            found = explain(
                subject, inputs, target=target, method=method, steps=steps, patches=patches,
                progress=progress,
            )  # fmt: skip
    finally:
        subject.close()
    if output is not None:
        from edgetune.bench.explain_page import write_explanations

        output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"model": str(path), "method": found[0].method}
        write_explanations(output, found, title=path.resolve().name, facts=facts)
    if as_json:
        echo_json([_as_json(e) for e in found])
        return
    for explanation in found:
        _print(explanation)
    if output is not None:
        click.echo(f"explanations: {output}")


def _print(explanation: "Explanation") -> None:
    from rich.console import Console

    e = explanation
    console = Console(highlight=False)
    other = "" if e.target == e.predicted else f" (predicted: {e.predicted})"
    console.print(
        f"{e.target}: score {e.probability:.4f}{other}, by {e.method}", markup=False,
        soft_wrap=True,
    )  # fmt: skip
    if e.pixels is None:
        _print_text(console, e)
    else:
        _print_image(console, e)
    if e.completeness is not None:
        c = e.completeness
        console.print(
            f"attributions add up to {c.total:+.4f}, the logits differ by {c.difference:+.4f}:"
            f" convergence delta {c.delta:+.2g}"
            + ("; more --steps bring it down" if c.coarse else ""),
            soft_wrap=True,
        )
    console.print()


def _print_text(console: Any, explanation: "Explanation") -> None:
    from rich.text import Text

    from edgetune.bench.explain_page import shares_of, strongest

    e = explanation
    line = Text()
    for token, share, special in zip(e.tokens, shares_of(e.values), e.special, strict=True):
        if not special:
            body = token.lstrip()
            line.append(token[: len(token) - len(body)])
            line.append(body, style=_style(float(share)))
    console.print(line, soft_wrap=True)
    for token, value in strongest(e):
        console.print(f"  {value:+.4f}  {token}", markup=False, soft_wrap=True)


def _print_image(console: Any, explanation: "Explanation") -> None:
    from rich.text import Text

    from edgetune.bench.explain_page import coarse, shares_of

    e = explanation
    console.print(e.shown, markup=False, soft_wrap=True)
    for row in shares_of(coarse(e.values, CELLS)):
        line = Text("  ")
        for share in row:
            shade = SHADES[min(int(abs(share) * len(SHADES)), len(SHADES) - 1)]
            line.append(2 * shade, style="blue" if share > 0 else "dark_orange")
        console.print(line)


def _style(share: float) -> str:
    """Return the colour under a token, stronger the more it counts."""
    if abs(share) < 0.05:
        return ""
    name = "blue" if share > 0 else "dark_orange3"
    return f"bold white on {name}" if abs(share) > 0.5 else f"{name} underline"


def _as_json(explanation: "Explanation") -> dict[str, object]:
    e = explanation
    found: dict[str, object] = {
        "input": e.shown,
        "method": e.method,
        "target": e.target,
        "predicted": e.predicted,
        "probability": e.probability,
        "values": e.values.tolist(),
    }
    if e.tokens:
        found["tokens"] = [t.strip() for t in e.tokens]
    if e.completeness is not None:
        c = e.completeness
        found["completeness"] = {"total": c.total, "difference": c.difference, "delta": c.delta}
    return found
