"""Back to the cloud: sums add exactly, tensors by their products, the guard has the last word."""

import dataclasses
import json
import math
import shutil
from statistics import NormalDist

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from fleet_bundles import COLOURS, LABELS, features_of, images, make_colour_bundle
from onnx import numpy_helper

from edgetune.cli.main import cli
from edgetune.errors import ConfigError, DataError, GateError, IntegrityError
from edgetune.export.average import average, average_low_rank
from edgetune.export.heads import replace_head
from edgetune.export.merge import combine, merge_bundle
from edgetune.export.privacy import epsilon_of, noise_multiplier_for
from edgetune.runtime.bundle import open_bundle, verify_files
from edgetune.runtime.learn.exchange import (
    dump_fleet_file,
    export_learned,
    load_fleet_file,
    read_fleet_file,
)
from edgetune.runtime.learn.material import read_material
from edgetune.runtime.learn.privacy import Privacy
from edgetune.runtime.learn.projection import Projection
from edgetune.runtime.learn.ridge import regularisation, solve
from edgetune.runtime.learn.state import STATE_NAME, State, binding_of, dump_state
from edgetune.runtime.learn.statistics import add, empty, expand, merge
from edgetune.runtime.learn.store import Store
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.ort import onnxruntime
from edgetune.runtime.packing import pack

GIVEN = {  # device -> label -> samples
    "a": {"white": 12, "red": 7},
    "b": {"white": 9, "black": 15},
    "c": {"blue": 11, "white": 6},
}


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    return make_colour_bundle(
        tmp_path_factory.mktemp("merge") / "colours",
        files={"MODEL_CARD.md": b"# colours\n\nthe first\n", "extra.txt": b"kept"},
    )


@pytest.fixture(scope="session")
def trainable(tmp_path_factory):
    return make_colour_bundle(tmp_path_factory.mktemp("merge") / "trainable", train=True)


@pytest.fixture(scope="session")
def fleet(colours, tmp_path_factory):
    """A file of each device of GIVEN."""
    return send(colours, tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="session")
def merged(colours, fleet, tmp_path_factory):
    output = tmp_path_factory.mktemp("merged") / "new"
    return merge_bundle(colours, fleet, output=output)


def send(bundle, folder, **options):
    files = []
    for seed, (device, given) in enumerate(GIVEN.items()):
        store = folder / f"{device}.learned"
        with EdgeModel.load(bundle) as model, model.learner(store, screen=False) as learner:
            for label, count in given.items():
                learner.add(images(label, count, seed), label)
            assert learner.commit().accepted
        path = folder / f"{device}.npz"
        path.write_bytes(dump_fleet_file(export_learned(bundle, store, **options).file))
        files.append(path)
    return files


def pooled_samples():
    """All devices' samples that went into statistics: all but each fifth of a class."""
    for seed, given in enumerate(GIVEN.values()):
        for label, count in given.items():
            yield label, [s for i, s in enumerate(images(label, count, seed)) if i % 5 != 4]


def pooled(start, labels):
    stats = merge(start, empty(3, labels))
    for label, samples in pooled_samples():
        rows = features_of(samples)
        stats = add(stats, rows, np.full(len(rows), stats.labels.index(label)))
    return stats


def answers(path, samples):
    with EdgeModel.load(path) as model:
        return [model.predict(s).label for s in samples]


def weights_of(path, name="model.onnx"):
    model = onnx.load(path / name)
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# -- statistics


def test_merged_files_are_the_statistics_of_all_samples_pooled(fleet):
    total = empty(3, ("black", "blue", "red", "white"))
    for path in fleet:
        total = merge(total, read_fleet_file(path).statistics)
    expected = pooled(empty(3), total.labels)
    np.testing.assert_allclose(total.gram, expected.gram, rtol=1e-9)
    np.testing.assert_allclose(total.sums, expected.sums, rtol=1e-9)
    np.testing.assert_array_equal(total.counts, expected.counts)


