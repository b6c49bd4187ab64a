"""Files to rows: JSONL, CSV, Parquet and a folder that ``datasets`` saved.

Errors name the file, the line and the column, never a cell: whoever reads a log may not read the
text. Driver errors are raised ``from None``, since a decoder's exception carries the whole line.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shared.errors import DataError, MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

Row = dict[str, object]
Format = Literal["jsonl", "csv", "parquet", "datasets"]

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
# What may be shown as a column's name. A CSV file without a header has text in its first line.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")


@dataclass(frozen=True)
class Table:
    """Rows in file order. ``columns`` are all that were seen; rows may hold fewer."""

    path: Path
    kind: Format
    columns: tuple[str, ...]
    rows: list[Row]

    def require(self, wanted: Mapping[str, str]) -> None:
        """Check that columns are there: setting's name -> column's name. Raises DataError."""
        for setting, column in wanted.items():
            if column not in self.columns:
                raise DataError(
                    f"{self.path}: {setting} = {column!r}: expected a column of that name, "
                    f"got {shown_columns(self.columns)}; correct the name"
                )


def read_table(
    path: Path, kind: Literal[Format, "auto"], wanted: Collection[str] | None = None
) -> Table:
    """Read all rows of ``path``, of the columns ``wanted`` (None: of all columns).

    ``auto`` goes by the suffix; a folder is one that ``datasets`` saved. Raises DataError for a
    path that is missing, unreadable, empty or not of its format, MissingPackageError where the
    format needs a package.
    """
    if not path.exists():
        raise DataError(
            f"{path}: data.path: expected a file or folder, got nothing there; correct the path"
        )
    found = _format_of(path) if kind == "auto" else kind
    if (found == "datasets") != path.is_dir():
        wants, has = ("a folder", "a file") if found == "datasets" else ("a file", "a folder")
        raise DataError(
            f"{path}: data.format = {found}: expected {wants}, got {has}; correct path or format"
        )
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{path}: expected rows, got an empty file; give a file with text")
        table = _READERS[found](path, wanted)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8, got byte {error.object[error.start]:#04x} which is not; "
            "convert the file to UTF-8"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or type(error).__name__}; "
            "check the file and its rights"
        ) from None
    if not table.rows:
        raise DataError(f"{path}: expected rows, got none; give a file with text")
    return table


def shown_columns(columns: Collection[str]) -> str:
    """Column names for a message, without those that may be text of a file with no header."""
    names = [name for name in columns if _NAME.fullmatch(name)]
    hidden = len(columns) - len(names)
    if hidden:
        names.append(f"{hidden} whose name is not shown (is the first line a header?)")
    return ", ".join(names) or "none"


def _format_of(path: Path) -> Format:
    if path.is_dir():
        return "datasets"
    found = SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise DataError(
            f"{path}: data.format = auto: expected a name that ends in {', '.join(SUFFIXES)} "
            f"or a folder, got {path.suffix or 'no suffix'}; set data.format"
        )
    return found


def _read_jsonl(path: Path, wanted: Collection[str] | None) -> Table:
    columns: dict[str, None] = {}
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _json_object(path, number, line)
            columns.update(dict.fromkeys(row))
            rows.append(row if wanted is None else {k: row[k] for k in wanted if k in row})
    return Table(path, "jsonl", tuple(columns), rows)


def _json_object(path: Path, number: int, line: str) -> Row:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{path}: line {number}{where}: expected one JSON object a line, got something else; "
            "fix that line"
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: line {number}: expected a JSON object, got {type(value).__name__}; "
            "write one object a line"
        )
    return value


def _read_csv(path: Path, wanted: Collection[str] | None) -> Table:
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise DataError(
                    f"{path}: line 1: expected column names, got the same one twice; rename one"
                )
            kept = [(i, name) for i, name in enumerate(header) if wanted is None or name in wanted]
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}: line {reader.line_num}: expected {len(header)} cells, "
                        f"got {len(cells)}; quote cells that hold commas or line breaks"
                    )
                rows.append({name: cells[i] for i, name in kept})
        except csv.Error as error:
            raise DataError(
                f"{path}: line {reader.line_num}: expected CSV, got: {error}; "
                "fix that line, or give the text as JSONL"
            ) from None
    return Table(path, "csv", tuple(header), rows)


def _read_parquet(path: Path, wanted: Collection[str] | None) -> Table:
    parquet = _package("pyarrow.parquet", "parquet")
    arrow = _package("pyarrow", "parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = tuple(file.schema_arrow.names)
            kept = [name for name in columns if wanted is None or name in wanted]
            rows = file.read(columns=kept).to_pylist()
    except arrow.ArrowException as error:
        raise DataError(
            f"{path}: expected Parquet, got {type(error).__name__} from its reader; "
            "write the file again or set data.format"
        ) from None
    return Table(path, "parquet", columns, rows)


def _read_datasets(path: Path, wanted: Collection[str] | None) -> Table:
    # By its files first: `datasets` alone takes seconds to import, and its own message for a
    # folder of another kind is about the hub.
    if (path / "dataset_dict.json").is_file():
        parts = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise DataError(
            f"{path}: data.path: expected one dataset, got a folder of several; "
            f"name one of them: {parts}"
        )
    if not (path / "state.json").is_file():
        raise DataError(
            f"{path}: data.path: expected a folder written by save_to_disk, got another one; "
            "name a file or such a folder"
        )
    datasets = _package("datasets", "datasets")
    arrow = _package("pyarrow", "datasets")
    try:
        saved = datasets.load_from_disk(str(path)).with_format(None)
        columns = tuple(saved.column_names)
        kept = [name for name in columns if wanted is None or name in wanted]
        rows = saved.select_columns(kept).to_list()
    except (arrow.ArrowException, FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected a folder written by save_to_disk, got {type(error).__name__} from "
            "its reader; save it again"
        ) from None
    return Table(path, "datasets", columns, rows)


_READERS = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "datasets": _read_datasets,
}


def _package(name: str, kind: Format) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise MissingPackageError(
            f"data.format = {kind}: expected the package {name.partition('.')[0]}, which is not "
            "installed; pip install 'gradualdiff-fed[participant]'"
        ) from None
