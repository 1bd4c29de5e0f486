"""What a check of a data set says: counts, sizes and problems, as plain records."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edgetune.data.split import Kind, Target

Severity = Literal["error", "warning"]

# every kind of problem, and what to do about it
REMEDIES: Mapping[str, str] = {
    "unreadable": "replace or remove them",
    "empty": "fill or remove them",
    "missing-label": "label or remove them",
    "one-class": "add samples of another class",
    "few-samples": "add samples, merge the class into another, or lower min_per_class",
    "unknown-label": "correct the label, or add the class to the training data",
    "leak": "remove the copies from one side",
    "label-variants": "spell each class one way",
    "label-typo": "correct the label if it is one",
    "conflicting-labels": "keep the right label",
    "duplicates": "remove the copies",
    "imbalance": "add samples of the small classes, and judge by f1_macro",
    "unlabelled-class-in-val": "add samples of these classes to the validation data",
    "empty-class": "add images or remove the folder",
    "constant-value": "give values that differ",
    "far-value": "check that they are right, and in the unit of the others",
    "mixed-modes": "check that the device's images are of these modes too",
    "tiny-images": "check that they are meant to be so small",
}

# problems of single samples: allowing one leaves these samples out
SAMPLE_KINDS = ("unreadable", "empty", "missing-label", "unknown-label")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong or doubtful.

    Attributes:
        kind: a key of `REMEDIES`.
        severity: "error" stops training unless its kind is allowed; "warning" does not.
        count: how many samples (or classes, where the message says so) it concerns.
        message: a sentence for people.
        examples: up to 5 `where` of samples.
        samples: (split, index) of every sample concerned, for the kinds in `SAMPLE_KINDS`.
    """

    kind: str
    severity: Severity
    count: int
    message: str
    examples: tuple[str, ...] = ()
    samples: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Order statistics; each is a value that occurs (the median is the lower one of two)."""

    minimum: int
    median: int
    p95: int
    maximum: int


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """Lengths of the texts that are not blank, in characters and in words by white space."""

    characters: Spread
    words: Spread


@dataclass(frozen=True, kw_only=True)
class ImageSizes:
    """Sizes in pixels of the images that can be read, and how many are of each mode and format.

    `modes` and `formats` have Pillow's names ("RGB", "JPEG").
    """

    width: Spread
    height: Spread
    modes: dict[str, int]
    formats: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ValueSpread:
    """Numbers that are learned: their order statistics, as of `Spread`, mean and deviation."""

    minimum: float
    median: float
    p95: float
    maximum: float
    mean: float
    std: float


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What `check_dataset` found.

    Attributes:
        kind: of the inputs.
        held_out: whether "val" was held out of the training data.
        samples: how many samples each split has.
        classes: split -> class -> samples; blank labels are not counted.
        target: what the labels are.
        values: split -> spread of its values, where labels are values.
        text: sizes of the texts; None for images, or where there is none.
        image: sizes of the images; None for texts, or where none can be read.
        ignored: paths in the folders that are no samples; a folder ends in "/".
        problems: errors first.
    """

    kind: Kind
    held_out: bool
    samples: dict[str, int]
    classes: dict[str, dict[str, int]]
    text: TextSizes | None = None
    image: ImageSizes | None = None
    ignored: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    target: Target = "classes"
    values: dict[str, ValueSpread] | None = None

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that stop training unless their kind is allowed."""
        return tuple(p for p in self.problems if p.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """The problems that do not stop training."""
        return tuple(p for p in self.problems if p.severity == "warning")
