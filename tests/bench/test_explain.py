"""Explanations against sums by hand on linear models, and against captum itself."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from edgetune.bench.explain import (
    BundleSubject,
    Explanation,
    RunSubject,
    explain,
    feature_layer,
    open_subject,
)
from edgetune.bench.explain_page import cards, coarse, overlay, shares_of, write_explanations
from edgetune.cli.eval import command as eval_command
from edgetune.cli.explain import command as explain_command
from edgetune.config import TrainConfig
from edgetune.errors import ConfigError, DataError
from edgetune.models.families import Family
from edgetune.models.load import Loaded, load_model
from edgetune.models.preprocessing import Preprocessing
from edgetune.runtime import EdgeModel
from edgetune.tasks import open_task
from edgetune.train.run import Run, RunRecord

FAMILY = Family(
    name="linear", source="torchvision", match=("linear",), blocks=(), head=("head",),
    output="head", int8="static",
)  # fmt: skip
# mean 1/2 and deviation 1/4 of every channel: a pixel p is (p / 255 - 1/2) * 4
SQUARE = Preprocessing(
    input_size=8, resize_size=8, crop_mode="squash", mean=(0.5,) * 3, std=(0.25,) * 3
)


def subject_of(loaded, task, labels):
    config = TrainConfig(task=task, model="m", data="d", output="o", max_length=32)
    run = Run(
        folder=Path("run"),
        config=config,
        record=RunRecord(
            status="finished", task=task, labels=labels, trainable_parameters=0, parameters=0,
            frozen_sha256="",
        ),
        family=loaded.family,
        task=open_task(task, loaded, labels, config),
    )  # fmt: skip
    loaded.network.eval().requires_grad_(False)
    return RunSubject(run)


def image_subject(network):
    loaded = Loaded(network=network, family=FAMILY, preprocessing=SQUARE)
    return subject_of(loaded, "image-classification", ("no", "yes"))


class LinearText(nn.Module):
    """logits = sum over tokens of embedding @ weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(8, 5)
        self.head = nn.Linear(5, 2)

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, attention_mask):
        return self.head((self.embeddings(input_ids) * attention_mask[..., None]).sum(1))


def word_tokenizer():
    ids = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[UNK]", "lamp", "on", "off", "the"])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def linear_text():
    loaded = Loaded(
        network=LinearText(), family=FAMILY, tokenizer_json=word_tokenizer(), pad_id=0,
        max_tokens=32,
    )  # fmt: skip
    return subject_of(loaded, "text-classification", ("off", "on"))


@pytest.fixture(scope="module")
def tiny_text(tiny_bert):
    labels = ("off", "on")
    loaded = load_model(tiny_bert, kind="text", labels=labels)
    torch.manual_seed(1)
    # a fresh network is near 0 everywhere; larger weights make it curved
    for parameter in loaded.network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return subject_of(loaded, "text-classification", labels)


