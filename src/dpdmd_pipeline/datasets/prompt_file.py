"""Prompt files: .txt, .jsonl, .csv and .parquet, read line by line in bounded memory."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from kedro.io import AbstractDataset

from dpdmd_pipeline.errors import MissingInputError
from dpdmd_pipeline.publishing import write_atomically, writing
from dpdmd_pipeline.wording import is_blank, is_utf16, refused_character

KEYS = ("text", "prompt", "caption")  # of a column or a JSON object; the first that exists is read
MAX_LINE = 1 << 20  # bytes; a longer line is no prompt and would need unbounded memory

_BOM = b"\xef\xbb\xbf"
_NUMBERED = re.compile(r"\s*([0-9]{1,18})[.)](?:\s+|$)")


class Line(NamedTuple):
    """A prompt as the file spells it."""

    number: int  # of the line where it begins, from 1; in .parquet, of the row
    text: str  # not cleaned; "" for a line without a visible character


@dataclass(frozen=True)
class PromptFile:
    """A prompt file that is opened anew at each iteration; iterating gives records.

    Errors of all readers: FileNotFoundError if the file does not exist; ValueError if its suffix is unknown, a
    column is missing or ambiguous, a line is malformed, is not UTF-8, or holds a character that no tokenizer should
    see, and for pipes and devices.
    """

    path: Path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.records()

    def lines(self) -> Iterator[Line]:
        """Read every prompt and blank line; the numbers of a numbered list are removed."""
        readers = {".txt": self._txt, ".jsonl": self._jsonl, ".csv": self._csv, ".parquet": self._parquet}
        suffix = self.path.suffix
        if suffix.lower() not in readers:
            raise ValueError(f"prompt file {self.path} ends in {suffix!r}: give one of {', '.join(readers)}")
        if not self.path.exists():
            remedy = "create it, or set raw_prompts=FILE (raw_eval_prompts=FILE for evaluation)"
            raise FileNotFoundError(f"prompt file {self.path} does not exist: {remedy}")
        self._refuse_other_than_files()
        return (line._replace(text="") if is_blank(line.text) else line for line in readers[suffix.lower()]())

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """Read records start <= i < stop of a .jsonl file that this project wrote, with all their keys."""
        if not self.path.exists():
            raise MissingInputError(f"prompt file {self.path} does not exist", stage="prompts")
        self._refuse_other_than_files()
        with self.path.open("rb") as file:
            for number, raw in enumerate(islice(file, start, stop), start + 1):
                yield _TextLine.decode(self.path, number, file.tell() - len(raw), raw).json()

    def is_numbered_list(self) -> bool:
        """True if every line of a .txt file begins with a number, `1.` or `1)`, rising from 0 or 1.

        Otherwise numbers are part of the prompts: "3 cats", a lone "2. Weltkrieg".
        """
        if self.path.suffix.lower() != ".txt":
            return False
        last = None
        for text in (line.text for line in self._text_lines() if not is_blank(line.text)):
            match = _NUMBERED.match(text)
            if not match:
                return False
            number = int(match[1])
            if (number > 1) if last is None else (number <= last):
                return False
            last = number
        return last is not None

    def _refuse_other_than_files(self) -> None:
        """Refuse what is read twice or never ends; opening a pipe would wait for its writer."""
        if self.path.is_dir():
            raise IsADirectoryError(f"prompt file {self.path} is a folder: give a file")
        if not self.path.is_file():
            raise ValueError(f"prompt file {self.path} is a pipe, socket or device: give a file")

    # ---- the formats

    def _txt(self) -> Iterator[Line]:
        is_numbered = self.is_numbered_list()
        for line in self._text_lines():
            text = line.text.rstrip("\r\n")
            yield Line(line.number, _NUMBERED.sub("", text, count=1) if is_numbered else text)

    def _jsonl(self) -> Iterator[Line]:
        for line in self._text_lines():
            value = "" if is_blank(line.text) else line.json()
            if isinstance(value, dict):
                value = value[text_key(value, f"{self.path}, line {line.number}")]
            if not isinstance(value, str):
                raise line.error(f"expected a string, got {value!r:.60}")
            if fault := refused_character(value):  # spelt as an escape
                raise line.error(f"{fault[0]} in a prompt; remove it")
            yield Line(line.number, value)

    def _csv(self) -> Iterator[Line]:
        reader = csv.reader((line.text for line in self._text_lines()), strict=True)
        start, header, column = 1, None, 0
        try:
            for row in reader:
                if len(row) < 2 and is_blank("".join(row)):
                    yield Line(start, "")
                elif header is None:
                    header, column = row, row.index(text_key(row, f"the header of {self.path}"))
                elif len(row) != len(header):
                    counts = f"{len(row)} fields, but {len(header)} in the header"
                    raise ValueError(f"{self.path}, line {start}: {counts}; put texts with commas in quotes")
                else:
                    yield Line(start, row[column])
                start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{self.path}, line {start}: malformed CSV ({error}); check its quotes") from error

    def _parquet(self) -> Iterator[Line]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self.path) as file:
                column = text_key(file.schema_arrow.names, f"the schema of {self.path}")
                batches = file.iter_batches(columns=[column], batch_size=4096)
                for row, scalar in enumerate(chain.from_iterable(batch.column(0) for batch in batches), 1):
                    yield Line(row, _parquet_text(f"{self.path}, row {row}", scalar))
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self.path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error

    def _text_lines(self) -> Iterator[_TextLine]:
        """Read the lines of a text file in bounded memory; refuse characters that no tokenizer should see.

        Lines end in \\n, \\r\\n or, as on old Macs, in \\r; a file may mix them.
        """
        with self.path.open(encoding="latin-1", newline="") as file:  # a character per byte, with the line ends
            offset = 0
            for number, characters in enumerate(iter(partial(file.readline, MAX_LINE + 1), ""), 1):
                raw = characters.encode("latin-1")
                if len(raw) > MAX_LINE:
                    what = f"more than {MAX_LINE} bytes; is this a file of prompts?"
                    raise _TextLine(self.path, number, offset, "").error(what)
                if b"\0" in raw and is_utf16(raw):
                    raise _TextLine(self.path, number, offset, "").error("looks like UTF-16; save the file as UTF-8")
                skipped = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
                line = _TextLine.decode(self.path, number, offset + skipped, raw[skipped:])
                if fault := refused_character(line.text):
                    raise line.error(f"{fault[0]} in a prompt; remove it", fault[1])
                yield line
                offset += len(raw)


class PromptFileDataset(AbstractDataset[Iterable[dict], PromptFile]):
    """A prompt file in the catalog; loading opens nothing, so the file may be missing until it is read.

    Args:
        filepath: ends in .txt, .jsonl, .csv or .parquet, of which only .jsonl can be saved; or hf:// (`hub_prompts`).
        metadata: ignored; for Kedro plugins.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self._url = Path(filepath), filepath
        self.metadata = metadata

    def load(self) -> PromptFile:
        from dpdmd_pipeline.datasets.hub_prompts import SCHEME, HubPrompts

        return HubPrompts.of(self._url) if str(self._url).startswith(SCHEME) else PromptFile(self._filepath)

    def save(self, data: Iterable[dict]) -> None:
        """Stream records into a .jsonl file that is complete or absent."""
        if self._filepath.suffix.lower() != ".jsonl":
            raise ValueError(f"cannot save prompts as {self._filepath}: only .jsonl can be written")

        def write(path: Path) -> None:
            with path.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in data)

        with writing(self._filepath):
            self._filepath.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._filepath, write)

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}


