"""What this machine has, what edgetune can do with it, and what is known to go wrong.

`collect_facts` looks: at installed metadata, and by subprocesses, so that a package whose
import crashes or hangs takes nothing else down. All else is pure functions of the facts.
"""

import importlib.metadata
import operator
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgetune import __version__
from edgetune.errors import ConfigError
from edgetune.profile import Int8Arithmetic, host_profile
from edgetune.runtime.device import cpu_features, cpu_model, memory_mib

Status = Literal["ok", "warning", "problem"]

# packages that all bring a module named onnxruntime
ONNXRUNTIMES = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino",
    "onnxruntime-qnn", "onnxruntime-rocm", "onnxruntime-silicon", "onnxruntime-training",
)  # fmt: skip
# looked for whether or not edgetune's metadata asks for them
NOTEWORTHY = (
    *ONNXRUNTIMES, "numpy", "click", "pillow", "tokenizers", "torch", "torchvision",
    "transformers", "peft", "accelerate", "onnx", "onnxscript", "bitsandbytes",
)  # fmt: skip
# variables that change what edgetune or its measurements do
VARIABLES = ("PYTHONDONTWRITEBYTECODE", "ORT_DISABLE_TELEMETRY", "CUDA_VISIBLE_DEVICES")
# what a subprocess runs
IMPORT_ONNXRUNTIME = "import onnxruntime; print(*onnxruntime.get_available_providers())"
IMPORT_TORCH = "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"
IMPORT_TORCHVISION = f"import torchvision; {IMPORT_TORCH}"
IMPORT_LIMIT_S = 120.0
_COMPARE: Mapping[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    "==": operator.eq, "!=": operator.ne, ">=": operator.ge,
    "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
GPU_LIMIT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A package and the versions asked of it, as in ">=1.17,!=1.21.0"; "" is any."""

    package: str
    versions: str


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What came of importing a package in a process of its own.

    `said`: onnxruntime's execution providers, or "cuda" or "cpu" for torch and torchvision;
    where it fails, the last line of the error.
    """

    works: bool
    said: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found. Memory and disk are MiB; packages are name -> version, installed only.

    `requirements` are edgetune's own: "base" and each extra. `disk_free_mib` is of the working
    folder's disk. `int8` is None on a CPU that edgetune has no profile for.
    """

    edgetune: str
    python: str
    executable: str
    system: str
    machine: str
    pointer_bits: int
    cpu_model: str
    cpu_features: tuple[str, ...]
    cores: int
    int8: Int8Arithmetic | None
    memory_total_mib: int
    memory_available_mib: int
    disk_free_mib: int
    packages: Mapping[str, str]
    requirements: Mapping[str, tuple[Requirement, ...]]
    environment: Mapping[str, str]
    gpus: tuple[str, ...]
    imports: Mapping[str, ImportResult]


@dataclass(frozen=True, kw_only=True)
class Extra:
    """One optional extra and what it lacks: "torch", or "torch 2.4.0 (asks >=2.9)"."""

    name: str
    lacks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing known to go wrong.

    `name` states what is so when all is well; `fault` says what was found when it is not, and
    returns None otherwise.
    """

    name: str
    severity: Literal["warning", "problem"]
    fault: Callable[[Facts], str | None]
    cure: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """One rule held against the facts; `found` and `cure` are empty where it is met."""

    name: str
    status: Status
    found: str = ""
    cure: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that `edgetune doctor` says."""

    facts: Facts
    int8_meaning: str
    extras: tuple[Extra, ...]
    checks: tuple[Check, ...]


def diagnose(facts: Facts) -> Diagnosis:
    """Hold the facts against edgetune's requirements and the rules."""
    return Diagnosis(
        facts=facts,
        int8_meaning=int8_meaning(facts),
        extras=tuple(
            Extra(name=name, lacks=tuple(_unmet(requirements, facts.packages, absent=True)))
            for name, requirements in facts.requirements.items()
            if name != "base"
        ),
        checks=tuple(_check(rule, facts) for rule in RULES),
    )


def collect_facts() -> Facts:
    """Look at this machine; takes a few seconds where torch is installed."""
    requirements = read_requirements()
    asked = {r.package for group in requirements.values() for r in group}
    packages = _installed(sorted(asked | set(NOTEWORTHY)))
    with ThreadPoolExecutor() as pool:
        gpus = pool.submit(_gpus)
        torch = pool.submit(_import_torch, packages)
        imports = _import_onnxruntime(packages) | torch.result()
    total, available = memory_mib()
    return Facts(
        edgetune=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        system=platform.platform(),
        machine=platform.machine(),
        pointer_bits=64 if sys.maxsize > 2**32 else 32,
        cpu_model=cpu_model(),
        cpu_features=cpu_features(),
        cores=os.cpu_count() or 1,
        int8=_host_int8(),
        memory_total_mib=total,
        memory_available_mib=available,
        disk_free_mib=shutil.disk_usage(Path.cwd()).free // 2**20,
        packages=packages,
        requirements=requirements,
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        gpus=gpus.result(),
        imports=imports,
    )


def read_requirements() -> dict[str, tuple[Requirement, ...]]:
    """Return what edgetune's installed metadata asks: "base" first, then each extra.

    Empty where edgetune runs from a folder that was never installed.
    """
    try:
        metadata = importlib.metadata.metadata("edgetune")
    except importlib.metadata.PackageNotFoundError:
        return {}
    return parse_requirements(
        metadata.get_all("Requires-Dist") or [], metadata.get_all("Provides-Extra") or []
    )


def parse_requirements(lines: list[str], extras: list[str]) -> dict[str, tuple[Requirement, ...]]:
    """Sort Requires-Dist lines under "base" and the extras that they belong to.

    An extra that asks for edgetune's own extras gets theirs.
    """
    groups: dict[str, dict[str, Requirement]] = {name: {} for name in ["base", *extras]}
    inherits: dict[str, set[str]] = {name: set() for name in groups}
    for line in lines:
        match = re.match(r"\s*([\w.-]+)\s*(?:\[([^]]*)\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?", line)
        if match is None:
            continue
        package, of_package, versions, marker = match.groups(default="")
        named = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        group = named.group(1) if named else "base"
        if group not in groups:
            continue
        if _canonical(package) == "edgetune":
            inherits[group] |= {name.strip() for name in of_package.split(",")}
        else:
            requirement = Requirement(package=_canonical(package), versions=versions.strip())
            groups[group][requirement.package] = requirement
    for name in groups:
        reached: set[str] = set()
        waiting = set(inherits[name])
        while waiting:
            other = waiting.pop()
            if other in groups and other not in reached:
                reached.add(other)
                waiting |= inherits[other]
                groups[name] = {**groups[other], **groups[name]}
    return {
        name: tuple(sorted(found.values(), key=lambda r: r.package))
        for name, found in groups.items()
    }


def meets(version: str, versions: str) -> bool:
    """Say whether `version` is one of `versions` (">=1.17,!=1.21.0"), by release numbers alone.

    Pre-release and local parts ("rc1", "+cpu") are not looked at.

    Raises:
        ConfigError: `versions` has an operator other than >=, <=, >, <, == and !=.
    """
    have = _release(version)
    for part in filter(None, (p.strip() for p in versions.split(","))):
        match = re.fullmatch(r"(==|!=|>=|<=|>|<)\s*([\d.]+)", part)
        if match is None:
            raise ConfigError(f"expected versions like '>=1.17,!=1.21.0', got {versions!r}")
        if not _COMPARE[match.group(1)](have, _release(match.group(2))):
            return False
    return True


def try_import(code: str, *, limit_s: float = IMPORT_LIMIT_S) -> ImportResult:
    """Run `code` in a fresh Python and say what came of it; a crash or a hang stays there.

    Args:
        code: imports something and prints one line.
        limit_s: seconds until the process is stopped.
    """
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    # -P: a folder named torch in the working folder is not torch
    command = [sys.executable, "-P", "-c", code]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=limit_s,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return ImportResult(works=False, said=f"no answer within {limit_s:g} s")
    except OSError as error:
        return ImportResult(works=False, said=f"cannot start {sys.executable}: {error}")
    if done.returncode == 0:
        return ImportResult(works=True, said=done.stdout.strip())
    if done.returncode < 0:
        number = -done.returncode
        return ImportResult(works=False, said=f"died of {signal.strsignal(number) or number}")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return ImportResult(works=False, said=lines[-1] if lines else f"exit code {done.returncode}")


def int8_meaning(facts: Facts) -> str:
    """Say in a line what the CPU's features mean for int8."""
    have = set(facts.cpu_features)
    if facts.int8 is None:
        return "unknown: edgetune knows x86-64 and ARM64"
    if facts.int8 == "saturates":
        speed = "" if "avx2" in have else "; no AVX2 either: slow"
        return f"saturates: no VNNI, so u8 x s8 pairs are summed in int16{speed}"
    kernels = {
        "AMX": "amx_int8", "VNNI": "avx512_vnni", "AVX-VNNI": "avx_vnni",
        "i8mm": "i8mm", "dotprod": "asimddp",
    }  # fmt: skip
    fast = [name for name, feature in kernels.items() if feature in have]
    if fast:
        return f"exact, with fast kernels ({', '.join(fast)})"
    # a pair of -128 x -128 wraps in int16 there: microsoft/onnxruntime#31573
    return "exact while no s8 weight is -128; no dotprod, so slower than on newer ARM cores"


def _check(rule: Rule, facts: Facts) -> Check:
    found = rule.fault(facts)
    if found is None:
        return Check(name=rule.name, status="ok")
    return Check(name=rule.name, status=rule.severity, found=found, cure=rule.cure)


# the rules' predicates: facts -> what is wrong, or None


def _not_installed(facts: Facts) -> str | None:
    return None if facts.requirements else "edgetune has no installed metadata"


def _narrow_python(facts: Facts) -> str | None:
    if facts.pointer_bits == 64:
        return None
    kernel = " on a 64-bit kernel" if facts.machine in {"aarch64", "arm64", "x86_64"} else ""
    return f"{facts.pointer_bits}-bit Python{kernel} ({facts.machine})"


def _base_unmet(facts: Facts) -> str | None:
    unmet = [
        line
        for requirement in facts.requirements.get("base", ())
        for line in _unmet([_as_installed(requirement, facts)], facts.packages, absent=True)
    ]
    return ", ".join(unmet) or None


def _onnxruntime_broken(facts: Facts) -> str | None:
    result = facts.imports.get("onnxruntime")
    return None if result is None or result.works else result.said


def _onnxruntime_illegal(facts: Facts) -> str | None:
    bad = facts.packages.get("onnxruntime") == "1.21.0"
    if bad and facts.machine in {"aarch64", "arm64"} and "asimddp" not in facts.cpu_features:
        return f"onnxruntime 1.21.0 on {facts.cpu_model}, a CPU without dotprod"
    return None


def _several_onnxruntimes(facts: Facts) -> str | None:
    found = [name for name in ONNXRUNTIMES if name in facts.packages]
    return " and ".join(found) if len(found) > 1 else None


def _onnxruntime_training(facts: Facts) -> str | None:
    version = facts.packages.get("onnxruntime-training")
    return None if version is None else f"onnxruntime-training {version}"


def _numpy_abi(facts: Facts) -> str | None:
    numpy = facts.packages.get("numpy")
    name, runtime = _onnxruntime(facts)
    if numpy and runtime and meets(numpy, ">=2") and meets(runtime, "<1.19"):
        return f"numpy {numpy} and {name} {runtime}"
    return None


def _outdated_extras(facts: Facts) -> str | None:
    found: dict[str, None] = {}
    for group, requirements in facts.requirements.items():
        if group != "base":
            found.update(dict.fromkeys(_unmet(requirements, facts.packages, absent=False)))
    return ", ".join(found) or None


def _torch_broken(facts: Facts) -> str | None:
    result = facts.imports.get("torch")
    return None if result is None or result.works else result.said


def _torchvision_broken(facts: Facts) -> str | None:
    result = facts.imports.get("torchvision")
    if result is None or result.works or _torch_broken(facts):
        return None
    pair = f"torch {facts.packages['torch']}, torchvision {facts.packages['torchvision']}"
    return f"{pair}: {result.said}"


def _peft_old(facts: Facts) -> str | None:
    peft, transformers = facts.packages.get("peft"), facts.packages.get("transformers")
    if peft and transformers and meets(transformers, ">=5") and meets(peft, "<0.18"):
        return f"peft {peft} with transformers {transformers}"
    return None


def _gpu_unused(facts: Facts) -> str | None:
    result = facts.imports.get("torch")
    hidden = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if facts.gpus and result and result.works and result.said == "cpu":
        cause = f" (CUDA_VISIBLE_DEVICES is {hidden!r})" if hidden is not None else ""
        return f"torch {facts.packages['torch']} does not see {facts.gpus[0]}{cause}"
    return None


def _bytecode_off(facts: Facts) -> str | None:
    value = facts.environment.get("PYTHONDONTWRITEBYTECODE")
    return f"PYTHONDONTWRITEBYTECODE is {value!r}" if value else None


def _telemetry_on(facts: Facts) -> str | None:
    value = facts.environment.get("ORT_DISABLE_TELEMETRY")
    return f"ORT_DISABLE_TELEMETRY is {value!r}" if value not in {None, "1"} else None


def _memory_short(facts: Facts) -> str | None:
    # (0, 0) is "can't be read"
    if facts.memory_total_mib and facts.memory_available_mib < 200:
        return f"{facts.memory_available_mib} of {facts.memory_total_mib} MiB available"
    return None


def _disk_short(facts: Facts) -> str | None:
    return f"{facts.disk_free_mib} MiB free" if facts.disk_free_mib < 500 else None


RULES = (
    Rule(
        name="Python has 64 bits",
        severity="problem",
        fault=_narrow_python,
        cure="install a 64-bit system (Raspberry Pi OS 64-bit): onnxruntime has no 32-bit"
        " ARM wheels",
    ),
    Rule(
        name="edgetune is installed",
        severity="warning",
        fault=_not_installed,
        cure="pip install edgetune, or pip install -e . in its folder; without that its"
        " requirements can't be checked",
    ),
    Rule(
        name="the base packages are there",
        severity="problem",
        fault=_base_unmet,
        cure="pip install --upgrade edgetune",
    ),
    Rule(
        name="onnxruntime imports",
        severity="problem",
        fault=_onnxruntime_broken,
        cure="pip install --force-reinstall onnxruntime; where the instruction is illegal,"
        " another version of it",
    ),
    Rule(
        name="onnxruntime suits the CPU",
        severity="problem",
        fault=_onnxruntime_illegal,
        cure="pip install --upgrade 'onnxruntime!=1.21.0' (1.21.0 dies of an illegal"
        " instruction on Cortex-A72 and older: microsoft/onnxruntime#23957)",
    ),
    Rule(
        name="there is one onnxruntime",
        severity="problem",
        fault=_several_onnxruntimes,
        cure="they overwrite each other's files: pip uninstall all of them, then install one",
    ),
    Rule(
        name="no onnxruntime-training",
        severity="warning",
        fault=_onnxruntime_training,
        cure="pip uninstall onnxruntime-training, then pip install --force-reinstall onnxruntime;"
        " it ended at 1.19.2 and edgetune needs nothing of it",
    ),
    Rule(
        name="numpy and onnxruntime fit",
        severity="problem",
        fault=_numpy_abi,
        cure="pip install --upgrade onnxruntime (1.19 was the first built for numpy 2), or"
        " pip install 'numpy<2'",
    ),
    Rule(
        name="extras are new enough",
        severity="warning",
        fault=_outdated_extras,
        cure="pip install --upgrade 'edgetune[train]', or the extra that you use",
    ),
    Rule(
        name="torch imports",
        severity="problem",
        fault=_torch_broken,
        cure="pip install --force-reinstall torch torchvision",
    ),
    Rule(
        name="torch and torchvision are of one build",
        severity="problem",
        fault=_torchvision_broken,
        cure="install both from one index, in one command: pip install --force-reinstall torch"
        " torchvision; for the CPU builds add --index-url https://download.pytorch.org/whl/cpu",
    ),
    Rule(
        name="transformers and peft fit",
        severity="problem",
        fault=_peft_old,
        cure="pip install --upgrade 'peft>=0.18' (older ones import a class that transformers 5"
        " no longer has)",
    ),
    Rule(
        name="torch sees the GPU",
        severity="warning",
        fault=_gpu_unused,
        cure="install a CUDA build of torch that the driver supports: https://pytorch.org",
    ),
    Rule(
        name="bytecode is cached",
        severity="warning",
        fault=_bytecode_off,
        cure="unset PYTHONDONTWRITEBYTECODE: every start compiles all modules that have no cache"
        " yet",
    ),
    Rule(
        name="onnxruntime's telemetry is off",
        severity="warning",
        fault=_telemetry_on,
        cure="unset it or set it to 1: edgetune's own processes send nothing in any case, other"
        " programs that use onnxruntime do",
    ),
    Rule(
        name="memory is free",
        severity="warning",
        fault=_memory_short,
        cure="stop other programs, or add swap: loading a bundle takes 50 to 200 MiB",
    ),
    Rule(
        name="the disk has room",
        severity="warning",
        fault=_disk_short,
        cure="free some: checkpoints and bundles are written to the working folder",
    ),
)


def _unmet(
    requirements: tuple[Requirement, ...] | list[Requirement],
    packages: Mapping[str, str],
    *,
    absent: bool,
) -> list[str]:
    """Name the requirements that are too old or excluded, and with `absent` those missing."""
    lines = []
    for requirement in requirements:
        version = packages.get(requirement.package)
        if version is None:
            if absent:
                lines.append(requirement.package)
        elif not meets(version, requirement.versions):
            lines.append(f"{requirement.package} {version} (asks {requirement.versions})")
    return lines


def _onnxruntime(facts: Facts) -> tuple[str, str | None]:
    """Return name and version of the package that brings onnxruntime."""
    for name in ONNXRUNTIMES:
        if name in facts.packages:
            return name, facts.packages[name]
    return "onnxruntime", None


def _as_installed(requirement: Requirement, facts: Facts) -> Requirement:
    """Ask of onnxruntime-gpu and its like what is asked of onnxruntime."""
    if requirement.package != "onnxruntime":
        return requirement
    return Requirement(package=_onnxruntime(facts)[0], versions=requirement.versions)


def _canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _release(version: str) -> tuple[int, ...]:
    """Return the release numbers, trailing zeros dropped: "2.15.0+cpu" -> (2, 15)."""
    match = re.match(r"\s*v?(\d+(?:\.\d+)*)", version)
    numbers = [int(n) for n in match.group(1).split(".")] if match else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _installed(names: list[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _host_int8() -> Int8Arithmetic | None:
    try:
        return host_profile().cpu.int8
    except ConfigError:
        return None


def _import_onnxruntime(packages: Mapping[str, str]) -> dict[str, ImportResult]:
    if not set(ONNXRUNTIMES) & set(packages):
        return {}
    return {"onnxruntime": try_import(IMPORT_ONNXRUNTIME)}


def _import_torch(packages: Mapping[str, str]) -> dict[str, ImportResult]:
    """Import torchvision, which imports torch; and torch alone where that does not tell."""
    results = {}
    if "torchvision" in packages:
        results["torchvision"] = try_import(IMPORT_TORCHVISION)
    if "torch" in packages:
        both = results.get("torchvision")
        results["torch"] = both if both and both.works else try_import(IMPORT_TORCH)
    return results


def _gpus() -> tuple[str, ...]:
    """Return "name, memory, driver" of each NVIDIA GPU, () without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [program, *query],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=GPU_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if done.returncode:
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())
