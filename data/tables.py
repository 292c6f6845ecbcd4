"""Table files as columns of text: CSV and Parquet alike, with the line that each row stands on."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import TableError


@dataclass(frozen=True)
class TextTable:
    """Columns of stripped text, '' for an empty cell; `lines` are lines of a CSV (from 1), rows of a Parquet file."""

    header: list[str]
    columns: dict[str, list[str]]
    lines: list[int]
    unit: str
    bad: dict[int, str] = field(default_factory=dict)  # line -> what is wrong with it; such rows are left out


def read_text_table(path: Path, wanted: Iterable[str]) -> TextTable:
    """Read those of the wanted columns that a CSV or Parquet file has, by its suffix.

    CSV: UTF-8, commas, a header; blank lines are skipped, rows of another length than the header noted as bad.
    Raises TableError if the file is missing, is neither of the two, or repeats a wanted column.
    """
    if not path.is_file():
        raise TableError(f"{path}: no such clip table. Name a CSV or Parquet file in [data] table.")
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise TableError(f"{path}: a clip table ends in .csv or .parquet. Convert the file.")
    return (_read_csv if suffix == ".csv" else _read_parquet)(path, list(wanted))


def _read_csv(path: Path, wanted: list[str]) -> TextTable:
    rows, lines, bad, line = [], [], {}, 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            line = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    bad[line] = f"{len(row)} cells, the header has {len(header)}"
                elif row:
                    rows.append(row)
                    lines.append(line)
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    except csv.Error as error:
        raise TableError(f"{path}, line {line}: not CSV: {error}. Correct the line and run again.") from None
    repeated = sorted(name for name in wanted if header.count(name) > 1)
    if repeated:
        raise TableError(f"{path}: column {repeated[0]!r} occurs twice. Rename one of them.")
    places = {name: header.index(name) for name in wanted if name in header}
    columns = {name: [row[place].strip() for row in rows] for name, place in places.items()}
    return TextTable(header, columns, lines, "line", bad)


def _read_parquet(path: Path, wanted: list[str]) -> TextTable:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        header = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[name for name in wanted if name in header])
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"{path}: cannot be read as Parquet: {error}. Write it again.") from None
    columns = {name: [_text(value) for value in table.column(name).to_pylist()] for name in table.column_names}
    return TextTable(header, columns, list(range(1, table.num_rows + 1)), "row")


def _text(value: Any) -> str:
    """Return a Parquet cell as CSV would have it: null and NaN empty, whole floats as integers."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()
