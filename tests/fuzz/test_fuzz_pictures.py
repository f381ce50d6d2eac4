"""Folders of pictures, and manifests: every file is a picture, a fault with a reason, or ignored."""

import io
import json
import os
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.fuzz.verdicts import refusal, seeded

from dpdmd_pipeline.scoring.arena import ArenaOptions, make_arena
from dpdmd_pipeline.scoring.folders import find_pictures

KIND = "pictures"


def encoded(form: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((16, 12), 50).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def frames(form: str) -> bytes:
    return encoded(form, save_all=True, append_images=[Image.new("RGB", (16, 12))])


SOUND = {
    "0.png": encoded("PNG"),
    "1.jpg": encoded("JPEG"),
    "2.WEBP": encoded("WEBP"),
    "3.bmp": encoded("BMP"),
    "4.png": encoded("PNG", "P"),
    "5.jpeg": encoded("PNG"),  # named as another promised format
    "6.png": encoded("PNG", "LA"),
    "7.png": encoded("PNG", icc_profile=b"rubbish", exif=b"Exif\0\0rubbish"),
    "8.jpg": encoded("MPO", save_all=True, append_images=[Image.new("RGB", (16, 12))]),
    "9.png": encoded("PNG", "1"),
}
DAMAGED = {
    "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n(x) run\n",
    "gif.png": encoded("GIF"),
    "tiff.jpg": encoded("TIFF"),
    "ppm.bmp": encoded("PPM"),
    "ico.png": encoded("ICO"),
    "deep.png": encoded("PNG", "I;16"),
    "moving.png": frames("PNG"),
    "moving.webp": frames("WEBP"),
    "bomb.png": png(60_000, 60_000),
    "wide.png": png(2**31 - 1, 1),
    "none.png": png(0, 0),
    "cut.jpg": encoded("JPEG")[:200],
    "cut.webp": encoded("WEBP")[:60],
    "empty.png": b"",
    "page.png": b"<!doctype html>",
    "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "text.png": b"\x89PNG\r\n\x1a\n" + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 25))),
    "pickle.bmp": b"\x80\x04\x95",
    "x.gif": encoded("GIF"),
    "x.tiff": encoded("TIFF"),
}
LINKS = {"pipe.png": os.mkfifo, "folder.png": os.mkdir, "loop.png": lambda path: path.symlink_to(path)}
LINKS |= {"gone.png": lambda path: path.symlink_to("nothing"), "null.png": lambda path: path.symlink_to("/dev/null")}
IGNORED = (".0.png", "._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/0.png", "@eaDir/0.png", "notes.txt")
FOLDERS = ("a red circle", "a blue \x1b[31msquare", "café", "x" * 200, "caf\udce9 noir", "-rf", "a\nb c", "%s {x}")


def fill(folder, names) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        content = (SOUND | DAMAGED).get(name, SOUND["0.png"])
        LINKS[name](path) if name in LINKS else path.write_bytes(content)


def read(folder) -> tuple[list, list[str]]:
    sets, strays = find_pictures(folder)
    return [(one, one.load()) for one in sets], strays


NAMES = st.lists(st.sampled_from([*SOUND, *DAMAGED, *LINKS, *IGNORED]), min_size=1, max_size=8, unique=True)


def test_every_file_of_a_folder_is_a_picture_a_fault_or_ignored(tmp_path_factory):
    @seeded(100)
    @given(st.dictionaries(st.sampled_from(FOLDERS), NAMES, min_size=1, max_size=4))
    def run(folders):
        folder = tmp_path_factory.mktemp("pictures")
        for prompt, names in folders.items():
            (folder / prompt).mkdir()
            fill(folder / prompt, names)
        (folder / ".hidden").mkdir()
        result = []
        line = refusal(KIND, lambda: result.append(read(folder)))
        files = {name for names in folders.values() for name in names}
        if not result:
            assert str(folder) in line and not files & SOUND.keys(), line
            return
        assert files & (SOUND.keys() | DAMAGED.keys() | LINKS.keys())
        ((sets, _),) = result
        for one, loaded in sets:
            names = folders[one.id]
            assert len(loaded.images) == len(SOUND.keys() & set(names))
            faults = {os.path.basename(fault.name) for fault in loaded.faults}
            assert faults == (DAMAGED.keys() | LINKS.keys()) & set(names)
            assert all(image.mode == "RGB" for image in loaded.images)
            assert bool(one.no_text) == (one.id in ("a blue \x1b[31msquare", "caf\udce9 noir"))

    run()


def test_random_bytes_in_a_picture_give_a_picture_or_a_fault(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "a red circle").mkdir()

    @seeded(100)
    @given(st.sampled_from(sorted(SOUND)), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1))
    def run(name, changes):
        content = bytearray(SOUND[name])
        for where, byte in changes:
            content[int(where * len(content))] = byte
        (folder / "a red circle" / "0.png").write_bytes(content)
        assert not refusal(KIND, lambda: read(folder))

    run()


