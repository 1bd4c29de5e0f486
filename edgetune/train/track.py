"""Trackers: what a run reports to TensorBoard, MLflow and Weights & Biases.

Each is a class of four verbs: it is made (and finds out whether it was made for this run before),
`step`, `epoch` and `close`. What fails while training runs is switched off with one note.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError, EdgetuneError, MissingExtraError, ResourceError
from edgetune.runtime.files import write_atomic

if TYPE_CHECKING:
    from edgetune.train.events import Event

IDS_NAME = "tracking.json"
EXPERIMENT = "edgetune"
# a run reports so many steps at most: curves need no more, and files and servers less
STEPS_SHOWN = 2000
# MLflow's limits: of a value, characters (before 2.8; 6000 since); of a call, parameters
_MLFLOW_TEXT, _MLFLOW_BATCH = 500, 100
_OTHER_SCALARS = ("lr", "samples_per_s", "energy_wh", "peak_memory_mib")

Ending = Literal["finished", "interrupted", "failed"]


class Tracker(Protocol):
    """One place that a run reports to. Any method may raise anything."""

    def step(self, step: int, scalars: Mapping[str, float]) -> None:
        """Report within an epoch."""

    def epoch(self, step: int, scalars: Mapping[str, float]) -> None:
        """Report an epoch that ended with `step`."""

    def close(self, ending: Ending) -> None:
        """Hand over what is left."""


class Trackers:
    """The trackers of a run, called with its events."""

    def __init__(self, trackers: Mapping[str, Tracker], note: Callable[[str], None]) -> None:
        """Report to `trackers`, by name; `note` is told of one that failed."""
        self._trackers = dict(trackers)
        self._note = note
        self._ending: Ending = "failed"
        self._shown = 0

    def __call__(self, event: "Event") -> None:
        """Report an event."""
        values = event.values
        if event.kind == "step" and self._is_shown(values):
            self._each("step", values["step"], _scalars({**values, "train_loss": values["loss"]}))
        elif event.kind == "epoch":
            scalars = {**_scalars(values), "epoch": float(values["epoch"])}
            self._each("epoch", values["step"], scalars)
        elif event.kind == "finished":
            self._ending = "finished"
        elif event.kind == "interrupted":
            self._ending = "interrupted"

    def close(self) -> None:
        """Hand over what is left, and how the run ended; "failed" if no event said so."""
        self._each("close", self._ending)
        self._trackers.clear()

    def _is_shown(self, values: Mapping[str, Any]) -> bool:
        step, steps = values["step"], values.get("steps") or 0
        if step - self._shown < max(1, steps // STEPS_SHOWN):
            return False
        self._shown = step
        return True

    def _each(self, verb: str, *arguments: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, verb)(*arguments)
            except Exception as error:  # the network, a server, a disk: anything
                del self._trackers[name]
                self._note(f"{name}: is switched off, the run goes on: {_line_of(error)}")


def open_trackers(
    names: Sequence[str],
    folder: Path,
    config: TrainConfig,
    record: Mapping[str, object],
    *,
    steps_done: int = 0,
    note: Callable[[str], None],
) -> Trackers:
    """Open the trackers of a run; of a resumed one, those it had.

    Args:
        names: of `TRACKERS`.
        folder: the run, which exists.
        config: reported with the run.
        record: the run's record as plain values; what is a number or a text is reported too.
        steps_done: where a resumed run goes on; what was reported of later steps is dropped.
        note: told, in a line, of a tracker that fails while the run goes on.

    Raises:
        MissingExtraError: a tracker's package is not installed.
        ConfigError: MLflow's database needs a package that is not installed.
        ResourceError: a tracker can't be opened: its server, its account or the disk.
    """
    about: dict[str, object] = {
        f"run/{k}": v for k, v in record.items() if isinstance(v, str | int | float)
    }
    opened: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        try:
            opened[name] = TRACKERS[name](folder, config, about, steps_done)
        except EdgetuneError:
            Trackers(opened, note).close()
            raise
        except Exception as error:
            Trackers(opened, note).close()
            raise ResourceError(
                f"{name}: can't be opened: {_line_of(error)}; correct that, or leave out"
                f" --track {name}"
            ) from error
    return Trackers(opened, note)


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(
        self, folder: Path, config: TrainConfig, about: dict[str, object], steps_done: int
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "tensorboard":
                raise
            raise MissingExtraError("tensorboard", "train") from error
        place = folder / "tensorboard"
        resumed = place.is_dir() and any(place.iterdir())
        # readers drop what earlier files say of this step and later ones
        purge_step = steps_done + 1 if resumed else None
        self._at = -1
        self._writer: Any = SummaryWriter(str(place), purge_step=purge_step)
        if not resumed:
            rows = "".join(f"| {k} | {v} |\n" for k, v in (_flat(config) | about).items())
            self._writer.add_text("config", f"| key | value |\n|---|---|\n{rows}")

    def step(self, step: int, scalars: Mapping[str, float]) -> None:
        self._at = step
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def epoch(self, step: int, scalars: Mapping[str, float]) -> None:
        # the last step may have its points already; both losses are means since the epoch began
        known = ("train/loss", "lr", "samples_per_s") if step == self._at else ()
        self.step(step, {name: value for name, value in scalars.items() if name not in known})
        self._writer.flush()

    def close(self, ending: Ending) -> None:  # noqa: ARG002  event files have no place for it
        self._writer.close()


class _MLflow:
    """A run of the experiment "edgetune", where MLFLOW_TRACKING_URI or MLflow's default says."""

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        about: dict[str, object],
        steps_done: int,  # noqa: ARG002  the server knows more
    ) -> None:
        # a server that is away holds the run up for seconds, not for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        try:
            from mlflow.entities import Metric, Param
            from mlflow.tracking import MlflowClient
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "mlflow":
                raise
            raise MissingExtraError("mlflow", "mlflow") from error
        self._metric: Any = Metric
        known = _read_ids(folder).get("mlflow", {})
        asked = os.environ.get("MLFLOW_TRACKING_URI")
        # the default depends on the working folder, which may be another one now
        uri = asked or known.get("tracking_uri") or _default_mlflow_uri()
        self._client: Any = MlflowClient(tracking_uri=uri)
        self._reported = -1
        if known.get("tracking_uri") == uri:
            self._id = known["run_id"]
            self._client.update_run(self._id, status="RUNNING")
            # a run that was killed may have reported epochs that it now trains again
            points = self._client.get_metric_history(self._id, "epoch")
            self._reported = max((point.step for point in points), default=-1)
            return
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        number = (
            experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT)
        )
        self._id = self._client.create_run(number, run_name=folder.name).info.run_id
        _write_ids(folder, "mlflow", {"run_id": self._id, "tracking_uri": uri})
        values = {k: str(v) for k, v in (_flat(config) | about).items()}
        params = [Param(key, value[:_MLFLOW_TEXT]) for key, value in values.items()]
        for first in range(0, len(params), _MLFLOW_BATCH):
            self._client.log_batch(self._id, params=params[first : first + _MLFLOW_BATCH])

    def step(self, step: int, scalars: Mapping[str, float]) -> None:
        """Report nothing: a call to a server a step would slow the run down."""

    def epoch(self, step: int, scalars: Mapping[str, float]) -> None:
        if step <= self._reported:
            return
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(name, value, now_ms, step) for name, value in scalars.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, ending: Ending) -> None:
        status = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[ending]
        self._client.set_terminated(self._id, status=status)


