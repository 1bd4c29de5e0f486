"""What learning starts from: the file learn.npz of a bundle."""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, IntegrityError
from edgetune.runtime.bundle import LEARN_NAME, Bundle
from edgetune.runtime.learn.projection import Projection
from edgetune.runtime.learn.statistics import Prior, prior_arrays, prior_from_arrays
from edgetune.runtime.npz import load_arrays
from edgetune.runtime.tasks import has_classes

VERSION = 1
MAX_BYTES = 2**28
REPLAY_PREFIX, CANARY_PREFIX = "replay_latent_", "canary_latent_"


@dataclass(frozen=True, kw_only=True)
class Material:
    """The factory's share in learning on the device.

    prior: statistics of the training samples' features, projected where there is a projection.
    canary_features: of samples that nothing was trained on, float32 (n, d), before projection.
    canary_classes: their true classes, (n,). canary_answers: what the factory head answers, (n,).
    ridge_factor: how much larger than `ridge.regularisation` the ridge is to be.
    margin: what a canary of this size can prove, a share; see `guard.Rules`.
    projection: of features; None for none.
    canary_latents, replay_latents: what train.onnx takes, of the canary's samples and of training
        samples to rehearse, name -> one array a sample; empty where there is no such step.
    replay_classes: of the latter, (m,).
    """

    prior: Prior
    canary_features: npt.NDArray[np.float32]
    canary_classes: npt.NDArray[np.int64]
    canary_answers: npt.NDArray[np.int64]
    ridge_factor: float
    margin: float
    projection: Projection | None
    canary_latents: dict[str, list[npt.NDArray[Any]]]
    replay_latents: dict[str, list[npt.NDArray[Any]]]
    replay_classes: npt.NDArray[np.int64]


def read_material(bundle: Bundle) -> Material:
    """Read a bundle's learn.npz.

    Raises:
        ConfigError: the bundle has none.
        IntegrityError: it is not the manifest's, or not what it should be.
    """
    entry = bundle.manifest.files.get(LEARN_NAME)
    if not has_classes(bundle.manifest.task):
        raise ConfigError(
            f"{bundle.where}: this bundle cannot learn: task {bundle.manifest.task} gives no one"
            " class a sample, which learning on the device teaches"
        )
    if entry is None:
        raise ConfigError(
            f"{bundle.where}: this bundle cannot learn: it has no {LEARN_NAME}; export it without"
            " --learn none"
        )
    where = str(bundle.where / LEARN_NAME)
    if entry.size > MAX_BYTES:
        raise IntegrityError(f"{where}: {entry.size} bytes, allowed {MAX_BYTES}")
    try:
        arrays = load_arrays(bundle.read(LEARN_NAME), MAX_BYTES)
        material = _from_arrays(arrays, where)
    except (KeyError, ValueError, TypeError) as error:
        raise IntegrityError(f"{where}: cannot be read: {error}") from error
    if material.prior.labels != bundle.manifest.labels:
        raise IntegrityError(f"{where}: its labels are not those of the manifest")
    return material


def dump_material(material: Material) -> bytes:
    """Return the bytes of learn.npz; same material, same bytes. Float latents become float16."""
    settings = [material.ridge_factor, material.margin]
    projection = material.projection
    arrays: dict[str, npt.NDArray[Any]] = {
        "version": np.array(VERSION),
        "settings": np.array(settings, np.float64),
        "projection": np.array(
            [] if projection is None else [projection.width, projection.seed], np.int64
        ),
        "canary_features": material.canary_features.astype(np.float16),
        "canary_classes": material.canary_classes.astype(np.int32),
        "canary_answers": material.canary_answers.astype(np.int32),
        "replay_classes": material.replay_classes.astype(np.int32),
        **prior_arrays(material.prior),
    }
    for prefix, latents in (
        (CANARY_PREFIX, material.canary_latents),
        (REPLAY_PREFIX, material.replay_latents),
    ):
        for name, samples in latents.items():
            arrays |= pack_samples(f"{prefix}{name}", samples)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(arrays[name], order="C"))
            # a fixed date: the same content gives the same bytes
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue()
            )
    return data.getvalue()


