"""Every quantized form on the oldest onnxruntime that a shipped profile names."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetune.config import TrainConfig
from edgetune.export import export
from edgetune.profile import load_profile
from edgetune.quantize.blocks import quantize_blocks
from edgetune.quantize.dynamic import quantize_dynamic
from edgetune.quantize.embeddings import quantize_embeddings
from edgetune.quantize.qdq import quantize_static
from edgetune.train import train

PROFILES = Path(__file__).resolve().parents[2] / "profiles"

# what a process runs: every model of a folder on its feeds
RUN_FOLDER = """
import json, os, sys
from pathlib import Path
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.onnx")):
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    results = session.run(None, dict(np.load(path.with_suffix(".npz"))))
    np.save(folder / f"{path.stem}-{sys.argv[2]}.npy", results[0])
print(json.dumps(onnxruntime.__version__))
"""


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def graph(rows, constants, given, kind, result) -> onnx.ModelProto:
    nodes = [
        helper.make_node(op, wires.split(" -> ")[0].split(), [wires.split(" -> ")[1]],
                         name=f"node_{i}", **attributes)
        for i, (op, wires, attributes) in enumerate(rows)
    ]  # fmt: skip
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", kind, given)],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def conv_net() -> onnx.ModelProto:
    """Convolutions of every kind, a residual sum, pooling and a Gemm."""
    rows = [
        ("Conv", "x w0 b0 -> c0", {"pads": [1, 1, 1, 1]}), ("Relu", "c0 -> r0", {}),
        ("Conv", "r0 w1 -> c1", {"pads": [1, 1, 1, 1], "group": 16}),
        ("Clip", "c1 low high -> r1", {}), ("Conv", "r1 w2 b2 -> c2", {}),
        ("Add", "c2 r0 -> sum", {}),
        ("MaxPool", "sum -> pooled", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("GlobalAveragePool", "pooled -> mean", {}), ("Flatten", "mean -> flat", {}),
        ("Gemm", "flat w3 b3 -> y", {"transB": 1}),
    ]  # fmt: skip
    constants = {
        "w0": normal(0, 16, 3, 3, 3) / 5, "b0": normal(1, 16), "w1": normal(2, 16, 1, 3, 3) / 3,
        "w2": normal(3, 16, 16, 1, 1) / 4, "b2": normal(4, 16), "low": np.float32(0),
        "high": np.float32(6), "w3": normal(5, 10, 16) / 4, "b3": normal(6, 10),
    }  # fmt: skip
    return graph(rows, constants, ("n", 3, "h", "w"), TensorProto.FLOAT, "y")


def encoder() -> onnx.ModelProto:
    """Token ids looked up in a table, then a feed-forward part of MatMul, Add and Gelu's Erf."""
    rows = [
        ("Gather", "table x -> e", {}), ("MatMul", "e w0 -> p0", {}), ("Add", "p0 b0 -> h0", {}),
        ("Erf", "h0 -> g", {}), ("MatMul", "g w1 -> p1", {}), ("Add", "p1 b1 -> h1", {}),
        ("Add", "h1 e -> sum", {}), ("ReduceMean", "sum axes -> mean", {"keepdims": 0}),
        ("Gemm", "mean w2 b2 -> y", {"transB": 1}),
    ]  # fmt: skip
    constants = {
        "table": normal(0, 600, 64), "w0": normal(1, 64, 128) / 8, "b0": normal(2, 128),
        "w1": normal(3, 128, 64) / 11, "b1": normal(4, 64), "axes": np.array([1], np.int64),
        "w2": normal(5, 10, 64) / 8, "b2": normal(6, 10),
    }  # fmt: skip
    return graph(rows, constants, ("n", "t"), TensorProto.INT64, "y")


def forms() -> dict[str, tuple[onnx.ModelProto, dict[str, np.ndarray]]]:
    images = [{"x": normal(seed, 4, 3, 12, 10)} for seed in range(20, 24)]
    tokens = {"x": np.random.default_rng(7).integers(0, 600, (3, 9))}
    net, text = conv_net(), encoder()
    blocks = {"bits": 4, "block_size": 32, "method": "hqq"}
    return {
        "conv fp32": (net, images[0]),
        "conv static s8": (quantize_static(net, images), images[0]),
        "conv static u8 layer": (
            quantize_static(net, images, layer_codes={"node_0": "u8", "node_2": "u8"}), images[0],
        ),
        "conv static u8": (quantize_static(net, images, codes="u8"), images[0]),
        "text fp32": (text, tokens),
        "text static s8": (quantize_static(text, [tokens]), tokens),
        "text dynamic u8": (quantize_dynamic(text, codes="u8"), tokens),
        "text dynamic s8": (quantize_dynamic(text, codes="s8"), tokens),
        "text embeddings": (quantize_embeddings(text), tokens),
        "text 4-bit blocks": (quantize_blocks(text, **blocks), tokens),
        "text 4-bit float": (quantize_blocks(text, **blocks, accuracy_level=1), tokens),
        "text all": (quantize_embeddings(quantize_dynamic(text)), tokens),
    }  # fmt: skip


