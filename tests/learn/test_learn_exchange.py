"""Fleet files: what is in them, what is not, what is refused; noise that hides one sample."""

import io
import json
import math
import pickle
import zipfile

import numpy as np
import pytest
from fleet_bundles import features_of, images, make_colour_bundle

from edgetune.errors import ConfigError, DataError, IntegrityError
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.learn import exchange
from edgetune.runtime.learn.exchange import (
    DEVICE_NAME,
    MAX_BYTES,
    dump_fleet_file,
    export_learned,
    load_fleet_file,
    read_fleet_file,
)
from edgetune.runtime.learn.privacy import (
    Privacy,
    clip_rows,
    from_release_vector,
    gaussians,
    perturb,
    release_vector,
)
from edgetune.runtime.learn.state import STATE_NAME, State, binding_of, dump_state
from edgetune.runtime.learn.statistics import Statistics, add, empty
from edgetune.runtime.learn.store import Store
from edgetune.runtime.model import EdgeModel


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    return make_colour_bundle(tmp_path_factory.mktemp("fleet") / "colours")


@pytest.fixture(scope="session")
def trainable(tmp_path_factory):
    return make_colour_bundle(tmp_path_factory.mktemp("fleet") / "trainable", train=True)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def teach(bundle, store, *given):
    """Commit samples, label by label."""
    with EdgeModel.load(bundle) as model, model.learner(store, screen=False) as learner:
        for label, samples in given:
            learner.add(samples, label)
        assert learner.commit().accepted


def learned_of(samples):
    """The samples that the fifth of each five was not kept apart of."""
    return [s for i, s in enumerate(samples) if i % 5 != 4]


def sums_of(samples):
    rows = features_of(samples).astype(np.float64)
    return rows.T @ rows, rows.sum(axis=0)


def arrays_of(data):
    with np.load(io.BytesIO(data)) as stored:
        return dict(stored)


def packed(arrays, *, seal=True):
    arrays = dict(arrays)
    if seal:
        arrays["sha256"] = exchange._checksum(arrays)
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


def with_header(data, **changes):
    arrays = arrays_of(data)
    header = json.loads(arrays["header"].tobytes()) | changes
    return packed(arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)})


# -- what is in a file


def test_file_holds_the_sums_of_the_committed_samples_and_no_others(colours, store):
    white = images("white", 12)
    teach(colours, store, ("white", white))
    with EdgeModel.load(colours) as model, model.learner(store, screen=False) as learner:
        learner.add(images("black", 9), "black")  # not committed
        exported = export_learned(colours, store)
    file = exported.file
    gram, total = sums_of(learned_of(white))
    assert file.labels == ("white",)
    assert file.counts.tolist() == [10]
    np.testing.assert_allclose(file.statistics.gram, gram, rtol=1e-12)
    np.testing.assert_allclose(file.statistics.sums[0], total, rtol=1e-12)
    manifest = open_bundle(colours).manifest
    assert (file.bundle, file.base, file.generation) == ("colours", manifest.digest, 1)
    assert exported.left_out == {}


def test_file_is_that_of_the_parent_after_undo(colours, store):
    teach(colours, store, ("white", images("white", 12)))
    first = export_learned(colours, store).file
    teach(colours, store, ("black", images("black", 12)))
    second = export_learned(colours, store).file
    assert second.labels == ("black", "white")
    assert (second.source, second.generation) == (first.source, 2)
    assert second.id != first.id
    with EdgeModel.load(colours) as model, model.learner(store) as learner:
        learner.undo()
    assert dump_fleet_file(export_learned(colours, store).file) == dump_fleet_file(first)


def test_removed_samples_and_forgotten_classes_are_not_sent(colours, store):
    white = images("white", 12)
    teach(colours, store, ("white", white), ("black", images("black", 12)))
    with EdgeModel.load(colours) as model, model.learner(store, screen=False) as learner:
        learner.remove(white[:3])
        learner.forget_class("black")
        assert learner.commit().accepted
        increments = learner.increments()
    file = export_learned(colours, store).file
    gram, total = sums_of(learned_of(white)[3:])
    assert dict(zip(file.labels, file.counts, strict=True)) == {"white": 7}
    np.testing.assert_allclose(file.statistics.gram, gram, rtol=1e-12)
    np.testing.assert_allclose(file.statistics.sums[0], total, rtol=1e-12)
    np.testing.assert_allclose(file.statistics.gram, increments.gram, rtol=1e-12)


