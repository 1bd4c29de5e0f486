import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edgetune.data import Split, read_split
from edgetune.errors import ConfigError, DataError

# no clock in it: parallel test runners compare the names of tests
CUT_SHORT = gzip.compress(b"text,label\nx,a\n" * 99, mtime=0)[:-12]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, *, kind="text", input_column="", label_column="label") -> Split:
    return read_split(
        path, kind=kind, input_column=input_column, label_column=label_column, name="train"
    )


def test_csv_lines_are_counted_as_an_editor_does(tmp_path):
    content = (
        'text,label\n'          # 1
        'plain,a\n'             # 2
        '"two\nlines, and ""quotes""",b\n'  # 3 and 4
        '\n'                    # 5, blank
        '"three\r\n\r\nlines",a\n'          # 6 to 8
        'last,b'                # 9
    )  # fmt: skip
    split = read(write(tmp_path / "train.csv", content))
    assert split.inputs == ("plain", 'two\nlines, and "quotes"', "three\r\n\r\nlines", "last")
    assert split.labels == ("a", "b", "a", "b")
    assert split.where == ("train.csv:2", "train.csv:3", "train.csv:6", "train.csv:9")


def test_windows_line_ends_and_byte_order_mark_are_no_part_of_the_data(tmp_path):
    split = read(write(tmp_path / "t.csv", b"\xef\xbb\xbftext,label\r\nh\xc3\xa9,a\r\n"))
    assert (split.inputs, split.labels, split.where) == (("hé",), ("a",), ("t.csv:2",))


def test_nothing_is_stripped_and_absent_values_stay(tmp_path):
    split = read(write(tmp_path / "t.csv", "id,label,text\n1, a , x \n2,,\n"))
    assert split.inputs == (" x ", "")
    assert split.labels == (" a ", "")


def test_a_field_may_be_longer_than_the_csv_module_allows(tmp_path):
    split = read(write(tmp_path / "t.csv", f"text,label\n{'x' * 200_000},a\n"))
    assert len(split.inputs[0]) == 200_000


@pytest.mark.parametrize("name", ["t.csv.gz", "T.CSV.GZ"])
def test_gz_is_read(tmp_path, name):
    split = read(write(tmp_path / name, gzip.compress(b"text,label\nx,a\n")))
    assert (split.inputs, split.where) == (("x",), (f"{name}:2",))


def test_tsv_with_unbalanced_quotes_keeps_every_row(tmp_path):
    # read with quoting, rows 2 and 3 would become one
    content = 'text\tlabel\n" it begins\t1\nand ends "\t0\n'
    split = read(write(tmp_path / "t.tsv", content))
    assert split.inputs == ('" it begins', 'and ends "')
    assert split.labels == ("1", "0")


def test_quoted_tsv_is_unquoted(tmp_path):
    content = 'text\tlabel\n"say ""hi"""\ta\n"tab\there"\tb\n"two\nlines"\tc\n'
    split = read(write(tmp_path / "t.tsv", content))
    assert split.inputs == ('say "hi"', "tab\there", "two\nlines")
    assert split.where == ("t.tsv:2", "t.tsv:3", "t.tsv:4")


def test_jsonl_labels_of_every_plain_type_become_text(tmp_path):
    content = (
        '{"text": "a", "label": "x"}\n\n{"text": "b", "label": 3}\r\n{"text": "c", "label": true}\n'
        '{"text": "d\u2028e", "label": 4.0}\n{"text": null, "label": null}\n{"other": 1}\n'
    )
    split = read(write(tmp_path / "t.jsonl", content))
    assert split.inputs == ("a", "b", "c", "d\u2028e", "", "")
    assert split.labels == ("x", "3", "True", "4", "", "")
    assert split.where == tuple(f"t.jsonl:{n}" for n in (1, 3, 4, 5, 6, 7))


def test_parquet_is_read_by_row(tmp_path):
    labels = pa.array([1.0, None, float("nan")])
    table = pa.table({"text": ["a", "b", None], "label": labels, "more": [1, 2, 3]})
    pq.write_table(table, tmp_path / "t.parquet")
    split = read(tmp_path / "t.parquet")
    assert split.inputs == ("a", "b", "")
    assert split.labels == ("1", "", "")
    assert split.where == ("t.parquet:1", "t.parquet:2", "t.parquet:3")


