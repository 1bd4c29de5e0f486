"""Every family row, on a small random instance: it trains, exports, and answers alike."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from edgetune.config import TrainConfig
from edgetune.export.graph import export_graph
from edgetune.models.adapt import adapt, merge_adapters, set_train_mode
from edgetune.models.families import (
    Family,
    blocks,
    check_family,
    families,
    find_family,
    present,
)
from edgetune.models.load import _drop_unused
from edgetune.models.xlnet import RightPaddedXLNet
from edgetune.quantize.calibrate import calibrate
from edgetune.quantize.dynamic import quantize_dynamic
from edgetune.quantize.embeddings import quantize_embeddings
from edgetune.quantize.fuse import fuse
from edgetune.quantize.qdq import plan_static, write_static
from edgetune.tasks import GraphSpec
from edgetune.tasks.graph import SplitClassifier, logits_of

pytestmark = [
    # peft says so where it adapts GPT-2's transposed layers, and does the right thing
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
WINDOWS = {
    "image_size": 64, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4,
}  # fmt: skip
TEXT = {
    "bert": transformers.BertConfig(vocab_size=99, **ENCODER),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=2, n_heads=2, hidden_dim=64
    ),
    "roberta": transformers.RobertaConfig(vocab_size=99, **ENCODER),
    "electra": transformers.ElectraConfig(vocab_size=99, embedding_size=16, **ENCODER),
    "mpnet": transformers.MPNetConfig(vocab_size=99, **ENCODER),
    "albert": transformers.AlbertConfig(vocab_size=99, embedding_size=16, **ENCODER),
    "deberta": transformers.DebertaConfig(
        vocab_size=99, relative_attention=True, pos_att_type=["c2p", "p2c"], **ENCODER
    ),
    "deberta-v2": transformers.DebertaV2Config(
        vocab_size=99, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8,
        norm_rel_ebd="layer_norm", share_att_key=True, **ENCODER,
    ),
    # a window of 4 tokens, so that short texts reach beyond it
    "modernbert": transformers.ModernBertConfig(
        vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2, local_attention=4, **ENCODER,
    ),
    "xlnet": transformers.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=2, d_inner=64),
    "gpt2": transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    ),
}  # fmt: skip
IMAGE = {
    "vit": transformers.ViTConfig(image_size=64, **ENCODER),
    "deit": transformers.DeiTConfig(image_size=64, architectures=[], **ENCODER),
    "beit": transformers.BeitConfig(image_size=64, use_relative_position_bias=True, **ENCODER),
    "swin": transformers.SwinConfig(**WINDOWS),
    "swinv2": transformers.Swinv2Config(**WINDOWS),
    "convnext": transformers.ConvNextConfig(**STAGES),
    "convnextv2": transformers.ConvNextV2Config(**STAGES),
    "mobilevit": transformers.MobileViTConfig(
        image_size=128, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
        num_attention_heads=2,
    ),
    "mobilenet_v1": transformers.MobileNetV1Config(depth_multiplier=0.25),
    "mobilenet_v2": transformers.MobileNetV2Config(depth_multiplier=0.35),
    "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
}  # fmt: skip
# name -> side of its image
TORCHVISION = {
    "resnet18": 64, "resnext50_32x4d": 64, "vgg11": 32, "vgg11_bn": 32, "alexnet": 64,
    "inception_v3": 96, "googlenet": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64,
    "mnasnet0_5": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64, "regnet_y_400mf": 64,
    "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "densenet121": 64, "convnext_tiny": 64,
    "vit_b_32": 64, "swin_t": 64, "swin_v2_t": 64, "maxvit_t": 224,
}  # fmt: skip
TIMM: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "seresnext26d_32x4d": {},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (2, 1), "num_heads": (3, 6)},
    "mobilenetv3_small_050": {},
    "efficientnet_lite0": {},
    "mobilenetv2_035": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
}
NAMES = [
    *(f"transformers:{n}" for n in (*TEXT, *IMAGE)),
    *(f"torchvision:{n}" for n in TORCHVISION),
    *(f"timm:{n}" for n in TIMM),
]
# built of the same layers as another of their row
ALIKE = {"torchvision:vgg11", "torchvision:efficientnet_v2_s"}
LABELS = 3


@dataclass
class Instance:
    network: nn.Module
    family: Family
    keyword: str
    side: int = 0

    def inputs(self, batch: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.side:
            shape = (batch, 3, self.side, self.side)
            return {self.keyword: torch.randn(shape, generator=generator)}
        pad = self.network.config.pad_token_id
        ids = torch.randint(5, 99, (batch, tokens), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(1, batch):  # padded on the right, each row more
            mask[row, tokens - 2 * row :] = 0
        return {"input_ids": ids.where(mask == 1, pad), "attention_mask": mask}


def instance(name: str) -> Instance:
    """Return a small network at random, in which every layer is heard at the output."""
    case = untrained(name)
    enliven(case)
    return case


def enliven(case: Instance) -> None:
    """Undo what starts at zero, and give BatchNorm the statistics of what it really sees."""
    network = case.network
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        nn.init.ones_(norm.weight)
    for conv in [m for m in network.modules() if norms and isinstance(m, nn.Conv2d)]:
        nn.init.kaiming_normal_(conv.weight)  # else BatchNorm's epsilon outweighs MobileNet's
    for module in network.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0  # else it skips a block now and then
        elif "DropPath" in type(module).__name__:
            module.drop_prob = 0.0
    with torch.no_grad():
        for n, parameter in network.named_parameters():
            if "layer_scale" in n or n.endswith("gamma"):  # ConvNeXt's, 1e-6
                parameter.fill_(1.0)
    output = network.get_submodule(case.family.output)
    nn.init.normal_(output.weight, std=0.1)  # torchvision's ViT starts at zero
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            network.train()(**case.inputs(4, 8, seed=1))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def untrained(name: str) -> Instance:
    """Make it with the torch functions that loading a model uses."""
    source, _, kind = name.partition(":")
    torch.manual_seed(0)
    if source == "torchvision":
        family = find_family(source, kind)
        network = small_torchvision(kind)
        shorten(network)
        _drop_unused(network, family)
        return Instance(network, family, "x", TORCHVISION[kind])
    if source == "timm":
        options = TIMM[kind]
        network = timm.create_model(kind, num_classes=LABELS, **options)
        shorten(network)
        return Instance(network, find_family(source, kind), "x", options.get("img_size", 64))
    config = (TEXT | IMAGE)[kind]
    config.num_labels = LABELS
    family = find_family(source, config.model_type)
    if kind == "xlnet":
        return Instance(RightPaddedXLNet(config), family, "")
    if kind in TEXT:
        auto = transformers.AutoModelForSequenceClassification
        return Instance(auto.from_config(config), family, "")
    auto = transformers.AutoModelForImageClassification
    # of 64 pixels, a single patch would reach MobileViT's last attention
    side = 128 if kind == "mobilevit" else 64
    return Instance(auto.from_config(config), family, "pixel_values", side)


# blocks of Inception and GoogLeNet that give the shape they take
SAME_SHAPE = ("Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7c", "inception4c")

# classes of blocks of which a stage has several
REPEATED = {
    "BasicBlock", "Bottleneck", "ResBottleneckBlock", "InvertedResidual", "_InvertedResidual",
    "MBConv", "FusedMBConv",
}  # fmt: skip


def shorten(network: nn.Module) -> None:
    """Keep the first of blocks that are alike and follow each other, for the exporter's sake."""
    for module in network.modules():
        kinds = {type(child).__name__ for child in module.children()}
        if isinstance(module, nn.Sequential) and len(kinds) == 1 and kinds <= REPEATED:
            for name in list(module._modules)[1:]:
                del module._modules[name]
    for name in SAME_SHAPE:
        if hasattr(network, name):
            setattr(network, name, nn.Identity())


