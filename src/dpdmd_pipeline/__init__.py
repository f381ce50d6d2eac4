"""DP-DMD: distil a text-to-image model into four steps and keep a different picture for every seed."""

__version__ = "0.1.0"
