import dataclasses
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from learnable_bundles import COLOURS, build_colours, build_words, pictures, sentences
from tiny_bundles import write_manifest

from edgetune.errors import ConfigError, DataError, IntegrityError, ResourceError
from edgetune.runtime.archive import write_archive
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.learn.course import batch_of, class_weights
from edgetune.runtime.learn.defaults import read_defaults
from edgetune.runtime.learn.growth import grow
from edgetune.runtime.learn.guard import Rules
from edgetune.runtime.learn.latents import Labelled, batches, draw, layout_of
from edgetune.runtime.learn.step import Batch, Descent, Rate, StepSession, blanks_of
from edgetune.runtime.manifest import TensorSpec
from edgetune.runtime.model import EdgeModel

NO_LIMITS = Rules(margin=1.0, factory_margin=1.0, class_floor=1.0, slack=1000)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A perceptron that tells three colours; its last block and its head can train."""
    return build_colours(tmp_path_factory.mktemp("colours") / "bundle")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Attention over words at random, with LoRA on all layers."""
    return build_words(tmp_path_factory.mktemp("words") / "bundle")


@pytest.fixture(scope="module")
def late_words(tmp_path_factory):
    """The same, of which the last block and the head can train, by SGD."""
    return build_words(tmp_path_factory.mktemp("late-words") / "bundle", "last:1", "sgd")


@pytest.fixture
def model(colours):
    with EdgeModel.load(colours) as model:
        yield model


@pytest.fixture
def trainer(model, tmp_path):
    with model.trainer(tmp_path / "store") as trainer:
        yield trainer


def accuracy(model, *labels, adapter=None):
    given = [(label, p) for label in labels for p in pictures(label, 40, 99)]
    found = model.predict([p for _, p in given], adapter=adapter)
    return np.mean([r.label == label for r, (label, _) in zip(found, given, strict=True)])


def scores(model):
    samples = [p for label in (*COLOURS, "yellow") for p in pictures(label, 5, 98)]
    return [r.scores for r in model.predict(samples, all_scores=True)]


def tensors_of(trainer):
    return {n: v.copy() for n, v in trainer.candidate().tensors.items()}


def same(first, second):
    return first.keys() == second.keys() and all((first[n] == second[n]).all() for n in first)


# -- what it learns


def test_lora_learns_sentences_that_the_network_knew_nothing_of(words, tmp_path):
    pairs = sentences(60, 1)
    fresh = sentences(40, 2)
    with EdgeModel.load(words) as model, model.trainer(tmp_path / "s") as trainer:
        report = trainer.fit(
            [t for _, t in pairs], [c for c, _ in pairs], epochs=8, learning_rate=0.02
        )
        receipt = trainer.commit()
        found = [r.label for r in model.predict([t for _, t in fresh])]
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert report.learned + report.held_out + len(report.aside) == 60
    assert receipt.accepted, receipt.reasons
    assert np.mean([a == b for a, (b, _) in zip(found, fresh, strict=True)]) > 0.9


def test_a_new_class_is_known_after_a_commit_and_the_old_ones_still_are(model, trainer):
    report = trainer.fit(pictures("yellow", 20, 4), "yellow", epochs=4)
    assert (report.learned, report.held_out, report.labels) == (16, 4, (*COLOURS, "yellow"))
    assert accuracy(model, "yellow") == 0
    receipt = trainer.commit()
    assert receipt.accepted, receipt.reasons
    assert receipt.counts == {"yellow": 16}
    assert model.labels == (*COLOURS, "yellow")
    assert accuracy(model, "yellow") > 0.9
    assert accuracy(model, *COLOURS) > 0.95


def test_rehearsal_keeps_what_training_without_it_forgets(colours, tmp_path):
    kept = {}
    for rehearsal in (0.0, 1.0):
        with EdgeModel.load(colours) as model:
            store = tmp_path / str(rehearsal)
            with model.trainer(store, rules=NO_LIMITS) as trainer:
                # the device sees blue in another light, and too little to keep any of it apart
                trainer.fit(
                    pictures("yellow", 4, 5), "blue", epochs=40,
                    learning_rate=0.02, rehearsal=rehearsal,
                )  # fmt: skip
                assert trainer.commit().accepted
            kept[rehearsal] = accuracy(model, "red", "green")
    assert kept[0.0] < 0.7
    assert kept[1.0] > 0.95


