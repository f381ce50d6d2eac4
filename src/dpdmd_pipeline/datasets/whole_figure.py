"""A figure saved as a whole; apart from `whole_file` because importing matplotlib is slow."""

from kedro_datasets import matplotlib

from dpdmd_pipeline.datasets.whole_file import WholeFile


class MatplotlibDataset(WholeFile, matplotlib.MatplotlibDataset):
    """A matplotlib figure, in the format of the file's suffix."""
