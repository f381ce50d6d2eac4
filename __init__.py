"""Makes a clone of the whole repository work in ComfyUI's custom_nodes; does nothing anywhere else."""

try:
    import comfy.samplers  # noqa: F401  exists only inside ComfyUI; pytest reads this file too
except ImportError:
    pass
else:
    from .comfy_nodes import comfy_entrypoint  # noqa: F401

    WEB_DIRECTORY = "./comfy_nodes/web"
