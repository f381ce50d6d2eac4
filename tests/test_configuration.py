"""conf/: an environment is a folder of differences, and a real teacher's names every option that changes a result."""

import shutil
from functools import cache
from pathlib import Path

import click
import pytest
import yaml
from omegaconf import OmegaConf
from tests.raising import refuses

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.planning.conf_files import refused_files
from dpdmd_pipeline.planning.options import refused_options, shared_folder
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS, CONFIG_LOADER_CLASS
from dpdmd_pipeline.training.recipe import AnchorRecipe, Recipe

CONF = Path(__file__).parents[1] / "conf"
ENVIRONMENTS = sorted(path.parent.name for path in CONF.glob("*/globals.yml"))
PARENTS = {env: yaml.safe_load((CONF / env / "globals.yml").read_text())["extends"] for env in ENVIRONMENTS}
REAL = [env for env, parent in PARENTS.items() if parent == "hub"]
BASELINE = {"anchored_steps": 0, "diversity_weight": 0.0, "stop_gradient": False}
FILES = [path for path in CONF.rglob("*.yml") if "local" not in path.parts]


def loader(environment: str, conf: Path = CONF, **runtime_params):
    return CONFIG_LOADER_CLASS(str(conf), env=environment, runtime_params=runtime_params, **CONFIG_LOADER_ARGS)


@cache
def resolved(environment: str, kind: str) -> dict:
    """Catalog or parameters of an environment; do not change them."""
    return loader(environment)[kind]


def test_no_file_is_empty_and_an_environment_has_two():
    assert all(yaml.safe_load(path.read_text()) for path in FILES)
    for environment in set(ENVIRONMENTS) - {"base"}:
        names = {path.name for path in (CONF / environment).glob("*.yml")}
        assert names == {"globals.yml", "parameters.yml"}


def test_every_environment_has_folders_of_its_own():
    shared = {
        "raw_prompts",
        "raw_eval_prompts",
        "teacher",
        "shapes_clip",
        "clip_state",
        "clip_metrics",
        "metric_weights",
    }
    written: dict[str, str] = {}
    for environment in ENVIRONMENTS:
        for name, entry in resolved(environment, "catalog").items():
            if name not in shared and "filepath" in entry:
                path = Path(entry["filepath"]).as_posix()
                assert written.setdefault(path, environment) == environment, path


def test_an_environment_that_would_write_over_bases_results_is_refused(tmp_path):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf, ignore=shutil.ignore_patterns("local"))
    (conf / "mine").mkdir()
    assert shared_folder(loader("ci", conf)) is None and shared_folder(loader("base", conf)) is None
    line = shared_folder(loader("mine", conf))
    assert "conf/mine/globals.yml" in line and "folder: mine" in line
    (conf / "mine/globals.yml").write_text("folder: mine\n")
    assert shared_folder(loader("mine", conf)) is None


@pytest.mark.parametrize(
    ("group", "model"), [("train", Recipe), ("backbone", BackboneOptions), ("anchors", AnchorRecipe)]
)
@pytest.mark.parametrize("environment", REAL)
def test_a_real_teachers_environment_and_its_parent_name_every_option_that_changes_its_result(
    environment, group, model
):
    # Environments are merged softly into base: a field that is missing here would be the embedded world's.
    # And DVC watches the parent's parameters.yml in place of base's, which has `backbone`.
    own = [yaml.safe_load((CONF / name / "parameters.yml").read_text())[group] for name in ("hub", environment)]
    changing = {name for name in fields(model) if not name.startswith("launch.")}
    assert changing <= fields(OmegaConf.to_container(OmegaConf.merge(*own)))


def fields(options) -> set[str]:
    """Names of a model's or a mapping's values, with dots where they are nested."""
    is_model = isinstance(options, type)
    values = {name: field.annotation for name, field in options.model_fields.items()} if is_model else options
    names = set()
    for name, value in values.items():
        nested = hasattr(value, "model_fields") if is_model else isinstance(value, dict)
        names |= {f"{name}.{inner}" for inner in fields(value)} if nested else {name}
    return names


def test_a_parent_is_no_environment_and_every_environment_says_what_it_extends():
    assert set(PARENTS.values()) == {"base", "hub"} and PARENTS["base"] == "base"
    assert {path.name for path in (CONF / "hub").iterdir()} == {"catalog.yml", "parameters.yml"}
    written = [path for path in FILES if path.parent.name != "base" and "train_dmd" in yaml.safe_load(path.read_text())]
    assert written == []  # the baseline follows `train`


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_baseline_is_the_recipe_with_three_keys_changed(environment):
    parameters = resolved(environment, "parameters")
    train, baseline = parameters["train"], parameters["train_dmd"]
    assert {key for key in train if train[key] != baseline[key]} == set(BASELINE) and train.keys() == baseline.keys()
    assert {key: baseline[key] for key in BASELINE} == BASELINE


