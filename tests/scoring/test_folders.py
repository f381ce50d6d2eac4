import json
import os
from pathlib import Path

import pytest
from PIL import Image
from tests.raising import refuses
from tests.scoring.drawing import as_anyone, draw

from dpdmd_pipeline.scoring.folders import about_strays, find_pictures
from dpdmd_pipeline.scoring.sets import MAY_NOT_READ


def described(folder, prompts=None):
    return {one.id: (one.text, [file.name for file in one.files]) for one in find_pictures(folder, prompts)[0]}


def without_text(folder, prompts=None):
    """Reasons for missing texts, by id."""
    return {one.id: one.no_text for one in find_pictures(folder, prompts)[0] if one.no_text}


def test_a_folder_per_prompt_is_read_in_the_order_of_seeds(tmp_path):
    for name in ("a dog/10.png", "a dog/9.png", "cat/x.jpg"):
        draw(tmp_path / name)
    (tmp_path / "cat" / "prompt.txt").write_text("a cat / on a mat\n")
    (tmp_path / "cat" / "notes.md").write_text("")
    assert described(tmp_path) == {"a dog": ("a dog", ["9.png", "10.png"]), "cat": ("a cat / on a mat", ["x.jpg"])}
    assert find_pictures(tmp_path)[1] == ["cat/notes.md"]


def test_digits_that_are_no_numbers_are_letters_in_the_order(tmp_path):
    for name in ("1²3.png", "1²12.png"):
        draw(tmp_path / "a dog" / name)
    assert described(tmp_path)["a dog"][1] == ["1²3.png", "1²12.png"]


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
def test_an_id_without_a_text_is_refused_with_the_ids_of_the_file(tmp_path, name):
    draw(tmp_path / "pictures" / name)
    (tmp_path / "prompts.txt").write_text("a dog\na cat\na bird\n")
    prompt_id = name.split("_")[0].split("/")[0]
    with pytest.raises(ValueError, match=rf"'{prompt_id}' .*prompts.txt.*\b0 to 2\b"):
        find_pictures(tmp_path / "pictures", tmp_path / "prompts.txt")
    (tmp_path / "prompts.csv").write_text("id,text\n" + "".join(f"p{number},a dog\n" for number in range(9)))
    with refuses(ValueError, "prompts.csv", "p0, p1, p2, p3, p4 and 4 more"):
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
def test_a_name_is_a_text_or_an_id(tmp_path, name, is_text):
    draw(tmp_path / name)
    (one,) = find_pictures(tmp_path)[0]
    assert one.text == one.id  # for display
    assert bool(one.no_text) != is_text
    if not is_text:
        assert "--prompts" in one.no_text and "prompt.txt" in one.no_text


@pytest.mark.parametrize("name", [b"a caf\xe9 dog/1.png", b"a caf\xe9 dog_1.png"])
def test_a_name_outside_utf_8_is_no_text(tmp_path, name):
    draw(tmp_path / os.fsdecode(name))
    ((one,), _) = find_pictures(tmp_path)
    assert one.text == one.id == os.fsdecode(b"a caf\xe9 dog") and "UTF-8" in one.no_text


def test_prompt_txt_gives_the_text_unless_it_is_empty(tmp_path):
    for name in ("00000", "00001", "a dog"):
        draw(tmp_path / name / "1.png")
    (tmp_path / "00000" / "prompt.txt").write_text("\ufeffa cat\n", encoding="utf-8")
    (tmp_path / "a dog" / "prompt.txt").write_text(" \n")
    assert described(tmp_path)["00000"][0] == "a cat"
    reasons = without_text(tmp_path)
    assert set(reasons) == {"00001", "a dog"} and "empty" in reasons["a dog"]


def test_an_empty_folder_is_a_prompt_and_a_picture_of_another_format_is_a_fault(tmp_path):
    draw(tmp_path / "a dog" / "1.png")
    for name in ("2.gif", "3.TIF"):
        Image.new("RGB", (8, 8)).save(tmp_path / "a dog" / name)
    (tmp_path / "a cat").mkdir()
    (tmp_path / "a cat" / "log.json").write_text("{}")
    sets, strays = find_pictures(tmp_path)
    assert [(one.id, len(one)) for one in sets] == [("a cat", 0), ("a dog", 1)]
    assert strays == ["a cat/log.json"]
    names, _, faults = sets[1].load()
    assert len(names) == 1
    assert [fault.kind.split()[0] for fault in faults] == [".gif", ".tif"]
    assert sets[0].load() == ([], [], [])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_manifest_names_files_and_prompts(tmp_path, kind):
    records = [("x.png", "a dog", "7"), ("sub/y.png", "a dog", "7"), ("z.png", "a cat", "")]
    if kind == "csv":
        lines = ["file,prompt,id", *(",".join(record) for record in records)]
    else:
        lines = [json.dumps(dict(zip(("file", "prompt", "id"), record, strict=True))) for record in records]
    (tmp_path / f"manifest.{kind}").write_text("\n".join(lines))
    assert described(tmp_path) == {"7": ("a dog", ["x.png", "y.png"]), "a cat": ("a cat", ["z.png"])}


