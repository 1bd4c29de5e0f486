"""`edgetune-rt doctor`: rules on facts by hand, the collectors here, the command on bundles."""

import dataclasses
import json
import platform
import re
import sys
from datetime import UTC, datetime

import numpy as np
import onnx
import pytest
from tiny_bundles import base_manifest, write_goldens

from edgetune import __version__
from edgetune.runtime.doctor.facts import Facts, collect_facts, machine_name
from edgetune.runtime.doctor.limits import Limits, read_limits
from edgetune.runtime.doctor.rules import Check, diagnose, examine, worst
from edgetune.runtime.doctor.trial import Trial, _cause, _count_events, _ran, try_bundle
from edgetune.runtime.manifest import Compatibility, DeviceClass, FileEntry, SessionSettings
from edgetune.runtime.measure import Machine
from edgetune.runtime.model import EdgeModel
from edgetune.runtime.ort import onnxruntime
from edgetune.runtime.packing import pack

CPU, GPU = "CPUExecutionProvider", "CUDAExecutionProvider"
MACHINE = Machine(
    cpu_model="Board",
    cpu_features=("asimd", "asimddp"),
    cores=4,
    system="Linux",
    python="3.11.7",
    onnxruntime="1.20.1",
)
TRIAL = Trial(
    stage="done",
    onnxruntime="1.20.1",
    available=(CPU,),
    nodes={CPU: {"Conv": 3, "Add": 1}},
    difference=0.25,
    peak_rss_mib=80.0,
)
FACTS = Facts(
    bundle="here/bundle",
    edgetune="0.1.0",
    arch="aarch64",
    machine=MACHINE,
    int8="exact",
    onnxruntime="1.20.1",
    packages=("tokenizers", "pillow"),
    memory_total_mib=1000,
    memory_available_mib=500,
    limits=Limits(cores=4),
    disk_free_mib=100,
    read_only=False,
    open_to_all=(),
    clock_s=datetime(2026, 11, 22, tzinfo=UTC).timestamp(),
    installed_s=datetime(2026, 11, 1, tzinfo=UTC).timestamp(),
    cpufreq_driver=None,
    firmware_flags=None,
    trial=TRIAL,
)
MANIFEST = dataclasses.replace(
    base_manifest(),
    task="image-classification",
    precision="int8",
    compatibility=Compatibility(
        onnxruntime_min="1.17.0", onnxruntime_excluded=("1.21.0",), opset=18, ir_version=8
    ),
    device=DeviceClass(arch="aarch64", cpu_features=("asimd",), int8="exact", peak_rss_mib=90.0),
    files={"weights.bin": FileEntry(size=50 * 2**20, sha256="0" * 64)},
)


def facts(**changes):
    """FACTS, changed; `machine`, `limits` and `trial` by their own keys."""
    for key, base in (("machine", MACHINE), ("limits", FACTS.limits), ("trial", TRIAL)):
        if isinstance(changes.get(key), dict):
            changes[key] = dataclasses.replace(base, **changes[key])
    return dataclasses.replace(FACTS, **changes)


def manifest(**changes):
    """MANIFEST, changed; `device` and `session` by their own keys."""
    for key, base in (("device", MANIFEST.device), ("session", MANIFEST.session)):
        if isinstance(changes.get(key), dict):
            changes[key] = dataclasses.replace(base, **changes[key])
    return dataclasses.replace(MANIFEST, **changes)


def by_name(checks):
    assert len({c.name for c in checks}) == len(checks)
    return {check.name: check for check in checks}


# -- the rules ----------------------------------------------------------------------------------

