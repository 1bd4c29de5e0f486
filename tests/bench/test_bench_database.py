import dataclasses
import json
import multiprocessing
import sqlite3
from datetime import UTC, datetime, timedelta, timezone

import pytest

from edgetune.bench.database import (
    HostRatio,
    database_path,
    find,
    graph_key,
    host_name,
    host_ratio,
    record,
)
from edgetune.errors import ConfigError, IntegrityError, ResourceError
from edgetune.runtime.manifest import (
    Compatibility,
    DeviceClass,
    Evaluation,
    FileEntry,
    Goldens,
    Manifest,
    SessionSettings,
    TensorSpec,
)
from edgetune.runtime.measure import Machine, Measurement

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def manifest(graph="a", **changes):
    evaluation = Evaluation(split="test", samples=0, metrics={})
    return dataclasses.replace(
        Manifest(
            schema_version=1,
            name="name",
            release=1,
            task="image-classification",
            labels=("x", "y"),
            precision="fp32",
            profile="raspberry-pi-4",
            options={},
            inputs=(TensorSpec(name="image", dtype="uint8", shape=("batch", "h", "w", 3)),),
            outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 2)),),
            compatibility=Compatibility(onnxruntime_min="1.17.0", opset=17, ir_version=8),
            device=DeviceClass(arch="x86_64", cpu_features=(), int8="exact"),
            session=SessionSettings(intra_op_threads=4),
            evaluation=evaluation,
            reference=evaluation,
            goldens=Goldens(count=0, tolerance=0.0),
            files={
                "model.onnx": FileEntry(size=1, sha256=graph * 64),
                "weights.bin": FileEntry(size=1, sha256="b" * 64),
                "goldens.npz": FileEntry(size=1, sha256="c" * 64),
            },
            edgetune_version="0.1.0",
        ),
        **changes,
    )


