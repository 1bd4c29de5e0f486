"""Loading from local folders and torchvision: what comes with a model, and what is refused."""

import io
import zipfile

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from edgetune.errors import ConfigError
from edgetune.models.load import load_model
from edgetune.models.preprocessing import Preprocess
from edgetune.models.xlnet import RightPaddedXLNet

ENCODER = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip


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
        ("timm:resnet19", "none", r"timm has no model 'resnet19'; did you mean 'resnet\d+"),
        ("timm:resnet18.nope", "none", "Invalid pretrained tag"),
        ("timm:levit_128", "none", "'levit_128' is of no known family"),
        ("timm:resnetv2_18", "none", "built unlike the other models of family resnet-timm"),
        ("timm:resnet18", "nope.safetensors", r"weights nope\.safetensors: no such file"),
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


def word_tokenizer(folder, *, pad: bool, single: str = "$A") -> None:
    vocabulary = {word: i for i, word in enumerate(["<end>", "<pad>", "<unk>", "on", "off"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<end>", 0)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>",
        pad_token="<pad>" if pad else None,
    ).save_pretrained(folder)  # fmt: skip


def test_gpt2_pads_with_its_end_token_and_its_head_knows(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=5, n_embd=8, n_layer=1, n_head=1, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    word_tokenizer(tmp_path, pad=False)
    loaded = load_model(str(tmp_path), kind="text", labels=["a", "b", "c"])
    assert loaded.pad_id == loaded.network.config.pad_token_id == 0
    assert loaded.max_tokens == 32
    ids = torch.tensor([[3, 4, 3, 0, 0]])
    mask = (ids != 0).long()
    network = loaded.network.eval()
    with torch.no_grad():
        padded = network(input_ids=ids, attention_mask=mask).logits
        alone = network(input_ids=ids[:, :3]).logits
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (transformers.XLNetConfig(vocab_size=5, d_model=8, n_layer=1, n_head=1, d_inner=8), 512),
        (transformers.RobertaConfig(vocab_size=5, max_position_embeddings=66, **ENCODER), 64),
        (transformers.MPNetConfig(vocab_size=5, max_position_embeddings=66, **ENCODER), 64),
        (transformers.DebertaV2Config(vocab_size=5, **ENCODER), 512),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_longest_text_is_what_the_table_of_positions_holds(config, tokens, tmp_path):
    auto = transformers.AutoModelForSequenceClassification
    auto.from_config(config).save_pretrained(tmp_path)
    word_tokenizer(tmp_path, pad=True, single="$A <end>")
    loaded = load_model(str(tmp_path), kind="text", labels=["a", "b"])
    assert loaded.max_tokens == tokens
    assert loaded.pad_id == 1
    assert isinstance(loaded.network, RightPaddedXLNet) == (config.model_type == "xlnet")


@pytest.fixture(scope="module")
def photo(shared) -> np.ndarray:
    with zipfile.ZipFile(shared / "images" / "flowers5.zip") as archive:
        name = min(n for n in archive.namelist() if n.endswith(".jpg"))
        return np.array(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))


def assert_alike(preprocessing, photo: np.ndarray, reference) -> None:
    """Compare with our preprocessing, in levels of 255.

    Bytes are rounded and cut off between two passes, ours are not: at edges beside black or
    white, bicubic's overshoot shows. A crop one pixel off would differ by levels everywhere.
    """
    ours = Preprocess(preprocessing)(torch.from_numpy(photo)[None])[0].numpy()
    assert ours.shape == tuple(reference.shape)
    levels = np.abs(ours - np.asarray(reference)) * np.array(preprocessing.std)[:, None, None] * 255
    assert levels.mean() < 0.35
    assert np.quantile(levels, 0.995) < 1.5
    assert levels.max() < (1.1 if preprocessing.interpolation == "bilinear" else 20)


PROCESSORS = {
    "swin": (
        transformers.SwinConfig(
            image_size=32, embed_dim=8, depths=[1], num_heads=[1], window_size=4
        ),
        transformers.ViTImageProcessor(
            resample=3, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
        ),
    ),
    # both edges to 256, then the middle 224; its published class has two heads
    "deit": (
        transformers.DeiTConfig(image_size=32, **ENCODER),
        transformers.DeiTImageProcessor(),
    ),
    "convnext of 224, which crops": (
        transformers.ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1),
        transformers.ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875),
    ),
    "convnext of 384, which does not": (
        transformers.ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1),
        transformers.ConvNextImageProcessor(size={"shortest_edge": 384}),
    ),
    # blue first, and no normalisation
    "mobilevit": (
        transformers.MobileViTConfig(
            image_size=64, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[8] * 7, num_attention_heads=2
        ),
        transformers.MobileViTImageProcessor(
            size={"shortest_edge": 288}, crop_size={"height": 256, "width": 256}, resample=2
        ),
    ),
    "mobilenet_v2": (
        transformers.MobileNetV2Config(depth_multiplier=0.35),
        transformers.MobileNetV2ImageProcessor(),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_is_the_image_processors(name, photo, tmp_path):
    config, processor = PROCESSORS[name]
    config.architectures = []
    network = transformers.AutoModelForImageClassification.from_config(config)
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    spec = load_model(str(tmp_path), kind="image", labels=["a", "b"]).preprocessing
    reference = processor(Image.fromarray(photo), return_tensors="np")["pixel_values"][0]
    assert_alike(spec, photo, reference)


def test_a_distilled_deit_gets_one_head_that_trains(tmp_path):
    config = transformers.DeiTConfig(image_size=32, **ENCODER)
    transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path)
    transformers.DeiTImageProcessor().save_pretrained(tmp_path)
    network = load_model(str(tmp_path), kind="image", labels=["a", "b", "c"]).network
    assert type(network) is transformers.DeiTForImageClassification
    assert network.classifier.out_features == 3


