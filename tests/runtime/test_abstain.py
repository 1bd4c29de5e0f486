"""Scores of a bundle with a temperature and a threshold: predict, run, serve, learned states."""

import dataclasses
import json
import math

import numpy as np
import pytest

from edgetune.errors import IntegrityError
from edgetune.runtime import EdgeModel
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.learn.ridge import Head
from edgetune.runtime.learn.state import State
from edgetune.runtime.manifest import (
    Abstention,
    Calibration,
    TensorSpec,
    TrainingStep,
    dump_manifest,
    parse_manifest,
)
from edgetune.runtime.tasks.classification import Scoring, classify, softmax

CALIBRATION = Calibration(temperature=2.0, ece_before=0.2, ece_after=0.05, samples=100)
ABSTENTION = Abstention(threshold=0.6, accuracy=0.9, low=0.91, coverage=0.8, samples=100)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def bundle(word_bundle, seal):
    """Words, with temperature 2: logits are counts of "bad" and "good"."""
    seal(word_bundle, calibration=CALIBRATION, abstention=ABSTENTION)
    return word_bundle


def test_scores_are_of_logits_over_the_temperature(bundle):
    found = EdgeModel.load(bundle).predict("good good bad good", all_scores=True)
    # counts 1 and 3: (3 - 1) / 2 = 1
    assert (found.label, found.score) == ("positive", pytest.approx(sigmoid(1)))
    assert found.scores == pytest.approx({"negative": sigmoid(-1), "positive": sigmoid(1)})


@pytest.mark.parametrize(
    ("text", "label", "abstained"),
    # sigmoid(1 / 2) = 0.622, sigmoid(0) = 0.5
    [("good", "positive", False), ("bad bad", "negative", False), ("good bad", "negative", True)],
)
def test_answers_below_the_threshold_keep_their_label_and_are_marked(
    bundle, text, label, abstained
):
    found = EdgeModel.load(bundle).predict(text)
    assert (found.label, found.abstained) == (label, abstained)


def test_a_bundle_without_either_answers_as_ever(word_bundle):
    found = EdgeModel.load(word_bundle).predict("good")
    assert (found.score, found.abstained) == (pytest.approx(sigmoid(1)), None)
    assert "abstained" not in found.to_dict()


def test_goldens_are_raw_logits(bundle):
    assert EdgeModel.load(bundle).self_test() == 0.0
    raw = EdgeModel.load(bundle).outputs("good")["logits"]
    np.testing.assert_array_equal(raw, [[0, 1]])


def test_the_shell_shows_it(bundle, rt):
    lines = rt("run", bundle, "good", "good bad").stdout.decode().splitlines()
    assert lines == ["positive\t0.6225\tgood", "negative\t0.5000\tgood bad\tabstained"]
    found = [
        json.loads(x) for x in rt("run", bundle, "good", "bad good", "--json").stdout.splitlines()
    ]
    assert [f["abstained"] for f in found] == [False, True]
    answer = json.loads(rt("serve-stdin", bundle, stdin=b"bad good\n").stdout)
    assert answer["abstained"] is True
    info = rt("info", bundle).stdout.decode()
    assert "divided by temperature 2: calibration error 20.0 -> 5.0 points" in info
    assert "below score 0.6000: 80.0 % of 100 samples answered, accuracy at least 0.9100" in info


def test_no_temperature_changes_a_label():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 5)).astype(np.float32) * 1e-6
    labels = list("abcde")
    expected = [labels[i] for i in logits.argmax(axis=1)]
    for temperature in (1e-3, 1.0, 1e3):
        scoring = Scoring(temperature=temperature)
        found = classify(logits, labels, all_scores=False, scoring=scoring)
        assert [f.label for f in found] == expected


def test_the_largest_logits_stay_finite():
    big = np.float32([[3e38, -3e38, 0.0]])
    np.testing.assert_array_equal(softmax(big, 1e-3), [[1, 0, 0]])


# -- learned states -------------------------------------------------------------------------------

HEAD = Head(
    labels=("negative", "positive"), weights=np.zeros((2, 2), np.float32),
    bias=np.zeros(2, np.float32), temperature=0.5,
)  # fmt: skip


def state(**fields):
    return State(labels=("negative", "positive"), **fields)


def step(*trainable):
    return TrainingStep(
        method="lora", optimizer="adamw", gradients="float32", trainable=trainable, inputs=(),
        latents=(), decayed=(), checked_steps=20, worst_gradient=0.0,
    )  # fmt: skip


def spec(name, *shape):
    return TensorSpec(name=name, dtype="float32", shape=shape)


def test_the_temperature_is_of_the_factorys_head_only(bundle, seal):
    seal(bundle, training=step(spec("lora", 2, 2), spec("head", 2, "classes")))
    manifest = open_bundle(bundle).manifest
    zeros = np.zeros((2, 2), np.float32)
    assert state().has_head_of(manifest)
    assert state(tensors={"lora": zeros}).has_head_of(manifest)
    assert not state(tensors={"lora": zeros, "head": zeros}).has_head_of(manifest)
    assert not state(head=HEAD).has_head_of(manifest)
    assert not State(labels=("positive", "negative")).has_head_of(manifest)


def test_a_learned_head_is_not_divided_by_it_and_still_abstains(bundle):
    model = EdgeModel.load(bundle)
    logits = {"logits": np.float32([[0.0, 1.0], [0.0, 0.2]])}
    factory = model.task.results(logits, model.labels, all_scores=False)
    learned = model.task.results(logits, model.labels, all_scores=False, learned=True)
    assert [f.score for f in factory] == pytest.approx([sigmoid(0.5), sigmoid(0.1)])
    assert [f.score for f in learned] == pytest.approx([sigmoid(1.0), sigmoid(0.2)])
    assert [f.abstained for f in learned] == [False, True]


def test_a_state_of_the_same_head_keeps_the_temperature(bundle):
    model = EdgeModel.load(bundle)
    before = model.predict("good")
    model.use(state())
    assert model.predict("good") == before
    model.use(State(labels=("no", "yes")))  # what the head stands for has changed
    assert model.predict("good").score == pytest.approx(sigmoid(1))


# -- the manifest ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": {"temperature": 0.0}}, "calibration: temperature: expected 0.001 to 1000"),
        ({"calibration": {"temperature": 1e4}}, "calibration: temperature: expected 0.001 to 1000"),
        ({"abstention": {"threshold": 1.5}}, "abstention: threshold: expected 0 to 1, got 1.5"),
    ],
)
def test_values_out_of_bounds_are_refused(bundle, changes, message):
    manifest = open_bundle(bundle).manifest
    for key, values in changes.items():
        record = dataclasses.replace(getattr(manifest, key), **values)
        manifest = dataclasses.replace(manifest, **{key: record})
    with pytest.raises(IntegrityError, match=message):
        parse_manifest(dump_manifest(manifest), where="m")
