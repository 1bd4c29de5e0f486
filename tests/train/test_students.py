"""Students: fake quantization against torch's own and by hand, distillation on small real runs."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from edgetune.config import TrainConfig
from edgetune.data import load_dataset
from edgetune.errors import ConfigError, IntegrityError
from edgetune.models.load import load_model
from edgetune.models.prune import prune
from edgetune.tasks import open_task
from edgetune.train.distill import (
    CHECKPOINT_NAME,
    DistillSettings,
    distill,
    distillation_loss,
    student_of,
    taylor_of,
)
from edgetune.train.fake_quant import (
    Scheme,
    fake_quantize_weight,
    finish,
    is_prepared,
    observing,
    prepare,
)
from edgetune.train.run import data_source

# -- fake quantization ---------------------------------------------------------------------


def test_symmetric_codes_match_a_hand_computation():
    # largest absolute values 127 and 63.5 over 127: scales 1 and 0.5
    weight = torch.tensor([[127.0, -1.4, 0.6], [63.5, 0.3, -63.5]])
    coded = fake_quantize_weight(weight, "s8")
    assert coded.tolist() == [[127.0, -1.0, 1.0], [63.5, 0.5, -63.5]]


def test_seven_bit_codes_match_a_hand_computation():
    # largest absolute value 126 over 63: scale 2
    coded = fake_quantize_weight(torch.tensor([[126.0, -126.0, 2.9, 3.1]]), "s7")
    assert coded.tolist() == [[126.0, -126.0, 2.0, 4.0]]


def test_unsigned_codes_match_a_hand_computation():
    # range -55..200, scale 1, zero point 55; the second's lies above 0 and is widened to 0..255
    weight = torch.tensor([[-55.0, 200.0, 10.4], [255.0, 3.0, 2.6]])
    coded = fake_quantize_weight(weight, "u8")
    assert coded.tolist() == [[-55.0, 200.0, 10.0], [255.0, 3.0, 3.0]]


def test_a_channel_of_zeros_stays_zero():
    for codes in ("s8", "s7", "u8"):
        assert fake_quantize_weight(torch.zeros(2, 3), codes).tolist() == [[0.0] * 3] * 2


def test_a_convolutions_codes_match_torchs_fake_quantization():
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 2, 2)
    scale = weight.abs().amax((1, 2, 3)) / 127
    zero = torch.zeros(5, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)
    assert torch.equal(fake_quantize_weight(weight, "s8"), expected)


def test_gradients_pass_the_rounding_unchanged():
    torch.manual_seed(0)
    weight = torch.randn(4, 6, requires_grad=True)
    factor = torch.randn(4, 6)
    (fake_quantize_weight(weight, "s8") * factor).sum().backward()
    assert torch.equal(weight.grad, factor)


def test_dynamic_inputs_have_each_samples_own_range():
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.data = torch.eye(3)
    network = nn.Sequential(layer)
    prepare(network, Scheme(weights="s8", inputs="dynamic"))
    # ranges 0..255 (scale 1) and -1..1.55 (scale 0.01)
    x = torch.tensor([[255.0, 0.4, 7.6], [-1.0, 1.55, 0.123]])
    expected = torch.tensor([[255.0, 0.0, 8.0], [-1.0, 1.55, 0.12]])
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-5)


def test_static_inputs_follow_the_training_batches_and_nothing_else():
    network = nn.Sequential(nn.Linear(2, 2, bias=False))
    network[0].weight.data = torch.eye(2)
    prepare(network, Scheme(weights="s8", inputs="static"))
    x = torch.tensor([[0.0, 255.0]])
    network.eval()
    odd = torch.tensor([[0.3, 300.7]])
    assert torch.equal(network(odd), odd)  # nothing observed yet
    with observing(network):
        network(x)
    assert network(odd).tolist() == [[0.0, 255.0]]  # codes of scale 1 end at 255
    network.train()
    network(torch.tensor([[0.0, 355.0]]))
    network.eval()
    # the mean moved by a hundredth of 100
    torch.testing.assert_close(network(torch.tensor([[0.0, 999.0]])), torch.tensor([[0.0, 256.0]]))


def test_symmetric_codes_are_the_same_before_and_after_folding_batchnorm():
    torch.manual_seed(0)
    weight = torch.randn(6, 3, 3, 3)
    factor = torch.tensor([0.5, -1.7, 3.1, -0.01, 2.0, 1.0])[:, None, None, None]
    torch.testing.assert_close(
        fake_quantize_weight(weight, "s8") * factor, fake_quantize_weight(weight * factor, "s8")
    )


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v2(num_classes=3).eval()


@pytest.mark.parametrize("trainable", ["all", "lora"])
@pytest.mark.parametrize("inputs", ["static", "dynamic", "float"])
def test_finish_leaves_the_network_that_was(trainable, inputs):
    network = small_net()
    before = {n: t.clone() for n, t in network.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(x)
    prepare(network, Scheme(weights="u8", inputs=inputs, trainable=trainable))
    assert is_prepared(network)
    with torch.no_grad(), observing(network):
        network(x)
        assert not torch.equal(network(x), expected)
    finish(network)
    assert not is_prepared(network)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not any(m._forward_pre_hooks for m in network.modules())
    assert {type(m) for m in network.modules()} == {type(m) for m in small_net().modules()}
    with torch.no_grad():
        assert torch.equal(network(x), expected)


def test_lora_alone_trains_and_is_merged():
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    prepare(network, Scheme(weights="s8", inputs="float", trainable="lora", rank=2, alpha=4.0))
    names = {n for n, p in network.named_parameters() if p.requires_grad}
    stage = "parametrizations.weight.0"
    assert names == {f"{i}.{stage}.{x}" for i in (0, 1) for x in ("a", "b")}
    change = network[0].parametrizations.weight[0]
    change.b.data = torch.randn(3, 2)
    expected = network[0].parametrizations.weight.original + 2.0 * change.b @ change.a
    finish(network)
    assert torch.equal(network[0].weight, expected)


def test_excluded_layers_stay_float_and_unknown_ones_are_refused():
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    prepare(network, Scheme(weights="s8", inputs="dynamic", exclude=("1",)))
    assert not nn.utils.parametrize.is_parametrized(network[1])
    with pytest.raises(ConfigError, match="is prepared already"):
        prepare(network, Scheme(weights="s8", inputs="dynamic"))
    finish(network)
    with pytest.raises(ConfigError, match="'9' is no Conv2d or Linear"):
        prepare(network, Scheme(weights="s8", inputs="dynamic", exclude=("9",)))


# -- distillation --------------------------------------------------------------------------


def test_the_loss_matches_a_hand_computation():
    # T = 2: teacher (2 ln 3, 0) / 2 -> (3/4, 1/4); student (0, 0) -> (1/2, 1/2)
    teacher = torch.tensor([[2 * np.log(3.0), 0.0]], dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64)
    divergence = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    expected = 0.7 * 4 * divergence + 0.3 * np.log(2)
    found = distillation_loss(student, teacher, torch.tensor([1]), temperature=2.0, alpha=0.7)
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def text(switches, tiny_bert):
    """A teacher that is right about every switch, and its data."""
    config = TrainConfig(
        task="text-classification", model=tiny_bert, data=str(switches), output="-"
    )
    dataset = load_dataset(data_source(config))
    torch.manual_seed(0)
    loaded = load_model(tiny_bert, kind="text", labels=dataset.labels)
    task = open_task(config.task, loaded, dataset.labels, config)
    samples = task.samples(dataset.splits["train"], training=False)
    batch = task.collate([samples[0, i] for i in range(len(samples))])
    labels = batch.pop("labels")
    task.network.train()
    optimizer = torch.optim.Adam(task.network.parameters(), lr=5e-3)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(task.logits(task.network, batch), labels).backward()
        optimizer.step()
    task.network.eval().requires_grad_(False)
    assert (task.logits(task.network, batch).argmax(-1) == labels).all()
    return task, dataset.splits, loaded.family


SETTINGS = DistillSettings(epochs=3, lr=3e-3, batch_size=16, seed=1)


def perturbed(task):
    """A student whose network is the teacher's, shaken until it errs."""
    network = copy.deepcopy(task.network)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.25 * torch.randn(parameter.shape, generator=generator)
    return student_of(task, network)


