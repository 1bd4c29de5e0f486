"""Image classification and regression on the device: an image -> uint8 pixels -> label or value.

Resizing and normalising are in the graph; only decoding happens here.
"""

import io
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import DataError, IntegrityError, MissingExtraError, ResourceError
from edgetune.runtime.bundle import Bundle
from edgetune.runtime.tasks.answers import Answers, split_options
from edgetune.runtime.tasks.classification import Classes

Pixels = npt.NDArray[np.uint8]
# Pillow would start Ghostscript to draw these
PROGRAMS = ("EPS",)
# the EXIF tag that says how a camera was held; 1 is upright
ORIENTATION = 0x0112


class ImageClassification:
    """Decodes images, pixels go into the graph as they are; `answers` says what comes of them."""

    def __init__(self, bundle: Bundle, answers: type[Answers] = Classes) -> None:
        """Need nothing of the bundle but how it answers.

        Raises:
            IntegrityError: the manifest has an option that is unknown or out of bounds.
        """
        theirs, own = split_options(bundle.manifest, answers)
        if own:
            raise IntegrityError(f"manifest: options: unknown key {next(iter(own))!r:.200}")
        self._answers = answers(bundle.manifest, theirs)

    def is_many(self, value: Any) -> bool:
        """Say whether `value` is a list of images or a 4-D array rather than one image."""
        return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 4

    def golden(self, array: Any, where: str) -> Pixels:
        """Return pixels; a string, which would be a path, is none.

        Raises:
            IntegrityError: it is another array than uint8 of shape (height, width, 3).
        """
        if array.ndim != 3 or array.dtype != np.uint8:
            found = f"{array.dtype!s:.80} {array.shape}"
            raise IntegrityError(f"{where}: expected pixels, got an array of {found}")
        return np.ascontiguousarray(array)

    def encode(self, sample: Any) -> dict[str, Any]:
        """Return the pixels, uint8, shape (height, width, 3); see `decode_image`."""
        return {"image": decode_image(sample)}

    def group(self, encoded: dict[str, Any]) -> Hashable:
        """Batch images of one size."""
        height, width, _ = encoded["image"].shape
        return (height, width)

    def stack(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return pixels of shape (batch, height, width, 3)."""
        if len(encoded) == 1:
            return {"image": encoded[0]["image"][None]}  # a frame of a camera is not copied
        return {"image": np.stack([e["image"] for e in encoded])}

    def results(
        self,
        outputs: dict[str, Any],
        labels: Sequence[str],
        *,
        all_scores: bool,
        learned: bool = False,
    ) -> list[Any]:
        """Return one result a sample: `Classification`, `MultiLabel` or `Value`."""
        return self._answers.results(outputs, labels, all_scores=all_scores, learned=learned)


def decode_image(source: Any) -> Pixels:
    """Return an image's pixels as RGB, uint8, shape (height, width, 3).

    The orientation that a camera wrote into the file (EXIF) is applied; transparency is
    dropped; 16-bit grey is scaled to 8 bits.

    Args:
        source: path, bytes of an image file, open binary file, PIL image, or uint8 array of shape
            (height, width), (height, width, 1), (height, width, 3) RGB or (height, width, 4) RGBA.

    Raises:
        DataError: it is none of these, is absent or can't be decoded.
        MissingExtraError: Pillow is needed and not installed.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("pillow", "image") from error
    name, opened = type(source).__name__, source
    if isinstance(source, bytes | bytearray | memoryview):
        name, opened = f"{len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, str | Path):
        name, opened = str(source), Path(source)
    elif hasattr(source, "read") and not isinstance(source, Image.Image):
        name = str(getattr(source, "name", name))
    elif not isinstance(source, Image.Image):
        raise DataError(
            "expected a path, bytes, an open binary file, a PIL image or a uint8 array, got"
            f" {type(source).__module__}.{type(source).__name__}"
        )
    try:
        if isinstance(opened, Image.Image):  # the caller's: not ours to close
            return np.array(_to_rgb(_upright(opened)))
        with Image.open(opened) as image:
            if image.format in PROGRAMS:
                raise DataError(f"{name}: is {image.format}, a program and no picture")
            return np.array(_to_rgb(_upright(image)))
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise DataError(f"{name}: is a folder; expected an image file") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: is no image that Pillow knows") from error
    except DataError:
        raise
    except MemoryError as error:
        raise ResourceError(f"{name}: takes more memory than there is") from error
    except Exception as error:  # each of Pillow's decoders has its own
        raise DataError(f"{name}: cannot be decoded: {error}") from error


def _upright(image: Any) -> Any:
    if image.getexif().get(ORIENTATION, 1) == 1:
        return image
    from PIL import ImageOps  # takes a while to import, and few images need it

    return ImageOps.exif_transpose(image)


def _to_rgb(image: Any) -> Any:
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it to white
        values = np.asarray(image).astype(np.int64)
        grey = np.clip(values >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; expected 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_array(array: npt.NDArray[Any]) -> Pixels:
    if array.dtype != np.uint8:
        raise DataError(f"expected a uint8 array with values 0..255, got {array.dtype}")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise DataError(f"expected an array of shape (height, width, 3), got {array.shape}")
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return np.ascontiguousarray(array[:, :, :3])