def line_of(record) -> str:
    return json.dumps(record)


GOOD = {"file": "0.png", "prompt": "a red circle", "id": "1"}
MANIFESTS = {
    "missing file": (True, line_of(GOOD | {"file": "nothing.png"})),
    "NUL in a path": (True, line_of(GOOD | {"file": "a\0b.png"})),
    "path outside": (True, line_of(GOOD | {"file": "../../../../etc/passwd"})),
    "device": (True, line_of(GOOD | {"file": "/dev/zero"})),
    "folder": (True, line_of(GOOD | {"file": "."})),
    "more keys": (True, line_of(GOOD | {"seed": 3, "x": [{}]})),
    "number as id": (True, line_of(GOOD | {"id": 7})),
    "blank lines": (True, "\n\n" + line_of(GOOD) + "\n \n"),
    "no prompt": (False, line_of({"file": "0.png"})),
    "prompt of nothing": (False, line_of(GOOD | {"prompt": "\u200b \u2060"})),
    "list as prompt": (False, line_of(GOOD | {"prompt": ["a"]})),
    "boolean as id": (False, line_of(GOOD | {"id": True})),
    "infinite id": (False, line_of(GOOD | {"id": float("inf")})),
    "terminal command": (False, line_of(GOOD | {"prompt": "\x1b[2J"})),
    "half a pair": (False, line_of(GOOD | {"prompt": "\ud800"})),
    "twice": (False, line_of(GOOD) + "\n" + line_of(GOOD | {"file": "./0.png"})),
    "two prompts": (False, line_of(GOOD) + "\n" + line_of(GOOD | {"file": "1.jpg", "prompt": "b" * 10_000})),
    "deep": (False, '{"file": ' + "[" * 50_000 + "]" * 50_000 + "}"),
    "digits": (False, '{"file": "0.png", "prompt": ' + "1" * 5000 + "}"),
    "list": (False, '["0.png"]'),
    "text": (False, '"0.png"'),
    "empty": (False, ""),
    "UTF-16": (False, line_of(GOOD).encode("utf-16").decode("latin-1")),
    "CSV": (False, "file,prompt\n0.png,a red circle\n"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_read_or_refused(tmp_path, name):
    is_sound, text = MANIFESTS[name]
    fill(tmp_path, ["0.png", "1.jpg"])
    (tmp_path / "manifest.jsonl").write_text(text, encoding="latin-1" if name == "UTF-16" else "utf-8")
    result = []
    line = refusal("manifests", lambda: result.append(read(tmp_path)))
    assert bool(line) != is_sound and "manifest.jsonl" in (line or "manifest.jsonl")


ANSWER = {"question": "quality", "prompt": "a", "choice": "a", "left": "a", "id": "a/0"}
RESULT = {"format": 1, "arena": "x", "a": "ours", "b": "dmd", "participant": "p", "questions": 2, "answers": [ANSWER]}
STRANGE = [None, True, -1, 10**400, 0.5, float("nan"), "", "\x1b[2J", "\ud800", "a" * 10**6, [], [[]], {}, {"a": "b"}]


def test_answers_of_people_are_summed_up_or_refused(tmp_path_factory):
    from dpdmd_pipeline.scoring.human import as_text, load_results, summarise

    file = tmp_path_factory.mktemp("answers") / "results.json"

    @seeded(120)
    @given(st.sampled_from([*RESULT, *(f"answers.{key}" for key in ANSWER)]), st.sampled_from(STRANGE))
    def run(path, value):
        result = json.loads(json.dumps(RESULT))
        *groups, key = path.split(".")
        (result["answers"][0] if groups else result)[key] = value
        file.write_text(json.dumps(result))
        texts = []
        line = refusal("answers", lambda: texts.append(as_text(summarise(load_results([file]), 0))))
        if line:
            assert file.name in line or "no answer" in line
        else:
            assert type(value) is str or key in ("left", "id", "questions"), path
            assert all(part.isprintable() for part in texts[0].split("\n"))

    run()


def test_pages_hold_strange_names_and_refuse_strange_pictures(tmp_path_factory):
    options = ArenaOptions(per_prompt=1, set_size=0, side=None, seed=0)

    @seeded(40)
    @given(st.sampled_from(FOLDERS), NAMES, NAMES)
    def run(prompt, a, b):
        folder = tmp_path_factory.mktemp("arena")
        for name, names in (("a", a), ("b", b)):
            (folder / name / prompt).mkdir(parents=True)
            fill(folder / name / prompt, names)
        pages = []
        sides = folder / "a", folder / "b"

        def make() -> None:
            sets = [find_pictures(side)[0] for side in sides]
            pages.append(make_arena(*sets, tuple(map(str, sides)), options))

        line = refusal("pages", make)
        if pages:
            assert "\x1b" not in pages[0] and "\udce9" not in pages[0]
        else:
            assert line

    run()
