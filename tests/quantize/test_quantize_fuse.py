"""Fused graphs: fewer nodes, the answers of the graph that they were made of."""

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import helper
from torch import nn

from edgetune.config import TrainConfig
from edgetune.export.graph import export_graph
from edgetune.models.families import find_family
from edgetune.models.load import Loaded
from edgetune.models.preprocessing import Preprocess, Preprocessing
from edgetune.quantize.fuse import MICROSOFT, fuse
from edgetune.quantize.layers import copy_model
from edgetune.tasks.graph import logits_of
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.text_classification import TextClassification

Build = Callable[..., onnx.ModelProto]
Run = Callable[..., list[np.ndarray]]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def fused_alike(run: Run, model: onnx.ModelProto, feed: dict[str, Any]) -> onnx.ModelProto:
    """Fuse; the graph is valid, in topological order, and answers as it did to 1e-5."""
    made = fuse(model)
    checked = copy_model(made)
    for value in checked.graph.output:  # the checker wants a shape, of any content
        value.type.tensor_type.shape.SetInParent()
    onnx.checker.check_model(checked)
    # no fusion of onnxruntime's own
    expected, found = run(model, feed, "DISABLE_ALL"), run(made, feed, "DISABLE_ALL")
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    return made


# GELU

SCALINGS = {"Div": ("Div", "x root -> s"), "Mul": ("Mul", "x inverse -> s")}
ORDERS = {
    "x * (0.5 * (1 + erf))": [("Mul", "o half -> h"), ("Mul", "x h -> y")],
    "(x * (1 + erf)) * 0.5": [("Mul", "x o -> h"), ("Mul", "h half -> y")],
    "(0.5 * x) * (1 + erf)": [("Mul", "x half -> h"), ("Mul", "h o -> y")],
}
GELU_CONSTANTS = {
    "root": np.float32(2**0.5), "inverse": np.float32(0.5**0.5), "one": np.float32(1),
    "half": np.float32(0.5),
}  # fmt: skip
GELU_FEED = {"x": np.linspace(-4, 4, 30, dtype=np.float32).reshape(2, 3, 5)}


def gelu_rows(scaling: str, order: str) -> list[tuple[str, str]]:
    return [SCALINGS[scaling], ("Erf", "s -> e"), ("Add", "e one -> o"), *ORDERS[order]]


