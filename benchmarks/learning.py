"""How well does a device learn? New classes, few shots and bad streams, on frozen real backbones.

    python benchmarks/learning.py                          all parts, trains and exports first
    python benchmarks/learning.py --work FOLDER --part intents
    python benchmarks/learning.py --quick                  a few samples: shows that it works

Parts: increments (CIFAR-10 in five tasks), image-streams and text-streams (wrong and odd samples),
intents (Banking77, 17 of 77 intents come later), image-shots and text-shots (1, 5 and 10 samples of
a class). Runs, bundles and features stay in --work, so that a second call trains and exports
nothing. Progress goes to stderr, Markdown to stdout. No time is measured.
"""

import argparse
import csv
import gzip
import hashlib
import math
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import numpy.typing as npt
from _common import (
    BANKING77,
    CIFAR10,
    MOBILENET_V2,
    SHARED,
    percent,
    points,
    print_heading,
    print_table,
    say,
    shared_data,
    text_model,
    workplace,
)
from PIL import Image

from edgetune.config import TrainConfig
from edgetune.export.bundle import export
from edgetune.runtime.learn.guard import Rules
from edgetune.runtime.learn.guarded import default_rules
from edgetune.runtime.learn.learner import Learner, head_rules
from edgetune.runtime.learn.material import read_material
from edgetune.runtime.learn.outliers import FloodRules
from edgetune.runtime.model import EdgeModel
from edgetune.train import train

Rng = np.random.Generator
Floats = npt.NDArray[np.float64]
Labelled = tuple[list[Any], list[str]]

# what the exporter may not be able to show on samples so few, or on a machine so busy
ALLOW = ("accuracy", "samples", "speed", "latency", "memory", "size")
# a guard that lets everything pass: what the method itself does
NO_RULES = Rules(margin=1.0, factory_margin=1.0, class_floor=1.0, slack=10**6)
# what a person allows who knows that more classes to choose from cost the old ones
WIDE_RULES = Rules(margin=0.1, factory_margin=0.2)
IMAGE_SIZE = 96
WIDTH = 2048
TASKS = 5
LATER_IMAGES = ("cat", "horse", "ship")
INTENTS_AT_FIRST = 60
PORTIONS = 4
SHOTS = (1, 5, 10)
# (what it looks like, what it is said to be)
POISON_IMAGES = ("deer", "dog")
DRIFT_NOISE, DRIFT_BRIGHTNESS, DRIFT_TYPOS = 8.0, 0.7, 0.1


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is done. Samples are of a class."""

    train: int
    val: int
    given: int
    intents: tuple[int, int, int]
    epochs: int
    seeds: int
    draws: int
    stream: int
    portion: int


FULL = Effort(
    train=200, val=80, given=200, intents=(36, 10, 40), epochs=4, seeds=3, draws=2, stream=200,
    portion=100,
)  # fmt: skip
QUICK = Effort(
    train=24, val=30, given=20, intents=(10, 5, 10), epochs=1, seeds=1, draws=1, stream=40,
    portion=20,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Samples by label: what the factory has, what the device is given, and what judges."""

    train: Mapping[str, Sequence[Any]]
    val: Mapping[str, Sequence[Any]]
    device: Mapping[str, Sequence[Any]]
    test: Mapping[str, Sequence[Any]]


