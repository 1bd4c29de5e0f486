"""examples/cpp: the program builds without a warning and answers as the C one does."""

import os
import subprocess

import numpy as np
import pytest
from hostile_bundles import (
    ABSTENTION,
    CALIBRATED_LINES,
    CALIBRATION,
    COLOR_GOLDENS,
    CONFIG,
    INTEGRITY,
    WORD_GOLDENS,
    put,
    with_arrays,
)


@pytest.fixture(scope="session")
def program(examples, ort_include, compile_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpp")
    environment = {
        **os.environ,
        "CC": "gcc",
        "CXX": "g++",
        "CFLAGS": compile_flags,
        "ORT_INCLUDE": ort_include,
    }
    built = subprocess.run(
        [examples / "cpp" / "build.sh", folder], capture_output=True, text=True, env=environment
    )
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""
    return folder / "verify_bundle"


@pytest.fixture
def verify(program, ort_library, tmp_path):
    """Run the program; what goes wrong is one line."""
    home = tmp_path / "home"
    home.mkdir()

    def verify(*arguments, library=ort_library):
        done = subprocess.run(
            [program, *map(str, arguments)],
            capture_output=True,
            timeout=60,
            env={"ORT_LIB": library, "HOME": str(home)},
        )
        errors = done.stderr.decode()
        assert len(errors.splitlines()) == (done.returncode != 0), errors
        assert not list(home.iterdir())  # onnxruntime's telemetry would have written here
        return done.returncode, done.stdout.decode().splitlines(), errors

    return verify


def test_pixels_get_the_answers_worked_out_by_hand(verify, color_bundle):
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


@pytest.mark.parametrize("wrong", [9.0, np.nan])
def test_a_golden_that_differs_is_exit_6(verify, color_bundle, edit, seal, wrong):
    stored = np.float32([[8, 0, 0], [3, wrong, 2]])
    edit(color_bundle / "goldens.npz", with_arrays(logits=stored))
    seal(color_bundle)
    code, _, errors = verify(color_bundle)
    assert code == INTEGRITY
    assert "golden 1: a logit is " in errors


def test_session_settings_of_the_manifest_reach_onnxruntime(verify, color_bundle, edit):
    change = put("session/config", {"session.load_model_format": "ORT"})
    edit(color_bundle / "manifest.json", change)
    code, _, errors = verify(color_bundle)
    assert code == INTEGRITY
    assert "ORT model verification failed" in errors


def test_wrong_calls_and_onnxruntimes_that_do_not_serve_are_exit_2(verify, color_bundle, edit):
    assert verify()[0] == CONFIG
    assert verify(color_bundle, library="/nowhere.so")[0] == CONFIG
    edit(color_bundle / "manifest.json", put("compatibility/onnxruntime_min", "99.0.0"))
    assert verify(color_bundle)[0] == CONFIG


def test_an_id_outside_of_the_vocabulary_is_exit_1(verify, word_bundle, edit, seal):
    edit(word_bundle / "goldens.npz", with_arrays(ids_1=np.int64([2, 2**40])))
    seal(word_bundle)
    assert verify(word_bundle)[0] == 1


@pytest.mark.parametrize("name", ["compressed", "cut off", "pixels with alpha", "logits twice"])
def test_pixel_goldens_that_lie_are_refused(verify, color_bundle, edit, seal, name):
    edit(color_bundle / "goldens.npz", COLOR_GOLDENS[name])
    seal(color_bundle)
    assert verify(color_bundle)[0] == INTEGRITY


@pytest.mark.parametrize("name", ["no ids", "more ids than max_length"])
def test_id_goldens_that_lie_are_refused(verify, word_bundle, edit, seal, name):
    edit(word_bundle / "goldens.npz", WORD_GOLDENS[name])
    seal(word_bundle)
    assert verify(word_bundle)[0] == INTEGRITY
