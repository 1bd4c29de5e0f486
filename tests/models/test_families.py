"""Rows of families.toml against small random instances: blocks, head, LoRA, merge.

test_every_family.py has an instance of each row.
"""

import warnings

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError
from edgetune.models.adapt import adapt, merge_adapters, parameter_counts, set_train_mode
from edgetune.models.families import blocks, check_family, find_family, present
from edgetune.tasks.graph import logits_of

ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
TEXT = {
    "bert": transformers.BertConfig(vocab_size=99, **ENCODER),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=3, n_heads=2, hidden_dim=64
    ),
    "roberta": transformers.RobertaConfig(vocab_size=99, **ENCODER),
    "electra": transformers.ElectraConfig(vocab_size=99, embedding_size=16, **ENCODER),
}
IMAGE = {
    "vit": transformers.ViTConfig(image_size=64, **ENCODER),
    "mobilenet_v1": transformers.MobileNetV1Config(depth_multiplier=0.25),
    "mobilenet_v2": transformers.MobileNetV2Config(depth_multiplier=0.35),
    "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
}
TORCHVISION = [
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "squeezenet1_1",
]  # fmt: skip
# blocks that each instance above has, counted in the papers' tables or set above
BLOCKS = {
    "bert": 3, "distilbert": 3, "roberta": 3, "electra": 3, "vit": 3, "mobilenet_v1": 26,
    "mobilenet_v2": 16, "resnet": 2, "torchvision:resnet18": 8, "torchvision:mobilenet_v2": 19,
    "torchvision:mobilenet_v3_small": 13, "torchvision:efficientnet_b0": 9,
    "torchvision:squeezenet1_1": 13,
}  # fmt: skip


