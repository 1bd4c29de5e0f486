"""A bundle in one zip: packed, read where it lies, unpacked; and zips that are no bundles."""

import io
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgetune.errors import ConfigError, IntegrityError, ResourceError
from edgetune.runtime import EdgeModel, ort, packing
from edgetune.runtime.archive import PAGE, Archive
from edgetune.runtime.bundle import open_bundle, verify_files
from edgetune.runtime.packing import pack, unpack


@pytest.fixture
def color_zip(color_bundle, tmp_path):
    pack(color_bundle, tmp_path / "colors.zip")
    return tmp_path / "colors.zip"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_packed_bundle_is_a_zip_that_others_can_read(color_bundle, color_zip):
    with zipfile.ZipFile(color_zip) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "manifest.json"
        assert archive.namelist()[-1] == "weights.bin"
        assert {name: archive.read(name) for name in archive.namelist()} == contents(color_bundle)


def test_every_file_begins_on_a_page(color_zip):
    archive = Archive(color_zip)
    assert all(member.offset % PAGE == 0 for member in archive.members.values())
    archive.close()


def test_the_same_bundle_gives_the_same_bytes(color_bundle, color_zip, tmp_path):
    os.utime(color_bundle / "weights.bin", (1, 1))
    pack(color_bundle, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == color_zip.read_bytes()


def test_a_zip_answers_as_its_folder_does(color_bundle, color_zip, word_bundle, tmp_path):
    pack(word_bundle, tmp_path / "words.zip")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    for folder, file, sample in (
        (color_bundle, color_zip, pixels),
        (word_bundle, tmp_path / "words.zip", "bad bad good"),
    ):
        with EdgeModel.load(folder) as one, EdgeModel.load(file, check="full") as other:
            assert other.self_test() == one.self_test()
            np.testing.assert_array_equal(
                other.outputs(sample)["logits"], one.outputs(sample)["logits"]
            )
        assert file.parent == tmp_path


@pytest.mark.usefixtures("color_zip")
def test_reading_from_a_zip_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with EdgeModel.load("colors.zip") as model:
        model.self_test()
    assert sorted(tmp_path.rglob("*")) == before


def test_unpacking_gives_the_folder_again(color_bundle, color_zip, tmp_path):
    unpacked = unpack(color_zip, tmp_path / "new" / "bundle")
    assert contents(tmp_path / "new" / "bundle") == contents(color_bundle)
    verify_files(unpacked)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "new" / "bundle").iterdir()} == {0o644}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["bundle"]


def test_what_is_there_is_never_overwritten(color_bundle, color_zip, tmp_path):
    with pytest.raises(ConfigError, match="exists already; name another file"):
        pack(color_bundle, color_zip)
    with pytest.raises(ConfigError, match="exists already; name another folder"):
        unpack(color_zip, color_bundle)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already"):
        unpack(color_zip, tmp_path / "link")
    with pytest.raises(ConfigError, match="is a folder already"):
        unpack(color_bundle, tmp_path / "x")
    with pytest.raises(ConfigError, match="takes a bundle's folder; edgetune-rt unpack"):
        pack(color_zip, tmp_path / "x.zip")


def test_a_damaged_bundle_is_not_packed(color_bundle, tmp_path):
    (color_bundle / "weights.bin").write_bytes(b"\1" * 36)
    with pytest.raises(IntegrityError, match=r"weights\.bin: expected SHA-256"):
        pack(color_bundle, tmp_path / "x.zip")
    assert not list(tmp_path.glob("*.zip"))


