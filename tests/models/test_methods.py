"""What each method trains, against lists by hand, peft and bitsandbytes; merging; resuming."""

import copy
import dataclasses
import re
import sys

import pytest
import torch
import torchvision
import transformers
from torch import nn

from edgetune.config import TrainConfig, choices
from edgetune.errors import ConfigError, MissingExtraError
from edgetune.models.adapt import (
    DEFAULT_LR,
    activate,
    adapt,
    after_step,
    frozen_prefix,
    frozen_sha256,
    layer_depths,
    load_method_state,
    load_trainable,
    merge_adapters,
    merge_difference,
    method_state,
    parameter_counts,
    regularization,
    set_train_mode,
    trainable_state,
    trained_parameters,
    unfrozen_parameters,
)
from edgetune.models.families import find_family

# peft asks transformers for a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

BERT, RESNET = find_family("transformers", "bert"), find_family("torchvision", "resnet18")
MOBILENET = find_family("torchvision", "mobilenet_v2")
HEAD = {
    "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias",
}  # fmt: skip
LAYERS = [f"bert.encoder.layer.{i}" for i in range(3)]
# suffixes of the matrices in one layer of BERT
DENSE = [
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
]  # fmt: skip
NORMS = ["attention.output.LayerNorm", "output.LayerNorm"]
PEFT_METHODS = ["lora", "dora", "rslora", "adalora", "ia3"]
LABELS = torch.tensor([0, 1, 1, 0])


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None, num_classes=2).eval()


def mobilenet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v2(weights=None, num_classes=2, width_mult=0.25).eval()


def ids() -> torch.Tensor:
    return torch.randint(5, 99, (4, 8), generator=torch.Generator().manual_seed(1))


def logits(network: nn.Module) -> torch.Tensor:
    if any(isinstance(m, nn.Conv2d) for m in network.modules()):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        return network(images)
    return network(input_ids=ids()).logits


def adapted(method: str, network: nn.Module, family, **keys) -> nn.Module:
    torch.manual_seed(7)
    adapt(network, family, TrainConfig(method=method, lora_dropout=0.0, **keys))
    return network


def disturb(network: nn.Module) -> nn.Module:
    """Move everything that trains, so that adapters say something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(network.named_parameters(), key=lambda pair: plain(pair[0])):
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def trainable(network: nn.Module) -> set[str]:
    return {plain(n) for n, p in network.named_parameters() if p.requires_grad}


def by_peft(method: str) -> nn.Module:
    """Return peft's own model of the same network, seed and settings."""
    import peft

    network, common = bert(), {"target_modules": ["query", "value"], "lora_alpha": 16.0}
    torch.manual_seed(7)
    match method:
        case "lora":
            settings = peft.LoraConfig(r=8, **common)
        case "dora":
            settings = peft.LoraConfig(r=8, use_dora=True, **common)
        case "rslora":
            settings = peft.LoraConfig(r=8, use_rslora=True, **common)
        case "adalora":
            settings = peft.AdaLoraConfig(
                init_r=12, target_r=8, total_step=20, tinit=2, tfinal=10, **common
            )
        case _:
            hidden = r".*layer\.\d\.output\.dense"
            settings = peft.IA3Config(
                target_modules=rf".*(key|value)|{hidden}", feedforward_modules=hidden
            )
    model = peft.get_peft_model(network, settings)
    for part in (network.bert.pooler, network.classifier):
        part.requires_grad_(True)
    return model.eval()


# -- what trains ---------------------------------------------------------------------------


def test_every_method_of_the_config_has_a_learning_rate():
    assert set(DEFAULT_LR) == set(choices("method"))


def test_bitfit_trains_every_bias_and_the_head():
    biases = {f"{top}.{path}.bias" for top in LAYERS for path in [*DENSE, *NORMS]}
    network = adapted("bitfit", bert(), BERT)
    assert trainable(network) == biases | {"bert.embeddings.LayerNorm.bias"} | HEAD


def test_norm_trains_every_layer_norm_and_the_head():
    norms = {f"{top}.{path}" for top in LAYERS for path in NORMS} | {"bert.embeddings.LayerNorm"}
    expected = {f"{path}.{kind}" for path in norms for kind in ("weight", "bias")}
    assert trainable(adapted("norm", bert(), BERT)) == expected | HEAD


