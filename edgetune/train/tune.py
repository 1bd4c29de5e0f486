"""Hyper-parameter search: many runs of `train`, drawn by optuna, the hopeless ones cut short.

All trials have the config's own seed: the same validation data, the same order and the same
start, so that they differ by what is searched alone, and the best one can be had again.
"""

import contextlib
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError, DataError, EdgetuneError, IntegrityError, ResourceError
from edgetune.runtime.records import to_mapping
from edgetune.train.events import Event
from edgetune.train.loop import CACHE_FOLDER
from edgetune.train.run import BEST_NAME, RECORD_NAME, RunRecord, read_run, write_record
from edgetune.train.search_space import SearchKey, check_search, default_space, grid_of
from edgetune.train.start import resume, train
from edgetune.train.study import (
    Claim,
    PrunerName,
    SamplerName,
    Study,
    TuneRecord,
    grid_total,
    new_record,
    trial_config,
    trial_folder,
)
from edgetune.train.tune_figures import write_figures

DEFAULT_TRIALS = 20
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class TuneEvent:
    """Something to show.

    "plan": the search before it begins; "begin", "progress" and "end": of a trial; "note": a
    line of text; "finished": the search ended or was stopped.
    """

    kind: Literal["plan", "begin", "progress", "end", "note", "finished"]
    values: Mapping[str, Any]


OnTuneEvent = Callable[[TuneEvent], None]


def tune(
    config: TrainConfig,
    *,
    search: Mapping[str, object] | None = None,
    trials: int | None = None,
    minutes: float | None = None,
    sampler: SamplerName = "tpe",
    pruner: PrunerName = "median",
    jobs: int = 1,
    on_event: OnTuneEvent | None = None,
) -> TuneRecord:
    """Search for the config whose run has the best `config.metric`; go on where a search stopped.

    Args:
        config: what is not searched; its `output` is the study's folder.
        search: name of a key -> list of values, `SearchKey`, or a mapping with low, high and
            maybe log and step; None for `default_space`.
        trials: in total, with those that the folder has already (default: 20, or the whole grid).
        minutes: after these no trial goes on; what is at work is saved, and can go on later.
        sampler: "tpe" (Bergstra et al. 2011), "random" or "grid", each point once.
        pruner: "median" stops a trial that is below the median of the others after as many
            epochs (from the second on, and after five complete trials), "hyperband" by brackets
            (Li et al. 2018), "none" never.
        jobs: trials at a time, each in a process of its own where there are several. GPUs are
            dealt out in turn, CPU threads divided. With 1 the search can be repeated exactly.
        on_event: called with what happens, to show it.

    Returns:
        the record that tune.json has; its status is "interrupted" where Ctrl-C, SIGTERM or
        `minutes` ended it.

    Raises:
        ConfigError: the search does not fit the config, or the folder holds another search.
        DataError: the data check found what would waste the runs.
        ResourceError: memory or disk ran out.
        MissingExtraError: optuna is not installed.
    """
    _check_arguments(trials, minutes, jobs)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("tune starts its own processes (jobs); run it without torchrun")
    given = search if search is not None else default_space(config)
    space = check_search(
        {n: _as_table(k) if isinstance(k, SearchKey) else k for n, k in given.items()}, config
    )
    if sampler == "grid":
        space = grid_of(space)
    record = new_record(config, space, sampler=sampler, pruner=pruner, wanted=0)
    wanted = trials if trials is not None else (grid_total(record) or DEFAULT_TRIALS)
    wanted = min(wanted, grid_total(record) or wanted)
    deadline = time.monotonic() + 60 * minutes if minutes is not None else math.inf
    say = on_event or _silent
    stop = Stop(deadline=deadline)
    with Study(Path(config.output), replace(record, wanted=wanted)) as study, stop.listening():
        waiting = study.adopt_orphans()
        _say_plan(study, say, jobs, waiting, by_default=search is None)
        if jobs == 1:
            work(study, stop, say)
        else:
            from edgetune.train.tune_jobs import work_in_parallel

            work_in_parallel(study, stop, say, jobs)
        found = study.write(_status(study, stop))
        write_figures(study.folder, found)
        say(TuneEvent(kind="finished", values={"record": found, "folder": study.folder}))
    return found


def work(study: Study, stop: "Stop", say: OnTuneEvent) -> None:
    """Run trials, one after the other, until all are taken or `stop` says so."""
    while not stop.requested():
        claim = study.claim()
        if claim is None:
            return
        _run(study, claim, stop, say)
        study.write("running")


class Stop:
    """Whether to end: after Ctrl-C or SIGTERM, a request, or when the time is up."""

    def __init__(self, *, deadline: float = math.inf) -> None:
        """Take the deadline, in seconds of `time.monotonic`."""
        self.deadline = deadline
        self.asked = False

    def requested(self) -> bool:
        """Say whether to end."""
        return self.asked or time.monotonic() >= self.deadline

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM end the search cleanly; a second ends it at once."""
        try:
            previous = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, which alone gets signals
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:  # noqa: ARG002
        """Take a signal."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class _PrunedTrial(Exception):  # noqa: N818 - not an error
    """Ends the training of a hopeless trial."""


class _StoppedTrial(Exception):  # noqa: N818 - not an error
    """Ends the training where it can't be asked to save first."""


