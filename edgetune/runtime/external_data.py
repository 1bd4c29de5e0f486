"""Which files a graph reads its tensors from, found without the onnx package.

A tensor can name any path as the place of its values, and onnxruntime up to 1.23 at least
opens it: `../`, an absolute path, a file whose hash nobody checks. A bundle's graph may
name only files that the manifest lists.

The graph is read as protobuf wire format (https://protobuf.dev/programming-guides/encoding/)
along the fields of onnx.proto that lead to a tensor.
"""

from collections.abc import Iterator

from edgetune.errors import IntegrityError
from edgetune.runtime.bundle import Bundle

# message -> number of a field -> the message in it
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}  # fmt: skip
_KEY = b"location"
_MAX_DEPTH = 64


def check_external_data(bundle: Bundle, name: str) -> None:
    """Check that the graph in file `name` reads no file that the manifest does not list.

    Raises:
        IntegrityError: it does, or it is no protobuf.
    """
    path = bundle.path(name)
    try:
        locations = external_locations(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path}: is no ONNX graph: {error}") from error
    for location in sorted(locations - set(bundle.manifest.files)):
        raise IntegrityError(
            f"{path}: wants tensors from {location!r}, which the manifest does not list"
        )


def external_locations(graph: bytes) -> set[str]:
    """Return the places that a serialized ONNX model names for its tensors' values.

    Raises:
        ValueError: the bytes are no protobuf message.
    """
    return set(_locations(graph, "Model", 0))


def _locations(message: bytes, kind: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError("too many graphs inside one another")
    inner = _FIELDS[kind]
    for number, value in _fields(message):
        # most messages hold no such key; they need not be looked into
        if number not in inner or _KEY not in value:
            continue
        if inner[number] != "Entry":
            yield from _locations(value, inner[number], depth + 1)
            continue
        entry = dict(_fields(value))  # a field that is repeated: the last one counts
        if entry.get(1) == _KEY:
            yield entry.get(2, b"").decode(errors="backslashreplace")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each length-delimited field; skip the others."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        if tag >= 2**32:
            raise ValueError(f"a field's tag is {tag}")
        wire_type = tag & 7
        if wire_type == 2:
            size, place = _varint(message, place)
        elif wire_type == 0:
            size, place = 0, _varint(message, place)[1]
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        end = place + size
        if end > len(message):
            raise ValueError("it is cut off")
        if wire_type == 2:
            yield tag >> 3, message[place:end]
        place = end


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Return a base-128 number and the place after it."""
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError("a number does not end")
