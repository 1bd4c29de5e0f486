"""A linear head in closed form from statistics: ridge regression on one-hot targets.

No steps, no learning rate: the same statistics give the same head, whatever order the samples
came in. What is left to choose is one number, the ridge, and the scale of the logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, DataError
from edgetune.runtime.learn.statistics import Statistics, checked_samples, within

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]

# bias of a class without samples: below every score, and finite in float32 at every temperature
NEVER = -1e30
# scores are about 0 and 1; that of a head whose temperature was fitted to no sample
DEFAULT_TEMPERATURE = 0.1
TEMPERATURES = (1e-3, 1e3)
# ridge over the mean variance of a feature within classes; more forgets how features vary together
RATIOS = (1e-6, 10.0)
# what `choose` tries, in units of the ridge that the statistics alone give
FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)
# each step of a golden section keeps 0.618 of the bracket: 1e-9 of it is left after 43
STEPS = 43
TOO_LARGE = "statistics too large to solve for a head; expected sums over features"


@dataclass(frozen=True, kw_only=True)
class Head:
    """logits = (features @ weights + bias) / temperature.

    weights: float32, (d, classes). bias: float32, (classes,). temperature: more than 0, as in
    Guo et al. 2017 (arXiv:1706.04599).
    """

    labels: tuple[str, ...]
    weights: Float32Array
    bias: Float32Array
    temperature: float

    def logits(self, features: npt.NDArray[Any]) -> Float32Array:
        """Return float32 logits, (n, classes).

        Args:
            features: (n, d), any real type.

        Raises:
            DataError: they are of another shape.
        """
        return self.scores(features) / np.float32(self.temperature)

    def scores(self, features: npt.NDArray[Any]) -> Float32Array:
        """Return logits before the temperature, float32, (n, classes)."""
        if features.ndim != 2 or features.shape[1] != len(self.weights):
            raise DataError(
                f"features: expected shape (samples, {len(self.weights)}), got {features.shape}"
            )
        scores: Float32Array = features.astype(np.float32) @ self.weights + self.bias
        return scores


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """(T + ridge I) W = K, b = a - W^T m, of the classes that have samples.

    total: T, (d, d). between: K, (d, seen). mean: m, (d,). shares: a, (seen,). seen: (classes,).
    """

    total: FloatArray
    between: FloatArray
    mean: FloatArray
    shares: FloatArray
    seen: npt.NDArray[np.bool_]


def solve(stats: Statistics, *, ridge: float, balance: float = 1.0) -> Head:
    """Return the head of `coefficients`, at `DEFAULT_TEMPERATURE`.

    A class without samples gets weights 0 and the bias `NEVER`, so that it is not predicted.

    Args:
        stats: of 1 sample or more.
        ridge: more than 0, in squared units of the features.
        balance: 0, as seen, to 1, every class the same.

    Raises:
        ConfigError: a ridge or a balance out of range.
        DataError: no samples, or statistics that give no finite head.
    """
    return _head(stats.labels, *coefficients(stats, ridge=ridge, balance=balance))


def coefficients(
    stats: Statistics, *, ridge: float, balance: float = 1.0
) -> tuple[FloatArray, FloatArray]:
    """Return the weights W, (d, classes), and the bias b, (classes,), of ridge regression.

    With class counts n_c, means mu_c and the scatter S within all classes, class shares
    a_c ~ n_c^(1 - balance), m = sum a_c mu_c and

        T = S / n + sum_c a_c (mu_c - m)(mu_c - m)^T,    K_c = a_c (mu_c - m),
        W = (T + ridge I)^-1 K,                          b = a - W^T m.

    Balance 0 is least squares on one-hot targets with an intercept that isn't penalised and the
    penalty n ridge |W|^2. Balance 1 is the same with classes that weigh the same however many
    samples each has, except that the covariance within classes is that of all samples together:
    a rare class has too few to know its own.

    Takes O(d^3). Where subtraction and rounding left T with a negative eigenvalue below -ridge,
    it is replaced by the nearest matrix without any.

    Args, Raises: as `solve`. A class without samples has W 0 and b `NEVER`.
    """
    if not (ridge > 0 and math.isfinite(ridge)):
        raise ConfigError(f"ridge = {ridge}; expected a finite number above 0")
    return _solution(_problem(stats, balance, ridge), ridge)


def choose(
    stats: Statistics,
    holdout_features: npt.NDArray[Any],
    holdout_classes: npt.NDArray[Any],
    *,
    balance: float = 1.0,
) -> tuple[Head, float]:
    """Return the best head of five ridges, and its ridge.

    Tried are 0.01, 0.1, 1, 10 and 100 times `regularisation(stats)`. The best has the highest
    balanced accuracy (mean recall of the classes in the holdout). All that are less than one
    average sample (1 / samples) behind it count as good, and the one nearest to factor 1 is
    taken; of two as near, the better, then the larger. Its temperature is fitted to the holdout.

    Args:
        stats: of the training samples.
        holdout_features: of samples that aren't in `stats`, (n, d); n = 0 gives factor 1.
        holdout_classes: indices into the labels, (n,).
        balance: as in `solve`.

    Raises:
        ConfigError: a balance out of range.
        DataError: no training samples, or a holdout that isn't one.
    """
    classes = checked_samples(
        holdout_features, holdout_classes, width=stats.width, labels=stats.labels
    )
    middle = regularisation(stats)
    if not len(classes):
        return solve(stats, ridge=middle, balance=balance), middle
    problem = _problem(stats, balance, min(FACTORS) * middle)
    heads = {
        factor: _head(stats.labels, *_solution(problem, factor * middle)) for factor in FACTORS
    }
    accuracies = {
        factor: balanced_accuracy(head.scores(holdout_features), classes)
        for factor, head in heads.items()
    }
    # "less than a sample behind", whatever the division by it rounds to
    enough = max(accuracies.values()) - (1 - 1e-6) / len(classes)
    good = [factor for factor in FACTORS if accuracies[factor] > enough]
    best = min(good, key=lambda f: (round(abs(math.log10(f))), -accuracies[f], -f))
    temperature = fit_temperature(heads[best].scores(holdout_features), classes)
    return replace(heads[best], temperature=temperature), best * middle


def regularisation(stats: Statistics) -> float:
    """Return a ridge that the statistics alone suggest.

    Shrinking the covariance within classes, S / n, towards a multiple of the identity that has
    the same trace is adding a ridge, but for scale: with intensity rho, rho / (1 - rho) of the
    mean variance of a feature. rho is `shrinkage`, with as many samples as there are beyond one
    for each class. The ratio is kept within `RATIOS`.

    Where samples don't vary within classes (one of each), the variance of the class means takes
    the place of that within, and the ratio is 1.

    Returns:
        More than 0, in squared units of the features.

    Raises:
        DataError: no samples, or statistics too large for any.
    """
    _check_samples(stats)
    # statistics read from a file may hold any finite numbers
    with np.errstate(all="ignore"):
        found = _suggested(stats)
    if not math.isfinite(found):
        raise DataError(TOO_LARGE)
    return found


def shrinkage(covariance: FloatArray, samples: float) -> float:
    """Return by how much to shrink a sample covariance towards a multiple of the identity.

    The oracle approximating shrinkage of samples drawn from a normal distribution.

    Args:
        covariance: S, of any scale, (d, d).
        samples: that it is the covariance of, n, of known mean; less 1 for each mean estimated.

    Returns:
        rho, 0 to 1; 1 where S tells of no direction.

    Source: Chen, Wiesel, Eldar, Hero 2010 (arXiv:0907.4698), eq. 23.
    """
    width = len(covariance)
    scaled = covariance / (np.trace(covariance) or 1.0)  # trace 1
    squares = float(np.sum(scaled**2))  # Tr(S^2)
    above = (1 - 2 / width) * squares + 1
    below = (samples + 1 - 2 / width) * (squares - 1 / width)
    return min(above / below, 1.0) if below > 0 and above > 0 else 1.0


def balanced_accuracy(scores: npt.NDArray[Any], classes: npt.NDArray[Any]) -> float:
    """Return the mean recall of the classes that there are samples of.

    Args:
        scores: (n, classes), n of 1 or more.
        classes: of the samples, (n,).
    """
    hits = scores.argmax(axis=1) == classes
    return float(np.mean([hits[classes == c].mean() for c in np.unique(classes)]))


def fit_temperature(scores: npt.NDArray[Any], classes: npt.NDArray[Any]) -> float:
    """Return the temperature T at which softmax(scores / T) has the least log loss.

    Labels are smoothed by one sample's worth: a target is 1 / (n + 1) spread evenly over the
    classes, and the rest on the sample's own, else a few samples that are all right would make
    the head certain of everything (Platt 1999 smooths targets to the same end). The loss is
    convex in 1 / T; its minimum is found by golden section over log T within `TEMPERATURES`.

    Classes that can't be predicted (`NEVER`), and samples of theirs, are left out.

    Args:
        scores: of a head before its temperature, (n, classes).
        classes: indices, (n,).

    Returns:
        T; `DEFAULT_TEMPERATURE` if nothing is left to fit it to.

    Raises:
        DataError: shapes that disagree, scores that aren't finite, or unknown classes.
    """
    labels = [str(place) for place in range(scores.shape[-1])]
    places = checked_samples(scores, classes, width=len(labels), labels=labels)
    able: npt.NDArray[np.bool_] = np.all(scores > NEVER / 2, axis=0)
    fair = able[places]
    rows = scores[fair][:, able].astype(np.float64)  # (n, able)
    rows -= rows.max(axis=1, keepdims=True, initial=-np.inf)
    if not rows.any():
        return DEFAULT_TEMPERATURE
    own = np.take_along_axis(rows, (np.cumsum(able) - 1)[places[fair], None], axis=1)
    count = len(rows)
    targeted = (count * own[:, 0] + rows.mean(axis=1)) / (count + 1)  # (n,)

    def loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        norms = np.log(np.exp(rows * scale).sum(axis=1))  # (n,)
        return float(np.mean(norms - targeted * scale))

    low, high = (math.log(bound) for bound in TEMPERATURES)
    return math.exp(_golden(loss, low, high))


def _golden(loss: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function of one minimum has it; of two places as good, the higher."""
    part = (math.sqrt(5) - 1) / 2
    left, right = high - part * (high - low), low + part * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(STEPS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - part * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + part * (high - low)
            at_right = loss(right)
    return (low + high) / 2


def _suggested(stats: Statistics) -> float:
    scatter = within(stats) / stats.samples
    variance = float(np.trace(scatter)) / stats.width
    largest = max(float(np.trace(stats.gram)), 0) / stats.samples / stats.width
    # what is left of a variance of 0 by rounding is none
    if variance <= 1e-12 * largest:
        spread = float(np.mean(np.var(stats.means[stats.counts > 0], axis=0)))
        return next(size for size in (spread, largest, 1.0) if not size <= 1e-12 * largest)
    rho = shrinkage(scatter, stats.samples - float(np.count_nonzero(stats.counts)))
    ratio = rho / (1 - rho) if rho < 1 else math.inf
    return variance * min(max(ratio, RATIOS[0]), RATIOS[1])


def _problem(stats: Statistics, balance: float, least: float) -> _Problem:
    """Return the equations of a head, solvable for ridges of `least` and more."""
    if not 0 <= balance <= 1:
        raise ConfigError(f"balance = {balance}; expected 0 (as seen) to 1 (every class the same)")
    _check_samples(stats)
    seen = stats.counts > 0
    # statistics read from a file may hold any finite numbers
    with np.errstate(all="ignore"):
        shares = stats.counts[seen] ** (1 - balance)
        shares /= shares.sum()
        means = stats.means[seen]  # (seen, d)
        mean = shares @ means
        away = means - mean
        rooted = away * np.sqrt(shares)[:, None]
        total = within(stats) / stats.samples + rooted.T @ rooted  # (d, d)
    if not np.isfinite(total).all():
        raise DataError(TOO_LARGE)
    return _Problem(
        total=_positive(total, least),
        between=(away * shares[:, None]).T,
        mean=mean,
        shares=shares,
        seen=seen,
    )


def _positive(total: FloatArray, least: float) -> FloatArray:
    """Return T, or the nearest T without negative eigenvalues if T + least I isn't positive."""
    try:
        np.linalg.cholesky(_shifted(total, least))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(total)
        half = vectors * np.sqrt(np.maximum(values, 0))
        nearest: FloatArray = half @ half.T
        return nearest
    return total


def _solution(problem: _Problem, ridge: float) -> tuple[FloatArray, FloatArray]:
    # numpy has no triangular solve: for one right side LU costs less than Cholesky and two LUs
    try:
        found = np.linalg.solve(_shifted(problem.total, ridge), problem.between)  # (d, seen)
    except np.linalg.LinAlgError as error:
        raise ConfigError(
            f"ridge = {ridge} is lost in rounding beside these statistics; use a larger one"
        ) from error
    weights = np.zeros((len(problem.total), len(problem.seen)))
    weights[:, problem.seen] = found
    bias = np.full(len(problem.seen), NEVER)
    bias[problem.seen] = problem.shares - problem.mean @ found
    return weights, bias


def _shifted(total: FloatArray, ridge: float) -> FloatArray:
    shifted = total.copy()
    np.einsum("ii->i", shifted)[...] += ridge
    return shifted


def _head(labels: tuple[str, ...], weights: FloatArray, bias: FloatArray) -> Head:
    largest = float(np.finfo(np.float32).max)
    if not (np.abs(weights) <= largest).all() or not (np.abs(bias) <= largest).all():
        raise DataError(TOO_LARGE)
    return Head(
        labels=labels,
        weights=weights.astype(np.float32),
        bias=bias.astype(np.float32),
        temperature=DEFAULT_TEMPERATURE,
    )


def _check_samples(stats: Statistics) -> None:
    if not stats.samples > 0:
        raise DataError("statistics of no samples; add samples of one class or more first")
