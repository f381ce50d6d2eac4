"""Files of prompts: .txt, .jsonl, .csv and .parquet, read line by line and never as a whole."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from kedro.io import AbstractDataset

from dpdmd_pipeline.publishing import write_atomically, writing

KEYS = ("text", "prompt", "caption")  # of a column or a JSON key; the first that is there counts
MAX_LINE = 1 << 20  # bytes; a longer line is no prompt, and memory is to stay bounded

_ANOTHER = "create it, or name another with `--params raw_prompts=FILE` (or raw_eval_prompts=FILE, to evaluate on)"
_BOM = b"\xef\xbb\xbf"
# Control characters other than white space, and halves of surrogate pairs (JSON can spell them).
_REFUSED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
_NUMBERED = re.compile(r"\s*([0-9]{1,18})[.)](?:\s+|$)")


class Line(NamedTuple):
    """A prompt as the file spells it.

    Attributes:
        number: of the line where it begins, from 1; in .parquet, of the row.
        text: not cleaned; "" for a blank line.
    """

    number: int
    text: str


@dataclass(frozen=True)
class PromptFile:
    """A prompt file that is opened when it is iterated over, each time anew; iterating gives records.

    Errors of all readers: FileNotFoundError if there is no file; ValueError if its suffix is unknown, a
    column is missing, a line is malformed, is not UTF-8, or holds a character no tokenizer should see.
    """

    path: Path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.records()

    def lines(self) -> Iterator[Line]:
        """Every prompt with its place, blank lines included; the numbers of a numbered list are taken off."""
        return _reader(self.path)(self.path)

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """Records start <= i < stop of a .jsonl file that this project wrote, all keys."""
        _require(self.path, "run `kedro run --pipelines prompts` first")
        with self.path.open("rb") as file:
            for number, raw in enumerate(islice(file, start, stop), start + 1):
                offset = file.tell() - len(raw)
                yield _parse_json(self.path, number, offset, _decode(self.path, number, offset, raw))

    def is_numbered_list(self) -> bool:
        """Whether every line of a .txt file begins with a number, `1.` or `1)`, rising from 0 or 1.

        Only then are they numbers of lines: "3 cats" and a lone "2. Weltkrieg" keep theirs.
        """
        last = None
        if self.path.suffix.lower() != ".txt":
            return False
        for _, _, line in _decoded(self.path):
            if not line.strip():
                continue
            match = _NUMBERED.match(line)
            if not match:
                return False
            number = int(match[1])
            if (number > 1) if last is None else (number <= last):
                return False
            last = number
        return last is not None


class PromptFileDataset(AbstractDataset[Iterable[dict], PromptFile]):
    """A prompt file in the catalog; loading opens nothing, so the file may be absent until it is read.

    Args:
        filepath: ends in .txt, .jsonl, .csv or .parquet; only .jsonl can be saved.
        metadata: ignored; for Kedro plugins.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> PromptFile:
        return PromptFile(self._filepath)

    def save(self, data: Iterable[dict]) -> None:
        """Stream records into a .jsonl file that is there whole or not at all."""
        path = self._filepath
        if path.suffix.lower() != ".jsonl":
            raise ValueError(f"cannot save prompts as {path}: only .jsonl can be written")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, partial(_write_records, data), path.with_name(f".{path.name}.partial"))

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}


# ---- the formats --------------------------------------------------------------------------------


def _reader(path: Path):
    readers = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ValueError(f"prompt file {path} ends in {path.suffix!r}: give one of {', '.join(readers)}")
    return readers[path.suffix.lower()]


def _txt(path: Path) -> Iterator[Line]:
    numbered = PromptFile(path).is_numbered_list()
    for number, _, line in _decoded(path):
        text = line.rstrip("\r\n")
        yield Line(number, _NUMBERED.sub("", text, count=1) if numbered else text)


