"""Back to the cloud: what devices learned becomes the next release of their bundle.

Statistics are added, which is exact: the new head is that of all devices' samples together.
Trained tensors are averaged (`edgetune.export.average`). Either way the new bundle is made only
if the guard that judges on a device finds nothing against it on the bundle's canary.
"""

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from edgetune import __version__
from edgetune.errors import ConfigError, DataError, EdgetuneError, GateError, ResourceError
from edgetune.export.average import average
from edgetune.export.graph import save_graphs, tensor_specs
from edgetune.export.heads import FEATURES, LOGITS, depends, only, replace_head, set_defaults
from edgetune.export.pack import CARD_NAME, discard, publish, write_goldens, write_manifest
from edgetune.export.privacy import DELTA, epsilon_of
from edgetune.export.rungs import X64_PRECISION
from edgetune.quantize.arithmetic import emulate, host_arithmetic
from edgetune.runtime.bundle import (
    DRIFT_NAME,
    GOLDENS_NAME,
    GRAPH_NAME,
    LEARN_NAME,
    STEP_NAME,
    WEIGHTS_NAME,
    Bundle,
    Folder,
    open_bundle,
    verify_files,
)
from edgetune.runtime.goldens import read_goldens
from edgetune.runtime.learn.exchange import FleetFile, Kind, read_fleet_file
from edgetune.runtime.learn.guard import Evidence, PairedTest, Rules, judge
from edgetune.runtime.learn.learner import check_label
from edgetune.runtime.learn.material import Material, dump_material, read_material
from edgetune.runtime.learn.privacy import Privacy
from edgetune.runtime.learn.ridge import Head, fit_temperature, regularisation, solve
from edgetune.runtime.learn.statistics import (
    Prior,
    Statistics,
    compress,
    expand,
    merge,
    prior_arrays,
    with_labels,
    within,
)
from edgetune.runtime.manifest import (
    Evaluation,
    Goldens,
    Manifest,
    Metric,
    TensorSpec,
    TrainingStep,
)
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.ort import onnxruntime
from edgetune.runtime.packing import unpack
from edgetune.tasks.metrics import classification_report

IntArray = npt.NDArray[np.int64]
Weights = Literal["samples", "equal"]

