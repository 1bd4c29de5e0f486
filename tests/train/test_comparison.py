"""The figure that compares runs."""

import io

import pytest
from matplotlib.text import Text
from PIL import Image

from edgetune.errors import ConfigError, DataError
from edgetune.tasks.curves import figure_style
from edgetune.train.comparison import MOST_RUNS, comparison_figure, spread, write_comparison

A = [{"epoch": n, "val_accuracy": a, "val_loss": 1 - a} for n, a in ((1, 0.5), (2, 0.75), (3, 0.7))]
B = [{"epoch": n, "val_accuracy": a, "val_loss": 1 - a} for n, a in ((1, 0.25), (2, 0.72))]


def test_each_run_is_a_line_in_each_panel_with_its_name_at_the_end():
    figure = comparison_figure({"lora": A, "full": B})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Validation accuracy", "Validation loss"]
    for axes, key in zip(figure.axes, ("val_accuracy", "val_loss"), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        for name, history in (("lora", A), ("full", B)):
            assert list(lines[name].get_xdata()) == [line["epoch"] for line in history]
            assert list(lines[name].get_ydata()) == [line[key] for line in history]
        named = {text.get_text(): text for text in axes.texts}
        assert named["lora"].xy == (3, A[-1][key])
        assert named["full"].xy == (2, B[-1][key])
        assert named["lora"].get_color() == lines["lora"].get_color()


def test_the_best_epoch_is_marked_the_highest_metric_and_the_lowest_loss():
    figure = comparison_figure({"lora": A})
    marks = [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for axes in figure.axes
        for line in axes.lines
        if line.get_marker() == "o"
    ]
    assert marks == [(2.0, 0.75), (2.0, 0.25)]


def test_names_lie_within_the_figure_and_on_none_of_each_other():
    runs = {f"run-number-{n}": A for n in range(MOST_RUNS)}
    figure = comparison_figure(runs)
    with figure_style():
        figure.savefig(io.BytesIO(), format="png")  # lays it out
        # of the words alone, without the thread to the line's end
        boxes = [Text.get_window_extent(text) for axes in figure.axes for text in axes.texts]
    width = figure.bbox.width
    assert all(box.x1 <= width for box in boxes)
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])


def test_eight_runs_differ_in_colour_or_dashes():
    axes = comparison_figure({str(n): A for n in range(8)}).axes[0]
    looks = {
        (line.get_color(), line.get_linestyle())
        for line in axes.lines
        if line.get_label()[0] != "_"
    }
    assert len(looks) == 8


def test_more_runs_than_can_be_told_apart_are_refused():
    with pytest.raises(ConfigError, match="at most 8 runs"):
        comparison_figure({str(n): A for n in range(9)})


def test_runs_without_epochs_have_nothing_to_draw():
    with pytest.raises(DataError, match="val_accuracy or val_loss"):
        comparison_figure({"a": [], "b": [{"epoch": 1, "lr": 0.1}]})


def test_a_run_without_epochs_is_left_out_beside_others():
    axes = comparison_figure({"a": [], "b": B}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["b"]


def test_loss_as_the_metric_is_one_panel():
    assert len(comparison_figure({"a": A}, metric="loss").axes) == 1


def test_a_png_is_written(tmp_path):
    write_comparison(tmp_path / "c.png", {"lora": A, "full": B})
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (1568, 528)  # 9.8 x 3.3 inches at 160 dots
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([], []),
        ([0.3], [0.3]),
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.52, 0.5], [0.56, 0.46]),
        ([1.0, 1.0], [0.9, 1.0]),
        ([0.0, 0.02, 0.5], [0.0, 0.1, 0.5]),
        # the pair moves to 0.45 and 0.55, too near to 0.6: three about their mean, 1.6 / 3
        ([0.5, 0.5, 0.6], [1.6 / 3 - 0.1, 1.6 / 3, 1.6 / 3 + 0.1]),
    ],
)
def test_names_move_apart_no_further_than_needed(heights, expected):
    assert spread(heights, 0.1) == pytest.approx(expected)


def test_more_names_than_fit_share_the_height():
    assert spread([0.5] * 5, 0.5) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