def instance(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    if name in TEXT:
        model = transformers.AutoModelForSequenceClassification.from_config(TEXT[name])
        ids = torch.randint(5, 99, (2, 8))
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in IMAGE:
        model = transformers.AutoModelForImageClassification.from_config(IMAGE[name])
        return model, {"pixel_values": torch.randn(2, 3, 64, 64)}
    model = torchvision.models.get_model(name.removeprefix("torchvision:"), weights=None)
    return model, {"x": torch.randn(2, 3, 64, 64)}


def row(name: str):
    source, _, kind = name.rpartition(":")
    return find_family(source or "transformers", kind)


NAMES = [*TEXT, *IMAGE, *(f"torchvision:{n}" for n in TORCHVISION)]


# counted in the papers' tables; layers that lie between blocks count where they are children too
PUBLISHED_BLOCKS = {
    "torchvision:alexnet": 13, "torchvision:vgg16": 31, "torchvision:googlenet": 11,
    "torchvision:inception_v3": 11, "torchvision:densenet121": 12, "torchvision:mnasnet1_0": 17,
    "torchvision:shufflenet_v2_x1_0": 16, "torchvision:convnext_tiny": 8, "torchvision:swin_t": 8,
    "torchvision:vit_b_16": 12, "timm:resnet50": 16, "timm:vit_small_patch16_224": 12,
    "timm:swin_tiny_patch4_window7_224": 4, "timm:efficientnet_b0": 7, "timm:mobilenetv2_100": 7,
    "timm:mobilenetv3_large_100": 7, "timm:convnext_tiny": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_BLOCKS)
def test_published_networks_have_the_blocks_of_their_papers(name):
    source, _, kind = name.partition(":")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Inception's of another random start
        network = (
            torchvision.models.get_model(kind, weights=None)
            if source == "torchvision"
            else timm.create_model(kind)
        )
    family = find_family(source, kind)
    check_family(network, family, name=name)
    assert len(blocks(network, family)) == PUBLISHED_BLOCKS[name]


@pytest.mark.parametrize(
    ("source", "kind", "family"),
    [
        ("torchvision", "resnext50_32x4d", "resnext"),
        ("torchvision", "swin_v2_t", "swin"),
        ("torchvision", "efficientnet_v2_s", "efficientnet"),
        ("timm", "tf_mobilenetv3_small_100", "mobilenet_v3-timm"),
        ("timm", "seresnext50_32x4d", "resnext-timm"),
        ("transformers", "xlm-roberta", "roberta"),
        ("transformers", "deberta", "deberta"),
        ("transformers", "deberta-v2", "deberta-v2"),
    ],
)
def test_the_longest_prefix_or_the_exact_type_decides(source, kind, family):
    assert find_family(source, kind).name == family


def test_a_network_built_unlike_its_name_is_refused():
    with torch.device("meta"):
        network = timm.create_model("resnetv2_50")
    with pytest.raises(ConfigError, match="is built unlike the other models of family resnet-timm"):
        check_family(network, find_family("timm", "resnetv2_50"), name="timm:resnetv2_50")


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_head_are_found(name):
    network, _ = instance(name)
    family = row(name)
    assert len(blocks(network, family)) == BLOCKS[name]
    assert [p for p, _ in present(network, family.head)] == list(family.head)
    assert isinstance(network.get_submodule(family.output), nn.Linear | nn.Conv2d)


@pytest.mark.parametrize("name", NAMES)
def test_lora_trains_and_merging_keeps_the_answer(name):
    network, inputs = instance(name)
    adapt(network, row(name), TrainConfig(method="lora", lora_dropout=0.0))
    trainable = [n for n, p in network.named_parameters() if p.requires_grad]
    assert any("lora_" in n for n in trainable)
    network.eval()
    # B starts at zero: a step is needed before the adapter says anything
    for name_, parameter in network.named_parameters():
        if "lora_B" in name_:
            parameter.data.normal_(std=0.02)
    before = logits_of(network(**inputs))
    before.sum().backward()
    assert all(p.grad is not None for n, p in network.named_parameters() if "lora_A" in n)
    merge_adapters(network)
    assert not any("lora" in n for n, _ in network.named_parameters())
    scale = float(before.detach().abs().max())
    torch.testing.assert_close(logits_of(network(**inputs)), before, rtol=0, atol=2e-4 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_head_method_trains_exactly_the_head(name):
    network, _ = instance(name)
    family = row(name)
    adapt(network, family, TrainConfig(method="head"))
    expected = sum(p.numel() for _, m in present(network, family.head) for p in m.parameters())
    assert parameter_counts(network)[0] == expected


def test_freeze_counts_blocks_from_the_output():
    network, _ = instance("bert")
    adapt(network, row("bert"), TrainConfig(method="freeze", last_blocks=1))
    trainable = {n for n, p in network.named_parameters() if p.requires_grad}
    assert any(n.startswith("bert.encoder.layer.2.") for n in trainable)
    assert not any(n.startswith("bert.encoder.layer.1.") for n in trainable)


def test_more_blocks_than_there_are_is_refused():
    network, _ = instance("bert")
    with pytest.raises(ConfigError, match="has 3 blocks, got 9"):
        adapt(network, row("bert"), TrainConfig(method="freeze", last_blocks=9))


def test_a_pattern_that_matches_nothing_is_refused_with_examples():
    network, _ = instance("bert")
    with pytest.raises(ConfigError, match=r"'\*nope\*' matches no parameter; they are named like"):
        adapt(network, row("bert"), TrainConfig(method="freeze", train_patterns=("*nope*",)))


def test_a_lora_target_that_is_absent_is_refused():
    network, _ = instance("bert")
    with pytest.raises(ConfigError, match="lora_targets"):
        adapt(network, row("bert"), TrainConfig(method="lora", lora_targets=("nope",)))


def test_frozen_batchnorm_keeps_its_statistics():
    network, inputs = instance("torchvision:resnet18")
    adapt(network, row("torchvision:resnet18"), TrainConfig(method="freeze", last_blocks=1))
    frozen = network.get_submodule("layer1.0.bn1").running_mean.clone()
    trained = network.get_submodule("layer4.1.bn1").running_mean.clone()
    set_train_mode(network)
    network(**inputs)
    assert torch.equal(network.get_submodule("layer1.0.bn1").running_mean, frozen)
    assert not torch.equal(network.get_submodule("layer4.1.bn1").running_mean, trained)


def test_an_unknown_family_lists_the_known():
    with pytest.raises(ConfigError, match=r"'t5' is of no known family; known: albert"):
        find_family("transformers", "t5")
