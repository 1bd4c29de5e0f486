"""The half of edgetune that runs on a device: standard library, numpy and onnxruntime only.

from edgetune.runtime import EdgeModel
EdgeModel.load("bundle").predict("turn the lights on")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune.runtime.model import EdgeModel
    from edgetune.runtime.tasks.classification import Classification

__all__ = ["Classification", "EdgeModel"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that reading a manifest loads neither numpy nor onnxruntime."""
    if name == "EdgeModel":
        from edgetune.runtime.model import EdgeModel

        return EdgeModel
    if name == "Classification":
        from edgetune.runtime.tasks.classification import Classification

        return Classification
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
