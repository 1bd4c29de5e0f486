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
from typing import Any, Literal

from edgetune.errors import IntegrityError
from edgetune.runtime.records import from_mapping, to_mapping

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 * 2**20
MAX_DEPTH = 32
# values in all: each takes some hundred bytes of memory, whatever it takes in the file
MAX_VALUES = 2**18
MAX_FILES = 63
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
# names are flat: no folder, no dot at either end, nothing that a shell, a zip or a file system
# could turn against us
FILE_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")
# what Windows opens as a device, whatever follows the first dot
DEVICE_NAME = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)
# the session options that a bundle may set: none names a file, loads code or writes anything
# (onnxruntime_session_options_config_keys.h has all)
SESSION_KEYS = frozenset(
    {
        "session.x64quantprecision",
        "session.disable_prepacking",
        "session.disable_quant_qdq",
        "session.disable_double_qdq_remover",
        "session.enable_quant_qdq_cleanup",
        "session.disable_cpu_ep_fallback",
        "session.dynamic_block_base",
        "session.set_denormal_as_zero",
        "mlas.enable_gemm_fastmath_arm64_bfloat16",
    }
)


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

    `arena` is onnxruntime's own pool of memory: faster, but what it once took it keeps.
    `max_batch` is 1 where the graph quantizes activations at run time: their scale is taken
    over the whole batch, so one sample's answer would depend on its neighbours.
    """

    execution_providers: tuple[str, ...] = ("CPUExecutionProvider",)
    intra_op_threads: int = 1
    allow_spinning: bool = False
    arena: bool = True
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
class Calibration:
    """The temperature that makes scores probabilities: softmax(logits / temperature).

    ece_before, ece_after: expected calibration error without and with it, shares in [0, 1], on
    samples held out of its fit. samples: that it was fitted to.

    Source: Guo et al. 2017 (arXiv:1706.04599), section 4.2.
    """

    temperature: float
    ece_before: float
    ece_after: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class Abstention:
    """The score below which an answer is marked as abstained, and what it rests on.

    accuracy: of the answers kept, as asked for; low: its 95 % lower confidence bound. coverage:
    the share of the samples that was kept; samples: how many there were.
    """

    threshold: float
    accuracy: float
    low: float
    coverage: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class Goldens:
    """The self-test: how many samples there are, how far an output may be from the stored one."""

    count: int
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """What `train.onnx` trains, and how far it was from torch when it was made.

    method: "head", "last:2", "norm", "bias:1", "lora", ... trainable: inputs of the inference
    graph that have defaults; a dimension "classes" grows with the labels. inputs: raw inputs that
    the step takes. latents: outputs of the inference graph that it takes. decayed: the trainable
    ones that weight decay shrinks. gradients: what goes back through int8 weights.
    checked_steps, worst_gradient: steps compared, and the largest relative error of a gradient.
    """

    method: str
    optimizer: Literal["adamw", "sgd"]
    gradients: Literal["float32", "int8"]
    trainable: tuple[TensorSpec, ...]
    inputs: tuple[str, ...]
    latents: tuple[TensorSpec, ...]
    decayed: tuple[str, ...]
    checked_steps: int
    worst_gradient: float


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
    training: TrainingStep | None = None
    calibration: Calibration | None = None
    abstention: Abstention | None = None
    overrides: tuple[str, ...] = ()
    edgetune_version: str
    digest: str = ""


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """Parse and check the bytes of manifest.json, at most MAX_MANIFEST_BYTES.

    Raises:
        IntegrityError: they are no JSON, ill-typed, of an unknown schema, were edited after they
            were made, name a file that a bundle cannot have, or a value is out of bounds.
    """
    try:
        # no value goes without one of these before it; those inside strings count too
        if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        mapping = json.loads(
            data.decode(),  # bytes may be UTF-16 to json
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
            f"{where}: bundle schema {version!r:.80}; this edgetune reads {SCHEMA_VERSION};"
            " use the edgetune version that wrote the bundle, or a newer one"
        )
    manifest = from_mapping(Manifest, mapping, where=where, error=IntegrityError)
    stated = mapping.pop("digest", "")
    if stated != _digest(mapping):
        raise IntegrityError(f"{where}: was changed after it was made (its digest does not match)")
    _check_files(manifest.files, where)
    _check_values(manifest, where)
    return manifest


def dump_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of manifest.json, its digest filled in; same record, same bytes."""
    mapping = to_mapping(manifest)
    mapping.pop("digest", None)
    mapping["digest"] = _digest(mapping)
    return (json.dumps(mapping, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def release_numbers(version: str) -> tuple[int, int, int]:
    """Return the release numbers of a version: "1.20.1rc2+cu12" -> (1, 20, 1)."""
    # int() refuses thousands of digits
    match = re.match(r"([0-9]{1,9})(?:\.([0-9]{1,9}))?(?:\.([0-9]{1,9}))?", version)
    major, minor, patch = match.groups() if match else (0, 0, 0)
    return int(major or 0), int(minor or 0), int(patch or 0)


def _digest(mapping: dict[str, Any]) -> str:
    canonical = json.dumps(mapping, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _check_files(files: dict[str, FileEntry], where: str) -> None:
    if len(files) > MAX_FILES:
        raise IntegrityError(f"{where}: files: {len(files)}, allowed {MAX_FILES}")
    for name, entry in files.items():
        allowed = FILE_NAME.fullmatch(name) and not DEVICE_NAME.fullmatch(name)
        if not allowed or name.lower() == MANIFEST_NAME:
            raise IntegrityError(f"{where}: {name!r:.200} is no name that a bundle's file may have")
        if entry.size < 0 or not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
            raise IntegrityError(f"{where}: {name}: size or sha256 is malformed")
    if len({name.lower() for name in files}) < len(files):
        raise IntegrityError(f"{where}: files: two names differ only in upper and lower case")


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
    for key in manifest.session.config:
        if key not in SESSION_KEYS:
            raise IntegrityError(
                f"{where}: session: config: {key!r:.200} is no option that a bundle may set"
            )
    if len(set(manifest.labels)) != len(manifest.labels):
        raise IntegrityError(f"{where}: labels: one of them is there twice")
    ranges: dict[str, tuple[float, float, float]] = {}
    if (found := manifest.calibration) is not None:
        ranges["calibration: temperature"] = (found.temperature, MIN_TEMPERATURE, MAX_TEMPERATURE)
    if (kept := manifest.abstention) is not None:
        ranges["abstention: threshold"] = (kept.threshold, 0.0, 1.0)
    for key, (number, start, end) in ranges.items():
        if not start <= number <= end:
            raise IntegrityError(f"{where}: {key}: expected {start:g} to {end:g}, got {number:g}")


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
            raise ValueError(f"key {key!r:.200} is repeated")
        mapping[key] = value
    return mapping


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.80} is too large")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")
