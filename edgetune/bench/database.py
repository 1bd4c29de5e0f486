"""What was measured, kept: one SQLite file of this user's.

A graph is known by its files' hashes and the session settings that change its speed, so a
bundle that is exported again with the same graph finds what was measured of it before. Each
measurement stands under a profile's name; those of this machine under "host:" and its CPU.
"""

import hashlib
import json
import os
import sqlite3
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edgetune.errors import ConfigError, IntegrityError, ResourceError
from edgetune.runtime.bundle import GRAPH_NAME, WEIGHTS_NAME
from edgetune.runtime.device import cpu_model
from edgetune.runtime.manifest import Manifest
from edgetune.runtime.measure import Machine, Measurement
from edgetune.runtime.records import from_mapping, to_mapping

SCHEMA_VERSION = 1
FILE_NAME = "measurements.sqlite"
# how long to wait for another process that writes
BUSY_S = 30.0
_SCHEMA = """\
CREATE TABLE measurements (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    profile TEXT NOT NULL,
    threads INTEGER NOT NULL,
    target TEXT NOT NULL,
    bundle TEXT NOT NULL,
    latency_p50_ms REAL NOT NULL,
    latency_p95_ms REAL NOT NULL,
    peak_rss_mib REAL,
    onnxruntime TEXT NOT NULL,
    machine TEXT NOT NULL,
    measured_at TEXT NOT NULL
)"""
_INDEX = "CREATE INDEX by_graph ON measurements (key, profile, threads)"
_COLUMNS = (
    "key, profile, threads, target, bundle, latency_p50_ms, latency_p95_ms, peak_rss_mib,"
    " onnxruntime, machine, measured_at"
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measurement as it is kept; `measured_at` is UTC, ISO 8601.

    `target` is where it was taken, as a URL; "" is this machine.
    """

    key: str
    profile: str
    threads: int
    target: str
    bundle: str
    latency_p50_ms: float
    latency_p95_ms: float
    peak_rss_mib: float | None
    onnxruntime: str
    machine: Machine
    measured_at: str


@dataclass(frozen=True, kw_only=True)
class HostRatio:
    """How many times this machine's latency a device needs: the median over `graphs` graphs.

    An estimate, and to be called so: `low` and `high` are the smallest and largest ratio.
    """

    ratio: float
    low: float
    high: float
    graphs: int


def database_path() -> Path:
    """Return where measurements are kept: $EDGETUNE_HOME, else the user's data folder.

    Source: XDG Base Directory Specification; a path there that is not absolute is ignored.
    """
    if home := os.environ.get("EDGETUNE_HOME"):
        return Path(home) / FILE_NAME
    data = os.environ.get("XDG_DATA_HOME", "")
    base = Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share"
    return base / "edgetune" / FILE_NAME


def host_name(cpu: str | None = None) -> str:
    """Return the name that measurements of a CPU stand under; this machine's by default."""
    return f"host:{cpu or cpu_model()}"


def graph_key(manifest: Manifest) -> str:
    """Return a SHA-256 of what decides the graph's speed on a given machine.

    The graph's and the weights' hashes and the session's settings; the number of threads is no
    part of it, nor are labels, metrics or the name.
    """
    session = to_mapping(manifest.session)
    for apart in ("intra_op_threads", "max_batch"):
        session.pop(apart, None)
    files = {
        name: manifest.files[name].sha256
        for name in (GRAPH_NAME, WEIGHTS_NAME)
        if name in manifest.files
    }
    canonical = json.dumps({"files": files, "session": session}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def record(
    measurement: Measurement,
    manifest: Manifest,
    *,
    profile: str,
    target: str = "",
    path: Path | None = None,
    now: datetime | None = None,
) -> Measured:
    """Keep a measurement of the bundle that `manifest` describes, and return it as it is kept.

    Args:
        measurement: what was measured, of the bundle's own samples.
        manifest: the bundle's.
        profile: the name of the device's profile, or `host_name()`.
        target: where it was taken, as a URL; "" is this machine.
        path: the database, else `database_path()`; made where it is absent.
        now: the time to write, with its time zone; else the clock's.

    Raises:
        ConfigError: the database is of a newer edgetune.
        IntegrityError: the file is damaged or is no database of edgetune's.
        ResourceError: it cannot be written, or others kept it busy too long.
    """
    kept = Measured(
        key=graph_key(manifest),
        profile=profile,
        threads=measurement.threads,
        target=target,
        bundle=manifest.name,
        latency_p50_ms=measurement.latency_p50_ms,
        latency_p95_ms=measurement.latency_p95_ms,
        peak_rss_mib=measurement.peak_rss_mib,
        onnxruntime=measurement.machine.onnxruntime,
        machine=measurement.machine,
        measured_at=(now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="microseconds"),
    )
    place = path or database_path()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{place.parent}: cannot be made: {error.strerror}") from error
    with _transaction(place, "IMMEDIATE") as connection:
        connection.execute(
            f"INSERT INTO measurements ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                kept.key, kept.profile, kept.threads, kept.target, kept.bundle,
                kept.latency_p50_ms, kept.latency_p95_ms, kept.peak_rss_mib, kept.onnxruntime,
                json.dumps(to_mapping(kept.machine)), kept.measured_at,
            ),
        )  # fmt: skip
    return kept


def find(
    key: str, *, profile: str, threads: int | None = None, path: Path | None = None
) -> Measured | None:
    """Return the newest measurement of the graph `key` under `profile`, or None.

    Args:
        key: of `graph_key`.
        profile: the name it was recorded under.
        threads: only with so many threads; any number by default.
        path: the database, else `database_path()`; none is made.

    Raises:
        ConfigError, IntegrityError, ResourceError: as `record`.
    """
    place = path or database_path()
    if _is_empty(place):
        return None
    with _transaction(place, "DEFERRED") as connection:
        row = connection.execute(
            f"SELECT {_COLUMNS} FROM measurements WHERE key = ?1 AND profile = ?2"
            " AND (?3 IS NULL OR threads = ?3) ORDER BY measured_at DESC, id DESC LIMIT 1",
            (key, profile, threads),
        ).fetchone()
    return None if row is None else _measured(row, place)


def host_ratio(
    profile: str, *, host: str | None = None, path: Path | None = None
) -> HostRatio | None:
    """Compare a device with this machine by the graphs that both ran; None where there are none.

    The newest median latencies with equal numbers of threads are divided; where a graph was
    measured with several numbers, the median of its ratios counts once.

    Args:
        profile: the device's profile.
        host: the name of this machine's measurements, else `host_name()`.
        path: the database, else `database_path()`; none is made.

    Raises:
        ConfigError, IntegrityError, ResourceError: as `record`.
    """
    place = path or database_path()
    if _is_empty(place):
        return None
    with _transaction(place, "DEFERRED") as connection:
        device = _newest(connection, profile)
        here = _newest(connection, host or host_name())
    ratios = defaultdict(list)
    for (key, threads), latency_ms in device.items():
        if (key, threads) in here:
            ratios[key].append(latency_ms / here[key, threads])
    if not ratios:
        return None
    each = [statistics.median(of_graph) for of_graph in ratios.values()]
    return HostRatio(ratio=statistics.median(each), low=min(each), high=max(each), graphs=len(each))


def _newest(connection: sqlite3.Connection, profile: str) -> dict[tuple[str, int], float]:
    """Return (key, threads) -> the newest median latency in ms."""
    rows = connection.execute(
        "SELECT key, threads, latency_p50_ms FROM measurements WHERE profile = ?"
        " ORDER BY measured_at, id",
        (profile,),
    )
    return {(key, threads): latency_ms for key, threads, latency_ms in rows}


def _is_empty(path: Path) -> bool:
    """Say whether there is nothing to read: no file, or one that a first writer just made."""
    try:
        return path.stat().st_size == 0
    except FileNotFoundError:
        return True
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}") from error


