"""Tier 0 through its public calls, on a bundle whose features are an image's mean colours."""

import dataclasses

import numpy as np
import pytest
from fleet_bundles import LABELS, features_of, images, make_colour_bundle

from edgetune.errors import ConfigError, DataError, IntegrityError, ResourceError
from edgetune.runtime.learn.guard import Rules
from edgetune.runtime.learn.ridge import coefficients, regularisation
from edgetune.runtime.learn.statistics import add, expand, with_label
from edgetune.runtime.model import EdgeModel


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "colours"
    make_colour_bundle(folder)
    return folder


@pytest.fixture
def learner(bundle):
    with EdgeModel.load(bundle) as model, model.learner(screen=False) as opened:
        yield opened


def predicted(model, samples):
    return [model.predict(s).label for s in samples]


def test_a_new_class_answers_after_the_commit_and_not_before(bundle):
    with EdgeModel.load(bundle) as model, model.learner(screen=False) as learner:
        whites = images("white", 12)
        learner.add_class("white", whites)
        assert "white" not in predicted(model, whites)
        receipt = learner.commit()
        assert receipt.accepted, receipt.reasons
        assert receipt.counts == {"white": 10}  # the 5th and the 10th are kept apart
        assert set(predicted(model, images("white", 20, seed=7))) == {"white"}
        assert predicted(model, [images(c, 1, seed=8)[0] for c in LABELS]) == list(LABELS)
    # and in another process' model, where it is asked for
    with EdgeModel.load(bundle) as model:
        assert "white" not in predicted(model, whites)
    with EdgeModel.load(bundle, learned=f"{bundle}.learned") as model:
        assert set(predicted(model, whites)) == {"white"}
        assert model.labels == (*LABELS, "white")


