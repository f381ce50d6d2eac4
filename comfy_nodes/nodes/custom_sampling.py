"""Schedule, sampler and noise as separate nodes, for ComfyUI's SamplerCustomAdvanced and SplitSigmas."""

from __future__ import annotations

from comfy_api.latest import io

from .. import sampling, schedules
from ..noise import PerImageNoise
from .model import header_of, levels_of
from .sampler import sampler_object
from .schema import denoise_input, schema, seed_input, show_text, steps_input


class DPDMDScheduler(io.ComfyNode):
    """The schedule as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDScheduler",
            aliases=["few step", "4 steps", "turbo", "lightning", "sigmas"],
            display_name="DP-DMD Scheduler",
            description="The noise levels that a DP-DMD student was trained on, as SIGMAS for ComfyUI's custom "
            "samplers. A shift patched into the model does not change them.",
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The student; its file's schedule comes with it."),
                steps_input("Network calls before denoise is applied; 0: as trained. Not used with custom."),
                denoise_input(),
                io.Combo.Input(
                    "schedule",
                    options=list(schedules.NAMES),
                    default=schedules.AUTO,
                    tooltip="auto: the schedule in the student's file; a file without one is refused. The official "
                    "SD3.5 schedule equals KSampler's scheduler 'normal', the other two its 'simple'.",
                ),
                io.String.Input(
                    "custom",
                    default="",
                    optional=True,
                    tooltip="Only for the schedule custom: falling sigmas that end at 0, for example 1, 0.9, 0.75, "
                    "0.5, 0.",
                ),
            ],
            outputs=[io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="Falling noise levels that end at 0.")],
        )

    @classmethod
    def execute(cls, model, steps, denoise, schedule, custom="") -> io.NodeOutput:
        levels, header = levels_of(model), header_of(model)
        sigmas, source = schedules.sigmas_for(schedule, steps, levels, header, custom)
        sigmas = schedules.last_steps(sigmas, denoise)
        text = f"{schedules.format_sigmas(sigmas)} ({source})"
        if header is None:
            text = f"{schedules.warning_without_header(levels)}\n{text}"
        show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(sigmas)


class DPDMDSamplerSelect(io.ComfyNode):
    """The sampler as SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDSamplerSelect",
            aliases=["few step", "re-noise", "LCM", "DMD2"],
            display_name="DP-DMD Sampler Select",
            description="The two ways to sample a student, for ComfyUI's custom samplers. Re-noise draws its fresh "
            "noise per picture on the CPU: the same picture in every version and on every device.",
            inputs=[
                io.Combo.Input(
                    "method",
                    options=list(sampling.METHODS),
                    default=sampling.DETERMINISTIC,
                    tooltip="deterministic: Euler (DDIM with eta 0 for SDXL). re-noise: x0 plus fresh noise at every "
                    "step, like DMD2; use it with Per-Image Noise, and do not split its schedule.",
                )
            ],
            outputs=[io.Sampler.Output("sampler", display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, method) -> io.NodeOutput:
        return io.NodeOutput(sampler_object(method))


class DPDMDNoise(io.ComfyNode):
    """The start noise per picture as NOISE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDNoise",
            aliases=["seed variation", "batch seeds", "random noise"],
            display_name="Per-Image Noise",
            description="Noise that belongs to a picture: picture i of a batch gets the noise that seed + i gives "
            "alone. Works with every model, and with Latent From Batch.",
            inputs=[seed_input("noise_seed")],
            outputs=[io.Noise.Output("noise", display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise_seed) -> io.NodeOutput:
        return io.NodeOutput(PerImageNoise(noise_seed))
