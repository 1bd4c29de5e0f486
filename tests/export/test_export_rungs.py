"""The table of the ladder, and what of it a profile and a model allow."""

import dataclasses
import inspect

import pytest

from edgetune.errors import ConfigError
from edgetune.export.rungs import FP32, RUNGS, Rung, rungs_for
from edgetune.export.students import STUDENTS, scheme
from edgetune.profile import (
    Cpu,
    DeviceProfile,
    Memory,
    PrecisionSettings,
    RuntimeSettings,
    load_profile,
)


def profile(*, arithmetic: str = "exact", fp16: bool = True, int8: bool = True) -> DeviceProfile:
    return DeviceProfile(
        name="board", description="",
        cpu=Cpu(arch="x86_64", model="", cores=1, features=(), int8=arithmetic),
        memory=Memory(total_mib=1024, available_mib=512),
        runtime=RuntimeSettings(onnxruntime_min="1.17.0", intra_op_threads=1),
        precision=PrecisionSettings(fp16=fp16, int8=int8),
    )  # fmt: skip


def names(rungs: list[Rung]) -> set[str]:
    return {rung.name for rung in rungs}


def test_names_are_unique():
    found = [rung.name for rung in (*RUNGS, FP32)]
    assert len(set(found)) == len(found)


def test_every_source_is_the_run_or_a_student_and_every_student_is_one():
    sources = {rung.source for rung in RUNGS}
    assert sources == {"run", *STUDENTS}


@pytest.mark.parametrize("rung", [*RUNGS, FP32], ids=lambda rung: rung.name)
def test_settings_are_parameters_of_the_function(rung: Rung):
    signature = inspect.signature(rung.make)
    bound = signature.bind("workshop", "source", **rung.settings)  # TypeError where one is not
    assert set(rung.settings) <= {*bound.arguments} - {"shop", "source"}
    keyword = {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert set(rung.settings) <= keyword


@pytest.mark.parametrize("int8", ["static", "dynamic"])
def test_the_order_is_the_tables(int8: str):
    found = rungs_for(profile(arithmetic="saturates"), int8)
    places = [RUNGS.index(rung) for rung in found]
    assert places == sorted(places)
    # and not that of the names asked for
    asked = [rung.name for rung in reversed(found)]
    assert rungs_for(profile(arithmetic="saturates"), int8, only=asked) == found


def test_a_family_has_its_own_kind_of_int8():
    static = names(rungs_for(profile(), "static"))
    dynamic = names(rungs_for(profile(), "dynamic"))
    assert "int8-static" in static - dynamic
    assert "int8-dynamic" in dynamic - static
    assert static & dynamic == {"fp16"}
    assert static | dynamic == {rung.name for rung in RUNGS if not rung.saturating_only}


def test_repairs_of_sums_that_saturate_are_for_cpus_where_they_do():
    exact = names(rungs_for(profile(), "static"))
    saturates = names(rungs_for(profile(arithmetic="saturates"), "static"))
    assert saturates - exact == {rung.name for rung in RUNGS if rung.saturating_only}
    assert {"int8-static-precise", "int8-static-reduced"} <= saturates - exact
    assert exact < saturates


@pytest.mark.parametrize(
    ("lacks", "left"),
    [
        ({"fp16": False}, {"fp32", "int8", "int4"}),
        ({"int8": False}, {"fp32", "fp16", "int4"}),
        ({"fp16": False, "int8": False}, {"fp32", "int4"}),
        ({}, {"fp32", "fp16", "int8", "int4"}),
    ],
)
def test_precisions_that_the_device_lacks_are_left_out(lacks: dict, left: set):
    found = [r for kind in ("static", "dynamic") for r in rungs_for(profile(**lacks), kind)]
    assert {rung.precision for rung in found} == left


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_one_precision_can_be_asked_for(precision: str):
    found = rungs_for(profile(), "dynamic", precision=precision)
    wanted = [rung for rung in rungs_for(profile(), "dynamic") if rung.precision == precision]
    assert found == wanted
    assert found or precision == "fp32"


def test_rungs_can_be_asked_for_by_name():
    only = ["fp16", "int8-dynamic"]
    assert [r.name for r in rungs_for(profile(), "dynamic", only=only)] == ["int8-dynamic", "fp16"]
    # fp32 is no row, but may be all that is asked for
    assert rungs_for(profile(), "dynamic", only=["fp32"]) == []
    assert (
        rungs_for(dataclasses.replace(profile()), "static", precision="fp32", only=["fp32"]) == []
    )


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no rung 'int8-dynamik'.*int8-dynamic"):
        rungs_for(profile(), "dynamic", only=["int8-dynamik"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"int8": "dynamic", "only": ["int8-static"]}, "profile board .* of rungs int8-static"),
        ({"int8": "static", "precision": "int4"}, "profile board .* of precision int4"),
    ],
)
def test_where_nothing_is_left_it_says_what_to_do(asked: dict, message: str):
    with pytest.raises(ConfigError, match=message + ".*--precision fp32"):
        rungs_for(profile(), **asked)


@pytest.mark.parametrize(
    ("profile", "kind", "weights", "inputs"),
    [
        ("x86-64-avx2", "dynamic", "u8", "dynamic"),
        ("raspberry-pi-5", "dynamic", "s8", "dynamic"),
        ("x86-64-avx2", "static", "s8", "static"),
        ("raspberry-pi-5", "static", "s8", "static"),
    ],
)
def test_training_rounds_as_the_rungs_of_the_profile_do(profile, kind, weights, inputs):
    found = scheme(load_profile(profile), kind, "all")
    assert (found.weights, found.inputs, found.trainable) == (weights, inputs, "all")
