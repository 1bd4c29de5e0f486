"""examples/c: the programs build without a warning, and no bundle makes them fall over."""

import os
import subprocess

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
    STRICT_JSON,
    WORD_GOLDENS,
    put,
    with_arrays,
)

# reads many bundles in one process and prints the status of each; runs no graph
READER = """
#include <stdio.h>
#include "goldens.h"

int main(int count, char **folders) {
    for (int i = 1; i < count; i++) {
        et_error error;
        et_manifest manifest;
        et_goldens goldens;
        et_status status = et_manifest_read(&manifest, folders[i], &error);
        if (!status) {
            status = et_goldens_read(&goldens, &manifest, &error);
            for (size_t g = 0; g < manifest.golden_count && !status; g++) {
                et_golden golden;
                status = et_golden_read(&goldens, g, &golden, &error);
                if (!status) et_golden_free(&golden);
                if (g + 1 == manifest.golden_count || status) et_goldens_free(&goldens);
            }
            et_manifest_free(&manifest);
        }
        printf("%d\\n", status);
    }
    return 0;
}
"""


@pytest.fixture(scope="session")
def programs(examples, ort_include, compile_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    flags = f"{compile_flags} -Wpedantic -Wconversion -Wshadow"
    environment = {**os.environ, "CC": "gcc", "CFLAGS": flags, "ORT_INCLUDE": ort_include}
    built = subprocess.run(
        [examples / "c" / "build.sh", folder], capture_output=True, text=True, env=environment
    )
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""
    return folder


@pytest.fixture
def run(programs, ort_library, tmp_path):
    """Run a program; what goes wrong is one line."""
    home = tmp_path / "home"
    home.mkdir()

    def run(program, *arguments, stdin=b"", library=ort_library):
        done = subprocess.run(
            [programs / program, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            timeout=60,
            env={"ORT_LIB": library, "HOME": str(home)},
        )
        errors = done.stderr.decode()
        assert len(errors.splitlines()) == (done.returncode != 0), errors
        assert not list(home.iterdir())  # onnxruntime's telemetry would have written here
        return done.returncode, done.stdout.decode().splitlines(), errors

    return run


@pytest.fixture
def verify(run):
    return lambda folder: run("verify_bundle", folder)


def test_pixels_get_the_answers_worked_out_by_hand(verify, color_bundle):
    # softmax of (8, 0, 0) and of (3, 1, 2) by hand
    assert verify(color_bundle) == (
        0,
        [
            "golden 0: label red score 1.00, largest difference 0",
            "golden 1: label red score 0.67, largest difference 0",
            "2 goldens, every logit within 0.001",
        ],
        "",
    )


def test_ids_get_the_answers_worked_out_by_hand(verify, word_bundle):
    assert verify(word_bundle) == (
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


@pytest.mark.parametrize("wrong", [9.0, np.nan, np.inf])
def test_a_golden_that_differs_is_exit_6(verify, color_bundle, edit, seal, wrong):
    stored = np.float32([[wrong, 0, 0], [3, 1, 2]])
    edit(color_bundle / "goldens.npz", with_arrays(logits=stored))
    seal(color_bundle)
    code, _, errors = verify(color_bundle)
    distance = "1" if wrong == 9 else "inf"
    assert code == INTEGRITY
    assert f"golden 0: a logit is {distance} from the stored one, allowed 0.001" in errors


def test_session_settings_of_the_manifest_reach_onnxruntime(verify, color_bundle, edit):
    change = put("session/config", {"session.load_model_format": "ORT"})
    edit(color_bundle / "manifest.json", change)
    code, _, errors = verify(color_bundle)
    assert code == INTEGRITY
    assert "model.onnx: onnxruntime: " in errors
    assert "ORT model verification failed" in errors


@pytest.mark.parametrize("level", ["off", "basic", "extended"])
def test_other_session_settings_answer_the_same(verify, color_bundle, edit, level):
    manifest = color_bundle / "manifest.json"
    edit(manifest, put("session/graph_optimization", level))
    edit(manifest, put("session/arena", False))
    edit(manifest, put("session/allow_spinning", True))
    edit(manifest, put("session/intra_op_threads", 2))
    assert verify(color_bundle)[0] == 0


def test_labels_cannot_send_control_characters_to_a_terminal(verify, color_bundle, edit):
    edit(color_bundle / "manifest.json", put("labels/0", "\x1b[31mréd\n"))
    assert verify(color_bundle)[1][0].startswith("golden 0: label ?[31mréd  score")


def test_wrong_calls_and_a_missing_library_are_exit_2(run, color_bundle, tmp_path):
    assert run("verify_bundle")[0] == CONFIG
    assert run("verify_bundle", tmp_path / "nothing")[0] == INTEGRITY
    code, _, errors = run("verify_bundle", color_bundle, library="/nowhere.so")
    assert code == CONFIG
    assert "onnxruntime cannot be loaded: /nowhere.so" in errors


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies_is_refused(verify, color_bundle, edit, name):
    change, expected = MANIFESTS[name]
    edit(color_bundle / "manifest.json", change)
    code, lines, _ = verify(color_bundle)
    assert (code, lines) == (expected, [])


@pytest.mark.parametrize("name", STRICT_JSON)
def test_json_that_means_different_things_to_readers_is_refused(verify, color_bundle, edit, name):
    edit(color_bundle / "manifest.json", STRICT_JSON[name])
    code, _, errors = verify(color_bundle)
    assert code == INTEGRITY
    assert "manifest.json: is no valid JSON" in errors


@pytest.mark.parametrize("name", COLOR_GOLDENS)
def test_pixel_goldens_that_lie_are_refused(verify, color_bundle, edit, seal, name):
    edit(color_bundle / "goldens.npz", COLOR_GOLDENS[name])
    seal(color_bundle)
    code, _, errors = verify(color_bundle)
    assert code == INTEGRITY
    assert "goldens.npz: " in errors


@pytest.mark.parametrize("name", WORD_GOLDENS)
def test_id_goldens_that_lie_are_refused(verify, word_bundle, edit, seal, name):
    edit(word_bundle / "goldens.npz", WORD_GOLDENS[name])
    seal(word_bundle)
    code, _, errors = verify(word_bundle)
    assert code == INTEGRITY
    assert "goldens.npz: " in errors


@pytest.mark.parametrize("name", FRIENDLY_GOLDENS)
def test_goldens_written_in_another_way_are_read(verify, color_bundle, edit, seal, name):
    edit(color_bundle / "goldens.npz", FRIENDLY_GOLDENS[name])
    seal(color_bundle)
    assert verify(color_bundle)[0] == 0


def test_an_id_outside_of_the_vocabulary_is_exit_1(verify, word_bundle, edit, seal):
    edit(word_bundle / "goldens.npz", with_arrays(ids_1=np.int64([2, 2**40])))
    seal(word_bundle)
    code, _, errors = verify(word_bundle)
    assert code == 1
    assert "the graph cannot be run: onnxruntime: " in errors


def test_a_link_is_no_file_of_a_bundle(verify, color_bundle):
    weights = color_bundle / "weights.bin"
    weights.symlink_to(weights.rename(color_bundle.parent / "elsewhere.bin"))
    assert verify(color_bundle)[0] == INTEGRITY


def test_bytes_damaged_at_random_never_crash_a_reader(
    examples, compile_flags, mutant_folders, tmp_path
):
    (tmp_path / "reader.c").write_text(READER)
    sources = [examples / "c" / f"{n}.c" for n in ("error", "json", "npz", "manifest", "goldens")]
    command = ["gcc", "-std=c11", *compile_flags.split(), "-I", examples / "c", "reader.c"]
    subprocess.run([*command, *sources, "-o", "reader", "-lm"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "reader", *mutant_folders], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    codes = [int(line) for line in done.stdout.split()]
    assert len(codes) == len(mutant_folders)
    # a flip in a label or a metric harms nothing
    assert {0, INTEGRITY} <= set(codes) <= {0, CONFIG, INTEGRITY}
    assert codes.count(INTEGRITY) > len(codes) / 2


def test_classify_reads_raw_pixels_until_they_end(run, color_bundle):
    code, lines, _ = run("classify", color_bundle, 1, 1, stdin=bytes([3, 1, 2, 0, 9, 0]))
    assert code == 0
    assert lines == ["red 0.6652", "green 0.9998"]  # 1 / (1 + e^-2 + e^-1), 1 / (1 + 2 e^-9)


def test_classify_calibrates_too(run, color_bundle, edit):
    edit(color_bundle / "manifest.json", put("calibration", CALIBRATION))
    edit(color_bundle / "manifest.json", put("abstention", ABSTENTION))
    code, lines, _ = run("classify", color_bundle, 1, 1, stdin=bytes([3, 1, 2, 0, 9, 0]))
    assert code == 0
    # 1 / (1 + e^-1 + e^-0.5), 1 / (1 + 2 e^-4.5)
    assert lines == ["red 0.5065 (abstained)", "green 0.9783"]


def test_classify_says_when_pixels_are_missing(run, color_bundle):
    code, lines, errors = run("classify", color_bundle, 2, 1, stdin=bytes([3, 1, 2, 3]))
    assert (code, lines) == (3, [])
    assert "got 4 bytes of 6" in errors


def test_classify_refuses_a_bundle_for_texts(run, word_bundle):
    code, _, errors = run("classify", word_bundle, 1, 1, stdin=bytes(3))
    assert code == 3
    assert "takes token ids" in errors


def test_build_says_how_to_get_the_header(examples, tmp_path):
    environment = {"PATH": os.environ["PATH"], "ORT_INCLUDE": str(tmp_path)}
    found = subprocess.run(
        [examples / "c" / "find_header.sh", "no_such_header.h"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert found.returncode == CONFIG
    assert found.stderr.startswith("no no_such_header.h found; set ORT_INCLUDE")