def test_the_devices_own_samples_are_rehearsed_in_the_next_fit(trainer):
    trainer.fit(pictures("yellow", 10, 4), "yellow")
    assert {s.label for s in trainer._memory.train.items} == {"yellow"}
    report = trainer.fit(pictures("red", 8, 6), "red", rehearsal=100)
    # eight of the bundle's ten of each colour, and eight of the ten of yellow from before
    assert report.rehearsed == 32


# -- nothing changes before a commit


def test_a_fit_changes_no_answer_and_a_commit_does(model, trainer, colours, tmp_path):
    before, session = scores(model), model.session
    trainer.fit(pictures("yellow", 20, 4), "yellow")
    assert scores(model) == before
    trainer.commit()
    assert model.session is session
    after = scores(model)
    assert after != before
    with EdgeModel.load(colours, learned=tmp_path / "store") as again:
        assert scores(again) == after
    with EdgeModel.load(colours) as factory:
        assert scores(factory) == before


def test_undo_and_reset_bring_old_answers_back(model, trainer):
    factory = scores(model)
    trainer.fit(pictures("yellow", 20, 4), "yellow")
    trainer.commit()
    first, counts = scores(model), trainer.learned
    trainer.fit(pictures("red", 10, 5), "red", learning_rate=0.01)
    assert trainer.commit().generation == 2
    assert scores(model) != first
    assert trainer.undo() == 1
    assert scores(model) == first
    assert trainer.learned == counts
    trainer.factory_reset(forget=True)
    assert scores(model) == factory
    assert trainer.labels == COLOURS
    assert trainer.history() == ()


def test_a_refused_candidate_leaves_everything_as_it_was(model, trainer):
    trainer.fit(pictures("yellow", 20, 4), "yellow")
    trainer.commit()
    before, tensors, counts = scores(model), tensors_of(trainer), trainer.learned
    held = [s.id for s in trainer._memory.holdout.items]
    wrong = [*pictures("green", 2, 7), *pictures("blue", 2, 7)]
    trainer.fit(wrong, "red", epochs=30, learning_rate=0.05, rehearsal=0)
    receipt = trainer.commit()
    assert not receipt.accepted
    assert receipt.generation == 1
    assert any("canary" in reason for reason in receipt.reasons)
    assert scores(model) == before
    assert same(tensors_of(trainer), tensors)
    assert trainer.learned == counts
    assert [s.id for s in trainer._memory.holdout.items] == held
    with pytest.raises(DataError, match="nothing to commit"):
        trainer.commit()


def test_what_a_listener_raises_ends_the_fit_without_a_trace(trainer):
    tensors, seen = tensors_of(trainer), []

    def stop(step):
        seen.append(step)
        if step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(pictures("yellow", 20, 4), "yellow", on_step=stop)
    assert [s.step for s in seen] == [1, 2, 3]
    assert same(tensors_of(trainer), tensors)
    assert trainer.labels == COLOURS
    assert trainer.learned == {}


# -- going on


def test_a_trainer_that_is_opened_again_goes_on_as_one_that_never_closed(colours, tmp_path):
    results = []
    for reopened in (False, True):
        store = tmp_path / str(reopened)
        with EdgeModel.load(colours) as model:
            trainer = model.trainer(store)
            trainer.fit(pictures("yellow", 20, 4), "yellow")
            trainer.commit()
            if reopened:
                trainer.close()
                trainer = model.trainer(store)
            trainer.fit(pictures("blue", 10, 8), "blue")
            results.append(tensors_of(trainer))
            trainer.close()
    assert same(*results)


def test_another_seed_trains_another_way(colours, tmp_path):
    found = []
    for seed in (0, 1):
        store = tmp_path / str(seed)
        with EdgeModel.load(colours) as model, model.trainer(store, seed=seed) as trainer:
            trainer.fit(pictures("yellow", 20, 4), "yellow")
            found.append(tensors_of(trainer))
    assert not same(*found)