OK = [
    ({}, {}, "software", "edgetune 0.1.0, Python 3.11.7, Linux"),
    ({}, {}, "clock", "2026-11-22 00:00 UTC"),
    ({"installed_s": None}, {}, "clock", "2026-11-22 00:00 UTC"),
    ({}, {}, "governor", "unknown"),
    (
        {"machine": {"governor": "ondemand", "cpu_mhz": 600.0, "cpu_max_mhz": 1800.0}},
        {},
        "governor",
        "ondemand, now 600 of 1800 MHz",
    ),
    # Intel's own powersave follows the load
    (
        {"machine": {"governor": "powersave"}, "cpufreq_driver": "intel_pstate"},
        {},
        "governor",
        "powersave",
    ),
    ({}, {}, "heat", "unknown"),
    ({"machine": {"temperature_c": 79.9, "throttled": False}}, {}, "heat", "80 C"),
    ({"firmware_flags": 0}, {}, "heat", "unknown"),
    ({}, {}, "permissions", "not every user may write to it"),
    ({"open_to_all": None}, {}, "permissions", "unknown"),
    ({}, {}, "onnxruntime", "1.20.1; the bundle needs 1.17.0 or newer"),
    ({"onnxruntime": "1.100"}, {}, "onnxruntime", "1.100; the bundle needs 1.17.0 or newer"),
    ({}, {}, "processor", "Board, aarch64"),
    ({"machine": {"cpu_features": ()}}, {}, "processor", "Board, aarch64; features unknown"),
    ({}, {}, "int8", "exact, as the bundle was made for"),
    ({"int8": None}, {}, "int8", "unknown"),
    ({"int8": "saturates"}, {"precision": "fp32"}, "int8", "of no matter: the bundle is fp32"),
    ({}, {}, "memory", "500 MiB available; the bundle takes 80 MiB (measured here)"),
    (
        {"trial": None},
        {},
        "memory",
        "500 MiB available; the bundle takes 90 MiB (as its manifest says)",
    ),
    (
        {"memory_available_mib": None, "trial": None},
        {"device": {"peak_rss_mib": None}},
        "memory",
        "unknown; how much the bundle takes is not known",
    ),
    # the smallest room counts
    (
        {"limits": {"memory_free_mib": 200.4, "address_space_mib": 4000.0}},
        {},
        "memory",
        "200 MiB left to the control group; the bundle takes 80 MiB (measured here)",
    ),
    ({}, {}, "disk", "100 MiB free beside the bundle, which has 50.0 MiB"),
    ({"disk_free_mib": None}, {}, "disk", "unknown"),
    ({"disk_free_mib": 0, "read_only": True}, {}, "disk", "read-only, which is fine"),
    ({}, {"session": {"intra_op_threads": 4}}, "threads", "4 on 4 cores"),
    ({"limits": {"core_quota": 0.5}}, {}, "threads", "1 on 0.5 cores"),
    (
        {"limits": {"cores": None}},
        {},
        "threads",
        "1; how many cores may be used is unknown",
    ),
    ({}, {}, "graph", "opset 18, IR 8: loads"),
    (
        {},
        {},
        "provider",
        f"{CPU} took 4 of 4 nodes (assigned, before fusing): 3 Conv, 1 Add",
    ),
    (
        {"trial": {"nodes": {}}},
        {},
        "provider",
        f"{CPU} is there; which nodes it takes is unknown",
    ),
    (
        {"trial": {"nodes_are": "run", "nodes": {CPU: dict.fromkeys("abcdef", 1)}}},
        {},
        "provider",
        f"{CPU} took 6 of 6 nodes (run, after fusing): 1 a, 1 b, 1 c, 1 d and 2 more",
    ),
    ({}, {}, "goldens", "2 answered as stored: largest difference 0.25, allowed 0.001"),
    ({"trial": {"difference": None}}, {}, "goldens", "not replayed"),
]


@pytest.mark.parametrize(("found", "asked", "name", "text"), OK)
def test_what_is_well_or_unknown_is_ok(found, asked, name, text):
    check = by_name(diagnose(facts(**found), manifest(**asked)))[name]
    assert check == Check(name=name, status="ok", found=text)


