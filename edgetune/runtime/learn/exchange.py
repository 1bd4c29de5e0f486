"""What a device sends home of what it learned: one file, and no sample in it.

A fleet file is an npz of a JSON header, arrays, and a SHA-256 over both, which tells accidents;
who sent it is for the transport to prove. It holds either the sums of what the device itself has
learned ("statistics"), without the factory's and without other devices', or the values of the
tensors that it has trained ("tensors"); always those of the live generation, so nothing that was
not committed.

No sample is not no secret: docs/fleet.md says what sums and tensors tell of the samples.
"""

import hashlib
import io
import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, IntegrityError, ResourceError
from edgetune.runtime.bundle import Bundle, open_bundle
from edgetune.runtime.learn.learner import KIND as HEAD_KIND
from edgetune.runtime.learn.learner import MAX_CLASSES, check_label
from edgetune.runtime.learn.material import Material, read_material
from edgetune.runtime.learn.privacy import Privacy, clip_rows, perturb
from edgetune.runtime.learn.samples import Forgetting, Removal, Sample, effective
from edgetune.runtime.learn.state import binding_of, default_store, read_state
from edgetune.runtime.learn.statistics import Statistics, add, empty
from edgetune.runtime.learn.store import Generation, Store
from edgetune.runtime.npz import load_arrays
from edgetune.runtime.records import from_mapping, to_mapping

FloatArray = npt.NDArray[np.float64]
Kind = Literal["statistics", "tensors"]

