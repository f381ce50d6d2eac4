"""Model families: one file each, named as in the configuration."""

FAMILIES = ("sd3", "sdxl", "sana")  # one file of this folder each; here, since naming them must not load torch
