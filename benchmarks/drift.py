"""Does a device notice that its inputs have changed? False alarms and power on real shifts.

    python benchmarks/drift.py                                 trains and exports first
    python benchmarks/drift.py --text-bundle BUNDLE            Banking77, about 4 minutes
    python benchmarks/drift.py --image-bundle BUNDLE           CIFAR-10, about 5 minutes
    python benchmarks/drift.py --quick --text-bundle BUNDLE    a minute: shows that it works

A bundle is one that `quantization.py --keep FOLDER` leaves in FOLDER/banking77/graphs/first or
FOLDER/resnet20/graphs/first. Progress goes to stderr, Markdown to stdout.
"""

import argparse
import csv
import gzip
import io
import os
import statistics
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import numpy.typing as npt
from _common import (
    BANKING77,
    CIFAR10,
    SHARED,
    SST2,
    percent,
    print_heading,
    print_table,
    say,
    shared_data,
    workplace,
)
from PIL import Image, ImageFilter
from scipy import stats
from scipy.spatial.distance import cdist

from edgetune.export.drift import FALSE_ALARMS, baseline_of
from edgetune.runtime.drift import CLASSES, Baseline, dump_baseline
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.tasks.classification import softmax

Rng = np.random.Generator
Pixels = npt.NDArray[np.uint8]

SMS = Path("text/sms_spam_test.tsv.gz")
SIZES = (32, 64, 128)
PEERS_WINDOW = 64
PEERS = ("KS, Bonferroni", "MMD", "mean confidence")
PERMUTATIONS = 200
# of the classes: what a device sees whose inputs are right but whose mix of classes is another
FEW_CLASSES = 0.2
NOTHING, OTHER_MIX = "nothing", "a fifth of the classes"

TEXT = f"""\
Windows of a device's predictions are held against the baseline that the exporter stores in the
bundle: class-conditional statistics of features and confidence, thresholds for one false alarm in
{1 / FALSE_ALARMS:.0f} windows over all of them together. The baseline is made of 1,024 samples that
the model has not been trained on, drawn at random; windows are drawn from the others, which a
shift is applied to, or from another data set. That is repeated with other draws, and shown are
means over them; *95 %* is the t-interval over the draws, since windows of one draw share a
baseline. *nothing* and *{OTHER_MIX}* are false alarms: with the latter every window
shows but so many classes, drawn for each (or as many more as hold enough samples), and its inputs
are as they were.

Peers, windows of {PEERS_WINDOW}, at the same rate: two-sample Kolmogorov-Smirnov tests of each
feature with Bonferroni's correction, and MMD with a Gaussian kernel (median heuristic,
{PERMUTATIONS} permutations), both of which have to keep all 1,024 reference features on the device
(they are what alibi-detect's KSDrift and MMDDrift compute); and the mean confidence of a window
between two quantiles of the reference's. *classes* is edgetune's alarm of the mix of classes at
{PEERS_WINDOW}, which it reports apart."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is done. windows: of each draw and shift; quiet: of each draw without a shift."""

    base: int
    samples: int | None
    draws: int
    windows: int
    quiet: int
    peer_draws: int
    sizes: tuple[int, ...]


FULL = Effort(base=1024, samples=None, draws=10, windows=20, quiet=100, peer_draws=4, sizes=SIZES)
QUICK = Effort(base=256, samples=400, draws=2, windows=5, quiet=10, peer_draws=1, sizes=(32,))


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a bundle gave: features, logits, and whether each answer was right, or None."""

    features: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]
    right: npt.NDArray[np.bool_] | None

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """Probability of the predicted class, (samples,)."""
        return softmax(self.logits).max(axis=1)

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """Index of the predicted class, (samples,)."""
        return self.logits.argmax(axis=1)

    def take(self, chosen: npt.NDArray[np.int64]) -> "Outputs":
        """Return the chosen samples."""
        right = None if self.right is None else self.right[chosen]
        return Outputs(features=self.features[chosen], logits=self.logits[chosen], right=right)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One bundle: in-distribution samples, shifts of them, and samples from elsewhere."""

    title: str
    edge: EdgeModel
    samples: Sequence[Any]
    labels: Sequence[str]
    shifts: Mapping[str, Callable[[Any, Rng], Any]]
    elsewhere: Mapping[str, tuple[Sequence[Any], Sequence[str] | None]]


