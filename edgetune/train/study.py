"""A study's folder: what a search is, who works on which trial, and what came out.

tune.json         this module's TuneRecord
study.db          optuna's own record of the trials
trials/0007/      the run folder of trial 7
best.toml         the best training config
history.png, importance.png
locks/            who is at work

A process that works on trials holds a lock on a file of its own. The system lets go of it when
the process ends, however it ends; so a trial whose process was killed is known at once, without
the waiting that heartbeats need.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError, IntegrityError, MissingExtraError, ResourceError
from edgetune.runtime.files import write_atomic
from edgetune.runtime.learn.disk import Disk, Lock
from edgetune.runtime.records import from_mapping, to_mapping
from edgetune.tasks import MINIMIZED, selection_metric
from edgetune.train.run import versions
from edgetune.train.search_space import (
    SearchKey,
    decoded,
    grid_size,
    grid_values,
    suggest,
)

SamplerName = Literal["tpe", "random", "grid"]
PrunerName = Literal["median", "hyperband", "none"]
Direction = Literal["maximize", "minimize"]
TrialStatus = Literal["complete", "pruned", "failed", "running", "waiting"]

TUNE_NAME = "tune.json"
BEST_CONFIG_NAME = "best.toml"
# keys that may be others when a study goes on: results do not depend on them
FREE_KEYS = (
    "output", "workers", "checkpoint_minutes", "checkpoint_steps", "activation_cache", "cache_gib",
    "track",
)  # fmt: skip
_STUDY_NAME = "edgetune"
# trials that run to their end before the median counts, and epochs that every trial may have
_MEDIAN_TRIALS, _MEDIAN_EPOCHS = 5, 2
_LOCK_SECONDS = 0.02
_SQLITE_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One training run of a search.

    Attributes:
        number: from 0; its run folder is trials/NUMBER, in four digits.
        status: "complete" ran to its end (or stopped early), "pruned" was stopped as hopeless,
            "failed" broke, "running" is at work, "waiting" was interrupted and will go on.
        params: what it was given by the search.
        value: the metric: of its best epoch where it is complete, of its last where pruned.
        epochs: how many it was measured after.
        seconds: of training.
        reason: why it failed.
    """

    number: int
    status: TrialStatus
    params: dict[str, Any]
    value: float | None = None
    epochs: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class TuneRecord:
    """What a search is and how far it came.

    Attributes:
        status: "finished" when all wanted trials are done, "interrupted" when it was stopped.
        metric: the config's, on the validation data.
        direction: which values of it are better.
        sampler: how values are drawn.
        pruner: how hopeless trials are told.
        seed: the config's; each trial's draw depends on it, on the number and on the trials before.
        base: the training config without its output; trials differ from it in their params.
        search: what is searched.
        wanted: trials in total.
        trials: by number.
        best: number of the best complete trial.
        importance: share of each searched key in what tells good trials from others; they add up
            to 1. Empty with too few complete trials.
        versions: of the packages that results depend on.
    """

    status: Literal["running", "interrupted", "finished"] = "running"
    metric: str
    direction: Direction
    sampler: SamplerName
    pruner: PrunerName
    seed: int
    base: dict[str, Any]
    search: dict[str, SearchKey]
    wanted: int
    trials: tuple[TrialRecord, ...] = ()
    best: int | None = None
    importance: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def ranked(self) -> tuple[TrialRecord, ...]:
        """Return the trials, best first: complete, pruned, then those without a value."""
        order = {"complete": 0, "pruned": 1, "running": 2, "waiting": 2, "failed": 3}
        sign = -1.0 if self.direction == "maximize" else 1.0

        def key(trial: TrialRecord) -> tuple[int, float, int]:
            value = sign * trial.value if trial.value is not None else 0.0
            return order[trial.status], value, trial.number

        return tuple(sorted(self.trials, key=key))


def new_record(
    config: TrainConfig, search: Mapping[str, SearchKey], *, sampler: SamplerName,
    pruner: PrunerName, wanted: int,
) -> TuneRecord:  # fmt: skip
    """Return the record of a search that has not begun."""
    base = to_mapping(_with_absolute_paths(config))
    del base["output"]
    metric = objective(config)
    return TuneRecord(
        metric=metric,
        direction="minimize" if metric in MINIMIZED else "maximize",
        sampler=sampler,
        pruner=pruner,
        seed=config.seed,
        base=_as_json(base),
        search=dict(search),
        wanted=wanted,
        versions={**versions(), "optuna": import_optuna().__version__},
    )


