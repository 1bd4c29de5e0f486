"""A bundle that is not what its manifest says is refused, in process and on the command line."""

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgetune.errors import ConfigError, IntegrityError, ResourceError
from edgetune.runtime import EdgeModel
from edgetune.runtime.bundle import open_bundle, verify_files
from edgetune.runtime.manifest import (
    MAX_MANIFEST_BYTES,
    Compatibility,
    FileEntry,
    SessionSettings,
    TensorSpec,
    dump_manifest,
    parse_manifest,
)


def edited(old, new):
    """Return a damage: replace text in manifest.json, as a person with an editor would."""

    def damage(folder):
        path = folder / "manifest.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return damage


def rewritten(data):
    return lambda folder: (folder / "manifest.json").write_bytes(data)


def cut(name, length):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:length])

    return damage


def flipped(name, place):
    def damage(folder):
        path = folder / name
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    return damage


def removed(name):
    return lambda folder: (folder / name).unlink()


def linked(name):
    def damage(folder):
        path = folder / name
        path.rename(folder.parent / name)
        path.symlink_to(folder.parent / name)

    return damage


# what is done to the folder -> what the message says
REFUSED_AT_OPENING = {
    "no manifest": (removed("manifest.json"), "is no bundle: it has no file manifest.json"),
    "empty manifest": (cut("manifest.json", 0), "manifest.json: is no valid JSON"),
    "truncated manifest": (cut("manifest.json", 700), "manifest.json: is no valid JSON"),
    "labels swapped by hand": (edited('"red",\n    "green"', '"green",\n    "red"'),
                               "was changed after it was made"),
    "value changed by hand": (edited('"release": 1', '"release": 2'),
                              "was changed after it was made"),
    "digest removed": (lambda f: (f / "manifest.json").write_text(
                           re.sub(r',\s*"digest": "\w+"', "", (f / "manifest.json").read_text())),
                       "was changed after it was made"),
    "unknown key": (edited('"name"', '"naem": 1, "name"'),
                    "unknown key 'naem'; did you mean 'name'?"),
    "unknown inner key": (edited('"max_batch"', '"max_batsh"'),
                          "session: unknown key 'max_batsh'; did you mean 'max_batch'?"),
    "missing key": (edited('"release": 1,', ""), "key 'release' is missing"),
    "wrong type": (edited('"release": 1', '"release": "1"'),
                   "release: expected a whole number, got '1' (str)"),
    "repeated key": (edited('"release": 1', '"release": 1, "release": 1'),
                     "key 'release' is repeated"),
    "repeated inner key": (edited('"max_batch": 4', '"max_batch": 4, "max_batch": 9'),
                           "key 'max_batch' is repeated"),
    "NaN": (edited("0.001", "NaN"), "NaN is no JSON number"),
    "Infinity": (edited("0.001", "-Infinity"), "-Infinity is no JSON number"),
    "number beyond double": (edited("0.001", "1e999"), "1e999 is too large"),
    "newer schema": (edited('"schema_version": 1', '"schema_version": 2'),
                     "bundle schema 2; this edgetune reads 1"),
    "no schema": (rewritten(b"{}"), "bundle schema None"),
    "no object": (rewritten(b"[1, 2]"), "expected a JSON object, got list"),
    "no text": (rewritten(b"\xff\xfe\x00\xd8"), "is no valid JSON"),
    "bomb of brackets": (rewritten(b"[" * 100_000), "is no valid JSON"),
    "deep options": (edited('"options": {}', '"options": {"a": ' + "[" * 500 + "]" * 500 + "}"),
                     "levels deep"),
    "half a surrogate pair": (edited('"name": "colors"', '"name": "\\ud800"'),
                              "is no valid JSON"),
    "manifest above the limit": (rewritten(b" " * (MAX_MANIFEST_BYTES + 1)),
                                 f"larger than {MAX_MANIFEST_BYTES} bytes"),
    "file absent": (removed("weights.bin"), "36 bytes, found nothing"),
    "graph absent": (removed("model.onnx"), "model.onnx: expected a file of"),
    "goldens absent": (removed("goldens.npz"), "goldens.npz: expected a file of"),
    "weights truncated": (cut("weights.bin", 35), "weights.bin: expected 36 bytes, got 35"),
    "graph truncated": (cut("model.onnx", 100), "got 100; the bundle is damaged, copy it again"),
    "bit of the graph flipped": (flipped("model.onnx", 60), "model.onnx: expected SHA-256"),
    "weights are a link": (linked("weights.bin"), "weights.bin: expected a file of 36 bytes, found"
                           " a link"),
    "graph is a link": (linked("model.onnx"), "found a link"),
    "graph is a folder": (lambda f: ((f / "model.onnx").unlink(), (f / "model.onnx").mkdir()),
                          "model.onnx: expected a file of"),
}  # fmt: skip
REFUSED_BY_VERIFY = {
    "bit of the weights flipped": (flipped("weights.bin", 3), "weights.bin: expected SHA-256"),
    "bit of the goldens flipped": (flipped("goldens.npz", 90), "goldens.npz: expected SHA-256"),
    "extra file": (lambda f: (f / "extra.txt").write_text("?"),
                   "extra.txt: is not listed in the manifest"),
    "extra folder": (lambda f: (f / "more").mkdir(), "more: is not listed in the manifest"),
    "extra hidden file": (lambda f: (f / ".hidden").write_text("?"),
                          ".hidden: is not listed in the manifest"),
}  # fmt: skip


