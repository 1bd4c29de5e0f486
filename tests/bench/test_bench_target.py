import hashlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

import edgetune
from edgetune.bench.database import find, graph_key
from edgetune.bench.target import Target, bench_target, parse_target, requirements
from edgetune.cli.bench import command
from edgetune.errors import ConfigError, DataError, IntegrityError, ResourceError
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.manifest import (
    Compatibility,
    DeviceClass,
    Evaluation,
    FileEntry,
    Goldens,
    Manifest,
    SessionSettings,
    TensorSpec,
    dump_manifest,
)
from edgetune.runtime.measure import Throttling, was_throttled

QUICK = {"runs": 10, "warmup": 0, "seconds": 1.0, "cold_starts": 0}
USER = pwd.getpwuid(os.getuid()).pw_name


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Device:
    """A real sshd on this machine, whose sessions have a home folder of their own."""

    def __init__(self, folder, sshd):
        self.folder, self.home, self.port = folder, folder / "home", free_port()
        self.home.mkdir()
        for name in ("host", "key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
            )
        host_key = (folder / "host.pub").read_text()
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {host_key}")
        shutil.copy(folder / "key.pub", folder / "authorized")
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\n"
            f"AuthorizedKeysFile {folder}/authorized\nUsePAM no\nStrictModes no\nPidFile none\n"
            f"PasswordAuthentication no\nSetEnv HOME={self.home}\n"
        )
        self.log = (folder / "log").open("w")
        self.server = subprocess.Popen(
            [sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=self.log
        )
        self.options = (
            "-Fnone", f"IdentityFile={folder}/key", "IdentitiesOnly=yes",
            f"UserKnownHostsFile={folder}/known", "StrictHostKeyChecking=yes",
        )  # fmt: skip
        self.url = f"ssh://{USER}@127.0.0.1:{self.port}"
        self.cache = self.home / ".cache" / "edgetune"

    def wait(self):
        for _ in range(100):
            if self.server.poll() is not None:
                pytest.skip(f"sshd does not start: {(self.folder / 'log').read_text()}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        pytest.skip("sshd does not answer")

    def bench(self, bundle, **options):
        return bench_target(
            bundle, self.url, ssh_options=self.options, **{"python": sys.executable, **options}
        )

    def hold(self, bundle):
        """Have the bundle and the runtime there; return the bundle's folder."""
        folder = self.cache / f"bundle-{open_bundle(bundle).manifest.digest}"
        if not folder.exists():
            self.bench(bundle, **QUICK)
        return folder

    def arguments(self):
        options = [f"--ssh-option={option}" for option in self.options]
        return ["--target", self.url, f"--target-python={sys.executable}", *options]

    def folders(self, kind):
        return sorted(p.name for p in self.cache.glob(f"{kind}-*"))

    def stop(self):
        self.server.terminate()
        self.server.wait()
        self.log.close()


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if sshd is None or not shutil.which("ssh") or not shutil.which("ssh-keygen"):
        pytest.skip("ssh, sshd or ssh-keygen is not installed")
    if os.getuid() == 0:  # sshd's privilege separation wants it
        try:
            Path("/run/sshd").mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            pytest.skip(f"sshd cannot run as root without /run/sshd: {error}")
    device = Device(tmp_path_factory.mktemp("device"), sshd)
    try:
        device.wait()
        yield device
    finally:
        device.stop()


def write_bundle(folder, name):
    """The mean of each colour is the logit of its label."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "h", "w", 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["logits"], axes=[1, 2], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "mean", [image], [logits])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        folder / "model.onnx",
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    np.savez(
        folder / "goldens.npz",
        logits=images.mean((1, 2)).astype(np.float32),
        **{f"input_{i}": image for i, image in enumerate(images)},
    )
    files = {
        p.name: FileEntry(size=p.stat().st_size, sha256=hashlib.sha256(p.read_bytes()).hexdigest())
        for p in folder.iterdir()
    }
    evaluation = Evaluation(split="test", samples=0, metrics={})
    manifest = Manifest(
        schema_version=1,
        name=name,
        release=1,
        task="image-classification",
        labels=("red", "green", "blue"),
        precision="fp32",
        profile="raspberry-pi-4",
        options={},
        inputs=(TensorSpec(name="image", dtype="uint8", shape=("batch", "h", "w", 3)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),),
        compatibility=Compatibility(
            onnxruntime_min="1.17.0", onnxruntime_excluded=("1.21.0",), opset=17, ir_version=8
        ),
        device=DeviceClass(arch="x86_64", cpu_features=(), int8="exact"),
        session=SessionSettings(intra_op_threads=1),
        evaluation=evaluation,
        reference=evaluation,
        goldens=Goldens(count=2, tolerance=0.01),
        files=files,
        edgetune_version="0.1.0",
    )
    (folder / "manifest.json").write_bytes(dump_manifest(manifest))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundle"), "mean-colour")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """No test writes in the user's own home."""
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path / "edgetune-home"))


