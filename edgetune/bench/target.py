"""Measure a bundle on the real device, over ssh.

The system's `ssh` is all that this side needs: keys, jump hosts and the like come from the
user's own ssh configuration. The target needs Python. What is sent there (the runtime's
sources, the bundle) lies in ~/.cache/edgetune under names that are content hashes, so a second
run sends nothing. `remote.py` is the half that runs there.
"""

import base64
import contextlib
import hashlib
import io
import json
import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgetune
from edgetune.bench.doctor import meets, read_requirements
from edgetune.bench.latency import (
    FIRST_ANSWER,
    BenchReport,
    child_error,
    read_sample,
    summarize_starts,
)
from edgetune.bench.remote import digest_of
from edgetune.errors import ConfigError, DataError, EdgetuneError, ResourceError
from edgetune.runtime.bundle import TOKENIZER_NAME, Bundle, check_hash, file_sha256, open_bundle
from edgetune.runtime.manifest import MANIFEST_NAME, Manifest
from edgetune.runtime.measure import Measurement
from edgetune.runtime.records import from_mapping

MIN_PYTHON = (3, 11)
CONNECT_TIMEOUT_S = 15
# so much more than what is sent has to be free on the target's disk
SPARE_MIB = 16
# names, and addresses with or without a zone; nothing that ssh or a shell could read as more
_USER = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_ADDRESS = r"\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?\]"
_URL = re.compile(rf"ssh://(?:({_USER})@)?({_HOST}|{_ADDRESS})(?::([0-9]{{1,5}}))?/?")
_PLAIN = re.compile(rf"(?:({_USER})@)?({_HOST})")
# ssh's own flags: without a value, or with the value attached
_FLAG = re.compile(r"-(?:[46ACKakvx]|[FiJo].+)")
_KEYWORD = re.compile(r"[A-Za-z][A-Za-z0-9]*=.+")


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to reach a device; `user` is "" and `port` None where ssh's configuration says."""

    user: str
    host: str
    port: int | None = None

    def __str__(self) -> str:
        """Return it as a URL."""
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{user}{host}{f':{self.port}' if self.port else ''}"


@dataclass(frozen=True, kw_only=True)
class Need:
    """A module that the target has to import, the package that brings it, its versions."""

    module: str
    package: str
    versions: str


@dataclass(frozen=True, kw_only=True)
class Connection:
    """A target, the options that reach it, and the Python to run there."""

    target: Target
    ssh_options: tuple[str, ...]
    python: str


def parse_target(text: str) -> Target:
    """Read `ssh://[user@]host[:port]`, `user@host` or a host's name.

    Raises:
        ConfigError: it is none of these; what could be read as an option of ssh or by a shell
            is refused.
    """
    match = _URL.fullmatch(text) or _PLAIN.fullmatch(text)
    groups = match.groups() if match else ()
    port = int(groups[2]) if len(groups) == 3 and groups[2] else None
    if match is None or (port is not None and not 1 <= port <= 65535):
        raise ConfigError(f"target: expected ssh://user@host[:port] or user@host, got {text!r}")
    return Target(user=groups[0] or "", host=groups[1].strip("[]"), port=port)


