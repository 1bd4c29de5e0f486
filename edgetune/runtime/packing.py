"""Make one file of a bundle's folder, and a folder of the file."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from edgetune.errors import ConfigError, IntegrityError, ResourceError
from edgetune.runtime.archive import write_archive
from edgetune.runtime.bundle import (
    WEIGHTS_NAME,
    Bundle,
    check_listed,
    open_bundle,
    verify_files,
)
from edgetune.runtime.files import flush, replace_atomic
from edgetune.runtime.manifest import MANIFEST_NAME

# how much of the disk an unpacked bundle leaves free
RESERVE_BYTES = 2**24
_BLOCK = 2**20


def pack(bundle: str | Path, output: str | Path) -> Bundle:
    """Write the bundle in folder `bundle` to the zip `output`, and return that, opened.

    The same bundle gives the same bytes. Weights come last and start on a page.

    Raises:
        ConfigError: `output` exists already, or the bundle is larger than 2 GiB.
        IntegrityError: the bundle is not what its manifest says.
        ResourceError: the disk is full or cannot be written.
    """
    source, target = open_bundle(bundle), Path(output)
    verify_files(source)
    try:
        there = target.exists()
    except OSError as error:
        raise ResourceError(f"{target}: cannot be written: {error}") from error
    if source.folder.resolve() in target.resolve().parents:
        raise ConfigError(f"output {target}: lies in the bundle itself; name a file elsewhere")
    if there:
        raise ConfigError(f"output {target}: exists already; name another file")
    rest = sorted(source.manifest.files, key=lambda name: (name == WEIGHTS_NAME, name))
    files = {name: source.folder / name for name in (MANIFEST_NAME, *rest)}
    try:
        replace_atomic(target, lambda temporary: write_archive(temporary, files))
    except zipfile.LargeZipFile as error:
        target.with_name(f".{target.name}.partial").unlink(missing_ok=True)
        raise ConfigError(
            f"{source.where}: a zip holds bundles up to 2 GiB; ship the folder instead"
        ) from error
    return open_bundle(target)


def unpack(
    bundle: str | Path, output: str | Path, *, progress: Callable[[str], None] | None = None
) -> Bundle:
    """Write the bundle in the zip `bundle` to the new folder `output`, and return that, opened.

    Nothing is written before the manifest, every name and every size have been checked; files
    are hashed as they are written, into a folder beside `output` that is renamed at the end.

    Raises:
        ConfigError: `output` exists already, or `bundle` is a folder.
        IntegrityError: the bundle is not what its manifest says.
        ResourceError: the disk is full or cannot be written.
    """
    source, target = open_bundle(bundle), Path(output)
    try:
        _check_room(source, target)
        absent = [folder for folder in target.parents if not folder.exists()]
        try:
            _fill(source, target, progress)
        except BaseException:
            for folder in absent:  # innermost first
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
    except OSError as error:
        raise ResourceError(f"{target}: cannot be written: {error}") from error
    finally:
        source.files.close()
    return open_bundle(target)


def _check_room(source: Bundle, target: Path) -> None:
    """Check that the archive `source` holds nothing more, and has room at `target`."""
    if source.where.is_dir():
        raise ConfigError(f"{source.where}: is a folder already; unpack takes a bundle's zip")
    if target.exists() or target.is_symlink():
        raise ConfigError(f"output {target}: exists already; name another folder")
    check_listed(source)
    there = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if source.size_bytes + RESERVE_BYTES > free:
        raise ResourceError(
            f"{there}: {free >> 20} MiB are free, the bundle takes {source.size_bytes >> 20} and"
            f" {RESERVE_BYTES >> 20} are to stay"
        )


def _fill(source: Bundle, target: Path, progress: Callable[[str], None] | None) -> None:
    """Write the files of `source` to a folder beside `target` and rename that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name in sorted({MANIFEST_NAME, *source.manifest.files}):
            if progress:
                progress(name)
            _write(source, name, staging / name)
        staging.chmod(0o755)
        flush(staging)
        staging.rename(target)
        flush(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(bundle: Bundle, name: str, path: Path) -> None:
    """Write the file `name` to `path`, which must not exist, and check its hash."""
    entry = bundle.manifest.files.get(name)
    digest = hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(handle, "wb") as file, memoryview(bundle.files.view(name)) as data:
        for begin in range(0, len(data), _BLOCK):
            # released where writing fails too: else the archive could not be closed
            with data[begin : begin + _BLOCK] as block:
                digest.update(block)
                file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if entry is not None and digest.hexdigest() != entry.sha256:  # the manifest is in no list
        raise IntegrityError(
            f"{bundle.where / name}: expected SHA-256 {entry.sha256[:12]}..., got"
            f" {digest.hexdigest()[:12]}...; the bundle is damaged, copy it again"
        )
