"""Files of prompts and records: .txt, .csv, .jsonl, and GenEval's metadata."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpdmd_pipeline.wording import is_blank, is_utf16, one_line, refused_character, short

_LONGEST = 80  # characters of a value in a message


def read_text(path: Path) -> str:
    """Read a user's text file; its lines end in \\n.

    Raises:
        OSError: if it is no file; a pipe would block for ever.
        ValueError: if it is not UTF-8, or has a character that no tokenizer should see.
    """
    if not path.is_file():
        raise OSError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path} is not UTF-8 (byte {byte:#04x} at {error.start}): save it as UTF-8") from error
    if fault := refused_character(text):
        remedy = "it looks like UTF-16, save it as UTF-8" if is_utf16(text.encode()) else "remove it"
        raise ValueError(f"{path} has {fault[0]} at character {fault[1]}: {remedy}")
    return text


def read_json(text: str, source: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: with the source, for anything that is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} cannot be read as JSON: {error}") from error


def read_records(path: Path) -> Iterator[dict]:
    """Yield the records of a .csv or .jsonl file."""
    text = read_text(path)
    if path.suffix == ".csv":
        try:
            yield from _csv_records(path, text)
        except csv.Error as error:
            raise ValueError(f"{path} is not valid CSV: {error}") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            record = read_json(line, f"{path}, line {number}")
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object")
            yield record


def _csv_records(path: Path, text: str) -> Iterator[dict]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    names = rows.fieldnames or []
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path} has {names.count(name)} columns {name!r}: rename all but one")
    for record in rows:
        if None in record:  # the fields beyond the header
            raise ValueError(f"{path}, line {rows.line_num} has more fields than the header: put commas in quotes")
        yield record


def field_as_text(record: Mapping[str, Any], key: str, source: str, is_path: bool = False) -> str:
    """Text or whole number of a record's field, as text; empty if there is none, or nothing to see.

    Raises:
        ValueError: if it is of another type, or has a character that no tokenizer should see. In a path, half a
            surrogate pair stands for a byte outside UTF-8.
    """
    value = record.get(key)
    if value is None:
        return ""
    if type(value) not in (str, int):
        raise ValueError(f"{source} has a {type(value).__name__} as {key}: give a text")
    if is_blank(str(value)):
        return ""
    if not is_path and (fault := refused_character(str(value))):
        raise ValueError(f"{source} has {fault[0]} in {key}: remove it")
    return str(value)


def read_texts(path: Path) -> dict[str, str]:
    """Prompt ids and their texts."""
    path = Path(path)
    if path.suffix == ".txt":
        lines = read_text(path).split("\n")
        return {str(number): line.strip() for number, line in enumerate(lines) if not is_blank(line)}
    if path.suffix not in {".csv", ".jsonl"}:
        raise ValueError(f"{path}: prompts are read from .txt, .csv or .jsonl")
    texts = {}
    for line, record in enumerate(read_records(path), start=1):
        name, text = (field_as_text(record, key, f"{path}, record {line}") for key in ("id", "text"))
        if not name or not text:
            raise ValueError(f"{path}, record {line} lacks id or text: give both")
        if texts.setdefault(name, text) != text:
            both = " and ".join(short(repr(one), _LONGEST) for one in (texts[name], text))
            raise ValueError(f"{path}, record {line}: id {short(name, _LONGEST)} has two texts, {both}")
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
            raise ValueError(f"{path}, record {line} ({short(text, _LONGEST)}): {one_line(error)}") from error
        records[text] = record
    return records