VERSION = 1
# of the file, and of its arrays together
MAX_BYTES = 2**28
MAX_HEADER_BYTES = 2**22
# a class of one sample sends that sample's features
MIN_COUNT = 2
# of the canary's norms, the share that is not clipped where no clip is given
CLIP_QUANTILE = 0.9
# in the store's folder: what tells this device's files from others', and seeds their noise
DEVICE_NAME = "device-id"
TENSORS_KIND = "tensors"
_TENSOR = "tensor_"
_SHORT, _LONG = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{64}")
# what rounding may add to a sum of many products
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class FleetFile:
    """What one generation of one device has learned.

    kind: what it holds. bundle, base: the bundle's name and its manifest's digest. id: the same
    for every export of a generation, so that it counts once. source: the same for every
    generation of a device, so that a later one replaces an earlier one; random, says nothing of
    the device. labels: in the order of the arrays. counts: samples of each, float64 (labels,).
    statistics: of the device's own samples; where `privacy` is set, counts may be negative and
    the Gram matrix indefinite. tensors: name -> value. privacy: of the noise; None: there is none.
    """

    kind: Kind
    bundle: str
    base: str
    id: str
    source: str
    generation: int
    labels: tuple[str, ...]
    counts: FloatArray
    statistics: Statistics | None = None
    tensors: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    privacy: Privacy | None = None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A fleet file, and what only the device may know.

    left_out: label -> samples that are not in it. clipped: share of the samples in it that were
    longer than the clip.
    """

    file: FleetFile
    left_out: dict[str, int]
    clipped: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Header:
    kind: Kind
    bundle: str
    base: str
    id: str
    source: str
    generation: int
    labels: tuple[str, ...]
    privacy: Privacy | None = None


def export_learned(
    path: str | Path | Bundle,
    store: str | Path | None = None,
    *,
    min_count: int = MIN_COUNT,
    noise_multiplier: float | None = None,
    clip: float | None = None,
    labels: Sequence[str] = (),
) -> Exported:
    """Return what the live generation of a store has learned.

    The same generation and the same settings give the same file, noise included.

    Args:
        path: the bundle, or where it lies.
        store: the store's folder; default: the bundle's name with ".learned", beside it.
        min_count: classes with fewer samples are left out, with noise by their noisy count; of
            tensors only the rows of such new classes are, other tensors have learned from them.
        noise_multiplier: adds noise (see `privacy.perturb`); None adds none.
        clip: longest features; default: what 9 of 10 of the bundle's canary samples keep to.
        labels: with noise, those to send; anyone may know them, and samples of others are left
            out: that there is such a label would tell of them. Default: the bundle's. Each of
            them is noisy, samples or not, so name no more than were taught.

    Raises:
        ConfigError: nothing was learned there, or settings that do not go together.
        IntegrityError: the store is damaged.
        ResourceError: it cannot be read, or the device's id cannot be written there.
    """
    bundle = path if isinstance(path, Bundle) else open_bundle(path)
    folder = default_store(bundle) if store is None else Path(store)
    if min_count < 1:
        raise ConfigError(f"min_count: expected 1 or more, got {min_count}")
    if noise_multiplier is None and (clip is not None or labels):
        raise ConfigError("clip and labels go with noise; give a noise multiplier too")
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: nothing was learned there; edgetune-rt learn makes such a folder"
        )
    opened = Store.open(folder, binding=binding_of(bundle), readonly=True)
    live = opened.live
    if live is None:
        raise ConfigError(f"{folder}: the factory state is live, nothing to export")
    secret = _device_secret(folder)
    header = _Header(
        kind="statistics" if live.receipt.get("kind") == HEAD_KIND else "tensors",
        bundle=bundle.manifest.name,
        base=bundle.manifest.digest,
        id=_digest(secret, b"id", bundle.manifest.digest, live.digest)[:32],
        source=_digest(secret, b"source")[:32],
        generation=live.number,
        labels=(),
    )
    if live.receipt.get("kind") == TENSORS_KIND:
        if noise_multiplier is not None:
            raise ConfigError(
                f"{folder}: holds trained tensors; noise is for statistics, what Learner learns"
            )
        return _tensors(header, bundle, opened, live, min_count)
    if live.receipt.get("kind") != HEAD_KIND:
        raise ConfigError(f"{folder}: holds what this edgetune cannot send")
    material = read_material(bundle)
    samples = committed_samples(opened, live)
    if noise_multiplier is None:
        return _statistics(header, material, samples, min_count)
    privacy = Privacy(clip=_clip(material) if clip is None else clip,
                      noise_multiplier=noise_multiplier)  # fmt: skip
    privacy.check()
    for label in labels:
        check_label(label)
    known = tuple(dict.fromkeys(labels or bundle.manifest.labels))
    context = [live.digest, repr(privacy), json.dumps(known)]
    key = bytes.fromhex(_digest(secret, b"noise", *context))
    return _noisy(header, material, samples, known, privacy, key, min_count)


def committed_samples(store: Store, generation: Generation) -> list[Sample]:
    """Return the samples that a generation's statistics are of, less those taken out again.

    What was given since is not among them, nor what is kept apart to judge by.

    Raises:
        IntegrityError: the receipt or the journal cannot be read.
    """
    try:
        ranges = [(int(a), int(b)) for a, b in generation.receipt["ranges"]]
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{store.folder}: generation {generation.number}: its receipt names no ranges"
        ) from error
    journal = store.journal
    kept: dict[str, Sample] = {}
    for record in effective(journal.records(), ranges, str(journal.path)):
        if isinstance(record, Sample):
            if record.role != "aside":
                kept.setdefault(record.id, record)
        elif isinstance(record, Removal):
            for name in record.ids:
                kept.pop(name, None)
        elif isinstance(record, Forgetting):
            kept = {i: s for i, s in kept.items() if s.label != record.label}
    return [s for s in kept.values() if s.role == "train"]


def dump_fleet_file(file: FleetFile) -> bytes:
    """Return a file's bytes; same file, same bytes."""
    fields = {name: getattr(file, name) for name in _Header.__dataclass_fields__}
    header = json.dumps(to_mapping(_Header(**fields)), sort_keys=True, separators=(",", ":"))
    arrays: dict[str, npt.NDArray[Any]] = {
        "version": np.array(VERSION, np.int64),
        "header": np.frombuffer(header.encode("ascii"), np.uint8),
        "counts": np.ascontiguousarray(file.counts, np.float64),
    }
    if file.statistics is not None:
        arrays["gram"] = file.statistics.gram[np.triu_indices(file.statistics.width)]
        arrays["sums"] = np.ascontiguousarray(file.statistics.sums)
    for name in sorted(file.tensors):
        arrays[_TENSOR + name] = np.ascontiguousarray(file.tensors[name])
    arrays["sha256"] = _checksum(arrays)
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]
    return data.getvalue()


