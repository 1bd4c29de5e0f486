"""Open a bundle: a folder whose files are what its manifest says they are."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgetune.errors import IntegrityError
from edgetune.runtime.manifest import MANIFEST_NAME, Manifest, read_manifest

GRAPH_NAME = "model.onnx"
WEIGHTS_NAME = "weights.bin"
GOLDENS_NAME = "goldens.npz"
TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle's folder and its manifest."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Return the path of the file `name`.

        Raises:
            IntegrityError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise IntegrityError(f"{self.folder}: the manifest lists no {name}")
        return self.folder / name

    @property
    def size_bytes(self) -> int:
        """Size of all files, the manifest's own left out."""
        return sum(entry.size for entry in self.manifest.files.values())


def open_bundle(path: str | Path) -> Bundle:
    """Open the bundle in folder `path` and check what can be checked at once.

    The size of every file is compared, and the hash of every file but the weights, whose
    reading would make each start of the device slower: `verify_files` checks those too.

    Raises:
        IntegrityError: the folder is no bundle, or a file is absent, a link, of another size or
            of another hash.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise IntegrityError(f"{folder}: expected a bundle's folder, found none")
    bundle = Bundle(folder=folder, manifest=read_manifest(folder))
    for name in bundle.manifest.files:
        _check_size(bundle, name)
    for name in bundle.manifest.files:
        if name not in {WEIGHTS_NAME, GOLDENS_NAME}:
            _check_hash(bundle, name)
    return bundle


def verify_files(bundle: Bundle, *, progress: Callable[[str], None] | None = None) -> None:
    """Check size and SHA-256 of every file, and that no file is there that is not listed.

    Raises:
        IntegrityError: one differs, is absent or is not listed.
    """
    listed = {MANIFEST_NAME, *bundle.manifest.files}
    for entry in sorted(bundle.folder.iterdir()):
        if entry.name not in listed:
            raise IntegrityError(f"{entry}: is not listed in the manifest")
    for name in bundle.manifest.files:
        if progress:
            progress(name)
        _check_size(bundle, name)
        _check_hash(bundle, name)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(bundle: Bundle, name: str) -> None:
    path, entry = bundle.folder / name, bundle.manifest.files[name]
    if path.is_symlink() or not path.is_file():
        found = "a link" if path.is_symlink() else "nothing"
        raise IntegrityError(f"{path}: expected a file of {entry.size} bytes, found {found}")
    size = path.stat().st_size
    if size != entry.size:
        raise IntegrityError(
            f"{path}: expected {entry.size} bytes, got {size}; the bundle is damaged, copy it again"
        )


def _check_hash(bundle: Bundle, name: str) -> None:
    path, entry = bundle.folder / name, bundle.manifest.files[name]
    try:
        found = file_sha256(path)
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read: {error.strerror or error}") from error
    if found != entry.sha256:
        raise IntegrityError(
            f"{path}: expected SHA-256 {entry.sha256[:12]}..., got {found[:12]}...;"
            " the bundle is damaged, copy it again"
        )
