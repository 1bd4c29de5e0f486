"""Pruned networks: the shapes asked for, the same answers where nothing of weight was lost."""

import numpy as np
import pytest
import torch
import torchvision
import transformers
from torch import nn

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError
from edgetune.export.graph import export_graph
from edgetune.models.families import find_family
from edgetune.models.load import Loaded
from edgetune.models.preprocessing import Preprocess, Preprocessing
from edgetune.models.prune import magnitude, prune, spread, taylor
from edgetune.runtime.ort import onnxruntime
from edgetune.tasks.graph import logits_of
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.text_classification import TextClassification

ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
TEXT = {
    "bert": transformers.BertConfig(vocab_size=99, **ENCODER),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=4, n_heads=4, hidden_dim=64
    ),
    "roberta": transformers.RobertaConfig(vocab_size=99, **ENCODER),
    "electra": transformers.ElectraConfig(vocab_size=99, embedding_size=16, **ENCODER),
}
IMAGE = {
    "vit": transformers.ViTConfig(image_size=64, **ENCODER),
    "mobilenet_v1": transformers.MobileNetV1Config(depth_multiplier=0.25),
    "mobilenet_v2": transformers.MobileNetV2Config(depth_multiplier=0.35),
    "resnet": transformers.ResNetConfig(embedding_size=16, hidden_sizes=[64, 128], depths=[2, 1]),
}
ENCODERS = [*TEXT, "vit"]
CONVOLUTIONAL = [
    "mobilenet_v1", "mobilenet_v2", "resnet", "torchvision:resnet18", "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small", "torchvision:efficientnet_b0", "torchvision:squeezenet1_1",
]  # fmt: skip


