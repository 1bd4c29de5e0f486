"""Does an ARM CPU answer what edgetune computes for it? The same graphs on both, compared.

    python benchmarks/arm_arithmetic.py CASES                     writes the cases, half a minute
    python CASES/check.py --check CASES                           there, on the ARM machine
    python benchmarks/arm_arithmetic.py CASES --device-command "ssh pi@pi4 python3"     both

A case is a small quantized graph, its inputs, and the outputs of `emulate(graph, "exact")` on
this machine, whatever its CPU: the worst magnitudes, every operator that edgetune's quantizers
leave to integer kernels, what rounds between them, and small nets. `--graph` adds a real float
graph, as edgetune exports it, of text or images. A float rounded otherwise moves a code by a step,
and a deep net multiplies that, so what is "allowed" there is how far the net moves here when its
float constants do by a unit in the last place or two; it is shown and decides nothing.

The checker needs numpy and onnxruntime, and CASES under the same path: the command given as
`--device-command` runs Python where it is so (an emulator that sees this machine's files, or a
mounted or copied folder). It prints a Markdown section and ends with 1 where a value differs that
should not: `largest difference` is of integers in units, of floats as a share of the largest.
Everything is drawn from fixed seeds.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

    from edgetune.quantize.dynamic import DynamicCode
    from edgetune.quantize.qdq import WeightCode

Arrays = dict[str, Any]

# shares of the largest value expected. A sum scaled and a bias added, fused or one by one:
ROUNDING = 1e-6
# float products over hundreds of inputs, in another order:
SUMS = 1e-5
# activations rounded to int8 where the CPU has such a kernel, and left float where it has none:
INT8_OR_FLOAT = 2e-2
# onnxruntime's addition of codes rounds halves to even on x86, as ONNX says, and away from zero
# on ARM
STEP = 1.0
NUDGES = 8
MINUS_128 = "weights of -128, which edgetune never writes"
CODES: tuple["WeightCode", ...] = ("s8", "u8", "s7")
# Arm's part numbers, as in /proc/cpuinfo: MIDR_EL1 in the cores' technical reference manuals
CORES = {
    "0xd03": "Cortex-A53", "0xd04": "Cortex-A35", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72", "0xd09": "Cortex-A73", "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse N1", "0xd40": "Neoverse V1", "0xd42": "Cortex-A78AE",
    "0xd47": "Cortex-A710", "0xd49": "Neoverse N2",
}  # fmt: skip
FEATURES = ("asimd", "asimddp", "i8mm", "sve", "avx2", "avx512_vnni", "avx_vnni")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One graph with its inputs.

    name: also that of its files.
    group: the line of the table that it counts in.
    tolerance: largest difference allowed: of integers in units, of floats as a share of the
        largest |expected|; 0: bit for bit.
    required: whether edgetune relies on it; where not, a difference is shown and no more.
    """

    name: str
    group: str
    tolerance: float = 0.0
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a case gave: values compared, how many differ, the largest difference.

    largest: as for `Case.tolerance`.
    error: why the case could not run; "" where it did.
    """

    case: Case
    values: int = 0
    differ: int = 0
    largest: float = 0.0
    integers: bool = False
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether the case ran and no value is further away than allowed."""
        return not self.error and self.largest <= self.case.tolerance


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where the cases are written")
    parser.add_argument("--check", type=Path, metavar="CASES", help="compare on this machine")
    parser.add_argument("--device-command", help="what runs Python there, to check at once")
    parser.add_argument(
        "--graph", type=Path, action="append", default=[], help="a float graph to add (repeatable)"
    )
    given = parser.parse_args()
    if (given.folder is None) == (given.check is None):
        parser.error("name the folder to write to, or --check CASES")
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported
    if given.check is not None:
        return check(given.check)
    folder = given.folder.resolve()
    write(folder, given.graph)
    command = [str(folder / "check.py"), "--check", str(folder)]
    if given.device_command is None:
        print(f"on the device: python3 {shlex.join(command)}")
        return 0
    return subprocess.run([*shlex.split(given.device_command), *command], check=False).returncode


