"""Checkpoints: what is damaged is passed over, what is kept is whole, a full disk is said."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import Forks, open_forks
from safetensors.torch import load_file
from torch import nn

from edgetune.errors import IntegrityError, ResourceError
from edgetune.runtime.bundle import file_sha256
from edgetune.train.checkpoint import (
    Position,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)


def groups(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "weights": {"w": torch.full((4,), value)},
        "optimizer": {"exp_avg/w": torch.full((4,), -value)},
        "ema": {},
    }


def test_what_was_saved_is_read(tmp_path):
    position = Position(step=7, steps=9, epoch=2, loss_sum=0.1, best_value=1 / 3, energy_wh=None)
    folder = save_checkpoint(tmp_path, groups(1.0), position)
    assert folder.name == "step-00000007"
    found, tensors, skipped = load_checkpoint(tmp_path)
    assert (found, skipped) == (position, [])
    assert tensors.keys() == {"weights", "optimizer"}  # no file without tensors
    torch.testing.assert_close(tensors["weights"]["w"], torch.ones(4), rtol=0, atol=0)


def test_the_newest_two_are_kept(tmp_path):
    for step in (3, 5, 9):
        save_checkpoint(tmp_path, groups(1.0), Position(step=step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000009"]


def test_a_step_saved_anew_takes_the_place_of_the_old(tmp_path):
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path, groups(value), Position(step=3))
    assert float(load_checkpoint(tmp_path)[1]["weights"]["w"][0]) == 2.0


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "first byte": lambda p: flip(p, 0),
    "last byte": lambda p: flip(p, -1),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-7]),
    "empty": lambda p: p.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_makes_the_one_before_the_newest(tmp_path, name, damage):
    for step in (3, 5):
        newest = save_checkpoint(tmp_path, groups(float(step)), Position(step=step))
    DAMAGES[damage](newest / name)
    position, tensors, skipped = load_checkpoint(tmp_path)
    assert (position.step, float(tensors["weights"]["w"][0])) == (3, 3.0)
    assert [newest.name in line for line in skipped] == [True]


def test_no_bit_of_the_state_flips_unseen(tmp_path):
    folder = save_checkpoint(tmp_path, groups(1.0), Position(step=3, epoch=1, loss_sum=0.5))
    whole = (folder / "state.json").read_bytes()
    spaces = 0
    for at in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            (folder / "state.json").write_bytes(data)
            try:
                found = load_checkpoint(tmp_path)[0]
            except IntegrityError:
                continue
            assert found == Position(step=3, epoch=1, loss_sum=0.5)
            spaces += 1
    # a space that becomes a tab, or a letter's case in \\u escapes: the same JSON
    assert spaces < len(whole)


def test_a_later_checkpoint_that_is_damaged_does_not_push_out_the_good_ones(tmp_path):
    for step in (3, 5):
        save_checkpoint(tmp_path, groups(1.0), Position(step=step))
    for step in (7, 9):  # as a kill between writing and tidying up may leave them
        shutil.copytree(tmp_path / "step-00000005", tmp_path / f"step-{step:08d}")
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{}")
    assert load_checkpoint(tmp_path)[0].step == 5
    save_checkpoint(tmp_path, groups(1.0), Position(step=6))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion"])
def test_an_optimizer_goes_on_where_it_was_with_channels_last(name):
    """Fused kernels read all tensors of a parameter in one order of memory."""
    from edgetune.config import TrainConfig
    from edgetune.train.optim import make_optimizer

    config = TrainConfig(task="t", model="m", data="d", output="o", optimizer=name, lr=1e-2)

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = nn.Conv2d(3, 4, 5)
        optimizer = make_optimizer(network, config)
        return network.to(memory_format=torch.channels_last), optimizer

    def steps(network: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            network(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    network, optimizer = make()
    steps(network, optimizer, range(3))
    saved = optimizer_tensors(network, optimizer)
    weights = {n: t.clone(memory_format=torch.contiguous_format)
               for n, t in network.state_dict().items()}  # fmt: skip
    steps(network, optimizer, range(3, 6))
    other, other_optimizer = make()
    other.load_state_dict(weights)
    restore_optimizer(other, other_optimizer, saved)
    steps(other, other_optimizer, range(3, 6))
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_state_of_other_parameters_is_refused():
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    with pytest.raises(IntegrityError, match="'gone'"):
        restore_optimizer(network, optimizer, {"exp_avg/gone": torch.zeros(2)})


# -- a full disk -------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def forks():
    with open_forks() as forks:
        yield forks


def fill(folder: Path, *, leave: int) -> None:
    free = shutil.disk_usage(folder).free
    (folder / "filler").write_bytes(b"\1" * (free - leave))


def test_a_full_disk_leaves_the_older_checkpoints_and_says_what_to_do(small_disk):
    folder = small_disk / "run" / "checkpoints"
    save_checkpoint(folder, groups(1.0), Position(step=1))
    fill(small_disk, leave=40_000)
    large = {"weights": {"w": torch.zeros(10**6)}}
    with pytest.raises(ResourceError, match=r"step-00000002: cannot be written: .*make room"):
        save_checkpoint(folder, large, Position(step=2))
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]
    assert load_checkpoint(folder)[0].step == 1


def run_config(model: str, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "task": "text-classification", "model": model, "data": str(data), "output": str(output),
        "method": "full", "epochs": 3, "batch_size": 16, "lr": 5e-3, "cpu": True,
        "metric": "accuracy", "checkpoint_steps": 2, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(forks: Forks, switches, tiny_bert, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert forks.train(run_config(tiny_bert, switches, folder)).status == "finished"
    return folder


def test_a_run_on_a_disk_that_fills_up_goes_on_to_the_same_bytes(
    forks, whole, switches, tiny_bert, small_disk
):
    run = small_disk / "run"
    config = run_config(tiny_bert, switches, run)
    assert forks.train(config, interrupt_at=4).status == "interrupted"
    for leave in (0, 4096, 40_000, 300_000):
        fill(small_disk, leave=leave)
        outcome = forks.resume(run)
        assert outcome.code == 4, (leave, outcome.error)
        assert str(run) in outcome.error
        assert "No space left" in outcome.error
        assert load_checkpoint(run / "checkpoints")[0].step >= 4
        (small_disk / "filler").unlink()
    assert forks.resume(run).status == "finished"
    assert file_sha256(run / "best.safetensors") == file_sha256(whole / "best.safetensors")
    assert losses(run) == losses(whole)


def losses(run: Path) -> list[tuple[float, float]]:
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [(x["train_loss"], x["val_loss"]) for x in lines]


@pytest.mark.parametrize(
    ("most_bytes", "name"), [(1_000, r"config\.toml"), (60_000, "step-00000002|best.safetensors")]
)
def test_a_file_that_cannot_be_written_is_named(
    forks, switches, tiny_bert, tmp_path, most_bytes, name
):
    config = run_config(tiny_bert, switches, tmp_path / "run")
    outcome = forks.train(config, file_bytes=most_bytes)
    assert outcome.code == 4, outcome.error
    assert re.search(f"/({name}): cannot be written", outcome.error), outcome.error
    assert (tmp_path / "run").exists() == (name != r"config\.toml")


@pytest.mark.parametrize("damage", ["flip", "cut", "state", "kill"])
def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_bytes(
    forks, whole, switches, tiny_bert, tmp_path, damage
):
    run = tmp_path / "run"
    assert (
        forks.train(run_config(tiny_bert, switches, run), interrupt_at=11).status == "interrupted"
    )
    newest = sorted((run / "checkpoints").iterdir())[-1]
    if damage == "flip":
        flip(newest / "optimizer.safetensors", -3)
    elif damage == "cut":
        DAMAGES["cut"](newest / "weights.safetensors")
    elif damage == "state":
        (newest / "state.json").unlink()
    else:  # SIGKILL in the middle of removing it
        for path in newest.iterdir():
            path.unlink()
    outcome = forks.resume(run)
    assert outcome.status == "finished", outcome.error
    assert any("is damaged" in line and newest.name in line for line in outcome.notes)
    assert file_sha256(run / "best.safetensors") == file_sha256(whole / "best.safetensors")
    assert losses(run) == losses(whole)
    last = [sorted((r / "checkpoints").iterdir())[-1] for r in (run, whole)]
    one, other = (load_file(p / "optimizer.safetensors") for p in last)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