# what is made anew, or would be wrong of the new model
NOT_COPIED = frozenset(
    {GRAPH_NAME, WEIGHTS_NAME, STEP_NAME, GOLDENS_NAME, LEARN_NAME, DRIFT_NAME, CARD_NAME}
)
# a draft whose graph is another CPU's arithmetic written out
EMULATED = "emulated"
# how far the new graph's logits may be from the head that was judged, of the largest
PARITY = 1e-4
# of more files the one to blame for a refusal is not looked for
MOST_SUSPECTS = 64
# standard deviations of its noise that the count of a new class has to be above
LEAST_EVIDENCE = 2.0
# a class mean that is noisy along directions in which classes hardly vary would be taken for a
# far one: the ridge grows by so many times the variance of its noise
NOISE_RIDGE = 3.0
FILE_SUFFIX = ".npz"


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One device's part.

    where: the file. id, source, generation: its own. samples: as it says; with noise, about.
    noise_multiplier: of its noise; None without. epsilon: what that proves of one sample, at the
    delta that was asked for; None without noise, or without an accountant.
    """

    where: str
    id: str
    source: str
    generation: int
    samples: float
    noise_multiplier: float | None = None
    epsilon: float | None = None

    @property
    def noise(self) -> str:
        """Return what is to be said of the noise."""
        if self.noise_multiplier is None:
            return "none"
        proven = "" if self.epsilon is None else f", epsilon {self.epsilon:.3g}"
        return f"{self.noise_multiplier:g}{proven}"


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What a merge made.

    labels: of the new bundle; new_labels: those that its parent lacks. counts: label -> samples
    that the devices learned. canary: shares that the parent and the new bundle get right.
    notes: what was left out, and what the user should know.
    """

    bundle: Path
    parent: str
    release: int
    kind: Kind
    labels: tuple[str, ...]
    new_labels: tuple[str, ...]
    counts: dict[str, float]
    contributions: tuple[Contribution, ...]
    canary: tuple[float, float]
    reasons: tuple[str, ...]
    tests: tuple[PairedTest, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A file, without its arrays."""

    path: Path
    file: FleetFile

    @property
    def samples(self) -> float:
        return float(self.file.counts.sum())


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What is to be judged and written.

    model, step: graphs; step None where there is none. after: the canary's answers.
    check: what the logits of the new graph must be, of all its outputs.
    """

    labels: tuple[str, ...]
    model: onnx.ModelProto
    step: onnx.ModelProto | None
    training: TrainingStep | None
    material: Material
    after: IntArray
    check: Callable[[Mapping[str, Any]], npt.NDArray[np.float32]] | None
    notes: tuple[str, ...]


def merge_bundle(
    bundle: str | Path,
    files: Sequence[str | Path],
    *,
    output: str | Path,
    release: int | None = None,
    max_drop: float | None = None,
    weights: Weights = "samples",
    delta: float = DELTA,
) -> MergeResult:
    """Make the next release of a bundle of what its devices have sent.

    Files may come in any order; the same file twice, or two of the same device, count once: of a
    device the file of its last generation.

    Args:
        bundle: the very one that the devices have: its folder or zip.
        files: of `edgetune-rt export-learned`; a folder stands for all .npz in it.
        output: the new bundle's folder; must not exist.
        release: its release counter; default: the parent's and one.
        max_drop: largest loss of accuracy on the canary, a share, with 95 % confidence; default:
            what the bundle's canary can prove.
        weights: "samples": every sample weighs the same; "equal": every device.
        delta: at which epsilon is given.

    Raises:
        ConfigError: an argument is wrong, or the bundle cannot learn.
        DataError: a file is of another bundle, or of another kind than the others.
        GateError: the guard refuses; there is no new bundle.
        IntegrityError: the bundle or a file is damaged.
        ResourceError: the disk is full or fails.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"output {target}: exists already; name another folder")
    if weights not in ("samples", "equal"):
        raise ConfigError(f"weights: expected 'samples' or 'equal', got {weights!r}")
    absent = [folder for folder in target.absolute().parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            parent = _open(Path(bundle), workplace)
            merger = _Merger(parent, _paths(files), workplace, weights, max_drop, delta)
            return merger.run(target, release)
        finally:
            discard(workplace)
            for folder in absent if not target.exists() else []:
                folder.rmdir()
    except OSError as error:
        raise ResourceError(f"{target}: cannot be written: {error}") from error


class _Merger:
    """One merge: read, add, judge, write."""

    def __init__(
        self,
        parent: Bundle,
        paths: Sequence[Path],
        workplace: Path,
        weights: Weights,
        max_drop: float | None,
        delta: float,
    ) -> None:
        self.parent, self.workplace, self.weights = parent, workplace, weights
        self.material = read_material(parent)
        margin = self.material.margin if max_drop is None else max_drop
        self.rules = Rules(margin=margin, factory_margin=max(0.05, margin))
        self.delta = delta
        self.notes: list[str] = []
        self.sent = self._read(paths)
        self.kind = self.sent[0].file.kind

    def run(self, target: Path, release: int | None) -> MergeResult:
        number = self.parent.manifest.release + 1 if release is None else release
        if number <= self.parent.manifest.release:
            raise ConfigError(
                f"release: expected more than the parent's {self.parent.manifest.release}, got"
                f" {number}; devices refuse to go back"
            )
        made = self._statistics() if self.kind == "statistics" else self._tensors()
        self.notes += made.notes
        evidence = self._evidence(made.after)
        verdict = judge(evidence, None, self.rules, made.labels)
        if not verdict.accepted:
            raise GateError(
                "refused, and no bundle was made: " + " ".join(verdict.reasons) + self._blame()
            )
        if DRIFT_NAME in self.parent.manifest.files:
            self.notes.append("no baseline to tell drift by: the parent's is of other answers")
        if self.parent.manifest.abstention is not None:
            self.notes.append("it never abstains: the parent's threshold is of another head")
        truth = self.material.canary_classes
        shares = tuple(float(np.mean(x == truth)) for x in (evidence.before, evidence.after))
        result = MergeResult(
            bundle=target,
            parent=self.parent.manifest.digest,
            release=number,
            kind=self.kind,
            labels=made.labels,
            new_labels=made.labels[len(self.parent.manifest.labels) :],
            counts=self._counts(made.labels),
            contributions=tuple(self._contribution(s) for s in self.sent),
            canary=(shares[0], shares[1]),
            reasons=verdict.reasons,
            tests=verdict.tests,
            notes=tuple(self.notes),
        )
        _write(self.parent, made, result, evidence.before, self.workplace / "bundle")
        publish(self.workplace / "bundle", target)
        return result

    # -- what was sent

    def _read(self, paths: Sequence[Path]) -> list[_Sent]:
        """Return the files that count, in an order that is not that of the command line."""
        latest: dict[str, _Sent] = {}
        seen: dict[str, Path] = {}
        for path in paths:
            file = read_fleet_file(path)
            self._check(path, file)
            if file.id in seen:
                self.notes.append(f"{path}: skipped, {seen[file.id]} is the same")
                continue
            seen[file.id] = path
            known = latest.get(file.source)
            sent = _Sent(path=path, file=dataclasses.replace(file, statistics=None, tensors={}))
            if known is None or known.file.generation < file.generation:
                latest[file.source], known, sent = sent, sent, known or sent
            if known is not sent:
                self.notes.append(
                    f"{sent.path}: skipped, {known.path} is a later generation of the same device"
                )
        found = sorted(latest.values(), key=lambda s: s.file.id)
        kinds = {s.file.kind: s.path for s in found}
        if len(kinds) > 1:
            raise DataError(
                f"{kinds['tensors']} holds tensors and {kinds['statistics']} statistics; merge"
                " them one kind at a time"
            )
        return found

    def _check(self, path: Path, file: FleetFile) -> None:
        manifest = self.parent.manifest
        if file.base != manifest.digest:
            raise DataError(
                f"{path}: was learned with {file.bundle!r:.80}, digest {file.base[:12]}; expected"
                f" that of {manifest.name!r}, {manifest.digest[:12]}"
            )
        for label in file.labels:
            check_label(label)
        if file.statistics is not None:
            width = self.material.prior.means.shape[1]
            if file.statistics.width != width:
                raise DataError(
                    f"{path}: statistics of {file.statistics.width} features; expected {width}"
                )
            return
        training = manifest.training
        expected = {s.name: s for s in training.trainable} if training else {}
        if file.tensors.keys() != expected.keys():
            raise DataError(f"{path}: its tensors are not those that this bundle trains")
        for name, value in file.tensors.items():
            shape = tuple(len(file.labels) if d == "classes" else d for d in expected[name].shape)
            if value.shape != shape:
                raise DataError(f"{path}: {name}: expected shape {shape}, got {value.shape}")
        if not set(manifest.labels) <= set(file.labels):
            raise DataError(f"{path}: its tensors lack rows of some of the bundle's labels")

    def _shares(self) -> list[float]:
        """Return what each file's samples are multiplied with: 1, or the same total for all."""
        if self.weights == "samples":
            return [1.0] * len(self.sent)
        sizes = [max(s.samples, 0.0) for s in self.sent]
        mean = sum(sizes) / len(sizes)
        return [mean / size if size else 0.0 for size in sizes]

    def _counts(self, labels: Sequence[str]) -> dict[str, float]:
        totals = dict.fromkeys(labels, 0.0)
        for sent in self.sent:
            for label, count in zip(sent.file.labels, sent.file.counts, strict=True):
                if label in totals:
                    totals[label] += float(count)
        return {label: round(count, 3) for label, count in totals.items() if count}

    def _contribution(self, sent: _Sent) -> Contribution:
        epsilon, privacy = None, sent.file.privacy
        if privacy is not None:
            try:
                epsilon = epsilon_of([privacy.noise_multiplier], self.delta)
            except ConfigError as error:  # no accountant is installed; or no such delta
                if str(error) not in self.notes:
                    self.notes.append(str(error))
        return Contribution(
            where=str(sent.path),
            id=sent.file.id,
            source=sent.file.source,
            generation=sent.file.generation,
            samples=round(sent.samples, 3),
            noise_multiplier=privacy.noise_multiplier if privacy else None,
            epsilon=epsilon,
        )

    # -- statistics

    def _statistics(self) -> _Made:
        total, head, doubted = self._solved(None)
        self.notes += [
            f"new class {label!r}: left out, its count is no larger than noise may make it"
            for label in doubted
        ]
        material, manifest = self.material, self.parent.manifest
        scores = self._scores(head)
        weights = (head.weights / np.float32(head.temperature)).astype(np.float32)
        bias = (head.bias / np.float32(head.temperature)).astype(np.float32)
        model = _load(self.parent, GRAPH_NAME)
        step, training = None, manifest.training
        notes = []
        placed = None if training is None else _head_values(model, training, weights, bias)
        if training is not None and placed is None:
            notes.append(f"{STEP_NAME} is left out: its head is not the new one's kind")
            training = None
        if placed is not None:
            model, step = set_defaults(model, placed), _load(self.parent, STEP_NAME)
        else:
            model = replace_head(model, weights, bias, projection=material.projection)
        fresh = dataclasses.replace(
            material,
            prior=compress(total, _room(material.prior, total.labels)),
            canary_answers=scores.argmax(axis=1).astype(np.int64),
            canary_latents=material.canary_latents if training else {},
            replay_latents=material.replay_latents if training else {},
            replay_classes=material.replay_classes if training else np.zeros(0, np.int64),
        )
        projection = material.projection

        def expected(outputs: Mapping[str, Any]) -> npt.NDArray[np.float32]:
            features = outputs[FEATURES]
            return head.logits(features if projection is None else projection.apply(features))

        return _Made(
            labels=total.labels, model=model, step=step, training=training, material=fresh,
            after=fresh.canary_answers, check=expected, notes=tuple(notes),
        )  # fmt: skip

    def _solved(self, without: _Sent | None) -> tuple[Statistics, Head, tuple[str, ...]]:
        """Return all sums but one file's, their head, and new classes that may be noise."""
        exact, noisy = expand(self.material.prior), None
        noises: list[tuple[Privacy, float, tuple[str, ...]]] = []
        for sent, share in zip(self.sent, self._shares(), strict=True):
            if sent is without:
                continue
            stats = read_fleet_file(sent.path).statistics
            assert stats is not None
            stats = _scaled(stats, share)
            if sent.file.privacy is None:
                exact = merge(exact, stats)
            else:
                noisy = stats if noisy is None else merge(noisy, stats)
                noises.append((sent.file.privacy, share, stats.labels))
        total, extra = exact, 0.0
        doubted: tuple[str, ...] = ()
        if noisy is not None:
            total, doubted, extra = combine(exact, noisy, noises)
        ridge = regularisation(total) * self.material.ridge_factor + extra
        head = solve(total, ridge=ridge)
        if len(self.material.canary_classes):
            temperature = fit_temperature(self._scores(head), self.material.canary_classes)
            head = dataclasses.replace(head, temperature=temperature)
        return total, head, doubted

    def _scores(self, head: Head) -> npt.NDArray[np.float32]:
        material = self.material
        features: npt.NDArray[Any] = material.canary_features
        if material.projection is not None:
            features = material.projection.apply(features)
        return head.scores(features)

    def _evidence(self, after: IntArray) -> Evidence:
        answers = self.material.canary_answers
        return Evidence(
            truth=self.material.canary_classes, before=answers, after=after, factory=answers
        )

    def _blame(self) -> str:
        """Name a file without which statistics would have passed."""
        if self.kind != "statistics" or not 1 < len(self.sent) <= MOST_SUSPECTS:
            return ""
        guilty = []
        for suspect in self.sent:
            try:
                _, head, _ = self._solved(suspect)
            except DataError:
                continue
            evidence = self._evidence(self._scores(head).argmax(axis=1))
            if judge(evidence, None, self.rules, head.labels).accepted:
                guilty.append(str(suspect.path))
        if not guilty:
            return " Leaving out any one file does not help."
        return f" Without {' or '.join(guilty)} it would pass."

    # -- tensors

    def _tensors(self) -> _Made:
        manifest, material = self.parent.manifest, self.material
        training = manifest.training
        assert training is not None  # `_check` has compared the tensors with it
        axes = {s.name: s.shape.index("classes") for s in training.trainable if _grows(s)}
        model, step = _load(self.parent, GRAPH_NAME), _load(self.parent, STEP_NAME)
        constants = {t.name: t for t in model.graph.initializer}
        defaults = {
            s.name: onnx.numpy_helper.to_array(constants[s.name]) for s in training.trainable
        }
        files = [read_fleet_file(sent.path) for sent in self.sent]
        sizes = [max(sent.samples, 0.0) for sent in self.sent]
        shares = sizes if self.weights == "samples" and any(sizes) else [1.0] * len(files)
        merged = average(
            [(f.labels, f.tensors) for f in files], shares, defaults, axes, manifest.labels
        )
        after = answers_of_step(step, merged.tensors, material)
        model = set_defaults(model, merged.tensors)
        notes = []
        if merged.kept:
            least = min(merged.kept, key=lambda name: merged.kept[name])
            notes.append(
                f"of the mean of the low-rank products, {100 * merged.kept[least]:.1f} % or more"
                f" is kept ({least} least)"
            )
        prior = _with_new(material.prior, merged.labels)
        if depends(model, FEATURES, [n for n in defaults if n not in axes]):
            # statistics of other features would put any head that is solved from them wrong
            prior = dataclasses.replace(prior, counts=np.zeros_like(prior.counts))
            notes.append(
                "features are others now and the factory's samples are not here: the new bundle"
                " can train, but has no statistics to learn classes by; export it anew for these"
            )
        fresh = dataclasses.replace(material, prior=prior, canary_answers=after)
        return _Made(
            labels=merged.labels, model=model, step=step, training=training, material=fresh,
            after=after, check=None, notes=tuple(notes),
        )  # fmt: skip


def combine(
    exact: Statistics,
    noisy: Statistics,
    noises: Sequence[tuple[Privacy, float, tuple[str, ...]]],
) -> tuple[Statistics, tuple[str, ...], float]:
    """Return exact and noisy sums together, new classes that may be noise, and a ridge to add.

    The noise of d^2 entries of a Gram matrix outweighs what few samples say of how features vary:
    its eigenvalues reach 2 sigma sqrt(d). Where that is more than the mean eigenvalue of what
    the exact samples say, the noisy ones are taken to vary as those do.

    Args:
        exact: of the factory and of files without noise.
        noisy: the others, their sum.
        noises: of each of those: its noise, what it was multiplied with, its labels.
    """
    total = merge(exact, noisy)
    count_variance = np.zeros(len(total.labels))
    sum_variance = np.zeros(len(total.labels))
    gram_variance = 0.0  # of an entry off the diagonal
    index = {label: i for i, label in enumerate(total.labels)}
    for privacy, share, labels in noises:
        places = [index[label] for label in labels]
        variance = (share * privacy.deviation) ** 2
        count_variance[places] += variance
        sum_variance[places] += variance * privacy.clip**2
        gram_variance += variance * privacy.clip**4 / 2
    new = np.arange(len(total.labels)) >= len(exact.labels)
    doubted = new & (total.counts < LEAST_EVIDENCE * np.sqrt(count_variance))
    there = (total.counts >= 1) & ~doubted
    sums = np.where(there[:, None], total.sums, 0.0)
    counts = np.where(there, total.counts, 0.0)
    gram, spread = total.gram, within(exact) / max(exact.samples, 1.0)
    floor = float(np.trace(spread)) / exact.width * float(counts.sum())
    if 2 * math.sqrt(gram_variance * exact.width) > floor:
        rows = sums[there] / np.sqrt(counts[there])[:, None]
        gram = rows.T @ rows + spread * counts.sum()
    left = Statistics(labels=total.labels, gram=gram, sums=sums, counts=counts)
    out = tuple(n for n, drop in zip(total.labels, new & ~there, strict=True) if drop)
    kept = with_labels(left, [n for n in total.labels if n not in out])
    uncertain = sum_variance[there] / counts[there] ** 2
    return kept, out, NOISE_RIDGE * float(uncertain.max(initial=0.0))


def answers_of_step(
    step: onnx.ModelProto, tensors: Mapping[str, npt.NDArray[np.float32]], material: Material
) -> IntArray:
    """Return what a training step's forward pass answers for the canary's samples.

    Args:
        step: weights inside.
        tensors: values of all trainable ones.
        material: with the canary's latents.

    Raises:
        ConfigError: there are none.
    """
    forward = only(step, [LOGITS])
    inputs = [v.name for v in forward.graph.input if v.name not in tensors]
    missing = [name for name in inputs if name not in material.canary_latents]
    if missing:
        raise ConfigError(
            f"{LEARN_NAME}: has no canary samples to judge tensors by (no {', '.join(missing)})"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        forward.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    read = {value.name for value in forward.graph.input}
    feeds = {name: value for name, value in tensors.items() if name in read}
    answers = []
    for i in range(len(material.canary_classes)):
        sample = {name: material.canary_latents[name][i][None] for name in inputs}
        answers.append(int(session.run([LOGITS], {**feeds, **sample})[0][0].argmax()))
    return np.array(answers, np.int64)


def _paths(files: Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, files):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix == FILE_SUFFIX)
            if not inside:
                raise ConfigError(f"{path}: has no {FILE_SUFFIX} file")
            found += inside
        else:
            found.append(path)
    if not found:
        raise ConfigError("expected one file or more to merge")
    return found


def _open(path: Path, workplace: Path) -> Bundle:
    """Open a bundle whose every hash is right; a zip is unpacked."""
    bundle = open_bundle(path)
    if isinstance(bundle.files, Folder):
        verify_files(bundle)
        return bundle
    bundle.files.close()
    return unpack(path, workplace / "parent")


def _load(bundle: Bundle, name: str) -> onnx.ModelProto:
    """Return a graph with its weights inside."""
    return onnx.load(bundle.path(name))


def _scaled(stats: Statistics, share: float) -> Statistics:
    if share == 1.0:
        return stats
    return dataclasses.replace(
        stats, gram=stats.gram * share, sums=stats.sums * share, counts=stats.counts * share
    )


def _grows(spec: TensorSpec) -> bool:
    return "classes" in spec.shape


def _head_values(
    model: onnx.ModelProto,
    training: TrainingStep,
    weights: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
) -> dict[str, npt.NDArray[np.float32]] | None:
    """Return a head as values of the trainable one; None where that is no product of features.

    A head behind a projection is none either: the step knows of no projection.
    """
    values: dict[str, npt.NDArray[np.float32]] = {}
    for spec in filter(_grows, training.trainable):
        if len(spec.shape) == 1:
            values[spec.name] = bias
            continue
        value = weights if spec.shape.index("classes") == 1 else weights.T
        fixed = spec.shape[1 - spec.shape.index("classes")]
        readers = [n for n in model.graph.node if spec.name in n.input]
        if fixed != len(weights) or [n.input[0] for n in readers] != [FEATURES]:
            return None
        values[spec.name] = np.ascontiguousarray(value)
    return values if len(values) == 2 else None


def _room(prior: Prior, labels: Sequence[str]) -> int:
    """Return what a prior may take: as much as its parent, and more for new classes."""
    own = sum(int(array.nbytes) for array in prior_arrays(prior).values())
    new = labels[len(prior.labels) :]
    return own + sum(
        4 * int(prior.means.shape[1]) + 8 + len(json.dumps(label)) + 2 for label in new
    )


def _with_new(prior: Prior, labels: Sequence[str]) -> Prior:
    """Return a prior that has new classes, of no samples."""
    new = len(labels) - len(prior.labels)
    return dataclasses.replace(
        prior,
        labels=tuple(labels),
        counts=np.pad(prior.counts, (0, new)),
        means=np.pad(prior.means, ((0, new), (0, 0))),
    )


def _write(
    parent: Bundle,
    made: _Made,
    result: MergeResult,
    before: npt.NDArray[np.integer[Any]],
    folder: Path,
) -> None:
    """Write the new bundle into `folder` and test it; `before` is the parent's on the canary.

    Raises:
        EdgetuneError: it does not answer as what was judged.
    """
    folder.mkdir()
    for name in parent.manifest.files.keys() - NOT_COPIED:
        shutil.copyfile(parent.path(name), folder / name)
    graphs = {GRAPH_NAME: made.model}
    if made.step is not None:
        graphs[STEP_NAME] = made.step
    save_graphs(graphs, folder)
    (folder / LEARN_NAME).write_bytes(dump_material(made.material))
    inputs, outputs = tensor_specs(made.model)
    manifest = dataclasses.replace(
        parent.manifest,
        release=result.release,
        labels=made.labels,
        inputs=inputs,
        outputs=outputs,
        training=made.training,
        # fitted to the parent's head, and not to this one
        calibration=None,
        abstention=None,
        evaluation=_measured(made.material.canary_classes, made.after, made.labels),
        reference=_measured(made.material.canary_classes, before, made.labels),
        goldens=Goldens(count=0, tolerance=0.0),
        edgetune_version=__version__,
    )
    manifest = write_manifest(folder, manifest)
    manifest = _add_goldens(parent, made, folder, manifest)
    (folder / CARD_NAME).write_text(_card(parent, manifest, result), encoding="utf-8")
    write_manifest(folder, manifest)
    with EdgeModel.load(folder, check="full") as edge:
        if not folder.with_name(EMULATED).exists():  # else the goldens are another CPU's answers
            edge.self_test()
    read_material(open_bundle(folder))


def _measured(
    truth: IntArray, answers: npt.NDArray[np.integer[Any]], labels: Sequence[str]
) -> Evaluation:
    report = classification_report(truth, answers.astype(np.int64), labels)
    metrics = {
        name: Metric(value=found.value, low=found.low, high=found.high)
        for name, found in (("accuracy", report.accuracy), ("f1_macro", report.f1_macro))
    }
    return Evaluation(split="canary", samples=len(truth), metrics=metrics)


def _faithful(folder: Path, model: onnx.ModelProto, manifest: Manifest) -> Path:
    """Return the draft, or one beside it that answers here as the profile's CPU does."""
    exact = manifest.session.config.get(X64_PRECISION) == "1"
    wanted = "exact" if exact else manifest.device.int8
    if manifest.precision not in ("int8", "int4") or wanted == host_arithmetic():
        return folder
    emulated = emulate(model, wanted)
    if emulated is model:
        return folder  # nothing in it that the CPUs do differently
    other = folder.with_name(EMULATED)
    shutil.copytree(folder, other)
    save_graphs({GRAPH_NAME: emulated}, other)
    write_manifest(other, manifest)
    return other


def _add_goldens(parent: Bundle, made: _Made, folder: Path, manifest: Manifest) -> Manifest:
    """Ask the new graph what the parent's goldens ask, and store what the device's CPU answers."""
    with EdgeModel.load(_faithful(folder, made.model, manifest)) as edge:
        samples, old = read_goldens(parent, edge.task)
        encoded = [edge.task.encode(sample) for sample in samples]
        outputs = [edge.run(edge.task.stack([arrays])) for arrays in encoded]
    logits = np.concatenate([found[LOGITS] for found in outputs])
    largest = max(1.0, float(np.abs(logits).max()))
    if made.check is not None:
        wanted = np.concatenate([made.check(found) for found in outputs])
        worst = float(np.abs(logits - wanted).max())
        if not worst <= PARITY * largest:
            raise EdgetuneError(
                f"the new graph's logits are {worst:.3g} from those of the head that was judged,"
                f" allowed {PARITY * largest:.3g}"
            )
    write_goldens(folder, samples, encoded, logits)
    share = parent.manifest.goldens.tolerance / max(1.0, float(np.abs(old).max()))
    goldens = Goldens(count=len(samples), tolerance=float(f"{share * largest:.6g}"))
    return write_manifest(folder, dataclasses.replace(manifest, goldens=goldens))


def _card(parent: Bundle, manifest: Manifest, result: MergeResult) -> str:
    """Return MODEL_CARD.md: what was merged, and the parent's card below it."""
    rows = "\n".join(
        f"| {c.id[:12]} | {c.source[:12]} | {c.generation} | {c.samples:g} | {c.noise} |"
        for c in result.contributions
    )
    counts = ", ".join(f"{label} {count:g}" for label, count in result.counts.items())
    notes = "".join(f"- {note}\n" for note in result.notes)
    accuracy, before = manifest.evaluation.metrics["accuracy"], result.canary[0]
    text = f"""# {manifest.name}

{manifest.task}, {len(manifest.labels)} labels, {manifest.precision}, for the profile
`{manifest.profile}`: release {result.release}, made by edgetune {manifest.edgetune_version} of what
devices learned with release {parent.manifest.release}.

- parent: {parent.manifest.name}, release {parent.manifest.release}, digest
  {result.parent}
- labels: {", ".join(result.labels)}
- new labels: {", ".join(result.new_labels) or "none"}
- merged: {result.kind} of {len(result.contributions)} devices
- samples that they learned: {counts or "not said"}

## Measured

On the {manifest.evaluation.samples} canary samples of the parent's classes, which nothing was
trained on: accuracy {accuracy.value:.4f} [{accuracy.low:.4f}, {accuracy.high:.4f}], the parent's
{before:.4f}. New labels have no canary: of them nothing was measured.

{" ".join(result.reasons)}

## Devices

| file | device | generation | samples | noise |
|---|---|---|---|---|
{rows}

{notes}"""
    if CARD_NAME in parent.manifest.files:
        card = parent.read(CARD_NAME).decode("utf-8", "replace")
        lowered = "\n".join(f"#{x}" if x.startswith("#") else x for x in card.splitlines())
        text += f"\n## The parent's card\n\n{lowered}\n"
    return text
