"""What training changes about a sample, each a function of the sample and a generator."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgetune.config import Augmentation
from edgetune.runtime.tasks.image_classification import Pixels

# the share of the image's area that "standard" augmentation keeps, and its aspect ratio
CROP_AREA = (0.4, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)

TokenIds = npt.NDArray[np.integer[Any]]


def augment(image: Pixels, rng: np.random.Generator, *, kind: Augmentation) -> Pixels:
    """Change an image at random, uint8 (height, width, 3); cropped ones are smaller.

    none: nothing. flip: mirrored half of the time. standard: a random window (Inception's,
    Szegedy et al. 2015, section 6, drawn milder), then flip. randaugment, augmix: standard,
    then torchvision's RandAugment (Cubuk et al. 2019, arXiv:1909.13719; two operations of
    magnitude 9) or AugMix (Hendrycks et al. 2020, arXiv:1912.02781; severity 3).

    Args:
        image: the image; left as it is.
        rng: decides everything; the same state gives the same image.
        kind: the config's `augment`.
    """
    if kind == "none":
        return image
    if kind != "flip":
        image = _crop(image, rng)
    if rng.random() < 0.5:
        # a copy: of an image one pixel wide, numpy takes the mirrored view for contiguous, but
        # torch does not take its negative stride
        image = image[:, ::-1].copy()
    if kind in ("randaugment", "augmix"):
        image = _by_policy(image, rng, kind)
    return np.ascontiguousarray(image)


def drop_tokens(
    ids: TokenIds, rng: np.random.Generator, share: float, *, keep: frozenset[int]
) -> TokenIds:
    """Leave each token out with probability `share`; at least one that is not special stays.

    Random deletion of Wei & Zou 2019 (arXiv:1901.11196), on tokens for words.

    Args:
        ids: token ids, (tokens,).
        rng: decides which.
        share: probability, 0 to 1.
        keep: ids of special tokens, which always stay.

    Returns:
        ids in their order, (tokens that stay,).
    """
    special = np.isin(ids, np.fromiter(keep, np.int64, len(keep)))
    stays = special | (rng.random(len(ids)) >= share)
    ordinary = np.flatnonzero(~special)
    if len(ordinary) and not stays[ordinary].any():
        stays[rng.choice(ordinary)] = True
    return ids[stays]


def _crop(image: Pixels, rng: np.random.Generator) -> Pixels:
    height, width = image.shape[:2]
    area = height * width * rng.uniform(*CROP_AREA)
    aspect = np.exp(rng.uniform(*np.log(CROP_ASPECT)))
    h = int(np.clip(round((area / aspect) ** 0.5), 1, height))
    w = int(np.clip(round((area * aspect) ** 0.5), 1, width))
    top = int(rng.integers(0, height - h + 1))
    left = int(rng.integers(0, width - w + 1))
    return image[top : top + h, left : left + w]


def _by_policy(image: Pixels, rng: np.random.Generator, kind: str) -> Pixels:
    """Apply torchvision's `kind`, whose randomness is torch's own generator: lent, and put back."""
    seed = int(rng.integers(2**63))
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs too, whose state is not put back
        torch.default_generator.manual_seed(seed)
        pixels = torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1)
        changed = _policy(kind)(pixels)
    result: Pixels = changed.permute(1, 2, 0).numpy()
    return result


@functools.cache
def _policy(kind: str) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    policies: dict[str, Callable[[Tensor], Tensor]] = {
        "randaugment": v2.RandAugment(),
        "augmix": v2.AugMix(),
    }
    return policies[kind]
