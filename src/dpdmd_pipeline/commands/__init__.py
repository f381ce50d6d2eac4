"""Commands beside the pipelines: `python -m dpdmd_pipeline <name> ...`, a file with a `main(arguments)` for each."""

COMMANDS = {
    "arena": "make a page on which people compare two folders of pictures blindly",
    "comfy-install": "install the node pack into a ComfyUI",
    "score": "score any folder of pictures, from any model",
}
