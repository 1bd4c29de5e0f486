"""Statistics are sums over samples: of any order, in any parts, added and taken away."""

import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.errors import ConfigError, DataError, IntegrityError
from edgetune.runtime.learn.statistics import (
    Prior,
    Statistics,
    add,
    compress,
    difference,
    dump,
    empty,
    expand,
    forget,
    load,
    merge,
    prior_arrays,
    prior_from_arrays,
    subtract,
    with_label,
    with_labels,
    within,
)

LABELS = ("ant", "bee", "cat")
WIDTH = 5


def samples(count=40, seed=0, width=WIDTH, classes=3):
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(count, width)) @ draw.normal(size=(width, width)) + 2
    return features.astype(np.float32), draw.integers(classes, size=count)


def direct(features, classes, weights=None, labels=LABELS):
    """The definition, sample by sample, in extended precision."""
    width = features.shape[1]
    weights = np.ones(len(features)) if weights is None else weights
    gram = np.zeros((width, width), np.longdouble)
    sums = np.zeros((len(labels), width), np.longdouble)
    counts = np.zeros(len(labels))
    for row, c, weight in zip(features.astype(np.longdouble), classes, weights, strict=True):
        gram += weight * np.outer(row, row)
        sums[c] += weight * row
        counts[c] += weight
    return Statistics(
        labels=labels, gram=gram.astype(float), sums=sums.astype(float), counts=counts
    )


def assert_same(found, expected, error=1e-9):
    assert found.labels == expected.labels
    scale = max(np.abs(expected.gram).max(), 1)
    np.testing.assert_allclose(found.gram, expected.gram, rtol=0, atol=error * scale)
    np.testing.assert_allclose(found.sums, expected.sums, rtol=0, atol=error * scale)
    np.testing.assert_allclose(found.counts, expected.counts, rtol=1e-12, atol=0)


def test_statistics_of_three_samples_are_those_computed_by_hand():
    stats = add(
        empty(2, ("a", "b")),
        np.float32([[1, 2], [3, 4], [0, 5]]),
        np.array([0, 0, 1]),
        np.array([1.0, 2.0, 0.5]),
    )
    # 1*[1 2;2 4] + 2*[9 12;12 16] + 0.5*[0 0;0 25]
    np.testing.assert_allclose(stats.gram, [[19, 26], [26, 48.5]], rtol=1e-15)
    np.testing.assert_array_equal(stats.sums, [[7, 10], [0, 2.5]])
    np.testing.assert_array_equal(stats.counts, [3, 0.5])
    assert stats.samples == 3.5
    assert stats.width == 2
    np.testing.assert_allclose(stats.means, [[7 / 3, 10 / 3], [0, 5]])


def test_scatter_within_classes_is_the_one_about_the_class_means():
    features, classes = samples()
    expected = sum(
        np.cov(features[classes == c].T.astype(float), bias=True) * (classes == c).sum()
        for c in range(3)
    )
    found = within(add(empty(WIDTH, LABELS), features, classes))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.uint8])
