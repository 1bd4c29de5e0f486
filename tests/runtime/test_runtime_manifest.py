import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgetune.errors import ConfigError, IntegrityError
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.manifest import (
    DEVICE_NAME,
    FILE_NAME,
    MAX_DEPTH,
    SESSION_KEYS,
    Abstention,
    Calibration,
    Compatibility,
    DeviceClass,
    Evaluation,
    FileEntry,
    Goldens,
    Manifest,
    Metric,
    SessionSettings,
    TensorSpec,
    dump_manifest,
    parse_manifest,
)
from edgetune.runtime.records import from_mapping, nearest, to_mapping

# what may be in a manifest: JSON has no NaN, UTF-8 no half of a surrogate pair
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(1, 2**63)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def tuples(of, **bounds):
    return st.lists(of, max_size=4, **bounds).map(tuple)


METRIC = st.builds(Metric, value=NUMBER, low=NUMBER, high=NUMBER)
EVALUATION = st.builds(
    Evaluation,
    split=TEXT,
    samples=st.integers(),
    metrics=st.dictionaries(TEXT, METRIC, max_size=2),
)
TENSORS = tuples(
    st.builds(TensorSpec, name=TEXT, dtype=TEXT, shape=tuples(st.integers() | TEXT)),
)
MANIFESTS = st.builds(
    Manifest,
    schema_version=st.just(1),
    name=TEXT,
    release=COUNT,
    task=TEXT,
    labels=tuples(TEXT, unique=True),
    precision=TEXT,
    profile=TEXT,
    options=st.dictionaries(TEXT, VALUE, max_size=3),
    inputs=TENSORS,
    outputs=TENSORS,
    compatibility=st.builds(
        Compatibility,
        onnxruntime_min=TEXT,
        onnxruntime_excluded=tuples(TEXT),
        opset=st.integers(),
        ir_version=st.integers(),
    ),
    device=st.builds(
        DeviceClass,
        arch=TEXT,
        cpu_features=tuples(TEXT),
        int8=st.sampled_from(["exact", "saturates"]),
        peak_rss_mib=st.none() | NUMBER,
    ),
    session=st.builds(
        SessionSettings,
        execution_providers=tuples(TEXT),
        intra_op_threads=COUNT,
        allow_spinning=st.booleans(),
        graph_optimization=st.sampled_from(["off", "basic", "extended", "all"]),
        arena=st.booleans(),
        config=st.dictionaries(st.sampled_from(sorted(SESSION_KEYS)), TEXT, max_size=2),
        max_batch=COUNT,
    ),
    evaluation=EVALUATION,
    reference=EVALUATION,
    goldens=st.builds(
        Goldens,
        count=st.integers(0, 10**6),
        tolerance=st.floats(0, allow_nan=False, allow_infinity=False),
    ),
    files=st.dictionaries(
        st.from_regex(FILE_NAME, fullmatch=True)
        .map(str.lower)
        .filter(lambda n: n != "manifest.json" and not DEVICE_NAME.fullmatch(n)),
        st.builds(
            FileEntry,
            size=st.integers(0, 2**63),
            sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
        ),
        max_size=3,
    ),
    calibration=st.none()
    | st.builds(
        Calibration,
        temperature=st.floats(1e-3, 1e3),
        ece_before=NUMBER,
        ece_after=NUMBER,
        samples=st.integers(),
    ),
    abstention=st.none()
    | st.builds(
        Abstention,
        threshold=st.floats(0, 1),
        accuracy=NUMBER,
        low=NUMBER,
        coverage=NUMBER,
        samples=st.integers(),
    ),
    overrides=tuples(TEXT),
    edgetune_version=TEXT,
    digest=st.just(""),
)
quick = settings(max_examples=60, deadline=None)


def without_digest(manifest):
    return dataclasses.replace(manifest, digest="")


