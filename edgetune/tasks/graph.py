"""What the exported graphs of all classification tasks share: logits beside features."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

MICROSOFT_ATTENTION = "edgetune_export"


class SplitClassifier(nn.Module):
    """A copy of a classifier that returns its logits and what its last layer was given.

    The last layer moves out and an identity takes its place, so that the network's own
    output is the features, shape (batch, features). Where that isn't a matrix (a
    convolution as the last layer), features are left out.
    """

    def __init__(self, network: nn.Module, output: str) -> None:
        """Copy `network` and take its last layer, named `output`, out of the copy."""
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        last = self.network.get_submodule(output)
        self.output = last if isinstance(last, nn.Linear) else None
        if self.output is not None:
            self.network.set_submodule(output, nn.Identity())
        use_attention_operator(self.network)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Return (logits, features), or (logits,)."""
        features = logits_of(self.network(**inputs))
        if self.output is None:
            return (features,)
        return self.output(features), features


def logits_of(output: Any) -> Tensor:
    """Return the logits of a network's output: a tensor, or an object that has them."""
    logits = output if isinstance(output, Tensor) else output.logits
    assert isinstance(logits, Tensor)
    return logits


def use_attention_operator(network: nn.Module) -> None:
    """Make a transformers network export its attention as one MultiHeadAttention node.

    transformers lets a function stand in for attention; ours writes onnxruntime's
    com.microsoft.MultiHeadAttention straight into the graph, with the padding mask as it is.
    So every encoder family is fused alike, no pattern has to be found afterwards, and the
    mask's dozen of nodes never come into being. Such a network can only be exported.

    Families that attend by code of their own (DeBERTa, XLNet, MPNet) keep it, and so do those
    whose layers see a window of the text (ModernBERT): the padding mask doesn't say the window.
    """
    transformers_network: Any = network
    if not hasattr(network, "set_attn_implementation"):
        return
    if "sliding_attention" in (getattr(transformers_network.config, "layer_types", None) or ()):
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(MICROSOFT_ATTENTION, _attention)
    AttentionMaskInterface.register(MICROSOFT_ATTENTION, _padding_mask)
    transformers_network.set_attn_implementation(MICROSOFT_ATTENTION)


def _padding_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """Pass the (batch, tokens) mask on as it came, instead of a (batch, 1, tokens, tokens) one."""
    return attention_mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Stand in for attention; query, key, value: (batch, heads, tokens, head size).

    attention_mask: (batch, tokens), 1 where there is a token; or what is added to the scores,
        (1 or batch, heads, tokens, tokens): Swin's and BEiT's relative positions.
    """
    batch, heads, tokens, size = query.shape
    scale = scaling if scaling is not None else size**-0.5
    if getattr(module, "is_causal", False):
        # a text's tokens never look ahead to the padding on its right, so that mask is not needed
        return _plain_attention(query, key, value, _causal_bias(query), scale), None
    if attention_mask is not None and attention_mask.ndim == 4:
        return _plain_attention(query, key, value, attention_mask, scale), None

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(batch, -1, heads * size)

    mask = None if attention_mask is None else attention_mask.to(torch.int32)
    q = flat(query)
    mixed = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (q, flat(key), flat(value), None, mask),
        attrs={"num_heads": heads, "scale": scale},
        dtype=q.dtype,
        shape=q.shape,
        version=1,
    )
    return mixed.view(batch, tokens, heads, size), None


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """Return attention in ONNX's own operators, (batch, tokens, heads, head size).

    Every onnxruntime reads these alike; its own operator's causal and biased forms came one by one.
    """
    scores = torch.matmul(query * scale, key.transpose(-1, -2)) + bias
    return torch.matmul(torch.softmax(scores, -1), value).transpose(1, 2)


def _causal_bias(query: Tensor) -> Tensor:
    """Return 0 where a token may look and float's least ahead of it, shape (tokens, tokens)."""
    places = torch.arange(query.shape[2], device=query.device)
    ahead = places[None, :] > places[:, None]
    return ahead.to(query.dtype) * torch.finfo(query.dtype).min
