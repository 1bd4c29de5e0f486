"""Losses by name, each as a sum over samples and what that sum is to be divided by.

A mean over a batch that several processes share, or that is accumulated in parts, is right
only where numerators and denominators are added up apart; with class weights a mean of means
is another number. So a loss gives both, a sample at a time.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.config import LossName, TrainConfig
from edgetune.errors import ConfigError

Target = Literal["classes", "multilabel", "values"]


class Loss(nn.Module):
    """A loss with its class weights; `to(device)` takes them where the logits are.

    Nothing is fetched from the device and nothing depends on values, so it can be compiled.
    """

    weights: Tensor | None

    def __init__(self, rule: "_Rule", weights: Tensor | None, config: TrainConfig) -> None:
        """Keep the rule and the `weights`, float32 (labels,)."""
        super().__init__()
        self.rule = rule
        self.config = config
        # not saved with a network that the loss may become part of: it is a function of the data
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return numerators and denominators; the batch's loss is sum over sum.

        Args:
            logits: (batch, labels), of any float type; the loss is computed in float32.
            targets: classes: int64 (batch,), or shares, float32 (batch, labels); multilabel:
                float32 (batch, labels) of 0 and 1; values: float32 (batch,), with logits
                (batch, 1).

        Returns:
            float32 (batch,) and float32 (batch,); only the first has a gradient.
        """
        logits = logits.float()
        if targets.is_floating_point():
            targets = targets.float()
        return self.rule(logits, targets, self.weights, self.config)


def make_loss(
    config: TrainConfig,
    *,
    target: Target,
    class_counts: Sequence[int] | None,
    samples: int | None = None,
) -> Loss:
    """Return the loss that `config` names for a target.

    Balanced weights are scikit-learn's for classes, n / (classes * count): of one label in
    `cross_entropy` and `focal`, of the sample in `bce`. For multilabel they weigh what is
    present, (n - count) / count, as torch's `pos_weight`.

    Args:
        config: loss, class_weights, label_smoothing, focal_gamma, huber_delta.
        target: what is predicted: one of several classes, several labels at once, or a value.
        class_counts: training samples of each label; needed where weights are balanced.
        samples: training samples; needed where weights of multilabel are balanced, whose
            counts do not sum to it.

    Raises:
        ConfigError: the loss or one of its keys does not fit the target, or a label has no
            weight because it occurs in no sample (multilabel: or in each).
    """
    name: LossName = _AUTO[target] if config.loss == "auto" else config.loss
    rules = _RULES[target]
    if name not in rules:
        raise ConfigError(
            f"loss {name!r} does not fit {_WORDS[target]}; it takes {' or '.join(rules)}"
        )
    if config.label_smoothing and (target == "values" or name == "focal"):
        raise ConfigError(
            f"label_smoothing: loss {name!r} has no smoothed labels, got"
            f" {config.label_smoothing:g}; set it to 0 or use cross_entropy or bce"
        )
    weights = None
    if config.class_weights == "balanced":
        if target == "values":
            raise ConfigError("class_weights 'balanced' does not fit values; use none")
        if class_counts is None or (target == "multilabel" and samples is None):
            raise ValueError("balanced weights need class_counts, and samples for multilabel")
        total = sum(class_counts) if samples is None else samples
        weights = _balanced(class_counts, total, target)
    return Loss(rules[name], weights, config)


def _balanced(counts: Sequence[int], samples: int, target: Target) -> Tensor:
    for index, count in enumerate(counts):
        if count == 0 or (target == "multilabel" and count >= samples):
            raise ConfigError(
                f"class_weights 'balanced': label number {index} is in {count} of {samples}"
                " training samples, which gives it no weight; use none, or other data"
            )
    if target == "multilabel":
        return torch.tensor([(samples - count) / count for count in counts])
    return torch.tensor([samples / (len(counts) * count) for count in counts])


# -- rules: (logits, targets, weights, config) -> (numerators, denominators), each (batch,) -----

_Rule = Callable[[Tensor, Tensor, Tensor | None, TrainConfig], tuple[Tensor, Tensor]]


