import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetune.quantize.calibrate import run_tensors
from edgetune.quantize.embeddings import quantize_embeddings, row_codes

IDS = np.array([[0, 3], [511, 3]], np.int64)


def lookups(table: np.ndarray, *, tied: bool = False, times: int = 1) -> onnx.ModelProto:
    """Rows of one table looked up, once or more; `tied`: also multiplied by the table."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], [f"rows{i}"], name=f"lookup{i}", axis=0)
        for i in range(times)
    ]
    if tied:
        nodes.append(helper.make_node("Transpose", ["table"], ["turned"], name="turn"))
        nodes.append(helper.make_node("MatMul", ["rows0", "turned"], ["scores"], name="scores"))
    outputs = [f"rows{i}" for i in range(times)] + ["scores"] * tied
    graph = helper.make_graph(
        nodes,
        "lookups",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ("batch", "tokens"))],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, (None,) * 3) for o in outputs],
        [numpy_helper.from_array(table, "table")],
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


@pytest.fixture
def table() -> np.ndarray:
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.01, 10, (512, 1))
    return (rng.normal(size=(512, 64)) * spread).astype(np.float32)


def test_row_codes_match_a_hand_computation():
    # first row: -1..4.1 in steps of 5.1 / 255 = 0.02, so 0 is code 50
    codes, scale, zero_point = row_codes(np.float32([[-1.0, 0.0, 4.1], [0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(codes, [[0, 50, 255], [0, 0, 0]])
    np.testing.assert_allclose(scale, [[0.02], [0.0]], rtol=1e-6)
    np.testing.assert_array_equal(zero_point, [[50], [0]])


def test_no_value_moves_by_more_than_half_a_step_of_its_row(table: np.ndarray):
    table[3] = np.abs(table[3]) + 5  # a row on one side of zero
    (values,) = run_tensors(quantize_embeddings(lookups(table)), [{"ids": IDS}], ["rows0"])
    wanted = table[IDS]
    high = np.maximum(wanted.max(axis=-1), 0).astype(np.float64)
    low = np.minimum(wanted.min(axis=-1), 0).astype(np.float64)
    half_step = (high - low) / 255 / 2
    error = np.abs(values["rows0"] - wanted).max(axis=-1)
    assert (error <= half_step * 1.0001).all()
    assert (error > half_step * 0.5).all()  # 64 values a row: some lie near the middle of a step


def test_the_graph_is_plain_onnx_of_opset_18_and_a_quarter_of_the_size(table: np.ndarray):
    before = lookups(table)
    after = quantize_embeddings(before)
    onnx.checker.check_model(after, full_check=True)
    assert [(o.domain, o.version) for o in after.opset_import] == [("", 18)]
    assert {n.op_type for n in after.graph.node} == {"Gather", "Cast", "Sub", "Mul"}
    assert after.ByteSize() < 0.3 * before.ByteSize()
    assert before == lookups(table)


def test_a_table_looked_up_twice_is_stored_once(table: np.ndarray):
    after = quantize_embeddings(lookups(table, times=2))
    assert len(after.graph.initializer) == 3
    (values,) = run_tensors(after, [{"ids": IDS}], ["rows0", "rows1"])
    np.testing.assert_array_equal(values["rows0"], values["rows1"])


def test_what_is_small_tied_or_excluded_stays_as_it_is(table: np.ndarray):
    for model, keep in (
        (lookups(table[:512, :16]), ()),  # 32 KiB
        (lookups(table, tied=True), ()),
        (lookups(table, times=2), ("lookup1",)),
    ):
        assert quantize_embeddings(model, keep_float=keep) == model
