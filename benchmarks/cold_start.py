"""Cold start and overhead a call: edgetune.runtime against bare onnxruntime on the same graph.

    python benchmarks/cold_start.py                 builds its bundles with `edgetune demo`
    python benchmarks/cold_start.py --text-bundle B1 --image-bundle B2     two minutes

Both sides run in fresh processes, taking turns, on the same graph with the same session options.
The bare side is what a person would write by hand: labels from a JSON file, tokenizer or image,
session, run, softmax. It checks nothing; edgetune checks every size and the hashes of all files
but the weights. Progress goes to stderr, Markdown to stdout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _common import print_heading, print_table, quit_unable, say, warn_if_busy, workplace

from edgetune.runtime import EdgeModel
from edgetune.runtime.tasks.image_classification import decode_image

TARGET = 1.3  # times the bare side's time from start to answer
SENTENCE = "could you get the lights in the packing hall going"
TEXT = f"""\
From the start of a process to its first answer: medians over fresh processes that take turns,
after one of each that does not count (it compiles modules and fills the page cache, which are warm
from then on). *Python* is the interpreter's own start. What is imported where differs: edgetune
imports tokenizers when it loads and Pillow when it decodes the first image, the bare side both at
its start; so compare *start to answer*, of which the target is at most {TARGET:g} times the bare
side's. `ORT_DISABLE_TELEMETRY=1` is set and `PYTHONDONTWRITEBYTECODE` unset on both sides."""
CALLS = """\
One sample a call in a warm process, alternating call by call; medians. *overhead* is `predict`
from the raw sample (a sentence, or decoded pixels) less `session.run` on the prepared arrays. The
last columns leave the session out (a stand-in gives the stored outputs at once): what the Python
around it costs, in edgetune and written by hand."""

# Clocks are time.monotonic(), which is one clock for all processes of a machine.
EDGETUNE = """\
import time
started = time.monotonic()
import json, sys
from edgetune.runtime import EdgeModel
imported = time.monotonic()
model = EdgeModel.load(sys.argv[1])
loaded = time.monotonic()
label = model.predict(sys.argv[2]).label
"""
BARE_START = """\
import time
started = time.monotonic()
import json, sys
import numpy as np
import onnxruntime as ort
"""
BARE_SESSION = """
imported = time.monotonic()
folder = sys.argv[1]
with open(folder + "/manifest.json") as file:
    manifest = json.load(file)
wanted = manifest["session"]
options = ort.SessionOptions()
options.intra_op_num_threads = wanted["intra_op_threads"]
options.inter_op_num_threads = 1
options.graph_optimization_level = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}[wanted["graph_optimization"]]
options.log_severity_level = 3
spinning = "1" if wanted["allow_spinning"] else "0"
options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
for key, value in wanted["config"].items():
    options.add_session_config_entry(key, value)
providers = wanted["execution_providers"]
session = ort.InferenceSession(folder + "/model.onnx", options, providers=providers)
"""
BARE_ANSWER = """
logits = session.run(["logits"], feeds)[0][0]
e = np.exp(logits - logits.max())
probabilities = e / e.sum()
best = int(probabilities.argmax())
label, score = manifest["labels"][best], float(probabilities[best])
"""
BARE_TEXT = (
    BARE_START
    + "from tokenizers import Tokenizer"
    + BARE_SESSION
    + """
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.enable_truncation(manifest["options"]["max_length"])
tokenizer.no_padding()
loaded = time.monotonic()
ids = np.array([tokenizer.encode(sys.argv[2]).ids], np.int64)
feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
"""
    + BARE_ANSWER
)
BARE_IMAGE = (
    BARE_START
    + "from PIL import Image"
    + BARE_SESSION
    + """
loaded = time.monotonic()
with Image.open(sys.argv[2]) as image:
    feeds = {"image": np.asarray(image.convert("RGB"))[None]}
"""
    + BARE_ANSWER
)
# both sides: when it was done, and the largest memory so far (VmHWM is this program's own)
REPORT = """
answered = time.monotonic()
try:
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
except OSError:
    peak = float("nan")
print(json.dumps([label, started, imported, loaded, answered, peak]))
"""
BARE = {"text": BARE_TEXT, "image": BARE_IMAGE}
PARTS = ("total", "python", "import", "load", "first", "peak")