# Shares of the largest answer. Float kernels differ in the order of their sums, by 1e-5. Codes are
# exact but for values in the middle between two, where such a difference decides: a step, the
# 255th of a range. Blocks allow activations to be rounded to int8, in steps of the 127th of a
# block's largest: today's onnxruntime does, 1.17.0 computes on floats.
TOLERANCE = {"fp32": 1e-5, "embeddings": 1e-5, "4-bit float": 1e-5, "4-bit blocks": 1 / 127}
CODE_STEP = 1 / 255


def oldest() -> str:
    found = [
        tomllib.loads(path.read_text())["runtime"]["onnxruntime_min"]
        for path in PROFILES.glob("*.toml")
    ]
    return min(found, key=lambda version: [int(n) for n in version.split(".")])


@pytest.fixture(scope="module")
def oldest_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has the oldest onnxruntime and, as a device for texts, click and tokenizers."""
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    if not Path(uv).exists():
        pytest.skip("uv is not installed")
    folder = tmp_path_factory.mktemp("oldest") / "venv"
    python = str(folder / "bin" / "python")
    # its wheels are for Python up to 3.12 and numpy 1
    version = "{}.{}".format(*sys.version_info) if sys.version_info < (3, 13) else "3.12"
    wanted = [f"onnxruntime=={oldest()}", "numpy<2", "click", "tokenizers"]
    for command in (
        [uv, "venv", "-q", "-p", version, folder],
        [uv, "pip", "install", "-q", "-p", python, "--only-binary", ":all:", *wanted],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            said = " ".join(done.stderr.split())
            if os.environ.get("CI"):
                pytest.fail(f"onnxruntime {oldest()} cannot be installed: {said}")
            pytest.skip(f"onnxruntime {oldest()} cannot be installed: {said}")
    return python


@pytest.fixture(scope="module")
def answers(
    oldest_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """What the oldest and today's onnxruntime answer, by the name of a form."""
    folder = tmp_path_factory.mktemp("forms")
    for name, (model, feed) in forms().items():
        onnx.save(model, folder / f"{name}.onnx")
        np.savez(folder / f"{name}.npz", **feed)
    versions = {}
    for python, era in ((oldest_python, "oldest"), (sys.executable, "today")):
        done = subprocess.run(
            [python, "-c", RUN_FOLDER, folder, era], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        versions[era] = json.loads(done.stdout)
    assert versions["oldest"] == oldest()
    assert versions["today"] != oldest()
    return lambda name: (
        np.load(folder / f"{name}-oldest.npy"),
        np.load(folder / f"{name}-today.npy"),
    )


@pytest.mark.parametrize("name", list(forms()))
def test_the_oldest_onnxruntime_answers_as_todays(
    answers: Callable[[str], tuple[np.ndarray, np.ndarray]], name: str
):
    before, now = answers(name)
    tolerance = TOLERANCE.get(name.split(maxsplit=1)[1], CODE_STEP)
    np.testing.assert_allclose(before, now, rtol=0, atol=tolerance * np.abs(now).max())


@pytest.mark.parametrize("name", list(forms()))
def test_quantized_answers_are_near_those_of_fp32(
    answers: Callable[[str], tuple[np.ndarray, np.ndarray]], name: str
):
    (before, _), (real, _) = answers(name), answers(f"{name.split()[0]} fp32")
    noise = ((before - real) ** 2).mean() / (real**2).mean()
    assert noise < (0.01 if "4-bit" in name else 0.001)


def test_a_bundle_verifies_on_the_oldest_onnxruntime(
    oldest_python: str, switches: Path, tiny_bert: str, tmp_path: Path
):
    config = TrainConfig(
        task="text-classification", model=tiny_bert, data=str(switches), method="full", lr=5e-3,
        epochs=1, batch_size=8, output=str(tmp_path / "run"), cpu=True,
    )  # fmt: skip
    train(config)
    profile = load_profile("raspberry-pi-4")
    assert profile.runtime.onnxruntime_min == oldest()
    # so small a net, taught so little, may lose anything and gains no speed
    result = export(
        tmp_path / "run", output=tmp_path / "bundle", profile=profile.name, precision="int8",
        max_drop=1.0, allow=("speed",), name="oldest",
    )  # fmt: skip
    # of the repository only what a device has: the environment has no torch and no onnx
    done = subprocess.run(
        [oldest_python, "-m", "edgetune.runtime.cli", "verify", str(result.bundle)],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(PROFILES.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "goldens answered as expected" in done.stdout