@quick
@given(MANIFESTS)
def test_a_manifest_written_and_read_is_the_same(manifest):
    data = dump_manifest(manifest)
    read = parse_manifest(data, where="m")
    assert without_digest(read) == manifest
    assert dump_manifest(read) == data


@quick
@given(MANIFESTS)
def test_a_manifest_as_mapping_and_back_is_the_same(manifest):
    mapping = to_mapping(manifest)
    assert from_mapping(Manifest, mapping, where="m") == manifest
    assert from_mapping(Manifest, json.loads(json.dumps(mapping)), where="m") == manifest


@quick
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode(errors="replace")))
@example(b"")
@example(b"null")
@example(b'{"schema_version": 1}')
@example(b'{"schema_version": true}')
@example(b'{"schema_version": 1.0}')
@example(b"\xef\xbb\xbf{}")
@example(b"1" * 5000)
def test_arbitrary_bytes_are_refused(data):
    with pytest.raises(IntegrityError):
        parse_manifest(data, where="m")


@settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_manifest_is_refused_or_the_same(built, data):
    original = (built / "colors" / "manifest.json").read_bytes()
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(mutated)))
        end = data.draw(st.integers(start, min(start + 8, len(mutated))))
        mutated[start:end] = data.draw(st.binary(max_size=4) | st.sampled_from([b'"', b"[", b"1"]))
    try:
        read = parse_manifest(bytes(mutated), where="m")
    except IntegrityError:
        return
    # white space, or an escape of the same letter
    assert read == parse_manifest(original, where="m")


@settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_value_put_anywhere_into_a_manifest_is_refused_or_read(built, data):
    mapping = json.loads((built / "colors" / "manifest.json").read_bytes())
    spot, key = mapping, data.draw(st.sampled_from(sorted(mapping)))
    while isinstance(spot[key], dict) and spot[key] and data.draw(st.booleans()):
        spot, key = spot[key], data.draw(st.sampled_from(sorted(spot[key])))
    spot[key] = data.draw(VALUE | st.integers(10**300, 10**320) | st.just("\ud800"))
    bytes_ = resealed(mapping)
    try:
        read = parse_manifest(bytes_, where="m")
    except IntegrityError:
        return
    # defaults that were left out are written, so the digest may be another
    again = parse_manifest(dump_manifest(read), where="m")
    assert without_digest(again) == without_digest(read)


def resealed(mapping):
    """Give a mapping the digest that goes with it, as an attacker would."""
    rest = {k: v for k, v in mapping.items() if k != "digest"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**rest, "digest": hashlib.sha256(canonical).hexdigest()}).encode()


def test_the_digest_is_the_sha256_of_the_rest_in_canonical_json(built):
    data = (built / "colors" / "manifest.json").read_bytes()
    assert json.loads(data)["digest"] == json.loads(resealed(json.loads(data)))["digest"]


def test_order_of_keys_and_white_space_do_not_count(built):
    mapping = json.loads((built / "colors" / "manifest.json").read_bytes())
    shuffled = json.dumps(dict(reversed(mapping.items()))).encode()
    assert parse_manifest(shuffled, where="m") == open_bundle(built / "colors").manifest


