"""A metric with its one protocol, and the settings that all metrics share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dpdmd_pipeline.metrics.embedders import Embedder
from dpdmd_pipeline.metrics.errors import DamagedWeightsError, MissingWeightsError
from dpdmd_pipeline.metrics.features import CachedFeatures
from dpdmd_pipeline.metrics.measures import Measure
from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.scoring.weights import Weights

Axis = Literal["diversity", "quality", "alignment", "preference", "distribution"]
AXES: tuple[Axis, ...] = ("diversity", "quality", "alignment", "preference", "distribution")


@dataclass(frozen=True)
class Settings:
    """Settings that all metrics share.

    Attributes:
        weights: folder of all weights.
        passes: device and batch size of networks.
        processes: number of processes that share the prompts.
        seed: seed of bootstrap and subsets.
        duplicates_above: cosine from which two pictures are near-duplicates; None takes it from the reference.
        parts: GenEval's records by text of the prompt.
        elsewhere: folders of weights that do not lie below `weights`, by name.
        features: folder of features that metrics share; None computes them for each metric.
    """

    weights: Path
    passes: Passes
    processes: int
    seed: int
    duplicates_above: float | None = None
    parts: Mapping[str, dict] = field(default_factory=dict)
    elsewhere: Mapping[str, Path] = field(default_factory=dict)
    features: Path | None = None

    def folder_of(self, weights: Weights) -> Path:
        """Folder of these weights."""
        return self.elsewhere.get(weights.folder, Path(self.weights) / weights.folder)

    def file_of(self, weights: Weights) -> Path:
        """Path of the first file of these weights."""
        return self.folder_of(weights) / str(weights.files[0])

    def shared(self, embed: Embedder, weights: Weights, output: str) -> Embedder:
        """The embedder, with features shared between metrics if there is a folder for them.

        Args:
            embed: embedder of a network.
            weights: weights of the network.
            output: name of the network's output that gives the features.
        """
        if self.features is None:
            return embed
        network = (type(embed).__name__, output, weights.digest(self.folder_of(weights)), self.passes.device)
        return CachedFeatures(embed, self.features, "/".join(network))


@dataclass(frozen=True)
class Preset:
    """One named protocol.

    Attributes:
        axis, name: parts of the full name, as in `diversity.dino_v2`.
        protocol: description of the computation.
        build: makes the measure from the settings and the weights, which exist by then.
        weights: all weights that it needs.
        by_default: True if the name of the axis alone includes it.
    """

    axis: Axis
    name: str
    protocol: str
    build: Callable[..., Measure]
    weights: tuple[Weights, ...] = ()
    by_default: bool = False

    @property
    def full_name(self) -> str:
        return f"{self.axis}.{self.name}"

    @property
    def needs_text(self) -> bool:
        """True if it reads the text of the prompt."""
        return self.axis in {"alignment", "preference"} or self.name == "shapes"

    def require(self, settings: Settings) -> None:
        """Check that the weights exist.

        Raises:
            MissingWeightsError: with the remedy for all that are missing.
        """
        absent = []
        for weights in self.weights:
            try:
                weights.require(settings.folder_of(weights), self.full_name)
            except MissingWeightsError as error:
                absent.append(str(error))
        if absent:
            first, *others = absent
            raise MissingWeightsError(
                "; and ".join([first, *(other.removeprefix(f"{self.full_name} ") for other in others)])
            )

    def digests(self, settings: Settings) -> dict[str, str]:
        """SHA-256 (hex) of the files of each of the weights, by name."""
        return {weights.folder: weights.digest(settings.folder_of(weights)) for weights in self.weights}

    def make(self, settings: Settings) -> Measure:
        """Build the measure.

        Raises:
            MissingWeightsError, MissingLibraryError, DamagedWeightsError: with the remedy.
        """
        self.require(settings)
        try:
            return self.build(settings, *self.weights)
        except Exception as error:  # libraries raise many kinds for a truncated file
            self._blame_weights(settings, error)
            raise

    def _blame_weights(self, settings: Settings, error: Exception) -> None:
        """Raise an error that names the file if damaged weights made `build` fail.

        Raises:
            DamagedWeightsError: if a file is damaged.
            RuntimeError: in place of KeyError and the like, if no damage shows.
        """
        for weights in self.weights:
            damage = weights.damage(settings.folder_of(weights))
            if damage:
                raise DamagedWeightsError(damage) from error
        if self.weights and not isinstance(error, (OSError, ValueError, ImportError, RuntimeError, MemoryError)):
            folders = " or ".join(dict.fromkeys(str(settings.folder_of(weights)) for weights in self.weights))
            raise RuntimeError(
                f"cannot load {folders} ({type(error).__name__}: {error}): compare the files with the published ones"
            ) from error
