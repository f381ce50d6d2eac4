"""Two nodes that stand in for text encoders and VAE of the small student that `make distill` makes."""

from __future__ import annotations

import comfy.latent_formats
import folder_paths
from comfy_api.latest import io

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


class DPDMDDemoDecode(io.ComfyNode):
    """Pictures of the demonstration student."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDDemoDecode",
            display_name="Demo Decode",
            description="Decodes latents of the small student that the training project's `make distill` makes, and "
            "enlarges its 32 x 32 pixels. For real models use ComfyUI's VAE Decode.",
            inputs=[
                _pipeline_input(),
                io.Latent.Input("samples", tooltip="Latents of the student."),
                io.Int.Input(
                    "enlarge", default=8, min=1, max=32, tooltip="Every pixel becomes a square of this many pixels."
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The pictures.")],
        )

    @classmethod
    def execute(cls, pipeline_name, samples, enlarge) -> io.NodeOutput:
        folder = pipeline.find_pipeline(pipeline_name, _roots())
        latents = comfy.latent_formats.SD3().process_in(samples["samples"].cpu())
        pictures = pipeline.decode_latents(folder, latents).movedim(1, -1)
        return io.NodeOutput(pictures.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2))


def _pipeline_input() -> io.Input:
    return io.Combo.Input(
        "pipeline_name",
        options=pipeline.list_pipelines(_roots()),
        tooltip="The export's folder `diffusers`, copied into models/diffusers.",
    )


def _roots() -> list[str]:
    return folder_paths.get_folder_paths("diffusers")