def test_the_head_is_the_ridge_of_prior_and_samples_pooled(bundle):
    with EdgeModel.load(bundle) as model, model.learner(screen=False) as learner:
        whites = images("white", 9)
        for i in (0, 3, 6):  # in portions, with another class between them
            learner.add(whites[i : i + 3], "white")
            learner.add(images("red", 2, seed=20 + i), "red")
        # the same sums, taken at once: every fifth of a class is left out
        stats = with_label(expand(learner._material.prior), "white")
        rows = features_of([w for n, w in enumerate(whites, 1) if n % 5])
        stats = add(stats, rows, np.full(len(rows), 3))
        reds = [r for i in (0, 3, 6) for r in images("red", 2, seed=20 + i)]
        rows = features_of([r for n, r in enumerate(reds, 1) if n % 5])
        stats = add(stats, rows, np.zeros(len(rows), int))
        np.testing.assert_allclose(learner.statistics.gram, stats.gram, rtol=0, atol=1e-9)
        np.testing.assert_allclose(learner.statistics.sums, stats.sums, rtol=0, atol=1e-9)
        weights, bias = coefficients(stats, ridge=regularisation(stats))
        head = learner.candidate().head
        np.testing.assert_allclose(head.weights, weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(head.bias, bias, rtol=1e-5, atol=1e-6)


def test_what_was_given_is_there_after_reopening_and_is_not_learned_twice(bundle):
    whites = images("white", 6)
    with EdgeModel.load(bundle) as model, model.learner(screen=False) as learner:
        learner.add(whites, "white")
        gram = learner.statistics.gram
    with EdgeModel.load(bundle) as model, model.learner(screen=False) as learner:
        np.testing.assert_array_equal(learner.statistics.gram, gram)
        again = learner.add(whites, "white")
        assert again.learned == again.held_out == 0
        assert {one.reason for one in again.aside} == {"it was learned before"}
        np.testing.assert_array_equal(learner.statistics.gram, gram)


def test_a_removed_sample_leaves_the_sums_as_if_it_had_never_been(bundle):
    with EdgeModel.load(bundle) as model, model.learner(screen=False) as learner:
        learner.add(images("white", 4), "white")
        before = learner.statistics
        added = learner.add(images("black", 3), "black")
        learner.remove(added.ids)
        assert learner.labels == (*LABELS, "white")
        np.testing.assert_allclose(learner.statistics.gram, before.gram, rtol=0, atol=1e-9)
        learner.remove(images("white", 1))  # the sample itself serves as well as its id
        assert learner.learned == {"white": 3}
        with pytest.raises(DataError, match="not learned here"):
            learner.remove([images("white", 1)[0]])


def test_undo_goes_back_and_the_undone_samples_do_not_come_back(bundle):
    with EdgeModel.load(bundle) as model, model.learner(screen=False) as learner:
        learner.add_class("white", images("white", 8))
        assert learner.commit().generation == 1
        learner.add_class("black", images("black", 8))
        assert learner.commit().generation == 2
        assert learner.undo() == 1
        assert model.labels == learner.labels == (*LABELS, "white")
        assert learner.undo() == 0
        assert model.labels == LABELS
        assert predicted(model, images("white", 1)) != ["white"]
        with pytest.raises(ConfigError, match="factory"):
            learner.undo()
        learner.add_class("black", images("black", 8, seed=3))
        assert learner.commit().generation == 3
        assert model.labels == (*LABELS, "black")


def test_the_factory_state_comes_back_and_can_be_all_that_is_left(bundle):
    with EdgeModel.load(bundle) as model, model.learner(screen=False) as learner:
        learner.add_class("white", images("white", 8))
        learner.commit()
        learner.factory_reset()
        assert model.labels == LABELS
        assert len(learner.history()) == 1
        learner.factory_reset(forget=True)
        assert learner.history() == ()
        assert learner.learned == {}


def test_a_forgotten_class_is_no_answer(bundle):
    with EdgeModel.load(bundle) as model:
        rules = Rules(margin=0.05, factory_margin=1.0)
        with model.learner(screen=False, rules=rules) as learner:
            learner.forget_class("blue")
            assert learner.commit().accepted
            assert model.labels == ("red", "green")
            with pytest.raises(DataError, match="no such class"):
                learner.forget_class("blue")
            with pytest.raises(DataError, match="two classes"):
                learner.forget_class("red")


def test_the_guard_refuses_a_class_that_is_taught_as_another(bundle):
    with EdgeModel.load(bundle) as model, model.learner(screen=False, flood=None) as learner:
        learner.add(images("red", 300, seed=50), "green")
        learner.add(images("green", 300, seed=51), "red")
        answers = predicted(model, [images(c, 1, seed=9)[0] for c in LABELS])
        receipt = learner.commit()
        assert not receipt.accepted
        assert receipt.generation == 0
        assert "canary" in receipt.reasons[0]
        assert predicted(model, [images(c, 1, seed=9)[0] for c in LABELS]) == answers
        # dropped with what it was made of, also for the next time
        assert learner.learned == {}
        with pytest.raises(DataError, match="nothing to commit"):
            learner.commit()


def test_samples_that_look_like_another_class_are_set_aside(bundle):
    with EdgeModel.load(bundle) as model, model.learner() as learner:
        added = learner.add([*images("red", 3, seed=70), images("blue", 1, seed=71)[0]], "red")
        assert [one.place for one in added.aside] == [3]
        assert "blue" in added.aside[0].reason


def test_another_device_sums_are_added_once(bundle, tmp_path):
    with EdgeModel.load(bundle) as model, model.learner(tmp_path / "other", screen=False) as other:
        other.add(images("white", 8), "white")
        increments = other.increments()
    assert increments.labels == ("white",)
    assert increments.samples == 7
    with EdgeModel.load(bundle) as model, model.learner(screen=False) as learner:
        before = learner.statistics
        assert learner.merge(increments, id="a")
        assert not learner.merge(increments, id="a")
        difference = learner.statistics.gram - before.gram
        rows = features_of([w for n, w in enumerate(images("white", 8), 1) if n % 5])
        np.testing.assert_allclose(difference, rows.T.astype(float) @ rows, atol=1e-6)
        assert learner.commit().accepted
        assert set(predicted(model, images("white", 3, seed=5))) == {"white"}


def test_two_learned_states_are_held_and_picked_per_call(bundle, tmp_path):
    for name in ("white", "black"):
        with (
            EdgeModel.load(bundle) as model,
            model.learner(tmp_path / name, screen=False) as learner,
        ):
            learner.add_class(name, images(name, 8))
            learner.commit()
    with EdgeModel.load(bundle) as model:
        model.add_adapter("line-1", tmp_path / "white")
        model.add_adapter("line-2", tmp_path / "black")
        white, black = images("white", 1, seed=4)[0], images("black", 1, seed=4)[0]
        assert model.predict(white, adapter="line-1").label == "white"
        assert model.predict(black, adapter="line-2").label == "black"
        assert model.predict(white).label in LABELS
        with pytest.raises(ConfigError, match="line-1, line-2"):
            model.predict(white, adapter="line-3")


def test_two_processes_cannot_learn_in_one_place(bundle):
    with (
        EdgeModel.load(bundle) as model,
        model.learner(),
        pytest.raises(ResourceError, match="another process"),
    ):
        model.learner()


def test_a_store_of_another_bundle_is_refused(bundle, tmp_path):
    other = tmp_path / "other"
    make_colour_bundle(other, files={"note.txt": b"different"})
    with EdgeModel.load(bundle) as model, model.learner() as learner:
        folder = learner.folder
    with EdgeModel.load(other) as model, pytest.raises(ConfigError, match="belongs to"):
        model.learner(folder)
    with pytest.raises(ConfigError, match="belongs to"):
        EdgeModel.load(other, learned=folder)


def test_damage_to_what_was_learned_is_seen(bundle):
    with EdgeModel.load(bundle) as model, model.learner(screen=False) as learner:
        learner.add_class("white", images("white", 8))
        learner.commit()
        state = learner.folder / "gen-000001" / "state.npz"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"gen-000001|generation 1"):
        EdgeModel.load(bundle, learned=f"{bundle}.learned")


