"""What an answer rests on: how much each token of a text, or part of an image, adds to a logit.

A run is asked through torch, by gradients (captum) or by leaving parts out; a bundle is only asked
through the device runtime, by leaving parts out, so that what ships is what is explained.

| method | of | what a value is |
|---|---|---|
| integrated-gradients | runs | gradient of the logit, integrated along the line from a baseline; values add up to the difference of the two logits (Sundararajan et al. 2017, arXiv:1703.01365) |
| gradcam | runs on images | last feature map, weighted by its mean gradients (Selvaraju et al. 2017, arXiv:1610.02391) |
| occlusion | runs and bundles | what the logit loses without the token, or with the patch painted over (Zeiler & Fergus 2014, arXiv:1311.2901) |
"""  # noqa: E501

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, DataError, MissingExtraError
from edgetune.runtime.bundle import TOKENIZER_NAME
from edgetune.runtime.manifest import MANIFEST_NAME
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.records import nearest
from edgetune.runtime.tasks.classification import softmax
from edgetune.runtime.tasks.image_classification import Pixels, decode_image
from edgetune.runtime.tasks.text_classification import open_tokenizer
from edgetune.tasks import Kind, task_kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgetune.train.run import Run

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]
MethodName = Literal["auto", "integrated-gradients", "gradcam", "occlusion"]

# points on the line from the baseline; captum's default, Gauss-Legendre
STEPS = 50
# share of the difference by which attributions may miss it before more steps are advised
COARSE = 0.05
# patches along each edge of an image that are painted over
PATCHES = 12
# samples handed over at a time
CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class Completeness:
    """Whether attributions add up: their sum, and f(input) - f(baseline), in logits."""

    total: float
    difference: float

    @property
    def delta(self) -> float:
        """How far the sum is off; 0 is exact, more steps bring it nearer."""
        return self.total - self.difference

    @property
    def coarse(self) -> bool:
        """Whether it is off by so much that more steps are worth their time."""
        return abs(self.delta) > COARSE * abs(self.difference)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One answer, explained.

    Attributes:
        shown: the text, or the path of the image.
        method: that made it; never "auto".
        target: the label that is explained.
        predicted: the label that the model gives.
        probability: of the target.
        values: in logits, what speaks for the target above 0, against it below (Grad-CAM: 0 and
            up, of no unit). Text: (tokens,); image: (rows, columns).
        tokens: of a text: the pieces that `values` are of, as they stand in it, with the space
            before them; special tokens, which stand nowhere, in the tokenizer's own words.
        special: of a text: which tokens are such.
        pixels: of an image: what `values` lie over, uint8 (height, width, 3).
        completeness: where the method promises it.
    """

    shown: str
    method: str
    target: str
    predicted: str
    probability: float
    values: FloatArray
    tokens: tuple[str, ...] = ()
    special: tuple[bool, ...] = ()
    pixels: Pixels | None = None
    completeness: Completeness | None = None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample as it is explained: token ids (tokens,) or pixels (height, width, 3).

    tokens, special: of a text: pieces, and which of them the tokenizer adds by itself.
    """

    array: npt.NDArray[Any]
    tokens: tuple[str, ...] = ()
    special: tuple[bool, ...] = ()


class Subject(Protocol):
    """A model that is explained."""

    kind: Kind
    labels: tuple[str, ...]
    temperature: float

    def encode(self, sample: str) -> Encoded:
        """Return a text or the image at a path as the model takes it."""

    def logits(self, arrays: Sequence[npt.NDArray[Any]]) -> FloatArray:
        """Return logits, (samples, labels), of arrays like `Encoded.array`."""

    def close(self) -> None:
        """Give back what it holds."""


