"""Mixing the images of a batch, and their labels alike: mixup and CutMix.

Every image is mixed with the one before it in the batch, the first with the last, as
torchvision.transforms.v2.MixUp and CutMix do; a batch is shuffled anyway. All randomness comes
from the generator that is passed in, so a resumed run mixes as an unbroken one.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgetune.config import TrainConfig


def mix(
    pixels: Tensor, targets: Tensor, labels: int, config: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix a batch by mixup or CutMix; by either, evenly, where both are on.

    Args:
        pixels: float (batch, 3, height, width), on any device.
        targets: int64 (batch,), or float shares (batch, labels).
        labels: number of labels.
        config: mixup and cutmix, the alpha of Beta(alpha, alpha); 0 is off.
        generator: of the CPU, so that nothing is fetched from the device; it moves on by one
            number a batch.

    Returns:
        pixels like `pixels`, and float32 targets (batch, labels). Where both are off, the
        pixels as they are and one-hot targets.
    """
    shares = targets if targets.ndim == 2 else functional.one_hot(targets, labels)
    shares = shares.float()
    alphas = {"mixup": config.mixup, "cutmix": config.cutmix}
    kinds = [kind for kind, alpha in alphas.items() if alpha > 0]
    if not kinds:
        return pixels, shares
    # torch's own beta distribution takes no generator
    seed = torch.randint(2**63 - 1, (), generator=generator)
    rng = np.random.default_rng(int(seed))
    kind = kinds[int(rng.integers(len(kinds)))]
    share = float(rng.beta(alphas[kind], alphas[kind]))
    if kind == "mixup":
        return blend(pixels, share), blend(shares, share)
    height, width = pixels.shape[-2:]
    centre = (int(rng.integers(height)), int(rng.integers(width)))
    top, left, bottom, right = cut_box(height, width, share, centre)
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = pixels.roll(1, 0)[..., top:bottom, left:right]
    return mixed, blend(shares, 1 - (bottom - top) * (right - left) / (height * width))


def blend(batch: Tensor, share: float) -> Tensor:
    """Return share * each + (1 - share) * the one before it, (batch, ...).

    Source: Zhang et al. 2018 (arXiv:1710.09412), section 2.
    """
    return batch.roll(1, 0).mul_(1 - share).add_(batch.mul(share))


def cut_box(
    height: int, width: int, share: float, centre: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right) of the window that is replaced.

    Its area is 1 - `share` of the image's where it does not reach over the border.

    Source: Yun et al. 2019 (arXiv:1905.04899), eq. 2; half sides rounded down as in torchvision.
    """
    half = 0.5 * math.sqrt(1 - share)
    tall, wide = int(half * height), int(half * width)
    row, column = centre
    return (
        max(0, row - tall),
        max(0, column - wide),
        min(height, row + tall),
        min(width, column + wide),
    )