@pytest.mark.parametrize("depth", [MAX_DEPTH, 200, 900, 960, 980, 990, 995, 2000, 10**6])
def test_deep_options_are_refused_at_every_depth(built, depth):
    # around the interpreter's limit, where reading works and writing would not
    text = (built / "colors" / "manifest.json").read_text()
    deep = text.replace('"options": {}', '"options": {"a": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(IntegrityError, match="is no valid JSON"):
        parse_manifest(deep.encode(), where="m")


def test_a_hostile_manifest_is_refused_in_time():
    # 200 000 keys, one of them twice; comparing each with each would take minutes
    keys = ",".join(f'"k{i}":1' for i in range(200_000))
    begin = time.perf_counter()
    with pytest.raises(IntegrityError, match="key 'k199999' is repeated"):
        parse_manifest(f'{{{keys},"k199999":2}}'.encode(), where="m")
    assert time.perf_counter() - begin < 10


def test_a_message_does_not_repeat_megabytes():
    data = json.dumps({"schema_version": 1, "k" * 10**6: 1}).encode()
    with pytest.raises(IntegrityError, match="unknown key 'kkk") as caught:
        parse_manifest(data, where="m")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_lacks_is_not_written(built, value):
    manifest = open_bundle(built / "colors").manifest
    with pytest.raises(ValueError, match="JSON compliant"):
        dump_manifest(dataclasses.replace(manifest, options={"a": value}))


# -- records ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inner:
    x: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Record:
    name: str
    count: int = 1
    share: float | None = None
    flag: bool = False
    way: Literal["fast", "slow"] = "fast"
    many: tuple[int, ...] = ()
    either: int | str = 0
    table: dict[str, Inner] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    inner: Inner = Inner()


def read(**mapping):
    return from_mapping(Record, {"name": "n", **mapping}, where="file")


def test_a_whole_number_serves_as_a_number_and_a_list_as_a_tuple():
    record = read(share=1, many=[1, 2])
    assert record.share == 1.0
    assert isinstance(record.share, float)
    assert record.many == (1, 2)


def test_a_free_value_stays_what_it_is():
    free = {"a": True, "b": None, "c": [1, {"d": 2.5}], "e": "x"}
    assert read(free=free).free == free


def test_none_is_left_out_of_a_mapping():
    assert "share" not in to_mapping(read())


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"count": "1"}, r"file: count: expected a whole number, got '1' \(str\)"),
        ({"count": True}, r"count: expected a whole number, got True \(bool\)"),
        ({"count": 1.0}, r"count: expected a whole number, got 1.0 \(float\)"),
        ({"share": "0.5"}, r"share: expected a number, got '0.5' \(str\)"),
        ({"share": True}, "share: expected a number, got True"),
        ({"share": 10**400}, "share: 1000.* is too large"),
        ({"flag": 1}, r"flag: expected true or false, got 1 \(int\)"),
        ({"name": None}, "name: expected a string, got None"),
        ({"way": "fats"}, r"way: expected one of 'fast', 'slow', got 'fats'; did you mean 'fast'"),
        ({"way": True}, "way: expected one of 'fast', 'slow', got True$"),
        ({"many": 1}, r"many: expected a list, got 1 \(int\)"),
        ({"many": "12"}, r"many: expected a list, got '12' \(str\)"),
        ({"many": [1, "2"]}, r"many\[1\]: expected a whole number, got '2'"),
        ({"either": 1.5}, "either: expected a string, got 1.5"),
        ({"table": []}, r"table: expected a table of keys, got \[\] \(list\)"),
        ({"table": {"k": {"x": "y"}}}, r"table\.k: x: expected a number, got 'y'"),
        ({"inner": {"y": 1}}, "inner: unknown key 'y'; known: x"),
        ({"cuont": 1}, "file: unknown key 'cuont'; did you mean 'count'?"),
    ],
)
def test_a_wrong_value_is_named_with_its_place_and_what_was_expected(mapping, message):
    with pytest.raises(ConfigError, match=message):
        read(**mapping)


def test_a_missing_key_and_a_wrong_table_are_named():
    with pytest.raises(ConfigError, match="file: key 'name' is missing"):
        from_mapping(Record, {}, where="file")
    with pytest.raises(ConfigError, match="file: expected a table of keys, got 3"):
        from_mapping(Record, 3, where="file")


def test_the_error_is_of_the_class_asked_for():
    with pytest.raises(IntegrityError, match="unknown key"):
        from_mapping(Record, {"x": 1}, where="file", error=IntegrityError)


def test_an_alias_goes_before_a_like_spelling():
    assert nearest("lr", ["learning_rate", "r"], {"lr": "learning_rate"}) == (
        "; did you mean 'learning_rate'?"
    )
    assert nearest("lerning_rate", ["learning_rate", "r"]) == "; did you mean 'learning_rate'?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
