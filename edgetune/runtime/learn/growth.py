"""New classes in a head that gradients train: what their rows and columns start from."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgetune.runtime.manifest import TensorSpec

Float32Array = npt.NDArray[np.float32]


def grow(
    tensors: Mapping[str, Float32Array],
    specs: Sequence[TensorSpec],
    means: Sequence[Float32Array | None],
    centre: Float32Array | None,
) -> dict[str, Float32Array]:
    """Return tensors with one more class for each of `means`.

    A class starts with the logit that the others have on average, and, where it is known what its
    samples look like, with one that grows towards them as fast as the others' do towards theirs
    (after Qi, Brown and Lowe 2018, Low-Shot Learning with Imprinted Weights).

    Args:
        tensors: name -> value; they stay as they are.
        specs: of them; the axis "classes" of those that have one grows.
        means: features, (d,), of each new class; None where they cannot be had.
        centre: the mean features of all classes, (d,).
    """
    grown = dict(tensors)
    slopes: list[Float32Array] = []
    for spec in specs:
        axis = axis_of_classes(spec)
        if axis is None:
            continue
        value = np.moveaxis(tensors[spec.name], axis, 0)  # (classes, ...)
        rows = np.repeat(value.mean(axis=0, keepdims=True), len(means), axis=0)
        if centre is not None and value.ndim == 2 and value.shape[1] == len(centre):
            slopes = [_slope(value, mean, centre) for mean in means]
            rows = rows + np.stack(slopes)
        whole = np.concatenate([value, rows]).astype(np.float32)
        grown[spec.name] = np.ascontiguousarray(np.moveaxis(whole, 0, axis))
    for spec in specs:
        # the bias of a product whose rows were turned towards their class
        if slopes and centre is not None and spec.shape == ("classes",):
            value = grown[spec.name].copy()
            value[-len(means) :] -= np.array([slope @ centre for slope in slopes], np.float32)
            grown[spec.name] = value
    return grown


def axis_of_classes(spec: TensorSpec) -> int | None:
    """Return a tensor's axis of classes; None where it has none."""
    return spec.shape.index("classes") if "classes" in spec.shape else None


def _slope(weights: Float32Array, mean: Float32Array | None, centre: Float32Array) -> Float32Array:
    """Return a vector from the centre towards a class, as long as the others' are."""
    away = None if mean is None else mean - centre
    length = 0.0 if away is None else float(np.linalg.norm(away))
    if away is None or length == 0:
        return np.zeros_like(centre)
    others = weights - weights.mean(axis=0)
    typical = float(np.linalg.norm(others, axis=1).mean())
    slope: Float32Array = (away * np.float32(typical / length)).astype(np.float32)
    return slope