WARNINGS = [
    ({"clock_s": 0.0}, {}, "clock", "1970-01-01 00:00 UTC: long before", "set the clock"),
    (
        {"clock_s": datetime(2026, 10, 1, tzinfo=UTC).timestamp()},
        {},
        "clock",
        "2026-10-01 00:00 UTC: before edgetune was installed (2026-11-01 00:00 UTC)",
        "timedatectl",
    ),
    ({"machine": {"governor": "powersave"}}, {}, "governor", "powersave", "schedutil"),
    (
        {"machine": {"governor": "performance, powersave"}, "cpufreq_driver": "cpufreq-dt"},
        {},
        "governor",
        "performance, powersave",
        "lowest frequency",
    ),
    ({"machine": {"temperature_c": 80.0}}, {}, "heat", "80 C", "cooling"),
    ({"machine": {"throttled": True}}, {}, "heat", "the clock is held down", "cooling"),
    # 0x50000: bits 16 and 18
    (
        {"firmware_flags": 0x50000},
        {},
        "heat",
        "under-voltage since boot, throttled since boot",
        "power supply",
    ),
    ({"firmware_flags": 0x8}, {}, "heat", "too warm now", "cooling"),
    (
        {"open_to_all": ("bundle", "weights.bin")},
        {},
        "permissions",
        "every user of this machine may write to bundle, weights.bin",
        "chmod -R o-w here/bundle",
    ),
    (
        {"packages": ("tokenizers",)},
        {},
        "extras",
        "pillow is not installed: arrays can be answered, image files can't",
        "pip install 'edgetune[image]'",
    ),
    (
        {"arch": "x86_64"},
        {},
        "processor",
        "Board, x86_64; the bundle was made for aarch64",
        "export",
    ),
    (
        {},
        {"device": {"cpu_features": ("asimd", "asimddp", "i8mm", "sve")}},
        "processor",
        "Board, aarch64; lacks i8mm, sve, which the bundle was made for",
        "slower",
    ),
    (
        {"int8": "saturates"},
        {},
        "int8",
        "this CPU's sum of u8 x s8 products saturates in int16, that of the CPU that the bundle was"
        " made for is exact: answers may differ",
        "the goldens decide",
    ),
    # it answered all the same
    ({"memory_available_mib": 70}, {}, "memory", "70 MiB available; the bundle takes 80", "stop"),
    ({"disk_free_mib": 49}, {}, "disk", "49 MiB free beside the bundle", "free some"),
    ({}, {"session": {"intra_op_threads": 5}}, "threads", "5 on 4 cores", "threads=4"),
    (
        {"limits": {"core_quota": 1.5}},
        {"session": {"intra_op_threads": 2, "allow_spinning": True}},
        "threads",
        "2 on 1.5 cores, which they keep busy waiting for one another",
        "threads=1",
    ),
    (
        {},
        {"session": {"execution_providers": (GPU, CPU)}},
        "provider",
        f"{GPU} is not in this onnxruntime, which has {CPU}",
        "install the onnxruntime package that has it",
    ),
    (
        {"trial": {"available": (GPU, CPU)}},
        {"session": {"execution_providers": (GPU, CPU)}},
        "provider",
        f"{GPU} took none of the 4 nodes",
        "driver",
    ),
    (
        {"trial": {"available": (GPU, CPU), "nodes": {GPU: {"Conv": 9}, CPU: {"Shape": 2}}}},
        {"session": {"execution_providers": (GPU, CPU)}},
        "provider",
        f"{GPU} took 9 of 11 nodes (assigned, before fusing); 2 fell back to the CPU: 2 Shape",
        "copy",
    ),
]


@pytest.mark.parametrize(("found", "asked", "name", "text", "cure"), WARNINGS)
def test_what_may_hurt_is_a_warning_with_a_cure(found, asked, name, text, cure):
    checks = diagnose(facts(**found), manifest(**asked))
    check = by_name(checks)[name]
    assert (check.status, check.exit_code) == ("warning", 0)
    assert check.found.startswith(text)
    assert cure in check.cure
    assert worst(checks) == 0