class BundleSubject:
    """A bundle, asked through the device runtime."""

    def __init__(self, model: EdgeModel) -> None:
        """Take a loaded bundle, which `close` closes."""
        self.kind = task_kind(model.manifest.task)
        self.labels = model.labels
        found = model.manifest.calibration
        self.temperature = 1.0 if found is None else found.temperature
        self._model = model
        self._tokenizer: Any = None
        if self.kind == "text":
            bundle = model.bundle
            self._tokenizer = open_tokenizer(
                bundle.read(TOKENIZER_NAME), model.manifest.options["max_length"],
                where=str(bundle.where),
            )  # fmt: skip

    def encode(self, sample: str) -> Encoded:
        """Return a text or the image at a path as the device takes it."""
        if self.kind == "image":
            return Encoded(array=decode_image(sample))
        return _tokenized(self._tokenizer, sample)

    def logits(self, arrays: Sequence[npt.NDArray[Any]]) -> FloatArray:
        """Return logits, (samples, labels), in batches as the manifest allows."""
        most = min(self._model.manifest.session.max_batch, CHUNK)
        return _in_chunks(arrays, most, self._run)

    def close(self) -> None:
        """Close the bundle."""
        self._model.close()

    def _run(self, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        if self.kind == "image":
            encoded = [{"image": a} for a in arrays]
        else:
            encoded = [{"input_ids": a, "attention_mask": np.ones_like(a)} for a in arrays]
        found: npt.NDArray[Any] = self._model.run(self._model.task.stack(encoded))["logits"]
        return found


class RunSubject:
    """A run, asked through torch."""

    def __init__(self, run: "Run") -> None:
        """Take an opened run."""
        import torch

        self.kind = task_kind(run.config.task)
        self.labels = run.record.labels
        self.temperature = 1.0
        self.task: Any = run.task
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network: nn.Module = run.task.network.to(self.device).eval()
        self._tokenizer: Any = None
        if self.kind == "text":
            options = run.task.device_options()
            self.pad_id = int(options["pad_id"])
            data = run.task.device_files()[TOKENIZER_NAME]
            self._tokenizer = open_tokenizer(
                data, options["max_length"], where=str(run.folder / TOKENIZER_NAME)
            )

    def encode(self, sample: str) -> Encoded:
        """Return a text or the image at a path as the network takes it."""
        if self.kind == "image":
            return Encoded(array=decode_image(sample))
        return _tokenized(self._tokenizer, sample)

    def logits(self, arrays: Sequence[npt.NDArray[Any]]) -> FloatArray:
        """Return logits, (samples, labels)."""
        return _in_chunks(arrays, CHUNK, self._run)

    def close(self) -> None:
        """Do nothing."""

    def batch(self, arrays: Sequence[npt.NDArray[Any]]) -> "dict[str, Tensor]":
        """Return arrays as the batch that the task's network takes."""
        import torch

        if self.kind == "image":
            pixels = [self.task.preprocess(torch.from_numpy(a)[None])[0] for a in arrays]
            return {"pixels": torch.stack(pixels).to(self.device)}
        width = max(1, *(len(a) for a in arrays))
        ids = torch.full((len(arrays), width), self.pad_id)
        mask = torch.zeros((len(arrays), width), dtype=torch.int64)
        for row, array in enumerate(arrays):
            ids[row, : len(array)] = torch.from_numpy(array)
            mask[row, : len(array)] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def forward(self, batch: "dict[str, Tensor]") -> "Tensor":
        """Return logits, (samples, labels), with gradients where they are on."""
        logits: Tensor = self.task.logits(self.network, batch)
        return logits

    def _run(self, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        import torch

        with torch.inference_mode():
            found: npt.NDArray[Any] = self.forward(self.batch(arrays)).double().cpu().numpy()
        return found


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a method returns; fields as of `Explanation`."""

    values: FloatArray
    pixels: Pixels | None = None
    completeness: Completeness | None = None


# subject, sample, index of the target's logit, options, progress of one sample -> what was found
Attribute = Callable[[Any, Encoded, int, "Options", "Progress | None"], Found]


@dataclass(frozen=True, kw_only=True)
class Options:
    """steps: of integrated gradients. patches: of an image, along each edge."""

    steps: int = STEPS
    patches: int = PATCHES


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of `METHODS`: what it can explain, and how."""

    kinds: tuple[Kind, ...]
    bundles: bool
    attribute: Attribute


def open_subject(path: Path) -> Subject:
    """Open a run's folder, or a bundle.

    Raises:
        ConfigError: it is neither.
        IntegrityError: a file of it is damaged.
    """
    if (path / MANIFEST_NAME).is_file() or path.is_file():
        return BundleSubject(EdgeModel.load(path, check="full"))
    from edgetune.train.run import open_run

    return RunSubject(open_run(path))


def explain(
    subject: Subject,
    samples: Sequence[str],
    *,
    target: str = "",
    method: str = "auto",
    steps: int = STEPS,
    patches: int = PATCHES,
    progress: Progress | None = None,
) -> list[Explanation]:
    """Explain an answer a sample.

    Args:
        subject: of `open_subject`.
        samples: texts, or paths of images.
        target: the label to explain; "" for the one that is predicted.
        method: "auto" is integrated gradients for a text, and for an image Grad-CAM where the
            network ends in feature maps, else integrated gradients; occlusion for a bundle.
        steps: of integrated gradients, 2 or more; more make it more exact.
        patches: painted over along each edge of an image, 2 to 64.
        progress: called with (done, all) in units of a sample's work.

    Raises:
        ConfigError: there is no such method or label, the method does not suit the model, or a
            number is out of range.
        DataError: a sample cannot be read.
        MissingExtraError: captum is needed and not installed.
    """
    if target and target not in subject.labels:
        raise ConfigError(f"target: no label {target!r}{nearest(target, subject.labels)}")
    if steps < 2 or not 2 <= patches <= 64:
        raise ConfigError(
            f"expected 2 steps or more and 2 to 64 patches, got {steps} and {patches}"
        )
    chosen = _method(subject, method)
    options = Options(steps=steps, patches=patches)
    explanations = []
    for number, sample in enumerate(samples):
        encoded = subject.encode(sample)
        logits = subject.logits([encoded.array])[0]
        if logits.shape != (len(subject.labels),):
            raise ConfigError("only models that give each sample one label can be explained")
        best = int(logits.argmax())
        index = subject.labels.index(target) if target else best
        found = METHODS[chosen].attribute(
            subject, encoded, index, options, _part(progress, number, len(samples))
        )
        shares = softmax(logits[None].astype(np.float32), subject.temperature)[0]
        explanations.append(
            Explanation(
                shown=sample,
                method=chosen,
                target=subject.labels[index],
                predicted=subject.labels[best],
                probability=float(shares[index]),
                values=found.values,
                tokens=encoded.tokens,
                special=encoded.special,
                pixels=found.pixels,
                completeness=found.completeness,
            )
        )
    return explanations


def _method(subject: Subject, name: str) -> str:
    bundle = not isinstance(subject, RunSubject)
    if name == "auto":
        if bundle:
            return "occlusion"
        spatial = subject.kind == "image" and feature_layer(cast("RunSubject", subject)) is not None
        return "gradcam" if spatial else "integrated-gradients"
    if name not in METHODS:
        raise ConfigError(f"method: no {name!r}{nearest(name, [*METHODS, 'auto'])}")
    row = METHODS[name]
    if bundle and not row.bundles:
        raise ConfigError(
            f"method: {name} takes gradients, which a bundle has not; use occlusion, or name the"
            " run that it was exported from"
        )
    if subject.kind not in row.kinds:
        raise ConfigError(
            f"method: {name} explains {' and '.join(row.kinds)} models, this one takes"
            f" {subject.kind}s"
        )
    return name


def _occlusion(
    subject: Subject, encoded: Encoded, index: int, options: Options, progress: Progress | None
) -> Found:
    if subject.kind == "text":
        return Found(values=_left_out(subject, encoded, index, progress))
    pixels: Pixels = encoded.array
    values = _painted_over(subject, pixels, index, options.patches, progress)
    return Found(values=values, pixels=pixels)


def _left_out(
    subject: Subject, encoded: Encoded, index: int, progress: Progress | None
) -> FloatArray:
    """Return what the logit loses without each token, (tokens,); special ones stay: 0."""
    places = [i for i, special in enumerate(encoded.special) if not special]
    without = (np.delete(encoded.array, i) for i in places)
    values = np.zeros(len(encoded.special))
    whole = subject.logits([encoded.array])[0, index]
    for at, logit in _each(subject, without, len(places), index, progress):
        values[places[at]] = whole - logit
    return values


def _painted_over(
    subject: Subject, pixels: Pixels, index: int, patches: int, progress: Progress | None
) -> FloatArray:
    """Return what the logit loses with each patch in the image's mean colour, (rows, columns)."""
    height, width = pixels.shape[:2]
    rows = np.linspace(0, height, min(patches, height) + 1).round().astype(int)
    columns = np.linspace(0, width, min(patches, width) + 1).round().astype(int)
    colour = pixels.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    shape = (len(rows) - 1, len(columns) - 1)

    def painted() -> Iterator[Pixels]:
        for row, column in np.ndindex(shape):
            copy = pixels.copy()
            copy[rows[row] : rows[row + 1], columns[column] : columns[column + 1]] = colour
            yield copy

    values = np.zeros(shape)
    whole = subject.logits([pixels])[0, index]
    for at, logit in _each(subject, painted(), values.size, index, progress):
        values.flat[at] = whole - logit
    return values


def _each(
    subject: Subject,
    arrays: Iterator[npt.NDArray[Any]],
    count: int,
    index: int,
    progress: Progress | None,
) -> Iterator[tuple[int, float]]:
    """Yield (number, logit) of arrays, made a few at a time."""
    done = 0
    while done < count:
        chunk = [next(arrays) for _ in range(min(CHUNK, count - done))]
        for at, logit in enumerate(subject.logits(chunk)[:, index]):
            yield done + at, float(logit)
        done += len(chunk)
        if progress:
            progress(done, count)


def _integrated_gradients(
    subject: RunSubject, encoded: Encoded, index: int, options: Options, progress: Progress | None
) -> Found:
    gradients = _token_gradients if subject.kind == "text" else _pixel_gradients
    found = gradients(subject, encoded, index, options.steps)
    if progress:
        progress(1, 1)
    return found


def _token_gradients(subject: RunSubject, encoded: Encoded, index: int, steps: int) -> Found:
    """Integrate at the word embeddings, from padding in place of all but special tokens."""
    import torch

    attr = _captum()
    layer = _word_embeddings(subject.network)
    batch = subject.batch([encoded.array])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    special = torch.tensor([encoded.special], device=ids.device)
    baseline = torch.where(special, ids, subject.pad_id)

    def forward(input_ids: "Tensor", attention_mask: "Tensor") -> "Tensor":
        return subject.forward({"input_ids": input_ids, "attention_mask": attention_mask})

    parts: Tensor = attr.LayerIntegratedGradients(forward, layer).attribute(
        ids, baselines=baseline, target=index, additional_forward_args=(mask,), n_steps=steps,
        internal_batch_size=CHUNK,
    )  # (1, tokens, width)  # fmt: skip
    values = parts.detach().double().sum(-1)[0].cpu().numpy()
    with torch.inference_mode():
        ends = subject.forward(
            {"input_ids": torch.cat([ids, baseline]), "attention_mask": mask.expand(2, -1)}
        )[:, index].double()
    return Found(values=values, completeness=_completeness(values, ends))


def _pixel_gradients(subject: RunSubject, encoded: Encoded, index: int, steps: int) -> Found:
    """Integrate at the network's input, from the mean colour, which is 0 there."""
    import torch

    attr = _captum()
    pixels = subject.batch([encoded.array])["pixels"]

    def forward(x: "Tensor") -> "Tensor":
        return subject.forward({"pixels": x})

    parts: Tensor = attr.IntegratedGradients(forward).attribute(
        pixels, baselines=torch.zeros_like(pixels), target=index, n_steps=steps,
        internal_batch_size=CHUNK,
    )  # (1, 3, size, size)  # fmt: skip
    values = parts.detach().double().sum(1)[0].cpu().numpy()
    with torch.inference_mode():
        ends = forward(torch.cat([pixels, torch.zeros_like(pixels)]))[:, index].double()
    return Found(
        values=values, pixels=_seen(subject, pixels), completeness=_completeness(values, ends)
    )


def _gradcam(
    subject: RunSubject, encoded: Encoded, index: int, _: Options, progress: Progress | None
) -> Found:
    attr = _captum()
    layer = feature_layer(subject)
    if layer is None:
        raise ConfigError(
            "method: gradcam needs a network that ends in feature maps, which this one does not;"
            " use integrated-gradients or occlusion"
        )
    pixels = subject.batch([encoded.array])["pixels"].requires_grad_(True)

    def forward(x: "Tensor") -> "Tensor":
        return subject.forward({"pixels": x})

    weighted: Tensor = attr.LayerGradCam(forward, layer).attribute(
        pixels, target=index, relu_attributions=True
    )  # (1, 1, rows, columns)
    if progress:
        progress(1, 1)
    values = weighted.detach().double()[0, 0].cpu().numpy()
    return Found(values=values, pixels=_seen(subject, pixels))


METHODS: Mapping[str, Method] = {
    "integrated-gradients": Method(
        kinds=("text", "image"), bundles=False, attribute=_integrated_gradients
    ),
    "gradcam": Method(kinds=("image",), bundles=False, attribute=_gradcam),
    "occlusion": Method(kinds=("text", "image"), bundles=True, attribute=_occlusion),
}


def feature_layer(subject: RunSubject) -> "nn.Module | None":
    """Return the last layer that gives feature maps, (batch, channels, rows, columns).

    Of a transformer the embedding of patches is the only one, at the beginning, where Grad-CAM
    would say nothing: it is none.
    """
    import torch
    from torch import nn

    size = subject.task.preprocess.spec.input_size
    seen: list[tuple[nn.Module, bool]] = []  # in the order in which they are done, inner first

    def note(module: nn.Module, _: Any, output: Any) -> None:
        maps = isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1
        seen.append((module, maps))

    hooks = [module.register_forward_hook(note) for module in subject.network.modules()]
    try:
        with torch.inference_mode():
            subject.forward({"pixels": torch.zeros((1, 3, size, size), device=subject.device)})
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(id(module) for module, _ in seen)
    # of a module that is called twice, as some activations are, no hook could tell which it sees
    last = max((i for i, (m, maps) in enumerate(seen) if maps and times[id(m)] == 1), default=-1)
    return seen[last][0] if last >= len(seen) // 2 else None


def _word_embeddings(network: "nn.Module") -> "nn.Module":
    find = getattr(network, "get_input_embeddings", None)
    if find is None:
        raise ConfigError("method: this network has no word embeddings; use occlusion")
    layer: nn.Module = find()
    return layer


def _captum() -> Any:
    try:
        import captum.attr
    except ImportError as error:
        raise MissingExtraError("captum", "explain") from error
    return captum.attr


def _completeness(values: FloatArray, ends: "Tensor") -> Completeness:
    """Compare attributions with the logits of input and baseline, (2,)."""
    return Completeness(total=float(values.sum()), difference=float(ends[0] - ends[1]))


def _seen(subject: RunSubject, pixels: "Tensor") -> Pixels:
    """Return what the network saw of an image, uint8 (size, size, 3)."""
    preprocess = subject.task.preprocess
    shown = pixels.detach()[0].cpu() / preprocess.scale.cpu() + preprocess.mean.cpu()  # (3, S, S)
    result: Pixels = shown.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return result


def _tokenized(tokenizer: Any, text: str) -> Encoded:
    if not isinstance(text, str):
        raise DataError(f"expected a string, got {type(text).__name__}")
    found = tokenizer.encode(text)
    special = tuple(bool(s) for s in found.special_tokens_mask)
    pieces, before = [], 0
    for name, (_, end), is_special in zip(found.tokens, found.offsets, special, strict=True):
        pieces.append(name if is_special else text[before:end])
        before = before if is_special else max(before, end)
    if not any(not s for s in special):
        raise DataError(f"{text!r:.80}: has no token to explain an answer by")
    return Encoded(array=np.array(found.ids, np.int64), tokens=tuple(pieces), special=special)


def _in_chunks(
    arrays: Sequence[npt.NDArray[Any]],
    most: int,
    run: Callable[[Sequence[npt.NDArray[Any]]], npt.NDArray[Any]],
) -> FloatArray:
    rows = [run(arrays[i : i + most]) for i in range(0, len(arrays), most)]
    return np.concatenate(rows).astype(np.float64)


def _part(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Return the progress of one sample of `count`, in thousandths of it."""
    if progress is None:
        return None
    return lambda done, total: progress(1000 * number + 1000 * done // total, 1000 * count)
