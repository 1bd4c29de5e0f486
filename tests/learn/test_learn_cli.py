"""`edgetune-rt learn` reads what stands on its command line."""

import pytest

from edgetune.errors import ConfigError, DataError
from edgetune.runtime.cli.learn import read_samples
from edgetune.runtime.model import EdgeModel


def test_a_file_gives_its_lines_and_a_text_itself(word_bundle, tmp_path):
    (tmp_path / "shots.txt").write_text("good good\n\nbad\n")
    with EdgeModel.load(word_bundle) as model:
        found = read_samples(model, ["good", str(tmp_path / "shots.txt"), "open notes.txt"])
    assert found == ["good", "good good", "bad", "open notes.txt"]


def test_a_missing_file_is_not_taught_as_a_text(word_bundle, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with EdgeModel.load(word_bundle) as model:
        with pytest.raises(DataError, match="no such file"):
            read_samples(model, [str(tmp_path / "shots.txt")])
        with pytest.raises(DataError, match="no UTF-8"):
            read_samples(model, [str(tmp_path / "latin.txt")])


def test_a_folder_without_images_is_refused(color_bundle, tmp_path):
    with EdgeModel.load(color_bundle) as model, pytest.raises(ConfigError, match="no image"):
        read_samples(model, [str(tmp_path)])
