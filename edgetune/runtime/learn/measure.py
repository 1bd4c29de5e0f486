"""What learning costs on this machine: `python -m edgetune.runtime.learn.measure BUNDLE`.

Runs in a process of its own, so that its peak memory is that of a device which learns.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.errors import EdgetuneError
from edgetune.runtime.learn.state import STATE_NAME, binding_of, dump_state
from edgetune.runtime.learn.store import Store
from edgetune.runtime.measure import peak_rss_mib
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.records import to_mapping

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class LearningCost:
    """What learning takes; times are medians in ms.

    add_ms: one sample looked at and written to the journal. solve_ms: a head solved from the
    statistics. commit_bytes, commit_syncs: written to the disk by a commit, and how often flushed.
    step_ms: one optimizer step of a batch of `batch`, None without train.onnx. cpu_step_ms: the
    same in CPU time over all threads. peak_rss_mib: of the process that did all of it;
    base_rss_mib: of one that had loaded the model only.
    """

    threads: int
    batch: int
    add_ms: float
    solve_ms: float
    commit_bytes: int
    commit_syncs: int
    step_ms: float | None = None
    cpu_step_ms: float | None = None
    base_rss_mib: float | None = None
    peak_rss_mib: float | None = None


def measure_learning(
    path: str | Path, *, steps: int = 20, threads: int | None = None
) -> LearningCost:
    """Measure with the bundle's own samples, in a store that is removed after.

    Raises:
        ConfigError: the bundle cannot learn.
    """
    with EdgeModel.load(path, threads=threads) as model, tempfile.TemporaryDirectory() as folder:
        samples = model.goldens()
        model.predict(samples[0])
        base = peak_rss_mib()
        label = model.labels[0]
        with model.learner(Path(folder) / "head", screen=False) as learner:
            adds = []
            for i in range(max(3, min(steps, 10))):
                begin = time.perf_counter()
                learner.add([samples[i % len(samples)]], f"{label} {i}")
                adds.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            state = learner.candidate()
            solve = time.perf_counter() - begin
        with Store.open(Path(folder) / "bytes", binding=binding_of(model.bundle)) as store:
            before, syncs = store.disk.bytes_written, store.disk.syncs
            store.commit({STATE_NAME: dump_state(state)}, {"kind": "head"})
            written, flushed = store.disk.bytes_written - before, store.disk.syncs - syncs
        step: tuple[float, float] | None = None
        if model.manifest.training is not None:
            step = _steps(model, samples, Path(folder) / "tensors", steps)
        return LearningCost(
            threads=threads or model.manifest.session.intra_op_threads,
            batch=BATCH,
            add_ms=1e3 * statistics.median(adds),
            solve_ms=1e3 * solve,
            commit_bytes=written,
            commit_syncs=flushed,
            step_ms=None if step is None else step[0],
            cpu_step_ms=None if step is None else step[1],
            base_rss_mib=base,
            peak_rss_mib=peak_rss_mib(),
        )


def _steps(
    model: EdgeModel, samples: Sequence[Any], folder: Path, steps: int
) -> tuple[float, float]:
    """Return wall and CPU time in ms of an optimizer step, the median and the mean."""
    batch = [samples[i % len(samples)] for i in range(BATCH)]
    labels = [model.labels[i % len(model.labels)] for i in range(BATCH)]
    with model.trainer(folder) as trainer:
        return trainer.time_steps(batch, labels, steps)


def main() -> None:
    """Print the cost as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    cost = measure_learning(given.bundle, steps=given.steps, threads=given.threads)
    print(json.dumps(to_mapping(cost)))


if __name__ == "__main__":
    try:
        main()
    except EdgetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