def main() -> None:
    """Measure both kinds of bundle and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text-bundle", type=Path, help="[made with edgetune demo]")
    parser.add_argument("--image-bundle", type=Path, help="[made with edgetune demo]")
    parser.add_argument("--only", choices=BARE, help="one kind instead of both")
    parser.add_argument("--rounds", type=int, default=15, help="processes of each side [15]")
    parser.add_argument("--quick", action="store_true", help="2 rounds; no usable figures")
    given = parser.parse_args()
    rounds, calls = (2, 30) if given.quick else (given.rounds, 500)
    named = {"text": given.text_bundle, "image": given.image_bundle}
    kinds = [given.only] if given.only else list(BARE)
    with workplace(None) as folder:
        bundles = {kind: named[kind] or _demo(kind, folder / kind) for kind in kinds}
        warn_if_busy()
        print_heading("Cold start and overhead, against bare onnxruntime", TEXT)
        samples = {"text": SENTENCE, "image": _picture(folder)}
        starts, verdicts, overheads = [], [], []
        for kind, bundle in bundles.items():
            say(f"{kind}: {rounds} starts of each side")
            found = _time_starts(kind, bundle, samples[kind], rounds)
            starts += _start_rows(kind, found)
            verdicts.append(_verdict(kind, found))
            overheads.append([kind, *_time_calls(kind, bundle, samples[kind], calls)])
        for kind, bundle in bundles.items():
            print(f"- {kind}: {_described(bundle)}")
        print()
        columns = ("start to answer ms", "Python ms", "import", "load", "first answer", "peak MiB")
        print_table(("bundle", "side", *columns), starts)
        print("\n".join(verdicts) + f"\n\n{CALLS}\n")
        columns = ("session.run ms", "predict ms", "overhead us", "edgetune's Python us", "by hand")
        print_table(("bundle", *columns), overheads)


# -- what is measured on -------------------------------------------------------------------


def _demo(kind: str, output: Path) -> Path:
    task = f"{kind}-classification"
    say(f"edgetune demo --task {task}")
    command = [sys.executable, "-m", "edgetune.cli.main", "demo", "--task", task]
    subprocess.run([*command, "--output", str(output)], check=True, stdout=subprocess.DEVNULL)
    return output / "bundle"


def _picture(folder: Path) -> str:
    """Write a picture of a small camera's size and return its path."""
    from PIL import Image

    path = folder / "sample.jpg"
    Image.effect_noise((320, 240), 60).convert("RGB").save(path, quality=90)
    return str(path)


def _described(bundle: Path) -> str:
    model = EdgeModel.load(bundle)
    manifest = model.manifest
    return (
        f"{manifest.name}, {manifest.precision}, {model.bundle.size_bytes / 2**20:.1f} MiB,"
        f" {len(manifest.labels)} labels, {manifest.session.intra_op_threads} threads"
    )


# -- starts --------------------------------------------------------------------------------

Starts = dict[str, list[dict[str, float]]]


def _time_starts(kind: str, bundle: Path, sample: str, rounds: int) -> Starts:
    """Start both sides in turn; return the parts of each process's time, milliseconds."""
    sides = {"bare onnxruntime": BARE[kind], "edgetune": EDGETUNE}
    found: Starts = {side: [] for side in sides}
    labels = set()
    for number in range(rounds + 1):
        # who goes first changes, so that neither always follows the other
        for side in sorted(sides, reverse=number % 2 == 1):
            label, parts = _start(sides[side], bundle, sample)
            labels.add(label)
            if number:
                found[side].append(parts)
    if len(labels) != 1:
        quit_unable(f"{bundle}: the two sides answer differently: {', '.join(sorted(labels))}")
    return found