def test_statistics_of_other_devices_are_not_sent_on(colours, store):
    other = add(empty(3, ("white",)), features_of(images("white", 20, 5)), np.zeros(20, np.int64))
    red = images("red", 10)
    with EdgeModel.load(colours) as model, model.learner(store, screen=False) as learner:
        learner.add(red, "red")
        learner.merge(other, id="other")
        assert learner.commit().accepted
    file = export_learned(colours, store).file
    assert file.labels == ("red",)
    np.testing.assert_allclose(file.statistics.gram, sums_of(learned_of(red))[0], rtol=1e-12)


def test_small_classes_are_left_out_of_the_gram_matrix_too(colours, store):
    red = images("red", 10)
    teach(colours, store, ("red", red), ("white", images("white", 3)))
    exported = export_learned(colours, store, min_count=4)
    assert exported.file.labels == ("red",)
    assert exported.left_out == {"white": 3}
    gram, _ = sums_of(learned_of(red))
    np.testing.assert_allclose(exported.file.statistics.gram, gram, rtol=1e-12)
    with pytest.raises(ConfigError, match="no class has 9 samples"):
        export_learned(colours, store, min_count=9)


def test_factory_state_has_nothing_to_send(colours, store):
    with pytest.raises(ConfigError, match="nothing was learned there"):
        export_learned(colours, store)
    teach(colours, store, ("white", images("white", 12)))
    with EdgeModel.load(colours) as model, model.learner(store) as learner:
        learner.factory_reset()
    with pytest.raises(ConfigError, match="the factory state is live"):
        export_learned(colours, store)


def test_two_devices_with_the_same_samples_are_two(colours, tmp_path):
    files = []
    for name in ("a", "b"):
        teach(colours, tmp_path / name, ("white", images("white", 12)))
        files.append(export_learned(colours, tmp_path / name).file)
    assert files[0].id != files[1].id
    assert files[0].source != files[1].source
    assert (tmp_path / "a" / DEVICE_NAME).stat().st_mode & 0o077 == 0


def test_file_is_read_as_it_was_written(colours, store, tmp_path):
    teach(colours, store, ("white", images("white", 12)), ("red", images("red", 9)))
    file = export_learned(colours, store).file
    data = dump_fleet_file(file)
    (tmp_path / "file.npz").write_bytes(data)
    read = read_fleet_file(tmp_path / "file.npz")
    assert dump_fleet_file(read) == data
    assert read.labels == ("red", "white")
    np.testing.assert_array_equal(read.statistics.gram, file.statistics.gram)


def commit_tensors(bundle, store, labels, tensors, counts):
    opened = open_bundle(bundle)
    with Store.open(store, binding=binding_of(opened)) as writable:
        state = dump_state(State(labels=labels, tensors=tensors))
        writable.commit({STATE_NAME: state}, {"kind": "tensors", "counts": counts})


def test_tensors_go_home_without_the_rows_of_small_new_classes(trainable, store):
    rng = np.random.default_rng(0)
    tensors = {
        "learn.body.lora_a.weight": rng.normal(size=(3, 1)).astype(np.float32),
        "learn.body.lora_b.weight": rng.normal(size=(1, 3)).astype(np.float32),
        "learn.output.weight": rng.normal(size=(3, 5)).astype(np.float32),
        "learn.output.bias": rng.normal(size=5).astype(np.float32),
    }
    labels = ("red", "green", "blue", "white", "black")
    counts = {"white": 1, "black": 6, "red": 1, "green": 4}
    commit_tensors(trainable, store, labels, tensors, counts)
    exported = export_learned(trainable, store)
    file = load_fleet_file(dump_fleet_file(exported.file), "file")
    assert file.kind == "tensors"
    assert file.labels == ("red", "green", "blue", "black")
    assert file.counts.tolist() == [0, 4, 0, 6]
    kept = [0, 1, 2, 4]
    np.testing.assert_array_equal(
        file.tensors["learn.output.weight"], tensors["learn.output.weight"][:, kept]
    )
    np.testing.assert_array_equal(
        file.tensors["learn.output.bias"], tensors["learn.output.bias"][kept]
    )
    np.testing.assert_array_equal(
        file.tensors["learn.body.lora_a.weight"], tensors["learn.body.lora_a.weight"]
    )
    assert exported.left_out == {"white": 1}
    with pytest.raises(ConfigError, match="noise is for statistics"):
        export_learned(trainable, store, noise_multiplier=1.0)


