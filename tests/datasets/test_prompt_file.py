import csv
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.raising import refuses

from dpdmd_pipeline.datasets.prompt_file import MAX_LINE, Line, PromptFile, PromptFileDataset
from dpdmd_pipeline.errors import MissingInputError

TRICKY = [
    "50-year-old man",
    "3 cats",
    'a sign, "open", in the rain',
    "e\u0301cole 🦊👩‍👩‍👧",
    "שלום \u200fעולם",
    "[red] (car) {x} \\n",
    "a\u2028b",
]
# Visible, or empty: lines of white space or zero-width characters alone are read as "".
writable = st.just("") | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])).map("a{}".format)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return PromptFile(path)


def texts(file):
    return [line.text for line in file.lines()]


def write_csv(path, column, values):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", column], *([index, text] for index, text in enumerate(values))])
    return PromptFile(path)


def write_parquet(path, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return PromptFile(path)


@pytest.mark.parametrize("key", ["text", "prompt", "caption"])
def test_every_format_gives_back_the_written_texts(tmp_path, key):
    files = [
        write(tmp_path / "a.txt", "\n".join(TRICKY)),
        write(tmp_path / "a.jsonl", "\n".join(json.dumps({key: text, "other": 1}) for text in TRICKY)),
        write(tmp_path / "b.jsonl", "\n".join(json.dumps(text, ensure_ascii=False) for text in TRICKY) + "\n"),
        write_csv(tmp_path / "a.csv", key, TRICKY),
        write_parquet(tmp_path / "a.PARQUET", id=range(len(TRICKY)), **{key: TRICKY}),
    ]
    for file in files:
        assert texts(file) == TRICKY, file.path.name


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first draw, on a busy machine
@given(records=st.lists(st.fixed_dictionaries({"text": writable, "train": st.booleans()})))
def test_saved_records_are_loaded(tmp_path_factory, records):
    dataset = PromptFileDataset(filepath=str(tmp_path_factory.mktemp("saved") / "new" / "prompts.jsonl"))
    dataset.save(iter(records))
    assert list(dataset.load()) == records
    assert list(dataset.load().records(1, 3)) == records[1:3]
    assert texts(dataset.load()) == [record["text"] for record in records]


def test_loading_opens_nothing(tmp_path):
    dataset = PromptFileDataset(filepath=str(tmp_path / "later.txt"))
    assert not dataset.exists()
    file = dataset.load()
    write(tmp_path / "later.txt", "a cat")
    assert dataset.exists()
    assert texts(file) == texts(file) == ["a cat"]


def test_an_interrupted_save_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    def broken():
        yield {"text": "new"}
        raise KeyboardInterrupt

    dataset = PromptFileDataset(filepath=str(tmp_path / "prompts.jsonl"))
    dataset.save([{"text": "old"}])
    with pytest.raises(KeyboardInterrupt):
        dataset.save(broken())
    assert list(dataset.load()) == [{"text": "old"}]
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    "content", ["1. a cat\n2. 3 dogs\n10. 50-year-old man\n", "0) a cat\r\n\r\n 1)  3 dogs\r\n2) 50-year-old man"]
)
def test_a_numbered_list_loses_its_numbers(tmp_path, content):
    file = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + content.encode())
    assert file.is_numbered_list()
    assert [text for text in texts(file) if text] == ["a cat", "3 dogs", "50-year-old man"]


@pytest.mark.parametrize(
    "lines",
    [
        ["50-year-old man", "3 cats"],
        ["1. a cat", "a dog"],
        ["2. Weltkrieg"],
        ["2. Bundesliga", "1. FC"],
        ["1.5 litres of milk", "2.5 litres"],
        ["1. same", "1. same"],
    ],
)
def test_other_numbers_are_part_of_the_prompts(tmp_path, lines):
    file = write(tmp_path / "a.txt", "\n".join(lines))
    assert not file.is_numbered_list()
    assert texts(file) == lines


def test_lines_carry_their_numbers(tmp_path):
    assert list(write(tmp_path / "a.txt", "a\n\nb\n").lines()) == [Line(1, "a"), Line(2, ""), Line(3, "b")]
    rows = 'text\n"two\nlines"\n\nlast\n'
    assert list(write(tmp_path / "a.csv", rows).lines()) == [Line(2, "two\nlines"), Line(4, ""), Line(5, "last")]


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        ("a red circle\ra blue square\ra green triangle", [1, 2, 3]),
        ("a red circle\ra blue square\r\na green triangle\n", [1, 2, 3]),
        ("\ufeff1. a red circle\r\r2. a blue square\r3. a green triangle\r", [1, 3, 4]),
    ],
)
def test_a_carriage_return_alone_ends_a_line(tmp_path, content, numbers):
    lines = [line for line in write(tmp_path / "a.txt", content).lines() if line.text]
    assert [line.text for line in lines] == ["a red circle", "a blue square", "a green triangle"]
    assert [line.number for line in lines] == numbers


def test_carriage_returns_alone_end_lines_of_every_text_format_in_bounded_memory(tmp_path):
    assert texts(write(tmp_path / "a.csv", 'id,text\r1,a cat\r2,"a, dog"\r')) == ["a cat", "a, dog"]
    assert texts(write(tmp_path / "a.jsonl", '"a cat"\r{"text": "a dog"}\r')) == ["a cat", "a dog"]
    many = MAX_LINE // 4
    assert texts(write(tmp_path / "a.txt", "a cat\r" * many)) == ["a cat"] * many


