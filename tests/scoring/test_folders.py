import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpdmd_pipeline.scoring.decode import read_picture
from dpdmd_pipeline.scoring.folders import about_strays, find_pictures
from dpdmd_pipeline.scoring.sets import FileSet, StoredSet, TensorSet, of_one_size
from dpdmd_pipeline.scoring.texts import read_parts, read_texts


def draw(path, size=(8, 8), colour="red", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def described(folder, prompts=None):
    return {found.id: (found.text, [file.name for file in found.files]) for found in find_pictures(folder, prompts)[0]}


def without_text(folder, prompts=None):
    """Why prompts have no text, by id."""
    return {found.id: found.no_text for found in find_pictures(folder, prompts)[0] if found.no_text}


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
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,text\n0,a dog\nmy_cat,a cat\nComfyUI,a bird\nmore,a fish\n")
    assert described(tmp_path, prompts) == {
        "0": ("a dog", ["0_1.png", "0_2.png", "0_12.png"]),
        "ComfyUI": ("a bird", ["ComfyUI_00001_.png"]),
        "my_cat": ("a cat", ["my_cat_5.png"]),
    }
    assert not without_text(tmp_path, prompts)
    assert find_pictures(tmp_path)[1] == ["prompts.csv"]


@pytest.mark.parametrize("name", ["00000_1.png", "00000/1.png", "a dog/1.png"])
def test_an_id_that_the_file_of_prompts_lacks_is_refused_with_what_the_file_has(tmp_path, name):
    draw(tmp_path / "pictures" / name)
    (tmp_path / "prompts.txt").write_text("a dog\na cat\na bird\n")
    found = name.split("_")[0].split("/")[0]
    with pytest.raises(ValueError, match=rf"id '{found}' is not in .*prompts.txt, which has 0 to 2: write both alike"):
        find_pictures(tmp_path / "pictures", tmp_path / "prompts.txt")
    (tmp_path / "prompts.csv").write_text("id,text\n" + "".join(f"p{number},a dog\n" for number in range(9)))
    with pytest.raises(ValueError, match="which has p0, p1, p2, p3, p4 and 4 more"):
        find_pictures(tmp_path / "pictures", tmp_path / "prompts.csv")


@pytest.mark.parametrize(
    ("name", "is_text"),
    [
        ("a red circle/1.png", True),
        ("cat/1.png", True),
        ("2 dogs/1.png", True),
        ("00000/1.png", False),
        ("prompt_12/1.png", False),
        ("a red circle_1.png", True),
        ("2 dogs_1.png", True),
        ("cat_1.png", False),
        ("ComfyUI_00001_.png", False),
    ],
)
def test_a_name_is_a_text_where_it_reads_like_one_and_else_an_id(tmp_path, name, is_text):
    draw(tmp_path / name)
    (found,) = find_pictures(tmp_path)[0]
    assert found.text == found.id  # for who shows it
    assert bool(found.no_text) != is_text
    if not is_text:
        assert "its name is an id: give --prompts FILE" in found.no_text


def test_a_text_beside_the_pictures_makes_up_for_a_name_that_is_an_id_and_an_empty_one_is_none(tmp_path):
    for name in ("00000", "00001", "a dog"):
        draw(tmp_path / name / "1.png")
    (tmp_path / "00000" / "prompt.txt").write_text("\ufeffa cat\n", encoding="utf-8")
    (tmp_path / "a dog" / "prompt.txt").write_text(" \n")
    assert described(tmp_path)["00000"][0] == "a cat"
    told = without_text(tmp_path)
    assert set(told) == {"00001", "a dog"} and "its prompt.txt is empty" in told["a dog"]


def test_a_folder_without_pictures_is_a_prompt_and_a_format_that_is_not_read_is_a_fault(tmp_path):
    draw(tmp_path / "a dog" / "1.png")
    for name in ("2.gif", "3.TIF"):
        Image.new("RGB", (8, 8)).save(tmp_path / "a dog" / name)
    (tmp_path / "a cat").mkdir()
    (tmp_path / "a cat" / "log.json").write_text("{}")
    sets, rest = find_pictures(tmp_path)
    assert [(one.id, len(one)) for one in sets] == [("a cat", 0), ("a dog", 1)]
    assert rest == ["a cat/log.json"]
    names, _, faults = sets[1].load()
    assert len(names) == 1
    assert [fault.kind for fault in faults] == [f"{kind} is not read: convert it to PNG" for kind in (".gif", ".tif")]
    assert sets[0].load() == ([], [], [])


def test_a_picture_is_read_as_a_viewer_shows_it(tmp_path):
    hidden = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    hidden.putpixel((0, 0), (0, 0, 255, 255))
    hidden.save(tmp_path / "alpha.png")
    hidden.convert("LA").save(tmp_path / "grey.png")
    keyed = Image.new("P", (2, 2), 0)
    keyed.putpalette([255, 0, 0, 0, 0, 255])
    keyed.putpixel((0, 0), 1)
    keyed.save(tmp_path / "palette.png", transparency=0)
    for name in ("alpha.png", "palette.png"):
        found = read_picture(tmp_path / name)
        assert found.mode == "RGB"
        assert [found.getpixel((x, y)) for y in (0, 1) for x in (0, 1)] == [(0, 0, 255)] + 3 * [(255, 255, 255)]
    assert read_picture(tmp_path / "grey.png").getpixel((1, 1)) == (255, 255, 255)
    turned = Image.new("RGB", (4, 2), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (2, 4)
    turned.save(tmp_path / "odd.jpg", exif=b"Exif\0\0rubbish")  # says nothing, and spoils no picture
    assert read_picture(tmp_path / "odd.jpg").size == (4, 2)


def test_an_opaque_alpha_channel_changes_no_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(np.dstack([pixels, np.full((6, 5), 255, np.uint8)])).save(tmp_path / "opaque.png")
    assert np.array_equal(np.asarray(read_picture(tmp_path / "opaque.png")), pixels)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_manifest_names_files_and_prompts(tmp_path, kind):
    records = [("x.png", "a dog", "7"), ("sub/y.png", "a dog", "7"), ("z.png", "a cat", "")]
    if kind == "csv":
        lines = ["file,prompt,id", *(",".join(record) for record in records)]
    else:
        lines = [json.dumps(dict(zip(("file", "prompt", "id"), record, strict=True))) for record in records]
    (tmp_path / f"manifest.{kind}").write_text("\n".join(lines))
    assert described(tmp_path) == {"7": ("a dog", ["x.png", "y.png"]), "a cat": ("a cat", ["z.png"])}


def test_pictures_that_a_manifest_does_not_name_are_told(tmp_path):
    for name in ("x.png", "y.png", "sub/z.jpg", "old.gif", ".hidden.png"):
        draw(tmp_path / name)
    (tmp_path / "manifest.csv").write_text("file,prompt\nx.png,a dog\n")
    sets, rest = find_pictures(tmp_path)
    assert len(sets) == 1 and rest == ["old.gif", "sub/z.jpg", "y.png"]
    assert about_strays(tmp_path, rest) == (
        f"left out of {tmp_path}, since its manifest does not name them: old.gif, sub/z.jpg, y.png"
    )


def test_geneval_s_own_layout_is_read_without_its_grids(tmp_path):
    for number, prompt in enumerate(("a photo of a dog", "a photo of two cats")):
        room = tmp_path / f"{number:05d}"
        for name in ("samples/0000.png", "samples/0001.png", "grid.png"):
            draw(room / name)
        (room / "metadata.jsonl").write_text(json.dumps({"tag": "counting", "prompt": prompt}) + "\n")
    pictures = ["0000.png", "0001.png"]
    assert described(tmp_path) == {"00000": ("a photo of a dog", pictures), "00001": ("a photo of two cats", pictures)}
    assert not without_text(tmp_path) and find_pictures(tmp_path)[1] == []
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"tag": "counting"}\n')
    with pytest.raises(ValueError, match=r"00000/metadata.jsonl has not one record with a prompt, .* write prompt.txt"):
        find_pictures(tmp_path)


def test_pictures_that_lie_a_folder_deeper_are_pointed_at(tmp_path):
    draw(tmp_path / "run 1" / "a dog" / "1.png")
    with pytest.raises(OSError, match=r"no folder of them; there are pictures in .*run 1/a dog: give .*run 1$"):
        find_pictures(tmp_path)


def test_a_format_that_is_not_read_is_a_fault_of_its_prompt_in_either_layout(tmp_path):
    for name in ("a dog_1.png", "a dog_2.gif", "a cat_1.tif", "logo.gif"):
        draw(tmp_path / name)
    sets, rest = find_pictures(tmp_path)
    assert {one.id: [fault.kind for fault in one.load().faults] for one in sets} == {
        "a dog": [".gif is not read: convert it to PNG"],
        "a cat": [".tif is not read: convert it to PNG"],
    }
    assert rest == ["logo.gif"]


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_a_picture_of_several_frames_is_a_fault(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:])
    with pytest.raises(OSError, match="animated: save the frame that is meant"):
        read_picture(tmp_path / f"x.{ending}")