def pack_samples(name: str, samples: list[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return arrays of any lengths along their first axis as one, and their lengths.

    Raises:
        ConfigError: they differ in another axis.
    """
    if len({s.shape[1:] for s in samples}) > 1:
        raise ConfigError(f"{name}: the samples differ in more than their first axis")
    joined = np.concatenate(samples) if samples else np.zeros(0, np.float32)
    if joined.dtype.kind == "f":
        joined = joined.astype(np.float16)
    if joined.dtype == np.int64 and (not joined.size or abs(joined).max() < 2**31):
        joined = joined.astype(np.int32)
    lengths = np.array([len(s) for s in samples], np.int32)
    return {name: joined, f"{name}_lengths": lengths}


def unpack_samples(arrays: Mapping[str, npt.NDArray[Any]], name: str) -> list[npt.NDArray[Any]]:
    """Return what `pack_samples` packed; float16 becomes float32, int32 int64.

    Raises:
        ValueError: the lengths are not those of the array.
    """
    joined, lengths = arrays[name], arrays[f"{name}_lengths"]
    if lengths.ndim != 1 or lengths.dtype.kind != "i" or (lengths < 0).any():
        raise ValueError(f"{name}: lengths are malformed")
    ends = np.cumsum(lengths.astype(np.int64))
    if (ends[-1] if len(ends) else 0) != len(joined) or joined.ndim < 1:
        raise ValueError(f"{name}: its lengths do not add up")
    wide = {np.dtype(np.float16): np.float32, np.dtype(np.int32): np.int64}
    joined = joined.astype(wide.get(joined.dtype, joined.dtype))
    return np.split(joined, ends[:-1]) if len(ends) else []


def _from_arrays(arrays: Mapping[str, npt.NDArray[Any]], where: str) -> Material:
    if int(arrays["version"]) != VERSION:
        raise ValueError(f"version {int(arrays['version'])}, this edgetune reads {VERSION}")
    prior = prior_from_arrays(arrays, where)
    classes, width = len(prior.labels), prior.means.shape[1]
    features = arrays["canary_features"].astype(np.float32)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError("canary_features: expected finite numbers, (samples, features)")
    settings, planned = arrays["settings"], arrays["projection"]
    if settings.shape != (2,) or not np.isfinite(settings).all() or not (settings > 0).all():
        raise ValueError("settings: expected two numbers above 0")
    projection = None
    if planned.size:
        if planned.shape != (2,) or planned.dtype != np.int64:
            raise ValueError("projection: expected a width and a seed")
        projection = Projection(
            width_in=features.shape[1], width=int(planned[0]), seed=int(planned[1])
        )
    if (projection.width if projection else features.shape[1]) != width:
        raise ValueError(f"the prior has {width} features, the canary {features.shape[1]}")
    canary = _classes(arrays, "canary_classes", len(features), classes)
    canary_latents = _latents(arrays, CANARY_PREFIX, len(features))
    replay = _classes(arrays, "replay_classes", None, classes)
    return Material(
        prior=prior,
        canary_features=features,
        canary_classes=canary,
        canary_answers=_classes(arrays, "canary_answers", len(features), classes),
        ridge_factor=float(settings[0]),
        margin=float(settings[1]),
        projection=projection,
        canary_latents=canary_latents,
        replay_latents=_latents(arrays, REPLAY_PREFIX, len(replay)),
        replay_classes=replay,
    )


def _classes(
    arrays: Mapping[str, npt.NDArray[Any]], name: str, samples: int | None, classes: int
) -> npt.NDArray[np.int64]:
    found = arrays[name]
    if (
        found.ndim != 1
        or found.dtype.kind != "i"
        or (samples is not None and len(found) != samples)
    ):
        raise ValueError(f"{name}: expected one class a sample")
    if found.size and not 0 <= found.min() <= found.max() < classes:
        raise ValueError(f"{name}: a class that is none of {classes}")
    return found.astype(np.int64)


def _latents(
    arrays: Mapping[str, npt.NDArray[Any]], prefix: str, samples: int
) -> dict[str, list[npt.NDArray[Any]]]:
    names = [n for n in arrays if n.startswith(prefix) and not n.endswith("_lengths")]
    found = {name.removeprefix(prefix): unpack_samples(arrays, name) for name in sorted(names)}
    for name, values in found.items():
        if len(values) != samples:
            raise ValueError(f"{prefix}{name}: expected {samples} samples, got {len(values)}")
    return found
