"""Stage `export`: a trained student as a diffusers folder, a ComfyUI file, a LoRA file and a model card."""

from dpdmd_pipeline.pipelines.export.pipeline import create_pipeline as create_pipeline
