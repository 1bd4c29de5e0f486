import dataclasses
import importlib.metadata
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from edgetune.bench import doctor
from edgetune.bench.doctor import (
    Facts,
    ImportResult,
    Requirement,
    diagnose,
    int8_meaning,
    meets,
    parse_requirements,
    read_requirements,
    try_import,
)
from edgetune.cli import doctor as cli_doctor
from edgetune.errors import ConfigError
from edgetune.runtime.records import to_mapping

HEALTHY = Facts(
    edgetune="0.1.0",
    python="3.11.7",
    executable="/usr/bin/python3",
    system="Linux",
    machine="x86_64",
    pointer_bits=64,
    cpu_model="a CPU",
    cpu_features=("avx2", "fma", "avx512f", "avx512_vnni"),
    cores=4,
    int8="exact",
    memory_total_mib=8000,
    memory_available_mib=6000,
    disk_free_mib=20_000,
    packages={
        "click": "8.1.8",
        "numpy": "2.2.0",
        "onnxruntime": "1.22.0",
        "torch": "2.9.1",
        "torchvision": "0.24.1",
        "transformers": "5.1.0",
        "peft": "0.18.0",
    },
    requirements={
        "base": (
            Requirement(package="numpy", versions=">=1.26"),
            Requirement(package="onnxruntime", versions="!=1.21.0,>=1.17"),
        ),
        "image": (Requirement(package="pillow", versions=">=10.3"),),
        "train": (
            Requirement(package="torch", versions=">=2.9"),
            Requirement(package="torchvision", versions=">=0.24"),
        ),
    },
    environment={},
    gpus=(),
    imports={
        "onnxruntime": ImportResult(works=True, said="CPUExecutionProvider"),
        "torch": ImportResult(works=True, said="cpu"),
        "torchvision": ImportResult(works=True, said="cpu"),
    },
)
NMS = "RuntimeError: operator torchvision::nms does not exist"
PI_4 = {
    "machine": "aarch64",
    "cpu_model": "Raspberry Pi 4 Model B Rev 1.4",
    "cpu_features": ("asimd",),
}


def changed(packages=None, imports=None, **changes):
    """HEALTHY with `packages` and `imports` laid over its own (None removes one)."""
    merged = {**HEALTHY.packages, **(packages or {})}
    return dataclasses.replace(
        HEALTHY,
        packages={k: v for k, v in merged.items() if v is not None},
        imports={**HEALTHY.imports, **(imports or {})},
        **changes,
    )


def failed(said):
    return ImportResult(works=False, said=said)


def faults(facts):
    return {c.name: c.status for c in diagnose(facts).checks if c.status != "ok"}


def test_a_healthy_machine_meets_every_rule():
    assert faults(HEALTHY) == {}


def test_a_base_install_without_torch_meets_every_rule():
    gone = dict.fromkeys(["torch", "torchvision", "transformers", "peft"])
    facts = dataclasses.replace(
        changed(packages=gone), imports={"onnxruntime": HEALTHY.imports["onnxruntime"]}
    )
    assert faults(facts) == {}


@pytest.mark.parametrize(
    ("facts", "name", "status"),
    [
        (changed(pointer_bits=32, machine="aarch64"), "Python has 64 bits", "problem"),
        (changed(requirements={}), "edgetune is installed", "warning"),
        (changed(packages={"numpy": None}), "the base packages are there", "problem"),
        (changed(packages={"onnxruntime": "1.16.3", "numpy": "1.26.4"}),
         "the base packages are there", "problem"),
        (changed(imports={"onnxruntime": failed("died of Illegal instruction")}),
         "onnxruntime imports", "problem"),
        (changed(packages={"onnxruntime-gpu": "1.22.0"}), "there is one onnxruntime", "problem"),
        (changed(packages={"onnxruntime": None, "onnxruntime-training": "1.19.2"}),
         "no onnxruntime-training", "warning"),
        (changed(packages={"onnxruntime": "1.18.1"}), "numpy and onnxruntime fit", "problem"),
        (changed(packages={"torch": "2.4.0+cpu"}), "extras are new enough", "warning"),
        (changed(imports={"torch": failed("OSError: libcudart"), "torchvision": failed("OSError")}),
         "torch imports", "problem"),
        (changed(imports={"torchvision": failed(NMS)}),
         "torch and torchvision are of one build", "problem"),
        (changed(packages={"peft": "0.17.1"}), "transformers and peft fit", "problem"),
        (changed(gpus=("NVIDIA L4, 23034 MiB, 570.1",)), "torch sees the GPU", "warning"),
        (changed(environment={"PYTHONDONTWRITEBYTECODE": "1"}), "bytecode is cached", "warning"),
        (changed(environment={"ORT_DISABLE_TELEMETRY": "0"}),
         "onnxruntime's telemetry is off", "warning"),
        (changed(memory_available_mib=120), "memory is free", "warning"),
        (changed(disk_free_mib=100), "the disk has room", "warning"),
    ],
)  # fmt: skip
def test_each_fault_is_found_alone(facts, name, status):
    assert faults(facts) == {name: status}
    check = next(c for c in diagnose(facts).checks if c.name == name)
    assert check.found
    assert check.cure


