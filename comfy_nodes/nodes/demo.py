"""Two nodes that stand in for text encoders and VAE of the small student that `make distill` makes."""

from __future__ import annotations

from pathlib import Path

import comfy.latent_formats
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from .. import pipeline
from .schema import schema


class DPDMDDemoPrompt(io.ComfyNode):
    """A prompt for the demonstration student."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDDemoPrompt",
            display_name="Demo Prompt",
            description="Encodes a prompt for the small student that the training project's `make distill` makes. For "
            "real models use ComfyUI's CLIP Text Encode.",
            inputs=[
                _pipeline_input(),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a red circle",
                    tooltip="The prompt, in the words of the embedded world: one colour and one shape.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", display_name="conditioning", tooltip="The prompt's embeddings.")
            ],
        )

    @classmethod
    def execute(cls, pipeline_name, text) -> io.NodeOutput:
        tokens, pooled = pipeline.encode_prompt(pipeline.find_pipeline(pipeline_name, _roots()), text)
        return io.NodeOutput([[tokens, {"pooled_output": pooled}]])


class DPDMDDemoVAE(io.ComfyNode):
    """The decoder of the demonstration student."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDDemoVAE",
            display_name="Demo VAE",
            description="The decoder of the small student that the training project's `make distill` makes, for "
            "ComfyUI's VAE Decode. For real models use Load VAE.",
            inputs=[
                _pipeline_input(),
                io.Int.Input(
                    "enlarge",
                    default=8,
                    min=1,
                    max=32,
                    tooltip="Its pictures have 32 x 32 pixels: each becomes a square of this many.",
                ),
            ],
            outputs=[io.Vae.Output("vae", display_name="vae", tooltip="For VAE Decode; it cannot encode.")],
        )

    @classmethod
    def execute(cls, pipeline_name, enlarge) -> io.NodeOutput:
        return io.NodeOutput(DemoVAE(pipeline.find_pipeline(pipeline_name, _roots()), enlarge))


class DemoVAE:
    """A VAE for ComfyUI that only decodes."""

    def __init__(self, folder: Path, enlarge: int) -> None:
        self.folder, self.enlarge = folder, enlarge

    def decode(self, samples: Tensor) -> Tensor:
        """Pictures [B, H, W, 3] in [0, 1] of a LATENT's samples."""
        latents = comfy.latent_formats.SD3().process_in(samples.cpu())
        pictures = pipeline.decode_latents(self.folder, latents).movedim(1, -1)
        return pictures.repeat_interleave(self.enlarge, 1).repeat_interleave(self.enlarge, 2)

    def encode(self, *_arguments: object, **_options: object) -> Tensor:
        raise ValueError("Demo VAE cannot encode pictures: start from an empty latent")


def _pipeline_input() -> io.Input:
    return io.Combo.Input(
        "pipeline_name",
        options=pipeline.list_pipelines(_roots()),
        tooltip="The export's folder `diffusers`, copied into models/diffusers.",
    )


def _roots() -> list[str]:
    return folder_paths.get_folder_paths("diffusers")
