"""Several labels at once: what is encoded, measured and compared."""

import numpy as np
import pytest
import sklearn.metrics
import torch

from edgetune.config import TrainConfig
from edgetune.data import Split, encode_targets
from edgetune.errors import ConfigError, DataError
from edgetune.runtime.tasks.multilabel import sigmoid
from edgetune.tasks import TASKS, open_task, selection_metric, task_target
from edgetune.tasks.multilabel import average_precisions, label_report
from edgetune.tasks.paired import verdict
from edgetune.tasks.paired_targets import compare_labels
from edgetune.tasks.targets import plain_losses, target_tensor

LABELS = ("a", "b", "c")


@pytest.fixture
def measured():
    """200 samples of 3 labels, with scores that know something and are often the same."""
    rng = np.random.default_rng(0)
    truth = rng.random((200, 3)) < (0.5, 0.3, 0.1)
    scores = np.round(np.clip(0.3 * truth + 0.6 * rng.random((200, 3)), 0, 1), 1)
    return truth, scores


def split_of(*labels: str) -> Split:
    return Split(
        name="train", inputs=tuple(str(i) for i in range(len(labels))), labels=labels,
        where=tuple(f"t.csv:{i + 2}" for i in range(len(labels))), target="multilabel",
    )  # fmt: skip


def test_labels_become_rows_of_zero_and_one_and_none_is_a_row_of_zeros():
    found = encode_targets(split_of("b", "", "c|a"), LABELS)
    np.testing.assert_array_equal(found, [[0, 1, 0], [0, 0, 0], [1, 0, 1]])
    assert target_tensor(split_of("b"), LABELS, None).dtype == torch.float32


def test_a_label_that_the_model_lacks_is_refused_with_its_place():
    with pytest.raises(DataError, match=r"t\.csv:3: label 'd' is none of the model's"):
        encode_targets(split_of("a", "a|d"), LABELS)


def test_metrics_are_those_of_scikit_learn(measured):
    truth, scores = measured
    predicted = scores >= 0.5
    report = label_report(truth, scores, LABELS, resamples=10)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(truth, predicted),
        "precision_micro": sklearn.metrics.precision_score(truth, predicted, average="micro"),
        "recall_micro": sklearn.metrics.recall_score(truth, predicted, average="micro"),
        "f1_micro": sklearn.metrics.f1_score(truth, predicted, average="micro"),
        "f1_macro": sklearn.metrics.f1_score(truth, predicted, average="macro"),
        "mean_average_precision": sklearn.metrics.average_precision_score(truth, scores),
    }
    assert {name: getattr(report, name).value for name in expected} == pytest.approx(expected)
    each = sklearn.metrics.average_precision_score(truth, scores, average=None)
    assert [s.average_precision for s in report.per_label] == pytest.approx(each.tolist())
    per_label = sklearn.metrics.precision_recall_fscore_support(truth, predicted)
    found = [[getattr(s, k) for s in report.per_label] for k in ("precision", "recall", "f1")]
    np.testing.assert_allclose(found, per_label[:3])
    clipped = np.clip(scores, np.finfo(float).eps, 1 - np.finfo(float).eps)
    losses = [sklearn.metrics.log_loss(truth[:, i], clipped[:, i]) for i in range(3)]
    assert report.log_loss == pytest.approx(np.mean(losses))


def test_average_precision_of_drawn_samples_is_that_of_the_samples_repeated(measured):
    truth, scores = measured
    weights = np.random.default_rng(1).integers(0, 3, (2, len(truth)))
    for row, found in zip(weights, average_precisions(truth, scores, weights), strict=True):
        drawn = np.repeat(np.arange(len(truth)), row)
        expected = sklearn.metrics.average_precision_score(
            truth[drawn], scores[drawn], average=None
        )
        np.testing.assert_allclose(found, expected)


def test_intervals_hold_the_value_and_shrink_with_more_samples(measured):
    truth, scores = measured
    few = label_report(truth, scores, LABELS).accuracy
    many = label_report(np.tile(truth, (9, 1)), np.tile(scores, (9, 1)), LABELS).accuracy
    assert few.low < few.value < few.high
    # a third of the width for nine times the samples
    assert (many.high - many.low) / (few.high - few.low) == pytest.approx(1 / 3, abs=0.1)


def test_a_label_that_no_sample_has_takes_no_part_in_mean_average_precision():
    truth = np.array([[1, 0], [0, 0], [1, 0]], bool)
    scores = np.array([[0.9, 0.1], [0.2, 0.3], [0.8, 0.2]])
    report = label_report(truth, scores, ("a", "b"), resamples=5)
    assert report.mean_average_precision.value == 1.0
    assert [s.average_precision for s in report.per_label] == [1.0, None]
    assert label_report(truth[1:2], scores[1:2], ("a", "b")).mean_average_precision is None