def test_new_head_is_that_of_the_factory_and_all_devices_samples(colours, merged):
    prior = expand(read_material(open_bundle(colours)).prior)
    expected = pooled(prior, merged.labels)
    head = solve(expected, ridge=regularisation(expected))
    found = weights_of(merged.bundle)
    scale = found["merged.weight"].max() / head.weights.max()  # the temperature
    np.testing.assert_allclose(found["merged.weight"], head.weights * scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["merged.bias"], head.bias * scale, rtol=1e-4, atol=1e-5)
    again = expand(read_material(open_bundle(merged.bundle)).prior)
    assert again.labels == merged.labels
    np.testing.assert_array_equal(again.counts, expected.counts)
    np.testing.assert_allclose(again.gram, expected.gram, rtol=1e-5)


def test_new_bundle_is_whole_and_knows_the_new_classes(merged):
    bundle = open_bundle(merged.bundle)
    verify_files(bundle)
    assert bundle.manifest.labels == merged.labels
    assert set(merged.new_labels) == {"white", "black"}
    assert bundle.manifest.release == merged.release == 2
    assert bundle.manifest.evaluation.split == "canary"
    assert bundle.manifest.evaluation.samples == 180
    assert (merged.bundle / "extra.txt").read_bytes() == b"kept"
    with EdgeModel.load(merged.bundle, check="full") as model:
        assert model.self_test() == 0.0
        for label in COLOURS:
            assert [r.label for r in model.predict(images(label, 20, 77))] == [label] * 20
    # it teaches in turn, and the parent's canary still judges
    material = read_material(bundle)
    assert len(material.canary_answers) == 180
    np.testing.assert_array_equal(material.canary_answers, material.canary_classes)


def test_card_names_parent_files_and_what_was_measured(colours, merged):
    card = (merged.bundle / "MODEL_CARD.md").read_text()
    assert open_bundle(colours).manifest.digest in card
    for contribution in merged.contributions:
        assert contribution.id[:12] in card
    assert "white 23, black 12" in card or "black 12, white 23" in card
    assert "180 canary samples" in card
    assert "\n## colours\n\nthe first\n" in card


def test_order_and_repetition_of_files_change_no_byte(colours, fleet, merged, tmp_path):
    copy = tmp_path / "copy.npz"
    shutil.copyfile(fleet[1], copy)
    again = merge_bundle(colours, [copy, *reversed(fleet), fleet[0]], output=tmp_path / "again")
    assert any("is the same" in note for note in again.notes)
    assert len(again.contributions) == 3
    one, two = files_of(merged.bundle), files_of(tmp_path / "again")
    for files in (one, two):  # they tell of the notes, and of where the files were
        del files["MODEL_CARD.md"], files["manifest.json"]
    assert one == two


def test_of_a_device_only_the_last_generation_counts(colours, tmp_path):
    store, files = tmp_path / "store", []
    for number in range(2):
        with EdgeModel.load(colours) as model, model.learner(store, screen=False) as learner:
            learner.add(images("white", 10, number), "white")
            assert learner.commit().accepted
        files.append(tmp_path / f"{number}.npz")
        files[-1].write_bytes(dump_fleet_file(export_learned(colours, store).file))
    result = merge_bundle(colours, files, output=tmp_path / "new")
    assert result.counts == {"white": 16}
    assert "later generation of the same device" in result.notes[0]
    folder = tmp_path / "inbox"
    folder.mkdir()
    shutil.copyfile(files[0], folder / "one.npz")
    alone = merge_bundle(colours, [folder], output=tmp_path / "alone")
    assert alone.counts == {"white": 8}


def test_equal_weights_give_every_device_the_same_say(colours, tmp_path):
    files = []
    for device, (label, count) in {"x": ("white", 40), "y": ("black", 10)}.items():
        store = tmp_path / device
        with EdgeModel.load(colours) as model, model.learner(store, screen=False) as learner:
            learner.add(images(label, count), label)
            assert learner.commit().accepted
        files.append(tmp_path / f"{device}.npz")
        files[-1].write_bytes(dump_fleet_file(export_learned(colours, store).file))
    result = merge_bundle(colours, files, output=tmp_path / "new", weights="equal")
    prior = expand(read_material(open_bundle(result.bundle)).prior)
    counts = dict(zip(prior.labels, prior.counts, strict=True))
    # 32 and 8 samples learned, 20 on average
    assert counts["white"] == counts["black"] == 20
    assert result.counts == {"white": 32, "black": 8}


