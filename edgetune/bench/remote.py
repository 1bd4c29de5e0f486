"""The half of `edgetune bench --target` that runs on the target.

`target.py` sends this file's text over ssh and the target's own Python runs it, so it needs the
standard library only; edgetune comes from the copy that was sent before. Standard input is one
line of JSON, the request, then what the operation reads; it stays open while the operation
runs, and its end means that nobody waits any more. Standard output ends with one line of JSON.
An error is one line on standard error and the exit code of the edgetune error it stands for.
"""

import base64
import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

CONFIG, RESOURCE = 2, 4  # exit codes, as in edgetune/errors.py
IMPORT_LIMIT_S = 120.0
STALE_S = 86400.0
# prints a line for each module that it is given, at once
_VERSIONS = """\
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        said = {"version": str(importlib.import_module(name).__version__)}
    except Exception as error:
        said = {"problem": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps({"module": name, **said}), flush=True)
"""


class RemoteError(Exception):
    """An error for the user, with the exit code that names its class."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def digest_of(hashes: Mapping[str, str]) -> str:
    """Return one SHA-256 for a folder, of its files' relative names and SHA-256s."""
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def tree_digest(folder: Path) -> str:
    """Return `digest_of` what lies in `folder`, compiled modules left out."""
    hashes = {}
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return digest_of(hashes)


def look(request: Mapping[str, Any]) -> dict[str, Any]:
    """Say what is here: Python, the modules that can be imported, copies from earlier runs."""
    folder = cache_folder()
    runtime = folder / request["runtime"]
    environment = _python_of(_environment_folder(request["environment"]))
    return {
        "python": platform.python_version(),
        "cache": str(folder),
        "free_mib": shutil.disk_usage(folder).free // 2**20,
        "runtime": f"runtime-{tree_digest(runtime)}" == runtime.name,
        "bundle": (folder / request["bundle"]).is_dir(),
        "modules": versions(sys.executable, request["modules"]),
        "environment": (
            versions(str(environment), request["modules"]) if environment.exists() else None
        ),
    }


def receive(request: Mapping[str, Any]) -> dict[str, Any]:
    """Unpack the tar stream that follows into a folder: whole, under its name, or not at all."""
    folder = cache_folder()
    final = folder / request["name"]
    with _temporary_folder(folder, request["name"]) as temporary:
        try:
            _unpack(sys.stdin.buffer, temporary)
            complete = tree_digest(temporary) == request["digest"]
        except tarfile.TarError:
            complete = False
        if not complete:
            raise RemoteError(RESOURCE, f"{request['name']} did not arrive whole; run it again")
        if final.exists():  # a damaged one
            shutil.rmtree(final)
        temporary.rename(final)
    return {}


def make_environment(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make a virtual environment with the packages asked for; say what can be imported in it."""
    folder = cache_folder()
    final = _environment_folder(request["name"])
    wheels = folder / request["wheels"] if request["wheels"] else None
    with _temporary_folder(folder, final.name) as temporary:
        code, said, errors = supervise([sys.executable, "-P", "-m", "venv", str(temporary)])
        if code:
            raise RemoteError(
                _disk_or(CONFIG, errors + said),
                f"python -m venv failed: {_last_line(errors or said)}; on Debian and Raspberry"
                " Pi OS: sudo apt install python3-venv",
            )
        command = [
            str(_python_of(temporary)), "-P", "-m", "pip", "install", "--quiet", "--no-input",
            "--disable-pip-version-check", "--no-cache-dir", "--only-binary=:all:",
        ]  # fmt: skip
        command += ["--no-index", "--find-links", str(wheels)] if wheels else []
        code, _, errors = supervise([*command, *request["requirements"]])
        if code:
            raised = [line for line in errors.splitlines() if line.startswith("ERROR:")]
            said = raised[-1].removeprefix("ERROR:").strip() if raised else _last_line(errors)
            hint = "" if wheels else "; where the target has no network, give --wheels DIR"
            raise RemoteError(_disk_or(RESOURCE, errors), f"pip install failed: {said}{hint}")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    if wheels:
        shutil.rmtree(wheels, ignore_errors=True)
    return {"modules": versions(str(_python_of(final)), request["modules"])}


def run(request: Mapping[str, Any]) -> dict[str, Any]:
    """Verify the bundle, measure it, start it cold; nobody else may measure meanwhile."""
    folder = cache_folder()
    bundle = folder / request["bundle"]
    python = sys.executable
    if request["environment"]:
        python = str(_python_of(_environment_folder(request["environment"])))
    with _lock(folder), _sample(folder, request) as sample:
        runtime = folder / request["runtime"]
        _verify(runtime, bundle)
        command = [python, "-P", "-m", "edgetune.runtime.measure", *request["arguments"]]
        command += [f"--sample={sample}"] if sample is not None else []
        code, out, errors = supervise([*command, "--", str(bundle)], runtime=runtime)
        if code:
            return {"returncode": code, "stderr": errors[-8000:]}
        reply: dict[str, Any] = {"measurement": json.loads(out), "starts": []}
        threads = str(request["threads"] or 0)
        for _ in range(request["cold_starts"]):
            command = [python, "-P", "-c", request["first_answer"], str(bundle), threads]
            command += [sample] if sample is not None else []
            begin = time.monotonic()  # one clock for all processes of a machine
            code, out, errors = supervise(command, runtime=runtime)
            if code:
                return {"returncode": code, "stderr": errors[-8000:]}
            answered, _, peak = out.strip().partition(" ")
            reply["starts"].append([(float(answered) - begin) * 1e3, float(peak) if peak else None])
        _clean(folder, None if request["keep"] else bundle.name)
    return reply


def versions(python: str, modules: Sequence[str]) -> dict[str, dict[str, str]]:
    """Import modules in a process of its own: {"version": ...} or {"problem": ...} of each."""
    try:
        code, out, errors = supervise([python, "-P", "-c", _VERSIONS, *modules])
    except OSError as error:
        code, out, errors = 1, "", str(error)
    found: dict[str, dict[str, str]] = {}
    for line in out.splitlines():
        if line.startswith('{"module": '):
            said = json.loads(line)
            found[said.pop("module")] = said
    # an import can end the process: an illegal instruction, for one
    problem = f"died of signal {-code}" if code < 0 else _last_line(errors)
    return {module: found.get(module, {"problem": problem}) for module in modules}


def supervise(command: Sequence[str], *, runtime: Path | None = None) -> tuple[int, str, str]:
    """Run `command` and return (exit code, standard output, standard error).

    It is in a process group of its own, which is killed when this process is told to stop.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"ORT_DISABLE_TELEMETRY": "1", "LC_ALL": "C.UTF-8"}
    environment |= {"PYTHONPATH": str(runtime)} if runtime else {}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate()
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, out, errors


