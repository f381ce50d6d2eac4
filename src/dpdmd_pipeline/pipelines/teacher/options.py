"""Options of the teacher stage."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from dpdmd_pipeline.training.teacher_recipe import TeacherRecipe


class TeacherOptions(BaseModel):
    """Recipe of the training, and options of the judgement."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    recipe: TeacherRecipe
    judged_per_prompt: Annotated[int, Field(ge=2)]  # pictures of each prompt, at the teacher's own settings
    judge_seed: Annotated[int, Field(ge=0)]
