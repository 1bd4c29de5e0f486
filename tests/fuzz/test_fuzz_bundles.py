"""Bundles of strangers: thousands of hostile ones, each opened by a process that is watched.

What holds of each: nothing but an `EdgetuneError` of one line comes out; nothing is written but
what `unpack` and `pack` were asked for, and nothing where they refuse; no code of it is run, no
file outside is read, no connection opened; it takes at most 5 s of CPU time and 256 MiB of memory.
README.md says how to run this for long.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("needs Linux's limits and its /proc", allow_module_level=True)

sys.path.append(str(Path(__file__).parent))

from hostile import Hostile, read_folder
from hypothesis import HealthCheck, Phase, given, settings
from watched import Worker

# how many of each kind at most, and nine tenths of it at least; the same ones in every run
EXAMPLES = {
    "zips": 1300,
    "damaged zips": 650,
    "manifests": 400,
    "graphs": 350,
    "goldens": 250,
    "tokenizers": 300,
    "folders": 150,
    "vast files": 20,
}


@pytest.fixture(scope="module")
def hostile(built):
    return Hostile(colors=read_folder(built / "colors"), words=read_folder(built / "words"))


@pytest.fixture(scope="module")
def worker(hostile):
    with Worker(hostile.good) as running:
        yield running


@pytest.mark.parametrize("kind", EXAMPLES)
def test_hostile_bundles_do_no_harm(hostile, worker, kind):
    before = worker.cases

    @settings(
        max_examples=EXAMPLES[kind],
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(hostile.strategies[kind])
    def check(case):
        failures = worker.run(case)["failures"]
        if failures:
            kept = Path(tempfile.gettempdir()) / f"edgetune-fuzz-{kind.replace(' ', '-')}.json"
            kept.write_text(json.dumps(case))
            pytest.fail(f"{failures}; again: python tests/fuzz/fuzz.py --replay {kept}")

    check()
    assert worker.cases - before >= 0.9 * EXAMPLES[kind]


def test_a_harmless_bundle_passes_all_of_it(hostile, worker):
    for case in hostile.good:
        verdict = worker.run(case)
        assert verdict["failures"] == []
        assert {outcome.split(": ")[1] for outcome in verdict["outcome"]} == {"done"}


def test_many_hostile_bundles_get_past_the_manifest(hostile, worker):
    """Else the rest would not be tested: graphs that load, goldens that are read."""
    reached = 0

    @settings(max_examples=50, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck), phases=[Phase.generate])  # fmt: skip
    @given(hostile.strategies["goldens"])
    def count(case):
        nonlocal reached
        reached += any(o.startswith("self_test") for o in worker.run(case)["outcome"])

    count()
    assert reached >= 40


# -- that the watching sees what it watches for: each of these must fail --------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("writes beside", "sentinel.txt was written"),
        ("writes outside", "open '/tmp/edgetune-fuzz-harm'"),
        ("reads outside", "open '/etc/passwd'"),
        ("runs a command", "os.system"),
        ("runs code", "compile|exec"),
        ("unpickles", "pickle.find_class"),
        ("connects", "socket"),
        ("takes memory", r"took [23]\d\d MiB"),
        ("takes more memory", "MemoryError"),
        ("raises another error", "IndexError"),
        ("crashes", "died with code -6"),
    ],
)
def test_harm_is_seen(worker, how, message):
    failures = " ".join(worker.run({"form": "harm", "how": how})["failures"])
    assert re.search(message, failures), failures


def test_there_are_as_many_as_the_page_says():
    assert 0.9 * sum(EXAMPLES.values()) >= 3000
    assert "opens 3,000 hostile bundles" in (Path(__file__).parent / "README.md").read_text()
