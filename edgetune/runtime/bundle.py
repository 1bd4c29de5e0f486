"""Open a bundle: a folder, or one zip, whose files are what its manifest says they are."""

import hashlib
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.errors import ConfigError, IntegrityError, ResourceError
from edgetune.runtime.manifest import (
    MANIFEST_NAME,
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
# a file that is read as a whole is no larger; weights are mapped, not read
MAX_READ_BYTES = 2**30
# what opening a bundle does not hash: weights, whose reading would make each start of the
# device slower, and goldens, which nothing but the self-test reads
UNHASHED = frozenset({WEIGHTS_NAME, GOLDENS_NAME})


class Folder:
    """A folder of files."""

    def __init__(self, path: Path) -> None:
        """Remember where it is."""
        self.where = path

    def names(self) -> set[str]:
        """Return the names of all that is there."""
        return {path.name for path in self.where.iterdir()}

    def size(self, name: str) -> int | None:
        """Return a plain file's size in bytes; None if there is none of that name, or a link."""
        try:
            status = (self.where / name).lstat()
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def view(self, name: str) -> bytes:
        """Return a file's bytes."""
        return (self.where / name).read_bytes()

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
        """Return the bytes of the file `name`.

        Raises:
            IntegrityError: the manifest does not list it, it is too large to be read as a whole,
                or has another size.
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
            return bytes(self.files.view(name))
        except OSError as error:
            reason = error.strerror or error
            raise ResourceError(f"{self.where}: {name}: cannot be read: {reason}") from error

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
            another hash.
        ResourceError: a file cannot be read.
    """
    bundle = _read_manifest(Path(path))
    for name in bundle.manifest.files:
        check_size(bundle, name)
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
    listed = {MANIFEST_NAME, *bundle.manifest.files}
    for name in sorted(bundle.files.names() - listed):
        raise IntegrityError(f"{bundle.where / name}: is not listed in the manifest")
    for name in bundle.manifest.files:
        if progress:
            progress(name)
        check_size(bundle, name)
        check_hash(bundle, name)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in lower-case hex."""
    with path.open("rb") as file:
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
    path, expected = bundle.where / name, bundle.manifest.files[name].sha256
    try:
        if isinstance(bundle.files, Folder):
            found = file_sha256(path)
        else:
            found = hashlib.sha256(bundle.files.view(name)).hexdigest()
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    if found != expected:
        raise IntegrityError(
            f"{path}: expected SHA-256 {expected[:12]}..., got {found[:12]}...;"
            " the bundle is damaged, copy it again"
        )


def _read_manifest(path: Path) -> Bundle:
    files: Folder | Archive
    if path.is_dir():
        files = Folder(path)
    elif path.is_file():
        from edgetune.runtime import archive  # a folder needs it not

        files = archive.Archive(path)
    else:
        raise IntegrityError(f"{path}: expected a bundle's folder or zip, found none")
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
