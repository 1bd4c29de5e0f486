"""The factory's values of what a bundle trains: the defaults of the inference graph's inputs."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from edgetune.errors import IntegrityError, ResourceError
from edgetune.runtime.bundle import GRAPH_NAME, Bundle, Folder, open_plain
from edgetune.runtime.graph import Place, _fields, _place
from edgetune.runtime.manifest import TensorSpec

# field numbers of onnx.proto
_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_TENSOR_FLOATS, _TENSOR_NAME, _TENSOR_RAW = 4, 8, 9


def read_defaults(
    bundle: Bundle, specs: Sequence[TensorSpec]
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the values that the inference graph has for its trainable inputs.

    Raises:
        IntegrityError: it has none for one of them, or not of the manifest's shape.
        ResourceError: they cannot be read.
    """
    where = f"{bundle.where}: {GRAPH_NAME}"
    try:
        found = _initializers(bundle.read(GRAPH_NAME), {spec.name for spec in specs})
    except ValueError as error:
        raise IntegrityError(f"{where}: is no ONNX graph: {error}") from error
    classes = len(bundle.manifest.labels)
    values = {}
    for spec in specs:
        if spec.name not in found:
            raise IntegrityError(f"{where}: has no default of the input {spec.name}")
        kept = found[spec.name]
        data = _bytes_at(bundle, kept) if isinstance(kept, Place) else kept
        shape = tuple(classes if d == "classes" else int(d) for d in spec.shape)
        size = 4 * int(np.prod(shape, dtype=np.int64))
        if len(data) != size:
            raise IntegrityError(
                f"{where}: {spec.name}: expected float32 {shape}, {size} bytes; got {len(data)}"
            )
        value = np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)
        if not np.isfinite(value).all():
            raise IntegrityError(f"{where}: {spec.name}: has values that are no numbers")
        values[spec.name] = value
    return values


def _initializers(graph: bytes, names: Collection[str]) -> dict[str, bytes | Place]:
    """Return values, or where they lie, of a serialized ONNX model's initializers.

    Raises:
        ValueError: the bytes are no protobuf message, or values are kept in an odd way.
    """
    wanted = {name.encode(): name for name in names}
    found: dict[str, bytes | Place] = {}
    for number, body in _fields(graph):
        if number != _MODEL_GRAPH:
            continue
        for inner, tensor in _fields(body):
            if inner != _GRAPH_INITIALIZER:
                continue
            fields = dict(_fields(tensor))
            name = wanted.get(fields.get(_TENSOR_NAME, b""))
            if name is not None:
                inside = fields.get(_TENSOR_RAW, fields.get(_TENSOR_FLOATS, b""))
                found[name] = _place(tensor) or inside
    return found


def _bytes_at(bundle: Bundle, place: Place) -> bytes:
    """Return the bytes at a place of one of the bundle's files.

    Raises:
        IntegrityError: the manifest does not list the file.
        ResourceError: it cannot be read.
    """
    entry = bundle.manifest.files.get(place.location)
    if entry is None:
        raise IntegrityError(f"{bundle.where}: the manifest lists no {place.location!r:.200}")
    length = entry.size - place.offset if place.length is None else place.length
    try:
        if isinstance(bundle.files, Folder):
            with open_plain(bundle.path(place.location)) as file:
                file.seek(place.offset)
                return file.read(length)
        return bytes(bundle.files.view(place.location)[place.offset : place.offset + length])
    except OSError as error:
        reason = error.strerror or error
        raise ResourceError(f"{bundle.where / place.location}: cannot be read: {reason}") from error