@pytest.fixture
def picture(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return str(tmp_path / "a.png"), pixels


# -- texts ----------------------------------------------------------------------------------------


def test_integrated_gradients_of_a_linear_text_model_are_weight_times_input(linear_text):
    found = explain(linear_text, ["the lamp  on"], target="on")[0]
    assert found.method == "integrated-gradients"
    assert found.tokens == ("[CLS]", "the", " lamp", "  on")
    network = linear_text.network
    rows, padding = network.embeddings.weight, network.embeddings.weight[0]
    weight = network.head.weight[1]
    expected = [0.0, *[float((rows[i] - padding) @ weight) for i in (6, 3, 4)]]
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    assert found.completeness.total == pytest.approx(sum(expected), abs=1e-5)
    assert found.completeness.delta == pytest.approx(0, abs=1e-5)


def test_occlusion_of_a_linear_text_model_is_what_each_token_adds(linear_text):
    found = explain(linear_text, ["the lamp on"], target="on", method="occlusion")[0]
    network = linear_text.network
    weight = network.head.weight[1]
    expected = [0.0, *[float(network.embeddings.weight[i] @ weight) for i in (6, 3, 4)]]
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    assert found.completeness is None


def test_it_is_captums_layer_integrated_gradients_on_bert(tiny_text):
    from captum.attr import LayerIntegratedGradients

    text = "turn the lamp on please"
    found = explain(tiny_text, [text], target="off", steps=40)[0]
    ids = torch.from_numpy(tiny_text.encode(text).array)[None]
    baseline = ids.clone()
    baseline[0, 1:-1] = 0  # [CLS] and [SEP] stay
    network = tiny_text.network
    layer = LayerIntegratedGradients(
        lambda x: network(input_ids=x, attention_mask=torch.ones_like(x)).logits,
        network.bert.embeddings.word_embeddings,
    )
    expected, delta = layer.attribute(
        ids, baselines=baseline, target=0, n_steps=40, return_convergence_delta=True
    )
    np.testing.assert_allclose(found.values, expected.sum(-1)[0].numpy(), rtol=1e-3, atol=1e-5)
    assert found.completeness.delta == pytest.approx(delta.item(), abs=1e-4)
    assert abs(found.completeness.delta) < 0.05 * abs(found.completeness.difference)


def test_the_predicted_label_is_explained_where_none_is_named(linear_text):
    found = explain(linear_text, ["lamp"])[0]
    logits = linear_text.logits([linear_text.encode("lamp").array])[0]
    assert found.target == found.predicted == ("off", "on")[int(logits.argmax())]
    expected = np.exp(logits).max() / np.exp(logits).sum()
    assert found.probability == pytest.approx(expected, rel=1e-5)


def test_equal_input_gives_equal_values(tiny_text):
    first, second = (explain(tiny_text, ["lamp off"])[0].values for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "onn"}, "target: no label 'onn'; did you mean 'on'"),
        ({"method": "oclusion"}, "method: no 'oclusion'; did you mean 'occlusion'"),
        ({"method": "gradcam"}, "gradcam explains image models, this one takes texts"),
        ({"steps": 1}, "expected 2 steps or more"),
    ],
)
def test_what_cannot_be_explained_is_refused(linear_text, options, message):
    with pytest.raises(ConfigError, match=message):
        explain(linear_text, ["lamp"], **options)


def test_a_text_without_tokens_is_refused(linear_text):
    with pytest.raises(DataError, match="has no token"):
        explain(linear_text, [" "])


# -- images ---------------------------------------------------------------------------------------


class LinearImage(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3 * 8 * 8, 2)

    def forward(self, x):
        return self.head(x.flatten(1))


