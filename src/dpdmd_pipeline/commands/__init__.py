"""Commands beside the pipelines: `python -m dpdmd_pipeline <name> ...`, a file with a `main(arguments)` for each."""

COMMANDS = {
    "arena": "a page on which people compare two folders of pictures blindly",
    "comfy-install": "put the node pack into a ComfyUI",
    "score": "judge any folder of pictures, from any model",
}
