"""Open a bundle: a folder, or one zip, whose files are what its manifest says they are."""

import hashlib
import io
import itertools
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import ConfigError, IntegrityError, ResourceError
from edgetune.runtime.manifest import (
    MANIFEST_NAME,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    Manifest,
    parse_manifest,
)

if TYPE_CHECKING:
    from edgetune.runtime.archive import Archive

GRAPH_NAME = "model.onnx"
WEIGHTS_NAME = "weights.bin"
GOLDENS_NAME = "goldens.npz"
TOKENIZER_NAME = "tokenizer.json"
DRIFT_NAME = "drift.npz"
# what learning on the device starts from, and one step of its training
LEARN_NAME = "learn.npz"
STEP_NAME = "train.onnx"
# a file that is read as a whole is no larger, nor are all together that opening hashes; weights
# are mapped, not read
MAX_READ_BYTES = 2**30
# a file with holes can claim more than any disk holds, and hashing it would take days
MAX_BUNDLE_BYTES = 2**36
# what opening a bundle does not hash: weights, whose reading would make each start of the
# device slower, and what a start does not read; it is hashed when it is read
UNHASHED = frozenset({WEIGHTS_NAME, GOLDENS_NAME, LEARN_NAME, STEP_NAME})


class Folder:
    """A folder of files."""

    def __init__(self, path: Path) -> None:
        """Remember where it is."""
        self.where = path

    def names(self) -> set[str]:
        """Return the names of what is there; of very many, some.

        Raises:
            ResourceError: the folder cannot be read.
        """
        try:
            with os.scandir(self.where) as entries:
                # one more than a bundle has: one of them is not listed, whichever it is
                return {entry.name for entry in itertools.islice(entries, MAX_FILES + 2)}
        except OSError as error:
            reason = error.strerror or error
            raise ResourceError(f"{self.where}: cannot be read: {reason}") from error

    def size(self, name: str) -> int | None:
        """Return a plain file's size in bytes; None if there is none of that name, or a link."""
        try:
            status = (self.where / name).lstat()
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def view(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            OSError: it cannot be read, or is too large to be read as a whole.
        """
        with open_plain(self.where / name) as file:
            if os.fstat(file.fileno()).st_size > MAX_READ_BYTES:
                raise OSError(f"larger than {MAX_READ_BYTES} bytes")
            return file.read()

    def close(self) -> None:
        """Do nothing: no file is kept open."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle's files and its manifest."""

    files: "Folder | Archive"
    manifest: Manifest

    @property
    def where(self) -> Path:
        """The folder, or the zip."""
        return self.files.where

    @property
    def folder(self) -> Path:
        """The folder that the bundle is.

        Raises:
            ConfigError: it is a zip.
        """
        if not isinstance(self.files, Folder):
            raise ConfigError(
                f"{self.where}: this takes a bundle's folder; edgetune-rt unpack makes one"
            )
        return self.files.where

    def path(self, name: str) -> Path:
        """Return the path of the file `name` of a bundle that is a folder.

        Raises:
            IntegrityError: the manifest does not list it.
            ConfigError: the bundle is a zip.
        """
        self._check_listed(name)
        return self.folder / name

    def read(self, name: str) -> bytes:
        """Return the bytes of the file `name`, whose hash is that of the manifest.

        Raises:
            IntegrityError: the manifest does not list it, it is too large to be read as a whole,
                or has another size or hash.
            ResourceError: it cannot be read.
        """
        self._check_listed(name)
        size = self.manifest.files[name].size
        if size > MAX_READ_BYTES:
            raise IntegrityError(
                f"{self.where}: {name}: {size} bytes, allowed {MAX_READ_BYTES} for a file that is"
                " read as a whole"
            )
        check_size(self, name)
        try:
            data = bytes(self.files.view(name))
        except OSError as error:
            reason = error.strerror or error
            raise ResourceError(f"{self.where}: {name}: cannot be read: {reason}") from error
        # these very bytes: the file may be another one than when the bundle was opened
        _compare(self, name, hashlib.sha256(data).hexdigest())
        return data

    @property
    def size_bytes(self) -> int:
        """Size of all files, the manifest's own left out."""
        return sum(entry.size for entry in self.manifest.files.values())

    def _check_listed(self, name: str) -> None:
        if name not in self.manifest.files:
            raise IntegrityError(f"{self.where}: the manifest lists no {name}")


def open_bundle(path: str | Path) -> Bundle:
    """Open the bundle in folder or zip `path` and check what can be checked at once.

    The size of every file is compared, and the hash of every file but weights and goldens:
    `verify_files` checks those too.

    Raises:
        IntegrityError: it is no bundle, or a file is absent, a link, of another size or of
            another hash, or they are larger than any bundle's.
        ResourceError: a file cannot be read.
    """
    bundle = _read_manifest(Path(path))
    for name in bundle.manifest.files:
        check_size(bundle, name)
    hashed = sum(e.size for name, e in bundle.manifest.files.items() if name not in UNHASHED)
    if hashed > MAX_READ_BYTES or bundle.size_bytes > MAX_BUNDLE_BYTES:
        raise IntegrityError(
            f"{bundle.where}: {bundle.size_bytes} bytes, {hashed} of them neither weights nor"
            f" goldens; allowed {MAX_BUNDLE_BYTES} and {MAX_READ_BYTES}"
        )
    for name in bundle.manifest.files:
        if name not in UNHASHED:
            check_hash(bundle, name)
    return bundle


def verify_files(bundle: Bundle, *, progress: Callable[[str], None] | None = None) -> None:
    """Check size and SHA-256 of every file, and that no file is there that is not listed.

    Raises:
        IntegrityError: one differs, is absent or is not listed.
        ResourceError: one cannot be read.
    """
    check_listed(bundle)
    for name in bundle.manifest.files:
        if progress:
            progress(name)
        check_size(bundle, name)
        check_hash(bundle, name)


def check_listed(bundle: Bundle) -> None:
    """Check that nothing is there that the manifest does not list.

    Raises:
        IntegrityError: something is.
        ResourceError: the folder cannot be read.
    """
    for name in sorted(bundle.files.names() - {MANIFEST_NAME, *bundle.manifest.files}):
        # a name of others may hold line breaks, or what a terminal obeys
        shown = name if name.isascii() and name.isprintable() else ascii(name)
        raise IntegrityError(f"{bundle.where}/{shown:.200}: is not listed in the manifest")


def open_plain(path: Path) -> io.BufferedReader:
    """Open a plain file for reading; a pipe in its place is not waited for.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """

    def at_once(path: str, flags: int) -> int:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=at_once)  # noqa: SIM115 - returned; Path.open has no opener
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("is no plain file")
    return file


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in lower-case hex.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(bundle: Bundle, name: str) -> None:
    """Check that the file `name` is there, no link, and of the size that the manifest says.

    Raises:
        IntegrityError: it is not.
    """
    path, expected = bundle.where / name, bundle.manifest.files[name].size
    size = bundle.files.size(name)
    if size is None:
        found = "a link" if path.is_symlink() else "nothing"
        raise IntegrityError(f"{path}: expected a file of {expected} bytes, found {found}")
    if size != expected:
        raise IntegrityError(
            f"{path}: expected {expected} bytes, got {size}; the bundle is damaged, copy it again"
        )