@contextmanager
def _transaction(path: Path, kind: str) -> Iterator[sqlite3.Connection]:
    """Open the database, begin, and commit when the block ends; an error takes all back."""
    try:
        # "delete", the default journal, works on a home folder that lies on a file server too
        with closing(sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)) as connection:
            connection.execute(f"BEGIN {kind}")
            _check_schema(connection, path, create=kind == "IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        raise ResourceError(f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise IntegrityError(
            f"{path}: is damaged or no database ({error}); move it away, and a new one is made"
        ) from error


def _check_schema(connection: sqlite3.Connection, path: Path, *, create: bool) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"{path}: schema {version}; this edgetune reads {SCHEMA_VERSION}; use the newer"
            " edgetune that wrote it, or set EDGETUNE_HOME to another folder"
        )
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables or not create:
        raise IntegrityError(
            f"{path}: is a database of something else; set EDGETUNE_HOME to another folder"
        )
    connection.execute(_SCHEMA)
    connection.execute(_INDEX)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _measured(row: tuple[object, ...], path: Path) -> Measured:
    fields = dict(zip(_COLUMNS.split(", "), row, strict=True))
    try:
        machine = json.loads(str(fields["machine"]))
    except ValueError as error:
        raise IntegrityError(f"{path}: machine: is no JSON: {error}") from error
    return from_mapping(
        Measured,
        {**fields, "machine": machine},
        where=str(path),
        error=IntegrityError,
    )