def test_image_paths_are_relative_to_the_table(tmp_path):
    content = "image,label\nimages/1.png,a\n/else/2.png,b\n,c\n"
    split = read(write(tmp_path / "t.csv", content), kind="image")
    assert split.inputs == (str(tmp_path / "images/1.png"), "/else/2.png", "")
    assert split.where == ("t.csv:2", "t.csv:3", "t.csv:4")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "t.csv: is empty"),
        ("t.csv", "\n \n", "t.csv: is empty"),
        ("t.csv", "text,label\n", "t.csv: has columns but no rows"),
        ("t.csv", "texts,label\nx,a\n", "no column 'text'; it has 'texts', 'label'; did you mean"
         " 'texts'?; name another with --input-column"),
        ("t.csv", "text,klass\nx,a\n", "no column 'label'; it has 'text', 'klass'; name another"
         " with --label-column"),
        ("t.csv", "text;label\nx;a\n", "the fields look separated by ';'"),
        ("t.csv", "hello,world\n", "the first line must name the columns"),
        ("t.csv", "text,label,text\nx,a,y\n", "column 'text' occurs 2 times"),
        ("t.csv", 'text,label\n"x\ny",a\nb\n', "t.csv:4: expected 2 fields, as the first line has,"
         " got 1"),
        ("t.csv", "text,label\nx, y,a\n", "t.csv:2: expected 2 fields, as the first line has, got"
         " 3; quote fields that hold a comma"),
        ("t.csv", 'text,label\nok,a\n"x" y,a\n', "t.csv:3: is malformed"),
        ("t.csv", 'text,label\n"never closed,a\n', "t.csv:2: is malformed"),
        ("t.csv", b"text,label\nok,a\ncaf\xe9,a\n", "t.csv:3: is not UTF-8 (byte 0xe9)"),
        ("t.csv", "text,label\nx,a\n".encode("utf-16"), "t.csv: is UTF-16"),
        ("t.csv.gz", b"text,label\nx,a\n", "t.csv.gz: cannot be read"),
        ("t.csv.gz", CUT_SHORT, "t.csv.gz: cannot be read"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": "b\n', "t.jsonl:2: is no valid JSON"),
        ("t.jsonl", "[" * 100_000 + "\n", "t.jsonl:1: is no valid JSON"),
        ("t.jsonl", '["a", 1]\n', "t.jsonl:1: expected an object like"),
        ("t.jsonl", '{"text": "a", "label": [1, 2]}\n', "t.jsonl:1: label: expected one label"),
        ("t.jsonl", '{"text": "a", "label": 0.5}\n', "got 0.5 (float)"),
        ("t.jsonl", '{"text": 5, "label": 1}\n', "t.jsonl:1: text: expected a string, got 5 (int)"),
        ("t.jsonl", '{"text": "\\ud800", "label": 1}\n', "t.jsonl:1: text: is no valid Unicode"),
        ("t.jsonl", '{"sentence": "a", "label": 1}\n', "it has 'sentence', 'label'"),
        ("t.parquet", b"PAR1 no", "t.parquet: is no readable Parquet file"),
        ("t.json", "[]", "t.json: no file type that can be read; expected .csv, .tsv, .jsonl"),
        ("t.parquet.gz", b"", "t.parquet.gz: no file type that can be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_parquet_column_of_another_type_is_refused(tmp_path):
    table = pa.table({"image": [{"bytes": b"x"}], "label": [1]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet:1: image: expected a string"):
        read(tmp_path / "t.parquet", kind="image")


def test_an_absent_path_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "none.csv")


def test_one_column_cannot_be_both_input_and_label(tmp_path):
    path = write(tmp_path / "t.csv", "label\nx\n")
    with pytest.raises(ConfigError, match="both 'label'"):
        read(path, input_column="label")


def test_columns_of_unequal_length_make_no_split():
    with pytest.raises(ValueError, match="differ in length"):
        Split(name="train", inputs=("a",), labels=(), where=("x",))
