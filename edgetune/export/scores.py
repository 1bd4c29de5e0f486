"""What a bundle's scores are worth: its temperature, and the score below which it abstains.

Both are fitted to the candidate that is shipped, quantized as it is, on its own answers to the
validation split as the profile's CPU would give them. Labels stay what they were.
"""

import dataclasses
import math

import numpy as np

from edgetune.bench.evaluate import Answers
from edgetune.runtime.manifest import Abstention, Calibration
from edgetune.tasks.calibration import (
    MIN_SAMPLES,
    log_probabilities,
    log_softmax,
    temperature_of,
    threshold_for,
)

# the device's float32 must not put the last answer that was kept below the threshold
_DECIMALS = 1e6


def fit_calibration(answers: Answers) -> tuple[Calibration | None, str]:
    """Return a calibration, where one lowers the log loss of samples held out, and a sentence.

    Args:
        answers: at temperature 1.
    """
    fit = temperature_of(log_probabilities(answers.probabilities), answers.truth)
    name = answers.split.name
    if fit is None:
        return None, (
            f"scores are as the network gives them: {len(answers.truth)} {name} samples are too"
            f" few to fit a temperature, {MIN_SAMPLES} would do"
        )
    before, after = 100 * fit.error_before, 100 * fit.error_after
    if not fit.helps:
        return None, (
            f"scores are as the network gives them (calibration error {before:.1f} points): a"
            f" temperature does not lower the log loss of {name} samples held out"
        )
    calibration = Calibration(
        temperature=round(fit.temperature, 6),
        ece_before=round(fit.error_before, 6),
        ece_after=round(fit.error_after, 6),
        samples=fit.samples,
    )
    return calibration, (
        f"scores are divided by temperature {fit.temperature:.3g}: calibration error"
        f" {before:.1f} -> {after:.1f} points, log loss {fit.loss_before:.4f} ->"
        f" {fit.loss_after:.4f}, on {fit.samples} {name} samples, each held out of its fit"
    )


def calibrated(answers: Answers, calibration: Calibration | None) -> Answers:
    """Return the answers with the scores that the device gives."""
    if calibration is None:
        return answers
    logs = log_probabilities(answers.probabilities)
    scores = np.exp(log_softmax(logs, calibration.temperature))
    return dataclasses.replace(answers, probabilities=scores)


def fit_abstention(answers: Answers, accuracy: float) -> Abstention:
    """Return from which score on the answers are as accurate as wanted.

    Args:
        answers: with the scores that the device gives.
        accuracy: wanted of the answers kept, in (0, 1).

    Raises:
        ConfigError: `accuracy` is out of range.
        GateError: no score reaches it.
    """
    found = threshold_for(accuracy, answers.confidence, answers.right)
    return Abstention(
        threshold=math.floor(found.threshold * _DECIMALS) / _DECIMALS,
        accuracy=accuracy,
        low=round(found.low, 6),
        coverage=round(found.coverage, 6),
        samples=found.samples,
    )


def abstention_sentence(abstention: Abstention, validated: Answers, shown: Answers) -> str:
    """Return what abstaining does; on other samples too, where there are some."""
    a = abstention
    text = (
        f"it abstains below score {a.threshold:.4f}: {100 * a.coverage:.1f} % of {a.samples}"
        f" {validated.split.name} samples are answered, and of those at least {100 * a.low:.2f} %"
        " rightly (95 %)"
    )
    if shown.split is validated.split:
        return text
    kept = shown.confidence >= a.threshold
    if not kept.any():
        return f"{text}; of {len(kept)} {shown.split.name} samples none"
    return (
        f"{text}; of {len(kept)} {shown.split.name} samples {100 * kept.mean():.1f} % are"
        f" answered, {100 * shown.right[kept].mean():.2f} % of them rightly"
    )
