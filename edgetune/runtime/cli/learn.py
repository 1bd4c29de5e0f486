"""`edgetune-rt learn`: teach a bundle labelled samples, and say what that changed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.errors import ConfigError, DataError, GateError
from edgetune.runtime.cli.lazy import printable
from edgetune.runtime.cli.options import BUNDLE, JSON
from edgetune.runtime.records import to_mapping

if TYPE_CHECKING:
    from edgetune.runtime.learn.learner import Added, Learner, Receipt
    from edgetune.runtime.model import EdgeModel

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
ASIDE_SHOWN = 5


@click.command("learn")
@BUNDLE
@click.argument("label", required=False)
@click.argument("samples", nargs=-1)
@click.option(
    "--learned", type=click.Path(path_type=Path), metavar="DIR",
    help="Folder to keep what is learned in.  [default: BUNDLE.learned]",
)  # fmt: skip
@click.option("--remove", is_flag=True, help="Take these samples out again, exactly.")
@click.option("--forget", is_flag=True, help="Take the whole class LABEL out.")
@click.option("--undo", is_flag=True, help="Go back to what answered before the last commit.")
@click.option("--reset", is_flag=True, help="Answer as the bundle came; what was learned stays.")
@click.option("--erase", is_flag=True, help="Like --reset, and remove all that was learned.")
@click.option("--history", is_flag=True, help="List what was committed.")
@click.option("--no-commit", is_flag=True, help="Take the samples in, change no answer yet.")
@click.option(
    "--margin", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
    help="Accuracy on the canary that may be lost.  [default: what the bundle's own head costs]",
)  # fmt: skip
@click.option("--no-screen", is_flag=True, help="Take samples that look unlike their label too.")
@JSON
def command(
    bundle: Path, label: str | None, samples: tuple[str, ...], learned: Path | None, remove: bool,
    forget: bool, undo: bool, reset: bool, erase: bool, history: bool, no_commit: bool,
    margin: float | None, no_screen: bool, as_json: bool,
) -> None:  # fmt: skip
    """Teach BUNDLE that SAMPLES are LABEL, which may be a new class.

    SAMPLES are texts or paths of images; of a folder, all images in it; of a .txt file, its lines.
    What is taught answers only if the guard finds that nothing else got worse by it.

    \b
    Examples:
      edgetune-rt learn camera.bundle scratch ./shots
      edgetune-rt learn intents.bundle refund "money back please" more.txt
      edgetune-rt learn camera.bundle --undo
      edgetune-rt run camera.bundle --learned camera.bundle.learned photo.jpg

    Exits with 5 where the guard refused: the answers are those of before.
    """  # noqa: D301
    _check_flags(label, samples, remove, forget, (undo, reset, erase, history))
    from edgetune.runtime.learn.guard import Rules
    from edgetune.runtime.model import EdgeModel

    rules = None if margin is None else Rules(margin=margin, factory_margin=max(0.05, margin))
    with (
        EdgeModel.load(bundle) as model,
        model.learner(learned, screen=not no_screen, rules=rules) as learner,
    ):
        if history:
            _show_history(learner, as_json)
        elif undo:
            number = learner.undo()
            who = f"generation {number}" if number else "the factory state"
            click.echo(f"{who} answers")
        elif reset or erase:
            learner.factory_reset(forget=erase)
            click.echo("the factory state answers" + (", nothing is kept" if erase else ""))
        else:
            assert label is not None
            _teach(model, learner, label, samples, remove, forget, no_commit, as_json)


def _check_flags(
    label: str | None,
    samples: Sequence[str],
    remove: bool,
    forget: bool,
    alone: tuple[bool, ...],
) -> None:
    if sum(alone) + (label is not None) != 1:
        raise click.UsageError(
            "expected a LABEL and its SAMPLES, or one of --undo, --reset, --erase, --history"
        )
    if label is not None and not samples and not forget:
        raise click.UsageError(f"expected SAMPLES of {label!r}")
    if forget and (samples or remove):
        raise click.UsageError("--forget takes a LABEL and no SAMPLES")


def _teach(
    model: "EdgeModel",
    learner: "Learner",
    label: str,
    samples: Sequence[str],
    remove: bool,
    forget: bool,
    no_commit: bool,
    as_json: bool,
) -> None:
    report: dict[str, Any] = {"store": str(learner.folder)}
    classes = len(model.labels)
    if forget:
        learner.forget_class(label)
    elif remove:
        report["removed"] = learner.remove(read_samples(model, samples))
        click.echo(f"removed {report['removed']} samples", err=True)
    else:
        added = learner.add(read_samples(model, samples), label)
        report["added"] = to_mapping(added)
        if not as_json:
            _show_added(added, label)
        if not added.learned and not added.held_out:
            raise ConfigError(
                f"none of {len(added.ids)} samples was taken in; --no-screen takes those in that"
                " look unlike their label"
            )
    if no_commit:
        click.echo(json.dumps(report) if as_json else "not committed: no answer has changed yet")
        return
    receipt = learner.commit()
    report["receipt"] = to_mapping(receipt)
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
    else:
        _show_receipt(receipt, learner, classes)
    if not receipt.accepted:
        raise GateError(
            "refused, and dropped: "
            + " ".join(receipt.reasons)
            + " To allow a larger loss: --margin SHARE"
        )


def read_samples(model: "EdgeModel", given: Sequence[str]) -> list[str]:
    """Return texts, or paths of images, of what stands on a command line.

    Raises:
        ConfigError: a folder has no image.
        DataError: a .txt file is not there, or is no UTF-8 text.
    """
    text = "input_ids" in {spec.name for spec in model.manifest.inputs}
    found: list[str] = []
    for value in given:
        path = Path(value)
        if text and value.endswith(".txt") and " " not in value:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except FileNotFoundError as error:  # its name would be taught as a text
                raise DataError(f"{value}: no such file; a text may not end in .txt") from error
            except UnicodeDecodeError as error:
                raise DataError(f"{value}: is no UTF-8 text: {error}") from error
            found += [line for line in lines if line.strip()]
        elif not text and path.is_dir():
            images = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in IMAGES)
            if not images:
                raise ConfigError(f"{path}: has no image; expected {', '.join(sorted(IMAGES))}")
            found += images
        else:
            found.append(value)
    return found


def _show_added(added: "Added", label: str) -> None:
    click.echo(
        f"{printable(label)}: {added.learned} learned, {added.held_out} kept apart to judge by,"
        f" {len(added.aside)} set aside"
    )
    for one in added.aside[:ASIDE_SHOWN]:
        click.echo(f"    sample {one.place + 1}: {printable(one.reason)}")
    if len(added.aside) > ASIDE_SHOWN:
        click.echo(f"    and {len(added.aside) - ASIDE_SHOWN} more; --json lists all")


def _show_receipt(receipt: "Receipt", learner: "Learner", classes: int) -> None:
    click.echo(f"{'':24}{'before':>10}{'after':>10}")
    click.echo(f"{'classes':24}{classes:>10}{len(receipt.labels):>10}")
    for name, shares in (("canary", receipt.canary), ("held-out samples", receipt.holdout)):
        if shares is not None:
            click.echo(f"{name + ', right':24}{shares[0]:>9.1%} {shares[1]:>9.1%}")
    for reason in receipt.reasons:
        click.echo(printable(reason))
    if receipt.accepted:
        kib = receipt.bytes_written / 1024
        click.echo(
            f"generation {receipt.generation} answers now ({kib:.0f} KiB written); predict with it:"
            f" edgetune-rt run BUNDLE --learned {learner.folder} ..."
        )


def _show_history(learner: "Learner", as_json: bool) -> None:
    found = learner.history()
    if as_json:
        click.echo(json.dumps([to_mapping(g) for g in found], ensure_ascii=False))
        return
    if not found:
        click.echo("nothing was committed yet")
    for generation in found:
        counts = generation.receipt.get("counts", {})
        what = ", ".join(f"{printable(str(k))} {v}" for k, v in counts.items())
        click.echo(f"{generation.number:>4}  {generation.time}  from {generation.parent}  {what}")