def test_norm_trains_every_batchnorm_and_the_head():
    network = adapted("norm", resnet(), RESNET)
    # bn1, bn2 and the one of the shortcut, all weight and bias
    expected = {n for n in dict(network.named_parameters()) if re.search(r"bn\d|downsample\.1", n)}
    assert len(expected) == 2 * 20
    assert trainable(network) == expected | {"fc.weight", "fc.bias"}


def test_full_trains_everything_and_head_only_the_head():
    network = bert()
    assert trainable(adapted("full", network, BERT)) == set(dict(network.named_parameters()))
    assert trainable(adapted("head", bert(), BERT)) == HEAD


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_adapters_train_what_peft_trains_and_the_head(method):
    assert trainable(adapted(method, bert(), BERT)) == trainable(by_peft(method))


def test_qlora_trains_what_lora_trains():
    assert trainable(adapted("qlora", bert(), BERT)) == trainable(adapted("lora", bert(), BERT))


def test_ia3_scales_keys_values_and_the_hidden_width_of_the_feed_forward():
    network = adapted("ia3", bert(), BERT)
    shapes = {n: tuple(p.shape) for n, p in network.named_parameters() if "ia3_l" in n}
    assert shapes == {
        f"{top}.{path}.ia3_l.default": shape
        for top in LAYERS
        for path, shape in (
            ("attention.self.key", (32, 1)),
            ("attention.self.value", (32, 1)),
            ("output.dense", (1, 64)),
        )
    }


def test_ia3_scales_outputs_of_convolutions_where_there_is_no_feed_forward():
    network = adapted("ia3", resnet(), RESNET)
    factors = {n: tuple(p.shape) for n, p in network.named_parameters() if "ia3_l" in n}
    assert len(factors) == 16
    assert factors["layer2.0.conv1.ia3_l.default"] == (1, 128, 1, 1)


def test_ia3_on_named_layers_scales_those():
    network = adapted("ia3", bert(), BERT, lora_targets=("query", "intermediate.dense"))
    factors = {n for n in trainable(network) if "ia3_l" in n}
    assert factors == {
        f"{top}.{path}.ia3_l.default"
        for top in LAYERS
        for path in ("attention.self.query", "intermediate.dense")
    }


@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "qlora"])
def test_a_target_that_is_absent_is_refused(method):
    with pytest.raises(ConfigError, match="lora_targets"):
        adapted(method, bert(), BERT, lora_targets=("nope",))


@pytest.mark.parametrize(
    ("method", "network", "message"),
    [
        ("norm", nn.Sequential(nn.Linear(2, 2)), "no normalisation"),
        ("bitfit", nn.Sequential(nn.Linear(2, 2, bias=False)), "no bias"),
    ],
)
def test_a_method_that_finds_nothing_to_train_is_refused(method, network, message):
    with pytest.raises(ConfigError, match=message):
        adapted(method, network, RESNET)


# -- the same as peft ----------------------------------------------------------------------


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_logits_and_gradients_are_those_of_peft(method):
    ours, theirs = disturb(adapted(method, bert(), BERT)), disturb(by_peft(method))
    first, second = logits(ours), logits(theirs)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    nn.functional.cross_entropy(first, LABELS).backward()
    nn.functional.cross_entropy(second, LABELS).backward()
    gradients = {plain(n): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "adalora", "ia3"])
def test_adapters_start_as_they_start_in_peft(method):
    ours = dict(adapted(method, bert(), BERT).named_parameters())
    theirs = {plain(n): p for n, p in by_peft(method).named_parameters()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


# -- training and merging ------------------------------------------------------------------


@pytest.mark.parametrize("method", choices("method"))
def test_one_step_lowers_the_loss(method):
    keys = {"last_blocks": 1} if method == "freeze" else {}
    network = adapted(method, bert(), BERT, **keys)
    optimizer = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad], lr=DEFAULT_LR[method]
    )
    before = nn.functional.cross_entropy(logits(network), LABELS)
    before.backward()
    optimizer.step()
    after = nn.functional.cross_entropy(logits(network), LABELS)
    assert after.item() < before.item()


@pytest.mark.parametrize(
    ("method", "make", "family"),
    [
        *((m, bert, BERT) for m in [*PEFT_METHODS, "qlora"]),
        *((m, resnet, RESNET) for m in ("lora", "dora", "adalora", "ia3")),
        *((m, mobilenet, MOBILENET) for m in ("lora", "dora")),
    ],
)
def test_merging_keeps_the_answer_and_leaves_plain_layers(method, make, family):
    types = {n: type(m) for n, m in make().named_modules()}
    network = disturb(adapted(method, make(), family))
    with torch.no_grad():
        before = logits(network)
        unadapted = logits(make())
    assert float((before - unadapted).abs().max()) > 1e-3
    scale = float(before.abs().max())
    assert merge_difference(network, logits) <= 1e-4 * scale
    merge_adapters(network)
    assert {n: type(m) for n, m in network.named_modules()} == types
    with torch.no_grad():
        torch.testing.assert_close(logits(network), before, rtol=0, atol=1e-4 * scale)
    adapted("lora", network, family)  # nothing of the old adapter is in the way


