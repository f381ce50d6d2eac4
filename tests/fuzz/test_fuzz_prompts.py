"""Prompt files: those of a run, and those of `score --prompts`."""

import csv
import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.verdicts import refusal, seeded

from dpdmd_pipeline.datasets.prompt_file import PromptFile
from dpdmd_pipeline.scoring.texts import read_texts
from dpdmd_pipeline.wording import is_blank, refused_character

FORMATS = ("txt", "jsonl", "csv")
TEXTS = [
    "a red circle",
    "café, at night",
    'a "quoted" dog',
    "3 cats",
    "猫と犬",
    "1. a list",
    "🐈 {x}",
    "a\tb",
    "é" * 90,
]
READERS = {
    "run": lambda path: [line.text for line in PromptFile(path).lines()],
    "score": lambda path: list(read_texts(path).values()),
}


def write(form: str, texts: list[str], newline: str = "\n") -> bytes:
    """A sound file that both readers accept: `id` and `text` where there are columns."""
    if form == "txt":
        return newline.join([*texts, ""]).encode()
    if form == "jsonl":
        lines = [json.dumps({"id": number, "text": text}) for number, text in enumerate(texts)]
        return newline.join([*lines, ""]).encode()
    file = io.StringIO(newline="")
    rows = csv.writer(file, lineterminator=newline)
    rows.writerows([["id", "text"], *([number, text] for number, text in enumerate(texts))])
    return file.getvalue().encode()


def last_field(value: str):
    """A damage of JSON: the last record with this spelling of its text."""
    return lambda content: content + b'{"id": 99, "text": ' + value.encode() + b"}\n"


# What both readers accept, and what both refuse: name -> (formats, damage of a sound file).
SOUND = {
    "none": (FORMATS, lambda content: content),
    "mark": (FORMATS, lambda content: b"\xef\xbb\xbf" + content),
    "old Mac": (("txt",), lambda content: content.replace(b"\n", b"\r")),
    "Windows": (FORMATS, lambda content: content.replace(b"\n", b"\r\n")),
    "blank lines": (("txt", "jsonl"), lambda content: b"\n  \n" + content + b"\n\n"),
    "zero width": (("txt",), lambda content: content + "\u200b\n\u2060\ufeff\n".encode()),
    "no last end": (FORMATS, lambda content: content.rstrip(b"\n")),
    "separator": (("txt", "csv"), lambda content: content.replace(b"red", "r\u2028d".encode())),
}
DAMAGED = {
    "UTF-16": (FORMATS, lambda content: content.decode().encode("utf-16")),
    "UTF-16 without mark": (FORMATS, lambda content: content.decode().encode("utf-16-le")),
    "UTF-32": (FORMATS, lambda content: content.decode().encode("utf-32-be")),
    "Latin-1": (FORMATS, lambda content: content + b"caf\xe9\n"),
    "half a character": (FORMATS, lambda content: content + "é".encode()[:1]),
    "NUL": (FORMATS, lambda content: content + b"a\0b\n"),
    "bell": (("txt", "csv"), lambda content: content + b"99,\x07\n"),
    "terminal command": (("txt", "csv"), lambda content: content + b"99,\x1b[2J\n"),
    "C1 control": (("txt", "csv"), lambda content: content + "99,\x9b31m\n".encode()),
    "gzip": (FORMATS, lambda content: b"\x1f\x8b\x08\0" + content),
    "quote": (("csv",), lambda content: content + b'99,"a dog\n'),
    "comma": (("csv",), lambda content: content + b"99,a dog, a cat\n"),
    "two columns": (("csv",), lambda content: content.replace(b"id,text", b"text,text", 1)),
    "no column": (("csv",), lambda content: content.replace(b"id,text", b"id,words", 1)),
    "long field": (("csv", "jsonl"), lambda content: content + b"99," + b"a" * (1 << 20) + b"\n"),
    "deep": (("jsonl",), last_field("[" * 100_000 + "]" * 100_000)),
    "deep line": (("jsonl",), lambda content: content + b'{"a":' * 50_000 + b"\n"),
    "huge integer": (("jsonl",), last_field("1" * 5000)),
    "escaped bell": (("jsonl",), last_field(r'"a\u0007"')),
    "escaped half": (("jsonl",), last_field(r'"a\ud83d"')),
    "list": (("jsonl",), last_field('["a"]')),
    "object": (("jsonl",), last_field('{"text": "a"}')),
    "boolean": (("jsonl",), last_field("true")),
    "cut": (("jsonl",), lambda content: content.rstrip()[:-3]),
    "not JSON": (("jsonl",), lambda content: content + b"a red circle\n"),
}
CASES = [(name, form) for table in (SOUND, DAMAGED) for name, (forms, _) in table.items() for form in forms]


def check(folder, reader: str, texts: list[str], name: str, form: str) -> None:
    path = folder / f"prompts.{form}"
    path.write_bytes((SOUND | DAMAGED)[name][1](write(form, texts)))
    read: list[str] = []
    line = refusal(f"prompts of a {reader}", lambda: read.extend(READERS[reader](path)))
    assert bool(line) == (name in DAMAGED), f"{name}.{form}: {line or read}"
    assert path.name in (line or path.name)
    assert not [text for text in read if not isinstance(text, str) or refused_character(text)]
    if name in SOUND and reader == "score":
        assert len(read) == len(texts)


@pytest.mark.parametrize("reader", READERS)
def test_prompt_files_are_read_or_refused(tmp_path_factory, reader):
    folder = tmp_path_factory.mktemp("prompts")

    @seeded(110)
    @given(texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5), case=st.sampled_from(CASES))
    def run(texts, case):
        check(folder, reader, texts, *case)

    run()


@pytest.mark.parametrize("reader", READERS)
def test_random_bytes_in_a_prompt_file_give_clean_texts_or_a_refusal(tmp_path_factory, reader):
    folder = tmp_path_factory.mktemp("prompts")

    @seeded(60)
    @given(st.sampled_from(FORMATS), st.binary(min_size=1, max_size=8), st.floats(0, 1))
    def run(form, noise, where):
        content = write(form, TEXTS)
        position = int(where * len(content))
        path = folder / f"prompts.{form}"
        path.write_bytes(content[:position] + noise + content[position:])
        read: list[str] = []
        refusal(f"prompts of a {reader}", lambda: read.extend(READERS[reader](path)))
        assert not [text for text in read if refused_character(text) or (reader == "score" and is_blank(text))]

    run()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ".docx", ""])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "nothing", "rubbish"])
def test_other_things_than_prompt_files_are_refused(tmp_path, reader, suffix, kind):
    path = tmp_path / f"prompts{suffix}"
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda path: path.symlink_to(path)}
    make |= {"nothing": lambda path: None, "rubbish": lambda path: path.write_bytes(bytes(range(256)))}
    make[kind](path)
    assert path.name in refusal(f"prompts of a {reader}", lambda: READERS[reader](path))
