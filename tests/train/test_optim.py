"""Optimizers against torch, timm, bitsandbytes and the papers; groups by hand."""

import builtins
import copy
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError, MissingExtraError
from edgetune.train.optim import Lion, make_optimizer, set_lr


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 64), nn.LayerNorm(64), nn.Linear(64, 3))


def train(network, optimizer, steps, seed=0):
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(8, 80)).square().mean().backward()
        optimizer.step()


def assert_same_weights(found, expected, **tolerance):
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def groups_of(network, decay):
    """Return torch's form of: matrices decay, vectors don't."""
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


KEYS = {"lr": 0.01, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.95, "momentum": 0.7}


@pytest.mark.parametrize(
    ("name", "keys", "make"),
    [
        ("adamw", {}, lambda g: torch.optim.AdamW(g, lr=0.01, betas=(0.8, 0.95))),
        ("adam", {}, lambda g: torch.optim.Adam(g, lr=0.01, betas=(0.8, 0.95))),
        ("sgd", {}, lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.7)),
        (
            "sgd",
            {"nesterov": True},
            lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.7, nesterov=True),
        ),
    ],
    ids=["adamw", "adam", "sgd", "nesterov"],
)
def test_optimizers_step_as_torchs(name, keys, make):
    network, expected = make_network(), make_network()
    train(network, make_optimizer(network, TrainConfig(optimizer=name, **KEYS, **keys)), 5)
    train(expected, make(groups_of(expected, 0.2)), 5)
    assert_same_weights(network, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_torchs_optimizers_are_fused(name):
    optimizer = make_optimizer(make_network(), TrainConfig(optimizer=name))
    assert all(group["fused"] for group in optimizer.param_groups)


def test_lion_by_hand():
    # Chen et al. 2023, algorithm 2, one weight, beta 0.9 and 0.5, lr 0.1, decay 0.5
    weight = nn.Parameter(torch.tensor([[2.0]]))
    lion = Lion([weight], lr=0.1, betas=(0.9, 0.5), weight_decay=0.5)
    weight.grad = torch.tensor([[4.0]])
    lion.step()
    # m = 0: c = 0.1 * 4 > 0; 2 - 0.1 (1 + 0.5 * 2) = 1.8; m = 0.5 * 4 = 2
    assert weight.item() == pytest.approx(1.8)
    weight.grad = torch.tensor([[-10.0]])
    lion.step()
    # c = 0.9 * 2 - 0.1 * 10 = 0.8 > 0; 1.8 - 0.1 (1 + 0.9) = 1.61; m = 0.5 * 2 - 0.5 * 10 = -4
    assert weight.item() == pytest.approx(1.61)
    assert lion.state[weight]["exp_avg"].item() == pytest.approx(-4)
    weight.grad = None
    lion.step()
    assert weight.item() == pytest.approx(1.61)


def test_lion_steps_as_timms():
    theirs = pytest.importorskip("timm.optim").Lion
    network, expected = make_network(), make_network()
    train(network, make_optimizer(network, TrainConfig(optimizer="lion", **KEYS)), 5)
    train(expected, theirs(groups_of(expected, 0.2), lr=0.01, betas=(0.8, 0.95)), 5)
    assert_same_weights(network, expected, rtol=1e-5, atol=1e-6)


def test_lion_works_with_a_gradient_scaler():
    # a step whose gradients overflow is left out
    network = make_network()
    before = copy.deepcopy(network)
    optimizer = make_optimizer(network, TrainConfig(optimizer="lion", **KEYS))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(network(torch.full((2, 80), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same_weights(network, before, rtol=0, atol=0)


def test_adamw_8bit_is_near_adamw():
    pytest.importorskip("bitsandbytes")
    # a matrix of 5,120 elements is large enough for bitsandbytes to keep its state in 8 bits
    start, network, expected = make_network(), make_network(), make_network()
    optimizer = make_optimizer(network, TrainConfig(optimizer="adamw_8bit", **KEYS))
    train(network, optimizer, 20)
    assert optimizer.state[network[0].weight]["state1"].dtype == torch.uint8
    train(expected, make_optimizer(expected, TrainConfig(optimizer="adamw", **KEYS)), 20)
    for a, b, c in zip(
        network.parameters(), expected.parameters(), start.parameters(), strict=True
    ):
        assert (a - b).norm() < 0.1 * (b - c).norm()


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "adamw_8bit"])
def test_a_state_saved_as_tensors_goes_on_bit_for_bit(name):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    config = TrainConfig(optimizer=name, **KEYS)
    unbroken = make_network()
    optimizer = make_optimizer(unbroken, config)
    train(unbroken, optimizer, 3)
    # as edgetune.train.checkpoint keeps it
    blob = save(
        {
            f"{index}.{key}": torch.as_tensor(value).detach().contiguous().cpu()
            for index, entries in optimizer.state_dict()["state"].items()
            for key, value in entries.items()
            if value is not None
        }
    )
    resumed = copy.deepcopy(unbroken)
    train(unbroken, optimizer, 3, seed=1)

    fresh = make_optimizer(resumed, config)
    state = {}
    for key, value in load(blob).items():
        index, _, word = key.partition(".")
        state.setdefault(int(index), {})[word] = value
    fresh.load_state_dict({"state": state, "param_groups": fresh.state_dict()["param_groups"]})
    train(resumed, fresh, 3, seed=1)
    assert_same_weights(resumed, unbroken, rtol=0, atol=0)
    assert not torch.equal(resumed[2].weight, make_network()[2].weight)


@pytest.fixture
def sharded():
    """A network in FSDP2's parts, of which this process holds all."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        network = make_network()
        fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
        yield network
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion"])
def test_sharded_weights_move_as_whole_ones(sharded, name):
    config = TrainConfig(optimizer=name, **KEYS)
    expected = make_network()
    train(expected, make_optimizer(expected, config), 3)
    train(sharded, make_optimizer(sharded, config), 3)
    sharded.reshard()
    for a, b in zip(sharded.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.full_tensor(), b, rtol=1e-5, atol=1e-6)


def test_adamw_8bit_refuses_a_sharded_network(sharded):
    with pytest.raises(ConfigError, match="cannot train a sharded model"):
        make_optimizer(sharded, TrainConfig(optimizer="adamw_8bit"))


def test_adamw_8bit_without_bitsandbytes_says_what_brings_it(monkeypatch):
    from edgetune.train import optim

    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    optim._adamw_8bit_class.cache_clear()
    with pytest.raises(MissingExtraError, match=r"edgetune\[qlora\]"):
        make_optimizer(make_network(), TrainConfig(optimizer="adamw_8bit"))


def test_biases_and_norms_do_not_decay():
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = make_optimizer(network, TrainConfig(weight_decay=0.3)).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.3, 1), (0.0, 3)]


def test_kernels_decay_and_scales_of_adapters_do_not():
    from peft import IA3Config, inject_adapter_in_model

    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4, 2))
    inject_adapter_in_model(IA3Config(target_modules=["2"], feedforward_modules=[]), network)
    network[0].requires_grad_(True)
    groups = make_optimizer(network, TrainConfig(weight_decay=0.3)).param_groups
    names = {id(p): n for n, p in network.named_parameters()}
    found = [(g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups]
    assert found == [(0.3, ["0.weight"]), (0.0, ["2.ia3_l.default"])]


def test_rates_fall_from_block_to_block():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    depths = {n: 2 - int(n[0]) for n, _ in network.named_parameters()}
    config = TrainConfig(lr=0.08, layer_decay=0.5, weight_decay=0.1)
    optimizer = make_optimizer(network, config, depths=depths)
    found = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(0.08, 0.1), (0.08, 0), (0.04, 0.1), (0.04, 0), (0.02, 0.1), (0.02, 0)]
    order = [id(p) for g in optimizer.param_groups for p in g["params"]]
    names = ("2.weight", "2.bias", "1.weight", "1.bias", "0.weight", "0.bias")
    assert order == [id(network.get_parameter(name)) for name in names]
    # one step of sign descent moves each weight by its own rate
    before = copy.deepcopy(network)
    lion = make_optimizer(
        network, TrainConfig(optimizer="lion", lr=0.08, layer_decay=0.5, weight_decay=0.0),
        depths=depths,
    )  # fmt: skip
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_lr(lion, 0.25)
    lion.step()
    for layer, moved in enumerate((0.005, 0.01, 0.02)):
        difference = before[layer].weight - network[layer].weight
        torch.testing.assert_close(difference, torch.full_like(difference, moved))


def test_without_layer_decay_depths_make_no_groups():
    network = make_network()
    depths = {n: int(n[0]) for n, _ in network.named_parameters()}
    assert len(make_optimizer(network, TrainConfig(), depths=depths).param_groups) == 2


def test_only_what_trains_is_in_a_group():
    network = make_network()
    network[0].requires_grad_(False)
    groups = make_optimizer(network, TrainConfig()).param_groups
    assert sum(len(g["params"]) for g in groups) == 4
    network.requires_grad_(False)
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        make_optimizer(network, TrainConfig())


def test_a_rate_is_a_share_of_the_peak():
    optimizer = make_optimizer(make_network(), TrainConfig(lr=0.5))
    set_lr(optimizer, 0.1)
    set_lr(optimizer, 0.3)
    assert all(math.isclose(g["lr"], 0.15) for g in optimizer.param_groups)


@pytest.mark.parametrize("keys", [{"optimizer": "adamw"}, {"optimizer": "sgd", "momentum": 0.0}])
def test_nesterov_without_sgds_momentum_is_an_error(keys):
    with pytest.raises(ConfigError, match="nesterov belongs to optimizer 'sgd'"):
        make_optimizer(make_network(), TrainConfig(nesterov=True, **keys))
