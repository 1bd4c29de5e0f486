"""The bundle's manifest: what is in it, what it needs, what it promises.

`manifest.json` is strict: an unknown key, a wrong type or a repeated key refuses the
bundle. `digest` is the SHA-256 of the rest in canonical form, so that an edit by hand is
seen; it guards against accidents, not against an attacker, who needs a signature to stop.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgetune.errors import IntegrityError
from edgetune.runtime.records import from_mapping, to_mapping

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 * 2**20
MAX_DEPTH = 32
# names are flat: no folder, no leading dot, nothing that a shell or a zip could turn against us
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file: its size in bytes and its SHA-256 in lower-case hex."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of the graph; a name in `shape` is a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """Which onnxruntime can read the graph."""

    onnxruntime_min: str
    onnxruntime_excluded: tuple[str, ...] = ()
    opset: int
    ir_version: int


@dataclass(frozen=True, kw_only=True)
class DeviceClass:
    """The device that the bundle was made for, as its profile describes it.

    `cpu_features` are those of `runtime.device.RELEVANT_FEATURES` that its CPU has; `int8` is how
    that sums u8 x s8 products; `peak_rss_mib` is what a process that predicts takes, measured or
    estimated when the bundle was made.
    """

    arch: str
    cpu_features: tuple[str, ...]
    int8: Literal["saturates", "exact"]
    peak_rss_mib: float | None = None


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """How onnxruntime is to run the graph.

    `max_batch` is 1 where the graph quantizes activations at run time: their scale is taken
    over the whole batch, so one sample's answer would depend on its neighbours.
    """

    execution_providers: tuple[str, ...] = ("CPUExecutionProvider",)
    intra_op_threads: int = 1
    allow_spinning: bool = False
    graph_optimization: Literal["off", "basic", "extended", "all"] = "all"
    config: dict[str, str] = field(default_factory=dict)
    max_batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured on labelled data, through this runtime, when the bundle was made."""

    split: str
    samples: int
    metrics: dict[str, Metric]


@dataclass(frozen=True, kw_only=True)
class Goldens:
    """The self-test: how many samples there are, how far an output may be from the stored one."""

    count: int
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime knows of a bundle before it opens the graph."""

    schema_version: int
    name: str
    release: int
    task: str
    labels: tuple[str, ...]
    precision: str
    profile: str
    options: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    compatibility: Compatibility
    device: DeviceClass
    session: SessionSettings
    evaluation: Evaluation
    reference: Evaluation
    goldens: Goldens
    files: dict[str, FileEntry]
    overrides: tuple[str, ...] = ()
    edgetune_version: str
    digest: str = ""


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json.

    Raises:
        IntegrityError: it is absent, too large, no JSON, ill-typed, of an unknown schema, was
            edited after it was made, or names a file that a bundle cannot have.
    """
    path = folder / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        reason = error.strerror or error
        raise IntegrityError(f"{folder}: is no bundle: {MANIFEST_NAME}: {reason}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
    return parse_manifest(data, where=str(path))


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """Parse a manifest's bytes; see `read_manifest` for the errors."""
    try:
        mapping = json.loads(
            data,
            object_pairs_hook=_no_repeats,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        _check_text_and_depth(mapping)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: is no valid JSON: {error}") from error
    if not isinstance(mapping, dict):
        raise IntegrityError(f"{where}: expected a JSON object, got {type(mapping).__name__}")
    version = mapping.get("schema_version")
    if version != SCHEMA_VERSION:
        raise IntegrityError(
            f"{where}: bundle schema {version!r}; this edgetune reads {SCHEMA_VERSION};"
            " use the edgetune version that wrote the bundle, or a newer one"
        )
    manifest = from_mapping(Manifest, mapping, where=where, error=IntegrityError)
    stated = mapping.pop("digest", "")
    if stated != _digest(mapping):
        raise IntegrityError(f"{where}: was changed after it was made (its digest does not match)")
    for name, entry in manifest.files.items():
        if not FILE_NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise IntegrityError(f"{where}: {name!r} is no name that a bundle's file may have")
        if entry.size < 0 or not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
            raise IntegrityError(f"{where}: {name}: size or sha256 is malformed")
    _check_values(manifest, where)
    return manifest


def dump_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of manifest.json, its digest filled in; same record, same bytes."""
    mapping = to_mapping(manifest)
    mapping.pop("digest", None)
    mapping["digest"] = _digest(mapping)
    return (json.dumps(mapping, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _digest(mapping: dict[str, Any]) -> str:
    canonical = json.dumps(mapping, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _check_values(manifest: Manifest, where: str) -> None:
    lowest = {
        "release": (manifest.release, 1),
        "session: max_batch": (manifest.session.max_batch, 1),
        "session: intra_op_threads": (manifest.session.intra_op_threads, 1),
        "goldens: count": (manifest.goldens.count, 0),
        "goldens: tolerance": (manifest.goldens.tolerance, 0),
    }
    for key, (value, least) in lowest.items():
        if value < least:
            raise IntegrityError(f"{where}: {key}: expected at least {least}, got {value}")
    if len(set(manifest.labels)) != len(manifest.labels):
        raise IntegrityError(f"{where}: labels: one of them is there twice")


def _check_text_and_depth(value: object) -> None:
    """Refuse what JSON can say and a manifest can't be written with again."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"{MAX_DEPTH} levels deep or more")
    json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is a ValueError


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"key {key!r} is repeated")
        mapping[key] = value
    return mapping


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")
