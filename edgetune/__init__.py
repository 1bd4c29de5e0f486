"""edgetune: from a pretrained model and your data to a model that runs on an edge device."""

__version__ = "0.1.0"
