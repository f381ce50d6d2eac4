"""The export stage on a tiny student: options, and what they give."""

from pathlib import Path

import pytest
import yaml
from kedro.config import OmegaConfigLoader
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from pydantic import ValidationError
from tests.pipelines.conftest import backbone_options, train_options

from dpdmd_pipeline.backbones.student_file import StudentHeader, save_student
from dpdmd_pipeline.datasets.model_folder import ModelFolderDataset, folder_hash
from dpdmd_pipeline.datasets.optional_json import OptionalJSONDataset
from dpdmd_pipeline.hooks import _missing_inputs
from dpdmd_pipeline.pipelines.export import create_pipeline
from dpdmd_pipeline.pipelines.export.nodes import export_student
from dpdmd_pipeline.pipelines.export.options import ExportOptions
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS

CONF = Path(__file__).parents[3] / "conf"
ENVIRONMENTS = sorted({path.parent.name for path in CONF.glob("*/parameters_*.yml")} - {"local"})
OPTIONS = {
    "title": "tiny-student",
    "formats": ["diffusers", "comfyui", "lora"],
    "dtype": "float16",
    "license": "apache-2.0",
    "license_name": None,
    "license_link": None,
    "base_model": None,
}


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    network = backbone_options().load(tiny_teacher, "cpu").load_model()
    save_student(folder, network, StudentHeader("sd3", [1.0, 0.75, 0.5, 0.25, 0.0]))
    return folder


def test_the_catalog_gets_a_folder_with_every_form_that_the_student_has(student, tiny_teacher, tmp_path):
    write = export_student(student, tiny_teacher, {}, train_options(), backbone_options(), ExportOptions(**OPTIONS))
    dataset = ModelFolderDataset(filepath=str(tmp_path / "export"))
    dataset.save(write)
    found = {path.relative_to(tmp_path / "export").as_posix() for path in dataset.load().rglob("*") if path.is_file()}
    assert {"README.md", "config.json", "comfyui/tiny-student.safetensors", "diffusers/model_index.json"} <= found
    assert not any(path.startswith("lora") for path in found)


def measured(model):
    """Metrics of one model, as the evaluate stage writes them."""
    figure = {"value": 0.5, "low": 0.25, "high": 0.75}
    told = {} if model is None else {"model": model}
    return {"dp_dmd": {"nfe": 4, "quality": {"aligned": figure}, "diversity": {}, "figures": {}, **told}}


def card_with(metrics, student, teacher, folder):
    options = ExportOptions(**OPTIONS | {"formats": ["comfyui"]})
    export_student(student, teacher, metrics, train_options(), backbone_options(), options)(folder)
    return (folder / "README.md").read_text()


def test_the_card_has_the_measurements_of_its_own_student(student, tiny_teacher, tmp_path, caplog):
    card = card_with(measured(folder_hash(student)[:16]), student, tiny_teacher, tmp_path)
    assert "| aligned | 0.5 [0.25, 0.75] |" in card and "not measured" not in card
    assert not caplog.records


@pytest.mark.parametrize(
    "model, whose",
    [("0123456789abcdef", "another student (0123456789abcdef)"), (None, "an older version, which did not note")],
)
def test_measurements_of_another_student_are_left_out_and_said(student, tiny_teacher, tmp_path, caplog, model, whose):
    card = card_with(measured(model), student, tiny_teacher, tmp_path)
    assert "## Measured" not in card and "aligned" not in card
    assert "This student was not measured: `kedro run --pipelines evaluate,export`" in card
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert whose in line and "kedro run --pipelines evaluate,export" in line


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_environment_exports_without_metrics(environment):
    entry = OmegaConfigLoader(str(CONF), env=environment, **CONFIG_LOADER_ARGS)["catalog"]["metrics"]
    assert entry["type"] == "dpdmd_pipeline.datasets.optional_json.OptionalJSONDataset"


def test_a_student_that_nobody_measured_is_exported_and_it_is_said(student, tiny_teacher, tmp_path, caplog):
    groups = {"train": train_options(), "backbone": backbone_options(), "export": ExportOptions(**OPTIONS)}
    given = {"student": student, "teacher": tiny_teacher, **{f"params:{name}": group for name, group in groups.items()}}
    made = DataCatalog({name: MemoryDataset(value) for name, value in given.items()})
    made["metrics"] = OptionalJSONDataset(filepath=str(tmp_path / "metrics.json"))
    assert list(_missing_inputs(create_pipeline(), made, tmp_path)) == []
    SequentialRunner().run(create_pipeline(), made)["export"].load()(tmp_path / "export")
    assert "This student was not measured" in (tmp_path / "export" / "README.md").read_text()
    assert "nothing was measured: `kedro run --pipelines evaluate,export` measures this student" in caplog.text


def turned_round(train):
    """As a YAML file may have them: in another order, whole numbers without a point."""
    plain = dict(reversed(train.model_dump(mode="json").items()))
    return {name: int(value) if value == 1.0 and isinstance(value, float) else value for name, value in plain.items()}


@pytest.mark.parametrize("train", [train_options(), turned_round(train_options())], ids=["typed", "plain"])
def test_the_card_lists_the_options_of_the_run(student, tiny_teacher, tmp_path, train):
    options = ExportOptions(**OPTIONS | {"formats": ["comfyui"]})
    export_student(student, tiny_teacher, {}, train, backbone_options(), options)(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| `train.diversity_weight` | `1.0` |" in card and "| `backbone.resolution` | `32` |" in card
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    named = [line.split("`")[1] for line in card.splitlines() if line.startswith("| `train.")]
    assert named[:2] == ["train.roles", "train.lora.student_rank"]  # in one order, whatever that of the file


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"title": "../elsewhere"}, "title"),
        ({"formats": []}, "formats"),
        ({"formats": ["onnx"]}, "formats"),
        ({"license": "other"}, "license=other: license_name and license_link go with `other`"),
        ({"license_name": "mine", "license_link": "https://example.org"}, "license=apache-2.0: license_name"),
    ],
)
def test_options_that_name_no_file_or_half_a_licence_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        ExportOptions(**OPTIONS | changes)
