import weakref
from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from edgetune.errors import DataError
from edgetune.quantize.calibrate import (
    BINS,
    Histogram,
    Range,
    calibrate,
    entropy_range,
    error_range,
    percentile_range,
    run_tensors,
)

TWO_PASSES = ["percentile", "entropy", "mse"]
METHODS = ["minmax", *TWO_PASSES]


class Feeds:
    """Feeds that are made when asked for; counts how many are alive at once."""

    def __init__(self, count: int) -> None:
        self.count, self.passes, self.most_alive = count, 0, 0
        self.alive: list[weakref.ref] = []

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        self.passes += 1
        rng = np.random.default_rng(0)
        for _ in range(self.count):
            array = rng.normal(size=(1, 1000)).astype(np.float32)
            self.alive = [ref for ref in self.alive if ref() is not None]
            self.alive.append(weakref.ref(array))
            self.most_alive = max(self.most_alive, len(self.alive))
            yield {"x": array}
            del array


@pytest.fixture
def model(build) -> onnx.ModelProto:
    """y = max(0, 2 x - 1), with 2 x - 1 inside."""
    rows = [("Mul", "x two -> twice"), ("Sub", "twice one -> less"), ("Relu", "less -> y")]
    constants = {"two": np.float32(2), "one": np.float32(1)}
    return build(rows, constants, {"x": ["batch", "values"]}, ["y"])


def feeds_of(*samples: object) -> list[dict[str, np.ndarray]]:
    return [{"x": np.atleast_2d(np.float32(sample))} for sample in samples]


def histogram_of(values: np.ndarray) -> Histogram:
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, bins=BINS, range=(low, high))
    return Histogram(low=low, high=high, counts=counts)


def squared_error(values: np.ndarray, low: float, high: float) -> float:
    """Of 256 levels over a range, by quantizing every value."""
    step = (high - low) / 255
    levels = np.clip(np.rint((values - low) / step), 0, 255)
    return float(((low + levels * step - values) ** 2).mean())


def test_minmax_is_the_extremes_over_all_feeds(model: onnx.ModelProto):
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=(2, n)).astype(np.float32) for n in (3, 50, 7)]
    ranges = calibrate(model, feeds_of(*samples), ["x", "less", "y"])
    x = np.concatenate([s.ravel() for s in samples])
    for name, values in (("x", x), ("less", 2 * x - 1), ("y", np.maximum(2 * x - 1, 0))):
        assert ranges[name] == Range(low=float(values.min()), high=float(values.max())), name
    assert ranges["y"].low == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("low", "high"), [(3, 4), (-9, -8), (5, 5), (0, 0)])
def test_zero_is_inside_every_range(model: onnx.ModelProto, method: str, low: float, high: float):
    sample = np.linspace(low, high, 10_001)
    found = calibrate(model, feeds_of(sample), ["x"], method=method)["x"]
    assert found.low <= 0 <= found.high
    # and the side without values has nothing else
    assert found.low == 0 or high < 0
    assert found.high == 0 or low > 0


def test_percentile_leaves_the_outermost_values_out(model: onnx.ModelProto):
    # 100,000 values, of which 5 at each end may go: 4 of 1000 and 5 of -500 do
    middle = np.linspace(-1, 1, 99_991)
    sample = np.concatenate([middle, [1000] * 4, [-500] * 5])
    found = calibrate(model, feeds_of(*np.split(sample, 10)), ["x"], method="percentile")["x"]
    bin_width = 1500 / BINS
    assert -1 - bin_width <= found.low <= -1
    assert 1 <= found.high <= 1 + bin_width
    # one value more is more than 0.005 %
    found = calibrate(model, feeds_of([*sample, 1000, 1000]), ["x"], method="percentile")["x"]
    assert found.high == 1000


def test_percentile_of_a_uniform_distribution_is_its_quantile():
    values = np.linspace(-1, 1, 2_000_001)
    found = percentile_range(histogram_of(values))
    assert found.low == pytest.approx(np.quantile(values, 0.00005), abs=2 / BINS)
    assert found.high == pytest.approx(np.quantile(values, 0.99995), abs=2 / BINS)


