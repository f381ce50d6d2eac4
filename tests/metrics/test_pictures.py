import json

import numpy as np
import pytest
import torch
from PIL import Image

from dpdmd_pipeline.metrics.pictures import FileSet, StoredSet, TensorSet, find_pictures, read_parts, read_texts


def draw(path, size=(8, 8), colour="red", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def described(folder, prompts=None):
    return {found.id: (found.text, [file.name for file in found.files]) for found in find_pictures(folder, prompts)[0]}


def test_a_folder_per_prompt_is_read_in_the_order_of_seeds(tmp_path):
    for name in ("a dog/10.png", "a dog/9.png", "cat/x.jpg"):
        draw(tmp_path / name)
    (tmp_path / "cat" / "prompt.txt").write_text("a cat / on a mat\n")
    (tmp_path / "cat" / "notes.md").write_text("")
    assert described(tmp_path) == {"a dog": ("a dog", ["9.png", "10.png"]), "cat": ("a cat / on a mat", ["x.jpg"])}
    assert find_pictures(tmp_path)[1] == ["cat/notes.md"]


def test_a_file_per_picture_is_grouped_by_its_id(tmp_path):
    for name in ("0_1.png", "0_12.png", "0_2.png", "my_cat_5.png", "ComfyUI_00001_.png"):
        draw(tmp_path / name)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n")
    assert described(tmp_path, prompts) == {
        "0": ("a dog", ["0_1.png", "0_2.png", "0_12.png"]),
        "ComfyUI": ("ComfyUI", ["ComfyUI_00001_.png"]),
        "my_cat": ("my_cat", ["my_cat_5.png"]),
    }
    assert find_pictures(tmp_path)[1] == ["prompts.txt"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_manifest_names_files_and_prompts(tmp_path, kind):
    records = [("x.png", "a dog", "7"), ("sub/y.png", "a dog", "7"), ("z.png", "a cat", "")]
    if kind == "csv":
        lines = ["file,prompt,id", *(",".join(record) for record in records)]
    else:
        lines = [json.dumps(dict(zip(("file", "prompt", "id"), record, strict=True))) for record in records]
    (tmp_path / f"manifest.{kind}").write_text("\n".join(lines))
    assert described(tmp_path) == {"7": ("a dog", ["x.png", "y.png"]), "a cat": ("a cat", ["z.png"])}


def test_every_kind_of_bad_picture_is_a_fault_with_its_name(tmp_path):
    good = [draw(tmp_path / f"{number}.png") for number in range(3)]
    odd, cut, empty = draw(tmp_path / "odd.png", (4, 8)), draw(tmp_path / "cut.jpg", (200, 200)), tmp_path / "empty.png"
    cut.write_bytes(cut.read_bytes()[:500])
    empty.touch()
    text, deep = tmp_path / "text.png", tmp_path / "deep.png"
    text.write_text("no picture")
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(deep)
    files = (odd, good[0], cut, empty, good[1], text, deep, tmp_path / "gone.png", good[2])
    names, images, faults = FileSet("p", "p", files).load()
    assert names == list(map(str, good)) and all(image.size == (8, 8) for image in images)
    assert {tmp_path.joinpath(fault.name).name: fault.kind for fault in faults} == {
        "odd.png": "another size than the prompt's other pictures",
        "cut.jpg": "cut off or damaged",
        "empty.png": "empty file",
        "text.png": "not a picture",
        "deep.png": "pixel format I;16: convert it to 8 bits",
        "gone.png": "no such file",
    }


def test_pictures_in_memory_are_those_on_disk(tmp_path):
    pixels = torch.randint(256, (2, 3, 6, 5), dtype=torch.uint8)
    names, images, _ = TensorSet("p", "a dog", pixels).load()
    assert names == ["p[0]", "p[1]"]
    assert np.array_equal(np.asarray(images[1]), pixels[1].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "has no picture"),
        ({"dog.png": None}, "dog.png is not named <prompt-id>_<seed>"),
        ({"a_1.png": None, "b/1.png": None}, "pictures beside folders of pictures"),
        ({"manifest.csv": "file,prompt\nx.png,\n"}, "record 1 has no prompt"),
        ({"manifest.csv": "file,prompt\n"}, "is empty"),
        ({"manifest.jsonl": "{\n"}, "line 1 is not JSON"),
        ({"manifest.jsonl": "[1]\n"}, "line 1 is not a JSON object"),
        ({"manifest.csv": "file,prompt,id\nx.png,a,1\ny.png,b,1\n"}, "id 1 has two prompts, 'a' and 'b'"),
    ],
)
def test_a_folder_that_cannot_be_understood_is_refused_with_a_reason(tmp_path, files, told):
    for name, content in files.items():
        draw(tmp_path / name) if content is None else (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=told):
        find_pictures(tmp_path)


def test_texts_and_parts_are_read_or_refused(tmp_path):
    (tmp_path / "p.csv").write_text("id,text\n3,a dog\n")
    assert read_texts(tmp_path / "p.csv") == {"3": "a dog"}
    (tmp_path / "p.jsonl").write_text('{"id": 0}\n')
    with pytest.raises(ValueError, match="lacks id or text"):
        read_texts(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match=r"read from .txt, .csv or .jsonl"):
        read_texts(tmp_path / "p.parquet")
    (tmp_path / "m.jsonl").write_text('{"prompt": "a dog", "include": []}\n')
    assert list(read_parts(tmp_path / "m.jsonl")) == ["a dog"]
    with pytest.raises(ValueError, match="not GenEval's"):
        read_parts(tmp_path / "p.jsonl")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(OSError, match="is no folder of pictures"):
        find_pictures(tmp_path / "nothing")


def test_a_stored_set_reads_its_rows_when_it_is_measured_and_not_before():
    cache, asked = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8), []

    def read(rows):
        asked.append(rows)
        return cache[list(rows)]

    stored = StoredSet("p", "a cat", (4, 1), read)
    assert len(stored) == 2 and not asked
    loaded, expected = stored.load(), TensorSet("p", "a cat", cache[[4, 1]]).load()
    assert asked == [(4, 1)] and loaded.names == expected.names
    assert [image.tobytes() for image in loaded.images] == [image.tobytes() for image in expected.images]
