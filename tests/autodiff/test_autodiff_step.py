"""Whole networks' gradients: against those of torch's modules themselves, and in int8."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from learning_networks import (
    CLASSES,
    batch_inputs,
    compiled,
    defaults,
    learnable,
    network,
    run_step,
    session,
)
from torch.fx.experimental.optimization import fuse as fold_norms


def torch_gradients(name: str, feeds: dict[str, np.ndarray], targets: np.ndarray) -> list:
    """(value, gradient) of every parameter of the module; norms are part of its convolutions."""
    module = network(name).module
    if name != "bert":
        module = fold_norms(module)
    for parameter in module.parameters():
        parameter.requires_grad_()
        parameter.grad = None
    if name == "bert":
        logits = module(**{n: torch.tensor(v) for n, v in feeds.items()}).logits
    else:
        logits = module(torch.tensor(feeds["image"]))
    F.cross_entropy(logits, torch.tensor(targets), reduction="sum").backward()
    return [(p.detach().numpy(), p.grad.numpy()) for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["bert", "mobilenet"])
def test_the_last_two_blocks_have_the_gradients_of_the_torch_module(name: str):
    made, step = learnable(name, "last:2"), compiled(name, "last:2")
    feeds = network(name).batches(np.random.default_rng(3), 4)
    targets = np.eye(CLASSES, dtype=np.float32)[[0, 3, 1, 4]]
    values = defaults(made)
    found = run_step(session(step.model), batch_inputs(made, step, feeds), values, targets)
    wanted = torch_gradients(name, feeds, targets)
    turned = wanted + [(v.T, g.T) for v, g in wanted if v.ndim == 2]
    largest = max(np.abs(gradient).max() for _, gradient in wanted)
    for trained, value in values.items():
        (gradient,) = [
            g
            for v, g in turned
            if v.shape == value.shape and np.allclose(v, value, rtol=0, atol=1e-6)
        ]
        np.testing.assert_allclose(
            found[f"{trained}.grad.out"], gradient, rtol=0, atol=2e-5 * largest, err_msg=trained
        )
    # weights and biases: 2 x (6 products, 2 norms), pooler, head; or 3 convolutions, 2 products of
    # squeeze-and-excite, the last convolution, 2 products of the head
    assert len(values) == {"bert": 36, "mobilenet": 16}[name]


@pytest.mark.parametrize("codes", ["s8", "u8"])
def test_gradients_in_int8_are_within_a_few_percent(codes: str):
    made = learnable("bert", "lora", codes)
    rng = np.random.default_rng(4)
    values = {n: v + rng.normal(size=v.shape).astype("f4") / 10 for n, v in defaults(made).items()}
    feeds = network("bert").batches(rng, 4)
    targets = np.eye(CLASSES, dtype=np.float32)[[0, 3, 1, 4]]
    found = {}
    for gradients in ("float32", "int8"):
        step = compiled("bert", "lora", codes, gradients=gradients)
        given = batch_inputs(made, step, feeds)
        found[gradients] = run_step(session(step.model), given, values, targets)
    worst = 0.0
    for name in values:
        exact, rough = (found[g][f"{name}.grad.out"] for g in ("float32", "int8"))
        worst = max(worst, float(np.linalg.norm(rough - exact) / np.linalg.norm(exact)))
    assert 1e-4 < worst < 0.05


def test_training_with_int8_gradients_ends_at_the_same_loss():
    """Which class a text is of, one of its words tells; 40 steps of AdamW."""
    made = learnable("bert", "lora", "u8")
    rng = np.random.default_rng(6)
    feeds = network("bert").batches(rng, 16)
    classes = np.arange(16) % CLASSES
    feeds["input_ids"][:, 1:4] = 10 + classes[:, None]
    targets = np.eye(CLASSES, dtype=np.float32)[classes]
    losses = {}
    for gradients in ("float32", "int8"):
        step = compiled("bert", "lora", "u8", gradients=gradients)
        opened = session(step.model)
        given, values = batch_inputs(made, step, feeds), defaults(made)
        state: dict[str, np.ndarray] = {}
        curve = []
        for t in range(1, 41):
            found = run_step(opened, given, values, targets, state, lr=2e-2, t=t)
            curve.append(float(found["loss"]) / 16)
            values = {n: found[f"{n}.out"] for n in values}
            state = {f"{n}.{m}": found[f"{n}.{m}.out"] for n in values for m in "mv"}
        losses[gradients] = curve
    assert losses["float32"][-1] < 0.5 * losses["float32"][0]
    assert losses["int8"][-1] == pytest.approx(losses["float32"][-1], rel=0.02)
