import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgetune.runtime.ort  # noqa: F401  its telemetry is off before onnxruntime comes in
from edgetune.errors import ConfigError
from edgetune.quantize import arithmetic
from edgetune.quantize.arithmetic import emulate, host_arithmetic, saturation
from edgetune.quantize.qdq import quantize_static
from edgetune.runtime import device

CODES = {"u8": np.uint8, "s8": np.int8}

# what a process of its own, with VNNI hidden, runs: every model of a folder on its feeds, with its
# session options
RUN_FOLDER = """
import json, os, sys
from pathlib import Path
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np
import onnxruntime
for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in json.loads(path.with_suffix(".json").read_text()).items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    feeds = dict(np.load(path.with_suffix(".npz")))
    np.save(path.with_suffix(".npy"), session.run(None, feeds)[0])
"""


def run(model, feeds):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


def graph(nodes, inputs, outputs, constants):
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def matmul_integer(weights, **constants):
    given = {"a_zero_point": np.uint8(0), "w_zero_point": np.int8(0), **constants}
    node = helper.make_node(
        "MatMulInteger", ["a", "w", "a_zero_point", "w_zero_point"], ["y"], "layer"
    )
    return graph(
        [node],
        [("a", TensorProto.UINT8, ["rows", len(weights)])],
        [("y", TensorProto.INT32)],
        {"w": np.asarray(weights, np.int8), **given},
    )


def heavy_weights(rng, shape, axis):
    """int8 weights of which many neighbours are large and have one sign."""
    weights = rng.integers(-127, 128, shape)
    sign_shape = [n if i == axis else 1 for i, n in enumerate(shape)]
    large = rng.choice([-1, 1], sign_shape) * (np.abs(weights) // 2 + 64)
    return np.where(rng.random(shape) < 0.5, large, weights).astype(np.int8)


def qdq(op, shape, weight_shape, *, seed=0, axis=0, per_channel=True, bias=False, zero_point=7,
        activation="u8", weight="s8", then="", output="u8", **attributes):  # fmt: skip
    """DequantizeLinear -> op -> QuantizeLinear, as a static quantizer writes it."""
    rng = np.random.default_rng(seed)
    channels = weight_shape[axis]
    codes = heavy_weights(rng, weight_shape, axis)
    w_scale = rng.uniform(0.001, 0.01, channels) if per_channel else np.array(0.004)
    x_scale = np.float32(0.02)
    point = zero_point if activation == "u8" else zero_point - 128
    shift = 128 if weight == "u8" else 0
    constants = {
        "x_scale": x_scale,
        "x_zero_point": np.array(point, CODES[activation]),
        "w": (codes.astype(int) + shift).astype(CODES[weight]),
        "w_scale": w_scale.astype(np.float32),
        "w_zero_point": np.full(w_scale.shape, shift, CODES[weight]),
    }
    per_axis = {"axis": axis} if per_channel else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero_point"], ["x_codes"], "xq"),
        helper.make_node("DequantizeLinear", ["x_codes", "x_scale", "x_zero_point"], ["a"], "xd"),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero_point"], ["wd"], "wd",
                         **per_axis),
    ]  # fmt: skip
    inputs = ["a", "wd"]
    if bias:
        constants["b"] = rng.integers(-9000, 9000, channels).astype(np.int32)
        constants["b_scale"] = (x_scale * w_scale).astype(np.float32)
        constants["b_zero_point"] = np.zeros(w_scale.shape, np.int32)
        nodes.append(
            helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero_point"], ["bd"], "bd",
                             **({"axis": 0} if per_channel else {}))
        )  # fmt: skip
        inputs.append("bd")
    nodes.append(helper.make_node(op, inputs, ["y"], "layer", **attributes))
    last = "y"
    if then:
        nodes.append(helper.make_node(then, ["y"], ["z"], "then"))
        last = "z"
    fixed = 1 if op == "Conv" else len(shape) - 1  # the axis of channels
    given = [("x", TensorProto.FLOAT, [n if i == fixed else f"d{i}" for i, n in enumerate(shape)])]
    low = -zero_point * float(x_scale)
    feeds = {"x": rng.uniform(low + 1, low + 255 * float(x_scale), shape).astype(np.float32)}
    if output == "float":
        return graph(nodes, given, [(last, TensorProto.FLOAT)], constants), feeds
    real = run(graph(nodes, given, [(last, TensorProto.FLOAT)], constants), feeds)
    scale = (max(real.max(), 0) - min(real.min(), 0)) / 255
    constants["y_scale"] = np.float32(scale)
    kind, lowest = (np.int8, -128) if activation == "s8" else (np.uint8, 0)
    constants["y_zero_point"] = np.array(round(-min(real.min(), 0) / scale) + lowest, kind)
    nodes += [
        helper.make_node("QuantizeLinear", [last, "y_scale", "y_zero_point"], ["y_codes"], "yq"),
        helper.make_node("DequantizeLinear", ["y_codes", "y_scale", "y_zero_point"], ["out"], "yd"),
    ]
    return graph(nodes, given, [("out", TensorProto.FLOAT)], constants), feeds


