"""What hostile bundles were found to do, or could have done; tests/fuzz looks for more."""

import dataclasses
import io
import json
import os
import resource
import struct
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgetune.errors import ConfigError, IntegrityError, ResourceError
from edgetune.runtime import EdgeModel
from edgetune.runtime.archive import Archive
from edgetune.runtime.bundle import MAX_BUNDLE_BYTES, MAX_READ_BYTES, file_sha256, open_bundle
from edgetune.runtime.bundle import verify_files as verify
from edgetune.runtime.graph import external_places
from edgetune.runtime.manifest import (
    MAX_VALUES,
    FileEntry,
    Goldens,
    TensorSpec,
    dump_manifest,
    parse_manifest,
    release_numbers,
)
from edgetune.runtime.ort import check_version
from edgetune.runtime.packing import pack, unpack

unix = pytest.mark.skipif(sys.platform == "win32", reason="needs a Unix")


# -- zips ----------------------------------------------------------------------------------------


def zip_of(**info):
    """Return a zip of one file, with attributes of its `ZipInfo` set."""
    stored = io.BytesIO()
    entry = zipfile.ZipInfo(info.pop("filename", "weights.bin"))
    for name, value in info.items():
        setattr(entry, name, value)
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr(entry, b"abc")
    return stored.getvalue()


@pytest.mark.parametrize(
    ("info", "message"),
    [
        # another extractor would take the second name
        ({"extra": struct.pack("<HHBL", 0x7075, 12, 1, 0) + b"../evil"}, "an extra field 0x7075"),
        ({"extra": struct.pack("<HHQQ", 1, 16, 3, 3)}, "an extra field 0x0001"),
        ({"extra": struct.pack("<HH", 0xD935, 9)}, "an extra field that is cut off"),
        ({"create_system": 0, "external_attr": 0x10}, "is no plain file"),
        ({"filename": "../weights.bin"}, "is no name of a bundle's file"),
        ({"filename": "a\x1b[2J"}, "is no name of a bundle's file"),
        ({"filename": "a" * 129}, "is no name of a bundle's file"),
    ],
)
def test_a_zip_that_others_could_read_otherwise_is_refused(tmp_path, info, message):
    path = tmp_path / "x.zip"
    path.write_bytes(zip_of(**info))
    with pytest.raises(IntegrityError, match=message) as caught:
        Archive(path)
    assert "\x1b" not in str(caught.value)


def test_padding_is_no_such_extra_field(tmp_path):
    (tmp_path / "x.zip").write_bytes(zip_of(extra=struct.pack("<HH", 0xD935, 2) + b"\0\0"))
    archive = Archive(tmp_path / "x.zip")
    assert bytes(archive.view("weights.bin")) == b"abc"


@pytest.fixture
def color_zip(color_bundle, tmp_path):
    pack(color_bundle, tmp_path / "colors.zip")
    return tmp_path / "colors.zip"


def test_unpacking_where_nothing_can_be_written_is_a_resource_error(color_zip, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for target in (tmp_path / "file" / "new", tmp_path / ("n" * 250), tmp_path / ("n" * 300)):
        with pytest.raises(ResourceError, match="cannot be written"):
            unpack(color_zip, target)


def test_unpacking_that_fails_leaves_no_folder_that_it_made(color_zip, tmp_path):
    data = bytearray(color_zip.read_bytes())
    archive = Archive(color_zip)
    data[archive.members["weights.bin"].offset] ^= 1
    archive.close()
    color_zip.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"weights\.bin: expected SHA-256"):
        unpack(color_zip, tmp_path / "a" / "b" / "c")
    assert not (tmp_path / "a").exists()


@unix
def test_a_disk_that_fills_up_while_unpacking_is_a_resource_error(color_bundle, seal, tmp_path):
    (color_bundle / "big.bin").write_bytes(bytes(2**20))
    seal(color_bundle)
    pack(color_bundle, tmp_path / "big.zip")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(ResourceError, match="cannot be written"):
            unpack(tmp_path / "big.zip", tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*new*"))


# -- folders -------------------------------------------------------------------------------------


@unix
def test_a_pipe_or_device_in_place_of_a_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OSError, match="is no plain file"):
            file_sha256(tmp_path / name)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "goldens.npz"])
def test_what_is_read_is_what_was_hashed(word_bundle, name):
    bundle = open_bundle(word_bundle)
    data = bytearray((word_bundle / name).read_bytes())
    data[20] ^= 1
    (word_bundle / name).write_bytes(data)  # after opening, and of the same size
    with pytest.raises(IntegrityError, match="expected SHA-256"):
        bundle.read(name)


@unix
def test_a_name_that_a_terminal_would_obey_is_shown_as_text(color_bundle):
    (color_bundle / "a\x1b[2J\nerror: none").touch()
    with pytest.raises(IntegrityError, match=r"a\\x1b\[2J\\nerror: none'?: is not listed"):
        verify(open_bundle(color_bundle))