def test_two_states_answer_side_by_side_as_adapters(colours, tmp_path):
    names = {"morning": "yellow", "evening": "green"}
    for store, label in names.items():
        with (
            EdgeModel.load(colours) as model,
            model.trainer(tmp_path / store, rules=NO_LIMITS) as trainer,
        ):
            trainer.fit(pictures("yellow", 20, 4), label, epochs=20, learning_rate=0.02)
            trainer.commit()
    with EdgeModel.load(colours) as model:
        for store in names:
            model.add_adapter(store, tmp_path / store)
        picture = pictures("yellow", 1, 97)[0]
        assert model.predict(picture).label in COLOURS
        assert model.predict(picture, adapter="morning").label == "yellow"
        assert model.predict(picture, adapter="evening").label == "green"


def test_a_bundle_in_one_file_trains_alike(colours, trainer, tmp_path):
    packed = tmp_path / "colours.zip"
    write_archive(packed, {p.name: p for p in sorted(colours.iterdir())})
    with EdgeModel.load(packed) as model, model.trainer(tmp_path / "other") as other:
        for t in (trainer, other):
            t.fit(pictures("yellow", 20, 4), "yellow")
        assert same(tensors_of(other), tensors_of(trainer))


# -- stopping, and what is kept apart


def test_training_stops_early_and_the_best_epoch_is_kept(trainer):
    trainer.fit(pictures("red", 20, 1), "red", epochs=1)
    # samples that say red is green, while those kept apart of both say what is so
    trainer.fit(pictures("green", 20, 1), "green", epochs=1)
    start = tensors_of(trainer)
    report = trainer.fit(
        pictures("red", 4, 2), "green", epochs=10, learning_rate=0.01, patience=2, rehearsal=0
    )
    assert report.held_out == 0
    assert report.stopped_early
    assert len(report.losses) == 2
    assert report.holdout_losses[0] == min(report.holdout_losses)
    assert report.best_epoch == 0
    assert same(tensors_of(trainer), start)


def test_nothing_is_stopped_by_samples_that_know_nothing_of_what_is_taught(trainer):
    report = trainer.fit(pictures("yellow", 4, 4), "yellow", epochs=6)
    assert report.holdout_losses == ()
    assert (len(report.losses), report.best_epoch, report.stopped_early) == (6, 6, False)


def test_the_candidate_has_the_loss_of_the_best_epoch(trainer):
    report = trainer.fit(
        pictures("yellow", 20, 4), "yellow", epochs=12, learning_rate=0.3, patience=12
    )
    assert len(report.holdout_losses) == 13
    assert report.best_epoch == int(np.argmin(report.holdout_losses))
    held = [*trainer._memory.holdout.items, *trainer._watched]
    # four of yellow, and two of each colour of the bundle's: each class weighs the same
    assert len(held) == 10
    weights = class_weights([s.label for s in held], 1.0)
    batch = batch_of(layout_of(trainer._model.manifest), held, trainer.labels, weights)
    tensors = trainer.candidate().tensors
    found, _ = trainer._step().loss_and_logits(batch, tensors, blanks_of(tensors))
    assert found / 10 == pytest.approx(min(report.holdout_losses), rel=1e-4)


def test_every_fifth_sample_of_a_class_is_kept_apart_over_several_fits(trainer):
    samples = pictures("yellow", 12, 4)
    first = trainer.fit(samples[:4], "yellow")
    second = trainer.fit(samples[4:], "yellow")
    assert (first.learned, first.held_out) == (4, 0)
    assert (second.learned, second.held_out) == (6, 2)
    again = trainer.fit(samples, "yellow")
    assert (again.learned, again.held_out) == (10, 0)
    assert [a.place for a in again.aside] == [4, 9]
    assert trainer.learned == {"yellow": 10}


def test_a_sample_given_twice_is_learned_once(trainer):
    picture = pictures("yellow", 1, 4)[0]
    report = trainer.fit([picture, picture], "yellow")
    assert report.learned == 1
    assert [(a.place, a.reason) for a in report.aside] == [(1, "it was given twice")]


def test_the_memory_stays_within_its_bytes(colours, tmp_path):
    store = tmp_path / "s"
    with EdgeModel.load(colours) as model, model.trainer(store, replay_bytes=1000) as trainer:
        trainer.fit(pictures("yellow", 60, 4), "yellow")
        trainer.fit(pictures("red", 10, 5), "red")
        # 16 features in 2 bytes each: 25 to rehearse, 6 to judge by
        assert trainer._memory.train.counts == {"red": 8, "yellow": 17}
        assert trainer._memory.holdout.nbytes <= 200


