"""What a person sees of a long command: a live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from edgetune.train import Event


class TrainingDisplay:
    """Shows the events of a training run on standard error and standard output."""

    def __init__(self) -> None:
        """Start without a live line; it appears with the first step."""
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._progress: Any = None
        self._bar: Any = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the live line away."""
        self._stop()

    def show(self, event: "Event") -> None:
        """Show one event."""
        getattr(self, f"_show_{event.kind}")(event.values)

    def _show_plan(self, v: Mapping[str, Any]) -> None:
        share = 100 * v["trainable"] / max(1, v["parameters"])
        self._print(f"model      {v['model']}")
        self._print(
            f"method     {v['method']}: {v['trainable']:,} of {v['parameters']:,} parameters"
            f" train ({share:.2f} %)"
        )
        self._print(f"data       {v['train']:,} train, {v['val']:,} val, {v['labels']} classes")
        machine = v["device"] + (f" x {v['processes']}" if v["processes"] > 1 else "")
        self._print(
            f"steps      {v['steps']:,} of {v['batch_size']} samples, lr {v['lr']:g},"
            f" {v['precision']} on {machine}"
        )
        if v["steps_done"]:
            self._print(f"resuming   at step {v['steps_done']:,}")

    def _show_step(self, v: Mapping[str, Any]) -> None:
        if not self._console.is_terminal:
            return
        if self._progress is None:
            self._start(v["steps"])
        text = f"epoch {v['epoch']}/{v['epochs']}  loss {v['loss']:.4f}"
        self._progress.update(self._bar, completed=v["step"], description=text)

    def _show_epoch(self, v: Mapping[str, Any]) -> None:
        self._print(
            f"epoch {v['epoch']:>3}/{v['epochs']}  loss {v['train_loss']:.4f}"
            f"  val loss {v['val_loss']:.4f}  accuracy {v['val_accuracy']:.4f}"
            f"  F1 {v['val_f1_macro']:.4f}  {v['seconds']:.0f} s{'  best' if v['best'] else ''}"
        )

    def _show_note(self, v: Mapping[str, Any]) -> None:
        self._print(f"note: {v['text']}")

    def _show_interrupted(self, v: Mapping[str, Any]) -> None:
        self._stop()
        self._print(f"stopped at step {v['step']:,} of {v['steps']:,}; everything is saved")
        self._print(f"go on with: edgetune train --resume {v['folder']}")

    def _show_finished(self, v: Mapping[str, Any]) -> None:
        self._stop()
        early = " (stopped early)" if v["stopped_early"] else ""
        self._print(
            f"done after {v['epochs']} epochs{early}, {v['seconds']:.0f} s; best epoch"
            f" {v['best_epoch']}: accuracy {v['val_accuracy']:.4f}, F1 {v['val_f1_macro']:.4f}"
        )
        click.echo(str(v["folder"]))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _start(self, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining(),
            console=self._console, transient=True,
        )  # fmt: skip
        self._bar = self._progress.add_task("", total=steps)
        self._progress.start()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


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