def state(network: nn.Module) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in network.state_dict().items()}


def test_a_perturbed_student_gets_better_and_twice_the_same(text):
    task, splits, _ = text
    before = state(task.network)
    outcomes = []
    for _ in range(2):
        student = perturbed(task)
        found = distill(student, task, splits["train"], splits["val"], SETTINGS)
        outcomes.append((state(student.network), found.history, found.best_epoch))
    assert outcomes[0] == outcomes[1]
    assert found.start_accuracy < 0.9
    assert found.accuracy > found.start_accuracy
    assert found.accuracy == max(line["val_accuracy"] for line in found.history)
    assert state(task.network) == before
    assert not any(p.requires_grad for p in student.network.parameters())
    assert not student.network.training


def test_a_student_that_cannot_get_better_stays_as_it_was(text):
    task, splits, _ = text
    student = student_of(task, copy.deepcopy(task.network))
    settings = dataclasses.replace(SETTINGS, lr=10.0, epochs=1)
    found = distill(student, task, splits["train"], splits["val"], settings)
    assert (found.best_epoch, found.accuracy) == (0, 1.0)
    assert state(student.network) == state(task.network)


class InterruptError(Exception):
    """What stops a distillation in a test."""


def stop_in_epoch(number: int):
    def on_event(event):
        if event.kind == "step" and event.values["epoch"] == number:
            raise InterruptError

    return on_event