def test_command_writes_a_file_and_says_what_is_in_it(colours, store, tmp_path, rt):
    teach(colours, store, ("white", images("white", 12)), ("black", images("black", 1)))
    output = tmp_path / "home.npz"
    said = rt("export-learned", colours, output, "--learned", store)
    assert said.returncode == 0, said.stderr
    assert b"white\t10" in said.stdout
    assert b"left out: black (1)" in said.stdout
    assert read_fleet_file(output).labels == ("white",)
    again = rt("export-learned", colours, output, "--learned", store)
    assert again.returncode == 2
    assert b"exists already" in again.stderr


# -- what is refused


@pytest.fixture(scope="session")
def good(colours, tmp_path_factory):
    store = tmp_path_factory.mktemp("good") / "store"
    teach(colours, store, ("white", images("white", 12)), ("red", images("red", 9)))
    return dump_fleet_file(export_learned(colours, store).file)


def test_every_cut_and_every_damaged_byte_is_refused(good):
    for length in range(0, len(good), 97):
        with pytest.raises(IntegrityError):
            load_fleet_file(good[:length], "cut")
    expected = arrays_of(good)
    for place in range(0, len(good), 13):
        damaged = bytearray(good)
        damaged[place] ^= 0x55
        try:
            file = load_fleet_file(bytes(damaged), "damaged")
        except IntegrityError:
            continue
        # what is not content, such as the date of a zip's entry
        assert {n: a.tobytes() for n, a in arrays_of(dump_fleet_file(file)).items()} == {
            n: a.tobytes() for n, a in expected.items()
        }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"counts": np.array([7.0, -10.0])}, "below 0"),
        ({"counts": np.array([7.0])}, "expected float64 of shape"),
        ({"counts": np.array([7, 10])}, "expected float64"),
        ({"sums": np.full((2, 3), np.nan)}, "not finite"),
        ({"sums": np.full((2, 3), 1e4)}, "no samples with such sums"),
        ({"sums": np.full((2, 3), 1e300)}, "no samples with such sums"),
        ({"sums": np.zeros((2, 4))}, "gram of shape"),
        ({"sums": np.zeros((2, 2**20))}, "gram of shape"),
        ({"counts": np.array([0.0, 10.0])}, "of no samples"),
        ({"gram": np.array([-1.0, 0, 0, 1, 0, 1])}, "of no samples"),
        ({"gram": np.array([50.0, 90, 0, 50, 0, 50])}, "no samples with such sums"),
        ({"version": np.array(2)}, "version 2"),
        ({"tensor_x": np.zeros(3, np.float32)}, "statistics with gram, sums, tensor_x"),
        ({"header": np.zeros(9, np.uint8)}, "is no fleet file"),
        ({"header": np.frombuffer(b"[" * 100_000, np.uint8)}, "is no fleet file"),
        ({"header": np.frombuffer(b"[1]", np.uint8)}, "expected a JSON object"),
    ],
)  # fmt: skip
def test_sealed_file_of_odd_numbers_is_refused(good, change, said):
    with pytest.raises(IntegrityError, match=said):
        load_fleet_file(packed(arrays_of(good) | change), "odd")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "weights"}, "kind"),
        ({"kind": "tensors"}, "tensors with gram, sums"),
        ({"labels": ["red", "red"]}, "different ones"),
        ({"labels": []}, "1 to"),
        ({"labels": ["red", "\u001b[2J"]}, "cannot be shown"),
        ({"labels": ["red", 7]}, "labels"),
        ({"id": "../../x"}, "malformed"),
        ({"base": "A" * 64}, "malformed"),
        ({"generation": 0}, "malformed"),
        ({"generation": True}, "generation"),
        ({"more": 1}, "unknown key"),
        ({"privacy": {"clip": 1.0}}, "noise_multiplier"),
        ({"privacy": {"clip": 0.0, "noise_multiplier": 1.0}}, "above 0"),
        ({"privacy": {"clip": 1e999, "noise_multiplier": 1.0}}, "above 0"),
    ],
)
def test_sealed_file_of_an_odd_header_is_refused(good, change, said):
    with pytest.raises(IntegrityError, match=said):
        load_fleet_file(with_header(good, **change), "odd")


