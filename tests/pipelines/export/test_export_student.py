"""The export stage on a tiny student: its options and their effect on files, card and log."""

import pytest
import yaml
from huggingface_hub.file_download import repo_folder_name
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from pydantic import ValidationError
from tests.pipelines.conftest import backbone_options, train_options
from tests.test_configuration import ENVIRONMENTS, resolved

from dpdmd_pipeline.backbones.student_file import save_student
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.backbones.tensor_files import load_metadata
from dpdmd_pipeline.datasets.model_folder import ModelFolderDataset, folder_hash
from dpdmd_pipeline.datasets.whole_file import OptionalJSONDataset
from dpdmd_pipeline.pipelines.export import create_pipeline
from dpdmd_pipeline.pipelines.export.nodes import export_student
from dpdmd_pipeline.pipelines.export.options import ExportOptions

OPTIONS = {
    "title": "tiny-student",
    "formats": ["diffusers", "comfyui", "lora"],
    "dtype": "float16",
    "license": "apache-2.0",
    "license_name": None,
    "license_link": None,
    "base_model": None,
    "teacher": None,
}
KNOWN = {
    "model": "them/theirs",
    "license": "other",
    "license_name": "community",
    "license_link": "https://example.org/licence",
}
MEASURE = "`kedro run --pipelines evaluate,export`"
UNKNOWN = {"license": None, "teacher": KNOWN, "formats": ["comfyui"]}


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    network = backbone_options().load(tiny_teacher, "cpu").load_model()
    recipe = {
        "backbone": backbone_options().model_dump(mode="json"),
        "train": train_options(diversity_weight=7.0).recipe().model_dump(mode="json"),
    }
    save_student(folder, network, StudentHeader("sd3", [1.0, 0.75, 0.5, 0.25, 0.0], recipe=recipe))
    return folder


def test_the_catalog_gets_a_folder_with_every_form_that_the_student_has(student, tiny_teacher, tmp_path):
    write = export_student(student, tiny_teacher, {}, backbone_options(), ExportOptions(**OPTIONS), "")
    dataset = ModelFolderDataset(filepath=str(tmp_path / "export"))
    dataset.save(write)
    files = {path.relative_to(tmp_path / "export").as_posix() for path in dataset.load().rglob("*") if path.is_file()}
    assert {"README.md", "config.json", "comfyui/tiny-student.safetensors", "diffusers/model_index.json"} <= files
    assert not any(path.startswith("lora") for path in files)


def measured(model):
    """Metrics of one model, as the evaluate stage writes them."""
    figure = {"value": 0.5, "low": 0.25, "high": 0.75}
    student = {} if model is None else {"model": model}
    return {"dp_dmd": {"nfe": 4, "quality": {"aligned": figure}, "diversity": {}, "figures": {}, **student}}


def card_with(metrics, student, teacher, folder):
    options = ExportOptions(**OPTIONS | {"formats": ["comfyui"]})
    export_student(student, teacher, metrics, backbone_options(), options, "")(folder)
    return (folder / "README.md").read_text()


def test_the_card_has_the_measurements_of_its_own_student(student, tiny_teacher, tmp_path, caplog):
    card = card_with(measured(folder_hash(student)[:16]), student, tiny_teacher, tmp_path)
    assert "| aligned | 0.5 [0.25, 0.75] |" in card and MEASURE not in card
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@pytest.mark.parametrize(
    "model, fact",
    [("0123456789abcdef", "another student (0123456789abcdef)"), (None, "older version")],
)
def test_measurements_of_another_student_are_left_out_with_a_warning(
    student, tiny_teacher, tmp_path, caplog, model, fact
):
    card = card_with(measured(model), student, tiny_teacher, tmp_path)
    assert "## Measured" not in card and "aligned" not in card
    assert MEASURE in card
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert fact in line and "evaluate" in line and "kedro run" not in line


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_environment_exports_without_metrics(environment):
    entry = resolved(environment, "catalog")["metrics"]
    assert entry["type"] == "dpdmd_pipeline.datasets.whole_file.OptionalJSONDataset"


def test_a_student_without_measurements_is_exported_with_a_warning(student, tiny_teacher, tmp_path, caplog):
    groups = {"backbone": backbone_options(), "export": ExportOptions(**OPTIONS)}
    inputs = {
        "student": student,
        "teacher": tiny_teacher,
        "run_arguments": "",
        **{f"params:{name}": groups[name] for name in groups},
    }
    catalog = DataCatalog({name: MemoryDataset(value) for name, value in inputs.items()})
    catalog["metrics"] = OptionalJSONDataset(filepath=str(tmp_path / "metrics.json"))
    assert catalog.get("metrics").optional and not catalog.exists("metrics")  # a run without it is not refused
    SequentialRunner().run(create_pipeline(), catalog)["export"].load()(tmp_path / "export")
    assert MEASURE in (tmp_path / "export" / "README.md").read_text()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "not measured" in line and "evaluate" in line