def test_pictures_outside_the_manifest_are_reported(tmp_path):
    for name in ("x.png", "y.png", "sub/z.jpg", "old.gif", ".hidden.png"):
        draw(tmp_path / name)
    (tmp_path / "manifest.csv").write_text("file,prompt\nx.png,a dog\n")
    sets, strays = find_pictures(tmp_path)
    assert len(sets) == 1 and strays == ["old.gif", "sub/z.jpg", "y.png"]
    note = about_strays(tmp_path, strays)
    assert str(tmp_path) in note and "manifest" in note and note.endswith(": old.gif, sub/z.jpg, y.png")


HIDDEN = ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".cache/0.png", "__MACOSX/._0.png", "__MACOSX/0.png")


@pytest.mark.parametrize(
    ("layout", "depths"),
    [
        ("a {} circle/0.png", ("", "a red circle")),
        ("a {} circle_0.png", ("",)),
        ("0000{}/samples/0.png", ("", "0000red", "0000red/samples")),
    ],
)
@pytest.mark.parametrize("manifest", [False, True])
def test_hidden_and_system_files_are_ignored_at_every_depth(tmp_path, layout, depths, manifest):
    names = [layout.format(colour) for colour in ("red", "blue")]
    for name in names:
        draw(tmp_path / name)
        if "samples" in name:
            (tmp_path / name).parents[1].joinpath("metadata.jsonl").write_text(json.dumps({"prompt": name}))
    if manifest:
        (tmp_path / "manifest.csv").write_text("\n".join(["file,prompt", *(f"{name},{name}" for name in names)]))
    for path in (tmp_path / depth / hidden for depth in depths for hidden in HIDDEN):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0\5\26\7")
    sets, strays = find_pictures(tmp_path)
    assert {str(file.relative_to(tmp_path)) for one in sets for file in one.files} == set(names)
    assert len(sets) == 2 and strays == []


def test_hidden_files_one_folder_deeper_are_no_hint(tmp_path):
    for folder in ("run/.cache", "run/__MACOSX", "run/a dog"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "._0.png").touch()
    with pytest.raises(OSError) as refused:
        find_pictures(tmp_path)
    assert "run" not in str(refused.value).removeprefix(str(tmp_path))


def test_geneval_s_layout_is_read_without_its_grids(tmp_path):
    for number, prompt in enumerate(("a photo of a dog", "a photo of two cats")):
        folder = tmp_path / f"{number:05d}"
        for name in ("samples/0000.png", "samples/0001.png", "grid.png"):
            draw(folder / name)
        (folder / "metadata.jsonl").write_text(json.dumps({"tag": "counting", "prompt": prompt}) + "\n")
    pictures = ["0000.png", "0001.png"]
    assert described(tmp_path) == {"00000": ("a photo of a dog", pictures), "00001": ("a photo of two cats", pictures)}
    assert not without_text(tmp_path) and find_pictures(tmp_path)[1] == []
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"tag": "counting"}\n')
    with refuses(ValueError, "00000/metadata.jsonl", "prompt.txt"):
        find_pictures(tmp_path)


def test_the_error_points_at_pictures_one_folder_deeper(tmp_path):
    draw(tmp_path / "run 1" / "a dog" / "1.png")
    with pytest.raises(OSError, match=rf"^{tmp_path} .*{tmp_path}/run 1/a dog.*{tmp_path}/run 1$"):
        find_pictures(tmp_path)


def test_a_picture_of_another_format_is_a_fault_of_its_prompt(tmp_path):
    for name in ("a dog_1.png", "a dog_2.gif", "a cat_1.tif", "logo.gif"):
        draw(tmp_path / name)
    sets, strays = find_pictures(tmp_path)
    assert {one.id: [fault.kind.split()[0] for fault in one.load().faults] for one in sets} == {
        "a dog": [".gif"],
        "a cat": [".tif"],
    }
    assert strays == ["logo.gif"]