# -- on the device -------------------------------------------------------------------------


def check(folder: Path) -> int:
    """Run every case, print what differs, return 1 where edgetune relies on what does."""
    import onnxruntime

    listed = json.loads((folder / "cases.json").read_text())
    outcomes = [compared(folder, Case(**case)) for case in listed["cases"]]
    print(f"### {cpu()}\n")
    print(f"- here: {platform.machine()}, {', '.join(features())}; {versions(onnxruntime)}")
    print(f"- expected: {listed['made']}\n")
    print_outcomes(outcomes)
    return int(any(o.case.required and not o.holds for o in outcomes))


def compared(folder: Path, case: Case) -> Outcome:
    """Run one case on one thread and hold its outputs against the expected ones."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(folder / f"{case.name}.onnx"), options, ["CPUExecutionProvider"]
        )
        found = session.run(None, dict(np.load(folder / f"{case.name}.inputs.npz")))
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        return Outcome(case=case, error=" ".join(str(error).split()))
    expected = np.load(folder / f"{case.name}.expected.npz")
    outcome = Outcome(case=case)
    for output, value in zip(session.get_outputs(), found, strict=True):
        outcome = with_output(outcome, np.asarray(value), expected[output.name])
    return outcome


def with_output(outcome: Outcome, found: Any, expected: Any) -> Outcome:
    """Return the outcome with one more output counted in."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        got, wanted = (f"{a.dtype} {a.shape}" for a in (found, expected))
        return replace(outcome, error=f"gave {got}, expected {wanted}")
    integers = bool(np.issubdtype(expected.dtype, np.integer))
    away = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    away = np.where(np.isnan(away), np.inf, away)
    largest = float(away.max(initial=0))
    if not integers:
        size = float(np.abs(expected).max(initial=0))
        largest = largest / size if size else largest
    return replace(
        outcome,
        values=outcome.values + expected.size,
        differ=outcome.differ + int((away > 0).sum()),
        largest=max(outcome.largest, largest),
        integers=outcome.integers or integers,
    )


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    groups: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda o: not o.case.required):
        groups.setdefault(outcome.case.group, []).append(outcome)
    rows = [["graphs", "cases", "allowed", "values", "differ", "largest difference", "holds"]]
    for group, members in groups.items():
        allowed = max(o.case.tolerance for o in members)
        largest = max(o.largest for o in members)
        unit = " (int)" if any(o.integers for o in members) else ""
        holds = sum(o.holds for o in members)
        kept = "yes" if holds == len(members) else f"{holds} of {len(members)}"
        if not all(o.case.required for o in members):
            kept += " (shown only)"
        rows.append(
            [
                group,
                str(len(members)),
                f"{allowed:.1g}{unit}" if allowed else "none",
                str(sum(o.values for o in members)),
                str(sum(o.differ for o in members)),
                f"{largest:.3g}{unit}" if largest else "0",
                kept,
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"| {' | '.join(cells)} |")
    print()
    for outcome in outcomes:
        if outcome.error:
            print(f"- `{outcome.case.name}`: {outcome.error}")
        elif not outcome.holds:
            away = f"{outcome.differ} of {outcome.values} differ, by at most {outcome.largest:.3g}"
            print(f"- `{outcome.case.name}`: {away}")


def cpu() -> str:
    """Return the board's or CPU's name, and the kind of its cores where it is ARM's."""
    lines = [line.partition(":") for line in cpuinfo()]
    names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
    parts = {value.strip() for key, _, value in lines if key.strip() == "CPU part"}
    cores = ", ".join(CORES.get(part, f"ARM part {part}") for part in sorted(parts))
    board = Path("/proc/device-tree/model")
    name = board.read_text(errors="replace").rstrip("\0\n") if board.is_file() else ""
    return ", ".join(filter(None, [name, cores])) or (names or [platform.machine()])[0]


def features() -> list[str]:
    words = {word for line in cpuinfo() for word in line.split()}
    return [feature for feature in FEATURES if feature in words]


def cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []


def versions(onnxruntime: Any) -> str:
    return (
        f"Python {platform.python_version()}, onnxruntime {onnxruntime.__version__},"
        f" numpy {np.__version__}"
    )


# -- here: the cases -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Made:
    """A case with its graph and inputs, before it is written."""

    case: Case
    model: "onnx.ModelProto"
    feeds: Arrays


def write(folder: Path, graphs: Sequence[Path]) -> None:
    """Write every case, what is expected of it, and this script as check.py."""
    import onnx
    import onnxruntime

    import edgetune
    from edgetune.quantize.arithmetic import emulate
    from edgetune.runtime.device import int8_arithmetic

    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for made in (*all_cases(), *(case for path in graphs for case in real_cases(path))):
        name = made.case.name
        onnx.save(made.model, folder / f"{name}.onnx")
        np.savez(folder / f"{name}.inputs.npz", **made.feeds)
        np.savez(folder / f"{name}.expected.npz", **answers(emulate(made.model, "exact"), made))
        cases.append(asdict(made.case))
        print(f"{name}: written", file=sys.stderr, flush=True)
    host = (
        f"{cpu()} (its own int8 {int8_arithmetic()}), edgetune {edgetune.__version__},"
        f" {versions(onnxruntime)}"
    )
    (folder / "cases.json").write_text(json.dumps({"made": host, "cases": cases}, indent=1))
    shutil.copyfile(__file__, folder / "check.py")


def answers(model: "onnx.ModelProto", made: Made) -> Arrays:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, made.feeds), strict=True))


