"""Every row of the task table goes from data to device."""

import csv
import dataclasses
import filecmp
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from edgetune.bench.database import host_name, record
from edgetune.bench.evaluate import answer_run, evaluate
from edgetune.cli.eval import command as eval_command
from edgetune.config import TrainConfig
from edgetune.errors import ConfigError, GateError
from edgetune.export import ExportResult, export
from edgetune.export.rungs import RUNGS, rungs_for
from edgetune.export.workshop import Built
from edgetune.profile import load_profile
from edgetune.runtime import EdgeModel
from edgetune.runtime.bundle import file_sha256, open_bundle
from edgetune.runtime.measure import measure
from edgetune.runtime.packing import pack, unpack
from edgetune.runtime.tasks import TASKS as DEVICE_TASKS
from edgetune.tasks import TASKS
from edgetune.train import open_run, run_dataset, train

TO_INT8 = {
    "profile": "x86-64-avx2", "precision": "int8", "max_drop": 1.0, "name": "case",
    "allow": ("speed",),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A small run of one task, exported."""

    task: str
    data: Path
    run: Path
    result: ExportResult


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tables(switches, colours, tmp_path_factory) -> dict[str, Path]:
    """The data of each task that is no folder of class folders, made of the two that are there."""
    folder = tmp_path_factory.mktemp("tables")
    texts = [line.split(",")[0] for line in switches.read_text().splitlines()[1:]]
    channels = {"red": 0, "green": 1, "blue": 2}
    images = {str(path): path.parent.name for path in sorted(colours.glob("*/*.png"))}
    of_colour = {"red": ["red", "warm"], "green": ["green"], "blue": []}
    tables = {
        # two labels, or none
        "text-multilabel-classification": [
            {"text": t, "label": ["on", "lit"] if t.endswith("on") else []} for t in texts
        ],
        # a number, in a unit of its own: what the last word says, and a little of the others
        "text-regression": [
            {"text": t, "label": 1000 + 25.5 * t.endswith("on") + 1.5 * t.count("please")}
            for t in texts
        ],
        "image-multilabel-classification": [
            {"image": path, "label": of_colour[name]} for path, name in images.items()
        ],
        "image-regression": [
            {"image": path, "label": 40.0 * channels[name] - 7} for path, name in images.items()
        ],
    }
    tables = {name: write_table(folder / f"{name}.jsonl", rows) for name, rows in tables.items()}
    return {**tables, "text-classification": switches, "image-classification": colours}


@pytest.fixture(scope="module", params=sorted(TASKS))
def case(request, tables, tiny_bert, tmp_path_factory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("conformance")
    target = TASKS[request.param].target
    rows = {
        "text": TrainConfig(
            model=tiny_bert, method="full", batch_size=8,
            **({"lr": 2e-3, "epochs": 8} if target == "values" else {"lr": 5e-3, "epochs": 4}),
        ),
        "image": TrainConfig(
            model="torchvision:resnet18", weights="none", method="full", lr=1e-3, epochs=4,
            batch_size=12, image_size=32,
        ),
    }  # fmt: skip
    config = dataclasses.replace(
        rows[TASKS[request.param].kind], task=request.param, data=str(tables[request.param]),
        output=str(folder / "run"), cpu=True,
        # a regression's errors are not judged by fewer than 30
        val_fraction=0.5 if target == "values" else 0.15,
    )  # fmt: skip
    train(config)
    # accuracy of so small a net on so few samples may fall anywhere, and it is too small to gain
    # speed; the gate has its own tests
    result = export(folder / "run", output=folder / "bundle", **TO_INT8)
    yield Case(request.param, Path(config.data), folder / "run", result)


def test_both_halves_have_the_same_tasks():
    assert set(TASKS) == set(DEVICE_TASKS)


def test_the_bundle_answers_as_torch_does(case):
    run = open_run(case.run)
    split = run_dataset(run).splits["val"]
    in_torch = answer_run(run.task, split, run.record.labels)
    model = EdgeModel.load(case.result.bundle)
    found = [model.predict(value) for value in split.inputs]
    match TASKS[case.task].target:
        case "classes":
            expected = [in_torch.labels[i] for i in in_torch.predicted]
            assert np.mean([f.label == e for f, e in zip(found, expected, strict=True)]) >= 0.8
        case "multilabel":
            given = [[label in f.labels for label in in_torch.labels] for f in found]
            assert np.mean(np.array(given) == in_torch.predicted) >= 0.8
        case "values":
            off = np.array([f.value for f in found]) - in_torch.predicted
            # in standard deviations of the training data
            assert np.median(np.abs(off)) <= 0.1 * run.record.scale.std


def test_the_fp32_graph_matches_torch_including_preprocessing(case, tmp_path):
    result = export(case.run, output=tmp_path / "fp32", precision="fp32")
    assert result.parity < 1e-3
    run = open_run(case.run)
    split = run_dataset(run).splits["train"]
    samples = run.task.samples(split, training=False)
    model = EdgeModel.load(tmp_path / "fp32")
    # a batch of several lengths or sizes, through the public call
    many = model.predict(list(split.inputs[:9]), all_scores=True)
    for index, found in enumerate(many):
        batch = run.task.collate([samples[0, index]])
        batch.pop("labels")
        with torch.no_grad():
            logits = run.task.logits(run.task.network, batch)[0]
        match TASKS[case.task].target:
            case "classes":
                scores = [found.scores[label] for label in model.labels]
                np.testing.assert_allclose(scores, logits.softmax(-1).numpy(), atol=1e-4)
            case "multilabel":
                scores = [found.scores[label] for label in model.labels]
                np.testing.assert_allclose(scores, logits.sigmoid().numpy(), atol=1e-4)
            case "values":
                values = [float(v) for v in split.labels]
                in_unit = np.mean(values) + np.std(values) * float(logits[0])
                assert found.value == pytest.approx(in_unit, abs=1e-3 * np.std(values))


def test_the_bundle_verifies_and_runs_from_the_shell_without_the_cloud_side(case):
    def edgetune_rt(*arguments: str) -> str:
        command = [sys.executable, "-m", "edgetune.runtime.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    bundle = str(case.result.bundle)
    assert "goldens answered as expected" in edgetune_rt("verify", bundle)
    run = open_run(case.run)
    value = run_dataset(run).splits["val"].inputs[0]
    answer = json.loads(edgetune_rt("run", bundle, value, "--json"))
    match TASKS[case.task].target:
        case "classes":
            assert answer["label"] in run.record.labels
        case "multilabel":
            assert set(answer["labels"]) == set(answer["scores"]) <= set(run.record.labels)
        case "values":
            assert isinstance(answer["value"], float)
    assert edgetune_rt("run", bundle, value).endswith(f"\t{value}\n")


def test_the_manifest_is_what_its_schema_says(case):
    schema = Path(__file__).parents[1] / "docs" / "bundle.schema.json"
    manifest = (case.result.bundle / "manifest.json").read_text()
    jsonschema.validate(json.loads(manifest), json.loads(schema.read_text()))


def test_one_file_answers_as_the_folder_does(case, tmp_path):
    pack(case.result.bundle, tmp_path / "bundle.zip")
    value = run_dataset(open_run(case.run)).splits["val"].inputs[0]
    with (
        EdgeModel.load(case.result.bundle) as folder,
        EdgeModel.load(tmp_path / "bundle.zip") as file,
    ):
        assert file.predict(value, all_scores=True) == folder.predict(value, all_scores=True)
    unpack(tmp_path / "bundle.zip", tmp_path / "again")
    names = [path.name for path in case.result.bundle.iterdir()]
    same, *_ = filecmp.cmpfiles(case.result.bundle, tmp_path / "again", names, shallow=False)
    assert sorted(same) == sorted(names)


def test_goldens_hold_what_a_program_without_tokenizer_needs(case):
    model = EdgeModel.load(case.result.bundle)
    with np.load(case.result.bundle / "goldens.npz") as stored:
        for i, sample in enumerate(model.goldens()):
            ids = stored.get(f"ids_{i}")
            arrays = {"image": sample} if ids is None else {
                "input_ids": ids, "attention_mask": np.ones_like(ids)
            }  # fmt: skip
            found = model.run({name: array[None] for name, array in arrays.items()})["logits"][0]
            np.testing.assert_array_equal(found, model.outputs(sample)["logits"][0])


def test_drift_is_told_from_validation_samples_or_why_not_is_said(case):
    # 256 are needed, and so small a data set holds less out
    why = "drift can be told from 256 on"
    if TASKS[case.task].target != "classes":
        why = f"that takes one class a sample, and {case.task} has not"
    assert "drift.npz" not in open_bundle(case.result.bundle).manifest.files
    assert any(why in note for note in case.result.notes if "drift" in note)


def test_what_cannot_learn_or_be_watched_says_so_in_one_line(case, tmp_path):
    if TASKS[case.task].target == "classes":
        pytest.skip("these can")
    assert any(note.startswith("a device cannot teach") for note in case.result.notes)
    with pytest.raises(ConfigError, match=f"cannot learn: task {case.task} gives no one class"):
        EdgeModel.load(case.result.bundle).learner(tmp_path / "learned")
    with pytest.raises(ConfigError, match=f"watch: task {case.task} gives no one class"):
        EdgeModel.load(case.result.bundle, watch=tmp_path / "watch")
    for options in ({"learn": "head"}, {"abstain": 0.9}):
        with pytest.raises(ConfigError, match=f"needs one class a sample, and {case.task} has"):
            export(case.run, output=tmp_path / "bundle", **options)


def test_int8_is_smaller_and_measured(case):
    fp32, int8 = case.result.candidates
    assert int8.size_bytes < fp32.size_bytes
    manifest = open_bundle(case.result.bundle).manifest
    assert (manifest.precision, manifest.profile) == ("int8", "x86-64-avx2")
    name = "mae" if TASKS[case.task].target == "values" else "accuracy"
    headline = getattr(int8.answers.report(), name).value
    assert manifest.evaluation.metrics[name].value == pytest.approx(headline, abs=1e-6)


def test_the_graph_keeps_to_the_stated_opset_and_names(case):
    model = onnx.load(case.result.bundle / "model.onnx", load_external_data=False)
    assert model.ir_version == 8
    assert {o.domain: o.version for o in model.opset_import}[""] == 18
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.graph.output[0].name == "logits"
    # nothing of this machine: no path, no exporter's notes
    text = str(model)
    assert "/" + "home" not in text
    assert "stack_trace" not in text


def test_export_is_deterministic(case, tmp_path):
    # nothing may come from the cache; only the timings in the card and in what hashes it differ
    shutil.rmtree(case.run / "export-cache")
    again = export(case.run, output=tmp_path / "again", **TO_INT8)
    for path in sorted(case.result.bundle.iterdir()):
        if path.name in ("MODEL_CARD.md", "manifest.json"):
            continue
        assert file_sha256(path) == file_sha256(again.bundle / path.name), path.name


def test_run_and_bundle_are_evaluated_on_any_split(case):
    for split in ("train", "val"):
        found = evaluate(case.run, split=split)
        assert found.answers.split.name == split
        name = "mae" if TASKS[case.task].target == "values" else "accuracy"
        headline = getattr(found.report, name)
        assert headline.low <= headline.value <= headline.high
    on_device = evaluate(case.result.bundle, data=str(case.data), split="everything")
    assert on_device.report.samples == len(on_device.answers.split.labels)
    with pytest.raises(ConfigError, match="a bundle holds no data"):
        evaluate(case.result.bundle)
    with pytest.raises(ConfigError, match="has no 'tset'"):
        evaluate(case.run, split="tset")


def test_eval_prints_writes_and_reports_the_metrics_of_the_task(case, tmp_path):
    files = {"--report": tmp_path / "r.html", "--predictions": tmp_path / "p.csv"}
    given = [str(word) for pair in files.items() for word in pair]
    done = CliRunner().invoke(eval_command, [str(case.run), *given])
    assert done.exit_code == 0, done.output
    report = (tmp_path / "r.html").read_text()
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    val = run_dataset(open_run(case.run)).splits["val"]
    assert [row["input"] for row in rows] == list(val.inputs)
    match TASKS[case.task].target:
        case "classes":
            assert "confusion matrix" in done.output
            assert [row["truth"] for row in rows] == list(val.labels)
        case "multilabel":
            assert "average precision" in done.output
            assert "Labels, weakest first" in report
            assert {tuple(sorted(row["truth"].split("|"))) for row in rows} == {
                tuple(sorted(label.split("|"))) for label in val.labels
            }
        case "values":
            assert "mean absolute error" in done.output
            assert "Predicted and true" in report
            errors = [abs(float(row["predicted"]) - float(row["truth"])) for row in rows]
            found = evaluate(case.run).report.mae.value
            assert np.mean(errors) == pytest.approx(found, rel=1e-6)


@pytest.fixture
def ruined(monkeypatch):
    """A ladder of one rung that ruins the graph: the last layer's weights become zero."""

    def ruin(_, source):
        model = onnx.ModelProto()
        model.CopyFrom(source.model)
        last = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if "logits" in node.output:
                for name in node.input:
                    if name in last:
                        zeros = np.zeros_like(onnx.numpy_helper.to_array(last[name]))
                        last[name].CopyFrom(onnx.numpy_helper.from_array(zeros, name))
        return Built(model=model, precision="int8")

    rung = dataclasses.replace(RUNGS[0], name="ruin", suits=("static", "dynamic"), make=ruin)
    monkeypatch.setattr("edgetune.export.rungs.RUNGS", (rung,))


@pytest.mark.usefixtures("ruined")
def test_a_loss_beyond_the_allowed_exits_with_the_numbers_and_writes_no_bundle(case, tmp_path):
    lost = r"loses \d+(\.\d+)? points"
    if TASKS[case.task].target == "values":
        lost = r"mean absolute error rises by \d+(\.\d+)? %"
    with pytest.raises(GateError, match=f"nearest of 2 is ruin: .*{lost}"):
        export(
            case.run, output=tmp_path / "bundle", precision="int8", allow=("speed",), max_drop=0.4
        )
    # what was tried can be read, and nothing else is there
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"bundle.report.html", "bundle.search.json"}
    search = json.loads((tmp_path / "bundle.search.json").read_text())
    assert [(a["rung"], a["status"]) for a in search["attempts"]] == [
        ("fp32", "passed"), ("ruin", "failed"),
    ]  # fmt: skip


