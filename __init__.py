"""Lets a clone of the whole repository work inside ComfyUI's custom_nodes; does nothing anywhere else."""

try:
    import comfy.samplers  # noqa: F401  only inside ComfyUI; pytest, too, reads this file
except ImportError:
    pass
else:
    from .comfy_nodes import comfy_entrypoint  # noqa: F401

    WEB_DIRECTORY = "./comfy_nodes/web"