def test_each_label_has_its_own_threshold():
    truth = np.array([[1, 1], [0, 0]], bool)
    scores = np.array([[0.4, 0.8], [0.1, 0.6]])
    report = label_report(truth, scores, ("a", "b"), thresholds=np.array([0.3, 0.7]))
    assert report.accuracy.value == 1.0
    assert label_report(truth, scores, ("a", "b")).accuracy.value == 0.0


@pytest.mark.parametrize(
    ("truth", "scores", "what"),
    [
        (np.zeros((0, 2)), np.zeros((0, 2)), "no samples"),
        (np.zeros((2, 2)), np.zeros((2, 3)), "expected truth and probabilities of shape"),
        (np.zeros((1, 2)), np.array([[0.5, 1.5]]), "from 0 to 1"),
        (np.zeros((1, 2)), np.array([[0.5, np.nan]]), "from 0 to 1"),
    ],
)
def test_what_are_no_probabilities_of_labels_is_refused(truth, scores, what):
    with pytest.raises(DataError, match=what):
        label_report(truth, scores, ("a", "b"))


def test_a_sample_counts_as_lost_where_one_label_turns_wrong():
    truth = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], bool)
    reference = np.array([[0.9, 0.1], [0.9, 0.9], [0.1, 0.2], [0.2, 0.1]])  # the third is wrong
    candidate = reference.copy()
    candidate[0, 1] = 0.6  # lost
    candidate[2, 1] = 0.7  # gained
    found = compare_labels(truth, reference, candidate, ("a", "b"))
    assert (found.samples, found.lost, found.gained) == (4, 1, 1)
    assert (found.reference_accuracy, found.candidate_accuracy) == (0.75, 0.75)
    assert (found.drop.value, found.agreement) == (0.0, 0.5)
    assert found.max_probability_difference == pytest.approx(0.5)
    # no label loses recall, "b" wins half
    assert (found.worst_class, found.worst_class_drop) == ("a", 0.0)
    f1 = [
        sklearn.metrics.f1_score(truth, scores >= 0.5, average="macro")
        for scores in (reference, candidate)
    ]
    assert found.f1_macro_drop.value == pytest.approx(f1[0] - f1[1])


def test_the_verdict_is_that_of_the_paired_samples():
    rng = np.random.default_rng(0)
    truth = rng.random((2000, 2)) < 0.5
    right = np.where(truth, 0.9, 0.1)
    wrong = right.copy()
    wrong[:100, 0] = 1 - wrong[:100, 0]  # 5 of 100 samples have a wrong label
    found = compare_labels(truth, right, wrong, ("a", "b"), resamples=50)
    assert (found.lost, found.gained, found.drop.value) == (100, 0, 0.05)
    assert verdict(found, 0.02).status == "fail"
    assert verdict(found, 0.1).status == "pass"
    assert verdict(compare_labels(truth, right, right, ("a", "b"), resamples=50), 0.01).status == (
        "pass"
    )


def test_plain_losses_are_the_mean_over_the_labels():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # -ln of sigmoid(x), or of 1 - sigmoid(x) = sigmoid(-x), by hand
    expected = [
        (np.log(1 + np.exp(-0.0)) + np.log(1 + np.exp(2.0))) / 2,
        (np.log(1 + np.exp(-1.0)) + np.log(1 + np.exp(-1.0))) / 2,
    ]
    found = plain_losses(logits, targets, "multilabel")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_the_devices_sigmoid_is_torchs_and_safe():
    logits = np.float32([-200, -3, 0, 3, 200])
    np.testing.assert_allclose(sigmoid(logits), torch.sigmoid(torch.tensor(logits)), atol=1e-7)
    assert sigmoid(np.float32([0.0]))[0] >= 0.5


def test_what_picks_the_best_epoch_goes_by_the_task():
    names = {name: selection_metric(TrainConfig(task=name)) for name in TASKS}
    assert names == {
        "image-classification": "accuracy",
        "image-multilabel-classification": "f1_macro",
        "image-regression": "loss",
        "text-classification": "accuracy",
        "text-multilabel-classification": "f1_macro",
        "text-regression": "loss",
    }
    with pytest.raises(ConfigError, match="'accuracy' does not fit text-regression; it has loss"):
        selection_metric(TrainConfig(task="text-regression", metric="accuracy"))
    with pytest.raises(ConfigError, match="did you mean 'text-regression'"):
        task_target("text-regresion")


def test_mixing_does_not_fit_values():
    with pytest.raises(ConfigError, match="mixup and cutmix mix labels"):
        open_task("image-regression", None, ("value",), TrainConfig(mixup=0.2))
