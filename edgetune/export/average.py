"""Average what devices trained: low-rank branches by their products, the rest by its values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import DataError

FloatArray = npt.NDArray[np.float64]
Tensors = Mapping[str, npt.NDArray[np.float32]]

A_MARK, B_MARK = ".lora_a.", ".lora_b."
# a singular value below this share of the largest is rounding
LEAST_SINGULAR = 1e-7


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """The mean of several devices' tensors.

    labels: in the order of the rows of the tensors of classes. kept: layer with a low-rank
    branch -> share of the mean product's squared norm that its rank can hold.
    """

    labels: tuple[str, ...]
    tensors: dict[str, npt.NDArray[np.float32]]
    kept: dict[str, float]


def average(
    states: Sequence[tuple[Sequence[str], Tensors]],
    weights: Sequence[float],
    defaults: Tensors,
    class_axes: Mapping[str, int],
    labels: Sequence[str],
) -> Averaged:
    """Return the weighted mean of trained tensors.

    Of LoRA, the mean of the products is what the mean of the models would compute; the product
    of the means is not (it mixes every device's A with every other's B). So the products are
    averaged, and the nearest product of the same rank is taken. Tensors with an axis of classes
    are averaged label by label over the devices that have it. All else is the mean of its values.

    Args:
        states: labels and tensors, one a device; the same names everywhere.
        weights: 0 or more, not all 0, one a device.
        defaults: the bundle's own tensors.
        class_axes: tensor -> its axis of classes.
        labels: the bundle's own; new ones come behind, in the order of the devices.

    Raises:
        DataError: there are no states, or weights that give no mean.
    """
    shares = np.array(weights, np.float64)
    if not len(states) or shares.shape != (len(states),) or not (shares >= 0).all():
        raise DataError("expected a weight of 0 or more for each of some devices")
    if not 0 < shares.sum() < np.inf:
        raise DataError("the weights are all 0, or infinite: no device has any samples")
    shares = shares / shares.sum()
    joined = tuple(dict.fromkeys([*labels, *(name for own, _ in states for name in own)]))
    result: dict[str, npt.NDArray[np.float32]] = {}
    kept: dict[str, float] = {}
    for name, default in defaults.items():
        values = [tensors[name] for _, tensors in states]
        partner = _partner(name)
        if partner in defaults and partner != name:
            if A_MARK in name:
                pairs = [(tensors[name], tensors[partner]) for _, tensors in states]
                own = (default, defaults[partner])
                result[name], result[partner], kept[name.split(A_MARK)[0]] = average_low_rank(
                    pairs, shares, own
                )
        elif name in class_axes:
            owners = [own for own, _ in states]
            result[name] = _by_label(
                values, owners, shares, joined, class_axes[name], default, labels
            )
        else:
            result[name] = _mean(values, shares).astype(np.float32)
    ordered = {name: result[name] for name in defaults}
    return Averaged(labels=joined, tensors=ordered, kept=kept)


def average_low_rank(
    pairs: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]],
    shares: npt.NDArray[Any],
    default: tuple[npt.NDArray[Any], npt.NDArray[Any]],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], float]:
    """Return factors A, B of rank r, and the share of the mean's squared norm that they hold.

    Of the mean of the devices' products, P = sum_i w_i A_i B_i, the nearest matrix of rank r in
    the Frobenius norm is made of its r largest singular values (Eckart and Young 1936); A takes
    U sqrt(S), B takes sqrt(S) V^T. P itself is never formed: its singular values are those of a
    matrix as wide as all ranks together. Where P has a lower rank than r, the rest of A is the
    bundle's own and that of B is 0, so that it can still be trained.

    Args:
        pairs: A (in, r) and B (r, out) of a product, or A (r, in, height, width) and
            B (out, r, 1, 1) of convolutions, one a device.
        shares: weights w, which sum to 1.
        default: the bundle's own A and B.
    """
    convolution = pairs[0][0].ndim == 4
    # of a convolution B comes first: (out, r) (r, in * height * width)
    lefts = [_matrix(b if convolution else a) for a, b in pairs]
    rights = [_matrix(a if convolution else b) for a, b in pairs]
    rank = lefts[0].shape[1]
    weighted = [w * left for w, left in zip(shares, lefts, strict=True)]
    q_left, r_left = np.linalg.qr(np.concatenate(weighted, axis=1))
    q_right, r_right = np.linalg.qr(np.concatenate(rights, axis=0).T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    energy = float(np.sum(s**2))
    count = min(rank, len(s))
    real = s[:count] > LEAST_SINGULAR * max(float(s[0]), 1e-300)
    roots = np.sqrt(np.where(real, s[:count], 0.0))
    left, right = q_left @ u[:, :count], (q_right @ vt[:count].T).T
    # the sign of a singular vector is free: its largest entry is positive
    signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(count)])
    left, right = left * signs * roots, right * signs[:, None] * roots[:, None]
    left = np.pad(left, ((0, 0), (0, rank - count)))
    right = np.pad(right, ((0, rank - count), (0, 0)))
    unused = ~np.pad(real, (0, rank - count))
    a, b = (right, left) if convolution else (left, right)
    own = _matrix(default[0])
    if convolution:
        a[unused] = own[unused]
    else:
        a[:, unused] = own[:, unused]
    kept = float(np.sum(s[:count] ** 2)) / energy if energy > 0 else 1.0
    shaped_a = a.reshape(default[0].shape).astype(np.float32)
    return shaped_a, b.reshape(default[1].shape).astype(np.float32), kept


def _partner(name: str) -> str:
    """Return the other factor of a branch; the name itself where it is none."""
    if A_MARK in name:
        return name.replace(A_MARK, B_MARK)
    return name.replace(B_MARK, A_MARK)


def _matrix(factor: npt.NDArray[Any]) -> FloatArray:
    return factor.reshape(factor.shape[0], -1).astype(np.float64)


def _mean(values: Sequence[npt.NDArray[Any]], shares: npt.NDArray[Any]) -> FloatArray:
    total = np.zeros(values[0].shape)
    for share, value in zip(shares, values, strict=True):
        total += share * value.astype(np.float64)
    return total


def _by_label(
    values: Sequence[npt.NDArray[Any]],
    owners: Sequence[Sequence[str]],
    shares: npt.NDArray[Any],
    joined: Sequence[str],
    axis: int,
    default: npt.NDArray[Any],
    labels: Sequence[str],
) -> npt.NDArray[np.float32]:
    rows = []
    for label in joined:
        found = [
            (value.take(list(own).index(label), axis=axis), share)
            for value, own, share in zip(values, owners, shares, strict=True)
            if label in own and share > 0
        ]
        if found:
            having = np.array([share for _, share in found])
            rows.append(_mean([row for row, _ in found], having / having.sum()))
        elif label in labels:
            rows.append(default.take(list(labels).index(label), axis=axis).astype(np.float64))
        else:  # a device of weight 0 has it alone
            everyone = [
                value.take(list(own).index(label), axis=axis)
                for value, own in zip(values, owners, strict=True)
                if label in own
            ]
            rows.append(_mean(everyone, np.full(len(everyone), 1 / len(everyone))))
    return np.stack(rows, axis=axis).astype(np.float32)