TEXT = {"tokenizer.json": FileEntry(size=1, sha256="0" * 64)}
MISS = "golden 1: a logit is 0.5 from the stored one, allowed 0.001; this device does not answer"
PROBLEMS = [
    ({"fault": "x: damaged", "fault_code": 6, "trial": None}, {}, "files", 6, "copy the bundle"),
    ({"fault": "x: denied", "fault_code": 4, "trial": None}, {}, "files", 4, "this user"),
    ({"onnxruntime": None}, {}, "onnxruntime", 2, "pip install 'onnxruntime>=1.17.0'"),
    ({"onnxruntime": "1.16.3"}, {}, "onnxruntime", 2, "pip install --upgrade"),
    ({"onnxruntime": "1.9"}, {}, "onnxruntime", 2, "pip install --upgrade"),
    ({"onnxruntime": "1.21.0"}, {}, "onnxruntime", 2, "'onnxruntime>=1.17.0,!=1.21.0'"),
    ({"packages": ("pillow",)}, {"files": TEXT}, "extras", 2, "pip install 'edgetune[text]'"),
    ({"memory_available_mib": 89, "trial": None}, {}, "memory", 4, "smaller model"),
    (
        {"limits": {"address_space_mib": 64.0}, "trial": None},
        {},
        "memory",
        4,
        "raise the limit",
    ),
    ({"trial": {"stage": "load", "error": "no", "exit_code": 6}}, {}, "graph", 6, "copy"),
    (
        {"trial": {"stage": "load", "error": "onnxruntime is old", "exit_code": 2}},
        {},
        "graph",
        2,
        "pip install --upgrade onnxruntime",
    ),
    ({"trial": {"stage": "import", "error": "no", "exit_code": 1}}, {}, "graph", 1, "numpy"),
    ({"trial": {"stage": "load", "error": "died", "exit_code": 4}}, {}, "graph", 4, "smaller"),
    ({"trial": {"stage": "goldens", "error": MISS, "exit_code": 6}}, {}, "goldens", 6, "export"),
    ({"trial": {"stage": "goldens", "error": "died", "exit_code": 4}}, {}, "goldens", 4, "smaller"),
]


@pytest.mark.parametrize(("found", "asked", "name", "code", "cure"), PROBLEMS)
def test_what_stands_in_the_way_is_a_problem_with_an_exit_code(found, asked, name, code, cure):
    checks = diagnose(facts(**found), manifest(**asked))
    check = by_name(checks)[name]
    assert (check.status, check.exit_code) == ("problem", code)
    assert cure in check.cure
    assert worst(checks) == code


def test_all_is_well_with_the_facts_that_the_tables_change():
    checks = diagnose(FACTS, MANIFEST)
    assert {check.status for check in checks} == {"ok"}
    assert len(checks) == 16
    assert worst(checks) == 0


def test_a_missed_golden_on_another_class_of_cpu_says_what_the_bundle_was_made_for():
    found = facts(int8="saturates", trial={"stage": "goldens", "error": MISS, "exit_code": 6})
    check = by_name(diagnose(found, MANIFEST))["goldens"]
    assert check.found == MISS
    assert "made for aarch64 with exact int8" in check.cure


def test_a_bundle_that_cannot_be_opened_leaves_the_checks_of_the_device():
    found = facts(fault="no bundle", fault_code=6, trial=None)
    names = [check.name for check in diagnose(found, None)]
    assert names == ["software", "clock", "governor", "heat", "files", "permissions"]


def test_a_damaged_bundle_is_not_tried():
    found = facts(fault="weights.bin: damaged", fault_code=6, trial=None)
    checks = by_name(diagnose(found, MANIFEST))
    assert not {"graph", "provider", "goldens"} & set(checks)
    assert {"onnxruntime", "memory"} <= set(checks)