@pytest.mark.parametrize(
    ("text", "expected", "url"),
    [
        ("ssh://pi@kitchen:2222", Target(user="pi", host="kitchen", port=2222), None),
        ("ssh://kitchen.lan", Target(user="", host="kitchen.lan"), None),
        ("ssh://kitchen/", Target(user="", host="kitchen"), "ssh://kitchen"),
        ("pi@192.168.1.7", Target(user="pi", host="192.168.1.7"), "ssh://pi@192.168.1.7"),
        ("kitchen", Target(user="", host="kitchen"), "ssh://kitchen"),
        ("ssh://pi@[fe80::1%eth0]:22", Target(user="pi", host="fe80::1%eth0", port=22), None),
    ],
)
def test_a_target_is_read(text, expected, url):
    assert parse_target(text) == expected
    assert str(expected) == (url or text)


@pytest.mark.parametrize(
    "text",
    [
        "", "-oProxyCommand=touch x", "ssh://-oProxyCommand=touch x", "pi@-oProxyCommand=x",
        "ssh://-l@host", "-pi@host", "pi@host;reboot", "pi@$(reboot)", "pi@`reboot`", "pi@ho st",
        "pi@host\n", "pi@host'", "ssh://pi@host:0", "ssh://pi@host:65536", "ssh://pi@host:x",
        "ssh://pi:secret@host", "ssh://pi@host/path", "http://host", "pi@host:22", "pi@@host",
        "[::1", "ssh://[%x]", "pi@höst",
    ],
)  # fmt: skip
def test_a_target_that_could_be_read_as_more_is_refused(text, bundle):
    with pytest.raises(ConfigError, match="expected ssh://user@host"):
        bench_target(bundle, text)


@pytest.mark.parametrize("option", ["", "-i", "-o", "host", "-Lx", "=x", "-F", "--", "-W1:2"])
def test_an_ssh_option_has_its_value_attached(option, bundle):
    with pytest.raises(ConfigError, match="ssh option: expected Keyword=value"):
        bench_target(bundle, "pi@host", ssh_options=[option])


@pytest.mark.parametrize("python", ["", "-c", " python3", "python3\nreboot"])
def test_a_target_python_that_is_no_name_is_refused(python, bundle):
    with pytest.raises(ConfigError, match="target Python: expected a name or a path"):
        bench_target(bundle, "pi@host", python=python)


def test_a_bundle_asks_for_what_its_task_and_manifest_say(bundle):
    needs = {need.package: need for need in requirements(open_bundle(bundle).manifest)}
    assert set(needs) == {"numpy", "onnxruntime", "pillow"}
    assert needs["onnxruntime"].versions == ">=1.17.0,!=1.21.0"
    assert needs["pillow"].module == "PIL"


def test_a_device_measures_and_the_second_run_sends_nothing(device, bundle):
    of_old = device.cache / "bundle-of-old"
    of_old.mkdir(parents=True)
    said = []
    report = device.bench(
        bundle, **{**QUICK, "cold_starts": 1}, threads=2, keep=True, progress=said.append
    )
    assert report.target == device.url
    assert (report.measurement.runs, report.measurement.threads) == (10, 2)
    assert report.measurement.machine.onnxruntime == __import__("onnxruntime").__version__
    assert report.measurement.import_ms > 10
    assert len(report.cold_start.each_ms) == 1
    assert report.cold_start.median_ms > 50  # Python and numpy alone take longer
    assert [line.split()[0] for line in said] == ["connecting", "sending", "sending", "measuring"]
    (runtime,) = device.folders("runtime")
    copied = {p.name for p in (device.cache / runtime / "edgetune").iterdir()}
    assert copied - {"__pycache__"} == {"__init__.py", "errors.py", "runtime"}
    assert of_old.exists()

    said.clear()
    device.bench(bundle, **QUICK, progress=said.append)
    assert [line.split()[0] for line in said] == ["connecting", "measuring"]
    assert device.folders("bundle") == [f"bundle-{open_bundle(bundle).manifest.digest}"]
    assert not list(device.cache.glob(".*"))


