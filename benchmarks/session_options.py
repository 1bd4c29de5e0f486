"""What a session costs, by how it is opened: start, speed, memory, CPU time.

Each row is one way to open the same bundle's graph in a fresh process with onnxruntime alone, after
one start that does not count; rows take turns. Progress goes to stderr, Markdown to stdout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from _common import print_heading, print_table, quit_unable, say, warn_if_busy, workplace

TEXT = """\
Medians over fresh processes that take turns. *load* is the making of the session, *first* its
first run, *p50* one run in a warm process, *CPU* the CPU time of one such run with 20 ms of sleep
after each (a spinning thread goes on burning meanwhile). *peak* is the process's, Python, numpy and
onnxruntime included. *shared* is how much of that a second process that opens the same bundle does
not need again: mapped pages of the weights' file (`Rss` in `/proc/self/smaps`). The zip's *load*
includes what `edgetune` does before: directory, manifest, hashes, the graph's places."""
# name -> what is different from the way that bundles are opened
WAYS = {
    "as bundles are opened": {},
    "the bundle's zip": {"graph": "zip"},
    "weights inside model.onnx": {"graph": "inside"},
    "optimized offline (extended), then off": {"graph": "offline", "level": "off"},
    "onnxruntime's .ort format": {"graph": "ort"},
    "without prepacking": {"config": {"session.disable_prepacking": "1"}},
    "without the arena": {"arena": False},
    "without memory patterns": {"pattern": False},
    "optimization extended": {"level": "extended"},
    "optimization basic": {"level": "basic"},
    "threads that spin": {"config": {"session.intra_op.allow_spinning": "1"}},
}
# runs in a process of its own; prints one JSON object
PROGRAM = """\
import json, os, sys, time
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
way = json.loads(sys.argv[1])
import numpy as np
import onnxruntime as ort
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))
levels = {"off": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED",
          "all": "ORT_ENABLE_ALL"}
begin = time.perf_counter()
options = ort.SessionOptions()
options.intra_op_num_threads = way["threads"]
options.inter_op_num_threads = 1
options.log_severity_level = 3
options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, levels[way["level"]])
options.enable_cpu_mem_arena = way["arena"]
options.enable_mem_pattern = way["pattern"]
for key, value in way["config"].items():
    options.add_session_config_entry(key, value)
if way["zip"]:
    sys.path.insert(0, way["source"])
    from edgetune.runtime.bundle import open_bundle
    from edgetune.runtime.ort import open_session
    begin = time.perf_counter()
    session = open_session(open_bundle(way["zip"]), "model.onnx", threads=way["threads"])
else:
    session = ort.InferenceSession(way["path"], options, providers=["CPUExecutionProvider"])
load = time.perf_counter() - begin
with np.load(way["feeds"]) as stored:
    feeds = {name: stored[name] for name in stored.files}
begin = time.perf_counter()
session.run(None, feeds)
first = time.perf_counter() - begin
times = []
for _ in range(way["runs"]):
    begin = time.perf_counter()
    session.run(None, feeds)
    times.append(time.perf_counter() - begin)
begin = time.process_time()
for _ in range(20):
    session.run(None, feeds)
    time.sleep(0.02)
cpu = (time.process_time() - begin) / 20
shared, inside = 0, False
with open("/proc/self/smaps") as file:
    for line in file:
        if "-" in line.split(" ")[0]:
            inside = line.rstrip().endswith((".bin", ".zip", ".onnx", ".ort"))
        elif inside and line.startswith("Rss:"):
            shared += int(line.split()[1]) / 1024
middle = sorted(times)[len(times) // 2]
print(json.dumps({"load": 1e3 * load, "first": 1e3 * first, "p50": 1e3 * middle,
                  "cpu": 1e3 * cpu, "peak": status("VmHWM"), "shared": shared}))
"""
COLUMNS = ("load", "first", "p50", "cpu", "peak", "shared")


def main() -> None:
    """Measure every way on every bundle and print a table each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundles", nargs="+", type=Path, help="folders of bundles")
    parser.add_argument("--rounds", type=int, default=9, help="processes of each way [9]")
    parser.add_argument("--quick", action="store_true", help="2 rounds; no usable figures")
    given = parser.parse_args()
    rounds, runs = (2, 20) if given.quick else (given.rounds, 100)
    warn_if_busy()
    print_heading("How a session is opened", TEXT)
    for bundle in given.bundles:
        with workplace(None) as folder:
            _measure(bundle, folder, rounds, runs)


def _measure(bundle: Path, folder: Path, rounds: int, runs: int) -> None:
    import numpy as np

    from edgetune.runtime import EdgeModel

    with EdgeModel.load(bundle) as model:
        manifest = model.manifest
        goldens = model.goldens()
        if not goldens:
            quit_unable(f"{bundle}: has no goldens to run")
        np.savez(folder / "feeds.npz", **model.task.stack([model.task.encode(goldens[0])]))
    paths = _graphs(bundle, folder)
    ways = {name: _way(way, manifest, paths, folder, runs) for name, way in WAYS.items()}
    say(f"{manifest.name}: {rounds} processes of {len(ways)} ways each")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in sorted(ways, reverse=number % 2 == 1):
            result = _run(ways[name])
            if number and result:
                found[name].append(result)
    print(
        f"{manifest.name}: {manifest.precision}, {manifest.session.intra_op_threads} threads,"
        f" graph and weights {sum(manifest.files[n].size for n in GRAPH) / 2**20:.1f} MiB\n"
    )
    rows = []
    for name, results in found.items():
        values = [f"{statistics.median(r[c] for r in results):.1f}" for c in COLUMNS if results]
        rows.append([name, *(values or ["failed"] + ["-"] * (len(COLUMNS) - 1))])
    heads = ("load ms", "first ms", "p50 ms", "CPU ms", "peak MiB", "shared MiB")
    print_table(("way", *heads), rows)


GRAPH = ("model.onnx", "weights.bin")


def _graphs(bundle: Path, folder: Path) -> dict[str, str]:
    """Write the forms of the graph; return form -> path."""
    import onnx
    import onnxruntime

    from edgetune.runtime.packing import pack

    source = str(bundle / "model.onnx")
    inside = folder / "inside.onnx"
    onnx.save(onnx.load(source), inside)
    paths = {"": source, "zip": str(folder / "bundle.zip"), "inside": str(inside)}
    pack(bundle, paths["zip"])
    for form, name, config in (
        ("offline", "offline.onnx", {
            "session.optimized_model_external_initializers_file_name": "offline.bin",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        }),
        ("ort", "model.ort", {"session.save_model_format": "ORT"}),
    ):  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(folder / name)
        options.log_severity_level = 3
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        paths[form] = str(folder / name)
    return paths


def _way(way: dict, manifest: object, paths: dict[str, str], folder: Path, runs: int) -> str:
    settings = manifest.session  # type: ignore[attr-defined]
    spinning = "1" if settings.allow_spinning else "0"
    form = way.get("graph", "")
    return json.dumps(
        {
            "path": paths[form],
            "zip": paths["zip"] if form == "zip" else "",
            "source": str(Path(__file__).resolve().parents[1]),
            "feeds": str(folder / "feeds.npz"),
            "runs": runs,
            "threads": settings.intra_op_threads,
            "level": way.get("level", settings.graph_optimization),
            "arena": way.get("arena", settings.arena),
            "pattern": way.get("pattern", True),
            "config": {
                "session.intra_op.allow_spinning": spinning,
                **settings.config,
                **way.get("config", {}),
            },
        }
    )


def _run(way: str) -> dict[str, float] | None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, way],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        say(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "died")
        return None
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
