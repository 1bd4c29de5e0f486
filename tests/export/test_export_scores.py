"""Temperature and threshold of an exported bundle, from the run to the device."""

import dataclasses

import numpy as np
import pytest

from edgetune.bench.evaluate import Answers, evaluate
from edgetune.config import TrainConfig
from edgetune.data import Split
from edgetune.errors import ConfigError, DataError, GateError
from edgetune.export import export
from edgetune.export.drift import baseline_of
from edgetune.export.scores import (
    abstention_sentence,
    calibrated,
    fit_abstention,
    fit_calibration,
)
from edgetune.runtime import EdgeModel
from edgetune.runtime.bundle import open_bundle
from edgetune.train import train


def answers(factor=3.0, samples=500, name="val", seed=0):
    """Answers whose logits are probabilities once divided by `factor`."""
    rng = np.random.default_rng(seed)
    true_logits = 2 * rng.normal(size=(samples, 3))
    shares = np.exp(true_logits) / np.exp(true_logits).sum(1, keepdims=True)
    truth = np.array([rng.choice(3, p=p) for p in shares])
    sharp = np.exp(factor * true_logits)
    names = tuple(str(i) for i in range(samples))
    return Answers(
        split=Split(name=name, inputs=names, labels=names, where=names),
        labels=("a", "b", "c"),
        probabilities=sharp / sharp.sum(1, keepdims=True),
        truth=truth,
    )


def test_overconfident_scores_get_their_temperature():
    found, sentence = fit_calibration(answers())
    assert found.temperature == pytest.approx(3.0, rel=0.15)
    assert found.ece_after < found.ece_before
    assert found.samples == 500
    assert "scores are divided by temperature" in sentence


def test_the_answers_stay_and_the_error_falls():
    before = answers()
    after = calibrated(before, fit_calibration(before)[0])
    np.testing.assert_array_equal(after.predicted, before.predicted)
    assert after.report().expected_calibration_error < 0.05
    assert before.report().expected_calibration_error > 0.1


def test_few_samples_and_good_scores_are_left_alone_and_that_is_said():
    found, sentence = fit_calibration(answers(samples=12))
    assert found is None
    assert "12 val samples are too few to fit a temperature, 20 would do" in sentence
    # 0.8 and 8 of 10 right
    shares = np.tile([[0.8, 0.1, 0.1]], (100, 1))
    truth = np.tile([0, 0, 0, 0, 1, 0, 0, 0, 0, 2], 10)
    fair = dataclasses.replace(answers(samples=100), probabilities=shares, truth=truth)
    found, sentence = fit_calibration(fair)
    assert found is None
    assert "does not lower the log loss of val samples held out" in sentence


def test_the_threshold_keeps_the_answers_that_it_was_chosen_by():
    seen = answers(factor=1.0)
    found = fit_abstention(seen, 0.9)
    kept = seen.confidence >= found.threshold
    assert kept.mean() == pytest.approx(found.coverage)
    assert np.mean(seen.right[kept]) > 0.9
    assert found.low >= 0.9
    shown = answers(factor=1.0, name="test", seed=1)
    sentence = abstention_sentence(found, seen, shown)
    part = np.mean(shown.confidence >= found.threshold)
    assert f"of 500 test samples {100 * part:.1f} % are answered" in sentence
    assert "test" not in abstention_sentence(found, seen, seen)


def test_a_baseline_of_drift_is_of_the_scores_that_the_device_gives():
    logits = np.random.default_rng(0).normal(size=(260, 3)).astype(np.float32)
    warm = baseline_of({"logits": logits}, temperature=4.0)
    plain = baseline_of({"logits": logits / 4})
    np.testing.assert_allclose(warm.edges, plain.edges, rtol=1e-6)


# -- a real run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(switches, tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores") / "run"
    train(
        TrainConfig(
            task="text-classification", model=tiny_bert, data=str(switches), method="full",
            lr=5e-3, epochs=3, batch_size=8, val_fraction=0.4, output=str(folder), cpu=True,
        )
    )  # fmt: skip
    return folder


OPTIONS = {"profile": "host", "precision": "fp32", "learn": "none"}


def test_a_bundle_scores_as_its_manifest_says(run, switches, tmp_path):
    result = export(run, output=tmp_path / "b", abstain=0.6, **OPTIONS)
    manifest = open_bundle(tmp_path / "b").manifest
    assert (manifest.calibration, manifest.abstention) == (result.calibration, result.abstention)
    assert any(note.startswith("scores are ") for note in result.notes)
    assert any(note.startswith("it abstains below score") for note in result.notes)
    plain = export(run, output=tmp_path / "p", calibrate=False, **OPTIONS)
    assert (plain.calibration, plain.abstention) == (None, None)
    with EdgeModel.load(tmp_path / "b") as edge, EdgeModel.load(tmp_path / "p") as raw:
        edge.self_test()
        for text in ("turn the lamp on", "turn now please off"):
            warm, cold = (m.predict(text, all_scores=True) for m in (edge, raw))
            temperature = manifest.calibration.temperature if manifest.calibration else 1.0
            powers = {k: v ** (1 / temperature) for k, v in cold.scores.items()}
            for label, score in warm.scores.items():
                assert score == pytest.approx(powers[label] / sum(powers.values()), rel=1e-4)
            assert warm.label == cold.label
            assert warm.abstained == (warm.score < manifest.abstention.threshold)
    kept = evaluate(tmp_path / "b", data=str(switches)).kept
    assert 0 < kept.coverage <= 1


def test_a_run_is_measured_by_groups_of_its_own_table(run):
    found = evaluate(run, split="train", slices=("label", "label"), min_slice=1)
    assert [s.column for s in found.slices] == ["label"]
    recall = {c.label: (c.recall, c.support) for c in found.report.per_class}
    groups = {g.value: (g.accuracy.value, g.samples) for g in found.slices[0].groups}
    assert groups == recall
    with pytest.raises(DataError, match="no column 'site'"):
        evaluate(run, slices=("site",))


def test_an_accuracy_out_of_reach_writes_no_bundle(run, tmp_path):
    # 48 samples show at most 0.05^(1/48) = 0.9395
    with pytest.raises(GateError, match=r"abstain: no score keeps answers that are 99 % right"):
        export(run, output=tmp_path / "b", abstain=0.99, **OPTIONS)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ConfigError, match="abstain: expected an accuracy between 0 and 1, got 99"):
        export(run, output=tmp_path / "b", abstain=99, **OPTIONS)
