"""What learning costs on this machine, measured in a process of its own."""

import json
from pathlib import Path

from edgetune.bench.latency import run_child
from edgetune.runtime.learn.measure import LearningCost
from edgetune.runtime.records import from_mapping

MODULE = "edgetune.runtime.learn.measure"


def bench_learning(
    path: str | Path, *, steps: int = 20, threads: int | None = None
) -> LearningCost:
    """Measure what a bundle's learning costs here.

    Args:
        path: the bundle's folder, or its zip.
        steps: optimizer steps to time, where it has them.
        threads: overrides the number of threads that the manifest names.

    Raises:
        ConfigError: the bundle cannot learn.
        ResourceError: the process could not be started, or was killed.
    """
    options = [f"--steps={steps}", *([f"--threads={threads}"] if threads is not None else [])]
    output = run_child(["-m", MODULE, *options, "--", str(path)])
    return from_mapping(LearningCost, json.loads(output), where=MODULE)


def energy_mj(cost: LearningCost, watts: float, cores: int) -> float | None:
    """Return the energy of an optimizer step in mJ, as far as CPU time tells.

    A board that takes `watts` with all of its `cores` busy is taken to spend an even share of
    that for each second of one core.
    """
    return None if cost.cpu_step_ms is None else cost.cpu_step_ms * watts / cores
