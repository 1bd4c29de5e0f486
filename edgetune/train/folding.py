"""Frozen BatchNorm folded into the convolution before it: the same function in fewer passes.

Only layers that never train are touched, and a run does not save those. Which convolution feeds
which BatchNorm is seen by running the network once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# folded against not, as a share of the largest value: rounding, over the depth of a network
TOLERANCE = 1e-3


def fold_frozen_norms(network: nn.Module, stages: Sequence[str], run: Callable[[], Tensor]) -> int:
    """Fold the BatchNorms of frozen `stages` into their convolutions, in place.

    Args:
        network: in evaluation mode.
        stages: module paths in which nothing ever trains.
        run: runs the network and returns its logits; they decide whether the folding stays.

    Returns:
        how many were folded; 0 where the answers would differ by more than rounding.
    """
    within = [network.get_submodule(path) for path in stages]
    modules = {id(m): m for stage in within for m in stage.modules()}
    pairs = _pairs(modules, run)
    if not pairs:
        return 0
    with torch.no_grad():
        before = run()
        kept = [(conv.weight, conv.bias) for conv, _ in pairs]
        for conv, norm in pairs:
            _fold(conv, norm)
        after = run()
        scale = max(float(before.abs().max()), 1e-6)
        if float((after - before).abs().max()) / scale <= TOLERANCE:
            return len(pairs)
        for (conv, norm), (weight, bias) in zip(pairs, kept, strict=True):
            conv.weight, conv.bias = weight, bias
            del norm.forward
    return 0


def _pairs(
    modules: dict[int, nn.Module], run: Callable[[], Tensor]
) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Return each convolution whose output a BatchNorm takes as it is."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    calls: dict[int, int] = {}
    found: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after(module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG001
        calls[id(module)] = calls.get(id(module), 0) + 1
        if type(module) is nn.Conv2d:
            made[id(output)] = (module, output)  # held, so that no other tensor takes its id

    def before(module: nn.Module, args: Any) -> None:
        if type(module) is nn.BatchNorm2d and not module.training and args:
            conv = made.get(id(args[0]))
            if conv is not None and module.track_running_stats:
                found.append((conv[0], module))

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    chosen = [m for m in modules.values() if type(m) in kinds]
    handles = [m.register_forward_hook(after) for m in chosen]
    handles += [m.register_forward_pre_hook(before) for m in chosen]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [(c, n) for c, n in found if calls[id(c)] == 1 and calls[id(n)] == 1]


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
        norm.weight, norm.bias,
    )  # fmt: skip
    conv.weight.requires_grad_(False)
    conv.bias.requires_grad_(False)
    norm.forward = _same  # type: ignore[method-assign]


def _same(input: Tensor) -> Tensor:
    return input
