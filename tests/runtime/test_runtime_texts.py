import math

import numpy as np
import pytest
from tokenizers import Tokenizer

from edgetune.errors import DataError, IntegrityError
from edgetune.runtime import EdgeModel

E = math.e


@pytest.fixture
def model(word_bundle):
    return EdgeModel.load(word_bundle)


@pytest.fixture
def batches(model, monkeypatch):
    """The input arrays of every run of the graph."""
    seen = []
    run = model._run
    monkeypatch.setattr(model, "_run", lambda *a: (seen.append(a[0]), run(*a))[1])
    return seen


def test_scores_are_the_softmax_of_the_word_counts(model):
    # one bad, two good: logits (1, 2)
    result = model.predict("good good bad", all_scores=True)
    assert result.label == "positive"
    assert result.score == pytest.approx(E / (1 + E))
    assert result.scores == pytest.approx({"negative": 1 / (1 + E), "positive": E / (1 + E)})
    assert sum(result.scores.values()) == pytest.approx(1.0)


def test_scores_of_all_labels_come_only_when_asked_for(model):
    assert model.predict("good").scores is None


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_keeps_its_order(model, kind):
    texts = ["good", "bad bad good", "so good", "bad", "", "good bad bad bad", "good good"]
    labels = [r.label for r in model.predict(kind(texts))]
    assert labels == [
        "positive", "negative", "positive", "negative", "negative", "negative", "positive",
    ]  # fmt: skip


def test_a_list_longer_than_a_batch_keeps_its_order(model, batches):
    texts = ["bad" if i % 3 else "good good" for i in range(21)]
    labels = [r.label for r in model.predict(texts)]
    assert labels == ["negative" if i % 3 else "positive" for i in range(21)]
    assert [len(b["input_ids"]) for b in batches] == [8, 8, 5]


def test_no_texts_give_no_results(model):
    assert model.predict([]) == []


def test_the_empty_string_has_an_answer(model):
    # only [CLS]: logits (0, 0)
    assert model.predict("", all_scores=True).scores == {"negative": 0.5, "positive": 0.5}


def test_a_string_without_any_token_is_one_masked_padding(word_bundle, seal):
    path = word_bundle / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = None
    path.write_text(tokenizer.to_str())
    seal(word_bundle)
    model = EdgeModel.load(word_bundle)
    batch = model.task.stack([model.task.encode("")])
    np.testing.assert_array_equal(batch["input_ids"], [[0]])
    np.testing.assert_array_equal(batch["attention_mask"], [[0]])
    assert model.predict("", all_scores=True).scores == {"negative": 0.5, "positive": 0.5}


def test_padding_changes_no_answer(model, batches):
    # beside a longer text the shorter one is padded, and each padding would add (100, -100)
    results = model.predict(["good", "bad good good bad good"], all_scores=True)
    assert results[0].scores == pytest.approx({"negative": 1 / (1 + E), "positive": E / (1 + E)})
    (batch,) = batches
    np.testing.assert_array_equal(batch["input_ids"], [[2, 3, 0, 0, 0, 0], [2, 4, 3, 3, 4, 3]])
    np.testing.assert_array_equal(batch["attention_mask"], [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == np.int64


def test_a_long_text_is_cut_to_max_length(model, batches):
    # 6 tokens with [CLS]: five words count, the "bad" after them do not
    result = model.predict("good good good good good" + " bad" * 50, all_scores=True)
    assert batches[0]["input_ids"].shape == (1, 6)
    assert result.scores["negative"] == pytest.approx(1 / (1 + E**5))


def test_truncation_and_padding_of_the_tokenizer_file_do_not_count(word_bundle, seal):
    path = word_bundle / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    path.write_text(tokenizer.to_str())
    seal(word_bundle)
    arrays = EdgeModel.load(word_bundle).task.encode("good bad good")
    np.testing.assert_array_equal(arrays["input_ids"], [2, 3, 4, 3])


def test_words_out_of_the_vocabulary_and_odd_characters_have_an_answer(model):
    for text in ("żółw 🐢", "a\0b", "\n\t ", "‮good"):
        assert model.predict(text).label in model.labels


@pytest.mark.parametrize(
    ("sample", "got"),
    [(None, "NoneType"), (7, "int"), (b"good", "bytes"), (np.array(["good"]), "ndarray")],
)
def test_what_is_no_string_is_a_data_error_that_says_what_was_got(model, sample, got):
    with pytest.raises(DataError, match=f"expected a string, got {got}") as caught:
        model.predict(sample)
    assert caught.value.exit_code == 3
    with pytest.raises(DataError, match=f"expected a string, got {got}"):
        model.predict(["good", sample])


def test_half_of_a_surrogate_pair_is_a_data_error(model):
    with pytest.raises(DataError, match="is no Unicode text"):
        model.predict("good \ud83d")


def test_an_answer_does_not_depend_on_the_one_before(model):
    before = model.predict("bad", all_scores=True)
    model.predict("good " * 100)
    assert model.predict("bad", all_scores=True) == before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 6},
        {"max_length": 6, "pad_id": 0, "lower": True},
        {"max_length": "6", "pad_id": 0},
        {"max_length": True, "pad_id": 0},
        {"max_length": 0, "pad_id": 0},
        {"max_length": -1, "pad_id": 0},
        {"max_length": 10**30, "pad_id": 0},
        {"max_length": 6, "pad_id": -1},
        {"max_length": 6, "pad_id": 10**30},
    ],
)
def test_options_that_are_wrong_refuse_the_bundle(word_bundle, seal, options):
    seal(word_bundle, options=options)
    with pytest.raises(IntegrityError, match="manifest: options"):
        EdgeModel.load(word_bundle)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\x00", b'{"version": "1.0", "model": 3}'])
def test_a_tokenizer_that_is_none_refuses_the_bundle(word_bundle, seal, data):
    (word_bundle / "tokenizer.json").write_bytes(data)
    seal(word_bundle)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json: is no tokenizer"):
        EdgeModel.load(word_bundle)


def test_a_text_bundle_without_tokenizer_is_refused(word_bundle, seal):
    (word_bundle / "tokenizer.json").unlink()
    seal(word_bundle)
    with pytest.raises(IntegrityError, match=r"lists no tokenizer\.json"):
        EdgeModel.load(word_bundle)