# -- the step


def test_pieces_of_a_batch_train_like_the_whole(colours, tmp_path):
    found = []
    for micro_batch in (None, 3, 1):
        store = tmp_path / str(micro_batch)
        with EdgeModel.load(colours) as model, model.trainer(store) as trainer:
            trainer.fit(
                pictures("yellow", 16, 4), "yellow", batch_size=8, accumulate=2,
                micro_batch=micro_batch,
            )  # fmt: skip
            found.append(tensors_of(trainer))
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=2e-6)


def test_updates_in_place_are_those_of_plain_runs(colours):
    bundle = open_bundle(colours)
    training = bundle.manifest.training
    tensors = read_defaults(bundle, training.trainable)
    descent = Descent(StepSession(bundle), tensors)
    plain = onnxruntime.InferenceSession(
        str(colours / "train.onnx"), providers=["CPUExecutionProvider"]
    )
    state = dict(tensors) | {
        n + s: np.zeros_like(v) for n, v in tensors.items() for s in (".grad", ".m", ".v")
    }
    rng = np.random.default_rng(0)
    for step in range(1, 6):
        batch = Batch(
            inputs={training.latents[0].name: rng.normal(size=(4, 16)).astype(np.float32)},
            targets=np.eye(3, dtype=np.float32)[rng.integers(0, 3, 4)],
            weights=rng.uniform(0.5, 2, 4).astype(np.float32),
        )
        loss = descent.step([batch], Rate(lr=0.01, weight_decay=0.1))
        scalars = {"weight_sum": batch.weights.sum(), "lr": 0.01, "weight_decay": 0.1, "t": step}
        feeds = {**batch.inputs, "targets": batch.targets, "sample_weight": batch.weights}
        feeds |= {n: np.array(v, np.float32) for n, v in scalars.items()} | state
        names = [o.name for o in plain.get_outputs()]
        found = dict(zip(names, plain.run(names, feeds), strict=True))
        assert loss == pytest.approx(float(found["loss"] / batch.weights.sum()), rel=1e-6)
        for name in tensors:
            expected = found[f"{name}.out"]
            np.testing.assert_allclose(descent.tensors[name], expected, rtol=1e-5, atol=1e-7)
            state |= {name + s: found[f"{name}{s}.out"] for s in ("", ".m", ".v")}
    assert same(tensors, read_defaults(bundle, training.trainable))  # what was given stays


@pytest.mark.parametrize("bundle", ["words", "late_words"])
def test_padding_changes_no_gradient(bundle, request, tmp_path):
    texts = ["turn on", "turn the light in the lamp now please on"]
    rng = np.random.default_rng(0)
    folder = request.getfixturevalue(bundle)
    with EdgeModel.load(folder) as model, model.trainer(tmp_path / "s") as trainer:
        layout, session = layout_of(model.manifest), trainer._step()
        samples = trainer._look(texts, ["on", "on"])
        # LoRA's second factors start at zero, which would leave the first without a gradient
        tensors = {
            n: v + 0.1 * rng.normal(size=v.shape).astype(np.float32)
            for n, v in trainer.candidate().tensors.items()
        }
    state = {n + s: v for n, v in blanks_of(tensors).items() for s in (".grad", ".m", ".v")}
    outputs = ["loss", *(f"{n}.grad.out" for n in tensors)]

    def gradients(rows, weights):
        batch = batch_of(layout, rows, ("on", "off"), np.array(weights))
        found = session.run(batch, tensors, outputs, state=state, scalars={}, into={})
        return dict(zip(outputs, found, strict=True))

    alone, padded = gradients(samples[:1], [1.0]), gradients(samples, [1.0, 0.0])
    assert layout.stack(samples)["attention_mask"].tolist() == [[1] * 3 + [0] * 7, [1] * 10]
    for name, value in alone.items():
        scale = np.abs(value).max()
        assert scale > 0
        np.testing.assert_allclose(padded[name], value, atol=2e-6 * max(scale, 1), rtol=1e-4)


