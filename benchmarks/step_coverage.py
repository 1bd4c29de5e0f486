r"""Which models can learn on a device, and how: every family by every set of trainable tensors.

    python benchmarks/step_coverage.py --write docs/coverage.md      about 5 minutes on 2 cores
    python benchmarks/step_coverage.py --only bert,resnet            some rows
    python benchmarks/step_coverage.py --also regnet_y_400mf         other torchvision models

Of every model a tiny random instance is exported, prepared, quantized, released and compiled into a
training step, which is held against torch's autograd. Progress goes to stderr, Markdown to stdout.
"""

import argparse
import contextlib
import io
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import onnx
import torch
import torchvision
import transformers
from _common import cores, print_heading, print_table, say
from torch import Tensor, nn
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import BasicBlock

from edgetune.autodiff.learnable import parse_request, prepare, release
from edgetune.autodiff.step import compile_step
from edgetune.errors import EdgetuneError
from edgetune.export.graph import export_graph
from edgetune.export.step_check import StepReport, Tolerances, TrainSpec, check_step
from edgetune.models.families import Family, blocks, families, find_family
from edgetune.quantize.calibrate import calibrate
from edgetune.quantize.dynamic import quantize_dynamic
from edgetune.quantize.embeddings import quantize_embeddings
from edgetune.quantize.fuse import fuse
from edgetune.quantize.qdq import plan_static, write_static
from edgetune.tasks import GraphSpec
from edgetune.tasks.graph import SplitClassifier

REQUESTS = ("head", "last:1", "last:2", "norm", "bias", "lora", "lora:2")
CLASSES, WORDS, PIXELS = 5, 99, 64
STEPS = 20
# gradients and losses are measured, so nothing is too far off; the optimizer is held to the rule
TOLERANCES = Tolerances(loss=math.inf, gradient=math.inf)
ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "num_labels": CLASSES,
}  # fmt: skip
CONVOLUTIONS = {"num_labels": CLASSES}
CONFIGS: dict[str, Mapping[str, Any]] = {
    "bert": {"vocab_size": WORDS, **ENCODER},
    "distilbert": {
        "vocab_size": WORDS, "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64,
        "num_labels": CLASSES,
    },
    "roberta": {"vocab_size": WORDS, **ENCODER},
    "electra": {"vocab_size": WORDS, "embedding_size": 16, **ENCODER},
    "vit": {"image_size": PIXELS, **ENCODER},
    "mobilenet_v1": {"depth_multiplier": 0.25, **CONVOLUTIONS},
    "mobilenet_v2": {"depth_multiplier": 0.35, **CONVOLUTIONS},
    "resnet": {
        "embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 1, 2],
        "layer_type": "basic", **CONVOLUTIONS,
    },
}  # fmt: skip
# what torchvision builds, as small as its families get
TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], CLASSES),
    "mobilenet_v2": lambda: torchvision.models.MobileNetV2(CLASSES, width_mult=0.35),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(
        num_classes=CLASSES, width_mult=0.5
    ),
    "efficientnet_b": lambda: torchvision.models.EfficientNet(
        [
            MBConvConfig(expand, kernel, stride, inputs, outputs, 2, 0.25, 1.0)
            for expand, kernel, stride, inputs, outputs in (
                (1, 3, 1, 32, 16), (6, 3, 2, 16, 24), (6, 5, 2, 24, 40), (6, 5, 2, 40, 48),
            )
        ],
        dropout=0.2, num_classes=CLASSES, last_channel=96,
    ),
    "squeezenet": lambda: torchvision.models.SqueezeNet("1_1", CLASSES),
}  # fmt: skip
TEXT = f"""\
Every family of models that edgetune knows, by what of it learns besides the head (`--learn`), in
float32 and in the family's int8. Of each a tiny random instance ({CLASSES} classes, images of
{PIXELS} px) goes the way of an export: LoRA branches and marks, fusion, quantization, release of
the trainable tensors, compilation of train.onnx. Then {STEPS} optimizer steps (AdamW; partial
batches, zero and soft targets' weights, accumulation) are held against torch's autograd.

A number is the worst gradient's distance from torch: the largest of all its elements' differences,
over the largest element of that gradient, of {STEPS} steps the worst. Roundings of float32 are 1e-7
to 1e-5. A value next to a kink (0 before a ReLU, two equal places of a MaxPool, the middle between
two int8 codes) may fall on its other side in the two programs, and then single elements are off
by far more: 1e-3 to 1e-1 in some cells of networks with ReLUs. Where there is no number there is no
train.onnx of that kind, for the reason below the table."""
IMAGES = frozenset({"vit", "mobilenet_v1", "mobilenet_v2", "resnet"})


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model: a transformers config or a torchvision name, in a family."""

    title: str
    source: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What became of a model in one precision, trained in one way; an empty reason: it works."""

    case: str
    precision: str
    request: str
    error: float = math.nan
    tensors: int = 0
    reason: str = ""
    seconds: float = 0.0