def objective(config: TrainConfig) -> str:
    """Return the metric that trials are compared by; "auto" goes by the task, as in training."""
    return selection_metric(config)


def read_tune(folder: Path) -> TuneRecord:
    """Read tune.json.

    Raises:
        ConfigError: the folder is no study.
        IntegrityError: the record is damaged.
    """
    path = folder / TUNE_NAME
    if not path.is_file():
        raise ConfigError(f"{folder}: is no study of edgetune tune (it has no {TUNE_NAME})")
    try:
        mapping: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path}: is damaged: {error}") from error
    return from_mapping(TuneRecord, mapping, where=str(path), error=IntegrityError)


def trial_folder(folder: Path, number: int) -> Path:
    """Return the run folder of a trial."""
    return folder / "trials" / f"{number:04}"


def trial_config(record: TuneRecord, params: Mapping[str, Any], output: Path) -> TrainConfig:
    """Return the training config of a trial.

    Raises:
        ConfigError: its values contradict each other.
    """
    values = {**record.base, **params, "output": str(output.absolute())}
    return from_mapping(TrainConfig, values, where="trial")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that this process is to run; `resumed` where another had begun it."""

    number: int
    params: dict[str, Any]
    resumed: bool


class Study:
    """A study's folder, opened by one of the processes that work on it."""

    def __init__(self, folder: Path, record: TuneRecord) -> None:
        """Open the folder, making it where there is none, and take a place at work.

        Raises:
            ConfigError: the folder is something else, or another search.
            MissingExtraError: optuna is not installed.
            ResourceError: the folder cannot be written.
        """
        self.optuna = import_optuna()
        self.folder = folder
        if folder.exists() and not (folder / TUNE_NAME).is_file():
            _check_is_unused(folder)
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            (folder / "trials").mkdir(exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{folder}: cannot be written: {error}") from error
        with self._locked():
            if (folder / TUNE_NAME).is_file():
                known = read_tune(folder)
                _check_is_same(folder, known, record)
                record = replace(known, base=record.base, wanted=record.wanted)
            self.record = record
            self._write_record()
            self._storage = self._open_storage()
            self._place, self._lock = self._take_place()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the place at work."""
        self._storage.remove_session()
        self._storage.engine.dispose()
        self._lock.close()
        if kind is None:  # else it may have left a trial behind
            with self._locked():
                self._place_path(self._place).unlink(missing_ok=True)

    # -- who does what ---------------------------------------------------------------------

    def adopt_orphans(self) -> list[int]:
        """Let the trials wait for someone whose process has ended; return their numbers."""
        orphans = []
        with self._locked():
            for trial in self._trials("RUNNING"):
                place = trial.user_attrs.get("place")
                if place is not None and not self._is_taken(place):
                    self._set(trial.number, "place", None)
                    orphans.append(trial.number)
        return orphans

    def claim(self) -> Claim | None:
        """Return a trial to run: one that waits, else a new one; None when all are taken."""
        with self._locked():
            # a trial that was just asked for has no place yet; nobody else is here meanwhile
            waiting = [t for t in self._trials("RUNNING") if t.user_attrs.get("place") is None]
            if waiting:
                number = min(t.number for t in waiting)
            elif len(self._trials()) < self.record.wanted:
                number = len(self._trials())
            else:
                return None
            study = self._open(sampler=self._sampler(number))
            if waiting:
                trial = self.optuna.trial.Trial(study, self._id(number))
            else:
                trial = study.ask()
                assert trial.number == number
            params = suggest(trial, self.record.search)
            self._set(number, "place", self._place)
        return Claim(number=number, params=params, resumed=bool(waiting))

    def release(self, number: int) -> None:
        """Let a trial that was stopped wait for whoever goes on."""
        with self._locked():
            self._set(number, "place", None)

    def abandon(self, number: int, reason: str) -> bool:
        """Fail a trial whose process died; False where it had ended or is someone else's."""
        with self._locked():
            for trial in self._trials("RUNNING"):
                place = trial.user_attrs.get("place")
                if trial.number == number and place is not None and not self._is_taken(place):
                    self._end(number, "FAIL", reason=reason)
                    return True
        return False

    # -- what came out ---------------------------------------------------------------------

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Note the metric after an epoch; return whether the trial is hopeless."""
        trial_id = self._id(number)
        with self._locked():
            self._storage.set_trial_intermediate_value(trial_id, epoch, value)
            study = self._open()
            return bool(study.pruner.prune(study, self._storage.get_trial(trial_id)))

    def complete(self, number: int, value: float, seconds: float) -> None:
        """End a trial with the metric of its best epoch."""
        with self._locked():
            self._set(number, "seconds", seconds)
            self._end(number, "COMPLETE", value=value)

    def prune(self, number: int, seconds: float) -> None:
        """End a trial as hopeless."""
        with self._locked():
            self._set(number, "seconds", seconds)
            self._end(number, "PRUNED")

    def fail(self, number: int, reason: str) -> None:
        """End a trial that broke."""
        with self._locked():
            self._end(number, "FAIL", reason=reason)

    def trial(self, number: int) -> TrialRecord:
        """Return what is known of a trial."""
        return self._trial_record(self._storage.get_trial(self._id(number)))

    def trials(self) -> tuple[TrialRecord, ...]:
        """Return what is known of all trials, by number."""
        return tuple(self._trial_record(t) for t in self._trials())

    def write(self, status: Literal["running", "interrupted", "finished"]) -> TuneRecord:
        """Bring tune.json and best.toml up to date and return the record."""
        with self._locked():
            study = self._open()
            record = replace(self.record, status=status, trials=self.trials())
            ranked = record.ranked()
            best = ranked[0].number if ranked and ranked[0].status == "complete" else None
            importance = {} if status == "running" else self._importance(study)
            self.record = replace(record, best=best, importance=importance)
            self._write_record()
            if best is not None:
                self._write_best(ranked[0])
        return self.record

    # -- details ---------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep the other processes of the study out."""
        while True:
            try:
                lock = Disk().lock(self.folder / "locks" / "study")
            except BlockingIOError:
                time.sleep(_LOCK_SECONDS)
                continue
            except OSError as error:
                raise ResourceError(f"{self.folder}: cannot be locked: {error}") from error
            break
        try:
            yield
        finally:
            lock.close()

    def _take_place(self) -> tuple[int, Lock]:
        """Take a number that no process has had, so that its trials are told from others'."""
        names = (self.folder / "locks").glob("place-*")
        place = 1 + max((int(p.name.removeprefix("place-")) for p in names), default=0)
        return place, Disk().lock(self._place_path(place))

    def _is_taken(self, place: int) -> bool:
        try:
            Disk().lock(self._place_path(place)).close()
        except BlockingIOError:
            return True
        return False

    def _place_path(self, place: int) -> Path:
        return self.folder / "locks" / f"place-{place}"

    def _open_storage(self) -> Any:
        path = (self.folder / "study.db").absolute()
        storage = self.optuna.storages.RDBStorage(
            f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": _SQLITE_SECONDS}}
        )
        self.optuna.create_study(
            storage=storage,
            study_name=_STUDY_NAME,
            direction=self.record.direction,
            load_if_exists=True,
            sampler=self.optuna.samplers.RandomSampler(seed=0),
        )
        return storage

    def _open(self, *, sampler: Any = None) -> Any:
        """Return optuna's study; its grid sampler may only draw, it breaks where trials end."""
        return self.optuna.load_study(
            study_name=_STUDY_NAME,
            storage=self._storage,
            sampler=sampler or self.optuna.samplers.RandomSampler(seed=0),
            pruner=self._pruner(),
        )

    def _sampler(self, number: int) -> Any:
        """Return a sampler for one trial alone, so that a resumed study draws what it would have.

        The grid has one shuffled order, which trials take by their number.
        """
        samplers = self.optuna.samplers
        if self.record.sampler == "grid":
            return samplers.GridSampler(grid_values(self.record.search), seed=self.record.seed)
        state = np.random.SeedSequence((self.record.seed, number)).generate_state(1)
        if self.record.sampler == "random":
            return samplers.RandomSampler(seed=int(state[0]))
        return samplers.TPESampler(seed=int(state[0]))

    def _pruner(self) -> Any:
        pruners = self.optuna.pruners
        if self.record.pruner == "none":
            return pruners.NopPruner()
        if self.record.pruner == "median":
            return pruners.MedianPruner(
                n_startup_trials=_MEDIAN_TRIALS, n_warmup_steps=_MEDIAN_EPOCHS
            )
        key = self.record.search.get("epochs")
        default = TrainConfig.__dataclass_fields__["epochs"].default
        most = self.record.base.get("epochs", default)
        if key is not None:
            most = int(max(key.choices)) if key.choices else int(key.high or most)
        return pruners.HyperbandPruner(min_resource=1, max_resource=most)

    def _trials(self, state: str | None = None) -> list[Any]:
        states = (self.optuna.trial.TrialState[state],) if state else None
        study_id = self._storage.get_study_id_from_name(_STUDY_NAME)
        trials: list[Any] = self._storage.get_all_trials(study_id, states=states)
        return trials

    def _id(self, number: int) -> int:
        study_id = self._storage.get_study_id_from_name(_STUDY_NAME)
        return int(self._storage.get_trial_id_from_study_id_trial_number(study_id, number))

    def _set(self, number: int, key: str, value: object) -> None:
        self._storage.set_trial_user_attr(self._id(number), key, value)

    def _end(
        self, number: int, state: str, *, value: float | None = None, reason: str = ""
    ) -> None:
        if reason:
            self._set(number, "reason", reason)
        self._open().tell(number, value, state=self.optuna.trial.TrialState[state])

    def _trial_record(self, trial: Any) -> TrialRecord:
        names: dict[str, TrialStatus] = {
            "COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running",
        }  # fmt: skip
        status = names.get(trial.state.name, "waiting")
        if status == "running" and trial.user_attrs.get("place") is None:
            status = "waiting"
        return TrialRecord(
            number=trial.number,
            status=status,
            params=decoded(trial.params, self.record.search),
            value=trial.value,
            epochs=trial.last_step or 0,
            seconds=trial.user_attrs.get("seconds", 0.0),
            reason=trial.user_attrs.get("reason", ""),
        )

    def _importance(self, study: Any) -> dict[str, float]:
        """Return PED-ANOVA importances (Watanabe et al. 2023, arXiv:2304.10255).

        It asks what tells the best trials from the rest. Optuna wants at least five of the best;
        with few trials these are up to half of all.
        """
        complete = self._trials("COMPLETE")
        searched = [n for n, k in self.record.search.items() if len(k.choices) != 1]
        if len(complete) < 4 or len({t.value for t in complete}) < 2 or not searched:
            return {}
        quantile = min(0.5, max(0.1, 5 / len(complete)))
        evaluator = self.optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
        found = evaluator.evaluate(study, params=searched)
        total = sum(found.values())
        return {name: value / total for name, value in found.items()} if total > 0 else {}

    def _write_record(self) -> None:
        content = json.dumps(to_mapping(self.record), indent=2, ensure_ascii=False)
        write_atomic(self.folder / TUNE_NAME, content.encode())

    def _write_best(self, trial: TrialRecord) -> None:
        import tomli_w

        config = trial_config(self.record, trial.params, self.folder / "best")
        write_atomic(self.folder / BEST_CONFIG_NAME, tomli_w.dumps(to_mapping(config)).encode())


def import_optuna() -> Any:
    """Return optuna, told to keep its own log to itself.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise MissingExtraError("optuna", "tune") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _check_is_unused(folder: Path) -> None:
    # another process may be making the study right now: it begins with the locks
    if not folder.is_dir() or any(p.name not in ("locks", "trials") for p in folder.iterdir()):
        raise ConfigError(f"output {folder}: exists already and is no study; name another folder")


def _check_is_same(folder: Path, known: TuneRecord, asked: TuneRecord) -> None:
    """Refuse to mix trials of two searches."""
    differences = [
        f"{f} is {getattr(known, f)!r} there, {getattr(asked, f)!r} now"
        for f in ("sampler", "pruner")
        if getattr(known, f) != getattr(asked, f)
    ]
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    for name in defaults:
        if name in FREE_KEYS:
            continue
        there = known.base.get(name, _as_json(defaults[name]))
        now = asked.base.get(name, _as_json(defaults[name]))
        if there != now:
            differences.append(f"{name} is {there!r} there, {now!r} now")
    for name in sorted(known.search.keys() | asked.search.keys()):
        keys = [known.search.get(name), asked.search.get(name)]
        there, now = (_as_json(to_mapping(k)) if k is not None else None for k in keys)
        if there != now:
            texts = [f"[{k}]" if k is not None else "not there" for k in keys]
            differences.append(f"search of {name} is {texts[0]} there, {texts[1]} now")
    if differences:
        raise ConfigError(
            f"output {folder}: holds another search: {'; '.join(differences)}; name another"
            " folder, or give the same again"
        )


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Make local paths absolute, so that best.toml serves from any folder."""
    local: dict[str, Any] = {
        key: str(Path(value).expanduser().absolute())
        for key in ("data", "val", "test", "model", "weights")
        if (value := getattr(config, key)) and Path(value).expanduser().exists()
    }
    return replace(config, **local)


def _as_json(value: Any) -> Any:
    """Return a value as it comes back from JSON: tuples become lists."""
    return json.loads(json.dumps(value))


def grid_total(record: TuneRecord) -> int | None:
    """Return how many trials a grid has; None for other samplers."""
    return grid_size(record.search) if record.sampler == "grid" else None
