import io
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from edgetune.errors import DataError, MissingExtraError
from edgetune.tasks.curves import best_epoch, curves_figure, write_curves

HISTORY = [
    {
        "epoch": epoch, "train_loss": 2.0 / epoch, "val_loss": 2.2 / epoch + 0.1,
        "val_accuracy": accuracy, "val_f1_macro": accuracy - 0.1, "lr": 1e-3 / epoch,
        "seconds": 9.0,
    }
    for epoch, accuracy in [(1, 0.5), (2, 0.75), (3, 0.75), (4, 0.7)]
]  # fmt: skip


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def without(key):
    return [{k: v for k, v in entry.items() if k != key} for entry in HISTORY]


def curve(figure, panel, name):
    (line,) = [line for line in figure.axes[panel].lines if line.get_label() == name]
    return line


def test_the_panels_are_losses_metrics_and_learning_rate():
    figure = curves_figure(HISTORY)
    assert titles(figure) == ["Loss", "Validation", "Learning rate"]
    np.testing.assert_array_equal(curve(figure, 0, "training").get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(
        curve(figure, 0, "training").get_ydata(), [2.0, 1.0, 2.0 / 3.0, 0.5]
    )
    np.testing.assert_array_equal(curve(figure, 1, "accuracy").get_ydata(), [0.5, 0.75, 0.75, 0.7])


def test_a_constant_learning_rate_has_no_panel():
    constant = [{**entry, "lr": 1e-3} for entry in HISTORY]
    assert titles(curves_figure(constant)) == ["Loss", "Validation"]
    assert titles(curves_figure(without("lr"))) == ["Loss", "Validation"]


def test_only_what_history_has_is_drawn():
    figure = curves_figure([{"train_loss": 1.0}, {"train_loss": 0.5}])
    assert titles(figure) == ["Loss"]
    np.testing.assert_array_equal(curve(figure, 0, "training").get_xdata(), [1, 2])
    assert len(figure.axes[0].lines) == 1


@pytest.mark.parametrize("gap", [math.nan, math.inf, None])
def test_a_value_that_is_absent_or_not_finite_leaves_a_gap(gap):
    history = [dict(entry) for entry in HISTORY]
    if gap is None:
        del history[1]["val_loss"]
    else:
        history[1]["val_loss"] = gap
    drawn = curve(curves_figure(history), 0, "validation").get_ydata()
    np.testing.assert_array_equal(np.isnan(drawn), [False, True, False, False])


def test_a_single_epoch_is_drawn_as_a_point():
    line = curve(curves_figure(HISTORY[:1]), 0, "training")
    assert line.get_marker() == "o"


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", 2), ("f1_macro", 2), ("loss", 4)])
def test_the_best_epoch_is_the_first_of_the_best(metric, expected):
    assert best_epoch(HISTORY, metric=metric) == expected


def test_the_best_epoch_falls_back_on_a_metric_that_is_there():
    assert best_epoch([{"val_loss": 0.5}, {"val_loss": 0.4}, {"val_loss": 0.6}]) == 2
    assert best_epoch([{"val_accuracy": math.nan}, {"val_accuracy": 0.1}]) == 2
    assert best_epoch([{"train_loss": 0.5}]) is None


def test_the_best_epoch_is_marked():
    figure = curves_figure(HISTORY, metric="loss")
    assert curve(figure, 1, "best: epoch 4").get_xdata()[0] == 4
    assert any(list(line.get_ydata()) == [0.7] for line in figure.axes[1].lines)


@pytest.mark.parametrize("history", [[], [{}], [{"lr": 1.0}], [{"train_loss": math.nan}]])
def test_a_history_with_nothing_to_draw_is_refused(history):
    with pytest.raises(DataError, match="train_loss"):
        curves_figure(history)


def test_the_png_is_whole_and_the_same_each_time(tmp_path):
    write_curves(tmp_path / "a.png", HISTORY)
    write_curves(tmp_path / "b.png", HISTORY)
    content = (tmp_path / "a.png").read_bytes()
    assert content == (tmp_path / "b.png").read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert image.width > 2 * image.height
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_the_users_matplotlib_settings_neither_matter_nor_change(tmp_path):
    import matplotlib

    write_curves(tmp_path / "a.png", HISTORY)
    with matplotlib.rc_context({"lines.linewidth": 9.0, "axes.facecolor": "black"}):
        write_curves(tmp_path / "b.png", HISTORY)
        assert matplotlib.rcParams["lines.linewidth"] == 9.0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_matplotlib_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"edgetune\[train\]"):
        curves_figure(HISTORY)


def test_matplotlib_waits_for_a_drawing_and_pyplot_is_never_loaded():
    code = (
        "import sys; sys.modules.update(torch=None, sklearn=None);"
        "import edgetune.bench.report as report;"
        "assert 'matplotlib' not in sys.modules;"
        "report.curves_figure([{'train_loss': 1.0}]).savefig('/dev/null', format='png');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