def dynamic(shape, outputs, *, seed=0, bias=True, per_channel=True, zero_point=0):
    """DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul -> Add, as quantize_dynamic does."""
    rng = np.random.default_rng(seed)
    points = outputs if per_channel else ()
    constants = {
        "w": heavy_weights(rng, (shape[-1], outputs), 1),
        "w_zero_point": np.full(points, zero_point, np.int8),
        "w_scale": np.asarray(rng.uniform(0.001, 0.01, points), np.float32),
        "b": rng.uniform(-1, 1, outputs).astype(np.float32),
    }
    last = "product" if bias else "y"
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "point"], "xq"),
        helper.make_node("MatMulInteger", ["codes", "w", "point", "w_zero_point"], ["i"], "layer"),
        helper.make_node("Cast", ["i"], ["f"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["scale", "w_scale"], ["s"], "scales"),
        helper.make_node("Mul", ["f", "s"], [last], "scaled"),
    ]
    if bias:
        nodes.append(helper.make_node("Add", [last, "b"], ["y"], "biased"))
    given = [("x", TensorProto.FLOAT, [*[f"d{i}" for i in range(len(shape) - 1)], shape[-1]])]
    feeds = {"x": rng.normal(0.7, 1, shape).astype(np.float32)}
    return graph(nodes, given, [("y", TensorProto.FLOAT)], constants), feeds


def integer(rows, depth, outputs, *, a_zero_point=0, w_zero_point=0):
    rng = np.random.default_rng(depth)
    model = matmul_integer(
        heavy_weights(rng, (depth, outputs), 1),
        a_zero_point=np.uint8(a_zero_point),
        w_zero_point=np.int8(w_zero_point),
    )
    return model, {"a": rng.integers(50, 256, (rows, depth)).astype(np.uint8)}


