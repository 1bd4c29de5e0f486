"""The check of training graphs: a right one passes, every known way of being wrong is refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgetune.errors import EdgetuneError, GateError
from edgetune.export.step_check import StepReport, TrainSpec, check_step

FEATURES, CLASSES = 6, 3
SHAPES = {"head.weight": (FEATURES, CLASSES), "head.bias": (CLASSES,)}
CONSTANTS = {
    "one": 1.0, "beta1": 0.9, "rest1": 0.1, "beta2": 0.999, "rest2": 0.001, "eps": 1e-6,
    "momentum": 0.9,
}  # fmt: skip
# operator, inputs, attributes after a comma, outputs; by hand:
# d CE_i / d logits = softmax - targets, and a linear layer's two gradients
FORWARD = """
MatMul latents head.weight -> product
Add product head.bias -> logits
LogSoftmax logits -> log_probabilities
Mul targets log_probabilities -> agreement
ReduceSum agreement axis_1, keepdims=0 -> likelihood
Neg likelihood -> entropies
Mul sample_weight entropies -> weighted
ReduceSum weighted, keepdims=0 -> loss
Softmax logits -> probabilities
Sub probabilities targets -> excess
Unsqueeze sample_weight axis_1 -> weight_column
Mul weight_column excess -> outer
Transpose latents -> latents_t
MatMul latents_t outer -> head.weight.gradient
ReduceSum outer axis_0, keepdims=0 -> head.bias.gradient
"""
ACCUMULATE = """
Add NAME.grad NAME.gradient -> NAME.grad.out
Div NAME.grad.out weight_sum -> NAME.g
"""
ADAMW = """
Mul beta1 NAME.m -> NAME.m.kept
Mul rest1 NAME.g -> NAME.m.added
Add NAME.m.kept NAME.m.added -> NAME.m.out
Mul NAME.g NAME.g -> NAME.square
Mul beta2 NAME.v -> NAME.v.kept
Mul rest2 NAME.square -> NAME.v.added
Add NAME.v.kept NAME.v.added -> NAME.v.out
Pow beta1 t -> NAME.power1
Sub one NAME.power1 -> NAME.correction1
Div NAME.m.out NAME.correction1 -> NAME.m.hat
Pow beta2 t -> NAME.power2
Sub one NAME.power2 -> NAME.correction2
Div NAME.v.out NAME.correction2 -> NAME.v.hat
Sqrt NAME.v.hat -> NAME.root
Add NAME.root eps -> NAME.denominator
Div NAME.m.hat NAME.denominator -> NAME.direction
Mul lr NAME.direction -> NAME.change
Mul lr weight_decay -> NAME.rate
Mul NAME.rate NAME -> NAME.decay
Sub NAME NAME.decay -> NAME.decayed
Sub NAME.decayed NAME.change -> NAME.out
"""
SGD = """
Mul weight_decay NAME -> NAME.decay
Add NAME.g NAME.decay -> NAME.pull
Mul momentum NAME.m -> NAME.m.kept
Add NAME.m.kept NAME.pull -> NAME.m.out
Mul lr NAME.m.out -> NAME.change
Sub NAME NAME.change -> NAME.out
"""


def train_graph(optimizer: str = "adamw", *mutations: tuple[str, str]) -> onnx.ModelProto:
    """A linear softmax model's step, with lines replaced."""
    text = FORWARD
    for name in SHAPES:
        text += (ACCUMULATE + {"adamw": ADAMW, "sgd": SGD}[optimizer]).replace("NAME", name)
    for old, new in mutations:
        names = list(SHAPES) if "NAME" in old else [""]
        for name in names:
            assert old.replace("NAME", name) in text
            text = text.replace(old.replace("NAME", name), new.replace("NAME", name))
    moments = ("m", "v") if optimizer == "adamw" else ("m",)
    inputs = {"latents": ("n", FEATURES), "targets": ("n", CLASSES), "sample_weight": ("n",)}
    inputs |= dict.fromkeys(("lr", "weight_decay", "t", "weight_sum"), ())
    outputs = {"loss": (), "logits": ("n", CLASSES)}
    for name, shape in SHAPES.items():
        inputs |= {f"{name}{part}": shape for part in ("", ".grad", *(f".{m}" for m in moments))}
        outputs |= {
            f"{name}{part}.out": shape for part in ("", ".grad", *(f".{m}" for m in moments))
        }
    graph = helper.make_graph(
        [node(line) for line in text.splitlines() if line],
        "step",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in inputs.items()],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in outputs.items()],
        [numpy_helper.from_array(np.float32(v), k) for k, v in CONSTANTS.items()]
        + [numpy_helper.from_array(np.array([i], np.int64), f"axis_{i}") for i in (0, 1)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def node(line: str) -> onnx.NodeProto:
    left, _, output = line.partition(" -> ")
    call, _, attributes = left.partition(", ")
    op, *inputs = call.split()
    given = {k: int(v) for k, _, v in (a.partition("=") for a in attributes.split())}
    return helper.make_node(op, inputs, [output], name=output, **given)


def inference_graph() -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    graph = helper.make_graph(
        [node("Gemm latents head.weight head.bias -> logits")],
        "inference",
        [helper.make_tensor_value_info("latents", TensorProto.FLOAT, ("n", FEATURES))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("n", CLASSES))],
        [
            numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
            for name, shape in SHAPES.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def batches(rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    return {"latents": rng.normal(size=(size, FEATURES)).astype(np.float32)}


def check(model: onnx.ModelProto | Path, optimizer: str = "adamw", steps: int = 24) -> StepReport:
    spec = TrainSpec(trainable=tuple(SHAPES), inputs=("latents",), optimizer=optimizer)
    return check_step(model, inference_graph(), spec, batches=batches, steps=steps)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_written_by_hand_passes_far_within_its_tolerances(optimizer: str):
    report = check(train_graph(optimizer), optimizer)
    assert report.steps == 24
    assert 0 < report.worst_loss < 1e-6
    assert 0 < report.worst_gradient < 1e-5
    assert 0 < report.worst_parameter < 1e-4
    assert report.worst_name.startswith(("loss", "logits", "head."))


def test_a_step_is_read_from_a_file(tmp_path: Path):
    path = tmp_path / "train.onnx"
    onnx.save(train_graph(), path)
    assert check(path) == check(train_graph())


def test_the_same_seed_gives_the_same_report():
    assert check(train_graph()) == check(train_graph())


MUTANTS = {
    "gradient times batch size": [
        ("MatMul latents_t outer -> head.weight.gradient",
         "Shape latents -> size\nSlice size axis_0 axis_1 -> count\n"
         "CastLike count one -> factor\nMul outer factor -> outer_n\n"
         "MatMul latents_t outer_n -> head.weight.gradient"),
    ],
    "gradient's sign": [
        ("Sub probabilities targets -> excess", "Sub targets probabilities -> excess"),
    ],
    "one tensor without gradient": [
        ("ReduceSum outer axis_0, keepdims=0 -> head.bias.gradient",
         "Sub head.bias head.bias -> head.bias.gradient"),
    ],
    "gradient of hard targets": [
        ("Sub probabilities targets -> excess",
         "Hardmax targets -> hard\nSub probabilities hard -> excess"),
    ],
    "sample weights ignored by the loss": [
        ("Mul sample_weight entropies -> weighted", "Identity entropies -> weighted"),
    ],
    "sample weights ignored by the gradient": [
        ("Mul weight_column excess -> outer", "Identity excess -> outer"),
    ],
    "mean in place of the sum": [
        ("ReduceSum weighted, keepdims=0 -> loss", "ReduceMean weighted, keepdims=0 -> loss"),
    ],
    "nothing accumulated": [
        ("Add NAME.grad NAME.gradient -> NAME.grad.out", "Identity NAME.gradient -> NAME.grad.out"),
    ],
    "weight sum ignored": [
        ("Div NAME.grad.out weight_sum -> NAME.g", "Identity NAME.grad.out -> NAME.g"),
    ],
    "only the last micro-batch": [
        ("Div NAME.grad.out weight_sum -> NAME.g", "Div NAME.gradient weight_sum -> NAME.g"),
    ],
    "eps dropped": [
        ("Add NAME.root eps -> NAME.denominator", "Identity NAME.root -> NAME.denominator"),
    ],
    "eps inside the root": [
        ("Sqrt NAME.v.hat -> NAME.root\nAdd NAME.root eps -> NAME.denominator",
         "Add NAME.v.hat eps -> NAME.root\nSqrt NAME.root -> NAME.denominator"),
    ],
    "moments swapped": [
        ("Mul beta1 NAME.m -> NAME.m.kept", "Mul beta1 NAME.v -> NAME.m.kept"),
        ("Mul beta2 NAME.v -> NAME.v.kept", "Mul beta2 NAME.m -> NAME.v.kept"),
    ],
    "v aliased to m": [("Mul beta2 NAME.v -> NAME.v.kept", "Mul beta2 NAME.m -> NAME.v.kept")],
    "m aliased to the gradient": [
        ("Mul beta1 NAME.m -> NAME.m.kept", "Mul beta1 NAME.grad -> NAME.m.kept"),
    ],
    "moments given out swapped": [
        ("-> NAME.m.out", "-> NAME.m.new"), ("-> NAME.v.out", "-> NAME.v.new"),
        ("Div NAME.m.out ", "Identity NAME.v.new -> NAME.m.out\nDiv NAME.m.new "),
        ("Div NAME.v.out ", "Identity NAME.m.new -> NAME.v.out\nDiv NAME.v.new "),
    ],
    "weight decay coupled": [
        ("Div NAME.grad.out weight_sum -> NAME.g",
         "Div NAME.grad.out weight_sum -> NAME.g0\nMul weight_decay NAME -> NAME.pull\n"
         "Add NAME.g0 NAME.pull -> NAME.g"),
        ("Sub NAME NAME.decay -> NAME.decayed", "Identity NAME -> NAME.decayed"),
    ],
    "weight decay without lr": [
        ("Mul lr weight_decay -> NAME.rate", "Identity weight_decay -> NAME.rate"),
    ],
    "no weight decay": [("Sub NAME NAME.decay -> NAME.decayed", "Identity NAME -> NAME.decayed")],
    "no bias correction": [
        ("Div NAME.m.out NAME.correction1 -> NAME.m.hat", "Identity NAME.m.out -> NAME.m.hat"),
        ("Div NAME.v.out NAME.correction2 -> NAME.v.hat", "Identity NAME.v.out -> NAME.v.hat"),
    ],
    "no bias correction of v": [
        ("Div NAME.v.out NAME.correction2 -> NAME.v.hat", "Identity NAME.v.out -> NAME.v.hat"),
    ],
    "steps counted from 0": [
        ("Pow beta1 t -> NAME.power1", "Sub t one -> NAME.t0\nPow beta1 NAME.t0 -> NAME.power1"),
    ],
    "not a number where there is no gradient": [
        ("Div NAME.grad.out weight_sum -> NAME.g",
         "Div NAME.grad.out weight_sum -> NAME.g0\nMul NAME.g0 NAME.g0 -> NAME.g1\n"
         "Div NAME.g1 NAME.g0 -> NAME.g"),
    ],
    "lr ignored": [
        ("Mul lr NAME.direction -> NAME.change", "Mul rest2 NAME.direction -> NAME.change"),
    ],
}  # fmt: skip
SGD_MUTANTS = {
    "dampened": [
        ("Add NAME.m.kept NAME.pull -> NAME.m.out",
         "Mul rest1 NAME.pull -> NAME.part\nAdd NAME.m.kept NAME.part -> NAME.m.out"),
    ],
    "weight decay decoupled": [
        ("Add NAME.g NAME.decay -> NAME.pull", "Identity NAME.g -> NAME.pull"),
        ("Sub NAME NAME.change -> NAME.out",
         "Mul lr NAME.decay -> NAME.shrink\nSub NAME NAME.shrink -> NAME.shrunk\n"
         "Sub NAME.shrunk NAME.change -> NAME.out"),
    ],
    "no momentum": [("Mul lr NAME.m.out -> NAME.change", "Mul lr NAME.pull -> NAME.change")],
    "lr inside the momentum": [
        ("Add NAME.m.kept NAME.pull -> NAME.m.out",
         "Mul lr NAME.pull -> NAME.part\nAdd NAME.m.kept NAME.part -> NAME.m.out"),
        ("Mul lr NAME.m.out -> NAME.change", "Identity NAME.m.out -> NAME.change"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_step_is_refused(mutant: str):
    with pytest.raises(GateError, match="deviates from torch"):
        check(train_graph("adamw", *MUTANTS[mutant]))


@pytest.mark.parametrize("mutant", SGD_MUTANTS)
def test_a_wrong_step_of_sgd_is_refused(mutant: str):
    with pytest.raises(GateError, match="deviates from torch"):
        check(train_graph("sgd", *SGD_MUTANTS[mutant]), "sgd")


def test_the_deviation_of_a_wrong_step_names_tensor_and_step():
    with pytest.raises(GateError, match=r"^step 1 \(random state, soft targets\): loss deviates"):
        check(train_graph("adamw", *MUTANTS["mean in place of the sum"]))
    with pytest.raises(GateError, match=r"head\.weight\.grad\.out deviates"):
        check(train_graph("adamw", *MUTANTS["gradient times batch size"]))
    with pytest.raises(GateError, match=r"head\.weight\.m\.out deviates"):
        check(train_graph("adamw", *MUTANTS["m aliased to the gradient"]))
    with pytest.raises(GateError, match=r"^step 4 \(no gradient\): .* by nan of its scale"):
        check(train_graph("adamw", *MUTANTS["not a number where there is no gradient"]))
    with pytest.raises(
        GateError, match=r"^step 6 \(gradients as small as eps\): head\.weight\.out"
    ):
        check(train_graph("adamw", *MUTANTS["eps dropped"]))


def test_a_loss_of_another_shape_is_refused():
    mutation = (
        "ReduceSum weighted, keepdims=0 -> loss",
        "ReduceSum weighted, keepdims=1 -> loss",
    )
    model = train_graph("adamw", mutation)
    model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 1
    with pytest.raises(GateError, match=r"loss is of shape \(1,\), expected \(\)"):
        check(model)


def test_a_graph_without_an_output_of_the_contract_is_refused():
    model = train_graph()
    (place,) = (i for i, o in enumerate(model.graph.output) if o.name == "head.bias.v.out")
    del model.graph.output[place]
    with pytest.raises(GateError, match=r"lacks the outputs head\.bias\.v\.out"):
        check(model)


def test_a_graph_that_onnxruntime_refuses_is_refused():
    with pytest.raises(GateError, match="onnxruntime cannot open"):
        check(train_graph("adamw", ("Neg likelihood", "NoSuchOperator likelihood")))


def with_hidden_layer() -> onnx.ModelProto:
    """The inference graph with a layer before the one that is trained."""
    model = inference_graph()
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(FEATURES, FEATURES)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(hidden, "hidden.weight"))
    model.graph.input[0].name = "x"
    nodes = [node("MatMul x hidden.weight -> product"), node("Tanh product -> latents")]
    nodes += model.graph.node
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def raw_batches(rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    return {"x": batches(rng, size)["latents"]}


def test_latents_are_made_of_the_inference_graphs_own_inputs():
    spec = TrainSpec(trainable=tuple(SHAPES), inputs=("latents",), optimizer="adamw")
    report = check_step(train_graph(), with_hidden_layer(), spec, batches=raw_batches)
    assert report.worst_gradient < 1e-5


def test_a_graph_that_begins_above_what_it_trains_is_refused():
    model = with_hidden_layer()
    (head,) = (n for n in model.graph.node if n.op_type == "Gemm")
    head.input[2] = "total"
    # latents now depend on the bias too, and the training graph doesn't know
    model.graph.node[0].input[0] = "moved"
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "axis_0"))
    early = [
        node("ReduceSum head.bias axis_0 -> sum"), node("Add x sum -> moved"),
        node("Identity head.bias -> total"),
    ]  # fmt: skip
    nodes = [*early, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    spec = TrainSpec(trainable=tuple(SHAPES), inputs=("latents",), optimizer="adamw")
    with pytest.raises(GateError, match="deviates from torch"):
        check_step(train_graph(), model, spec, batches=raw_batches)


UNDECAYED = {
    "adamw": ("Sub head.bias head.bias.decay -> head.bias.decayed",
              "Identity head.bias -> head.bias.decayed"),
    "sgd": ("Add head.bias.g head.bias.decay -> head.bias.pull",
            "Identity head.bias.g -> head.bias.pull"),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", UNDECAYED)
def test_weight_decay_of_some_tensors_only_is_checked_as_such(optimizer):
    model = train_graph(optimizer, UNDECAYED[optimizer])
    spec = TrainSpec(
        trainable=tuple(SHAPES),
        inputs=("latents",),
        optimizer=optimizer,
        decayed=("head.weight",),
    )
    check_step(model, inference_graph(), spec, batches=batches)
    with pytest.raises(GateError, match=r"head\.bias"):
        check(model, optimizer)


def test_logits_are_compared_where_they_are_given():
    wrong = train_graph("adamw")
    wrong.graph.node.append(helper.make_node("Identity", ["log_probabilities"], ["logits_wrong"]))
    for n in wrong.graph.node:
        n.output[:] = ["hidden_logits" if o == "logits" else o for o in n.output]
        n.output[:] = ["logits" if o == "logits_wrong" else o for o in n.output]
        n.input[:] = ["hidden_logits" if i == "logits" else i for i in n.input]
    with pytest.raises(GateError, match="logits deviates"):
        check(wrong)
    del wrong.graph.output[1]
    check(wrong)


def test_too_few_steps_are_no_check():
    with pytest.raises(EdgetuneError, match="at least 20 steps"):
        check(train_graph(), steps=19)


def test_the_hand_written_step_is_a_step_of_torch_optim():
    """The passing graph against torch without check_step between: one step by their own code."""
    import edgetune.runtime.ort  # noqa: F401  its telemetry is off first

    import onnxruntime  # isort: skip

    rng = np.random.default_rng(0)
    layer = torch.nn.Linear(FEATURES, CLASSES)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, eps=1e-6, weight_decay=0.1)
    feeds = {
        **batches(rng, 5),
        "targets": np.eye(CLASSES, dtype=np.float32)[[0, 2, 1, 1, 0]],
        "sample_weight": np.ones(5, np.float32), "lr": np.array(0.01, np.float32),
        "weight_decay": np.array(0.1, np.float32), "t": np.array(1, np.float32),
        "weight_sum": np.array(5, np.float32),
        "head.weight": layer.weight.detach().numpy().T.copy(),
        "head.bias": layer.bias.detach().numpy().copy(),
    }  # fmt: skip
    for name, shape in SHAPES.items():
        feeds |= {f"{name}.{part}": np.zeros(shape, np.float32) for part in ("grad", "m", "v")}
    session = onnxruntime.InferenceSession(
        train_graph().SerializeToString(), providers=["CPUExecutionProvider"]
    )
    loss, weight, bias = session.run(["loss", "head.weight.out", "head.bias.out"], feeds)
    labels = torch.tensor([0, 2, 1, 1, 0])
    expected = torch.nn.functional.cross_entropy(layer(torch.tensor(feeds["latents"])), labels)
    expected.backward()
    optimizer.step()
    np.testing.assert_allclose(loss / 5, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(weight, layer.weight.detach().numpy().T, rtol=0, atol=1e-6)
    np.testing.assert_allclose(bias, layer.bias.detach().numpy(), rtol=0, atol=1e-6)