def _cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """torch.nn.functional.cross_entropy, which divides by weights only where targets are hard."""
    losses = functional.cross_entropy(
        logits, targets, weights, reduction="none", label_smoothing=config.label_smoothing
    )
    if targets.is_floating_point() or weights is None:
        return losses, torch.ones_like(losses)
    return losses, weights[targets]


def _bce_of_classes(
    logits: Tensor, targets: Tensor, weights: Tensor | None, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Each class against the rest, mean over classes: timm's BinaryCrossEntropy.

    The recipe of Wightman et al. 2021 (arXiv:2110.00476), smoothed as in timm: 1 - s + s /
    classes for the true class, s / classes for the others.
    """
    labels = logits.shape[1]
    shares = targets if targets.is_floating_point() else functional.one_hot(targets, labels).float()
    smoothed = shares * (1 - config.label_smoothing) + config.label_smoothing / labels
    losses = functional.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
    per_sample = losses.mean(1)
    if weights is None:
        return per_sample, torch.ones_like(per_sample)
    of_samples = (shares * weights).sum(1)
    return per_sample * of_samples, of_samples


def _bce_of_labels(
    logits: Tensor, targets: Tensor, weights: Tensor | None, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Each label for itself, mean over labels; smoothing moves a target towards one half."""
    smoothed = targets * (1 - config.label_smoothing) + config.label_smoothing / 2
    losses = functional.binary_cross_entropy_with_logits(
        logits, smoothed, pos_weight=weights, reduction="none"
    )
    per_sample = losses.mean(1)
    return per_sample, torch.ones_like(per_sample)


def _focal_of_classes(
    logits: Tensor, targets: Tensor, weights: Tensor | None, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """-alpha (1 - p)^gamma log p of the true class's p; alpha divides too, as in cross-entropy.

    Lin et al. 2017 (arXiv:1708.02002), eq. 5, with softmax for their sigmoid.
    """
    losses = functional.cross_entropy(logits, targets, reduction="none")
    losses = _easiness(losses, config.focal_gamma) * losses
    if weights is None:
        return losses, torch.ones_like(losses)
    alpha = weights[targets]
    return alpha * losses, alpha


def _focal_of_labels(
    logits: Tensor, targets: Tensor, weights: Tensor | None, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """-alpha (1 - p)^gamma log p, mean over labels; alpha is 1 where a label is absent.

    Lin et al. 2017 (arXiv:1708.02002), eq. 5.
    """
    losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    losses = _easiness(losses, config.focal_gamma) * losses
    if weights is not None:
        losses = losses * torch.where(targets > 0.5, weights, 1.0)
    per_sample = losses.mean(1)
    return per_sample, torch.ones_like(per_sample)


def _easiness(losses: Tensor, gamma: float) -> Tensor:
    """Return (1 - p)^gamma for losses of -log p."""
    # at p = 1 the slope of x^gamma is infinite for gamma < 1, and times log p = 0 not a number
    missing = (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny)
    return missing**gamma


def _mse(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,  # noqa: ARG001
    config: TrainConfig,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    losses = functional.mse_loss(logits.squeeze(1), targets, reduction="none")
    return losses, torch.ones_like(losses)


def _huber(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,  # noqa: ARG001
    config: TrainConfig,
) -> tuple[Tensor, Tensor]:
    """Huber 1964; torch.nn.functional.huber_loss."""
    losses = functional.huber_loss(
        logits.squeeze(1), targets, reduction="none", delta=config.huber_delta
    )
    return losses, torch.ones_like(losses)


_AUTO: dict[Target, LossName] = {"classes": "cross_entropy", "multilabel": "bce", "values": "mse"}

_RULES: dict[Target, dict[LossName, _Rule]] = {
    "classes": {
        "cross_entropy": _cross_entropy,
        "bce": _bce_of_classes,
        "focal": _focal_of_classes,
    },
    "multilabel": {"bce": _bce_of_labels, "focal": _focal_of_labels},
    "values": {"mse": _mse, "huber": _huber},
}

_WORDS: dict[Target, str] = {
    "classes": "one class of several",
    "multilabel": "several labels at once",
    "values": "values",
}