def test_a_picture_beyond_pillow_s_limit_is_told_from_what_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
    with pytest.raises(OSError, match="more than 4 million pixels: scale it down"):
        read_picture(draw(tmp_path / "x.png", (2100, 2000)))


def test_every_kind_of_bad_picture_is_a_fault_with_its_name(tmp_path):
    good = [draw(tmp_path / f"{number}.png") for number in range(3)]
    odd, cut, empty = draw(tmp_path / "odd.png", (4, 8)), draw(tmp_path / "cut.jpg", (200, 200)), tmp_path / "empty.png"
    cut.write_bytes(cut.read_bytes()[:500])
    empty.touch()
    text, deep = tmp_path / "text.png", tmp_path / "deep.png"
    text.write_text("no picture")
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(deep)
    files = (odd, good[0], cut, empty, good[1], text, deep, tmp_path / "gone.png", good[2])
    names, images, faults = of_one_size(FileSet("p", "p", files).load())
    assert names == list(map(str, good)) and all(image.size == (8, 8) for image in images)
    assert {tmp_path.joinpath(fault.name).name: fault.kind for fault in faults} == {
        "odd.png": "another size than the prompt's other pictures",
        "cut.jpg": "cut off or damaged",
        "empty.png": "empty file",
        "text.png": "not a picture",
        "deep.png": "pixel format I;16: convert it to 8 bits",
        "gone.png": "no such file",
    }