def test_measuring_the_merge_leaves_the_network_as_it_was():
    network = disturb(adapted("dora", bert(), BERT))
    network.bert.encoder.train()
    state = {n: t.clone() for n, t in network.state_dict().items()}
    modes = {n: m.training for n, m in network.named_modules()}
    merge_difference(network, logits)
    assert {n: m.training for n, m in network.named_modules()} == modes
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in network.state_dict().items())


def test_a_merged_lora_is_the_weight_and_the_product_of_its_factors():
    network = disturb(adapted("lora", resnet(), RESNET))
    layer = network.get_submodule("layer2.0.conv1")
    down, up = layer.lora_A.default.weight, layer.lora_B.default.weight
    # (out, r, 1, 1) and (r, in, 3, 3); alpha / r = 16 / 8
    delta = 2.0 * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down).detach()
    expected = layer.get_base_layer().weight.detach().clone() + delta
    merge_adapters(network)
    torch.testing.assert_close(network.get_submodule("layer2.0.conv1").weight.detach(), expected)


# -- quantized -----------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
def test_merged_nf4_is_what_bitsandbytes_dequantizes_and_the_product(double_quant):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        codes, state = quantize_4bit(
            weight.detach(), quant_type="nf4", compress_statistics=double_quant
        )
        return dequantize_4bit(codes, state)

    reference = dict(bert().named_modules())
    network = disturb(adapted("qlora", bert(), BERT, double_quant=double_quant))
    query = f"{LAYERS[1]}.attention.self.query"
    layer = network.get_submodule(query)
    product = 2.0 * (layer.lora_B.default.weight @ layer.lora_A.default.weight).detach()
    assert network.get_submodule(f"{LAYERS[0]}.output.dense").quant_state.nested == double_quant
    merge_adapters(network)
    torch.testing.assert_close(
        network.get_submodule(query).weight.detach(),
        rounded(reference[query].weight) + product,
        rtol=0,
        atol=1e-6,
    )
    dense = f"{LAYERS[2]}.intermediate.dense"  # no target: quantized alone
    assert torch.equal(network.get_submodule(dense).weight, rounded(reference[dense].weight))
    assert torch.equal(network.get_submodule(dense).bias, reference[dense].bias)


