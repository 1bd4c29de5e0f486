"""Thresholds that keep the rate they state, and find what has really moved."""

import numpy as np
import pytest

from edgetune.data import Split
from edgetune.errors import ConfigError
from edgetune.export import drift
from edgetune.export.drift import baseline_of, class_means, fit_space, thresholds_of, write_baseline
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.drift import dump_baseline, read_baseline
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.tasks.classification import softmax
from edgetune.runtime.watch import Watch, read_watch

LABELS, WIDTH = 4, 24
CENTRES = 3 * np.random.default_rng(7).normal(size=(LABELS, WIDTH))
# no direction is like another, as in a real network
SCALES = np.geomspace(2, 0.05, WIDTH)


def world(count, rng, *, shift=0.0, stretch=1.0, doubt=0.0, mix=(0.4, 0.3, 0.2, 0.1)):
    """Features around class centres, and logits that mostly tell the class."""
    classes = rng.choice(LABELS, count, p=mix)
    noise = rng.normal(size=(count, WIDTH)) * stretch + shift
    features = CENTRES[classes] + noise * SCALES
    logits = 6 * np.eye(LABELS)[classes] + (1 + doubt) * rng.normal(size=(count, LABELS))
    return {"features": features.astype(np.float32), "logits": logits.astype(np.float32)}


def measured(baseline, outputs):
    probabilities = softmax(outputs["logits"])
    scores, classes = probabilities.max(axis=1), probabilities.argmax(axis=1)
    return baseline.measure(outputs.get("features"), scores, classes)


def alarm_rates(baseline, rng, windows, **change):
    """Return the share of windows that alarm of the inputs, and of the mix of classes."""
    seen = [
        baseline.alarms(measured(baseline, world(baseline.window, rng, **change)))
        for _ in range(windows)
    ]
    inputs = sum(any(name != "classes" for name in alarms) for alarms in seen)
    return inputs / windows, sum("classes" in alarms for alarms in seen) / windows


