"""What all classification tasks share: logits to labels and scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import IntegrityError
from edgetune.runtime.records import to_mapping

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Classification:
    """One answer: the most probable label, its probability, and all of them if asked for."""

    label: str
    score: float
    scores: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: label, score and, if they were asked for, scores."""
        return to_mapping(self)


def softmax(logits: FloatArray) -> FloatArray:
    """Return probabilities over the last axis, shape unchanged; safe for large logits."""
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: FloatArray = exp / exp.sum(axis=-1, keepdims=True)
    return result


def classify(
    logits: FloatArray | None, labels: Sequence[str], *, all_scores: bool
) -> list[Classification]:
    """Turn logits, shape (batch, labels), into one `Classification` a row.

    None stands for a graph that gives no logits.

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
    probabilities = softmax(logits)
    results = []
    for row in probabilities:
        best = int(row.argmax())
        scores = dict(zip(labels, row.tolist(), strict=True)) if all_scores else None
        results.append(Classification(label=labels[best], score=float(row[best]), scores=scores))
    return results
