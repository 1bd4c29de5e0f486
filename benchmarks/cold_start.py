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

from _common import (
    last_line,
    optimum_python,
    print_heading,
    print_table,
    quit_unable,
    say,
    warn_if_busy,
    workplace,
)

from edgetune.runtime import EdgeModel
from edgetune.runtime.tasks.image_classification import decode_image

# the bare side's time from start to answer, its peak memory and a call's overhead, at most so much
TARGET, TARGET_MIB, TARGET_US = 1.1, 8, 30
# a peer's time from start to answer, at least so many times edgetune's
PEER_TARGET = 15
SENTENCE = "could you get the lights in the packing hall going"
TEXT = f"""\
From the start of a process to its first answer: medians over fresh processes that take turns,
after one of each that does not count (it compiles modules and fills the page cache, which are warm
from then on). *Python* is the interpreter's own start. What is imported where differs: edgetune
imports tokenizers when it loads and Pillow when it decodes the first image, the bare side both at
its start; so compare *start to answer*, of which the target is at most {TARGET:g} times the bare
side's, with at most {TARGET_MIB} MiB more at the peak. `ORT_DISABLE_TELEMETRY=1` is set and
`PYTHONDONTWRITEBYTECODE` unset on both sides."""
CALLS = f"""\
One sample a call in a warm process, alternating call by call; medians. *overhead* is `predict`
from the raw sample (a sentence, or decoded pixels) less `session.run` on the prepared arrays. The
last columns leave the session out (a stand-in gives the stored outputs at once): what the Python
around it costs, in edgetune and written by hand; target: at most {TARGET_US} us more."""

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
    parser.add_argument("--text-run", type=Path, help="the run that --text-bundle was exported of")
    parser.add_argument("--optimum-venv", type=Path, help="an environment that has optimum-onnx")
    parser.add_argument("--no-peers", action="store_true", help="leave transformers, Optimum out")
    parser.add_argument("--only", choices=BARE, help="one kind instead of both")
    parser.add_argument("--rounds", type=int, default=15, help="processes of each side [15]")
    parser.add_argument("--quick", action="store_true", help="2 rounds; no usable figures")
    given = parser.parse_args()
    rounds, calls = (2, 30) if given.quick else (given.rounds, 500)
    named = {"text": given.text_bundle, "image": given.image_bundle}
    kinds = [given.only] if given.only else list(BARE)
    with workplace(None) as folder:
        runs = {"text": given.text_run, "image": None}
        bundles = {}
        for kind in kinds:
            if named[kind] is None:
                _demo(kind, folder / kind)
                named[kind], runs[kind] = folder / kind / "bundle", folder / kind / "run"
            bundles[kind] = named[kind]
        peers = {}
        if "text" in bundles and runs["text"] is not None and not given.no_peers:
            peers = _peers(runs["text"], given.optimum_venv, folder)
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
        print("\n".join(verdicts) + "\n")
        if peers:
            _print_peers(bundles["text"], peers, samples["text"], max(2, rounds // 3))
        print(f"{CALLS}\n")
        columns = ("session.run ms", "predict ms", "overhead us", "edgetune's Python us", "by hand")
        print_table(("bundle", *columns), overheads)
        for kind, *_, ours, by_hand in overheads:
            more = float(ours) - float(by_hand)
            met = "met" if more <= TARGET_US else "MISSED"
            print(f"- {kind}: {more:+.0f} us a call; target at most +{TARGET_US}: {met}")


# -- what is measured on -------------------------------------------------------------------


def _demo(kind: str, output: Path) -> None:
    task = f"{kind}-classification"
    say(f"edgetune demo --task {task}")
    command = [sys.executable, "-m", "edgetune.cli.main", "demo", "--task", task]
    subprocess.run([*command, "--output", str(output)], check=True, stdout=subprocess.DEVNULL)


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
            label, parts = _start(Path(sys.executable), sides[side], bundle, sample)
            labels.add(label)
            if number:
                found[side].append(parts)
    if len(labels) != 1:
        quit_unable(f"{bundle}: the two sides answer differently: {', '.join(sorted(labels))}")
    return found


def _start(python: Path, code: str, bundle: Path, sample: str) -> tuple[str, dict[str, float]]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    begin = time.monotonic()
    done = subprocess.run(
        [str(python), "-P", "-c", code + REPORT, str(bundle.resolve()), sample],
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
    peak, bare_peak = (
        statistics.median(parts["peak"] for parts in found[side])
        for side in ("edgetune", "bare onnxruntime")
    )
    peak_met = "met" if peak - bare_peak <= TARGET_MIB else "MISSED"
    return (
        f"- {kind}: {ratio:.2f} times bare onnxruntime (95 % interval {low:.2f} to {high:.2f}),"
        f" {np.median(ours) - np.median(bare):+.0f} ms; target at most {TARGET:g}: {met}\n"
        f"- {kind}: {peak - bare_peak:+.1f} MiB at the peak; target at most +{TARGET_MIB}:"
        f" {peak_met}"
    )


# -- peers ---------------------------------------------------------------------------------

PEERS = """\
The same fine-tuned checkpoint and the same sentence: transformers' `pipeline` on the checkpoint
as transformers saves it, and Optimum's `ORTModelForSequenceClassification` in a `pipeline` on the
graph that Optimum exported of it beforehand, each from a local folder, offline, in a fresh
process; they take turns with edgetune. Their CPU threads are as they come."""
PIPELINE = """\
import time
started = time.monotonic()
import json, sys
from transformers import pipeline
imported = time.monotonic()
model = pipeline("text-classification", model=sys.argv[1], device="cpu")
loaded = time.monotonic()
label = model(sys.argv[2])[0]["label"]
"""
ORT_MODEL = """\
import time
started = time.monotonic()
import json, sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline
imported = time.monotonic()
model = ORTModelForSequenceClassification.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = pipeline("text-classification", model=model, tokenizer=tokenizer)
loaded = time.monotonic()
label = model(sys.argv[2])[0]["label"]
"""
OPTIMUM_EXPORT = """\
import sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer
source, target = sys.argv[1:]
ORTModelForSequenceClassification.from_pretrained(source, export=True).save_pretrained(target)
AutoTokenizer.from_pretrained(source).save_pretrained(target)
"""
# name -> (the Python that has it, what it runs, the folder that it loads)
Peers = dict[str, tuple[Path, str, Path]]


def _peers(run_folder: Path, optimum_venv: Path | None, folder: Path) -> Peers:
    """Save a run's checkpoint for transformers, and have Optimum export it."""
    from transformers import AutoTokenizer

    from edgetune.train import open_run

    run = open_run(run_folder)
    checkpoint, exported = folder / "checkpoint", folder / "optimum"
    network: Any = run.task.network
    network.config.id2label = dict(enumerate(run.record.labels))
    network.config.label2id = {label: i for i, label in enumerate(run.record.labels)}
    network.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(run.config.model).save_pretrained(checkpoint)
    peers = {"transformers pipeline": (Path(sys.executable), PIPELINE, checkpoint)}
    python, reason = optimum_python(optimum_venv, folder)
    if python is None:
        say(f"Optimum is left out: {reason}")
        return peers
    command = [str(python), "-c", OPTIMUM_EXPORT, str(checkpoint), str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"Optimum is left out: {last_line(done.stderr)}")
        return peers
    return {**peers, "Optimum ORTModel": (python, ORT_MODEL, exported)}


def _print_peers(bundle: Path, peers: Peers, sample: str, rounds: int) -> None:
    say(f"peers: {rounds} starts of each side")
    sides: Peers = {"edgetune": (Path(sys.executable), EDGETUNE, bundle), **peers}
    found: Starts = {side: [] for side in sides}
    labels = {}
    for number in range(rounds + 1):
        for side in sorted(sides, reverse=number % 2 == 1):
            python, code, path = sides[side]
            labels[side], parts = _start(python, code, path, sample)
            if number:
                found[side].append(parts)
    print(f"{PEERS}\n")
    for side, (python, _, _) in peers.items():
        print(f"- {side}: {_versions_of(python)}; answers {labels[side]}")
    print(f"- edgetune answers {labels['edgetune']}\n")
    columns = ("start to answer ms", "Python ms", "import", "load", "first answer", "peak MiB")
    print_table(("bundle", "side", *columns), _start_rows("text", found))
    ours = statistics.median(parts["total"] for parts in found["edgetune"])
    for side in peers:
        ratio = statistics.median(parts["total"] for parts in found[side]) / ours
        met = "met" if ratio >= PEER_TARGET else "MISSED"
        print(
            f"- edgetune starts {ratio:.1f} times as quickly as {side}; target at least"
            f" {PEER_TARGET}: {met}"
        )
    print(flush=True)


def _versions_of(python: Path) -> str:
    code = (
        "from importlib.metadata import PackageNotFoundError, version\n"
        "for name in ('transformers', 'torch', 'optimum-onnx', 'onnxruntime'):\n"
        "    try: print(name, version(name), end='; ')\n"
        "    except PackageNotFoundError: pass"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.rstrip("; ").replace("; ", ", ")


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
