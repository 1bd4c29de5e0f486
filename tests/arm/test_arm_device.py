"""What is made here answers on emulated ARM cores as it did here.

The device is built in a cache folder at the first run; see docs/arm.md.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgetune.config import TrainConfig
from edgetune.export import export
from edgetune.profile import load_profile
from edgetune.runtime.bundle import open_bundle
from edgetune.train import train

DEVICE = Path(__file__).with_name("device.py")
CORES = ["cortex-a53", "cortex-a72", "cortex-a76"]


def command_line(*arguments, **environment):
    return subprocess.run(
        [sys.executable, DEVICE, *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture(scope="session")
def device():
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("EDGETUNE_ARM_DEVICE") or Path(cache, "edgetune", "arm-device")
    done = command_line("build", folder)
    if done.returncode == 4:  # what it needs is not to be had; anything else is a failure
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def text_int8(tiny_bert, switches, tmp_path_factory):
    return trained_and_exported(
        tmp_path_factory.mktemp("text"), "raspberry-pi-4", "int8-dynamic",
        task="text-classification", model=tiny_bert, data=str(switches), lr=5e-3, batch_size=8,
    )  # fmt: skip


# without residual sums: of those the last bit differs between CPUs, and later layers enlarge it
@pytest.fixture(scope="module")
def image_int8(colours, tmp_path_factory):
    return trained_and_exported(
        tmp_path_factory.mktemp("image"), "raspberry-pi-5", "int8-static",
        task="image-classification", model="torchvision:squeezenet1_1", weights="none",
        data=str(colours), lr=1e-3, batch_size=12, image_size=32,
    )  # fmt: skip


def trained_and_exported(folder, profile, rung, **config):
    train(TrainConfig(**config, method="full", epochs=1, output=str(folder / "run"), cpu=True))
    # so small a net gains neither speed nor, in so short a training, accuracy
    result = export(
        folder / "run", output=folder / "int8", profile=profile, precision="int8", rungs=(rung,),
        max_drop=1.0, allow=("speed", "samples"),
    )  # fmt: skip
    assert open_bundle(result.bundle).manifest.precision == "int8"
    return result.bundle


def test_bundles_made_for_a_board_answer_on_every_core_as_they_did_here(
    device, text_int8, image_int8
):
    expected = [[str(b), core, "ok"] for b in (text_int8, image_int8) for core in CORES]
    assert verified(device, text_int8, image_int8) == (0, expected)


def test_answers_worked_out_by_hand_hold_on_the_device_and_wrong_ones_fail(
    device, color_bundle, word_bundle, seal, tmp_path
):
    wrong = Path(shutil.copytree(color_bundle, tmp_path / "wrong"))
    with np.load(wrong / "goldens.npz") as stored:
        arrays = dict(stored)
    arrays["logits"] = arrays["logits"] + np.float32(0.5)
    np.savez(wrong / "goldens.npz", **arrays)
    seal(wrong)
    core = "cortex-a72"
    code, rows = verified(device, color_bundle, word_bundle, wrong, "--cpu", core)
    assert rows[:2] == [[str(color_bundle), core, "ok"], [str(word_bundle), core, "ok"]]
    assert "failed: error: golden 0: a logit is 0.5 from the stored one" in rows[2][2]
    assert code == 6


def verified(device, *arguments):
    """Return the exit code and bundle, core and result of each row of the table."""
    done = command_line("verify", device, *arguments)
    rows = [line.strip("| ").split(" | ")[:3] for line in done.stdout.splitlines()[2:]]
    return done.returncode, rows


@pytest.mark.parametrize(
    ("core", "profile"), [("cortex-a72", "raspberry-pi-4"), ("cortex-a76", "raspberry-pi-5")]
)
def test_a_program_and_its_children_run_on_the_core_that_the_profile_describes(
    device, core, profile
):
    program = """
import json, platform, subprocess, sys
from edgetune.runtime.device import cpu_features

child = [sys.executable, "-c", "import platform; print(platform.machine())"]
child = subprocess.run(child, capture_output=True, text=True).stdout.strip()
print(json.dumps([platform.machine(), child, cpu_features()]))
sys.exit(7)
"""
    done = command_line("run", device, "--cpu", core, "--", "python3", "-c", program)
    features = list(load_profile(profile).cpu.features)
    assert json.loads(done.stdout) == ["aarch64", "aarch64", features]
    assert done.returncode == 7


def test_without_a_device_the_command_to_make_one_is_named(tmp_path):
    done = command_line("run", tmp_path, "--", "python3")
    assert done.returncode == 2
    assert f"build {tmp_path}" in done.stderr


def test_building_without_apt_says_so_and_exits_4(tmp_path):
    done = command_line("build", tmp_path / "device", PATH=str(tmp_path))
    assert done.returncode == 4
    assert done.stderr == "device: dpkg: not found; building needs Debian's apt\n"