def test_zip_of_the_bundle_gives_the_same_new_one(colours, fleet, merged, tmp_path):
    pack(colours, tmp_path / "colours.zip")
    again = merge_bundle(tmp_path / "colours.zip", fleet, output=tmp_path / "new")
    assert files_of(again.bundle) == files_of(merged.bundle)


def test_poisoned_file_is_refused_and_named(colours, fleet, tmp_path):
    """Many samples that look green and are said to be red."""
    file = read_fleet_file(fleet[0])
    stats = add(empty(3, ("red",)), features_of(images("green", 5000)), np.zeros(5000, np.int64))
    poisoned = dataclasses.replace(
        file, id="f" * 32, source="e" * 32, labels=("red",), counts=stats.counts,
        statistics=stats,
    )  # fmt: skip
    path = tmp_path / "poison.npz"
    path.write_bytes(dump_fleet_file(poisoned))
    with pytest.raises(GateError, match=r"poison\.npz it would pass") as refusal:
        merge_bundle(colours, [*fleet, path], output=tmp_path / "new")
    assert "canary" in str(refusal.value)
    assert refusal.value.exit_code == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["poison.npz"]


def test_canary_too_small_to_prove_the_limit_refuses(colours, fleet, tmp_path):
    with pytest.raises(GateError, match="does not show a loss"):
        merge_bundle(colours, fleet, output=tmp_path / "new", max_drop=0.001)


def test_files_of_another_bundle_damaged_files_and_wrong_arguments_are_refused(
    colours, trainable, fleet, tmp_path
):
    output = tmp_path / "new"
    with pytest.raises(DataError, match="digest"):
        merge_bundle(trainable, fleet, output=output)
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(fleet[0].read_bytes()[:-40])
    with pytest.raises(IntegrityError, match="is no fleet file"):
        merge_bundle(colours, [damaged], output=output)
    wide = dataclasses.replace(
        read_fleet_file(fleet[0]), labels=("red",), counts=np.ones(1),
        statistics=add(empty(4, ("red",)), np.ones((1, 4)), np.zeros(1, np.int64)),
    )  # fmt: skip
    damaged.write_bytes(dump_fleet_file(wide))
    with pytest.raises(DataError, match="4 features; expected 3"):
        merge_bundle(colours, [damaged], output=output)
    with pytest.raises(ConfigError, match="expected more than the parent's 1"):
        merge_bundle(colours, fleet, output=output, release=1)
    with pytest.raises(ConfigError, match="exists already"):
        merge_bundle(colours, fleet, output=colours)
    with pytest.raises(ConfigError, match="one file or more"):
        merge_bundle(colours, [], output=output)
    assert [p.name for p in tmp_path.iterdir()] == ["damaged.npz"]


def test_command_merges_and_prints_json(colours, fleet, tmp_path):
    runner = CliRunner()
    arguments = ["merge", str(colours), *map(str, fleet), "--output", str(tmp_path / "new")]
    said = runner.invoke(cli, arguments, catch_exceptions=False)
    assert "canary, right: 100.0% before, 100.0% after" in said.output
    assert "release 2" in said.output
    said = runner.invoke(cli, [*arguments[:-1], str(tmp_path / "json"), "--release", "7", "--json"])
    found = json.loads(said.output)
    assert found["release"] == 7
    assert found["counts"]["black"] == 12
    assert open_bundle(found["bundle"]).manifest.release == 7


# -- the graph


