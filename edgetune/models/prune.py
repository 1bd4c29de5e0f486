"""Structured pruning: a smaller network out of a trained one, whole units at a time.

Blocks, feed-forward widths and attention heads of encoders go by the family's row; channels of
convolutional nets by torch-pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900). What
is left is an ordinary dense network: it trains, exports and quantizes like any other.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edgetune.errors import ConfigError, MissingExtraError
from edgetune.models.families import Family, present

# how much each element of each parameter matters, by the parameter's name; of its shape
Saliency = Mapping[str, Tensor]
Batch = TypeVar("Batch")

# widths are kept multiples of this: what SIMD kernels work in
MULTIPLE = 8
# side of the image that the dependency graph is traced with, pixels
TRACE_SIZE = 64


def prune(
    network: nn.Module,
    family: Family,
    *,
    keep_blocks: int | None = None,
    ffn_ratio: float | None = None,
    head_ratio: float | None = None,
    channel_ratio: float | None = None,
    saliency: Saliency | None = None,
) -> nn.Module:
    """Return a smaller copy of `network`, in eval mode; `network` is left as it is.

    A unit (a hidden neuron, a head, a channel) matters by the sum of its elements' saliency. The
    last layer's outputs are never pruned, and so are the channels that a sum of two branches
    ties together: of a block only what is inside it gets narrower. A transformers network's
    config follows in `num_hidden_layers` only; it has no words for widths that differ by block.

    Args:
        network: a classifier of the family, without LoRA layers.
        family: its row.
        keep_blocks: encoders: how many blocks to keep, evenly spread, the last one always
            (after Sanh et al. 2019, arXiv:1910.01108, section 3).
        ffn_ratio: encoders: share of each feed-forward's hidden width to keep, 0 < ratio <= 1;
            the width becomes a multiple of 8.
        head_ratio: encoders: share of all attention heads to keep, 0 < ratio <= 1. Heads of all
            blocks compete (Michel et al. 2019, arXiv:1905.10650), each block keeps one at least.
        channel_ratio: convolutional nets: share of each inner layer's channels to keep,
            0 < ratio <= 1; their number becomes a multiple of 8.
        saliency: by `magnitude` (where None is given) or `taylor`, of this network.

    Raises:
        ConfigError: a number is out of bounds, the family has no such parts, or `saliency` is of
            another network.
        MissingExtraError: channels are to be pruned and torch-pruning is not installed.
    """
    for name, ratio in (
        ("ffn_ratio", ffn_ratio), ("head_ratio", head_ratio), ("channel_ratio", channel_ratio),
    ):  # fmt: skip
        if ratio is not None and not 0 < ratio <= 1:
            raise ConfigError(f"{name}: expected more than 0 and at most 1, got {ratio:g}")
    smaller = copy.deepcopy(network).eval()
    scores = magnitude(smaller) if saliency is None else saliency
    _check_saliency(smaller, scores)
    if keep_blocks is not None or ffn_ratio is not None or head_ratio is not None:
        kept = _kept_blocks(smaller, family, keep_blocks)
        if ffn_ratio is not None:
            _prune_ffn(smaller, family, kept, ffn_ratio, scores)
        if head_ratio is not None:
            if not family.attention:
                raise ConfigError(f"head_ratio: the heads of a {family.name} cannot be pruned")
            _prune_heads(smaller, family, kept, head_ratio, scores)
        _drop_blocks(smaller, kept)  # last: until here, names are those that `scores` knows
    if channel_ratio is not None:
        _prune_channels(smaller, family, channel_ratio, scores)
    return smaller


def magnitude(network: nn.Module) -> dict[str, Tensor]:
    """Return each element's share of its parameter's sum of squares.

    Shares, not squares, so that a kernel in front of BatchNorm, whose scale means nothing, does
    not outweigh the BatchNorm's own.
    """
    return {
        name: parameter.detach().square() / parameter.detach().square().sum().clamp_min(1e-30)
        for name, parameter in network.named_parameters()
    }


def taylor(
    network: nn.Module, batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor]
) -> dict[str, Tensor]:
    """Return (gradient * weight)^2 of each element, summed over batches.

    It is the change of the loss, squared and to first order, that setting the element to zero
    would make. The network answers as in eval mode and is left as it is.

    Args:
        network: as it will be pruned.
        batches: what `loss` takes; a few hundred samples serve.
        loss: (network, batch) -> a scalar.

    Source: Molchanov et al. 2019 (arXiv:1906.10771), eq. 8.
    """
    probe = copy.deepcopy(network).eval().requires_grad_(True)
    total = {name: torch.zeros_like(p) for name, p in probe.named_parameters()}
    for batch in batches:
        probe.zero_grad()
        torch.autograd.backward(loss(probe, batch))
        for name, parameter in probe.named_parameters():
            if parameter.grad is not None:
                total[name] += (parameter.grad * parameter.detach()).square()
    return total


def spread(total: int, kept: int) -> list[int]:
    """Return `kept` of the indices 0..total-1, evenly spread, the last one always among them."""
    return [(i + 1) * total // kept - 1 for i in range(kept)]


# -- encoders ------------------------------------------------------------------------------


def _kept_blocks(
    network: nn.Module, family: Family, keep_blocks: int | None
) -> list[tuple[str, list[int]]]:
    """Return (container, indices of the blocks to keep) of each of the family's containers."""
    if not family.ffn:
        raise ConfigError(
            f"keep_blocks, ffn_ratio and head_ratio are for encoders, got a {family.name};"
            " channel_ratio prunes it"
        )
    containers = [(path, len(list(m.children()))) for path, m in present(network, family.blocks)]
    assert len(containers) == 1, containers
    path, total = containers[0]
    if keep_blocks is not None and not 1 <= keep_blocks <= total:
        raise ConfigError(
            f"keep_blocks: this {family.name} has {total} blocks, expected 1 to {total},"
            f" got {keep_blocks}"
        )
    return [(path, spread(total, total if keep_blocks is None else keep_blocks))]


