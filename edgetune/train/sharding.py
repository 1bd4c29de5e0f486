"""Several GPUs, one model: FSDP2, parameter by parameter."""

from torch import nn

from edgetune.config import TrainConfig
from edgetune.models.families import Family, blocks
from edgetune.train.machine import Machine, free_memory_bytes

# of a GPU's free memory: what weights, gradients and optimizer may take before activations
SHARE = 0.6


def wants_sharding(config: TrainConfig, network: nn.Module, machine: Machine) -> bool:
    """Return whether the model is to be sharded; "auto" does where it does not fit."""
    if machine.processes == 1 or config.sharding == "off":
        return False
    if config.sharding == "on":
        return True
    if machine.device.type != "cuda":
        return False
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    needed = weights + 3 * trained  # gradient and Adam's two moments
    return bool(machine.same(needed > SHARE * free_memory_bytes(machine.device)))


def shard(network: nn.Module, family: Family, machine: Machine) -> None:
    """Shard `network` in place, block by block, so that one block at a time is whole.

    Source: torch.distributed.fsdp.fully_shard (FSDP2).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(machine.device.type, (machine.processes,))
    network.to(machine.device)
    for _, block in blocks(network, family):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def reshard(network: nn.Module) -> None:
    """Leave each process its own part again; after a pass forward the root still has all.

    Until then the parameters of the root are others than those that the optimizer knows.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
