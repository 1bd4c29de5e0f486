"""What a request for a prediction may be: body and query -> samples. One row a kind of task.

A body is the sample itself or JSON that holds it, never a path: an image task takes a string for
the path of a file, so no string from a request may reach it.
"""

import importlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from edgetune.errors import ConfigError, MissingExtraError
from edgetune.runtime.records import nearest
from edgetune.runtime.serve.http import Refusal
from edgetune.runtime.serve.settings import ServeSettings

MAX_INPUTS = 256
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """How a request carries samples: content types, the largest body, body -> sample(s).

    `read` runs on a worker thread; a list that it returns is answered with a list. `needs` is the
    module that it imports, its package and the extra that brings it.
    """

    content_types: tuple[str, ...]
    max_body_mib: float
    read: Callable[[bytes, ServeSettings], Any]
    needs: tuple[str, str, str] | None = None


def read_texts(body: bytes, settings: ServeSettings) -> str | list[str]:  # noqa: ARG001
    """Return the text of {"input": "..."}, or the texts of {"inputs": ["...", ...]}.

    Raises:
        Refusal: 400 it is no such JSON; 413 it holds too many; 422 a sample is no string.
    """
    try:
        # UTF-8 alone: json.loads would guess others from bytes
        request = json.loads(body.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"is no valid JSON in UTF-8: {error}"[:200]) from None
    if not isinstance(request, dict):
        raise Refusal(400, 'expected an object, {"input": "..."} or {"inputs": ["...", ...]}')
    for key in request:
        if key not in {"input", "inputs"}:
            shown = key if len(key) <= 50 else f"{key[:50]}..."
            raise Refusal(400, f"unknown key {shown!r}{nearest(shown, ('input', 'inputs'))}")
    if len(request) != 1:
        raise Refusal(400, 'expected one key, "input" or "inputs"')
    if "input" in request:
        value = request["input"]
        if not isinstance(value, str):
            raise Refusal(422, f"input: expected a string, got {_json_type(value)}")
        return value
    values = request["inputs"]
    if not isinstance(values, list):
        raise Refusal(422, f"inputs: expected a list of strings, got {_json_type(values)}")
    if len(values) > MAX_INPUTS:
        raise Refusal(413, f"inputs: expected at most {MAX_INPUTS}, got {len(values)}")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise Refusal(422, f"inputs[{index}]: expected a string, got {_json_type(value)}")
    return values


def read_image(body: bytes, settings: ServeSettings) -> bytes:
    """Return the body if it is an image file that is safe to decode.

    Pillow knows dozens of formats, most of them rare and little tested; from a network only
    those are taken that cameras and programs send.

    Raises:
        Refusal: 422 it is of no such format, damaged, or too large once decoded.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(body), formats=IMAGE_FORMATS) as image:  # reads the head only
            pixels = image.width * image.height
    except Exception as error:  # Pillow's readers raise all kinds
        formats = ", ".join(IMAGE_FORMATS)
        raise Refusal(422, f"{len(body)} bytes: expected an image, {formats}") from error
    if pixels > settings.max_megapixels * 1e6:
        raise Refusal(
            422,
            f"expected an image of at most {settings.max_megapixels:g} megapixels, got"
            f" {pixels / 1e6:.1f}",
        )
    return body


# by what a task's name begins with: what its samples are
CARRIERS = {
    "text": Carrier(content_types=("application/json",), max_body_mib=1.0, read=read_texts),
    "image": Carrier(
        content_types=("image/*", "application/octet-stream"),
        max_body_mib=16.0,
        read=read_image,
        needs=("PIL.Image", "pillow", "image"),
    ),
}


def carrier_of(task: str) -> Carrier:
    """Return how requests carry the samples of `task`.

    Raises:
        ConfigError: there is no way yet.
        MissingExtraError: reading them needs a package that is not installed.
    """
    kind = task.partition("-")[0]
    if kind not in CARRIERS:
        raise ConfigError(f"task {task!r} cannot be served over HTTP; {', '.join(CARRIERS)} can")
    carrier = CARRIERS[kind]
    if carrier.needs:
        module, package, extra = carrier.needs
        try:
            importlib.import_module(module)  # now, rather than at the first request
        except ImportError as error:
            raise MissingExtraError(package, extra) from error
    return carrier


def read_query(query: str) -> bool:
    """Return whether all scores are asked for, the one thing that a query may say."""
    choices = {"1": True, "true": True, "0": False, "false": False}
    try:
        pairs = parse_qsl(
            query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=1
        )
    except ValueError:
        raise Refusal(400, "query: expected nothing or all_scores=1") from None
    for name, value in pairs:
        if name != "all_scores" or value not in choices:
            raise Refusal(400, "query: expected nothing or all_scores=1")
        return choices[value]
    return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key stands there twice")
    return mapping


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a string" if isinstance(value, str) else "a number")