def all_cases() -> Iterator[Made]:
    yield from static_cases()
    yield from integer_cases()
    yield from dynamic_cases()
    yield from rounding_cases()
    yield from embedding_cases()
    yield from block_cases()
    yield from net_cases()


# name: (operator, shape of x, shape of w, attributes); u8 activations over [-1, 3]
STATIC: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "conv": ("Conv", (3, 16, 9, 9), (24, 16, 3, 3), {"pads": [1, 1, 1, 1]}),
    "conv_3_channels": ("Conv", (3, 3, 11, 9), (16, 3, 3, 3),
                        {"pads": [0, 1, 1, 0], "strides": [2, 2]}),
    "conv_dilated": ("Conv", (3, 5, 14, 13), (6, 5, 3, 2),
                     {"pads": [2, 1, 0, 3], "dilations": [2, 3], "strides": [3, 2]}),
    "conv_1d": ("Conv", (3, 6, 20), (8, 6, 3), {"pads": [1, 1]}),
    "pointwise": ("Conv", (3, 64, 9, 9), (40, 64, 1, 1), {}),
    "pointwise_odd": ("Conv", (3, 7, 9, 8), (5, 7, 1, 1), {}),
    "pointwise_deep": ("Conv", (3, 960, 2, 2), (33, 960, 1, 1), {}),
    "depthwise": ("Conv", (3, 32, 9, 9), (32, 1, 3, 3), {"group": 32, "pads": [1, 1, 1, 1]}),
    "depthwise_odd": ("Conv", (3, 19, 9, 9), (19, 1, 3, 3), {"group": 19, "strides": [2, 2]}),
    "depthwise_5x5": ("Conv", (3, 16, 9, 9), (16, 1, 5, 5), {"group": 16, "pads": [2, 2, 2, 2]}),
    "depth_multiplier": ("Conv", (3, 16, 9, 9), (32, 1, 3, 3), {"group": 16}),
    "grouped": ("Conv", (3, 16, 9, 9), (16, 4, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    "grouped_odd": ("Conv", (3, 12, 9, 9), (8, 3, 3, 3), {"group": 4}),
    "matmul": ("MatMul", (5, 64), (64, 70), {}),
    "matmul_row": ("MatMul", (1, 384), (384, 77), {}),
    "matmul_3d": ("MatMul", (3, 5, 67), (67, 33), {}),
    "matmul_deep": ("MatMul", (5, 2600), (2600, 9), {}),
    "gemm": ("Gemm", (5, 63), (33, 63), {"transB": 1}),
    "gemm_row": ("Gemm", (1, 384), (10, 384), {"transB": 1}),
}  # fmt: skip


def static_cases() -> Iterator[Made]:
    from edgetune.quantize.qdq import quantize_static

    for name, (op, shape, weight_shape, attributes) in STATIC.items():
        axis = 0 if op == "Conv" or attributes.get("transB") else len(weight_shape) - 1
        for kind, weight in (("mixed", mixed), ("worst", worst)):
            w = weight(rng(f"{name} {kind}"), weight_shape, axis)
            feeds = {"x": extremes(rng(name), shape)}
            ranges = [feeds, *({"x": np.full_like(feeds["x"], v)} for v in (-1, 3))]
            for rectified in (False, True):
                # a bare matrix product gives floats; behind a Relu it gives codes
                if rectified and (op == "Conv" or kind == "worst"):
                    continue
                model = one_layer(op, w, shape, rectified=rectified, attributes=attributes)
                floats = op != "Conv" and not rectified
                layers = "Conv" if op == "Conv" else "MatMul and Gemm"
                if "group" in attributes:
                    layers = "Conv, depthwise and grouped,"
                to = f"to {'floats' if floats else 'codes'}"
                for codes in CODES:
                    made = quantize_static(model, ranges, codes=codes)
                    end = "_relu" if rectified else ""
                    case = Case(
                        name=f"static_{name}{end}_{kind}_{codes}",
                        group=f"static: {layers} {to}",
                        tolerance=ROUNDING if floats else 0.0,
                    )
                    made = made if floats else ending_in_codes(made)
                    yield Made(case=case, model=made, feeds=feeds)
                    if codes == "s8" and kind == "worst":
                        yield Made(
                            case=replace(
                                case,
                                name=f"{case.name}_minus_128",
                                group=f"{MINUS_128}, {to}",
                                required=False,
                            ),
                            model=with_minus_128(made),
                            feeds=feeds,
                        )


def integer_cases() -> Iterator[Made]:
    """Bare sums: what of a sum a later rounding would hide shows here."""
    from onnx import TensorProto, helper

    for rows, depth, outputs in ((1, 64, 33), (5, 67, 40), (4, 2600, 5)):
        random = rng(f"integer {depth}")
        a = random.integers(0, 256, (rows, depth)).astype(np.uint8)
        a[0] = 255
        a[1:2] = 0
        for codes, lowest, highest in (("s8", -127, 127), ("u8", 0, 255), ("s7", -63, 63)):
            kind = np.uint8 if codes == "u8" else np.int8
            w = random.integers(lowest, highest + 1, (depth, outputs)).astype(kind)
            w[:, 0::4], w[:, 1::4] = lowest, highest
            node = helper.make_node("MatMulInteger", ["a", "w", "az", "wz"], ["y"], "layer")
            zeros = np.full(outputs, 128 if codes == "u8" else 0, kind)
            model = graph(
                [node],
                {"a": (TensorProto.UINT8, a.shape)},
                {"y": TensorProto.INT32},
                {"w": w, "az": np.uint8(64), "wz": zeros},
            )
            case = Case(name=f"integer_{rows}_{depth}_{codes}", group="int32 sums")
            yield Made(case=case, model=model, feeds={"a": a})
            if codes == "s8":
                case = Case(
                    name=f"{case.name}_minus_128",
                    group=f"{MINUS_128}, int32 sums",
                    required=False,
                )
                yield Made(case=case, model=with_minus_128(model), feeds={"a": a})


def dynamic_cases() -> Iterator[Made]:
    from edgetune.quantize.dynamic import quantize_dynamic

    shapes = {
        "row": ("MatMul", (1, 384), (384, 65)),
        "3d": ("MatMul", (3, 5, 67), (67, 40)),
        "deep": ("MatMul", (4, 2600), (2600, 9)),
        "gemm": ("Gemm", (5, 63), (33, 63)),
    }
    for name, (op, shape, weight_shape) in shapes.items():
        attributes = {"transB": 1} if op == "Gemm" else {}
        for kind, weight in (("mixed", mixed), ("worst", worst)):
            w = weight(rng(f"dynamic {name} {kind}"), weight_shape, 0 if attributes else 1)
            model = one_layer(op, w, shape, rectified=False, attributes=attributes)
            for codes in ("u8", "s8"):
                case = Case(
                    name=f"dynamic_{name}_{kind}_{codes}",
                    group=f"dynamic: MatMul and Gemm, {codes}",
                    tolerance=ROUNDING,
                )
                made = quantize_dynamic(model, codes=codes)
                yield Made(case=case, model=made, feeds={"x": extremes(rng(name), shape)})


def rounding_cases() -> Iterator[Made]:
    """What rounds between the layers: quantizers, additions, scaled sums; halves above all."""
    from onnx import TensorProto, helper

    random = rng("rounding")
    halves = (np.arange(-300, 600) + 0.5).astype(np.float32) / 8
    spread = random.normal(1, 12, 20000).astype(np.float32)
    edges = np.array([0, -0.0, 1e30, -1e30, 1e-30], np.float32)
    x = np.concatenate([halves, spread, edges])
    for name, scale, zero in (("halves", 0.125, 128), ("any", 0.0371, 77)):
        constants = {"s": np.float32(scale), "z": np.uint8(zero)}
        node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], "q")
        inputs = {"x": (TensorProto.FLOAT, x.shape)}
        model = graph([node], inputs, {"y": TensorProto.UINT8}, constants)
        case = Case(name=f"quantize_{name}", group="QuantizeLinear, DequantizeLinear")
        yield Made(case=case, model=model, feeds={"x": x})
    codes = np.arange(256, dtype=np.uint8)
    node = helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"], "d")
    inputs = {"x": (TensorProto.UINT8, codes.shape)}
    model = graph([node], inputs, {"y": TensorProto.FLOAT}, constants)
    case = Case(name="dequantize", group="QuantizeLinear, DequantizeLinear")
    yield Made(case=case, model=model, feeds={"x": codes})

    tensors = {
        "normal": random.normal(0.3, 2, (7, 311)),
        "halves": np.concatenate([[-16.0, 15.875], (np.arange(-128, 127) + 0.5) / 8]),
        "positive": random.uniform(5, 6, 1000),
        "negative": -random.uniform(5, 6, 1000),
        "zeros": np.zeros(33),
        "one": np.full(1, 0.7),
    }
    for name, values in tensors.items():
        node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"], "q")
        inputs = {"x": (TensorProto.FLOAT, values.shape)}
        outputs = {"y": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
        case = Case(name=f"dynamic_quantize_{name}", group="DynamicQuantizeLinear")
        model = graph([node], inputs, outputs, {})
        yield Made(case=case, model=model, feeds={"x": values.astype(np.float32)})

    a, b = (m.astype(np.uint8) for m in np.meshgrid(np.arange(256), np.arange(256)))
    scales = [(1.0, 1.0, 2.0), (1.0, 0.5, 1.0)]  # halves
    scales += [tuple(random.uniform(0.005, 0.05, 3)) for _ in range(6)]
    for number, (a_scale, b_scale, y_scale) in enumerate(scales):
        zeros = random.integers(0, 256, 3).astype(np.uint8)
        group = f"Add of codes, {'halves' if number < 2 else 'any scale'}"
        case = Case(name=f"add_{number}", group=group, tolerance=STEP)
        model = added(np.array([a_scale, b_scale, y_scale], np.float32), zeros, a.shape)
        yield Made(case=case, model=model, feeds={"a": a, "b": b})

    for op in ("Conv", "MatMul", "Gemm"):
        for kind in CODES:
            case = Case(name=f"halves_{op}_{kind}", group="halves of Conv, MatMul, Gemm to codes")
            shape = (3, 16, 9, 9) if op == "Conv" else (40, 16)
            x = rng("halves").integers(0, 256, shape).astype(np.uint8)
            yield Made(case=case, model=scaled_by_16(op, shape, kind), feeds={"x": x})


def added(scales: Any, zeros: Any, shape: Sequence[int]) -> "onnx.ModelProto":
    """Return codes + codes -> codes; scales and zero points of the two and of the sum."""
    from onnx import TensorProto, helper

    constants: Arrays = {}
    for i, name in enumerate("aby"):
        constants |= {f"{name}s": scales[i], f"{name}z": zeros[i]}
    nodes = [
        helper.make_node("DequantizeLinear", ["a", "as", "az"], ["af"], "ad"),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bf"], "bd"),
        helper.make_node("Add", ["af", "bf"], ["f"], "add"),
        helper.make_node("QuantizeLinear", ["f", "ys", "yz"], ["y"], "yq"),
    ]
    inputs = dict.fromkeys("ab", (TensorProto.UINT8, shape))
    return graph(nodes, inputs, {"y": TensorProto.UINT8}, constants)


def scaled_by_16(op: str, shape: Sequence[int], codes: str) -> "onnx.ModelProto":
    """Return codes -> layer -> codes, 16 units of its sums to a step: every 16th sum is a half."""
    from onnx import TensorProto, helper

    weight_shape = (8, 16, 3, 3) if op == "Conv" else (16, 8)
    w = rng(f"halves {op}").integers(-2, 3, weight_shape)
    shift, kind = (128, np.uint8) if codes == "u8" else (0, np.int8)
    axis = 0 if op == "Conv" else 1
    constants = {
        "w": (w + shift).astype(kind), "ws": np.ones(8, np.float32), "wz": np.full(8, shift, kind),
        "xs": np.float32(1), "xz": np.uint8(128), "ys": np.float32(16), "yz": np.uint8(128),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xf"], "xd"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], "wd", axis=axis),
        helper.make_node(op, ["xf", "wf"], ["f"], "layer"),
        helper.make_node("QuantizeLinear", ["f", "ys", "yz"], ["y"], "yq"),
    ]
    inputs = {"x": (TensorProto.UINT8, shape)}
    return graph(nodes, inputs, {"y": TensorProto.UINT8}, constants)


def embedding_cases() -> Iterator[Made]:
    from onnx import TensorProto, helper

    from edgetune.quantize.embeddings import quantize_embeddings

    random = rng("embeddings")
    table = random.normal(0, 1, (700, 32)).astype(np.float32)
    table[3], table[4] = 0, np.abs(table[4])
    ids = np.concatenate([np.arange(8), random.integers(0, 700, 56)]).reshape(2, 32)
    model = graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"], "lookup")],
        {"ids": (TensorProto.INT64, ids.shape)},
        {"y": TensorProto.FLOAT},
        {"table": table},
    )
    case = Case(name="embeddings", group="embeddings, by row")
    yield Made(case=case, model=quantize_embeddings(model), feeds={"ids": ids.astype(np.int64)})