@contextmanager
def as_anyone(folder, monkeypatch):
    """The rights of a user who is not root, who is in this folder."""
    folder.chmod(0o755)
    monkeypatch.chdir(folder)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_picture_that_may_not_be_read_is_a_fault_of_its_own_kind(tmp_path, monkeypatch):
    draw(tmp_path / "x.png").chmod(0)
    draw(tmp_path / "inner" / "y.png")
    (tmp_path / "inner").chmod(0)
    with as_anyone(tmp_path, monkeypatch):
        for name in ("x.png", "inner/y.png"):
            with pytest.raises(OSError, match=r"^may not be read: change its mode$"):
                read_picture(Path(name))


@pytest.mark.parametrize(
    ("name", "mode"), [("a dog", 0), ("a dog", 0o444), ("a dog", 0o111), ("a dog/prompt.txt", 0), (".", 0o444)]
)
def test_what_may_not_be_read_is_named_with_the_remedy(tmp_path, monkeypatch, name, mode):
    draw(tmp_path / "pictures" / "a dog" / "1.png")
    (tmp_path / "pictures" / "a dog" / "prompt.txt").write_text("a dog")
    (tmp_path / "pictures" / name).chmod(mode)
    with as_anyone(tmp_path, monkeypatch), pytest.raises(OSError) as refused:
        find_pictures(Path("pictures"))
    assert str(refused.value) == f"{Path('pictures') / name} may not be read: change its mode"


