"""Read an npz of a bundle: no pickle, and no more memory than was allowed."""

import io
import zipfile
from typing import Any

import numpy as np

MAX_ARRAYS = 4096
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def load_arrays(data: bytes, most: int) -> dict[str, Any]:
    """Return the arrays of an npz, name -> array, `most` bytes of them at most.

    Raises:
        ValueError: it is none, holds what is no array, or would take more memory.
    """
    # zipfile makes an object of each entry before it can be asked for their number
    if data.count(b"PK\1\2") > MAX_ARRAYS:
        raise ValueError(f"more than {MAX_ARRAYS} arrays")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if size > most:
            raise ValueError(f"{size} bytes when unpacked, allowed {most}")
        if any(entry.compress_type not in _METHODS for entry in entries):
            raise ValueError("neither stored nor deflated")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except Exception as error:  # zipfile and zlib have errors of their own, numpy passes them on
        reason = str(error).split(". ")[0]  # numpy goes on to say how to load a pickle
        raise ValueError(f"{reason:.200}") from error
    for array in arrays.values():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of what is no array
            raise ValueError("holds what is no array")
    return arrays