def cache_folder() -> Path:
    """Return the folder for everything that edgetune puts here; made where it is absent."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if base.startswith("/") else Path.home() / ".cache") / "edgetune"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> int:
    """Do what the line on standard input asks for; return the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _stop)
    request = json.loads(sys.stdin.buffer.readline())
    operation = OPERATIONS[request["operation"]]
    if operation is not receive:
        threading.Thread(target=_watch_input, daemon=True).start()
    try:
        reply = operation(request)
    except RemoteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        reason = "no space left on its disk" if error.errno == errno.ENOSPC else str(error)
        print(f"error: {reason}", file=sys.stderr)
        return RESOURCE
    print(json.dumps(reply), flush=True)
    return 0


def _watch_input() -> None:
    """Stop this process when standard input ends: the other side is gone."""
    # not through sys.stdin.buffer, whose lock a thread must not hold when Python ends
    while os.read(0, 65536):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(number: int, _: object) -> None:
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _unpack(stream: BinaryIO, folder: Path) -> None:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name = Path(member.name)
            content = archive.extractfile(member)
            if content is None or name.is_absolute() or ".." in name.parts:
                raise tarfile.ReadError(f"unexpected member {member.name!r}")
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(content, file)


def _verify(runtime: Path, bundle: Path) -> None:
    sys.path.insert(0, str(runtime))
    from edgetune.errors import EdgetuneError
    from edgetune.runtime.bundle import open_bundle, verify_files

    try:
        verify_files(open_bundle(bundle))
    except EdgetuneError as error:
        raise RemoteError(
            error.exit_code, f"{error}; delete {bundle} there and run again"
        ) from error


def _clean(folder: Path, bundle: str | None) -> None:
    """Remove the other bundles, and what was left by connections that broke long ago."""
    for path in folder.iterdir():
        old = bundle is not None and path.name.startswith("bundle-") and path.name != bundle
        stale = path.name.startswith(".") and path.stat().st_mtime < time.time() - STALE_S
        if old or stale:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where target.py reads this module too

    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RemoteError(
                RESOURCE, "another measurement is running on the target; wait until it is done"
            ) from None
        yield


@contextlib.contextmanager
def _sample(folder: Path, request: Mapping[str, Any]) -> Iterator[str | None]:
    """Give the sample as an argument: the text, or the path of the file that was sent."""
    if request["file"] is None:
        yield request["text"]
        return
    with _temporary_folder(folder, "sample") as temporary:
        path = temporary / f"sample{request['file']['suffix']}"
        path.write_bytes(base64.b64decode(request["file"]["base64"]))
        yield str(path)


@contextlib.contextmanager
def _temporary_folder(folder: Path, name: str) -> Iterator[Path]:
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _environment_folder(name: str) -> Path:
    """Return the environment's place; each Python has its own."""
    # realpath and not the name: a later `python3` may be another one
    python = f"{platform.python_version()} {Path(sys.executable).resolve()}"
    return cache_folder() / f"{name}-{hashlib.sha256(python.encode()).hexdigest()[:8]}"


def _python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def _disk_or(exit_code: int, said: str) -> int:
    return RESOURCE if "No space left" in said else exit_code


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


OPERATIONS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "look": look,
    "receive": receive,
    "environment": make_environment,
    "run": run,
}

if __name__ == "__main__":
    sys.exit(main())
