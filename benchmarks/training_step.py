r"""One training step on the CPU, side by side: time and memory of the ways that a device has.

    python benchmarks/training_step.py --ort-training VENV \
    python benchmarks/training_step.py --prepare FOLDER       what bundles are to be made of
    python benchmarks/training_step.py --quick --only text    does it work

torch eager, onnxruntime-training 1.19.2 (the last release of the on-device training API), a step
traced by torch and exported, and edgetune's train.onnx do the same step: the same weights, the same
trainable tensors, the same batch, loss and AdamW. Each lives in a process of its own; they take
turns step by step. Without --edgetune-* that contender is left out. Progress goes to stderr,
Markdown to stdout.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# nothing here is fetched: the models are local
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import _training_peers as peers
from _common import (
    last_line,
    print_heading,
    print_table,
    quit_unable,
    say,
    text_model,
    warn_if_busy,
    workplace,
)

PEERS = Path(peers.__file__)
# onnxruntime-training reads IR 10 and opset 21 at most, which newer onnx would write beyond
ORT_TRAINING = ("onnxruntime-training==1.19.2", "onnx==1.17.0", "protobuf<6", "setuptools")
TORCH = "torch eager"
BATCH, TOKENS, CAMERA, PIXELS = 8, 32, 256, 224
CLASSES = {"text": 4, "image": 10}
TRAINED_BLOCKS = ("features.11.", "features.12.", "classifier.")
# (which step, how far losses may lie from torch's, relative)
AGREE = ((1, 1e-4), (5, 1e-3))
# the same of a frozen part in int8, which answers a little otherwise
INT8_AGREE = 0.1
# agreement says something only where the loss has moved by so much, relative
MOVED = 0.01
PAUSE_S = 0.02
TEXT = f"""\
One training step (forward, backward, AdamW) of {BATCH} samples on the CPU, float32. *text*: MiniLM
(22 M parameters) as a classifier of {CLASSES["text"]}, LoRA of rank {peers.LORA["r"]} on every
layer's query and value and the last layer trained, {TOKENS} tokens. *image*: torchvision's
MobileNetV3-small at {PIXELS} px, {CLASSES["image"]} classes, the convolutions of features.11 and
features.12 and the classifier trained. All else is frozen, BatchNorm too; dropout is off. Every
contender starts from the same weights and gets the same batch; their losses are compared at steps 1
and 5 before anything is timed.

- *torch eager*: `loss.backward()` and fused AdamW, `zero_grad(set_to_none=True)`, gradients only of
  what trains, scaled-dot-product attention.
- *onnxruntime-training*: the on-device API of 1.19.2 (its last release), the artifacts made offline
  from a graph whose frozen part was folded; imported without the parts that need torch.
- *plain road*: `torch.func` + `make_fx` + `torch.onnx.export` of the whole step, run by stock
  onnxruntime; the state stays in OrtValues.
- *edgetune*: train.onnx beside model.onnx, run by stock onnxruntime; the frozen part in fp32, or in
  int8 as it would ship (then the gradient that goes back through it is int8 too). *kept*: what the
  frozen part hands over is kept from an earlier epoch, as the device's trainer does; else it is
  computed in each step.