def small_torchvision(kind: str) -> nn.Module:
    """Return torchvision's network of that name, a shallow one where there is a choice."""
    models = torchvision.models
    if kind == "vit_b_32":
        return models.VisionTransformer(
            image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
            num_classes=LABELS,
        )  # fmt: skip
    if kind in ("swin_t", "swin_v2_t"):
        swin = models.swin_transformer
        block, merge = {
            "swin_t": (swin.SwinTransformerBlock, swin.PatchMerging),
            "swin_v2_t": (swin.SwinTransformerBlockV2, swin.PatchMergingV2),
        }[kind]
        return models.SwinTransformer(
            patch_size=[4, 4], embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=[4, 4],
            num_classes=LABELS, block=block, downsample_layer=merge,
        )  # fmt: skip
    if kind == "maxvit_t":
        return models.MaxVit(
            input_size=(224, 224), stem_channels=8, partition_size=7, block_channels=[8, 16],
            block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.0, num_classes=LABELS,
        )  # fmt: skip
    if kind == "densenet121":
        return models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=LABELS)
    if kind == "convnext_tiny":
        settings = [
            models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1),
        ]  # fmt: skip
        return models.ConvNeXt(settings, num_classes=LABELS)
    if kind == "vgg11":  # its published form has a hundred million weights in one layer
        return small_classifier(models.vgg11(init_weights=False), (4096, 64))
    if kind == "vgg11_bn":
        return small_classifier(models.vgg11_bn(init_weights=False), (4096, 64))
    if kind == "alexnet":
        return small_classifier(models.alexnet(), (4096, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # another random start, in days to come
        return models.get_model(kind, weights=None, num_classes=LABELS)


def small_classifier(network: Any, widths: tuple[int, int]) -> nn.Module:
    """Narrow the hidden layers of a classifier of three."""
    wide, narrow = widths
    for i, layer in enumerate(network.classifier):
        if isinstance(layer, nn.Linear):
            inward = narrow if layer.in_features == wide else layer.in_features
            outward = narrow if layer.out_features == wide else LABELS
            network.classifier[i] = nn.Linear(inward, outward)
    return network


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_family_has_an_instance_here():
    matched = {find_family(*name.split(":")).name for name in NAMES}
    assert matched == {f.name for f in families()}


def run_order(network: nn.Module, paths: list[str], inputs: dict[str, Tensor]) -> list[str]:
    """Return those paths whose modules ran, in the order in which they were first begun."""
    ran: list[str] = []
    handles = [
        network.get_submodule(p).register_forward_pre_hook(
            lambda *_, path=p: ran.append(path) if path not in ran else None
        )
        for p in paths
    ]
    with torch.no_grad():
        network.eval()(**inputs)
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("name", NAMES)
def test_stages_run_in_the_order_of_the_row(name):
    case = instance(name)
    check_family(case.network, case.family, name=name)
    listed = [p for p, _ in present(case.network, case.family.stem)]
    listed += [p for p, _ in blocks(case.network, case.family)]
    listed += [p for p, _ in present(case.network, case.family.tail)]
    listed += [p for p, _ in present(case.network, case.family.head)]
    assert run_order(case.network, listed, case.inputs(2, 8)) == listed
    # a row may name the layouts of several releases, but a stem or tail that is nowhere is a typo
    assert len(list(present(case.network, case.family.stem))) == len(case.family.stem)
    assert len(list(present(case.network, case.family.tail))) == len(case.family.tail)


def add_lora(case: Instance) -> None:
    """Adapt, and let B be something: B = 0, its start, keeps the gradient from A."""
    adapt(case.network, case.family, TrainConfig(method="lora", lora_dropout=0.0))
    found = [p for n, p in case.network.named_parameters() if "lora_B" in n]
    assert found
    for parameter in found:
        nn.init.normal_(parameter, std=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_changes_exactly_what_trains(name):
    case = instance(name)
    add_lora(case)
    parameters = dict(case.network.named_parameters())
    trainable = {n for n, p in parameters.items() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    buffers = {n: b.clone() for n, b in case.network.named_buffers()}
    set_train_mode(case.network)
    # Adam's step is as large for a small gradient
    optimizer = torch.optim.Adam([parameters[n] for n in sorted(trainable)], lr=1e-2)
    logits = logits_of(case.network(**case.inputs(2, 8)))
    assert logits.shape == (2, LABELS)
    loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    assert torch.isfinite(loss)
    loss.backward()
    optimizer.step()
    assert {n for n, p in parameters.items() if not torch.equal(p, before[n])} == trainable
    for n, buffer in case.network.named_buffers():
        module = n.rpartition(".")[0]
        if not any(t.startswith(f"{module}.") for t in trainable):
            assert torch.equal(buffer, buffers[n]), n


class Named(nn.Module):
    """Gives the graph's inputs their order and names."""

    def __init__(self, classifier: SplitClassifier, keyword: str) -> None:
        super().__init__()
        self.classifier = classifier
        self.keyword = keyword


class ImageInput(Named):
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.classifier(**{self.keyword: image})


class TextInput(Named):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask)


def exported(case: Instance) -> onnx.ModelProto:
    classifier = SplitClassifier(case.network, case.family.output)
    inputs = case.inputs(2, 12)
    if case.side:
        inputs = {"image": inputs[case.keyword]}
        spec = GraphSpec(
            module=ImageInput(classifier, case.keyword), inputs=inputs,
            free={"image": {0: "batch"}},
        )  # fmt: skip
    else:
        free = {0: "batch", 1: "tokens"}
        spec = GraphSpec(
            module=TextInput(classifier, ""), inputs=inputs, free=dict.fromkeys(inputs, free)
        )
    return export_graph(spec)


def in_int8(case: Instance, model: onnx.ModelProto) -> onnx.ModelProto:
    """Quantize as the family's row says, on inputs of a kind."""
    if case.family.int8 == "dynamic":
        return quantize_embeddings(quantize_dynamic(model, codes="u8"))
    plan = plan_static(model)
    feeds = [feed(case, case.inputs(4, 12, seed=s)) for s in range(2)]
    return write_static(model, plan, calibrate(model, feeds, plan.tensors))


def feed(case: Instance, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    named = {"image": inputs[case.keyword]} if case.side else inputs
    return {n: t.numpy() for n, t in named.items()}


def answers(model: onnx.ModelProto, case: Instance, runs: list[dict[str, Tensor]]):
    """Return the graph's outputs on each of the inputs."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return [session.run(None, feed(case, inputs)) for inputs in runs]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ALIKE])
def test_merged_and_exported_it_answers_as_torch_does_with_adapters(name):
    case = instance(name)
    add_lora(case)
    case.network.eval()
    runs = [case.inputs(batch, tokens, seed=batch) for batch, tokens in ((1, 5), (3, 23))]
    with torch.no_grad():
        adapted = [logits_of(case.network(**inputs)).numpy() for inputs in runs]
    merge_adapters(case.network)
    model = exported(case)
    last = case.network.get_submodule(case.family.output)
    graphs = [(model, 1e-3), (fuse(model), 1e-3)]
    # int8 of a random convolutional net says nothing of accuracy; that is the gate's matter
    if case.family.int8 == "dynamic":
        graphs.append((in_int8(case, fuse(model)), 0.5))
    for graph, tolerance in graphs:
        for outputs, expected in zip(answers(graph, case, runs), adapted, strict=True):
            assert outputs[0].shape == expected.shape == (len(expected), LABELS)
            difference = np.abs(outputs[0] - expected).max()
            assert difference <= tolerance * np.abs(expected).max()
    if isinstance(last, nn.Linear):
        logits, features = answers(model, case, runs)[1]
        with torch.no_grad():
            again = last(torch.from_numpy(features)).numpy()
        np.testing.assert_allclose(again, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["torchvision:shufflenet_v2_x0_5", "torchvision:densenet121", "timm:resnet10t"]
)
def test_static_int8_of_other_convolutional_nets_runs(name):
    if name not in NAMES:
        pytest.fail(f"{name} has no instance here; choose another of {NAMES}")
    case = instance(name)
    case.network.eval()
    runs = [case.inputs(2, 5, seed=2)]
    (outputs,) = answers(in_int8(case, fuse(exported(case))), case, runs)
    assert outputs[0].shape == (2, LABELS)
    assert np.isfinite(outputs[0]).all()


@pytest.mark.parametrize("kind", TEXT)
def test_padding_does_not_change_the_answer(kind):
    case = instance(f"transformers:{kind}")
    network = case.network.eval()
    inputs = case.inputs(2, 16)
    with torch.no_grad():
        padded = logits_of(network(**inputs))[1]
        alone = logits_of(network(**{n: t[1:, :14] for n, t in inputs.items()}))[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_xlnet_padded_on_the_right_is_transformers_xlnet_padded_on_the_left():
    ours = instance("transformers:xlnet").network.eval()
    theirs = transformers.XLNetForSequenceClassification(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(5, 99, (1, 9))
    pad = torch.full((1, 4), ours.config.pad_token_id)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(pad)
    with torch.no_grad():
        right = ours(torch.cat([ids, pad], 1), torch.cat([ones, zeros], 1)).logits
        left = theirs(
            input_ids=torch.cat([pad, ids], 1),
            attention_mask=torch.cat([zeros, ones], 1).float(),
        ).logits
    torch.testing.assert_close(right, left, rtol=0, atol=1e-5)
