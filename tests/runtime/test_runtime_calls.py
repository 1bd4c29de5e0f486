"""The ways to call a model: streams, asyncio, time limits, files, frames; and after closing."""

import asyncio
import io
import json
import threading
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgetune.errors import ConfigError, DataError, EdgetuneError, PredictionTimeout
from edgetune.runtime import Classification, EdgeModel
from edgetune.runtime.packing import pack
from edgetune.runtime.watch import read_watch


@pytest.fixture
def words(word_bundle):
    with EdgeModel.load(word_bundle) as model:
        yield model


@pytest.fixture
def slow_bundle(color_bundle, seal):
    """Colours, after a loop that goes round for minutes; it can be stopped at each turn."""
    graph = onnx.load(color_bundle / "model.onnx", load_external_data=False)
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Sin", ["x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        ],
    )
    nodes = list(graph.graph.node)
    del graph.graph.node[:]
    nodes[-1].output[0] = "fast"
    loop = helper.make_node("Loop", ["turns", "", "fast"], ["logits"], body=body)
    graph.graph.node.extend([*nodes, loop])
    graph.graph.initializer.append(helper.make_tensor("turns", TensorProto.INT64, [], [10**9]))
    (color_bundle / "model.onnx").write_bytes(graph.SerializeToString())
    seal(color_bundle)
    return color_bundle


RED = np.full((2, 2, 3), (9, 0, 0), np.uint8)


# -- results and inputs --------------------------------------------------------------------------


def test_a_result_is_typed_and_json_can_hold_it(words):
    result = words.predict("good", all_scores=True)
    assert isinstance(result, Classification)
    stored = json.loads(json.dumps(result.to_dict()))
    assert stored["label"] == "positive"
    assert stored["scores"]["positive"] == stored["score"] == pytest.approx(1 / (1 + np.exp(-1)))
    assert words.predict("good").to_dict().keys() == {"label", "score"}


def test_an_open_file_is_an_image(color_bundle):
    from PIL import Image

    stored = io.BytesIO()
    Image.fromarray(RED).save(stored, "PNG")
    stored.seek(0)
    model = EdgeModel.load(color_bundle)
    assert model.predict(stored).label == "red"
    assert not stored.closed
    with pytest.raises(DataError, match="is no image that Pillow knows"):
        model.predict(io.BytesIO(b"no image"))


def test_a_frame_is_not_copied(color_bundle):
    model = EdgeModel.load(color_bundle)
    frame = np.zeros((480, 640, 3), np.uint8)
    batch = model.task.stack([model.task.encode(frame)])
    assert batch["image"].shape == (1, 480, 640, 3)
    assert np.shares_memory(batch["image"], frame)


def test_run_takes_the_graphs_own_arrays(color_bundle):
    outputs = EdgeModel.load(color_bundle).run({"image": RED[None]})
    np.testing.assert_array_equal(outputs["logits"], [[9, 0, 0]])


# -- closing -------------------------------------------------------------------------------------


def test_a_closed_model_says_so(word_bundle):
    with EdgeModel.load(word_bundle) as model:
        model.predict("good")
    with pytest.raises(EdgetuneError, match="this model was closed"):
        model.predict("good")
    model.close()


# -- time limits ---------------------------------------------------------------------------------


def test_a_time_limit_that_is_kept_changes_nothing(words):
    assert words.predict("bad", timeout=60).label == "negative"
    assert [r.label for r in words.predict(["bad", "good"], timeout=60)] == ["negative", "positive"]


def test_a_run_that_takes_longer_is_stopped(slow_bundle):
    model = EdgeModel.load(slow_bundle)
    begin = time.monotonic()
    with pytest.raises(PredictionTimeout, match=r"no answer within 0\.2 s") as caught:
        model.predict(RED, timeout=0.2)
    assert 0.2 <= time.monotonic() - begin < 20
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("timeout", [0, -1.5, float("nan")])
def test_a_time_limit_of_nothing_is_a_config_error(words, timeout):
    with pytest.raises(ConfigError, match="timeout: expected more than 0 seconds"):
        words.predict("good", timeout=timeout)


# -- streams -------------------------------------------------------------------------------------


def test_a_stream_answers_in_order(words):
    samples = ["good", "bad"] * 40
    expected = [words.predict(sample) for sample in samples]
    assert list(words.predict_stream(iter(samples))) == expected
    assert list(words.predict_stream([])) == []