class Maps(nn.Module):
    """logits = head(mean of relu(maps)); the maps are 8 x 8."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.maps = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.maps(x).mean((2, 3)))


def test_integrated_gradients_of_a_linear_image_model_are_weight_times_input(picture):
    path, pixels = picture
    subject = image_subject(LinearImage())
    found = explain(subject, [path], target="yes")[0]
    assert found.method == "integrated-gradients"  # it has no feature maps
    weights = subject.network.head.weight[1].reshape(3, 8, 8).numpy()
    x = (pixels.transpose(2, 0, 1) / 255 - 0.5) * 4
    np.testing.assert_allclose(found.values, (weights * x).sum(0), atol=1e-4)
    assert found.completeness.delta == pytest.approx(0, abs=1e-4)
    np.testing.assert_array_equal(found.pixels, pixels)


def test_gradcam_by_hand(picture):
    path, _ = picture
    subject = image_subject(Maps())
    assert feature_layer(subject) is subject.network.maps
    found = explain(subject, [path], target="no")[0]
    assert found.method == "gradcam"
    with torch.no_grad():
        x = subject.batch([subject.encode(path).array])["pixels"]
        maps = subject.network.maps(x)[0]  # (4, 8, 8)
    alpha = subject.network.head.weight[0] / 64  # of a mean over 64 places
    expected = torch.einsum("c,chw->hw", alpha, maps).relu().numpy()
    np.testing.assert_allclose(found.values, expected, atol=1e-6)


def test_a_transformers_patch_embedding_is_no_feature_map():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 4, 4, 4)
            self.blocks = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))

    assert feature_layer(image_subject(Patches())) is None
    with pytest.raises(ConfigError, match="gradcam needs a network that ends in feature maps"):
        explain(image_subject(Patches()), [_grey()], method="gradcam")


def _grey():
    return np.full((8, 8, 3), 90, np.uint8)


def test_occlusion_is_captums_with_the_mean_colour_as_baseline(picture):
    from captum.attr import Occlusion

    path, pixels = picture
    subject = image_subject(Maps())
    found = explain(subject, [path], target="yes", method="occlusion", patches=4)[0]
    colour = pixels.reshape(-1, 3).mean(0).round()
    baseline = torch.tensor((colour / 255 - 0.5) * 4, dtype=torch.float32).view(1, 3, 1, 1)
    x = subject.batch([pixels])["pixels"]
    expected = Occlusion(subject.network).attribute(
        x, sliding_window_shapes=(3, 2, 2), strides=(3, 2, 2), target=1,
        baselines=baseline.expand_as(x),
    )  # fmt: skip
    np.testing.assert_allclose(found.values, expected[0, 0, ::2, ::2].numpy(), atol=1e-5)


# -- bundles, without torch -----------------------------------------------------------------------


def test_a_bundle_is_explained_by_what_it_loses_without_a_token(word_bundle):
    with EdgeModel.load(word_bundle) as model:
        found = explain(BundleSubject(model), ["good so good bad"], target="positive")[0]
    # its logit is how often "good" is there
    assert found.method == "occlusion"
    assert found.tokens == ("[CLS]", "good", " so", " good", " bad")
    assert found.values.tolist() == [0, 1, 0, 1, 0]
    assert (found.target, found.predicted) == ("positive", "positive")


def test_a_bundle_is_explained_by_what_it_loses_without_a_patch(color_bundle):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2, :2, 0] = 80  # red in one corner: mean 20
    with EdgeModel.load(color_bundle) as model:
        found = explain(BundleSubject(model), [pixels], patches=2)[0]
    assert found.target == "red"
    # the logit is the mean of 16 pixels: painted with 20, the corner costs 4 * 60 / 16
    np.testing.assert_allclose(found.values, [[15, -5], [-5, -5]], atol=1e-5)


def test_gradients_of_a_bundle_are_refused(word_bundle):
    subject = open_subject(word_bundle)
    with pytest.raises(ConfigError, match="gradients, which a bundle has not; use occlusion"):
        explain(subject, ["good"], method="integrated-gradients")
    subject.close()


def test_the_temperature_of_a_bundle_is_that_of_its_scores(word_bundle, seal):
    from edgetune.runtime.manifest import Calibration

    calibration = Calibration(temperature=2.0, ece_before=0.2, ece_after=0.1, samples=50)
    seal(word_bundle, calibration=calibration)
    with EdgeModel.load(word_bundle) as model:
        found = explain(BundleSubject(model), ["good"])[0]
        assert found.probability == pytest.approx(model.predict("good").score)


# -- pages and commands ---------------------------------------------------------------------------


def explanation(**changes):
    fields = {
        "shown": "<b> on", "method": "occlusion", "target": "on", "predicted": "off",
        "probability": 0.25, "values": np.array([0.0, 2.0, -1.0]),
        "tokens": ("[CLS]", "<b>", " on"), "special": (True, False, False),
    }  # fmt: skip
    return Explanation(**{**fields, **changes})


def test_a_page_colours_tokens_and_escapes_them(tmp_path):
    write_explanations(tmp_path / "a.html", [explanation()], title="t", facts={"model": "m"})
    page = (tmp_path / "a.html").read_text()
    assert '<span style="background:rgba(0,114,178,0.600)" title="+2.0000">&lt;b&gt;</span>' in page
    assert 'rgba(213,94,0,0.300)" title="-1.0000">on</span>' in page
    assert "<b>" not in page
    assert "[CLS]" not in page
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", page)


def test_what_the_model_did_not_read_is_said():
    assert "5 characters more, not read" in cards([explanation(shown="<b> on later")])


def test_a_map_lies_over_the_image_in_its_colours():
    pixels = np.full((4, 4, 3), 100, np.uint8)
    found = overlay(pixels, np.array([[1.0, -1.0]]))
    # 100 * (1 - 0.75) + 0.75 * colour
    np.testing.assert_array_equal(found[0, 0], [25, 110, 158])
    np.testing.assert_array_equal(found[0, 3], [185, 96, 25])


def test_maps_are_averaged_and_scaled_by_hand():
    values = np.arange(16.0).reshape(4, 4)
    np.testing.assert_array_equal(coarse(values, 2), [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(shares_of(np.array([2.0, -4.0])), [0.5, -1.0])
    np.testing.assert_array_equal(shares_of(np.zeros(2)), [0, 0])


def test_the_command_explains_a_bundle(word_bundle, tmp_path):
    output = tmp_path / "new" / "why.html"
    arguments = [str(word_bundle), "good bad good", "--target", "positive"]
    done = CliRunner().invoke(explain_command, [*arguments, "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "positive: score 0.7311, by occlusion" in done.output
    assert "+1.0000  good" in done.output
    assert output.read_text().startswith("<!DOCTYPE html>")
    done = CliRunner().invoke(explain_command, [*arguments, "--json"])
    found = json.loads(done.stdout)[0]
    assert found["tokens"] == ["[CLS]", "good", "bad", "good"]
    assert found["values"] == [0, 1, 0, 1]


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.csv"
    rows = [("good", "positive", "web"), ("bad good bad", "positive", "web")] * 2
    rows += [("bad", "negative", "shop"), ("good good", "negative", "shop")] * 2
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "place"), *rows])
    return path


def test_eval_shows_slices_and_explains_the_worst_mistakes(word_bundle, seal, reviews, tmp_path):
    from edgetune.runtime.manifest import Abstention

    kept = Abstention(threshold=0.8, accuracy=0.9, low=0.9, coverage=0.5, samples=9)
    seal(word_bundle, abstention=kept)
    report = tmp_path / "report.html"
    arguments = [str(word_bundle), "--data", str(reviews), "--slices", "place", "--min-slice", "2"]
    done = CliRunner().invoke(eval_command, [*arguments, "--report", str(report), "--explain", "2"])
    assert done.exit_code == 0, done.output
    assert re.search(r"shop +4 +0\.5000", done.output)
    assert re.search(r"gap: web is 0\.0 points above shop", done.output)
    # scores: sigmoid(1) = 0.73, but sigmoid(2) = 0.88 of two wrong answers
    assert "25.0 % of the samples are answered, accuracy of those 0.0000" in done.output
    page = report.read_text()
    assert "Groups by place, weakest first" in page
    assert "Explanations" in page
    assert page.count('class="explained"') == 2
    assert "Accuracy of the surest answers" in page
    done = CliRunner().invoke(eval_command, [*arguments, "--json"])
    found = json.loads(done.stdout)
    assert [g["value"] for g in found["slices"][0]["groups"]] == ["shop", "web"]
    assert found["kept"]["answered"] == 2


def test_explanations_need_a_report_to_stand_in(word_bundle, reviews):
    arguments = [str(word_bundle), "--data", str(reviews), "--explain", "2"]
    done = CliRunner().invoke(eval_command, arguments)
    assert isinstance(done.exception, ConfigError)
    assert "name it with --report" in str(done.exception)
