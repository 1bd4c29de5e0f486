"""Runs killed with SIGKILL at 20 points end with the bytes of runs that nothing disturbed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked_runs import AT_DELAY, AT_OPERATION, AT_TORN_FILE, Death, Forks, open_forks

from edgetune.runtime.bundle import file_sha256

TEXT = {"task": "text-classification", "epochs": 2, "batch_size": 16, "lr": 5e-3}
IMAGES = {
    "task": "image-classification", "model": "torchvision:shufflenet_v2_x0_5", "weights": "none",
    "epochs": 2, "batch_size": 16, "image_size": 32, "lr": 1e-3,
}  # fmt: skip
# name -> what is trained; each is killed twice, once in each kind of moment that stands behind it
SCENARIOS: dict[str, tuple[dict[str, Any], str, str]] = {
    "text, all weights, dropout": (
        {**TEXT, "method": "full", "checkpoint_steps": 1}, AT_OPERATION, AT_TORN_FILE),
    "text, LoRA dropout": (
        {**TEXT, "method": "lora", "lora_dropout": 0.2, "checkpoint_steps": 1},
        AT_OPERATION, AT_DELAY),
    "text, AdaLoRA, average": (
        {**TEXT, "method": "adalora", "ema_decay": 0.9, "checkpoint_steps": 2},
        AT_OPERATION, AT_TORN_FILE),
    "text, gradual unfreezing, plateau": (
        {**TEXT, "method": "full", "unfreeze_every": 1, "epochs": 4, "schedule": "plateau",
         "schedule_epochs": 1, "lr": 1e-3, "checkpoint_steps": 3},
        AT_OPERATION, AT_DELAY),
    "text, activations kept, token order, accumulation": (
        {**TEXT, "method": "freeze", "last_blocks": 1, "activation_cache": "memory",
         "batch_size": 8, "grad_accumulation": 3, "checkpoint_steps": 1},
        AT_OPERATION, AT_OPERATION),
    "text, token dropout, layer decay, Lion": (
        {**TEXT, "method": "full", "token_dropout": 0.2, "layer_decay": 0.8, "lr": 1e-3,
         "optimizer": "lion", "checkpoint_steps": 2},
        AT_OPERATION, AT_DELAY),
    "images, standard augmentation, average": (
        {**IMAGES, "method": "full", "augment": "standard", "workers": 0, "ema_decay": 0.9,
         "checkpoint_steps": 1},
        AT_OPERATION, AT_TORN_FILE),
    "images, standard augmentation, 4 workers": (
        {**IMAGES, "method": "full", "augment": "standard", "workers": 4, "checkpoint_steps": 1},
        AT_OPERATION, AT_DELAY),
    "images, mixup, label smoothing, 2 workers": (
        {**IMAGES, "method": "full", "mixup": 0.4, "label_smoothing": 0.1, "workers": 2,
         "checkpoint_steps": 2},
        AT_DELAY, AT_TORN_FILE),
    "images, activations kept": (
        {**IMAGES, "method": "freeze", "last_blocks": 1, "augment": "none",
         "activation_cache": "memory", "class_weights": "balanced", "checkpoint_steps": 1},
        AT_OPERATION, AT_OPERATION),
}  # fmt: skip


@pytest.fixture(scope="module")
def forks():
    with open_forks() as forks:
        yield forks


def left_behind(folder: Path) -> dict[str, Any]:
    """All that two runs which are the same leave the same: no times, no energy."""
    timed = ("seconds", "pass_seconds", "samples_per_s", "peak_memory_mib", "energy_wh")
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "state.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    record = json.loads((folder / "run.json").read_text())
    return {
        "best": file_sha256(folder / "best.safetensors"),
        "tensors": state["files"],
        "position": {k: v for k, v in state["position"].items() if k not in timed},
        "history": [
            {k: v for k, v in json.loads(line).items() if k not in timed} for line in lines
        ],
        "record": {k: v for k, v in record.items() if k not in timed},
        "names": sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")),
        "checkpoints": sorted(p.name for p in (folder / "checkpoints").iterdir()),
    }


def finish(forks: Forks, config: dict[str, Any], deaths: list[Death]) -> int:
    """Train until it is finished, dying of each of `deaths` in turn; return how many it died of."""
    folder = Path(config["output"])
    for died, death in enumerate([*deaths, None]):
        options = {} if death is None else {"death": death}
        if folder.exists():
            outcome = forks.resume(folder, **options)
        else:  # nothing half-made is taken for a run
            outcome = forks.train(config, **options)
        if outcome.code == 0:
            assert outcome.status == "finished"
            return died
        if died and "is finished" in outcome.error:  # killed after its last word
            return died
        assert outcome.code == -9, outcome.error
    raise AssertionError("the run did not finish")


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_run_resumes_to_the_same_bytes(
    forks, name, switches, tiny_bert, colours, tmp_path
):
    settings, *kinds = SCENARIOS[name]
    is_text = settings["task"].startswith("text")
    config = {
        **({"model": tiny_bert, "data": str(switches)} if is_text else {"data": str(colours)}),
        **settings, "cpu": True, "seed": 3,
    }  # fmt: skip
    whole = forks.train({**config, "output": str(tmp_path / "whole" / "run")})
    assert (whole.status, whole.error) == ("finished", "")
    expected = left_behind(tmp_path / "whole" / "run")
    rng = np.random.default_rng(list(SCENARIOS).index(name))
    seconds = json.loads((tmp_path / "whole/run/run.json").read_text())["seconds"]
    latest = {
        AT_OPERATION: whole.operations, AT_TORN_FILE: whole.tensor_files, AT_DELAY: seconds
    }  # fmt: skip
    # a resumed run is shorter: both come early enough to find it alive, but for a quick one
    moments = [
        rng.uniform(0, share) * latest[k] for k, share in zip(kinds, (0.5, 0.35), strict=True)
    ]
    deaths = [
        Death(kind, moment if kind == AT_DELAY else 1 + int(moment))
        for kind, moment in zip(kinds, moments, strict=True)
    ]
    died = finish(forks, {**config, "output": str(tmp_path / "killed" / "run")}, deaths)
    assert died == 2 or (died == 1 and AT_DELAY in kinds), deaths
    assert left_behind(tmp_path / "killed" / "run") == expected


def test_a_kill_between_an_epoch_s_checkpoint_and_its_record_loses_no_best_epoch(
    forks, switches, tiny_bert, tmp_path
):
    """Every operation of the epoch's end, one after the other."""
    config = {**TEXT, "model": tiny_bert, "data": str(switches), "method": "head", "epochs": 1,
              "cpu": True}  # fmt: skip
    whole = forks.train({**config, "output": str(tmp_path / "whole" / "run")})
    expected = left_behind(tmp_path / "whole" / "run")
    for at in range(whole.operations - 12, whole.operations + 1, 2):
        folder = tmp_path / f"killed-{at}" / "run"
        assert finish(
            forks, {**config, "output": str(folder)}, [Death(AT_OPERATION, at)]
        ) == 1  # fmt: skip
        assert left_behind(folder) == expected, at


@pytest.mark.parametrize("at", [1, 4, 8, 12])
def test_a_kill_while_the_folder_is_made_leaves_none(forks, switches, tiny_bert, tmp_path, at):
    config = {**TEXT, "model": tiny_bert, "data": str(switches), "method": "head", "epochs": 1,
              "cpu": True, "output": str(tmp_path / "run")}  # fmt: skip
    assert forks.train(config, death=Death(AT_OPERATION, at)).code == -9
    assert not (tmp_path / "run").exists()
    resumed = forks.resume(tmp_path / "run")
    assert resumed.code == 2
    assert "is no run of edgetune train" in resumed.error
    assert forks.train(config).status == "finished"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