def test_a_source_is_read_no_further_ahead_than_the_queue(words):
    taken = []

    def source():
        for number in range(100):
            taken.append(number)
            yield "good"

    stream = words.predict_stream(source(), queue_size=3)
    for answered in range(1, 20):
        next(stream)
        time.sleep(0.01)
        assert len(taken) <= answered + 3
    stream.close()


def test_a_stream_that_is_left_stops_its_thread(words):
    endless = iter(lambda: "good", None)
    stream = words.predict_stream(endless)
    next(stream)
    assert any(t.name == "edgetune-stream" for t in threading.enumerate())
    stream.close()
    deadline = time.monotonic() + 10
    while any(t.name == "edgetune-stream" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_sample_that_cannot_be_answered_ends_the_stream_or_is_given_in_its_place(words):
    samples = ["good", 7, "bad"]
    stream = words.predict_stream(samples)
    assert next(stream).label == "positive"
    with pytest.raises(DataError, match="expected a string, got int"):
        next(stream)
    first, failure, last = words.predict_stream(samples, errors="return")
    assert (first.label, last.label) == ("positive", "negative")
    assert isinstance(failure, DataError)


def test_an_error_of_the_source_is_the_callers(words):
    def source():
        yield "good"
        raise RuntimeError("the camera is gone")

    stream = words.predict_stream(source())
    next(stream)
    with pytest.raises(RuntimeError, match="the camera is gone"):
        next(stream)


# -- asyncio -------------------------------------------------------------------------------------


def test_many_awaited_calls_answer_as_predict_does(words):
    async def ask():
        return await asyncio.gather(*(words.apredict(s) for s in ["good", "bad", "good good"]))

    assert [r.label for r in asyncio.run(ask())] == ["positive", "negative", "positive"]


def test_the_event_loop_runs_while_an_answer_is_computed(slow_bundle):
    model = EdgeModel.load(slow_bundle)
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def ask():
        ticking = asyncio.create_task(tick())
        with pytest.raises(PredictionTimeout):
            await model.apredict(RED, timeout=0.5)
        ticking.cancel()

    asyncio.run(ask())
    assert ticks >= 5
    model.close()


def test_a_call_that_is_cancelled_stops_its_run(slow_bundle):
    model = EdgeModel.load(slow_bundle)

    async def ask():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(model.apredict(RED), timeout=0.2)

    begin = time.monotonic()
    asyncio.run(ask())
    model.close()  # waits for the thread, whose run would take minutes
    assert time.monotonic() - begin < 20


def test_an_error_comes_out_of_the_await(words):
    with pytest.raises(DataError, match="expected a string, got int"):
        asyncio.run(words.apredict(7))


# -- watching -------------------------------------------------------------------------------------


def test_a_watched_model_notes_what_it_predicts(word_bundle, tmp_path):
    with EdgeModel.load(word_bundle, watch=tmp_path / "watch") as model:
        model.predict("good")
        model.predict(["bad", "bad bad"])
        list(model.predict_stream(["good"]))
        asyncio.run(model.apredict("bad"))
        assert not list((tmp_path / "watch").iterdir())  # a window is not full yet
    (line,) = read_watch(tmp_path / "watch")
    assert line.classes == {"positive": 2, "negative": 3}
    assert sum(line.latency.values()) == line.predictions - 1  # the list was one batch
    assert line.bundle == model.manifest.digest
    assert line.inputs == ()


def test_inputs_are_noted_where_that_is_asked_for(word_bundle, tmp_path):
    with EdgeModel.load(word_bundle, watch=tmp_path / "w", keep_inputs=2) as model:
        model.predict(["good good good", "good", "bad bad"])
    (line,) = read_watch(tmp_path / "w")
    assert line.inputs == ("good", "bad bad")  # those that the model was least sure of


def test_a_stream_is_watched_with_its_inputs(word_bundle, tmp_path):
    with EdgeModel.load(word_bundle, watch=tmp_path / "w", keep_inputs=1) as model:
        list(model.predict_stream(["good good", "good"]))
    (line,) = read_watch(tmp_path / "w")
    assert line.inputs == ("good",)


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check": "ful"}, "check: expected 'quick' or 'full', got 'ful'"),
        ({"check": True}, "check: expected 'quick' or 'full', got True"),
        ({"threads": "2"}, "threads: expected 1 to 1024, got '2'"),
        ({"threads": True}, "threads: expected 1 to 1024, got True"),
        ({"keep_inputs": 3}, "keep_inputs: there is no watch to keep them in"),
    ],
)
def test_an_option_that_is_wrong_is_refused(word_bundle, options, message):
    with pytest.raises(ConfigError, match=message):
        EdgeModel.load(word_bundle, **options)


