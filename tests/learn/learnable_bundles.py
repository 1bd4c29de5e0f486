"""Tiny bundles that can train: a perceptron on colours, and attention on words."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from tiny_bundles import base_manifest, write_goldens, write_manifest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from edgetune.autodiff.learnable import parse_request, prepare, release
from edgetune.autodiff.step import compile_step
from edgetune.export.graph import export_graph, save_graphs
from edgetune.export.learning import example_runs
from edgetune.quantize.fuse import fuse
from edgetune.runtime.learn.material import Material, dump_material
from edgetune.runtime.learn.statistics import add, compress, empty
from edgetune.runtime.manifest import SessionSettings, TensorSpec, TrainingStep
from edgetune.runtime.model import EdgeModel
from edgetune.tasks import GraphSpec
from edgetune.tasks.graph import SplitClassifier

COLOURS = ("red", "green", "blue")
# what each class has more of than 60, of each channel
TINTS = {"red": (150, 0, 0), "green": (0, 150, 0), "blue": (0, 0, 150), "yellow": (150, 150, 0)}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "turn", "on", "off"]
WORDS += ["please", "now", "the", "lamp", "light", "door", "valve"]
CANARIES_A_CLASS, REPLAYED_A_CLASS = 60, 10


def pictures(label: str, count: int, seed: int) -> list[np.ndarray]:
    """Pictures of 2 x 3 pixels in which a colour leads."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 60, (count, 2, 3, 3))
    return list((noise + np.array(TINTS[label])).astype(np.uint8))


class Perceptron(nn.Module):
    """Means of the channels, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(3, 16), nn.ReLU()),
                nn.Sequential(nn.Linear(16, 16), nn.ReLU()),
            ]
        )
        self.head = nn.Linear(16, len(COLOURS))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image.to(torch.float32).mean((1, 2)) / 255
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class PictureGraph(nn.Module):
    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.classifier(image=image)


class Attention(nn.Module):
    """What stands beside a word is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ x.transpose(1, 2) / 4 + hidden  # (B, T, T)
        return x + torch.softmax(scores, -1) @ self.value(x)