def test_time_steps_trains_nothing(trainer):
    tensors = tensors_of(trainer)
    wall, cpu = trainer.time_steps(pictures("red", 8, 1), ["red"] * 8, 2)
    assert wall > 0
    assert cpu >= 0
    assert same(tensors_of(trainer), tensors)
    with pytest.raises(DataError, match="nothing to commit"):
        trainer.commit()


def test_factory_values_are_those_of_the_graph(colours, words):
    for folder in (colours, words):
        bundle = open_bundle(folder)
        graph = onnx.load(folder / "model.onnx").graph
        expected = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        found = read_defaults(bundle, bundle.manifest.training.trainable)
        assert len(found) == len(bundle.manifest.training.trainable)
        for name, value in found.items():
            np.testing.assert_array_equal(value, expected[name])


def test_the_last_block_learns_by_sgd_from_kept_latents(late_words, tmp_path):
    pairs = sentences(60, 1)
    with EdgeModel.load(late_words) as model, model.trainer(tmp_path / "s") as trainer:
        report = trainer.fit([t for _, t in pairs], [c for c, _ in pairs], epochs=6)
        kept = trainer._memory.train.items[0].arrays
        assert trainer.commit().accepted
    assert report.losses[-1] < report.losses[0]
    # what enters the block, and the mask: no word is kept
    assert sorted(a.dtype.name for a in kept.values()) == ["float16", "int8"]


# -- parts


def test_a_new_class_starts_where_the_others_are_on_average_and_turns_to_its_samples():
    specs = (
        TensorSpec(name="w", dtype="float32", shape=("classes", 2)),
        TensorSpec(name="b", dtype="float32", shape=("classes",)),
        TensorSpec(name="other", dtype="float32", shape=(2, 2)),
    )
    tensors = {
        "w": np.float32([[3, 0], [1, 0]]), "b": np.float32([1, 3]), "other": np.eye(2, dtype="f"),
    }  # fmt: skip
    centre = np.float32([1, 1])
    grown = grow(tensors, specs, [np.float32([1, 5])], centre)
    # the mean row is (2, 0), rows lie 1 from it, and the class lies along (0, 1) from the centre
    np.testing.assert_allclose(grown["w"], [[3, 0], [1, 0], [2, 1]])
    # at the centre its logit is 2 + 1 + b; the others' are 4 on average
    np.testing.assert_allclose(grown["b"], [1, 3, 1])
    assert grown["other"] is tensors["other"]
    assert tensors["w"].shape == (2, 2)
    unseen = grow(tensors, specs, [None], None)
    np.testing.assert_allclose(unseen["w"][2], [2, 0])
    np.testing.assert_allclose(unseen["b"][2], 2)


def test_a_head_that_lies_on_its_side_grows_a_column():
    specs = (TensorSpec(name="w", dtype="float32", shape=(3, "classes")),)
    tensors = {"w": np.float32([[1, 3], [0, 0], [0, 0]])}
    grown = grow(tensors, specs, [np.float32([0, 2, 0])], np.zeros(3, np.float32))
    np.testing.assert_allclose(grown["w"], [[1, 3, 2], [0, 0, 1], [0, 0, 0]])
    assert grown["w"].flags.c_contiguous


def test_weights_make_classes_equal_as_far_as_asked():
    labels = ["a"] * 8 + ["b"] * 2
    np.testing.assert_allclose(class_weights(labels, 0.0), 1)
    np.testing.assert_allclose(class_weights(labels, 1.0), [0.625] * 8 + [2.5] * 2)
    half = class_weights(labels, 0.5)
    assert half[-1] / half[0] == pytest.approx(2)
    assert half.mean() == pytest.approx(1)


def plain(label: str, length: int, height: int = 1) -> Labelled:
    ids, image = np.arange(length), np.zeros((height, 2), np.uint8)
    return Labelled(id=f"{label}{length}", label=label, arrays={"input_ids": ids, "image": image})