def test_a_watch_that_cannot_be_written_is_told_at_once(word_bundle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"watch: .*file: cannot be a folder"):
        EdgeModel.load(word_bundle, watch=tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"errors": "ignore"}, ConfigError, "errors: expected 'raise' or 'return', got 'ignore'"),
        ({"queue_size": 0}, ConfigError, "queue_size: expected 1 or more, got 0"),
        ({"samples": "photo.jpg"}, DataError, "expected samples to iterate over, got one"),
    ],
)
def test_a_stream_that_is_wrong_is_refused_at_the_call(words, options, error, message):
    with pytest.raises(error, match=message):
        words.predict_stream(**{"samples": ["good"], **options})


def test_run_takes_a_table_of_arrays(words):
    with pytest.raises(DataError, match="expected a table of name -> array, got list"):
        words.run([1])


def test_a_stream_takes_as_many_ahead_as_it_is_told(words):
    for size in (1, 2, 5):
        taken = []

        def source(taken=taken):
            for _ in range(20):
                taken.append(1)
                yield "good"

        stream = words.predict_stream(source(), queue_size=size)
        next(stream)
        time.sleep(0.3)
        assert len(taken) == 1 + size
        stream.close()


# -- closing in the middle -------------------------------------------------------------------------


def test_a_stream_of_a_closed_model_ends_whatever_it_returns(words):
    stream = words.predict_stream(iter(lambda: "good", None), errors="return")
    next(stream)
    words.close()
    with pytest.raises(EdgetuneError, match="this model was closed"):
        next(stream)


def test_awaited_calls_of_a_model_that_is_closed_are_told_so(slow_bundle):
    model = EdgeModel.load(slow_bundle)

    async def ask():
        calls = [asyncio.create_task(model.apredict(RED, timeout=0.5)) for _ in range(3)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(model.close)
        return await asyncio.gather(*calls, return_exceptions=True)

    first, *rest = asyncio.run(ask())
    assert isinstance(first, PredictionTimeout)
    assert all(isinstance(error, EdgetuneError) for error in rest)
    with pytest.raises(EdgetuneError, match="this model was closed"):
        asyncio.run(model.apredict(RED))
    assert not any(t.name.startswith("edgetune") for t in threading.enumerate())


def test_the_time_that_a_call_waits_for_its_turn_counts(slow_bundle):
    model = EdgeModel.load(slow_bundle)

    async def ask():
        begin = time.monotonic()
        calls = [asyncio.create_task(model.apredict(RED, timeout=0.5)) for _ in range(4)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(error, PredictionTimeout) for error in found)
        return time.monotonic() - begin

    assert asyncio.run(ask()) < 1.5  # and not four times as long
    model.close()


def test_a_call_that_waits_behind_a_longer_one_is_late_in_time(slow_bundle):
    model = EdgeModel.load(slow_bundle)

    async def ask():
        longer = asyncio.create_task(model.apredict(RED))  # would take minutes
        await asyncio.sleep(0.1)
        begin = time.monotonic()
        with pytest.raises(PredictionTimeout, match=r"no answer within 0\.3 s"):
            await model.apredict(RED, timeout=0.3)
        waited = time.monotonic() - begin
        assert not longer.done()
        longer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await longer
        return waited

    assert asyncio.run(ask()) < 5
    model.close()


def test_a_closed_zip_has_no_goldens(word_bundle, tmp_path):
    pack(word_bundle, tmp_path / "w.zip")
    with EdgeModel.load(tmp_path / "w.zip") as model:
        assert len(model.goldens()) == 2
    with pytest.raises(EdgetuneError, match="was closed"):
        model.goldens()


def test_an_image_whose_decoder_fails_in_its_own_way_is_a_data_error(color_bundle, monkeypatch):
    from PIL import Image

    def fail(_):
        raise RuntimeError("broken AVIF")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError, match="cannot be decoded: broken AVIF"):
        EdgeModel.load(color_bundle).predict(b"...")