def measurement(p50_ms=2.0, threads=4):
    machine = Machine(
        cpu_model="Raspberry Pi 4",
        cpu_features=("asimd",),
        cores=4,
        system="Linux",
        python="3.11.2",
        onnxruntime="1.31.1",
        load_average=(0.1, 0.2, 0.3),
        throttled=False,
        governor="ondemand",
    )
    return Measurement(
        threads=threads, samples=1, warmup=0, runs=10, latency_p50_ms=p50_ms,
        latency_p95_ms=p50_ms + 1, latency_p99_ms=p50_ms + 2, latency_mean_ms=p50_ms,
        latency_min_ms=p50_ms, throughput_per_s=1.0, load_ms=1.0, first_predict_ms=1.0,
        peak_rss_mib=80.5, machine=machine,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "measurements.sqlite"


def test_what_was_recorded_is_found_again(path):
    kept = record(
        measurement(), manifest(), profile="raspberry-pi-4", target="ssh://pi", path=path, now=NOON
    )
    assert find(graph_key(manifest()), profile="raspberry-pi-4", path=path) == kept
    assert (kept.latency_p50_ms, kept.latency_p95_ms, kept.peak_rss_mib) == (2.0, 3.0, 80.5)
    assert (kept.threads, kept.onnxruntime, kept.target) == (4, "1.31.1", "ssh://pi")
    assert kept.machine == measurement().machine
    assert kept.measured_at == "2026-01-02T12:00:00.000000+00:00"


def test_nothing_is_found_of_another_graph_profile_or_thread_count(path):
    key = graph_key(manifest())
    assert find(key, profile="raspberry-pi-4", path=path) is None
    assert not path.exists()
    record(measurement(threads=4), manifest(), profile="raspberry-pi-4", path=path)
    assert find(key, profile="raspberry-pi-5", path=path) is None
    assert find(graph_key(manifest("d")), profile="raspberry-pi-4", path=path) is None
    assert find(key, profile="raspberry-pi-4", threads=1, path=path) is None
    assert find(key, profile="raspberry-pi-4", threads=4, path=path) is not None


def test_the_newest_counts_whatever_zone_its_clock_was_in(path):
    east = timezone(timedelta(hours=5))
    for p50_ms, now in (
        (1.0, NOON),
        (2.0, datetime(2026, 1, 2, 17, 30, tzinfo=east)),  # 12:30 UTC
        (3.0, datetime(2026, 1, 2, 16, 30, tzinfo=east)),  # 11:30 UTC
    ):
        record(measurement(p50_ms), manifest(), profile="p", path=path, now=now)
    assert find(graph_key(manifest()), profile="p", path=path).latency_p50_ms == 2.0


def test_a_key_stands_for_what_changes_the_speed():
    key = graph_key(manifest())
    session = manifest().session
    assert graph_key(manifest(name="other", labels=("a", "b"), release=7)) == key
    threads = dataclasses.replace(session, intra_op_threads=1)
    assert graph_key(manifest(session=threads)) == key
    assert graph_key(manifest("d")) != key
    for change in (
        {"graph_optimization": "basic"},
        {"allow_spinning": True},
        {"config": {"session.x64quantprecision": "1"}},
        {"execution_providers": ("CUDAExecutionProvider",)},
    ):
        assert graph_key(manifest(session=dataclasses.replace(session, **change))) != key
    files = {**manifest().files, "weights.bin": FileEntry(size=1, sha256="e" * 64)}
    assert graph_key(manifest(files=files)) != key
    files = {**manifest().files, "goldens.npz": FileEntry(size=1, sha256="e" * 64)}
    assert graph_key(manifest(files=files)) == key


def test_the_host_ratio_is_the_median_over_graphs_that_both_ran(path):
    def both(graph, device_ms, host_ms, threads=4):
        for profile, p50_ms in (("pi", device_ms), ("host:mine", host_ms)):
            if p50_ms is not None:
                record(measurement(p50_ms, threads), manifest(graph), profile=profile, path=path)

    assert host_ratio("pi", host="host:mine", path=path) is None
    both("1", 10.0, None)
    both("2", None, 1.0)
    assert host_ratio("pi", host="host:mine", path=path) is None
    both("3", 99.0, 1.0)  # of old: the next one replaces it
    both("3", 8.0, 2.0)  # 4
    both("4", 30.0, 3.0)  # 10
    both("5", 12.0, 2.0)  # 6
    both("5", 16.0, 2.0, threads=1)  # 8: the graph counts once, with 7
    both("6", 50.0, None, threads=1)
    both("6", None, 1.0, threads=4)  # other threads are no pair
    assert host_ratio("pi", host="host:mine", path=path) == HostRatio(
        ratio=7.0, low=4.0, high=10.0, graphs=3
    )
    assert host_ratio("pi", host="host:other", path=path) is None


def test_the_file_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert database_path() == tmp_path / "mine" / "measurements.sqlite"
    monkeypatch.delenv("EDGETUNE_HOME")
    assert database_path() == tmp_path / "data" / "edgetune" / "measurements.sqlite"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert database_path() == tmp_path / ".local/share/edgetune/measurements.sqlite"


def test_a_host_name_has_the_cpu_in_it():
    assert host_name("Some CPU") == "host:Some CPU"
    assert host_name().startswith("host:")
    assert len(host_name()) > len("host:")


def test_a_newer_schema_is_refused_and_left_as_it_is(path):
    record(measurement(), manifest(), profile="p", path=path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="schema 2; this edgetune reads 1"):
        record(measurement(), manifest(), profile="p", path=path)
    with pytest.raises(ConfigError, match="schema 2"):
        find("x", profile="p", path=path)
    assert path.read_bytes() == before


def test_a_damaged_file_is_refused_and_left_as_it_is(path):
    path.parent.mkdir()
    path.write_bytes(b"no database " * 400)
    for attempt in (
        lambda: record(measurement(), manifest(), profile="p", path=path),
        lambda: find("x", profile="p", path=path),
        lambda: host_ratio("p", path=path),
    ):
        with pytest.raises(IntegrityError, match="damaged or no database") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"no database " * 400


def test_another_programs_database_is_refused(path):
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(IntegrityError, match="something else"):
        record(measurement(), manifest(), profile="p", path=path)
    with pytest.raises(IntegrityError, match="something else"):
        find("x", profile="p", path=path)


def test_a_damaged_row_is_named(path):
    record(measurement(), manifest(), profile="p", path=path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE measurements SET machine = ?", (json.dumps({"cores": "x"}),))
    connection.close()
    with pytest.raises(IntegrityError, match="machine"):
        find(graph_key(manifest()), profile="p", path=path)


def test_a_place_that_cannot_be_written_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be made"):
        record(measurement(), manifest(), profile="p", path=tmp_path / "file" / "x" / "m.sqlite")
    (tmp_path / "m.sqlite").mkdir()
    with pytest.raises(ResourceError, match=r"m\.sqlite"):
        record(measurement(), manifest(), profile="p", path=tmp_path / "m.sqlite")


def write_ten(path, writer):
    for number in range(10):
        record(measurement(1.0 + number), manifest(), profile=f"writer {writer}", path=path)


def test_processes_that_write_at_once_lose_nothing(path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_ten, args=(path, writer)) for writer in range(3)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    assert [process.exitcode for process in writers] == [0, 0, 0]
    with sqlite3.connect(path) as connection:
        counts = connection.execute(
            "SELECT profile, count(*) FROM measurements GROUP BY profile ORDER BY profile"
        ).fetchall()
    connection.close()
    assert counts == [(f"writer {writer}", 10) for writer in range(3)]
