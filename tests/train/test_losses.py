"""Losses against torch, timm, torchvision and scikit-learn, in value and in gradient."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError
from edgetune.train.losses import make_loss

COUNTS = (50, 30, 15, 5)
# scikit-learn's formula by hand: 100 / (4 * count)
BALANCED = torch.tensor([0.5, 100 / 120, 100 / 60, 5.0])


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return (3 * torch.randn(16, 4)).requires_grad_()


@pytest.fixture
def classes():
    return torch.tensor([0, 1, 2, 3] * 4)


@pytest.fixture
def shares():
    torch.manual_seed(1)
    return torch.randn(16, 4).softmax(1)


@pytest.fixture
def present():
    torch.manual_seed(2)
    return (torch.rand(16, 4) < 0.4).float()


def config(**keys):
    return TrainConfig(**keys)


def of_batch(loss, logits, targets):
    numerators, denominators = loss(logits, targets)
    assert numerators.shape == denominators.shape == (len(targets),)
    assert numerators.dtype == denominators.dtype == torch.float32
    return numerators.sum() / denominators.sum()


def assert_same(found, expected, logits):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    (found_slope,) = torch.autograd.grad(found, logits)
    (slope,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found_slope, slope, rtol=1e-5, atol=1e-8)
    assert slope.abs().max() > 1e-4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("kind", ["classes", "shares"])
def test_cross_entropy_is_torchs(request, logits, kind, weights, smoothing):
    targets = request.getfixturevalue(kind)
    loss = make_loss(
        config(class_weights=weights, label_smoothing=smoothing),
        target="classes", class_counts=COUNTS,
    )  # fmt: skip
    expected = functional.cross_entropy(
        logits, targets, BALANCED if weights == "balanced" else None, label_smoothing=smoothing
    )
    assert_same(of_batch(loss, logits, targets), expected, logits)


def test_a_batch_in_parts_adds_up_to_the_whole(logits, classes):
    loss = make_loss(
        config(class_weights="balanced", label_smoothing=0.1),
        target="classes", class_counts=COUNTS,
    )  # fmt: skip
    parts = [loss(logits[part], classes[part]) for part in (slice(0, 3), slice(3, 16))]
    found = sum(n.sum() for n, _ in parts) / sum(d.sum() for _, d in parts)
    expected = functional.cross_entropy(logits, classes, BALANCED, label_smoothing=0.1)
    assert_same(found, expected, logits)


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    y = np.repeat(np.arange(4), COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(4), y=y)
    loss = make_loss(config(class_weights="balanced"), target="classes", class_counts=COUNTS)
    np.testing.assert_allclose(loss.weights, expected, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_on_classes_is_timms(logits, classes, smoothing):
    timm_loss = pytest.importorskip("timm.loss").BinaryCrossEntropy(smoothing=smoothing)
    loss = make_loss(
        config(loss="bce", label_smoothing=smoothing), target="classes", class_counts=None
    )
    assert_same(of_batch(loss, logits, classes), timm_loss(logits, classes), logits)


def test_bce_smooths_mixed_labels_as_timms_mixup_does(logits, classes):
    mixup = pytest.importorskip("timm.data.mixup")
    mixed = mixup.mixup_target(classes, 4, lam=0.3, smoothing=0.1)
    unsmoothed = mixup.mixup_target(classes, 4, lam=0.3, smoothing=0.0)
    loss = make_loss(config(loss="bce", label_smoothing=0.1), target="classes", class_counts=None)
    expected = functional.binary_cross_entropy_with_logits(logits, mixed)
    assert_same(of_batch(loss, logits, unsmoothed), expected, logits)


def test_balanced_bce_on_classes_weighs_samples(logits, classes):
    # each sample of class c as if it were there BALANCED[c] times
    loss = make_loss(
        config(loss="bce", class_weights="balanced"), target="classes", class_counts=COUNTS
    )
    of_samples = BALANCED[classes]
    expected = functional.binary_cross_entropy_with_logits(
        logits, functional.one_hot(classes, 4).float(), weight=of_samples[:, None]
    ) * (len(classes) / of_samples.sum())
    assert_same(of_batch(loss, logits, classes), expected, logits)
    hot = functional.one_hot(classes, 4).float()
    torch.testing.assert_close(of_batch(loss, logits, hot), of_batch(loss, logits, classes))


def test_bce_on_labels_is_torchs(logits, present):
    loss = make_loss(config(), target="multilabel", class_counts=None)
    expected = functional.binary_cross_entropy_with_logits(logits, present)
    assert_same(of_batch(loss, logits, present), expected, logits)


def test_balanced_bce_on_labels_has_torchs_pos_weight(logits, present):
    # torch's documentation: 100 positive and 300 negative samples want 300 / 100 = 3
    loss = make_loss(
        config(class_weights="balanced"),
        target="multilabel", class_counts=(100, 200, 300, 40), samples=400,
    )  # fmt: skip
    expected = functional.binary_cross_entropy_with_logits(
        logits, present, pos_weight=torch.tensor([3.0, 1.0, 1 / 3, 9.0])
    )
    assert_same(of_batch(loss, logits, present), expected, logits)


def test_bce_on_labels_smooths_as_timm(logits, present):
    timm_loss = pytest.importorskip("timm.loss").BinaryCrossEntropy(
        smoothing=0.2, smooth_dense=True
    )
    loss = make_loss(config(label_smoothing=0.2), target="multilabel", class_counts=None)
    assert_same(of_batch(loss, logits, present), timm_loss(logits, present), logits)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_on_labels_is_torchvisions(logits, present, gamma):
    from torchvision.ops import sigmoid_focal_loss

    loss = make_loss(
        config(loss="focal", focal_gamma=gamma), target="multilabel", class_counts=None
    )
    expected = sigmoid_focal_loss(logits, present, alpha=-1, gamma=gamma, reduction="mean")
    assert_same(of_batch(loss, logits, present), expected, logits)


def test_focal_on_two_classes_is_the_sigmoid_one_of_their_difference(classes):
    # softmax of two logits is the sigmoid of what lies between them
    from torchvision.ops import sigmoid_focal_loss

    torch.manual_seed(0)
    logits = torch.randn(16, 2, requires_grad=True)
    loss = make_loss(config(loss="focal"), target="classes", class_counts=None)
    expected = sigmoid_focal_loss(
        logits[:, 1] - logits[:, 0], (classes % 2).float(), alpha=-1, gamma=2, reduction="mean"
    )
    assert_same(of_batch(loss, logits, classes % 2), expected, logits)


def test_focal_of_gamma_zero_is_weighted_cross_entropy(logits, classes):
    loss = make_loss(
        config(loss="focal", focal_gamma=0.0, class_weights="balanced"),
        target="classes", class_counts=COUNTS,
    )  # fmt: skip
    expected = functional.cross_entropy(logits, classes, BALANCED)
    assert_same(of_batch(loss, logits, classes), expected, logits)


def test_focal_counts_an_easy_sample_less_as_the_paper_says():
    # Lin et al. 2017, section 3.2: p = 0.9, gamma = 2 counts 100 times less
    logits = torch.tensor([[0.9, 0.1]]).log()
    plain = make_loss(config(), target="classes", class_counts=None)
    focal = make_loss(config(loss="focal"), target="classes", class_counts=None)
    target = torch.tensor([0])
    ratio = of_batch(plain, logits, target) / of_batch(focal, logits, target)
    assert float(ratio) == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("target", ["classes", "multilabel"])
def test_focal_of_a_certain_answer_has_a_finite_slope(target, gamma):
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    targets = torch.tensor([0]) if target == "classes" else torch.tensor([[1.0, 0.0]])
    loss = make_loss(config(loss="focal", focal_gamma=gamma), target=target, class_counts=None)
    value = of_batch(loss, logits, targets)
    (slope,) = torch.autograd.grad(value, logits)
    assert value.item() == 0
    assert slope.abs().max() == 0


def test_values_by_hand():
    logits = torch.tensor([[1.0], [5.0]])
    targets = torch.tensor([0.5, 2.0])
    # errors 0.5 and 3: squares 0.25 and 9
    mse = make_loss(config(), target="values", class_counts=None)
    assert mse(logits, targets)[0].tolist() == [0.25, 9.0]
    # delta 2: 0.5^2 / 2 and 2 (3 - 2 / 2)
    huber = make_loss(config(loss="huber", huber_delta=2.0), target="values", class_counts=None)
    assert huber(logits, targets)[0].tolist() == [0.125, 4.0]
    assert huber(logits, targets)[1].tolist() == [1.0, 1.0]


def test_values_have_torchs_slopes():
    torch.manual_seed(0)
    logits = (3 * torch.randn(16, 1)).requires_grad_()
    targets = torch.randn(16)
    for name, expected in (
        ("mse", functional.mse_loss(logits[:, 0], targets)),
        ("huber", functional.huber_loss(logits[:, 0], targets, delta=0.7)),
    ):
        loss = make_loss(config(loss=name, huber_delta=0.7), target="values", class_counts=None)
        assert_same(of_batch(loss, logits, targets), expected, logits)


@pytest.mark.parametrize(
    ("name", "target"),
    [("auto", "classes"), ("bce", "classes"), ("focal", "classes"), ("bce", "multilabel"),
     ("focal", "multilabel"), ("mse", "values"), ("huber", "values")],
)  # fmt: skip
def test_bfloat16_logits_under_autocast_lose_nothing(name, target, logits, classes, present):
    rounded = logits.detach().bfloat16()
    targets = {"classes": classes, "multilabel": present, "values": torch.randn(16)}[target]
    if target == "values":
        rounded = rounded[:, :1]
    loss = make_loss(config(loss=name), target=target, class_counts=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(rounded, targets)
    expected = loss(rounded.float(), targets)
    assert torch.equal(found[0], expected[0])
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["cross_entropy", "bce", "focal"])
def test_a_loss_is_one_graph(name, logits, classes):
    loss = make_loss(
        config(loss=name, class_weights="balanced"), target="classes", class_counts=COUNTS
    )
    graph = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(logits, classes), loss(logits, classes))


@pytest.mark.parametrize(
    ("target", "name"),
    [("classes", "mse"), ("classes", "huber"), ("multilabel", "cross_entropy"),
     ("multilabel", "mse"), ("values", "cross_entropy"), ("values", "bce"), ("values", "focal")],
)  # fmt: skip
def test_a_loss_that_does_not_fit_is_an_error(target, name):
    with pytest.raises(ConfigError, match=f"loss '{name}' does not fit"):
        make_loss(config(loss=name), target=target, class_counts=None)


def test_keys_that_do_not_fit_are_errors():
    with pytest.raises(ConfigError, match="label_smoothing"):
        make_loss(config(label_smoothing=0.1), target="values", class_counts=None)
    with pytest.raises(ConfigError, match="label_smoothing"):
        make_loss(config(label_smoothing=0.1, loss="focal"), target="classes", class_counts=None)
    balanced = config(class_weights="balanced")
    with pytest.raises(ConfigError, match="does not fit values"):
        make_loss(balanced, target="values", class_counts=None)
    with pytest.raises(ConfigError, match="label number 1 is in 0 of 9"):
        make_loss(balanced, target="classes", class_counts=(9, 0))
    with pytest.raises(ConfigError, match="label number 0 is in 9 of 9"):
        make_loss(balanced, target="multilabel", class_counts=(9, 3), samples=9)