def test_features_of_any_real_type_are_summed_in_float64(kind):
    features, classes = samples(3000)
    features = np.abs(features).astype(kind)
    assert_same(add(empty(WIDTH, LABELS), features, classes), direct(features, classes), 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_order_any_parts_and_any_merging_give_the_sums_of_all(data):
    count = data.draw(st.integers(0, 30))
    features, classes = samples(count, seed=data.draw(st.integers(0, 99)))
    weights = np.random.default_rng(count).uniform(0, 3, count)
    order = np.array(data.draw(st.permutations(range(count))), int)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    expected = direct(features, classes, weights)

    parts = np.split(order, cuts)
    stats = empty(WIDTH, LABELS)
    for part in parts:
        stats = add(stats, features[part], classes[part], weights[part])
    assert_same(stats, expected)

    blank = empty(WIDTH, LABELS)
    devices = [add(blank, features[part], classes[part], weights[part]) for part in parts]
    merged = blank
    for place in data.draw(st.permutations(range(len(devices)))):
        merged = merge(merged, devices[place])
    assert_same(merged, expected)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_subtracted_samples_leave_the_sums_of_the_others(data):
    features, classes = samples(25, seed=data.draw(st.integers(0, 99)))
    weights = np.random.default_rng(1).uniform(0.1, 3, 25)
    gone = np.array(data.draw(st.lists(st.booleans(), min_size=25, max_size=25)))
    stats = add(empty(WIDTH, LABELS), features, classes, weights)
    left = subtract(stats, features[gone], classes[gone], weights[gone])
    assert_same(left, direct(features[~gone], classes[~gone], weights[~gone]))


def test_subtracting_all_leaves_nothing_not_even_rounding():
    features, classes = samples(300)
    weights = np.random.default_rng(3).uniform(0.01, 1, 300) ** 4 * 1e5
    stats = add(empty(WIDTH, LABELS), features, classes, weights)
    for row in np.random.default_rng(4).permutation(300):
        one = slice(row, row + 1)
        stats = subtract(stats, features[one], classes[one], weights[one])
    for array in (stats.gram, stats.sums, stats.counts):
        np.testing.assert_array_equal(array, np.zeros_like(array))


def test_weight_two_is_a_sample_given_twice_and_weight_zero_none():
    features, classes = samples(3)
    weighted = add(empty(WIDTH, LABELS), features, classes, np.array([2, 0, 1]))
    repeated = add(empty(WIDTH, LABELS), features[[0, 0, 2]], classes[[0, 0, 2]])
    assert_same(weighted, repeated, 1e-12)


def test_merging_puts_new_labels_last_and_adds_the_same_ones():
    a = add(empty(1, ("x", "y")), np.array([[1.0], [2.0]]), np.array([0, 1]))
    b = add(empty(1, ("z", "y", "w")), np.array([[5.0], [7.0]]), np.array([0, 1]))
    merged = merge(a, b)
    assert merged.labels == ("x", "y", "z", "w")
    np.testing.assert_array_equal(merged.sums, [[1], [9], [5], [0]])
    np.testing.assert_array_equal(merged.counts, [1, 2, 1, 0])
    np.testing.assert_array_equal(merged.gram, [[1 + 4 + 25 + 49]])


def test_a_merge_is_undone_by_the_difference():
    features, classes = samples(30)
    a = add(empty(WIDTH, LABELS[:2]), features[:20], classes[:20] % 2)
    b = add(empty(WIDTH, ("cat", "ant")), features[20:], classes[20:] % 2)
    undone = difference(merge(a, b), b)
    assert undone.labels == ("ant", "bee", "cat")
    assert_same(with_labels(undone, a.labels), a)


def test_a_difference_refuses_more_samples_than_there_are():
    few = add(empty(1, ("x",)), np.array([[1.0]]), np.array([0]))
    many = add(few, np.array([[1.0]]), np.array([0]))
    with pytest.raises(DataError, match="2 samples of 'x' to subtract, and there are 1"):
        difference(few, many)
    other = add(empty(1, ("y",)), np.array([[1.0]]), np.array([0]))
    with pytest.raises(DataError, match="1 samples of 'y' to subtract, and there are 0"):
        difference(few, other)
    with pytest.raises(DataError, match="'x'"):
        subtract(empty(1, ("x",)), np.array([[1.0]]), np.array([0]))


def test_a_difference_ignores_classes_without_samples_that_it_lacks():
    few = add(empty(1, ("x",)), np.array([[1.0]]), np.array([0]))
    assert_same(difference(few, empty(1, ("y",))), few)


def test_labels_are_brought_to_another_order_with_their_sums():
    features, classes = samples()
    stats = add(empty(WIDTH, LABELS), features, classes)
    moved = with_labels(stats, ("cat", "dog", "ant", "bee"))
    np.testing.assert_array_equal(
        moved.sums, [stats.sums[2], [0] * 5, stats.sums[0], stats.sums[1]]
    )
    np.testing.assert_array_equal(moved.counts, [stats.counts[2], 0, *stats.counts[:2]])
    np.testing.assert_array_equal(moved.gram, stats.gram)
    assert_same(with_labels(moved, LABELS), stats, 0)


def test_a_class_with_samples_is_not_lost_by_relabelling():
    stats = add(empty(1, LABELS), np.array([[1.0]]), np.array([1]))
    with pytest.raises(DataError, match="samples of 'bee'"):
        with_labels(stats, ("ant", "cat"))
    assert with_labels(stats, ("bee",)).labels == ("bee",)


def test_a_label_names_one_class():
    with pytest.raises(DataError, match="there already"):
        with_label(empty(2, LABELS), "bee")
    with pytest.raises(DataError, match="same label twice"):
        empty(2, ("a", "a"))
    assert with_label(empty(2, LABELS), "dog").labels == (*LABELS, "dog")


def test_forgetting_a_class_by_its_own_gram_matrix_is_exact():
    features, classes = samples()
    stats = add(empty(WIDTH, LABELS), features, classes)
    mine = classes == 1
    own = features[mine].astype(float).T @ features[mine].astype(float)
    expected = direct(features[~mine], classes[~mine] // 2, labels=("ant", "cat"))
    assert_same(forget(stats, "bee", own), expected)


def test_forgetting_a_class_without_its_gram_matrix_keeps_the_covariance_within_classes():
    features, classes = samples()
    stats = add(empty(WIDTH, LABELS), features, classes)
    left = forget(stats, "bee")
    assert left.labels == ("ant", "cat")
    np.testing.assert_array_equal(left.sums, stats.sums[[0, 2]])
    np.testing.assert_array_equal(left.counts, stats.counts[[0, 2]])
    before, after = within(stats) / stats.samples, within(left) / left.samples
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-9)


def test_forgetting_without_the_gram_matrix_is_exact_where_classes_scatter_alike():
    offsets = np.random.default_rng(0).normal(size=(6, 3))
    offsets -= offsets.mean(axis=0)
    means = np.array([[0, 0, 0], [5, 1, 2], [-3, 4, 9]])
    features = np.concatenate([mean + offsets for mean in means])
    classes = np.repeat([0, 1, 2], 6)
    stats = add(empty(3, LABELS), features, classes)
    expected = direct(features[classes != 0], classes[classes != 0] - 1, labels=("bee", "cat"))
    assert_same(forget(stats, "ant"), expected)


def test_forgetting_the_last_samples_leaves_nothing():
    stats = add(
        empty(2, ("a", "b")), np.random.default_rng(0).normal(size=(4, 2)), np.zeros(4, int)
    )
    left = forget(forget(stats, "a"), "b")
    assert left.labels == ()
    np.testing.assert_array_equal(left.gram, np.zeros((2, 2)))
    np.testing.assert_array_equal(forget(stats, "b").gram, stats.gram)


def test_forgetting_what_is_not_there_is_refused():
    with pytest.raises(DataError, match="no class 'dog' to forget; expected one of 'ant'"):
        forget(empty(2, LABELS), "dog")
    with pytest.raises(DataError, match="shape"):
        forget(empty(2, LABELS), "ant", np.zeros((3, 3)))
    with pytest.raises(DataError, match="finite"):
        forget(empty(2, LABELS), "ant", np.full((2, 2), np.nan))


def test_no_function_changes_its_arguments():
    features, classes = samples()
    weights = np.ones(len(features))
    stats = add(empty(WIDTH, LABELS), features, classes)
    given_arrays = (features, classes, weights, stats.gram, stats.sums, stats.counts)
    copies = [array.copy() for array in given_arrays]
    for array in given_arrays:
        array.flags.writeable = False
    add(stats, features, classes, weights)
    subtract(stats, features[:5], classes[:5], weights[:5])
    merge(stats, stats)
    difference(stats, stats)
    forget(stats, "bee")
    with_label(stats, "dog")
    expand(compress(stats, 10_000))
    load(dump(stats), "here")
    for array, copy in zip(given_arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize(
    ("features", "classes", "weights", "said"),
    [
        (np.zeros((2, 4)), np.zeros(2, int), None, r"shape \(samples, 5\)"),
        (np.zeros(5), np.zeros(1, int), None, r"shape \(samples, 5\)"),
        (np.zeros((2, 5), bool), np.zeros(2, int), None, "real numbers"),
        (np.zeros((2, 5), complex), np.zeros(2, int), None, "real numbers"),
        (np.zeros((2, 5), object), np.zeros(2, int), None, "real numbers"),
        (np.array([[0.0] * 5, [np.nan] * 5]), np.zeros(2, int), None, "sample 1"),
        (np.full((1, 5), -np.inf), np.zeros(1, int), None, "sample 0"),
        (np.full((1, 5), 1e200), np.zeros(1, int), None, "finite float32"),
        (np.zeros((2, 5)), np.zeros(3, int), None, r"integers of shape \(2,\)"),
        (np.zeros((2, 5)), np.zeros(2), None, "integers"),
        (np.zeros((2, 5)), np.zeros(2, bool), None, "integers"),
        (np.zeros((2, 5)), np.array([0, 3]), None, "3 is no class"),
        (np.zeros((2, 5)), np.array([-1, 0]), None, "-1 is no class"),
        (np.zeros((2, 5)), np.zeros(2, int), np.ones(3), r"weights: .*shape \(2,\)"),
        (np.zeros((2, 5)), np.zeros(2, int), np.array([1, -0.5]), "-0.5; expected finite"),
        (np.zeros((2, 5)), np.zeros(2, int), np.array([1, np.nan]), "nan; expected finite"),
        (np.zeros((2, 5)), np.zeros(2, int), np.array(["1", "2"]), "real numbers"),
    ],
)
@pytest.mark.parametrize("function", [add, subtract])
def test_samples_that_are_none_are_refused(function, features, classes, weights, said):
    with pytest.raises(DataError, match=said):
        function(empty(WIDTH, LABELS), features, classes, weights)


def test_no_samples_change_nothing():
    stats = add(empty(WIDTH, LABELS), *samples())
    assert_same(add(stats, np.zeros((0, WIDTH), np.float32), np.array([])), stats, 0)


def test_statistics_of_other_features_are_not_merged():
    for function in (merge, difference):
        with pytest.raises(DataError, match="of 2 and of 3 features"):
            function(empty(2), empty(3))
    with pytest.raises(DataError, match="0 features"):
        empty(0)


def test_statistics_survive_a_file_to_the_bit():
    labels = ("plain", "", "ends with zero\0", "Größe 🐝", 'quote"\n', "\ud800")
    features, classes = samples(60, classes=6)
    stats = add(empty(WIDTH, labels), features, classes)
    read = load(dump(stats), "here")
    assert read.labels == labels
    for name in ("gram", "sums", "counts"):
        np.testing.assert_array_equal(getattr(read, name), getattr(stats, name))
    none = load(dump(empty(3)), "here")
    assert none.labels == ()
    assert none.width == 3


def test_the_same_statistics_are_the_same_bytes():
    stats = add(empty(WIDTH, LABELS), *samples())
    turned = replace(stats, gram=np.asfortranarray(stats.gram), sums=np.asfortranarray(stats.sums))
    assert dump(turned) == dump(stats)
    with zipfile.ZipFile(io.BytesIO(dump(stats))) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_gram_matrix_takes_half_its_numbers():
    data = dump(empty(100))
    assert 100 * 101 / 2 * 8 < len(data) < 100 * 101 / 2 * 8 + 2500


def arrays_of(data):
    with np.load(io.BytesIO(data)) as stored:
        return dict(stored)


def npz(arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def text(value):
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


HOSTILE = {
    "another version": ({"version": np.int64(2)}, "version 2; this edgetune reads 1"),
    "version of strings": ({"version": np.array(["1"])}, "version"),
    "huge version": ({"version": np.float64(1e300)}, "version"),
    "labels no JSON": ({"labels": np.frombuffer(b"[", np.uint8)}, "no statistics"),
    "labels no UTF-8": ({"labels": np.frombuffer(b'["\xff"]', np.uint8)}, "no statistics"),
    "labels no array": ({"labels": text({"a": 1})}, "array of strings"),
    "labels no strings": ({"labels": text([1, 2, 3])}, "array of strings"),
    "labels twice": ({"labels": text(["a", "a", "b"])}, "twice"),
    "labels nested": ({"labels": np.frombuffer(b"[" * 100_000, np.uint8)}, "no statistics"),
    "a label less": ({"labels": text(["a", "b"])}, "no statistics"),
    "strings": ({"labels": np.array(LABELS)}, "labels"),
    "infinite gram": ({"gram": np.full(15, np.inf)}, "not finite"),
    "negative squares": ({"gram": np.full(15, -1.0)}, "below 0"),
    "square gram": ({"gram": np.zeros((5, 5))}, "gram of shape"),
    "short gram": ({"gram": np.zeros(14)}, "gram of shape"),
    "single gram": ({"gram": np.zeros(15, np.float32)}, "float32"),
    "swapped gram": ({"gram": np.zeros(15, ">f8")}, "gram"),
    "no number in the sums": ({"sums": np.full((3, 5), np.nan)}, "not finite"),
    "flat sums": ({"sums": np.zeros(15)}, "sums of shape"),
    "sums of no width": ({"sums": np.zeros((3, 0)), "gram": np.zeros(0)}, "sums of shape"),
    "width of nothing": ({"sums": np.zeros((0, 2**40))}, "sums of shape"),
    "sum without samples": ({"counts": np.array([0.0, 1, 1])}, "without samples"),
    "negative count": ({"counts": np.array([-1.0, 1, 1])}, "expected 0 to"),
    "count without end": ({"counts": np.array([1e300, 1, 1])}, "expected 0 to"),
    "no number of samples": ({"counts": np.array([np.nan, 1, 1])}, "not finite"),
    "a pickle": ({"counts": np.array([object()] * 3)}, "no statistics"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name):
    changed, said = HOSTILE[name]
    arrays = arrays_of(dump(add(empty(WIDTH, LABELS), *samples())))
    with pytest.raises(IntegrityError, match=said) as caught:
        load(npz(arrays | changed), "learn/state.npz")
    assert str(caught.value).startswith("learn/state.npz: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["version", "labels", "gram", "sums", "counts"])
def test_a_file_that_lacks_an_array_is_refused(name):
    arrays = arrays_of(dump(empty(2, LABELS)))
    del arrays[name]
    with pytest.raises(IntegrityError, match=f"lacks '{name}'"):
        load(npz(arrays), "here")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_damaged_file_is_refused_or_read_never_worse(place, value, cut):
    data = bytearray(dump(add(empty(2, ("a",)), np.ones((1, 2)), np.array([0]))))
    place %= len(data)
    data[place] = value
    try:
        read = load(bytes(data[:place]) if cut else bytes(data), "here")
    except IntegrityError:
        return
    assert np.isfinite(read.gram).all()
    assert (read.counts >= 0).all()


def wide(count=400, width=32, seed=0):
    """Samples whose scatter within classes has a few strong directions, as features have."""
    draw = np.random.default_rng(seed)
    classes = draw.integers(3, size=count)
    strong = draw.normal(size=(count, 4)) @ draw.normal(size=(4, width)) * 3
    weak = draw.normal(size=(count, width)) * draw.uniform(0.1, 0.5, width)
    means = draw.normal(size=(3, width)) * 2
    return (means[classes] + strong + weak).astype(np.float32), classes


def bytes_of(prior):
    return sum(array.nbytes for array in prior_arrays(prior).values())


def test_a_prior_keeps_counts_means_and_variances():
    features, classes = wide()
    stats = add(empty(32, LABELS), features, classes)
    read = expand(compress(stats, 1200))
    assert read.labels == LABELS
    np.testing.assert_array_equal(read.counts, np.bincount(classes))
    for c in range(3):
        mean = features[classes == c].astype(float).mean(axis=0)
        np.testing.assert_allclose(read.means[c], mean, rtol=1e-6)
    np.testing.assert_allclose(np.diag(within(read)), np.diag(within(stats)), rtol=1e-6)
    np.testing.assert_array_equal(read.gram, read.gram.T)


@pytest.mark.parametrize("most", [700, 1000, 1500, 3000, 10_000])
def test_a_prior_fits_and_one_row_more_would_not(most):
    prior = compress(add(empty(32, LABELS), *wide()), most)
    rank, width = prior.factor.shape
    assert bytes_of(prior) <= most
    if rank < width:
        assert prior.factor.dtype == np.float16
        assert bytes_of(prior) + 2 * width > most
    else:
        assert rank == width


def test_a_prior_of_any_size_is_positive_semidefinite():
    stats = add(empty(32, LABELS), *wide())
    for most in range(700, 3000, 100):
        scatter = within(expand(compress(stats, most)))
        assert np.linalg.eigvalsh(scatter).min() > -1e-9 * np.trace(scatter)


def test_a_prior_with_room_for_all_is_as_exact_as_float32():
    stats = add(empty(32, LABELS), *wide())
    read = expand(compress(stats, 10_000))
    np.testing.assert_allclose(read.gram, stats.gram, rtol=0, atol=1e-6 * stats.gram.max())


def test_a_smaller_prior_errs_by_the_eigenvectors_that_it_lacks():
    stats = add(empty(32, LABELS), *wide())
    prior = compress(stats, 1100)
    rank = len(prior.factor)
    assert 4 < rank < 16
    scatter = within(stats)
    values, vectors = np.linalg.eigh(scatter)
    kept = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    np.fill_diagonal(kept, np.diag(scatter))
    # float16 has 11 bits: an entry of a product of rows no longer than a deviation
    spread = np.sqrt(np.outer(np.diag(scatter), np.diag(scatter)))
    assert (np.abs(within(expand(prior)) - kept) < 2e-3 * spread).all()
    assert np.linalg.norm(kept - scatter) < 0.05 * np.linalg.norm(scatter)


def test_a_dead_feature_and_an_unseen_class_are_no_trouble_to_a_prior():
    features, classes = wide()
    features[:, 7] = 0
    stats = add(empty(32, (*LABELS, "dog")), features, classes)
    read = expand(compress(stats, 2000))
    assert read.counts[3] == 0
    assert not read.gram[7].any()
    assert not expand(compress(empty(4, LABELS), 1000)).gram.any()


def test_a_prior_too_large_without_any_covariance_is_refused():
    # 32 x 3 means and 32 deviations of 4 bytes, 3 counts of 8, and ["ant", "bee", "cat"]
    least = 32 * 3 * 4 + 32 * 4 + 3 * 8 + 21
    stats = add(empty(32, LABELS), *wide())
    assert compress(stats, least).factor.shape == (0, 32)
    with pytest.raises(ConfigError, match=f"takes {least} bytes .* allowed {least - 1}"):
        compress(stats, least - 1)


def test_device_samples_are_added_to_a_prior_and_unlearned():
    stats = add(empty(32, LABELS), *wide())
    prior = expand(compress(stats, 1200))
    features, classes = wide(20, seed=5)
    assert_same(subtract(add(prior, features, classes), features, classes), prior)


@pytest.mark.parametrize("most", [1200, 10_000])
def test_a_prior_survives_a_file_beside_other_arrays(most):
    prior = compress(add(empty(32, LABELS), *wide()), most)
    read = prior_from_arrays(arrays_of(npz(prior_arrays(prior) | {"other": np.ones(3)})), "here")
    assert read.labels == prior.labels
    for name in ("counts", "means", "deviations", "factor"):
        np.testing.assert_array_equal(getattr(read, name), getattr(prior, name))
        assert getattr(read, name).dtype == getattr(prior, name).dtype


HOSTILE_PRIORS = {
    "prior_labels": text(["a"]),
    "prior_counts": np.array([-1.0, 0, 0]),
    "prior_means": np.full((3, 32), np.inf, np.float32),
    "prior_deviations": np.full(32, -1, np.float32),
    "prior_factor": np.full((2, 32), np.nan, np.float16),
}
WRONG_PRIORS = {
    "prior_labels": text("abc"),
    "prior_counts": np.zeros(3, np.float32),
    "prior_means": np.zeros((3, 31), np.float32),
    "prior_deviations": np.zeros(32),
    "prior_factor": np.zeros((2, 32)),
}


@pytest.mark.parametrize("name", HOSTILE_PRIORS)
def test_a_hostile_prior_is_refused(name):
    arrays = prior_arrays(compress(add(empty(32, LABELS), *wide()), 1200))
    for changed in (HOSTILE_PRIORS, WRONG_PRIORS):
        with pytest.raises(IntegrityError, match="here: no prior: "):
            prior_from_arrays(arrays | {name: changed[name]}, "here")
    with pytest.raises(IntegrityError, match=f"lacks '{name}'"):
        prior_from_arrays({n: a for n, a in arrays.items() if n != name}, "here")


def test_a_prior_whose_factor_is_too_long_still_expands_to_what_can_be():
    prior = Prior(
        labels=("a",),
        counts=np.array([10.0]),
        means=np.zeros((1, 2), np.float32),
        deviations=np.float32([1, 2]),
        factor=np.float16([[60000, 60000]]),
    )
    np.testing.assert_allclose(expand(prior).gram, [[10, 20], [20, 40]], rtol=1e-12)