@pytest.mark.parametrize(
    "changes",
    [{"onnxruntime": "1.21.0"}, {"onnxruntime": None}, {"packages": ()}],
)
def test_a_graph_that_fails_for_a_cause_named_before_is_not_named_again(changes):
    failed = {"stage": "load", "error": "no", "exit_code": 2}
    checks = by_name(diagnose(facts(trial=failed, **changes), manifest(files=TEXT)))
    assert "graph" not in checks
    assert worst(tuple(checks.values())) == 2


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((), 0), ((4, 2, 6), 6), ((4, 2), 2), ((1, 4), 4), ((1,), 1), ((3, 2), 2)],
)
def test_the_worst_problem_decides_the_exit_code(codes, expected):
    checks = [Check(name=str(c), status="problem", found="", exit_code=c) for c in codes]
    checks.append(Check(name="w", status="warning", found=""))
    assert worst(tuple(checks)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("AMD64", "x86_64"), ("arm64", "aarch64"), ("aarch64", "aarch64"), ("riscv64", "riscv64")],
)
def test_machines_are_named_as_linux_names_them(name, expected):
    assert machine_name(name) == expected


# -- limits: trees as Linux has them --------------------------------------------------------------

MIB = 2**20


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_version_2_counts_the_tightest_group_and_takes_cache_for_free(tmp_path):
    group = "sys/fs/cgroup/system.slice"
    limits = read_limits(
        tree(
            tmp_path,
            {
                "proc/self/cgroup": "0::/system.slice/edge.service",
                f"{group}/memory.max": 300 * MIB,
                f"{group}/memory.high": 250 * MIB,
                f"{group}/memory.current": 230 * MIB,
                f"{group}/memory.stat": f"anon 1\ninactive_file {30 * MIB}",
                f"{group}/edge.service/memory.max": "max",
                f"{group}/edge.service/memory.current": 10 * MIB,
                f"{group}/edge.service/cpu.max": "50000 100000",
                f"{group}/cpu.max": "max 100000",
            },
        )
    )
    assert limits.memory_mib == 250
    assert limits.memory_free_mib == 250 - (230 - 30)
    assert limits.core_quota == 0.5


def test_version_2_in_a_container_lies_at_the_mount(tmp_path):
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": 512 * MIB,
        "sys/fs/cgroup/memory.current": 500 * MIB,
        "sys/fs/cgroup/cpu.max": "150000 100000",
    }
    limits = read_limits(tree(tmp_path, files))
    assert (limits.memory_mib, limits.memory_free_mib, limits.core_quota) == (512, 12, 1.5)


def test_version_1_in_a_container_that_sees_the_path_of_its_host(tmp_path):
    memory, cpu = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu,cpuacct"
    files = {
        "proc/self/cgroup": "4:memory:/docker/0123\n2:cpu,cpuacct:/docker/0123\n1:name=systemd:/",
        f"{memory}/memory.limit_in_bytes": 256 * MIB,
        f"{memory}/memory.usage_in_bytes": 56 * MIB,
        f"{memory}/memory.stat": f"inactive_file 7\ntotal_inactive_file {6 * MIB}",
        f"{cpu}/cpu.cfs_quota_us": 200000,
        f"{cpu}/cpu.cfs_period_us": 100000,
    }
    limits = read_limits(tree(tmp_path, files))
    assert (limits.memory_mib, limits.memory_free_mib, limits.core_quota) == (256, 206, 2.0)


def test_no_limit_is_none_in_both_versions(tmp_path):
    memory, cpu = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu"
    files = {
        "proc/self/cgroup": "3:memory:/\n2:cpu:/\n0::/",
        f"{memory}/memory.limit_in_bytes": 9223372036854771712,
        f"{memory}/memory.usage_in_bytes": MIB,
        f"{cpu}/cpu.cfs_quota_us": -1,
        f"{cpu}/cpu.cfs_period_us": 100000,
        "sys/fs/cgroup/unified/memory.max": "max",
        "sys/fs/cgroup/unified/cpu.max": "max 100000",
    }
    limits = read_limits(tree(tmp_path, files))
    assert (limits.memory_mib, limits.memory_free_mib, limits.core_quota) == (None, None, None)