@pytest.fixture
def mine(tmp_path) -> Path:
    """A configuration with an environment `mine` on a parent `shared`."""
    conf = tmp_path / "conf"
    files = {
        "base": {"globals": {"folder": "."}, "parameters": {"a": {"x": 1, "y": 1, "z": 1}}},
        "shared": {"parameters": {"a": {"y": 2, "z": 2}}},
        "mine": {"globals": {"folder": "mine", "extends": "shared"}, "parameters": {"a": {"z": 3}}},
    }
    files["base"]["catalog"] = {"one": {"type": "text.TextDataset", "filepath": "base"}}
    files["shared"]["catalog"] = {"one": {"type": "text.TextDataset", "filepath": "${globals:folder}"}}
    for name, contents in files.items():
        (conf / name).mkdir(parents=True)
        for kind, values in contents.items():
            (conf / name / f"{kind}.yml").write_text(yaml.safe_dump(values))
    return conf


def test_an_environment_is_merged_over_its_parent_and_that_over_base(mine):
    made = loader("mine", mine, a={"x": 4})
    assert made["parameters"]["a"] == {"x": 4, "y": 2, "z": 3}
    assert made["catalog"]["one"]["filepath"] == "mine"
    assert loader("base", mine)["parameters"]["a"] == {"x": 1, "y": 1, "z": 1}


@pytest.mark.parametrize(("parent", "fact"), [("shred", "no folder"), ("base2", "an environment")])
def test_a_parent_that_does_not_exist_or_is_an_environment_is_refused(mine, parent, fact):
    shutil.copytree(mine / "base", mine / "base2")
    (mine / "mine/globals.yml").write_text(f"folder: mine\nextends: {parent}\n")
    with refuses(click.ClickException, parent, fact):
        loader("mine", mine)


def test_a_parent_that_kedro_cannot_read_is_named(mine):
    (mine / "shared/parameters.yml").write_text("a: {x: 1\n")
    with refuses(click.ClickException, str(mine / "shared/parameters.yml"), "line "):
        loader("mine", mine)


@pytest.mark.parametrize("environment", ["base", "sd35"])
def test_a_parameter_of_the_command_line_reaches_the_baseline_too(environment):
    changes = {"roles": "lora", "student": {"learning_rate": 0.5}, "diversity_weight": 7.0, "anchored_steps": 2}
    parameters = loader(environment, train=changes, train_dmd={"seed": 3})["parameters"]
    train, baseline = parameters["train"], parameters["train_dmd"]
    assert train["roles"] == baseline["roles"] == "lora"
    assert train["student"]["learning_rate"] == baseline["student"]["learning_rate"] == 0.5
    assert (train["diversity_weight"], baseline["diversity_weight"]) == (7.0, 0.0)
    assert (train["anchored_steps"], baseline["anchored_steps"]) == (2, 0)
    assert (train["seed"], baseline["seed"]) == (0, 3)


def test_what_is_given_for_the_baseline_itself_wins():
    changes = {"student": {"weight_decay": 0.5}, "watch": {"level": 0.1}}
    baseline = loader("base", train=changes, train_dmd={"watch": {"level": 0.2}})["parameters"]["train_dmd"]
    assert baseline["student"]["weight_decay"] == 0.5
    assert (baseline["watch"]["level"], baseline["watch"]["every"]) == (0.2, 10)
    for group in ("train", "train_dmd"):
        assert loader("base", **{group: 3})["parameters"][group] == 3  # the checks refuse it, not the loader


def test_a_wrong_option_of_train_is_reported_once():
    from dpdmd_pipeline.pipelines.train import create_pipeline

    made = loader("base", train={"num_stepz": 4, "student": {"learning_rate": -1}}, train_dmd={"seed": "x"})
    lines = [*refused_options(made, {"train": create_pipeline()})]
    assert sorted(line.split()[0] for line in lines) == [
        "train.num_stepz",
        "train.student.learning_rate",
        "train_dmd.seed",
    ]


@pytest.mark.parametrize("environment", ["base", "sd35"])
def test_a_learning_rate_that_the_roles_do_not_read_is_refused_on_the_command_line(environment):
    names, rate = {"full": "learning_rate", "lora": "lora_learning_rate"}, 0.5
    for roles, read in names.items():
        for name in names.values():
            lines = [*refused_options(loader(environment, train={"roles": roles, "student": {name: rate}}), {})]
            facts = f"train.student.{name} = {rate}", f"train.roles={roles}", f"train.student.{read}"
            assert lines == [] if name == read else all(fact in lines[0] for fact in facts) and len(lines) == 1


