"""`edgetune runs`: list, compare and clean training runs."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.output import echo_json, echo_table
from edgetune.errors import ConfigError
from edgetune.runtime.cli.lazy import printable
from edgetune.runtime.records import nearest

if TYPE_CHECKING:
    from edgetune.train.runs import Cleaning, RunSummary

SORTS = ("age", "name", "metric", "loss", "minutes", "energy")
_NONE = "-"
_LONGEST_CELL = 44


class _ListByDefault(click.Group):
    """A group whose `list` may be left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group("runs", cls=_ListByDefault)
def group() -> None:
    """List, compare and clean training runs.

    \b
    Examples:
      edgetune runs
      edgetune runs experiments/ --sort metric
      edgetune runs compare runs/lora runs/full --plot compared.png
      edgetune runs clean runs --checkpoints
    """  # noqa: D301


@group.command("list")
@click.argument("folder", type=click.Path(path_type=Path), default="runs")
@click.option(
    "--sort", type=click.Choice(SORTS), default="age", show_default=True,
    help="age and name: as they read; the others: best, or least, first.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_runs(folder: Path, sort: str, as_json: bool) -> None:
    """List the runs in FOLDER and below."""
    _check_folder(folder)
    from edgetune.train.runs import find_runs, plain_summary

    found = find_runs(folder)
    runs = sorted(found.runs, key=lambda run: _order(run, sort))
    if as_json:
        echo_json({"runs": [plain_summary(r) for r in runs], "damaged": list(found.damaged)})
        return
    now = time.time()
    header = ("run", "status", "task", "model", "method", "epochs", "best metric", "val loss",
              "minutes", "Wh", "age")  # fmt: skip
    if runs:
        echo_table(header, [_row(run, now) for run in runs])
    elif not found.damaged:
        click.echo(f"{folder}: holds no run")
    _say_all(found.damaged)


@group.command("compare")
@click.argument(
    "folders", metavar="RUN RUN...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("--plot", type=click.Path(path_type=Path), help="PNG to draw the curves into.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(folders: tuple[Path, ...], plot: Path | None, as_json: bool) -> None:
    """Show where the configs of runs differ, and what came out.

    --plot draws the validation metric and loss over the epochs, a line a run.
    """
    from edgetune.train.runs import compare_runs, summarize

    if plot is not None and plot.exists():
        raise ConfigError(f"--plot {plot}: exists already; name another file")
    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot {plot}: expected a name that ends in .png")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("expected different runs, got one twice")
    names = _names(folders)
    runs = [summarize(f, name=n) for f, n in zip(folders, names, strict=True)]
    comparison = compare_runs(runs)
    if as_json:
        echo_json({"runs": names, "config": comparison.config, "results": comparison.results,
                   "notes": comparison.notes})  # fmt: skip
    else:
        rows: list[tuple[str, ...]] = [
            (key, *map(_cell, values)) for key, values in comparison.config.items()
        ]
        rows += [("", *("" for _ in names))] if rows else []
        rows += [(key, *map(_cell, values)) for key, values in comparison.results.items()]
        echo_table(("", *map(printable, names)), rows)
        if not comparison.config:
            click.echo("\nthe configs are the same")
        for note in comparison.notes:
            click.echo(f"\nnote: {note}")
    if plot is not None:
        from edgetune.train.comparison import write_comparison

        curves = {run.name: run.history for run in runs}
        write_comparison(plot, curves, metric=runs[0].metric)
        click.echo(f"curves: {plot}", err=as_json)


@group.command("clean")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--checkpoints", "kinds", flag_value="checkpoints",
    help="Only checkpoints of finished runs, and kept activations.",
)  # fmt: skip
@click.option(
    "--failed", "kinds", flag_value="failed",
    help="Only runs that reached neither an epoch nor a checkpoint.",
)  # fmt: skip
@click.option("--yes", is_flag=True, help="Don't ask.")
def clean(folder: Path, kinds: "Cleaning | None", yes: bool) -> None:
    """Remove what the runs in FOLDER can do without, after showing it and asking.

    That is: the checkpoints of finished runs, which can't be resumed; activations that were kept;
    and runs that reached neither an epoch nor a checkpoint. The trained weights of a run, runs
    that train, and what edgetune did not write are never touched.
    """
    _check_folder(folder)
    from edgetune.train.runs import find_removals, find_runs, remove

    found = find_runs(folder)
    both: tuple[Cleaning, ...] = ("checkpoints", "failed")
    removals, notes = find_removals(found, (kinds,) if kinds else both)
    _say_all((*found.damaged, *notes))
    if not removals:
        click.echo(f"{folder}: nothing to remove")
        return
    rows = [(printable(r.name), r.what, _size(r.size_bytes)) for r in removals]
    echo_table(("run", "what", "size"), rows)
    size = _size(sum(removal.size_bytes for removal in removals))
    if not yes and not click.confirm(f"\nremove these, {size}?"):
        click.echo("nothing was removed")
        return
    for removal in removals:
        remove(removal)
    click.echo(f"removed {size}")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is not there, before torch is loaded."""
    if folder.is_dir():
        return
    hint = nearest(str(folder), group.commands)
    raise ConfigError(
        f"{folder}: is no folder" + (hint if "mean" in hint else "; name one that holds runs")
    )


def _say_all(lines: tuple[str, ...]) -> None:
    for line in lines:
        click.echo(f"note: {printable(line)}", err=True)


def _order(run: "RunSummary", sort: str) -> tuple[Any, ...]:
    """Return what to sort by; runs without a value come last, ties go by name."""
    values: dict[str, float | None] = {
        "age": -run.changed,
        "name": 0.0,
        "metric": None if run.value is None else -run.rank,
        "loss": run.metrics.get("val_loss"),
        "minutes": run.seconds,
        "energy": run.energy_wh,
    }
    value = values[sort]
    return (value is None, value or 0.0, run.name)


def _row(run: "RunSummary", now: float) -> tuple[object, ...]:
    loss = run.metrics.get("val_loss")
    return (
        printable(run.name),
        run.status + ("" if run.known else "?"),
        printable(run.task),
        printable(_short(str(run.config["model"]))),
        printable(str(run.config["method"])),
        f"{run.epochs}/{run.epochs_planned}",
        _NONE if run.value is None else f"{run.metric} {run.value:.4f}",
        _NONE if loss is None else f"{loss:.4f}",
        f"{run.seconds / 60:.1f}",
        _NONE if run.energy_wh is None else f"{run.energy_wh:.2f}",
        _age(now - run.changed),
    )


def _short(model: str) -> str:
    """Return the last part of a model's path or id."""
    return model.rstrip("/").rpartition("/")[2] or model


def _names(folders: tuple[Path, ...]) -> list[str]:
    """Return the shortest ends of the paths that tell the runs apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _cell(value: object) -> str:
    if value is None or value == "":
        return _NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = printable(text)
    # the end of a path tells more than its beginning
    return text if len(text) <= _LONGEST_CELL else "…" + text[1 - _LONGEST_CELL :]


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _size(size_bytes: int) -> str:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size_bytes >= 1024**power:
            return f"{size_bytes / 1024**power:.1f} {unit}"
    return f"{size_bytes} B"
