"""Model families: one file each, named as in the configuration. Nothing here imports torch."""

from pathlib import Path

FAMILIES = ("sd3", "sdxl", "sana", "flux2_klein", "qwen_image", "z_image")  # files of this folder
COMPONENTS = ("transformer", "unet")  # names of the denoising network in a pipeline's folder


def network_folder(pipeline: Path) -> Path:
    """Folder of the denoising network in a diffusers pipeline folder; FileNotFoundError if it has none."""
    for name in COMPONENTS:
        if (pipeline / name).is_dir():
            return pipeline / name
    raise FileNotFoundError(
        f"{pipeline} has no transformer/ and no unet/: give a diffusers pipeline folder, with its model_index.json"
    )
