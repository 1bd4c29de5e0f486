"""What a device has predicted of late: counts, latency, scores and drift, in a bounded file.

One JSON line a window, in two files that together never outgrow `max_bytes`: `telemetry.jsonl` is
written; where it is full it becomes `telemetry.1.jsonl`, and what was that goes. A line that a
power cut tore is skipped when read. Nothing of the inputs is stored unless it is asked for, and
nothing is sent. A disk that is full or can't be written never stops a prediction.
"""

import contextlib
import json
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from edgetune.errors import ConfigError, DataError, IntegrityError
from edgetune.runtime.bundle import Bundle
from edgetune.runtime.drift import CLASSES, Baseline, bundle_baseline
from edgetune.runtime.records import from_mapping, to_mapping
from edgetune.runtime.tasks import has_classes

FILE_NAME = "telemetry.jsonl"
SCHEMA_VERSION = 1
MAX_BYTES = 2**20
LEAST_BYTES = 4096
# predictions a line where there is no baseline, whose own window it would be
WINDOW = 256
FLUSH_SECONDS = 600.0
SCORE_BINS = 10
# ten buckets a decade from a microsecond to a thousand seconds; each is 26 % wide
BUCKETS_PER_DECADE = 10
SHORTEST_S = 1e-6
LAST_BUCKET = 90
MAX_INPUT_CHARACTERS = 500
# so many windows are looked at together, and so improbable must their alarms be, to speak of
# drift rather than of the alarms that come by chance
RECENT_WINDOWS = 10
IMPROBABLE = 1e-3
# seconds since 1970: the year 9000
LATEST = 2.2e11


@dataclass(frozen=True, kw_only=True)
class WatchLine:
    """One line: what was predicted between `start` and `end`, seconds since 1970.

    bundle: digest of its manifest. predictions: how many. classes: label -> count. scores: of
    each tenth of [0, 1]. latency: bucket -> calls of the graph; see `latency_bucket`. statistics,
    alarms: of the window that ended with this line; None where none did. false_alarms: share of
    windows that alarm by chance. lost: predictions whose lines could not be written so far.
    inputs: kept where asked for, those of the lowest scores.
    """

    version: int = SCHEMA_VERSION
    bundle: str
    start: float
    end: float
    predictions: int
    classes: dict[str, int]
    scores: tuple[int, ...]
    latency: dict[str, int]
    statistics: dict[str, float] | None = None
    alarms: tuple[str, ...] = ()
    false_alarms: float | None = None
    lost: int = 0
    inputs: tuple[str, ...] = ()


