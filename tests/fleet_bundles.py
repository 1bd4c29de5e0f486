"""A tiny bundle that can learn and whose features can be worked out by hand, without torch.

A sample is an image of one colour; its features are the means of its channels, in 0 to 1.
"""

import numpy as np
import tiny_bundles
from onnx import TensorProto, helper, numpy_helper

from edgetune.autodiff.step import compile_step
from edgetune.export.graph import save_graphs, tensor_specs
from edgetune.runtime.learn.material import Material, dump_material
from edgetune.runtime.learn.statistics import add, compress, empty
from edgetune.runtime.manifest import Goldens, SessionSettings, TensorSpec, TrainingStep

LABELS = ("red", "green", "blue")
COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 200, 40),
    "blue": (40, 40, 200),
    "white": (210, 210, 210),
    "black": (10, 10, 10),
}
SPREAD = 15
CANARY = 60  # of each class


def images(label, count, seed=0):
    """Images of 2 by 2 equal pixels, near a colour."""
    rng = np.random.default_rng([seed, sum(label.encode())])
    pixels = np.array(COLOURS[label]) + rng.integers(-SPREAD, SPREAD + 1, (count, 3))
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return [np.broadcast_to(p, (2, 2, 3)).copy() for p in pixels]


def features_of(samples):
    """What the graph gives, in float32 as it computes."""
    return np.stack([s[0, 0].astype(np.float32) * np.float32(1 / 255) for s in samples])


def factory_statistics(count=40):
    stats = empty(3, LABELS)
    for place, label in enumerate(LABELS):
        rows = features_of(images(label, count, seed=100))
        stats = add(stats, rows, np.full(count, place))
    return stats


def make_colour_bundle(folder, *, train=False, files=()):
    """logits = 10 features, so that the brightest channel wins; labels red, green, blue."""
    folder.mkdir()
    model = _model(train)
    training = None
    canary = {c: images(c, CANARY, seed=200) for c in LABELS}
    rows = np.concatenate([features_of(canary[c]) for c in LABELS])
    latents = {}
    if train:
        model, training, step = _trainable(model)
        save_graphs({"model.onnx": model, "train.onnx": step}, folder)
        latents = {name: _latents(name, rows) for name in (s.name for s in training.latents)}
    else:
        save_graphs({"model.onnx": model}, folder)
    stats = factory_statistics()
    truth = np.repeat(np.arange(3), CANARY)
    material = Material(
        prior=compress(stats, 2**16),
        canary_features=rows.astype(np.float16).astype(np.float32),
        canary_classes=truth,
        canary_answers=rows.argmax(axis=1),
        ridge_factor=1.0,
        margin=0.03,
        projection=None,
        canary_latents=latents,
        replay_latents={name: [] for name in latents},
        replay_classes=np.zeros(0, np.int64),
    )
    (folder / "learn.npz").write_bytes(dump_material(material))
    for name, data in dict(files).items():
        (folder / name).write_bytes(data)
    goldens = [np.full((2, 2, 3), COLOURS[c], np.uint8) for c in LABELS]
    tiny_bundles.write_goldens(folder, goldens, 10 * features_of(goldens))
    inputs, outputs = tensor_specs(model)
    tiny_bundles.write_manifest(
        folder,
        tiny_bundles.base_manifest(),
        name="colours",
        task="image-classification",
        labels=LABELS,
        inputs=inputs,
        outputs=outputs,
        session=SessionSettings(max_batch=4),
        goldens=Goldens(count=3, tolerance=1e-3),
        training=training,
    )
    return folder


def _model(train):
    float_, uint8 = TensorProto.FLOAT, TensorProto.UINT8
    eye = np.eye(3, dtype=np.float32)
    constants = {"scale": np.array(1 / 255, np.float32), "head": 10 * eye,
                 "offset": np.zeros(3, np.float32)}  # fmt: skip
    source = "small"
    nodes = [
        helper.make_node("Cast", ["image"], ["real"], to=float_),
        helper.make_node("ReduceMean", ["real"], ["means"], axes=[1, 2], keepdims=0),
    ]
    if train:  # a layer to adapt: features = means W + means A B, W the identity and B 0
        nodes += [
            helper.make_node("Mul", ["means", "scale"], ["small"]),
            helper.make_node("MatMul", [source, "body"], ["entered"]),
            helper.make_node("MatMul", ["entered", "eye"], ["frozen"]),
            helper.make_node("MatMul", ["entered", "learn.body.lora_a.weight"], ["inner"]),
            helper.make_node("MatMul", ["inner", "learn.body.lora_b.weight"], ["outer"]),
            helper.make_node("Add", ["frozen", "outer"], ["features"]),
            helper.make_node("MatMul", ["features", "learn.output.weight"], ["product"]),
            helper.make_node("Add", ["product", "learn.output.bias"], ["logits"]),
        ]
        constants |= {
            "body": eye,
            "eye": eye + np.float32(0),
            "learn.body.lora_a.weight": np.float32([[0.5], [0.25], [0.125]]),
            "learn.body.lora_b.weight": np.zeros((1, 3), np.float32),
            "learn.output.weight": constants.pop("head"),
            "learn.output.bias": constants.pop("offset"),
        }
    else:
        nodes += [
            helper.make_node("Mul", ["means", "scale"], ["features"]),
            helper.make_node("MatMul", ["features", "head"], ["product"]),
            helper.make_node("Add", ["product", "offset"], ["logits"]),
        ]
    outputs = [
        helper.make_tensor_value_info("logits", float_, ["batch", 3]),
        helper.make_tensor_value_info("features", float_, ["batch", 3]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", uint8, ["batch", "height", "width", 3])],
        outputs,
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def _trainable(model):
    axes = {"learn.output.weight": 1, "learn.output.bias": 0}
    names = [t.name for t in model.graph.initializer if t.name.startswith("learn.")]
    values = {t.name: t for t in model.graph.initializer}
    for name in names:
        shape = list(values[name].dims)
        if name in axes:
            shape[axes[name]] = "classes"
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        model.graph.input.append(info)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    runs = [{"image": np.ones((n, h, h + 2, 3), np.uint8)} for n, h in ((2, 5), (3, 11))]
    step = compile_step(model, names, runs, class_axes=axes)
    have = {v.name for v in model.graph.output}
    model.graph.output.extend(v for v in step.latents if v.name not in have)

    def spec(value):
        dims = value.type.tensor_type.shape.dim
        shape = tuple(d.dim_param or d.dim_value for d in dims)
        return TensorSpec(name=value.name, dtype="float32", shape=shape)

    inputs = {v.name: v for v in step.model.graph.input}
    training = TrainingStep(
        method="lora",
        optimizer="adamw",
        gradients="float32",
        trainable=tuple(spec(inputs[name]) for name in step.trainable),
        inputs=step.inputs,
        latents=tuple(spec(v) for v in step.latents),
        decayed=step.decayed,
        checked_steps=0,
        worst_gradient=0.0,
    )
    return model, training, step.model


def _latents(name, rows):
    assert name in ("entered", "frozen"), name  # both are the channels' means
    return [row.astype(np.float16).astype(np.float32) for row in rows]