def test_a_folder_of_very_many_files_is_not_listed_to_its_end(color_bundle, monkeypatch):
    for number in range(300):
        (color_bundle / f"f{number}").touch()
    seen = []
    scandir = os.scandir

    class Counting:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return map(self.count, self.entries)

        def __exit__(self, *failure):
            self.entries.close()

        def count(self, entry):
            seen.append(entry)
            return entry

    bundle = open_bundle(color_bundle)
    monkeypatch.setattr(os, "scandir", Counting)
    with pytest.raises(IntegrityError, match="is not listed in the manifest"):
        verify(bundle)
    assert len(seen) == 65


@unix
@pytest.mark.parametrize(
    ("name", "size"), [("extra.bin", MAX_READ_BYTES + 1), ("weights.bin", MAX_BUNDLE_BYTES)]
)
def test_files_of_holes_are_not_hashed_for_days(color_bundle, name, size):
    manifest = open_bundle(color_bundle).manifest
    with (color_bundle / name).open("wb") as file:
        file.truncate(size)
    files = {**manifest.files, name: FileEntry(size=size, sha256="0" * 64)}
    data = dump_manifest(dataclasses.replace(manifest, files=files))
    (color_bundle / "manifest.json").write_bytes(data)
    with pytest.raises(IntegrityError, match="of them neither weights nor goldens; allowed"):
        open_bundle(color_bundle)


def test_a_path_that_no_system_allows_is_a_resource_error():
    with pytest.raises(ResourceError, match="cannot be read"):
        open_bundle("a" * 5000)
    with pytest.raises(ConfigError, match="found none"):
        open_bundle("a\0b")


# -- manifests -----------------------------------------------------------------------------------


def test_a_manifest_is_utf_8(color_bundle):
    text = (color_bundle / "manifest.json").read_text()
    for codec in ("utf-16", "utf-32", "utf-8-sig"):
        with pytest.raises(IntegrityError, match="is no valid JSON"):
            parse_manifest(text.encode(codec), where="m")


def test_a_manifest_of_very_many_values_is_refused_before_they_are_made():
    for value in ("[],", "{},", "0,"):
        data = ('{"schema_version": 1, "x": [' + value * MAX_VALUES + "0]}").encode()
        with pytest.raises(IntegrityError, match="more than 262144 values"):
            parse_manifest(data, where="m")


def test_a_version_of_thousands_of_digits_is_refused_as_any_other(color_bundle, seal):
    manifest = open_bundle(color_bundle).manifest
    needs = dataclasses.replace(manifest.compatibility, onnxruntime_min="9" * 5000)
    seal(color_bundle, compatibility=needs)
    with pytest.raises(ConfigError, match="the bundle needs onnxruntime 9999"):
        EdgeModel.load(color_bundle)
    assert release_numbers("1.20.1rc2+cu12") == (1, 20, 1)
    assert release_numbers("12345678901.2") == (123456789, 0, 0)
    check_version(manifest.compatibility)


@pytest.mark.parametrize(
    "text",
    [
        '"x": ' + "1" * 10**6 + ".0e999", '"k": 1, "' + "k" * 10**6 + '": 1',
        '"' + "k" * 10**6 + '": 1, "' + "k" * 10**6 + '": 2',
        '"schema_version": "' + "v" * 10**6 + '"',
    ],
)  # fmt: skip
def test_no_message_is_long(text):
    with pytest.raises(IntegrityError) as caught:
        parse_manifest(f"{{{text}}}".encode(), where="m")
    assert len(str(caught.value)) < 1000


# -- goldens -------------------------------------------------------------------------------------


def with_goldens(folder, seal, members, method=zipfile.ZIP_STORED):
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", method) as archive:
        for name, value in members.items():
            if not isinstance(value, bytes):
                array = io.BytesIO()
                np.save(array, value)
                value = array.getvalue()
            archive.writestr(name, value)
    (folder / "goldens.npz").write_bytes(stored.getvalue())
    seal(folder)
    return EdgeModel.load(folder)


LOGITS = np.zeros((2, 3), np.float32)
PIXELS = np.zeros((1, 1, 3), np.uint8)
GOOD = {"logits.npy": LOGITS, "input_0.npy": PIXELS, "input_1.npy": PIXELS}


def test_a_string_in_the_goldens_of_images_is_no_path(color_bundle, seal):
    secret = color_bundle.parent / "secret.png"
    secret.write_bytes(b"not to be opened")
    model = with_goldens(color_bundle, seal, {**GOOD, "input_0.npy": np.array(str(secret))})
    for read in (model.self_test, model.goldens):
        with pytest.raises(IntegrityError, match="input_0: expected pixels, got"):
            read()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({**GOOD, "input_0.npy": b"hello"}, "holds what is no array"),
        ({**GOOD, "logits.npy": b"hello"}, "holds what is no array"),
        ({**GOOD, "input_0.npy": np.zeros((1, 1), np.uint8)}, "input_0: expected pixels"),
        ({**GOOD, **{f"a{i}.npy": b"" for i in range(5000)}}, "more than 4096 arrays"),
    ],
)
def test_goldens_that_are_no_samples_are_refused(color_bundle, seal, members, message):
    with pytest.raises(IntegrityError, match=message):
        with_goldens(color_bundle, seal, members).self_test()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_goldens_are_stored_or_deflated(color_bundle, seal, method):
    with pytest.raises(IntegrityError, match="neither stored nor deflated"):
        with_goldens(color_bundle, seal, GOOD, method).self_test()