def load_fleet_file(data: bytes, where: str) -> FleetFile:
    """Return the file in those bytes.

    Args:
        data: whatever came.
        where: its name, for errors.

    Raises:
        IntegrityError: they are none, were damaged on the way, or hold what no samples sum up to.
    """
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"{len(data)} bytes, allowed {MAX_BYTES}")
        arrays = load_arrays(data, MAX_BYTES)
        version = int(_array(arrays, "version", (), np.int64))
        if version != VERSION:
            raise ValueError(f"version {version}; this edgetune reads {VERSION}")
        stated = _array(arrays, "sha256", (32,), np.uint8)
        if not np.array_equal(stated, _checksum(arrays)):
            raise ValueError("was changed or damaged after it was made")
        return _file(arrays, where)
    except KeyError as error:
        raise IntegrityError(f"{where}: is no fleet file: it lacks {error}") from error
    except (ValueError, RecursionError, ConfigError) as error:
        raise IntegrityError(f"{where}: is no fleet file: {error!s:.300}") from error


def read_fleet_file(path: Path) -> FleetFile:
    """Read a file.

    Raises:
        IntegrityError: it is none, or too large.
        ResourceError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    return load_fleet_file(data, str(path))


def _statistics(
    header: _Header, material: Material, samples: Sequence[Sample], min_count: int
) -> Exported:
    rows = _by_label(samples)
    sent = {label: own for label, own in sorted(rows.items()) if len(own) >= min_count}
    if not sent:
        raise ConfigError(
            f"nothing to send: no class has {min_count} samples that were learned here; learn"
            " more, or send classes of fewer (--min-count)"
        )
    stats = empty(material.prior.means.shape[1], tuple(sent))
    for place, own in enumerate(sent.values()):
        stats = add(stats, _placed(material, own), np.full(len(own), place))
    return Exported(
        file=_with(header, stats, None),
        left_out={label: len(own) for label, own in rows.items() if label not in sent},
    )


def _noisy(
    header: _Header,
    material: Material,
    samples: Sequence[Sample],
    known: tuple[str, ...],
    privacy: Privacy,
    key: bytes,
    min_count: int,
) -> Exported:
    """Return noisy sums of the known labels; see `privacy` for what is kept secret."""
    stats = empty(material.prior.means.shape[1], known)
    rows = _by_label(samples)
    clipped = total = 0
    for place, label in enumerate(known):
        if label in rows:
            placed = _placed(material, rows[label])
            short = clip_rows(placed, privacy.clip)
            clipped += int(np.sum(np.sum(placed.astype(np.float64) ** 2, axis=1) > privacy.clip**2))
            total += len(placed)
            stats = _add_exactly(stats, short, place)
    noisy = perturb(stats, privacy, key)
    # made of what is private already: leaving out by it tells nothing more. A factory class stays,
    # whose noise averages out over many devices only if none is left out
    factory = set(material.prior.labels)
    kept = [i for i, n in enumerate(known) if n in factory or noisy.counts[i] >= min_count]
    if not kept:
        raise ConfigError(f"nothing to send: with noise no class has {min_count} samples")
    noisy = Statistics(
        labels=tuple(known[i] for i in kept), gram=noisy.gram, sums=noisy.sums[kept],
        counts=noisy.counts[kept],
    )  # fmt: skip
    return Exported(
        file=_with(header, noisy, privacy),
        left_out={label: len(own) for label, own in rows.items() if label not in noisy.labels},
        clipped=clipped / max(total, 1),
    )


def _tensors(
    header: _Header, bundle: Bundle, store: Store, live: Generation, min_count: int
) -> Exported:
    state = read_state(bundle, store, live)
    training = bundle.manifest.training
    assert training is not None  # read_state has compared the tensors with it
    counts = _counts_of(live)
    factory = set(bundle.manifest.labels)
    keep = [
        i
        for i, label in enumerate(state.labels)
        if label in factory or counts.get(label, 0) >= min_count
    ]
    axes = {s.name: s.shape.index("classes") for s in training.trainable if "classes" in s.shape}
    tensors = {
        name: value.take(keep, axis=axes[name]) if name in axes else value
        for name, value in state.tensors.items()
    }
    labels = tuple(state.labels[i] for i in keep)
    # of a factory class too few samples are said to be none
    said = [float(counts.get(n, 0)) for n in labels]
    file = FleetFile(
        **{**_fields(header), "labels": labels},
        counts=np.array([n if n >= min_count else 0.0 for n in said], np.float64),
        tensors=tensors,
    )
    left_out = {n: counts.get(n, 0) for n in state.labels if n not in labels}
    return Exported(file=file, left_out=left_out)


def _counts_of(generation: Generation) -> dict[str, int]:
    counts = generation.receipt.get("counts", {})
    if not isinstance(counts, dict):
        return {}
    return {str(k): v for k, v in counts.items() if type(v) is int and v >= 0}


def _add_exactly(stats: Statistics, rows: FloatArray, place: int) -> Statistics:
    """Add samples of one class in float64, clipped as they are."""
    sums, counts = stats.sums.copy(), stats.counts.copy()
    sums[place] += rows.sum(axis=0)
    counts[place] += len(rows)
    gram = stats.gram + rows.T @ rows
    return Statistics(labels=stats.labels, gram=gram, sums=sums, counts=counts)


def _by_label(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    rows: dict[str, list[Sample]] = {}
    for sample in samples:
        rows.setdefault(sample.label, []).append(sample)
    return rows


def _placed(material: Material, samples: Sequence[Sample]) -> npt.NDArray[np.float32]:
    features = np.stack([s.features for s in samples])
    projection = material.projection
    return features if projection is None else projection.apply(features)


def _clip(material: Material) -> float:
    """Return a clip that no device's samples have a part in."""
    features: npt.NDArray[Any] = material.canary_features
    if not len(features):
        raise ConfigError("clip: this bundle has no canary to take one from; name it")
    if material.projection is not None:
        features = material.projection.apply(features)
    lengths = np.sqrt(np.sum(features.astype(np.float64) ** 2, axis=1))
    return float(np.quantile(lengths, CLIP_QUANTILE))


