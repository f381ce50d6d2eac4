"""Saved pictures are found by the reader of scored folders: prompts, seeds, pixels."""

import weakref
from functools import partial

import pytest
from kedro.io import DatasetError
from PIL import Image
from tests.raising import refuses

from dpdmd_pipeline.datasets.picture_folder import EMPTY, PictureFolderDataset, folder_names
from dpdmd_pipeline.scoring.folders import find_pictures

PROMPTS = [
    "a red circle",
    "A Red Circle",  # one folder with the first on some disks
    "a cat / a dog",
    "..",
    ".hidden",
    "ends with a dot.",
    "what is this?",
    "00000_a cat",
    "cat42",
    "雨の夜の街",
    "long " * 60 + "end",
    "two\nlines",
]


@pytest.fixture
def dataset(tmp_path):
    return PictureFolderDataset(filepath=str(tmp_path / "data" / "pictures"))


def pictures(colour, seeds):
    return {seed: Image.new("RGB", (4, 4), (colour, seed % 256, 0)) for seed in seeds}


def drawings(prompts=PROMPTS, seeds=(7, 10, 9)):
    return {prompt: partial(pictures, number, seeds) for number, prompt in enumerate(prompts)}


def test_every_prompt_is_read_back_with_its_pictures_in_the_order_of_seeds(dataset):
    dataset.save(drawings())
    sets, rest = find_pictures(dataset.load())
    assert not rest and len({one.id.casefold() for one in sets}) == len(PROMPTS)
    sets_by_prompt = {one.text: one for one in sets}
    assert sets_by_prompt.keys() == set(PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        assert [file.name for file in sets_by_prompt[prompt].files] == ["7.png", "9.png", "10.png"]
        assert [image.getpixel((0, 0)) for image in sets_by_prompt[prompt].load().images] == [
            (number, s, 0) for s in (7, 9, 10)
        ]


def test_a_folder_is_named_after_its_prompt_if_possible(dataset):
    names = folder_names(PROMPTS)
    assert {prompt for prompt, name in names.items() if prompt == name} == {"a red circle", "雨の夜の街"}
    assert names["a cat / a dog"] == "00002_a-cat-a-dog" and names[".."] == "00003_prompt"
    dataset.save(drawings())
    assert sorted(path.parent.name for path in dataset.load().glob("*/prompt.txt")) == sorted(
        name for prompt, name in names.items() if prompt != name
    )


def test_subfolders_have_prompts_of_their_own(dataset):
    dataset.save({"teacher": drawings(PROMPTS[:1]), "dmd": drawings(PROMPTS[2:3])})
    assert [find_pictures(dataset.load() / name)[0][0].text for name in ("teacher", "dmd")] == [
        "a red circle",
        "a cat / a dog",
    ]


def test_without_pictures_a_folder_with_a_note_replaces_the_old_pictures(dataset):
    dataset.save(drawings())
    assert dataset.exists()
    dataset.save({})
    assert [path.name for path in dataset.load().iterdir()] == [EMPTY]
    assert dataset.exists()


def test_an_error_while_drawing_leaves_the_old_pictures(dataset):
    dataset.save(drawings())
    before = sorted(dataset.load().rglob("*"))

    def fail():
        raise ZeroDivisionError

    with pytest.raises(DatasetError) as error:
        dataset.save({"a red circle": partial(pictures, 0, (1,)), "another": fail})
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert sorted(dataset.load().rglob("*")) == before
    assert sorted(path.name for path in dataset.load().parent.iterdir()) == [".pictures.lock", "pictures"]


def test_one_prompt_is_in_memory_at_a_time(dataset):
    alive = []

    def draw(number):
        assert not any(picture() is not None for picture in alive), f"prompt {number}: pictures of another are alive"
        new = pictures(number, (1, 2))
        alive[:] = [weakref.ref(picture) for picture in new.values()]
        return new

    dataset.save({prompt: partial(draw, number) for number, prompt in enumerate(PROMPTS[:3])})


def test_a_missing_folder_is_refused_with_the_remedy(dataset):
    assert not dataset.exists()
    with refuses(DatasetError, "pictures", "run the stage") as error:
        dataset.load()
    assert isinstance(error.value.__cause__, FileNotFoundError)
