"""Options of the teacher stage."""

from dpdmd_pipeline.bounds import Pairs, Seed, StrictModel
from dpdmd_pipeline.training.teacher_recipe import TeacherRecipe


class TeacherOptions(StrictModel):
    """Recipe of the training, and options of the judgement."""

    recipe: TeacherRecipe
    judged_per_prompt: Pairs  # pictures of each prompt, at the teacher's own settings
    judge_seed: Seed
