"""Whole networks' training steps, step by step, held against torch's autograd and optimizers."""

import pytest
from learning_networks import compiled, learnable, network

from edgetune.export.step_check import TrainSpec, check_step

CHECKED = [
    *(("bert", r, p, "adamw") for r in ("head", "last:1", "norm", "bias", "lora")
      for p in ("float", "u8")),
    *(("bert", r, "s8", "adamw") for r in ("last:1", "bias", "lora")),
    *(("bert", r, p, "sgd") for r in ("last:1", "lora") for p in ("float", "u8")),
    *(("mobilenet", r, p, "adamw") for r in ("head", "last:1", "bias:2", "lora:4")
      for p in ("float", "static")),
    ("mobilenet", "last:1", "static", "sgd"),
    ("conv head", "head", "static", "adamw"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "request_", "precision", "optimizer"), CHECKED)
def test_24_steps_stay_with_torch(name: str, request_: str, precision: str, optimizer: str):
    made = learnable(name, request_, precision)
    step = compiled(name, request_, precision, optimizer=optimizer)
    spec = TrainSpec(
        trainable=step.trainable, optimizer=step.optimizer, decayed=step.decayed,
        inputs=(*step.inputs, *(latent.name for latent in step.latents)),
    )  # fmt: skip
    report = check_step(step.model, made.model, spec, batches=network(name).batches, steps=24)
    assert report.steps == 24
    assert 0 < report.worst_gradient < 1e-4
