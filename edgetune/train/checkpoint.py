"""Checkpoints: safetensors and JSON, written whole or not at all, the newest whole one read.

checkpoints/step-00000120/
    weights.safetensors     what training changes (parameters and buffers)
    optimizer.safetensors   optimizer state, one tensor a parameter and kind
    ...                     further groups of tensors, where the run has them
    state.json              where the run is; SHA-256 of the files and of itself

No random state is in it: every random choice of a run is a function of the seed and the step.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgetune.errors import IntegrityError, ResourceError
from edgetune.runtime.bundle import file_sha256
from edgetune.runtime.files import flush
from edgetune.runtime.records import from_mapping, to_mapping
from edgetune.train.schedules import Plateau

KEPT = 2
SUFFIX = ".safetensors"

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run is: counters of what is done, and what early stopping remembers.

    steps: planned in all; a time budget settles them while training, 0 before.
    batch: batches of the unfinished epoch that are done.
    loss_sum and loss_weight are of the unfinished epoch; seconds of all training so far.
    kept: where activations are kept; "" before that is settled.
    energy_wh: measured so far; None where nothing measures it.
    """

    step: int = 0
    steps: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    best_epoch: int = 0
    best_value: float | None = None
    best_loss: float | None = None
    stale_epochs: int = 0
    plateau: Plateau = Plateau()
    kept: Literal["", "off", "memory", "disk"] = ""
    seconds: float = 0.0
    energy_wh: float | None = None


def save_checkpoint(folder: Path, groups: Mapping[str, Tensors], position: Position) -> Path:
    """Write a checkpoint below `folder` and remove all but the newest two.

    Args:
        folder: of all checkpoints.
        groups: tensors by the name of their file.
        position: where the run is.

    Raises:
        ResourceError: the disk is full or cannot be written; older checkpoints are untouched.
    """
    final = folder / f"step-{position.step:08d}"
    temporary = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in groups.items():
            if tensors:
                save_file(tensors, temporary / f"{name}{SUFFIX}")
        state: dict[str, Any] = {
            "position": to_mapping(position),
            "files": {p.name: file_sha256(p) for p in sorted(temporary.iterdir())},
        }
        state["sha256"] = _state_sha256(state)
        (temporary / "state.json").write_text(json.dumps(state, indent=2))
        for path in temporary.iterdir():
            flush(path)
        flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        flush(folder)
    except (OSError, SafetensorError) as error:  # of a full disk safetensors raises its own
        shutil.rmtree(temporary, ignore_errors=True)
        raise ResourceError(
            f"{final}: cannot be written: {error}; make room, then go on with:"
            f" edgetune train --resume {folder.parent}"
        ) from error
    # a later one than this is damaged, or the run would have gone on from it
    kept = sorted(p for p in folder.glob("step-*") if p <= final)[-KEPT:]
    for old in folder.glob("step-*"):
        if old not in kept:
            shutil.rmtree(old)
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    return final


def load_checkpoint(folder: Path) -> tuple[Position, dict[str, Tensors], list[str]]:
    """Read the newest whole checkpoint.

    Returns:
        where the run was, its groups of tensors, and a line for each damaged checkpoint that
        was passed over.

    Raises:
        IntegrityError: there is none that is whole.
    """
    skipped: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            position, groups = _read(path)
        except (OSError, ValueError, IntegrityError) as error:
            skipped.append(f"{path}: is damaged ({error}); the one before it is used")
            continue
        return position, groups, skipped
    raise IntegrityError(f"{folder}: holds no whole checkpoint; start the run anew")


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the optimizer's state by "kind/parameter"; sharded tensors are gathered.

    Every process of a sharded run has to call it.
    """
    names = {id(p): n for n, p in network.named_parameters()}
    found: Tensors = {}
    for parameter, entries in optimizer.state.items():
        for kind, value in entries.items():
            if value is not None:
                tensor = whole(torch.as_tensor(value))
                found[f"{kind}/{names[id(parameter)]}"] = tensor
    return found


def restore_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors
) -> None:
    """Put `optimizer_tensors` back, on whatever device and shard each parameter is.

    Raises:
        IntegrityError: the state is of other parameters.
    """
    parameters = dict(network.named_parameters())
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if name not in parameters:
            raise IntegrityError(f"the saved optimizer knows {name!r}, which the model has not")
        parameter = parameters[name]
        if kind == "step" and not tensor.is_floating_point():
            optimizer.state[parameter][kind] = int(tensor)  # bitsandbytes counts in Python
            continue
        # fused and capturable optimizers keep their step count beside the parameter
        beside = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
        if kind == "step" and not beside:
            optimizer.state[parameter][kind] = tensor
            continue
        restored = like(tensor.to(parameter.device), parameter)
        if restored.shape == parameter.shape and not hasattr(parameter, "device_mesh"):
            # fused kernels take it for granted that both lie in memory in the same order
            restored = torch.empty_like(parameter, dtype=tensor.dtype).copy_(restored)
        optimizer.state[parameter][kind] = restored


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, detached and contiguous; a sharded one is gathered."""
    gather = getattr(tensor.detach(), "full_tensor", None)
    plain: Tensor = gather() if gather is not None else tensor.detach()
    return plain.cpu().contiguous().clone()


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor sharded as `parameter` is, where it is."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, mesh, parameter.placements)  # type: ignore[attr-defined]


def _read(path: Path) -> tuple[Position, dict[str, Tensors]]:
    state = json.loads((path / "state.json").read_text())
    if not isinstance(state, dict) or state.pop("sha256", None) != _state_sha256(state):
        raise IntegrityError("state.json does not match its SHA-256")
    for name, digest in state["files"].items():
        if file_sha256(path / name) != digest:
            raise IntegrityError(f"{name} does not match its SHA-256")
    position = from_mapping(
        Position, state["position"], where=str(path / "state.json"), error=IntegrityError
    )
    groups = {
        name.removesuffix(SUFFIX): load_file(path / name)
        for name in state["files"]
        if name.endswith(SUFFIX)
    }
    return position, groups


def _state_sha256(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