def main() -> None:
    """Run the parts and print a section for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--shared", type=Path, default=SHARED, help=f"shared data [{SHARED}]")
    parser.add_argument("--work", type=Path, help="folder for runs, bundles, features; they stay")
    parser.add_argument("--quick", action="store_true", help="a few samples; no usable figures")
    given = parser.parse_args()
    data = shared_data(given.shared, CIFAR10[0], MOBILENET_V2, *BANKING77)
    effort = QUICK if given.quick else FULL
    with workplace(given.work, may_exist=True) as work:
        folder = work / ("quick" if given.quick else "full")
        folder.mkdir(exist_ok=True)
        print_heading("Learning on the device", TEXT)
        for part in given.part or PARTS:
            PARTS[part](folder, data, effort)


# -- data ----------------------------------------------------------------------------------


def images(data: Path, effort: Effort, factory: Sequence[str] | None) -> Pool:
    """Return CIFAR-10; the device is given none of the factory's own samples."""
    with np.load(data / CIFAR10[0]) as stored:
        names = [str(name) for name in stored["classes"]]
        rows = {split: _by_class(stored, split, names) for split in ("train", "test")}
    known = names[: len(names) // TASKS] if factory is None else factory
    used = effort.train + effort.val
    return Pool(
        train={n: rows["train"][n][: effort.train] for n in known},
        val={n: rows["train"][n][effort.train : used] for n in known},
        device={n: rows["train"][n][used : used + effort.given] for n in names},
        test={n: rows["test"][n] for n in names},
    )


def _by_class(stored: Any, split: str, names: Sequence[str]) -> dict[str, list[Any]]:
    pixels, classes = stored[f"x_{split}"], stored[f"y_{split}"]
    return {name: list(pixels[classes == c]) for c, name in enumerate(names)}


def texts(data: Path, effort: Effort) -> Pool:
    """Return Banking77, of which the factory has `INTENTS_AT_FIRST` intents."""
    rows = {"train": _texts_by_class(data / BANKING77[0])}
    rows["test"] = _texts_by_class(data / BANKING77[1])
    names = [sorted(rows["test"])[i] for i in np.random.default_rng(0).permutation(77)]
    known, (own, val, given) = names[:INTENTS_AT_FIRST], effort.intents
    # an intent has 35 to 187 sentences; the factory leaves some for the device
    device = {n: rows["train"][n][own + val :][:given] for n in known}
    device |= {n: rows["train"][n][:given] for n in names[INTENTS_AT_FIRST:]}
    return Pool(
        train={n: rows["train"][n][: min(own, len(rows["train"][n]) - val)] for n in known},
        val={n: rows["train"][n][min(own, len(rows["train"][n]) - val) :][:val] for n in known},
        device=device,
        test={n: rows["test"][n] for n in names},
    )


def _texts_by_class(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for text, label in list(csv.reader(file))[1:]:
            found.setdefault(label, []).append(text.strip())
    return {label: list(dict.fromkeys(rows)) for label, rows in found.items()}


def joined(samples: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> Labelled:
    """Return the samples of some labels one after the other, and a label for each."""
    rows = [(sample, label) for label in labels for sample in samples[label]]
    return [sample for sample, _ in rows], [label for _, label in rows]


def shuffled(given: Labelled, rng: Rng) -> Labelled:
    """Return them in another order."""
    order = rng.permutation(len(given[1]))
    return [given[0][i] for i in order], [given[1][i] for i in order]


# -- factory -------------------------------------------------------------------------------


def image_bundle(
    folder: Path,
    name: str,
    data: Path,
    pool: Pool,
    effort: Effort,
    learn: str,
    *,
    projection: int | None = None,
) -> Path:
    """Return a bundle of MobileNetV2 whose head was trained on the pool's training samples."""
    source = folder / name / "data"
    if not source.exists():
        for split, samples in (("train", pool.train), ("val", pool.val)):
            for label, rows in samples.items():
                (source / split / label).mkdir(parents=True)
                for i, pixels in enumerate(rows):
                    Image.fromarray(pixels).save(source / split / label / f"{i:04d}.png")
    config = TrainConfig(
        task="image-classification",
        model=str(data / MOBILENET_V2),
        data=str(source),
        output=str(folder / name / "run"),
        image_size=IMAGE_SIZE,
        augment="none",
        method="head",
        lr=3e-3,
        epochs=effort.epochs,
        allow=("duplicates",),
    )
    return _bundle(config, learn, projection)


def text_bundle(folder: Path, pool: Pool, effort: Effort, learn: str) -> Path:
    """Return a bundle of MiniLM whose head was trained on the pool's training samples."""
    source = folder / "intents" / "data"
    if not source.exists():
        source.mkdir(parents=True)
        for split, samples in (("train", pool.train), ("val", pool.val)):
            with (source / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
                rows = [(text, label) for label, own in samples.items() for text in own]
                csv.writer(file).writerows([("text", "label"), *rows])
    config = TrainConfig(
        task="text-classification",
        model=text_model(),
        data=str(source / "train.csv"),
        val=str(source / "val.csv"),
        output=str(folder / "intents" / "run"),
        max_length=64,
        method="head",
        lr=2e-2,
        epochs=2 * effort.epochs,
    )
    return _bundle(config, learn)


def _bundle(config: TrainConfig, learn: str, projection: int | None = None) -> Path:
    run = Path(config.output)
    bundle = run.with_name(f"bundle-{learn.replace(':', '-')}-{projection or 'plain'}")
    if not bundle.exists():
        if not (run / "run.json").is_file():
            say(f"training {run.parent.name}")
            train(config)
        say(f"exporting {bundle.parent.name}, learn {learn}")
        export(
            run,
            output=bundle,
            precision="fp32",
            allow=ALLOW,
            learn=learn,
            learn_projection=projection,
        )
    return bundle


class Remembering(EdgeModel):
    """A model that computes the outputs of a sample once."""

    seen: dict[bytes, dict[str, Any]]
    kept: Path

    def outputs(self, sample: Any) -> dict[str, Any]:
        """Return the graph's features and logits for one raw sample."""
        key = _key(sample)
        if key not in self.seen:
            found = super().outputs(sample)
            self.seen[key] = {name: found[name] for name in ("features", "logits")}
        return self.seen[key]


@contextmanager
def remembering(bundle: Path) -> Iterator[Remembering]:
    """Yield a model that takes up what it has seen before, and keeps it beside the bundle."""
    with Remembering.load(bundle, threads=1) as model:
        digest = model.manifest.digest.rpartition(":")[2][:12]
        model.seen, model.kept = {}, bundle.with_name(f"{bundle.name}-{digest}.features.npz")
        if model.kept.exists():
            with np.load(model.kept) as stored:
                arrays = {name: stored[name] for name in ("keys", "features", "logits")}
            model.seen = {
                bytes(key): {"features": features[None], "logits": logits[None]}
                for key, features, logits in zip(*arrays.values(), strict=True)
            }
        try:
            yield model
        finally:
            outputs = list(model.seen.values())
            np.savez(
                model.kept,
                keys=np.array([np.frombuffer(key, np.uint8) for key in model.seen]),
                features=np.concatenate([o["features"] for o in outputs]),
                logits=np.concatenate([o["logits"] for o in outputs]),
            )


def _key(sample: Any) -> bytes:
    raw = sample.encode() if isinstance(sample, str) else np.ascontiguousarray(sample).tobytes()
    return hashlib.sha256(raw).digest()[:16]


# -- answers -------------------------------------------------------------------------------


def answers(model: EdgeModel, samples: Sequence[Any]) -> list[str]:
    """Return what the model answers now; a head's answers are worked out from kept features."""
    state = model.state
    if state is not None and state.tensors:
        return [result.label for result in model.predict(list(samples))]
    outputs = [model.outputs(sample) for sample in samples]
    if state is None:
        logits = np.concatenate([found["logits"] for found in outputs])
    else:
        logits = state.head_logits(np.concatenate([found["features"] for found in outputs]))
    return [model.labels[i] for i in logits.argmax(axis=1)]


def accuracy(model: EdgeModel, given: Labelled) -> float:
    """Return the share of right answers."""
    return _share(answers(model, given[0]), given[1])


def features_of(model: EdgeModel, samples: Sequence[Any]) -> Floats:
    """Return features, (n, d)."""
    rows = [model.outputs(sample)["features"] for sample in samples]
    return np.concatenate(rows).astype(np.float64)


def _share(found: Sequence[str], truth: Sequence[str]) -> float:
    return statistics.fmean(a == b for a, b in zip(found, truth, strict=True))


# -- contenders ----------------------------------------------------------------------------


class Contender:
    """Takes portions of samples in, and answers; refused counts portions that a guard dropped."""

    refused = 0
    commits = 0
    first_reason = ""

    def teach(self, given: Labelled) -> None:
        """Learn one portion."""
        raise NotImplementedError

    def answer(self, samples: Sequence[Any]) -> list[str]:
        """Return a label for each sample."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what it holds."""


class Device(Contender):
    """What the device does: a learner or a trainer, with its guard."""

    def __init__(self, model: EdgeModel, guarded: Any, fit: Mapping[str, Any]) -> None:
        """Take an open learner or trainer."""
        self.model, self.guarded, self.fit = model, guarded, fit
        self.aside: list[bool] = []

    def teach(self, given: Labelled) -> None:
        """Give a portion and commit it."""
        if isinstance(self.guarded, Learner):
            added = self.guarded.add(*given)
            places = {one.place for one in added.aside}
            self.aside += [i in places for i in range(len(given[1]))]
            if not added.learned and not added.held_out:
                return
        else:
            self.guarded.fit(*given, **self.fit)
        receipt = self.guarded.commit()
        self.commits += 1
        if not receipt.accepted:
            self.refused += 1
            self.first_reason = self.first_reason or receipt.reasons[0]

    def answer(self, samples: Sequence[Any]) -> list[str]:
        """Return what the live state answers."""
        return answers(self.model, samples)

    def close(self) -> None:
        """Close the store, and let the model answer as it came."""
        self.guarded.close()
        self.model.use(None)


def learner(model: EdgeModel, store: Path, **options: Any) -> Device:
    """Return tier 0, on a new store."""
    shutil.rmtree(store, ignore_errors=True)
    return Device(model, model.learner(store, **options), {})


def trainer(model: EdgeModel, store: Path, *, fit: Mapping[str, Any], **options: Any) -> Device:
    """Return tier 1, on a new store."""
    shutil.rmtree(store, ignore_errors=True)
    return Device(model, model.trainer(store, threads=1, **options), fit)


class Linear(Contender):
    """What keeps features, labels or a head in numpy; `model` only looks at samples."""

    def __init__(self, model: EdgeModel, factory: Labelled) -> None:
        """Take the factory's samples in."""
        self.model = model
        self.labels: list[str] = []
        self.begin(factory)

    def begin(self, factory: Labelled) -> None:
        """Learn the factory's samples."""
        self.teach(factory)

    def places(self, labels: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return classes of labels; a new one gets the next."""
        self.labels += [n for n in dict.fromkeys(labels) if n not in self.labels]
        return np.array([self.labels.index(n) for n in labels])

    def scores(self, features: Floats) -> Floats:
        """Return scores, (n, classes)."""
        raise NotImplementedError

    def answer(self, samples: Sequence[Any]) -> list[str]:
        """Return the labels of the highest scores."""
        found = self.scores(features_of(self.model, samples)).argmax(axis=1)
        return [self.labels[i] for i in found]


class NearestMean(Linear):
    """The class whose mean feature has the smallest angle with the sample's."""

    def begin(self, factory: Labelled) -> None:
        """Start with no sums."""
        self.sums: dict[int, Floats] = {}
        self.teach(factory)

    def teach(self, given: Labelled) -> None:
        """Add features to their class's sum."""
        features = _unit(features_of(self.model, given[0]))
        for c, row in zip(self.places(given[1]).tolist(), features, strict=True):
            self.sums[c] = self.sums.get(c, 0) + row

    def scores(self, features: Floats) -> Floats:
        """Return cosines."""
        return _unit(features) @ _unit(np.stack([self.sums[c] for c in sorted(self.sums)])).T


class Joint(Linear):
    """Logistic regression on all samples so far: it keeps every one, and starts anew each time."""

    def begin(self, factory: Labelled) -> None:
        """Keep the factory's samples."""
        self.kept: list[Labelled] = []
        self.teach(factory)

    def teach(self, given: Labelled) -> None:
        """Keep the samples; fit when asked."""
        self.kept.append(given)
        self.fitted: Any = None
        self.places(given[1])

    def scores(self, features: Floats) -> Floats:
        """Fit where that has not been done, and return the log odds."""
        if self.fitted is None:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler

            rows = np.concatenate([features_of(self.model, given[0]) for given in self.kept])
            classes = np.concatenate([self.places(given[1]) for given in self.kept])
            # penalty 100 / C: features in hundreds, as many samples, and standardised
            regression = LogisticRegression(C=0.01, max_iter=300)
            self.fitted = make_pipeline(StandardScaler(), regression).fit(rows, classes)
        found = self.fitted.decision_function(features)
        return np.stack([-found, found], axis=1) if found.ndim == 1 else found


class Naive(Linear):
    """A softmax head that goes on by SGD with momentum on the new samples only."""

    EPOCHS, BATCH, RATE = 10, 16, 0.3

    def begin(self, factory: Labelled) -> None:
        """Start from zero, standardised by the factory's samples."""
        features = features_of(self.model, factory[0])
        self.mean, self.deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
        self.weights = np.zeros((features.shape[1] + 1, 0))
        self.rng = np.random.default_rng(0)
        self.teach(factory)

    def teach(self, given: Labelled) -> None:
        """Descend."""
        rows, classes = self._rows(features_of(self.model, given[0])), self.places(given[1])
        grown = np.zeros((len(self.weights), len(self.labels)))
        grown[:, : self.weights.shape[1]] = self.weights
        self.weights, speed = grown, np.zeros_like(grown)
        for _ in range(self.EPOCHS):
            order = self.rng.permutation(len(rows))
            for start in range(0, len(rows), self.BATCH):
                part = order[start : start + self.BATCH]
                scores = rows[part] @ self.weights
                shares = np.exp(scores - scores.max(axis=1, keepdims=True))
                shares /= shares.sum(axis=1, keepdims=True)
                shares[np.arange(len(part)), classes[part]] -= 1
                speed = 0.9 * speed - self.RATE * rows[part].T @ shares / len(part)
                self.weights = self.weights + speed

    def scores(self, features: Floats) -> Floats:
        """Return logits."""
        return self._rows(features) @ self.weights

    def _rows(self, features: Floats) -> Floats:
        scaled = (features - self.mean) / self.deviation / math.sqrt(features.shape[1])
        return np.concatenate([scaled, np.ones((len(features), 1))], axis=1)


def _unit(rows: Floats) -> Floats:
    found: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


# -- increments: five tasks of two classes -------------------------------------------------


def increments(folder: Path, data: Path, effort: Effort) -> None:
    """Teach CIFAR-10 two classes at a time, with all labels to choose from."""
    pool = images(data, effort, None)
    names = list(pool.test)
    tasks = [names[i : i + 2] for i in range(0, len(names), len(names) // TASKS)]
    head, last = (
        image_bundle(folder, "increments", data, pool, effort, learn)
        for learn in ("head", "last:1")
    )
    projected = image_bundle(
        folder, "increments", data, pool, effort, "statistics", projection=WIDTH
    )
    factory, stores = joined(pool.train, tasks[0]), folder / "increments"
    with (
        remembering(head) as model,
        remembering(projected) as wide,
        EdgeModel.load(last, threads=1) as deep,
    ):
        wide.seen = model.seen
        rules, by_steps = _rules_of(model)
        canary = len(read_material(model.bundle).canary_classes)

        def open_trainer(model: EdgeModel, name: str, **options: Any) -> Device:
            fit = options.pop("fit", {})
            return trainer(model, stores / name, fit=fit, **options)

        makers: dict[tuple[str, str], Callable[[], Contender]] = {
            ("tier 0", "off"): lambda: learner(model, stores / "s0", rules=NO_RULES),
            ("tier 0", "on"): lambda: learner(model, stores / "s1"),
            ("tier 0", "wide"): lambda: learner(model, stores / "s7", rules=WIDE_RULES),
            (f"tier 0, projected to {WIDTH}", "off"): lambda: learner(
                wide, stores / "s2", rules=NO_RULES
            ),
            ("tier 1, head, rehearsal", "off"): lambda: open_trainer(model, "s3", rules=NO_RULES),
            ("tier 1, head, rehearsal", "on"): lambda: open_trainer(model, "s4"),
            ("tier 1, last:1, rehearsal", "off"): lambda: open_trainer(deep, "s5", rules=NO_RULES),
            ("tier 1, head, no rehearsal", "off"): lambda: open_trainer(
                model, "s6", rules=NO_RULES, fit={"rehearsal": 0.0}, replay_bytes=0
            ),
            ("nearest class mean", "-"): lambda: NearestMean(model, factory),
            ("softmax head, SGD on the new task", "-"): lambda: Naive(model, factory),
            ("joint: logistic regression, keeps all", "-"): lambda: Joint(model, factory),
        }
        rows, notes = [], []
        for (name, guard), make in makers.items():
            say(f"increments: {name}, guard {guard}")
            contender = make()
            found = _task_matrix(contender, pool, tasks)
            refused = f"{contender.refused} of {len(tasks) - 1}" if guard in ("on", "wide") else "-"
            rows.append([name, guard, *_continual(found), refused])
            if contender.first_reason:
                notes.append(f"- {name}, first refusal: {contender.first_reason}")
            contender.close()
    width = wide.manifest.outputs[1].shape[-1]
    print(f"### Class-incremental CIFAR-10, MobileNetV2 ({IMAGE_SIZE} px), fp32\n")
    print(
        f"- factory: {' and '.join(tasks[0])}, {effort.train} samples each, head only; the other"
        f" {len(tasks) - 1} tasks of 2 classes come on the device, {effort.given} samples a class"
        f" at once, each committed before the next comes; {width} features\n"
        f"- {sum(map(len, pool.test.values()))} test images, whose answer may be any class known"
        f" so far: the 95 % interval of a single accuracy is about +-4 points\n"
        f"- the guard at its defaults with this canary of {canary} samples: {_margins(rules)} for"
        f" tier 0, {_margins(by_steps)} for tier 1\n"
    )
    columns = (
        "method", "guard", "accuracy after last %", "mean over tasks %", "forgetting", "backward",
        "refused",
    )  # fmt: skip
    print_table(columns, rows)
    print("\n".join(notes) + "\n" if notes else "", flush=True)


def _rules_of(model: EdgeModel) -> tuple[Rules, Rules]:
    """Return the rules that a learner and a trainer of this bundle have by default."""
    material = read_material(model.bundle)
    return head_rules(material), default_rules(material)


def _margins(rules: Rules) -> str:
    margins = f"{100 * rules.margin:.1f} points a commit, {100 * rules.factory_margin:.1f}"
    return f"{margins} against the factory"


def _task_matrix(contender: Contender, pool: Pool, tasks: Sequence[Sequence[str]]) -> Floats:
    """Return the accuracy on each task after each, (tasks, tasks), NaN before it came."""
    found = np.full((len(tasks), len(tasks)), np.nan)
    for now, task in enumerate(tasks):
        if now:
            given = joined(pool.device, task)
            contender.teach(shuffled(given, np.random.default_rng(now)))
        for then in range(now + 1):
            samples, truth = joined(pool.test, tasks[then])
            found[now, then] = _share(contender.answer(samples), truth)
    return found


def _continual(found: Floats) -> list[str]:
    """Return accuracy after the last task, over all, forgetting and backward transfer.

    Chaudhry et al. 2018 (arXiv:1801.10112), eq. 2 and 3; Lopez-Paz and Ranzato 2017
    (arXiv:1706.08840), eq. 2 and 3.
    """
    last = len(found) - 1
    after = [float(np.nanmean(row)) for row in found]
    forgetting = statistics.fmean(
        float(np.nanmax(found[:last, i]) - found[last, i]) for i in range(last)
    )
    backward = statistics.fmean(float(found[last, i] - found[i, i]) for i in range(last))
    return [
        percent(after[-1]), percent(statistics.fmean(after)), percent(forgetting),
        points(backward),
    ]  # fmt: skip


# -- streams: wrong and odd samples --------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Samples as they come in: (raw, label), and which are wrong.

    test: of the same kind, where it is of another than the factory's.
    """

    samples: list[Any]
    labels: list[str]
    wrong: list[bool]
    test: Labelled | None = None


def image_streams(folder: Path, data: Path, effort: Effort) -> None:
    """Let bad images in, with and without guard and screen."""
    pool = seven_classes(data, effort)
    with remembering(image_bundle(folder, "images", data, pool, effort, "statistics")) as model:
        title = f"CIFAR-10, {len(model.labels)} classes, MobileNetV2 ({IMAGE_SIZE} px)"
        _run_streams(title, model, pool, POISON_IMAGES, _shift_image, effort, folder / "images")


def text_streams(folder: Path, data: Path, effort: Effort) -> None:
    """Let bad texts in, with and without guard and screen."""
    pool = texts(data, effort)
    with remembering(text_bundle(folder, pool, effort, "head")) as model:
        title = f"Banking77, {len(model.labels)} intents, MiniLM-L6"
        poison = _unlike(model, pool)
        _run_streams(title, model, pool, poison, _shift_text, effort, folder / "intents")


def seven_classes(data: Path, effort: Effort) -> Pool:
    """Return CIFAR-10 with a factory that lacks `LATER_IMAGES`."""
    names = [n for n in images(data, effort, None).test if n not in LATER_IMAGES]
    return images(data, effort, names)


def _unlike(model: EdgeModel, pool: Pool) -> tuple[str, str]:
    """Return two intents with the most samples on the device that are far apart."""
    most = sorted(model.labels, key=lambda n: -len(pool.device[n]))[:8]
    means = _unit(np.stack([features_of(model, pool.device[n]).mean(axis=0) for n in most]))
    one, other = np.unravel_index((means @ means.T).argmin(), (len(most), len(most)))
    return most[int(one)], most[int(other)]


def _shift_image(pixels: Any, rng: Rng) -> Any:
    """Return it darker and noisier."""
    moved = pixels * DRIFT_BRIGHTNESS + rng.normal(0, DRIFT_NOISE, pixels.shape)
    return np.clip(np.round(moved), 0, 255).astype(np.uint8)


def _shift_text(text: str, rng: Rng) -> str:
    """Drop, double or replace letters, each as often."""
    letters = []
    for letter in text:
        if not letter.isalpha() or rng.random() >= DRIFT_TYPOS:
            letters.append(letter)
        else:
            other = chr(ord("a") + int(rng.integers(26)))
            letters.append(("", 2 * letter, other)[int(rng.integers(3))])
    return "".join(letters)


def _streams(
    model: EdgeModel,
    pool: Pool,
    poison: tuple[str, str],
    shift: Callable[[Any, Rng], Any],
    effort: Effort,
    rng: Rng,
) -> Iterator[tuple[str, Stream]]:
    known = list(model.labels)
    samples, labels = shuffled(joined(pool.device, known), rng)
    samples, labels = samples[: effort.stream], labels[: effort.stream]
    right = [False] * len(labels)
    yield "nothing wrong", Stream(samples=samples, labels=labels, wrong=right)
    wrong = (rng.random(len(labels)) < 0.2).tolist()
    others = [[n for n in known if n != label][rng.integers(len(known) - 1)] for label in labels]
    flipped = [b if w else a for a, b, w in zip(labels, others, wrong, strict=True)]
    yield "20 % of labels flipped", Stream(samples=samples, labels=flipped, wrong=wrong)
    looks, claimed = poison
    taken = list(pool.device[looks])
    taken = [taken[i] for i in rng.permutation(len(taken))][: effort.stream]
    bad = [True] * len(taken)
    yield (
        f"only {_short(looks)}, labelled {_short(claimed)}",
        Stream(samples=taken, labels=[claimed] * len(taken), wrong=bad),
    )
    yield (
        f"only {_short(looks)}, labelled as a new class",
        Stream(samples=taken, labels=["novelty"] * len(taken), wrong=bad),
    )
    keep = rng.permutation(len(labels))[: len(labels) // 2]
    mixed = shuffled(
        ([samples[i] for i in keep] + taken, [labels[i] for i in keep] + [claimed] * len(taken)),
        np.random.default_rng(0),
    )
    mixed_wrong = shuffled(
        ([False] * len(keep) + bad, [""] * (len(keep) + len(taken))), np.random.default_rng(0)
    )[0]
    yield (
        "the same among as many right ones",
        Stream(samples=mixed[0], labels=mixed[1], wrong=mixed_wrong),
    )
    yield (
        f"a flood of {_short(looks)}, rightly labelled",
        Stream(samples=taken, labels=[looks] * len(taken), wrong=[False] * len(taken)),
    )
    test, truth = joined(pool.test, known)
    yield (
        "drifted inputs, rightly labelled",
        Stream(
            samples=[shift(x, rng) for x in samples], labels=labels, wrong=right,
            test=([shift(x, np.random.default_rng(1)) for x in test], truth),
        ),
    )  # fmt: skip


def _run_streams(
    title: str,
    model: Remembering,
    pool: Pool,
    poison: tuple[str, str],
    shift: Callable[[Any, Rng], Any],
    effort: Effort,
    stores: Path,
) -> None:
    clean = joined(pool.test, list(model.labels))
    material = read_material(model.bundle)
    rules, canary = head_rules(material), len(material.canary_classes)
    options: dict[str, dict[str, Any]] = {
        "off": {"rules": NO_RULES, "screen": False},
        "guard": {"screen": False},
        "guard, screen": {},
        "guard, screen, flood": {"flood": FloodRules()},
    }
    before = accuracy(model, clean)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in range(effort.draws):
        made = _streams(model, pool, poison, shift, effort, np.random.default_rng(seed))
        for name, stream in made:
            say(f"streams: {title}, {name}, seed {seed}")
            for way, settings in options.items():
                device = learner(model, stores / "stream", **settings)
                lived = _live_through(device, stream, clean, effort)
                found.setdefault((name, way), []).append(lived)
                device.close()
    print(f"### Bad streams: {title}, fp32\n")
    print(
        f"- factory {percent(before)} % on {len(clean[1]):,} clean test samples that neither it nor"
        f" the device has seen; {effort.draws} draws of each stream, of up to {effort.stream}"
        f" samples, committed by {effort.portion};"
        " counts are of all draws together\n"
        f"- canary of {canary} samples; margin {100 * rules.margin:.1f} points a commit,"
        f" {100 * rules.factory_margin:.1f} against the factory state\n"
        f"- *worst*: lowest accuracy on the clean test samples after any commit of any draw, less"
        f" the factory's; the promise is that it is no lower than"
        f" -{100 * rules.factory_margin:.1f} points\n"
    )
    rows = []
    for (name, way), runs in found.items():
        mean = {k: statistics.fmean(run[k] for run in runs) for k in ("clean", "own", "own before")}
        total = {k: round(sum(run[k] for run in runs)) for k in runs[0]}
        worst = min(run["worst"] for run in runs) - before
        kept = worst >= -rules.factory_margin
        drifted = f"{percent(mean['own before'])} -> {percent(mean['own'])}"
        rows.append(
            [
                name, way, percent(mean["clean"]), points(worst),
                "-" if way == "off" else "met" if kept else "missed",
                _of(total["wrong aside"], total["wrong"]),
                _of(total["right aside"], total["right"]),
                _of(total["refused"], total["commits"]), drifted if mean["own"] >= 0 else "-",
            ]
        )  # fmt: skip
    columns = (
        "stream", "protection", "accuracy %", "worst", "promise", "wrong set aside",
        "right set aside", "commits refused", "on drifted inputs %",
    )  # fmt: skip
    print_table(columns, rows)


def _live_through(
    device: Device, stream: Stream, clean: Labelled, effort: Effort
) -> dict[str, float]:
    own = -1.0 if stream.test is None else accuracy(device.model, stream.test)
    worst = accuracy(device.model, clean)
    for start in range(0, len(stream.labels), effort.portion):
        part = slice(start, start + effort.portion)
        device.teach((stream.samples[part], stream.labels[part]))
        worst = min(worst, accuracy(device.model, clean))
    aside = [a and w for a, w in zip(device.aside, stream.wrong, strict=True)]
    return {
        "clean": accuracy(device.model, clean),
        "worst": worst,
        "own before": own,
        "own": -1.0 if stream.test is None else accuracy(device.model, stream.test),
        "wrong": sum(stream.wrong),
        "wrong aside": sum(aside),
        "right": len(stream.wrong) - sum(stream.wrong),
        "right aside": sum(device.aside) - sum(aside),
        "refused": device.refused,
        "commits": device.commits,
    }


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole}" if whole else "-"


def _short(label: str) -> str:
    return label if len(label) <= 24 else f"{label[:22]}.."


# -- intents: 17 of 77 come later ----------------------------------------------------------


def intents(folder: Path, data: Path, effort: Effort) -> None:
    """Teach new intents in portions."""
    pool = texts(data, effort)
    head, lora = (text_bundle(folder, pool, effort, learn) for learn in ("head", "lora:1"))
    stores = folder / "intents"
    with remembering(head) as model, EdgeModel.load(lora, threads=1) as deep:
        old = list(model.labels)
        new = [n for n in pool.test if n not in old]
        factory, (rules, by_steps) = joined(pool.train, old), _rules_of(model)
        makers: dict[tuple[str, str], Callable[[], Contender]] = {
            ("tier 0", "on"): lambda: learner(model, stores / "s0"),
            ("tier 0", "wide"): lambda: learner(model, stores / "s5", rules=WIDE_RULES),
            ("tier 0", "off"): lambda: learner(model, stores / "s1", rules=NO_RULES),
            ("tier 1, head", "on"): lambda: trainer(model, stores / "s2", fit={}),
            ("tier 1, head", "off"): lambda: trainer(model, stores / "s3", fit={}, rules=NO_RULES),
            ("tier 1, lora:1", "on"): lambda: trainer(deep, stores / "s4", fit={}),
            ("nearest class mean", "-"): lambda: NearestMean(model, factory),
            ("softmax head, SGD on the new ones", "-"): lambda: Naive(model, factory),
            ("joint: logistic regression, keeps all", "-"): lambda: Joint(model, factory),
        }
        before = accuracy(model, joined(pool.test, old))
        parts = [list(part) for part in np.array_split(new, PORTIONS)]
        rows, notes = [], []
        for (name, guard), make in makers.items():
            say(f"intents: {name}, guard {guard}")
            contender, cells = make(), []
            samples, truth = joined(pool.test, old)
            first = before
            if isinstance(contender, Linear):
                first = _share(contender.answer(samples), truth)
            for i, part in enumerate(parts):
                given = joined(pool.device, part)
                contender.teach(shuffled(given, np.random.default_rng(i)))
            samples, truth = joined(pool.test, [*old, *new])
            right = [a == b for a, b in zip(contender.answer(samples), truth, strict=True)]
            for labels in (old, new, [*old, *new]):
                own = [r for r, label in zip(right, truth, strict=True) if label in labels]
                cells.append(statistics.fmean(own))
            refused = f"{contender.refused} of {len(parts)}" if guard in ("on", "wide") else "-"
            rows.append([name, guard, percent(first), *(percent(cell) for cell in cells), refused])
            if contender.first_reason:
                notes.append(f"- {name}, first refusal: {contender.first_reason}")
            contender.close()
    print("### New intents: Banking77, MiniLM-L6, fp32\n")
    print(
        f"- factory: {len(old)} intents, {effort.intents[0]} sentences each, head only,"
        f" {percent(before)} % on its own {sum(len(pool.test[n]) for n in old):,} test sentences;"
        f" {len(new)} intents come on the device in {len(parts)} portions, up to"
        f" {effort.intents[2]} sentences each;"
        f" {sum(len(pool.test[n]) for n in new)} test sentences of theirs\n"
        f"- *old before* is the method's own before anything new came; answers may be any label"
        f" known then\n"
        f"- the guard at its defaults: {_margins(rules)} for tier 0, {_margins(by_steps)} for"
        " tier 1, head\n"
    )
    columns = (
        "method", "guard", "old before %", "old after %", "new %", "all %", "refused",
    )  # fmt: skip
    print_table(columns, rows)
    print("\n".join(notes) + "\n" if notes else "", flush=True)


# -- shots: few samples of one class -------------------------------------------------------


def image_shots(folder: Path, data: Path, effort: Effort) -> None:
    """Teach a class of images with 1, 5 and 10 samples."""
    pool = seven_classes(data, effort)
    with remembering(image_bundle(folder, "images", data, pool, effort, "statistics")) as model:
        title = f"CIFAR-10, {len(model.labels)} classes and one more, MobileNetV2 ({IMAGE_SIZE} px)"
        _run_shots(title, model, pool, effort, folder / "images")


def text_shots(folder: Path, data: Path, effort: Effort) -> None:
    """Teach an intent with 1, 5 and 10 sentences."""
    pool = texts(data, effort)
    with remembering(text_bundle(folder, pool, effort, "head")) as model:
        title = f"Banking77, {len(model.labels)} intents and one more, MiniLM-L6"
        _run_shots(title, model, pool, effort, folder / "intents")


def _run_shots(title: str, model: Remembering, pool: Pool, effort: Effort, stores: Path) -> None:
    old = list(model.labels)
    new = [n for n in pool.test if n not in old][: 2 * effort.seeds]
    factory, tested = joined(pool.train, old), joined(pool.test, old)
    before = accuracy(model, tested)
    makers: dict[str, Callable[[], Contender]] = {
        "tier 0, guard on": lambda: learner(model, stores / "shots"),
        "tier 0, guard off": lambda: learner(model, stores / "shots", rules=NO_RULES),
        "nearest class mean": lambda: NearestMean(model, factory),
    }
    rows = []
    for count in SHOTS:
        for name, make in makers.items():
            say(f"shots: {title}, {count}, {name}")
            recalls, kept, refused, aside = [], [], 0, 0
            for label in new:
                for seed in range(effort.seeds):
                    own = list(pool.device[label])
                    picked = np.random.default_rng(seed).permutation(len(own))[:count]
                    contender = make()
                    first = _share(contender.answer(tested[0]), tested[1])
                    contender.teach(([own[i] for i in picked], [label] * len(picked)))
                    recalls.append(
                        _share(contender.answer(pool.test[label]), [label] * len(pool.test[label]))
                    )
                    kept.append(_share(contender.answer(tested[0]), tested[1]) - first)
                    refused += contender.refused
                    aside += sum(contender.aside) if isinstance(contender, Device) else 0
                    contender.close()
            spread = statistics.stdev(recalls) if len(recalls) > 1 else 0.0
            rows.append(
                [
                    count, name, percent(statistics.fmean(recalls)), percent(spread),
                    points(statistics.fmean(kept)), points(min(kept)),
                    f"{refused} of {len(recalls)}" if "guard on" in name else "-",
                    f"{aside} of {count * len(recalls)}" if "tier 0" in name else "-",
                ]
            )  # fmt: skip
    print(f"### Few shots: {title}, fp32\n")
    print(
        f"- {len(new)} classes, each alone, {effort.seeds} draws; the factory has"
        f" {percent(before)} % on {len(tested[1]):,} test samples of the old"
        " classes; every fifth sample is kept apart to judge by, so of 5 tier 0 learns 4, of 10 it"
        " learns 8\n"
    )
    columns = (
        "shots", "method", "recall of the new class %", "sd", "old, change", "worst", "refused",
        "set aside",
    )  # fmt: skip
    print_table(columns, rows)


TEXT = f"""\
Accuracy of what a device learns through `EdgeModel.learner()` and `.trainer()` on bundles that
`export` wrote, their backbones frozen. Accuracies, no times. All bundles are fp32; features are
computed once by the bundle's own graph. *guard off* has rules that everything passes, so that
the method itself is seen; *on* is as it comes: what the guard refuses is not learned; *wide*
allows {100 * WIDE_RULES.margin:.0f} points a commit and {100 * WIDE_RULES.factory_margin:.0f}
against the factory. Learning rates, ridges and epochs are edgetune's defaults. Nearest class mean
uses cosines of features; the softmax head is plain SGD with momentum on the new samples only,
{Naive.EPOCHS} epochs; joint training keeps every sample and starts anew at each task: the upper
reference."""

PARTS: dict[str, Callable[[Path, Path, Effort], None]] = {
    "increments": increments,
    "image-streams": image_streams,
    "text-streams": text_streams,
    "intents": intents,
    "image-shots": image_shots,
    "text-shots": text_shots,
}

if __name__ == "__main__":
    main()
