"""Trace files line by line: gzip or not, one JSON object a line or one document, or CSV.

Every error is one sentence with file and line.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.wire import from_json

MAX_TOKENS: Final = 10_000_000
_GZIP: Final = b"\x1f\x8b"
_UNKNOWN: Final[Any] = object()
_OPENINGS: Final = ("{", "[")


class Row:
    """One JSON object or one line of CSV, read key by key.

    Args:
        data: the values by key.
        where: file and line, for errors.
    """

    __slots__ = ("data", "where")

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def error(self, key: str, wanted: str) -> ConfigError:
        """Return the error for a value that is not as it should be."""
        if key not in self.data:
            return ConfigError(f'{self.where}: "{key}" is missing.')
        shown = repr(self.data[key])
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return ConfigError(f'{self.where}: "{key}" must be {wanted}, not {shown}.')

    def first(self, *keys: str) -> str:
        """Return the first of ``keys`` that is there and not null, else the first of all."""
        return next((key for key in keys if self.data.get(key) is not None), keys[0])

    def row(self, key: str, *, needed: bool = True) -> Row:
        """Return the object under ``key``; an empty one if it may be missing and is."""
        value = self.data.get(key)
        if value is None and not needed:
            return Row({}, f"{self.where}, {key}")
        if not isinstance(value, dict):
            raise self.error(key, "a JSON object")
        return Row(value, f"{self.where}, {key}")

    def rows(self, key: str, *, needed: bool = True) -> Iterator[Row]:
        """Yield the objects of the list under ``key``."""
        value = self.data.get(key)
        if value is None and not needed:
            return
        if not isinstance(value, list):
            raise self.error(key, "a list")
        for number, item in enumerate(value, 1):
            if not isinstance(item, dict):
                raise ConfigError(f"{self.where}, {key} {number} must be a JSON object.")
            yield Row(item, f"{self.where}, {key} {number}")

    def text(self, key: str, default: str | None = None) -> str:
        """Return a name; numbers count as one, and empty text as none."""
        value = self.data.get(key)
        if value in (None, "") and default is not None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f"{value:g}" if isinstance(value, float) else str(value)
        if not isinstance(value, str) or not value:
            raise self.error(key, "a name")
        return value

    def number(self, key: str, default: float | None = _UNKNOWN, least: float = -math.inf) -> Any:
        """Return a finite number of at least ``least``; text that holds one will do."""
        value: Any = self.data.get(key)
        if value in (None, "") and default is not _UNKNOWN:
            return default
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                value = None
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or value < least:
            raise self.error(key, "a number" if least == -math.inf else f"{least:g} or more")
        return float(value)

    def tokens(self, key: str, default: int | None = None) -> int:
        """Return a whole number of tokens, 0 or more; text that holds one will do."""
        value: Any = self.data.get(key)
        if value is None and default is not None:
            return default
        written = isinstance(value, str) and value.strip().isascii() and value.strip().isdigit()
        if written or (isinstance(value, float) and value.is_integer()):
            value = int(value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not 0 <= value <= MAX_TOKENS:
            raise self.error(key, f"a whole number from 0 to {MAX_TOKENS}")
        return int(value)

    def hashes(self, key: str) -> tuple[int, ...]:
        """Return a list of whole numbers, none when the key is missing or null."""
        value = self.data.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.error(key, "a list of whole numbers")
        return tuple(value)

    def names(self, key: str) -> list[str]:
        """Return a list of names, none when the key is missing or null."""
        value = self.data.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of names")
        return value


def files_of(path: Path) -> list[Path]:
    """Return the files of a trace: the file itself, or those of a folder, in order of names.

    Raises:
        ConfigError: there is none.
    """
    if not path.is_dir():
        return [path]
    suffixes = (".json", ".jsonl", ".csv", ".gz")
    found = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in suffixes)
    if not found:
        raise ConfigError(f"{path} holds no .json, .jsonl or .csv file.")
    return found


def opened(path: Path) -> IO[str]:
    """Open a text file, packed with gzip or not.

    Raises:
        ConfigError: it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP
        if packed:
            return gzip.open(path, "rt", encoding="utf-8", newline="")
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file that are not blank, with their numbers.

    Raises:
        ConfigError: it cannot be read, or not as UTF-8.
    """
    number = 0
    try:
        with opened(path) as file:
            for line in file:
                number += 1
                if line.strip():
                    yield number, line
    except UnicodeDecodeError:
        raise ConfigError(f"{path}, after line {number}, is not UTF-8.") from None
    except (OSError, EOFError) as error:
        told = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}, after line {number}, cannot be read: {told}.") from None


def records(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON file: one a line, or the one or many of a whole document.

    Raises:
        ConfigError: it is not JSON, or holds something else.
    """
    source = lines_of(path)
    number, line = next(source, (0, ""))
    if not number:
        raise ConfigError(f"{path} holds no workflow.")
    try:
        value = _decoded(line)
    except ValueError as error:
        if not line.rstrip().endswith((*_OPENINGS, ",")) or not line.lstrip().startswith(_OPENINGS):
            raise _no_json(path, number, error) from None
        value = _document(path)
        number = 0
    if isinstance(value, list):
        yield from _listed(path, value)
        return
    yield _object(path, value, number)
    if number:
        for number, line in source:
            try:
                value = _decoded(line)
            except ValueError as error:
                raise _no_json(path, number, error) from None
            yield _object(path, value, number)


def _decoded(line: str) -> Any:
    """Return the JSON of a line.

    Raises:
        ValueError: it is none, as the standard library says it.
    """
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError):
        return from_json(line)


def _document(path: Path) -> Any:
    with opened(path) as file:
        try:
            return from_json(file.read())
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not UTF-8.") from None
        except json.JSONDecodeError as error:
            raise _no_json(path, error.lineno, error) from None
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}.") from None


def _listed(path: Path, values: Sequence[Any]) -> Iterator[Row]:
    if not values:
        raise ConfigError(f"{path} holds an empty list.")
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise ConfigError(f"{path}, entry {number}, must be a JSON object.")
        yield Row(value, f"{path}, entry {number}")


def _object(path: Path, value: Any, number: int) -> Row:
    where = f"{path}, line {number}" if number else str(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a JSON object.")
    return Row(value, where)


def _no_json(path: Path, number: int, error: ValueError) -> ConfigError:
    told = getattr(error, "msg", str(error))
    return ConfigError(f"{path}, line {number} is not JSON: {told}.")


def table(path: Path) -> Iterator[Row]:
    """Yield the lines of a CSV file by the names of its first one.

    Raises:
        ConfigError: it cannot be read, or a line has another number of values.
    """
    source = lines_of(path)
    _, line = next(source, (0, ""))
    names = [name.strip() for name in next(csv.reader([line.lstrip("\ufeff")]), [])]
    for number, line in source:
        values = next(csv.reader([line]))
        where = f"{path}, line {number}"
        if len(values) != len(names):
            raise ConfigError(f"{where} must have {len(names)} values, not {len(values)}.")
        yield Row(dict(zip(names, map(str.strip, values), strict=True)), where)