def check_hash(bundle: Bundle, name: str) -> None:
    """Check that the file `name` has the SHA-256 that the manifest says.

    Raises:
        IntegrityError: it has not.
        ResourceError: it cannot be read.
    """
    path = bundle.where / name
    try:
        if isinstance(bundle.files, Folder):
            found = file_sha256(path)
        else:
            found = hashlib.sha256(bundle.files.view(name)).hexdigest()
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    _compare(bundle, name, found)


def _compare(bundle: Bundle, name: str, found: str) -> None:
    """Check that `found` is the SHA-256 that the manifest says of the file `name`."""
    expected = bundle.manifest.files[name].sha256
    if found != expected:
        raise IntegrityError(
            f"{bundle.where / name}: expected SHA-256 {expected[:12]}..., got {found[:12]}...;"
            " the bundle is damaged, copy it again"
        )


def _read_manifest(path: Path) -> Bundle:
    files: Folder | Archive
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a NUL
        mode = 0
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    if stat.S_ISDIR(mode):
        files = Folder(path)
    elif stat.S_ISREG(mode):
        from edgetune.runtime import archive  # a folder needs it not

        files = archive.Archive(path)
    else:
        raise ConfigError(f"{path}: expected a bundle's folder or zip, found none")
    size = files.size(MANIFEST_NAME)
    if size is None:
        raise IntegrityError(f"{path}: is no bundle: it has no file {MANIFEST_NAME}")
    if size > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{path / MANIFEST_NAME}: larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        data = bytes(files.view(MANIFEST_NAME))
    except OSError as error:
        reason = error.strerror or error
        raise ResourceError(f"{path / MANIFEST_NAME}: cannot be read: {reason}") from error
    manifest = parse_manifest(data, where=str(path / MANIFEST_NAME))
    return Bundle(files=files, manifest=manifest)
