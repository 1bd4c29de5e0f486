"""Mixup and CutMix against torchvision's, and their randomness."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.transforms import v2

from edgetune.config import TrainConfig
from edgetune.train.mix import cut_box, mix

MIXUP = TrainConfig(mixup=0.4)
CUTMIX = TrainConfig(cutmix=1.0)
BOTH = TrainConfig(mixup=0.4, cutmix=1.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 3, 20, 30), torch.tensor([0, 1, 2, 3, 4, 0])


class ForcedMixUp(v2.MixUp):
    """torchvision's mixup with a share that is given."""

    def __init__(self, share):
        super().__init__(num_classes=5)
        self.share = share

    def make_params(self, flat_inputs):  # noqa: ARG002
        return {"lam": self.share}


class ForcedCutMix(v2.CutMix):
    """torchvision's CutMix with a window that is given."""

    def __init__(self, params):
        super().__init__(num_classes=5)
        self.params = params

    def make_params(self, flat_inputs):  # noqa: ARG002
        return self.params


@pytest.mark.parametrize("seed", range(10))
def test_mixup_is_torchvisions(batch, seed):
    pixels, targets = batch
    mixed, shares = mix(pixels, targets, 5, MIXUP, generator(seed))
    share = shares[2, 2].item()  # of image 2's own class, in a batch of which image 1 has another
    expected = ForcedMixUp(share)(pixels, targets)
    torch.testing.assert_close(mixed, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shares, expected[1])
    assert 0 < share < 1


@pytest.mark.parametrize("seed", range(10))
def test_cutmix_is_torchvisions(batch, seed):
    pixels, targets = batch
    mixed, shares = mix(pixels, targets, 5, CUTMIX, generator(seed))
    changed = (mixed != pixels)[2, 0]
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    if not len(rows):
        pytest.skip("this draw replaces less than a pixel")
    box = (
        int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
    )  # fmt: skip
    left, top, right, bottom = box
    params = {"box": box, "lam_adjusted": 1 - (bottom - top) * (right - left) / 600}
    expected = ForcedCutMix(params)(pixels, targets)
    assert torch.equal(mixed, expected[0])
    torch.testing.assert_close(shares, expected[1])


@pytest.mark.parametrize("seed", range(20))
def test_the_window_is_torchvisions(seed):
    theirs = v2.CutMix(alpha=1.0, num_classes=2)
    torch.manual_seed(seed)
    params = theirs.make_params([torch.zeros(1, 3, 20, 30)])
    torch.manual_seed(seed)  # the same draws, in its order
    share = float(theirs._dist.sample(()))
    column, row = int(torch.randint(30, (1,))), int(torch.randint(20, (1,)))
    top, left, bottom, right = cut_box(20, 30, share, (row, column))
    assert (left, top, right, bottom) == params["box"]


def test_soft_targets_mix_as_hard_ones(batch):
    pixels, targets = batch
    hot = functional.one_hot(targets, 5).float()
    for config in (MIXUP, CUTMIX):
        hard, soft = (mix(pixels, t, 5, config, generator(3)) for t in (targets, hot))
        assert torch.equal(hard[0], soft[0])
        assert torch.equal(hard[1], soft[1])


@pytest.mark.parametrize("config", [MIXUP, CUTMIX, BOTH])
def test_shares_sum_to_one_and_the_batch_is_left_alone(batch, config):
    pixels, targets = batch
    kept = pixels.clone(), targets.clone()
    source = generator()
    for _ in range(20):
        mixed, shares = mix(pixels, targets, 5, config, source)
        assert shares.dtype == torch.float32
        assert mixed.dtype == pixels.dtype
        torch.testing.assert_close(shares.sum(1), torch.ones(6))
    assert torch.equal(pixels, kept[0])
    assert torch.equal(targets, kept[1])


def test_shares_are_beta_distributed():
    from scipy import stats

    source = generator()
    pixels, targets = torch.zeros(2, 3, 1, 1), torch.tensor([0, 1])
    shares = [mix(pixels, targets, 2, MIXUP, source)[1][0, 0].item() for _ in range(2000)]
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 0.01


def test_both_are_drawn_evenly(batch):
    pixels, targets = batch
    source = generator()
    cuts = 0
    for _ in range(400):
        mixed, _ = mix(pixels, targets, 5, BOTH, source)
        own = mixed == pixels
        cuts += bool((own | (mixed == pixels.roll(1, 0))).all())
    # 5 standard deviations of Binomial(400, 1 / 2) are 50
    assert 150 < cuts < 250


def test_all_randomness_is_the_generators(batch):
    pixels, targets = batch
    first, second = generator(5), generator(5)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state()
    found = [mix(pixels, targets, 5, BOTH, first) for _ in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for mixed, shares in found[:2]:
        again = mix(pixels, targets, 5, BOTH, second)
        assert torch.equal(mixed, again[0])
        assert torch.equal(shares, again[1])
    # a generator put back goes on with the batches that were left
    resumed = generator()
    resumed.set_state(second.get_state())
    for mixed, _ in found[2:]:
        assert torch.equal(mixed, mix(pixels, targets, 5, BOTH, resumed)[0])
    assert not torch.equal(found[0][0], found[1][0])


def test_off_is_one_hot(batch):
    pixels, targets = batch
    source = generator()
    mixed, shares = mix(pixels, targets, 5, TrainConfig(), source)
    assert mixed is pixels
    assert torch.equal(shares, functional.one_hot(targets, 5).float())
    assert torch.equal(source.get_state(), generator().get_state())
