"""Tiny bundles whose answers can be worked out by hand, made without torch."""

import dataclasses
import io
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from edgetune import __version__
from edgetune.runtime.bundle import file_sha256
from edgetune.runtime.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Compatibility,
    DeviceClass,
    Evaluation,
    FileEntry,
    Goldens,
    Manifest,
    Metric,
    SessionSettings,
    TensorSpec,
    dump_manifest,
    parse_manifest,
)

REPOSITORY = Path(__file__).parents[1]
# id = place. The padding row would drown every answer if the mask did not silence it.
VOCABULARY = {
    "[PAD]": (100.0, -100.0),
    "[UNK]": (0.0, 0.0),
    "[CLS]": (0.0, 0.0),
    "good": (0.0, 1.0),
    "bad": (1.0, 0.0),
}
MEASURED = Evaluation(
    split="test",
    samples=40,
    metrics={"accuracy": Metric(value=0.9, low=0.8, high=0.96)},
)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Both bundles, made once; tests get copies."""
    folder = tmp_path_factory.mktemp("built")
    make_color_bundle(folder / "colors")
    make_word_bundle(folder / "words")
    return folder


@pytest.fixture
def color_bundle(built, tmp_path):
    """image-classification; logits = mean of each channel; labels red, green, blue."""
    return Path(shutil.copytree(built / "colors", tmp_path / "colors"))


@pytest.fixture
def word_bundle(built, tmp_path):
    """text-classification; logits = how often "bad", how often "good"; at most 6 tokens."""
    return Path(shutil.copytree(built / "words", tmp_path / "words"))


@pytest.fixture
def seal():
    """A function that writes the manifest anew, with changes, for the files as they are."""
    return write_manifest


@pytest.fixture
def python():
    """A function that runs Python in the source tree and returns what came out."""
    return run_python


@pytest.fixture
def rt():
    """A function that runs `edgetune-rt` as its own process."""

    def run(*arguments, **options):
        return run_python("-m", "edgetune.runtime.cli", *map(str, arguments), **options)

    return run


def run_python(*arguments, stdin=b"", env=None):
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, **(env or {})},
    )


def make_color_bundle(folder):
    folder.mkdir()
    float_, uint8 = TensorProto.FLOAT, TensorProto.UINT8
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["real"], to=float_),
            helper.make_node("ReduceMean", ["real"], ["means"], axes=[1, 2], keepdims=0),
            helper.make_node("MatMul", ["means", "identity"], ["logits"]),
        ],
        "colors",
        [helper.make_tensor_value_info("image", uint8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info("logits", float_, ["batch", 3])],
        [external("identity", np.eye(3, dtype=np.float32))],
    )
    (folder / "weights.bin").write_bytes(np.eye(3, dtype=np.float32).tobytes())
    save(folder, graph)
    red = np.zeros((2, 3, 3), np.uint8)
    red[..., 0] = 8
    dark = np.array([[[3, 1, 2]]], np.uint8)
    write_goldens(folder, [red, dark], [[8, 0, 0], [3, 1, 2]])
    write_manifest(
        folder,
        base_manifest(),
        name="colors",
        task="image-classification",
        labels=("red", "green", "blue"),
        inputs=(TensorSpec(name="image", dtype="uint8", shape=("batch", "height", "width", 3)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),),
        session=SessionSettings(max_batch=4),
    )


def make_word_bundle(folder):
    folder.mkdir()
    float_, int64 = TensorProto.FLOAT, TensorProto.INT64
    table = np.array(list(VOCABULARY.values()), np.float32)
    shape = ["batch", "tokens"]
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=float_),
            helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
            helper.make_node("Mul", ["rows", "column"], ["heard"]),
            helper.make_node("ReduceSum", ["heard", "tokens_axis"], ["logits"], keepdims=0),
        ],
        "words",
        [
            helper.make_tensor_value_info("input_ids", int64, shape),
            helper.make_tensor_value_info("attention_mask", int64, shape),
        ],
        [helper.make_tensor_value_info("logits", float_, ["batch", 2])],
        [
            external("table", table),
            helper.make_tensor("last", int64, [1], [2]),
            helper.make_tensor("tokens_axis", int64, [1], [1]),
        ],
    )
    (folder / "weights.bin").write_bytes(table.tobytes())
    save(folder, graph)
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", ids["[CLS]"])]
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    cls, good, bad = ids["[CLS]"], ids["good"], ids["bad"]
    tokens = [[cls, good], [cls, bad, bad, good]]
    write_goldens(folder, ["good", "bad bad good"], [[0, 1], [2, 1]], tokens)
    ids_spec = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "tokens"))
    write_manifest(
        folder,
        base_manifest(),
        name="words",
        task="text-classification",
        labels=("negative", "positive"),
        options={"max_length": 6, "pad_id": 0},
        inputs=(ids_spec, dataclasses.replace(ids_spec, name="attention_mask")),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 2)),),
        session=SessionSettings(max_batch=8),
    )


def base_manifest():
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name="",
        release=1,
        task="",
        labels=(),
        precision="fp32",
        profile="host",
        options={},
        inputs=(),
        outputs=(),
        compatibility=Compatibility(onnxruntime_min="1.17.0", opset=17, ir_version=8),
        device=DeviceClass(arch=platform.machine().lower(), cpu_features=(), int8="exact"),
        session=SessionSettings(),
        evaluation=MEASURED,
        reference=MEASURED,
        goldens=Goldens(count=2, tolerance=1e-3),
        files={},
        edgetune_version=__version__,
    )


def external(name, values, location="weights.bin"):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=values.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(values.nbytes)}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def save(folder, graph):
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, folder / "model.onnx")
    onnx.checker.check_model(folder / "model.onnx")


def write_goldens(folder, samples, logits, ids=()):
    stored = io.BytesIO()
    arrays = {f"input_{i}": np.array(sample) for i, sample in enumerate(samples)}
    arrays |= {f"ids_{i}": np.array(tokens, np.int64) for i, tokens in enumerate(ids)}
    np.savez(stored, logits=np.array(logits, np.float32), **arrays)
    (folder / "goldens.npz").write_bytes(stored.getvalue())


def write_manifest(folder, manifest=None, **changes):
    path = folder / MANIFEST_NAME
    if manifest is None:
        manifest = parse_manifest(path.read_bytes(), where="test")
    files = {
        entry.name: FileEntry(size=entry.stat().st_size, sha256=file_sha256(entry))
        for entry in sorted(folder.iterdir())
        if entry != path
    }
    path.write_bytes(dump_manifest(dataclasses.replace(manifest, files=files, **changes)))
