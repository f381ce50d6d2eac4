"""Scores of any pictures: read folders, run metrics by name, make tables, and let people compare."""
