"""Is this device able to run this bundle?

`doctor.facts` looks; here are the rules, pure functions of the facts and the manifest. What the
system does not tell is "unknown" and no fault.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from edgetune.errors import ConfigError, IntegrityError, ResourceError
from edgetune.runtime.bundle import TOKENIZER_NAME
from edgetune.runtime.doctor.facts import Facts, collect_facts, machine_name, read_manifest
from edgetune.runtime.manifest import Manifest, release_numbers

# with several problems, the exit code is that of the first of these
WORST_FIRST = (IntegrityError.exit_code, ConfigError.exit_code, ResourceError.exit_code)
HOT_C = 80.0
EARLIEST_YEAR = 2024
DAY_S = 86400.0
# drivers whose "powersave" follows the load. Source: Linux, admin-guide/pm/intel_pstate.rst,
# amd-pstate.rst; everywhere else it is the lowest frequency
ADAPTIVE_DRIVERS = ("intel_pstate", "amd-pstate-epp")
# Source: Raspberry Pi documentation, "vcgencmd", get_throttled; 16 bits further up: since boot
FIRMWARE_FLAGS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "too warm"}
MORE_ROOM = "stop other programs, raise the limit, or export a smaller model"
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at: what was found and, where that is not well, what to do about it.

    `exit_code` is 0 unless `status` is "problem".
    """

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    cure: str = ""
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that `edgetune-rt doctor` says.

    `exit_code` is 0 if there is no problem, else the worst one's: 6 (the bundle is damaged, or
    answers wrongly here) before 2 (something is to be installed or exported anew) before 4
    (memory is short, or a file cannot be read) before all else.
    """

    exit_code: int
    checks: tuple[Check, ...]
    facts: Facts


def examine(path: str | Path, *, goldens: bool = True) -> Diagnosis:
    """Look at this device and the bundle at `path` and judge; what goes wrong is a check's.

    Args:
        path: the bundle.
        goldens: replay them.
    """
    facts = collect_facts(path, goldens=goldens)
    checks = diagnose(facts, read_manifest(path))
    return Diagnosis(exit_code=worst(checks), checks=checks, facts=facts)


def diagnose(facts: Facts, manifest: Manifest | None) -> tuple[Check, ...]:
    """Hold the facts against what the manifest asks.

    A check that needs what another one found lacking is left out.

    Args:
        facts: what was found.
        manifest: the bundle's; None if it cannot be opened, which leaves the device's own checks.
    """
    checks = [rule(facts) for rule in DEVICE_RULES]
    if manifest:
        checks += [c for rule in BUNDLE_RULES if (c := rule(facts, manifest)) is not None]
    missing = {c.name for c in checks if c.status == "problem"} & {"onnxruntime", "extras"}
    return tuple(c for c in checks if not (missing and c.name == "graph" and c.exit_code))


def worst(checks: tuple[Check, ...]) -> int:
    """Return the exit code of the worst problem, 0 if there is none; see `Diagnosis`."""
    codes = {check.exit_code for check in checks if check.status == "problem"}
    return next((code for code in WORST_FIRST if code in codes), max(codes, default=0))


# the rules of the device


def _files(facts: Facts) -> Check:
    name = "files"
    if not facts.fault:
        return _ok(name, "all match their SHA-256")
    cure = "see that this user may read it, and that its disk is well"
    if facts.fault_code == IntegrityError.exit_code:
        cure = "copy the bundle again, or export it again"
    elif facts.fault_code == ConfigError.exit_code:
        cure = "give the folder or the zip of a bundle"
    return _problem(name, facts.fault, cure, facts.fault_code)


def _software(facts: Facts) -> Check:
    machine = facts.machine
    return _ok("software", f"edgetune {facts.edgetune}, Python {machine.python}, {machine.system}")


def _permissions(facts: Facts) -> Check:
    name = "permissions"
    if facts.open_to_all is None:
        return _ok(name, "unknown")
    if not facts.open_to_all:
        return _ok(name, "not every user may write to it")
    found = f"every user of this machine may write to {_some(facts.open_to_all)}"
    return _warning(name, found, f"chmod -R o-w {facts.bundle}")


def _clock(facts: Facts) -> Check:
    found = _date(facts.clock_s)
    cure = (
        "set the clock (timedatectl set-ntp true): TLS, and the date on which an update expires,"
        " need it"
    )
    if facts.clock_s < datetime(EARLIEST_YEAR, 1, 1, tzinfo=UTC).timestamp():
        return _warning("clock", f"{found}: long before edgetune was written", cure)
    if facts.installed_s is not None and facts.clock_s < facts.installed_s - DAY_S:
        written = _date(facts.installed_s)
        return _warning("clock", f"{found}: before edgetune was installed ({written})", cure)
    return _ok("clock", found)


def _governor(facts: Facts) -> Check:
    name, machine = "governor", facts.machine
    if machine.governor is None:
        return _ok(name, "unknown")
    found = machine.governor
    if machine.cpu_mhz and machine.cpu_max_mhz:
        found += f", now {machine.cpu_mhz:.0f} of {machine.cpu_max_mhz:.0f} MHz"
    if "powersave" in machine.governor.split(", ") and (
        facts.cpufreq_driver not in ADAPTIVE_DRIVERS
    ):
        cure = "it keeps the lowest frequency; sudo cpupower frequency-set -g schedutil"
        return _warning(name, found, cure)
    return _ok(name, found)


def _heat(facts: Facts) -> Check:
    name, machine = "heat", facts.machine
    found = []
    if machine.temperature_c is not None:
        found.append(f"{machine.temperature_c:.0f} C")
    if machine.throttled:
        found.append("the clock is held down")
    flags = facts.firmware_flags or 0
    found += [f"{text} now" for bit, text in FIRMWARE_FLAGS.items() if flags >> bit & 1]
    found += [
        f"{text} since boot" for bit, text in FIRMWARE_FLAGS.items() if flags >> bit & 1 << 16
    ]
    if (machine.temperature_c or 0.0) >= HOT_C or machine.throttled or flags & 0xF000F:
        cure = "answers are slower than measured: better cooling, or a stronger power supply"
        return _warning(name, ", ".join(found), cure)
    return _ok(name, ", ".join(found) or "unknown")


# the rules that need the manifest; None: nothing to be said


def _onnxruntime(facts: Facts, manifest: Manifest) -> Check:
    name, found, needs = "onnxruntime", facts.onnxruntime, manifest.compatibility
    code = ConfigError.exit_code
    least = needs.onnxruntime_min
    if found is None:
        return _problem(name, "not installed", f"pip install 'onnxruntime>={least}'", code)
    if release_numbers(found) < release_numbers(least):
        cure = f"pip install --upgrade 'onnxruntime>={least}', or export the bundle for {found}"
        return _problem(name, f"{found}; the bundle needs {least} or newer", cure, code)
    if release_numbers(found) in map(release_numbers, needs.onnxruntime_excluded):
        cure = f"pip install 'onnxruntime>={least},!={found}'"
        return _problem(name, f"{found}: known not to work on this bundle's device", cure, code)
    return _ok(name, f"{found}; the bundle needs {least} or newer")


def _extras(facts: Facts, manifest: Manifest) -> Check:
    name = "extras"
    if TOKENIZER_NAME in manifest.files and "tokenizers" not in facts.packages:
        cure = "pip install 'edgetune[text]'"
        return _problem(name, "tokenizers is not installed", cure, ConfigError.exit_code)
    if manifest.task.startswith("image-") and "pillow" not in facts.packages:
        found = "pillow is not installed: arrays can be answered, image files can't"
        return _warning(name, found, "pip install 'edgetune[image]'")
    return _ok(name, "all that the task needs is installed")


def _processor(facts: Facts, manifest: Manifest) -> Check:
    name, made_for = "processor", manifest.device
    found = f"{facts.machine.cpu_model}, {facts.arch}"
    if facts.arch != machine_name(made_for.arch):
        return _warning(
            name,
            f"{found}; the bundle was made for {made_for.arch}",
            "its speed and memory were measured elsewhere: export for a profile of this device",
        )
    features = facts.machine.cpu_features
    if not features:
        return _ok(name, f"{found}; features unknown")
    lacking = [feature for feature in made_for.cpu_features if feature not in features]
    if lacking:
        return _warning(
            name,
            f"{found}; lacks {', '.join(lacking)}, which the bundle was made for",
            "it may be slower than measured: export for a profile of this device",
        )
    return _ok(name, found)


def _int8(facts: Facts, manifest: Manifest) -> Check:
    name, wanted = "int8", manifest.device.int8
    if manifest.precision not in {"int8", "int4"}:
        return _ok(name, f"of no matter: the bundle is {manifest.precision}")
    if facts.int8 is None:
        return _ok(name, "unknown")
    if facts.int8 != wanted:
        means = {"saturates": "saturates in int16", "exact": "is exact"}
        return _warning(
            name,
            f"this CPU's sum of u8 x s8 products {means[facts.int8]}, that of the CPU that the"
            f" bundle was made for {means[wanted]}: answers may differ",
            "the goldens decide; a miss there wants an export for a profile of this device",
        )
    return _ok(name, f"{facts.int8}, as the bundle was made for")


def _memory(facts: Facts, manifest: Manifest) -> Check:
    name = "memory"
    rooms = {
        "available": facts.memory_available_mib,
        "left to the control group": facts.limits.memory_free_mib,
        "of address space allowed (ulimit -v)": facts.limits.address_space_mib,
    }
    room, what = min(((v, k) for k, v in rooms.items() if v is not None), default=(None, ""))
    measured = facts.trial.peak_rss_mib if facts.trial else None
    need = measured or manifest.device.peak_rss_mib
    needs = "how much the bundle takes is not known"
    if need:
        by = "measured here" if measured else "as its manifest says"
        needs = f"the bundle takes {need:.0f} MiB ({by})"
    if room is None:
        return _ok(name, f"unknown; {needs}")
    found = f"{room:.0f} MiB {what}; {needs}"
    if need and need > room:
        if measured:  # it was answered all the same, from swap or from what others gave back
            return _warning(name, found, MORE_ROOM)
        return _problem(name, found, MORE_ROOM, ResourceError.exit_code)
    return _ok(name, found)


def _disk(facts: Facts, manifest: Manifest) -> Check:
    name = "disk"
    if facts.read_only:
        return _ok(name, "read-only, which is fine")
    if facts.disk_free_mib is None:
        return _ok(name, "unknown")
    size_mib = sum(entry.size for entry in manifest.files.values()) / 2**20
    found = f"{facts.disk_free_mib} MiB free beside the bundle, which has {size_mib:.1f} MiB"
    if facts.disk_free_mib < size_mib:
        return _warning(name, found, "free some: an update is written beside what it replaces")
    return _ok(name, found)


def _threads(facts: Facts, manifest: Manifest) -> Check:
    name, settings, limits = "threads", manifest.session, facts.limits
    if limits.cores is None:
        return _ok(name, f"{settings.intra_op_threads}; how many cores may be used is unknown")
    cores = min(float(limits.cores), limits.core_quota or float("inf"))
    found = f"{settings.intra_op_threads} on {cores:.3g} cores"
    # one thread is the caller's own, which takes what it is given
    if settings.intra_op_threads > max(1.0, cores):
        if settings.allow_spinning:
            found += ", which they keep busy waiting for one another"
        cure = f"EdgeModel.load(bundle, threads={max(1, int(cores))}), or export with fewer"
        return _warning(name, found, cure)
    return _ok(name, found)


def _graph(facts: Facts, manifest: Manifest) -> Check | None:
    name, trial, needs = "graph", facts.trial, manifest.compatibility
    if trial is None:
        return None
    stamp = f"opset {needs.opset}, IR {needs.ir_version}"
    if not trial.error or trial.stage not in {"import", "load"}:
        return _ok(name, f"{stamp}: loads")
    if trial.exit_code == ConfigError.exit_code and "onnxruntime" in trial.error:
        cure = "install an onnxruntime that can (pip install --upgrade onnxruntime), or export anew"
    elif trial.exit_code == ConfigError.exit_code and trial.stage == "load":
        cure = "install that anew"
    else:
        cure = {
            IntegrityError.exit_code: "copy the bundle again, or export it again",
            ResourceError.exit_code: MORE_ROOM,
        }.get(trial.exit_code, "pip install --force-reinstall onnxruntime numpy")
    did = "onnxruntime cannot be imported" if trial.stage == "import" else f"{stamp}: does not load"
    return _problem(name, f"{did}: {trial.error}", cure, trial.exit_code)


def _provider(facts: Facts, manifest: Manifest) -> Check | None:
    name, trial = "provider", facts.trial
    if trial is None or trial.stage in {"import", "load"}:
        return None
    first = manifest.session.execution_providers[0]
    if first not in trial.available:
        found = f"{first} is not in this onnxruntime, which has {', '.join(trial.available)}"
        return _warning(name, found, "install the onnxruntime package that has it")
    if not trial.nodes:
        return _ok(name, f"{first} is there; which nodes it takes is unknown")
    total = sum(sum(ops.values()) for ops in trial.nodes.values())
    as_what = "assigned, before fusing" if trial.nodes_are == "assigned" else "run, after fusing"
    of_first, of_cpu = trial.nodes.get(first, {}), trial.nodes.get(_CPU, {})
    if not of_first:
        return _warning(
            name,
            f"{first} took none of the {total} nodes ({as_what})",
            "its driver or libraries may be missing, or it lacks these types: onnxruntime's log"
            " says; else name another provider first",
        )
    taken = f"{first} took {sum(of_first.values())} of {total} nodes ({as_what})"
    if first != _CPU and of_cpu:
        found = f"{taken}; {sum(of_cpu.values())} fell back to the CPU: {_listed(of_cpu)}"
        return _warning(
            name, found, "fine where they are few; each change of provider costs a copy"
        )
    return _ok(name, f"{taken}: {_listed(of_first)}")


def _goldens(facts: Facts, manifest: Manifest) -> Check | None:
    name, trial, goldens, made_for = "goldens", facts.trial, manifest.goldens, manifest.device
    if trial is None or trial.stage in {"import", "load"}:
        return None
    if trial.exit_code == IntegrityError.exit_code:
        cure = "do not use it here: export it again, for a profile of this device"
        if made_for.arch != facts.arch or facts.int8 not in {None, made_for.int8}:
            cure += f" (it was made for {made_for.arch} with {made_for.int8} int8)"
        return _problem(name, trial.error, cure, trial.exit_code)
    if trial.error:
        cure = "run it again; if it stays so, install another onnxruntime"
        short = trial.exit_code == ResourceError.exit_code
        return _problem(name, trial.error, MORE_ROOM if short else cure, trial.exit_code)
    if trial.difference is not None:
        return _ok(
            name,
            f"{goldens.count} answered as stored: largest difference {trial.difference:.2g},"
            f" allowed {goldens.tolerance:.2g}",
        )
    return _ok(name, "not replayed" if goldens.count else "the bundle has none")


DEVICE_RULES: tuple[Callable[[Facts], Check], ...] = (
    _software, _clock, _governor, _heat, _files, _permissions,
)  # fmt: skip
BUNDLE_RULES: tuple[Callable[[Facts, Manifest], Check | None], ...] = (
    _onnxruntime, _extras, _processor, _int8, _memory, _disk, _threads, _graph, _provider, _goldens,
)  # fmt: skip


def _ok(name: str, found: str) -> Check:
    return Check(name=name, status="ok", found=found)


def _warning(name: str, found: str, cure: str) -> Check:
    return Check(name=name, status="warning", found=found, cure=cure)


def _problem(name: str, found: str, cure: str, exit_code: int) -> Check:
    return Check(name=name, status="problem", found=found, cure=cure, exit_code=exit_code)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _some(names: tuple[str, ...] | list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _listed(ops: Mapping[str, int]) -> str:
    return _some([f"{count} {op}" for op, count in sorted(ops.items(), key=lambda i: -i[1])])
