"""Opens one hostile bundle after the other, watched, and says what happened to each.

Run by `watched.Worker`: a case a line on standard input, a verdict a line on standard output. It
is a process of its own so that a crash, a hang or an allocation without end is one failed case,
and so that hooks and limits are nobody else's. It is told the folder that it may use.
"""

import base64
import io
import json
import os
import pickle
import pkgutil
import resource
import shutil
import socket
import stat
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEMORY_MIB = 256  # above what a good bundle takes
CPU_SECONDS = 5
MESSAGE_LENGTH = 2000

# what nothing that is read from a bundle may lead to
FORBIDDEN = {
    "pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn",
    "os.fork", "os.forkpty", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto",
    "ctypes.dlopen", "os.putenv", "code.__new__", "marshal.loads", "os.startfile", "os.link",
    "os.symlink", "webbrowser.open", "urllib.Request", "ftplib.connect",
}  # fmt: skip
# where the first argument is what is changed
CHANGES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "shutil.rmtree",
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


# what a test of the watching does; each must be seen
HARMS: dict[str, Callable[[], object]] = {
    "writes beside": lambda: Path("../sentinel.txt").write_text("touched"),
    "writes outside": lambda: Path("/tmp/edgetune-fuzz-harm").write_text("touched"),
    "reads outside": lambda: Path("/etc/passwd").read_text(),
    "runs a command": lambda: os.system("true"),
    "runs code": lambda: exec("pass"),
    "unpickles": lambda: pickle.loads(b"cos\nsystem\n."),
    "connects": lambda: socket.socket().connect(("127.0.0.1", 9)),
    "takes memory": lambda: bytes(range(256)) * (300 << 12),
    "takes more memory": lambda: bytes(2**32),
    "raises another error": lambda: [][0],
    "crashes": os.abort,
}


class ForbiddenError(BaseException):
    """Something was tried that no bundle may cause; nothing but this file catches it."""


