"""Stage `anchors`: where the teacher stands after some of its steps, cached."""

from dpdmd_pipeline.pipelines.anchors.pipeline import create_pipeline

__all__ = ["create_pipeline"]