def instance(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small random network in eval mode, and a batch for it."""
    torch.manual_seed(0)
    if name in TEXT:
        network = transformers.AutoModelForSequenceClassification.from_config(TEXT[name])
        ids = torch.randint(5, 99, (3, 9))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
    elif name in IMAGE:
        network = transformers.AutoModelForImageClassification.from_config(IMAGE[name])
        inputs = {"pixel_values": torch.randn(2, 3, 64, 64)}
    else:
        network = torchvision.models.get_model(name.removeprefix("torchvision:"), weights=None)
        network.set_submodule(row(name).output, _small(network.get_submodule(row(name).output)))
        inputs = {"x": torch.randn(2, 3, 64, 64)}
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as made, it is the identity and shows nothing
            channels = module.num_features
            module.weight.data = torch.linspace(0.5, 1.5, channels)[torch.randperm(channels)]
            nn.init.normal_(module.bias, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)  # some are made as zeros
    return network.eval().requires_grad_(False), inputs


def _small(last: nn.Module) -> nn.Module:
    """The last layer, for two labels."""
    if isinstance(last, nn.Linear):
        return nn.Linear(last.in_features, 2)
    return nn.Conv2d(last.in_channels, 2, 1)


def row(name: str):
    source, _, kind = name.rpartition(":")
    return find_family(source or "transformers", kind)


def answer(network: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(network(**inputs))


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def task_of(name: str, network: nn.Module, tiny_bert: str):
    """The task that exports `network`."""
    if name in TEXT:
        from tokenizers import Tokenizer

        text = Tokenizer.from_file(f"{tiny_bert}/tokenizer.json").to_str().encode()
        loaded = Loaded(network=network, family=row(name), tokenizer_json=text, max_tokens=64)
        return TextClassification(loaded, ("a", "b"), TrainConfig(max_length=16))
    spec = Preprocessing(input_size=64, resize_size=64)
    loaded = Loaded(network=network, family=row(name), preprocessing=spec)
    return ImageClassification(loaded, ("a", "b"), TrainConfig())


@pytest.mark.parametrize(
    ("total", "kept", "expected"),
    [(12, 6, [1, 3, 5, 7, 9, 11]), (6, 3, [1, 3, 5]), (6, 4, [0, 2, 3, 5]), (6, 1, [5]),
     (4, 4, [0, 1, 2, 3])],
)  # fmt: skip
def test_kept_blocks_are_spread_and_end_with_the_last(total, kept, expected):
    assert spread(total, kept) == expected


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_kept_whole_answers_the_same(name):
    network, inputs = instance(name)
    whole = prune(network, row(name), keep_blocks=4, ffn_ratio=1.0, head_ratio=1.0)
    assert whole is not network
    assert torch.equal(answer(whole, inputs), answer(network, inputs))


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_convolutional_net_kept_whole_answers_the_same(name):
    network, inputs = instance(name)
    whole = prune(network, row(name), channel_ratio=1.0)
    assert torch.equal(answer(whole, inputs), answer(network, inputs))


@pytest.mark.parametrize("name", ENCODERS)
def test_dropped_blocks_leave_the_others_in_order(name):
    network, inputs = instance(name)
    family = row(name)
    before = {n: p.clone() for n, p in network.named_parameters()}
    smaller = prune(network, family, keep_blocks=2)
    container = family.blocks[0]
    assert smaller.config.num_hidden_layers == 2
    assert network.config.num_hidden_layers == 4
    for new, old in ((0, 1), (1, 3)):
        for part, tensor in smaller.get_submodule(f"{container}.{new}").named_parameters():
            assert torch.equal(tensor, before[f"{container}.{old}.{part}"])
    # by hand: the network of four blocks whose first and third are skipped
    layers = network.get_submodule(container)
    network.set_submodule(container, nn.ModuleList([layers[1], layers[3]]))
    assert torch.equal(answer(smaller, inputs), answer(network, inputs))
    numbers = [m.layer_idx for m in smaller.modules() if getattr(m, "layer_idx", None) is not None]
    assert set(numbers) <= {0, 1}


@pytest.mark.parametrize("name", ENCODERS)
def test_units_of_no_weight_are_the_ones_that_go(name):
    network, inputs = instance(name)
    family = row(name)
    block = f"{family.blocks[0]}.2"
    up, down = (network.get_submodule(f"{block}.{p}") for p in family.ffn)
    for neuron in range(1, 64, 2):  # half of the hidden neurons
        up.weight[neuron], up.bias[neuron], down.weight[:, neuron] = 0, 0, 0
    *inward, outward = (network.get_submodule(f"{block}.{p}") for p in family.attention)
    for layer in inward:  # heads 0 and 3 of block 2; heads are 8 wide
        for rows in (slice(0, 8), slice(24, 32)):
            layer.weight[rows], layer.bias[rows] = 0, 0
    outward.weight[:, 0:8], outward.weight[:, 24:32] = 0, 0
    expected = answer(network, inputs)
    # 14 of 16 heads: the two empty ones are the two that go
    smaller = prune(network, family, head_ratio=14 / 16)
    torch.testing.assert_close(answer(smaller, inputs), expected, rtol=0, atol=1e-6)
    query = f"{{}}.{family.attention[0]}"
    widths = [smaller.get_submodule(query.format(f"{family.blocks[0]}.{i}")) for i in range(4)]
    assert [w.out_features for w in widths] == [32, 32, 16, 32]
    kept = prune(network, family, ffn_ratio=0.5).get_submodule(f"{block}.{family.ffn[0]}")
    assert torch.equal(kept.weight, up.weight[0::2])


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_channels_of_no_weight_go_without_a_trace(name):
    network, inputs = instance(name)
    family = row(name)
    # fixed before anything is zeroed, so that the same channels go both times
    saliency = magnitude(network)
    narrow = prune(network, family, channel_ratio=0.5, saliency=saliency)
    # the channels that would go, found by what they were: their every parameter is zeroed here,
    # the running mean too, so that what they pass on is nothing
    parts = _dropped(network, narrow)
    for module, index in parts:
        module.weight[index] = 0
        module.bias[index] = 0
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean[index] = 0
    assert parts
    smaller = prune(network, family, channel_ratio=0.5, saliency=saliency)
    assert parameters(smaller) == parameters(narrow) < 0.75 * parameters(network)
    expected = answer(network, inputs)
    scale = float(expected.abs().max())
    torch.testing.assert_close(answer(smaller, inputs), expected, rtol=0, atol=1e-5 * scale)


def _dropped(network: nn.Module, narrow: nn.Module) -> list[tuple[nn.Module, list[int]]]:
    """The channels a pruned copy lacks, found by BatchNorm's random scales or by biases."""
    found = []
    for name, module in network.named_modules():
        mine = narrow.get_submodule(name)
        marks = None
        if isinstance(module, nn.BatchNorm2d):
            marks = (module.weight, mine.weight)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            marks = (module.bias, mine.bias)
        if marks is None or len(marks[0]) == len(marks[1]):
            continue
        kept = set(marks[1].tolist())
        if len(kept) == len(marks[1]):
            index = [i for i, v in enumerate(marks[0].tolist()) if v not in kept]
            found.append((module, index))
    return found


@pytest.mark.parametrize(
    ("name", "layer", "channels"),
    [
        ("torchvision:resnet18", "layer1.0.conv1", 32),  # inside a block: half of 64
        ("torchvision:resnet18", "layer1.0.conv2", 64),  # what the shortcut is added to
        ("torchvision:mobilenet_v2", "features.2.conv.1.0", 48),  # depthwise, half of 96
        ("torchvision:mobilenet_v2", "features.15.conv.2", 160),
        ("torchvision:mobilenet_v3_small", "features.9.block.2.fc2", 144),  # squeeze-excite
        ("mobilenet_v2", "mobilenet_v2.layer.1.conv_3x3.convolution", 24),  # half of 48
        ("mobilenet_v2", "classifier", 2),
    ],
)
def test_inner_channels_are_halved_and_others_kept(name, layer, channels):
    network, _ = instance(name)
    assert prune(network, row(name), channel_ratio=0.5).get_submodule(layer).weight.shape[0] == (
        channels
    )


def pruned(name: str, network: nn.Module) -> nn.Module:
    if name in ENCODERS:
        return prune(network, row(name), keep_blocks=3, ffn_ratio=0.5, head_ratio=0.6)
    return prune(network, row(name), channel_ratio=0.6)


@pytest.mark.parametrize("name", [*ENCODERS, *CONVOLUTIONAL])
def test_a_pruned_network_trains(name):
    network, inputs = instance(name)
    smaller = pruned(name, network)
    assert parameters(smaller) < parameters(network)
    assert not any(p.requires_grad for p in smaller.parameters())
    smaller.requires_grad_(True)
    logits_of(smaller(**inputs)).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in smaller.parameters())