@pytest.mark.parametrize(
    ("name", "mode"), [("a dog", 0), ("a dog", 0o444), ("a dog", 0o111), ("a dog/prompt.txt", 0), (".", 0o444)]
)
def test_a_path_without_the_right_to_read_is_named(tmp_path, monkeypatch, name, mode):
    draw(tmp_path / "pictures" / "a dog" / "1.png")
    (tmp_path / "pictures" / "a dog" / "prompt.txt").write_text("a dog")
    (tmp_path / "pictures" / name).chmod(mode)
    with as_anyone(tmp_path, monkeypatch), pytest.raises(OSError) as refused:
        find_pictures(Path("pictures"))
    assert str(refused.value) == f"{Path('pictures') / name} {MAY_NOT_READ}"


@pytest.mark.parametrize("layout", ["a dog/{}.png", "a dog_{}.png"])
def test_broken_links_and_folders_named_like_pictures_are_faults_of_their_prompt(tmp_path, layout):
    draw(tmp_path / layout.format(0))
    (tmp_path / layout.format(1)).symlink_to("nowhere.png")
    (tmp_path / layout.format(2)).mkdir()
    ((one,), strays) = find_pictures(tmp_path)
    assert (len(one), strays) == (3, [])
    assert [fault.kind for fault in one.load().faults] == ["no such file", "a folder, not a picture"]


@pytest.mark.parametrize("name", ["{}.png", "COCO_val2014_{:012}.png", "real picture {}.png"])
def test_a_reference_may_have_pictures_with_any_names(tmp_path, name):
    files = [draw(tmp_path / name.format(number)) for number in range(101)]
    (tmp_path / "readme.md").touch()
    sets, strays = find_pictures(tmp_path, any_name=True)
    assert {one.files for one in sets} == {(file,) for file in files} and strays == ["readme.md"]


def test_a_picture_of_another_format_is_a_fault_under_any_name(tmp_path):
    draw(tmp_path / "one.png")
    draw(tmp_path / "two.gif")
    sets, strays = find_pictures(tmp_path, any_name=True)
    assert [(one.id, len(one), len(one.load().faults)) for one in sets] == [("one.png", 1, 0), ("two.gif", 0, 1)]
    assert strays == []


def test_a_reference_with_prompts_and_seeds_in_its_names_keeps_them(tmp_path):
    for number in range(4):
        draw(tmp_path / f"{number % 2}_{number}.png")
    assert find_pictures(tmp_path, any_name=True) == find_pictures(tmp_path)


@pytest.mark.parametrize(
    ("files", "facts"),
    [
        ({}, r"\.png"),
        ({"dog.png": None}, "/dog.png .*<prompt-id>_<seed>"),
        ({"a_1.png": None, "b/1.png": None}, "a_1.png, b/"),
        ({"manifest.csv": "file,prompt\nx.png,\n"}, "manifest.csv, record 1 .*prompt"),
        ({"manifest.csv": "file,prompt\n"}, "manifest.csv .*empty"),
        ({"manifest.jsonl": "{\n"}, "manifest.jsonl, line 1 .*JSON"),
        ({"manifest.jsonl": "[1]\n"}, "manifest.jsonl, line 1 .*JSON object"),
        ({"manifest.csv": "file,prompt,id\nx.png,a,1\ny.png,b,1\n"}, "manifest.csv, record 2.*id 1 .*'a'.*'b'"),
        ({"manifest.csv": "file,prompt\nx.png,a\nb/../x.png,b\n"}, r"record 2 .*b/\.\./x\.png .*record 1\b"),
        ({"manifest.jsonl": '{"file": "x.png", "prompt": "a", "id": 0}\n' * 2}, r"record 2 .*x\.png .*record 1\b"),
        ({"manifest.csv": "", "manifest.jsonl": ""}, "manifest.csv .*manifest.jsonl"),
    ],
)
def test_an_unclear_folder_is_refused_with_its_path_and_the_reason(tmp_path, files, facts):
    for name, content in files.items():
        draw(tmp_path / name) if content is None else (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=f"^{tmp_path}.*{facts}"):
        find_pictures(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(OSError, match=f"^{tmp_path}/nothing "):
        find_pictures(tmp_path / "nothing")