class _Wandb:
    """A run of the project "edgetune" (or WANDB_PROJECT); WANDB_MODE says whether it is sent."""

    def __init__(
        self, folder: Path, config: TrainConfig, about: dict[str, object], steps_done: int
    ) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            if error.name != "wandb":
                raise
            raise MissingExtraError("wandb", "wandb") from error
        known = _read_ids(folder).get("wandb", {})
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", EXPERIMENT),
            name=folder.name,
            dir=str(folder),
            id=known.get("id"),
            resume="allow",
            config=_flat(config) | about,
            # our own lines are not sent, and its are not mixed with ours
            settings=wandb.Settings(console="off", silent=True),
        )
        _write_ids(folder, "wandb", {"id": self._run.id})
        # wandb drops steps that it has, with a warning each
        self._reported = max(steps_done, int(self._run.step or 0) - 1)

    def step(self, step: int, scalars: Mapping[str, float]) -> None:
        """Report nothing: a call to a server a step would slow the run down."""

    def epoch(self, step: int, scalars: Mapping[str, float]) -> None:
        if step > self._reported:
            self._run.log(dict(scalars), step=step)

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=0 if ending == "finished" else 1)


TRACKERS: Mapping[str, Callable[[Path, TrainConfig, dict[str, object], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _Wandb,
}


def _default_mlflow_uri() -> str:
    """Return where MLflow keeps runs if nothing is set: a database file in the working folder."""
    from mlflow.tracking import get_tracking_uri

    uri = str(get_tracking_uri())
    if uri.startswith("sqlite:") and not (find_spec("sqlalchemy") and find_spec("alembic")):
        raise ConfigError(
            f"mlflow: would keep the run in {uri}, for which sqlalchemy and alembic are not"
            " installed; set MLFLOW_TRACKING_URI to your server, or: pip install sqlalchemy alembic"
        )
    return uri


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return an event's numbers by the names of curves: train/..., val/..., lr, ..."""
    scalars = {}
    for key, value in values.items():
        part, _, rest = key.partition("_")
        named = part in ("train", "val") and rest
        if isinstance(value, int | float) and (named or key in _OTHER_SCALARS):
            scalars[f"{part}/{rest}" if named else key] = float(value)
    return scalars


def _flat(config: TrainConfig) -> dict[str, object]:
    return {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()
    }


def _read_ids(folder: Path) -> dict[str, dict[str, str]]:
    try:
        found: dict[str, dict[str, str]] = json.loads((folder / IDS_NAME).read_text())
    except FileNotFoundError:
        return {}
    return found


def _write_ids(folder: Path, name: str, ids: Mapping[str, str]) -> None:
    everything = {**_read_ids(folder), name: dict(ids)}
    write_atomic(folder / IDS_NAME, json.dumps(everything, indent=2).encode())


def _line_of(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
