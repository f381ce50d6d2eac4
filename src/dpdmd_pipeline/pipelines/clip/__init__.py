"""Stage `clip`: train the embedded world's own CLIP from scratch, so that its metrics need no download."""

from dpdmd_pipeline.pipelines.clip.pipeline import create_pipeline as create_pipeline
