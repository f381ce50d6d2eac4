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