@pytest.mark.parametrize("kind", ["plain", "quantized"])
def test_an_interrupted_distillation_resumes_to_the_same_bytes(text, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("edgetune.train.distill.EVENT_SECONDS", 0.0)
    task, splits, _ = text

    def run(folder, on_event=None):
        student = perturbed(task)
        if kind == "quantized":
            prepare(student.network, Scheme(weights="s8", inputs="static", trainable="lora"))
        found = distill(
            student, task, splits["train"], splits["val"], SETTINGS,
            checkpoint=folder, on_event=on_event,
        )  # fmt: skip
        return state(student.network), found.history, found.best_epoch

    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptError):
        run(tmp_path / "broken", stop_in_epoch(2))
    assert run(tmp_path / "broken") == whole
    assert run(tmp_path / "broken") == whole  # finished: nothing is trained anew


def test_a_checkpoint_of_something_else_or_damaged_is_refused(text, tmp_path):
    task, splits, _ = text
    settings = dataclasses.replace(SETTINGS, epochs=1)

    def run(settings):
        return distill(
            perturbed(task), task, splits["train"], splits["val"], settings, checkpoint=tmp_path
        )

    run(settings)
    with pytest.raises(ConfigError, match="of another student, data or settings"):
        run(dataclasses.replace(settings, lr=1e-3))
    path = tmp_path / CHECKPOINT_NAME
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(IntegrityError, match="is damaged"):
        run(settings)


def test_time_that_ran_out_ends_training(text):
    task, splits, _ = text
    settings = dataclasses.replace(SETTINGS, epochs=50, seconds=1e-9)
    found = distill(perturbed(task), task, splits["train"], splits["val"], settings)
    assert found.epochs == 1


def test_features_are_matched_where_asked_for(text):
    task, splits, family = text
    settings = dataclasses.replace(SETTINGS, epochs=1, alpha=1.0)
    losses = []
    for weight in (0.0, 5.0):
        chosen = dataclasses.replace(settings, feature_weight=weight)
        found = distill(
            perturbed(task), task, splits["train"], splits["val"], chosen, output=family.output
        )
        losses.append(found.history[1]["train_loss"])
    assert losses[1] > losses[0]
    assert not any(m._forward_pre_hooks for m in task.network.modules())


def test_a_pruned_student_learns_from_its_teacher(text):
    task, splits, family = text
    saliency = taylor_of(task, splits["train"], samples=32, batch_size=16)
    network = prune(
        task.network, family, keep_blocks=1, ffn_ratio=0.5, head_ratio=0.5, saliency=saliency
    )
    found = distill(student_of(task, network), task, splits["train"], splits["val"], SETTINGS)
    assert found.accuracy >= found.start_accuracy


@pytest.mark.parametrize("augmentation", ["none", "task"])
def test_a_smaller_image_learns_from_a_larger_and_quantized_batchnorm_keeps_its_statistics(
    colours, augmentation
):
    config = TrainConfig(
        task="image-classification", model="torchvision:mobilenet_v2", weights="none",
        data=str(colours), output="-", image_size=48,
    )  # fmt: skip
    dataset = load_dataset(data_source(config))
    torch.manual_seed(0)
    loaded = load_model(config.model, kind="image", labels=dataset.labels, weights="none")
    loaded.network.eval().requires_grad_(False)
    teacher = open_task(config.task, loaded, dataset.labels, config)
    student = student_of(teacher, copy.deepcopy(teacher.network), image_size=32)
    assert (teacher.preprocess.spec.input_size, student.preprocess.spec.input_size) == (48, 32)
    settings = DistillSettings(epochs=1, lr=1e-4, batch_size=16, augmentation=augmentation)
    prepare(student.network, Scheme(weights="s8", inputs="static"))
    train, val = dataset.splits["train"], dataset.splits["val"]
    distill(student, teacher, train, val, settings)
    finish(student.network)
    mean = "features.0.1.running_mean"
    assert torch.equal(student.network.get_buffer(mean), teacher.network.get_buffer(mean))


def test_an_image_size_without_images_is_refused(text):
    task, _, _ = text
    with pytest.raises(ConfigError, match="this task has no images"):
        student_of(task, task.network, image_size=32)
