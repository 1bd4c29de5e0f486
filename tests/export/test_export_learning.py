"""A run becomes a bundle that learns: statistics, a training step, and both used on the device."""

import dataclasses
import json

import numpy as np
import onnx
import pytest

from edgetune.config import TrainConfig
from edgetune.errors import ConfigError, GateError
from edgetune.export import export
from edgetune.export.learning import canary_note
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.learn.material import read_material
from edgetune.runtime.learn.statistics import expand
from edgetune.runtime.model import EdgeModel
from edgetune.train import open_run, run_dataset, train

SHIP = {"max_drop": 1.0, "allow": ("speed", "samples", "accuracy")}


@pytest.fixture(scope="module")
def text_run(switches, tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning-text") / "run"
    train(
        TrainConfig(
            task="text-classification", model=tiny_bert, data=str(switches), method="full",
            lr=5e-3, epochs=4, batch_size=8, output=str(folder), cpu=True,
        )
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def image_run(colours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning-image") / "run"
    train(
        TrainConfig(
            task="image-classification", model="torchvision:resnet18", weights="none",
            data=str(colours), method="full", lr=1e-3, epochs=3, batch_size=12, image_size=32,
            output=str(folder), cpu=True,
        )
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def lora_bundle(text_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("lora") / "bundle"
    export(text_run, output=output, rungs=("int8-dynamic",), learn="lora", learn_rank=4, **SHIP)
    return output


def test_the_prior_is_that_of_the_training_samples(text_run, tmp_path):
    export(text_run, output=tmp_path / "b", precision="fp32")
    with EdgeModel.load(tmp_path / "b") as model:
        material = read_material(model.bundle)
        split = run_dataset(open_run(text_run)).splits["train"]
        rows = np.concatenate([model.outputs(x)["features"] for x in split.inputs])
    prior = expand(material.prior)
    for place, label in enumerate(prior.labels):
        of_class = rows[[x == label for x in split.labels]]
        assert prior.counts[place] == len(of_class)
        np.testing.assert_allclose(prior.means[place], of_class.mean(axis=0), atol=1e-5)
    # the diagonal of the scatter is stored exactly, in float32
    np.testing.assert_allclose(np.diag(prior.gram), (rows**2).sum(axis=0), rtol=1e-3)


def test_lora_ships_as_inputs_with_defaults_and_one_weights_file(lora_bundle):
    manifest = open_bundle(lora_bundle).manifest
    assert manifest.training.method == "lora"
    assert manifest.training.gradients == "int8"
    assert manifest.training.checked_steps >= 20
    # two encoder layers, query and value, two factors each; the head's weight and bias
    names = [spec.name for spec in manifest.training.trainable]
    assert sum("lora_" in name for name in names) == 8
    inference = onnx.load(lora_bundle / "model.onnx", load_external_data=False)
    step = onnx.load(lora_bundle / "train.onnx", load_external_data=False)
    assert set(names) <= {v.name for v in inference.graph.input}
    assert set(names) <= {t.name for t in inference.graph.initializer}

    def places(model):
        return {
            t.name: [(e.key, e.value) for e in t.external_data]
            for t in model.graph.initializer
            if t.external_data
        }

    shared = places(inference).keys() & places(step).keys()
    assert shared
    assert all(places(inference)[n] == places(step)[n] for n in shared)
    assert all(dict(p)["location"] == "weights.bin" for p in places(step).values())


def test_a_trained_lora_answers_in_the_same_session(lora_bundle, text_run, tmp_path):
    split = run_dataset(open_run(text_run)).splits["train"]
    with EdgeModel.load(lora_bundle) as model:
        session = model.session
        before = model.outputs(split.inputs[0])["logits"]
        with model.trainer(tmp_path / "s") as trainer:
            report = trainer.fit(list(split.inputs[:24]), list(split.labels[:24]), epochs=2)
            assert report.losses[-1] < report.losses[0] * 1.5
            state = trainer.candidate()
        model.use(dataclasses.replace(state))
        after = model.predict(split.inputs[0], all_scores=True)
        assert model.session is session
        model.use(None)
        factory = model.predict(split.inputs[0], all_scores=True)
        np.testing.assert_array_equal(model.outputs(split.inputs[0])["logits"], before)
    assert after.scores != factory.scores


def test_the_last_block_of_a_quantized_network_learns_in_float(image_run, tmp_path):
    export(image_run, output=tmp_path / "b", rungs=("int8-static",), learn="last:1", **SHIP)
    manifest = open_bundle(tmp_path / "b").manifest
    assert manifest.precision == "int8"
    (latent,) = manifest.training.latents
    assert latent.dtype == "uint8"  # codes: a quarter of the bytes
    split = run_dataset(open_run(image_run)).splits["train"]
    with EdgeModel.load(tmp_path / "b") as model:
        assert model.self_test() <= manifest.goldens.tolerance
        with model.trainer(tmp_path / "s") as trainer:
            report = trainer.fit(list(split.inputs[:12]), list(split.labels[:12]), epochs=2)
            assert report.steps >= 2


def test_a_projection_travels(text_run, tmp_path):
    export(text_run, output=tmp_path / "b", precision="fp32", learn_projection=64)
    with EdgeModel.load(tmp_path / "b") as model, model.learner(screen=False) as learner:
        assert learner.statistics.width == 64
        learner.add(["turn the door on now", "turn please valve on"], "on")
        assert learner.candidate().head.weights.shape == (64, 2)


def test_a_bundle_that_is_to_learn_nothing_carries_nothing(text_run, tmp_path):
    export(text_run, output=tmp_path / "b", precision="fp32", learn="none")
    assert not (tmp_path / "b" / "learn.npz").exists()
    assert "training" not in json.loads((tmp_path / "b" / "manifest.json").read_text())
    with EdgeModel.load(tmp_path / "b") as model, pytest.raises(ConfigError, match="--learn none"):
        model.learner()


@pytest.mark.parametrize("learn", ["lora:0", "last", "everything", "head:2", "last:1:2", ""])
def test_an_unknown_method_is_refused_before_any_work(text_run, tmp_path, learn):
    with pytest.raises(ConfigError, match="learn: "):
        export(text_run, output=tmp_path / "b", learn=learn)
    assert not (tmp_path / "b").exists()


def test_more_blocks_than_there_are_get_one_line(text_run, tmp_path):
    with pytest.raises(ConfigError, match="2 blocks"):
        export(text_run, output=tmp_path / "b", precision="fp32", learn="last:3")


def test_a_device_with_too_little_memory_is_refused(text_run, tmp_path):
    tight = tmp_path / "tight.toml"
    tight.write_text(
        'name = "tight"\ndescription = "64 MiB"\n'
        '[cpu]\narch = "x86_64"\nmodel = "any"\ncores = 1\nfeatures = []\nint8 = "exact"\n'
        "[memory]\ntotal_mib = 64\navailable_mib = 20\n"
        '[runtime]\nonnxruntime_min = "1.17.0"\nintra_op_threads = 1\n'
    )
    with pytest.raises(GateError, match="learning takes"):
        export(text_run, output=tmp_path / "b", precision="fp32", profile=str(tight))
    assert not (tmp_path / "b").exists()


def test_a_small_canary_is_said():
    assert "30 validation samples" in canary_note(30)
    assert canary_note(1000) == ""
