"""What a person sees of a long command: a live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from edgetune.train import Event


class TrainingDisplay:
    """Shows the events of a training run: live on a terminal, as plain lines elsewhere.

    Live are a line of numbers, a bar, and below them the epochs so far; notes scroll by above.
    """

    def __init__(self, console: Any = None) -> None:
        """Write to `console`, a rich console, or to standard error; nothing is live yet."""
        from rich.console import Console

        self._console = console or Console(stderr=True, highlight=False)
        # "dumb" ones can't move the cursor back
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live: Any = None
        self._progress: Any = None
        self._bar: Any = None
        self._stage = ""
        self._numbers = ""
        self._steps_done = 0
        self._epochs: list[Mapping[str, Any]] = []

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the terminal back as it was, whatever happened; the epochs stay on it."""
        self._stop()

    def show(self, event: "Event") -> None:
        """Show one event."""
        getattr(self, f"_show_{event.kind}")(event.values)

    def _show_preparing(self, v: Mapping[str, Any]) -> None:
        if self._is_live:
            self._move(v.get("text", "preparing"), v["done"], v["of"], "")

    def _show_plan(self, v: Mapping[str, Any]) -> None:
        self._stop()
        share = 100 * v["trainable"] / max(1, v["parameters"])
        self._print(f"model      {v['model']}")
        self._print(
            f"method     {v['method']}: {v['trainable']:,} of {v['parameters']:,} parameters"
            f" train ({share:.2f} %)"
        )
        self._print(f"data       {v['train']:,} train, {v['val']:,} val, {_outputs(v['labels'])}")
        machine = v["device"] + (f" x {v['processes']}" if v["processes"] > 1 else "")
        self._print(
            f"steps      {v['steps']:,} of {v['batch_size']} samples, lr {v['lr']:g},"
            f" {v['precision']} on {machine}"
        )
        if v.get("kept"):
            self._print(f"kept       activations of the frozen layers, {v['kept']}")
        estimate = [f"{v['memory_mib']:,.0f} MiB"] if v.get("memory_mib") is not None else []
        if v.get("minutes") is not None:
            estimate.append(_duration(60 * v["minutes"]))
        if estimate:
            self._print(f"estimate   {', '.join(estimate)}")
        self._steps_done = v.get("steps_done") or 0
        if self._steps_done:
            self._print(f"resuming   at step {self._steps_done:,}")

    def _show_step(self, v: Mapping[str, Any]) -> None:
        if not self._is_live:
            return
        numbers = [f"loss {v['loss']:.4f}"]
        if v.get("lr") is not None:
            numbers.append(f"lr {v['lr']:.3g}")
        if v.get("samples_per_s") is not None:
            rate = v["samples_per_s"]
            numbers.append(f"{rate:,.0f} samples/s" if rate >= 10 else f"{rate:.2g} samples/s")
        stage = f"epoch {v['epoch']}/{v['epochs']}"
        self._move("training", v["step"], v["steps"], "  ".join([stage, *numbers]))

    def _show_epoch(self, v: Mapping[str, Any]) -> None:
        if not self._is_live:
            self._print(_epoch_line(v))
            return
        self._epochs.append(v)
        if self._live is None:
            self._move("training", v["step"], v.get("steps"), f"epoch {v['epoch']}/{v['epochs']}")
        self._progress.update(self._bar, completed=v["step"])
        self._refresh()

    def _show_note(self, v: Mapping[str, Any]) -> None:
        self._print(f"note: {v['text']}")

    def _show_interrupted(self, v: Mapping[str, Any]) -> None:
        self._stop()
        self._print(f"stopped at step {v['step']:,} of {v['steps']:,}; everything is saved")
        self._print(f"go on with: edgetune train --resume {v['folder']}")

    def _show_finished(self, v: Mapping[str, Any]) -> None:
        self._stop()
        early = " (stopped early)" if v["stopped_early"] else ""
        metrics = _metrics(v, ", ")
        energy = f", {v['energy_wh']:.3g} Wh" if v.get("energy_wh") is not None else ""
        self._print(
            f"done after {v['epochs']} epochs{early}, {v['seconds']:.0f} s{energy}; best epoch"
            f" {v['best_epoch']}" + (f": {metrics}" if metrics else "")
        )
        click.echo(str(v["folder"]))

    # -- what is live ----------------------------------------------------------------------

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _move(self, stage: str, done: int, total: int | None, numbers: str) -> None:
        """Move the bar, and begin it anew where another stage began: rates are of one stage."""
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        if stage != self._stage:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining(),
                TextColumn("left"), console=self._console,
            )  # fmt: skip
            # what was done before a resume took no time now
            start = self._steps_done if stage == "training" else 0
            self._bar = self._progress.add_task(stage, total=total, completed=start)
            self._stage = stage
        self._progress.update(self._bar, completed=done, total=total)
        self._numbers = numbers
        if self._live is None:
            # the tables are cut to fit: a live part that is longer than the screen scrolls
            self._live = Live(
                console=self._console, transient=True, vertical_overflow="crop",
                get_renderable=self._picture,
            )  # fmt: skip
            self._live.start()
        elif stage != "training":
            self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _picture(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [self._progress]
        if self._numbers:
            parts.insert(0, Text(self._numbers, no_wrap=True, overflow="ellipsis"))
        # a line each for numbers, bar, what is left out, the header, and the prompt
        room = max(3, self._console.size.height - 5)
        if self._epochs:
            hidden = len(self._epochs) - room
            parts.append(_epoch_table(self._epochs[-room:]))
            if hidden > 0:
                parts.insert(-1, Text(f"... {hidden} epochs before", style="dim"))
        return Group(*parts)

    def _stop(self) -> None:
        """End what is live; the epochs are printed, so that they stay."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        epochs, self._epochs = self._epochs, []
        if epochs:
            self._console.print(_epoch_table(epochs))
        self._stage = self._numbers = ""


# what of an epoch's metrics is shown, as far as the task has it
_SHOWN = (
    ("val_accuracy", "accuracy"),
    ("val_f1_macro", "F1"),
    ("val_mean_average_precision", "mAP"),
    ("val_mae", "MAE"),
    ("val_r2", "R2"),
)


def _outputs(labels: int) -> str:
    return f"{labels} classes" if labels > 1 else "1 output"


def _metrics(values: Mapping[str, Any], between: str) -> str:
    return between.join(f"{name} {values[key]:.4f}" for key, name in _SHOWN if key in values)


def _epoch_line(v: Mapping[str, Any]) -> str:
    losses = (("train_loss", "loss"), ("val_loss", "val loss"))
    parts = [f"epoch {v['epoch']:>3}/{v['epochs']}"]
    parts += [f"{name} {v[key]:.4f}" for key, name in losses if v.get(key) is not None]
    metrics = _metrics(v, "  ")
    parts += [metrics] if metrics else []
    parts += [f"{v['seconds']:.0f} s"] if v.get("seconds") is not None else []
    return "  ".join(parts) + ("  best" if v.get("best") else "")


def _epoch_table(epochs: Sequence[Mapping[str, Any]]) -> Any:
    """Return a rich table of epochs with the columns that any of them has."""
    from rich.table import Table

    known = (("train_loss", "loss"), ("val_loss", "val loss"), *_SHOWN)
    columns = [(k, name) for k, name in known if any(e.get(k) is not None for e in epochs)]
    # only the newest best one is the best
    best = max((e["epoch"] for e in epochs if e.get("best")), default=None)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("epoch", *(name for _, name in columns), "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for epoch in epochs:
        values = [epoch.get(key) for key, _ in columns]
        seconds = epoch.get("seconds")
        is_best = epoch["epoch"] == best
        table.add_row(
            f"{epoch['epoch']}/{epoch['epochs']}",
            *("" if value is None else f"{value:.4f}" for value in values),
            "" if seconds is None else _duration(seconds),
            "best" if is_best else "",
            style="bold" if is_best else None,
        )
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


@contextmanager
def stage_lines() -> Iterator["StageLines"]:
    """Give a display for commands that go from stage to stage."""
    from rich.console import Console

    lines = StageLines(Console(stderr=True, highlight=False))
    try:
        yield lines
    finally:
        lines.close()


class StageLines:
    """One line a stage: a spinner while it runs on a terminal, its time when it is done."""

    def __init__(self, console: Any) -> None:
        """Write to `console`, a rich console."""
        self._console = console
        self._status: Any = None
        self._text = ""
        self._start = 0.0

    def __call__(self, text: str) -> None:
        """Begin the stage `text`; the one before it is done."""
        self.close()
        self._text, self._start = text, time.monotonic()
        if self._console.is_terminal:
            self._status = self._console.status(text)
            self._status.start()

    def close(self) -> None:
        """End the last stage."""
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._text:
            seconds = time.monotonic() - self._start
            self._console.print(f"{self._text} ({seconds:.1f} s)", markup=False, soft_wrap=True)
            self._text = ""


@contextmanager
def counter(text: str) -> Iterator[Any]:
    """Give a callback for (done, all) that draws a bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(text, total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        yield show
