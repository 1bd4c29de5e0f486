"""Augmentation: what stays, what changes, and that the generator decides everything."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from edgetune.tasks.augment import augment, drop_tokens

KINDS = ("none", "flip", "standard", "randaugment", "augmix")


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def digest(image):
    return image.shape, hashlib.sha256(image.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("kind", "seed", "expected"),
    # of the function that the first runs were trained with: resuming one needs the same pixels
    [
        ("flip", 0, ((40, 60, 3), "9ee9b5e8866a2f9d")),
        ("flip", 2, ((40, 60, 3), "414b7535021e95c9")),
        ("standard", 0, ((40, 41, 3), "8da8860831d9e389")),
        ("standard", 1, ((36, 47, 3), "693b12b6c1541584")),
        ("standard", 2, ((39, 35, 3), "a248c9b4d0ff6711")),
    ],
)
def test_flip_and_standard_are_what_they_were(image, kind, seed, expected):
    assert digest(augment(image, np.random.default_rng(seed), kind=kind)) == expected


def test_none_is_the_image(image):
    assert augment(image, np.random.default_rng(0), kind="none") is image


def test_flip_mirrors_half_of_the_images(image):
    found = [augment(image, np.random.default_rng(s), kind="flip") for s in range(200)]
    mirrored = [np.array_equal(f, image[:, ::-1]) for f in found]
    same = [np.array_equal(f, image) for f in found]
    assert sum(mirrored) + sum(same) == 200
    # 5 standard deviations of Binomial(200, 1 / 2) are 35
    assert 65 < sum(mirrored) < 135


@pytest.mark.parametrize(
    ("kind", "policy"), [("randaugment", v2.RandAugment()), ("augmix", v2.AugMix())]
)
def test_policies_are_torchvisions_after_standard(image, kind, policy):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        cropped = augment(image, rng, kind="standard")
        torch.manual_seed(int(rng.integers(2**63)))
        expected = policy(torch.tensor(cropped).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        found = augment(image, np.random.default_rng(seed), kind=kind)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.uint8


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_decides_everything(image, kind):
    kept = image.copy()
    image.setflags(write=False)
    first = [augment(image, np.random.default_rng(s), kind=kind) for s in range(12)]
    torch.manual_seed(9)
    before = torch.get_rng_state()
    again = [augment(image, np.random.default_rng(s), kind=kind) for s in range(12)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [digest(a) for a in again] == [digest(f) for f in first]
    np.testing.assert_array_equal(image, kept)
    if kind not in ("none", "flip"):
        assert len({digest(f) for f in first}) == 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 3)])
def test_tiny_images_are_tensors_afterwards(kind, shape):
    tiny = np.full((*shape, 3), 7, np.uint8)
    for seed in range(6):
        changed = augment(tiny, np.random.default_rng(seed), kind=kind)
        assert torch.from_numpy(changed).shape == changed.shape
        assert changed.flags.c_contiguous


SPECIAL = frozenset({101, 102})


@given(
    ordinary=st.lists(st.integers(0, 99), max_size=30), seed=st.integers(0, 2**32),
    share=st.floats(0, 1),
)  # fmt: skip
def test_special_tokens_stay_and_the_rest_keeps_its_order(ordinary, seed, share):
    ids = np.array([101, *ordinary, 102])
    found = drop_tokens(ids, np.random.default_rng(seed), share, keep=SPECIAL)
    assert found.dtype == ids.dtype
    assert (found[0], found[-1]) == (101, 102)
    assert len(found) >= min(1, len(ordinary)) + 2
    rest = iter(ordinary)
    assert all(token in rest for token in found[1:-1])  # a subsequence


def test_no_share_leaves_nothing_out_and_a_whole_one_leaves_one_token():
    ids = np.array([101, 5, 6, 7, 102, 8, 102])
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(drop_tokens(ids, rng, 0.0, keep=SPECIAL), ids)
    survivors = set()
    for _ in range(60):
        found = drop_tokens(ids, rng, 1.0, keep=SPECIAL)
        assert [t for t in found if t in SPECIAL] == [101, 102, 102]
        assert len(found) == 4
        survivors.update(t for t in found.tolist() if t not in SPECIAL)
    assert survivors == {5, 6, 7, 8}


def test_the_share_is_kept_on_average():
    ids = np.arange(2000)
    found = drop_tokens(ids, np.random.default_rng(0), 0.3, keep=frozenset())
    # 5 standard deviations of Binomial(2000, 0.3) are 102
    assert 1298 < len(found) < 1502


def test_tokens_go_by_the_generator_alone():
    ids = np.arange(50)
    found = [drop_tokens(ids, np.random.default_rng(s), 0.5, keep=SPECIAL) for s in (3, 3, 4)]
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].tolist() != found[2].tolist()