@pytest.fixture(scope="module")
def baselines():
    """Five, each of samples of its own, at one false alarm in 20 windows."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "WINDOWS_PER_SPLIT", 100)  # 40 of 800 are to alarm: enough for 5 %
        for seed in range(5):
            outputs = world(800, np.random.default_rng(seed))
            found.append(baseline_of(outputs, window=32, false_alarms=0.05, seed=seed))
    return found


def test_false_alarms_come_at_the_stated_rate(baselines):
    rates = np.array(
        [alarm_rates(b, np.random.default_rng(50 + i), 400) for i, b in enumerate(baselines)]
    )
    # 2,000 windows at 5 %: binomial standard deviation 0.5 points; what a baseline of 800
    # samples is off by itself comes on top
    assert 0.03 < rates[:, 0].mean() < 0.075
    assert 0.03 < rates[:, 1].mean() < 0.075
    assert rates.max() < 0.13


@pytest.mark.parametrize(
    "change", [{"shift": 0.7}, {"stretch": 1.4}, {"stretch": 0.7}, {"doubt": 2.0}], ids=str
)
def test_a_clear_shift_is_always_seen(baselines, change):
    for number, baseline in enumerate(baselines):
        assert alarm_rates(baseline, np.random.default_rng(number), 40, **change)[0] == 1


def test_another_mix_of_classes_alone_is_no_drift_of_the_inputs(baselines):
    rates = np.array(
        [
            alarm_rates(b, np.random.default_rng(90 + i), 200, mix=(0, 0, 0.1, 0.9))
            for i, b in enumerate(baselines)
        ]
    )
    assert rates[:, 0].mean() < 0.10
    assert rates[:, 1].mean() == 1


def test_the_mean_is_hotellings_t_squared_where_there_is_one_class():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    window = rng.normal(size=(32, 6)) @ rng.normal(size=(6, 6))
    space = fit_space(features, np.zeros(400, int), 1)
    along, _ = space.place(window, np.zeros(32, int))
    covariance = np.cov(features, rowvar=False)
    moved = window.mean(axis=0) - features.mean(axis=0)
    expected = moved @ np.linalg.solve(covariance, moved)
    assert np.sum(along.mean(axis=0) ** 2) == pytest.approx(expected, rel=1e-4)


def test_class_means_are_drawn_as_far_as_they_are_uncertain():
    rng = np.random.default_rng(1)
    classes = np.repeat(np.arange(500), 8)
    true = rng.normal(0, 1, 500)
    values = true[classes] + rng.normal(0, 2, len(classes))
    found = class_means(values[:, None], classes, 501)
    # variance 4 within, 1 between
    assert found.pull == pytest.approx(4, rel=0.2)
    raw = values.reshape(500, 8).mean(axis=1)
    best = (8 * raw + found.pull * values.mean()) / (8 + found.pull)
    np.testing.assert_allclose(found.values[:500, 0], best)
    assert found.values[500, 0] == pytest.approx(values.mean())
    errors = [np.mean((estimate - true) ** 2) for estimate in (found.values[:500, 0], raw)]
    assert errors[0] == pytest.approx(1 / (8 / 4 + 1), rel=0.15)  # posterior variance
    assert errors[0] < errors[1]


@pytest.mark.parametrize("together", [True, False])
def test_thresholds_share_the_rate_however_statistics_hang_together(together):
    rng = np.random.default_rng(2)
    one = rng.normal(size=20_000)
    seen = [
        {"a": x, "b": x if together else y, "classes": z}
        for x, y, z in zip(one, rng.normal(size=20_000), rng.normal(size=20_000), strict=True)
    ]
    limits = thresholds_of(seen, 0.02)
    over = {name: [w[name] > limits[name] for w in seen] for name in limits}
    either = np.mean(np.logical_or(over["a"], over["b"]))
    assert either == pytest.approx(0.02, abs=0.0005)
    assert np.mean(over["classes"]) == pytest.approx(0.02, abs=0.0005)
    # what is exceeded by both at once needs no division of the rate
    each = 0.02 if together else 0.0101
    assert np.mean(over["a"]) == pytest.approx(each, abs=0.001)
    assert np.mean(over["b"]) == pytest.approx(each, abs=0.001)


def test_same_outputs_same_bytes(monkeypatch):
    monkeypatch.setattr(drift, "WINDOWS_PER_SPLIT", 20)
    outputs = world(300, np.random.default_rng(3))
    before = {name: array.copy() for name, array in outputs.items()}
    data = dump_baseline(baseline_of(outputs))
    assert dump_baseline(baseline_of(outputs)) == data
    assert all(np.array_equal(outputs[name], before[name]) for name in outputs)
    assert read_baseline(data, where="").window == 32


def test_wide_features_and_many_classes_stay_small(monkeypatch):
    monkeypatch.setattr(drift, "WINDOWS_PER_SPLIT", 5)
    monkeypatch.setattr(drift, "SPLITS", 1)
    rng = np.random.default_rng(4)
    outputs = {
        "features": rng.normal(size=(600, 2048)).astype(np.float32),
        "logits": rng.normal(size=(600, 100)).astype(np.float32),
    }
    assert len(dump_baseline(baseline_of(outputs))) < 150 * 2**10


def test_features_that_never_move_are_no_trouble(monkeypatch):
    monkeypatch.setattr(drift, "WINDOWS_PER_SPLIT", 20)
    outputs = world(300, np.random.default_rng(5))
    outputs["features"][:] = 1.0
    outputs["logits"][:] = [9.0, 0.0, 0.0, 0.0]
    baseline = read_baseline(dump_baseline(baseline_of(outputs)), where="")
    same = {name: array[:32] for name, array in outputs.items()}
    assert baseline.alarms(measured(baseline, same)) == ()
    moved = same | {"features": same["features"] + np.float32(0.5)}
    assert "outside" in baseline.alarms(measured(baseline, moved))


@pytest.mark.parametrize(("rate", "window"), [(0.0, 32), (1.0, 32), (0.01, 64)])
def test_too_few_samples_and_rates_that_are_none_are_refused(rate, window):
    outputs = world(300, np.random.default_rng(6))
    with pytest.raises(ConfigError, match=r"false_alarms: expected|takes 512 samples, got 300"):
        baseline_of(outputs, window=window, false_alarms=rate)


# -- of a bundle --------------------------------------------------------------------------------


def sentences(count):
    rng = np.random.default_rng(8)
    texts = tuple(" ".join(rng.choice(["good", "bad"], 4)) for _ in range(count))
    return Split(name="val", inputs=texts, labels=texts, where=texts)


def test_a_bundle_gets_its_baseline_and_is_watched_by_it(word_bundle, seal, tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "WINDOWS_PER_SPLIT", 50)
    edge = EdgeModel.load(word_bundle)
    assert write_baseline(word_bundle, edge, sentences(300)) is None
    seal(word_bundle)
    edge = EdgeModel.load(word_bundle, check="full")
    watch = Watch.open(tmp_path / "watch", open_bundle(word_bundle))
    for texts in (sentences(32).inputs, ["good"] * 32):
        for text in texts:
            outputs = edge.outputs(text)
            watch.record(outputs, edge.task.results(outputs, edge.labels, all_scores=False), 0.001)
    usual, drifted = read_watch(tmp_path / "watch")
    assert usual.alarms == ()
    assert {"scores", "classes"} <= set(drifted.alarms)


def test_too_few_samples_make_no_baseline_and_say_so(word_bundle):
    edge = EdgeModel.load(word_bundle)
    found = write_baseline(word_bundle, edge, sentences(255))
    assert found == "255 val samples, and drift can be told from 256 on"
    assert not (word_bundle / "drift.npz").exists()
