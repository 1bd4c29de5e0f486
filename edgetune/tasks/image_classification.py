"""Image classification and regression in the cloud: files -> uint8 pixels -> the network's input.

What the labels are, one class, several labels or a number, is data: `target`. Pixels are
augmented on the way.

Decoding is the device half's own function, and resizing is the module that goes into the
graph, so training and device see the same pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgetune.config import Augmentation, TrainConfig
from edgetune.data import Scale, Split, Target
from edgetune.models.load import Loaded
from edgetune.models.preprocessing import Preprocess
from edgetune.runtime.tasks.image_classification import Pixels, decode_image
from edgetune.tasks import GraphSpec
from edgetune.tasks.augment import augment
from edgetune.tasks.graph import SplitClassifier, logits_of
from edgetune.tasks.targets import scale_options, target_tensor

# decoded images, or the network's inputs where no augmentation changes them, are kept up to
# this much, so that later epochs need not make them again
CACHE_BYTES = 2**30


class ImageSamples:
    """A split of image files, decoded when asked for."""

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | Tensor,
        preprocess: Preprocess,
        *,
        augment: Augmentation,
        seed: int,
        views: int = 0,
    ) -> None:
        """Keep paths and labels.

        Args:
            paths: of the image files.
            labels: index of each image's label, or what else `target_tensor` gives.
            preprocess: pixels -> the network's input.
            augment: kind of augmentation, see `edgetune.tasks.augment`.
            seed: of the augmentation.
            views: how many augmentations of an image there are; 0 for a new one every epoch.
        """
        self.lengths: Sequence[int] | None = None
        self.views: int | None = {"none": 1, "flip": 2}.get(augment, views or None)
        self._paths = paths
        self._labels = torch.as_tensor(labels)
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
        pixels = self._pixels(index, self.view(epoch, index))
        return {"pixels": pixels, "label": self._labels[index]}

    def view(self, epoch: int, index: int) -> int:
        """Return 0 without augmentation, 1 where a flip mirrors, else which augmentation."""
        if self._augment == "flip":
            return int(np.random.default_rng((self._seed, epoch, index)).random() < 0.5)
        return epoch if self.views is None else epoch % self.views

    def batch(
        self, indices: Sequence[int], *, epoch: int = 0, view: int | None = None
    ) -> dict[str, Tensor]:
        """Return `pixels`, float32 (batch, 3, size, size), and `labels`, (batch, ...)."""
        pixels = [
            self._pixels(int(i), self.view(epoch, int(i)) if view is None else view)
            for i in indices
        ]
        return {"pixels": torch.stack(pixels), "labels": self._labels[torch.as_tensor(indices)]}

    def outline(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return pixels that are all the same 0, which take no memory, and labels."""
        side = self._preprocess.spec.input_size
        return {
            "pixels": torch.zeros(1, 1, 1, 1).expand(len(indices), 3, side, side),
            "labels": self._labels[torch.as_tensor(indices)],
        }

    def _pixels(self, index: int, view: int) -> Tensor:
        kept = self._cache.get(index)
        if isinstance(kept, Tensor):
            return kept
        image = decode_image(self._paths[index]) if kept is None else kept
        if self._augment == "none":
            pixels = self._prepare(image)
            self._keep(index, pixels)
            return pixels
        self._keep(index, image)
        if self._augment == "flip":
            return self._prepare(image[:, ::-1].copy() if view else image)
        rng = np.random.default_rng((self._seed, view, index))
        return self._prepare(augment(image, rng, kind=self._augment))

    def _prepare(self, image: Pixels) -> Tensor:
        with torch.no_grad():
            pixels: Tensor = self._preprocess(torch.from_numpy(image[None]))[0]
        return pixels

    def _keep(self, index: int, value: Pixels | Tensor) -> None:
        if index not in self._cache and self._cached_bytes + value.nbytes <= CACHE_BYTES:
            self._cache[index] = value
            self._cached_bytes += value.nbytes


class ImageClassification:
    """Runs transformers and torchvision classifiers alike; for every target."""

    def __init__(
        self,
        loaded: Loaded,
        labels: Sequence[str],
        config: TrainConfig,
        *,
        target: Target = "classes",
        scale: Scale | None = None,
    ) -> None:
        """Settle the preprocessing."""
        assert loaded.preprocessing is not None
        self.network = loaded.network
        self.labels = tuple(labels)
        self.target, self.scale = target, scale
        spec = loaded.preprocessing
        if config.image_size is not None:
            spec = spec.at_size(config.image_size)
        self.preprocess = Preprocess(spec)
        self._keyword = "pixel_values" if loaded.family.source == "transformers" else ""
        self._augment, self._views = config.augment, config.augment_views
        self._seed = config.seed

    def samples(self, split: Split, *, training: bool) -> ImageSamples:
        """Return a split's images, augmented where `training`."""
        return ImageSamples(
            split.inputs,
            target_tensor(split, self.labels, self.scale),
            self.preprocess,
            augment=self._augment if training else "none",
            seed=self._seed,
            views=self._views if training else 0,
        )

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return pixels, float32 (batch, 3, size, size), and labels."""
        return {
            "pixels": torch.stack([s["pixels"] for s in samples]),
            "labels": torch.stack([torch.as_tensor(s["label"]) for s in samples]),
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
        """Return a regression's scale: the graph does all else that follows decoding."""
        return dict(scale_options(self.scale))

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