def run_model(model, feeds):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize("planned", [None, Projection(width_in=3, width=8, seed=5)])
def test_replaced_head_is_the_product_of_features_and_leaves_nothing_of_the_old(colours, planned):
    model = onnx.load(colours / "model.onnx")
    before = model.SerializeToString()
    rng = np.random.default_rng(0)
    width = 3 if planned is None else 8
    weights = rng.normal(size=(width, 4)).astype(np.float32)
    bias = rng.normal(size=4).astype(np.float32)
    new = replace_head(model, weights, bias, projection=planned)
    onnx.checker.check_model(new)
    assert model.SerializeToString() == before
    assert not {"head", "offset"} & {t.name for t in new.graph.initializer}
    pixels = images("white", 1)[0]
    rows = features_of([pixels])
    if planned is not None:
        # x R / sqrt(3), negative parts cut
        rows = np.maximum(rows @ planned.signs / np.sqrt(3), 0)
    np.testing.assert_allclose(
        run_model(new, {"image": pixels[None]}), rows @ weights + bias, rtol=1e-5
    )
    # once more: names of the first replacement are free again
    third = replace_head(new, weights[:, :2], bias[:2], projection=planned)
    np.testing.assert_allclose(
        run_model(third, {"image": pixels[None]}), (rows @ weights + bias)[:, :2], rtol=1e-5
    )


def test_graph_without_features_is_refused(colours):
    model = onnx.load(colours / "model.onnx")
    del model.graph.output[1:]
    with pytest.raises(ConfigError, match="features"):
        replace_head(model, np.zeros((3, 2)), np.zeros(2))


def test_statistics_set_the_trainable_head_and_keep_the_step(trainable, tmp_path):
    files = send(trainable, tmp_path)
    result = merge_bundle(trainable, files, output=tmp_path / "new")
    manifest = open_bundle(result.bundle).manifest
    assert manifest.training == open_bundle(trainable).manifest.training
    assert weights_of(result.bundle)["learn.output.weight"].shape == (3, 5)
    assert answers(result.bundle, images("white", 20, 77)) == ["white"] * 20
    step = onnx.load(result.bundle / "train.onnx")
    session = onnxruntime.InferenceSession(
        step.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    loss, logits = session.run(["loss", "logits"], step_feeds(result.bundle, session))
    assert logits.shape == (4, 5)
    assert np.isfinite(loss)


def step_feeds(bundle, session):
    """A batch of white images for the step, with the new bundle's tensors."""
    rows = features_of(images("white", 4))
    values = weights_of(bundle)
    feeds = {}
    for node in session.get_inputs():
        shape = [{"batch": 4, "classes": 5}.get(d, d) for d in node.shape]
        feeds[node.name] = values.get(node.name, np.ones(shape, np.float32))
        if node.name in ("entered", "frozen"):
            feeds[node.name] = rows
    return feeds


# -- tensors


def test_products_are_averaged_where_factors_would_cancel():
    """Two devices learned the same, one with both signs turned: the means of A and B are 0."""
    a, b = np.float32([[1], [2]]), np.float32([[3, 4]])
    own = (np.zeros_like(a), np.zeros_like(b))
    assert not ((a + -a) / 2).any()
    found_a, found_b, kept = average_low_rank([(a, b), (-a, -b)], np.array([0.5, 0.5]), own)
    np.testing.assert_allclose(found_a @ found_b, [[3, 4], [6, 8]], rtol=1e-6)
    # balanced: sqrt(S) on each side
    np.testing.assert_allclose(np.linalg.norm(found_a), np.linalg.norm(found_b), rtol=1e-6)
    assert kept == pytest.approx(1)


def test_low_rank_mean_is_the_best_of_its_rank():
    """Against the SVD of the whole mean product (Eckart and Young)."""
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(7, 2)), rng.normal(size=(2, 5))) for _ in range(4)]
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    product = sum(w * a @ b for w, (a, b) in zip(shares, pairs, strict=True))
    u, s, vt = np.linalg.svd(product)
    best = u[:, :2] * s[:2] @ vt[:2]
    found_a, found_b, kept = average_low_rank(pairs, shares, (np.zeros((7, 2)), np.zeros((2, 5))))
    np.testing.assert_allclose(found_a @ found_b, best, rtol=1e-5, atol=1e-6)
    assert kept == pytest.approx(float(np.sum(s[:2] ** 2) / np.sum(s**2)))