def test_infinite_logits_fail_the_self_test_without_a_warning(color_bundle, seal):
    members = {**GOOD, "logits.npy": np.full((2, 3), np.inf, np.float32)}
    with pytest.raises(IntegrityError, match="golden 0: a logit is inf from the stored one"):
        with_goldens(color_bundle, seal, members).self_test()


def regraphed(folder, seal, nodes, outputs, **changes):
    """Give the color bundle another graph."""
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "h", "w", 3])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
    )  # fmt: skip
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    specs = tuple(TensorSpec(name=n, dtype="x", shape=()) for n in outputs)
    seal(folder, outputs=specs, **changes)
    return EdgeModel.load(folder)


@pytest.mark.parametrize("name", ["scores", "logits"])
def test_a_graph_that_gives_no_logits_fails_the_self_test(color_bundle, seal, name):
    node = helper.make_node("Identity", ["image"], [name])
    model = regraphed(color_bundle, seal, [node], {name: TensorProto.UINT8})
    with pytest.raises(IntegrityError, match="the graph gives no logits of shape"):
        model.self_test()


def test_a_bundle_without_labels_fails_no_worse(color_bundle, seal):
    np.savez(color_bundle / "goldens.npz", logits=np.zeros((1, 0), np.float32), input_0=PIXELS)
    seal(color_bundle, labels=(), goldens=Goldens(count=1, tolerance=1.0))
    with pytest.raises(IntegrityError, match=r"gives no logits of shape \(1, 0\)"):
        EdgeModel.load(color_bundle).self_test()


# -- graphs --------------------------------------------------------------------------------------


def message(number, data):
    size, digits = len(data), b""
    while size > 0x7F:
        digits += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + digits + bytes([size]) + data


def tensor(**entries):
    proto = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    for key, value in entries.items():
        proto.external_data.add(key=key, value=value)
    return proto.SerializeToString()


def in_attribute(*tensors):
    attribute = b"".join(message(5, t) for t in tensors)
    return message(7, message(1, message(5, attribute)))


def test_a_tensor_in_two_parts_is_refused():
    # what protobuf makes of it: one tensor, its place from both
    parts = in_attribute(tensor(location="weights.bin"), tensor(offset="99"))
    merged = onnx.ModelProto.FromString(parts).graph.node[0].attribute[0].t
    assert [e.key for e in merged.external_data] == ["location", "offset"]
    with pytest.raises(ValueError, match="field 5 of Attribute is there twice"):
        external_places(parts)


def test_a_tensor_that_names_further_bytes_is_refused():
    odd = in_attribute(tensor(location="weights.bin", prepacked_0="key|0;99"))
    with pytest.raises(ValueError, match="twice, in part or oddly"):
        external_places(odd)
    fine = in_attribute(tensor(location="weights.bin", checksum="0"))
    assert {p.location for p in external_places(fine)} == {"weights.bin"}


def test_a_graph_that_onnxruntime_would_read_as_its_own_format_is_refused(color_bundle, seal):
    graph = (color_bundle / "model.onnx").read_bytes()
    (color_bundle / "model.onnx").write_bytes(b"\x12\x06ABORTM" + graph)  # a producer's name
    assert onnx.load(color_bundle / "model.onnx", load_external_data=False).producer_name
    seal(color_bundle)
    with pytest.raises(IntegrityError, match="is in onnxruntime's own format"):
        EdgeModel.load(color_bundle)


@unix
def test_graphs_inside_one_another_take_no_memory_of_their_own():
    # 8 MiB, 60 messages deep; a copy a level would be 480 MiB
    program = (
        "import resource, sys\n"
        "from edgetune.runtime.graph import external_places\n"
        "data = sys.stdin.buffer.read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert len(external_places(data)) == 1\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    core = message(5, tensor(location="weights.bin") + message(9, bytes(2**23)))
    for _ in range(19):
        core = message(1, message(5, message(6, core)))
    done = subprocess.run(
        [sys.executable, "-c", program], input=message(7, core), capture_output=True, check=True
    )
    assert int(done.stdout) < 40


# -- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        # Rust's own way to end: a BaseException in Python
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
         r"tokenizer\.json: is no tokenizer: "),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8A"},
         "the bundle's tokenizer fails on 'good'"),
        ("model", {"type": "WordLevel", "vocab": {}, "unk_token": "[UNK]"},
         "the bundle's tokenizer fails on 'good'"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_breaks_down_is_an_integrity_error(
    word_bundle, seal, part, value, message
):
    path = word_bundle / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: value}))
    seal(word_bundle)
    with pytest.raises(IntegrityError, match=message) as caught:
        EdgeModel.load(word_bundle).predict("good")
    assert "\n" not in str(caught.value)
