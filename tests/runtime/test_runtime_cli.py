"""`edgetune-rt` as a process: what it prints, and its exit codes."""

import contextlib
import json
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from edgetune import __version__
from edgetune.runtime.bundle import open_bundle


@pytest.fixture
def photos(tmp_path):
    """One PNG a color: red.png, green.png, blue.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for channel, name in enumerate(("red", "green", "blue")):
        pixels = np.zeros((2, 3, 3), np.uint8)
        pixels[..., channel] = 9
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def lines(done):
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    return done.stdout.decode().splitlines()


def answers(done):
    return [json.loads(line) for line in lines(done)]


# -- info, verify -------------------------------------------------------------------------------


def test_info_says_what_the_bundle_is(rt, color_bundle):
    size = sum(p.stat().st_size for p in color_bundle.iterdir() if p.name != "manifest.json")
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines(rt("info", color_bundle)))
    assert rows == {
        "name": "colors, release 1",
        "task": "image-classification",
        "labels": "3: red, green, blue",
        "precision": "fp32",
        "profile": f"host ({platform.machine().lower()})",
        "drift": "no baseline",
        "digest": open_bundle(color_bundle).manifest.digest[:12],
        "size": f"{size / 2**20:.1f} MiB in 3 files",
        "onnxruntime": "1.17.0 or newer (opset 17, IR 8)",
        "threads": "1",
        "accuracy": "0.9000 (0.8000 to 0.9600, 95 %; 40 test samples)",
    }


def test_info_shortens_a_long_list_of_labels_and_names_overrides(rt, color_bundle, seal):
    seal(color_bundle, labels=tuple(f"l{i}" for i in range(14)), overrides=("accuracy gate",))
    text = rt("info", color_bundle).stdout.decode()
    assert "14: l0, l1, l2, l3, l4, l5, l6, l7, l8, l9, l10, l11, ...\n" in text
    assert re.search("overrides +accuracy gate\n", text)


def test_info_as_json_is_the_manifest(rt, word_bundle):
    done = rt("info", word_bundle, "--json")
    assert json.loads(done.stdout) == json.loads((word_bundle / "manifest.json").read_bytes())


def test_info_escapes_letters_that_the_encoding_of_the_output_lacks(rt, color_bundle, seal):
    seal(color_bundle, labels=("żółw", "🐢", "龟"))
    done = rt("info", color_bundle, env={"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0, done.stderr.decode()
    assert r"3: \u017có\u0142w, \U0001f422, \u9f9f".encode("latin-1") in done.stdout


def test_verify_counts_files_and_goldens(rt, word_bundle):
    assert lines(rt("verify", word_bundle)) == [
        "4 files match their SHA-256",
        "2 goldens answered as expected (largest difference 0, allowed 0.001)",
    ]


def test_verify_as_json(rt, color_bundle):
    (result,) = answers(rt("verify", color_bundle, "--json"))
    assert result == {"files": 3, "goldens": 2, "largest_difference": 0.0, "tolerance": 0.001}


# -- run ----------------------------------------------------------------------------------------


def test_run_gives_label_score_and_input_of_each_text(rt, word_bundle):
    # logits (0, 1) and (2, 1): 1 / (1 + 1/e) = 0.7311 for both
    assert lines(rt("run", word_bundle, "so good", "bad bad good")) == [
        "positive\t0.7311\tso good",
        "negative\t0.7311\tbad bad good",
    ]


def test_run_reads_a_line_each_from_standard_input_and_skips_blank_ones(rt, word_bundle):
    done = rt("run", word_bundle, "-", "bad", stdin="good\r\n\n  \nżółw good\nbad".encode())
    assert [line.split("\t")[::2] for line in lines(done)] == [
        ["positive", "good"],
        ["positive", "żółw good"],
        ["negative", "bad"],
        ["negative", "bad"],
    ]


def test_run_with_empty_standard_input_says_nothing(rt, word_bundle):
    assert lines(rt("run", word_bundle, "-")) == []


def test_run_takes_paths_of_images(rt, color_bundle, photos):
    paths = [photos / "blue.png", photos / "red.png"]
    done = rt("run", color_bundle, *paths)
    assert [line.split("\t")[::2] for line in lines(done)] == [
        ["blue", str(paths[0])],
        ["red", str(paths[1])],
    ]


def test_run_gives_all_scores_the_highest_first(rt, word_bundle):
    assert lines(rt("run", word_bundle, "good", "--all-scores")) == [
        "positive\t0.7311\tgood",
        "    positive\t0.7311",
        "    negative\t0.2689",
    ]


def test_run_as_json_is_one_object_a_line(rt, word_bundle):
    first, second = answers(rt("run", word_bundle, "good", "żółw", "--json", "--all-scores"))
    assert (first["input"], first["label"]) == ("good", "positive")
    assert first["scores"] == pytest.approx({"negative": 0.268941, "positive": 0.731059}, abs=1e-6)
    assert second["input"] == "żółw"
    (plain,) = answers(rt("run", word_bundle, "good", "--json"))
    assert set(plain) == {"input", "label", "score"}


def test_run_of_a_sample_that_starts_with_a_dash(rt, word_bundle):
    (line,) = lines(rt("run", word_bundle, "--", "--good"))
    assert line.startswith("positive\t")


@pytest.mark.parametrize("sample", [b"\xff\xfe good", b"/tmp/\xff\xfe.png"])
def test_bytes_that_are_no_utf8_are_an_error_of_one_line(word_bundle, color_bundle, sample):
    bundle = color_bundle if b"png" in sample else word_bundle
    command = [sys.executable, "-m", "edgetune.runtime.cli", "run", bundle, sample]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == 1


def test_run_stops_at_a_sample_that_is_no_image_with_exit_code_3(rt, color_bundle, photos):
    done = rt("run", color_bundle, photos / "red.png", photos / "absent.png", photos / "blue.png")
    assert done.returncode == 3
    assert done.stdout.decode().startswith("red\t")
    assert done.stdout.count(b"\n") == 1
    assert done.stderr.decode() == f"error: {photos / 'absent.png'}: no such file\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "BUNDLE"], "Missing argument 'INPUTS...'"),
        (["run"], "Missing argument 'BUNDLE'"),
        (["rin", "BUNDLE"], "no command 'rin'; did you mean 'run'?"),
        (["info", "BUNDLE", "--jsn"], "No such option"),
    ],
)
def test_a_wrong_command_line_exits_with_2(rt, word_bundle, arguments, message):
    done = rt(*[word_bundle if a == "BUNDLE" else a for a in arguments])
    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert done.stdout == b""


def test_a_reader_that_goes_away_ends_the_command_without_a_traceback(word_bundle):
    # click's own answer to a broken pipe: quietly, exit code 1
    command = [sys.executable, "-m", "edgetune.runtime.cli", "run", word_bundle, "-"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        process.stdin.write(b"good\n" * 5000)
        with contextlib.suppress(BrokenPipeError):  # it ended before all was written
            process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_the_version_is_the_package_s(rt):
    assert lines(rt("--version")) == [f"edgetune-rt, version {__version__}"]


# -- serve-stdin --------------------------------------------------------------------------------


def test_serve_answers_plain_lines_and_json_lines_in_order(rt, word_bundle):
    stdin = (
        'good\n\n{"id": 7, "input": "bad"}\r\n{"input": "good"}\n{"id": null, "input": ""}\n  \n'
        '{"id": {"a": [1]}, "input": "żółw \\ud83d\\udc22 good"}\nbad'
    )
    found = answers(rt("serve-stdin", word_bundle, stdin=stdin.encode()))
    assert [(a.get("id", "none"), a["label"]) for a in found] == [
        ("none", "positive"),
        (7, "negative"),
        ("none", "positive"),
        (None, "negative"),
        ({"a": [1]}, "positive"),
        ("none", "negative"),
    ]
    for answer in found:
        assert answer["milliseconds"] > 0
        assert set(answer) <= {"id", "label", "score", "milliseconds"}


def test_serve_gives_all_scores_when_asked(rt, word_bundle):
    (answer,) = answers(rt("serve-stdin", word_bundle, "--all-scores", stdin=b"\n\ngood\n"))
    assert sum(answer["scores"].values()) == pytest.approx(1.0)


BAD_LINES = {
    b'{"id": 1, "input": ': "is no valid JSON: ",
    b'{"id": 1} x': "is no valid JSON: ",
    b'{"a":' + b"[" * 100_000: "is no valid JSON: ",
    b'{"id": 1}': 'expected a key "input" with a string',
    b'{"id": 1, "input": 5}': 'expected a key "input" with a string',
    b'{"id": 1, "input": ["good", "bad"]}': 'expected a key "input" with a string',
    b'{"id": 1, "input": []}': 'expected a key "input" with a string',
    b'{"id": 1, "input": {"input": "good"}}': 'expected a key "input" with a string',
    b'{"id": 1, "input": "\\ud800"}': "is no Unicode text",
    b"\xff\xfe good": "is no Unicode text",
}


def test_serve_answers_a_bad_line_with_an_error_and_goes_on(rt, word_bundle):
    stdin = b"".join(line + b"\ngood\n" for line in BAD_LINES)
    found = answers(rt("serve-stdin", word_bundle, stdin=stdin))
    assert [a.get("label") for a in found] == [None, "positive"] * len(BAD_LINES)
    for answer, (line, message) in zip(found[::2], BAD_LINES.items(), strict=True):
        assert message in answer["error"]
        # the id comes back where the line could be read
        assert answer.get("id") == (1 if line.endswith(b"}") else None)


def test_serve_answers_a_missing_or_broken_file_with_an_error_and_goes_on(rt, color_bundle, photos):
    (photos / "text.png").write_text("no picture")
    paths = [photos / n for n in ("red.png", "absent.png", "text.png", "blue.png")]
    stdin = b"".join(f"{path}\n".encode() for path in paths) + b"\xff.png\n"
    found = answers(rt("serve-stdin", color_bundle, stdin=stdin))
    assert [a.get("label") for a in found] == ["red", None, None, "blue", None]
    assert found[1]["error"] == f"{paths[1]}: no such file"
    assert found[2]["error"] == f"{paths[2]}: is no image that Pillow knows"
    assert found[4]["error"].endswith(".png: no such file")


def test_serve_answers_each_line_before_it_reads_the_next(word_bundle):
    command = [sys.executable, "-m", "edgetune.runtime.cli", "serve-stdin", word_bundle]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for text, label in (("good", "positive"), ("bad", "negative"), ("good", "positive")):
            process.stdin.write(f"{text}\n".encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["label"] == label
        process.stdin.close()
        assert process.wait(60) == 0


def test_serve_ends_with_its_input(rt, word_bundle):
    assert answers(rt("serve-stdin", word_bundle)) == []


def test_what_could_steer_a_terminal_is_shown_escaped(rt, word_bundle, seal):
    seal(word_bundle, name="\x1b]0;mine\a", labels=("neg\x1b[2J", "positive"))
    done = rt("info", word_bundle)
    assert b"\x1b" not in done.stdout
    assert rb"neg\x1b[2J, positive" in done.stdout
    assert rt("run", word_bundle, "bad").stdout == b"neg\\x1b[2J\t0.7311\tbad\n"
    assert rb"\x1b" in rt("verify", word_bundle.parent / "\x1b[2J").stderr
