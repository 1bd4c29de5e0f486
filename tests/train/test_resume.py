"""Interrupts that reach every process of a run, and what resumes exactly after them."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forked_runs import Forks, open_forks
from safetensors.torch import load_file

from edgetune.errors import DataError, ResourceError
from edgetune.runtime.bundle import file_sha256
from edgetune.train.batches import BatchOrder
from edgetune.train.feeding import Feeder


@pytest.fixture(scope="module")
def forks():
    with open_forks() as forks:
        yield forks


def images(data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "task": "image-classification", "model": "torchvision:squeezenet1_1", "weights": "none",
        "data": str(data), "output": str(output), "method": "full", "epochs": 2, "batch_size": 16,
        "image_size": 32, "workers": 2, "cpu": True, "lr": 1e-3, "metric": "accuracy", **changes,
    }  # fmt: skip


def texts(model: str, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "task": "text-classification", "model": model, "data": str(data), "output": str(output),
        "method": "full", "epochs": 2, "batch_size": 16, "lr": 1e-3, "cpu": True,
        "metric": "accuracy", **changes,
    }  # fmt: skip


def assert_ends_the_same(run: Path, whole: Path) -> None:
    assert file_sha256(run / "best.safetensors") == file_sha256(whole / "best.safetensors")
    ends = [sorted((r / "checkpoints").iterdir())[-1] for r in (run, whole)]
    names = [{p.name for p in end.iterdir()} - {"state.json"} for end in ends]
    assert names[0] == names[1]
    for name in names[0]:
        assert file_sha256(ends[0] / name) == file_sha256(ends[1] / name), name


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_whole_group_leaves_loading_to_end_by_itself(
    forks: Forks, colours, tmp_path, name
):
    """Ctrl-C on a terminal and torchrun's SIGTERM reach the loading processes too."""
    assert forks.train(images(colours, tmp_path / "whole")).status == "finished"
    # the fourth step is the epoch's last: validation still has to be loaded after it
    outcome = forks.train(
        images(colours, tmp_path / "run"), interrupt_at=4, signal=name, whole_group=True
    )
    assert (outcome.status, outcome.error) == ("interrupted", "")
    assert forks.resume(tmp_path / "run").status == "finished"
    assert_ends_the_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", ["sgd", "adam", "lion", "adamw_8bit"])
def test_every_optimizer_resumes_exactly(forks, switches, tiny_bert, tmp_path, name):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    whole = texts(tiny_bert, switches, tmp_path / "whole", optimizer=name)
    assert forks.train(whole).status == "finished"
    config = texts(tiny_bert, switches, tmp_path / "run", optimizer=name)
    assert forks.train(config, interrupt_at=5).status == "interrupted"
    assert forks.resume(tmp_path / "run").status == "finished"
    assert_ends_the_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("method", ["dora", "ia3", "bitfit"])
def test_methods_of_few_weights_resume_exactly(forks, switches, tiny_bert, tmp_path, method):
    whole = texts(tiny_bert, switches, tmp_path / "whole", method=method)
    assert forks.train(whole).status == "finished"
    config = texts(tiny_bert, switches, tmp_path / "run", method=method)
    assert forks.train(config, interrupt_at=5).status == "interrupted"
    assert forks.resume(tmp_path / "run").status == "finished"
    assert_ends_the_same(tmp_path / "run", tmp_path / "whole")
    assert load_file(tmp_path / "run" / "best.safetensors")


# -- loading processes -------------------------------------------------------------------------


class Numbers:
    """Samples whose batch fails, or kills its process, where an index is odd."""

    lengths = None
    views = 1

    def __init__(self, end: str) -> None:
        self.end = end

    def __len__(self) -> int:
        return 4

    def batch(self, indices: list[int], *, epoch: int) -> dict[str, Any]:  # noqa: ARG002
        import torch

        if indices[0] % 2:
            if self.end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            raise DataError("photos/7.jpg: cannot be decoded")
        return {"labels": torch.tensor(indices)}


def feeder(end: str) -> Feeder:
    import torch

    order = BatchOrder(4, 1, shuffle=False)
    return Feeder(Numbers(end), order, device=torch.device("cpu"), workers=1)  # type: ignore[arg-type]


def test_an_error_in_a_loading_process_is_the_one_line_that_it_was():
    feed = feeder("error")
    with pytest.raises(DataError, match=r"^photos/7\.jpg: cannot be decoded$"):
        list(feed.epoch(0))
    feed.close()


def test_a_loading_process_that_is_killed_is_said():
    feed = feeder("killed")
    with pytest.raises(ResourceError, match=r"data loading process ended: .* --workers 0"):
        list(feed.epoch(0))
    feed.close()
