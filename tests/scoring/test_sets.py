import numpy as np
import torch
from PIL import Image
from tests.scoring.drawing import draw

from dpdmd_pipeline.scoring.sets import FileSet, StoredSet, TensorSet, of_one_size


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
        "text.png": "not a PNG, JPEG, WebP or BMP picture",
        "deep.png": "pixel format I;16: convert it to 8 bits",
        "gone.png": "no such file",
    }


def test_pictures_in_memory_are_those_on_disk(tmp_path):
    pixels = torch.randint(256, (2, 3, 6, 5), dtype=torch.uint8)
    names, images, _ = TensorSet("p", "a dog", pixels).load()
    assert names == ["p[0]", "p[1]"]
    assert np.array_equal(np.asarray(images[1]), pixels[1].permute(1, 2, 0).numpy())


def test_a_stored_set_reads_its_rows_only_when_it_is_measured():
    cache, requests = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8), []

    def read(rows):
        requests.append(rows)
        return cache[list(rows)]

    stored = StoredSet("p", "a cat", (4, 1), read)
    assert len(stored) == 2 and not requests
    loaded, expected = stored.load(), TensorSet("p", "a cat", cache[[4, 1]]).load()
    assert requests == [(4, 1)] and loaded.names == expected.names
    assert [image.tobytes() for image in loaded.images] == [image.tobytes() for image in expected.images]
