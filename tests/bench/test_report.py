import base64
import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from edgetune.bench.report import Mistake, write_report
from edgetune.errors import DataError, ResourceError
from edgetune.tasks.metrics import classification_report

VOID = {"meta", "img", "br"}
HISTORY = [
    {"epoch": 1, "train_loss": 2.0, "val_loss": 1.9, "val_accuracy": 0.5},
    {"epoch": 2, "train_loss": 1.0, "val_loss": 1.2, "val_accuracy": 0.8},
]
LABELS = ["cat", "dog", "eel"]
TRUTH = np.array([0] * 10 + [1] * 8 + [2] * 2)
PREDICTED = np.array([0] * 9 + [1] + [1] * 5 + [2] * 3 + [0, 2])


class Page(HTMLParser):
    """Reads a page, checking that tags nest, and keeps what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows, self.ids = [], [], [], [], []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def image_png(size=(4, 3)):
    content = io.BytesIO()
    Image.new("RGB", size, "red").save(content, "PNG")
    return content.getvalue()


def mistake(shown="a text", image=None, confidence=0.5, truth="dog", predicted="eel"):
    return Mistake(
        shown=shown, image_png=image, truth=truth, predicted=predicted, confidence=confidence
    )


def write(path, truth=TRUTH, predicted=PREDICTED, labels=LABELS, **changes):
    arguments = {
        "title": "Pets",
        "facts": {"Model": "tiny", "Date": "2026-01-31"},
        "report": classification_report(truth, predicted, labels, resamples=50),
        "labels": labels,
        "mistakes": [],
        "history": None,
    }
    write_report(path, **{**arguments, **changes})
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_says_the_numbers(tmp_path):
    page = write(tmp_path / "report.html")
    words = " ".join(page.text.split())
    assert "Of 20 samples the model got 15 right." in words
    assert "likely between" in words
    assert "The weakest class is eel: 1 of its 2 samples found, F1 33.3%." in words
    assert ["Model", "tiny"] in page.rows
    assert any(row[:2] == ["Accuracy", "75.0%"] for row in page.rows)
    assert ["dog", "eel", "3", "37.5%"] in page.rows


def test_classes_stand_weakest_first_and_absent_ones_last(tmp_path):
    page = write(tmp_path / "report.html", labels=[*LABELS, "never"])
    order = [row[0] for row in page.rows if row[0] in {*LABELS, "never"} and len(row) in {3, 6}]
    assert order == ["eel", "dog", "cat", "never"]
    # F1 = 2 x right / (true + predicted): 2 / 6, 10 / 14, 18 / 20
    f1 = [row[4] for row in page.rows if row[0] in LABELS and len(row) == 6]
    assert f1 == ["33.3%", "71.4%", "90.0%"]


def test_probabilities_add_calibration_and_log_loss(tmp_path):
    probabilities = np.full((20, 3), 0.25)
    probabilities[np.arange(20), PREDICTED] = 0.5
    report = classification_report(
        TRUTH, PREDICTED, LABELS, probabilities=probabilities, resamples=5
    )
    with_them = write(tmp_path / "report.html", report=report)
    assert "25.0 points" in with_them.text  # says 0.5, is right 0.75 of the time
    # 15 x ln 2 + 5 x ln 4, over 20
    assert "0.866" in with_them.text
    assert "Log loss" not in write(tmp_path / "report.html").text


def test_no_mistake_at_all_gives_the_rule_of_three_and_no_false_interval(tmp_path):
    page = write(tmp_path / "report.html", truth=TRUTH, predicted=TRUTH)
    assert "likely above 85.0%" in page.text  # 1 - 3 / 20
    assert "100% to 100%" not in page.text
    assert "weakest" not in page.text.replace("Classes, weakest first", "")


def test_none_right_is_said(tmp_path):
    page = write(tmp_path / "report.html", truth=np.array([0, 1]), predicted=np.array([1, 0]))
    assert "None was right" in page.text


def test_almost_all_is_never_rounded_to_all(tmp_path):
    truth = np.zeros(5000, np.int64)
    predicted = truth.copy()
    predicted[0] = 1
    page = write(tmp_path / "report.html", truth=truth, predicted=predicted)
    assert any(row[:2] == ["Accuracy", ">99.9%"] for row in page.rows)


def test_text_from_outside_is_escaped_everywhere(tmp_path):
    attack = "<script>alert(1)</script>\"'&"
    labels = [attack, "dog", "eel"]
    page = write(
        tmp_path / "report.html", labels=labels, title=attack, facts={attack: attack},
        history=HISTORY,
        mistakes=[
            mistake(attack, truth=attack, predicted=attack), mistake(attack, image=image_png()),
        ],
    )  # fmt: skip
    assert "script" not in page.tags
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert page.text.count(attack) >= 8
    assert ("img", "alt", attack) in page.attributes


def test_control_characters_and_lone_surrogates_are_replaced(tmp_path):
    page = write(
        tmp_path / "report.html", labels=["a\0b", "c\udc80d", "$x_1$ \x1b"],
        mistakes=[mistake("bad\udcff\x07name.png", image=image_png())],
    )  # fmt: skip
    assert "a\N{REPLACEMENT CHARACTER}b" in page.text
    assert "bad\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}name.png" in page.text
    assert "$x_1$" in page.text  # no mathematics made of it


def test_labels_in_any_script_are_drawn_without_a_warning(tmp_path):
    page = write(tmp_path / "report.html", labels=["不良品", "גזר", "🥕"])
    assert {"不良品", "גזר", "🥕"} <= {text for row in page.rows for text in row}


def test_nothing_is_loaded_from_outside(tmp_path):
    path = tmp_path / "report.html"
    page = write(path, history=HISTORY, mistakes=[mistake(image=image_png())])
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    for _, name, value in page.attributes:
        if name in {"src", "href", "xlink:href"}:
            assert value.startswith(("data:image/png;base64,", "#"))
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", path.read_text(encoding="utf-8"))
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_ids_are_unique_and_references_resolve(tmp_path):
    path = tmp_path / "report.html"
    page = write(path, history=HISTORY)
    assert len(page.ids) == len(set(page.ids))
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(page.ids)


@pytest.mark.parametrize(
    ("classes", "figures", "counted"), [(2, 1, True), (20, 1, True), (21, 1, False), (41, 0, False)]
)
def test_the_confusion_matrix_suits_the_number_of_classes(tmp_path, classes, figures, counted):
    truth = np.repeat(np.arange(classes), 137)
    predicted = truth.copy()
    predicted[0] = 1
    labels = [f"class {i}" for i in range(classes)]
    page = write(tmp_path / "report.html", truth=truth, predicted=predicted, labels=labels)
    assert page.tags.count("svg") == figures
    drawn = re.findall(r"<svg.*?</svg>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert (">137<" in "".join(drawn)) == counted
    assert ["class 0", "class 1", "1", "0.7%"] in page.rows


def test_many_classes_give_the_thirty_most_confused_pairs(tmp_path):
    # class i is taken for class i + 1 in i of 50 samples
    truth = np.repeat(np.arange(45), 50)
    predicted = truth.copy()
    for i in range(44):
        predicted[50 * i : 50 * i + i] = i + 1
    labels = [f"class {i}" for i in range(45)]
    page = write(tmp_path / "report.html", truth=truth, predicted=predicted, labels=labels)
    pairs = [row for row in page.rows if len(row) == 4 and row[1].startswith("class")]
    assert [int(row[2]) for row in pairs] == list(range(43, 13, -1))
    assert pairs[0] == ["class 43", "class 44", "43", "86.0%"]


def test_many_classes_without_a_mistake_say_so(tmp_path):
    truth = np.arange(41)
    labels = [f"class {i}" for i in truth]
    page = write(tmp_path / "report.html", truth=truth, predicted=truth, labels=labels)
    assert "No class was taken for another." in page.text


def test_training_curves_are_drawn_where_there_is_a_history(tmp_path):
    page = write(tmp_path / "report.html", history=HISTORY)
    assert page.tags.count("svg") == 2
    assert "2 epochs; the best is epoch 2" in page.text
    assert write(tmp_path / "report.html", history=[]).tags.count("svg") == 1


def test_mistakes_stand_most_confident_first(tmp_path):
    page = write(
        tmp_path / "report.html",
        mistakes=[mistake("mild", confidence=0.4), mistake("bold", confidence=0.9)],
    )
    assert page.text.index("bold") < page.text.index("mild")
    assert "2 of 5 mistakes" in page.text
    assert "90.0%" in page.text


def test_a_long_text_is_cut_and_says_so(tmp_path):
    page = write(tmp_path / "report.html", mistakes=[mistake("x" * 1500)])
    assert "… 1,100 more characters" in page.text


def test_images_are_inlined_as_they_are(tmp_path):
    png = image_png()
    page = write(tmp_path / "report.html", mistakes=[mistake("a.jpg", image=png)])
    (source,) = [v for tag, name, v in page.attributes if (tag, name) == ("img", "src")]
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == png


def test_an_image_that_is_not_png_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"'a\.jpg'.*PNG"):
        write(tmp_path / "report.html", mistakes=[mistake("a.jpg", image=b"\xff\xd8\xff")])
    assert list(tmp_path.iterdir()) == []


def test_labels_that_are_not_the_reports_are_refused(tmp_path):
    report = classification_report(TRUTH, PREDICTED, LABELS, resamples=5)
    with pytest.raises(DataError, match="labels"):
        write(tmp_path / "report.html", report=report, labels=["cat", "eel", "dog"])


def test_equal_input_gives_equal_bytes_in_any_process(tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path;"
        "from edgetune.bench.report import write_report;"
        "from edgetune.tasks.metrics import classification_report;"
        "report = classification_report(np.array([0, 1, 1]), np.array([0, 1, 0]), ['a', 'b']);"
        "write_report(Path(sys.argv[1]), title='t', facts={}, report=report, labels=['a', 'b'],"
        " mistakes=[], history=[{'train_loss': 1.0, 'val_accuracy': 0.5}])"
    )
    for name, seed in (("a.html", "1"), ("b.html", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": seed}
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        subprocess.run(command, check=True, env=environment)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_report_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(ResourceError, match="no space left"):
        write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