def test_int8_is_what_bitsandbytes_dequantizes():
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    reference = bert().get_submodule(f"{LAYERS[2]}.intermediate.dense").weight.detach()
    network = adapted("qlora", bert(), BERT, quant_type="int8")
    merge_adapters(network)
    merged = network.get_submodule(f"{LAYERS[2]}.intermediate.dense").weight.detach()
    codes, scales, _ = int8_vectorwise_quant(reference.half())
    torch.testing.assert_close(merged, int8_vectorwise_dequant(codes, scales))
    # half a step of 1/127 of a row's largest; float16 before it adds 2^-11
    largest = reference.abs().amax(1, keepdim=True)
    assert bool(((merged - reference).abs() <= largest * (0.5 / 127 + 2**-10)).all())


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_gradients_of_a_quantized_network_are_those_of_its_dequantized_weights(quant_type):
    network = disturb(adapted("qlora", bert(), BERT, quant_type=quant_type))
    dequantized = copy.deepcopy(network)
    merge_adapters(dequantized)
    inputs = network.bert.embeddings(ids()).detach()
    gradients = []
    for model in (network, dequantized):
        values = inputs.clone().requires_grad_(True)
        model(inputs_embeds=values).logits.sum().backward()
        gradients.append(values.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_merging_a_quantized_network_changes_no_answer(quant_type):
    network = disturb(adapted("qlora", bert(), BERT, quant_type=quant_type))
    assert merge_difference(network, logits) < 1e-5


def test_quantizing_draws_no_random_numbers():
    network = adapted("qlora", bert(), BERT)
    ours = {n: p for n, p in network.named_parameters() if "lora_" in n}
    theirs = dict(adapted("lora", bert(), BERT).named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())


def test_four_bit_parameters_count_as_what_they_stand_for():
    counts = parameter_counts(adapted("lora", bert(), BERT))
    assert parameter_counts(adapted("qlora", bert(), BERT)) == counts
    assert parameter_counts(adapted("qlora", bert(), BERT, quant_type="int8")) == counts


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_the_hash_of_a_quantized_base_tells_scales_apart(quant_type):
    first = adapted("qlora", bert(), BERT, quant_type=quant_type)
    assert frozen_sha256(first) == frozen_sha256(
        adapted("qlora", bert(), BERT, quant_type=quant_type)
    )
    scaled = bert()
    with torch.no_grad():  # the same codes
        scaled.get_submodule(f"{LAYERS[0]}.output.dense").weight.mul_(2)
    other = frozen_sha256(adapted("qlora", scaled, BERT, quant_type=quant_type))
    assert other != frozen_sha256(first)


def test_training_leaves_the_hash_of_the_frozen_base():
    network = adapted("qlora", bert(), BERT)
    before = frozen_sha256(network)
    set_train_mode(network)
    logits(network).sum().backward()
    network.eval()
    with torch.no_grad():
        logits(network)
    disturb(network)
    assert frozen_sha256(network) == before


def test_a_network_without_linear_layers_to_quantize_is_refused():
    with pytest.raises(ConfigError, match="no linear layer outside its head"):
        adapted("qlora", resnet(), RESNET)


def test_layers_whose_weights_are_read_past_them_stay_plain():
    torch.manual_seed(0)
    network = torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=[2], num_heads=[2], window_size=[4, 4],
        num_classes=2,
    )  # fmt: skip
    adapted("qlora", network, find_family("torchvision", "swin_t"))
    attention = network.get_submodule("features.1.0.attn")
    assert (type(attention.qkv), type(attention.proj)) == (nn.Linear, nn.Linear)
    assert logits(network.eval()).shape == (4, 2)


def test_qlora_without_bitsandbytes_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"edgetune\[qlora\]"):
        adapted("qlora", bert(), BERT)


# -- what is stored ------------------------------------------------------------------------


@pytest.mark.parametrize("method", choices("method"))
def test_what_was_trained_goes_back_onto_a_fresh_network(method):
    keys = {"last_blocks": 1} if method == "freeze" else {}
    network = disturb(adapted(method, bert(), BERT, **keys))
    fresh = adapted(method, bert(), BERT, **keys)
    assert frozen_sha256(fresh) == frozen_sha256(network)
    load_trainable(fresh, {n: t.clone() for n, t in trainable_state(network).items()})
    with torch.no_grad():
        assert torch.equal(logits(fresh), logits(network))


@pytest.mark.parametrize(
    ("method", "moves"),
    [("norm", True), ("bitfit", True), ("full", True), ("head", False), ("lora", False)],
)
def test_batchnorm_updates_its_statistics_where_it_trains(method, moves):
    network = adapted(method, resnet(), RESNET)
    before = network.bn1.running_mean.clone()
    set_train_mode(network)
    logits(network)
    assert torch.equal(network.bn1.running_mean, before) is not moves
    assert ("bn1.running_mean" in trainable_state(network)) is moves


def test_batchnorm_that_does_not_train_yet_keeps_its_statistics():
    network = adapted("full", resnet(), RESNET)
    active = {n for n, _ in network.named_parameters() if n.startswith(("layer4", "fc"))}
    before = {n: b.clone() for n, b in network.named_buffers() if n.endswith("running_mean")}
    set_train_mode(network, active=active)
    logits(network)
    moved = {n for n, b in network.named_buffers() if n in before and not torch.equal(b, before[n])}
    assert moved == {n for n in before if n.startswith("layer4")}


# -- stages --------------------------------------------------------------------------------


def names_of(network: nn.Module, *prefixes: str) -> set[str]:
    return {n for n, _ in network.named_parameters() if n.startswith(prefixes)}


def test_unfreezing_goes_down_a_block_every_two_epochs():
    network = adapted("full", bert(), BERT)
    config = TrainConfig(method="full", unfreeze_every=2)
    third, second, first = (names_of(network, f"{top}.") for top in reversed(LAYERS))
    by_epoch = [unfrozen_parameters(network, BERT, config, epoch) for epoch in range(10)]
    assert by_epoch[0] == by_epoch[1] == HEAD
    assert by_epoch[2] == by_epoch[3] == HEAD | third
    assert by_epoch[4] == by_epoch[5] == HEAD | third | second
    assert by_epoch[6] == by_epoch[7] == HEAD | third | second | first
    assert by_epoch[8] == by_epoch[9] == set(dict(network.named_parameters()))


