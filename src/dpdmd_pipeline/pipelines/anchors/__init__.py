"""Stage `anchors`: cache the teacher's latents after some of its sampling steps."""

from dpdmd_pipeline.pipelines.anchors.pipeline import create_pipeline as create_pipeline
