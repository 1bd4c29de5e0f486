"""The session: versions, providers, threads, and one model for many callers."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgetune.errors import ConfigError, EdgetuneError
from edgetune.runtime import Classification, EdgeModel, ort
from edgetune.runtime.manifest import Compatibility, SessionSettings


def needs(minimum="1.17.0", excluded=()):
    return Compatibility(
        onnxruntime_min=minimum, onnxruntime_excluded=excluded, opset=17, ir_version=8
    )


@pytest.mark.parametrize(
    ("found", "minimum"),
    [
        ("1.20.1", "1.20.1"), ("1.20.10", "1.20.9"), ("2.0.0", "1.99.9"), ("1.20.1", "1.20"),
        ("1.20.0", "1.20"), ("1.20", "1.20.0"), ("1.20.1+cu12", "1.20.1"),
        ("1.23.0.dev20250101", "1.23.0"), ("1.21.0rc1", "1.20.9"),
    ],
)  # fmt: skip
def test_a_version_that_is_new_enough_is_taken(monkeypatch, found, minimum):
    monkeypatch.setattr(ort.onnxruntime, "__version__", found)
    ort.check_version(needs(minimum))


@pytest.mark.parametrize(
    ("found", "minimum"),
    [("1.9.0", "1.17.0"), ("1.20.0", "1.20.1"), ("1.20.1rc2", "1.20.12"), ("0.9", "1")],
)
def test_a_version_that_is_too_old_is_refused_with_the_remedy(monkeypatch, found, minimum):
    monkeypatch.setattr(ort.onnxruntime, "__version__", found)
    with pytest.raises(ConfigError, match=f"pip install 'onnxruntime>={minimum}'") as caught:
        ort.check_version(needs(minimum))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("found", ["1.21.0", "1.21.0+cu12", "1.21"])
def test_an_excluded_version_is_refused_in_every_build(monkeypatch, found):
    monkeypatch.setattr(ort.onnxruntime, "__version__", found)
    with pytest.raises(ConfigError, match=r"1\.21\.0 excluded"):
        ort.check_version(needs(excluded=("1.21.0",)))
    ort.check_version(needs(excluded=("1.21.1", "1.2.1")))


def test_providers_that_are_absent_are_a_config_error(color_bundle, seal):
    seal(color_bundle, session=SessionSettings(execution_providers=("NoSuchProvider",)))
    with pytest.raises(ConfigError, match=r"has .*CPUExecutionProvider; the bundle wants one of"
                       " NoSuchProvider"):  # fmt: skip
        EdgeModel.load(color_bundle)


def test_the_first_provider_that_is_there_serves(color_bundle, seal):
    providers = ("NoSuchProvider", "CPUExecutionProvider")
    seal(color_bundle, session=SessionSettings(execution_providers=providers))
    model = EdgeModel.load(color_bundle)
    assert model.predict(np.full((1, 1, 3), (0, 9, 0), np.uint8)).label == "green"


@pytest.mark.parametrize("level", ["off", "basic", "extended", "all"])
def test_every_level_of_optimization_gives_the_same_answer(word_bundle, seal, level):
    seal(word_bundle, session=SessionSettings(graph_optimization=level, allow_spinning=True))
    model = EdgeModel.load(word_bundle)
    np.testing.assert_array_equal(model.outputs("bad bad good")["logits"], [[2, 1]])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_can_be_overridden(word_bundle, threads):
    model = EdgeModel.load(word_bundle, threads=threads)
    assert model._session.get_session_options().intra_op_num_threads == threads
    assert model.predict("good").label == "positive"


def test_without_override_the_manifest_names_the_threads(word_bundle, seal):
    config = {"session.set_denormal_as_zero": "1"}
    seal(word_bundle, session=SessionSettings(intra_op_threads=3, config=config))
    options = EdgeModel.load(word_bundle)._session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_a_number_of_threads_out_of_bounds_is_a_config_error(word_bundle, threads):
    with pytest.raises(ConfigError, match=f"threads: expected 1 to 1024, got {threads}"):
        EdgeModel.load(word_bundle, threads=threads)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"picture": np.zeros((1, 2, 2, 3), np.uint8)},
        {"image": np.zeros((2, 2, 3), np.uint8)},
        {"image": np.zeros((1, 2, 2, 4), np.uint8)},
        {"image": np.zeros((1, 2, 2, 3), np.float32)},
        {"image": "text"},
    ],
)
def test_arrays_that_do_not_fit_the_graph_are_an_edgetune_error_on_one_line(color_bundle, inputs):
    model = EdgeModel.load(color_bundle)
    with pytest.raises(EdgetuneError, match=r"cannot be run on .*onnxruntime \d") as caught:
        model.run(inputs)
    assert "\n" not in str(caught.value)


def test_the_graph_can_be_run_on_its_own_arrays(color_bundle):
    model = EdgeModel.load(color_bundle)
    outputs = model.run({"image": np.array([[[[1, 2, 3], [3, 2, 1]]]], np.uint8)})
    np.testing.assert_array_equal(outputs["logits"], [[2, 2, 2]])
    assert list(outputs) == ["logits"]


def test_one_model_in_eight_threads_gives_the_answers_of_one(color_bundle, word_bundle):
    words = EdgeModel.load(word_bundle, threads=1)
    colors = EdgeModel.load(color_bundle, threads=1)
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        answers = []
        for turn in range(25):
            channel = (number + turn) % 3
            image = np.zeros((1 + number, 2 + turn % 4, 3), np.uint8)
            image[..., channel] = 50
            count = (number * 7 + turn) % 5
            text = " ".join(["good"] * count)
            answers.append(
                (
                    colors.predict([image, 255 - image])[0].label,
                    words.outputs(text)["logits"].tolist(),
                    [r.label for r in words.predict([text, "bad", "good"])][1:],
                )
            )
        return answers

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for number, answers in enumerate(results):
        for turn, answer in enumerate(answers):
            color = ("red", "green", "blue")[(number + turn) % 3]
            count = (number * 7 + turn) % 5
            assert answer == (color, [[0.0, float(count)]], ["negative", "positive"])


def test_a_model_knows_its_labels_and_gives_records(word_bundle):
    model = EdgeModel.load(str(word_bundle))
    assert model.labels == ("negative", "positive")
    assert isinstance(model.predict("good"), Classification)
    with pytest.raises(AttributeError):
        model.predict("good").label = "negative"


def test_the_package_has_the_names_it_lists_and_no_others():
    import edgetune.runtime as package

    assert {getattr(package, name).__name__ for name in package.__all__} == set(package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Model'"):
        package.Model  # noqa: B018