def main() -> None:
    """Run the cases and print a section for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=SHARED, help=f"shared data [{SHARED}]")
    parser.add_argument("--text-bundle", type=Path, help="of Banking77")
    parser.add_argument("--image-bundle", type=Path, help="of CIFAR-10")
    parser.add_argument("--keep", type=Path, help="folder for runs and bundles, which stay")
    parser.add_argument("--quick", action="store_true", help="a few samples; no usable figures")
    given = parser.parse_args()
    data = shared_data(given.shared, *BANKING77, SST2[1], SMS, *CIFAR10)
    effort = QUICK if given.quick else FULL
    bundles = {"text": given.text_bundle, "image": given.image_bundle}
    with workplace(given.keep, may_exist=True) as folder:
        if not any(bundles.values()):
            bundles = {name: _export(name, data, folder, given.quick) for name in bundles}
        print_heading("Drift: false alarms and power", TEXT)
        makers = {"text": _text_case, "image": _image_case}
        for name, bundle in bundles.items():
            if bundle is not None:
                _run_case(makers[name](bundle, data, effort), effort)


def _export(name: str, data: Path, folder: Path, quick: bool) -> Path:
    """Train where that is needed, and export for this machine."""
    import quantization

    from edgetune.export.bundle import export_run
    from edgetune.profile import load_profile

    effort = quantization.QUICK if quick else quantization.FULL
    output = folder / f"{name}-bundle"
    if output.exists():
        return output
    if name == "text":
        case = quantization.banking_case(data, folder / "banking77", effort)
    else:
        case = quantization.resnet_case(data, folder / "resnet20", effort, depth=20)
    say(f"exporting {case.title}")
    allow = ("accuracy", "samples", "speed", "latency", "memory", "size")
    export_run(case.run, case.dataset, load_profile("host"), output=output, allow=allow)
    return output


# -- data ----------------------------------------------------------------------------------


def _text_case(bundle: Path, data: Path, effort: Effort) -> Case:
    rows = _rows(data / BANKING77[1], ",")
    order = np.random.default_rng(0).permutation(len(rows))[: effort.samples]
    sst2, sms = _rows(data / SST2[1], "\t"), _rows(data / SMS, "\t")
    elsewhere = {"SST-2 sentences": sst2, "SMS": sms}
    return Case(
        title="Banking77, MiniLM-L6",
        edge=EdgeModel.load(bundle, threads=1),
        samples=[rows[i][0] for i in order],
        labels=[rows[i][1] for i in order],
        shifts={
            "upper case": lambda text, _: text.upper(),
            "typos, 1 letter in 50": lambda text, rng: _typos(text, 0.02, rng),
            "typos, 1 letter in 20": lambda text, rng: _typos(text, 0.05, rng),
            "typos, 1 letter in 10": lambda text, rng: _typos(text, 0.1, rng),
            "cut to 8 words": lambda text, _: " ".join(text.split()[:8]),
            "cut to 6 words": lambda text, _: " ".join(text.split()[:6]),
            "cut to 4 words": lambda text, _: " ".join(text.split()[:4]),
        },
        elsewhere={
            name: ([row[0] for row in found[: effort.samples]], None)
            for name, found in elsewhere.items()
        },
    )


def _rows(path: Path, delimiter: str) -> list[list[str]]:
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter=delimiter, quoting=quoting))[1:]


def _typos(text: str, rate: float, rng: Rng) -> str:
    """Drop, double or replace letters, each as often."""
    letters = []
    for letter in text:
        if not letter.isalpha() or rng.random() >= rate:
            letters.append(letter)
        else:
            other = chr(ord("a") + int(rng.integers(26)))
            letters.append(("", 2 * letter, other)[int(rng.integers(3))])
    return "".join(letters)


def _image_case(bundle: Path, data: Path, effort: Effort) -> Case:
    images, labels = [], []
    with zipfile.ZipFile(data / CIFAR10[1]) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        for i in np.random.default_rng(0).permutation(len(names))[: effort.samples]:
            images.append(np.asarray(Image.open(io.BytesIO(archive.read(names[i]))).convert("RGB")))
            labels.append(Path(names[i]).parent.name)
    with np.load(data / CIFAR10[0]) as stored:
        lossless = list(stored["x_test"][: effort.samples])
        classes = [str(name) for name in stored["classes"]]
        truth = [classes[i] for i in stored["y_test"][: effort.samples]]
    shifts: dict[str, Callable[[Pixels, Rng], Pixels]] = {}
    for deviation in (2, 5, 10):
        shifts[f"noise, deviation {deviation}"] = lambda pixels, rng, deviation=deviation: _clip(
            pixels + rng.normal(0, deviation, pixels.shape)
        )
    for radius in (0.3, 0.5, 0.8):
        shifts[f"blur, {radius} pixels"] = lambda pixels, _, radius=radius: np.asarray(
            Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius))
        )
    for factor in (0.9, 0.7, 0.5, 1.2, 1.5):
        shifts[f"brightness {factor}"] = lambda pixels, _, factor=factor: _clip(pixels * factor)
    for quality in (60, 40, 20):
        shifts[f"JPEG again, quality {quality}"] = lambda pixels, _, quality=quality: _jpeg(
            pixels, quality
        )
    return Case(
        title="CIFAR-10 (JPEG), ResNet-20",
        edge=EdgeModel.load(bundle, threads=1),
        samples=images,
        labels=labels,
        shifts=shifts,
        elsewhere={"lossless test images": (lossless, truth)},
    )


def _clip(values: npt.NDArray[Any]) -> Pixels:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _jpeg(pixels: Pixels, quality: int) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


# -- measuring -----------------------------------------------------------------------------


def _run_case(case: Case, effort: Effort) -> None:
    plain = _outputs(case.edge, case.samples, case.labels)
    rng = np.random.default_rng(1)
    shifted = {}
    for name, shift in case.shifts.items():
        say(f"{case.title}: {name}")
        samples = [shift(sample, rng) for sample in case.samples]
        shifted[name] = _outputs(case.edge, samples, case.labels)
    others = {
        name: _outputs(case.edge, samples, labels)
        for name, (samples, labels) in case.elsewhere.items()
    }
    found: dict[str, dict[str, list[float]]] = {}
    kib = 0.0
    for draw in range(effort.draws):
        say(f"{case.title}: draw {draw + 1} of {effort.draws}")
        order = np.random.default_rng(100 + draw).permutation(len(case.samples))
        base, rest = plain.take(order[: effort.base]), order[effort.base :]
        detectors: dict[str, tuple[int, Callable[[Outputs], Mapping[str, bool]]]] = {}
        for size in effort.sizes:
            baseline = baseline_of(
                {"features": base.features, "logits": base.logits}, window=size, seed=draw
            )
            kib = len(dump_baseline(baseline)) / 1024
            detectors[f"edgetune {size}"] = (size, _edgetune(baseline, f"{size}"))
        if draw < effort.peer_draws:
            detectors["peers"] = (PEERS_WINDOW, _peers(base, draw))
        here = plain.take(rest)
        worlds = {NOTHING: here, OTHER_MIX: here}
        worlds |= {name: outputs.take(rest) for name, outputs in shifted.items()} | others
        for name, world in worlds.items():
            rates = found.setdefault(name, {})
            for detector, (size, alarms) in detectors.items():
                quiet = name == NOTHING or (name == OTHER_MIX and detector != "peers")
                count = effort.quiet if quiet else effort.windows
                picks = [_pick(world, size, rng, few=name == OTHER_MIX) for _ in range(count)]
                seen = [alarms(world.take(pick)) for pick in picks]
                for column in seen[0]:
                    rate = statistics.fmean(one[column] for one in seen)
                    rates.setdefault(column, []).append(rate)
    right = {NOTHING: plain.right, **{n: o.right for n, o in (shifted | others).items()}}
    _print_case(case, effort, found, right, kib)


def _outputs(edge: EdgeModel, samples: Sequence[Any], labels: Sequence[str] | None) -> Outputs:
    found = [edge.outputs(sample) for sample in samples]
    logits = np.concatenate([one["logits"] for one in found])
    right = None
    if labels is not None:
        answers = [edge.labels[i] for i in logits.argmax(axis=1)]
        right = np.array([a == b for a, b in zip(answers, labels, strict=True)])
    features = np.concatenate([one["features"] for one in found])
    return Outputs(features=features, logits=logits, right=right)


def _pick(world: Outputs, size: int, rng: Rng, *, few: bool) -> npt.NDArray[np.int64]:
    """Return the indices of a window, none twice; of few classes, or as many as hold enough."""
    pool = np.arange(len(world.logits))
    if few:
        labels = world.logits.shape[1]
        order, count = rng.permutation(labels), max(2, round(FEW_CLASSES * labels))
        while np.count_nonzero(np.isin(world.classes, order[:count])) < size:
            count += 1
        pool = np.flatnonzero(np.isin(world.classes, order[:count]))
    return rng.choice(pool, size, replace=False)


def _edgetune(baseline: Baseline, name: str) -> Callable[[Outputs], Mapping[str, bool]]:
    def alarms(window: Outputs) -> Mapping[str, bool]:
        found = baseline.alarms(baseline.measure(window.features, window.scores, window.classes))
        mine = {f"n = {name}": any(n != CLASSES for n in found)}
        if name == str(PEERS_WINDOW):
            mine["classes"] = CLASSES in found
        return mine

    return alarms


def _peers(base: Outputs, seed: int) -> Callable[[Outputs], Mapping[str, bool]]:
    """Return the peers' alarms; each has the features or scores of all base samples."""
    rng = np.random.default_rng(seed)
    count, width = base.features.shape
    # ks_2samp's own asymptotic distribution, its p-value held against rate / width
    effective = round(count * PEERS_WINDOW / (count + PEERS_WINDOW))
    furthest = float(stats.kstwo.isf(FALSE_ALARMS / width, effective))
    distances = cdist(base.features, base.features, "sqeuclidean")
    width_squared = float(np.median(distances[np.triu_indices(count, 1)]))
    inner = np.exp(-distances / (2 * width_squared))
    means = [
        float(rng.choice(base.scores, PEERS_WINDOW, replace=False).mean()) for _ in range(4000)
    ]
    low, high = np.quantile(means, [FALSE_ALARMS / 2, 1 - FALSE_ALARMS / 2])
    members = np.array(
        [rng.permutation(count + PEERS_WINDOW) < PEERS_WINDOW for _ in range(PERMUTATIONS)]
    )

    def alarms(window: Outputs) -> Mapping[str, bool]:
        across = np.exp(-cdist(base.features, window.features, "sqeuclidean") / (2 * width_squared))
        own = np.exp(-cdist(window.features, window.features, "sqeuclidean") / (2 * width_squared))
        kernel = np.block([[inner, across], [across.T, own]])
        true = np.arange(count + PEERS_WINDOW) >= count
        mmd = _mmd(kernel, np.vstack([true, members]))
        p_value = (1 + np.count_nonzero(mmd[1:] >= mmd[0])) / (1 + PERMUTATIONS)
        mean = float(window.scores.mean())
        return {
            PEERS[0]: bool(_ks(base.features, window.features).max() > furthest),
            PEERS[1]: p_value <= FALSE_ALARMS,
            PEERS[2]: not low <= mean <= high,
        }

    return alarms