def test_a_filter_that_edgetune_lacks_is_refused(tmp_path):
    transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=32, **ENCODER)
    ).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(resample=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Pillow's filter 1; edgetune has bilinear"):
        load_model(str(tmp_path), kind="image", labels=["a", "b"])


@pytest.mark.parametrize("name", ["vit_b_32", "efficientnet_b0", "inception_v3"])
def test_preprocessing_is_torchvisions(name, photo):
    spec = load_model(
        f"torchvision:{name}", kind="image", labels=["a", "b"], weights="none"
    ).preprocessing
    reference = torchvision.models.get_model_weights(name).DEFAULT.transforms()(
        Image.fromarray(photo)
    )
    if name == "inception_v3":  # its published form goes on to -1..1 inside
        published = torchvision.models.Inception3(transform_input=True, init_weights=False)
        reference = published._transform_input(reference[None])[0]
    assert_alike(spec, photo, reference)


def test_inception_has_no_second_head_and_takes_weights_that_have_one(tmp_path):
    source = torchvision.models.Inception3(init_weights=False, transform_input=True)
    path = tmp_path / "inception.safetensors"
    save_file(source.state_dict(), path)
    network = load_model(
        "torchvision:inception_v3", kind="image", labels=["a", "b"], weights=str(path)
    ).network
    assert isinstance(network.train()(torch.randn(2, 3, 96, 96)), torch.Tensor)
    # the features of the published network, on what it makes of the same pixels
    pixels = torch.rand(1, 3, 96, 96)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    source.fc = network.fc = torch.nn.Identity()
    with torch.no_grad():
        theirs = source.eval()((pixels - mean) / std)
        source.eval()
        network.load_state_dict(
            {n: t for n, t in source.state_dict().items() if n in network.state_dict()}
        )
        ours = network.eval()((pixels - 0.5) / 0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_timm_comes_with_its_own_preprocessing_and_local_weights(name, photo, tmp_path):
    torch.manual_seed(0)
    source = timm.create_model(name)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    loaded = load_model(f"timm:{name}", kind="image", labels=["a", "b"], weights=str(path))
    last, first = loaded.family.output, next(iter(source.state_dict()))
    assert loaded.family.source == "timm"
    assert loaded.network.get_submodule(last).out_features == 2
    assert torch.equal(loaded.network.state_dict()[first], source.state_dict()[first])
    settings = timm.data.resolve_data_config(source.pretrained_cfg)
    reference = timm.data.create_transform(**settings)(Image.fromarray(photo))
    assert_alike(loaded.preprocessing, photo, reference)


def test_a_timm_folder_of_transformers_loads_as_timm(tmp_path):
    config = transformers.TimmWrapperConfig(
        architecture="resnet10t", num_labels=5,
        pretrained_cfg={"input_size": [3, 160, 160], "crop_pct": 0.8, "interpolation": "bilinear"},
    )  # fmt: skip
    torch.manual_seed(0)
    source = transformers.TimmWrapperForImageClassification(config)
    source.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), kind="image", labels=["a", "b", "c"])
    assert loaded.family.name == "resnet-timm"
    name = "layer1.0.conv1.weight"
    assert torch.equal(
        loaded.network.get_parameter(name), source.get_parameter(f"timm_model.{name}")
    )
    assert loaded.network.get_submodule("fc").out_features == 3
    spec = loaded.preprocessing
    assert (spec.input_size, spec.resize_size, spec.interpolation) == (160, 200, "bilinear")


def test_a_text_task_wants_no_image_model():
    with pytest.raises(ConfigError, match="timm models classify images, the task is text"):
        load_model("timm:resnet18", kind="text", labels=["a", "b"])