@pytest.mark.parametrize("text", ["", "what\nis:this", "0::/../../etc", "4:memory:/a\n0::/b"])
def test_a_system_without_these_files_limits_nothing(tmp_path, text):
    limits = read_limits(tree(tmp_path, {"proc/self/cgroup": text}))
    assert (limits.memory_mib, limits.memory_free_mib, limits.core_quota) == (None, None, None)
    assert limits.cores is None or limits.cores >= 1


def test_rlimit_as_is_the_address_space(python):
    code = (
        "import resource; from edgetune.runtime.doctor.limits import read_limits;"
        "resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, -1));"
        "print(read_limits().address_space_mib, resource.getrlimit(resource.RLIMIT_AS)[0])"
    )
    if sys.platform != "linux":
        pytest.skip("this system has no such limit, or does not keep it")
    found, kept = python("-c", code).stdout.split()
    if kept == b"-1":
        pytest.skip("this system keeps no such limit, as QEMU's user emulation does not")
    assert found == b"3072.0"


# -- the trial ------------------------------------------------------------------------------------


def test_a_trial_counts_the_nodes_of_the_graph_and_replays_the_goldens(word_bundle):
    trial = try_bundle(word_bundle)
    assert (trial.stage, trial.error, trial.difference) == ("done", "", 0.0)
    # as tiny_bundles writes the graph
    ops = {"Gather": 1, "Cast": 1, "Unsqueeze": 1, "Mul": 1, "ReduceSum": 1}
    assert trial.nodes == {CPU: ops}
    assert CPU in trial.available
    if sys.platform == "linux":
        assert 20 < trial.peak_rss_mib < 500


def test_an_onnxruntime_that_does_not_tell_is_profiled(color_bundle):
    # nothing in this graph fuses
    with EdgeModel.load(color_bundle) as model:
        assert _ran(model) == {CPU: {"Cast": 1, "ReduceMean": 1, "MatMul": 1}}


def test_of_a_profile_the_kernels_are_counted():
    # as onnxruntime 1.17 writes it
    events = [
        {"cat": "Session", "name": "model_run", "args": {}},
        {"cat": "Node", "name": "a_fence_before", "args": {"op_name": "Conv"}},
        {"cat": "Node", "name": "a", "args": {"op_name": "Conv", "provider": GPU}},
        {"cat": "Node", "name": "b", "args": {"op_name": "Conv", "provider": GPU}},
        {"cat": "Node", "name": "c", "args": {"op_name": "Shape", "provider": CPU}},
    ]
    assert _count_events(events) == {GPU: {"Conv": 2}, CPU: {"Shape": 1}}


def test_a_trial_that_takes_too_long_is_stopped(color_bundle):
    trial = try_bundle(color_bundle, limit_s=0.001)
    assert (trial.error, trial.exit_code) == ("no answer within 0.001 s", 4)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_what_a_process_died_of_is_the_last_that_it_said():
    assert _cause(3, " \n") == ("ended with exit code 3", 1)
    died = "the process died of Aborted: what(): std::bad_alloc"
    assert _cause(-6, "terminate called\n  what(): std::bad_alloc\nbacktrace\n") == (died, 1)
    assert _cause(1, "Traceback\n  File\nAttributeError: x\n") == ("AttributeError: x", 1)


def test_who_asks_imports_neither_onnxruntime_nor_numpy(python):
    code = (
        "import sys, edgetune.runtime.doctor;"
        "print(*{'onnxruntime', 'numpy', 'click'} & set(sys.modules))"
    )
    done = python("-c", code)
    assert (done.stdout.strip(), done.stderr) == (b"", b"")


# -- the command ----------------------------------------------------------------------------------