@pytest.mark.parametrize("label", ["", "  ", "a\nb", "x" * 201, 3])
def test_a_label_that_cannot_be_shown_is_refused(learner, label):
    with pytest.raises(DataError, match="label"):
        learner.add(images("white", 1), [label])


def test_bad_calls_get_one_line_and_take_nothing_in(learner):
    with pytest.raises(DataError, match="a label for each of 2"):
        learner.add(images("white", 2), ["white"])
    with pytest.raises(DataError, match="in a list"):
        learner.add("photo.png", "white")
    with pytest.raises(DataError, match="there is such a class"):
        learner.add_class("red", images("red", 1))
    with pytest.raises(DataError):
        learner.add([np.zeros((2, 2), np.float32)], "white")
    assert learner.learned == {}


def test_a_bundle_without_material_says_so(bundle, seal):
    (bundle / "learn.npz").unlink()
    seal(bundle)
    with EdgeModel.load(bundle) as model, pytest.raises(ConfigError, match="cannot learn"):
        model.learner()


def test_the_watch_counts_new_labels(bundle, tmp_path):
    with EdgeModel.load(bundle, watch=tmp_path / "seen") as model:
        model.predict(images("red", 1)[0])
        with model.learner(screen=False) as learner:
            learner.add_class("white", images("white", 8))
            learner.commit()
        model.predict(images("white", 1, seed=2)[0])
        model.flush_watch()
    text = (tmp_path / "seen").rglob("*.jsonl")
    lines = "".join(path.read_text() for path in text)
    assert '"red": 1' in lines.replace('":1', '": 1')
    assert '"white": 1' in lines.replace('":1', '": 1')


def test_a_state_is_the_same_after_writing_and_reading(bundle):
    with EdgeModel.load(bundle) as model, model.learner(screen=False) as learner:
        learner.add_class("white", images("white", 8))
        candidate = dataclasses.replace(learner.candidate(), generation=1)
        learner.commit()
        rows = features_of(images("white", 5, seed=6))
        np.testing.assert_array_equal(model.state.head_logits(rows), candidate.head_logits(rows))