def assert_one_line(done, message, exit_code=6):
    error = done.stderr.decode()
    assert done.returncode == exit_code, error
    assert done.stdout == b""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("case", REFUSED_AT_OPENING)
def test_it_is_refused_at_opening(color_bundle, rt, case):
    damage, message = REFUSED_AT_OPENING[case]
    damage(color_bundle)
    with pytest.raises(IntegrityError, match=re.escape(message)):
        EdgeModel.load(color_bundle)
    assert_one_line(rt("info", color_bundle), message)


@pytest.mark.parametrize("case", REFUSED_BY_VERIFY)
def test_it_is_loaded_quickly_and_refused_by_the_full_check(color_bundle, rt, case):
    damage, message = REFUSED_BY_VERIFY[case]
    damage(color_bundle)
    EdgeModel.load(color_bundle)
    with pytest.raises(IntegrityError, match=re.escape(message)):
        EdgeModel.load(color_bundle, check="full")
    assert_one_line(rt("verify", color_bundle), message)


def test_an_untouched_bundle_passes_the_full_check_and_its_self_test(color_bundle, word_bundle):
    for bundle in (color_bundle, word_bundle):
        assert EdgeModel.load(bundle, check="full").self_test() <= 1e-5


@pytest.mark.parametrize("kind", ["absent", "a file", "a broken link"])
def test_what_is_no_folder_is_refused(tmp_path, rt, kind):
    path = tmp_path / "bundle"
    if kind == "a file":
        path.write_bytes(b"PK")
    elif kind == "a broken link":
        path.symlink_to(tmp_path / "gone")
    error, message = ConfigError, "expected a bundle's folder or zip, found none"
    if kind == "a file":
        error, message = IntegrityError, "neither a folder nor a zip"
    with pytest.raises(error, match=message):
        EdgeModel.load(path)
    for command in (["info", path], ["verify", path], ["run", path, "x"], ["serve-stdin", path]):
        if kind == "absent" or command[0] == "info":
            assert_one_line(rt(*command), message, exit_code=error.exit_code)


@pytest.mark.parametrize("command", ["run", "serve-stdin", "verify"])
def test_every_command_refuses_a_damaged_bundle(color_bundle, rt, command):
    removed("weights.bin")(color_bundle)
    inputs = ["x.png"] if command == "run" else []
    assert_one_line(rt(command, color_bundle, *inputs), "weights.bin: expected a file")


def test_a_manifest_that_is_a_folder_is_refused(color_bundle):
    path = color_bundle / "manifest.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(IntegrityError, match=r"is no bundle: it has no file manifest\.json"):
        EdgeModel.load(color_bundle)


