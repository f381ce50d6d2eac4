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
    """Settings that all metrics share."""

    weights: Path  # folder of all weights
    passes: Passes
    processes: int  # that share the prompts
    seed: int  # of bootstrap and subsets
    duplicates_above: float | None = None  # cosine of near-duplicates; None takes it from the reference
    parts: Mapping[str, dict] = field(default_factory=dict)  # GenEval's records by text of the prompt
    elsewhere: Mapping[str, Path] = field(default_factory=dict)  # folders of weights not below `weights`, by name
    features: Path | None = None  # folder of features that metrics share; None computes them for each metric

    def folder_of(self, weights: Weights) -> Path:
        return self.elsewhere.get(weights.folder, Path(self.weights) / weights.folder)

    def file_of(self, weights: Weights) -> Path:
        return self.folder_of(weights) / str(weights.files[0])

    def shared(self, embed: Embedder, weights: Weights, output: str) -> Embedder:
        """The embedder of a network's `output`, with features shared between metrics if there is a folder for them."""
        if self.features is None:
            return embed
        network = (type(embed).__name__, output, weights.digest(self.folder_of(weights)), self.passes.device)
        return CachedFeatures(embed, self.features, "/".join(network))


@dataclass(frozen=True)
class Preset:
    """One named protocol; the full name has axis and name, as in `diversity.dino_v2`."""

    axis: Axis
    name: str
    protocol: str  # description of the computation
    build: Callable[..., Measure]  # makes the measure from the settings and the weights, which exist by then
    weights: tuple[Weights, ...] = ()  # all that it needs
    by_default: bool = False  # True if the name of the axis alone includes it

    @property
    def full_name(self) -> str:
        return f"{self.axis}.{self.name}"

    @property
    def needs_text(self) -> bool:
        """True if it reads the text of the prompt."""
        return self.axis in {"alignment", "preference"} or self.name == "shapes"

    def lack(self, settings: Settings) -> str:
        """Message on missing weights, with licence, size and remedy of each; empty if all exist."""
        lacks = [*filter(None, (weights.lack(settings.folder_of(weights)) for weights in self.weights))]
        return f"{self.full_name} {'; and '.join(lacks)}" if lacks else ""

    def require(self, settings: Settings) -> None:
        """Raise a MissingWeightsError if weights are missing."""
        if lack := self.lack(settings):
            raise MissingWeightsError(lack)

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
        """Name the file if damaged weights made `build` fail; without visible damage, name the folder of a KeyError."""
        for weights in self.weights:
            damage = weights.damage(settings.folder_of(weights))
            if damage:
                raise DamagedWeightsError(damage) from error
        if self.weights and not isinstance(error, (OSError, ValueError, ImportError, RuntimeError, MemoryError)):
            folders = " or ".join(dict.fromkeys(str(settings.folder_of(weights)) for weights in self.weights))
            raise RuntimeError(
                f"cannot load {folders} ({type(error).__name__}: {error}): compare the files with the published ones"
            ) from error
