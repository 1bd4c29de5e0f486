"""Labelled data: read it, hold a part out, and check it before anything is trained on it."""

from edgetune.data.check import accept, check_dataset, check_kinds
from edgetune.data.dataset import Dataset, DataSource, load_dataset, read_split
from edgetune.data.report import (
    REMEDIES,
    SAMPLE_KINDS,
    DataReport,
    ImageSizes,
    Problem,
    Spread,
    TextSizes,
    ValueSpread,
)
from edgetune.data.split import Kind, Split, Target, labels_of
from edgetune.data.targets import Scale, class_counts, encode_targets, scale_of

__all__ = [
    "REMEDIES",
    "SAMPLE_KINDS",
    "DataReport",
    "DataSource",
    "Dataset",
    "ImageSizes",
    "Kind",
    "Problem",
    "Scale",
    "Split",
    "Spread",
    "Target",
    "TextSizes",
    "ValueSpread",
    "accept",
    "check_dataset",
    "check_kinds",
    "class_counts",
    "encode_targets",
    "labels_of",
    "load_dataset",
    "read_split",
    "scale_of",
]
