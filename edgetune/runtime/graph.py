"""What the runtime checks of a graph before onnxruntime sees it, without the onnx package.

A tensor can name any path as the place of its values, and onnxruntime up to 1.23 at least
opens it: `../`, an absolute path, a file whose hash nobody checks. A bundle's graph may
name only files that the manifest lists, and operators only of domains that every
onnxruntime has.

The graph is read as protobuf wire format (https://protobuf.dev/programming-guides/encoding/)
along the fields of onnx.proto that lead to a tensor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edgetune.errors import IntegrityError
from edgetune.runtime.bundle import Bundle

# the ONNX standard's own, by both of its names, and the one of onnxruntime's build
DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
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
# tensors of which a message has one: a reader of protobuf would merge several into one, whose
# parts nobody has looked at together
_SINGULAR = {"Attribute": {5, 22}, "SparseTensor": {1, 2}}
_OPSET_IMPORT, _FUNCTIONS, _TRAINING_INFO = 8, 25, 20
_LENGTH_DELIMITED = 2
_KEY = b"location"
# others, such as onnxruntime's prepacked weights, name further bytes of the file
_KEYS = frozenset({_KEY, b"offset", b"length", b"checksum"})
# onnxruntime takes bytes with this at place 4 for its own format, whatever else they are
_ORT_FORMAT = b"ORTM"
# a node of this type names a file, or holds a binary, that a provider runs as it is
_COMPILED = b"EPContext"
_MAX_DEPTH = 64


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor's values lie: a file, and the bytes in it; no `length` is "to its end"."""

    location: str
    offset: int = 0
    length: int | None = None


def check_graph(bundle: Bundle, name: str) -> None:
    """Check that the graph in file `name` stays inside the bundle.

    Raises:
        IntegrityError: it reads a file that the manifest does not list, names operators of a
            domain that not every onnxruntime has, brings functions of its own, or is no protobuf.
    """
    data = bundle.read(name)
    where = f"{bundle.where}: {name}"
    try:
        if data[4:8] == _ORT_FORMAT:
            raise ValueError("it is in onnxruntime's own format")
        if _COMPILED in data:
            raise ValueError("it holds code compiled for an execution provider")
        places, domains, extras = external_places(data), operator_domains(data), _extras(data)
    except ValueError as error:
        raise IntegrityError(f"{where}: is no ONNX graph: {error}") from error
    if extras:
        raise IntegrityError(f"{where}: holds {extras}, which no bundle's graph does")
    for domain in sorted(domains - DOMAINS):
        raise IntegrityError(
            f"{where}: wants operators of {domain!r:.80}; a bundle's are of"
            f" {', '.join(sorted(d for d in DOMAINS if d))}"
        )
    for place in places:
        entry = bundle.manifest.files.get(place.location)
        if entry is None:
            raise IntegrityError(
                f"{where}: wants tensors from {place.location!r:.200}, which the manifest does not"
                " list"
            )
        if not 0 <= place.offset <= place.offset + (place.length or 0) <= entry.size:
            raise IntegrityError(
                f"{where}: wants bytes {place.offset} to {place.offset + (place.length or 0)} of"
                f" {place.location}, which has {entry.size}"
            )


def external_places(graph: bytes) -> set[Place]:
    """Return the places that a serialized ONNX model names for its tensors' values.

    Raises:
        ValueError: the bytes are no protobuf message, or an offset is no number.
    """
    return set(_places(graph, 0, len(graph), "Model", 0))


def operator_domains(graph: bytes) -> set[str]:
    """Return the operator domains that a serialized ONNX model imports.

    onnxruntime refuses a node whose domain is not among them.

    Raises:
        ValueError: the bytes are no protobuf message.
    """
    found = set()
    for number, value in _fields(graph):
        if number == _OPSET_IMPORT:
            found.add(dict(_fields(value)).get(1, b"").decode(errors="backslashreplace"))
    return found


def relocated(graph: bytes, move: Callable[[Place], Place]) -> bytes:
    """Return a serialized ONNX model with the places of its external tensors moved.

    Raises:
        ValueError: the bytes are no protobuf message.
    """
    return _relocated(graph, "Model", move, 0)


def _extras(graph: bytes) -> str:
    numbers = {number for number, *_ in _spans(graph, 0, len(graph))}
    names = {_FUNCTIONS: "functions of its own", _TRAINING_INFO: "training graphs"}
    return " and ".join(names[n] for n in sorted(names) if n in numbers)