@pytest.mark.parametrize("layout", ["a dog/{}.png", "a dog_{}.png"])
def test_links_to_nowhere_and_folders_that_are_named_as_pictures_are_faults_of_their_prompt(tmp_path, layout):
    draw(tmp_path / layout.format(0))
    (tmp_path / layout.format(1)).symlink_to("nowhere.png")
    (tmp_path / layout.format(2)).mkdir()
    ((found,), rest) = find_pictures(tmp_path)
    assert (len(found), rest) == (3, [])
    assert [fault.kind for fault in found.load().faults] == ["no such file", "a folder, not a picture"]


@pytest.mark.parametrize("name", ["{}.png", "COCO_val2014_{:012}.png", "real picture {}.png"])
def test_a_reference_may_be_a_folder_of_real_pictures_by_any_name(tmp_path, name):
    files = [draw(tmp_path / name.format(number)) for number in range(101)]
    (tmp_path / "readme.md").touch()
    sets, rest = find_pictures(tmp_path, any_name=True)
    assert {one.files for one in sets} == {(file,) for file in files} and rest == ["readme.md"]


def test_a_format_that_is_not_read_is_a_fault_in_a_folder_of_any_names_too(tmp_path):
    draw(tmp_path / "one.png")
    draw(tmp_path / "two.gif")
    sets, rest = find_pictures(tmp_path, any_name=True)
    assert [(one.id, len(one), len(one.load().faults)) for one in sets] == [("one.png", 1, 0), ("two.gif", 0, 1)]
    assert rest == []


def test_a_reference_named_by_prompt_and_seed_is_read_as_such(tmp_path):
    for number in range(4):
        draw(tmp_path / f"{number % 2}_{number}.png")
    assert find_pictures(tmp_path, any_name=True) == find_pictures(tmp_path)


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
        ({"manifest.csv": "file,prompt\nx.png,a\nb/../x.png,b\n"}, "record 2 names b/../x.png as record 1 does"),
        ({"manifest.jsonl": '{"file": "x.png", "prompt": "a", "id": 0}\n' * 2}, "record 2 names x.png as record 1"),
        ({"manifest.csv": "", "manifest.jsonl": ""}, "has manifest.csv and manifest.jsonl: keep the one that is meant"),
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
    (tmp_path / "two.csv").write_text("id,text\n0,a dog\n1,a cat\n0,a dog\n0,a bird\n")
    with pytest.raises(ValueError, match="two.csv, record 4: id 0 has two texts, 'a dog' and 'a bird'"):
        read_texts(tmp_path / "two.csv")
    with pytest.raises(ValueError, match="lacks id or text"):
        read_texts(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match=r"read from .txt, .csv or .jsonl"):
        read_texts(tmp_path / "p.parquet")
    (tmp_path / "m.jsonl").write_text('{"prompt": "a dog", "include": [{"class": "dog", "count": 1}]}\n')
    assert list(read_parts(tmp_path / "m.jsonl")) == ["a dog"]
    with pytest.raises(ValueError, match="not GenEval's"):
        read_parts(tmp_path / "p.jsonl")
    (tmp_path / "short.jsonl").write_text('{"prompt": "a dog", "include": [{"class": "dog"}]}\n')
    with pytest.raises(ValueError, match=r"short.jsonl, record 1 \(a dog\): include.0.count: Field required"):
        read_parts(tmp_path / "short.jsonl")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.csv", "prompts.jsonl", "prompts/p0/prompt.txt"])
def test_a_text_file_that_is_not_utf_8_or_not_there_is_named(tmp_path, name):
    draw(tmp_path / "prompts" / "p0" / "1.png")
    read = (lambda: find_pictures(tmp_path / "prompts")) if "p0" in name else (lambda: read_texts(tmp_path / name))
    (tmp_path / name).write_bytes("id,text\n0,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 \(byte 0xe9 at 13\): save it as UTF-8"):
        read()
    if "p0" not in name:
        (tmp_path / name).unlink()
        with pytest.raises(OSError, match=f"{name}: there is no such file"):
            read()


def test_what_is_no_csv_is_named(tmp_path):
    (tmp_path / "p.csv").write_text(f"id,text\n0,{'a' * 200_000}\n")
    with pytest.raises(ValueError, match=r"p.csv is not CSV: field larger"):
        read_texts(tmp_path / "p.csv")


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
