import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from edgetune.errors import DataError
from edgetune.export.pareto import accuracy_floor, pareto_figure, pareto_png
from edgetune.export.records import Attempt, LayerDamage, LayerSaturationRow, SearchReport
from edgetune.export.report import ladder_markdown, search_html, search_json, write_reports
from edgetune.export.search import Budgets
from edgetune.runtime.records import from_mapping
from edgetune.tasks.metrics import Interval
from edgetune.tasks.paired import compare

VOID = {"meta", "br"}
ATTACK = "<script>alert(1)</script>\"'& | `x`"
# 100 samples of two classes, 90 of which fp32 gets right; the candidate loses one of them
TRUTH = np.arange(100) % 2
FP32 = np.where(np.arange(100) < 90, TRUTH, 1 - TRUTH)
INT8 = np.where(np.arange(100) == 3, 1 - FP32, FP32)


class Page(HTMLParser):
    """Reads a page, checking that tags nest, and keeps what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows = [], [], [], []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
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


def comparison():
    one_hot = np.eye(2)
    return compare(TRUTH, one_hot[FP32], one_hot[INT8], ["a", "b"], resamples=20)


def fp32(**changes):
    return dataclasses.replace(
        Attempt(
            rung="fp32", description="as trained", precision="fp32", status="passed", reason="",
            size_mib=40.0, latency_p50_ms=29.0, latency_p95_ms=30.0,
            latency_basis="measured here", peak_rss_mib=120.0,
            accuracy=Interval(value=0.9, low=0.82, high=0.95), seconds=2.0, pareto=True,
        ),
        **changes,
    )  # fmt: skip


def int8(**changes):
    return fp32(
        rung="int8 dynamic", precision="int8", status="chosen", size_mib=11.5,
        latency_p50_ms=11.0, latency_p95_ms=12.5, peak_rss_mib=70.0, comparison=comparison(),
        accuracy=Interval(value=0.89, low=0.81, high=0.94), **changes,
    )  # fmt: skip


def report(*attempts, **changes):
    return dataclasses.replace(
        SearchReport(
            name="pets", profile="raspberry-pi-4",
            budgets=Budgets(max_drop=0.05, max_latency_ms=20.0), attempts=attempts,
            verdict="int8 dynamic is taken.", search="first", seconds=61.0,
        ),
        **changes,
    )  # fmt: skip


def layer(name, sqnr_db, **changes):
    return LayerDamage(
        layer=name, parameters=4096, sqnr_db=sqnr_db,
        **{"op": "MatMul", "kept": "int8", **changes},
    )  # fmt: skip


def row_of(page, name):
    (row,) = [row for row in page.rows if any(cell.startswith(name) for cell in row[:2])]
    return [" ".join(cell.split()) for cell in row]


def test_the_verdict_is_the_first_thing_under_the_name():
    text = " ".join(Page(search_html(report(fp32(), int8()))).text.split())
    assert "Export report pets int8 dynamic is taken." in text


def test_the_ladder_says_the_numbers_of_every_attempt():
    found = Page(search_html(report(fp32(), int8())))
    number, name, result, accuracy, loss, latency, size, memory = row_of(found, "int8 dynamic")
    assert (number, result) == ("2", "chosen")
    assert "2.0 s" in name
    assert accuracy.startswith("89.0%")
    assert loss.startswith("1.00 points")
    assert "1 lost, 0 gained" in loss
    assert latency.startswith("12.5 ms")
    assert "median 11.0 ms" in latency
    assert "measured here" in latency
    assert (size, memory) == ("11.5 MiB", "70.0 MiB")
    assert row_of(found, "fp32as")[2] == "passed"
    assert ("tr", "class", "chosen") in found.attributes


def test_an_estimate_says_so_wherever_it_stands():
    estimate = int8(latency_basis="estimate")
    found = Page(search_html(report(fp32(), estimate)))
    assert "≈ 12.5 ms" in row_of(found, "int8 dynamic")[5]
    assert "estimate" in row_of(found, "int8 dynamic")[5]
    assert "Latency p95, estimate" in found.text
    assert "hollow: estimate" in found.text
    assert "12.5 ms (estimate)" in ladder_markdown(report(fp32(), estimate))
    measured = search_html(report(fp32(), int8()))
    assert "≈" not in measured
    assert "hollow" not in measured
    assert "estimate" not in ladder_markdown(report(fp32(), int8()))


def test_what_was_not_measured_is_a_dash_and_breaks_nothing():
    refused = Attempt(
        rung="int4", description="blocks", precision="int4", status="refused",
        reason="The profile has no such kernel.",
    )  # fmt: skip
    found = Page(search_html(report(fp32(), refused)))
    assert row_of(found, "int4")[3:] == ["–"] * 5
    assert "The profile has no such kernel." in found.text
    assert "1 candidate without both numbers not shown" in found.text
    alone = Page(search_html(report(refused)))
    assert "svg" not in alone.tags
    assert "None was tried." in Page(search_html(report())).text


def test_text_from_outside_is_escaped_everywhere():
    attempt = int8(description=ATTACK, reason=ATTACK, session_config={ATTACK: ATTACK})
    whole = report(
        fp32(), dataclasses.replace(attempt, rung=ATTACK, precision=ATTACK), name=ATTACK,
        profile=ATTACK, verdict=ATTACK, notes=(ATTACK,), facts={ATTACK: ATTACK}, search=ATTACK,
        overrides=(ATTACK,), layers=(layer(ATTACK, 20.0, kept=ATTACK, op=ATTACK),),
        saturation=(
            LayerSaturationRow(
                layer=ATTACK, candidate_pairs=1, saturated_share=0.5, worst_error=1.0, repair="none"
            ),
        ),
    )  # fmt: skip
    found = Page(search_html(whole))
    assert "script" not in found.tags
    assert found.text.count(ATTACK) >= 17
    assert not [a for a in found.attributes if a[1].startswith("on")]
    assert len(ladder_markdown(whole).splitlines()) == 4


def test_nothing_is_loaded_from_outside():
    text = search_html(report(fp32(), int8(), layers=(layer("a", 30.0),)))
    found = Page(text)
    assert not {"script", "link", "iframe", "object", "base", "img"} & set(found.tags)
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert not re.search(r"url\((?!#)", text)


def test_the_gate_says_what_it_saw_of_the_chosen_candidate():
    refused = dataclasses.replace(int8(), rung="int8 static", status="failed")
    found = Page(search_html(report(fp32(), int8(), refused)))
    assert "The gate: int8 dynamic against fp32" in found.text
    assert row_of(found, "samples")[1] == "100 of the validation split"
    # one discordant pair: the exact two-sided McNemar p is 2 x 0.5
    assert row_of(found, "same answer")[1] == ("99.0 % of them; 1 lost, 0 gained (McNemar p 1)")
    assert row_of(found, "accuracy lost")[1].startswith("1.00 points, 95 % interval ")
    # sample 3 is one of the 50 of class b
    assert row_of(found, "worst class")[1] == "2.00 points of recall, b, 50 samples"
    # one-hot answers: the one that changed went from 0 to 1
    assert row_of(found, "largest change")[1] == "1.000"
    # without a choice it is the last that was compared, and without a comparison none
    last = search_html(report(fp32(), dataclasses.replace(int8(), status="failed"), refused))
    assert "The gate: int8 static against fp32" in Page(last).text
    assert "The gate" not in Page(search_html(report(fp32()))).text


def test_layers_stand_most_damaging_first_with_bars_to_scale():
    layers = (layer("mild", 40.0), layer("none", None), layer("bold", 20.0, accuracy_drop=0.03))
    text = search_html(report(fp32(), layers=layers))
    found = Page(text)
    # noise / signal = 10^(-dB / 20)
    assert row_of(found, "bold")[1] == "10%20.0 dB3.00 points of accuracy"
    assert row_of(found, "mild")[1] == "1%40.0 dB"
    assert row_of(found, "none")[1] == "none"
    assert text.index("bold") < text.index("mild")
    widths = re.findall(r'class="bar" style="width:([\d.]+)%"', text)
    assert [float(w) for w in widths] == [100.0, 10.0, 0.0]


def test_layers_without_a_signal_ratio_are_ranked_by_divergence():
    layers = tuple(layer(f"l{i}", None, mean_kl=0.01 * i) for i in (1, 3, 2))
    text = search_html(report(fp32(), layers=layers))
    assert text.index("l3") < text.index("l2") < text.index("l1")
    assert row_of(Page(text), "l3")[1] == "0.03"


def test_of_many_layers_the_thirty_worst_are_shown():
    layers = tuple(layer(f"layer {i:02}", 60.0 - i) for i in range(45))
    found = Page(search_html(report(fp32(), layers=layers)))
    shown = [row[0][:8] for row in found.rows if row[0].startswith("layer ")]
    assert shown == [f"layer {i:02}" for i in range(44, 14, -1)]
    assert "15 more layers below 0.56% not shown" in found.text  # 10^(-45 / 20)


def test_saturation_stands_worst_first():
    rows = tuple(
        LayerSaturationRow(
            layer=f"conv {i}", candidate_pairs=1200, saturated_share=share, worst_error=0.125,
            repair="u8 weights",
        )
        for i, share in enumerate((0.00001, 0.25))
    )  # fmt: skip
    found = Page(search_html(report(fp32(), saturation=rows)))
    assert row_of(found, "conv 1") == ["conv 1", "1,200", "25.0%", "0.125", "u8 weights"]
    assert row_of(found, "conv 0")[2] == "0.001%"
    assert found.text.index("conv 1") < found.text.index("conv 0")


def test_budgets_overrides_and_session_options_are_said():
    budgets = Budgets(max_drop=0.01, max_class_drop=0.1, max_size_mib=8.0)
    attempt = int8(session_config={"session.x64quantprecision": "1"})
    found = Page(search_html(report(attempt, budgets=budgets, overrides=("speed",))))
    assert ["loss of accuracy", "at most 1 points, with 95 % confidence"] in found.rows
    assert ["loss of a class", "at most 10 points of recall"] in found.rows
    assert ["size", "at most 8 MiB"] in found.rows
    assert ["latency p95", "no limit"] in found.rows
    assert ["session.x64quantprecision", "1"] in found.rows
    assert "Limits that were set aside: speed." in found.text


def many(count):
    attempts = [fp32()]
    for i in range(1, count):
        accuracy = 0.9 - 0.002 * (i % 7)
        attempts.append(
            int8(
                description="x" * 300,
                reason="a long reason " * 20,
            )
        )
        attempts[-1] = dataclasses.replace(
            attempts[-1], status="chosen" if i == 1 else "failed", rung=f"int8 {i}",
            latency_p95_ms=10.0 + i % 5, size_mib=8.0 + i,
            accuracy=Interval(value=accuracy, low=accuracy - 0.1, high=accuracy + 0.05),
        )  # fmt: skip
    return report(*attempts)


@pytest.mark.parametrize("count", [1, 2, 30])
def test_any_number_of_attempts_is_drawn_each_with_its_number(count):
    found = Page(search_html(many(count)))
    assert found.tags.count("svg") == 1
    assert len([row for row in found.rows if row[0].isdigit()]) == count
    figure = pareto_figure(many(count))
    numbers = [t.get_text() for t in figure.axes[0].texts if t.get_text().isdigit()]
    assert sorted(map(int, numbers)) == list(range(1, count + 1))


def test_numbers_of_a_few_points_do_not_hide_one_another():
    figure = pareto_figure(many(12))
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text().isdigit()]
    overlaps = [(i, j) for i, a in enumerate(boxes) for j in range(i) if a.overlaps(boxes[j])]
    assert overlaps == []


def test_points_lie_at_latency_and_accuracy_and_grow_with_size():
    axes = pareto_figure(report(fp32(), int8())).axes[0]
    points = [c for c in axes.collections if len(c.get_offsets())]
    found = {tuple(map(float, c.get_offsets()[0])): float(c.get_sizes()[0]) for c in points}
    assert set(found) == {(30.0, 0.9), (12.5, 0.89)}
    assert found[30.0, 0.9] > found[12.5, 0.89]


def test_budgets_are_lines_where_they_are_near():
    def lines(budgets):
        axes = pareto_figure(report(fp32(), int8(), budgets=budgets)).axes[0]
        return [line for line in axes.lines if line.get_linestyle() == "--"]

    near, far = Budgets(max_drop=0.02, max_latency_ms=20.0), Budgets(max_drop=0.9)
    assert len(lines(near)) == 2
    assert lines(far) == []
    assert accuracy_floor(report(fp32(), int8(), budgets=near)) == pytest.approx(0.88)
    assert accuracy_floor(report(fp32())) is None


def test_the_png_is_an_image_and_equal_input_gives_equal_bytes():
    png = pareto_png(report(fp32(), int8()))
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        assert min(image.size) > 600
    assert pareto_png(report(fp32(), int8())) == png
    assert search_html(many(4)) == search_html(many(4))


def test_no_point_at_all_cannot_be_drawn():
    with pytest.raises(DataError, match="latency and an accuracy, got none among 1"):
        pareto_png(report(fp32(latency_p95_ms=None)))
    with pytest.raises(DataError, match="got none"):
        pareto_png(report(fp32(latency_p95_ms=math.nan)))


def test_the_report_comes_back_from_its_json():
    whole = report(fp32(), int8(), layers=(layer("a", 30.0),), facts={"onnxruntime": "1.31.0"})
    assert from_mapping(SearchReport, json.loads(search_json(whole)), where="json") == whole


def test_json_has_no_number_that_json_lacks():
    text = search_json(report(fp32(), layers=(layer("a", math.inf),)))
    assert json.loads(text)["layers"][0]["sqnr_db"] is None


def test_the_markdown_table_has_a_row_of_eight_cells_for_each_attempt():
    table = ladder_markdown(
        report(fp32(), int8(), fp32(rung="a|b\nc", status="failed", reason="too *slow*"))
    ).splitlines()
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [9] * 5
    assert table[3].startswith("| 2 | int8 dynamic (int8) | **chosen** | 89.00 % | 1.00, ")
    assert "12.5 ms | 11.5 MiB | 70.0 MiB" in table[3]
    assert r"a\|b c (fp32) | failed: too \*slow\*" in table[4]


def test_the_reports_lie_beside_the_bundle(tmp_path):
    written = write_reports(report(fp32(), int8()), tmp_path / "pets")
    assert written == tmp_path / "pets.report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pets.report.html", "pets.search.json"]
    assert "int8 dynamic is taken." in written.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "pets.search.json").read_bytes())["profile"] == "raspberry-pi-4"
