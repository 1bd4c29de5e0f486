"""A bundle's self-test: raw samples, and the logits that its device answers."""

import io
import zipfile
from typing import Any

import numpy as np

from edgetune.errors import IntegrityError
from edgetune.runtime.bundle import GOLDENS_NAME, Bundle
from edgetune.runtime.tasks import DeviceTask

# of the file, and of all arrays together, once they are unpacked
MAX_BYTES = 2**28
MAX_ARRAYS = 4096
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_goldens(bundle: Bundle, task: DeviceTask) -> tuple[list[Any], Any]:
    """Return raw samples (str, or uint8 pixels) and the logits, float32 (samples, labels).

    Raises:
        IntegrityError: the file is not the manifest's, or not what it should be.
    """
    where = bundle.where / GOLDENS_NAME
    entry = bundle.manifest.files.get(GOLDENS_NAME)
    if entry is not None and entry.size > MAX_BYTES:
        raise IntegrityError(f"{where}: {entry.size} bytes, allowed {MAX_BYTES}")
    data = bundle.read(GOLDENS_NAME)
    try:
        _check_archive(data)
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            logits = stored["logits"]
            samples = [stored[f"input_{i}"] for i in range(bundle.manifest.goldens.count)]
    except Exception as error:  # zipfile and zlib have errors of their own, numpy passes them on
        reason = str(error).split(". ")[0]  # numpy goes on to say how to load a pickle
        raise IntegrityError(f"{where}: cannot be read: {reason:.200}") from error
    for array in (logits, *samples):
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of what is no array
            raise IntegrityError(f"{where}: cannot be read: holds what is no array")
    expected = (len(samples), len(bundle.manifest.labels))
    if logits.shape != expected or logits.dtype != np.float32:
        raise IntegrityError(
            f"{where}: expected logits of shape {expected}, float32; got {logits.shape},"
            f" {logits.dtype!s:.80}"
        )
    return [task.golden(sample, f"{where}: input_{i}") for i, sample in enumerate(samples)], logits


def _check_archive(data: bytes) -> None:
    """Check what the archive says of itself, before any of its arrays is unpacked.

    Raises:
        ValueError: it would take too much memory, or is packed as numpy packs nothing.
    """
    # zipfile makes an object of each entry before it can be asked for their number
    if data.count(b"PK\1\2") > MAX_ARRAYS:
        raise ValueError(f"more than {MAX_ARRAYS} arrays")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    size = sum(entry.file_size for entry in entries)
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes when unpacked, allowed {MAX_BYTES}")
    if any(entry.compress_type not in _METHODS for entry in entries):
        raise ValueError("neither stored nor deflated")