def _fields(header: _Header) -> dict[str, Any]:
    return {name: getattr(header, name) for name in _Header.__dataclass_fields__}


def _with(header: _Header, stats: Statistics, privacy: Privacy | None) -> FleetFile:
    fields = {**_fields(header), "labels": stats.labels, "privacy": privacy}
    return FleetFile(**fields, counts=stats.counts, statistics=stats)


def _device_secret(folder: Path) -> bytes:
    """Return the device's secret, 32 bytes, made at its first export.

    Raises:
        IntegrityError: it is damaged.
        ResourceError: it cannot be read or written.
    """
    path = folder / DEVICE_NAME
    try:
        if not path.exists():
            partial = folder / f".{DEVICE_NAME}.{secrets.token_hex(8)}"
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_hex(32).encode())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        text = path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ResourceError(f"{path}: cannot be read or written: {error}") from error
    if not _LONG.fullmatch(text):
        raise IntegrityError(
            f"{path}: expected 64 hexadecimal digits; remove it, and this device counts as another"
        )
    return bytes.fromhex(text)


def _digest(secret: bytes, what: bytes, *context: str) -> str:
    message = json.dumps([what.decode(), *context]).encode()
    return hashlib.blake2b(message, key=secret, digest_size=32).hexdigest()


def _checksum(arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    """Return the SHA-256 of all arrays but itself: names, types, shapes and values."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        if name != "sha256":
            value = arrays[name]
            total.update(f"{len(name)} {name} {value.dtype.str} {value.shape} ".encode())
            total.update(np.ascontiguousarray(value).tobytes())
    return np.frombuffer(total.digest(), np.uint8)


def _file(arrays: Mapping[str, npt.NDArray[Any]], where: str) -> FleetFile:
    header = _read_header(arrays, where)
    counts = _array(arrays, "counts", (len(header.labels),), np.float64)
    rest = arrays.keys() - {"version", "header", "counts", "sha256"}
    stats, tensors = None, {}
    if header.kind == "statistics":
        if rest != {"gram", "sums"}:
            raise ValueError(f"statistics with {', '.join(sorted(rest)) or 'no arrays'}")
        stats = _sums(arrays, header, counts)
    else:
        if not rest or not all(name.startswith(_TENSOR) for name in rest):
            raise ValueError(f"tensors with {', '.join(sorted(rest)) or 'no arrays'}")
        for name in sorted(rest):
            tensors[name.removeprefix(_TENSOR)] = _array(
                arrays, name, arrays[name].shape, np.float32
            )
    if (counts < 0).any() and header.privacy is None:
        raise ValueError("counts: below 0")
    return FleetFile(**_fields(header), counts=counts, statistics=stats, tensors=tensors)


def _read_header(arrays: Mapping[str, npt.NDArray[Any]], where: str) -> _Header:
    stored = arrays["header"]
    if stored.dtype != np.uint8 or stored.ndim != 1 or len(stored) > MAX_HEADER_BYTES:
        raise ValueError("header: expected the bytes of a JSON object")
    mapping = json.loads(stored.tobytes().decode("ascii"))
    if not isinstance(mapping, dict):
        raise ValueError("header: expected a JSON object")
    header = from_mapping(_Header, mapping, where=f"{where}: header", error=IntegrityError)
    if not all(_SHORT.fullmatch(text) for text in (header.id, header.source)):
        raise ValueError("header: its id or source is malformed")
    if not _LONG.fullmatch(header.base) or header.generation < 1 or len(header.bundle) > 1000:
        raise ValueError("header: base, bundle or generation is malformed")
    if not 0 < len(header.labels) <= MAX_CLASSES or len(set(header.labels)) < len(header.labels):
        raise ValueError(f"labels: expected 1 to {MAX_CLASSES} different ones")
    for label in header.labels:
        if not 0 < len(label) <= MAX_HEADER_BYTES or not label.isprintable():
            raise ValueError(f"labels: {label!r:.80} cannot be shown")
    if header.privacy is not None:
        if header.kind == "tensors":
            raise ValueError("privacy: tensors have none")
        header.privacy.check()
    return header


def _sums(
    arrays: Mapping[str, npt.NDArray[Any]], header: _Header, counts: FloatArray
) -> Statistics:
    """Return statistics; a ValueError where there are no samples with these sums."""
    shape = arrays["sums"].shape
    width = shape[1] if len(shape) == 2 else 0
    # before anything of that width is made
    if width < 1 or arrays["gram"].shape != (width * (width + 1) // 2,):
        raise ValueError(f"gram of shape {arrays['gram'].shape} and sums of shape {shape}")
    sums = _array(arrays, "sums", (len(header.labels), width), np.float64)
    upper = _array(arrays, "gram", arrays["gram"].shape, np.float64)
    gram = np.zeros((width, width))
    gram[np.triu_indices(width)] = upper
    gram += np.triu(gram, k=1).T
    if header.privacy is None:
        _check_sums(gram, sums, counts)
    return Statistics(labels=header.labels, gram=gram, sums=sums, counts=counts)


def _check_sums(gram: FloatArray, sums: FloatArray, counts: FloatArray) -> None:
    """Refuse numbers that no samples sum up to (Cauchy and Schwarz twice)."""
    with np.errstate(all="ignore"):  # a file may hold any finite numbers
        diagonal = np.diag(gram)
        if (diagonal < 0).any() or sums[counts == 0].any():
            raise ValueError("gram, sums: of no samples")
        roots = np.sqrt(diagonal)
        slack = _ROUNDING * math.sqrt(max(float(diagonal.max()), 0.0))
        bound = np.outer(roots + slack, roots + slack)
        seen = counts > 0
        between = np.sum(sums[seen] ** 2 / counts[seen][:, None], axis=0)
        if not (np.abs(gram) <= bound).all() or not (between <= (roots + slack) ** 2).all():
            raise ValueError("gram, sums: there are no samples with such sums")


def _array(
    arrays: Mapping[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...], kind: npt.DTypeLike
) -> npt.NDArray[Any]:
    found = arrays[name]
    if found.shape != shape or found.dtype != kind:
        raise ValueError(
            f"{name:.80}: expected {np.dtype(kind)} of shape {shape}, got {found.dtype!s:.80} of"
            f" shape {found.shape}"
        )
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise ValueError(f"{name:.80}: numbers that are not finite")
    return found
