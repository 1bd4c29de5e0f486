"""What learns, where a step begins, and what is refused."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from learning_networks import (
    CLASSES,
    PIXELS,
    batch_inputs,
    compiled,
    defaults,
    learnable,
    network,
    run_step,
    session,
)
from onnx import TensorProto, helper

from edgetune.autodiff.learnable import LearnRequest, parse_request, prepare, release
from edgetune.autodiff.step import compile_step
from edgetune.errors import ConfigError, EdgetuneError
from edgetune.quantize.fuse import fuse


def shape(value: onnx.ValueInfoProto) -> list:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def one_hot(rng: np.random.Generator, size: int, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[rng.integers(0, classes, size)]


# where a step begins


@pytest.mark.parametrize("precision", ["float", "u8"])
def test_a_step_of_the_last_block_begins_at_what_enters_it(precision: str):
    made, step = learnable("bert", "last:1", precision), compiled("bert", "last:1", precision)
    # the mask's part of attention is computed again, and of the ids their number is wanted
    assert step.inputs == ("input_ids", "attention_mask")
    readers = {n.op_type for n in step.model.graph.node if "input_ids" in n.input}
    assert readers == {"Shape"}
    (latent,) = step.latents
    assert shape(latent) == ["batch", "tokens", 32]
    feeds = network("bert").batches(np.random.default_rng(2), 3)
    given = batch_inputs(made, step, feeds)
    with torch.no_grad():
        hidden = network("bert").module.bert(
            **{n: torch.tensor(v) for n, v in feeds.items()}, output_hidden_states=True
        )
    wanted = hidden.hidden_states[1].numpy()
    np.testing.assert_allclose(
        given[latent.name], wanted, rtol=0, atol=1e-5 if precision == "float" else 0.1
    )


@pytest.mark.parametrize("precision", ["float", "u8"])
def test_a_step_of_the_head_begins_before_its_last_layer(precision: str):
    step = compiled("bert", "head", precision)
    assert step.inputs == ()
    assert [shape(latent) for latent in step.latents] == [["batch", 32]]
    kinds = {node.op_type for node in step.model.graph.node}
    assert "MatMulInteger" not in kinds


def test_a_step_of_all_blocks_computes_everything_from_the_ids():
    step = compiled("bert", "lora", "u8")
    assert step.inputs == ("input_ids", "attention_mask")
    assert step.latents == ()


def test_a_step_behind_calibrated_codes_is_handed_the_codes():
    step = compiled("mobilenet", "last:1", "static")
    assert step.inputs == ()
    assert [latent.type.tensor_type.elem_type for latent in step.latents] == [TensorProto.UINT8]
    # 32 px, halved by the stem and two of three blocks; what enters the last convolution
    assert [shape(latent) for latent in step.latents] == [["batch", 16, 4, 4]]
    kinds = {node.op_type for node in step.model.graph.node}
    assert "DequantizeLinear" in kinds
    assert "QuantizeLinear" not in kinds


# what learns


def test_biases_that_begin_equal_learn_apart():
    made, step = learnable("bert, fresh", "bias"), compiled("bert, fresh", "bias")
    values = defaults(made)
    # query, key and value are one product by now: 4 products and 2 norms a layer
    assert sum(not value.any() for value in values.values()) == 2 * (4 + 2)
    rng = np.random.default_rng(0)
    feeds = network("bert, fresh").batches(rng, 4)
    given = batch_inputs(made, step, feeds)
    found = run_step(session(step.model), given, values, one_hot(rng, 4, CLASSES), lr=0.1)
    moved = [found[f"{name}.out"] for name in values]
    for i, a in enumerate(moved):
        assert a.any()
        assert all(not np.array_equal(a, b) for b in moved[i + 1 :])


def test_lora_changes_nothing_before_it_has_learnt():
    feeds = network("bert").batches(np.random.default_rng(0), 3)
    answers = [
        session(learnable("bert", request).model).run(["logits"], feeds)[0]
        for request in ("head", "lora")
    ]
    np.testing.assert_allclose(*answers, rtol=0, atol=1e-6)
    names = learnable("bert", "lora").trainable
    # queries and values of two layers, two factors each, and the head
    assert sorted(n.rsplit(".", 1)[-1] for n in names) == ["bias"] + ["weight"] * 9
    assert sum("lora_a" in n for n in names) == sum("lora_b" in n for n in names) == 4


def test_an_inference_graph_takes_what_was_learnt_and_else_its_defaults():
    made = learnable("bert", "head")
    feeds = network("bert").batches(np.random.default_rng(0), 3)
    opened = session(made.model)
    features = opened.run(["features"], feeds)[0]
    weight = np.random.default_rng(1).normal(size=(CLASSES, 32)).astype(np.float32)
    values = defaults(made)
    (name,) = [n for n in values if values[n].ndim == 2]
    (bias,) = [values[n] for n in values if n != name]
    turned = values[name].shape == weight.shape
    changed = opened.run(["logits"], {**feeds, name: weight if turned else weight.T})[0]
    np.testing.assert_allclose(changed, features @ weight.T + bias, rtol=0, atol=1e-5)
    plain = opened.run(["logits"], feeds)[0]
    with torch.no_grad():
        module = network("bert").module(**{n: torch.tensor(v) for n, v in feeds.items()})
    np.testing.assert_allclose(plain, module.logits.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("bert", "float"), ("bert", "u8"), ("conv head", "float"), ("conv head", "static")],
)
def test_a_head_may_have_more_classes_than_were_exported(name: str, precision: str):
    made, step = learnable(name, "head", precision), compiled(name, "head", precision)
    rng, classes = np.random.default_rng(0), CLASSES + 3
    values = {}
    for tensor, value in defaults(made).items():
        sizes = list(value.shape)
        sizes[made.class_axes[tensor]] = classes
        values[tensor] = rng.normal(size=sizes).astype(np.float32)
    feeds = network(name).batches(rng, 4)
    given = batch_inputs(made, step, feeds)
    targets = one_hot(rng, 4, classes)
    found = run_step(session(step.model), given, values, targets, lr=0.1, weight_decay=0.1)

    (latent,) = (torch.tensor(v) for v in given.values())
    leaves = {n: torch.tensor(v, requires_grad=True) for n, v in values.items()}
    (weight,) = [v for v in leaves.values() if v.ndim > 1]
    (bias,) = [v for v in leaves.values() if v.ndim == 1]
    if name == "bert":
        logits = latent @ (weight.T if len(weight) == classes else weight) + bias
    else:
        if latent.dtype == torch.uint8:
            constants = {
                t.name: onnx.numpy_helper.to_array(t) for t in step.model.graph.initializer
            }
            (node,) = [n for n in step.model.graph.node if n.op_type == "DequantizeLinear"]
            scale, zero = (constants[i].item() for i in node.input[1:])
            latent = (latent.float() - zero) * scale
        logits = F.conv2d(latent, weight, bias).relu().mean((2, 3))
    loss = F.cross_entropy(logits, torch.tensor(targets), reduction="sum")
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for tensor, leaf in leaves.items():
        wanted = leaf.grad.numpy()
        np.testing.assert_allclose(found[f"{tensor}.grad.out"], wanted, rtol=0, atol=2e-5)
        assert found[f"{tensor}.out"].shape == values[tensor].shape
    answered = session(made.model).run(["logits"], {**feeds, **values})[0]
    np.testing.assert_allclose(answered, logits.detach().numpy(), rtol=0, atol=1e-4)


def test_the_same_input_gives_the_same_bytes():
    made = compiled("bert", "lora", "u8"), compiled("bert", "lora", "u8")
    first, second = (step.model.SerializeToString(deterministic=True) for step in made)
    assert first == second


def test_the_models_that_are_given_stay_as_they_are():
    net, request = network("bert"), parse_request("lora")
    before = net.graph.SerializeToString(deterministic=True)
    prepared = prepare(net.graph, request, net.blocks, net.is_target, static=False)
    fused = fuse(prepared).SerializeToString(deterministic=True)
    made = release(fuse(prepared), request, net.blocks)
    model = made.model.SerializeToString(deterministic=True)
    rng = np.random.default_rng(0)
    compile_step(made.model, made.trainable, [net.batches(rng, 2), net.batches(rng, 3)])
    assert net.graph.SerializeToString(deterministic=True) == before
    assert fuse(prepared).SerializeToString(deterministic=True) == fused
    assert made.model.SerializeToString(deterministic=True) == model


# what is refused


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("head", LearnRequest(kind="head")),
        ("last:2", LearnRequest(kind="last", blocks=2)),
        ("bias:1", LearnRequest(kind="bias", blocks=1)),
        ("lora", LearnRequest(kind="lora")),
    ],
)
def test_a_request_is_read_as_it_is_written(text: str, request_: LearnRequest):
    assert parse_request(text) == request_
    assert str(request_) == text


@pytest.mark.parametrize(
    "text", ["", "all", "last", "last:0", "last:-1", "head:2", "lora:x", "Lora", "lora:99999"]
)
def test_an_unknown_request_is_refused(text: str):
    with pytest.raises(ConfigError, match="learn: "):
        parse_request(text)


@pytest.mark.parametrize(
    ("name", "request_", "reason"),
    [
        ("mobilenet", "norm", "nothing that norm could train; its normalisation is part of its"),
        ("bert", "last:3", "this network has 2 blocks, got last:3"),
        ("conv head", "lora", "no layer that LoRA could adapt"),
    ],
)
def test_what_a_network_has_not_cannot_learn(name: str, request_: str, reason: str):
    with pytest.raises(ConfigError, match=reason):
        learnable(name, request_)


def compile_bert(*trainable: str, model: onnx.ModelProto | None = None) -> None:
    rng, net = np.random.default_rng(0), network("bert")
    runs = [net.batches(rng, 2), net.batches(rng, 3)]
    compile_step(model or fuse(net.graph), trainable, runs)


def test_embeddings_cannot_be_trained_and_are_named():
    table = "classifier.network.bert.embeddings.word_embeddings.weight"
    with pytest.raises(EdgetuneError, match=f"so {table} cannot be trained"):
        compile_bert(table)


def test_a_tensor_that_is_not_there_cannot_be_trained():
    with pytest.raises(ConfigError, match="'nowhere' cannot be trained: the graph has no such"):
        compile_bert("nowhere")


def test_a_tensor_that_the_logits_do_not_depend_on_cannot_be_trained():
    model = onnx.ModelProto()
    model.CopyFrom(fuse(network("bert").graph))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "aside"))
    model.graph.node.append(helper.make_node("Neg", ["aside"], ["beside"], name="beside"))
    with pytest.raises(ConfigError, match="'aside' cannot be trained: the logits do not depend"):
        compile_bert("aside", "classifier.output.bias", model=model)


def test_an_operator_without_a_gradient_is_named():
    net = network("conv head")
    made = learnable("conv head", "last:4")
    model = onnx.ModelProto()
    model.CopyFrom(made.model)
    for node in model.graph.node:
        if node.op_type == "MaxPool":
            node.op_type = "LpPool"
            kept = [a for a in node.attribute if a.name in ("kernel_shape", "strides", "ceil_mode")]
            del node.attribute[:]
            node.attribute.extend(kept)
    rng = np.random.default_rng(0)
    runs = [net.batches(rng, 2), net.batches(rng, 3)]
    with pytest.raises(EdgetuneError, match="operator LpPool has no gradient yet"):
        compile_step(model, made.trainable, runs)


def test_a_graph_that_cannot_run_says_so():
    made = learnable("conv head", "head")
    wrong = [{"image": np.zeros((b, 4, PIXELS, PIXELS), np.float32)} for b in (2, 3)]
    with pytest.raises(EdgetuneError, match="cannot be run to learn its shapes"):
        compile_step(made.model, made.trainable, wrong)
