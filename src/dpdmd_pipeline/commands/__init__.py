"""Commands beside the pipelines: `python -m dpdmd_pipeline <name> ...`, a file with a `main(arguments)` for each."""

COMMANDS = ("arena", "comfy-install", "score")
