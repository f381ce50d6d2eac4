"""Options of the clip stage."""

from dpdmd_pipeline.bounds import StrictModel
from dpdmd_pipeline.training.teacher_recipe import ClipRecipe


class ClipOptions(StrictModel):
    """Recipe of the training."""

    recipe: ClipRecipe
