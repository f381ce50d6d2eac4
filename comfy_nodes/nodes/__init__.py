"""The nodes that ComfyUI shows and calls. Only this folder imports ComfyUI; the modules beside it need torch alone."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .custom_sampling import DPDMDNoise, DPDMDSamplerSelect, DPDMDScheduler
from .demo import DPDMDDemoPrompt, DPDMDDemoVAE
from .loader import DPDMDLoader
from .sampler import DPDMDSampler
from .seeds import DPDMDDiversity, DPDMDSeeds
from .teacher_first import DPDMDFirstStepGuider
from .teacher_start import DPDMDTeacherStart, DPDMDTeacherStartGuider


class DPDMDExtension(ComfyExtension):
    """The pack's list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            DPDMDSampler,
            DPDMDScheduler,
            DPDMDLoader,
            DPDMDSamplerSelect,
            DPDMDNoise,
            DPDMDFirstStepGuider,
            DPDMDTeacherStart,
            DPDMDTeacherStartGuider,
            DPDMDDemoPrompt,
            DPDMDDemoVAE,
            DPDMDSeeds,
            DPDMDDiversity,
        ]
