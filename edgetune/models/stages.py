"""A network as stages from input to output: stem, blocks, tail, head.

What is frozen below, freed later or slowed down with depth is said in these terms.
"""

from collections.abc import Collection, Sequence

from torch import nn

from edgetune.config import TrainConfig
from edgetune.models.families import Family, blocks, present

# the names that adapt() chose, on the network: gradual unfreezing clears requires_grad for a while
_RECORD = "_edgetune_trained"


def record_trained(network: nn.Module) -> None:
    """Note the parameters that require a gradient now as those that training ever changes."""
    trained = frozenset(n for n, p in network.named_parameters() if p.requires_grad)
    setattr(network, _RECORD, trained)


def forget_trained(network: nn.Module) -> None:
    """Take back `record_trained`; nothing happens where there was none."""
    network.__dict__.pop(_RECORD, None)


def trained_parameters(network: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that training ever changes.

    Those that `adapt` chose, also while gradual unfreezing still keeps them frozen; without
    `adapt`, those that require a gradient.
    """
    recorded: frozenset[str] = network.__dict__.get(_RECORD, frozenset())
    return frozenset(n for n, p in network.named_parameters() if p.requires_grad or n in recorded)


def layer_depths(network: nn.Module, family: Family) -> dict[str, int]:
    """Return how far below the output each parameter lies, in layers.

    0 for the head; 1 for the tail and the last block; one more with each block towards the
    input; the largest for all else: stem, embeddings, and what several blocks share. With a
    decay d, a parameter's learning rate is d ** depth of the head's.

    Source: as ELECTRA (Clark et al. 2020, arXiv:2003.10555) and BEiT (Bao et al. 2021,
    arXiv:2106.08254) count them; BEiT's code has the last norm with the head, at 0.
    """
    depths = _stage_depths(network, family)
    deepest = 1 + max(depths.values(), default=0)
    return {n: _of_longest(n, depths, deepest) for n, _ in network.named_parameters()}


def unfrozen_parameters(
    network: nn.Module, family: Family, config: TrainConfig, epoch: int
) -> set[str]:
    """Return the names of the parameters that train in `epoch`, counted from 0.

    With `unfreeze_every` N: head and tail in the first N epochs, one more block from the output
    down with every further N, what lies below the blocks last; of all these, what the method
    trains. Without: all that the method trains.

    Source: Howard and Ruder 2018 (ULMFiT, arXiv:1801.06146), section 3.3.
    """
    trained = trained_parameters(network)
    if not config.unfreeze_every:
        return set(trained)
    depths = _stage_depths(network, family)
    depths.update({path: 0 for path, _ in present(network, family.tail)})
    deepest = 1 + max(depths.values(), default=0)
    reach = epoch // config.unfreeze_every
    return {n for n in trained if _of_longest(n, depths, deepest) <= reach}


def activate(network: nn.Module, active: Collection[str]) -> None:
    """Let gradients flow to `active` alone, of all that training ever changes.

    `trained_parameters` stays the same, so that checkpoints hold the others too.
    """
    trained = trained_parameters(network)
    setattr(network, _RECORD, trained)
    for name, parameter in network.named_parameters():
        if name in trained:
            parameter.requires_grad_(name in active)


def frozen_prefix(
    network: nn.Module, family: Family, active: Collection[str] | None = None
) -> tuple[str, ...]:
    """Return the stages from the input on in which nothing trains.

    Args:
        network: after `adapt`.
        family: its row; stages are its stem modules, blocks and tail modules, in this order.
        active: parameters that train now; None for all that require a gradient.

    Returns:
        module paths; () where a parameter trains that lies in no stage and not in the head, or
        where the row does not say what runs before the blocks and something does.
    """
    training = _training(network, active)
    stem = [path for path, _ in present(network, family.stem)]
    tail = [path for path, _ in present(network, family.tail)]
    stages = [*stem, *(path for path, _ in blocks(network, family)), *tail]
    known = [*stages, *(path for path, _ in present(network, family.head))]
    if any(not _within(name, known) for name in training):
        return ()
    if not stem and any(not _within(name, known) for name, _ in network.named_parameters()):
        return ()
    for number, path in enumerate(stages):
        if any(_within(name, (path,)) for name in training):
            return tuple(stages[:number])
    return tuple(stages)


def set_train_mode(
    network: nn.Module, prefix: Sequence[str] = (), active: Collection[str] | None = None
) -> None:
    """Put the network in training mode, but for what must not change.

    Args:
        network: after `adapt`.
        prefix: from `frozen_prefix`; these modules run as they do when predicting, without
            dropout.
        active: parameters that train now; None for all that require a gradient. A BatchNorm
            of which none trains keeps its statistics.
    """
    network.train()
    training = _training(network, active)
    for path, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            name in training for name in _own(path, module)
        ):
            module.eval()
    for path in prefix:
        network.get_submodule(path).eval()


def own_parameters(network: nn.Module) -> dict[str, list[str]]:
    """Return, by module path, the names of the parameters that lie directly in the module."""
    return {path: _own(path, module) for path, module in network.named_modules()}


def _own(path: str, module: nn.Module) -> list[str]:
    dot = f"{path}." if path else ""
    return [dot + n for n, _ in module.named_parameters(recurse=False)]


def _training(network: nn.Module, active: Collection[str] | None) -> set[str]:
    # every name of a parameter that two modules share
    return {
        n
        for n, p in network.named_parameters(remove_duplicate=False)
        if (p.requires_grad if active is None else n in active)
    }


def _stage_depths(network: nn.Module, family: Family) -> dict[str, int]:
    """Return the depth of each head, tail and block by its path."""
    depths = {path: 0 for path, _ in present(network, family.head)}
    depths.update({path: 1 for path, _ in present(network, family.tail)})
    from_output = reversed(blocks(network, family))
    depths.update({path: depth for depth, (path, _) in enumerate(from_output, start=1)})
    return depths


def _of_longest(name: str, values: dict[str, int], otherwise: int) -> int:
    """Return the value of the longest path that `name` lies within."""
    path = name
    while path:
        if path in values:
            return values[path]
        path = path.rpartition(".")[0]
    return otherwise


def _within(name: str, paths: Collection[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)
