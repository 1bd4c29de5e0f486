"""What all multi-label tasks share: logits to the labels that are given, any number of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgetune.errors import IntegrityError
from edgetune.runtime.manifest import Manifest
from edgetune.runtime.records import from_mapping, to_mapping
from edgetune.runtime.tasks.classification import FloatArray, check_logits

THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiLabel:
    """One answer: the labels that are given, in the bundle's order, and their probabilities.

    `scores` has the labels given; all labels where all were asked for.
    """

    labels: tuple[str, ...]
    scores: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return to_mapping(self)


@dataclass(frozen=True, kw_only=True)
class MultiLabelOptions:
    """The manifest's options: label -> probability from which on it is given; 0.5 for others."""

    thresholds: dict[str, float] = field(default_factory=dict)


class MultiLabels:
    """Turns logits into `MultiLabel`s."""

    options = frozenset({"thresholds"})

    def __init__(self, manifest: Manifest, options: Mapping[str, Any]) -> None:
        """Read the thresholds.

        Raises:
            IntegrityError: one is of no label, or outside [0, 1].
        """
        found = from_mapping(
            MultiLabelOptions, options, where="manifest: options", error=IntegrityError
        )
        for label, threshold in found.thresholds.items():
            if label not in manifest.labels:
                raise IntegrityError(f"manifest: options: thresholds: no label {label!r:.200}")
            if not 0 <= threshold <= 1:
                raise IntegrityError(
                    f"manifest: options: thresholds: {label!r:.200}: expected 0 to 1, got"
                    f" {threshold:g}"
                )
        self.thresholds = {
            label: found.thresholds.get(label, THRESHOLD) for label in manifest.labels
        }

    def results(
        self,
        outputs: Mapping[str, Any],
        labels: Sequence[str],
        *,
        all_scores: bool,
        learned: bool,  # noqa: ARG002
    ) -> list[MultiLabel]:
        """Return one `MultiLabel` a row of the logits, shape (batch, labels).

        Raises:
            IntegrityError: the graph does not give one number, and a finite one, for each label.
        """
        probabilities = sigmoid(check_logits(outputs.get("logits"), labels))
        thresholds = [self.thresholds.get(label, THRESHOLD) for label in labels]
        results = []
        for row in probabilities.tolist():
            given = tuple(
                label
                for label, score, least in zip(labels, row, thresholds, strict=True)
                if score >= least
            )
            scores = dict(zip(labels, row, strict=True))
            kept = scores if all_scores else {label: scores[label] for label in given}
            results.append(MultiLabel(labels=given, scores=kept))
        return results


def sigmoid(logits: FloatArray) -> FloatArray:
    """Return probabilities, shape unchanged; safe for large logits."""
    small = np.exp(-np.abs(logits))  # in (0, 1]
    result: FloatArray = np.where(logits >= 0, 1 / (1 + small), small / (1 + small))
    return result
