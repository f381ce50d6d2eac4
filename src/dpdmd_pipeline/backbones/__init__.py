"""Model families: one file each, named as in the configuration."""

FAMILIES = ("sd3", "sdxl", "sana")  # files of this folder; listed here so that reading the names does not import torch
