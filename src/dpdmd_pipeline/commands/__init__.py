"""Commands beside the pipelines: `python -m dpdmd_pipeline <name> ...`, one file each with a `main(arguments)`."""

COMMANDS = ("arena", "comfy-install", "score")
