import dataclasses
import json
import os
import shutil
import subprocess
import tomllib

import pytest
from click.testing import CliRunner

from edgetune.cli.profiles import command, format_toml
from edgetune.errors import ConfigError
from edgetune.profile import DeviceProfile, host_profile, load_profile, profile_names
from edgetune.runtime.records import from_mapping, to_mapping

SHIPPED = [name for name in profile_names() if name != "host"]
VALID = """
name = "mine"
description = "a board"

[cpu]
arch = "aarch64"
model = "Cortex-A55"
cores = 4
features = ["asimd", "asimddp"]
int8 = "exact"

[memory]
total_mib = 2048
available_mib = 1500

[runtime]
onnxruntime_min = "1.18.0"
intra_op_threads = 2
"""


def load_text(folder, text):
    path = folder / "mine.toml"
    path.write_text(text)
    return load_profile(str(path))


def test_the_device_classes_are_there():
    assert set(profile_names()) >= {
        "host", "x86-64-avx2", "x86-64-vnni", "raspberry-pi-4", "raspberry-pi-5",
        "raspberry-pi-zero-2w", "jetson-orin-nano", "android-arm64",
    }  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_and_is_named_as_its_file(name):
    assert load_profile(name).name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_int8_saturates_on_x86_without_vnni_and_nowhere_else(name):
    cpu = load_profile(name).cpu
    vnni = any(feature.endswith("_vnni") for feature in cpu.features)
    assert (cpu.int8 == "saturates") == (cpu.arch == "x86_64" and not vnni)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_asks_for_no_more_than_its_device_has(name):
    profile = load_profile(name)
    assert profile.runtime.intra_op_threads <= profile.cpu.cores
    assert 0 < profile.memory.available_mib < profile.memory.total_mib
    if profile.budget.max_rss_mib is not None:
        assert profile.budget.max_rss_mib <= profile.memory.available_mib


def test_an_x86_profile_has_x86_features_and_an_arm_profile_arm_ones():
    for name in SHIPPED:
        cpu = load_profile(name).cpu
        assert ("avx2" in cpu.features) == (cpu.arch == "x86_64")
        assert ("asimd" in cpu.features) == (cpu.arch == "aarch64")


def test_the_onnxruntime_that_dies_on_a_pi_4_is_excluded_there():
    runtime = load_profile("raspberry-pi-4").runtime
    assert "1.21.0" in runtime.onnxruntime_excluded


@pytest.mark.skipif(shutil.which("lscpu") is None, reason="lscpu is not there to compare with")
def test_host_agrees_with_lscpu():
    text = subprocess.run(
        ["lscpu"], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
    ).stdout
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    rows = {key.strip(): value.strip() for key, value in rows.items()}
    cpu = host_profile().cpu
    flags = set(rows["Flags"].split())
    assert cpu.arch == rows["Architecture"]
    assert cpu.cores <= int(rows["CPU(s)"])
    assert set(cpu.features) <= flags
    assert ("avx2" in cpu.features) == ("avx2" in flags)
    assert ("asimddp" in cpu.features) == ("asimddp" in flags)
    saturates = cpu.arch == "x86_64" and not flags & {"avx_vnni", "avx512_vnni"}
    assert (cpu.int8 == "saturates") == saturates


def test_host_has_this_processs_cores_and_some_memory():
    profile = load_profile("host")
    assert profile.name == "host"
    if hasattr(os, "sched_getaffinity"):
        assert profile.cpu.cores == len(os.sched_getaffinity(0))
    assert 0 < profile.memory.available_mib <= profile.memory.total_mib


def test_a_machine_of_another_architecture_has_no_host_profile(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "armv7l")
    with pytest.raises(ConfigError, match="expected x86-64 or ARM64, got 'armv7l'"):
        load_profile("host")


def test_a_path_serves_where_a_name_does(tmp_path):
    profile = load_text(tmp_path, VALID)
    assert profile.name == "mine"
    assert profile.cpu.features == ("asimd", "asimddp")
    assert profile.runtime.execution_providers == ("CPUExecutionProvider",)
    assert profile.budget.max_latency_ms is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cores = 4", "core = 4", r"mine\.toml: cpu: unknown key 'core'; did you mean 'cores'\?"),
        ("[runtime]", "[runtim]", r"unknown key 'runtim'; did you mean 'runtime'\?"),
        ("cores = 4", 'cores = "4"', r"cpu: cores: expected a whole number, got '4'"),
        ("cores = 4", "", r"cpu: key 'cores' is missing"),
        ('"exact"', '"exakt"', r"cpu: int8: .* did you mean 'exact'\?"),
        ('"aarch64"', '"arm64"', r"cpu: arch: expected one of 'x86_64', 'aarch64', got 'arm64'"),
        ("cores = 4", "cores = 0", r"cpu: cores: expected at least 1, got 0"),
        ("threads = 2", "threads = 0", r"runtime: intra_op_threads: expected at least 1, got 0"),
        ("threads = 2", "threads = 2\n[budget]\nmax_size_mib = 0", r"max_size_mib: expected more"),
        ("cores = 4", "cores = ", r"mine\.toml: is no valid TOML"),
    ],
)
def test_a_fault_in_a_profile_is_named(tmp_path, old, new, message):
    assert VALID.count(old) == 1
    with pytest.raises(ConfigError, match=message):
        load_text(tmp_path, VALID.replace(old, new))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("hosts", "host"), ("raspbery-pi-4", "raspberry-pi-4"), ("jetson-orin", "jetson-orin-nano")],
)
def test_an_unknown_name_gives_the_nearest_right_one(name, meant):
    with pytest.raises(ConfigError, match=rf"no profile '{name}'; did you mean '{meant}'\?"):
        load_profile(name)


def test_a_name_like_none_lists_them_all():
    with pytest.raises(ConfigError, match=r"; known: .*host, .*raspberry-pi-5"):
        load_profile("zzzz")


@pytest.mark.parametrize("name", profile_names())
def test_what_profiles_shows_is_toml_of_the_same_profile(name):
    result = CliRunner().invoke(command, [name])
    assert result.exit_code == 0, result.output
    shown = from_mapping(DeviceProfile, tomllib.loads(result.stdout), where=name)
    # a host's free memory moves between two looks
    expected = load_profile(name)
    assert dataclasses.replace(shown, memory=expected.memory) == expected


def test_toml_escapes_what_toml_wants_escaped():
    text = 'quote " backslash \\ tab \t newline \n delete \x7f Zürich'
    assert tomllib.loads(format_toml({"a": text, "b": {"c": [text]}})) == {
        "a": text,
        "b": {"c": [text]},
    }


def test_the_list_has_a_row_a_profile():
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[2:]] == profile_names()


def test_json_of_the_list_and_of_one():
    every = json.loads(CliRunner().invoke(command, ["--json"]).stdout)
    assert [p["name"] for p in every] == profile_names()
    one = json.loads(CliRunner().invoke(command, ["raspberry-pi-5", "--json"]).stdout)
    assert one == json.loads(json.dumps(to_mapping(load_profile("raspberry-pi-5"))))


def test_an_unknown_name_on_the_command_line_is_a_config_error():
    result = CliRunner().invoke(command, ["raspberry-pi-6"])
    assert isinstance(result.exception, ConfigError)


def test_a_machine_without_a_host_profile_still_lists_the_others(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "armv7l")
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0
    assert "note: profile 'host'" in result.stderr
    assert len(result.stdout.splitlines()) == 2 + len(SHIPPED)