def test_a_damaged_runtime_there_is_sent_again(device, bundle):
    device.hold(bundle)
    (runtime,) = device.folders("runtime")
    path = device.cache / runtime / "edgetune" / "errors.py"
    path.write_text("raise SystemExit(9)\n")
    said = []
    device.bench(bundle, **QUICK, progress=said.append)
    assert "sending the runtime" in said
    assert path.read_bytes() == Path(edgetune.__file__).with_name("errors.py").read_bytes()


def test_a_bundle_that_was_changed_on_the_target_is_refused(device, bundle):
    folder = device.hold(bundle)
    goldens = folder / "goldens.npz"
    data = bytearray(goldens.read_bytes())
    data[100] ^= 1
    goldens.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"goldens\.npz: expected SHA-256") as caught:
        device.bench(bundle, **QUICK)
    assert f"delete {folder} there" in str(caught.value)
    shutil.rmtree(folder)


def test_a_bundle_that_is_damaged_here_is_not_sent(device, bundle, tmp_path):
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest.pop("digest")
    manifest["name"] = "damaged"
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    manifest["digest"] = hashlib.sha256(canonical).hexdigest()
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    data = bytearray((damaged / "goldens.npz").read_bytes())
    data[100] ^= 1
    (damaged / "goldens.npz").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"goldens\.npz: expected SHA-256"):
        device.bench(damaged, **QUICK)
    assert f"bundle-{manifest['digest']}" not in device.folders("bundle")


def test_an_image_travels_and_leaves_no_trace(device, bundle, tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (4, 4), "red").save(tmp_path / "it's red; $(reboot).png")
    report = device.bench(bundle, **QUICK, sample=str(tmp_path / "it's red; $(reboot).png"))
    assert report.measurement.samples == 1
    assert not list(device.cache.glob(".sample*"))
    with pytest.raises(DataError, match=r"^absent\.png: no such file$"):
        device.bench(bundle, **QUICK, sample="absent.png")


def test_an_unreachable_target_is_one_line_of_ssh(bundle):
    with pytest.raises(ResourceError) as caught:
        bench_target(bundle, f"ssh://x@127.0.0.1:{free_port()}", ssh_options=["-Fnone"])
    assert caught.value.exit_code == 4
    assert "Connection refused" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_target_that_does_not_know_the_key_is_a_resource_error(device, bundle):
    options = [o for o in device.options if not o.startswith("IdentityFile")]
    with pytest.raises(ResourceError, match=r"Permission denied.*ssh-copy-id"):
        bench_target(bundle, device.url, ssh_options=[*options, "IdentityFile=/dev/null"])


def test_a_python_that_is_absent_or_too_old_is_said(device, bundle, tmp_path):
    with pytest.raises(ConfigError, match=r"no /no/such python there .*--target-python"):
        device.bench(bundle, python="/no/such python")
    # an interpreter that says it is 3.9, and does all else as the real one
    old = tmp_path / "old python"
    code = "import sys;sys.version_info=(3,9,2);exec(sys.argv.pop(1))"
    old.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" -c "{code}" "$@"\n')
    old.chmod(0o755)
    with pytest.raises(ConfigError, match=r"Python 3\.9 is too old: 3\.11 or newer") as caught:
        device.bench(bundle, python=str(old))
    assert "\n" not in str(caught.value)


