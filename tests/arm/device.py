#!/usr/bin/env python3
"""An emulated 64-bit ARM device, to run edgetune's runtime where there is no board.

    device.py build  FOLDER                  make it, or complete it
    device.py run    FOLDER -- COMMAND...    run a program on it; its exit code comes back
    device.py verify FOLDER BUNDLE...        replay bundles' goldens on each core
    device.py test   FOLDER -- ARGS...       run tests/runtime on it

The device is a Debian arm64 user land with Python and the published aarch64 wheels, under QEMU's
user emulation. It sees the host's files, and edgetune as it is in this repository. Everything lies
in FOLDER; nothing is installed on the host and nothing needs root. docs/arm.md says what it shows.

Exit codes: 2 wrong arguments or the device is not built; 4 a tool that building needs is not here,
or a download cannot be had; 6 a bundle did not verify.
"""

import argparse
import compileall
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
# as Raspberry Pi OS 12: the oldest Python that edgetune supports
SUITE, PYTHON = "bookworm", "3.11"
# what that Python and the wheels load; no shell, no package manager
DEBIAN_PACKAGES = (
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib",
    "libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libbz2-1.0", "libcrypt1", "libexpat1", "libffi8",
    "liblzma5", "libsqlite3-0", "libssl3", "libuuid1",
)  # fmt: skip
# bookworm's own QEMU 7.2 computes wrong sums in some kernels of onnxruntime and crashes in others
EMULATOR_SUITE, EMULATOR_PACKAGE = "trixie", "qemu-user"
PACKAGES = ("click", "h11", "numpy", "onnxruntime", "pillow", "tokenizers")
# pytest, hypothesis and onnx with what they import
TEST_PACKAGES = (
    "hypothesis", "iniconfig", "ml-dtypes", "onnx", "packaging", "pluggy", "protobuf", "pygments",
    "pytest", "sortedcontainers", "typing-extensions",
)  # fmt: skip
# a wheel says the oldest glibc that it runs with; bookworm has 2.36
GLIBC_MINORS = (17, 24, 26, 27, 28, 31, 34, 35)
# Pi 3 and Zero 2 W; Pi 4: both ARMv8.0. Pi 5: has dot products
CORES = ("cortex-a53", "cortex-a72", "cortex-a76")
# what `python3` is on the device. The host's kernel runs it, so the device's programs start others
# by sys.executable, which is this file, and need no support for foreign programs in the kernel.
LAUNCHER = f"""\
#!/bin/sh
device=${{0%/root/usr/bin/python3}}
exec "$device/emulator/qemu-aarch64" -0 "$0" -L "$device/root" \
"$device/root/usr/bin/python{PYTHON}" "$@"
"""
# where that Python looks for packages, and what it finds there: the way to the folder of wheels
SITE = Path("usr", "local", "lib", f"python{PYTHON}", "dist-packages")
WHEELS_LINE = "../" * (len(SITE.parts) + 1) + "packages\n"