@pytest.mark.parametrize(
    "name",
    [
        "../weights.bin", "/etc/hostname", "a/b", "a\\b", ".hidden", "..", ".", "", " a", "a\n",
        "a\0b", "-r", "~", "C:x", "ż.bin", "a" * 129, "manifest.json", "Manifest.JSON", "a.", "con",
        "NUL.txt", "lpt1",
    ],
)  # fmt: skip
def test_a_file_name_that_leaves_the_folder_or_could_do_harm_is_refused(color_bundle, name):
    # with a digest that is right: only the name is at fault
    manifest = open_bundle(color_bundle).manifest
    entry = manifest.files["weights.bin"]
    data = dump_manifest(dataclasses.replace(manifest, files={name: entry}))
    with pytest.raises(IntegrityError, match="is no name that a bundle's file may have"):
        parse_manifest(data, where="manifest")


def test_names_that_are_one_on_some_file_systems_are_refused(color_bundle):
    manifest = open_bundle(color_bundle).manifest
    entry = manifest.files["weights.bin"]
    files = {"weights.bin": entry, "Weights.bin": entry}
    data = dump_manifest(dataclasses.replace(manifest, files=files))
    with pytest.raises(IntegrityError, match="differ only in upper and lower case"):
        parse_manifest(data, where="manifest")


def test_more_files_than_a_bundle_has_are_refused(color_bundle):
    manifest = open_bundle(color_bundle).manifest
    entry = manifest.files["weights.bin"]
    files = {f"f{i}": entry for i in range(64)}
    data = dump_manifest(dataclasses.replace(manifest, files=files))
    with pytest.raises(IntegrityError, match="files: 64, allowed 63"):
        parse_manifest(data, where="manifest")


@pytest.mark.parametrize(
    "key",
    [
        "session.model_external_initializers_file_folder_path", "ep.context_file_path",
        "session.optimized_model_external_initializers_file_name", "session.use_env_allocators",
    ],
)  # fmt: skip
def test_a_session_option_that_names_files_is_refused(color_bundle, seal, key):
    seal(color_bundle, session=SessionSettings(config={key: "/"}))
    with pytest.raises(IntegrityError, match=f"config: '{key}' is no option that a bundle may set"):
        open_bundle(color_bundle)


@pytest.mark.parametrize(
    ("size", "sha256"), [(-1, "0" * 64), (1, "0" * 63), (1, "G" * 64), (1, "A" * 64), (1, "")]
)
def test_a_malformed_size_or_hash_is_refused(color_bundle, size, sha256):
    manifest = open_bundle(color_bundle).manifest
    files = {"weights.bin": FileEntry(size=size, sha256=sha256)}
    data = dump_manifest(dataclasses.replace(manifest, files=files))
    with pytest.raises(IntegrityError, match=r"weights\.bin: size or sha256 is malformed"):
        parse_manifest(data, where="manifest")


def test_a_file_that_cannot_be_read_is_a_resource_error(color_bundle, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("edgetune.runtime.bundle.file_sha256", refuse)
    with pytest.raises(ResourceError, match=r"model\.onnx: cannot be read: Permission denied"):
        open_bundle(color_bundle)


def test_progress_names_each_file_once(color_bundle):
    names = []
    verify_files(open_bundle(color_bundle), progress=names.append)
    assert sorted(names) == ["goldens.npz", "model.onnx", "weights.bin"]


def test_a_bundle_knows_its_size_without_the_manifest(color_bundle):
    files = [p for p in color_bundle.iterdir() if p.name != "manifest.json"]
    assert open_bundle(color_bundle).size_bytes == sum(p.stat().st_size for p in files)


# -- a manifest that is whole but wrong ---------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "image-clasification"},
         "names task 'image-clasification'; did you mean 'image-classification'?"),
        ({"task": "x"}, "known: image-classification, image-multilabel"),
        ({"labels": ("red", "green")}, "logit for each of 2 labels, got an array of shape (1, 3)"),
        ({"labels": ("red", "red", "blue")}, "labels: one of them is there twice"),
        ({"session": SessionSettings(max_batch=0)}, "max_batch: expected at least 1, got 0"),
        ({"session": SessionSettings(intra_op_threads=0)}, "intra_op_threads: expected at least 1"),
        ({"session": SessionSettings(config={"": "1"})},
         "config: '' is no option that a bundle may set"),
        ({"release": 0}, "release: expected at least 1, got 0"),
        ({"outputs": (TensorSpec(name="scores", dtype="float32", shape=(1,)),)},
         "names the graph's outputs scores; the graph has logits"),
        ({"inputs": ()}, "names the graph's inputs ; the graph has image"),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_fit_is_refused(color_bundle, seal, changes, message):
    seal(color_bundle, **changes)
    with pytest.raises(IntegrityError, match=re.escape(message)):
        EdgeModel.load(color_bundle).predict(np.zeros((1, 1, 3), np.uint8))


