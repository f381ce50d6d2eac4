"""Files of prompts and records: .txt, .csv, .jsonl, and GenEval's metadata."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair: in a path, a byte outside UTF-8


def read_text(path: Path) -> str:
    """Read a user's text file."""
    if not path.is_file():
        raise OSError(f"{path} does not exist")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path} is not UTF-8 (byte {byte:#04x} at {error.start}): save it as UTF-8") from error


def read_records(path: Path) -> Iterator[dict]:
    """Yield the records of a .csv or .jsonl file."""
    file = io.StringIO(read_text(path), newline="")
    if path.suffix == ".csv":
        try:
            yield from csv.DictReader(file)
        except csv.Error as error:
            raise ValueError(f"{path} is not valid CSV: {error}") from error
        return
    for number, line in enumerate(file, start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} cannot be read as JSON: {error}") from error
        if isinstance(record, dict):
            yield record
        elif record is not None:
            raise ValueError(f"{path}, line {number} is not a JSON object")


def field_as_text(record: Mapping[str, Any], key: str, source: str, is_path: bool = False) -> str:
    """Text or whole number of a record's field, as text; empty if there is none.

    Raises:
        ValueError: if it is of another type, or has half a surrogate pair, which JSON can spell; in a path, such a half
            stands for a byte outside UTF-8.
    """
    value = record.get(key)
    if value is None:
        return ""
    if type(value) not in (str, int):
        raise ValueError(f"{source} has a {type(value).__name__} as {key}: give a text")
    if not is_path and (half := SURROGATE.search(str(value))):
        raise ValueError(f"{source} has half a surrogate pair (U+{ord(half[0]):04X}) in {key}: remove it")
    return str(value)


def read_texts(path: Path) -> dict[str, str]:
    """Prompt ids and their texts."""
    path = Path(path)
    if path.suffix == ".txt":
        lines = read_text(path).splitlines()
        return {str(number): line.strip() for number, line in enumerate(lines) if line.strip()}
    if path.suffix not in {".csv", ".jsonl"}:
        raise ValueError(f"{path}: prompts are read from .txt, .csv or .jsonl")
    texts = {}
    for line, record in enumerate(read_records(path), start=1):
        name, text = (field_as_text(record, key, f"{path}, record {line}") for key in ("id", "text"))
        if not name or not text:
            raise ValueError(f"{path}, record {line} lacks id or text: give both")
        if texts.setdefault(name, text) != text:
            raise ValueError(f"{path}, record {line}: id {name} has two texts, {texts[name]!r} and {text!r}")
    return texts


def read_parts(path: Path) -> dict[str, dict]:
    """GenEval's records by text of their prompt, each with valid parts."""
    from dpdmd_pipeline.metrics.questions import part_questions

    records = {}
    for line, record in enumerate(read_records(Path(path)), start=1):
        text = field_as_text(record, "prompt", f"{path}, record {line}")
        if not text:
            raise ValueError(f"{path}, record {line} has no prompt: give GenEval's evaluation_metadata.jsonl")
        try:
            part_questions(record)
        except ValueError as error:
            raise ValueError(f"{path}, record {line} ({text}): {error}") from error
        records[text] = record
    return records
