import pytest

from dpdmd_pipeline.datasets import lineage
from dpdmd_pipeline.datasets.lineage import code_hash, text_side_hash, texts_digest


def test_the_digest_of_prompts_is_of_their_texts_and_order():
    one, two = {"text": "a", "train": True}, {"text": "b", "train": True}
    assert texts_digest([one, two]) == texts_digest([{**one, "train": False}, two])
    assert len({texts_digest([one, two]), texts_digest([two, one]), texts_digest([one]), texts_digest([])}) == 4


def test_a_teachers_text_side_is_its_encoders_and_tokenizers(tiny_teacher, tmp_path):
    assert text_side_hash(tiny_teacher) == text_side_hash(tiny_teacher)
    with pytest.raises(
        FileNotFoundError, match="has no text_encoder/ or no tokenizer/: give a diffusers pipeline folder"
    ):
        text_side_hash(tmp_path)


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ("def f(x):\n    '''Other words.'''\n    # a comment\n    return   x + 1\n", True),
        ("def f(x):\n    '''Adds one.'''\n    return x + 2\n", False),
        ("def g(x):\n    '''Adds one.'''\n    return x + 1\n", False),
    ],
)
def test_code_is_the_same_while_only_words_and_layout_change(tmp_path, monkeypatch, changed, same):
    monkeypatch.setattr(lineage, "_PACKAGE", tmp_path)
    (tmp_path / "part.py").write_text("def f(x):\n    '''Adds one.'''\n    return x + 1\n")
    before = code_hash("part.py")
    (tmp_path / "part.py").write_text(changed)
    assert (code_hash("part.py") == before) == same


def test_the_code_of_a_folder_is_that_of_its_files():
    assert code_hash("dpdmd") != code_hash("dpdmd/losses.py") != code_hash("dpdmd/noise.py")
