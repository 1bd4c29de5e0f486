"""Kept activations: what the network gives behind the cut is what the whole of it gives."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from edgetune.config import TrainConfig
from edgetune.models.adapt import adapt, frozen_prefix, set_train_mode
from edgetune.models.families import find_family
from edgetune.models.load import load_model
from edgetune.tasks import open_task
from edgetune.tasks.graph import logits_of
from edgetune.tasks.text_classification import TokenSamples
from edgetune.train import Event, train
from edgetune.train.activations import (
    KEY,
    Cut,
    Place,
    Refused,
    difference_behind,
    keep_activations,
)

TORCHVISION = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1"]


def vision(name: str) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    if name == "vit":
        config = ViTConfig(
            image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3,
            num_attention_heads=2, intermediate_size=64,
        )  # fmt: skip
        return ViTForImageClassification(config), find_family("transformers", "vit")
    return torchvision.models.get_model(name, weights=None), find_family("torchvision", name)


@pytest.mark.parametrize("method", ["head", "freeze"])
@pytest.mark.parametrize("name", [*TORCHVISION, "vit"])
def test_gradients_behind_the_cut_are_those_of_the_whole_network(name, method):
    network, family = vision(name)
    blocks = {"last_blocks": 1} if method == "freeze" else {}
    adapt(network, family, TrainConfig(method=method, **blocks))
    prefix = frozen_prefix(network, family)
    assert prefix
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    set_train_mode(network, prefix)
    x = torch.randn(4, 3, 32, 32)
    target = torch.tensor([0, 1, 0, 1])
    trained = [p for p in network.parameters() if p.requires_grad]

    def gradients(logits: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(nn.functional.cross_entropy(logits, target), trained))

    # BatchNorm behind the cut normalises by the batch: statistics may move, gradients not
    whole = gradients(logits_of(network(x)))
    cut = Cut(network, prefix)
    activation = cut.capture(lambda: network(x))
    outline = torch.zeros(1, 1, 1, 1).expand(4, 3, 32, 32)
    with cut.behind(activation):
        behind = gradients(logits_of(network(outline)))
    for ours, theirs in zip(behind, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def tiny(tiny_bert: str, **changes: object):
    config = dataclasses.replace(
        TrainConfig(task="text-classification", model=tiny_bert, method="head"), **changes
    )
    loaded = load_model(tiny_bert, kind="text", labels=["off", "on"])
    adapt(loaded.network, loaded.family, config)
    task = open_task("text-classification", loaded, ["off", "on"], config)
    prefix = frozen_prefix(loaded.network, loaded.family)
    set_train_mode(loaded.network, prefix)
    return task, Cut(loaded.network, prefix)


def texts() -> TokenSamples:
    ids = [[2, *range(5, 5 + n), 3] for n in (4, 9, 1, 6, 3, 8, 2)]
    return TokenSamples(ids, [0, 1, 0, 1, 0, 1, 0], pad_id=0)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_texts_of_any_length_answer_alike_behind_the_cut(tiny_bert, tmp_path, kind):
    task, cut = tiny(tiny_bert)
    network = task.network.eval()

    def logits(batch: dict[str, Tensor]) -> Tensor:
        return task.logits(network, batch)

    samples = texts()
    kept = keep_activations(
        cut, logits, samples, Place(kind=kind, folder=tmp_path, most_bytes=2**20), name="a.bin",
        batch_size=2, device=torch.device("cpu"), progress=lambda *_: None,
    )  # fmt: skip
    # 33 tokens and 14 special ones, 32 features of 4 bytes
    assert kept.nbytes == (33 + 14) * 32 * 4
    assert difference_behind(cut, logits, samples, kept, torch.device("cpu")) < 1e-5
    batch = kept.batch([1, 4])
    assert batch[KEY].shape == (2, 11, 32)
    assert torch.equal(batch[KEY][1, 5:], torch.zeros(6, 32))
    assert kept.batch([4])[KEY].shape == (1, 5, 32)


def test_what_takes_more_than_it_may_is_refused(tiny_bert, tmp_path):
    task, cut = tiny(tiny_bert)
    with pytest.raises(Refused, match="more than the"):
        keep_activations(
            cut, lambda b: task.logits(task.network, b), texts(),
            Place(kind="memory", folder=tmp_path, most_bytes=1000), name="a.bin", batch_size=2,
            device=torch.device("cpu"), progress=lambda *_: None,
        )  # fmt: skip


class Two(nn.Module):
    """Hands two tensors from stage to stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = _Pair(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x)
        return self.last(a + b)


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 2 * x


def test_a_stage_that_gives_two_tensors_is_refused():
    network = Two()
    with pytest.raises(Refused, match="more than one tensor"):
        Cut(network, ["first"]).capture(lambda: network(torch.ones(1, 4)))


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


def config_for(data: Path, model: str, output: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        task="text-classification", model=model, data=str(data), output=str(output),
        method="freeze", last_blocks=1, epochs=3, batch_size=16, lr=1e-3, cpu=True, workers=0,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def test_a_run_learns_the_same_with_and_without(switches, tiny_bert, tmp_path):
    events: list[Event] = []
    for cache in ("memory", "off", "disk"):
        config = config_for(switches, tiny_bert, tmp_path / cache, activation_cache=cache)
        train(config, on_event=events.append)
    plans = [e.values["kept"] for e in events if e.kind == "plan"]
    assert [bool(p) for p in plans] == [True, False, True]
    assert losses(tmp_path / "memory") == pytest.approx(losses(tmp_path / "off"), abs=2e-5)
    assert losses(tmp_path / "disk") == losses(tmp_path / "memory")
    assert not (tmp_path / "disk" / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_dropout": 0.2}, "token_dropout makes a new text every epoch"),
        ({"method": "lora", "last_blocks": None}, "no block is frozen"),
        ({"cache_gib": 1e-6}, "more than the"),
    ],
)
def test_what_would_change_the_result_is_refused_with_its_reason(
    switches, tiny_bert, tmp_path, changes, reason
):
    events: list[Event] = []
    config = config_for(
        switches, tiny_bert, tmp_path / "run", activation_cache="memory", epochs=1, **changes
    )
    train(config, on_event=events.append)
    notes = [e.values["text"] for e in events if e.kind == "note"]
    assert any(reason in text for text in notes)


def image_config(data: Path, output: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        task="image-classification", model="torchvision:squeezenet1_1", weights="none",
        data=str(data), output=str(output), method="freeze", last_blocks=2, image_size=32,
        epochs=3, batch_size=16, cpu=True, workers=0, augment="flip", patience=0,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


@pytest.mark.filterwarnings("ignore:.*Conv2d.*:UserWarning")
@pytest.mark.parametrize("changes", [{}, {"augment": "standard", "augment_views": 2}])
def test_images_are_kept_in_each_of_their_views(colours, tmp_path, changes):
    events: list[Event] = []
    for cache in ("memory", "off"):
        config = image_config(colours, tmp_path / cache, activation_cache=cache, **changes)
        train(config, on_event=events.append)
    assert [bool(e.values["kept"]) for e in events if e.kind == "plan"] == [True, False]
    assert losses(tmp_path / "memory") == pytest.approx(losses(tmp_path / "off"), abs=1e-3)


def test_augmentation_without_end_is_refused_and_says_what_would_help(colours, tmp_path):
    events: list[Event] = []
    config = image_config(
        colours, tmp_path / "run", activation_cache="memory", augment="standard", epochs=1
    )
    train(config, on_event=events.append)
    notes = [e.values["text"] for e in events if e.kind == "note"]
    assert any("--augment-views 4" in text for text in notes)
