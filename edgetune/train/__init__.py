"""Fine-tuning: one loop, a run folder, exact resume."""

from edgetune.train.events import Event
from edgetune.train.run import Run, RunRecord, open_run, read_run, run_dataset
from edgetune.train.start import resume, train

__all__ = [
    "Event", "Run", "RunRecord", "open_run", "read_run", "resume", "run_dataset", "train",
]  # fmt: skip
