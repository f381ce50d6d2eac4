"""DP-DMD for ComfyUI: few-step students with their trained schedule and a different picture for every seed."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's extension, for ComfyUI. The import is lazy: the torch-only modules also work without ComfyUI."""
    from .nodes import DPDMDExtension

    return DPDMDExtension()
