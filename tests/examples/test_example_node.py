"""examples/node: the program answers in Node and in WebAssembly, and no bundle makes it fail."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hostile_bundles import (
    ABSTENTION,
    CALIBRATED_LINES,
    CALIBRATION,
    COLOR_GOLDENS,
    COLOR_LOGITS,
    CONFIG,
    FRIENDLY_GOLDENS,
    INTEGRITY,
    MANIFESTS,
    WORD_GOLDENS,
    put,
    with_arrays,
)

# reads many bundles in one process and prints the exit code of each; runs no graph. A golden's
# hash is filled in, so that reading it is reached.
READER = """
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { readGoldens, readManifest } from "./bundle.mjs";
import { BundleError } from "./errors.mjs";

for (const folder of process.argv.slice(2)) {
  let code = 0;
  try {
    const goldens = readFileSync(`${folder}/goldens.npz`);
    const sha256 = createHash("sha256").update(goldens).digest("hex");
    const text = readFileSync(`${folder}/manifest.json`, "latin1");
    const sealed = text.replace(/("goldens.npz":\\s*{[^}]*"sha256": ")[0-9a-f]{64}/, `$1${sha256}`);
    writeFileSync(`${folder}/manifest.json`, sealed, "latin1");
    readGoldens(folder, await readManifest(folder));
  } catch (error) {
    if (!(error instanceof BundleError)) throw error;
    code = error.code;
  }
  console.log(code);
}
"""


@pytest.fixture(scope="session")
def program(examples, tmp_path_factory) -> Path:
    """A folder with the program and its packages, which are fetched once for this user."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("no node and npm")
    source = examples / "node"
    wanted = (source / "package.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgetune"
    packages = cache / f"node-{hashlib.sha256(wanted).hexdigest()[:12]}"
    packages.mkdir(parents=True, exist_ok=True)
    with (packages / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run several at a time
        if not (packages / ".done").exists():
            (packages / "package.json").write_bytes(wanted)
            installed = subprocess.run(
                [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"],
                cwd=packages,
                capture_output=True,
                text=True,
            )
            if installed.returncode != 0:
                said = (installed.stderr.strip().splitlines() or ["npm install failed"])[-1]
                pytest.skip(f"onnxruntime-node is not to be had: {said}")
            (packages / ".done").touch()
    folder = tmp_path_factory.mktemp("node")
    for entry in source.glob("*.mjs"):
        shutil.copy(entry, folder)
    shutil.copy(source / "package.json", folder)
    (folder / "node_modules").symlink_to(packages / "node_modules")
    return folder


@pytest.fixture
def verify(program, tmp_path):
    """Run the program; what goes wrong is one line."""
    home = tmp_path / "home"
    home.mkdir()

    def verify(*arguments):
        done = subprocess.run(
            ["node", program / "verify_bundle.mjs", *map(str, arguments)],
            capture_output=True,
            timeout=60,
            env={"PATH": os.environ["PATH"], "HOME": str(home)},
        )
        errors = done.stderr.decode()
        assert len(errors.splitlines()) == (done.returncode != 0), errors
        assert not list(home.iterdir())  # onnxruntime's telemetry would have written here
        return done.returncode, done.stdout.decode().splitlines(), errors

    return verify


@pytest.fixture
def answers(program):
    """Return the exit codes for many bundles, without running their graphs."""
    (program / "reader.mjs").write_text(READER)

    def answers(folders):
        done = subprocess.run(
            ["node", program / "reader.mjs", *folders], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        codes = [int(line) for line in done.stdout.split()]
        assert len(codes) == len(folders)
        return codes

    return answers


@pytest.fixture
def variants(tmp_path, edit, seal):
    """Write a copy of a bundle for each edit of one of its files."""

    def variants(bundle, file, edits):
        folders = []
        for number, change in enumerate(edits):
            folder = tmp_path / f"variant-{file}-{bundle.name}-{number}"
            shutil.copytree(bundle, folder)
            edit(folder / file, change)
            if file != "manifest.json":
                seal(folder)
            folders.append(folder)
        return folders

    return variants


@pytest.mark.parametrize("engine", [(), ("--wasm",)])
def test_pixels_get_the_answers_worked_out_by_hand(verify, color_bundle, engine):
    assert verify(*engine, color_bundle) == (
        0,
        [
            "golden 0: label red score 1.00, largest difference 0",
            "golden 1: label red score 0.67, largest difference 0",
            "2 goldens, every logit within 0.001",
        ],
        "",
    )


@pytest.mark.parametrize("engine", [(), ("--wasm",)])
def test_ids_get_the_answers_worked_out_by_hand(verify, word_bundle, engine):
    assert verify(*engine, word_bundle) == (
        0,
        [
            "golden 0: label positive score 0.73, largest difference 0",
            "golden 1: label negative score 0.73, largest difference 0",
            "2 goldens, every logit within 0.001",
        ],
        "",
    )


def test_scores_are_calibrated_and_those_below_the_threshold_are_marked(verify, color_bundle, edit):
    edit(color_bundle / "manifest.json", put("calibration", CALIBRATION))
    edit(color_bundle / "manifest.json", put("abstention", ABSTENTION))
    assert verify(color_bundle) == (0, CALIBRATED_LINES, "")


def test_a_difference_within_the_tolerance_is_printed(verify, color_bundle, edit, seal):
    stored = COLOR_LOGITS + np.float32([[0, 0, 0], [0, 0, 2**-11]])
    edit(color_bundle / "goldens.npz", with_arrays(logits=stored))
    seal(color_bundle)
    code, lines, _ = verify(color_bundle)
    assert code == 0
    assert lines[1] == "golden 1: label red score 0.67, largest difference 0.00049"


@pytest.mark.parametrize("wrong", [9.0, np.nan])
def test_a_golden_that_differs_is_exit_6(verify, color_bundle, edit, seal, wrong):
    stored = np.float32([[wrong, 0, 0], [3, 1, 2]])
    edit(color_bundle / "goldens.npz", with_arrays(logits=stored))
    seal(color_bundle)
    code, _, errors = verify(color_bundle)
    assert code == INTEGRITY
    assert "golden 0: a logit is " in errors


@pytest.mark.parametrize("engine", [(), ("--wasm",)])
def test_session_settings_of_the_manifest_reach_onnxruntime(verify, color_bundle, edit, engine):
    change = put("session/config", {"session.load_model_format": "ORT"})
    edit(color_bundle / "manifest.json", change)
    code, _, errors = verify(*engine, color_bundle)
    assert code == INTEGRITY
    assert "ORT model verification failed" in errors


def test_a_damaged_weight_of_the_right_size_is_refused(verify, color_bundle, edit):
    edit(color_bundle / "weights.bin", lambda data: data[:-1] + b"\x3e")
    code, _, errors = verify(color_bundle)
    assert code == INTEGRITY
    assert "weights.bin: expected SHA-256 " in errors


def test_wrong_calls_and_onnxruntimes_that_do_not_serve_are_exit_2(verify, color_bundle, edit):
    assert verify()[0] == CONFIG
    edit(color_bundle / "manifest.json", put("compatibility/onnxruntime_min", "99.0.0"))
    assert verify(color_bundle)[0] == CONFIG


def test_an_id_outside_of_the_vocabulary_is_exit_1(verify, word_bundle, edit, seal):
    edit(word_bundle / "goldens.npz", with_arrays(ids_1=np.int64([2, 2**40])))
    seal(word_bundle)
    code, _, errors = verify(word_bundle)
    assert code == 1
    assert "the graph cannot be run: onnxruntime: " in errors


def test_manifests_that_lie_are_refused(answers, variants, color_bundle):
    # those that onnxruntime itself, or its version, would refuse need a session
    late = {"config that onnxruntime refuses", "newer onnxruntime"}
    cases = {name: case for name, case in MANIFESTS.items() if name not in late}
    folders = variants(color_bundle, "manifest.json", [change for change, _ in cases.values()])
    codes = dict(zip(cases, answers(folders), strict=True))
    assert codes == {name: code for name, (_, code) in cases.items()}


def test_goldens_that_lie_are_refused(answers, variants, color_bundle, word_bundle):
    folders = variants(color_bundle, "goldens.npz", COLOR_GOLDENS.values())
    folders += variants(word_bundle, "goldens.npz", WORD_GOLDENS.values())
    codes = dict(zip([*COLOR_GOLDENS, *WORD_GOLDENS], answers(folders), strict=True))
    assert codes == dict.fromkeys(codes, INTEGRITY)


def test_goldens_written_in_another_way_are_read(answers, variants, color_bundle):
    folders = variants(color_bundle, "goldens.npz", FRIENDLY_GOLDENS.values())
    assert answers(folders) == [0] * len(folders)


def test_bytes_damaged_at_random_never_crash_a_reader(answers, mutant_folders):
    codes = answers(mutant_folders)
    # a flip in a label or a metric harms nothing
    assert {0, INTEGRITY} <= set(codes) <= {0, CONFIG, INTEGRITY}