def _drop_blocks(network: nn.Module, kept: Sequence[tuple[str, list[int]]]) -> None:
    for path, indices in kept:
        container: Any = network.get_submodule(path)
        if len(indices) == len(container):
            continue
        network.set_submodule(path, nn.ModuleList([container[i] for i in indices]))
        for number, i in enumerate(indices):
            for module in container[i].modules():
                if getattr(module, "layer_idx", None) is not None:
                    module.layer_idx = number
        owner: Any = network.get_submodule(path.rpartition(".")[0])
        if hasattr(owner, "n_layers"):  # DistilBERT's
            owner.n_layers = len(indices)
        config: Any = network.config
        config.num_hidden_layers = len(indices)


def _prune_ffn(
    network: nn.Module,
    family: Family,
    kept: Sequence[tuple[str, list[int]]],
    ratio: float,
    saliency: Saliency,
) -> None:
    for block in _block_names(kept):
        up, down = (_linear(network, f"{block}.{path}", family) for path in family.ffn)
        scores = _rows(saliency, f"{block}.{family.ffn[0]}")
        scores = scores + saliency[f"{block}.{family.ffn[1]}.weight"].sum(0)  # (hidden,)
        index = _best(scores, _rounded(ratio, up.out_features))
        _keep_outputs(up, index)
        _keep_inputs(down, index)