def conv_net():
    """Conv - Relu - depthwise Conv - pointwise Conv - pooling - Gemm, by onnxruntime's tools."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat
    from onnxruntime.quantization import quantize_static as stock_quantize_static

    rng = np.random.default_rng(4)

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter([{"x": rng.uniform(-1, 3, (1, 3, 12, 12)).astype(np.float32)}] * 2)

        def get_next(self):
            return next(self.left, None)

    def weights(*shape):
        values = rng.uniform(-1, 1, shape) + 0.8 * rng.choice([-1, 1], (shape[0],) + (1,) * 3)
        return values.astype(np.float32)

    constants = {
        "w1": weights(8, 3, 3, 3),
        "b1": rng.uniform(-1, 1, 8).astype(np.float32),
        "w2": weights(8, 1, 3, 3),
        "w3": weights(20, 8, 1, 1),
        "w4": weights(5, 20, 1, 1).reshape(5, 20),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "depthwise", group=8, strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("Conv", ["r2", "w3"], ["c3"], "pointwise"),
        helper.make_node("Sigmoid", ["c3"], ["s3"], "float"),
        helper.make_node("GlobalAveragePool", ["s3"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w4"], ["logits"], "head", transB=1),
    ]
    given = [("x", TensorProto.FLOAT, ["batch", 3, 12, 12])]
    made = graph(nodes, given, [("logits", TensorProto.FLOAT)], constants)
    return made, Reader(), QuantFormat.QDQ, stock_quantize_static


CASES = {
    "pointwise": qdq("Conv", (2, 16, 9, 9), (8, 16, 1, 1), bias=True),
    "pointwise_odd_depth": qdq("Conv", (2, 7, 9, 8), (5, 7, 1, 1)),
    "pointwise_strided": qdq("Conv", (1, 16, 9, 9), (40, 16, 1, 1), strides=[2, 2]),
    "pointwise_padded": qdq("Conv", (1, 8, 5, 5), (40, 8, 1, 1), pads=[1, 0, 0, 1]),
    "pointwise_one_pixel": qdq("Conv", (1, 64, 1, 1), (33, 64, 1, 1)),
    "conv": qdq("Conv", (1, 16, 9, 9), (70, 16, 3, 3), pads=[1, 1, 1, 1], bias=True),
    "conv_3_channels": qdq("Conv", (2, 3, 11, 9), (16, 3, 3, 3), pads=[0, 1, 1, 0],
                           strides=[2, 2], bias=True),
    "conv_dilated": qdq("Conv", (1, 5, 14, 13), (6, 5, 3, 2), pads=[2, 1, 0, 3],
                        dilations=[2, 3], strides=[3, 2]),
    "conv_relu": qdq("Conv", (1, 16, 9, 9), (8, 16, 3, 3), then="Relu", bias=True),
    "conv_per_tensor": qdq("Conv", (1, 16, 9, 9), (8, 16, 3, 3), per_channel=False, bias=True),
    "conv_auto_pad_valid": qdq("Conv", (1, 6, 9, 9), (8, 6, 3, 3), auto_pad="VALID"),
    "conv_1d": qdq("Conv", (2, 6, 20), (8, 6, 3), pads=[1, 1]),
    "conv_3d": qdq("Conv", (1, 4, 5, 6, 5), (8, 4, 3, 2, 3), pads=[1, 0, 1, 1, 1, 0]),
    "conv_groups": qdq("Conv", (1, 16, 9, 9), (16, 4, 3, 3), group=4, pads=[1, 1, 1, 1]),
    "conv_groups_odd_depth": qdq("Conv", (2, 12, 9, 9), (8, 3, 3, 3), group=4),
    "conv_depth_multiplier": qdq("Conv", (1, 16, 9, 9), (32, 1, 3, 3), group=16),
    "conv_s8_activations": qdq("Conv", (1, 16, 9, 9), (8, 16, 3, 3), activation="s8"),
    "matmul": qdq("MatMul", (5, 64), (64, 70), axis=1),
    "matmul_one_row": qdq("MatMul", (1, 64), (64, 7), axis=1),
    "matmul_odd_depth": qdq("MatMul", (2, 3, 67), (67, 33), axis=1),
    "matmul_per_tensor": qdq("MatMul", (4, 63), (63, 33), axis=1, per_channel=False),
    "matmul_to_float": qdq("MatMul", (2, 3, 66), (66, 33), axis=1, output="float"),
    "matmul_s8_activations": qdq("MatMul", (5, 64), (64, 70), axis=1, activation="s8"),
    "gemm": qdq("Gemm", (4, 63), (33, 63), transB=1, bias=True),
    "gemm_not_transposed": qdq("Gemm", (4, 64), (64, 33), axis=1, bias=True),
    "gemm_per_tensor": qdq("Gemm", (4, 64), (33, 64), transB=1, bias=True, per_channel=False),
    "gemm_alpha": qdq("Gemm", (4, 64), (33, 64), transB=1, alpha=0.7),
    "gemm_to_float": qdq("Gemm", (4, 64), (33, 64), transB=1, bias=True, output="float"),
    "gemm_one_row_to_float": qdq("Gemm", (1, 64), (9, 64), transB=1, bias=True, output="float"),
    "dynamic": dynamic((2, 3, 65), 40),
    "dynamic_one_row": dynamic((1, 64), 40),
    "dynamic_no_bias": dynamic((4, 64), 40, bias=False),
    "dynamic_zero_points": dynamic((4, 64), 40, zero_point=5),
    "dynamic_per_tensor": dynamic((4, 64), 40, per_channel=False),
    "integer": integer(3, 65, 40, a_zero_point=12, w_zero_point=-7),
    "integer_more_pairs_than_a_float_sum_holds": integer(3, 2600, 3),
}  # fmt: skip
# their kernels add every product in int32 on any CPU
NEVER = {
    "depthwise": qdq("Conv", (2, 16, 9, 9), (16, 1, 3, 3), group=16, pads=[1, 1, 1, 1]),
    "depthwise_dilated": qdq("Conv", (1, 16, 9, 9), (16, 1, 3, 3), group=16, dilations=[2, 2]),
    "depthwise_7x7": qdq("Conv", (1, 12, 9, 9), (12, 1, 7, 7), group=12),
    "one_channel": qdq("Conv", (2, 1, 9, 9), (1, 1, 3, 3)),
    "u8_weights": qdq("MatMul", (4, 63), (63, 33), axis=1, weight="u8"),
    "u8_conv": qdq("Conv", (1, 6, 9, 9), (8, 6, 3, 3), weight="u8"),
}
ALL = {**CASES, **NEVER}
# of the models below, the session options of onnxruntime that are not its defaults
SESSION = {"static_precise": {"session.x64quantprecision": "1"}}


def static_net(layer_codes=None):
    """The net of `conv_net`, quantized as a rung does it."""
    made, *_ = conv_net()
    feeds = [
        {"x": np.random.default_rng(seed).uniform(-1, 3, (2, 3, 12, 12)).astype(np.float32)}
        for seed in (9, 10)
    ]
    return quantize_static(made, feeds, layer_codes=layer_codes), feeds[0]


STATIC_LAYERS = ["first", "depthwise", "pointwise", "head"]
STATIC = {
    "static": static_net(),
    "static_precise": static_net(),
    "static_u8": static_net(dict.fromkeys(STATIC_LAYERS, "u8")),
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized_net(tmp_path_factory):
    made, reader, form, stock_quantize_static = conv_net()
    folder = tmp_path_factory.mktemp("net")
    onnx.save(made, folder / "float.onnx")
    stock_quantize_static(
        folder / "float.onnx", folder / "int8.onnx", reader, quant_format=form, per_channel=True
    )
    feeds = {"x": np.random.default_rng(9).uniform(-1, 3, (2, 3, 12, 12)).astype(np.float32)}
    return onnx.load(folder / "int8.onnx"), feeds


@pytest.fixture(scope="module")
def without_vnni(tmp_path_factory, quantized_net):
    """Stock onnxruntime's answers on its AVX2 kernels."""
    models = {**ALL, **STATIC, "net": quantized_net}
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        pytest.skip("the kernels that saturate are x86's, and hiding VNNI needs Linux")
    folder = tmp_path_factory.mktemp("hidden")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if host_arithmetic() == "exact":
        if "cpuid_fault" not in Path("/proc/cpuinfo").read_text():
            pytest.skip("this CPU has VNNI and can't hide it: no cpuid_fault")
        gcc = shutil.which("gcc")
        if gcc is None:
            pytest.skip("this CPU has VNNI, and without gcc it can't be hidden")
        source, library = Path(__file__).with_name("hide_vnni.c"), folder / "hide_vnni.so"
        subprocess.run([gcc, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        env["LD_PRELOAD"] = str(library)
    for name, (model, feeds) in models.items():
        onnx.save(model, folder / f"{name}.onnx")
        np.savez(folder / f"{name}.npz", **feeds)
        (folder / f"{name}.json").write_text(json.dumps(SESSION.get(name, {})))
    done = subprocess.run([sys.executable, "-c", RUN_FOLDER, folder], env=env, check=False)
    if done.returncode == 77:
        pytest.skip("the kernel does not let CPUID fault")
    assert done.returncode == 0
    return {name: np.load(folder / f"{name}.npy") for name in models}


def natively_exact():
    if host_arithmetic() != "exact":
        pytest.skip("this CPU has no VNNI: its own answers saturate")


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", ("avx2", "fma"), "saturates"),
        ("x86_64", ("avx2", "avx512f", "avx512bw"), "saturates"),
        ("AMD64", ("avx2", "avx_vnni"), "exact"),
        ("x86_64", ("avx512f", "avx512_vnni"), "exact"),
        ("aarch64", ("asimd",), "exact"),
    ],
)
def test_arithmetic_follows_from_the_cpu_features(monkeypatch, machine, features, expected):
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    monkeypatch.setattr(device, "cpu_features", lambda: features)
    assert host_arithmetic() == expected