@pytest.mark.parametrize(
    ("compatibility", "message"),
    [
        ({"onnxruntime_min": "99.0.0"}, "the bundle needs onnxruntime 99.0.0 or newer, found"),
        ({"onnxruntime_excluded": ("this",)}, "is known not to work on this bundle's device"),
    ],
)
def test_an_onnxruntime_that_cannot_run_the_bundle_is_a_config_error(
    color_bundle, seal, rt, compatibility, message
):
    from edgetune.runtime.ort import version

    if "onnxruntime_excluded" in compatibility:
        compatibility = {"onnxruntime_excluded": ("1.2.3", version())}
    needs = {"onnxruntime_min": "1.17.0", "opset": 17, "ir_version": 8, **compatibility}
    seal(color_bundle, compatibility=Compatibility(**needs))
    with pytest.raises(ConfigError, match=re.escape(message)):
        EdgeModel.load(color_bundle)
    assert_one_line(rt("verify", color_bundle), message, exit_code=2)


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "goldens.npz"])
def test_a_manifest_that_does_not_list_a_file_refuses_it(color_bundle, seal, name):
    (color_bundle / name).unlink()
    seal(color_bundle)
    with pytest.raises(IntegrityError, match=re.escape(name)):
        EdgeModel.load(color_bundle).self_test()


@pytest.mark.parametrize("data", [b"", b"\x00\xff" * 50, b"GIF89a", b"\x08\x08" + b"\x3a" * 400])
def test_a_graph_that_onnxruntime_cannot_read_is_one_line(color_bundle, seal, rt, data):
    (color_bundle / "model.onnx").write_bytes(data)
    seal(color_bundle)
    with pytest.raises(IntegrityError, match=r"model\.onnx: (onnxruntime \d|is no ONNX graph: )"):
        EdgeModel.load(color_bundle)
    assert_one_line(rt("verify", color_bundle), "model.onnx: ")


def test_weights_shorter_than_the_graph_says_refuse_the_bundle(color_bundle, seal):
    (color_bundle / "weights.bin").write_bytes(b"\0" * 8)
    seal(color_bundle)
    with pytest.raises(IntegrityError, match=r"wants bytes 0 to 36 of weights\.bin, which has 8"):
        EdgeModel.load(color_bundle)


@pytest.mark.parametrize("how", ["../secret.bin", "absolute", "./weights.bin", "unlisted.bin"])
def test_a_graph_may_read_listed_files_only(color_bundle, seal, how):
    # onnxruntime 1.17 to 1.23 reads all of these
    secret = color_bundle.parent / "secret.bin"
    secret.write_bytes(np.full((3, 3), 7, np.float32).tobytes())
    location = str(secret) if how == "absolute" else how
    graph = onnx.load(color_bundle / "model.onnx", load_external_data=False)
    graph.graph.initializer[0].external_data[0].value = location
    (color_bundle / "model.onnx").write_bytes(graph.SerializeToString())
    seal(color_bundle)
    (color_bundle / "unlisted.bin").write_bytes(secret.read_bytes())
    message = f"wants tensors from {location!r}, which the manifest does not list"
    with pytest.raises(IntegrityError, match=re.escape(message)):
        EdgeModel.load(color_bundle)


def test_a_sealed_link_to_weights_outside_the_folder_is_refused(color_bundle, seal):
    linked("weights.bin")(color_bundle)
    seal(color_bundle)
    with pytest.raises(IntegrityError, match="found a link"):
        EdgeModel.load(color_bundle)