@pytest.mark.usefixtures("ruined")
def test_fp32_is_shipped_where_nothing_smaller_is_good_enough_and_that_is_said(case, tmp_path):
    result = export(case.run, output=tmp_path / "bundle", max_drop=0.4)
    assert (result.precision, result.comparison) == ("fp32", None)
    assert "no smaller graph was good enough: the closest, ruin" in result.notes[0]


@pytest.mark.usefixtures("ruined")
def test_what_is_allowed_is_shipped_and_recorded(case, tmp_path):
    allow = ("accuracy", "samples", "speed")
    result = export(
        case.run, output=tmp_path / "bundle", precision="int8", allow=allow, max_drop=0.4
    )
    overrides = open_bundle(result.bundle).manifest.overrides
    assert overrides[0].startswith("accuracy: ")
    card = (result.bundle / "MODEL_CARD.md").read_text()
    assert "Limits that were overridden when this was made: accuracy: " in card


def test_another_profile_of_the_same_arithmetic_repeats_nothing(case, tmp_path):
    twin = tmp_path / "twin.toml"
    text = (Path(__file__).parents[1] / "profiles" / "x86-64-avx2.toml").read_text()
    twin.write_text(text.replace('name = "x86-64-avx2"', 'name = "twin"'))
    stages: list[str] = []
    options = {**TO_INT8, "profile": str(twin)}
    result = export(case.run, output=tmp_path / "b", on_stage=stages.append, **options)
    assert result.profile == "twin"
    assert all(candidate.cached for candidate in result.candidates)
    assert not [s for s in stages if s.startswith(("answering", "timing", "calibrating"))]