def test_low_rank_mean_of_convolutions_is_of_their_kernels():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 3, 3, 3)), rng.normal(size=(6, 2, 1, 1))
    found_a, found_b, _ = average_low_rank([(a, b), (-a, -b)], np.array([0.5, 0.5]), (a * 0, b * 0))
    assert found_a.shape == a.shape
    assert found_b.shape == b.shape
    kernel = np.einsum("or,rihw->oihw", b[..., 0, 0], a)
    found = np.einsum("or,rihw->oihw", found_b[..., 0, 0], found_a)
    np.testing.assert_allclose(found, kernel, rtol=1e-5, atol=1e-6)


def test_branch_that_no_device_trained_stays_trainable():
    own_a, own_b = np.float32([[1, 2], [3, 4], [5, 6]]), np.zeros((2, 4), np.float32)
    found_a, found_b, kept = average_low_rank(
        [(own_a, own_b), (own_a * 2, own_b)], np.array([0.5, 0.5]), (own_a, own_b)
    )
    np.testing.assert_array_equal(found_a, own_a)
    assert not found_b.any()
    assert kept == 1.0


def test_rows_of_classes_are_averaged_over_the_devices_that_have_them():
    """By hand: red of both (weights 1 and 3), white of the first alone, black of the second."""
    one = {"w": np.float32([[4, 8]]), "b": np.float32([0, 4]), "n": np.float32([1])}
    two = {"w": np.float32([[8, 5]]), "b": np.float32([4, 5]), "n": np.float32([5])}
    states = [(("red", "white"), one), (("red", "black"), two)]
    defaults = {"w": np.zeros((1, 1), np.float32), "b": np.zeros(1, np.float32), "n": one["n"]}
    found = average(states, [1, 3], defaults, {"w": 1, "b": 0}, ["red"])
    assert found.labels == ("red", "white", "black")
    np.testing.assert_array_equal(found.tensors["w"], [[7, 8, 5]])
    np.testing.assert_array_equal(found.tensors["b"], [3, 4, 5])
    np.testing.assert_array_equal(found.tensors["n"], [4])


def tensor_file(bundle, folder, name, labels, tensors, counts):
    opened = open_bundle(bundle)
    with Store.open(folder / name, binding=binding_of(opened)) as store:
        state = dump_state(State(labels=labels, tensors=tensors))
        store.commit({STATE_NAME: state}, {"kind": "tensors", "counts": counts})
    path = folder / f"{name}.npz"
    path.write_bytes(dump_fleet_file(export_learned(bundle, folder / name).file))
    return path


def trained(*, a, b, extra):
    """Tensors of a device: a product A B, and a row of head weights and a bias of a new class."""
    weight = np.concatenate([10 * np.eye(3), np.array(extra[0])[:, None]], axis=1)
    return {
        "learn.body.lora_a.weight": np.float32(a).reshape(3, 1),
        "learn.body.lora_b.weight": np.float32(b).reshape(1, 3),
        "learn.output.weight": weight.astype(np.float32),
        "learn.output.bias": np.float32([0, 0, 0, extra[1]]),
    }


