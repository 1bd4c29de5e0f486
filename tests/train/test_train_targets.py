"""Training where labels are several at once, or numbers."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgetune.bench.evaluate import evaluate
from edgetune.config import TrainConfig
from edgetune.errors import ConfigError, DataError
from edgetune.train import open_run, resume, run_dataset, train
from edgetune.train.history import read_history


@pytest.fixture(scope="module")
def texts(switches, tmp_path_factory) -> dict[str, Path]:
    """The switches with two labels or none, separated by ";", and with numbers."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [line.split(",") for line in switches.read_text().splitlines()[1:]]
    labels = {"on": "on;lit", "off": ""}
    paths = {"labels": folder / "labels.csv", "values": folder / "values.csv"}
    written = {
        "labels": [f"{text},{labels[label]}\n" for text, label in rows],
        "values": [f"{text},{5e4 + 200 * (label == 'on')}\n" for text, label in rows],
    }
    for name, path in paths.items():
        path.write_text("text,label\n" + "".join(written[name]))
    return paths


def config(model: str, data: Path, output: Path, task: str, **options) -> TrainConfig:
    given = {"lr": 5e-3, "epochs": 5, "batch_size": 8, "method": "full", **options}
    return TrainConfig(
        task=task, model=model, data=str(data), output=str(output), cpu=True, label_separator=";",
        **given,
    )  # fmt: skip


def test_several_labels_are_learned_with_rare_ones_weighed(tiny_bert, texts, tmp_path):
    wanted = config(
        tiny_bert, texts["labels"], tmp_path / "run", "text-multilabel-classification",
        class_weights="balanced",
    )  # fmt: skip
    record = train(wanted)
    assert record.labels == ("lit", "on")
    assert record.scale is None
    assert record.metrics["val_accuracy"] >= 0.9
    line = read_history(tmp_path / "run")[-1]
    assert {"val_loss", "val_accuracy", "val_f1_macro", "val_f1_micro"} <= set(line)
    # what was measured while training is what is measured after
    report = evaluate(tmp_path / "run").report
    best = read_history(tmp_path / "run")[record.best_epoch - 1]
    assert report.f1_macro.value == pytest.approx(best["val_f1_macro"], abs=1e-6)
    assert report.log_loss == pytest.approx(best["val_loss"], abs=1e-4)
    assert report.mean_average_precision.value == pytest.approx(
        best["val_mean_average_precision"], abs=1e-6
    )
    data = run_dataset(open_run(tmp_path / "run"))
    assert Counter(data.splits["val"].labels).keys() == {"on;lit", ""}


def test_numbers_are_learned_in_any_unit_and_a_resumed_run_is_the_same(tiny_bert, texts, tmp_path):
    def wanted(name: str) -> TrainConfig:
        return config(
            tiny_bert,
            texts["values"],
            tmp_path / name,
            "text-regression",
            loss="huber",
            lr=2e-3,
            epochs=8,
        )

    record = train(wanted("whole"))
    train_values = [
        float(x) for x in run_dataset(open_run(tmp_path / "whole")).splits["train"].labels
    ]
    assert record.scale.mean == pytest.approx(np.mean(train_values))
    assert record.scale.std == pytest.approx(np.std(train_values))
    assert record.metrics["val_r2"] >= 0.8
    assert record.metrics["val_mae"] <= 50
    report = evaluate(tmp_path / "whole").report
    assert report.mae.value == pytest.approx(record.metrics["val_mae"], rel=1e-3)

    def interrupt(event) -> None:
        if event.kind == "epoch" and event.values["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(wanted("parts"), on_event=interrupt)
    again = resume(tmp_path / "parts")
    assert again.scale == record.scale
    keys = ("epoch", "train_loss", "val_loss", "val_mae", "val_r2")
    whole, parts = (
        [{k: line[k] for k in keys} for line in read_history(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert whole == parts
    stored = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert stored["scale"] == {"mean": record.scale.mean, "std": record.scale.std}


@pytest.mark.parametrize(
    ("data", "task"),
    [("labels", "text-multilabel-classification"), ("values", "text-regression")],
)
def test_kept_activations_carry_every_kind_of_label(tiny_bert, texts, tmp_path, data, task):
    losses = {}
    for cache in ("off", "memory"):
        wanted = config(
            tiny_bert, texts[data], tmp_path / cache, task, method="head", epochs=2,
            activation_cache=cache,
        )  # fmt: skip
        train(wanted)
        losses[cache] = [line["val_loss"] for line in read_history(tmp_path / cache)]
    assert losses["memory"] == pytest.approx(losses["off"], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"loss": "cross_entropy"}, "loss 'cross_entropy' does not fit values"),
        ({"class_weights": "balanced"}, "class_weights 'balanced' does not fit values"),
        ({"metric": "f1_macro"}, "metric 'f1_macro' does not fit text-regression"),
    ],
)
def test_what_does_not_fit_numbers_is_refused(tiny_bert, texts, tmp_path, options, what):
    with pytest.raises(ConfigError, match=what):
        train(config(tiny_bert, texts["values"], tmp_path / "run", "text-regression", **options))


def test_texts_for_numbers_are_refused_before_anything_is_loaded(tiny_bert, switches, tmp_path):
    with pytest.raises(DataError, match=r"train\.csv:2: label: expected a finite number"):
        train(config(tiny_bert, switches, tmp_path / "run", "text-regression"))
    assert not (tmp_path / "run").exists()