class _Watch:
    """Hears what a trial's training says: reports its epochs, and ends it."""

    def __init__(self, study: Study, claim: Claim, stop: Stop, say: OnTuneEvent) -> None:
        self.began_to_train = False
        self._study, self._claim, self._stop, self._say = study, claim, stop, say
        self._asked_to_save = False

    def __call__(self, event: Event) -> None:
        values = event.values
        if event.kind in ("plan", "step", "epoch"):
            self.began_to_train = True
        if event.kind == "note":
            self._tell("note", text=values["text"])
        elif event.kind == "step":
            self._tell("progress", **{k: values[k] for k in ("epoch", "epochs", "step", "steps")})
        elif event.kind == "epoch":
            self._epoch(values)
        if self._stop.requested():
            self._end()

    def _epoch(self, values: Mapping[str, Any]) -> None:
        value = float(values[f"val_{self._study.record.metric}"])
        epoch = int(values["epoch"])
        self._tell("progress", epoch=epoch, epochs=values["epochs"], value=value)
        if self._study.report(self._claim.number, epoch, value):
            raise _PrunedTrial

    def _end(self) -> None:
        """Let the training save and end, as Ctrl-C does; without its handler just end it."""
        if threading.current_thread() is not threading.main_thread():
            raise _StoppedTrial
        if signal.getsignal(signal.SIGINT) in (self._stop.handle, signal.default_int_handler):
            raise _StoppedTrial
        if not self._asked_to_save:
            self._asked_to_save = True
            signal.raise_signal(signal.SIGINT)

    def _tell(self, kind: Literal["progress", "note"], **values: Any) -> None:
        self._say(TuneEvent(kind=kind, values={"number": self._claim.number, **values}))


def _run(study: Study, claim: Claim, stop: Stop, say: OnTuneEvent) -> None:
    """Run a trial and note what came of it.

    Raises:
        EdgetuneError: what would break the other trials as well; this one waits then.
    """
    number, folder = claim.number, trial_folder(study.folder, claim.number)
    values = {
        "number": number, "params": claim.params, "resumed": claim.resumed, "pid": os.getpid(),
    }  # fmt: skip
    say(TuneEvent(kind="begin", values=values))
    watch = _Watch(study, claim, stop, say)
    try:
        config = trial_config(study.record, claim.params, folder)
        run = _train(config, folder, watch)
    except _PrunedTrial:
        free_disk(folder)
        study.prune(number, _seconds(folder))
    except _StoppedTrial:
        study.release(number)
    except EdgetuneError as error:
        if _breaks_all(error, watch.began_to_train, study):
            study.release(number)
            raise
        free_disk(folder)
        study.fail(number, str(error))
    else:
        if run.status != "finished":
            stop.asked = True
            study.release(number)
        else:
            # a finished run needs them no more
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            study.complete(number, run.metrics[f"val_{study.record.metric}"], run.seconds)
    say(TuneEvent(kind="end", values=to_mapping(study.trial(number))))


def _train(config: TrainConfig, folder: Path, watch: _Watch) -> RunRecord:
    """Train, or go on with what an interrupted trial left."""
    if (folder / RECORD_NAME).is_file():
        _, run = read_run(folder)
        if run.status == "finished":  # killed between the end of the run and that of the trial
            return run
        with contextlib.suppress(IntegrityError):  # nothing whole is left to go on from
            return resume(folder, on_event=watch)
    shutil.rmtree(folder, ignore_errors=True)
    return train(config, on_event=watch)


def _breaks_all(error: EdgetuneError, began_to_train: bool, study: Study) -> bool:
    """Say whether an error is no fault of the trial's own values."""
    if isinstance(error, ResourceError):
        return not isinstance(error.__cause__, torch.OutOfMemoryError)
    if began_to_train:
        return False
    if isinstance(error, ConfigError):  # of the first trial: a model or path that is not there
        return all(t.status not in ("complete", "pruned") for t in study.trials())
    return isinstance(error, DataError | IntegrityError)


def _seconds(folder: Path) -> float:
    return read_run(folder)[1].seconds if (folder / RECORD_NAME).is_file() else 0.0


def free_disk(folder: Path) -> None:
    """Free the disk that a pruned or failed trial took; its record and curves stay.

    Done before the trial is ended: killed in between, the trial begins anew.
    """
    if not (folder / RECORD_NAME).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        return
    _, run = read_run(folder)
    write_record(folder, replace(run, status="interrupted"))
    for name in (CHECKPOINTS, CACHE_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / BEST_NAME).unlink(missing_ok=True)


def _status(study: Study, stop: Stop) -> Literal["running", "interrupted", "finished"]:
    trials = study.trials()
    done = sum(t.status in ("complete", "pruned", "failed") for t in trials)
    if done >= study.record.wanted:
        return "finished"
    # another command may be at work on the rest
    return "interrupted" if stop.requested() else "running"


def _say_plan(
    study: Study, say: OnTuneEvent, jobs: int, waiting: list[int], *, by_default: bool
) -> None:
    record = study.write("running")
    done = sum(t.status not in ("running", "waiting") for t in record.trials)
    values = {
        "folder": study.folder, "record": record, "jobs": jobs, "done": done, "waiting": waiting,
        "by_default": by_default,
    }  # fmt: skip
    say(TuneEvent(kind="plan", values=values))


def _as_table(key: SearchKey) -> dict[str, Any]:
    plain = {k: v for k, v in to_mapping(key).items() if v}
    return plain if key.choices else {**plain, "low": key.low, "high": key.high}


def _check_arguments(trials: int | None, minutes: float | None, jobs: int) -> None:
    if trials is not None and trials < 1:
        raise ConfigError(f"trials: expected at least 1, got {trials}")
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"minutes: expected more than 0, got {minutes:g}")
    if jobs < 1:
        raise ConfigError(f"jobs: expected at least 1, got {jobs}")


def _silent(event: TuneEvent) -> None:
    """Show nothing."""
