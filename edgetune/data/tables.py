"""CSV, TSV, JSONL and Parquet files as one split.

A file names its columns (the first line of a CSV or TSV, the keys of JSONL objects). What
is there is taken as it is: nothing is stripped, guessed or skipped except blank lines.
"""

import codecs
import csv
import gzip
import io
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from edgetune.data.split import LABEL_SEPARATOR, Kind, Split, Target
from edgetune.errors import ConfigError, DataError, MissingExtraError
from edgetune.runtime.records import nearest

DEFAULT_INPUT_COLUMN: Mapping[Kind, str] = {"text": "text", "image": "image"}

# line (or row) number, values of the columns asked for: input, label, further ones
Row = tuple[int, tuple[object, ...]]
Reader = Callable[[Path, tuple[str, ...]], list[Row]]
# (value, file, line, column) -> label
_LabelReader = Callable[[object, Path, int, str], str]

_LONGEST_FIELD = 2**31 - 1  # characters; the csv module's own limit is 131072
_Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE
_QUOTED_CELL = re.compile(r'"(?:[^"]|"")*"')


def read_table(
    path: Path, *, kind: Kind, input_column: str, label_column: str, name: str,
    columns: Sequence[str] = (), target: Target = "classes", separator: str = LABEL_SEPARATOR,
) -> Split:  # fmt: skip
    """Read a table as the split `name`.

    Args:
        path: a .csv, .tsv, .jsonl or .ndjson file, plain or .gz, or a .parquet file.
        kind: "text": the input column holds the text; "image": it holds paths of images,
            relative to the folder of the table.
        input_column: column of the input; "" for "text" or "image", by kind.
        label_column: column of the label. Whole numbers and true / false become their `str`.
        name: the name of the split.
        columns: further ones to read, as labels are.
        target: classes: one label a sample, as above; multilabel: several, in one text between
            separators or, in JSONL and Parquet, as a list; values: a finite number.
        separator: of multilabel.

    Raises:
        ConfigError: both columns have the same name, or the separator is empty.
        DataError: the file is of another type, empty, malformed or not UTF-8, lacks a column,
            or a value is neither a text, a whole number nor true / false, or not what `target`
            wants.
        MissingExtraError: the file is Parquet and pyarrow is not installed.
    """
    suffix = table_suffix(path)
    if suffix is None:
        raise DataError(
            f"{path}: no file type that can be read; expected {', '.join(_READERS)}"
            " (the text ones also as .gz) or, for images, a folder of class folders"
        )
    names = (input_column or DEFAULT_INPUT_COLUMN[kind], label_column, *columns)
    if names[0] == names[1]:
        raise ConfigError(f"input_column and label_column are both {label_column!r}")
    if not separator:
        raise ConfigError("label_separator: expected at least one character, got ''")
    rows = _READERS[suffix](path, names)
    if not rows:
        raise DataError(f"{path}: has columns but no rows")
    readers: dict[Target, _LabelReader] = {
        "classes": _as_label,
        "multilabel": partial(_as_labels, separator=separator),
        "values": _as_number,
    }
    read_label = readers[target]
    inputs = [_as_text(values[0], path, line, names[0]) for line, values in rows]
    if kind == "image":
        folder = os.path.abspath(path.parent)  # noqa: PTH100  resolve() would follow links
        inputs = [os.path.normpath(os.path.join(folder, p)) if p else "" for p in inputs]  # noqa: PTH118
    return Split(
        name=name,
        inputs=tuple(inputs),
        labels=tuple(read_label(values[1], path, line, names[1]) for line, values in rows),
        where=tuple(f"{path.name}:{line}" for line, _ in rows),
        columns={
            column: tuple(_as_group(values[at], path, line, column) for line, values in rows)
            for at, column in enumerate(names)
            if at > 1
        },
        target=target,
        separator=separator,
    )