@pytest.mark.parametrize(
    ("codes", "weights", "exact", "saturates"),
    [
        ([255, 255], [127, 127], 64770, 32767),
        ([255, 255], [-127, -127], -64770, -32768),
        ([255, 255], [-128, -1], -32895, -32768),
        ([255, 255], [65, 64], 32895, 32767),
        ([255, 255], [64, 64], 32640, 32640),
        ([255, 255], [127, -127], 0, 0),
        ([0, 255, 255, 0], [127, 127, 127, 127], 64770, 64770),  # neighbours, but of two pairs
        ([255, 255, 255, 255], [127, 127, -127, -127], 0, -1),  # 32767 - 32768
        ([255, 255, 255], [127, 127, 127], 97155, 65152),  # 32767 + 255 x 127
    ],
)
def test_sums_are_the_hand_computed_ones(codes, weights, exact, saturates):
    model = matmul_integer(np.array(weights)[:, None])
    feeds = {"a": np.array([codes], np.uint8)}
    assert run(emulate(model, "exact"), feeds).tolist() == [[exact]]
    assert run(emulate(model, "saturates"), feeds).tolist() == [[saturates]]


def test_zero_points_are_taken_off_after_the_saturation():
    # (255 x 127) twice saturates to 32767; less 10 x 254 for a and 1 x 510 for w, plus 2 x 10 x 1
    model = matmul_integer([[127], [127]], a_zero_point=np.uint8(10), w_zero_point=np.int8(1))
    result = run(emulate(model, "saturates"), {"a": np.array([[255, 255]], np.uint8)})
    assert result.tolist() == [[32767 - 2540 - 510 + 20]]