def test_damaged_weights_are_seen_before_the_folder_is_there(color_zip, tmp_path):
    archive = Archive(color_zip)
    place = archive.members["weights.bin"].offset
    archive.close()
    data = bytearray(color_zip.read_bytes())
    data[place] ^= 1
    color_zip.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"weights\.bin: expected SHA-256"):
        unpack(color_zip, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    EdgeModel.load(color_zip).close()
    with pytest.raises(IntegrityError, match=r"weights\.bin: expected SHA-256"):
        EdgeModel.load(color_zip, check="full")


def test_a_disk_without_room_is_told_before_anything_is_written(color_zip, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "RESERVE_BYTES", 2**62)
    with pytest.raises(ResourceError, match=r"MiB are free, the bundle takes 0"):
        unpack(color_zip, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_zip_that_is_replaced_while_it_is_opened_is_refused(color_zip, tmp_path):
    archive = Archive(color_zip)
    archive.check_unchanged()
    other = tmp_path / "other.zip"
    other.write_bytes(color_zip.read_bytes())
    other.replace(color_zip)
    with pytest.raises(IntegrityError, match="was replaced while it was being opened"):
        archive.check_unchanged()
    archive.close()


def test_an_onnxruntime_that_maps_nothing_from_a_zip_says_what_to_do(color_zip, monkeypatch):
    monkeypatch.setattr(ort.onnxruntime, "__version__", "1.18.1")
    with pytest.raises(ConfigError, match=r"edgetune-rt unpack .*colors\.zip FOLDER"):
        EdgeModel.load(color_zip)


def test_the_commands_pack_and_unpack(rt, color_bundle, tmp_path):
    done = rt("pack", color_bundle, tmp_path / "c.zip")
    assert done.stdout.decode() == f"{tmp_path}/c.zip: 0.0 MiB\n"
    assert rt("unpack", tmp_path / "c.zip", tmp_path / "c").stdout.decode() == (
        f"{tmp_path}/c: 3 files match their SHA-256\n"
    )
    assert b"2 goldens answered as expected" in rt("verify", tmp_path / "c.zip").stdout
    assert rt("unpack", tmp_path / "c.zip", tmp_path / "c").returncode == 2


# -- zips of others --------------------------------------------------------------------------------


def zipped(files, **options):
    """Return a zip made by Python's own writer: name -> contents."""
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", **options) as archive:
        for name, data in files.items():
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            info.compress_type = archive.compression
            archive.writestr(info, data)
    return stored.getvalue()


def a_link():
    info = zipfile.ZipInfo("weights.bin")
    info.external_attr = 0o120777 << 16
    return info


def a_comment():
    info = zipfile.ZipInfo("weights.bin")
    info.comment = b"hello"
    return info


def twice(data):
    stored = io.BytesIO(data)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(stored, "a") as archive:
        archive.writestr("weights.bin", b"x")
    return stored.getvalue()


def shifted(data):
    """Return the zip with its files inside each other: the second one's header is the first's."""
    end = data.rindex(b"PK\5\6")
    (start,) = struct.unpack_from("<L", data, end + 16)
    second = data.index(b"PK\1\2", start + 4)
    return data[: second + 42] + struct.pack("<L", 0) + data[second + 46 :]


PLAIN = {"manifest.json": b"{}", "weights.bin": b"abc"}
REFUSED = {
    "compressed": (lambda: zipped(PLAIN, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "bytes before": (lambda: b"#!/bin/sh\n" + zipped(PLAIN), "size, or zip64|no header"),
    "bytes after": (lambda: zipped(PLAIN) + b"x", "no end of a directory"),
    "a comment": (lambda: zipped(PLAIN)[:-2] + b"\5\0hello", "no end of a directory"),
    "a file's comment": (lambda: zipped({a_comment(): b"x"}), "has a comment"),
    "a link": (lambda: zipped({"manifest.json": b"{}", a_link(): b"/etc/passwd"}),
               "is no plain file"),
    "a folder": (lambda: zipped({"a/": b""}), "is no name of a bundle's file"),
    "two of a name": (lambda: twice(zipped(PLAIN)), "is there twice"),
    "overlapping files": (
        lambda: shifted(zipped(PLAIN)), "has two names|no file, or of two|differ",
    ),
    "65 files": (lambda: zipped({f"f{i}": b"" for i in range(65)}), "65 files, allowed 1 to 64"),
    "no files": (lambda: zipped({}), "0 files"),
    "nothing": (lambda: b"", "neither a folder nor a zip"),
    "no zip": (lambda: b"hello, world" * 10, "no end of a directory"),
    "no manifest": (lambda: zipped({"weights.bin": b""}), "has no file manifest.json"),
    "no bundle": (lambda: zipped(PLAIN), "bundle schema None"),
    "half of one": (lambda: zipped(PLAIN)[:60], "no end of a directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_zip_that_is_no_bundle_is_refused(tmp_path, case):
    make, message = REFUSED[case]
    path = tmp_path / "x.zip"
    path.write_bytes(make())
    with pytest.raises(IntegrityError, match=message):
        open_bundle(path)
    with pytest.raises(IntegrityError, match=message):
        unpack(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


def test_a_file_that_the_manifest_does_not_list_is_not_unpacked(color_bundle, tmp_path):
    files = {**contents(color_bundle), "extra.txt": b"?"}
    path = tmp_path / "x.zip"
    path.write_bytes(zipped(dict(sorted(files.items()))))
    EdgeModel.load(path).close()
    with pytest.raises(IntegrityError, match=r"extra\.txt: is not listed in the manifest"):
        unpack(path, tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_a_pipe_is_no_bundle_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="found none"):
        open_bundle(tmp_path / "pipe")


def test_processes_share_the_weights_of_a_zip(tmp_path, word_bundle):
    """onnxruntime maps the file itself: no copy of the weights is a process's own."""
    pack(word_bundle, tmp_path / "words.zip")
    program = (
        "import sys\nfrom edgetune.runtime import EdgeModel\n"
        "model = EdgeModel.load(sys.argv[1]); model.predict('good')\n"
        "print(any('words.zip' in line for line in open('/proc/self/maps')))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not show what is mapped")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "words.zip")],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr


def test_a_bundle_is_not_packed_into_itself(color_bundle):
    with pytest.raises(ConfigError, match="lies in the bundle itself"):
        pack(color_bundle, color_bundle / "in.zip")
    verify_files(open_bundle(color_bundle))


def test_an_archive_can_be_closed_while_it_is_read(color_zip):
    archive = Archive(color_zip)
    view = archive.view("weights.bin")
    archive.close()
    assert len(view) == 36  # unmapped with the last view


def test_an_interrupted_pack_leaves_nothing(color_bundle, tmp_path, monkeypatch):
    def interrupt(path, _):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "write_archive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(color_bundle, tmp_path / "x.zip")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["colors"]