class Reader(nn.Module):
    """Words are embedded, attend to one another twice, and the first one is judged by."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 16)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.classifier = nn.Linear(16, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)  # (B, T, 16)
        hidden = (1 - attention_mask.to(torch.float32))[:, None, :] * -1e4  # (B, 1, T)
        for block in self.blocks:
            x = block(x, hidden)
        return self.classifier(x[:, 0])


class WordGraph(nn.Module):
    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask)


def build_colours(
    folder: Path, learn: str = "last:1", optimizer: str = "adamw", labels=COLOURS
) -> Path:
    """image-classification, right on nearly all pictures of three colours."""
    torch.manual_seed(0)
    network = Perceptron()
    given = np.stack([p for c in COLOURS for p in pictures(c, 40, 1)])
    classes = torch.arange(len(COLOURS)).repeat_interleave(40)
    descent = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(120):
        descent.zero_grad()
        nn.functional.cross_entropy(network(torch.from_numpy(given)), classes).backward()
        descent.step()
    spec = GraphSpec(
        module=PictureGraph(SplitClassifier(network, "head")),
        inputs={"image": torch.zeros((2, 4, 5, 3), dtype=torch.uint8)},
        free={"image": {0: "batch", 1: "height", 2: "width"}},
    )
    training = write_graphs(
        folder, spec, learn, ["blocks.0", "blocks.1"], lambda _: True, optimizer=optimizer
    )
    write_goldens(folder, given[[0, 50]], np.zeros((2, len(COLOURS))))
    shape = ("batch", "height", "width", 3)
    write_manifest(
        folder, base_manifest(), name="colours", task="image-classification", labels=labels,
        inputs=(TensorSpec(name="image", dtype="uint8", shape=shape),),
        outputs=outputs(training, 16), session=SessionSettings(max_batch=8), training=training,
    )  # fmt: skip
    replay = [(c, p) for c in COLOURS for p in pictures(c, REPLAYED_A_CLASS, 2)]
    canary = [(c, p) for c in COLOURS for p in pictures(c, CANARIES_A_CLASS, 3)]
    write_material(folder, replay, canary)
    return folder


def build_words(folder: Path, learn: str = "lora", optimizer: str = "adamw") -> Path:
    """text-classification of "on" and "off" by a network at random, which knows nothing yet."""
    torch.manual_seed(0)
    ids = torch.ones((2, 6), dtype=torch.int64)
    free = {0: "batch", 1: "tokens"}
    spec = GraphSpec(
        module=WordGraph(SplitClassifier(Reader(), "classifier")),
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        free={"input_ids": free, "attention_mask": free},
    )
    blocks = ["blocks.0", "blocks.1"]
    training = write_graphs(
        folder, spec, learn, blocks, lambda path: path.endswith(("query", "value")),
        optimizer=optimizer,
    )  # fmt: skip
    places = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(places, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", places["[CLS]"])]
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    write_goldens(folder, ["turn on", "turn off"], np.zeros((2, 2)), [[2, 3], [2, 3]])
    raw = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "tokens"))
    write_manifest(
        folder,
        base_manifest(),
        name="words",
        task="text-classification",
        labels=("on", "off"),
        options={"max_length": 16, "pad_id": 0},
        inputs=(raw, dataclasses.replace(raw, name="attention_mask")),
        outputs=outputs(training, 16),
        session=SessionSettings(max_batch=8),
        training=training,
    )
    write_material(folder, sentences(10, 5), sentences(100, 6))
    return folder


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of a label, on and off in turn, and a sentence of 3 to 7 words that says it."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        label = ("on", "off")[i % 2]
        found.append((label, " ".join([*rng.choice(WORDS[6:], rng.integers(1, 6)), "turn", label])))
    return found


def write_graphs(folder, spec, learn, blocks, is_target, *, optimizer="adamw") -> TrainingStep:
    folder.mkdir(parents=True)
    request = parse_request(learn, rank=4)
    prepared = fuse(prepare(export_graph(spec), request, blocks, is_target, static=False))
    learnable = release(prepared, request, blocks)
    step = compile_step(
        learnable.model, learnable.trainable, example_runs(learnable.model), optimizer=optimizer,
        class_axes=learnable.class_axes, inner=learnable.inner,
    )  # fmt: skip
    there = {value.name for value in learnable.model.graph.output}
    learnable.model.graph.output.extend(v for v in step.latents if v.name not in there)
    save_graphs({"model.onnx": learnable.model, "train.onnx": step.model}, folder)
    inputs = {value.name: value for value in step.model.graph.input}
    return TrainingStep(
        method=learn, optimizer=optimizer, gradients="float32",
        trainable=tuple(tensor_spec(inputs[name]) for name in step.trainable), inputs=step.inputs,
        latents=tuple(tensor_spec(v) for v in step.latents), decayed=step.decayed,
        checked_steps=0, worst_gradient=0.0,
    )  # fmt: skip


def tensor_spec(value) -> TensorSpec:
    from onnx import helper

    tensor = value.type.tensor_type
    return TensorSpec(
        name=value.name, dtype=helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        shape=tuple(d.dim_param or d.dim_value for d in tensor.shape.dim),
    )  # fmt: skip


def outputs(training: TrainingStep, features: int) -> tuple[TensorSpec, ...]:
    found = {
        "logits": TensorSpec(name="logits", dtype="float32", shape=("batch", "classes")),
        "features": TensorSpec(name="features", dtype="float32", shape=("batch", features)),
    }
    return tuple((found | {spec.name: spec for spec in training.latents}).values())


def write_material(folder, replay, canary) -> None:
    """Write learn.npz of (label, sample) pairs, and the manifest with it."""
    with EdgeModel.load(folder) as model:
        labels, training = model.manifest.labels, model.manifest.training

        def look(pairs):
            latents = {name: [] for name in (*training.inputs, *(v.name for v in training.latents))}
            features, answers = [], []
            for _, sample in pairs:
                arrays = model.task.stack([model.task.encode(sample)])
                found = arrays | model.run(arrays)
                features.append(found["features"][0])
                answers.append(found["logits"][0].argmax())
                for name, values in latents.items():
                    values.append(found[name][0])
            classes = np.array([labels.index(label) for label, _ in pairs], np.int64)
            return np.stack(features), classes, np.array(answers, np.int64), latents

        features, classes, _, replay_latents = look(replay)
        seen, truth, answers, canary_latents = look(canary)
    stats = add(empty(features.shape[1], labels), features, classes)
    material = Material(
        prior=compress(stats, 1 << 20), canary_features=seen, canary_classes=truth,
        canary_answers=answers, ridge_factor=1.0, margin=0.03, projection=None,
        canary_latents=canary_latents, replay_latents=replay_latents, replay_classes=classes,
    )  # fmt: skip
    (folder / "learn.npz").write_bytes(dump_material(material))
    write_manifest(folder)