def measured_on(bundle: Path, profile: str, target: str, p50_ms: float, p95_ms: float) -> None:
    """Record as `edgetune bench` does, with latencies of our choosing."""
    found = dataclasses.replace(
        measure(bundle, runs=10, warmup=0, seconds=0.1, threads=1),
        latency_p50_ms=p50_ms, latency_p95_ms=p95_ms,
    )  # fmt: skip
    record(found, open_bundle(bundle).manifest, profile=profile, target=target)


def test_what_was_measured_on_the_device_counts_for_later_exports(case, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path / "home"))
    assert case.result.chosen.cost.basis == "estimate"
    measured_on(case.result.bundle, "x86-64-avx2", "ssh://box", 100.0, 150.0)
    again = export(case.run, output=tmp_path / "b", max_latency_ms=151.0, **TO_INT8)
    cost = again.chosen.cost
    assert (cost.basis, cost.latency_p50_ms, cost.latency_p95_ms) == (
        "measured on target", 100.0, 150.0,
    )  # fmt: skip
    with pytest.raises(GateError, match="p95 is 150 ms, allowed 149"):
        export(
            case.run, output=tmp_path / "c", max_latency_ms=149.0,
            rungs=[again.chosen.rung.name], **TO_INT8,
        )  # fmt: skip


