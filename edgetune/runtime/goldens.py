"""A bundle's self-test: raw samples, and the logits that its device answers."""

from typing import Any

import numpy as np

from edgetune.errors import IntegrityError
from edgetune.runtime.bundle import GOLDENS_NAME, Bundle
from edgetune.runtime.npz import load_arrays
from edgetune.runtime.tasks import DeviceTask

# of the file, and of all arrays together, once they are unpacked
MAX_BYTES = 2**28


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
        arrays = load_arrays(data, MAX_BYTES)
        logits = arrays["logits"]
        samples = [arrays[f"input_{i}"] for i in range(bundle.manifest.goldens.count)]
    except KeyError as error:
        raise IntegrityError(f"{where}: cannot be read: it lacks {error}") from error
    except ValueError as error:
        raise IntegrityError(f"{where}: cannot be read: {error}") from error
    expected = (len(samples), len(bundle.manifest.labels))
    if logits.shape != expected or logits.dtype != np.float32:
        raise IntegrityError(
            f"{where}: expected logits of shape {expected}, float32; got {logits.shape},"
            f" {logits.dtype!s:.80}"
        )
    return [task.golden(sample, f"{where}: input_{i}") for i, sample in enumerate(samples)], logits
