import re

import pytest
from tests.raising import refuses

from dpdmd_pipeline.backbones import FAMILIES
from dpdmd_pipeline.planning import identity
from dpdmd_pipeline.planning.identity import code_hash, text_side_hash, texts_digest


def test_the_digest_of_prompts_depends_on_texts_and_order_alone():
    one, two = {"text": "a", "train": True}, {"text": "b", "train": True}
    assert texts_digest([one, two]) == texts_digest([{**one, "train": False}, two])
    assert len({texts_digest([one, two]), texts_digest([two, one]), texts_digest([one]), texts_digest([])}) == 4


def test_a_teacher_without_text_encoders_is_refused(tiny_teacher, tmp_path):
    assert text_side_hash(tiny_teacher) == text_side_hash(tiny_teacher)
    with refuses(FileNotFoundError, "text_encoder") as error:
        text_side_hash(tmp_path)
    assert error.value.stage == "teacher"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of four modules: a imports b inside a function, b imports c; datasets stores."""
    monkeypatch.setattr(identity, "_ROOT", tmp_path)
    folder = tmp_path / "dpdmd_pipeline"
    (folder / "datasets").mkdir(parents=True)
    modules = {
        "a": "import dpdmd_pipeline.datasets.store\n\ndef f(x):\n    from dpdmd_pipeline import b\n    return b.g(x)\n",
        "b": "import dpdmd_pipeline.c as c\n\ndef g(x):\n    '''Add one.'''\n    return c.h(x) + 1\n",
        "c": "def h(x):\n    if x < 0:\n        raise ValueError('is negative')\n    log.info('%s', x)\n    return x\n",
        "datasets/store": "def save():\n    pass\n",
        "other": "x = 1\n",
    }
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    identity.code_hash.cache_clear()
    yield folder
    identity.code_hash.cache_clear()


@pytest.mark.parametrize(
    ("file", "before", "after", "same"),
    [
        ("b", "+ 1", "+ 2", False),
        ("c", "return x", "return 2 * x", False),
        ("c", "x < 0", "x < 1", False),
        ("b", "Add one.", "Other words.", True),
        ("b", "return c.h(x) + 1", "# a comment\n    return   c.h(x) + 1", True),
        ("c", "is negative", "must not be negative", True),
        ("c", "'%s', x", "'other %s', x", True),
        ("datasets/store", "pass", "return 1", True),
        ("other", "1", "2", True),
    ],
)
def test_code_changes_with_every_imported_module_but_not_with_words(package, file, before, after, same):
    first = code_hash("a")
    path = package / f"{file}.py"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    identity.code_hash.cache_clear()
    assert (code_hash("a") == first) == same


@pytest.mark.parametrize("root", ["pipelines.prompts.encoding", "pipelines.anchors.nodes", "pipelines.train.setup"])
def test_a_familys_code_belongs_to_what_it_computes_and_another_familys_does_not(root):
    hashes = {code_hash(root, f"backbones.{family}") for family in FAMILIES}
    assert len(hashes) == len(FAMILIES)
    closure = identity._import_closure([root])
    assert not {f"dpdmd_pipeline.backbones.{family}" for family in FAMILIES} & closure.keys()


@pytest.mark.parametrize(
    ("roots", "modules"),
    [
        (["pipelines.train.setup"], {"dpdmd.algorithm", "dpdmd.anchor", "training.distill", "training.draws"}),
        (["pipelines.evaluate.sampling"], {"exporting.sample", "dpdmd.sampling", "backbones.base"}),
        (["scoring.score", "scoring.builders"], {"metrics.alignment", "metrics.quality", "metrics.distribution"}),
        (["pipelines.study.students"], {"metrics.shapes", "shapes.reader", "exporting.sample"}),
        (["training.teacher"], {"shapes.models", "shapes.world"}),
        (["training.clip"], {"shapes.clip", "training.teacher"}),
    ],
)
def test_the_code_of_a_result_holds_the_modules_that_compute_it(roots, modules):
    assert {f"dpdmd_pipeline.{name}" for name in modules} <= identity._import_closure(roots).keys()


def test_every_root_of_a_code_hash_exists():
    package = identity._ROOT / "dpdmd_pipeline"
    calls = [call for path in package.rglob("*.py") for call in re.findall(r"code_hash\(([^)]*)\)", path.read_text())]
    roots = {root for call in calls for root in re.findall(r'(?<!f)"([\w.]+)"', call)}
    assert len(roots) > 5
    assert {root for root in roots if not identity._import_closure([root])} == set()
