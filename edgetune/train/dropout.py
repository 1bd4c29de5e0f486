"""Dropout on CPUs whose masks cost little.

torch draws a CPU's dropout masks one element at a time, on one core: a sixth of a small
encoder's whole step. Here a mask comes from 16 bits an element of SFC64, whose stream is seeded
anew for every batch, so that a resumed run draws the same masks.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ATTENTION = "edgetune_train"
_LEVELS = 2**16


class Masks:
    """A stream of dropout masks."""

    def __init__(self) -> None:
        """Begin at seed 0."""
        self._bits = np.random.SFC64(0)

    def seed(self, seed: int) -> None:
        """Begin the stream of `seed`."""
        self._bits = np.random.SFC64(seed)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """Return x with a share p of its elements 0 and the others over 1 - p.

        p is rounded to a 65,536th. Source: Srivastava et al. 2014, section 4 (inverted).
        """
        count = x.numel()
        raw = np.asarray(self._bits.random_raw(-(-count // 4))).view(np.int16)[:count]
        kept = torch.from_numpy(raw >= round(p * _LEVELS) - _LEVELS // 2)
        scale = kept.to(x.dtype).mul_(1 / (1 - p)).view(x.shape)
        return x * scale


def use_fast_dropout(network: nn.Module) -> Masks:
    """Let every dropout of `network` draw from one stream of masks, in place; return it.

    Modules of `nn.Dropout` are covered, and attention where transformers lets a function stand
    in for it. What is left keeps torch's own.
    """
    masks = Masks()
    for module in network.modules():
        if type(module) is nn.Dropout:
            module.forward = _forward(module, masks)  # type: ignore[method-assign]
    if getattr(getattr(network, "config", None), "_attn_implementation", "") == "sdpa":
        _use_attention(network, masks)
    return masks


def _forward(module: nn.Dropout, masks: Masks) -> Any:
    def forward(input: Tensor) -> Tensor:
        if not module.training or module.p == 0:
            return input
        return masks.dropout(input, module.p)

    return forward


def _use_attention(network: Any, masks: Masks) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    functions: Any = AttentionInterface
    masks_of: Any = AttentionMaskInterface
    usual_attention, usual_mask = functions()["sdpa"], masks_of()["sdpa"]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        dropout: float = 0.0, scaling: float | None = None, **others: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Stand in for attention; query, key, value: (batch, heads, tokens, head size)."""
        plain = key.shape[1] == query.shape[1] and not getattr(module, "is_causal", False)
        if dropout == 0 or not plain:
            found: tuple[Tensor, None] = usual_attention(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                **others,
            )  # fmt: skip
            return found
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        scores = torch.matmul(query * scale, key.transpose(-1, -2))
        if attention_mask is not None:
            if attention_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attention_mask, float("-inf"))
            else:
                scores = scores + attention_mask
        shares = masks.dropout(scores.softmax(-1), dropout)
        return torch.matmul(shares, value).transpose(1, 2).contiguous(), None

    # one name a process is enough: a second network's stream takes the place of the first's
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, usual_mask)
    network.set_attn_implementation(ATTENTION)