class _TextLine(NamedTuple):
    """A line of a text file and its position, for error messages."""

    path: Path
    number: int  # from 1
    offset: int  # bytes of the file before the text
    text: str  # with its line end

    @classmethod
    def decode(cls, path: Path, number: int, offset: int, raw: bytes) -> _TextLine:
        try:
            return cls(path, number, offset, raw.decode())
        except UnicodeDecodeError as error:
            what = f"0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
            raise cls(path, number, offset + error.start, "").error(what) from error

    def json(self) -> Any:
        try:
            return json.loads(self.text)
        except json.JSONDecodeError as error:
            what = f"not JSON ({error.msg}); write one object or string a line"
            raise self.error(what, error.pos) from error
        except RecursionError as error:
            raise self.error("JSON nested too deeply") from error

    def error(self, what: str, index: int = 0) -> ValueError:
        """Error at a character of the line."""
        byte = self.offset + len(self.text[:index].encode())
        return ValueError(f"{self.path}, line {self.number}, byte {byte}: {what}")


def _parquet_text(position: str, scalar: Any) -> str:
    try:
        text = scalar.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{position}, byte {error.start} of the text: not UTF-8; save it as UTF-8") from error
    return checked_text(position, text)


def checked_text(position: str, text: Any) -> str:
    """A text of a table, "" for a missing one; a ValueError with its position if it cannot be a prompt."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{position}: expected a string, got {text!r:.60}")
    if fault := refused_character(text):
        byte = len(text[: fault[1]].encode())
        raise ValueError(f"{position}, byte {byte} of the text: {fault[0]} in a prompt; remove it")
    return text


def text_key(names: Iterable[str], source: str) -> str:
    """The column of the prompts, or the key of an object's; a ValueError if it is missing or ambiguous."""
    for key in KEYS:
        if (count := list(names).count(key)) > 1:
            raise ValueError(f"{source} has {count} columns {key!r}: rename all but one")
        if count:
            return key
    available = ", ".join(repr(name) for name in names) or "nothing"
    raise ValueError(f"{source} names none of {', '.join(KEYS)}; it has {available:.200}")