def test_merged_tensors_compute_the_mean_of_the_devices_models(trainable, tmp_path):
    """Features x + x A B: with A B the same on both devices, but for the sign of the factors."""
    # a white row of 10 x and 4: grey images are above it, coloured ones are not
    new = ([10.0, 10.0, 10.0], -9.0)
    one = trained(a=[0.1, 0, 0], b=[0.2, 0, 0], extra=new)
    two = trained(a=[-0.1, 0, 0], b=[-0.2, 0, 0], extra=new)
    labels = (*LABELS, "white")
    files = [
        tensor_file(trainable, tmp_path, "one", labels, one, {"white": 8}),
        tensor_file(trainable, tmp_path, "two", labels, two, {"white": 2}),
    ]
    result = merge_bundle(trainable, files, output=tmp_path / "new")
    assert result.kind == "tensors"
    assert result.labels == labels
    assert result.counts == {"white": 10}
    with EdgeModel.load(result.bundle, check="full") as model:
        assert model.self_test() == 0.0
        sample = images("red", 1)[0]
        row = features_of([sample])[0]
        expected = row * [1.02, 1, 1]
        outputs = model.outputs(sample)
        np.testing.assert_allclose(outputs["features"][0], expected, rtol=1e-5)
        np.testing.assert_allclose(
            outputs["logits"][0], [*(10 * expected), 10 * expected.sum() - 9], rtol=1e-4
        )
        assert model.predict(images("white", 1)[0]).label == "white"
    manifest = open_bundle(result.bundle).manifest
    assert manifest.outputs[0].shape == ("batch", "classes")
    assert manifest.training is not None
    # the factory's sums are of other features
    assert any("export it anew" in note for note in result.notes)
    assert not read_material(open_bundle(result.bundle)).prior.counts.any()