def test_unfreezing_frees_only_what_the_method_trains():
    network = adapted("freeze", bert(), BERT, last_blocks=2)
    config = TrainConfig(method="freeze", last_blocks=2, unfreeze_every=1)
    upper = names_of(network, f"{LAYERS[2]}.")
    assert unfrozen_parameters(network, BERT, config, 0) == HEAD
    assert unfrozen_parameters(network, BERT, config, 1) == HEAD | upper
    everything = HEAD | upper | names_of(network, f"{LAYERS[1]}.")
    assert unfrozen_parameters(network, BERT, config, 9) == everything
    at_once = dataclasses.replace(config, unfreeze_every=0)
    assert unfrozen_parameters(network, BERT, at_once, 0) == everything


def test_the_tail_is_free_with_the_head():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    network = transformers.ViTForImageClassification(config)
    family = find_family("transformers", "vit")
    adapted("full", network, family)
    config = TrainConfig(method="full", unfreeze_every=1)
    assert unfrozen_parameters(network, family, config, 0) == {
        "vit.layernorm.weight", "vit.layernorm.bias", "classifier.weight", "classifier.bias",
    }  # fmt: skip


def test_what_is_not_free_yet_gets_no_gradient_but_belongs_to_the_run():
    network = adapted("full", bert(), BERT)
    stored, counts = set(trainable_state(network)), parameter_counts(network)
    digest = frozen_sha256(network)
    activate(network, HEAD)
    logits(network).sum().backward()
    assert {n for n, p in network.named_parameters() if p.grad is not None} == HEAD
    assert set(trainable_state(network)) == stored
    assert trained_parameters(network) == set(dict(network.named_parameters()))
    assert (parameter_counts(network), frozen_sha256(network)) == (counts, digest)
    activate(network, trained_parameters(network))
    assert trainable(network) == set(dict(network.named_parameters()))


def test_depth_counts_from_the_head_down_to_the_embeddings():
    network = adapted("lora", bert(), BERT)
    depths = layer_depths(network, BERT)
    assert depths.keys() == dict(network.named_parameters()).keys()
    expected = {top: 3 - number for number, top in enumerate(LAYERS)}
    for name, depth in depths.items():
        if name in HEAD:
            assert depth == 0
        elif name.startswith("bert.embeddings"):
            assert depth == 4
        else:
            assert depth == expected[name[: len(LAYERS[0])]]


def test_depth_of_a_resnet():
    depths = layer_depths(resnet(), RESNET)
    assert depths["fc.weight"] == 0
    assert (depths["layer4.1.conv1.weight"], depths["layer4.0.bn1.weight"]) == (1, 2)
    assert (depths["layer1.0.conv1.weight"], depths["conv1.weight"]) == (8, 9)


def test_the_frozen_prefix_ends_where_something_trains():
    network = adapted("freeze", mobilenet(), MOBILENET, last_blocks=2)
    assert frozen_prefix(network, MOBILENET) == tuple(f"features.{i}" for i in range(17))
    head = {"classifier.1.weight", "classifier.1.bias"}
    assert frozen_prefix(network, MOBILENET, head) == tuple(f"features.{i}" for i in range(19))
    assert frozen_prefix(adapted("full", mobilenet(), MOBILENET), MOBILENET) == ()


def test_what_runs_before_the_blocks_comes_first():
    network = adapted("lora", bert(), BERT, lora_targets=("layer.2.output.dense",))
    assert frozen_prefix(network, BERT) == ("bert.embeddings", *LAYERS[:2])
    network = adapted("head", bert(), BERT)
    assert frozen_prefix(network, BERT) == ("bert.embeddings", *LAYERS)
    network = adapted("freeze", bert(), BERT, train_patterns=("*LayerNorm*",))
    assert frozen_prefix(network, BERT) == ()


def test_a_parameter_outside_all_stages_forbids_a_prefix():
    network = adapted("head", mobilenet(), MOBILENET)
    network.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert frozen_prefix(network, MOBILENET) == ()


def test_the_prefix_runs_without_dropout():
    network = adapted("head", bert(), BERT)
    set_train_mode(network, prefix=LAYERS[:2])
    training = {n for n, m in network.named_modules() if m.training and isinstance(m, nn.Dropout)}
    assert f"{LAYERS[2]}.attention.output.dropout" in training
    assert f"{LAYERS[1]}.attention.output.dropout" not in training
    assert network.training


