"""What the inputs of a data set hold: which can be read, which are the same, how large.

Texts are looked at where they are; every image file is decoded once, by a pool of threads
(Pillow's decoders release the interpreter's lock).
"""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgetune.data.dataset import Dataset
from edgetune.data.holdout import text_key
from edgetune.data.report import ImageSizes, Spread, TextSizes
from edgetune.data.split import Kind
from edgetune.errors import MissingExtraError

if TYPE_CHECKING:
    from PIL import Image

Progress = Callable[[int, int], None]

# no more than this many images are decoded ahead of the one that is being looked at
_AHEAD = 256


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is in the inputs; the lists run parallel to the samples of each split.

    Attributes:
        keys: split -> equal for the same input; "" where there is none to compare.
        faults: split -> "" or why the image cannot be read. Blank inputs have no fault.
        sides: split -> shorter side of each image in pixels, 0 where unknown; {} for texts.
        text: sizes of all texts.
        image: sizes of all images.
    """

    keys: Mapping[str, Sequence[str]]
    faults: Mapping[str, Sequence[str]]
    sides: Mapping[str, Sequence[int]]
    text: TextSizes | None = None
    image: ImageSizes | None = None


def read_contents(dataset: Dataset, progress: Progress | None) -> Contents:
    """Look at every input of `dataset`.

    Args:
        dataset: what to look at.
        progress: called with (done, total) image files.

    Raises:
        MissingExtraError: the data are images and Pillow is not installed.
    """
    return _LOOK[dataset.kind](dataset, progress)


def spread(values: Sequence[int]) -> Spread:
    """Return the order statistics of `values`, of which there is at least one.

    Quantile q is the least v such that a share of at least q of the values is <= v.
    """
    quantiles = np.percentile(values, [0, 50, 95, 100], method="inverted_cdf")
    low, median, p95, high = (int(q) for q in quantiles)
    return Spread(minimum=low, median=median, p95=p95, maximum=high)


def _look_at_texts(dataset: Dataset, progress: Progress | None) -> Contents:  # noqa: ARG001
    keys = {name: [text_key(t) for t in s.inputs] for name, s in dataset.splits.items()}
    texts = [t for s in dataset.splits.values() for t in s.inputs if t.strip()]
    sizes = (
        TextSizes(
            characters=spread([len(t) for t in texts]),
            words=spread([len(t.split()) for t in texts]),
        )
        if texts
        else None
    )
    faults = {name: [""] * len(s.inputs) for name, s in dataset.splits.items()}
    return Contents(keys=keys, faults=faults, sides={}, text=sizes)


@dataclass(frozen=True, kw_only=True)
class _Image:
    """One image file. An empty file has no key and no fault."""

    key: str = ""
    fault: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    format: str = ""


def _look_at_images(dataset: Dataset, progress: Progress | None) -> Contents:
    paths = list(dict.fromkeys(p for s in dataset.splits.values() for p in s.inputs if p))
    images = _decode_all(paths, progress)
    images[""] = _Image()
    listed = {name: [images[p] for p in s.inputs] for name, s in dataset.splits.items()}
    good = [image for row in listed.values() for image in row if image.key]
    sizes = (
        ImageSizes(
            width=spread([i.width for i in good]),
            height=spread([i.height for i in good]),
            modes=dict(Counter(i.mode for i in good).most_common()),
            formats=dict(Counter(i.format for i in good).most_common()),
        )
        if good
        else None
    )
    return Contents(
        keys={name: [i.key for i in row] for name, row in listed.items()},
        faults={name: [i.fault for i in row] for name, row in listed.items()},
        sides={name: [min(i.width, i.height) for i in row] for name, row in listed.items()},
        image=sizes,
    )


def _decode_all(paths: Sequence[str], progress: Progress | None) -> dict[str, _Image]:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("pillow", "image") from error
    images: dict[str, _Image] = {}
    # what Pillow warns of (odd metadata, a large image) is no fault of the pixels
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool,
    ):
        warnings.simplefilter("ignore")
        for start in range(0, len(paths), _AHEAD):
            batch = paths[start : start + _AHEAD]
            for path, image in zip(batch, pool.map(_decode, batch), strict=True):
                images[path] = image
                if progress is not None:
                    progress(len(images), len(paths))
    return images


def _decode(path: str) -> _Image:
    from PIL import Image, UnidentifiedImageError

    try:
        if os.path.getsize(path) == 0:  # noqa: PTH202
            return _Image()
        with Image.open(path) as image:
            image.load()
            return _Image(
                key=_pixel_key(image),
                width=image.width,
                height=image.height,
                mode=image.mode,
                format=image.format or "",
            )
    except FileNotFoundError:
        return _Image(fault="no such file")
    except UnidentifiedImageError:
        return _Image(fault="no image format that Pillow knows")
    except Exception as error:  # broken files make decoders raise nearly anything
        return _Image(fault=" ".join(str(error).split()) or type(error).__name__)


def _pixel_key(image: "Image.Image") -> str:
    """Return the SHA-256 of size, mode and pixels; grey and palette images count as RGB(A)."""
    pixels = image
    if image.mode in ("1", "L", "P"):
        pixels = image.convert("RGBA" if image.has_transparency_data else "RGB")
    digest = hashlib.sha256(f"{pixels.mode} {pixels.width} {pixels.height} ".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


_LOOK: Mapping[Kind, Callable[[Dataset, Progress | None], Contents]] = {
    "text": _look_at_texts,
    "image": _look_at_images,
}
