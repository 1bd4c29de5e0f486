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
)
from edgetune.data.split import Kind, Split

__all__ = [
    "REMEDIES",
    "SAMPLE_KINDS",
    "DataReport",
    "DataSource",
    "Dataset",
    "ImageSizes",
    "Kind",
    "Problem",
    "Split",
    "Spread",
    "TextSizes",
    "accept",
    "check_dataset",
    "check_kinds",
    "load_dataset",
    "read_split",
]