def test_a_run_with_a_name_writes_into_folders_of_its_own_and_shares_caches():
    plain, first, second = (loader("ci", **({"run": name} if name else {}))["catalog"] for name in ("", "a", "b-2.0"))
    paths = {name: entry["filepath"] for name, entry in plain.items() if isinstance(entry.get("filepath"), str)}
    own = {name for name in paths if Path(paths[name]) != Path(first[name]["filepath"])}
    assert {"student", "student_dmd", "train_state", "images", "metrics", "report_{format}", "export"} <= own
    assert not {"prompts", "embeddings", "anchors", "raw_prompts", "shapes_clip", "metric_weights"} & own
    for name in own:
        files = {Path(catalog[name]["filepath"]) for catalog in (plain, first, second)}
        assert len(files) == 3 and "ci/runs/b-2.0/" in second[name]["filepath"]


@pytest.mark.parametrize("name", ["../up", "a/b", ".", "..", "-x", "a b", "x" * 65])
def test_a_run_with_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(Exception, match=r"run = .*letters"):
        loader("base", run=name)["catalog"]


def test_an_option_that_is_unread_and_out_of_bounds_has_one_line():
    from dpdmd_pipeline.pipelines.train.pipeline import create_pipeline

    made = loader("base", train={"student": {"lora_learning_rate": -1}})
    (line,) = refused_options(made, {"train": create_pipeline()})
    assert "train.roles=full" in line


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("file", "text", "facts"),
    [
        ("catalog.yml", "- teacher\n", ["line 1"]),
        ("catalog.yml", "prompts: {type: text.TextDataset}\nteacher: 3\n", ["line 2", "teacher"]),
        ("catalog.yml", "1: {type: text.TextDataset}\n", ["line 1", "key 1", "quotes"]),
        ("globals.yml", "folder: mine\nteacher: {path: a}\n", ["line 2", "teacher", "quotes"]),
        ("globals.yml", "folder: mine\nraw_prompts: 12\n", ["line 2", "raw_prompts", "quotes"]),
        ("globals.yml", "just words\n", ["line 1"]),
        ("globals.yml", "folder: {mine\n", ["line "]),
        ("globals.yml", LAUGHS, ["aliases"]),
        ("parameters.yml", LAUGHS, ["aliases"]),
        ("parameters_train.yml", "train: &train {seed: 1, again: *train}\n", ["line 1", "alias"]),
        ("parameters.yml", "train: {1: 2}\n", ["key 1"]),
        ("parameters.yml", "train: {on: 2}\n", ["key on"]),
        ("parameters.yml", "train: {[1, 2]: 2}\n", ["key"]),
        ("parameters.yml", "train: {seed: 1, seed: 2}\n", ["seed", "twice"]),
        ("parameters.yml", "train: !!python/object/apply:os.getcwd []\n", ["python/object"]),
        ("parameters.yml", "train: !mine {seed: 1}\n", ["!mine"]),
        ("parameters.yml", "train: \udcff\n", ["utf-8"]),
        ("parameters.yml", "train: " + "[" * 5000, []),
    ],
)
def test_a_file_that_kedro_cannot_read_is_named_before_it_is_expanded(tmp_path, file, text, facts):
    conf = tmp_path / "conf"
    shutil.copytree(CONF / "base", conf / "base")
    (conf / "mine").mkdir()
    path = conf / "mine" / file
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with refuses(click.ClickException, str(path), *facts) as error:
        loader("mine", conf)
    assert "\n" not in str(error.value)


def test_the_files_of_this_project_are_read_and_those_that_kedro_ignores_are_not(tmp_path):
    assert [*refused_files([CONF])] == []
    for name in (".checkpoints/catalog.yml", "notes.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{1: 2}")
    assert [*refused_files([tmp_path])] == []


def test_globals_that_omegaconf_cannot_resolve_are_one_line(tmp_path):
    shutil.copytree(CONF / "base", tmp_path / "base")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/globals.yml").write_text("folder: ${nothing}\n")
    with refuses(click.ClickException, "globals.yml", "nothing"):
        loader("mine", tmp_path)


@pytest.mark.parametrize("environment", ["ci", "base", "sd35"])
def test_only_the_paths_that_an_environment_reads_are_accepted(environment):
    given = {"raw_prompts": "a.txt", "raw_eval_prompts": "b.txt", "teacher_model": "c"}
    lines = [*refused_options(loader(environment, **given), {})]
    if environment == "sd35":
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith("teacher_model: ") and "own teacher" in line and "sd35, " in line


def test_a_file_of_evaluation_prompts_is_not_accepted_beside_a_share_of_the_others():
    made = loader("base", raw_eval_prompts="b.txt", prompts={"eval_share": 0.2})
    (line,) = refused_options(made, {})
    assert "raw_eval_prompts" in line and "prompts.eval_share=0.2" in line


def test_a_path_of_the_command_line_in_a_file_of_parameters_is_refused(tmp_path):
    conf = tmp_path / "conf"
    shutil.copytree(CONF / "base", conf / "base")
    (conf / "mine").mkdir()
    (conf / "mine/parameters.yml").write_text("raw_prompts: mine.txt\n")
    (line,) = refused_options(loader("mine", conf), {})
    assert line.startswith("raw_prompts: ")
