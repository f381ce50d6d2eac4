"""Options of the clip stage."""

from pydantic import BaseModel, ConfigDict

from dpdmd_pipeline.training.teacher_recipe import ClipRecipe


class ClipOptions(BaseModel):
    """Recipe of the training."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    recipe: ClipRecipe