class Watch:
    """Collects predictions and writes a line a window. May be used from several threads.

    One process writes one folder: two would take each other's place in the ring.
    """

    def __init__(
        self,
        path: str | Path,
        digest: str,
        labels: Sequence[str],
        *,
        baseline: Baseline | None = None,
        window: int = WINDOW,
        max_bytes: int = MAX_BYTES,
        flush_seconds: float = FLUSH_SECONDS,
        keep_inputs: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Watch predictions of one bundle; `Watch.open` takes the rest from it.

        Args:
            path: a folder, or a file that ends in ".jsonl".
            digest: of the bundle's manifest.
            labels: of the bundle.
            baseline: what the predictions are held against; its window counts, then.
            window: predictions a line.
            max_bytes: that both files may take together, 4096 or more.
            flush_seconds: a line is written at the next prediction after so long, however few
                predictions it has.
            keep_inputs: how many inputs of the lowest scores to store with each line; texts and
                paths only.
            clock: seconds since 1970.

        Raises:
            ConfigError: a number is too small.
        """
        self._size = baseline.window if baseline else window
        if self._size < 1 or max_bytes < LEAST_BYTES or keep_inputs < 0:
            raise ConfigError(
                f"watch: expected a window of 1 or more, {LEAST_BYTES} bytes or more and 0 or more"
                f" inputs, got {self._size}, {max_bytes} and {keep_inputs}"
            )
        self.path = watch_file(path)
        self.lost = 0
        self._digest, self._plain_size, self._factory_baseline = digest, window, baseline
        self._half, self._flush, self._keep = max_bytes // 2, flush_seconds, keep_inputs
        self._clock = clock
        self._collecting, self._writing = threading.Lock(), threading.Lock()
        self._hold_against(labels, baseline)

    def use_labels(self, labels: Sequence[str], *, learned: bool) -> None:
        """Note answers of these labels from now on, after writing what was noted before.

        The baseline describes what the bundle answered as it came: once that has learned, its
        answers are counted and no longer held against it.
        """
        self.close()
        with self._collecting:
            self._hold_against(labels, None if learned else self._factory_baseline)

    def _hold_against(self, labels: Sequence[str], baseline: Baseline | None) -> None:
        self._labels, self._baseline = tuple(labels), baseline
        self._index = {label: i for i, label in enumerate(labels)}
        self._wide = baseline.space.mean.shape[0] if baseline and baseline.space else 0
        self._size = baseline.window if baseline else self._plain_size
        self._window = _Window(self._size, self._wide)
        self._line = _Line()

    @classmethod
    def open(
        cls,
        path: str | Path,
        bundle: Bundle,
        *,
        keep_inputs: int = 0,
        labels: Sequence[str] | None = None,
    ) -> Self:
        """Watch what a bundle predicts, against the baseline that it carries, if any.

        Args:
            path: a folder, or a file that ends in ".jsonl".
            bundle: that predicts.
            keep_inputs: as of `Watch`.
            labels: that it has learned to answer; None: it answers as it came.

        Raises:
            IntegrityError: its baseline can't be read or is another graph's.
            ConfigError: `path` is neither a folder nor a .jsonl file, and can't become one, or the
                bundle's task gives no one class a sample.
        """
        if not has_classes(bundle.manifest.task):
            raise ConfigError(
                f"watch: task {bundle.manifest.task} gives no one class a sample, so there is"
                " nothing to watch it by; leave watch out"
            )
        _check_place(watch_file(path))
        baseline = bundle_baseline(bundle)
        digest = bundle.manifest.digest
        watch = cls(
            path, digest, bundle.manifest.labels, baseline=baseline, keep_inputs=keep_inputs
        )
        if labels is not None:
            watch.use_labels(labels, learned=True)
        return watch

    def record(
        self,
        outputs: Mapping[str, npt.NDArray[Any]],
        results: Sequence[Any],
        seconds: float,
        inputs: Sequence[Any] = (),
    ) -> None:
        """Note a batch's predictions. It writes a line now and then, and raises no OSError.

        Args:
            outputs: of the graph; `features`, (batch, features), is looked at.
            results: a `Classification` a sample.
            seconds: that the graph's call took.
            inputs: the samples, of which some are stored where that was asked for.
        """
        features = outputs.get("features") if self._wide else None
        if self._wide and (features is None or features.shape != (len(results), self._wide)):
            raise IntegrityError(f"the graph gives no features of width {self._wide}")
        due = []
        with self._collecting:
            now = self._clock()
            line, window = self._line, self._window
            if window.count == line.first:
                line.start = now
            bucket = latency_bucket(seconds)
            line.latency[bucket] = line.latency.get(bucket, 0) + 1
            for row, result in enumerate(results):
                at = window.count
                window.classes[at] = self._index[result.label]
                window.scores[at] = result.score
                if features is not None:
                    window.features[at] = features[row]
                if self._keep and row < len(inputs) and isinstance(inputs[row], str | Path):
                    line.inputs.append((result.score, str(inputs[row])[:MAX_INPUT_CHARACTERS]))
                window.count = at + 1
                if window.count == self._size:
                    due.append((line, window, window.count, now))
                    line = self._line = _Line(start=now)
                    window = self._window = _Window(self._size, self._wide)
            # a clock that was set back has no say of how long it has been
            if not 0 <= now - line.start < self._flush and window.count > line.first:
                due.append((line, window, window.count, now))
                self._line = _Line(start=now, first=window.count)
        for one in due:
            self._write(*one)

    def close(self) -> None:
        """Write what has not been written yet; more may be recorded after."""
        with self._collecting:
            line, window, now = self._line, self._window, self._clock()
            count = window.count
            self._line = _Line(start=now, first=count)
        if count > line.first:
            self._write(line, window, count, now)

    def _write(self, line: "_Line", window: "_Window", last: int, now: float) -> None:
        statistics: dict[str, float] | None = None
        alarms: tuple[str, ...] = ()
        if last == self._size and self._baseline:
            features = window.features if self._wide else None
            statistics = self._baseline.measure(features, window.scores, window.classes)
            alarms = self._baseline.alarms(statistics)
        classes = np.bincount(window.classes[line.first : last], minlength=len(self._labels))
        tenths = (window.scores[line.first : last] * SCORE_BINS).astype(np.int64)
        scores = np.bincount(np.clip(tenths, 0, SCORE_BINS - 1), minlength=SCORE_BINS)
        with self._writing:
            record = WatchLine(
                bundle=self._digest,
                start=round(line.start, 3),
                end=round(now, 3),
                predictions=last - line.first,
                classes={self._labels[i]: int(classes[i]) for i in np.flatnonzero(classes)},
                scores=tuple(scores.tolist()),
                latency={str(bucket): line.latency[bucket] for bucket in sorted(line.latency)},
                statistics=statistics and {k: float(f"{v:.5g}") for k, v in statistics.items()},
                alarms=alarms,
                false_alarms=self._baseline.false_alarms if self._baseline else None,
                lost=self.lost,
                inputs=tuple(text for _, text in sorted(line.inputs)[: self._keep]),
            )
            data = json.dumps(to_mapping(record), ensure_ascii=False, separators=(",", ":"))
            try:
                append_line(self.path, data.encode(errors="replace") + b"\n", self._half)
            except OSError as error:
                self._lose(record.predictions, error)

    def _lose(self, predictions: int, error: OSError) -> None:
        if not self.lost:
            # no warning: where warnings are errors, that would stop the prediction
            import logging

            logging.getLogger(__name__).warning(
                "%s: cannot be written, predictions go on unwatched: %s", self.path, error
            )
        self.lost += predictions


class _Window:
    """The predictions of a window, so far."""

    def __init__(self, size: int, features: int) -> None:
        self.features = np.empty((size, features), np.float32)
        self.scores = np.empty(size, np.float32)
        self.classes = np.empty(size, np.int64)
        self.count = 0


@dataclass
class _Line:
    """What the next line says besides; its predictions are the window's from `first` on."""

    start: float = 0.0
    first: int = 0
    latency: dict[int, int] = field(default_factory=dict)
    inputs: list[tuple[float, str]] = field(default_factory=list)


def watch_file(path: str | Path) -> Path:
    """Return the file that is written, given that or its folder."""
    path = Path(path)
    return path if path.suffix == ".jsonl" else path / FILE_NAME


def _check_place(path: Path) -> None:
    """Make the folder of `path`.

    Raises:
        ConfigError: a file is in its way, or it can't be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        wrong = path.is_dir()
    except (OSError, ValueError) as error:
        raise ConfigError(f"watch: {path.parent}: cannot be a folder: {error}") from error
    if wrong:
        raise ConfigError(f"watch: {path}: is a folder; expected a .jsonl file")


def _older(path: Path) -> Path:
    return path.with_suffix(".1.jsonl")


def append_line(path: Path, line: bytes, most: int) -> None:
    """Append a line to `path`, which moves aside first where it would outgrow `most` bytes.

    Raises:
        OSError: it can't be written, or is longer than `most`; nothing of it is left then, if
            the disk allows.
    """
    if len(line) + 1 > most:
        raise OSError(f"a line of {len(line)} bytes, and {most} are allowed")
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    if size > most:  # was allowed more once
        path.unlink()
    elif size + len(line) + 1 > most:
        path.replace(_older(path))
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o600)
    try:
        size = os.fstat(handle).st_size
        if size:
            os.lseek(handle, size - 1, os.SEEK_SET)
            if os.read(handle, 1) != b"\n":  # torn by a power cut: it ends here
                line = b"\n" + line
        try:
            if os.write(handle, line) != len(line):
                raise OSError("no space left for a whole line")
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def read_watch(path: str | Path, *, bundle: str = "") -> Iterator[WatchLine]:
    """Yield the lines of a folder or a file, oldest first; one that was torn is left out.

    Args:
        path: what `Watch` was given.
        bundle: digest of the only bundle to look at, or its beginning.

    Raises:
        DataError: there is no such file.
    """
    current = watch_file(path)
    found = [file for file in (_older(current), current) if file.is_file()]
    if not found:
        raise DataError(f"{current}: no such file; name the folder that was watched into")
    # both are opened before one is read: the writer may move them meanwhile
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(file.open("rb")) for file in found]
        contents = {file: stream.read() for file, stream in zip(found, opened, strict=True)}
    for file, data in contents.items():
        for line in data.splitlines():
            try:
                record = from_mapping(WatchLine, json.loads(line), where=str(file), error=DataError)
            except (ValueError, RecursionError, DataError):
                continue
            if _sound(record) and record.bundle.startswith(bundle):
                yield record


def _sound(line: WatchLine) -> bool:
    """Say whether a line's numbers are such as `Watch` writes."""
    buckets = {str(bucket) for bucket in range(LAST_BUCKET + 1)}
    return (
        line.version == SCHEMA_VERSION
        and line.latency.keys() <= buckets
        and 0 <= line.start < LATEST
        and 0 <= line.end < LATEST
        and min(line.latency.values(), default=0) >= 0
        and min(line.classes.values(), default=0) >= 0
        and line.predictions >= 0
        and line.lost >= 0
        and (line.false_alarms is None or 0 < line.false_alarms < 1)
    )


def latency_bucket(seconds: float) -> int:
    """Return the bucket of a latency: i holds 1 us * 10^(i/10) to 1 us * 10^((i + 1)/10)."""
    if not seconds > SHORTEST_S:
        return 0
    return int(min(BUCKETS_PER_DECADE * math.log10(seconds / SHORTEST_S), LAST_BUCKET))


def latency_quantile_ms(latency: Mapping[int, int], share: float) -> float:
    """Return a quantile of the calls' latency in ms: the geometric middle of its bucket."""
    wanted, seen = share * sum(latency.values()), 0
    bucket = 0
    for bucket in sorted(latency):
        seen += latency[bucket]
        if seen >= wanted:
            break
    return float(1e3 * SHORTEST_S * 10 ** ((bucket + 0.5) / BUCKETS_PER_DECADE))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the lines of one bundle say together.

    start, end: seconds since 1970. windows: that were held against the baseline. classes:
    label -> predictions. alarms: statistic -> windows that it alarmed in. expected: windows that
    alarm by chance, of the inputs. drift_since, classes_since: when the alarms began that are too
    many for chance and go on at the end; None where there are none. baseline: the bundle has one,
    so that its windows can be held against it.
    """

    bundle: str
    start: float
    end: float
    predictions: int
    lost: int
    windows: int
    latency_p50_ms: float
    latency_p95_ms: float
    classes: dict[str, int]
    scores: tuple[int, ...]
    alarms: dict[str, int]
    alarmed: int
    expected: float
    baseline: bool
    drift_since: float | None = None
    drift_statistics: tuple[str, ...] = ()
    classes_since: float | None = None


def summarize(lines: Iterable[WatchLine]) -> list[Summary]:
    """Return a summary a bundle, the one that predicted last at the end."""
    by_bundle: dict[str, list[WatchLine]] = {}
    for line in lines:
        by_bundle.setdefault(line.bundle, []).append(line)
    found = [_summary(sorted(group, key=lambda line: line.end)) for group in by_bundle.values()]
    return sorted(found, key=lambda summary: summary.end)


def _summary(lines: Sequence[WatchLine]) -> Summary:
    latency: Counter[int] = Counter()
    classes: Counter[str] = Counter()
    alarms: Counter[str] = Counter()
    for line in lines:
        latency.update({int(bucket): calls for bucket, calls in line.latency.items()})
        classes.update(line.classes)
        alarms.update(line.alarms)
    windows = [line for line in lines if line.statistics is not None]
    drift = _Streak()
    mix = _Streak()
    for line in windows:
        drift.add(line, [name for name in line.alarms if name != CLASSES])
        mix.add(line, [name for name in line.alarms if name == CLASSES])
    return Summary(
        bundle=lines[0].bundle,
        start=min(line.start for line in lines),
        end=lines[-1].end,
        predictions=sum(line.predictions for line in lines),
        lost=_lost(lines),
        windows=len(windows),
        latency_p50_ms=latency_quantile_ms(latency, 0.50),
        latency_p95_ms=latency_quantile_ms(latency, 0.95),
        classes=dict(classes.most_common()),
        scores=tuple(sum(column) for column in zip(*(line.scores for line in lines), strict=False)),
        alarms=dict(alarms.most_common()),
        alarmed=sum(any(name != CLASSES for name in line.alarms) for line in windows),
        expected=sum(line.false_alarms or 0.0 for line in windows),
        baseline=lines[-1].false_alarms is not None,
        drift_since=drift.since,
        drift_statistics=drift.statistics(),
        classes_since=mix.since,
    )


def _lost(lines: Sequence[WatchLine]) -> int:
    """Return how many predictions were lost: each process counts its own, from nothing up."""
    total = before = 0
    for line in lines:
        total += line.lost - before if line.lost >= before else line.lost
        before = line.lost
    return total


class _Streak:
    """Tells alarms that are too many for chance from those that are not, window by window."""

    def __init__(self) -> None:
        self.recent: deque[tuple[WatchLine, list[str]]] = deque(maxlen=RECENT_WINDOWS)
        self.since: float | None = None

    def add(self, line: WatchLine, alarms: list[str]) -> None:
        self.recent.append((line, alarms))
        alarmed = [one for one, names in self.recent if names]
        rate = line.false_alarms or 0.0
        if chance(len(alarmed), len(self.recent), rate) >= IMPROBABLE:
            self.since = None
        elif self.since is None:
            self.since = alarmed[0].start

    def statistics(self) -> tuple[str, ...]:
        if self.since is None:
            return ()
        return tuple(
            n for n, _ in Counter(n for _, names in self.recent for n in names).most_common()
        )


def chance(alarmed: int, windows: int, rate: float) -> float:
    """Return the probability of so many alarms or more by chance, the windows independent."""
    return sum(
        math.comb(windows, k) * rate**k * (1 - rate) ** (windows - k)
        for k in range(alarmed, windows + 1)
    )
