"""Tiny networks on the road of an export: the real torch module, its graph, and a step of it."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import torch
import transformers
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

from edgetune.autodiff.learnable import Learnable, parse_request, prepare, release
from edgetune.autodiff.step import Step, compile_step
from edgetune.export.graph import export_graph
from edgetune.export.step_check import Batches
from edgetune.models.families import Family, blocks, find_family
from edgetune.quantize.calibrate import calibrate
from edgetune.quantize.dynamic import quantize_dynamic
from edgetune.quantize.embeddings import quantize_embeddings
from edgetune.quantize.fuse import fuse
from edgetune.quantize.qdq import plan_static, write_static
from edgetune.runtime.ort import onnxruntime
from edgetune.tasks import GraphSpec
from edgetune.tasks.graph import SplitClassifier

CLASSES, WORDS, PIXELS = 5, 50, 32
Precision = Literal["float", "s8", "u8", "static"]


class Graph(nn.Module):
    """As the tasks' graphs: the network under `classifier`."""

    def __init__(self, network: nn.Module, family: Family, image: str) -> None:
        super().__init__()
        self.classifier = SplitClassifier(network, family.output)
        self.image = image

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        named = {self.image if name == "image" else name: v for name, v in inputs.items()}
        return self.classifier(**named)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network in torch, its family's row, and its graph."""

    module: nn.Module
    family: Family
    blocks: tuple[str, ...]
    graph: onnx.ModelProto
    batches: Batches

    def is_target(self, path: str) -> bool:
        if self.family.lora_regex:
            return re.fullmatch(self.family.lora_regex, path) is not None
        return path.split(".")[-1] in self.family.lora


class ConvolutionalHead(nn.Module):
    """As SqueezeNet: the last layer is a convolution, and the logits are its average."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(6, 8, 1)
        )
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Conv2d(8, CLASSES, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).flatten(1)


@functools.cache
def network(name: str) -> Network:
    """Return "bert", "bert, fresh" (its biases still zero), "mobilenet" or "conv head"."""
    torch.manual_seed(0)
    if name.startswith("bert"):
        config = transformers.BertConfig(
            vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=32, num_labels=CLASSES,
        )  # fmt: skip
        module: nn.Module = transformers.BertForSequenceClassification(config)
        family = find_family("transformers", "bert")
    elif name == "mobilenet":
        rows = [
            InvertedResidualConfig(8, 3, 8, 8, True, "RE", 2, 1, 1.0),
            InvertedResidualConfig(8, 5, 24, 16, True, "HS", 2, 1, 1.0),
            InvertedResidualConfig(16, 5, 32, 16, True, "HS", 1, 1, 1.0),
        ]
        module = MobileNetV3(rows, last_channel=24, num_classes=CLASSES)
        family = find_family("torchvision", "mobilenet_v3_small")
    else:
        module, family = ConvolutionalHead(), find_family("torchvision", "squeezenet1_1")
    if "fresh" not in name:
        _shake(module)
    module.eval()
    if name.startswith("bert"):
        ids = torch.ones((2, 6), dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        free: dict[int, str] = {0: "batch", 1: "tokens"}
    else:
        inputs, free = {"image": torch.randn(2, 3, PIXELS, PIXELS)}, {0: "batch"}
    spec = GraphSpec(
        module=Graph(module, family, "x"), inputs=inputs, free=dict.fromkeys(inputs, free)
    )
    return Network(
        module=module, family=family, blocks=tuple(n for n, _ in blocks(module, family)),
        graph=export_graph(spec), batches=_texts if name.startswith("bert") else _images,
    )  # fmt: skip


def _shake(module: nn.Module) -> None:
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
            if isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
                part.weight.uniform_(0.5, 1.5)
            if isinstance(getattr(part, "bias", None), Tensor):
                part.bias.normal_(0, 0.1)


def _texts(rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    tokens = 4 + size
    ids, mask = rng.integers(5, WORDS, (size, tokens)), np.ones((size, tokens), np.int64)
    mask[0, tokens // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _images(rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    return {"image": rng.normal(size=(size, 3, PIXELS, PIXELS)).astype(np.float32)}


@functools.cache
def learnable(name: str, request: str, precision: Precision = "float") -> Learnable:
    net, wanted = network(name), parse_request(request, rank=2)
    static = precision == "static"
    model = fuse(prepare(net.graph, wanted, net.blocks, net.is_target, static=static))
    if precision in ("s8", "u8"):
        model = quantize_embeddings(quantize_dynamic(model, codes=precision))
    elif static:
        plan = plan_static(model)
        samples = [net.batches(np.random.default_rng(1), 4)]
        model = write_static(model, plan, calibrate(model, samples, plan.tensors))
    return release(model, wanted, net.blocks)


def compiled(name: str, request: str, precision: Precision = "float", **options: Any) -> Step:
    rng, net = np.random.default_rng(0), network(name)
    made = learnable(name, request, precision)
    return compile_step(
        made.model, made.trainable, [net.batches(rng, 2), net.batches(rng, 3)],
        class_axes=made.class_axes, inner=made.inner, **options,
    )  # fmt: skip


def defaults(made: Learnable) -> dict[str, np.ndarray]:
    values = {t.name: onnx.numpy_helper.to_array(t) for t in made.model.graph.initializer}
    return {name: values[name] for name in made.trainable}


def session(model: onnx.ModelProto) -> Any:
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def batch_inputs(made: Learnable, step: Step, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """What the step takes of a batch: its own inputs, and what the inference graph makes of it."""
    given = {name: feeds[name] for name in step.inputs}
    if step.latents:
        model = onnx.ModelProto()
        model.CopyFrom(made.model)
        del model.graph.output[:]
        model.graph.output.extend(step.latents)
        names = [latent.name for latent in step.latents]
        given |= dict(zip(names, session(model).run(names, dict(feeds)), strict=True))
    return given


def run_step(
    opened: Any,
    given: Mapping[str, Any],
    values: Mapping[str, np.ndarray],
    targets: np.ndarray,
    state: Mapping[str, np.ndarray] | None = None,
    **scalars: float,
) -> dict[str, np.ndarray]:
    """Run a step on a batch of equal weights, from zero gradients and, unless given, moments."""
    numbers = {"weight_sum": float(len(targets)), "lr": 0.0, "weight_decay": 0.0, "t": 1.0}
    feeds: dict[str, Any] = {"targets": targets, "sample_weight": np.ones(len(targets), np.float32)}
    feeds |= {n: np.array(v, np.float32) for n, v in (numbers | scalars).items()}
    for end in (".grad", ".m", ".v"):
        feeds |= {name + end: np.zeros_like(value) for name, value in values.items()}
    feeds |= {**given, **values, **(state or {})}
    taken = {i.name for i in opened.get_inputs()}
    names = [o.name for o in opened.get_outputs()]
    found = opened.run(names, {n: v for n, v in feeds.items() if n in taken})
    return dict(zip(names, found, strict=True))