# -- AdaLoRA -------------------------------------------------------------------------------


def adalora(**keys) -> nn.Module:
    return adapted("adalora", bert(), BERT, lora_r=2, **keys)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        loss = nn.functional.cross_entropy(logits(network), LABELS)
        extra = regularization(network)
        assert extra is not None
        (loss + extra).backward()
        optimizer.step()
        after_step(network, step, 20)
        optimizer.zero_grad()


def adam(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)


def kept_ranks(network: nn.Module) -> list[int]:
    return [int((p != 0).sum()) for n, p in network.named_parameters() if ".lora_E." in n]


def test_ranks_end_at_the_budget():
    network = adalora()
    assert [tuple(p.shape) for n, p in network.named_parameters() if "lora_E" in n] == [(3, 1)] * 6
    train(network, adam(network), 0, 20)
    # query and value of three layers, two ranks each on average
    assert sum(kept_ranks(network)) == 6 * 2


def test_ranks_and_weights_are_those_that_peft_allots():
    import peft

    network = adalora()
    train(network, adam(network), 0, 20)
    torch.manual_seed(7)
    base = bert()
    torch.manual_seed(7)
    settings = peft.AdaLoraConfig(
        init_r=3, target_r=2, lora_alpha=16.0, target_modules=["query", "value"],
        total_step=20, tinit=2, tfinal=10,
    )  # fmt: skip
    theirs = peft.get_peft_model(base, settings).eval()
    for part in (base.bert.pooler, base.classifier):
        part.requires_grad_(True)
    optimizer = adam(theirs)
    for step in range(20):
        # not `theirs(...)`: that goes past AdaLoRA's own forward
        theirs.base_model(input_ids=ids(), labels=LABELS).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    expected = {plain(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [5, 10, 14])
def test_adalora_goes_on_from_its_state_as_if_it_had_not_stopped(stop):
    whole = adalora()
    optimizer = adam(whole)
    train(whole, optimizer, 0, stop)
    weights = {n: t.clone() for n, t in trainable_state(whole).items()}
    state = {n: t.clone() for n, t in method_state(whole).items()}
    momenta = copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, stop, 20)

    fresh = adalora()
    load_trainable(fresh, weights)
    load_method_state(fresh, state)
    optimizer = adam(fresh)
    optimizer.load_state_dict(momenta)
    train(fresh, optimizer, stop, 20)
    after, expected = trainable_state(fresh), trainable_state(whole)
    assert all(torch.equal(after[n], expected[n]) for n in expected)
    assert method_state(fresh).keys() == method_state(whole).keys()


def test_cleared_ranks_stay_cleared_when_loaded_and_merged():
    network = adalora()
    train(network, adam(network), 0, 20)
    fresh = adalora()
    load_trainable(fresh, trainable_state(network))
    assert kept_ranks(fresh) == kept_ranks(network)
    targets = [f"{top}.attention.self.{kind}" for top in LAYERS for kind in ("query", "value")]
    merge_adapters(fresh)
    before = bert()
    ranks = [
        int(torch.linalg.matrix_rank(
            fresh.get_submodule(path).weight - before.get_submodule(path).weight, atol=1e-5
        ))
        for path in targets
    ]  # fmt: skip
    assert ranks == kept_ranks(network)


def test_the_regularization_is_the_one_peft_adds_to_its_loss():
    theirs = disturb(by_peft("adalora"))
    outputs = theirs.base_model(input_ids=ids(), labels=LABELS)
    added = outputs.loss - nn.functional.cross_entropy(outputs.logits, LABELS)
    ours = regularization(disturb(adapted("adalora", bert(), BERT)))
    torch.testing.assert_close(ours, added, rtol=1e-5, atol=1e-6)


def test_other_methods_have_no_state_and_no_regularization():
    network = adapted("lora", bert(), BERT)
    after_step(network, 0, 1)
    assert regularization(network) is None
    assert method_state(network) == {}
    load_method_state(network, {})
    with pytest.raises(ConfigError, match="of another method"):
        load_method_state(network, {"kept.x": torch.ones(1)})


def test_adalora_refuses_the_state_of_another_network():
    with pytest.raises(ConfigError, match="does not fit the model"):
        load_method_state(adalora(), {"kept.nope": torch.ones(3, 1)})


def test_adalora_refuses_a_run_too_short_to_allot_ranks():
    network = adalora()
    logits(network).sum().backward()
    with pytest.raises(ConfigError, match="needs 3 steps or more"):
        after_step(network, 0, 2)
