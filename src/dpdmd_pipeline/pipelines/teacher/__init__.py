"""Stage `teacher`: train the embedded teacher; its result is in git, so you need not run it."""

from dpdmd_pipeline.pipelines.teacher.pipeline import create_pipeline as create_pipeline