def test_missing_array_unsealed_change_and_no_npz_are_refused(good):
    arrays = arrays_of(good)
    for name in arrays:
        rest = {n: a for n, a in arrays.items() if n != name}
        with pytest.raises(IntegrityError, match=r"lacks|statistics with"):
            load_fleet_file(packed(rest, seal=name != "sha256"), "file")
    with pytest.raises(IntegrityError, match="changed or damaged"):
        load_fleet_file(packed(arrays | {"gram": arrays["gram"] * 2}, seal=False), "file")
    for data in (b"", b"PK\3\4", pickle.dumps([1]), good + b"\0" * (MAX_BYTES - len(good) + 1)):
        with pytest.raises(IntegrityError):
            load_fleet_file(data, "file")


def test_pickles_and_bombs_are_not_unpacked(good, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    trap = io.BytesIO()
    np.lib.format.write_array(trap, np.array([Trap()], object), allow_pickle=True)
    bomb = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        bomb, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)}
    )
    for name, inner in (("sums.npy", trap), ("gram.npy", bomb)):
        data = io.BytesIO(good)
        with zipfile.ZipFile(data, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(name, inner.getvalue())
        with pytest.raises(IntegrityError):
            load_fleet_file(data.getvalue(), "file")
    assert not (tmp_path / "sprung").exists()
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("gram.npy", b"\0" * (MAX_BYTES + 1))
    with pytest.raises(IntegrityError, match="when unpacked"):
        load_fleet_file(data.getvalue(), "file")


def test_damaged_device_id_is_told(colours, store):
    teach(colours, store, ("white", images("white", 12)))
    (store / DEVICE_NAME).write_text("not hexadecimal")
    with pytest.raises(IntegrityError, match="64 hexadecimal digits"):
        export_learned(colours, store)


# -- noise


def statistics_of(rows, classes, labels):
    """The definition, not the code: sums over samples."""
    rows = np.asarray(rows, np.float64).reshape(-1, 3)
    sums = np.zeros((len(labels), 3))
    for row, c in zip(rows, classes, strict=True):
        sums[c] += row
    counts = np.bincount(np.asarray(classes, np.int64), minlength=len(labels)).astype(float)
    return Statistics(labels=labels, gram=rows.T @ rows, sums=sums, counts=counts)


@pytest.mark.parametrize("clip", [0.3, 1.0, 7.0])
def test_one_sample_moves_the_release_by_at_most_the_root_of_three(clip):
    rng = np.random.default_rng(0)
    labels = ("a", "b")
    largest = 0.0
    for _ in range(300):
        count = int(rng.integers(0, 6))
        lengths = clip * rng.uniform(0, 1, count + 1) ** 0.2
        lengths[-1] = clip if rng.random() < 0.5 else lengths[-1]
        rows = rng.normal(size=(count + 1, 3))
        rows *= (lengths / np.linalg.norm(rows, axis=1))[:, None]
        classes = rng.integers(0, 2, count + 1)
        with_it = release_vector(statistics_of(rows, classes, labels), clip)
        without = release_vector(statistics_of(rows[:-1], classes[:-1], labels), clip)
        largest = max(largest, float(np.linalg.norm(with_it - without)))
    assert largest <= math.sqrt(3) * (1 + 1e-9)
    assert largest == pytest.approx(math.sqrt(3))  # a sample as long as the clip does move it so


def test_release_vector_is_turned_back():
    rng = np.random.default_rng(1)
    stats = statistics_of(rng.normal(size=(9, 3)), rng.integers(0, 2, 9), ("a", "b"))
    back = from_release_vector(release_vector(stats, 0.7), 0.7, 3, stats.labels)
    np.testing.assert_allclose(back.gram, stats.gram, rtol=1e-12)
    np.testing.assert_allclose(back.sums, stats.sums, rtol=1e-12)
    np.testing.assert_array_equal(back.counts, stats.counts)


def test_clipped_rows_are_no_longer_than_the_clip_and_keep_their_direction():
    rows = np.float32([[3, 4, 0], [0.3, 0.4, 0], [0, 0, 0]])
    clipped = clip_rows(rows, 2.5)
    np.testing.assert_allclose(clipped, [[1.5, 2, 0], [0.3, 0.4, 0], [0, 0, 0]], rtol=1e-6)
    many = clip_rows(np.random.default_rng(0).normal(size=(1000, 7)), 1.1)
    assert np.linalg.norm(many, axis=1).max() <= 1.1


def test_noise_has_the_promised_scale_in_every_part():
    stats = statistics_of(np.eye(3), [0, 1, 1], ("a", "b"))
    privacy = Privacy(clip=2.0, noise_multiplier=0.5)
    noisy = [perturb(stats, privacy, f"key number {i:09}".encode()) for i in range(3000)]
    deviation = 0.5 * math.sqrt(3)
    gram = np.std([n.gram - stats.gram for n in noisy], axis=0)
    expected = np.full((3, 3), deviation * 4 / math.sqrt(2))
    np.fill_diagonal(expected, deviation * 4)
    np.testing.assert_allclose(gram, expected, rtol=0.06)
    sums = np.std([n.sums - stats.sums for n in noisy], axis=0)
    np.testing.assert_allclose(sums, deviation * 2, rtol=0.06)
    counts = np.std([n.counts - stats.counts for n in noisy], axis=0)
    np.testing.assert_allclose(counts, deviation, rtol=0.06)
    assert all((n.gram == n.gram.T).all() for n in noisy[:10])


def test_noise_is_normal_and_only_the_key_tells_it():
    drawn = gaussians(b"a key of sixteen" * 2, 200_001)
    assert len(drawn) == 200_001
    assert abs(drawn.mean()) < 0.01
    # shares of a standard normal within 1, 2 and 3
    for limit, share in ((1, 0.682689), (2, 0.954500), (3, 0.997300)):
        assert np.mean(np.abs(drawn) < limit) == pytest.approx(share, abs=0.004)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01
    np.testing.assert_array_equal(drawn[:0], gaussians(b"a key of sixteen", 0))
    assert not np.isin(drawn[:100], gaussians(b"b key of sixteen" * 2, 200_001)).any()
    with pytest.raises(DataError, match="16 or more"):
        gaussians(b"short", 3)


def test_noisy_export_is_the_same_each_time_and_hides_unknown_labels(colours, store):
    teach(colours, store, ("white", images("white", 12)), ("black", images("black", 12)))
    options = {"noise_multiplier": 0.1, "clip": 2.0}
    first = export_learned(colours, store, **options, labels=["white"])
    again = export_learned(colours, store, **options, labels=["white"])
    assert dump_fleet_file(first.file) == dump_fleet_file(again.file)
    read = load_fleet_file(dump_fleet_file(first.file), "file")
    assert read.labels == ("white",)
    assert read.privacy == Privacy(clip=2.0, noise_multiplier=0.1)
    assert first.left_out == {"black": 10}
    assert 0 < abs(read.counts[0] - 10) < 1.5
    assert read.id == export_learned(colours, store).file.id
    # those that were not taught are sent too: that they were not would tell
    default = export_learned(colours, store, **options)
    assert default.file.labels == ("red", "green", "blue")
    assert default.left_out == {"white": 10, "black": 10}
    other = export_learned(colours, store, noise_multiplier=0.1, clip=2.5, labels=["white"])
    assert not np.isin(other.file.counts, first.file.counts).any()


def test_default_clip_comes_of_the_canary_and_samples_are_clipped_to_it(colours, store):
    white = images("white", 12)
    teach(colours, store, ("white", white))
    exported = export_learned(colours, store, noise_multiplier=1e-9, labels=["white"])
    canary = np.concatenate(
        [features_of(images(c, 60, seed=200)) for c in ("red", "green", "blue")]
    )
    clip = exported.file.privacy.clip
    assert clip == pytest.approx(np.quantile(np.linalg.norm(canary, axis=1), 0.9), rel=1e-3)
    assert exported.clipped == 1.0  # white is brighter than any of these
    # next to no noise: what is left are the clipped samples' sums
    assert np.trace(exported.file.statistics.gram) == pytest.approx(10 * clip**2, rel=1e-6)


def test_noise_settings_that_do_not_go_together_are_refused(colours, store):
    teach(colours, store, ("white", images("white", 12)))
    for options in ({"clip": 1.0}, {"labels": ["white"]}):
        with pytest.raises(ConfigError, match="go with noise"):
            export_learned(colours, store, **options)
    for options in ({"noise_multiplier": 0.0}, {"noise_multiplier": 1.0, "clip": -1.0}):
        with pytest.raises(ConfigError, match="above 0"):
            export_learned(colours, store, **options)
    with pytest.raises(ConfigError, match="min_count"):
        export_learned(colours, store, min_count=0)
