"""docs/bundle.schema.json and docs/bundle-format.md say what the parser of manifests does."""

import copy
import dataclasses
import hashlib
import json
import re
import struct
import types
import zipfile
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_runtime_manifest import MANIFESTS, VALUE, resealed
from tiny_bundles import REPOSITORY

from edgetune.errors import IntegrityError
from edgetune.runtime import archive, bundle, goldens, graph, manifest, npz, ort
from edgetune.runtime.manifest import SESSION_KEYS, Manifest, dump_manifest, parse_manifest
from edgetune.runtime.packing import pack

SCHEMA = json.loads((REPOSITORY / "docs" / "bundle.schema.json").read_text())
PAGE = (REPOSITORY / "docs" / "bundle-format.md").read_text()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
# what the parser refuses and no schema can say
BEYOND_THE_SCHEMA = (
    r"differ only in upper and lower case",
    r"is no valid JSON: .*(surrogates|levels deep|too large)",
    r"[\d.] is too large$",  # a whole number where a double is expected
    r"expected a whole number, got -?[\d.e+]+ \(float\)",  # 1.0 is an integer to JSON Schema
    r"expected a string, got -?[\d.e+]+ \(float\)",  # the same in a shape: "int or str"
    r"bundle schema 1\.0;|schema_version: expected a whole number",
)
quick = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def mappings(built):
    return [json.loads((built / n / "manifest.json").read_bytes()) for n in ("colors", "words")]


def accepts(data):
    """Say whether the parser accepts it, and if not, why."""
    try:
        parse_manifest(data, where="m")
    except IntegrityError as error:
        return str(error)
    return None


# -- the schema and the parser --------------------------------------------------------------------


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_manifests_of_bundles_are_valid(built):
    for mapping in mappings(built):
        VALIDATOR.validate(mapping)


@settings(quick, max_examples=150)
@given(MANIFESTS)
def test_whatever_the_parser_accepts_is_valid(record):
    data = dump_manifest(record)
    assert accepts(data) is None
    VALIDATOR.validate(json.loads(data))


@quick
@given(data=st.data())
def test_a_changed_manifest_is_refused_by_both_or_by_neither(built, data):
    mapping = copy.deepcopy(data.draw(st.sampled_from(mappings(built))))
    change(mapping, data)
    text = resealed(mapping)
    why, valid = accepts(text), VALIDATOR.is_valid(json.loads(text))
    if why is None:
        assert valid
    elif valid:
        assert any(re.search(known, why) for known in BEYOND_THE_SCHEMA), why


def change(mapping, data):
    """Put a value somewhere, remove a key, or add one."""
    spot, key = {"": mapping}, ""
    while isinstance(spot[key], dict | list) and spot[key] and data.draw(st.integers(0, 3)):
        spot = spot[key]
        keys = sorted(spot) if isinstance(spot, dict) else list(range(len(spot)))
        key = data.draw(st.sampled_from(keys))
    how = data.draw(st.sampled_from(["set", "set", "set", "drop", "add", "name"]))
    if spot.get("") is mapping if isinstance(spot, dict) else False:
        return
    if how == "drop":
        del spot[key]
    elif how == "add" and isinstance(spot, dict):
        spot[data.draw(st.sampled_from(["x", "", "a\n", "size"]))] = data.draw(VALUE)
    elif how == "name":
        odd = ["con", "NUL.x", "a\n", "../a", "A" * 129, "Manifest.json", "WEIGHTS.BIN", "ok_1.bin"]
        mapping["files"] = {data.draw(st.sampled_from(odd)): {"size": 1, "sha256": "0" * 64}}
    else:
        spot[key] = data.draw(
            VALUE
            | st.sampled_from([0, 1, -1, 0.0, 1.0, -0.5, "", "0" * 64, 10**400, "\ud800", "all"])
        )


@pytest.mark.parametrize(
    "changed",
    [
        {"schema_version": 2}, {"release": 0}, {"labels": ["a", "a"]}, {"extra": 1},
        {"files": {"../x": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"con": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"Manifest.JSON": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"a": {"size": -1, "sha256": "0" * 64}}},
        {"files": {"a": {"size": 1, "sha256": "0" * 63}}},
        {"files": {"a": {"size": 1, "sha256": "0" * 64 + "\n"}}},
        {"files": {f"f{i}": {"size": 1, "sha256": "0" * 64} for i in range(64)}},
        {"session": {"config": {"ep.context_file_path": "/"}}}, {"session": {"max_batch": 0}},
        {"goldens": {"count": -1, "tolerance": 0}}, {"goldens": {"count": 0, "tolerance": -1}},
        {"device": {"arch": "x", "cpu_features": [], "int8": "no"}}, {"options": []},
    ],
)  # fmt: skip
def test_both_refuse(built, changed):
    for mapping in mappings(built):
        text = resealed({**mapping, **changed})
        assert accepts(text)
        assert not VALIDATOR.is_valid(json.loads(text))


# -- the schema and the dataclasses ---------------------------------------------------------------

TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def definition(schema):
    """Return a part of the schema, its reference followed."""
    if "$ref" not in schema:
        return schema
    return SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")]


