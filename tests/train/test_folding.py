"""Frozen BatchNorm folded away: the same answers, and nothing done where it would change them."""

import torch
import torchvision
from torch import Tensor, nn

from edgetune.train.folding import fold_frozen_norms


def settled(network: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and weights that are not those of a fresh one."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return network.eval().requires_grad_(False)


def test_resnet_answers_alike_with_its_twenty_norms_folded():
    network = settled(torchvision.models.resnet18(weights=None))
    x = torch.randn(2, 3, 64, 64)
    before = network(x)
    stages = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    # 1 + 16 in the blocks + 3 in the shortcuts
    assert fold_frozen_norms(network, stages, lambda: network(x)) == 20
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-5)


def test_only_the_named_stages_are_touched():
    network = settled(torchvision.models.resnet18(weights=None))
    weight = network.layer4[0].conv1.weight.clone()
    x = torch.randn(2, 3, 64, 64)
    assert fold_frozen_norms(network, ["layer1"], lambda: network(x)) == 4
    assert torch.equal(network.layer4[0].conv1.weight, weight)


class Twice(nn.Module):
    """Uses the convolution's own output beside the normalised one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (self.norm(y) + y).mean((2, 3))


def test_a_convolution_that_others_read_too_is_put_back():
    network = settled(Twice())
    x = torch.randn(2, 3, 8, 8)
    before, weight = network(x), network.conv.weight.clone()
    assert fold_frozen_norms(network, ["conv", "norm"], lambda: network(x)) == 0
    assert torch.equal(network(x), before)
    assert torch.equal(network.conv.weight, weight)


def test_a_norm_in_training_mode_stays():
    network = settled(torchvision.models.resnet18(weights=None))
    network.bn1.train()
    x = torch.randn(2, 3, 64, 64)
    assert fold_frozen_norms(network, ["conv1", "bn1"], lambda: network(x)) == 0