@pytest.mark.parametrize("invisible", ["\u200b", "\u200d\u2060", " \ufeff\u00ad\t", "\u3164\ufe0f"])
def test_a_line_of_zero_width_characters_is_no_prompt(tmp_path, invisible):
    files = [
        write(tmp_path / "a.txt", f"1. a cat\n{invisible}\n2. a dog\n"),
        write(tmp_path / "a.jsonl", f'"a cat"\n{invisible}\n"a dog"'),
        write(tmp_path / "b.jsonl", "\n".join(json.dumps(text) for text in ("a cat", invisible, "a dog"))),
        write(tmp_path / "a.csv", f"id,text\n1,a cat\n{invisible}\n2,a dog"),
        write(tmp_path / "b.csv", f"text\na cat\n{invisible}\na dog"),
        write_parquet(tmp_path / "a.parquet", text=["a cat", invisible, "a dog"]),
    ]
    for file in files:
        assert texts(file) == ["a cat", "", "a dog"], file.path.name


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_utf_16_is_named_with_the_encoding_to_use(tmp_path, encoding, suffix):
    with refuses(ValueError, f"a.{suffix}, line 1,", "UTF-16", "as UTF-8"):
        texts(write(tmp_path / f"a.{suffix}", "text\r\na café\r\n".encode(encoding)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok\na \x00 cat", "a.txt, line 2, byte 5: NUL"),
        ("a.txt", b"\xef\xbb\xbf\xc3\xa9\x1b[0m", r"line 1, byte 5: .*U\+001B"),
        ("a.txt", b"ok\r\n\xc3\xa9 \xff", "line 2, byte 7: 0xff .*UTF-8"),
        ("a.txt", b"\xff\xfea\x00", "line 1, byte 0: 0xff .*UTF-8"),
        ("a.txt", b"x" * (MAX_LINE + 1), "line 1, byte 0: .*1048576"),
        ("a.doc", b"a cat", r"a\.doc .*'\.doc'.*\.txt, \.jsonl, \.csv, \.parquet"),
        ("a", b"a cat", r"''.*\.txt, \.jsonl"),
        ("a.jsonl", b'"ok"\n{"text": ', "line 2, byte 14: .*JSON"),
        ("a.jsonl", b'{"body": "a cat"}', "a.jsonl, line 1 .*text, prompt, caption.*'body'"),
        ("a.jsonl", b'{"text": 7}', r"line 1, byte 0: .*string.*\b7"),
        ("a.jsonl", b"[1]", r"line 1, byte 0: .*string.*\[1\]"),
        ("a.jsonl", b'"ok"\n"a \\u0000"', "line 2, byte 5: NUL"),
        ("a.jsonl", b'"\\ud800"', r"line 1, byte 0: .*surrogate.*U\+D800"),
        ("a.jsonl", b"[" * 100_000, "line 1, byte 0: JSON"),
        (
            "a.csv",
            b"id,body\n1,a cat",
            "header of .*a.csv .*text, prompt, caption.*'id', 'body'",
        ),
        ("a.csv", b"text,id,text\na cat,1,a dog", "header of .*a.csv .*2 columns 'text'"),
        ("a.csv", b"text\na red, shiny car", "line 2: 2 fields.* 1 .*quotes"),
        ("a.csv", b'text\nok\n"open', "line 3: .*CSV"),
        ("a.csv", b'text\n"a\n\xff"', "line 3, byte 8: 0xff .*UTF-8"),
        ("a.parquet", b"PAR1 not really", "a.parquet .*Parquet"),
    ],
)
def test_bad_content_is_refused_with_its_position(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        texts(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, "schema of .*a.parquet .*text, prompt, caption.*'body'"),
        ({"text": [1]}, r"row 1: .*string.*\b1"),
        ({"text": ["ok", "é\x00"]}, "row 2, byte 2 .*NUL"),
    ],
)
def test_bad_parquet_is_refused_with_its_position(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        texts(write_parquet(tmp_path / "a.parquet", **columns))


def test_undecodable_parquet_is_refused_with_its_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    broken = pa.array([b"ok", b"a \xff"], pa.binary()).view(pa.string())
    with refuses(ValueError, "row 2, byte 2", "UTF-8"):
        texts(write_parquet(tmp_path / "a.parquet", text=broken))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_a_missing_file_is_named_with_the_options_that_name_another(tmp_path, suffix):
    with refuses(FileNotFoundError, f"nope{suffix}", "raw_prompts=FILE", "raw_eval_prompts=FILE"):
        texts(PromptFile(tmp_path / f"nope{suffix}"))


def test_missing_prompts_of_this_project_name_the_stage_that_writes_them(tmp_path):
    with refuses(MissingInputError, "nope.jsonl") as error:
        list(PromptFile(tmp_path / "nope.jsonl"))
    assert error.value.stage == "prompts"


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table([["a cat"], ["a dog"]], names=["text", "text"]), tmp_path / "a.parquet")
    with refuses(ValueError, "a.parquet", "2 columns 'text'"):
        texts(PromptFile(tmp_path / "a.parquet"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("read", [texts, list], ids=["lines", "records"])
def test_folders_pipes_and_devices_are_refused_without_waiting(tmp_path, suffix, read):
    folder, pipe, device = (tmp_path / f"{kind}{suffix}" for kind in ("folder", "pipe", "device"))
    folder.mkdir()
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (folder, pipe, device):
        with refuses((IsADirectoryError, ValueError), str(path)) as error:
            read(PromptFile(path))
        assert "\n" not in str(error.value)


def test_only_jsonl_is_written(tmp_path):
    with refuses(Exception, "a.csv", ".jsonl"):
        PromptFileDataset(filepath=str(tmp_path / "a.csv")).save([{"text": "a"}])
