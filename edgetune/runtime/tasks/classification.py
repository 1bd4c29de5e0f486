"""What all classification tasks share: logits to labels and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import IntegrityError
from edgetune.runtime.manifest import Manifest
from edgetune.runtime.records import to_mapping

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Classification:
    """One answer: the most probable label, its probability, and all of them if asked for.

    `abstained` says whether the probability is below the bundle's threshold, so that the label is
    no more than a best guess; None where the bundle has no threshold.
    """

    label: str
    score: float
    scores: dict[str, float] | None = None
    abstained: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: label, score, and what there is of scores and abstained."""
        return to_mapping(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How a bundle's logits become answers: its temperature and its threshold, if any."""

    temperature: float = 1.0
    threshold: float | None = None

    @classmethod
    def of(cls, manifest: Manifest, *, learned: bool) -> "Scoring":
        """Return a manifest's; a `learned` head has a scale of its own, and so temperature 1."""
        calibration, abstention = manifest.calibration, manifest.abstention
        return cls(
            temperature=1.0 if learned or calibration is None else calibration.temperature,
            threshold=None if abstention is None else abstention.threshold,
        )


def softmax(logits: FloatArray, temperature: float = 1.0) -> FloatArray:
    """Return probabilities over the last axis, shape unchanged; safe for large logits.

    Logits are divided by `temperature`, more than 0, first.
    """
    with np.errstate(over="ignore"):  # infinitely far below the largest: the probability is 0
        exp = np.exp((logits - logits.max(axis=-1, keepdims=True)) / np.float32(temperature))
    result: FloatArray = exp / exp.sum(axis=-1, keepdims=True)
    return result


def check_logits(logits: FloatArray | None, labels: Sequence[str]) -> FloatArray:
    """Return logits of shape (batch, labels).

    Raises:
        IntegrityError: the graph does not give one number, and a finite one, for each label.
    """
    if logits is None:
        raise IntegrityError("the graph has no output named logits")
    if logits.ndim != 2 or logits.shape[1] != len(labels):
        raise IntegrityError(
            f"expected the graph to give a logit for each of {len(labels)} labels, got an array"
            f" of shape {logits.shape}"
        )
    if not np.isfinite(logits).all():
        raise IntegrityError("the graph gave a logit that is infinite or no number")
    return logits


def classify(
    logits: FloatArray | None,
    labels: Sequence[str],
    *,
    all_scores: bool,
    scoring: Scoring | None = None,
) -> list[Classification]:
    """Turn logits, shape (batch, labels), into one `Classification` a row.

    None stands for a graph that gives no logits, and for a scoring that changes nothing.

    Raises:
        IntegrityError: the graph does not give one number, and a finite one, for each label.
    """
    logits = check_logits(logits, labels)
    scoring = scoring or Scoring()
    probabilities = softmax(logits, scoring.temperature)
    results = []
    # of the logits, so that no temperature makes two labels equal that were not
    for row, best in zip(probabilities, logits.argmax(axis=1).tolist(), strict=True):
        scores = dict(zip(labels, row.tolist(), strict=True)) if all_scores else None
        score = float(row[best])
        abstained = None if scoring.threshold is None else score < scoring.threshold
        results.append(
            Classification(label=labels[best], score=score, scores=scores, abstained=abstained)
        )
    return results


class Classes:
    """Turns logits into `Classification`s."""

    options: frozenset[str] = frozenset()

    def __init__(self, manifest: Manifest, options: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Keep how the bundle scores."""
        self._manifest = manifest

    def results(
        self,
        outputs: Mapping[str, Any],
        labels: Sequence[str],
        *,
        all_scores: bool,
        learned: bool,
    ) -> list[Classification]:
        """Return one `Classification` a sample; see `Scoring.of` for what `learned` changes."""
        scoring = Scoring.of(self._manifest, learned=learned)
        return classify(outputs.get("logits"), labels, all_scores=all_scores, scoring=scoring)