class Guard:
    """An audit hook that is on while a case runs."""

    def __init__(self, box: Path) -> None:
        self.box = str(box)
        self.readable = (
            self.box, "/proc/", "/sys/", "/dev/null", "/dev/urandom", *sys.path[1:],
            *(p for p in sysconfig.get_paths().values() if p),
        )  # fmt: skip
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def armed(self) -> Iterator[None]:
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and (why := self._wrong(event, arguments)):
            self.seen.append(why)
            raise ForbiddenError(why)

    def _wrong(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event in FORBIDDEN:
            return f"{event} {arguments!r:.200}"
        if event == "exec":
            file = str(getattr(arguments[0], "co_filename", ""))
            return None if file.startswith(self.readable) else f"exec of code from {file!r:.200}"
        if event == "compile":  # "<unknown>" is ast.literal_eval, which runs nothing
            return None if arguments[1] == "<unknown>" else f"compile {arguments[1]!r:.200}"
        if event == "open" and not isinstance(arguments[0], int):
            path = _absolute(arguments[0])
            allowed = self.box if arguments[2] & WRITING else self.readable
            return None if path.startswith(allowed) else f"open {path!r:.200} {arguments[1:]}"
        if event in CHANGES and arguments[-1] in (-1, None):  # else relative to an open folder
            path = _absolute(arguments[0])
            return None if path.startswith(self.box) else f"{event} {path!r:.200}"
        return None


class Sandbox:
    """A folder with what must not be touched, a bundle, and a place to unpack to."""

    def __init__(self, box: Path) -> None:
        self.box = box
        self.sentinel = box / "sentinel.txt"
        self.out = box / "out"

    def fill(self, case: dict[str, Any]) -> Path:
        """Build the case afresh and return the path of its bundle."""
        shutil.rmtree(self.box, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.sentinel.write_text("untouched")
        (self.box / "cwd").mkdir()
        os.chdir(self.box / "cwd")
        if case["form"] == "harm":
            return self.box
        if case["form"] == "zip":
            path = self.box / "bundle.zip"
            path.write_bytes(base64.b64decode(case["data"]))
            return path
        path = self.box / "bundle"
        path.mkdir()
        for name, kind, payload in case["items"]:
            self._place(path / name, kind, payload)
        return path

    def _place(self, path: Path, kind: str, payload: Any) -> None:
        path.unlink(missing_ok=True)
        if kind == "file":
            path.write_bytes(base64.b64decode(payload))
        elif kind == "link":
            path.symlink_to(payload.replace("BOX", str(self.box)))
        elif kind == "hard link":
            os.link(self.sentinel, path)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                folder = os.open(path.parent, os.O_RDONLY)  # the name of a socket must be short
                server.bind(f"/proc/self/fd/{folder}/s")
                os.close(folder)
            path.with_name("s").rename(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "sparse":
            with path.open("wb") as file:
                file.truncate(payload)
        elif kind == "unreadable":
            path.write_bytes(b"x")
            path.chmod(0)
        elif kind == "many":
            for number in range(payload):
                (path.parent / f"{path.name}{number}").touch()

    def snapshot(self) -> dict[str, tuple[int, int, int]]:
        """Return type, size and time of change of all that is there."""
        found = {}
        for folder, folders, files in os.walk(self.box):
            for name in (*folders, *files):
                path = f"{folder}/{name}"
                status = os.lstat(path)
                size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
                time_ns = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
                found[path] = (stat.S_IFMT(status.st_mode), size, time_ns)
        return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what native code prints is no answer
    box = Path(sys.argv[1]).resolve() / "box"
    warnings.simplefilter("ignore")
    _import_all()
    guard, sandbox = Guard(box), Sandbox(box)
    limited = False
    for line in sys.stdin:
        case = json.loads(line)
        if case["form"] == "limit":  # good bundles went before: all is imported that ever will be
            _limit_memory()
            limited = True
            verdict: dict[str, Any] = {"failures": [], "outcome": "limited"}
        else:
            verdict = judge(case, sandbox, guard if limited else None)
        answers.write(json.dumps(verdict) + "\n")
        answers.flush()


def judge(case: dict[str, Any], sandbox: Sandbox, guard: Guard | None) -> dict[str, Any]:
    """Run all that reads a bundle on a case; say what went wrong, and how far it came."""
    from edgetune.runtime import EdgeModel
    from edgetune.runtime.bundle import open_bundle, verify_files
    from edgetune.runtime.packing import pack, unpack

    path = sandbox.fill(case)
    failures: list[str] = []
    outcomes: list[str] = []
    rss, cpu = _reset_peak(), time.process_time()
    before = sandbox.snapshot()

    def attempt(what: str, work: Callable[[], object], writes: Path | None = None) -> bool:
        nonlocal before
        outcome = _attempt(what, work, failures, guard)
        outcomes.append(f"{what}: {outcome}")
        after = sandbox.snapshot()
        allowed = str(writes) if writes is not None and outcome == "done" else None
        for name in sorted(before.keys() | after.keys()):
            inside = allowed is not None and (name == allowed or name.startswith(allowed + "/"))
            if before.get(name) != after.get(name) and not inside:
                failures.append(f"{what}: {name} was written, changed or removed")
        before = after
        return outcome == "done"

    def check_files() -> None:
        verify_files(open_bundle(path))

    def load() -> None:
        with EdgeModel.load(path) as model:
            attempt("self_test", model.self_test)

    if case["form"] == "harm":
        attempt("harm", HARMS[case["how"]])
    else:
        attempt("open_bundle", lambda: open_bundle(path))
        attempt("verify_files", check_files)
    if case["form"] == "harm":
        pass
    elif case["form"] == "zip":
        target = sandbox.out / "deep" / "new"
        if attempt("unpack", lambda: unpack(path, target), sandbox.out / "deep"):
            _check_unpacked(target, failures)
    else:
        target = sandbox.out / "new.zip"
        attempt("pack", lambda: pack(path, target), target)
    if case["form"] != "harm":
        attempt("load", load)
    if sandbox.sentinel.read_text() != "untouched":
        failures.append("the sentinel was overwritten")
    seconds, peak = time.process_time() - cpu, _peak() - rss
    if seconds > CPU_SECONDS:
        failures.append(f"took {seconds:.1f} s of CPU time")
    if peak > MEMORY_MIB:
        failures.append(f"took {peak} MiB")
    return {"failures": failures, "outcome": outcomes, "seconds": seconds, "peak_mib": peak}


def _attempt(
    what: str, work: Callable[[], object], failures: list[str], guard: Guard | None
) -> str:
    from edgetune.errors import EdgetuneError

    try:
        if guard is None:
            work()
        else:
            guard.seen.clear()
            with guard.armed():
                work()
        outcome = "done"
    except EdgetuneError as error:
        outcome = f"{type(error).__name__}: {error}"
        if len(outcome) > MESSAGE_LENGTH or "\n" in outcome:
            failures.append(f"{what}: a message of {len(outcome)} characters: {outcome!r:.300}")
    except BaseException as error:  # whatever it is, it is what we look for
        outcome = f"{type(error).__name__}: {error!s:.300}"
        failures.append(f"{what}: {outcome} at {_place_of(error)}")
    if guard is not None:
        guard.on = what == "self_test"  # that runs within another one
        failures.extend(f"{what}: {why}" for why in guard.seen)
        guard.seen.clear()
    return outcome[:300]


def _check_unpacked(target: Path, failures: list[str]) -> None:
    listed = {"manifest.json", *json.loads((target / "manifest.json").read_bytes())["files"]}
    found = {p.name for p in target.iterdir()}
    if found != listed:
        failures.append(f"unpack: wrote {sorted(found)}, listed are {sorted(listed)}")
    if not all(stat.S_ISREG(p.lstat().st_mode) for p in target.iterdir()):
        failures.append("unpack: wrote what is no plain file")


def _absolute(path: Any) -> str:
    # links are not followed: it is the name that a bundle chose
    return os.path.abspath(os.fsdecode(path))  # noqa: PTH100


def _place_of(error: BaseException) -> str:
    trace = error.__traceback__
    place = ""
    while trace is not None:
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _import_all() -> None:
    """Import what the runtime imports late, so that nothing is imported because of a bundle."""
    import difflib  # noqa: F401
    import encodings.utf_16
    import encodings.utf_32  # noqa: F401
    import traceback  # noqa: F401

    import numpy as np

    import edgetune.runtime.tasks
    from edgetune.runtime import archive, goldens, model, packing  # noqa: F401

    for module in pkgutil.iter_modules(edgetune.runtime.tasks.__path__):
        __import__(f"edgetune.runtime.tasks.{module.name}")
    stored = io.BytesIO()
    np.savez_compressed(stored, x=np.zeros(2))
    for data in (stored.getvalue(), b"PK\3\4", b"?"):
        try:
            with np.load(io.BytesIO(data)) as arrays:
                arrays["x"]
        except (OSError, ValueError, KeyError, EOFError):
            pass
        except Exception:  # zipfile's own
            pass
    from PIL import Image
    from tokenizers import Tokenizer  # noqa: F401

    Image.init()


def _status(key: str) -> int:
    """Return a number of kibibytes from /proc/self/status; 0 where there is none."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(key)), 0)


def _limit_memory() -> None:
    """Let later allocations fail that a good bundle is far from; ulimit's own unit is bytes."""
    if size := _status("VmSize:"):
        limit = (size << 10) + 2 * (MEMORY_MIB << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _reset_peak() -> int:
    """Start to measure anew; return what is taken now, in MiB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()  # the peak of all cases so far: better than nothing
    return _status("VmRSS:") >> 10


def _peak() -> int:
    return _status("VmHWM:") >> 10


if __name__ == "__main__":
    main()
