"""A bundle's self-test: raw samples, and the logits that its device answers."""

import io
import zipfile
from typing import Any

import numpy as np

from edgetune.errors import IntegrityError
from edgetune.runtime.bundle import GOLDENS_NAME, Bundle, check_hash

# of all arrays together, once they are unpacked
MAX_BYTES = 2**28


def read_goldens(bundle: Bundle) -> tuple[list[Any], Any]:
    """Return raw samples (str, or uint8 pixels) and the logits, float32 (samples, labels).

    Raises:
        IntegrityError: the file is not the manifest's, or not what it should be.
    """
    data = bundle.read(GOLDENS_NAME)
    check_hash(bundle, GOLDENS_NAME)
    where = bundle.where / GOLDENS_NAME
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes when unpacked, allowed {MAX_BYTES}")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            logits = stored["logits"]
            samples = [stored[f"input_{i}"] for i in range(bundle.manifest.goldens.count)]
    except Exception as error:  # zipfile and zlib have errors of their own, numpy passes them on
        reason = str(error).split(". ")[0]  # numpy goes on to say how to load a pickle
        raise IntegrityError(f"{where}: cannot be read: {reason}") from error
    expected = (len(samples), len(bundle.manifest.labels))
    if logits.shape != expected or logits.dtype != np.float32:
        raise IntegrityError(
            f"{where}: expected logits of shape {expected}, float32; got {logits.shape},"
            f" {logits.dtype}"
        )
    # a text travels as a 0-d array of str
    return [s.item() if s.ndim == 0 else s for s in samples], logits
