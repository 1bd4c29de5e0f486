"""The moving average against torch.optim.swa_utils, and what it leaves alone."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edgetune.errors import ConfigError
from edgetune.train.ema import Ema


def make_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train_a_step(network, optimizer):
    optimizer.zero_grad()
    network(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()


def snapshot(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_averages_are_torchs():
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    theirs.update_parameters(network)  # torch's first update is a copy
    ours = Ema(network, 0.9)
    for step in range(1000, 1020):  # late enough that the decay is not warming up
        train_a_step(network, optimizer)
        ours.update(step)
        theirs.update_parameters(network)
    expected = theirs.module.state_dict()
    found = ours.state()
    assert found.keys() == {n for n in expected if "num_batches" not in n}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])
        assert not torch.equal(tensor, network.state_dict()[name])


def test_the_decay_warms_up():
    # decays (1 + t) / (10 + t): 0.1, 2/11; from 0 with weights 1: 0.9, 2/11 * 0.9 + 9/11
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.zero_()
    ema = Ema(network, 0.999)
    network.weight.data.fill_(1.0)
    ema.update(0)
    assert float(ema.state()["weight"]) == pytest.approx(0.9)
    ema.update(1)
    assert float(ema.state()["weight"]) == pytest.approx(0.9 * 2 / 11 + 9 / 11)
    ema.load({"weight": torch.zeros(1, 1)})
    ema.update(10**6)
    assert float(ema.state()["weight"]) == pytest.approx(0.001, rel=1e-4)


def test_weights_come_back_bit_for_bit_also_after_an_error():
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    ema = Ema(network, 0.5)
    train_a_step(network, optimizer)
    ema.update(100)
    train_a_step(network, optimizer)
    before = snapshot(network)
    averages = {name: tensor.clone() for name, tensor in ema.state().items()}
    with ema.applied():
        inside = snapshot(network)
    assert_equal(snapshot(network), before)
    for name, tensor in averages.items():
        assert torch.equal(inside[name], tensor)
        assert not torch.equal(inside[name], before[name])
    assert torch.equal(inside["1.num_batches_tracked"], before["1.num_batches_tracked"])
    with pytest.raises(RuntimeError, match="in the middle"), ema.applied():
        raise RuntimeError("in the middle")
    assert_equal(snapshot(network), before)
    assert_equal(ema.state(), averages)


def test_training_goes_on_as_if_nothing_had_been_applied():
    weights = []
    for applies in (False, True):
        network = make_network()
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        ema = Ema(network, 0.9)
        for step in range(4):
            train_a_step(network, optimizer)
            ema.update(step)
            if applies:
                with ema.applied(), torch.inference_mode():
                    network(torch.zeros(2, 3))
        weights.append(snapshot(network))
    # the forward passes in between moved BatchNorm's statistics, which were put back; its count
    # of batches is no float and is the network's own
    del weights[0]["1.num_batches_tracked"], weights[1]["1.num_batches_tracked"]
    assert_equal(weights[1], weights[0])


def test_a_sharded_network_runs_on_averages_and_then_on_its_own_weights_again():
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def outputs(network, ema, optimizer):
        """Return what it says trained, averaged, trained again, and after another step."""
        torch.manual_seed(1)
        train_a_step(network, optimizer)
        ema.update(100)
        network.eval()
        x, found = torch.ones(2, 3), []
        with torch.no_grad():
            found.append(network(x))
            with ema.applied():
                found.append(network(x))
            found.append(network(x))
        network.train()
        train_a_step(network, optimizer)
        network.eval()
        with torch.no_grad():
            found.append(network(x))
        return found

    def trainer(network):
        return network, Ema(network, 0.5), torch.optim.SGD(network.parameters(), lr=0.1)

    expected = outputs(*trainer(make_network()))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        found = outputs(*trainer(fully_shard(make_network(), mesh=init_device_mesh("cpu", (1,)))))
    finally:
        distributed.destroy_process_group()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(expected[0], expected[1])
    torch.testing.assert_close(expected[0], expected[2])


def test_frozen_weights_have_no_average():
    network = make_network()
    network[0].requires_grad_(False)
    network[1].requires_grad_(False)
    assert set(Ema(network, 0.9).state()) == {"2.weight", "2.bias"}


def test_averages_of_bfloat16_weights_keep_small_steps():
    network = nn.Linear(1, 1, bias=False).bfloat16()
    network.weight.data.fill_(1.0)
    ema = Ema(network, 0.999)
    network.weight.data.fill_(2.0)
    for step in range(10_000, 10_100):
        ema.update(step)
    # 2 - 0.999^100; one step of 0.001 on 1 would be rounded away in bfloat16
    assert float(ema.state()["weight"]) == pytest.approx(2 - 0.999**100, rel=1e-5)
    with ema.applied():
        assert network.weight.dtype == torch.bfloat16
        assert network.weight.item() == pytest.approx(2 - 0.999**100, rel=2**-8)


def test_saved_averages_go_on_where_they_were():
    network = make_network()
    ema = Ema(network, 0.9)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    train_a_step(network, optimizer)
    ema.update(0)
    saved = {name: tensor.clone() for name, tensor in ema.state().items()}
    other = Ema(network, 0.9)
    other.load(saved)
    train_a_step(network, optimizer)
    ema.update(1)
    other.update(1)
    assert_equal(other.state(), ema.state())


def test_averages_of_another_network_are_refused():
    ema = Ema(make_network(), 0.9)
    with pytest.raises(ConfigError, match=r"do not fit the model: 9\.weight"):
        ema.load({**ema.state(), "9.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"0.bias: expected shape \(4,\), got \(5,\)"):
        ema.load({**ema.state(), "0.bias": torch.zeros(5)})
