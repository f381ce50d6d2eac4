import pytest
from tests.raising import refuses
from tests.scoring.drawing import draw

from dpdmd_pipeline.scoring.folders import find_pictures
from dpdmd_pipeline.scoring.texts import read_parts, read_texts


def test_texts_and_parts_are_read_or_refused(tmp_path):
    (tmp_path / "p.csv").write_text("id,text\n3,a dog\n")
    assert read_texts(tmp_path / "p.csv") == {"3": "a dog"}
    (tmp_path / "p.jsonl").write_text('{"id": 0}\n')
    (tmp_path / "two.csv").write_text("id,text\n0,a dog\n1,a cat\n0,a dog\n0,a bird\n")
    with refuses(ValueError, "two.csv, record 4", "id 0", "'a dog'", "'a bird'"):
        read_texts(tmp_path / "two.csv")
    with refuses(ValueError, "p.jsonl, record 1", "text"):
        read_texts(tmp_path / "p.jsonl")
    with refuses(ValueError, "p.parquet", ".txt", ".csv", ".jsonl"):
        read_texts(tmp_path / "p.parquet")
    (tmp_path / "m.jsonl").write_text('{"prompt": "a dog", "include": [{"class": "dog", "count": 1}]}\n')
    assert list(read_parts(tmp_path / "m.jsonl")) == ["a dog"]
    with refuses(ValueError, "p.jsonl, record 1", "prompt"):
        read_parts(tmp_path / "p.jsonl")
    (tmp_path / "short.jsonl").write_text('{"prompt": "a dog", "include": [{"class": "dog"}]}\n')
    with refuses(ValueError, "short.jsonl, record 1 (a dog): include.0.count"):
        read_parts(tmp_path / "short.jsonl")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.csv", "prompts.jsonl", "prompts/p0/prompt.txt"])
def test_a_text_file_with_another_encoding_or_a_missing_one_is_named(tmp_path, name):
    draw(tmp_path / "prompts" / "p0" / "1.png")
    read = (lambda: find_pictures(tmp_path / "prompts")) if "p0" in name else (lambda: read_texts(tmp_path / name))
    (tmp_path / name).write_bytes("id,text\n0,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name} .*UTF-8.*0xe9.*\b13\b"):
        read()
    if "p0" not in name:
        (tmp_path / name).unlink()
        with refuses(OSError, f"{name}"):
            read()


def test_an_invalid_csv_is_named(tmp_path):
    (tmp_path / "p.csv").write_text(f"id,text\n0,{'a' * 200_000}\n")
    with refuses(ValueError, "p.csv", "CSV"):
        read_texts(tmp_path / "p.csv")


UNREADABLE = {
    "deep": ("[" * 100_000 + "]" * 100_000, "JSON"),
    "long number": ("1" * 5000, "JSON"),
    "list": ('["a dog"]', "list"),
    "object": ('{"a": "dog"}', "dict"),
    "flag": ("true", "bool"),
    "half a pair": (r'"a \ud800 dog"', "U+D800"),
}


def record_of(**fields):
    """A line of JSON from the spelling of each value."""
    return "{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}\n"


@pytest.mark.parametrize(("value", "fact"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("key", ["id", "text"])
def test_a_field_of_prompts_that_is_no_text_is_refused_with_its_record(tmp_path, key, value, fact):
    fields = {"id": "1", "text": '"a dog"'} | {key: value}
    (tmp_path / "p.jsonl").write_text(record_of(id=0, text='"a cat"') + record_of(**fields))
    with refuses(ValueError, f"{tmp_path}/p.jsonl, ", " 2 ", fact):
        read_texts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(("value", "fact"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_prompt_of_geneval_that_is_no_text_is_refused_with_its_record(tmp_path, value, fact):
    record = record_of(prompt=value, include='[{"class": "dog", "count": 1}]')
    (tmp_path / "m.jsonl").write_text(record)
    with refuses(ValueError, f"{tmp_path}/m.jsonl, ", " 1 ", fact):
        read_parts(tmp_path / "m.jsonl")
    draw(tmp_path / "00000" / "samples" / "0000.png")
    (tmp_path / "00000" / "metadata.jsonl").write_text(record)
    with refuses(ValueError, f"{tmp_path}/00000/metadata.jsonl", fact):
        find_pictures(tmp_path)


@pytest.mark.parametrize(("value", "fact"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("key", ["file", "prompt", "id"])
def test_a_field_of_a_manifest_that_is_no_text_is_refused_with_its_record(tmp_path, key, value, fact):
    fields = {"file": '"x.png"', "prompt": '"a dog"', "id": "1"} | {key: value}
    (tmp_path / "manifest.jsonl").write_text(record_of(**fields))
    if key == "file" and fact == "U+D800":  # in a path, it can stand for a byte outside UTF-8
        ((one,), _) = find_pictures(tmp_path)
        assert [fault.kind for fault in one.load().faults] == ["no such file"]
        return
    with refuses(ValueError, f"{tmp_path}/manifest.jsonl, ", " 1 ", fact):
        find_pictures(tmp_path)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("id,text,text\n0,a dog,a cat\n", ["2 columns 'text'"]),
        ("id,text\n0,a dog, and a cat\n", ["line 2", "more fields"]),
        ('id,text\n0,"a dog\n', ["CSV"]),
        ("id,text\n0,a \x1b[2Jdog\n", ["control character U+001B"]),
        ("id,text\n0,a dog\n".encode("utf-16-le").decode(), ["NUL", "UTF-16"]),
        ("id,text\n0,\u200b\u2060\n", ["record 1", "text"]),
    ],
    ids=["two columns", "comma", "quote", "terminal command", "UTF-16", "nothing to see"],
)
def test_texts_that_would_be_read_as_others_are_refused(tmp_path, content, facts):
    (tmp_path / "p.csv").write_text(content)
    with refuses(ValueError, "p.csv", *facts):
        read_texts(tmp_path / "p.csv")


def test_lines_of_a_text_file_end_as_in_the_prompt_files_of_a_run(tmp_path):
    (tmp_path / "p.txt").write_bytes("a dog\ra \u2028cat\r\n\u200b\na\x0ccow\n".encode())
    assert read_texts(tmp_path / "p.txt") == {"0": "a dog", "1": "a \u2028cat", "3": "a\x0ccow"}