@pytest.mark.parametrize("name", ["bert", "mobilenet_v2"])
def test_a_pruned_network_exports(name, tiny_bert):
    network, inputs = instance(name)
    smaller = pruned(name, network)
    task = task_of(name, smaller, tiny_bert)
    model = export_graph(task.graph(row(name).output))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    if name in TEXT:
        feeds = {n: t.numpy() for n, t in inputs.items()}
    else:
        image = np.random.default_rng(0).integers(0, 256, (2, 70, 81, 3), dtype=np.uint8)
        feeds = {"image": image}
        pixels = Preprocess(Preprocessing(input_size=64, resize_size=64))(torch.from_numpy(image))
        inputs = {next(iter(inputs)): pixels}
    expected = answer(smaller, inputs).numpy()
    np.testing.assert_allclose(
        session.run(["logits"], feeds)[0], expected, rtol=0,
        atol=1e-4 * max(1.0, float(np.abs(expected).max())),
    )  # fmt: skip


def test_taylor_is_the_squared_product_of_gradient_and_weight():
    network = nn.Sequential(nn.Linear(2, 1))
    network[0].weight.data = torch.tensor([[2.0, -3.0]])
    network[0].bias.data = torch.tensor([0.5])
    batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])]
    # loss = w.x + b: gradients are x and 1; the sums over batches are
    # (2 * 1)^2 + 0, (-3 * 2)^2 + (-3 * 1)^2, and 2 * 0.5^2
    found = taylor(network, batches, lambda net, x: net(x).sum())
    assert found["0.weight"].tolist() == [[4.0, 45.0]]
    assert found["0.bias"].tolist() == [0.5]
    assert network[0].weight.grad is None


def test_magnitude_is_the_share_of_the_squares():
    network = nn.Linear(2, 1, bias=False)
    network.weight.data = torch.tensor([[1.0, 3.0]])
    assert magnitude(network)["weight"].tolist() == [[pytest.approx(0.1), pytest.approx(0.9)]]


def test_what_taylor_calls_important_stays():
    network, inputs = instance("bert")
    # the gradient of block 0's hidden neurons 8 to 15 alone is not zero where others are cut off
    down = network.bert.encoder.layer[0].output.dense
    down.weight[:, :8], down.weight[:, 16:] = 0, 0
    found = taylor(network, [inputs], lambda net, batch: logits_of(net(**batch)).square().sum())
    smaller = prune(network, row("bert"), ffn_ratio=8 / 64, saliency=found)
    kept = smaller.bert.encoder.layer[0].intermediate.dense
    assert torch.equal(kept.weight, network.bert.encoder.layer[0].intermediate.dense.weight[8:16])


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("bert", {"keep_blocks": 5}, "has 4 blocks, expected 1 to 4, got 5"),
        ("bert", {"ffn_ratio": 0.0}, "ffn_ratio: expected more than 0 and at most 1, got 0"),
        ("bert", {"channel_ratio": 0.5}, "channel_ratio is for convolutional nets, got a bert"),
        ("torchvision:resnet18", {"keep_blocks": 1}, "are for encoders, got a resnet"),
        ("bert", {"ffn_ratio": 0.5, "saliency": {}}, "saliency: is of another network"),
    ],
)
def test_what_a_network_cannot_do_is_said(name, asked, message):
    network, _ = instance(name)
    with pytest.raises(ConfigError, match=message):
        prune(network, row(name), **asked)