@pytest.mark.parametrize("choose", [entropy_range, error_range])
def test_a_far_outlier_is_cut_and_a_uniform_distribution_is_not(choose):
    rng = np.random.default_rng(0)
    uniform = rng.uniform(-1, 1, 100_000)
    found = choose(histogram_of(uniform))
    assert found.low < -0.97
    assert found.high > 0.97
    normal = rng.normal(0, 1, 100_000)
    found = choose(histogram_of(np.append(normal, [20, -20])))
    assert 3 < found.high < 19
    assert found.low == pytest.approx(-found.high)
    found = choose(histogram_of(np.append(np.maximum(normal, 0), 20)))  # after ReLU
    assert 3 < found.high < 19
    assert found.low == 0


def test_mse_has_the_error_of_the_best_of_all_shrunken_ranges():
    rng = np.random.default_rng(0)
    for values in (
        rng.laplace(0, 1, 100_000),
        np.append(rng.normal(0, 1, 100_000), [12, -12]),
        np.maximum(rng.normal(0, 1, 100_000), 0) ** 3,
    ):
        low, high = float(values.min()), float(values.max())
        found = error_range(histogram_of(values))
        brute = min(squared_error(values, s * low, s * high) for s in np.linspace(0.25, 1, 301))
        assert squared_error(values, found.low, found.high) < 1.02 * brute
        assert brute < squared_error(values, low, high)


def test_mse_of_a_laplace_distribution_is_near_the_published_optimum():
    # Banner et al. 2019 (arXiv:1810.05723), table of optimal clipping values: 9.89 b at 8 bits
    steps = (np.arange(1_000_000) + 0.5) / 1_000_000
    half = -np.log(1 - steps)  # quantiles of |x|
    values = np.concatenate([-half, half, [-14.5, 14.5]])
    found = error_range(histogram_of(values))
    assert found.high == pytest.approx(9.89, abs=0.3)
    assert found.low == pytest.approx(-9.89, abs=0.3)


@pytest.mark.parametrize(("method", "passes"), [("minmax", 1), *((m, 2) for m in TWO_PASSES)])
def test_feeds_are_in_memory_one_at_a_time(model: onnx.ModelProto, method: str, passes: int):
    feeds = Feeds(20)
    ranges = calibrate(model, feeds, ["x", "y"], method=method)
    assert feeds.passes == passes
    assert feeds.most_alive <= 2  # the one that is being made, and the one before
    everything = np.concatenate([feed["x"] for feed in Feeds(20)])
    assert ranges["x"].high <= everything.max()
    assert ranges["x"].high > 0.5 * everything.max()


@pytest.mark.parametrize("method", TWO_PASSES)
def test_feeds_that_cannot_be_gone_through_twice_are_refused(model: onnx.ModelProto, method: str):
    feeds = (feed for feed in feeds_of([1, 2], [3, 4], [5, 6]))
    with pytest.raises(DataError, match="3 samples the first time and 0 the second"):
        calibrate(model, feeds, ["x"], method=method)


def test_minmax_goes_through_the_feeds_once(model: onnx.ModelProto):
    feeds = (feed for feed in feeds_of([1, 2], [-3, 4]))
    assert calibrate(model, feeds, ["x"]) == {"x": Range(low=-3, high=4)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(model: onnx.ModelProto, method: str, bad: float):
    with pytest.raises(DataError, match="tensor 'less' is not finite"):
        calibrate(model, feeds_of([1, 2], [1, bad]), ["less"], method=method)


@pytest.mark.parametrize("method", METHODS)
def test_no_feeds_are_refused(model: onnx.ModelProto, method: str):
    with pytest.raises(DataError, match="expected at least one sample, got none"):
        calibrate(model, [], ["x"], method=method)


def test_no_tensors_need_no_feeds(model: onnx.ModelProto):
    assert calibrate(model, [], []) == {}


def test_any_tensor_can_be_looked_at_and_the_graph_stays(model: onnx.ModelProto):
    before = model.SerializeToString(deterministic=True)
    (values,) = run_tensors(model, feeds_of([1, -1]), ["twice", "x", "y"])
    assert list(values) == ["twice", "x", "y"]
    np.testing.assert_array_equal(values["twice"], [[2, -2]])
    np.testing.assert_array_equal(values["x"], [[1, -1]])
    np.testing.assert_array_equal(values["y"], [[1, 0]])
    assert model.SerializeToString(deterministic=True) == before