def compare(hint: Any, schema: dict[str, Any], where: str) -> None:
    """Check that a part of the schema says what a type says."""
    schema = definition(schema)
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        fields = {f.name: f for f in dataclasses.fields(hint)}
        assert schema["properties"].keys() == fields.keys(), where
        assert schema["additionalProperties"] is False, where
        needed = {
            name
            for name, f in fields.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        # a manifest without its digest is refused, though a record may be without
        assert set(schema["required"]) == needed | ({"digest"} & fields.keys()), where
        for name, inner in get_type_hints(hint).items():
            compare(inner, schema["properties"][name], f"{where}.{name}")
    elif origin is tuple:
        assert schema["type"] == "array", where
        compare(args[0], schema["items"], f"{where}[]")
    elif origin is dict:
        assert schema["type"] == "object", where
        if args[1] is Any:
            assert schema.get("additionalProperties", True) is True, where
        elif schema["additionalProperties"] is not False:
            compare(args[1], schema["additionalProperties"], f"{where}{{}}")
        else:
            assert schema["properties"].keys() == SESSION_KEYS, where
            assert all(s == {"type": "string"} for s in schema["properties"].values()), where
    elif origin is Literal:
        assert schema["enum"] == list(args), where
    elif origin in (Union, types.UnionType) and dataclasses.is_dataclass(args[0]):
        compare(args[0], schema, where)  # left out where there is none
    elif origin in (Union, types.UnionType):
        assert set(schema["type"]) == {TYPES[a] for a in args}, where
    else:
        assert schema["type"] == TYPES[hint], where


def test_every_field_is_in_the_schema_and_the_reverse():
    compare(Manifest, SCHEMA, "manifest")
    used = set(re.findall(r"#/\$defs/(\w+)", json.dumps(SCHEMA)))
    assert used == SCHEMA["$defs"].keys()


def test_the_page_names_every_key():
    records = [Manifest]
    for record in records:
        for name, hint in get_type_hints(record).items():
            assert f"`{name}`" in PAGE, name
            inner = [hint, *get_args(hint)]
            records += [h for h in inner if dataclasses.is_dataclass(h) and h not in records]
    for key in SESSION_KEYS:
        assert f"`{key}`" in PAGE, key


# -- what the page says in numbers ----------------------------------------------------------------


def test_the_digest_of_the_example_is_what_the_page_says():
    canonical, sha256 = re.findall(r"^    (\{.*\}|[0-9a-f]{64})$", PAGE, re.MULTILINE)[-2:]
    example = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    assert json.dumps(example, sort_keys=True, separators=(",", ":")) == canonical
    assert hashlib.sha256(canonical.encode()).hexdigest() == sha256
    assert json.loads(resealed(example))["digest"] == sha256


def test_the_limits_are_what_the_page_says():
    table = dict(re.findall(r"^\| ([^|]+?) \| ([\d,]+(?: [KMG]iB)?)[^|]*\|$", PAGE, re.MULTILINE))
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "": 1}
    stated = {}
    del table["`schema_version`"]
    for what, limit in table.items():
        number, _, unit = limit.replace(",", "").partition(" ")
        stated[what] = int(number) * units[unit]
    assert stated == {
        "files, the manifest not counted": manifest.MAX_FILES,
        "`manifest.json`": manifest.MAX_MANIFEST_BYTES,
        "levels of lists and objects in it": manifest.MAX_DEPTH,
        "commas and opening brackets in it": manifest.MAX_VALUES,
        "files that opening hashes, together": bundle.MAX_READ_BYTES,
        "all files together": bundle.MAX_BUNDLE_BYTES,
        "`goldens.npz`, and its arrays when unpacked": goldens.MAX_BYTES,
        "arrays in it": npz.MAX_ARRAYS,
        "threads": ort.MAX_THREADS,
    }
    assert archive.MAX_FILES == manifest.MAX_FILES + 1
    assert f"`{manifest.FILE_NAME.pattern}`" in PAGE
    assert all(f"`{d}`" in PAGE for d in graph.DOMAINS if d)


def test_a_reader_that_follows_the_page_finds_the_files(color_bundle, tmp_path):
    """The layout of the zip, read with nothing but struct."""
    pack(color_bundle, tmp_path / "b.zip")
    data = (tmp_path / "b.zip").read_bytes()
    sign, *_, count, size, start, comment = struct.unpack("<4s4H2LH", data[-22:])
    assert (sign, comment, start + size) == (b"PK\5\6", 0, len(data) - 22)
    place, names = 0, []
    for _ in range(count):  # local headers, one after the other, from the first byte on
        header = struct.unpack_from("<4s5H3L2H", data, place)
        sign, _, flags, method, _, _, _, packed, length, name_size, extra_size = header
        assert (sign, flags, method, packed) == (b"PK\3\4", 0, 0, length)
        name = data[place + 30 : place + 30 + name_size].decode()
        kind, room = struct.unpack_from("<HH", data, place + 30 + name_size)
        assert (kind, room) == (0xD935, extra_size - 4)
        place += 30 + name_size + extra_size
        assert place % 4096 == 0
        assert data[place : place + length] == (color_bundle / name).read_bytes()
        names.append(name)
        place += length
    assert place == start
    assert names == ["manifest.json", "goldens.npz", "model.onnx", "weights.bin"]


def test_goldens_are_stored_as_the_page_says(word_bundle, color_bundle):
    with zipfile.ZipFile(word_bundle / "goldens.npz") as stored:
        assert {e.compress_type for e in stored.infolist()} == {zipfile.ZIP_STORED}
    with np.load(word_bundle / "goldens.npz") as stored:
        assert stored["input_0"].shape == ()
        assert stored["ids_1"].dtype == np.int64
        assert stored["logits"].dtype == np.float32
    with np.load(color_bundle / "goldens.npz") as stored:
        assert stored["input_0"].shape == (2, 3, 3)
        assert stored["input_0"].dtype == np.uint8
