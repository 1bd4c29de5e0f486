"""Loading from local folders and torchvision: what comes with a model, and what is refused."""

import pytest
import torch
import torchvision
import transformers
from safetensors.torch import save_file

from edgetune.errors import ConfigError
from edgetune.models.load import load_model


def test_batchnorm_statistics_are_averaged_not_replaced(tmp_path):
    config = transformers.MobileNetV2Config(depth_multiplier=0.35)
    transformers.MobileNetV2ForImageClassification(config).save_pretrained(tmp_path)
    transformers.MobileNetV2ImageProcessor().save_pretrained(tmp_path)
    network = load_model(str(tmp_path), kind="image", labels=["a", "b"]).network
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 52
    assert {m.momentum for m in norms} == {0.1}


def test_preprocessing_is_read_from_the_folder(shared):
    folder = shared / "weights" / "mobilenet_v2_1.0_224-imagenet"
    spec = load_model(str(folder), kind="image", labels=["a", "b"]).preprocessing
    assert spec is not None
    assert (spec.input_size, spec.resize_size, spec.crop_mode) == (224, 256, "center")
    assert spec.mean == spec.std == (0.5, 0.5, 0.5)


def test_labels_become_the_head(minilm):
    loaded = load_model(minilm, kind="text", labels=["x", "y", "z"])
    assert loaded.network.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert loaded.max_tokens == 512
    assert loaded.pad_id == 0


def test_torchvision_takes_local_weights_whole(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.squeezenet1_1(weights=None)
    path = tmp_path / "squeezenet.safetensors"
    save_file(source.state_dict(), path)
    loaded = load_model(
        "torchvision:squeezenet1_1", kind="image", labels=["a", "b"], weights=str(path)
    )
    name = "features.3.squeeze.weight"
    assert torch.equal(loaded.network.get_parameter(name), source.get_parameter(name))
    assert loaded.network.get_submodule("classifier.1").out_channels == 2


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("torchvision:resnet19", "none", r"no model 'resnet19'; did you mean 'resnet\d+'"),
        ("torchvision:vgg11", "none", "'vgg11' is of no known family"),
        ("torchvision:resnet18", "nope.safetensors", r"weights nope\.safetensors: no such file"),
        ("./nope", "default", "no such folder"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(model, weights, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(model, kind="image", labels=["a", "b"], weights=weights)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    with pytest.raises(ConfigError, match=r"do not fit the model"):
        load_model("torchvision:resnet18", kind="image", labels=["a"], weights=str(path))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        load_model(str(tmp_path), kind="text", labels=["a", "b"])