def table_suffix(path: Path) -> str | None:
    """Return the suffix that says how `path` is read (".csv" for x.csv.gz), or None."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in _READERS and suffix != ".parquet" else None
    return suffix if suffix in _READERS else None


def _read_csv(path: Path, columns: tuple[str, ...]) -> list[Row]:
    return _delimited(path, _file_text(path), columns, ",", csv.QUOTE_MINIMAL)


def _read_tsv(path: Path, columns: tuple[str, ...]) -> list[Row]:
    text = _file_text(path)
    return _delimited(path, text, columns, "\t", _tsv_quoting(text))


def _tsv_quoting(text: str) -> _Quoting:
    """Return csv.QUOTE_NONE where quotes are part of the text, else csv.QUOTE_MINIMAL.

    Both are called TSV. Where a quote opens a cell and does not close it, yet every line has
    the same number of cells, quotes are plain characters (as in the GLUE files); to read
    those as quoting would join rows without a word.
    """
    width, broken = 0, False
    for line in text.split("\n") if '"' in text else ():
        cells = line.rstrip("\r").split("\t")
        if cells == [""]:
            continue
        width = width or len(cells)
        if len(cells) != width:
            return csv.QUOTE_MINIMAL
        broken = broken or any(c.startswith('"') and not _QUOTED_CELL.fullmatch(c) for c in cells)
    return csv.QUOTE_NONE if broken else csv.QUOTE_MINIMAL


def _delimited(
    path: Path, text: str, columns: tuple[str, ...], delimiter: str, quoting: _Quoting
) -> list[Row]:
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True
    )
    header: list[str] = []
    at: tuple[int, ...] = ()
    rows: list[Row] = []
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        while True:
            line = reader.line_num + 1  # a record may span lines; this is where it starts
            row = next(reader, None)
            if row is None:
                break
            if not row:
                continue  # a blank line
            if not header:
                header, at = row, _positions(path, row, columns)
            elif len(row) != len(header):
                raise DataError(
                    f"{path}:{line}: expected {len(header)} fields, as the first line has,"
                    f" got {len(row)}; quote fields that hold a {_DELIMITERS[delimiter]}"
                )
            else:
                rows.append((line, tuple(row[i] for i in at)))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: is malformed: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not header:
        raise DataError(f"{path}: is empty")
    return rows


_DELIMITERS = {",": "comma", "\t": "tab"}


def _positions(path: Path, header: list[str], columns: tuple[str, ...]) -> tuple[int, ...]:
    for flag, column in _flagged(columns):
        if header.count(column) > 1:
            raise DataError(f"{path}: column {column!r} occurs {header.count(column)} times")
        if column not in header:
            hint = "; the first line must name the columns"
            if len(header) == 1 and (other := re.search(r"[;\t|,]", header[0])):
                hint = f"; the fields look separated by {other[0]!r}"
            raise _no_column(path, column, flag, header, hint)
    return tuple(header.index(column) for column in columns)


def _read_jsonl(path: Path, columns: tuple[str, ...]) -> list[Row]:
    rows: list[Row] = []
    keys: dict[str, None] = {}
    for number, line in enumerate(_file_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: is no valid JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path}:{number}: expected an object like"
                f' {{"{columns[0]}": ..., "{columns[1]}": ...}} on each line, got {line[:40]!r}'
            )
        keys.update(dict.fromkeys(record))
        rows.append((number, tuple(record.get(column) for column in columns)))
    if not rows:
        raise DataError(f"{path}: is empty")
    _require_columns(path, keys, columns)
    return rows


def _read_parquet(path: Path, columns: tuple[str, ...]) -> list[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "train") from error
    try:
        with pq.ParquetFile(path) as file:
            _require_columns(path, file.schema_arrow.names, columns)
            table = file.read(columns=list(dict.fromkeys(columns)))
            values = [table.column(c).to_pylist() for c in columns]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is no readable Parquet file: {error}") from error
    return list(enumerate(zip(*values, strict=True), start=1))


_READERS: Mapping[str, Reader] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def _flagged(columns: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return (flag that names it, column) of each."""
    flags = ["--input-column", "--label-column"] + ["--slices"] * (len(columns) - 2)
    return list(zip(flags, columns, strict=True))


def _require_columns(path: Path, names: Iterable[str], columns: tuple[str, ...]) -> None:
    known = list(names)
    for flag, column in _flagged(columns):
        if column not in known:
            raise _no_column(path, column, flag, known, "")


def _no_column(path: Path, column: str, flag: str, known: list[str], hint: str) -> DataError:
    shown = [repr(k if len(k) <= 40 else k[:37] + "...") for k in known[:20]]
    if len(known) > len(shown):
        shown.append(f"... ({len(known)} in all)")
    near = nearest(column, known)
    near = near if "did you mean" in near else ""
    return DataError(
        f"{path}: no column {column!r}; it has {', '.join(shown)}{near}"
        f"; name another with {flag}{hint}"
    )


def _file_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix.lower() == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: is UTF-16; save it as UTF-8")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        raise DataError(f"{path}: is empty")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: is not UTF-8 (byte 0x{raw[error.start]:02x}); save it as UTF-8"
        ) from error


def _as_text(value: object, path: Path, line: int, column: str) -> str:
    if isinstance(value, str):
        return _encodable(value, path, line, column)
    if value is None:
        return ""
    raise DataError(f"{path}:{line}: {column}: expected a string, got {_described(value)}")


def _as_label(value: object, path: Path, line: int, column: str) -> str:
    if isinstance(value, str):
        return _encodable(value, path, line, column)
    if isinstance(value, int):  # bool too
        return str(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise DataError(
        f"{path}:{line}: {column}: expected one label (a string, a whole number or true /"
        f" false), got {_described(value)}"
    )


def _as_labels(value: object, path: Path, line: int, column: str, *, separator: str) -> str:
    """Return the names joined by the separator, "" for none."""
    if isinstance(value, list):
        names = [_as_label(item, path, line, column) for item in value]
        for name in names:
            if separator in name:
                raise DataError(
                    f"{path}:{line}: {column}: label {name!r} holds the separator {separator!r};"
                    " name another with --label-separator"
                )
    else:
        text = _as_label(value, path, line, column)
        names = text.split(separator) if text else []
    if any(not name.strip() for name in names):
        raise DataError(
            f"{path}:{line}: {column}: a label is blank in {separator.join(names)!r}; expected"
            f" names with {separator!r} between them, or nothing for no label"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{path}:{line}: {column}: a label is there twice: {names}")
    return separator.join(names)


def _as_number(value: object, path: Path, line: int, column: str) -> str:
    """Return a finite number as it was written, "" where there is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    shown = value if isinstance(value, str) else repr(value)
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        # Python's own 1_000 is no number elsewhere
        if "_" in shown or not math.isfinite(float(shown)):
            raise ValueError
    except (ValueError, OverflowError):
        raise DataError(
            f"{path}:{line}: {column}: expected a finite number, got {_described(value)}"
        ) from None
    return shown.strip()


def _as_group(value: object, path: Path, line: int, column: str) -> str:
    """Return a value of a further column; numbers need not be whole."""
    if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
        return repr(value)
    if isinstance(value, str | int | float) or value is None:
        return _as_label(value, path, line, column)
    raise DataError(
        f"{path}:{line}: {column}: expected a string, a number or true / false, got"
        f" {_described(value)}"
    )


def _encodable(value: str, path: Path, line: int, column: str) -> str:
    """Refuse half a surrogate pair, which JSON can spell and no tokenizer can read."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{path}:{line}: {column}: is no valid Unicode: {error}") from error
    return value


def _described(value: object) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"
