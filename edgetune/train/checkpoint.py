"""Checkpoints: safetensors and JSON, written whole or not at all, the newest whole one read.

checkpoints/step-00000120/
    weights.safetensors     what training changes (parameters and buffers)
    optimizer.safetensors   optimizer state, one tensor a parameter and kind; random state
    state.json              where the run is; SHA-256 of the two files
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgetune.errors import IntegrityError, ResourceError
from edgetune.models.adapt import load_trainable, trainable_state
from edgetune.runtime.bundle import file_sha256
from edgetune.runtime.files import flush
from edgetune.runtime.records import from_mapping, to_mapping

KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run is: counters of what is done, and what early stopping remembers.

    loss_sum and loss_samples are of the unfinished epoch; seconds of all training so far.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    loss_samples: int = 0
    best_epoch: int = 0
    best_value: float | None = None
    best_loss: float | None = None
    stale_epochs: int = 0
    seconds: float = 0.0


def save_checkpoint(
    folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, position: Position
) -> Path:
    """Write a checkpoint below `folder` and remove all but the newest two.

    Raises:
        ResourceError: the disk is full or cannot be written; older checkpoints are untouched.
    """
    final = folder / f"step-{position.step:08d}"
    temporary = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = {n: t.contiguous().cpu() for n, t in trainable_state(network).items()}
        save_file(weights, temporary / "weights.safetensors")
        save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
        state = {
            "position": to_mapping(position),
            "files": {p.name: file_sha256(p) for p in sorted(temporary.iterdir())},
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=2))
        for path in temporary.iterdir():
            flush(path)
        flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        flush(folder)
    except (OSError, RuntimeError) as error:  # safetensors raises its own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise ResourceError(f"{final}: cannot be written: {error}") from error
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Position, list[str]]:
    """Put the newest whole checkpoint back.

    Returns:
        where the run was, and a line for each damaged checkpoint that was passed over.

    Raises:
        IntegrityError: there is none that is whole.
    """
    skipped: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            position, tensors, weights = _read(path)
        except (OSError, ValueError, KeyError, IntegrityError) as error:
            skipped.append(f"{path}: is damaged ({error}); the one before it is used")
            continue
        load_trainable(network, weights)
        _restore_optimizer(optimizer, tensors)
        return position, skipped
    raise IntegrityError(f"{folder}: holds no whole checkpoint; start the run anew")


def _read(path: Path) -> tuple[Position, dict[str, Tensor], dict[str, Tensor]]:
    state = json.loads((path / "state.json").read_text())
    for name, digest in state["files"].items():
        if file_sha256(path / name) != digest:
            raise IntegrityError(f"{name} does not match its SHA-256")
    position = from_mapping(
        Position, state["position"], where=str(path / "state.json"), error=IntegrityError
    )
    return (
        position,
        load_file(path / "optimizer.safetensors"),
        load_file(path / "weights.safetensors"),
    )


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state and the random generators' as named tensors."""
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().contiguous().cpu()
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
        if value is not None
    }
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state().cpu()
    return tensors


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if index != "rng":
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