def test_padding_saturates_as_the_activations_zero_point():
    # two channels; the window at the left edge sees one padded pixel of codes 255, 255
    model, _ = qdq("Conv", (1, 2, 1, 2), (1, 2, 1, 2), pads=[0, 1, 0, 0], zero_point=255)
    report = saturation(
        with_weights(model, [[[[127, 0]], [[127, 0]]]]),
        [{"x": np.full((1, 2, 1, 2), -5.1, np.float32)}],  # codes 0
    )
    assert (report[0].candidate_pairs, report[0].pair_sums, report[0].saturated) == (1, 2, 1)
    assert report[0].worst_error == 64770 - 32767


def with_weights(model, codes):
    for tensor in model.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(numpy_helper.from_array(np.array(codes, np.int8), "w"))
    return model


def test_saturation_counts_the_hand_computed_pairs():
    # outputs: one candidate pair, two of opposite signs, none
    model = matmul_integer([[127, 100, 1], [127, 100, 127], [127, -100, 1], [0, -29, 127]])
    feeds = [
        {"a": np.array([[255, 255, 255, 255], [0, 0, 0, 0]], np.uint8)},
        {"a": np.array([[255, 255, 0, 0]], np.uint8)},
    ]
    (layer,) = saturation(model, feeds)
    assert layer.node == "layer"
    assert layer.candidate_pairs == 3
    assert layer.pair_sums == 3 * 3  # in three rows
    # row 0: 64770; 51000 and -32895; row 2: 64770; 51000
    assert layer.saturated == 3 + 0 + 2
    assert layer.outputs_hit == pytest.approx(4 / 9)
    assert layer.worst_error == 64770 - 32767


def test_saturation_lists_layers_that_can_not_saturate():
    model, feeds = NEVER["depthwise"]
    (layer,) = saturation(model, [feeds])
    assert (layer.node, layer.candidate_pairs, layer.saturated) == ("layer", 0, 0)
    model, feeds = NEVER["u8_weights"]
    assert saturation(model, [feeds]) == []


@pytest.mark.parametrize("name", ALL)
def test_exact_is_what_a_cpu_with_vnni_answers(name):
    natively_exact()
    model, feeds = ALL[name]
    np.testing.assert_array_equal(run(emulate(model, "exact"), feeds), run(model, feeds))


@pytest.mark.parametrize("name", ALL)
def test_saturates_is_what_a_cpu_without_vnni_answers(name, without_vnni):
    model, feeds = ALL[name]
    np.testing.assert_array_equal(run(emulate(model, "saturates"), feeds), without_vnni[name])


@pytest.mark.parametrize("name", CASES)
def test_every_case_does_saturate(name):
    model, feeds = CASES[name]
    assert (run(emulate(model, "saturates"), feeds) != run(emulate(model, "exact"), feeds)).any()
    (layer,) = saturation(model, [feeds])
    assert layer.node == "layer"
    assert 0 < layer.saturated <= layer.pair_sums
    assert 0 < layer.outputs_hit <= 1


