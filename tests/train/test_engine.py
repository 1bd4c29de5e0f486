"""A step: its gradients are those of the mean over all its rows, however they are divided."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgetune.config import TrainConfig
from edgetune.models.adapt import adapt
from edgetune.models.load import load_model
from edgetune.tasks import open_task
from edgetune.tasks.text_classification import TokenSamples
from edgetune.train import Event, train
from edgetune.train.batches import BatchOrder
from edgetune.train.engine import Engine, step_seed
from edgetune.train.feeding import Feeder
from edgetune.train.history import read_history
from edgetune.train.machine import open_machine

LABELS = [0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1]


def samples() -> TokenSamples:
    rng = np.random.default_rng(0)
    ids = [[2, *rng.integers(5, 19, n).tolist(), 3] for n in rng.integers(2, 9, len(LABELS))]
    return TokenSamples(ids, LABELS, pad_id=0)


def engine_of(tiny_bert: str, **changes: object) -> Engine:
    config = dataclasses.replace(
        TrainConfig(
            task="text-classification", model=tiny_bert, method="full", cpu=True, grad_clip=0.0
        ),
        **changes,
    )
    torch.manual_seed(0)
    loaded = load_model(tiny_bert, kind="text", labels=["off", "on"])
    adapt(loaded.network, loaded.family, config)
    for module in loaded.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loaded.network.config.attention_probs_dropout_prob = 0.0
    for layer in loaded.network.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    task = open_task("text-classification", loaded, ["off", "on"], config)
    engine = Engine(config, task, loaded.family, open_machine(config), [3, 9])
    engine.train_mode(0)
    return engine


def gradients(engine: Engine) -> list[torch.Tensor]:
    return [p.grad.clone() for p in engine.plain.parameters() if p.grad is not None]


def accumulated(engine: Engine, batch_size: int) -> list[torch.Tensor]:
    feed = Feeder(
        samples(), BatchOrder(len(LABELS), batch_size, shuffle=False), device=torch.device("cpu")
    )
    batches = list(feed.epoch(0))
    for batch in batches:
        engine.accumulate(batch, epoch=0, rows=len(LABELS), last=batch is batches[-1])
    return gradients(engine)


def by_torch(engine: Engine, loss: nn.Module) -> list[torch.Tensor]:
    batch = samples().batch(range(len(LABELS)))
    labels = batch.pop("labels")
    for parameter in engine.plain.parameters():
        parameter.grad = None
    loss(engine.task.logits(engine.plain, batch), labels).backward()
    return gradients(engine)


@pytest.mark.parametrize("batch_size", [12, 5, 1])
def test_accumulated_gradients_are_those_of_the_whole_batch(tiny_bert, batch_size):
    engine = engine_of(tiny_bert)
    ours = accumulated(engine, batch_size)
    theirs = by_torch(engine, nn.CrossEntropyLoss())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [12, 5])
def test_class_weights_divide_by_the_weight_of_all_rows(tiny_bert, batch_size):
    # SGD at rate 1 without momentum: the step is the gradient itself
    engine = engine_of(
        tiny_bert, class_weights="balanced", optimizer="sgd", momentum=0.0, lr=1.0, weight_decay=0.0
    )
    # scikit-learn's balanced weights by hand: 12 / (2 * 3) and 12 / (2 * 9)
    expected = by_torch(engine, nn.CrossEntropyLoss(weight=torch.tensor([2.0, 2 / 3])))
    for parameter in engine.plain.parameters():
        parameter.grad = None
    trained = [p for p in engine.plain.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    accumulated(engine, batch_size)
    engine.update(1.0, 0, 1)
    found = [b - p.detach() for b, p in zip(before, trained, strict=True)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_seeds_differ_by_epoch_batch_and_process():
    seeds = {
        step_seed(0, e, b, r) for e in range(10) for b in range(10) for r in range(10)
    } | {step_seed(1, 0, 0, 0)}  # fmt: skip
    assert len(seeds) == 1001
    assert step_seed(0, 3, 2, 1) == step_seed(0, 3, 2, 1)


def config_for(switches, tiny_bert, output, **changes: object) -> TrainConfig:
    config = TrainConfig(
        task="text-classification", model=tiny_bert, data=str(switches), output=str(output),
        method="full", epochs=2, batch_size=16, lr=1e-3, cpu=True, patience=0,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def newest(folder, group: str) -> dict[str, torch.Tensor]:
    checkpoint = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return load_file(checkpoint / f"{group}.safetensors")


def test_blocks_are_freed_one_after_the_other(switches, tiny_bert, tmp_path):
    base = load_model(tiny_bert, kind="text", labels=["off", "on"]).network.state_dict()

    def changed(epochs: int) -> set[str]:
        folder = tmp_path / str(epochs)
        train(config_for(switches, tiny_bert, folder, epochs=epochs, unfreeze_every=1))
        after = newest(folder, "weights")
        return {
            part
            for part in ("embeddings", "layer.0", "layer.1", "pooler")
            for name, tensor in after.items()
            if part in name and not torch.equal(tensor, base[name])
        }

    # of two blocks: the head alone, then the upper block, the lower one, what lies below
    assert changed(1) == {"pooler"}
    assert changed(2) == {"pooler", "layer.1"}
    assert changed(3) == {"pooler", "layer.1", "layer.0"}
    assert changed(4) == {"pooler", "layer.1", "layer.0", "embeddings"}


def test_the_average_is_what_is_measured_and_kept(switches, tiny_bert, tmp_path):
    folder = tmp_path / "run"
    train(config_for(switches, tiny_bert, folder, ema_decay=0.9, metric="loss"))
    best = load_file(folder / "best.safetensors")
    average, weights = newest(folder, "ema"), newest(folder, "weights")
    assert all(torch.equal(best[name], average[name]) for name in average)
    assert any(not torch.equal(best[name], weights[name]) for name in weights)


def test_a_plateau_lowers_the_rate(switches, tiny_bert, tmp_path):
    # a rate of nearly 0 cannot change the accuracy: after one stale epoch it falls tenfold
    folder = tmp_path / "run"
    train(
        config_for(
            switches, tiny_bert, folder, epochs=3, lr=1e-9, schedule="plateau", schedule_epochs=1,
            warmup_fraction=0.0,
        )
    )  # fmt: skip
    assert [h["lr"] for h in read_history(folder)] == pytest.approx([1e-9, 1e-9, 1e-10])


def test_a_time_budget_ends_the_run_early_and_whole(switches, tiny_bert, tmp_path):
    events: list[Event] = []
    folder = tmp_path / "run"
    record = train(
        config_for(switches, tiny_bert, folder, epochs=500, time_budget=0.02),
        on_event=events.append,
    )
    assert record.status == "finished"
    assert len(read_history(folder)) < 500
    assert any("minutes allow" in e.values["text"] for e in events if e.kind == "note")
    assert (folder / "best.safetensors").is_file()
