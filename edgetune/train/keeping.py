"""Whether a run keeps its frozen layers' activations, and making them for both its splits."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from edgetune.config import TrainConfig
from edgetune.models.families import blocks
from edgetune.tasks import Samples
from edgetune.train.activations import (
    TOLERANCE,
    Cut,
    KeptSamples,
    Place,
    Refused,
    difference_behind,
    keep_activations,
)
from edgetune.train.engine import Engine
from edgetune.train.machine import free_memory_bytes

# (done, all samples in all their views, seconds so far)
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The splits with their activations, and the cut behind which they are taken up."""

    cut: Cut
    samples: Mapping[str, KeptSamples]
    place: Literal["memory", "disk"]

    @property
    def nbytes(self) -> int:
        """Size of all activations."""
        return sum(samples.nbytes for samples in self.samples.values())


def refusal_of(config: TrainConfig, engine: Engine, train: Samples) -> str | None:
    """Return why keeping activations would change the result or not pay; None where neither."""
    if engine.sharded:
        return "the model is sharded"
    below = {path for path, _ in blocks(engine.plain, engine.family)}
    if not below & set(engine.prefix):
        return "no block is frozen below the ones that train"
    if config.mixup or config.cutmix:
        return "mixup and cutmix mix what the frozen layers are given"
    if train.views is None:
        return (
            "token_dropout makes a new text every epoch"
            if config.token_dropout
            else "augmentation makes a new image every epoch; --augment-views 4 keeps to four of"
            " each, or use --augment flip or none"
        )
    if config.activation_cache == "auto" and config.epochs <= train.views:
        return f"{config.epochs} epochs do not pay for {train.views} views"
    return None


def keep_frozen(
    engine: Engine,
    config: TrainConfig,
    splits: Mapping[str, Samples],
    folder: Path,
    place: Literal["memory", "disk"],
    *,
    progress: Progress,
) -> Kept:
    """Make the activations of all splits.

    Args:
        engine: whose frozen prefix makes them.
        config: batch_size, cache_gib.
        splits: by name.
        folder: for those that go to disk.
        place: where they are kept.
        progress: called as they are made.

    Raises:
        Refused: they take too much, or the network answers otherwise behind the cut.
        ResourceError: the disk is full.
    """
    cut = Cut(engine.plain, engine.prefix)
    device = engine.machine.device
    most = config.cache_gib * 2**30
    if place == "memory":
        most = min(most, free_memory_bytes(torch.device("cpu")) / 2)
    left = Place(kind=place, folder=folder / str(engine.machine.rank), most_bytes=int(most))
    began = time.monotonic()

    def logits(tensors: dict[str, Tensor]) -> Tensor:
        return engine.logits(tensors)

    def show(done: int, samples: int) -> None:
        progress(done, samples, time.monotonic() - began)

    kept: dict[str, KeptSamples] = {}
    # frozen layers are in this mode anyway; what comes behind them has no part in it
    engine.network.eval()
    for name, samples in splits.items():
        found = keep_activations(
            cut, logits, samples, left, name=f"{name}.bin", batch_size=config.batch_size,
            device=device, progress=show,
        )  # fmt: skip
        off = difference_behind(cut, logits, samples, found, device)
        if off > TOLERANCE:
            raise Refused(f"behind the cut the model answers otherwise (by {off:.1e})")
        kept[name] = found
        left = dataclasses.replace(left, most_bytes=left.most_bytes - found.nbytes)
    return Kept(cut=cut, samples=kept, place=place)