*ms* is the median over steps that take turns (quartiles in brackets). Memory is resident MiB:
*peak* is of the whole process, interpreter and imports included; *above import* leaves out what was
resident right before the model was built; *peak of steps* leaves out building (for graphs: reading
and optimizing the file)."""


def main() -> None:
    """Prepare the cases, check that the contenders agree, measure and print a table each."""
    given = _arguments()
    wanted = [given.only] if given.only else list(CLASSES)
    folder = given.prepare or given.keep
    with workplace(folder, may_exist=True) as place:
        for kind in wanted:
            prepare_case(kind, place / kind, batchnorm=given.batchnorm)
        if given.prepare:
            say(f"prepared: {place}")
            return
        left_out: list[str] = []
        python, reason = None, "not asked for"
        if "onnxruntime-training" in given.contenders:
            python, reason = _training_python(given.ort_training, place)
        if python is None:
            left_out.append(f"onnxruntime-training is left out: {reason}")
        warn_if_busy()
        print_heading("One training step, against torch and onnxruntime-training", TEXT)
        if python is not None:
            print(f"- onnxruntime-training's Python: {_versions_of(python)}")
        tables = []
        for kind in wanted:
            sides = _sides(kind, place / kind, python, given.contenders, left_out)
            for threads in given.threads:
                say(f"{kind}, {threads} threads: {', '.join(sides)}")
                measured = measure(
                    sides, threads=threads, spin=given.spin, rounds=given.rounds, warm=given.warm_up
                )
                tables.append((kind, threads, measured))
        print(f"- {given.rounds} steps of each; spinning threads in onnxruntime: {given.spin}")
        print(f"- BatchNorm of the image case: {given.batchnorm}")
        print("".join(f"- {line}\n" for line in left_out))
        for kind, threads, measured in tables:
            print(f"{kind}, {threads} thread{'s' * (threads > 1)}:\n")
            _print_measured(measured)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=CLASSES, help="one case instead of both")
    parser.add_argument(
        "--contenders", nargs="+", choices=peers.CONTENDERS, default=list(peers.CONTENDERS),
        help="these only [all]",
    )  # fmt: skip
    parser.add_argument("--ort-training", type=Path, metavar="VENV", help="[made with uv]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="[1 2]")
    parser.add_argument("--spin", type=int, choices=(0, 1), default=0, help="onnxruntime's [0]")
    parser.add_argument("--batchnorm", choices=("kept", "folded"), default="kept",
        help="the image case's: kept as it is, or folded into the convolutions for all [kept]",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=40, help="steps of each contender [40]")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before, at least 5 [5]")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what is prepared")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="prepare, measure nothing")
    parser.add_argument("--quick", action="store_true", help="2 steps; no usable figures")
    given = parser.parse_args()
    given.warm_up = max(given.warm_up, AGREE[-1][0])
    if given.quick:
        given.rounds = 2
    return given


# -- what is prepared ----------------------------------------------------------------------


def prepare_case(kind: str, folder: Path, *, batchnorm: str) -> None:
    """Write what the contenders read: `case.json`, `data.npz` and the two graphs.

    A bundle of the same frozen weights comes of `edgetune train` on the text model, and with
    `--model torchvision:mobilenet_v3_small --weights mobilenet_v3_small.safetensors` on the image
    one; the trainable tensors' values are in `data.npz` by torch's names. A folder that has all of
    them already is left as it is.
    """
    done = folder / "prepared"
    if done.exists() and done.read_text() == batchnorm:
        return
    say(f"{kind}: prepare weights, batch and graphs")
    folder.mkdir(parents=True, exist_ok=True)
    # what was made of other weights; no more, for the folder is the user's
    done.unlink(missing_ok=True)
    shutil.rmtree(folder / "ort-training", ignore_errors=True)
    import numpy as np
    import torch

    torch.manual_seed(0)
    make = {"text": _text_case, "image": _image_case}[kind]
    case, network, batch = make(folder, batchnorm)
    trainable = {
        name: parameter.detach().numpy().copy()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    labels = np.arange(BATCH) % CLASSES[kind]
    targets = np.eye(CLASSES[kind], dtype=np.float32)[labels]
    np.savez(folder / "data.npz", labels=labels, targets=targets, **batch, **trainable)
    case |= {"kind": kind, "classes": CLASSES[kind], "trainable": list(trainable)}
    (folder / "case.json").write_text(json.dumps(case, indent=2))
    export_forward(case, folder)
    export_step(case, folder)
    export_edgetune(case, folder)
    done.write_text(batchnorm)


# what a case is: its part of case.json, the torch model, the batch's arrays
_Case = tuple[dict[str, Any], Any, dict[str, Any]]


def _text_case(folder: Path, batchnorm: str) -> _Case:  # noqa: ARG001
    import numpy as np
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForSequenceClassification

    model = text_model()
    network: Any = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=CLASSES["text"]
    )
    inject_adapter_in_model(LoraConfig(**peers.LORA), network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("classifier."))
        if "lora_B" in name:  # zeros at the start would leave lora_A without a gradient
            torch.nn.init.normal_(parameter, std=0.02)
    rng = np.random.default_rng(0)
    lengths = np.linspace(TOKENS // 4, TOKENS, BATCH).astype(int)
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(1000, 20000, (BATCH, TOKENS)) * mask
    case = {"model": model, "inputs": ["input_ids", "attention_mask"]}
    return case, network, {"input_ids": ids, "attention_mask": mask}


def _image_case(folder: Path, batchnorm: str) -> _Case:
    import numpy as np
    import torch
    import torchvision
    from safetensors.torch import save_file

    network = torchvision.models.mobilenet_v3_small(num_classes=CLASSES["image"])
    rng = np.random.default_rng(0)
    # coarse patterns: noise would look the same to the network in every sample
    coarse = rng.integers(0, 256, (BATCH, 8, 8, 3), dtype=np.uint8)
    image = coarse.repeat(CAMERA // 8, axis=1).repeat(CAMERA // 8, axis=2)
    edge = (CAMERA - PIXELS) // 2
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    scaled = (image[:, edge:-edge, edge:-edge].astype(np.float32) / 255 - mean) / std
    pixels = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
    for layer in network.classifier:
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()  # torchvision's own beginning gives logits near 0
    norms = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    # random weights pass little on; the batch's own statistics make the activations a network's
    momentum = {name: norm.momentum for name, norm in norms.items()}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches seen: of one, its own
    network.train()
    with torch.no_grad():
        network(torch.from_numpy(pixels))
    network.eval()
    for name, norm in norms.items():
        norm.momentum = momentum[name]
    # torchvision's own shape of the last layer, which edgetune puts a fresh one in place of
    last = {"classifier.3.weight": torch.zeros(1000, 1024), "classifier.3.bias": torch.zeros(1000)}
    save_file({**network.state_dict(), **last}, folder / "mobilenet_v3_small.safetensors")
    if batchnorm == "folded":
        peers.fold_batchnorm(network)
    save_file(network.state_dict(), folder / "frozen.safetensors")
    for name, parameter in network.named_parameters():
        owner = name.rpartition(".")[0]
        parameter.requires_grad_(name.startswith(TRAINED_BLOCKS) and owner not in norms)
    case = {"batchnorm": batchnorm, "inputs": ["pixels"]}
    return case, network, {"image": image, "pixels": pixels}


def export_forward(case: Mapping[str, Any], folder: Path) -> None:
    """Write `forward.onnx` for onnxruntime-training: batch -> logits.

    While it is exported and folded, the trainable tensors are inputs, so that they keep their
    names and all that is frozen is folded around them: at 1.19.2 nothing else would do it.
    """
    import onnx
    import torch
    from torch.func import functional_call

    from edgetune.runtime.ort import onnxruntime as ort

    network = peers.network_of(dict(case), folder, attention="eager").requires_grad_(False)
    arrays = peers.arrays_of(folder, *case["inputs"], *case["trainable"])
    tensors = [torch.from_numpy(array) for array in arrays.values()]
    inputs = len(case["inputs"])

    class Forward(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *flat: Any) -> Any:
            weights = dict(zip(case["trainable"], flat[inputs:], strict=True))
            return _logits(functional_call(self.network, weights, flat[:inputs]))

    program = torch.onnx.export(
        Forward().eval(),
        tuple(tensors),
        input_names=list(arrays),
        output_names=["logits"],
        dynamo=True,
        opset_version=18,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    del model.graph.value_info[:]
    _use_differentiable_operators(model, case["trainable"])
    options = ort.SessionOptions()
    # standard operators only, which the older onnxruntime knows
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "folded.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    model = onnx.load(folder / "folded.onnx")
    (folder / "folded.onnx").unlink()
    batch = [value for value in model.graph.input if value.name in case["inputs"]]
    del model.graph.input[:]
    model.graph.input.extend(batch)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(arrays[name], name) for name in case["trainable"]
    )
    used = {node.domain for node in model.graph.node}
    for entry in [entry for entry in model.opset_import if entry.domain not in used | {""}]:
        model.opset_import.remove(entry)
    model.ir_version = 8
    onnx.save(model, folder / "forward.onnx")


def export_edgetune(case: Mapping[str, Any], folder: Path) -> None:
    """Write edgetune's graphs: `edgetune-fp32` and `edgetune-int8`, each with both graphs."""
    import numpy as np
    import torch
    from onnx import numpy_helper

    from edgetune.autodiff.learnable import parse_request
    from edgetune.export.graph import export_graph, save_graphs
    from edgetune.export.learning import LearnPlan, compile_learning
    from edgetune.models.families import blocks, find_family
    from edgetune.quantize.dynamic import quantize_dynamic
    from edgetune.quantize.embeddings import quantize_embeddings
    from edgetune.quantize.fuse import fuse
    from edgetune.quantize.qdq import quantize_static
    from edgetune.tasks import GraphSpec
    from edgetune.tasks.graph import SplitClassifier

    text = case["kind"] == "text"
    network = peers.network_of(dict(case), folder)
    values = peers.arrays_of(folder, *case["trainable"], *case["inputs"])
    family = find_family(
        *(("transformers", "bert") if text else ("torchvision", "mobilenet_v3_small"))
    )
    if text:  # edgetune puts LoRA into the graph itself
        from edgetune.models.adapt import merge_adapters

        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        merge_adapters(network)

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = SplitClassifier(network, family.output)

        def forward(self, **given: Any) -> Any:
            return self.classifier(**({"x": given["image"]} if "image" in given else given))

    names = ["input_ids", "attention_mask"] if text else ["image"]
    inputs = {
        n: torch.from_numpy(values[c][:2]) for n, c in zip(names, case["inputs"], strict=True)
    }
    free = {0: "batch", 1: "tokens"} if text else {0: "batch"}
    spec = GraphSpec(module=Graph(), inputs=inputs, free=dict.fromkeys(names, free))
    plan = LearnPlan(
        request=parse_request("lora" if text else "last:2"), optimizer="adamw", family=family,
        blocks=tuple(name for name, _ in blocks(network, family)),
    )  # fmt: skip
    source = fuse(plan.prepared(export_graph(spec)))
    if text:
        quantized = quantize_embeddings(quantize_dynamic(source, codes="s8"))
    else:
        feeds = [{"image": values["pixels"][i : i + 1]} for i in range(BATCH)]
        quantized = quantize_static(source, feeds)
    for precision, model in (("fp32", source), ("int8", quantized)):
        compiled = compile_learning(plan, model)
        own = folder / f"edgetune-{precision}"
        own.mkdir(exist_ok=True)
        save_graphs({"model.onnx": compiled.model, "train.onnx": compiled.step.model}, own)
        defaults = {t.name: numpy_helper.to_array(t) for t in compiled.model.graph.initializer}
        begin = {name: defaults[name] for name in compiled.step.trainable}
        for name in begin if text else ():
            begin[name] = _from_peft(name, begin[name], values)
        np.savez(own / "trainable.npz", **begin)
        latents = [value.name for value in compiled.step.latents]
        (own / "latents.json").write_text(json.dumps(latents))