class Graph(nn.Module):
    """A network as the export has it: its inputs by their names, logits and features out."""

    def __init__(self, network: nn.Module, family: Family, names: Mapping[str, str]) -> None:
        """Map the graph's inputs to the network's by `names`."""
        super().__init__()
        self.classifier = SplitClassifier(network, family.output)
        self._names = names

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what the classifier does."""
        outputs = self.classifier(**{self._names[name]: value for name, value in inputs.items()})
        assert isinstance(outputs, tuple)
        return outputs


def main() -> None:
    """Go through the models and print the table."""
    arguments = _arguments()
    cases = [c for c in _cases(arguments.also) if not arguments.only or c.title in arguments.only]
    if not cases:
        raise SystemExit(f"error: no such model; known: {', '.join(c.title for c in _cases(()))}")
    cells: list[Cell] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(arguments.jobs, len(cases))) as pool:
        for found in pool.imap(_try_case, cases):
            cells += found
            works = sum(not cell.reason for cell in found)
            seconds = sum(cell.seconds for cell in found)
            say(f"{found[0].case}: {works} of {len(found)} work ({seconds:.0f} s)")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        _print(cells)
    sys.stdout.write(text.getvalue())
    if arguments.write:
        arguments.write.write_text(text.getvalue().rstrip() + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", type=names, default=[], help="rows, separated by commas")
    parser.add_argument("--also", type=names, default=[], help="further torchvision models")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes (default: cores)")
    parser.add_argument("--write", type=Path, help="a file for the Markdown, besides stdout")
    return parser.parse_args()


def _cases(also: Sequence[str]) -> list[Case]:
    cases = [Case(title=f.name, source=f.source, kind=_instance_of(f)) for f in families()]
    return cases + [Case(title=name, source="torchvision", kind=name) for name in also]


def _instance_of(family: Family) -> str:
    return (
        family.match[0]
        if family.source == "transformers"
        else next(name for name in TORCHVISION if name.startswith(family.match))
    )


def _try_case(case: Case) -> list[Cell]:
    """Export a model and try every precision and request."""
    torch.set_num_threads(1)
    family = _family(case)
    spec, names = _instance(case, family)
    model = export_graph(spec)
    cells = []
    for precision in ("float32", f"int8 {family.int8}"):
        for request in REQUESTS:
            start = time.perf_counter()
            cell = {"case": case.title, "precision": precision, "request": request}
            try:
                report, tensors = _try(model, spec, family, names, precision, request)
                found = Cell(**cell, error=report.worst_gradient, tensors=tensors,
                             seconds=time.perf_counter() - start)  # fmt: skip
            except EdgetuneError as error:
                found = Cell(**cell, reason=str(error), seconds=time.perf_counter() - start)
            cells.append(found)
    return cells


def _family(case: Case) -> Family:
    """Return the family; of a model of none, a row as a user would write it."""
    known = [f for f in families() if f.source == case.source]
    if any(case.kind == m or case.kind.startswith(m) for f in known for m in f.match):
        return find_family(case.source, case.kind)
    network = _torchvision(case.kind)
    containers = [n for n, child in network.named_children() if n not in ("fc", "classifier")]
    output = "fc" if hasattr(network, "fc") else "classifier"
    return Family(
        name=case.kind, source="torchvision", match=(case.kind,), blocks=tuple(containers),
        head=(output,), output=output, lora_regex=".*", int8="static",
    )  # fmt: skip


def _instance(case: Case, family: Family) -> tuple[GraphSpec, list[str]]:
    """Return a small random network's graph and the paths of its blocks."""
    torch.manual_seed(0)
    images = case.source == "torchvision" or case.kind in IMAGES
    if case.source == "torchvision":
        network, name = _torchvision(case.kind), "x"
    else:
        config = transformers.AutoConfig.for_model(case.kind, **CONFIGS[case.kind])
        auto: Any = transformers.AutoModelForSequenceClassification
        if images:
            auto = transformers.AutoModelForImageClassification
        network, name = auto.from_config(config), "pixel_values"
    _shake(network)
    free: dict[int, str] = {0: "batch"}
    if images:
        inputs = {"image": torch.randn(2, 3, PIXELS, PIXELS)}
        mapping = {"image": name}
    else:
        ids = torch.randint(5, WORDS, (2, 6))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        mapping, free = {n: n for n in inputs}, {0: "batch", 1: "tokens"}
    paths = [path for path, _ in blocks(network, family)]
    graph = Graph(network.eval(), family, mapping)
    return GraphSpec(module=graph, inputs=inputs, free=dict.fromkeys(inputs, free)), paths