# -- goldens ------------------------------------------------------------------------------------


def rewrite_goldens(folder, **arrays):
    with np.load(folder / "goldens.npz") as stored:
        arrays = {**stored, **arrays}
    stored = io.BytesIO()
    np.savez_compressed(stored, **arrays)
    (folder / "goldens.npz").write_bytes(stored.getvalue())


def test_a_wrong_logit_fails_the_self_test(color_bundle, seal, rt):
    # the stored answer to the second golden is (3, 1, 2)
    rewrite_goldens(color_bundle, logits=np.float32([[8, 0, 0], [3, 1, 2.5]]))
    seal(color_bundle)
    message = "golden 1: a logit is 0.5 from the stored one, allowed 0.001"
    with pytest.raises(IntegrityError, match=message):
        EdgeModel.load(color_bundle, check="full").self_test()
    assert_one_line(rt("verify", color_bundle), message)


def test_weights_that_were_exchanged_and_sealed_fail_the_self_test(color_bundle, seal):
    swapped = np.eye(3, dtype=np.float32)[[1, 0, 2]]
    (color_bundle / "weights.bin").write_bytes(swapped.tobytes())
    seal(color_bundle)
    with pytest.raises(IntegrityError, match="golden 0: a logit is 8 from the stored one"):
        EdgeModel.load(color_bundle).self_test()


def test_a_stored_logit_that_is_no_number_fails_the_self_test(color_bundle, seal):
    rewrite_goldens(color_bundle, logits=np.float32([[8, 0, np.nan], [3, 1, 2]]))
    seal(color_bundle)
    with pytest.raises(IntegrityError, match="golden 0: a logit is nan from the stored one"):
        EdgeModel.load(color_bundle).self_test()


def test_the_self_test_gives_the_largest_difference(color_bundle, seal):
    rewrite_goldens(color_bundle, logits=np.float32([[8, 0, 0.0005], [3, 1, 2.00025]]))
    seal(color_bundle)
    assert EdgeModel.load(color_bundle).self_test() == pytest.approx(0.0005)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["logits", "input_0", ""], ids=["logits", "sample", "whole file"])
def test_a_pickle_in_the_goldens_is_refused_and_not_run(color_bundle, seal, rt, name):
    mark = color_bundle.parent / "was-run"
    bomb = np.array([Bomb(mark)], object)
    if name:
        rewrite_goldens(color_bundle, **{name: bomb})
    else:
        (color_bundle / "goldens.npz").write_bytes(bomb.dumps())
    seal(color_bundle)
    with pytest.raises(IntegrityError, match=r"cannot be read: (.*pickle|File is not a zip)"):
        EdgeModel.load(color_bundle, check="full").self_test()
    assert_one_line(rt("verify", color_bundle), "goldens.npz: cannot be read")
    assert not mark.exists()
    # the control: the same bytes do run where pickles are allowed
    stored = np.load(color_bundle / "goldens.npz", allow_pickle=True)
    if name:
        with stored:
            stored[name]
    assert mark.exists()


def plain_npy():
    stored = io.BytesIO()
    np.save(stored, np.zeros(3, np.float32))
    return stored.getvalue()


def truncated_zip(data):
    return data[:-30]


def damaged_zip(data):
    return data[:60] + b"\xff" * 4 + data[64:]


@pytest.mark.parametrize(
    "change",
    [lambda _: b"", lambda _: b"junk", lambda _: plain_npy(), truncated_zip, damaged_zip],
    ids=["empty", "junk", "one array", "truncated", "damaged"],
)
def test_goldens_that_are_no_archive_of_arrays_are_an_integrity_error(color_bundle, seal, change):
    path = color_bundle / "goldens.npz"
    path.write_bytes(change(path.read_bytes()))
    seal(color_bundle)
    with pytest.raises(IntegrityError, match=r"goldens\.npz: cannot be read"):
        EdgeModel.load(color_bundle).self_test()


