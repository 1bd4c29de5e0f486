"""The reader of a graph's external locations, against the onnx package and by hand."""

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, external_data_helper, helper

from edgetune.runtime.external_data import external_locations


def external(location):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value="4")
    return tensor


def constant(location):
    return helper.make_node("Constant", [], ["c"], value=external(location))


def graph(nodes=(), tensors=(), **more):
    return helper.make_graph(list(nodes), "g", [], [], list(tensors), **more)


def model(inner, functions=()):
    return helper.make_model(inner, functions=list(functions)).SerializeToString()


def test_a_graph_without_external_data_names_no_file():
    inside = helper.make_tensor("location", TensorProto.FLOAT, [1], [1.0])
    node = helper.make_node("Identity", ["location"], ["y"], name="location", doc_string="location")
    assert external_locations(model(graph([node], [inside]))) == set()
    assert external_locations(b"") == set()


def test_every_initializer_is_read():
    tensors = [external("weights.bin"), external("../secret.bin"), external("weights.bin")]
    assert external_locations(model(graph(tensors=tensors))) == {"weights.bin", "../secret.bin"}


def test_tensors_in_attributes_and_inner_graphs_are_read():
    branch = helper.make_node(
        "If",
        ["x"],
        ["y"],
        then_branch=graph([constant("a")]),
        else_branch=graph([], [external("b")]),
    )
    listed = helper.make_node(
        "Odd", [], [], tensors=[external("c")], graphs=[graph([], [external("d")])]
    )
    nested = helper.make_node("If", ["x"], ["z"], then_branch=graph([branch, listed]))
    assert external_locations(model(graph([nested]))) == {"a", "b", "c", "d"}


def test_sparse_tensors_functions_and_training_graphs_are_read():
    sparse = onnx.SparseTensorProto(values=external("a"), indices=external("b"), dims=[1])
    function = helper.make_function(
        "edge", "F", [], ["c"], [constant("c")], [helper.make_opsetid("", 17)]
    )
    proto = onnx.ModelProto.FromString(
        model(graph([helper.make_node("Constant", [], ["s"], sparse_value=sparse)],
                    sparse_initializer=[sparse]), [function])
    )  # fmt: skip
    training = proto.training_info.add()
    training.algorithm.CopyFrom(graph([], [external("d")]))
    training.initialization.CopyFrom(graph([constant("e")]))
    assert external_locations(proto.SerializeToString()) == {"a", "b", "c", "d", "e"}


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=4),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=200), max_size=4),
)
@settings(max_examples=50, deadline=None)
def test_it_finds_what_the_onnx_package_finds(in_nodes, in_initializers):
    data = model(graph(map(constant, in_nodes), map(external, in_initializers)))
    expected = {
        external_data_helper.ExternalDataInfo(tensor).location
        for tensor in external_data_helper._get_all_tensors(onnx.ModelProto.FromString(data))
    }
    assert expected == {*in_nodes, *in_initializers}
    assert external_locations(data) == expected


# -- what no writer writes and protobuf reads ----------------------------------------------------


def field(number, data, *, overlong=0):
    """Encode a length-delimited field, the length in `overlong` bytes more than it needs."""
    return varint(number << 3 | 2) + varint(len(data), overlong) + data


def varint(value, overlong=0):
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    for _ in range(overlong):
        groups[-1] |= 0x80
        groups.append(0)
    return bytes(groups)


def by_hand(entry):
    """Return a model whose only initializer has that entry among its external data."""
    return field(7, field(5, field(13, entry)))


@pytest.mark.parametrize(
    "entry",
    [
        field(1, b"location") + field(2, b"x"),
        field(2, b"x") + field(1, b"location"),
        field(1, b"offset") + field(2, b"y") + field(1, b"location") + field(2, b"x"),
        field(1, b"location", overlong=3) + field(2, b"x", overlong=2),
        field(9, b"?") + b"\x18\x05" + field(1, b"location") + b"\x25abcd" + field(2, b"x")
        + b"\x29abcdefgh",
    ],
    ids=["as written", "value first", "repeated", "long lengths", "unknown fields"],
)  # fmt: skip
def test_an_entry_is_found_however_it_is_encoded(entry):
    data = by_hand(entry)
    tensor = onnx.ModelProto.FromString(data).graph.initializer[0]
    assert external_data_helper.ExternalDataInfo(tensor).location == "x"  # protobuf's own reading
    assert external_locations(data) == {"x"}


def test_parts_of_one_graph_are_all_read():
    # protobuf joins the two graphs to one
    first, second = (by_hand(field(1, b"location") + field(2, x)) for x in (b"x", b"y"))
    assert len(onnx.ModelProto.FromString(first + second).graph.initializer) == 2
    assert external_locations(first + second) == {"x", "y"}


def test_a_key_without_value_names_the_empty_path():
    assert external_locations(by_hand(field(1, b"location"))) == {""}


@pytest.mark.parametrize(
    "data",
    [
        b"\x80", b"\x3a", b"\x3a\x05abc", b"\x3b", b"\x0f", b"\xff" * 20, b"\x39abc",
        b"\xba\x80\x80\x80\x80\x01\x00",  # field 7, its tag beyond 32 bits
        by_hand(field(1, b"location") + b"\x12\x7fx"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_message_are_a_value_error(data):
    with pytest.raises(ValueError, match=r"tag|wire type|cut off|does not end"):
        external_locations(data)


def test_graphs_without_end_inside_one_another_are_a_value_error():
    data = field(5, field(13, field(1, b"location")))
    for _ in range(100):
        data = field(1, field(5, field(6, data)))
    with pytest.raises(ValueError, match="too many graphs inside one another"):
        external_locations(field(7, data))


@given(st.binary(max_size=100))
@example(by_hand(b"location"))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_are_read_or_a_value_error(data):
    try:
        found = external_locations(data)
    except ValueError:
        return
    assert all(isinstance(name, str) for name in found)


def test_a_cut_graph_is_a_value_error_or_names_no_more_than_the_whole():
    data = model(graph([constant("a")], [external("b"), helper.make_tensor("t", 1, [1], [0.0])]))
    for length in range(len(data)):
        try:
            assert external_locations(data[:length]) <= {"a", "b"}
        except ValueError:
            continue


def test_weights_of_many_megabytes_inside_the_graph_are_skipped():
    heavy = onnx.numpy_helper.from_array(np.zeros(2**22, np.float32), "heavy")
    assert external_locations(model(graph([], [heavy, external("x")]))) == {"x"}