def lines(done):
    """Return name -> (status, text) of what the command printed, and its last line."""
    assert done.stderr == b""
    *rows, last = done.stdout.decode().splitlines()
    assert all(len(row) <= 100 or " " not in row[22:].strip() for row in rows)
    found, name = {}, ""
    for row in rows:
        if row[0] != " ":
            status, name, text = re.split(r"\s{2,}", row, maxsplit=2)
            found[name] = (status, text)
        else:
            found[name] = (found[name][0], f"{found[name][1]} {row.strip()}")
    return found, last


def statuses(found):
    return {name: status for name, (status, _) in found.items()}


def test_a_good_bundle_exits_with_0(rt, color_bundle):
    done = rt("doctor", color_bundle)
    found, last = lines(done)
    assert done.returncode == 0, done.stdout.decode()
    assert last.startswith("this device can run the bundle")
    assert "problem" not in statuses(found).values()
    assert found["software"][1].startswith(f"edgetune {__version__}, Python ")
    assert found["files"] == ("ok", "all match their SHA-256")
    assert found["graph"] == ("ok", "opset 17, IR 8: loads")
    assert found["goldens"] == (
        "ok",
        "2 answered as stored: largest difference 0, allowed 0.001",
    )
    assert f"{CPU} took 3 of 3 nodes" in found["provider"][1]


def test_damaged_weights_exit_with_6_and_are_not_loaded(rt, color_bundle):
    weights = bytearray((color_bundle / "weights.bin").read_bytes())
    weights[0] ^= 1
    (color_bundle / "weights.bin").write_bytes(weights)
    done = rt("doctor", color_bundle)
    found, last = lines(done)
    assert done.returncode == 6
    assert last.startswith("this device cannot run the bundle: 1 problem")
    assert found["files"][0] == "problem"
    assert "weights.bin: expected SHA-256" in found["files"][1]
    assert "-> copy the bundle again" in found["files"][1]
    assert "graph" not in found
    assert found["onnxruntime"][0] == "ok"


def test_an_onnxruntime_that_is_too_old_exits_with_2(rt, color_bundle, seal):
    seal(
        color_bundle,
        compatibility=Compatibility(onnxruntime_min="99.1.0", opset=17, ir_version=8),
    )
    done = rt("doctor", color_bundle)
    found, _ = lines(done)
    assert done.returncode == 2
    assert found["onnxruntime"][0] == "problem"
    assert "the bundle needs 99.1.0 or newer" in found["onnxruntime"][1]
    assert "graph" not in found


def test_wrong_goldens_exit_with_6(rt, color_bundle, seal):
    write_goldens(color_bundle, [np.full((2, 2, 3), 5, np.uint8)] * 2, [[5, 5, 5], [5, 5, 7]])
    seal(color_bundle)
    done = rt("doctor", color_bundle)
    found, _ = lines(done)
    assert done.returncode == 6
    assert found["graph"][0] == "ok"
    assert found["goldens"][0] == "problem"
    assert "golden 1: a logit is 2 from the stored one" in found["goldens"][1]
    assert "export it again, for a profile of this device" in found["goldens"][1]


def test_another_architecture_is_a_warning_where_the_goldens_agree(color_bundle, seal):
    foreign = "aarch64" if machine_name(platform.machine()) == "x86_64" else "x86_64"
    seal(color_bundle, device=DeviceClass(arch=foreign, cpu_features=(), int8="exact"))
    diagnosis = examine(color_bundle)
    checks = by_name(diagnosis.checks)
    assert diagnosis.exit_code == 0
    assert checks["processor"].status == "warning"
    assert f"made for {foreign}" in checks["processor"].found
    assert checks["goldens"].status == "ok"


def test_json_is_one_object_of_facts_and_checks(rt, word_bundle):
    done = rt("doctor", word_bundle, "--json", "--no-goldens")
    found = json.loads(done.stdout)
    assert done.stderr == b""
    assert done.returncode == found["exit_code"] == 0
    assert set(found) == {"exit_code", "facts", "checks"}
    assert found["facts"]["trial"]["stage"] == "done"
    assert found["facts"]["machine"]["python"] == platform.python_version()
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["goldens"]["found"] == "not replayed"
    assert set(checks["goldens"]) == {"name", "status", "found", "cure", "exit_code"}


