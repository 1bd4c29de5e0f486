"""The reader of a graph's external locations, against the onnx package and by hand."""

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, external_data_helper, helper

from edgetune.runtime.graph import Place, external_places, operator_domains, relocated


def external_locations(data):
    return {place.location for place in external_places(data)}


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
    with pytest.raises(ValueError, match=r"tag|wire type|cut off|does not end|in part"):
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


# -- domains and moving ----------------------------------------------------------------------------


def test_the_domains_are_those_that_the_model_imports():
    proto = onnx.ModelProto.FromString(model(graph()))
    proto.opset_import.add(domain="com.example", version=3)
    proto.opset_import.add(domain="ai.onnx", version=18)
    assert operator_domains(proto.SerializeToString()) == {"", "com.example", "ai.onnx"}


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=4), st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_moving_changes_the_places_and_nothing_else(locations, offset):
    tensors = [external(location) for location in locations]
    inside = helper.make_tensor("location", TensorProto.FLOAT, [1], [1.0])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=graph([constant("b")], [inside]))
    data = model(graph([branch, constant("a")], [*tensors, inside]))

    def move(place):
        return Place(location=f"new-{place.location}", offset=place.offset + offset, length=4)

    moved = onnx.ModelProto.FromString(relocated(data, move))
    for tensor in external_data_helper._get_all_tensors(moved):
        if external_data_helper.uses_external_data(tensor):
            info = external_data_helper.ExternalDataInfo(tensor)
            assert (info.offset, info.length) == (offset, 4)
            new = info.location
            del tensor.external_data[:]
            tensor.external_data.extend(external(new.removeprefix("new-")).external_data)
    assert moved == onnx.ModelProto.FromString(data)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": "0"}, "in part"),
        ({"location": "w", "offset": "-1"}, "no number of bytes"),
        ({"location": "w", "length": "1e3"}, "no number of bytes"),
        ({"location": "w", "offset": "9" * 21}, "no number of bytes"),
        ({"location": "w", "offset": ""}, "no number of bytes"),
    ],
)
def test_a_place_that_is_none_is_a_value_error(entries, message):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    # a tensor beside it, whose name is "location", makes the reader look at all of them
    data = model(graph([], [tensor, helper.make_tensor("location", 1, [1], [0.0])]))
    if "location" in entries:
        with pytest.raises(ValueError, match=message):
            external_places(data)
    else:
        assert external_places(data) == set()  # onnxruntime refuses it: no file is named


def test_a_place_that_is_named_twice_is_a_value_error():
    tensor = external("weights.bin")
    tensor.external_data.add(key="location", value="../secret")
    with pytest.raises(ValueError, match="named twice"):
        external_places(model(graph([], [tensor])))