def _start(code: str, bundle: Path, sample: str) -> tuple[str, dict[str, float]]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["ORT_DISABLE_TELEMETRY"] = "1"
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-c", code + REPORT, str(bundle.resolve()), sample],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        quit_unable(f"{bundle}: {done.stderr.strip().splitlines()[-1]}")
    label, started, imported, loaded, answered, peak = json.loads(done.stdout)
    seconds = {
        "total": answered - begin,
        "python": started - begin,
        "import": imported - started,
        "load": loaded - imported,
        "first": answered - loaded,
    }
    return label, {**{part: 1e3 * s for part, s in seconds.items()}, "peak": peak}


def _start_rows(kind: str, found: Starts) -> list[list[str]]:
    return [
        [kind, side, *(f"{statistics.median(p[part] for p in each):.0f}" for part in PARTS)]
        for side, each in found.items()
    ]


def _verdict(kind: str, found: Starts) -> str:
    """Return the ratio of the medians with its bootstrap interval, held against the target."""
    import numpy as np

    ours, bare = (
        np.array([parts["total"] for parts in found[side]])
        for side in ("edgetune", "bare onnxruntime")
    )
    ratio = float(np.median(ours) / np.median(bare))
    rng = np.random.default_rng(0)
    a, b = (np.median(rng.choice(x, (2000, len(x))), axis=1) for x in (ours, bare))
    low, high = np.percentile(a / b, [2.5, 97.5])
    met = "met" if ratio <= TARGET else "MISSED"
    return (
        f"- {kind}: {ratio:.2f} times bare onnxruntime (95 % interval {low:.2f} to {high:.2f}),"
        f" {np.median(ours) - np.median(bare):+.0f} ms; target at most {TARGET:g}: {met}"
    )


# -- calls ---------------------------------------------------------------------------------


class _Instant:
    """Stands in for a session: gives stored outputs at once."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        self.outputs = outputs

    def run(self, names: Sequence[str], feeds: Any, options: Any = None) -> Sequence[Any]:  # noqa: ARG002
        return self.outputs


def _time_calls(kind: str, bundle: Path, sample: str, calls: int) -> list[str]:
    """Return what `print_table` shows of a bundle's calls."""
    model = EdgeModel.load(bundle)
    value = sample if kind == "text" else decode_image(sample)
    feeds = model.task.stack([model.task.encode(value)])
    names = [spec.name for spec in model.manifest.outputs]
    session = model._session  # the very session that predict uses
    bare, predict = _alternate(
        [lambda: session.run(names, feeds), lambda: model.predict(value)], calls
    )
    over = statistics.median(p - b for b, p in zip(bare, predict, strict=True))

    model._session = instant = _Instant(session.run(names, feeds))
    by_hand = _by_hand(kind, bundle, instant)
    ours, theirs = _alternate([lambda: model.predict(value), lambda: by_hand(value)], 4 * calls)
    return [
        f"{1e3 * statistics.median(bare):.3f}",
        f"{1e3 * statistics.median(predict):.3f}",
        f"{1e6 * over:.0f}",
        f"{1e6 * statistics.median(ours):.0f}",
        f"{1e6 * statistics.median(theirs):.0f}",
    ]


def _by_hand(kind: str, bundle: Path, session: Any) -> Callable[[Any], tuple[str, float]]:
    """Return the bare side's code as a function of the raw sample."""
    import numpy as np
    from tokenizers import Tokenizer

    manifest = json.loads((bundle / "manifest.json").read_text())
    tokenizer: Any = None
    if kind == "text":
        tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        tokenizer.enable_truncation(manifest["options"]["max_length"])
        tokenizer.no_padding()

    def answer(value: Any) -> tuple[str, float]:
        if tokenizer is not None:
            ids = np.array([tokenizer.encode(value).ids], np.int64)
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        else:
            feeds = {"image": value[None]}
        logits = session.run(["logits"], feeds)[0][0]
        e = np.exp(logits - logits.max())
        probabilities = e / e.sum()
        best = int(probabilities.argmax())
        return manifest["labels"][best], float(probabilities[best])

    return answer


def _alternate(functions: Sequence[Callable[[], object]], calls: int) -> list[list[float]]:
    """Call the functions in turn, `calls` times each; return their times in seconds."""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(calls + 20):
        for function, store in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            if number >= 20:
                store.append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    main()