class UnavailableError(Exception):
    """A tool is not here, or a download cannot be had: nothing that a change of ours would mend."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    added = {name: commands.add_parser(name) for name in ("build", "run", "verify", "test")}
    for command in added.values():
        command.add_argument("folder", type=Path)
    added["build"].add_argument("--with-tests", action="store_true", help="and what tests need")
    added["build"].add_argument(
        "--constraints", type=Path, default=REPOSITORY / "constraints.txt", metavar="FILE",
        help="versions of the wheels; default: the repository's",
    )  # fmt: skip
    added["verify"].add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    added["verify"].add_argument("--cpu", action="append", help=f"default: {', '.join(CORES)}")
    for name in ("run", "test"):
        added[name].add_argument("--cpu", default="cortex-a72", help="default: cortex-a72")
    own, rest = _split(arguments)
    chosen = parser.parse_args(own)
    device = chosen.folder.resolve()
    if chosen.command == "build":
        build(device, read_pins(chosen.constraints), with_tests=chosen.with_tests)
        return 0
    if not (device / "packages").is_dir():
        _stop(2, f"{device}: is no device; make it: {sys.argv[0]} build {chosen.folder}")
    if chosen.command == "verify":
        return verify(device, chosen.bundles, chosen.cpu or CORES)
    if chosen.command == "test":
        return run_tests(device, rest, chosen.cpu)
    if not rest:
        parser.error("expected -- and a command")
    return run(device, rest, chosen.cpu)


def read_pins(constraints: Path) -> dict[str, str]:
    """Return the version of each package that a constraints file names."""
    lines = [line.partition("#")[0] for line in constraints.read_text().splitlines()]
    pins = (line.split("==") for line in lines if "==" in line)
    found = {name.strip(): version.strip() for name, version in pins}
    if absent := sorted({*PACKAGES, *TEST_PACKAGES} - set(found)):
        _stop(2, f"{constraints}: expected a line NAME==VERSION also for {', '.join(absent)}")
    return found


# -- building -------------------------------------------------------------------------------------


def build(device: Path, pins: Mapping[str, str], *, with_tests: bool) -> None:
    """Make what of the device is not there, or was made by another recipe.

    Raises:
        UnavailableError: a tool or a download is not to be had.
    """
    architecture = _output("dpkg", "--print-architecture").strip()
    emulator = (EMULATOR_SUITE, architecture, EMULATOR_PACKAGE)
    wheels = {"packages": PACKAGES} | ({"tests": TEST_PACKAGES} if with_tests else {})
    device.mkdir(parents=True, exist_ok=True)
    with _locked(device):
        _step(device, "emulator", emulator, lambda at: _make_emulator(at, *emulator))
        _step(device, "root", (SUITE, *DEBIAN_PACKAGES, LAUNCHER, WHEELS_LINE), _make_root)
        for name, packages in wheels.items():
            exact = [f"{package}=={pins[package]}" for package in packages]
            _step(device, name, exact, partial(_install, requirements=exact))
    check = "import click, h11, numpy, onnxruntime, PIL, tokenizers"
    if run(device, ["python3", "-c", check], "cortex-a53"):
        raise RuntimeError("the device is there, but its Python cannot import the packages")


def _step(device: Path, name: str, recipe: Sequence[str], make: Callable[[Path], None]) -> None:
    """Have `make` fill the folder `name`, unless it did so by this recipe before."""
    made, unfinished = device / name, device / f"{name}.unfinished"
    text = "\n".join(recipe) + "\n"
    if (made / "recipe.txt").is_file() and (made / "recipe.txt").read_text() == text:
        return
    _say(f"making {made}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    make(unfinished)
    (unfinished / "recipe.txt").write_text(text)
    shutil.rmtree(made, ignore_errors=True)
    unfinished.rename(made)


def _make_emulator(target: Path, suite: str, architecture: str, package: str) -> None:
    (archive,) = _download_debs(target / "apt", suite, architecture, (package,))
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking:
        # the package has an emulator for each architecture, 20 times what is needed
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as files:
            for file in files:
                if file.name == "./usr/bin/qemu-aarch64":
                    content = files.extractfile(file)
                    assert content is not None
                    (target / "qemu-aarch64").write_bytes(content.read())
        unpacking.communicate()
    (target / "qemu-aarch64").chmod(0o755)
    shutil.rmtree(target / "apt")


def _make_root(target: Path) -> None:
    for archive in _download_debs(target / "apt", SUITE, "arm64", DEBIAN_PACKAGES):
        _output("dpkg-deb", "--extract", str(archive), str(target))
    shutil.rmtree(target / "apt")
    launcher = target / "usr" / "bin" / "python3"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    (target / SITE).mkdir(parents=True)
    (target / SITE / "wheels.pth").write_text(WHEELS_LINE)
    _compile(target / "usr" / "lib" / f"python{PYTHON}")


def _download_debs(
    work: Path, suite: str, architecture: str, packages: Sequence[str]
) -> list[Path]:
    """Download Debian packages, signatures checked, with the host's apt but none of its state."""
    for folder in ("none", "lists/partial", "cache/archives/partial", "debs"):
        (work / folder).mkdir(parents=True)
    keyring = next(Path("/usr/share/keyrings").glob("debian-archive-keyring.*"), None)
    archives = _output("apt-get", "indextargets", "--format", "$(REPO_URI)").split()
    archive = next((uri for uri in archives if "security" not in uri), None)
    if keyring is None or archive is None:
        raise UnavailableError("this host's apt names no Debian archive, or has no key for it")
    (work / "sources.list").write_text(
        f"deb [arch={architecture} signed-by={keyring}] {archive} {suite} main\n"
    )
    (work / "status").touch()
    settings = {
        "Dir::State": work, "Dir::State::status": work / "status", "Dir::Cache": work / "cache",
        "Dir::Etc::SourceList": work / "sources.list", "Dir::Etc::SourceParts": work / "none",
        "Dir::Etc::Parts": work / "none", "Dir::Etc::Main": "/dev/null",
        "Dir::Etc::Preferences": "/dev/null", "Dir::Etc::PreferencesParts": work / "none",
        "APT::Architecture": architecture, "APT::Architectures": architecture,
        "APT::Sandbox::User": "", "APT::Update::Error-Mode": "any", "Acquire::Languages": "none",
    }  # fmt: skip
    # proxies, certificates and the like stay as the host has them
    lines = [line for line in _output("apt-config", "dump").splitlines() if "Acquire::" in line]
    lines += [f'{key} "{value}";' for key, value in settings.items()]
    (work / "apt.conf").write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "APT_CONFIG": str(work / "apt.conf")}
    for command in (["update"], ["download", *packages]):
        done = subprocess.run(
            ["apt-get", "-q", *command],
            cwd=work / "debs", env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            if "Unable to locate package" in done.stderr:
                raise RuntimeError(done.stderr)
            raise UnavailableError(f"apt-get {command[0]}: {_last_line(done.stderr)}")
    return sorted((work / "debs").glob("*.deb"))


def _install(target: Path, requirements: Sequence[str]) -> None:
    """Put the aarch64 wheels of exactly these packages into a folder."""
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBC_MINORS]
    done = subprocess.run(
        [*_pip(), "install", "--quiet", "--no-compile", "--no-deps", "--only-binary=:all:",
         f"--target={target}", f"--python-version={PYTHON}", "--implementation=cp",
         "--platform=manylinux2014_aarch64", *platforms, *requirements],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        message = f"pip: {_last_line(done.stderr)}"
        # a version that does not exist is our mistake; an index that does not answer is not
        lost = "Retrying (" in done.stderr or "(from versions: none)" in done.stderr
        raise UnavailableError(message) if lost else RuntimeError(message)
    _compile(target)


def _pip() -> list[str]:
    """Return the command of a pip: this Python's, or where uv made it without one, another's."""
    for python in (sys.executable, "python3"):
        command = [python, "-m", "pip"]
        tried = subprocess.run([*command, "--version"], capture_output=True, check=False)
        if tried.returncode == 0:
            return command
    raise UnavailableError("neither this Python nor python3 has pip")


def _compile(folder: Path) -> None:
    """Byte-compile, if this Python's byte code is the device's: there it takes minutes."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == PYTHON:
        unused = re.compile(r"/(tests|transformers|tools|quantization|lib2to3|idlelib)/")
        compileall.compile_dir(folder, quiet=2, rx=unused, workers=0)


# -- running --------------------------------------------------------------------------------------


def run(device: Path, command: Sequence[str], cpu: str) -> int:
    """Run a program of the device on an emulated core; return its exit code.

    `python3` is the device's; anything else is the path of an arm64 program.
    """
    status = subprocess.run(
        _on_device(device, command), env=_environment(cpu), check=False
    ).returncode
    return status if status >= 0 else 128 - status


def run_tests(device: Path, arguments: Sequence[str], cpu: str) -> int:
    """Run pytest on the device: tests/runtime, unless the arguments name tests."""
    if not (device / "tests").is_dir():
        _stop(2, f"{device}: has no pytest; add it: {sys.argv[0]} build --with-tests {device}")
    named = any((REPOSITORY / argument.split("::")[0]).exists() for argument in arguments)
    command = ["python3", "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        _on_device(device, [*command, *([] if named else ["tests/runtime"])]),
        env=_environment(cpu, extra=device / "tests"), cwd=REPOSITORY, check=False,
    ).returncode  # fmt: skip


def verify(device: Path, bundles: Sequence[Path], cores: Sequence[str]) -> int:
    """Run `edgetune-rt verify` for each bundle on each core and print a Markdown table."""
    cases = [(bundle, core) for bundle in bundles for core in cores]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda case: _verify_one(device, *case), cases))
    print("| bundle | core | result | largest difference | tolerance |")
    print("|---|---|---|---|---|")
    failed = False
    for (bundle, core), done in zip(cases, results, strict=True):
        if done.returncode:
            failed = True
            cells = [f"failed: {_last_line(done.stderr) or done.returncode}", "", ""]
        else:
            found = json.loads(done.stdout)
            differences = (found["largest_difference"], found["tolerance"])
            cells = ["ok", *(f"{number:.2g}" for number in differences)]
        print(f"| {bundle} | {core} | {' | '.join(cells)} |")
    return 6 if failed else 0


def _verify_one(device: Path, bundle: Path, core: str) -> subprocess.CompletedProcess[str]:
    command = ["python3", "-m", "edgetune.runtime.cli", "verify", "--json", str(bundle)]
    return subprocess.run(
        _on_device(device, command),
        env=_environment(core), capture_output=True, text=True, check=False,
    )  # fmt: skip


def _on_device(device: Path, command: Sequence[str]) -> list[str]:
    if command[0] == "python3":
        return [str(device / "root" / "usr" / "bin" / "python3"), *command[1:]]
    emulator = str(device / "emulator" / "qemu-aarch64")
    return [emulator, "-L", str(device / "root"), *command]


def _environment(cpu: str, *, extra: Path | None = None) -> dict[str, str]:
    # what is meant for the host's programs and Python
    foreign = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
    kept = {key: value for key, value in os.environ.items() if key not in foreign}
    path = [*([extra] if extra else []), REPOSITORY]
    return kept | {"QEMU_CPU": cpu, "PYTHONPATH": os.pathsep.join(map(str, path))}


# -- the rest -------------------------------------------------------------------------------------


@contextmanager
def _locked(device: Path) -> Iterator[None]:
    with (device / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise UnavailableError(f"{command[0]}: not found; building needs Debian's apt") from error


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what stands before the first -- and what stands after it."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _say(message: str) -> None:
    print(f"device: {message}", file=sys.stderr, flush=True)


def _stop(code: int, message: str) -> NoReturn:
    _say(message)
    sys.exit(code)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UnavailableError as error:
        _stop(4, str(error))