def _places(graph: bytes, begin: int, end: int, kind: str, depth: int) -> Iterator[Place]:
    """Yield the places that graph[begin:end], a message of a kind, names.

    Only tensors are copied: graphs inside one another would else take their size once a level.
    """
    if depth > _MAX_DEPTH:
        raise ValueError("too many graphs inside one another")
    inner, singular, seen = _FIELDS[kind], _SINGULAR.get(kind, ()), set()
    for number, first, last in _spans(graph, begin, end):
        if number not in inner:
            continue
        if number in singular:
            if number in seen:
                raise ValueError(f"field {number} of {kind} is there twice")
            seen.add(number)
        # most messages hold no such key; they need not be looked into
        if graph.find(_KEY, first, last) < 0:
            continue
        if inner[number] != "Tensor":
            yield from _places(graph, first, last, inner[number], depth + 1)
        elif (place := _place(graph[first:last])) is not None:
            yield place


def _place(tensor: bytes) -> Place | None:
    # a field that is repeated in an entry: the last one counts
    entries = [dict(_fields(value)) for number, value in _fields(tensor) if number == 13]
    values = {entry.get(1, b""): entry.get(2, b"") for entry in entries}
    if not entries:
        return None
    if len(values) < len(entries) or _KEY not in values or not values.keys() <= _KEYS:
        raise ValueError("the place of a tensor's values is named twice, in part or oddly")
    return Place(
        location=values[_KEY].decode(errors="backslashreplace"),
        offset=_whole(values.get(b"offset", b"0")),
        length=_whole(values[b"length"]) if b"length" in values else None,
    )


def _whole(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise ValueError(f"{digits[:40]!r} is no number of bytes")
    return int(digits)


def _relocated(message: bytes, kind: str, move: Callable[[Place], Place], depth: int) -> bytes:
    if depth > _MAX_DEPTH:
        raise ValueError("too many graphs inside one another")
    if kind == "Tensor" and (place := _place(message)) is not None:
        kept = [raw for number, _, raw in _raw_fields(message) if number != 13]
        return b"".join(kept) + _entries(move(place))
    inner = _FIELDS[kind]
    pieces = []
    for number, value, raw in _raw_fields(message):
        if number not in inner or value is None or _KEY not in value or inner[number] == "Entry":
            pieces.append(raw)
        else:
            pieces.append(_field(number, _relocated(value, inner[number], move, depth + 1)))
    return b"".join(pieces)


def _entries(place: Place) -> bytes:
    """Return a tensor's `external_data` entries."""
    values = {"location": place.location, "offset": str(place.offset)}
    if place.length is not None:
        values["length"] = str(place.length)
    return b"".join(
        _field(13, _field(1, key.encode()) + _field(2, value.encode()))
        for key, value in values.items()
    )


def _field(number: int, value: bytes) -> bytes:
    return _number(number << 3 | _LENGTH_DELIMITED) + _number(len(value)) + value


def _number(value: int) -> bytes:
    """Return a base-128 number."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each length-delimited field; skip the others."""
    for number, first, last in _spans(message, 0, len(message)):
        yield number, message[first:last]


def _spans(message: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number and place, from and to, of each length-delimited field of message[begin:end]."""
    place = begin
    while place < end:
        start = place
        # nearly all of a graph's fields: tag and length of one byte each
        tag = message[place]
        if tag < 0x80 and tag & 7 == _LENGTH_DELIMITED and place + 1 < end:
            size = message[place + 1]
            if size < 0x80:
                place += 2 + size
                if place > end:
                    raise ValueError("it is cut off")
                yield tag >> 3, start + 2, place
                continue
        number, first, place = _field_at(message, start, end)
        if first is not None:
            yield number, first, place


def _raw_fields(message: bytes) -> Iterator[tuple[int, bytes | None, bytes]]:
    """Yield each field's number, its value if that is length-delimited, and all of its bytes."""
    place = 0
    while place < len(message):
        start = place
        number, first, place = _field_at(message, start, len(message))
        yield number, None if first is None else message[first:place], message[start:place]


def _field_at(message: bytes, place: int, end: int) -> tuple[int, int | None, int]:
    """Return a field's number, where its value begins if it is length-delimited, and its end."""
    tag, place = _varint(message, place)
    if tag >= 2**32:
        raise ValueError(f"a field's tag is {tag}")
    wire_type = tag & 7
    if wire_type == _LENGTH_DELIMITED:
        size, place = _varint(message, place)
    elif wire_type == 0:
        size, place = 0, _varint(message, place)[1]
    elif wire_type in (1, 5):
        size = 8 if wire_type == 1 else 4
    else:
        raise ValueError(f"wire type {wire_type}")
    if place + size > end:
        raise ValueError("it is cut off")
    return tag >> 3, place if wire_type == _LENGTH_DELIMITED else None, place + size


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