def test_batches_are_of_one_size_where_no_mask_tells_and_of_like_lengths_else(words):
    manifest = open_bundle(words).manifest
    image = TensorSpec(name="image", dtype="uint8", shape=("batch", "height", 2))
    layout = layout_of(manifest)
    layout = dataclasses.replace(layout, specs=(layout.specs[0], image))
    samples = [plain("a", n, height) for n in range(1, 17) for height in (1, 2)]
    found = batches(samples, layout, 4, np.random.default_rng(0))
    assert sorted(i for places in found for i in places) == list(range(32))
    for places in found:
        rows = [samples[i] for i in places]
        assert len({s.arrays["image"].shape for s in rows}) == 1
        lengths = [len(s.arrays["input_ids"]) for s in rows]
        assert max(lengths) - min(lengths) <= 3


def test_a_draw_takes_classes_in_turn_and_nothing_twice():
    pools = {
        "a": [plain("a", n) for n in range(1, 9)], "b": [plain("b", 1)], "c": [plain("c", 1)] * 0,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    assert sorted(s.label for s in draw(pools, 4, rng)) == ["a", "a", "a", "b"]
    assert len({s.id for s in draw(pools, 100, rng)}) == 9


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected a whole number of 1 or more, got 0"),
        ({"batch_size": 2.0}, "batch_size: expected"),
        ({"micro_batch": 0}, "micro_batch: expected"),
        ({"accumulate": -1}, "accumulate: expected"),
        ({"patience": 0}, "patience: expected"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected"),
        ({"weight_decay": -1.0}, "weight_decay: expected 0 or more"),
        ({"rehearsal": -0.5}, "rehearsal: expected 0 or more"),
        ({"balance": 2.0}, "balance: expected 0"),
        ({"learning_rate": 1e30}, "try a tenth of it"),
    ],
)
def test_settings_out_of_bounds_are_refused_and_nothing_changes(trainer, options, message):
    tensors = tensors_of(trainer)
    with pytest.raises(ConfigError, match=message):
        trainer.fit(pictures("yellow", 20, 4), "yellow", **options)
    assert same(tensors_of(trainer), tensors)
    assert trainer.labels == COLOURS


@pytest.mark.parametrize(
    ("samples", "labels", "message"),
    [
        ("red.png", "red", "expected several, in a list; got one"),
        ([0, 1], ["red"], "expected a label for each of 2 samples, got 1"),
        ([np.zeros((2, 2, 3), np.uint8)], [" "], "expected a text"),
        ([np.zeros((2, 2, 5), np.uint8)], "red", "expected"),
        ([], "red", "nothing to learn"),
    ],
)
def test_bad_samples_are_refused(trainer, samples, labels, message):
    with pytest.raises(DataError, match=message):
        trainer.fit(samples, labels)
    assert trainer.learned == {}


def test_nothing_to_commit_is_said(trainer):
    with pytest.raises(DataError, match="nothing was fitted"):
        trainer.commit()


def test_a_bundle_without_a_step_is_refused(colours, tmp_path):
    folder = shutil.copytree(colours, tmp_path / "bundle")
    (folder / "train.onnx").unlink()
    write_manifest(folder, training=None)
    with EdgeModel.load(folder) as model, pytest.raises(ConfigError, match=r"no train\.onnx"):
        model.trainer()
    assert not (tmp_path / "bundle.learned").exists()


def test_a_store_is_for_one_way_of_learning_and_one_process(model, trainer, tmp_path):
    assert trainer.folder == tmp_path / "store"
    with pytest.raises(ResourceError, match="another process"):
        model.trainer(tmp_path / "store")
    with model.learner(tmp_path / "head", screen=False) as learner:
        learner.add(pictures("yellow", 10, 4), "yellow")
        assert learner.commit().accepted
    assert model.labels == (*COLOURS, "yellow")
    with pytest.raises(ConfigError, match="learned as 'head', which 'tensors' cannot go on from"):
        model.trainer(tmp_path / "head")


def test_a_step_that_is_not_the_manifests_is_refused(colours, tmp_path):
    folder = shutil.copytree(colours, tmp_path / "bundle")
    training = open_bundle(folder).manifest.training
    write_manifest(folder, training=dataclasses.replace(training, optimizer="sgd"))
    with (
        EdgeModel.load(folder) as model,
        model.trainer() as trainer,
        pytest.raises(IntegrityError, match="is not the step that the manifest describes"),
    ):
        trainer.fit(pictures("red", 3, 1), "red")
