"""What the cloud halves share of labels: tensors to learn from, and how wrong a batch is."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.data import Scale, Split, Target, encode_targets


def target_tensor(split: Split, labels: Sequence[str], scale: Scale | None) -> Tensor:
    """Return a split's labels as `edgetune.train.losses.Loss` takes them.

    Returns:
        classes: int64 (samples,); multilabel: float32 (samples, labels); values: float32
        (samples,), of the training split with mean 0 and standard deviation 1.

    Raises:
        DataError: a label is missing or none of `labels`.
    """
    found = encode_targets(split, labels)
    if scale is not None:
        found = (found - scale.mean) / scale.std
    return torch.from_numpy(found if found.dtype.kind == "i" else found.astype("float32"))


def plain_losses(logits: Tensor, targets: Tensor, target: Target) -> Tensor:
    """Return each sample's loss, (batch,), without weights or smoothing, to compare epochs by.

    Cross-entropy, binary cross-entropy averaged over the labels, or the squared error.
    """
    if target == "classes":
        return functional.cross_entropy(logits, targets, reduction="none")
    if target == "multilabel":
        return functional.binary_cross_entropy_with_logits(
            logits, targets.float(), reduction="none"
        ).mean(1)
    return functional.mse_loss(logits.squeeze(1), targets.float(), reduction="none")


def scale_options(scale: Scale | None) -> dict[str, float]:
    """Return what the device half needs to give values in their own unit; nothing of others."""
    return {} if scale is None else {"mean": scale.mean, "std": scale.std}
