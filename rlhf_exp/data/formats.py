"""Files of rows -> rows with their positions: lines of JSON (also gzipped), JSON, parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_exp.data.records import BadRow
from rlhf_exp.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


def suffix_of(path: Path) -> str:
    """The one of SUFFIXES that a file has, "" if none."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(position, row) of every row of a file; where it could not be read, the row is the BadRow that says why."""
    readers = {".jsonl": _lines, ".jsonl.gz": _lines, ".json": _json, ".parquet": _parquet}
    try:
        yield from readers[suffix_of(path)](path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parsed(raw: bytes) -> Any:
    """A line as JSON, or the BadRow that says why not."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a list in a list in a list ...
        return BadRow(f"not JSON: {str(error).split(';')[0]}")


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, raw in enumerate(file, 1):
                raw = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
                if raw:
                    yield f"{path}:{number}", _parsed(raw)
        except (EOFError, zlib.error) as error:
            raise InputError(f"{path}: not a gzip file that can be read to its end: {error}") from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of rows, or (as many published .json files are) a row a line."""
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip()
    if not raw.startswith(b"["):
        yield from _lines(path)
        return
    rows = _parsed(raw)
    if isinstance(rows, BadRow):
        raise InputError(f"{path}: {rows}")
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(
            f"{path}: not a parquet file that can be read: {str(error).splitlines()[0]}"
        ) from error