def test_the_command_on_the_card_names_the_environment_whose_results_it_replaces(student, tiny_teacher, tmp_path):
    options = ExportOptions(**OPTIONS | {"formats": ["comfyui"]})
    export_student(student, tiny_teacher, {}, backbone_options(), options, "--env 'my sd35' ")(tmp_path)
    command = "`kedro run --env 'my sd35' --pipelines evaluate,export`"
    assert command in (tmp_path / "README.md").read_text()


def test_the_card_lists_the_options_in_the_students_header(student, tiny_teacher, tmp_path):
    options = ExportOptions(**OPTIONS | {"formats": ["comfyui"]})
    export_student(student, tiny_teacher, {}, backbone_options(), options, "")(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| `train.diversity_weight` | `7.0` |" in card and "| `backbone.resolution` | `32` |" in card
    assert front_matter(card)["license"] == "apache-2.0"


def test_a_student_without_a_recipe_is_exported_with_a_warning(student, tiny_teacher, tmp_path, caplog):
    foreign = tmp_path / "foreign"
    network = backbone_options().load(tiny_teacher, "cpu").load_model()
    foreign.mkdir()
    save_student(foreign, network, StudentHeader("sd3", [1.0, 0.5, 0.0]))
    options = ExportOptions(**OPTIONS | {"formats": ["comfyui"]})
    export_student(foreign, tiny_teacher, {}, backbone_options(), options, "")(tmp_path / "export")
    assert "`train." not in (tmp_path / "export" / "README.md").read_text()
    assert any("recipe" in record.getMessage() and str(foreign) in record.getMessage() for record in caplog.records)


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def exported(student, teacher, folder, **changes):
    """Card of an export, and header of its weights."""
    options = ExportOptions(**OPTIONS | UNKNOWN | changes)
    export_student(student, teacher, {}, backbone_options(), options, "")(folder)
    return (folder / "README.md").read_text(), load_metadata(folder / "comfyui" / "tiny-student.safetensors")


def fetched(teacher, folder, model):
    """A teacher in the cache layout of the hub's own client."""
    snapshot = folder / repo_folder_name(repo_id=model, repo_type="model") / "snapshots" / "0123456789abcdef"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(teacher)
    return snapshot


def test_the_environments_own_teacher_gives_its_id_and_licence(student, tiny_teacher, tmp_path, caplog):
    card, header = exported(student, fetched(tiny_teacher, tmp_path, "them/theirs"), tmp_path)
    fields = front_matter(card)
    assert {name: fields[name] for name in KNOWN if name != "model"} == {
        name: value for name, value in KNOWN.items() if name != "model"
    }
    assert fields["base_model"] == "them/theirs" and "`them/theirs`" in card
    assert header["modelspec.license"] == "community" and "licence" not in caplog.text


def test_a_folder_has_no_id_and_an_unknown_licence(student, tiny_teacher, tmp_path, caplog):
    teacher = tmp_path / "my_finetune"
    teacher.symlink_to(tiny_teacher)
    card, header = exported(student, teacher, tmp_path)
    assert not front_matter(card).keys() & {"license", "license_name", "license_link", "base_model"}
    assert "`my_finetune`" in card and "theirs" not in card and "modelspec.license" not in header
    assert "Licence: unknown" in card
    assert all(fact in caplog.text for fact in (str(teacher), "export.license", "export.base_model"))


def test_another_teacher_of_the_hub_has_its_own_id_and_an_unknown_licence(student, tiny_teacher, tmp_path):
    card, _ = exported(student, fetched(tiny_teacher, tmp_path, "me/my-finetune"), tmp_path)
    fields = front_matter(card)
    assert fields["base_model"] == "me/my-finetune" and "license" not in fields and "Licence: unknown" in card


def test_the_options_licence_and_base_model_apply_to_any_teacher(student, tiny_teacher, tmp_path):
    origin = {"license": "mit", "base_model": "me/mine"}
    for number, teacher in enumerate((tiny_teacher, fetched(tiny_teacher, tmp_path, "them/theirs"))):
        card, _ = exported(student, teacher, tmp_path / str(number), **origin)
        assert origin.items() <= front_matter(card).items() and "Licence: unknown" not in card


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_an_environments_licence_belongs_to_the_teacher_it_fetches(environment):
    options = ExportOptions(**resolved(environment, "parameters")["export"])
    assert (options.teacher and options.teacher.model) == resolved(environment, "catalog")["teacher"].get("model")
    assert bool(options.license) != bool(options.teacher)


@pytest.mark.parametrize(
    "changes, fact",
    [
        ({"title": "../elsewhere"}, "title"),
        ({"formats": []}, "formats"),
        ({"formats": ["onnx"]}, "formats"),
        ({"license": "other"}, "license=other: license_name"),
        ({"license_name": "mine", "license_link": "https://example.org"}, "license=apache-2.0: license_name"),
        ({"license": None, "license_name": "mine", "license_link": "https://example.org"}, "license=None: "),
        ({"teacher": KNOWN | {"license_link": None}}, r"teacher\n.*license=other: license_name"),
    ],
)
def test_options_that_name_no_file_or_half_a_licence_are_refused(changes, fact):
    with pytest.raises(ValidationError, match=fact):
        ExportOptions(**OPTIONS | changes)
