"""Several labels at once, and numbers, on the device."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_bundles import base_manifest

from edgetune.errors import ConfigError, IntegrityError
from edgetune.runtime import EdgeModel
from edgetune.runtime.tasks.multilabel import MultiLabel
from edgetune.runtime.tasks.regression import Value, Values

SCALE = {"mean": 1000.0, "std": 25.0}


@pytest.fixture
def label_bundle(word_bundle, seal):
    """text-multilabel-classification; logits = how often "bad", how often "good"."""
    seal(word_bundle, task="text-multilabel-classification")
    return word_bundle


def values(labels=("value",), **options):
    manifest = dataclasses.replace(base_manifest(), labels=labels)
    return Values(manifest, {**SCALE, **options})


def told(logits, labels=("value",)):
    return values().results({"logits": logits}, labels, all_scores=False, learned=False)


def test_labels_of_half_and_more_are_given(label_bundle):
    model = EdgeModel.load(label_bundle)
    # sigmoid(0) = 0.5 is enough, sigmoid(1) = 0.7311, sigmoid(2) = 0.8808
    both = model.predict("bad bad good")
    assert both.labels == ("negative", "positive")
    assert both.scores == pytest.approx({"negative": 0.880797, "positive": 0.731059}, abs=1e-6)
    assert model.predict("good").scores["negative"] == 0.5


def test_thresholds_go_by_the_label_and_may_leave_none(label_bundle, seal):
    options = {"max_length": 6, "pad_id": 0, "thresholds": {"negative": 0.8}}
    seal(label_bundle, options=options)
    model = EdgeModel.load(label_bundle)
    assert model.predict("good").labels == ("positive",)
    assert model.predict("bad").labels == ("positive",)
    assert model.predict("bad bad").labels == ("negative", "positive")
    seal(label_bundle, options={**options, "thresholds": {"negative": 0.8, "positive": 0.9}})
    model = EdgeModel.load(label_bundle)
    assert model.predict("good") == MultiLabel(labels=(), scores={})
    everything = model.predict("good", all_scores=True)
    assert everything.labels == ()
    assert everything.scores == pytest.approx({"negative": 0.5, "positive": 0.731059}, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"thresholds": {"neutral": 0.5}}, "no label 'neutral'"),
        ({"thresholds": {"negative": 1.5}}, "expected 0 to 1, got 1.5"),
        ({"thresholds": [0.5]}, "thresholds"),
        ({"threshold": {}}, "unknown key 'threshold'"),
        ({"mean": 1.0}, "unknown key 'mean'"),
    ],
)
def test_options_of_labels_are_strict(label_bundle, seal, options, what):
    seal(label_bundle, options={"max_length": 6, "pad_id": 0, **options})
    with pytest.raises(IntegrityError, match=what):
        EdgeModel.load(label_bundle)


def test_a_class_task_takes_no_thresholds(word_bundle, color_bundle, seal):
    seal(word_bundle, options={"max_length": 6, "pad_id": 0, "thresholds": {}})
    with pytest.raises(IntegrityError, match="unknown key 'thresholds'"):
        EdgeModel.load(word_bundle)
    seal(color_bundle, options={"thresholds": {}})
    with pytest.raises(IntegrityError, match="unknown key 'thresholds'"):
        EdgeModel.load(color_bundle)


def test_a_value_is_in_its_own_unit():
    assert told(np.float32([[0.0], [2.0], [-0.5]])) == [
        Value(value=1000.0), Value(value=1050.0), Value(value=987.5),
    ]  # fmt: skip
    assert Value(value=987.5).to_dict() == {"value": 987.5}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"std": 0.0}, "out of bounds"),
        ({"std": -1.0}, "out of bounds"),
        ({"mean": float("nan")}, "out of bounds"),
        ({"mean": "5"}, "mean"),
        ({"scale": 1.0}, "unknown key 'scale'"),
    ],
)
def test_options_of_values_are_strict(options, what):
    with pytest.raises(IntegrityError, match=what):
        values(**options)


def test_a_scale_is_needed_and_one_output():
    with pytest.raises(IntegrityError, match="key 'mean' is missing"):
        Values(dataclasses.replace(base_manifest(), labels=("value",)), {})
    with pytest.raises(IntegrityError, match="a regression has one, got 2"):
        values(labels=("a", "b"))
    with pytest.raises(IntegrityError, match="one logit a sample, got 2"):
        told(np.float32([[0.0, 1.0]]), labels=("a", "b"))


@pytest.mark.parametrize("logit", [np.inf, np.nan])
def test_what_is_no_number_is_refused(logit):
    with pytest.raises(IntegrityError, match="infinite or no number"):
        told(np.float32([[logit]]))


def test_the_shell_shows_every_label_given(label_bundle, rt):
    plain = rt("run", label_bundle, "bad bad good")
    assert plain.stdout.decode() == "negative 0.8808, positive 0.7311\tbad bad good\n"
    found = json.loads(rt("run", label_bundle, "good", "--json").stdout)
    assert found["labels"] == ["negative", "positive"]
    assert found["scores"] == pytest.approx({"negative": 0.5, "positive": 0.731059}, abs=1e-6)


def test_neither_watching_nor_learning_takes_several_labels(label_bundle, tmp_path):
    with pytest.raises(ConfigError, match="gives no one class a sample, so there is nothing to"):
        EdgeModel.load(label_bundle, watch=tmp_path / "watch")
    assert not (tmp_path / "watch").exists()
    with pytest.raises(ConfigError, match="cannot learn: task text-multilabel-classification"):
        EdgeModel.load(label_bundle).learner(tmp_path / "learned")