def _from_peft(name: str, default: Any, values: Mapping[str, Any]) -> Any:
    """Return peft's value of a LoRA factor; edgetune's product is x A B, peft's B A x."""
    for factor in ("a", "b"):
        if name.endswith(f".lora_{factor}.weight"):
            path = name.removeprefix("learn.").removesuffix(f".lora_{factor}.weight")
            return values[f"{path}.lora_{factor.upper()}.default.weight"].T.copy()
    return default


def _use_differentiable_operators(model: Any, trainable: Sequence[str]) -> None:
    """Rewrite, in place, what onnxruntime-training has no gradient for below a trained tensor.

    hardsigmoid(x) = clip(x / 6 + 1/2, 0, 1) = 1 - relu(1 - relu(x / 6 + 1/2)); hardswish is x times
    that; a frozen BatchNorm is a product and a sum. LayerNormalization's gradient reads its
    optional outputs.
    """
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in inferred}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    reached, nodes = set(trainable), []

    def constant(name: str, value: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def write(op: str, name: str, *inputs: str) -> str:
        nodes.append(helper.make_node(op, inputs, [name], name=name))
        return name

    for node in graph.node:
        if reached.isdisjoint(node.input):
            nodes.append(node)
            continue
        reached.update(node.output)
        x, (out, *_) = node.input[0], node.output
        if node.op_type == "LayerNormalization":
            node.output[1:] = [f"{out}_mean", f"{out}_deviation"]
            nodes.append(node)
        elif node.op_type == "BatchNormalization":
            scale, shift, mean, variance = (constants[name] for name in node.input[1:])
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            factor = (scale / np.sqrt(variance + epsilon))[:, None, None]
            shift = shift[:, None, None] - mean[:, None, None] * factor
            scaled = write("Mul", f"{out}_scaled", x, constant(f"{out}_factor", factor))
            write("Add", out, scaled, constant(f"{out}_shift", shift))
        elif node.op_type in ("HardSwish", "HardSigmoid"):
            given = {a.name: a.f for a in node.attribute}
            slope = 1 / 6 if node.op_type == "HardSwish" else given.get("alpha", 0.2)
            half = given.get("beta", 0.5)
            # of x's rank: onnxruntime goes one by one through (N, C, 1, 1) with a plain number
            slope, half, one = (
                constant(f"{out}_{name}", np.full([1] * ranks[x], value))
                for name, value in (("slope", slope), ("half", half), ("one", 1))
            )
            y = write("Mul", f"{out}_sloped", x, slope)
            y = write("Add", f"{out}_line", y, half)
            y = write("Sub", f"{out}_rest", one, write("Relu", f"{out}_above", y))
            y = write("Relu", f"{out}_below", y)
            last = out if node.op_type == "HardSigmoid" else f"{out}_gate"
            write("Sub", last, one, y)
            if last != out:
                write("Mul", out, x, last)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def export_step(case: Mapping[str, Any], folder: Path) -> None:
    """Write `plain.onnx`, as torch traces it: batch, targets, numbers, state -> loss, state."""
    import torch
    from torch.func import functional_call, grad_and_value
    from torch.fx.experimental.proxy_tensor import make_fx

    network = peers.network_of(dict(case), folder, attention="eager").requires_grad_(False)
    arrays = peers.arrays_of(folder, *case["inputs"], "targets")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    batch = tuple(tensors[name] for name in case["inputs"])
    # transformers' masks branch on values: export fixes the branches, then the trace can go on
    exported = torch.export.export(network, batch).module()
    names = case["trainable"]
    values = dict(exported.named_parameters())
    trained = {name: values[name].detach().clone() for name in names}

    def loss_of(weights: dict[str, Any], targets: Any, inputs: tuple[Any, ...]) -> Any:
        logits = _logits(functional_call(exported, weights, inputs))
        # not cross_entropy: its translation to ONNX gets the mean's gradient wrong
        return -(targets * torch.log_softmax(logits, -1)).sum() / BATCH

    def step(*flat: Any) -> tuple[Any, ...]:
        inputs, rest = flat[: len(batch)], flat[len(batch) :]
        targets, lr, decay, eps, t, *state = rest
        third = len(names)
        old = [state[i * third : (i + 1) * third] for i in range(3)]
        gradients, loss = grad_and_value(loss_of)(
            dict(zip(names, old[0], strict=True)), targets, inputs
        )
        new = [
            _adamw(w, gradients[name], m, v, lr, decay, eps, t)
            for name, w, m, v in zip(names, *old, strict=True)
        ]
        return (loss, *(part for kind in zip(*new, strict=True) for part in kind))

    # eps is an input: as a constant, the exporter's optimizer takes x + 1e-8 for x
    numbers = [torch.tensor(x) for x in (peers.LR, peers.WEIGHT_DECAY, peers.EPS, 1.0)]
    # distinct values: inputs that share memory would become one
    moments = [torch.full_like(w, 0.1 * k) for k in (1, 2) for w in trained.values()]
    arguments = (*batch, tensors["targets"], *numbers, *trained.values(), *moments)
    table = dict(torch.export.default_decompositions())
    table[torch.ops.aten.convolution_backward.default] = _convolution_backward
    traced = make_fx(step, decomposition_table=table)(*arguments).eval()
    state = [f"{name}{s}" for s in ("", ".m", ".v") for name in case["trainable"]]
    program = torch.onnx.export(
        traced,
        arguments,
        input_names=[*case["inputs"], "targets", "lr", "weight_decay", "eps", "t", *state],
        output_names=["loss", *(f"{name}.out" for name in state)],
        dynamo=True,
        opset_version=18,
        verbose=False,
    )
    assert program is not None
    program.save(folder / "plain.onnx")


def _adamw(w: Any, g: Any, m: Any, v: Any, lr: Any, decay: Any, eps: Any, t: Any) -> list[Any]:
    """Return weight and moments after a step (Loshchilov and Hutter 2019, algorithm 2)."""
    shape = w.shape
    # flat: onnxruntime multiplies a (576, 96, 1, 1) tensor with a number one element at a time
    w, g, m, v = (x.flatten() for x in (w, g, m, v))
    beta1, beta2 = peers.BETAS
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    unbiased = (v / (1 - beta2**t)).sqrt()
    w = w * (1 - lr * decay) - lr * (m / (1 - beta1**t)) / (unbiased + eps)
    return [x.reshape(shape) for x in (w, m, v)]


def _convolution_backward(
    gradient: Any,
    x: Any,
    weight: Any,
    bias_sizes: Any,  # noqa: ARG001
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Any,  # noqa: ARG001
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Any, Any, Any]:
    """Write the gradients of a 2-D convolution as convolutions, which ONNX has.

    gradient (N, O, H', W'), x (N, C, H, W), weight (O, C / groups, h, w).
    """
    from torch.nn.functional import conv2d, conv_transpose2d

    assert not transposed
    of_x = of_weight = of_bias = None
    channels = x.shape[1]
    if wanted[0]:
        # rows and columns at the end that no window reached
        unreached = [
            (x.shape[a + 2] + 2 * padding[a] - dilation[a] * (weight.shape[a + 2] - 1) - 1)
            % stride[a]
            for a in (0, 1)
        ]
        of_x = conv_transpose2d(
            gradient, weight, None, stride, padding, unreached, groups, dilation
        )
    if wanted[1]:
        # correlate over the batch: it takes the channels' place; a group's samples lie together
        # grouped: (C / groups, groups, N, H, W)
        grouped = x.unflatten(1, (groups, channels // groups)).permute(2, 1, 0, 3, 4)
        of_weight = conv2d(
            grouped.flatten(1, 2),
            gradient.transpose(0, 1),
            None,
            dilation,
            padding,
            stride,
            groups,
        )[..., : weight.shape[2], : weight.shape[3]].transpose(0, 1)
    if wanted[2]:
        of_bias = gradient.sum((0, 2, 3))
    return of_x, of_weight, of_bias


# -- onnxruntime-training's Python ---------------------------------------------------------


def _training_python(venv: Path | None, folder: Path) -> tuple[Path | None, str]:
    """Return the Python of an environment with onnxruntime-training, made where none is named."""
    home = (venv or folder / "ort-training-venv").expanduser().absolute()
    python = home / "bin" / "python"
    if venv is None and not python.exists():
        uv = shutil.which("uv")
        if uv is None:
            return None, "uv is not installed, which makes its environment; see --ort-training"
        say("installing onnxruntime-training into an environment of its own")
        for command in (
            # the newest that 1.19.2 has wheels for
            [uv, "venv", "--python", "3.11", str(home)],
            [uv, "pip", "install", "--python", str(python), *ORT_TRAINING],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                shutil.rmtree(home, ignore_errors=True)
                return None, f"cannot be installed: {last_line(done.stderr)}"
    try:
        _versions_of(python)
    except OSError as error:
        return None, str(error)
    except subprocess.CalledProcessError as error:
        return None, last_line(error.stderr)
    return python, ""


def _versions_of(python: Path) -> str:
    code = (
        "import platform\n"
        "from importlib.metadata import version\n"
        "names = ('onnxruntime-training', 'onnx', 'numpy')\n"
        "print(', '.join(['python ' + platform.python_version(),"
        " *(name + ' ' + version(name) for name in names)]))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


# -- measuring -----------------------------------------------------------------------------


def _sides(
    kind: str,
    folder: Path,
    python: Path | None,
    contenders: Sequence[str],
    left_out: list[str],
) -> dict[str, list[str]]:
    """Return the commands of the contenders that can take part; say of the rest why not."""
    here = [sys.executable, str(PEERS), "serve"]
    sides = {}
    for name in peers.CONTENDERS:
        if name not in contenders:
            continue
        if name == "onnxruntime-training":
            if python is None:
                continue
            if not (folder / "ort-training" / "optimizer_model.onnx").exists():
                command = [str(python), str(PEERS), "artifacts", str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    left_out.append(f"{kind}: {name} is left out: {last_line(done.stderr)}")
                    continue
            sides[name] = [str(python), str(PEERS), "serve", name, "--folder", str(folder)]
        elif name.endswith("kept") and kind == "text":
            continue  # LoRA on all layers has no frozen part below it
        else:
            sides[name] = [*here, name, "--folder", str(folder)]
    return sides


class Contender:
    """A process that does a step whenever it is told to, and sleeps in between."""

    def __init__(self, name: str, command: Sequence[str], threads: int, spin: int) -> None:
        """Start the process and wait until it is ready."""
        self.name = name
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "ORT_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads), "--spin", str(spin)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.memory: dict[str, float] = self._answer()

    def step(self) -> tuple[float, float]:
        """Do one step; return milliseconds and the loss before it."""
        answer = self._ask("go")
        return answer["ms"], answer["loss"]

    def end(self) -> dict[str, float]:
        """End the process; return all that it said of its memory, MiB."""
        return {**self.memory, **self._ask("end")}

    def __enter__(self) -> "Contender":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End this very process, if it is still there."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, line: str) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, stderr = self._process.communicate()
            quit_unable(f"{self.name}: {last_line(stderr) or 'ended without a word'}")
        answer: dict[str, float] = json.loads(line)
        return answer


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one contender's steps came to: milliseconds, all its losses, memory in MiB."""

    ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)


def measure(
    sides: Mapping[str, Sequence[str]], *, threads: int, spin: int, rounds: int, warm: int
) -> dict[str, Measured]:
    """Start all contenders, check that they compute the same, then let them take turns."""
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(Contender(name, command, threads, spin))
            for name, command in sides.items()
        }
        found = {name: Measured() for name in sides}
        for number in range(warm + rounds):
            for name, process in processes.items():
                # until the last one's worker threads, which may spin a while, are asleep
                time.sleep(PAUSE_S)
                ms, loss = process.step()
                found[name].losses.append(loss)
                if number >= warm:
                    found[name].ms.append(ms)
            if number + 1 == warm:
                _check_losses({name: m.losses for name, m in found.items()})
        for name, process in processes.items():
            found[name].memory.update(process.end())
    return found


def _check_losses(losses: Mapping[str, Sequence[float]]) -> None:
    """End the program where contenders disagree: what they took would not be the same step's."""
    for name, values in losses.items():
        say(f"  {name}: losses " + " ".join(f"{value:.6f}" for value in values))
    reference_name = TORCH if TORCH in losses else next(iter(losses))
    reference = losses[reference_name]
    last = AGREE[-1][0]
    if abs(reference[last - 1] - reference[0]) < MOVED * abs(reference[0]):
        quit_unable(f"{reference_name}: the loss stays at {reference[0]:.4f}; nothing is learned")
    for name, values in losses.items():
        for step, strict in AGREE:
            tolerance = INT8_AGREE if name.startswith("edgetune int8") else strict
            expected, got = reference[step - 1], values[step - 1]
            if not abs(got - expected) <= tolerance * abs(expected):
                quit_unable(
                    f"{name}: loss of step {step} is {got:.6f}, of {reference_name}"
                    f" {expected:.6f}; expected them within {tolerance:g}"
                )


def _print_measured(measured: Mapping[str, Measured]) -> None:
    base = measured.get(TORCH)

    def against(value: Callable[[Measured], float], mine: Measured) -> str:
        return f"{value(mine) / value(base):.2f}" if base else "-"

    rows = []
    for name, mine in measured.items():
        low, middle, high = statistics.quantiles(mine.ms, n=4, method="inclusive")
        memory = mine.memory
        rows.append(
            [
                name,
                f"{middle:.1f} ({low:.1f} to {high:.1f})",
                against(lambda m: statistics.median(m.ms), mine),
                f"{memory['peak']:.0f}",
                against(lambda m: m.memory["peak"], mine),
                f"{memory['peak'] - memory['imported']:.0f}",
                against(lambda m: m.memory["peak"] - m.memory["imported"], mine),
                f"{memory['step_peak']:.0f}",
                f"{mine.losses[0]:.4f}, {mine.losses[AGREE[-1][0] - 1]:.4f}",
            ]
        )
    print_table(
        (
            "contender", "ms a step", "x torch", "peak MiB", "x torch", "above import", "x torch",
            "peak of steps", "loss at steps 1, 5",
        ),
        rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
