"""What all regression tasks share: a logit to the value it stands for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.errors import IntegrityError
from edgetune.runtime.manifest import Manifest
from edgetune.runtime.records import from_mapping, to_mapping
from edgetune.runtime.tasks.classification import check_logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """One answer: the value, in the unit of the training data."""

    value: float

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return to_mapping(self)


@dataclass(frozen=True, kw_only=True)
class ValueOptions:
    """The manifest's options: value = mean + std * logit."""

    mean: float
    std: float


class Values:
    """Turns logits into `Value`s."""

    options = frozenset({"mean", "std"})

    def __init__(self, manifest: Manifest, options: Mapping[str, Any]) -> None:
        """Read the scale.

        Raises:
            IntegrityError: there is none, it is out of bounds, or there is not one output.
        """
        self.scale = from_mapping(
            ValueOptions, options, where="manifest: options", error=IntegrityError
        )
        if not (math.isfinite(self.scale.mean) and 0 < self.scale.std < math.inf):
            raise IntegrityError(f"manifest: options: out of bounds: {self.scale}")
        if len(manifest.labels) != 1:
            raise IntegrityError(
                f"manifest: labels: a regression has one, got {len(manifest.labels)}"
            )

    def results(
        self,
        outputs: Mapping[str, Any],
        labels: Sequence[str],
        *,
        all_scores: bool,  # noqa: ARG002
        learned: bool,  # noqa: ARG002
    ) -> list[Value]:
        """Return one `Value` a row of the logits, shape (batch, 1).

        Raises:
            IntegrityError: the graph does not give one number, and a finite one.
        """
        logits = check_logits(outputs.get("logits"), labels)
        if logits.shape[1] != 1:
            raise IntegrityError(f"expected one logit a sample, got {logits.shape[1]}")
        values = [self.scale.mean + self.scale.std * logit for logit in logits[:, 0].tolist()]
        if not all(map(math.isfinite, values)):
            raise IntegrityError("the graph gave a value that is infinite")
        return [Value(value=value) for value in values]