def _ks(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Return the Kolmogorov-Smirnov distance of each column."""
    both = np.concatenate([first, second])
    order = both.argsort(axis=0, kind="stable")
    steps = np.where(order < len(first), 1 / len(first), -1 / len(second))
    gaps = np.abs(steps.cumsum(axis=0))
    # within ties the distributions have not both stepped yet
    ordered = np.take_along_axis(both, order, axis=0)
    gaps[:-1][ordered[:-1] == ordered[1:]] = 0
    return gaps.max(axis=0)


def _mmd(kernel: npt.NDArray[np.float64], members: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Return the squared MMD of each division of the samples into members and others."""
    ours = members / members.sum(axis=1, keepdims=True)
    others = ~members / (~members).sum(axis=1, keepdims=True)
    weights = ours - others
    return np.einsum("ij,ij->i", weights @ kernel, weights)


def _print_case(
    case: Case,
    effort: Effort,
    found: Mapping[str, Mapping[str, list[float]]],
    right: Mapping[str, npt.NDArray[np.bool_] | None],
    kib: float,
) -> None:
    width = case.edge.manifest.outputs[1].shape[-1]
    print(f"### {case.title}\n")
    print(
        f"- {len(case.labels):,} samples, {len(case.edge.labels)} classes, {width} features;"
        f" drift.npz {kib:.0f} KiB\n"
        f"- {effort.draws} draws; of each {effort.quiet} windows without a shift and"
        f" {effort.windows} of every shift; peers {effort.peer_draws} draws\n"
    )
    sizes = [f"n = {size}" for size in effort.sizes]
    quiet = [name for name in found if name in (NOTHING, OTHER_MIX)]
    rows = [
        [name, *(_with_interval(found[name].get(c, [])) for c in (*sizes, "classes", *PEERS))]
        for name in quiet
    ]
    columns = (*(f"edgetune {size}" for size in sizes), "classes", *PEERS)
    print("False alarms, % of windows (95 %):\n")
    print_table(("what has changed", *columns), rows)
    rows = []
    for name in found:
        if name in quiet:
            continue
        answers = right.get(name)
        accuracy = "-" if answers is None else percent(float(answers.mean()))
        rates = found[name]
        cells = (
            percent(statistics.fmean(rates[c])) if rates.get(c) else "-"
            for c in (*sizes, "classes", *PEERS)
        )
        rows.append([name, accuracy, *cells])
    plain = right[NOTHING]
    assert plain is not None
    print(f"Alarms, % of windows; accuracy without a shift {percent(float(plain.mean()))} %:\n")
    print_table(("shift", "accuracy %", *columns), rows)


def _with_interval(rates: Sequence[float]) -> str:
    if len(rates) < 2:
        return "-"
    mean = statistics.fmean(rates)
    reach = float(stats.t.ppf(0.975, len(rates) - 1)) * statistics.stdev(rates) / len(rates) ** 0.5
    return f"{percent(mean)} ({percent(max(mean - reach, 0))} to {percent(min(mean + reach, 1))})"


if __name__ == "__main__":
    main()