def test_a_target_without_packages_and_an_empty_wheel_folder_is_said(device, bundle, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", device.home / "bare env"], check=True
    )
    bare = "~/bare env/bin/python"
    (tmp_path / "wheels").mkdir()
    said = []
    with pytest.raises(ConfigError, match=r"holds no wheel \(\*\.whl\)"):
        device.bench(bundle, python=bare, wheels=tmp_path / "wheels", progress=said.append)
    (lacks,) = (line for line in said if "lacks" in line)
    assert "numpy (ModuleNotFoundError: No module named 'numpy')" in lacks
    assert device.folders("venv") == []


def test_a_pip_that_finds_no_wheel_is_one_line_and_leaves_nothing(device, bundle, tmp_path):
    pytest.importorskip("ensurepip")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", device.home / "bare"], check=True
    )
    (tmp_path / "other-1.0-py3-none-any.whl").write_bytes(b"")
    with pytest.raises(ResourceError, match="pip install failed: No matching dist") as caught:
        device.bench(bundle, python="~/bare/bin/python", wheels=tmp_path)
    assert "\n" not in str(caught.value)
    assert device.folders("venv") == []
    assert not list(device.cache.glob(".*"))


def test_an_error_of_the_measuring_process_keeps_its_class(device, bundle):
    with pytest.raises(ConfigError, match=r"^runs: expected at least 10, got 3$"):
        device.bench(bundle, **{**QUICK, "runs": 3})


def running_in(folder):
    """Return the ids of the processes that have `folder` on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_until(true, what):
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    pytest.fail(f"waited 10 s for: {what}")


# what a shell runs in the background ignores SIGINT, and so would its children; tests may run there
INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from edgetune.cli.main import main
main()
"""


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_an_interrupt_here_ends_the_process_there(device, bundle):
    cache = device.hold(bundle)
    arguments = [*device.arguments(), "--runs=100000000", "--warmup=0", "--seconds=60"]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "bench", bundle, *arguments],
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        wait_until(lambda: running_in(cache), "the measurement to begin")
        with pytest.raises(ResourceError, match="another measurement is running"):
            device.bench(bundle, **QUICK)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode != 0
    wait_until(lambda: not running_in(cache), "the measurement to end")


def test_the_command_shows_and_records_the_devices_figures(device, bundle, tmp_path):
    arguments = [str(bundle), "--runs=10", "--seconds=1", "--cold-starts=0", *device.arguments()]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert f"measured on {device.url}" in result.stdout
    assert "latency p95" in result.stdout
    assert "not on a raspberry-pi-4" not in result.stdout
    path = tmp_path / "edgetune-home" / "measurements.sqlite"
    assert f"recorded for profile raspberry-pi-4 in {path}" in result.stderr
    key = graph_key(open_bundle(bundle).manifest)
    kept = find(key, profile="raspberry-pi-4", path=path)
    assert (kept.target, kept.threads) == (device.url, 1)

    result = CliRunner().invoke(command, [*arguments, "--json", "--profile", "raspberry-pi-5"])
    plain = json.loads(result.stdout)
    kept = find(key, profile="raspberry-pi-5", path=path)
    assert kept.latency_p50_ms == plain["measurement"]["latency_p50_ms"]
    assert plain["target"] == device.url


def test_the_command_refuses_what_says_nothing_or_names_nothing(bundle):
    result = CliRunner().invoke(command, [str(bundle), "--keep"])
    assert result.exit_code == 2
    assert "--keep says nothing without --target" in result.stderr
    arguments = [str(bundle), "--target", "pi@host", "--profile", "raspbery-pi-4"]
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "did you mean 'raspberry-pi-4'" in str(result.exception)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((None, None), (None, None), None),
        ((0x0, None), (0x0, None), False),
        ((0x0, None), (0x4, None), True),  # throttled now
        ((0x8, None), (0x0, None), True),  # soft temperature limit when it began
        ((0x0, None), (0x20000, None), True),  # capped in between
        ((0xF0000, None), (0xF0000, None), False),  # some time since boot, not now
        ((0x0, None), (0x10001, None), False),  # low voltage alone holds no clock down
        ((None, 7), (None, 7), False),
        ((None, 7), (None, 9), True),
    ],
)
def test_throttling_is_told_by_flags_or_by_a_count_that_grew(before, after, expected):
    readings = [Throttling(flags=flags, events=events) for flags, events in (before, after)]
    assert was_throttled(*readings) is expected
