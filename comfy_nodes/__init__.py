"""DP-DMD for ComfyUI: few-step students with their trained schedule and a different picture for every seed."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's nodes; ComfyUI calls it. Imported here, so that the torch-only modules work without ComfyUI."""
    from .nodes import DPDMDExtension

    return DPDMDExtension()
