"""Files of prompts and records: .txt, .csv, .jsonl, and GenEval's metadata."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path


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
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if isinstance(record, dict):
            yield record
        elif record is not None:
            raise ValueError(f"{path}, line {number} is not a JSON object")


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
        if record.get("id") in (None, "") or not record.get("text"):
            raise ValueError(f"{path}, record {line} lacks id or text: give both")
        name, text = str(record["id"]), str(record["text"])
        if texts.setdefault(name, text) != text:
            raise ValueError(f"{path}, record {line}: id {name} has two texts, {texts[name]!r} and {text!r}")
    return texts


def read_parts(path: Path) -> dict[str, dict]:
    """GenEval's records by text of their prompt, each with valid parts."""
    from dpdmd_pipeline.metrics.questions import part_questions

    records = list(read_records(Path(path)))
    for line, record in enumerate(records, start=1):
        if not record.get("prompt"):
            raise ValueError(f"{path}, record {line} has no prompt: give GenEval's evaluation_metadata.jsonl")
        try:
            part_questions(record)
        except ValueError as error:
            raise ValueError(f"{path}, record {line} ({record['prompt']}): {error}") from error
    return {record["prompt"]: record for record in records}