def bench_target(
    path: str | Path,
    target: str,
    *,
    runs: int = 200,
    warmup: int = 20,
    seconds: float = 10.0,
    threads: int | None = None,
    cold_starts: int = 5,
    sample: str | None = None,
    python: str = "python3",
    ssh_options: Sequence[str] = (),
    wheels: Path | None = None,
    keep: bool = False,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure the bundle at `path` on the device `target`.

    The runtime and the bundle are copied there, unless they are there already. Where `python`
    cannot import what the bundle needs, a virtual environment is made in the target's
    ~/.cache/edgetune; nothing else of the target is changed.

    Args:
        path: the bundle's folder, here.
        target: `ssh://[user@]host[:port]` or `user@host`.
        runs: timed calls, at least 10.
        warmup: untimed calls before them.
        seconds: longest time for the timed calls.
        threads: overrides the number of threads that the manifest names.
        cold_starts: how many processes to start for the cold start; 0 for none.
        sample: predict this instead of the bundle's goldens: a path here of an image, or a
            text, or the path here of a file that holds the text.
        python: the Python to use there: a name, or a path; `~/` is the home folder there.
        ssh_options: more for ssh: `IdentityFile=key`, or one of its flags with the value
            attached, such as `-Fconfig`.
        wheels: a folder of wheels for the target, to install from instead of the network.
        keep: leave other bundles' copies on the target.
        progress: is told in a line what begins.

    Raises:
        ConfigError: an argument is wrong, or Python there is absent or too old.
        IntegrityError: the bundle, here or there, is not what its manifest says.
        DataError: `sample` is not what the task takes.
        ResourceError: the target cannot be reached, has no space, or packages could not be
            installed; the connection was lost; the measuring process was killed.
    """
    if cold_starts < 0:
        raise ConfigError(f"cold_starts: expected at least 0, got {cold_starts}")
    connection = Connection(
        target=parse_target(target),
        ssh_options=tuple(map(_ssh_option, ssh_options)),
        python=python,
    )
    bundle = open_bundle(path)
    given = _sample(sample, bundle)
    say = progress or (lambda _: None)

    runtime = _runtime_files()
    names = {
        "runtime": f"runtime-{digest_of({n: _sha256(data) for n, data in runtime.items()})}",
        "bundle": f"bundle-{bundle.manifest.digest}",
    }
    needs = requirements(bundle.manifest)
    environment = f"venv-{_sha256(' '.join(map(_pinned, needs)).encode())[:16]}"
    modules = [need.module for need in needs]
    say(f"connecting to {connection.target}")
    found = _call(
        connection, {"operation": "look", "modules": modules, "environment": environment, **names}
    )
    if not found["runtime"]:
        say("sending the runtime")
        _send(connection, names["runtime"], runtime, found)
    if not found["bundle"]:
        say(f"sending {bundle.manifest.name}: {bundle.size_bytes / 2**20:.1f} MiB")
        _send(connection, names["bundle"], _bundle_files(bundle), found)
    used = _choose_environment(connection, found, needs, environment, wheels, say)

    say(f"measuring {bundle.manifest.name} there: {runs} runs, {seconds:g} s at most")
    arguments = [f"--runs={runs}", f"--warmup={warmup}", f"--seconds={seconds}"]
    arguments += [f"--threads={threads}"] if threads is not None else []
    reply = _call(
        connection,
        {
            "operation": "run", "environment": used, "arguments": arguments, "threads": threads,
            "cold_starts": cold_starts, "first_answer": FIRST_ANSWER, "keep": keep,
            **names, **given,
        },
    )  # fmt: skip
    if "returncode" in reply:
        raise child_error(reply["returncode"], reply["stderr"])
    manifest = bundle.manifest
    starts = [(milliseconds, peak) for milliseconds, peak in reply["starts"]]
    return BenchReport(
        bundle=manifest.name,
        task=manifest.task,
        precision=manifest.precision,
        profile=manifest.profile,
        profile_threads=manifest.session.intra_op_threads,
        size_mib=bundle.size_bytes / 2**20,
        measurement=from_mapping(Measurement, reply["measurement"], where=str(connection.target)),
        cold_start=summarize_starts(starts) if starts else None,
        target=str(connection.target),
    )


def requirements(manifest: Manifest) -> tuple[Need, ...]:
    """Return what a target has to have installed to run the bundle."""
    stated = {r.package: r.versions for group in read_requirements().values() for r in group}
    modules = {"numpy": "numpy", "onnxruntime": "onnxruntime"}
    if TOKENIZER_NAME in manifest.files:
        modules["tokenizers"] = "tokenizers"
    if any(spec.dtype == "uint8" and len(spec.shape) == 4 for spec in manifest.inputs):
        modules["PIL"] = "pillow"
    compatibility = manifest.compatibility
    versions = {
        **stated,
        "onnxruntime": ",".join(
            [f">={compatibility.onnxruntime_min}"]
            + [f"!={version}" for version in compatibility.onnxruntime_excluded]
        ),
    }
    return tuple(
        Need(module=module, package=package, versions=versions.get(package, ""))
        for module, package in modules.items()
    )


def _pinned(need: Need) -> str:
    """Return what pip is to install: onnxruntime as it is here, if the bundle allows it."""
    if need.package == "onnxruntime":
        from edgetune.runtime.ort import version

        if meets(version(), need.versions):
            return f"onnxruntime=={version()}"
    return f"{need.package}{need.versions}"


def _choose_environment(
    connection: Connection,
    found: Mapping[str, Any],
    needs: Sequence[Need],
    name: str,
    wheels: Path | None,
    say: Callable[[str], None],
) -> str:
    """Return the name of the target's environment to measure in; "" is its Python as it is."""
    lacks = _lacks(needs, found["modules"])
    if not lacks:
        return ""
    if found["environment"] is not None and not _lacks(needs, found["environment"]):
        return name
    say(f"{connection.python} there lacks: {'; '.join(lacks)}")
    sent = None
    if wheels is not None:
        files = _wheel_files(wheels)
        sent = f"wheels-{_sha256(' '.join(files).encode())[:16]}"
        say(f"sending {len(files)} wheels from {wheels}")
        _send(connection, sent, files, found)
    pinned = [_pinned(need) for need in needs]
    say(f"making an environment in {found['cache']} there, with {', '.join(pinned)}")
    made = _call(
        connection,
        {
            "operation": "environment", "name": name, "wheels": sent, "requirements": pinned,
            "modules": [need.module for need in needs],
        },
    )  # fmt: skip
    if lacks := _lacks(needs, made["modules"]):
        raise ConfigError(f"{connection.target}: the environment made there: {'; '.join(lacks)}")
    return name


def _lacks(needs: Sequence[Need], modules: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Say what is wrong with a Python's packages, [] where nothing is."""
    faults = []
    for need in needs:
        at = modules[need.module]
        if "problem" in at:
            faults.append(f"{need.package} ({at['problem']})")
        elif not meets(at["version"], need.versions):
            faults.append(f"{need.package} {at['version']} (asks {need.versions})")
    return faults


def _sample(sample: str | None, bundle: Bundle) -> dict[str, Any]:
    """Return the request's part for the sample: a text, or a file to be sent.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    text = read_sample(sample, bundle)
    if text is None or TOKENIZER_NAME in bundle.manifest.files:
        return {"text": text, "file": None}
    path = Path(text)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    suffix = path.suffix if re.fullmatch(r"\.[A-Za-z0-9]+", path.suffix) else ""
    encoded = base64.b64encode(data).decode()
    return {"text": None, "file": {"suffix": suffix, "base64": encoded}}


def _runtime_files() -> dict[str, bytes]:
    """Return the sources that a device runs, name -> bytes; names begin with edgetune/."""
    package = Path(edgetune.__file__).parent
    paths = [package / "__init__.py", package / "errors.py"]
    paths += [
        p for p in sorted((package / "runtime").rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts
    ]  # fmt: skip
    return {f"edgetune/{p.relative_to(package).as_posix()}": p.read_bytes() for p in paths}


def _bundle_files(bundle: Bundle) -> dict[str, Path]:
    """Return the bundle's files, every hash compared first.

    Raises:
        IntegrityError: one differs from the manifest.
    """
    for name in bundle.manifest.files:
        check_hash(bundle, name)
    return {name: bundle.folder / name for name in [MANIFEST_NAME, *bundle.manifest.files]}


def _wheel_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder of wheels, found none")
    files = {path.name: path for path in sorted(folder.glob("*.whl"))}
    if not files:
        raise ConfigError(
            f"{folder}: holds no wheel (*.whl); fill it with: pip download --only-binary=:all:"
            f" --dest {folder} --platform ... onnxruntime numpy"
        )
    return files


def _send(
    connection: Connection,
    name: str,
    files: Mapping[str, bytes] | Mapping[str, Path],
    found: Mapping[str, Any],
) -> None:
    """Copy `files` into the target's folder `name`, whole or not at all.

    Raises:
        ResourceError: there is no space, or the connection was lost.
    """
    sizes = {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in files.items()}
    mib = sum(sizes.values()) / 2**20
    if found["free_mib"] < mib + SPARE_MIB:
        raise ResourceError(
            f"{connection.target}: no space left: {mib + SPARE_MIB:.0f} MiB are needed in"
            f" {found['cache']}, {found['free_mib']} are free"
        )
    hashes = {n: _sha256(f) if isinstance(f, bytes) else file_sha256(f) for n, f in files.items()}

    def write(stream: Any) -> None:
        with tarfile.open(fileobj=stream, mode="w|") as archive:
            for member in sorted(files):
                source = files[member]
                entry = tarfile.TarInfo(member)  # no owner, no time: same files, same bytes
                entry.size, entry.mode = sizes[member], 0o644
                if isinstance(source, bytes):
                    archive.addfile(entry, io.BytesIO(source))
                    continue
                with source.open("rb") as file:
                    archive.addfile(entry, file)

    request = {"operation": "receive", "name": name, "digest": digest_of(hashes)}
    _call(connection, request, write)


def _call(
    connection: Connection,
    request: Mapping[str, Any],
    write: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Have the target do what `request` says and return its answer.

    Standard input stays open until it has answered, unless `write` gives it what to read: when
    this process ends, or the connection does, the other side sees the end and stops.

    Raises:
        EdgetuneError: it failed; of the class that fits.
    """
    script = Path(__file__).with_name("remote.py").read_bytes()
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                _ssh_command(connection, len(script)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        except OSError as error:
            raise ResourceError(f"cannot start ssh: {error.strerror or error}") from error
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            try:
                process.stdin.write(script + json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                if write is not None:
                    write(process.stdin)
                    process.stdin.close()
            except BrokenPipeError:
                pass  # ssh's exit code and last words say why
            out = process.stdout.read()
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if process.returncode:
        raise _failure(connection, request["operation"], process.returncode, said)
    # what a login script prints comes before the answer
    lines = [line for line in out.decode(errors="replace").split("\n") if line.strip()]
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        got = repr(lines[-1][:200]) if lines else "nothing"
        raise EdgetuneError(f"{connection.target}: expected an answer, got {got}") from error
    return answer


def _ssh_command(connection: Connection, script_bytes: int) -> list[str]:
    """Return the command that has the target's Python run the script it is sent first."""
    python, target = connection.python, connection.target
    if not re.fullmatch(r"[^-\s][^\0\r\n]*", python):
        raise ConfigError(f"target Python: expected a name or a path, got {python!r}")
    quoted = f'"$HOME"/{shlex.quote(python[2:])}' if python[:2] == "~/" else shlex.quote(python)
    old = "error: Python %d.%d is too old: "
    old += f"{'.'.join(map(str, MIN_PYTHON))} or newer is needed; name one with --target-python"
    # any Python can read this much; '' on sys.path is the home folder, whose files are no modules
    start = (
        f"import sys;sys.version_info<{MIN_PYTHON} and"
        f' [sys.stderr.write("{old}"%sys.version_info[:2]),sys.exit(2)];'
        f"sys.path=[p for p in sys.path if p];exec(sys.stdin.buffer.read({script_bytes}))"
    )
    return [
        "ssh", "-T", "-oBatchMode=yes", *connection.ssh_options,
        f"-oConnectTimeout={CONNECT_TIMEOUT_S}", "-oServerAliveInterval=15",
        "-oServerAliveCountMax=4", *([f"-p{target.port}"] if target.port else []),
        *([f"-l{target.user}"] if target.user else []), "--", target.host,
        f"exec {quoted} -c {shlex.quote(start)}",
    ]  # fmt: skip


def _ssh_option(text: str) -> str:
    """Return one argument for ssh.

    Raises:
        ConfigError: it is neither `Keyword=value` nor a flag with its value attached.
    """
    if _FLAG.fullmatch(text):
        return text
    if _KEYWORD.fullmatch(text):
        return f"-o{text}"
    raise ConfigError(
        f"ssh option: expected Keyword=value as in ssh_config, or -Ffile, -ifile, -Jhost;"
        f" got {text!r}"
    )


def _failure(connection: Connection, operation: str, returncode: int, said: str) -> EdgetuneError:
    """Turn ssh's exit code, its own or the remote command's, into the error it stands for."""
    target = connection.target
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    if returncode == 255:
        if operation != "look":
            return ResourceError(f"the connection to {target} was lost: {last}")
        hint = ""
        if "Permission denied" in last:
            hint = "; no password is asked for here: set up a key (ssh-copy-id)"
        if "Host key verification failed" in last:
            hint = f"; connect once by hand, to see and accept its key: ssh {target}"
        return ResourceError(f"cannot connect to {target}: {last}{hint}")
    if returncode in {126, 127}:
        return ConfigError(
            f"{target}: no {connection.python} there ({last}); install Python"
            f" {'.'.join(map(str, MIN_PYTHON))} or newer, or name one with --target-python"
        )
    error = child_error(returncode, said)
    return type(error)(f"{target}: {error}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
