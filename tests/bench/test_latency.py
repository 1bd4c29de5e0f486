import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from edgetune.bench import latency
from edgetune.bench.latency import BenchReport, bench
from edgetune.cli.bench import command
from edgetune.errors import ConfigError, DataError, EdgetuneError, IntegrityError, ResourceError
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.manifest import (
    Compatibility,
    DeviceClass,
    Evaluation,
    FileEntry,
    Goldens,
    Manifest,
    Metric,
    SessionSettings,
    TensorSpec,
    dump_manifest,
)
from edgetune.runtime.measure import Measurement
from edgetune.runtime.records import from_mapping, to_mapping

QUICK = {"runs": 10, "warmup": 1, "seconds": 1.0}


def write_graph(path):
    """The mean of each colour is the logit of its label."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "h", "w", 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["logits"], axes=[1, 2], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "mean", [image], [logits])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    write_graph(folder / "model.onnx")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.savez(
        folder / "goldens.npz",
        logits=images.mean((1, 2)).astype(np.float32),
        **{f"input_{i}": image for i, image in enumerate(images)},
    )
    files = {
        p.name: FileEntry(size=p.stat().st_size, sha256=hashlib.sha256(p.read_bytes()).hexdigest())
        for p in folder.iterdir()
    }
    evaluation = Evaluation(
        split="test", samples=3, metrics={"accuracy": Metric(value=1.0, low=0.4, high=1.0)}
    )
    manifest = Manifest(
        schema_version=1,
        name="mean-colour",
        release=1,
        task="image-classification",
        labels=("red", "green", "blue"),
        precision="fp32",
        profile="raspberry-pi-4",
        options={},
        inputs=(TensorSpec(name="image", dtype="uint8", shape=("batch", "h", "w", 3)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),),
        compatibility=Compatibility(onnxruntime_min="1.17.0", opset=17, ir_version=8),
        device=DeviceClass(arch="x86_64", cpu_features=(), int8="exact"),
        session=SessionSettings(intra_op_threads=1),
        evaluation=evaluation,
        reference=evaluation,
        goldens=Goldens(count=3, tolerance=0.01),
        files=files,
        edgetune_version="0.1.0",
    )
    (folder / "manifest.json").write_bytes(dump_manifest(manifest))
    return folder


@pytest.fixture(scope="module")
def report(bundle):
    return bench(bundle, **QUICK, cold_starts=2)


def test_a_report_says_what_was_measured_and_how(report):
    assert (report.bundle, report.task, report.precision) == (
        "mean-colour", "image-classification", "fp32",
    )  # fmt: skip
    assert report.profile == "raspberry-pi-4"
    assert report.profile_threads == report.measurement.threads == 1
    assert (report.measurement.runs, report.measurement.warmup) == (10, 1)
    assert report.measurement.samples == 3
    assert report.measurement.machine.onnxruntime == __import__("onnxruntime").__version__


def test_figures_of_a_fresh_process_are_in_order(report):
    measured = report.measurement
    assert 0 < measured.latency_min_ms <= measured.latency_p50_ms
    assert measured.latency_p50_ms <= measured.latency_p95_ms <= measured.latency_p99_ms
    # this process has onnxruntime loaded, the measuring one had not
    assert measured.import_ms > 10
    assert 10 < measured.rss_before_load_mib < measured.peak_rss_mib < 400


def test_cold_start_covers_import_load_and_first_answer(report):
    cold = report.cold_start
    assert len(cold.each_ms) == 2
    assert min(cold.each_ms) <= cold.median_ms <= max(cold.each_ms)
    assert cold.median_ms > 50  # Python and numpy alone take longer
    assert 10 < cold.peak_rss_mib < 400


def test_a_report_survives_json(report):
    plain = json.loads(json.dumps(to_mapping(report)))
    assert from_mapping(BenchReport, plain, where="report") == report


def test_threads_and_no_cold_start_as_asked_for(bundle):
    lines = []
    report = bench(bundle, **QUICK, threads=2, cold_starts=0, progress=lines.append)
    assert (report.measurement.threads, report.profile_threads) == (2, 1)
    assert report.cold_start is None
    assert lines == ["measuring mean-colour: 10 runs, 1 s at most"]


def test_the_entry_prints_one_json_object(bundle):
    done = subprocess.run(
        [sys.executable, "-m", "edgetune.runtime.measure", bundle, "--runs", "10",
         "--warmup", "0", "--seconds", "1"],
        capture_output=True, check=True,
    )  # fmt: skip
    plain = json.loads(done.stdout)
    assert plain["runs"] == 10
    assert set(plain) <= set(Measurement.__dataclass_fields__)


def test_an_image_file_can_be_the_sample(bundle, tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    report = bench(bundle, **QUICK, cold_starts=1, sample=str(tmp_path / "red.png"))
    assert report.measurement.samples == 1


def test_a_text_task_takes_a_text_or_a_file_with_one(bundle, tmp_path):
    opened = open_bundle(bundle)
    files = {**opened.manifest.files, "tokenizer.json": FileEntry(size=0, sha256="0" * 64)}
    text_bundle = dataclasses.replace(
        opened, manifest=dataclasses.replace(opened.manifest, files=files)
    )
    path = tmp_path / "sample.txt"
    path.write_text("Licht an, bitte! ü\n", encoding="utf-8")
    assert latency.read_sample(str(path), text_bundle) == "Licht an, bitte! ü"
    assert latency.read_sample("turn it on", text_bundle) == "turn it on"
    assert latency.read_sample("long " * 2000, text_bundle) == "long " * 2000
    assert latency.read_sample(None, text_bundle) is None
    assert latency.read_sample(str(path), opened) == str(path)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="is no UTF-8 text"):
        latency.read_sample(str(path), text_bundle)


def test_a_failing_child_gives_its_own_error(bundle):
    with pytest.raises(DataError, match=r"^absent\.png: no such file$"):
        bench(bundle, **QUICK, sample="absent.png")
    with pytest.raises(ConfigError, match=r"^runs: expected at least 10, got 3$"):
        bench(bundle, runs=3)


def test_no_bundle_is_an_integrity_error(tmp_path):
    with pytest.raises(IntegrityError, match="is no bundle"):
        bench(tmp_path)


@pytest.mark.parametrize(
    ("code", "stderr", "expected", "message"),
    [
        (3, "error: bad picture\n", DataError, "bad picture"),
        (6, "noise\nerror: hash differs\n\n", IntegrityError, "hash differs"),
        (1, "Traceback\nKeyError: 'x'\n", EdgetuneError, "KeyError: 'x'"),
        (77, "", EdgetuneError, "no message"),
        (-9, "", ResourceError, "died of signal 9; most often the memory ran out"),
        (-4, "", ResourceError, "died of signal 4; this onnxruntime does not suit the CPU"),
    ],
)
def test_an_exit_code_maps_to_its_error_class(code, stderr, expected, message):
    error = latency.child_error(code, stderr)
    assert type(error) is expected
    assert message in str(error)


def test_children_may_cache_their_bytecode(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("KEPT", "1")
    script = "import os, sys; print('PYTHONDONTWRITEBYTECODE' in os.environ, os.environ['KEPT'])"
    assert latency.run_child(["-c", script]).split() == ["False", "1"]
    assert os.environ["PYTHONDONTWRITEBYTECODE"] == "1"


def test_the_table_names_the_threads_and_the_cpu_it_is_not(bundle):
    result = CliRunner().invoke(
        command, [str(bundle), "--runs", "10", "--seconds", "1", "--cold-starts", "1"]
    )
    assert result.exit_code == 0, result.output
    assert "threads as profile raspberry-pi-4 says: 1" in result.stdout
    assert "not on a raspberry-pi-4" in result.stdout
    for row in ("latency p50", "latency p99", "throughput", "cold start", "memory peak"):
        assert row in result.stdout
    assert "measuring mean-colour" in result.stderr
    assert "measuring" not in result.stdout


def test_json_output_is_one_object_and_nothing_else(bundle):
    arguments = [str(bundle), "--runs", "10", "--seconds", "1", "--cold-starts", "0", "--json"]
    result = CliRunner().invoke(command, [*arguments, "--threads", "2"])
    assert json.loads(result.stdout)["measurement"]["threads"] == 2