def swapped(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sums and products with their operands the other way round."""
    found = []
    for op, wires in rows:
        inputs, _, output = wires.partition(" -> ")
        if op in ("Add", "Mul"):
            inputs = " ".join(reversed(inputs.split()))
        found.append((op, f"{inputs} -> {output}"))
    return found


def gelu(build: Build, rows: list, outputs: tuple[str, ...] = ("y",), **constants: Any):
    return build(rows, {**GELU_CONSTANTS, **constants}, {"x": ["a", "b", "c"]}, outputs)


@pytest.mark.parametrize("turn", [list, swapped])
@pytest.mark.parametrize(("scaling", "order"), list(product(SCALINGS, ORDERS)))
def test_gelu_in_any_order_becomes_one_node(build: Build, run: Run, scaling, order, turn):
    made = fused_alike(run, gelu(build, turn(gelu_rows(scaling, order))), GELU_FEED)
    assert [(node.op_type, node.domain) for node in made.graph.node] == [("Gelu", MICROSOFT)]
    assert not made.graph.initializer
    expected = nn.functional.gelu(torch.from_numpy(GELU_FEED["x"])).numpy()
    np.testing.assert_allclose(run(made, GELU_FEED)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "constant", "value"),
    [("Div", "root", 1.5), ("Mul", "inverse", 0.75), ("Div", "one", 1.01), ("Div", "half", 0.51),
     ("Div", "one", [[[[1.0]]]])],  # a fourth dimension, which the answer has too
)  # fmt: skip
@pytest.mark.parametrize("order", ORDERS)
def test_with_a_constant_off_it_is_no_gelu(build: Build, run: Run, order, scaling, constant, value):
    model = gelu(build, gelu_rows(scaling, order), **{constant: np.float32(value)})
    made = fused_alike(run, model, GELU_FEED)
    assert ops(made) == ops(model)


@pytest.mark.parametrize("order", ORDERS)
def test_a_constant_over_x_is_no_gelu(build: Build, run: Run, order):
    rows = [("Div", "root x -> s"), *gelu_rows("Div", order)[1:]]
    model = gelu(build, rows)
    assert ops(fused_alike(run, model, GELU_FEED)) == ops(model)


READ_ELSEWHERE = [(order, name) for order in ORDERS for name in "seoh"]
# it is made of x alone, so that it may stay beside the Gelu
HALF_OF_X = ("(0.5 * x) * (1 + erf)", "h")


@pytest.mark.parametrize(("order", "name"), [pair for pair in READ_ELSEWHERE if pair != HALF_OF_X])
def test_what_is_read_elsewhere_or_given_out_is_not_fused_away(build: Build, run: Run, order, name):
    rows = gelu_rows("Div", order)
    read = gelu(build, [*rows, ("Neg", f"{name} -> z")], ("y", "z"))
    assert ops(fused_alike(run, read, GELU_FEED)) == ops(read)
    given_out = gelu(build, rows, ("y", name))
    assert ops(fused_alike(run, given_out, GELU_FEED)) == ops(given_out)


def test_half_of_x_that_is_read_elsewhere_stays_beside_the_gelu(build: Build, run: Run):
    order, name = HALF_OF_X
    made = fused_alike(run, gelu(build, gelu_rows("Div", order), ("y", name)), GELU_FEED)
    assert ops(made) == {"Gelu": 1, "Mul": 1}


# Reshape


def shape_of(*sizes: int) -> np.ndarray:
    return np.array(sizes, np.int64)


@pytest.mark.parametrize(
    ("shapes", "left"),
    [
        ([(-1, 24), (-1, 2, 12)], 1),
        ([(-1, 24), (6, -1), (-1, 4), (3, -1, 2)], 1),
        ([(0, -1), (-1, 2, 12)], 1),  # the first may copy: it is the second that stays
        ([(-1, 24), (0, 2, 12)], 2),  # a copy of the first's dimension
    ],
)
def test_a_chain_of_reshapes_becomes_its_last(build: Build, run: Run, shapes, left):
    names = ["x", *(f"r{i}" for i in range(len(shapes)))]
    rows = [("Reshape", f"{names[i]} shape{i} -> {names[i + 1]}") for i in range(len(shapes))]
    constants = {f"shape{i}": shape_of(*shape) for i, shape in enumerate(shapes)}
    model = build(rows, constants, {"x": ["a", 6, 4]}, [names[-1]])
    assert ops(fused_alike(run, model, {"x": normal(0, 2, 6, 4)})) == {"Reshape": left}


def test_a_zero_that_a_node_holds_counts_as_a_copy(build: Build, run: Run):
    rows = [
        ("Reshape", "x flat -> r0"), ("Constant", "-> zero", {"value_ints": [0]}),
        ("Concat", "zero rest -> shape", {"axis": 0}), ("Reshape", "r0 shape -> y"),
    ]  # fmt: skip
    constants = {"flat": shape_of(-1, 4), "rest": shape_of(-1)}
    model = build(rows, constants, {"x": ["a", 6, 4]}, ["y"])
    assert ops(fused_alike(run, model, {"x": normal(0, 2, 6, 4)}))["Reshape"] == 2


SIZES = [
    ("Shape", "x -> batch", {"start": 0, "end": 1}),
    ("Shape", "x -> tokens", {"start": 1, "end": 2}),
]
NORM = ("LayerNormalization", "x scale shift -> n")
NORM_CONSTANTS = {"scale": normal(1, 8), "shift": normal(2, 8)}


def reshaped(
    build: Build,
    target: str,
    *between: tuple,
    source: str = "n",
    given: tuple[Any, ...] = ("batch", "tokens", 8),
    outputs: tuple[str, ...] = ("y",),
    **constants: np.ndarray,
) -> onnx.ModelProto:
    """A layer norm, what is between, and a Reshape to the three sizes named in `target`."""
    rows = [
        *SIZES, NORM, *between, ("Concat", f"{target} -> target", {"axis": 0}),
        ("Reshape", f"{source} target -> r"), ("Neg", "r -> y"),
    ]  # fmt: skip
    return build(rows, {**NORM_CONSTANTS, **constants}, {"x": list(given)}, outputs)


@pytest.mark.parametrize("last", [8, -1])
def test_a_reshape_to_the_same_sizes_goes(build: Build, run: Run, last: int):
    model = reshaped(build, "batch tokens last", last=shape_of(last))
    made = fused_alike(run, model, {"x": normal(0, 2, 5, 8)})
    assert ops(made) == {"LayerNormalization": 1, "Neg": 1}


def test_a_reshape_behind_a_feed_forward_goes(build: Build, run: Run):
    between = [
        ("MatMul", "n up -> p"), ("Add", "p bias -> h"), ("Relu", "h -> a"),
        ("MatMul", "a down -> d"), ("Add", "d n -> sum"),
    ]  # fmt: skip
    model = reshaped(
        build, "batch middle last", *between, source="sum", middle=shape_of(-1),
        last=shape_of(8), up=normal(3, 8, 16), bias=normal(4, 16), down=normal(5, 16, 8),
    )  # fmt: skip
    made = fused_alike(run, model, {"x": normal(0, 2, 5, 8)})
    assert ops(made) == {"LayerNormalization": 1, "MatMul": 2, "Add": 2, "Relu": 1, "Neg": 1}


@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        ("batch middle last", {"middle": -1, "last": 4}),  # another last dimension
        ("batch middle last", {"middle": 10, "last": -1}),
        ("first middle last", {"first": 5, "middle": -1, "last": 8}),
        ("first middle last", {"first": -1, "middle": 2, "last": 8}),
        ("tokens middle last", {"middle": -1, "last": 8}),
        ("batch middle last", {"middle": 0, "last": -1}),  # the same, but nothing tells so
    ],
)
def test_a_reshape_to_other_sizes_stays(build: Build, run: Run, target: str, sizes: dict):
    model = reshaped(build, target, **{k: shape_of(v) for k, v in sizes.items()})
    assert ops(fused_alike(run, model, {"x": normal(0, 2, 5, 8)}))["Reshape"] == 1


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 5, 8)])
def test_a_reshape_that_changes_the_number_of_dimensions_stays(build: Build, run: Run, shape):
    given = ("batch", "tokens", "more", 8)[: len(shape) - 1]
    model = reshaped(
        build, "batch middle last", given=(*given, 8), middle=shape_of(-1), last=shape_of(8)
    )
    assert ops(fused_alike(run, model, {"x": normal(0, *shape)}))["Reshape"] == 1


def test_a_reshape_stays_where_a_constant_widens_its_source(build: Build, run: Run):
    for name, shape in (("four", (1, 1, 1, 8)), ("batches", (2, 1, 8))):
        model = reshaped(
            build, "batch middle last", ("Add", f"n {name} -> w"), source="w",
            middle=shape_of(-1), last=shape_of(8), **{name: normal(4, *shape)},
        )  # fmt: skip
        assert ops(fused_alike(run, model, {"x": normal(0, 1, 5, 8)}))["Reshape"] == 1


def test_a_reshape_stays_where_a_split_cuts_tokens(build: Build, run: Run):
    split = ("Split", "n cut -> left right", {"axis": 1})
    model = reshaped(
        build, "batch middle last", split, source="left", cut=shape_of(4, 2),
        middle=shape_of(-1), last=shape_of(4), given=("batch", 6, 8),
    )  # fmt: skip
    assert ops(fused_alike(run, model, {"x": normal(0, 2, 6, 8)}))["Reshape"] == 1


def test_a_reshape_that_is_an_output_stays(build: Build, run: Run):
    model = reshaped(build, "batch tokens last", last=shape_of(8), outputs=("y", "r"))
    assert ops(fused_alike(run, model, {"x": normal(0, 2, 5, 8)}))["Reshape"] == 1


def test_a_reshape_that_goes_reads_nothing_any_more(build: Build, run: Run):
    # between products and their biases: they join as if it had never been there
    between = [("MatMul", "n wq -> pq"), ("MatMul", "n wk -> pk")]
    rows = [
        *SIZES, NORM, *between, ("Concat", "batch tokens last -> target", {"axis": 0}),
        ("Reshape", "pq target -> rq"), ("Add", "rq bq -> q"), ("Add", "pk bk -> k"),
    ]  # fmt: skip
    constants = {
        "wq": normal(3, 8, 8), "wk": normal(4, 8, 8), "bq": normal(5, 8), "bk": normal(6, 8),
        "last": shape_of(8),
    }  # fmt: skip
    model = build(rows, {**NORM_CONSTANTS, **constants}, {"x": ["batch", "tokens", 8]}, ["q", "k"])
    made = fused_alike(run, model, {"x": normal(0, 2, 5, 8)})
    assert ops(made) == {"LayerNormalization": 1, "MatMul": 1, "Add": 1, "Split": 1}


# joint products

HEADS = {"q": 8, "k": 8, "v": 6}
HEAD_ROWS = [
    ("MatMul", "x wq -> pq"), ("Add", "pq bq -> q"),
    ("MatMul", "x wk -> pk"), ("Add", "bk pk -> k"),
    ("MatMul", "x wv -> pv"), ("Add", "pv bv -> v"),
]  # fmt: skip
HEAD_CONSTANTS = {f"w{n}": normal(i, 8, size) for i, (n, size) in enumerate(HEADS.items())} | {
    f"b{n}": normal(i + 9, size) for i, (n, size) in enumerate(HEADS.items())
}
HEAD_FEED = {"x": normal(20, 2, 5, 8)}


def heads(
    build: Build,
    rows: list = HEAD_ROWS,
    outputs: tuple[str, ...] = ("q", "k", "v"),
    *,
    drop: tuple[str, ...] = (),
    inputs: dict | None = None,
    **constants: np.ndarray,
) -> onnx.ModelProto:
    kept = {k: v for k, v in {**HEAD_CONSTANTS, **constants}.items() if k not in drop}
    return build(rows, kept, {"x": ["a", "b", 8], **(inputs or {})}, outputs)


def test_products_of_one_input_are_joined(build: Build, run: Run):
    made = fused_alike(run, heads(build), HEAD_FEED)
    assert [node.op_type for node in made.graph.node] == ["MatMul", "Add", "Split"]
    assert list(made.graph.node[-1].output) == ["q", "k", "v"]
    weight, bias, sizes = (onnx.numpy_helper.to_array(t) for t in made.graph.initializer)
    assert (weight.shape, bias.shape, sizes.tolist()) == ((8, 22), (22,), [8, 8, 6])
    # each is its own product in numpy
    for name, found in zip(HEADS, run(made, HEAD_FEED), strict=True):
        expected = HEAD_FEED["x"] @ HEAD_CONSTANTS[f"w{name}"] + HEAD_CONSTANTS[f"b{name}"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_products_of_several_inputs_are_joined_apart_whatever_their_names(build: Build, run: Run):
    rows = [
        *HEAD_ROWS, ("MatMul", "q wq -> pt"), ("Add", "pt bq -> t"), ("MatMul", "q wk -> pu"),
        ("Add", "pu bk -> u"),
    ]  # fmt: skip
    model = heads(build, rows, ("q", "k", "v", "t", "u"))
    for node in model.graph.node:
        node.name = ""
    made = fused_alike(run, model, HEAD_FEED)
    assert ops(made) == {"MatMul": 2, "Add": 2, "Split": 2}


def test_a_reader_before_the_last_product_still_finds_its_input(build: Build, run: Run):
    # q is read, and what comes of it is read, before k's product
    rows = [*HEAD_ROWS[:2], ("Neg", "q -> z"), ("Relu", "z -> y"), *HEAD_ROWS[2:]]
    made = fused_alike(run, heads(build, rows, ("y", "k", "v")), HEAD_FEED)
    assert [n.op_type for n in made.graph.node] == ["MatMul", "Add", "Split", "Neg", "Relu"]


TWO = HEAD_ROWS[:4]
BIAS_INPUT = {"drop": ("bk",), "inputs": {"bk": [8]}}


@pytest.mark.parametrize(
    ("rows", "outputs", "changes"),
    [
        (TWO, ("q", "k"), BIAS_INPUT),  # a bias that is no constant
        (TWO, ("q", "k"), {"drop": ("wk",), "inputs": {"wk": [8, 8]}}),
        (TWO, ("q", "k"), {"bk": normal(3, 1, 8)}),  # a bias of another shape
        (TWO, ("q", "k"), {"bk": normal(3, 1)}),
        (TWO, ("q", "k"), {"bk": normal(3, 5, 8)}),
        ([*TWO, ("Neg", "pk -> z")], ("q", "k", "z"), {}),  # a second reader of the product
        (TWO, ("q", "k", "pk"), {}),  # the product is given out
        ([*TWO[:3], ("Mul", "bk pk -> k")], ("q", "k"), {}),
        ([*TWO[:2], ("MatMul", "q wk -> pk"), TWO[3]], ("q", "k"), {}),  # of another input
    ],
)  # fmt: skip
def test_products_that_do_not_fit_stay_apart(build: Build, run: Run, rows, outputs, changes):
    model = heads(build, rows, outputs, **changes)
    feed = HEAD_FEED | {k: normal(30, *v) for k, v in changes.get("inputs", {}).items()}
    made = fused_alike(run, model, feed)
    assert ops(made) == ops(model)


# the whole


def test_the_preprocessing_stays_as_it_is(build: Build, run: Run):
    model = gelu(build, gelu_rows("Div", "x * (0.5 * (1 + erf))"))
    joint = heads(build)
    for made in (model, joint):
        for node in made.graph.node:
            node.metadata_props.add(key="edgetune.scope", value="preprocess")
    assert ops(fused_alike(run, model, GELU_FEED)) == ops(model)
    assert ops(fused_alike(run, joint, HEAD_FEED)) == ops(joint)


def test_the_input_stays_and_the_same_graph_gives_the_same_bytes(build: Build):
    rows = [*HEAD_ROWS, *((op, w.replace("x", "v")) for op, w in gelu_rows("Div", HALF_OF_X[0]))]
    model = heads(build, rows, ("q", "k", "y"), **GELU_CONSTANTS)
    before = model.SerializeToString(deterministic=True)
    first, second = fuse(model), fuse(model)
    assert model.SerializeToString(deterministic=True) == before
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )
    assert ops(first) == {"MatMul": 1, "Add": 1, "Split": 1, "Gelu": 1}
    assert fuse(first).SerializeToString(deterministic=True) == first.SerializeToString(
        deterministic=True
    )


def test_microsofts_operators_are_imported_once_and_only_where_needed(build: Build):
    def imports(model: onnx.ModelProto) -> list[str]:
        return sorted(o.domain for o in model.opset_import)

    whole = gelu(build, gelu_rows("Div", "x * (0.5 * (1 + erf))"))
    assert imports(fuse(whole)) == ["", MICROSOFT]
    assert imports(fuse(fuse(whole))) == ["", MICROSOFT]
    whole.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    assert imports(fuse(whole)) == ["", MICROSOFT]
    assert imports(fuse(heads(build))) == [""]


# families

ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
TEXT = {
    "bert": transformers.BertConfig(vocab_size=99, **ENCODER),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64
    ),
    "roberta": transformers.RobertaConfig(vocab_size=99, **ENCODER),
    "electra": transformers.ElectraConfig(vocab_size=99, embedding_size=16, **ENCODER),
}
VIT = transformers.ViTConfig(image_size=32, patch_size=16, **ENCODER)


def random_weights(network: nn.Module) -> nn.Module:
    """As made, weights are so small that attention is even, and biases are zeros."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        mean = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
        parameter.data.normal_(mean, 0.15, generator=generator)
    return network.eval().requires_grad_(False)


def check_family(run: Run, model: onnx.ModelProto, network: nn.Module, cases: list) -> None:
    made = fuse(model)
    onnx.checker.check_model(made)
    # two blocks: q, k and v in one, a Gelu each; no Reshape but those of the attention
    assert ops(made)["Split"] == ops(made)["MultiHeadAttention"] == 2
    assert ops(made)["Gelu"] >= 2
    assert ops(made)["Erf"] == 0
    for feed, inputs in cases:
        expected = logits_of(network(**inputs)).numpy()
        assert expected.std() > 1e-2
        for level in ("DISABLE_ALL", "ENABLE_ALL"):
            np.testing.assert_allclose(run(made, feed, level)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TEXT)
def test_a_text_encoder_answers_as_torch_does(run: Run, tiny_bert: str, name: str):
    from tokenizers import Tokenizer

    made = transformers.AutoModelForSequenceClassification.from_config(TEXT[name])
    network, family = random_weights(made), find_family("transformers", name)
    text = Tokenizer.from_file(f"{tiny_bert}/tokenizer.json").to_str().encode()
    loaded = Loaded(network=network, family=family, tokenizer_json=text, max_tokens=64)
    task = TextClassification(loaded, ("a", "b"), TrainConfig(max_length=16))
    model = export_graph(task.graph(family.output))
    cases = []
    for batch, tokens in ((1, 7), (3, 9)):
        ids = torch.from_numpy(np.random.default_rng(batch).integers(5, 99, (batch, tokens)))
        mask = torch.ones_like(ids)
        mask[-1, 5:] = 0
        # RoBERTa tells padding by its id
        padding = getattr(network.config, "pad_token_id", None) or 0
        ids[-1, 5:] = padding
        inputs = {"input_ids": ids, "attention_mask": mask}
        cases.append(({k: v.numpy() for k, v in inputs.items()}, inputs))
    check_family(run, model, network, cases)
    assert ops(fuse(model))["Reshape"] == 0


def test_an_image_encoder_answers_as_torch_does(run: Run):
    made = transformers.AutoModelForImageClassification.from_config(VIT)
    network, family = random_weights(made), find_family("transformers", "vit")
    spec = Preprocessing(input_size=32, resize_size=32)
    loaded = Loaded(network=network, family=family, preprocessing=spec)
    task = ImageClassification(loaded, ("a", "b"), TrainConfig())
    cases = []
    for batch in (1, 3):
        shape = (batch, 40, 51, 3)
        image = np.random.default_rng(batch).integers(0, 256, shape, dtype=np.uint8)
        cases.append(
            ({"image": image}, {"pixel_values": Preprocess(spec)(torch.from_numpy(image))})
        )
    check_family(run, export_graph(task.graph(family.output)), network, cases)