def _torchvision(kind: str) -> nn.Module:
    if kind in TORCHVISION:
        return TORCHVISION[kind]()
    network: nn.Module = torchvision.models.get_model(kind, weights=None, num_classes=CLASSES)
    return network


def _shake(network: nn.Module) -> None:
    """Give norms and biases values that are not 0 and 1, so that a missing one shows."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                bias.normal_(0, 0.1)


def _try(
    model: onnx.ModelProto,
    spec: GraphSpec,
    family: Family,
    names: Sequence[str],
    precision: str,
    wanted: str,
) -> tuple[StepReport, int]:
    """Go the way of an export; return the comparison and how many tensors learn."""
    request = parse_request(wanted)
    static = precision == "int8 static"
    batches = _batches(spec)
    prepared = fuse(prepare(model, request, names, _is_target(family), static=static))
    quantized = _quantized(prepared, precision, batches)
    learnable = release(quantized, request, names)
    rng = np.random.default_rng(0)
    step = compile_step(
        learnable.model, learnable.trainable, [batches(rng, 2), batches(rng, 3)],
        class_axes=learnable.class_axes, inner=learnable.inner,
    )  # fmt: skip
    inputs = (*step.inputs, *(latent.name for latent in step.latents))
    check = TrainSpec(
        trainable=step.trainable, inputs=inputs, optimizer=step.optimizer, decayed=step.decayed
    )
    report = check_step(
        step.model, learnable.model, check, batches=batches, steps=STEPS, tolerances=TOLERANCES
    )
    return report, len(step.trainable)


def _is_target(family: Family) -> Callable[[str], bool]:
    """Tell LoRA's targets as peft does: suffixes of whole names, or an expression."""

    def is_target(path: str) -> bool:
        if family.lora_regex:
            return re.fullmatch(family.lora_regex, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in family.lora)

    return is_target


Batches = Callable[[np.random.Generator, int], dict[str, Any]]


def _batches(spec: GraphSpec) -> Batches:
    """Return what makes batches: images, or ids of different lengths with padding."""

    def batch(rng: np.random.Generator, size: int) -> dict[str, Any]:
        if "image" in spec.inputs:
            shape = (size, *spec.inputs["image"].shape[1:])
            return {"image": rng.normal(size=shape).astype(np.float32)}
        tokens = 4 + size
        ids = rng.integers(5, WORDS, (size, tokens))
        mask = np.ones_like(ids)
        mask[0, tokens // 2 + 1 :] = 0
        return {"input_ids": ids, "attention_mask": mask}

    return batch


def _quantized(model: onnx.ModelProto, precision: str, batches: Batches) -> onnx.ModelProto:
    if precision == "float32":
        return model
    if precision == "int8 dynamic":
        return quantize_embeddings(quantize_dynamic(model))
    plan = plan_static(model)
    rng = np.random.default_rng(1)
    ranges = calibrate(model, [batches(rng, 4) for _ in range(2)], plan.tensors)
    return write_static(model, plan, ranges)


def _print(cells: Sequence[Cell]) -> None:
    print_heading("What can learn on a device", TEXT)
    rows, notes = [], {}
    for case, precision in dict.fromkeys((c.case, c.precision) for c in cells):
        row: list[object] = [case, precision]
        for cell in cells:
            if (cell.case, cell.precision) != (case, precision):
                continue
            if not cell.reason:
                row.append(f"{cell.error:.0e}")
                continue
            reason = re.sub(rf"\b{cell.request}\b", "it", cell.reason)
            row.append(f"no [{notes.setdefault(reason, len(notes) + 1)}]")
        rows.append(row)
    print_table(["family", "graph", *REQUESTS], rows)
    for reason, number in notes.items():
        print(f"{number}. {reason}")


if __name__ == "__main__":
    main()