@pytest.mark.parametrize("name", NEVER)
def test_layers_exact_on_every_cpu_stay_as_they_are(name):
    model, _ = NEVER[name]
    assert emulate(model, "saturates") == model
    assert emulate(model, "exact") == model


def test_conv_net_answers_as_with_and_without_vnni(quantized_net, without_vnni):
    model, feeds = quantized_net
    np.testing.assert_array_equal(run(emulate(model, "saturates"), feeds), without_vnni["net"])
    exact = run(emulate(model, "exact"), feeds)
    if host_arithmetic() == "exact":
        np.testing.assert_array_equal(exact, run(model, feeds))
    assert (exact != without_vnni["net"]).any()


def test_a_static_net_without_a_repair_saturates(without_vnni):
    model, feeds = STATIC["static"]
    np.testing.assert_array_equal(run(emulate(model, "saturates"), feeds), without_vnni["static"])
    assert (run(emulate(model, "exact"), feeds) != without_vnni["static"]).any()
    assert sum(layer.saturated for layer in saturation(model, [feeds])) > 0


def test_x64quantprecision_makes_every_sum_exact(without_vnni):
    model, feeds = STATIC["static_precise"]
    exact = run(emulate(model, "exact"), feeds)
    np.testing.assert_array_equal(without_vnni["static_precise"], exact)
    assert (without_vnni["static"] != exact).any()


def test_layers_of_u8_weights_answer_alike_with_and_without_vnni(without_vnni):
    model, feeds = STATIC["static_u8"]
    np.testing.assert_array_equal(without_vnni["static_u8"], run(emulate(model, "exact"), feeds))
    if host_arithmetic() == "exact":
        np.testing.assert_array_equal(without_vnni["static_u8"], run(model, feeds))
    # the same values as the s8 weights that do saturate
    real, _ = STATIC["static"]
    np.testing.assert_array_equal(without_vnni["static_u8"], run(emulate(real, "exact"), feeds))


def test_conv_net_is_reported_layer_by_layer(quantized_net):
    model, feeds = quantized_net
    layers = {layer.node: layer for layer in saturation(model, [feeds])}
    assert list(layers) == ["first", "depthwise", "pointwise", "head"]
    assert layers["first"].saturated > 0
    assert layers["depthwise"].candidate_pairs == 0


def test_answers_do_not_depend_on_where_the_pairs_are_cut(monkeypatch):
    model, feeds = CASES["conv"]
    whole, report = run(emulate(model, "saturates"), feeds), saturation(model, [feeds])
    monkeypatch.setattr(arithmetic, "_PAIRS_AT_ONCE", 100)
    monkeypatch.setattr(arithmetic, "_PAIRS_PER_SUM", 7)
    np.testing.assert_array_equal(run(emulate(model, "saturates"), feeds), whole)
    assert saturation(model, [feeds]) == report


@pytest.mark.parametrize("kind", ["exact", "saturates"])
def test_same_model_gives_same_bytes_and_stays_as_it_was(kind):
    model, _ = CASES["conv"]
    before = model.SerializeToString(deterministic=True)
    first, second = emulate(model, kind), emulate(model, kind)
    assert first.SerializeToString() == second.SerializeToString()
    assert model.SerializeToString(deterministic=True) == before


def test_s8_weights_that_are_no_constant_are_refused():
    node = helper.make_node("MatMulInteger", ["a", "w"], ["y"], "layer")
    model = graph(
        [node],
        [("a", TensorProto.UINT8, [2, 4]), ("w", TensorProto.INT8, [4, 3])],
        [("y", TensorProto.INT32)],
        {},
    )
    with pytest.raises(ConfigError, match=r"'layer'.*no constant.*u8 weights"):
        emulate(model, "saturates")


def test_padding_that_is_not_written_as_numbers_is_refused():
    model, _ = qdq("Conv", (1, 6, 9, 9), (8, 6, 3, 3), auto_pad="SAME_UPPER")
    with pytest.raises(ConfigError, match="auto_pad"):
        emulate(model, "saturates")


def test_model_that_onnxruntime_refuses_is_refused():
    node = helper.make_node("NoSuchOperator", ["a"], ["y"], "layer")
    model = graph([node], [("a", TensorProto.UINT8, [2])], [("y", TensorProto.UINT8)], {})
    with pytest.raises(ConfigError, match="NoSuchOperator"):
        emulate(model, "exact")
