"""Every option is checked by a model before anything runs."""

import importlib
import inspect
from pathlib import Path

import pytest
from kedro.pipeline import Pipeline
from kedro.validation.type_extractor import TypeExtractor
from pydantic import BaseModel
from tests.test_configuration import ENVIRONMENTS, resolved

PIPELINES = sorted(
    p.parent.name for p in (Path(__file__).parents[1] / "src/dpdmd_pipeline/pipelines").glob("*/pipeline.py")
)
STAGES = [name for name in PIPELINES if name != "distill"]

# The report prints the other stages' options as they were given; alone, it must not refuse what those stages would.
# In one run with them (distill), their own nodes give these groups a type.
UNTYPED = {"report": {"prompts", "evaluate"}}


def pipeline(stage: str) -> Pipeline:
    return importlib.import_module(f"dpdmd_pipeline.pipelines.{stage}").create_pipeline()


def asked(stage: str) -> set[str]:
    inputs = {name for node in pipeline(stage).nodes for name in node.inputs}
    return {name.removeprefix("params:") for name in inputs if name.startswith("params:")}


def typed(*stages: str) -> dict[str, type]:
    return TypeExtractor({stage: pipeline(stage) for stage in stages}).extract_types_from_pipelines()


def models_in(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A model and those nested in it."""
    found = {model}
    for field in model.model_fields.values():
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if inspect.isclass(inner) and issubclass(inner, BaseModel):
                found |= models_in(inner)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_group_of_a_stage_has_a_model(stage):
    assert asked(stage) - set(typed(stage)) == UNTYPED.get(stage, set())


def test_kedro_reads_the_annotations_of_every_node(caplog):
    typed(*PIPELINES)
    assert not caplog.messages  # it warns, at every run, of a type that only a checker imports


def test_in_the_main_job_no_group_is_without_a_model():
    assert asked("distill") == set(typed("distill"))


def test_no_stage_takes_all_options_at_once():
    assert not [n for stage in STAGES for node in pipeline(stage).nodes for n in node.inputs if n == "parameters"]


@pytest.mark.parametrize("group, model", sorted(typed(*STAGES).items()))
def test_a_model_is_frozen_and_refuses_unknown_keys_at_every_level(group, model):
    for inner in models_in(model):
        assert inner.model_config.get("extra") == "forbid", inner
        assert inner.model_config.get("frozen"), inner


@pytest.mark.parametrize("group, model", sorted(typed(*STAGES).items()))
def test_no_option_has_a_default(group, model):
    # of the ways to name an anchor level, or a teacher's network, one is given, so each may be left out
    either = {("AnchorLevel", name) for name in ("steps", "sigma", "first_step")}
    either |= {("TeacherRecipe", name) for name in ("transformer", "unet")}
    either |= {("TeacherStart", name) for name in ("landing", "guidance_scale")}  # also an argument in Python
    with_default = {
        (inner.__name__, name)
        for inner in models_in(model)
        for name, field in inner.model_fields.items()
        if not field.is_required()
    }
    assert with_default <= either


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("group, model", sorted(typed(*STAGES).items()))
def test_the_options_in_conf_are_accepted(group, model, environment):
    model.model_validate(resolved(environment, "parameters")[group])