def test_an_estimate_is_scaled_by_what_both_machines_have_run(case, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path / "home"))
    plain = export(case.run, output=tmp_path / "a", **TO_INT8).chosen.cost
    assert plain.note == "this machine's"
    # another graph, five times as slow there as here
    fp32 = export(case.run, output=tmp_path / "fp32", precision="fp32").bundle
    measured_on(fp32, host_name(), "", 10.0, 11.0)
    measured_on(fp32, "x86-64-avx2", "ssh://box", 50.0, 99.0)
    scaled = export(case.run, output=tmp_path / "b", **TO_INT8).chosen.cost
    assert scaled.basis == "estimate"
    assert scaled.latency_p95_ms == pytest.approx(5 * plain.latency_p95_ms)
    assert scaled.note == "this machine's times 5.00, seen on 1 graphs"


# one student of each kind is enough here: the others differ in a number
STUDENTS = {"run", "qat", "depth-50", "width-50", "image-71", "channels-50"}


def test_the_pareto_search_makes_and_measures_every_rung(case, tmp_path, monkeypatch):
    monkeypatch.setattr("edgetune.export.candidate.TIMING_SECONDS", 0.05)
    profile = load_profile("x86-64-avx2")
    suited = rungs_for(profile, open_run(case.run).family.int8)
    rungs = ["fp32", *(rung.name for rung in suited if rung.source in STUDENTS)]
    result = export(
        case.run, output=tmp_path / "b", profile=profile.name, search="pareto", max_drop=1.0,
        rungs=rungs, name="case",
    )  # fmt: skip
    attempts = {a.rung: a for a in result.report.attempts}
    assert set(attempts) == set(rungs)
    for attempt in attempts.values():
        if attempt.status == "skipped":  # what others have shown already
            reasons = ["keeps less", "costs what"]
            if TASKS[case.task].target != "classes":
                reasons.append("students are only taught where each sample has one class")
            assert any(reason in attempt.reason for reason in reasons), attempt
        else:
            assert attempt.size_mib > 0
            assert attempt.latency_p50_ms > 0
    assert sum(a.status == "chosen" for a in attempts.values()) == 1
    assert any(a.pareto for a in attempts.values())
    # a number has no accuracy to be drawn against latency
    drawn = TASKS[case.task].target != "values"
    assert (tmp_path / "b.pareto.png").exists() == drawn
    assert not drawn or (tmp_path / "b.pareto.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((tmp_path / "b.search.json").read_text())
    assert [a["rung"] for a in stored["attempts"]] == list(attempts)


def test_too_few_samples_to_tell_are_no_pass(case, tmp_path):
    if TASKS[case.task].target == "values":
        pytest.skip("how many samples it takes depends on how errors scatter")
    result = export(case.run, output=tmp_path / "bundle", max_drop=0.001)
    assert result.precision == "fp32"
    assert "validation samples cannot show a loss of at most 0.1 points" in result.notes[0]
    with pytest.raises(GateError, match=r"nothing was tried for host: \d+ validation samples"):
        export(case.run, output=tmp_path / "other", max_drop=0.001, precision="int8")


def test_a_second_export_makes_and_measures_nothing(case, tmp_path):
    stages: list[str] = []
    again = export(case.run, output=tmp_path / "b", on_stage=stages.append, **TO_INT8)
    assert all(candidate.cached for candidate in again.candidates)
    assert not [s for s in stages if s.startswith(("answering", "timing", "calibrating"))]


def test_an_existing_output_is_left_alone(case, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        export(case.run, output=tmp_path)


def test_a_size_budget_that_is_not_met_is_refused(case, tmp_path):
    profile = Path(__file__).parents[1] / "profiles" / "x86-64-avx2.toml"
    text = profile.read_text()
    small = tmp_path / "small.toml"
    head, _, _ = text.partition("[budget]")
    small.write_text(head + "[budget]\nmax_size_mib = 0.001\n")
    with pytest.raises(GateError, match=r"the bundle is .* MiB, allowed 0\.001"):
        export(
            case.run, profile=str(small), output=tmp_path / "bundle", max_drop=1.0,
            rungs=("fp32", "int8-static", "int8-dynamic"),
        )  # fmt: skip