def test_what_is_not_there_exits_with_2_and_the_device_is_still_looked_at(rt, tmp_path):
    done = rt("doctor", tmp_path / "absent")
    found, _ = lines(done)
    assert done.returncode == 2
    assert statuses(found)["files"] == "problem"
    assert {"software", "clock", "governor", "heat"} <= set(found)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
@pytest.mark.parametrize(
    ("signal", "code", "text"),
    [("SIGILL", 2, "built for another CPU"), ("SIGKILL", 4, "memory ran out")],
)
def test_an_onnxruntime_that_ends_the_process_is_a_problem_and_no_end(
    rt, color_bundle, tmp_path, signal, code, text
):
    package = tmp_path / "site" / "onnxruntime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        f'__version__ = "1.20.9"\nimport os, signal\nos.kill(os.getpid(), signal.{signal})\n'
    )
    done = rt("doctor", color_bundle, env={"PYTHONPATH": str(package.parent)})
    found, _ = lines(done)
    assert done.returncode == code
    # its version is read without importing it
    assert found["onnxruntime"] == ("ok", "1.20.9; the bundle needs 1.17.0 or newer")
    assert found["graph"][0] == "problem"
    assert text in found["graph"][1]
    assert found["files"][0] == "ok"


def test_a_graph_of_a_newer_opset_wants_another_onnxruntime(color_bundle, seal):
    graph = onnx.load(color_bundle / "model.onnx", load_external_data=False)
    graph.opset_import[0].version = 99
    (color_bundle / "model.onnx").write_bytes(graph.SerializeToString())
    seal(color_bundle)
    diagnosis = examine(color_bundle)
    check = by_name(diagnosis.checks)["graph"]
    assert diagnosis.exit_code == 2, check
    assert "pip install --upgrade onnxruntime" in check.cure


def test_a_zip_is_looked_at_as_a_folder_is(color_bundle, tmp_path):
    pack(color_bundle, tmp_path / "colors.zip")
    diagnosis = examine(tmp_path / "colors.zip")
    checks = by_name(diagnosis.checks)
    assert diagnosis.exit_code == 0
    assert checks["goldens"].found.startswith("2 answered as stored")
    assert checks["provider"].found.startswith(f"{CPU} took 3 of 3 nodes")


def test_a_provider_that_takes_no_node_is_a_warning(color_bundle, seal):
    # onnxruntime's wheels for Linux have Azure's, which takes nothing of ours
    azure = "AzureExecutionProvider"
    if azure not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has one provider")
    seal(color_bundle, session=SessionSettings(execution_providers=(azure, CPU)))
    check = by_name(examine(color_bundle, goldens=False).checks)["provider"]
    assert check.status == "warning"
    assert check.found.startswith(f"{azure} took none of the 3 nodes")


@pytest.mark.skipif(sys.platform == "win32", reason="modes there are not these")
def test_a_bundle_that_every_user_may_write_to_is_named(color_bundle):
    (color_bundle / "weights.bin").chmod(0o666)
    color_bundle.chmod(0o777)
    assert collect_facts(color_bundle, goldens=False).open_to_all == ("colors", "weights.bin")


def test_the_facts_of_this_machine_are_sane(color_bundle):
    found = collect_facts(color_bundle, goldens=False)
    assert found.arch == machine_name(platform.machine())
    assert found.edgetune == __version__
    assert set(found.packages) == {"tokenizers", "pillow"}
    assert found.installed_s is not None
    assert 2**30 < found.installed_s <= found.clock_s + 86400
    assert found.disk_free_mib is None or found.disk_free_mib > 0
    assert found.trial is not None
    assert found.onnxruntime == found.trial.onnxruntime == found.machine.onnxruntime
    if found.memory_available_mib is not None:
        assert 0 < found.memory_available_mib <= found.memory_total_mib
