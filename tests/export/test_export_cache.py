import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetune.data import Split
from edgetune.errors import ResourceError
from edgetune.export.cache import Cache, key_of, model_key, split_key


def scaling(factor: float) -> onnx.ModelProto:
    """y = factor x."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"], name="scale")],
        "scaling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n",))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n",))],
        [numpy_helper.from_array(np.full(100, factor, np.float32), "factor")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def equal(one: object, other: object) -> bool:
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


# a method, its value, another
KINDS = {
    "json": ({"a": [1, 2.5, None, "ä"]}, {"a": []}),
    "array": (np.arange(1000, dtype=np.float32).reshape(10, 100), np.zeros(3)),
    "model": (scaling(2), scaling(3)),
}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "export-cache")


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_is_made_once(cache: Cache, kind: str):
    made = []

    def make() -> object:
        made.append(1)
        return KINDS[kind][0]

    for was_there in (False, True, True):
        # another process starts with nothing but the folder
        found, cached = getattr(Cache(cache.folder), kind)("thing", "key", make)
        assert cached == was_there
        assert equal(found, KINDS[kind][0])
    assert made == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_another_key_or_kind_is_another_entry(cache: Cache, kind: str):
    first, second = KINDS[kind]
    get = getattr(cache, kind)
    get("thing", "key", lambda: first)
    for name, key in (("thing", "other"), ("other", "key")):
        found, cached = get(name, key, lambda: second)
        assert not cached
        assert equal(found, second)
    assert equal(get("thing", "key", lambda: second)[0], first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["empty", "half", "all but one", "garbage"])
def test_a_damaged_entry_is_made_again(cache: Cache, kind: str, damage: str):
    value, other = KINDS[kind]
    get = getattr(cache, kind)
    get("thing", "key", lambda: value)
    (path,) = cache.folder.iterdir()
    data = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "half": data[: len(data) // 2], "all but one": data[:-1],
         "garbage": b"\xff\x00\x80" * 50}[damage]
    )  # fmt: skip
    found, cached = get("thing", "key", lambda: other)
    assert not cached
    assert equal(found, other)
    assert get("thing", "key", lambda: value)[1]


def test_a_graph_cut_off_anywhere_is_made_again(cache: Cache):
    cache.model("thing", "key", lambda: scaling(2))
    (path,) = cache.folder.iterdir()
    data = path.read_bytes()
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        found, cached = cache.model("thing", "key", lambda: scaling(2))
        assert not cached, length
        assert found == scaling(2)


def test_what_cannot_be_made_leaves_nothing(cache: Cache):
    def fail() -> object:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cache.json("thing", "key", fail)
    assert not cache.folder.exists() or not list(cache.folder.iterdir())
    assert cache.json("thing", "key", lambda: 1) == (1, False)


def test_a_folder_that_cannot_be_written_is_an_error_of_the_machine(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        Cache(tmp_path / "file").json("thing", "key", lambda: 1)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_entries_is_left_in_the_folder(cache: Cache, kind: str):
    getattr(cache, kind)("thing", "key", lambda: KINDS[kind][0])
    assert [p.stem for p in cache.folder.iterdir()] == ["thing-key"]


def test_writers_at_once_leave_whole_entries(cache: Cache):
    # all have looked and found nothing before the first one writes
    barrier = threading.Barrier(8)
    errors: list[Exception] = []

    def write(number: int) -> None:
        def make() -> np.ndarray:
            barrier.wait(timeout=20)
            return np.full(200_000, number)

        try:
            cache.array("thing", "key", make)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found, cached = cache.array("thing", "key", lambda: np.zeros(1))
    assert cached
    assert found.shape == (200_000,)
    assert (found == found[0]).all()
    assert len(list(cache.folder.iterdir())) == 1


# keys


def test_a_key_depends_on_every_part_and_on_where_parts_end():
    keys = [
        key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of("c", "ab"),
        key_of("ab", "c", ""), key_of(b"abd"), key_of(), key_of({"a": 1}), key_of({"a": 2}),
        key_of({"b": 1}), key_of(["a", "b"]), key_of(["b", "a"]),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 32 for key in keys)


def test_the_order_of_a_records_fields_does_not_matter():
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def test_a_key_is_the_same_in_another_process():
    code = "from edgetune.export.cache import key_of; print(key_of('a', {'b': [1, 2.5]}, b'c'))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == key_of("a", {"b": [1, 2.5]}, b"c")


def test_a_graphs_key_depends_on_its_weights():
    assert model_key(scaling(2)) == model_key(scaling(2))
    assert model_key(scaling(2)) != model_key(scaling(2.0001))


def images(folder: Path, *pixels: bytes, labels: tuple[str, ...] = ("a", "b")) -> Split:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(len(pixels))]
    for path, data in zip(paths, pixels, strict=True):
        path.write_bytes(data)
    names = tuple(map(str, paths))
    return Split(name="train", inputs=names, labels=labels, where=names)


def test_a_splits_key_depends_on_the_images_bytes_not_on_path_or_time(tmp_path: Path):
    key = split_key(images(tmp_path / "one", b"first", b"second"))
    assert split_key(images(tmp_path / "elsewhere", b"first", b"second")) == key
    split = images(tmp_path / "one", b"first", b"second")
    for path in split.inputs:
        os.utime(path, (1, 1))
    assert split_key(split) == key
    # the same name, size and time: other bytes
    times = Path(split.inputs[0]).stat()
    Path(split.inputs[0]).write_bytes(b"FIRST")
    os.utime(split.inputs[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert split_key(split) != key


def test_a_splits_key_depends_on_order_and_labels(tmp_path: Path):
    key = split_key(images(tmp_path, b"first", b"second"))
    assert split_key(images(tmp_path, b"second", b"first")) != key
    assert split_key(images(tmp_path, b"first", b"second", labels=("b", "a"))) != key


def texts(*inputs: str) -> Split:
    return Split(name="train", inputs=inputs, labels=("a",) * len(inputs), where=inputs)


def test_texts_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    keys = [split_key(texts(*t)) for t in (("on", "off"), ("off", "on"), ("onoff",), ("on", ""))]
    keys.append(split_key(texts("/" + "x" * 100_000, "/a\0b", "/", ".")))
    assert len(set(keys)) == 5
    # a word that happens to name a file is a text
    (tmp_path / "on").write_text("something else")
    monkeypatch.chdir(tmp_path)
    assert split_key(texts("on", "off")) == keys[0]
