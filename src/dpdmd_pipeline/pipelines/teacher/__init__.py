"""Stage `teacher`: trains the embedded teacher; its result is in git, so that nobody has to."""

from dpdmd_pipeline.pipelines.teacher.pipeline import create_pipeline

__all__ = ["create_pipeline"]