def test_tensors_that_lose_the_canary_are_refused(trainable, tmp_path):
    spoiled = trained(a=[1, 1, 1], b=[-3, 0, 5], extra=([0.0, 0.0, 0.0], -9.0))
    labels = (*LABELS, "white")
    path = tensor_file(trainable, tmp_path, "one", labels, spoiled, {"white": 8})
    with pytest.raises(GateError, match="canary"):
        merge_bundle(trainable, [path], output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tensors_and_statistics_are_not_mixed_and_odd_tensors_refused(trainable, tmp_path):
    good = trained(a=[0, 0, 0], b=[0, 0, 0], extra=([0.0, 0.0, 0.0], -9.0))
    labels = (*LABELS, "white")
    path = tensor_file(trainable, tmp_path, "one", labels, good, {"white": 8})
    statistics = send(trainable, tmp_path)[0]
    with pytest.raises(DataError, match="one kind at a time"):
        merge_bundle(trainable, [path, statistics], output=tmp_path / "new")
    file = load_fleet_file(path.read_bytes(), "file")
    renamed = dict(file.tensors)
    renamed["learn.other"] = renamed.pop("learn.output.bias")
    turned = {**file.tensors, "learn.output.weight": file.tensors["learn.output.weight"].T.copy()}
    for tensors, said in ((renamed, "not those"), (turned, "expected shape")):
        path.write_bytes(dump_fleet_file(dataclasses.replace(file, tensors=tensors)))
        with pytest.raises(DataError, match=said):
            merge_bundle(trainable, [path], output=tmp_path / "new")


# -- noise


def delta_of(epsilon, sigma):
    """Balle and Wang 2018, theorem 8, of sensitivity 1."""
    normal = NormalDist()
    return normal.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * normal.cdf(
        -0.5 / sigma - epsilon * sigma
    )


@pytest.mark.parametrize("sigma", [0.8, 2.0, 10.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_epsilon_is_that_of_the_analytic_gaussian_mechanism(sigma, delta):
    assert delta_of(epsilon_of([sigma], delta), sigma) == pytest.approx(delta, rel=1e-4)


def test_releases_compose_as_google_s_numerical_accountant_says():
    import dp_accounting
    from dp_accounting.pld import pld_privacy_accountant

    accountant = pld_privacy_accountant.PLDAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(6.0), 4)
    accountant.compose(dp_accounting.GaussianDpEvent(9.0), 2)
    numerical = accountant.get_epsilon(1e-5)
    assert epsilon_of([6.0] * 4 + [9.0] * 2, 1e-5) == pytest.approx(numerical, rel=1e-3)


def test_noise_is_found_for_an_epsilon_and_as_many_releases():
    sigma = noise_multiplier_for(2.0, 1e-6, releases=9)
    assert epsilon_of([sigma] * 9, 1e-6) == pytest.approx(2.0, rel=1e-4)
    assert delta_of(2.0, sigma / 3) == pytest.approx(1e-6, rel=1e-3)
    for epsilon, delta, releases in ((0.0, 1e-6, 1), (1.0, 1.0, 1), (1.0, 1e-6, 0)):
        with pytest.raises(ConfigError):
            noise_multiplier_for(epsilon, delta, releases=releases)


def test_noisy_files_merge_and_their_epsilon_is_said(colours, tmp_path):
    files = send(colours, tmp_path, noise_multiplier=0.01, labels=["white", "black"])
    result = merge_bundle(colours, files, output=tmp_path / "new")
    assert {c.noise_multiplier for c in result.contributions} == {0.01}
    for contribution in result.contributions:
        assert contribution.epsilon == epsilon_of([0.01], 1e-6)
    assert set(result.new_labels) == {"white", "black"}
    assert answers(result.bundle, images("red", 20, 77)) == ["red"] * 20
    assert result.counts["white"] == pytest.approx(23, abs=0.3)


def test_new_class_of_noise_alone_is_left_out(colours, tmp_path):
    store = tmp_path / "store"
    with EdgeModel.load(colours) as model, model.learner(store, screen=False) as learner:
        learner.add(images("red", 50), "red")
        assert learner.commit().accepted
    file = export_learned(colours, store).file
    # no sample is of it, and noise of 0.5 sqrt(3) = 0.87 on a count reaches 1.5 now and then
    stats = merge(file.statistics, empty(3, ("ghost", "real")))
    stats.counts[-2:] = 1.5, 9
    stats.sums[-1] = 9 * features_of(images("white", 1))[0]
    noise = Privacy(clip=1.0, noise_multiplier=0.5)
    path = tmp_path / "file.npz"
    path.write_bytes(
        dump_fleet_file(
            dataclasses.replace(
                file, labels=stats.labels, counts=stats.counts, statistics=stats, privacy=noise
            )
        )
    )
    result = merge_bundle(colours, [path], output=tmp_path / "new")
    assert result.new_labels == ("real",)
    assert any("ghost" in note for note in result.notes)


def test_noisy_scatter_counts_only_where_it_outweighs_its_noise():
    """By hand: means of classes on one axis, and the factory's variance of 1 on the other."""
    exact = empty(2, ("a",))
    exact = add(exact, np.array([[0, 1], [0, -1]] * 50), np.zeros(100, np.int64))
    noisy = add(empty(2, ("b",)), np.full((100, 2), [3.0, 0.0]), np.zeros(100, np.int64))
    little = (Privacy(clip=1.0, noise_multiplier=1e-6), 1.0, ("b",))
    total, out, extra = combine(exact, noisy, [little])
    assert out == ()
    np.testing.assert_allclose(total.gram, [[900, 0], [0, 100]])
    # noise of 1e-12 * 3 on a sum, over 100 samples, three times its variance
    assert extra == pytest.approx(3 * 3e-12 / 100**2)
    much = (Privacy(clip=10.0, noise_multiplier=10.0), 1.0, ("b",))
    total, _, extra = combine(exact, noisy, [much])
    # b is taken to vary as a does: 200 samples of variance 1
    np.testing.assert_allclose(total.gram, [[900, 0], [0, 200]])
    assert extra == pytest.approx(3 * 100 * 300 / 100**2)
    # two standard deviations of the count's noise are 2 * 10 * sqrt(3 * 9) = 104
    _, out, _ = combine(exact, noisy, [much] * 9)
    assert out == ("b",)


def test_privacy_command_finds_noise_and_epsilon():
    runner = CliRunner()
    said = runner.invoke(cli, ["privacy", "--epsilon", "2", "--releases", "9", "--json"])
    found = json.loads(said.output)
    assert delta_of(2.0, found["noise_multiplier"] / 3) == pytest.approx(1e-6, rel=1e-3)
    said = runner.invoke(cli, ["privacy", "--noise-multiplier", "4"])
    assert "(1.06, 1e-06)" in said.output
    assert runner.invoke(cli, ["privacy"]).exit_code == 2