def test_onnxruntime_1_21_0_is_a_problem_on_a_pi_4_and_excluded_everywhere():
    on_pi_4 = faults(changed(packages={"onnxruntime": "1.21.0"}, **PI_4))
    assert on_pi_4["onnxruntime suits the CPU"] == "problem"
    on_x86 = faults(changed(packages={"onnxruntime": "1.21.0"}))
    assert on_x86 == {"the base packages are there": "problem"}
    assert faults(changed(packages={"onnxruntime": "1.21.1"}, **PI_4)) == {}


@pytest.mark.parametrize(
    "facts",
    [
        changed(packages={"onnxruntime": "1.18.1", "numpy": "1.26.4"}),
        changed(packages={"peft": "0.17.1", "transformers": "4.57.0"}),
        changed(packages={"onnxruntime": None, "onnxruntime-gpu": "1.23.0"}),
        changed(environment={"ORT_DISABLE_TELEMETRY": "1"}),
        changed(environment={"PYTHONDONTWRITEBYTECODE": ""}),
        changed(
            gpus=("NVIDIA L4, 23034 MiB, 570.1",),
            imports={"torch": ImportResult(works=True, said="cuda")},
        ),
        changed(memory_total_mib=0, memory_available_mib=0),
    ],
)
def test_what_only_looks_like_a_fault_is_none(facts):
    assert faults(facts) == {}


def test_every_rule_is_broken_by_some_test_above():
    broken = {
        mark.args[1][i][1]
        for mark in test_each_fault_is_found_alone.pytestmark
        for i in range(len(mark.args[1]))
    }
    assert {rule.name for rule in doctor.RULES} - broken == {"onnxruntime suits the CPU"}


def test_an_extra_names_what_it_lacks():
    extras = {e.name: e.lacks for e in diagnose(changed(packages={"torch": "2.4.0"})).extras}
    assert extras == {"image": ("pillow",), "train": ("torch 2.4.0 (asks >=2.9)",)}


@pytest.mark.parametrize(
    ("version", "versions", "expected"),
    [
        ("1.17", ">=1.17,!=1.21.0", True),
        ("1.17.0", ">=1.17", True),
        ("1.9", ">=1.17", False),
        ("1.21.0", ">=1.17,!=1.21.0", False),
        ("1.21.1", ">=1.17,!=1.21.0", True),
        ("2.15.0+cpu", ">=2.9", True),
        ("2.0.0rc1", "<2", False),
        ("1.26.4", "<2", True),
        ("3.0", "==3", True),
        ("3.0", ">3", False),
        ("3.0", "<=3", True),
        ("0.1", "", True),
    ],
)
def test_versions_compare_by_their_release_numbers(version, versions, expected):
    assert meets(version, versions) is expected


def test_a_version_operator_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"got '~=1\.4'"):
        meets("1.4", "~=1.4")


def test_requirements_go_to_their_extras_and_extras_inherit():
    groups = parse_requirements(
        [
            "numpy>=1.26",
            "onnxruntime (!=1.21.0,>=1.17)",
            "pillow>=10.3; extra == 'image'",
            'edgetune[image]; extra == "train"',
            "torch>=2.9 ; extra == 'train'",
            "edgetune[train]; extra == 'dev'",
            "Import_Linter>=2.5; extra == 'dev'",
        ],
        ["image", "train", "dev"],
    )
    names = {name: [r.package for r in group] for name, group in groups.items()}
    assert names == {
        "base": ["numpy", "onnxruntime"],
        "image": ["pillow"],
        "train": ["pillow", "torch"],
        "dev": ["import-linter", "pillow", "torch"],
    }
    assert groups["base"][1].versions == "!=1.21.0,>=1.17"


