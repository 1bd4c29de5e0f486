"""Image classification in the cloud: files -> uint8 pixels -> augmentation -> the network's input.

Decoding is the device half's own function, and resizing is the module that goes into the
graph, so training and device see the same pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgetune.config import TrainConfig
from edgetune.data import Split
from edgetune.models.load import Loaded
from edgetune.models.preprocessing import Preprocess
from edgetune.runtime.tasks.image_classification import Pixels, decode_image
from edgetune.tasks import GraphSpec
from edgetune.tasks.graph import SplitClassifier, logits_of

# decoded images, or the network's inputs where no augmentation changes them, are kept up to
# this much, so that later epochs need not make them again
CACHE_BYTES = 2**30
# the share of the image's area that "standard" augmentation keeps, and its aspect ratio
CROP_AREA = (0.4, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)


class ImageSamples:
    """A split of image files, decoded when asked for."""

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        preprocess: Preprocess,
        *,
        augment: str,
        seed: int,
    ) -> None:
        """Keep paths and label indices; `augment` is "none", "flip" or "standard"."""
        self.lengths: Sequence[int] | None = None
        self._paths = paths
        self._labels = labels
        self._preprocess = preprocess
        self._augment = augment
        self._seed = seed
        self._cache: dict[int, Pixels | Tensor] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return pixels, float32 (3, size, size), and label; augmented by (seed, epoch, index)."""
        epoch, index = key
        kept = self._cache.get(index)
        if isinstance(kept, Tensor):
            return {"pixels": kept, "label": self._labels[index]}
        image = decode_image(self._paths[index]) if kept is None else kept
        if self._augment == "none":
            pixels = self._prepare(image)
            self._keep(index, pixels)
        else:
            self._keep(index, image)
            rng = np.random.default_rng((self._seed, epoch, index))
            pixels = self._prepare(augment(image, rng, crop=self._augment == "standard"))
        return {"pixels": pixels, "label": self._labels[index]}

    def _prepare(self, image: Pixels) -> Tensor:
        with torch.no_grad():
            pixels: Tensor = self._preprocess(torch.from_numpy(image[None]))[0]
        return pixels

    def _keep(self, index: int, value: Pixels | Tensor) -> None:
        if index not in self._cache and self._cached_bytes + value.nbytes <= CACHE_BYTES:
            self._cache[index] = value
            self._cached_bytes += value.nbytes


class ImageClassification:
    """Runs transformers and torchvision classifiers alike."""

    def __init__(self, loaded: Loaded, labels: Sequence[str], config: TrainConfig) -> None:
        """Settle the preprocessing."""
        assert loaded.preprocessing is not None
        self.network = loaded.network
        self.labels = tuple(labels)
        spec = loaded.preprocessing
        if config.image_size is not None:
            spec = spec.at_size(config.image_size)
        self.preprocess = Preprocess(spec)
        self._keyword = "pixel_values" if loaded.family.source == "transformers" else ""
        self._augment = config.augment
        self._seed = config.seed

    def samples(self, split: Split, *, training: bool) -> ImageSamples:
        """Return a split's images, augmented where `training`."""
        index = {label: i for i, label in enumerate(self.labels)}
        return ImageSamples(
            split.inputs,
            [index[label] for label in split.labels],
            self.preprocess,
            augment=self._augment if training else "none",
            seed=self._seed,
        )

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return pixels, float32 (batch, 3, size, size), and labels."""
        return {
            "pixels": torch.stack([s["pixels"] for s in samples]),
            "labels": torch.tensor([s["label"] for s in samples]),
        }

    def logits(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return logits, shape (batch, labels)."""
        pixels = batch["pixels"]
        return logits_of(network(**{self._keyword: pixels}) if self._keyword else network(pixels))

    def graph(self, family_output: str) -> GraphSpec:
        """Return uint8 pixels of any size -> logits and features."""
        image = torch.zeros((2, 70, 90, 3), dtype=torch.uint8)
        return GraphSpec(
            module=_ImageGraph(
                self.preprocess, SplitClassifier(self.network, family_output), self._keyword
            ),
            inputs={"image": image},
            free={"image": {0: "batch", 1: "height", 2: "width"}},
        )

    def device_options(self) -> dict[str, Any]:
        """Return nothing: the graph does all that follows decoding."""
        return {}

    def device_files(self) -> dict[str, bytes]:
        """Return nothing."""
        return {}


class _ImageGraph(nn.Module):
    """Preprocessing and network in one; the name `preprocess` marks its nodes in the graph."""

    def __init__(self, preprocess: Preprocess, classifier: SplitClassifier, keyword: str) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.classifier = classifier
        self.keyword = keyword

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.classifier(
            **{self.keyword or "x": self.preprocess(image)}
        )
        return outputs


def augment(image: Pixels, rng: np.random.Generator, *, crop: bool) -> Pixels:
    """Mirror at random, and where `crop` keep a random window; uint8 (height, width, 3).

    The window is Inception's (Szegedy et al. 2015, section 6), drawn milder.
    """
    if crop:
        height, width = image.shape[:2]
        area = height * width * rng.uniform(*CROP_AREA)
        aspect = np.exp(rng.uniform(*np.log(CROP_ASPECT)))
        h = int(np.clip(round((area / aspect) ** 0.5), 1, height))
        w = int(np.clip(round((area * aspect) ** 0.5), 1, width))
        top = int(rng.integers(0, height - h + 1))
        left = int(rng.integers(0, width - w + 1))
        image = image[top : top + h, left : left + w]
    if rng.random() < 0.5:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
