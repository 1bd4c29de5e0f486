"""What an export has made and measured, kept by what it depends on.

A key is the SHA-256 of everything that could change the result: contents, not paths, and
edgetune's own code. So a second export, for another profile too, repeats nothing, and
nothing old is ever taken for new. The folder may be deleted at any time.
"""

import functools
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

import edgetune
from edgetune.data import Split
from edgetune.errors import ResourceError
from edgetune.runtime.files import flush

FOLDER_NAME = "export-cache"


class Cache:
    """A folder of results: one file an entry, each written in one step."""

    def __init__(self, folder: Path) -> None:
        """Keep entries in `folder`, which is made with the first of them."""
        self.folder = folder

    def json(self, kind: str, key: str, make: Callable[[], Any]) -> tuple[Any, bool]:
        """Return what `make` gives for that key, from the folder where it is there already.

        Returns:
            The value (what JSON can hold) and whether it was there.
        """
        path = self.folder / f"{kind}-{key}.json"
        try:
            return json.loads(path.read_text()), True
        except (OSError, ValueError):  # not there, or a damaged file: make it again
            pass
        value = make()
        self._write(path, json.dumps(value).encode())
        return value, False

    def array(
        self, kind: str, key: str, make: Callable[[], npt.NDArray[Any]]
    ) -> tuple[npt.NDArray[Any], bool]:
        """Like `json`, for an array."""
        path = self.folder / f"{kind}-{key}.npy"
        try:
            return np.load(path, allow_pickle=False), True
        except (OSError, ValueError, EOFError):
            pass
        value = make()
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        self._write(path, buffer.getvalue())
        return value, False

    def model(
        self, kind: str, key: str, make: Callable[[], onnx.ModelProto]
    ) -> tuple[onnx.ModelProto, bool]:
        """Like `json`, for a graph with its weights."""
        path = self.folder / f"{kind}-{key}.onnx"
        try:
            found = onnx.load(path)
        except Exception:  # protobuf has errors of its own; a damaged file is made again
            found = onnx.ModelProto()
        # the opsets come last: a file cut short may still parse, but lacks them
        if found.opset_import:
            return found, True
        model = make()
        self._write(path, model.SerializeToString(deterministic=True))
        return model, False

    def path(self, kind: str, key: str) -> Path:
        """Return a folder of an entry's own, for what writes and resumes by itself."""
        return self.folder / f"{kind}-{key}"

    def _write(self, path: Path, data: bytes) -> None:
        """Write an entry in one step, whoever else is writing the same one."""
        temporary: Path | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # a name of its own: two exports at once may make the same entry
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                temporary = Path(file.name)
                file.write(data)
            flush(temporary)
            temporary.replace(path)
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            raise ResourceError(f"{path}: cannot be written: {error}") from error


def key_of(*parts: str | bytes | Mapping[str, Any] | list[Any]) -> str:
    """Return one key of many parts; records and lists by their JSON."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else _text(part).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def model_key(model: onnx.ModelProto) -> str:
    """Return the hash of a graph and its weights."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()[:32]


def structure_key(model: onnx.ModelProto) -> str:
    """Return the hash of a graph without its weights' values: graphs of one cost the same."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        if len(tensor.raw_data) > _SHAPE_BYTES:
            tensor.raw_data = b""
    return model_key(bare)


def split_key(split: Split) -> str:
    """Return the hash of a split's samples and labels; of images, of the files' bytes."""
    digest = hashlib.sha256()
    for value, label in zip(split.inputs, split.labels, strict=True):
        path = Path(value)
        data = path.read_bytes() if _is_file(path) else value.encode()
        digest.update(hashlib.sha256(data).digest())
        digest.update(label.encode() + b"\0")
    return digest.hexdigest()[:32]


@functools.cache
def code_key() -> str:
    """Return the hash of edgetune's sources: changed code makes everything anew."""
    folder = Path(edgetune.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for end in ("py", "toml") for p in folder.rglob(f"*.{end}")):
        if path.relative_to(folder).parts[0] in _NO_EFFECT:
            continue
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:32]


# larger constants are weights, smaller ones shapes and axes, which decide what is computed
_SHAPE_BYTES = 256
# parts of the package that change no graph and no measurement
_NO_EFFECT = ("cli", "demo", "profiles")


def _text(part: str | Mapping[str, Any] | list[Any]) -> str:
    return part if isinstance(part, str) else json.dumps(part, sort_keys=True, default=str)


def _is_file(path: Path) -> bool:
    try:
        # images have absolute paths; a word that happens to name a file here is a text
        return path.is_absolute() and path.is_file()
    except (OSError, ValueError):  # a text that is no path
        return False