def _prune_heads(
    network: nn.Module,
    family: Family,
    kept: Sequence[tuple[str, list[int]]],
    ratio: float,
    saliency: Saliency,
) -> None:
    names = _block_names(kept)
    scores: list[Tensor] = []
    for block in names:
        size = _head_size(network, block, family)
        *inward, outward = family.attention
        score = saliency[f"{block}.{outward}.weight"].sum(0)
        for path in inward:
            score = score + _rows(saliency, f"{block}.{path}")
        scores.append(score.view(-1, size).sum(1))  # (heads,)
    for block, heads in zip(names, _best_heads(scores, ratio), strict=True):
        size = _head_size(network, block, family)
        index = (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()
        *inward, outward = family.attention
        for path in inward:
            _keep_outputs(_linear(network, f"{block}.{path}", family), index)
        _keep_inputs(_linear(network, f"{block}.{outward}", family), index)
        module = network.get_submodule(f"{block}.{family.head_size}".rpartition(".")[0])
        # the forward pass divides widths by the head's size; these only describe
        for name, value in (
            ("num_attention_heads", len(heads)), ("n_heads", len(heads)),
            ("all_head_size", len(index)),
        ):  # fmt: skip
            if hasattr(module, name):
                setattr(module, name, value)


def _best_heads(scores: Sequence[Tensor], ratio: float) -> list[Tensor]:
    """Return the heads to keep of each block, ascending; `scores`: (heads,) of each block."""
    total = sum(len(s) for s in scores)
    count = max(len(scores), round(ratio * total))
    # the best of each block comes first of all, whatever the others are worth
    firsts = torch.cat([torch.arange(len(s), device=s.device) == s.argmax() for s in scores])
    flat = torch.where(firsts, torch.inf, torch.cat(list(scores)))
    chosen = torch.zeros(total, dtype=torch.bool, device=flat.device)
    chosen[flat.argsort(descending=True, stable=True)[:count]] = True
    each = torch.split(chosen, [len(s) for s in scores])
    return [c.nonzero()[:, 0] for c in each]


def _block_names(kept: Sequence[tuple[str, list[int]]]) -> list[str]:
    return [f"{path}.{i}" for path, indices in kept for i in indices]


def _linear(network: nn.Module, path: str, family: Family) -> nn.Linear:
    try:
        module = network.get_submodule(path)
    except AttributeError as error:
        raise ConfigError(
            f"this {family.name} has no {path}; its widths cannot be pruned with the installed"
            " transformers"
        ) from error
    assert isinstance(module, nn.Linear), path
    return module


def _head_size(network: nn.Module, block: str, family: Family) -> int:
    module, _, attribute = f"{block}.{family.head_size}".rpartition(".")
    for path in family.attention:
        _linear(network, f"{block}.{path}", family)
    return int(getattr(network.get_submodule(module), attribute))


def _rows(saliency: Saliency, layer: str) -> Tensor:
    """Return the saliency of each of a layer's outputs, weight and bias, shape (outputs,)."""
    scores = saliency[f"{layer}.weight"].flatten(1).sum(1)
    bias = saliency.get(f"{layer}.bias")
    return scores if bias is None else scores + bias


def _keep_outputs(layer: nn.Linear, index: Tensor) -> None:
    layer.weight = _part(layer.weight, 0, index)
    if layer.bias is not None:
        layer.bias = _part(layer.bias, 0, index)
    layer.out_features = len(index)


def _keep_inputs(layer: nn.Linear, index: Tensor) -> None:
    layer.weight = _part(layer.weight, 1, index)
    layer.in_features = len(index)


def _part(parameter: Tensor, axis: int, index: Tensor) -> nn.Parameter:
    values = parameter.detach().index_select(axis, index.to(parameter.device))
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


# -- convolutional nets --------------------------------------------------------------------


def _prune_channels(network: nn.Module, family: Family, ratio: float, saliency: Saliency) -> None:
    if family.ffn:
        raise ConfigError(
            f"channel_ratio is for convolutional nets, got a {family.name};"
            " keep_blocks, ffn_ratio and head_ratio prune it"
        )
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingExtraError("torch-pruning", "train") from error

    trains = {name: p.requires_grad for name, p in network.named_parameters()}
    network.requires_grad_(True)  # the graph is read off autograd's
    some: Any = next(network.parameters())
    graph: Any = torch_pruning.DependencyGraph().build_dependency(
        network,
        torch.zeros(1, 3, TRACE_SIZE, TRACE_SIZE, device=some.device),
        forward_fn=_answer,
        verbose=False,
    )
    names = {module: name for name, module in network.named_modules()}
    plans: list[tuple[nn.Module, Any, list[int]]] = []
    for group in graph.get_all_groups(
        ignored_layers=[network.get_submodule(family.output)],
        root_module_types=[nn.Conv2d, nn.Linear],
    ):
        if not _is_inner(group):
            continue
        root, prune_root = group[0].dep.target.module, group[0].dep.handler
        scores = _channel_scores(graph, group, names, saliency)
        kept = set(_best(scores, _rounded(ratio, len(scores))).tolist())
        plans.append((root, prune_root, [i for i in range(len(scores)) if i not in kept]))
    for root, prune_root, dropped in plans:
        if dropped:
            # anew, as pruning before it may have moved a concatenation's offsets
            graph.get_pruning_group(root, prune_root, idxs=dropped).prune()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trains[name])
        parameter.grad = None


def _answer(network: Any, image: Tensor) -> Tensor:
    output = network(image)
    logits = output if isinstance(output, Tensor) else output.logits
    assert isinstance(logits, Tensor)
    return logits


def _is_inner(group: Any) -> bool:
    """Return whether no sum of branches and no grouped convolution ties the group's channels."""
    for item in group:
        node = item.dep.target
        module = node.module
        if type(node.grad_fn).__name__.startswith("AddBackward"):
            return False
        if isinstance(module, nn.Conv2d) and 1 < module.groups < module.in_channels:
            return False
    return True


def _channel_scores(
    graph: Any, group: Any, names: Mapping[nn.Module, str], saliency: Saliency
) -> Tensor:
    """Return what each channel of a group is worth, shape (channels,)."""
    scores = torch.zeros(len(group[0].idxs), dtype=torch.float64)
    for item in group:
        module = item.dep.target.module
        if module not in names or not isinstance(getattr(module, "weight", None), Tensor):
            continue
        axis = int(
            module.weight.ndim > 1
            and graph.is_in_channel_pruning_fn(item.dep.handler)
            and getattr(module, "groups", 1) == 1
        )
        weight = saliency[f"{names[module]}.weight"].double().cpu()
        each = weight.movedim(axis, 0).flatten(1).sum(1) if weight.ndim > 1 else weight
        if axis == 0 and getattr(module, "bias", None) is not None:
            each = each + saliency[f"{names[module]}.bias"].double().cpu()
        scores.index_add_(0, torch.tensor(item.root_idxs), each[torch.tensor(item.idxs)])
    return scores


# -- both ----------------------------------------------------------------------------------


def _check_saliency(network: nn.Module, saliency: Saliency) -> None:
    for name, parameter in network.named_parameters():
        if name not in saliency or saliency[name].shape != parameter.shape:
            raise ConfigError(f"saliency: is of another network; {name} is not in it as it is here")


def _rounded(ratio: float, width: int) -> int:
    """Return the multiple of 8 nearest to ratio * width, 8 at least, but never above width."""
    nearest = MULTIPLE * max(1, math.floor(ratio * width / MULTIPLE + 0.5))
    return min(width, nearest) if ratio < 1 else width


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest scores, ascending; of equals the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
