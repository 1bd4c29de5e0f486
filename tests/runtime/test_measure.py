import itertools
import json
import subprocess
import sys

import pytest

from edgetune.errors import ConfigError
from edgetune.runtime.measure import (
    MIN_RUNS,
    main,
    measure,
    summarize,
    time_calls,
)


class Stopwatch:
    """A clock that each call of `predict` moves by one second."""

    def __init__(self):
        self.now = 100.0
        self.seen = []

    def __call__(self):
        return self.now

    def predict(self, sample):
        self.seen.append(sample)
        self.now += 1.0


def timed(samples="ab", **limits):
    watch = Stopwatch()
    warmed, durations = time_calls(watch.predict, samples, clock=watch, **limits)
    return warmed, durations, watch.seen


def test_percentiles_interpolate_linearly_between_ranks():
    latency = summarize([i / 1000 for i in range(100, 0, -1)])  # 1..100 ms
    # rank of percentile p among n values is p/100 (n - 1): 49.5, 94.05, 98.01
    assert latency.p50_ms == pytest.approx(50.5)
    assert latency.p95_ms == pytest.approx(95.05)
    assert latency.p99_ms == pytest.approx(99.01)
    assert latency.mean_ms == pytest.approx(50.5)
    assert latency.min_ms == pytest.approx(1.0)


def test_throughput_is_calls_over_their_summed_time():
    assert summarize([0.1, 0.3]).throughput_per_s == pytest.approx(5.0)


def test_runs_end_the_measurement_when_time_does_not():
    warmed, durations, _ = timed(runs=12, warmup=3, seconds=1000.0)
    assert warmed == 3
    assert durations == [1.0] * 12


def test_seconds_end_the_measurement_when_runs_do_not():
    # each call takes 1 s; after 26 of them 25.5 s are over
    assert len(timed(runs=200, warmup=0, seconds=25.5)[1]) == 26


def test_ten_runs_are_done_however_long_they_take():
    assert len(timed(runs=200, warmup=0, seconds=0.5)[1]) == MIN_RUNS == 10


def test_warmup_ends_after_the_same_seconds():
    warmed, durations, _ = timed(runs=10, warmup=20, seconds=3.0)
    assert warmed == 3
    assert len(durations) == 10


def test_samples_are_taken_in_turn_and_timed_calls_begin_with_the_first():
    seen = timed(samples=["a", "b", "c"], runs=10, warmup=2, seconds=1000.0)[2]
    assert seen == ["a", "b", *itertools.islice(itertools.cycle("abc"), 10)]


def test_the_default_clock_times_real_calls():
    total = []
    _, durations = time_calls(
        lambda n: total.append(sum(range(n))), [20_000], runs=20, warmup=1, seconds=5.0
    )
    assert len(durations) == 20
    assert all(0 < d < 1 for d in durations)
    assert total == [199_990_000] * 21


def test_peak_memory_rises_with_what_is_allocated():
    # a process of its own: one that has freed memory and kept it would fill that first
    program = """
import numpy as np
from edgetune.runtime.measure import peak_rss_mib
before = peak_rss_mib()
block = np.ones(64 * 2**20, np.uint8)
print(peak_rss_mib() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 48 < float(done.stdout) < 96


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"runs": 9}, "runs: expected at least 10, got 9"),
        ({"warmup": -1}, "warmup: expected at least 0, got -1"),
        ({"seconds": 0.0}, "seconds: expected more than 0, got 0"),
        ({"seconds": float("nan")}, "seconds: expected more than 0, got nan"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
    ],
)
def test_a_limit_out_of_bounds_is_a_config_error(tmp_path, limits, message):
    with pytest.raises(ConfigError, match=message):
        measure(tmp_path, **limits)


def test_the_entry_gives_an_error_as_one_line_and_its_exit_code(tmp_path, capsys):
    code = main([str(tmp_path / "absent"), "--runs", "10"])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_importing_the_module_loads_neither_numpy_nor_onnxruntime():
    code = (
        "import sys, json, edgetune.runtime.measure;"
        "print(json.dumps([m for m in ('numpy', 'onnxruntime', 'click') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(done.stdout) == []