def test_edgetunes_own_metadata_is_understood():
    groups = read_requirements()
    assert {"base", "image", "text", "train", "demo", "dev"} <= set(groups)
    assert {r.package for r in groups["base"]} == {"numpy", "onnxruntime", "click"}
    for group in groups.values():
        for requirement in group:
            meets("1.0", requirement.versions)  # every operator is known


@pytest.mark.parametrize(
    ("int8", "features", "expected"),
    [
        ("exact", ("avx2", "avx512_vnni"), "exact, with fast kernels (VNNI)"),
        ("saturates", ("avx2",), "saturates"),
        ("saturates", (), "no AVX2 either"),
        ("exact", ("asimd", "asimddp"), "dotprod"),
        ("exact", ("asimd", "asimddp", "i8mm"), "i8mm, dotprod"),
        ("exact", ("asimd",), "no dotprod"),
        (None, (), "unknown"),
    ],
)
def test_features_say_what_int8_does(int8, features, expected):
    assert expected in int8_meaning(changed(int8=int8, cpu_features=features))


def test_an_import_that_works_gives_its_line():
    assert try_import("print('cpu')") == ImportResult(works=True, said="cpu")


def test_an_import_that_raises_gives_its_last_line():
    result = try_import(f"raise RuntimeError({NMS.partition(': ')[2]!r})")
    assert result == ImportResult(works=False, said=NMS)


def test_an_import_that_crashes_takes_nothing_down():
    result = try_import("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert result == ImportResult(works=False, said="died of Illegal instruction")


def test_an_import_that_hangs_is_stopped():
    result = try_import("import time; time.sleep(60)", limit_s=0.5)
    assert result == ImportResult(works=False, said="no answer within 0.5 s")


def test_torch_is_asked_alone_only_where_torchvision_fails(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORT_ONNXRUNTIME", "print('CPUExecutionProvider')")
    monkeypatch.setattr(doctor, "IMPORT_TORCHVISION", "raise RuntimeError('no operator')")
    monkeypatch.setattr(doctor, "IMPORT_TORCH", "print('cpu')")
    facts = doctor.collect_facts()
    assert facts.packages["numpy"] == importlib.metadata.version("numpy")
    assert facts.imports["onnxruntime"].said == "CPUExecutionProvider"
    assert facts.pointer_bits == 64
    assert 0 < facts.memory_available_mib <= facts.memory_total_mib
    if "torchvision" in facts.packages:
        assert facts.imports["torch"].works
        assert not facts.imports["torchvision"].works


def test_the_doctor_itself_loads_nothing_that_it_examines():
    code = (
        "import sys, json, edgetune.cli.doctor;"
        "print(json.dumps(sorted({'numpy', 'onnxruntime', 'torch', 'PIL'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_command_prints_a_row_a_check_and_succeeds_without_problems(monkeypatch):
    monkeypatch.setattr(cli_doctor, "collect_facts", lambda: changed(disk_free_mib=100))
    result = CliRunner().invoke(cli_doctor.command, [])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    for rule in doctor.RULES:
        assert any(line.startswith(rule.name) for line in lines)
    assert any(line.split() == ["image", "incomplete", "pillow"] for line in lines)
    assert "warning: 100 MiB free" in lines


def test_the_command_ends_with_a_config_error_where_there_is_a_problem(monkeypatch):
    monkeypatch.setattr(
        cli_doctor, "collect_facts", lambda: changed(imports={"torchvision": failed(NMS)})
    )
    result = CliRunner().invoke(cli_doctor.command, [])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2
    assert "1 problem" in str(result.exception)
    assert NMS in result.stdout
    assert "--index-url" in result.stdout


def test_json_holds_facts_extras_and_checks(monkeypatch):
    monkeypatch.setattr(cli_doctor, "collect_facts", lambda: HEALTHY)
    result = CliRunner().invoke(cli_doctor.command, ["--json"])
    assert json.loads(result.stdout) == json.loads(json.dumps(to_mapping(diagnose(HEALTHY))))
