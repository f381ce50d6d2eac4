"""Trains: the embedded teacher, and the distilled student."""
