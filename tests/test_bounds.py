"""Every number of the options has a largest value, and one beyond it is refused in one line before the first node."""

from collections.abc import Iterator
from typing import Any

import pytest
from annotated_types import Le
from kedro.validation.type_extractor import TypeExtractor
from pydantic import BaseModel
from tests.raising import refuses
from tests.test_params_typed import PIPELINES, pipeline

from dpdmd_pipeline.bounds import LAST_SEED
from dpdmd_pipeline.configuration import ConfigLoader
from dpdmd_pipeline.pipelines.sample.options import SampleOptions
from dpdmd_pipeline.planning.options import refused_options

STAGES = {name: pipeline(name) for name in PIPELINES}
GROUPS = TypeExtractor(STAGES).extract_types_from_pipelines()
SAMPLE = {
    "size": None,
    "form": "diffusers",
    "prompts": ["a"],
    "batch_size": 1,
    "dtype": "float32",
    "device": "cpu",
    "teacher_start": None,
}


def numbers(annotation: Any, limits: tuple = (), path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple]]:
    """Paths of the integers in an annotation, with the constraints on each."""
    limits += getattr(annotation, "__metadata__", ())
    if annotation is int:
        yield path, limits
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from numbers(field.annotation, tuple(field.metadata), (*path, name))
    else:
        inner = getattr(annotation, "__origin__", None) if hasattr(annotation, "__metadata__") else None
        for part in (inner,) if inner else getattr(annotation, "__args__", ()):
            yield from numbers(part, (*limits, *(m for f in limits for m in getattr(f, "metadata", ()))), path)


NUMBERS = {(group, *path): limits for group, model in GROUPS.items() for path, limits in numbers(model)}


def test_the_walk_finds_the_numbers_of_all_stages():
    assert len(NUMBERS) > 60 and {path[0] for path in NUMBERS} == set(GROUPS) - {"export"}
    nested = {("train", "lora", "student_rank"), ("study", "seeds"), ("anchors", "anchor_levels", "steps")}
    assert nested <= set(NUMBERS)


@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_every_number_has_a_largest_value(path):
    limits = [m for limit in NUMBERS[path] for m in (limit, *getattr(limit, "metadata", ()))]
    assert any(isinstance(limit, Le) for limit in limits)


@pytest.mark.parametrize("value", [10**12, 10**30])
def test_a_number_too_large_is_refused_in_one_line_each(value):
    loader = ConfigLoader("conf", env="base", base_env="base", default_run_env="local")
    parameters, paths = loader["parameters"], []
    for path in NUMBERS:
        if _holds_a_number(parameters, path):
            parameters = _changed(parameters, path, value)
            paths += [path] if path[0] != "train_dmd" else []  # the baseline's options are those of `train`
    lines = [*refused_options(_Loaded(loader, parameters), STAGES)]
    assert len(paths) > 60 and not any("\n" in line for line in lines)
    assert sorted(line.partition(": ")[0] for line in lines) == sorted(f"{'.'.join(path)} = {value}" for path in paths)


class _Loaded(dict):
    """A configuration loader with changed parameters."""

    def __init__(self, loader: ConfigLoader, parameters: dict) -> None:
        super().__init__(parameters=parameters)
        self.env, self.base_env, self.runtime_params = None, "base", {}


def _holds_a_number(parameters: dict, path: tuple[str, ...]) -> bool:
    for name in path:
        parameters = parameters.get(name) if isinstance(parameters, dict) else None
    return isinstance(parameters, int)


def _changed(value: dict, path: tuple[str, ...], new: int) -> dict:
    name, *rest = path
    return {**value, name: _changed(value[name], tuple(rest), new) if rest else new}


@pytest.mark.parametrize("seed, pictures", [(LAST_SEED - 1, 2), (LAST_SEED, 1), (0, 8)])
def test_the_last_seeds_are_accepted(seed, pictures):
    assert SampleOptions(**SAMPLE, seed=seed, images_per_prompt=pictures).seed == seed


@pytest.mark.parametrize("seed, pictures", [(LAST_SEED, 2), (LAST_SEED - 3, 8)])
def test_a_last_seed_too_large_is_named_with_the_largest_first_one(seed, pictures):
    facts = f"seed={seed}", f"images_per_prompt={pictures}", str(LAST_SEED + 1 - pictures)
    with refuses(ValueError, *facts):
        SampleOptions(**SAMPLE, seed=seed, images_per_prompt=pictures)
