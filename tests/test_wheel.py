"""The built wheel, in an environment of its own with the base install alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_profiles_families_and_the_demo_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "edgetune/profiles/raspberry-pi-5.toml" in names
    assert "edgetune/models/families.toml" in names
    assert "edgetune/demo/device-commands/train.csv" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_the_base_install_is_small_and_its_commands_work(wheel, tmp_path):
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    if not Path(uv).exists():
        pytest.skip("uv is not installed")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([uv, "venv", "-q", "-p", sys.executable, tmp_path / "venv"], check=True)
    done = subprocess.run(
        [uv, "pip", "install", "-q", "-p", python, "-c", ROOT / "constraints.txt", wheel],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        if os.environ.get("CI"):
            pytest.fail(done.stderr)
        pytest.skip(f"no package registry here: {done.stderr.splitlines()[-1]}")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    listed = subprocess.run(
        [uv, "pip", "list", "-q", "-p", python], capture_output=True, text=True, check=True
    ).stdout
    packages = {line.split()[0] for line in listed.splitlines()[2:]}
    assert {"edgetune", "numpy", "onnxruntime", "click"} <= packages
    assert not packages & {"torch", "transformers", "onnx", "pillow", "tokenizers", "pyarrow"}
    assert "raspberry-pi-5" in run("edgetune.cli.main", "profiles").stdout
    assert run("edgetune.cli.main", "doctor").returncode == 0
    assert "verify" in run("edgetune.runtime.cli", "--help").stdout
    needs_more = run("edgetune.cli.main", "train", "--resume", "nowhere")
    assert needs_more.returncode == 2
    assert "edgetune[train]" in needs_more.stderr
