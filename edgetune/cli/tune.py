"""`edgetune tune`: search for the best training config."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import click

from edgetune.cli.options import config_options, given
from edgetune.cli.output import echo_json, echo_table
from edgetune.config import load_config
from edgetune.errors import ConfigError, EdgetuneError

if TYPE_CHECKING:
    from edgetune.train.study import TrialRecord, TuneRecord
    from edgetune.train.tune import TuneEvent

# trials in the live table: those at work, and the best of the others
LIVE_ROWS = 12


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="TOML file with what is not searched; its keys are the flags below.",
)
@click.option(
    "--search",
    "search_path",
    type=click.Path(path_type=Path),
    help="TOML file with a table [search]: lr = {low = 1e-5, high = 1e-2, log = true},"
    " lora_r = [4, 8, 16]. Without it a space that suits the method.",
)
@click.option(
    "--search-key",
    "search_keys",
    multiple=True,
    metavar="KEY=VALUES",
    help="A key to search, as lr=log:1e-5..1e-2 or lora_r=4,8,16. Can be repeated.",
)
@click.option(
    "--trials", type=click.IntRange(min=1),
    help="Trials in total, with those there already.  [default: 20, or the whole grid]",
)  # fmt: skip
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True),
    help="Stop after so long; what is at work is saved and can go on later.",
)  # fmt: skip
@click.option(
    "--sampler", type=click.Choice(["tpe", "random", "grid"]), default="tpe", show_default=True,
    help="How values are drawn.",
)  # fmt: skip
@click.option(
    "--pruner", type=click.Choice(["median", "hyperband", "none"]), default="median",
    show_default=True, help="Which trials are stopped early as hopeless.",
)  # fmt: skip
@click.option(
    "--jobs", type=click.IntRange(min=1), default=1, show_default=True,
    help="Trials at a time, each in its own process, on a GPU of its own where there are several.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@config_options
def command(
    config_path: Path | None,
    search_path: Path | None,
    search_keys: tuple[str, ...],
    trials: int | None,
    minutes: float | None,
    sampler: str,
    pruner: str,
    jobs: int,
    as_json: bool,
    **flags: Any,
) -> None:
    """Search for the training config with the best validation metric.

    --output is the study's folder. The same command again goes on where it stopped; best.toml
    in it is the best config, for: edgetune train --config STUDY/best.toml --output RUN

    \b
    Examples:
      edgetune tune --config train.toml --output studies/intents
      edgetune tune --config train.toml --output studies/rank --sampler grid \\
          --search-key lora_r=4,8,16 --search-key lr=3e-4,1e-3
      edgetune tune --config train.toml --output studies/night --minutes 480 --jobs 4
    """  # noqa: D301
    if search_path is not None and search_keys:
        raise ConfigError("--search and --search-key: expected one of them, got both")
    config = load_config(config_path, given(flags))
    # torch and optuna take seconds to load: say what is wrong with the flags before that
    from edgetune.train.search_space import parse_search, read_search
    from edgetune.train.study import PrunerName, SamplerName
    from edgetune.train.tune import tune

    search = None
    if search_path is not None:
        search = read_search(search_path, config)
    elif search_keys:
        search = parse_search(search_keys, config)
    with TuneDisplay() as display:
        record = tune(
            config,
            search=search,
            trials=trials,
            minutes=minutes,
            sampler=cast("SamplerName", sampler),
            pruner=cast("PrunerName", pruner),
            jobs=jobs,
            on_event=display.show,
        )
    if as_json:
        echo_json(record)
    else:
        _echo_result(record, Path(config.output))
    if record.status == "interrupted" and minutes is None:
        sys.exit(130)
    if record.best is None and record.status == "finished":
        reasons = sorted({t.reason for t in record.trials if t.reason})
        raise EdgetuneError(
            f"no trial ran to its end{': ' + '; '.join(reasons[:3]) if reasons else ''}"
        )


class TuneDisplay:
    """Shows a search on standard error: a live table on a terminal, a line a trial elsewhere."""

    def __init__(self) -> None:
        """Start without a table; it appears with the first trial."""
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._live: Any = None
        self._running: dict[int, dict[str, Any]] = {}
        self._ended: dict[int, dict[str, Any]] = {}
        self._record: Any = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the table away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, event: "TuneEvent") -> None:
        """Show one event."""
        getattr(self, f"_show_{event.kind}")(event.values)

    def _show_plan(self, v: Mapping[str, Any]) -> None:
        from edgetune.runtime.records import to_mapping

        record = self._record = v["record"]
        goal = {"maximize": "highest", "minimize": "lowest"}[record.direction]
        jobs = f", {v['jobs']} at a time" if v["jobs"] > 1 else ""
        self._print(f"search     {record.wanted} trials for the {goal} {record.metric}{jobs}")
        self._print(f"           sampler {record.sampler}, pruner {record.pruner}")
        source = " (by default)" if v["by_default"] else ""
        for name, key in record.search.items():
            self._print(f"  {name:<16} {key}{source}")
        for trial in record.trials:
            if trial.status not in ("running", "waiting"):
                self._ended[trial.number] = to_mapping(trial)
        if record.trials:
            goes_on = f", {len(v['waiting'])} to go on with" if v["waiting"] else ""
            self._print(f"resuming   {v['done']} trials are done{goes_on}")

    def _show_begin(self, v: Mapping[str, Any]) -> None:
        self._running[v["number"]] = dict(v)
        self._refresh()

    def _show_progress(self, v: Mapping[str, Any]) -> None:
        self._running.setdefault(v["number"], {}).update(v)
        self._refresh()

    def _show_end(self, v: Mapping[str, Any]) -> None:
        self._running.pop(v["number"], None)
        if v["status"] not in ("running", "waiting"):
            self._ended[v["number"]] = dict(v)
        self._refresh()
        if not self._console.is_terminal or v["status"] == "failed":
            self._print(self._line(v))

    def _show_note(self, v: Mapping[str, Any]) -> None:
        if self._console.is_terminal:
            return  # each trial has the same remarks on the data
        number = f"trial {v['number']}: " if "number" in v else ""
        self._print(f"note: {number}{v['text']}")

    def _show_finished(self, v: Mapping[str, Any]) -> None:
        self.__exit__(None, None, None)
        record = v["record"]
        done = sum(t.status not in ("running", "waiting") for t in record.trials)
        self._print(f"{record.status} with {done} of {record.wanted} trials done")
        if record.status == "interrupted":
            self._print("go on with the same command")

    # -- details ---------------------------------------------------------------------------

    def _line(self, v: Mapping[str, Any]) -> str:
        from edgetune.train.search_space import shown_params

        value = f"{self._record.metric} {v['value']:.4f}  " if v.get("value") is not None else ""
        best = "best  " if self._best() == v["number"] else ""
        reason = f"  {v['reason']}" if v["reason"] else ""
        return (
            f"trial {v['number']:>3}  {v['status']:<8}  {value}{best}epochs {v['epochs']}"
            f"  {v['seconds']:.0f} s  {shown_params(v['params'])}{reason}"
        )

    def _best(self) -> int | None:
        sign = 1 if self._record.direction == "maximize" else -1
        complete = [v for v in self._ended.values() if v["status"] == "complete"]
        ranked = sorted(complete, key=lambda v: (-sign * v["value"], v["number"]))
        return int(ranked[0]["number"]) if ranked else None

    def _refresh(self) -> None:
        if not self._console.is_terminal:
            return
        if self._live is None:
            from rich.live import Live

            self._live = Live(console=self._console, transient=True, refresh_per_second=4)
            self._live.start()
        self._live.update(self._table())

    def _table(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        from edgetune.train.search_space import shown_params

        sign = 1 if self._record.direction == "maximize" else -1
        table = Table(
            title=f"{len(self._ended)} of {self._record.wanted} trials done", title_justify="left",
            box=None, pad_edge=False,
        )  # fmt: skip
        for title in ("trial", "status", self._record.metric, "epoch", "values"):
            table.add_column(title)
        running = sorted(self._running.items())
        for number, v in running:
            table.add_row(
                str(number), "running", f"{v['value']:.4f}" if "value" in v else "",
                f"{v['epoch']}/{v['epochs']}" if "epoch" in v else "",
                escape(shown_params(v.get("params", {}))),
            )  # fmt: skip
        valued = [v for v in self._ended.values() if v.get("value") is not None]
        valued.sort(key=lambda v: (v["status"] != "complete", -sign * v["value"], v["number"]))
        for v in valued[: max(0, LIVE_ROWS - len(running))]:
            table.add_row(
                str(v["number"]), v["status"], f"{v['value']:.4f}", str(v["epochs"]),
                escape(shown_params(v["params"])),
            )  # fmt: skip
        return table

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def _echo_result(record: "TuneRecord", folder: Path) -> None:
    """Print trials ranked, importance, and how the best differs from the base."""
    from edgetune.train.search_space import shown_value

    names = list(record.search)
    rows = [_row(rank, trial, names) for rank, trial in enumerate(record.ranked(), 1)]
    echo_table(("rank", "trial", "status", record.metric, "epochs", "s", *names), rows)
    for trial in record.trials:
        if trial.reason:
            click.echo(f"trial {trial.number} failed: {trial.reason}")
    if record.importance:
        ranked = sorted(record.importance.items(), key=lambda item: -item[1])
        click.echo("")
        echo_table(("key", "importance"), [(n, f"{100 * v:.0f} %") for n, v in ranked])
    if record.best is not None:
        click.echo("")
        best = record.trials[record.best]
        click.echo(f"best: trial {best.number}, {record.metric} {best.value:.4f}; in its config")
        for name, value in best.params.items():
            before = record.base.get(name)
            if before == value:
                said = "as it was"
            else:
                said = f"was {shown_value(before) if before is not None else 'by default'}"
            click.echo(f"  {name} = {shown_value(value)}  ({said})")
        click.echo(f"train with it: edgetune train --config {folder / 'best.toml'} --output RUN")


def _row(rank: int, trial: "TrialRecord", names: list[str]) -> tuple[object, ...]:
    from edgetune.train.search_space import shown_value

    value = f"{trial.value:.4f}" if trial.value is not None else ""
    params = [shown_value(trial.params[n]) if n in trial.params else "" for n in names]
    return rank, trial.number, trial.status, value, trial.epochs, round(trial.seconds), *params