def _jsonl(path: Path) -> Iterator[Line]:
    for number, offset, line in _decoded(path):
        if not line.strip():
            yield Line(number, "")
            continue
        value = _parse_json(path, number, offset, line)
        if isinstance(value, dict):
            value = value[_key(value, f"{path}, line {number}")]
        if not isinstance(value, str):
            raise _error(path, number, offset, f"{value!r:.60} where a string is due")
        if found := _REFUSED.search(value):  # spelt as an escape
            raise _error(path, number, offset, f"{_name(found[0])} in a prompt; remove it")
        yield Line(number, value)


def _csv(path: Path) -> Iterator[Line]:
    reader = csv.reader((line for _, _, line in _decoded(path)), strict=True)
    header: list[str] | None = None
    column = end = 0
    while True:
        start = end + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {start}: malformed CSV ({error}); check its quotes") from error
        end = reader.line_num
        if row is None:
            return
        if not row:
            yield Line(start, "")
        elif header is None:
            header, column = row, row.index(_key(row, f"the header of {path}"))
        elif len(row) != len(header):
            counts = f"{len(row)} fields, but {len(header)} in the header"
            raise ValueError(f"{path}, line {start}: {counts}; put texts with commas in quotes")
        else:
            yield Line(start, row[column])


def _parquet(path: Path) -> Iterator[Line]:
    import pyarrow
    from pyarrow import parquet

    _require(path)
    try:
        with parquet.ParquetFile(path) as file:
            column = _key(file.schema_arrow.names, f"the schema of {path}")
            row = 0
            for batch in file.iter_batches(columns=[column], batch_size=4096):
                for scalar in batch.column(0):
                    row += 1
                    yield Line(row, _parquet_text(f"{path}, row {row}", scalar))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _parquet_text(place: str, scalar: Any) -> str:
    try:
        text = scalar.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}, byte {error.start} of the text: not UTF-8; save it as UTF-8") from error
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{place}: {text!r:.60} where a string is due")
    if found := _REFUSED.search(text):
        byte = len(text[: found.start()].encode())
        raise ValueError(f"{place}, byte {byte} of the text: {_name(found[0])} in a prompt; remove it")
    return text


# ---- what the formats share ---------------------------------------------------------------------


def _decoded(path: Path) -> Iterator[tuple[int, int, str]]:
    """(number, byte offset, line with its end) of a text file, in bounded memory."""
    _require(path)
    with path.open("rb") as file:
        number = offset = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            if len(raw) > MAX_LINE:
                raise _error(path, number, offset, f"more than {MAX_LINE} bytes; is this a file of prompts?")
            skipped = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
            line = _decode(path, number, offset + skipped, raw[skipped:])
            if found := _REFUSED.search(line):
                byte = offset + skipped + len(line[: found.start()].encode())
                raise _error(path, number, byte, f"{_name(found[0])} in a prompt; remove it")
            yield number, offset, line
            offset += len(raw)


def _decode(path: Path, number: int, offset: int, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        what = f"0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise _error(path, number, offset + error.start, what) from error


def _parse_json(path: Path, number: int, offset: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        byte = offset + len(line[: error.pos].encode())
        raise _error(path, number, byte, f"not JSON ({error.msg}); write one object or string a line") from error
    except RecursionError as error:
        raise _error(path, number, offset, "JSON nested too deeply") from error


def _write_records(records: Iterable[dict], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _key(names: Iterable[str], where: str) -> str:
    for key in KEYS:
        if key in names:
            return key
    have = ", ".join(repr(name) for name in names) or "nothing"
    raise ValueError(f"{where} names none of {', '.join(KEYS)}; it has {have:.200}")


def _name(character: str) -> str:
    if character == "\0":
        return "NUL"
    kind = "half a surrogate pair" if character >= "\ud800" else "control character"
    return f"{kind} U+{ord(character):04X}"


def _error(path: Path, number: int, offset: int, what: str) -> ValueError:
    return ValueError(f"{path}, line {number}, byte {offset}: {what}")


def _require(path: Path, remedy: str = _ANOTHER) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"prompt file {path} is a folder: give a file")
    if not path.exists():
        raise FileNotFoundError(f"prompt file {path} does not exist: {remedy}")