@pytest.mark.parametrize(
    "logits",
    [
        np.zeros((2, 2), np.float32), np.zeros((1, 3), np.float32), np.zeros(3, np.float32),
        np.zeros((2, 3)), np.array([["a", "b", "c"]] * 2),
    ],
)  # fmt: skip
def test_goldens_of_another_shape_or_type_are_an_integrity_error(color_bundle, seal, logits):
    rewrite_goldens(color_bundle, logits=logits)
    seal(color_bundle)
    with pytest.raises(IntegrityError, match=r"expected logits of shape \(2, 3\), float32; got"):
        EdgeModel.load(color_bundle).self_test()


def test_goldens_give_back_the_raw_samples(color_bundle, word_bundle):
    assert EdgeModel.load(word_bundle).goldens() == ["good", "bad bad good"]
    red, dark = EdgeModel.load(color_bundle).goldens()
    np.testing.assert_array_equal(dark, [[[3, 1, 2]]])
    assert red.shape == (2, 3, 3)


# -- a graph that asks for more than a bundle holds ---------------------------------------------


def regraphed(folder, change):
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    change(graph)
    (folder / "model.onnx").write_bytes(graph.SerializeToString())


def test_operators_of_another_domain_are_refused(color_bundle, seal):
    regraphed(color_bundle, lambda g: g.opset_import.add(domain="com.evil", version=1))
    seal(color_bundle)
    with pytest.raises(IntegrityError, match=r"wants operators of 'com\.evil'; a bundle's are of"):
        EdgeModel.load(color_bundle)


def test_onnxruntime_refuses_a_node_of_a_domain_that_the_graph_does_not_import(color_bundle, seal):
    # so looking at the imports is enough
    def change(graph):
        graph.graph.node[0].domain = "com.evil"

    regraphed(color_bundle, change)
    seal(color_bundle)
    with pytest.raises(IntegrityError, match=r"model\.onnx: onnxruntime .*com\.evil"):
        EdgeModel.load(color_bundle)


def test_functions_and_training_graphs_are_refused(color_bundle, seal):
    regraphed(color_bundle, lambda g: g.functions.add(name="F", domain="x"))
    seal(color_bundle)
    with pytest.raises(IntegrityError, match="holds functions of its own"):
        EdgeModel.load(color_bundle)
    regraphed(color_bundle, lambda g: (g.functions.pop(), g.training_info.add()))
    seal(color_bundle)
    with pytest.raises(IntegrityError, match="holds training graphs"):
        EdgeModel.load(color_bundle)


def test_code_compiled_for_a_provider_is_refused(color_bundle, seal):
    def change(graph):
        node = graph.graph.node.add(op_type="EPContext", domain="com.microsoft", output=["code"])
        node.attribute.add(name="ep_cache_context", s=b"/etc/passwd", type=3)

    regraphed(color_bundle, change)
    seal(color_bundle)
    with pytest.raises(IntegrityError, match="holds code compiled for an execution provider"):
        EdgeModel.load(color_bundle)


@pytest.mark.parametrize(("offset", "length"), [("4", "36"), ("0", "37"), ("37", None)])
def test_tensors_beyond_the_end_of_a_file_are_refused(color_bundle, seal, offset, length):
    def change(graph):
        tensor = graph.graph.initializer[0]
        del tensor.external_data[1:]
        tensor.external_data.add(key="offset", value=offset)
        if length:
            tensor.external_data.add(key="length", value=length)

    regraphed(color_bundle, change)
    seal(color_bundle)
    with pytest.raises(IntegrityError, match=r"of weights\.bin, which has 36"):
        EdgeModel.load(color_bundle)


def test_goldens_that_would_fill_the_memory_are_refused(color_bundle, seal):
    stored = io.BytesIO()
    np.savez_compressed(stored, logits=np.zeros((2, 3), np.float32), input_0=np.zeros(2**29, "u1"))
    assert stored.tell() < 2**20
    (color_bundle / "goldens.npz").write_bytes(stored.getvalue())
    seal(color_bundle)
    with pytest.raises(IntegrityError, match=r"goldens\.npz: .*bytes when unpacked, allowed"):
        EdgeModel.load(color_bundle).self_test()
