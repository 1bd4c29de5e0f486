"""Cold start and overhead a call: edgetune.runtime against bare onnxruntime on the same graph.

    python benchmarks/cold_start.py                 builds its bundles with `edgetune demo`
    python benchmarks/cold_start.py --text-bundle B1 --image-bundle B2     two minutes

Both sides run in fresh processes, alternating, with the same session options, thread count and
ORT_DISABLE_TELEMETRY=1. The bare side is what a person would write by hand: read tokenizer or
image, open the session, run, softmax. It checks nothing; edgetune checks sizes and hashes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from _common import print_heading, print_table, quit_unable, say, warn_if_busy, workplace

TEXT = """\
From process start to the first answer, and memory, in fresh processes that alternate; then the
time of 300 calls on the same input in one process, alternating call by call. Medians."""

# what both children share: marks of time, and what they print
MARKS = """\
import json, os, sys, time
start = time.perf_counter()
"""
PRINT = """
answered = time.perf_counter()
peak = [l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")]
print(json.dumps({"import_ms": 1e3 * (imported - start), "load_ms": 1e3 * (loaded - imported),
    "first_ms": 1e3 * (answered - loaded), "label": label, "peak_mib": int(peak[0]) / 1024}))
"""
EDGETUNE = (
    MARKS
    + """
from edgetune.runtime import EdgeModel
imported = time.perf_counter()
model = EdgeModel.load(sys.argv[1])
loaded = time.perf_counter()
label = model.predict(sys.argv[2]).label
"""
    + PRINT
)
SESSION = """
import onnxruntime as ort
imported = time.perf_counter()
folder = sys.argv[1]
manifest = json.load(open(folder + "/manifest.json"))
options = ort.SessionOptions()
options.intra_op_num_threads = manifest["session"]["intra_op_threads"]
options.inter_op_num_threads = 1
options.log_severity_level = 3
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = ort.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
"""
ANSWER = """
e = np.exp(logits[0] - logits[0].max())
label = manifest["labels"][int((e / e.sum()).argmax())]
"""
BARE = {
    "text": MARKS + "import numpy as np\nfrom tokenizers import Tokenizer" + SESSION + """
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.enable_truncation(manifest["options"]["max_length"])
tokenizer.no_padding()
loaded = time.perf_counter()
ids = np.array([tokenizer.encode(sys.argv[2]).ids], np.int64)
feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
logits = session.run(["logits", "features"], feeds)[0]
""" + ANSWER + PRINT,
    "image": MARKS + "import numpy as np\nfrom PIL import Image" + SESSION + """
loaded = time.perf_counter()
feeds = {"image": np.asarray(Image.open(sys.argv[2]).convert("RGB"))[None]}
logits = session.run(["logits", "features"], feeds)[0]
""" + ANSWER + PRINT,
}  # fmt: skip


def main() -> None:
    """Measure both kinds of bundle and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text-bundle", type=Path)
    parser.add_argument("--image-bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=15, help="processes of each side")
    parser.add_argument("--quick", action="store_true", help="2 rounds; no usable figures")
    given = parser.parse_args()
    rounds = 2 if given.quick else given.rounds
    with workplace(None) as folder:
        bundles = {
            "text": given.text_bundle or _demo("text-classification", folder / "text"),
            "image": given.image_bundle or _demo("image-classification", folder / "image"),
        }
        warn_if_busy()
        print_heading("Cold start and overhead", TEXT)
        starts, calls = [], []
        for kind, bundle in bundles.items():
            sample = _sample(kind, folder)
            say(f"{kind}: {rounds} starts of each side")
            starts += _compare_starts(kind, bundle, sample, rounds)
            calls.append(_compare_calls(kind, bundle, sample, 30 if given.quick else 300))
        columns = ("bundle", "side", "start to answer ms", "import", "load", "first", "peak MiB")
        print_table(columns, starts)
        print_table(("bundle", "session.run ms", "predict ms", "overhead us"), calls)


def _demo(task: str, output: Path) -> Path:
    say(f"edgetune demo --task {task}")
    command = [sys.executable, "-m", "edgetune.cli.main", "demo", "--task", task]
    subprocess.run([*command, "--output", str(output)], check=True, stdout=subprocess.DEVNULL)
    return output / "bundle"


def _sample(kind: str, folder: Path) -> str:
    """Return a sentence, or the path of a small picture written here."""
    if kind == "text":
        return "could you get the lights in the packing hall going"
    from PIL import Image

    path = folder / "sample.png"
    Image.linear_gradient("L").resize((320, 240)).convert("RGB").save(path)
    return str(path)


def _compare_starts(kind: str, bundle: Path, sample: str, rounds: int) -> list[list[object]]:
    sides = {"bare onnxruntime": BARE[kind], "edgetune": EDGETUNE}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, code in sides.items():
            result = _child(code, bundle, sample)
            if number:  # the first of each compiles modules and fills the page cache
                found[side].append(result)
    if len({r["label"] for results in found.values() for r in results}) != 1:
        quit_unable(f"{bundle}: the two sides answer differently")
    rows = []
    for side, results in found.items():
        medians = {
            key: statistics.median(r[key] for r in results) for key in results[0] if key != "label"
        }
        total = f"{medians['wall_ms']:.0f}"
        if side == "edgetune":
            bare = statistics.median(r["wall_ms"] for r in found["bare onnxruntime"])
            total += f" ({medians['wall_ms'] / bare:.2f}x)"
        parts = (f"{medians[key]:.0f}" for key in ("import_ms", "load_ms", "first_ms", "peak_mib"))
        rows.append([kind, side, total, *parts])
    return rows


def _child(code: str, bundle: Path, sample: str) -> dict[str, float]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["ORT_DISABLE_TELEMETRY"] = "1"
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle), sample],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    wall_ms = 1e3 * (time.perf_counter() - begin)
    if done.returncode:
        quit_unable(f"{bundle}: {done.stderr.strip().splitlines()[-1]}")
    return {**json.loads(done.stdout), "wall_ms": wall_ms}


def _compare_calls(kind: str, bundle: Path, sample: str, calls: int) -> list[object]:
    """Time predict against session.run on the same, already prepared arrays."""
    from edgetune.runtime import EdgeModel
    from edgetune.runtime.tasks.image_classification import decode_image

    model = EdgeModel.load(bundle)
    value = sample if kind == "text" else decode_image(sample)
    feeds = model.task.stack([model.task.encode(value)])
    names = [spec.name for spec in model.manifest.outputs]
    session = model._session
    times: dict[str, list[float]] = {"bare": [], "predict": []}
    for number in range(calls + 20):
        begin = time.perf_counter()
        session.run(names, feeds)
        middle = time.perf_counter()
        model.predict(value)
        end = time.perf_counter()
        if number >= 20:
            times["bare"].append(middle - begin)
            times["predict"].append(end - middle)
    bare, predict = (statistics.median(t) for t in times.values())
    over = statistics.median(p - b for b, p in zip(times["bare"], times["predict"], strict=True))
    return [kind, f"{1e3 * bare:.3f}", f"{1e3 * predict:.3f}", f"{1e6 * over:.0f}"]


if __name__ == "__main__":
    main()
