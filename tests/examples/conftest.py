"""What the example programs are built from and what they are given."""

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_bundles import mutants

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SANITIZE = "-O0 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


@pytest.fixture(scope="session")
def examples() -> Path:
    return EXAMPLES


@pytest.fixture(scope="session")
def ort_library() -> str:
    """The path of the library in onnxruntime's wheel."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    found = sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip(f"onnxruntime's wheel for {platform.system()} has no libonnxruntime.so")
    return str(found[0])


@pytest.fixture(scope="session")
def ort_include() -> str:
    """The folder of onnxruntime's headers: $ORT_INCLUDE, or fetched once for this user."""
    if found := os.environ.get("ORT_INCLUDE"):
        return found
    got = subprocess.run(
        [EXAMPLES / "c" / "get_header.sh"], capture_output=True, text=True, check=False
    )
    if got.returncode != 0:
        pytest.skip(f"onnxruntime's headers are not to be had: {got.stderr.strip()}")
    return got.stdout.strip()


@pytest.fixture(scope="session")
def compile_flags(tmp_path_factory) -> str:
    """Flags of gcc's sanitizers, where they work."""
    if shutil.which("gcc") is None or shutil.which("g++") is None:
        pytest.skip("no gcc and g++")
    folder = tmp_path_factory.mktemp("sanitize")
    (folder / "main.c").write_text("int main(void) { return 0; }\n")
    built = subprocess.run(
        ["gcc", *SANITIZE.split(), "main.c", "-o", "main"], cwd=folder, capture_output=True
    )
    works = built.returncode == 0 and subprocess.run([folder / "main"]).returncode == 0
    return SANITIZE if works else ""


@pytest.fixture
def mutant_folders(color_bundle, word_bundle, tmp_path) -> list[Path]:
    """200 copies of the tiny bundles with bytes damaged at random in what a program parses."""
    folders = []
    for seed, bundle in enumerate((color_bundle, word_bundle)):
        for number, (manifest, goldens) in enumerate(mutants(bundle, seed, 100)):
            folder = tmp_path / f"mutant-{bundle.name}-{number}"
            folder.mkdir()
            for entry in bundle.iterdir():
                (folder / entry.name).hardlink_to(entry)
            for name, data in {"manifest.json": manifest, "goldens.npz": goldens}.items():
                (folder / name).unlink()
                (folder / name).write_bytes(data)
            folders.append(folder)
    return folders


@pytest.fixture
def edit() -> Callable[[Path, Callable[[bytes], bytes]], None]:
    """Rewrite a file; the change must be one."""

    def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
        before = path.read_bytes()
        after = change(before)
        assert after != before
        path.write_bytes(after)

    return rewrite
