"""Losses and pictures for programs that follow a training, through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.preview import preview_path

Track = Callable[[dict[str, float]], None]  # takes the record of a cycle


@contextmanager
def tracked(name: str, folder: Path, options: TrainOptions) -> Iterator[Track]:
    """Function that passes records on to the requested trackers, which are closed at the end.

    Args:
        name: of the run.
        folder: of its checkpoints; trackers that write files get a folder in it.
        options: of the training, stored by the trackers too.
    """
    trackers: list[Any] = []

    def track(record: dict[str, float]) -> None:
        if options.track and not trackers:  # only now: accelerate knows the processes when training has begun
            trackers.extend(_open(name, folder, options))
        values = {key: value for key, value in record.items() if key != "step"}
        row = preview_path(folder, record["step"])
        for tracker in trackers:
            tracker.log(values, step=record["step"])
            if row.is_file() and hasattr(tracker, "log_images"):
                _log_picture(tracker, row, record["step"])

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.finish()


def _open(name: str, folder: Path, options: TrainOptions) -> Iterator[Any]:
    from accelerate import PartialState
    from accelerate.state import is_initialized
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if not is_initialized():  # training runs in other processes; this one must not touch a GPU
        PartialState(cpu=True)
    for tracker in options.track:
        kind = LOGGER_TYPE_TO_CLASS[tracker]
        target = {"logging_dir": str(folder / "tracking")} if kind.requires_logging_directory else {}
        opened = kind(f"{name}-{folder.name[:8]}", **target)
        if hasattr(opened, "start"):  # older versions of accelerate open a tracker at once
            opened.start()
        opened.store_init_configuration(dict(_flat("", options.model_dump(mode="json"))))
        yield opened


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options by their path, as numbers and texts."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value if isinstance(value, int | float | str) else str(value)


def _log_picture(tracker: Any, path: Path, step: int) -> None:
    import numpy as np
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as picture:
        pixels = np.asarray(picture)[None]
    arguments = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images({"previews": pixels}, step=step, **arguments)