def block_cases() -> Iterator[Made]:
    from edgetune.quantize.blocks import quantize_blocks, quantize_weights

    for shape in ((1, 128), (5, 100)):
        w = mixed(rng("blocks"), (shape[1], 48), 1)
        model = one_layer("MatMul", w, shape, rectified=False, attributes={})
        feeds = {"x": rng("blocks").normal(0.3, 1, shape).astype(np.float32)}
        for bits in (4, 8):
            for level in (0, 4):
                case = Case(
                    name=f"blocks_{shape[0]}_{bits}_bits_level_{level}",
                    group=f"weights in blocks, accuracy_level {level}",
                    tolerance=INT8_OR_FLOAT if level else SUMS,
                )
                made = quantize_blocks(model, bits=bits, accuracy_level=level)
                yield Made(case=case, model=made, feeds=feeds)
        # onnxruntime makes blocks of accuracy_level 4 of it
        case = Case(
            name=f"weights_{shape[0]}", group="weights only, plain ONNX", tolerance=INT8_OR_FLOAT
        )
        yield Made(case=case, model=quantize_weights(model), feeds=feeds)


def net_cases() -> Iterator[Made]:
    """A residual conv net to codes, where every node but the first works on codes."""
    from onnx import TensorProto, helper

    from edgetune.quantize.qdq import quantize_static

    random = rng("net")
    shapes = {"w1": (16, 3, 3, 3), "w2": (16, 1, 3, 3), "w3": (16, 16, 1, 1), "w4": (10, 1024)}
    constants: Arrays = {name: mixed(random, shape, 0) for name, shape in shapes.items()}
    for i in (1, 2, 3, 4):
        constants[f"b{i}"] = random.uniform(-1, 1, len(constants[f"w{i}"])).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "first", pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "depthwise", group=16, pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("Conv", ["r2", "w3", "b3"], ["c3"], "pointwise"),
        helper.make_node("Add", ["c3", "r1"], ["sum"], "residual"),
    ]
    head = [
        helper.make_node("Flatten", ["sum"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w4", "b4"], ["logits"], "head", transB=1),
    ]
    inputs = {"x": (TensorProto.FLOAT, (4, 3, 16, 16))}
    feeds = {"x": random.uniform(-1, 3, (4, 3, 16, 16)).astype(np.float32)}
    for codes in CODES:
        body = graph(nodes, inputs, {"sum": TensorProto.FLOAT}, constants)
        made = quantize_static(body, [feeds], codes=codes)
        case = Case(name=f"net_body_{codes}", group="small conv net, residual, to codes")
        yield Made(case=case, model=ending_in_codes(made), feeds=feeds)
        whole = graph([*nodes, *head], inputs, {"logits": TensorProto.FLOAT}, constants)
        made = quantize_static(whole, [feeds], codes=codes)
        case = Case(
            name=f"net_{codes}", group="small conv net, residual, to logits", tolerance=ROUNDING
        )
        yield Made(case=case, model=made, feeds=feeds)


def real_cases(path: Path) -> Iterator[Made]:
    """A float graph as edgetune exports it: of text (token ids) or images (u8 pixels)."""
    import onnx

    from edgetune.quantize.dynamic import quantize_dynamic
    from edgetune.quantize.embeddings import quantize_embeddings
    from edgetune.quantize.qdq import quantize_static

    model = onnx.load(path)
    names = [value.name for value in model.graph.input]
    random = rng("real")
    if "image" in names:
        images = random.integers(0, 256, (2, 5, 5, 3)).repeat(20, 1).repeat(20, 2)
        feeds: Arrays = {"image": images.astype(np.uint8)}
        models = {c: quantize_static(model, [feeds], codes=c) for c in CODES}
    else:
        feeds = {name: np.ones((2, 12), np.int64) for name in names}
        feeds["input_ids"] = random.integers(1000, 20000, (2, 12))
        feeds["attention_mask"][1, 9:] = 0
        both: tuple[DynamicCode, ...] = ("u8", "s8")
        models = {c: quantize_embeddings(quantize_dynamic(model, codes=c)) for c in both}
    for codes, quantized in models.items():
        case = Case(
            name=f"real_{path.stem}_{codes}",
            group=f"{path.stem}, whole, {codes}",
            required=False,
        )
        made = Made(case=case, model=quantized, feeds=feeds)
        yield replace(made, case=replace(case, tolerance=moved(made)))


def moved(made: Made) -> float:
    """Return how far outputs move, as a share of the largest, when constants do by 1 ulp or 2.

    The largest of NUDGES draws: what rounding alone makes of the net, in exact integers.
    """
    from onnx import TensorProto, numpy_helper

    from edgetune.quantize.arithmetic import emulate
    from edgetune.quantize.layers import copy_model

    model = emulate(made.model, "exact")
    still = answers(model, made)
    largest = 0.0
    for seed in range(NUDGES):
        random = np.random.default_rng(seed)
        nudged = copy_model(model)
        for tensor in nudged.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                values = numpy_helper.to_array(tensor)
                factor = 1 + 2e-7 * random.uniform(-1, 1, values.shape)
                values = np.asarray((values * factor).astype(np.float32))
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        for name, value in answers(nudged, made).items():
            share = np.abs(value - still[name]).max() / np.abs(still[name]).max()
            largest = max(largest, float(share))
    return largest


# -- here: graphs and numbers --------------------------------------------------------------


def rng(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def graph(
    nodes: "Sequence[onnx.NodeProto]",
    inputs: Mapping[str, tuple[int, Sequence[int]]],
    outputs: Mapping[str, int],
    constants: Mapping[str, Any],
) -> "onnx.ModelProto":
    from onnx import helper, numpy_helper

    made = helper.make_graph(
        nodes,
        "case",
        [helper.make_tensor_value_info(k, kind, shape) for k, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(k, kind, None) for k, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def one_layer(
    op: str, weight: Any, shape: Sequence[int], *, rectified: bool, attributes: dict[str, Any]
) -> "onnx.ModelProto":
    """Return a float graph of one layer, with a bias where the operator takes one."""
    from onnx import TensorProto, helper

    constants = {"w": weight}
    inputs = ["x", "w"]
    if op != "MatMul":
        constants["b"] = rng("bias").uniform(-1, 1, len(weight)).astype(np.float32)
        inputs.append("b")
    nodes = [helper.make_node(op, inputs, ["y"], "layer", **attributes)]
    if rectified:
        nodes.append(helper.make_node("Relu", ["y"], ["z"], "relu"))
    output = "z" if rectified else "y"
    return graph(nodes, {"x": (TensorProto.FLOAT, shape)}, {output: TensorProto.FLOAT}, constants)


def mixed(random: np.random.Generator, shape: Sequence[int], axis: int) -> Any:
    """Return weights in [-1, 1], half of each output channel's large and of one sign."""
    signs = random.choice([-1, 1], [n if i == axis else 1 for i, n in enumerate(shape)])
    large = signs * random.uniform(0.6, 1, shape)
    values = np.where(random.random(shape) < 0.5, large, random.uniform(-1, 1, shape))
    return values.astype(np.float32)


def worst(_: np.random.Generator, shape: Sequence[int], axis: int) -> Any:
    """Return weights of 1 in one output channel and of -1 in the next: the largest codes."""
    channels = np.where(np.arange(shape[axis]) % 2, -1, 1)
    along = [n if i == axis else 1 for i, n in enumerate(shape)]
    return np.broadcast_to(channels.reshape(along), shape).astype(np.float32)


def extremes(random: np.random.Generator, shape: Sequence[int]) -> Any:
    """Return values in [-1, 3]: first all the largest (code 255), then all the smallest (0)."""
    x = random.uniform(-1, 3, shape).astype(np.float32)
    x[0] = 3
    x[1:2] = -1
    return x


def ending_in_codes(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Return the graph without its last DequantizeLinear: its outputs are codes, not floats."""
    from onnx import TensorProto, helper

    from edgetune.quantize.layers import copy_model

    result = copy_model(model)
    (output,) = result.graph.output
    (last,) = (n for n in result.graph.node if output.name in n.output)
    codes = helper.make_tensor_value_info(last.input[0], TensorProto.UINT8, None)
    result.graph.node.remove(last)
    output.CopyFrom(codes)
    return result


def with_minus_128(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Return the graph with -128 for each weight code of -127."""
    from onnx import TensorProto, numpy_helper

    from edgetune.quantize.layers import copy_model

    result = copy_model(model)
    for tensor in result.graph.initializer:
        if tensor.data_type == TensorProto.INT8:
            codes = numpy_helper.to_array(tensor)
            lower = np.where(codes == -127, -128, codes).astype(np.int8)
            tensor.CopyFrom(numpy_helper.from_array(lower, tensor.name))
    return result


if __name__ == "__main__":
    sys.exit(main())
