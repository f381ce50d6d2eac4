"""Every metric that can be asked for by name, each with the one protocol its numbers stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dpdmd_pipeline.metrics import weights as w
from dpdmd_pipeline.metrics.embedders import Embedder
from dpdmd_pipeline.metrics.features import KeptFeatures
from dpdmd_pipeline.metrics.measures import (
    NO_ANSWER,
    Measure,
    PairDiversity,
    PartScores,
    PictureScores,
    SetDiversity,
    SetFeatures,
    ShapesReader,
    pixel_distances,
)
from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.shapes.world import RESOLUTION

Axis = Literal["diversity", "quality", "alignment", "preference", "distribution"]
AXES: tuple[Axis, ...] = ("diversity", "quality", "alignment", "preference", "distribution")
GENEVAL = "geneval"  # folder of evaluation_metadata.jsonl, beside the weights
_LPIPS_SIDE = 256
_PROJECTED = "projected"  # output of a CLIP that diversity and alignment share


@dataclass(frozen=True)
class Settings:
    """How pictures are judged, whatever the metric.

    Attributes:
        weights: folder of all weights.
        passes: where networks run.
        processes: over which prompts are spread.
        seed: of bootstrap and subsets.
        duplicates_above: cosine from which two pictures are near-duplicates; None takes it from the reference.
        parts: GenEval's records by text of the prompt.
        elsewhere: name of a folder of weights to its place, of those that do not lie below `weights`.
        features: folder of features that metrics share; None computes them for each.
    """

    weights: Path
    passes: Passes
    processes: int
    seed: int
    duplicates_above: float | None = None
    parts: Mapping[str, dict] = field(default_factory=dict)
    elsewhere: Mapping[str, Path] = field(default_factory=dict)
    features: Path | None = None

    def folder_of(self, needed: w.Weights) -> Path:
        """Where these weights belong."""
        return self.elsewhere.get(needed.folder, Path(self.weights) / needed.folder)

    def shared(self, embed: Embedder, needed: w.Weights, output: str) -> Embedder:
        """The embedder, for all metrics that look through it.

        Args:
            embed: of a network.
            needed: its weights.
            output: which of its outputs are the features.
        """
        if self.features is None:
            return embed
        network = (type(embed).__name__, output, needed.digest(self.folder_of(needed)), self.passes.device)
        return KeptFeatures(embed, self.features, "/".join(network))


@dataclass(frozen=True)
class Preset:
    """One named protocol.

    Attributes:
        axis, name: `diversity.dino_v2` and so on.
        protocol: what exactly is computed, in words.
        build: makes the measure; called after the weights were found.
        weights: all it needs.
        by_default: whether naming the axis alone includes it.
    """

    axis: Axis
    name: str
    protocol: str
    build: Callable[[Settings], Measure]
    weights: tuple[w.Weights, ...] = ()
    by_default: bool = False

    @property
    def full_name(self) -> str:
        return f"{self.axis}.{self.name}"

    @property
    def needs_text(self) -> bool:
        """Whether it asks what the prompt says."""
        return self.axis in {"alignment", "preference"} or self.name == "shapes"

    def require(self, settings: Settings) -> None:
        """Look for the weights.

        Raises:
            MissingWeightsError: with the remedy, of all that are absent.
        """
        absent = []
        for needed in self.weights:
            try:
                needed.require(settings.folder_of(needed), self.full_name)
            except w.MissingWeightsError as error:
                absent.append(str(error))
        if absent:
            first, *others = absent
            raise w.MissingWeightsError(
                "; and ".join([first, *(other.removeprefix(f"{self.full_name} ") for other in others)])
            )

    def digests(self, settings: Settings) -> dict[str, str]:
        """Name of each of the weights to the SHA-256 of its files, hexadecimal."""
        return {needed.folder: needed.digest(settings.folder_of(needed)) for needed in self.weights}

    def make(self, settings: Settings) -> Measure:
        """The measure, ready to run.

        Raises:
            MissingWeightsError, MissingLibraryError, DamagedWeightsError: with the remedy.
        """
        self.require(settings)
        try:
            return self.build(settings)
        except Exception as error:  # every library has its own for a file that is cut off
            self._blame_weights(settings, error)
            raise

    def _blame_weights(self, settings: Settings, error: Exception) -> None:
        """Name the file that made `build` fail, if it is one of the weights.

        Raises:
            DamagedWeightsError: instead of what a library says of it.
            RuntimeError: instead of a KeyError and the like, where all files look whole.
        """
        for needed in self.weights:
            damage = needed.damage(settings.folder_of(needed))
            if damage:
                raise w.DamagedWeightsError(damage) from error
        if self.weights and not isinstance(error, (OSError, ValueError, ImportError, RuntimeError, MemoryError)):
            places = " or ".join(dict.fromkeys(str(settings.folder_of(needed)) for needed in self.weights))
            told = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"{places} cannot be loaded ({told}): see whether it is what was published") from error


def _vision(kind: Callable[[Any], Measure], needed: w.Weights, tokens: Any, settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.embedders import TransformersVision

    embed = TransformersVision(settings.folder_of(needed), tokens, settings.passes)
    # Those of all patches of a picture would be larger than the picture.
    return kind(embed if tokens == "patches" else settings.shared(embed, needed, tokens))


def _open_clip(needed: w.Weights, settings: Settings, side: int | None = None) -> Measure:
    from dpdmd_pipeline.metrics.embedders import OpenClipVision

    embed = OpenClipVision.of(settings.folder_of(needed), settings.passes, side)
    return SetDiversity(settings.shared(embed, needed, _PROJECTED))


def _lpips(network: Literal["alex", "squeeze"], settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.embedders import Lpips

    return PairDiversity("mean_distance", Lpips(network, settings.weights, _LPIPS_SIDE, settings.passes))


def _pixels(settings: Settings) -> Measure:
    return PairDiversity("mean_distance", pixel_distances)


def _inception(settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.embedders import Inception

    file = settings.folder_of(w.INCEPTION) / str(w.INCEPTION.files[0])
    return SetFeatures(settings.shared(Inception(file, settings.passes), w.INCEPTION, "2048"))


def _clip_score(needed: w.Weights, settings: Settings, side: int | None = None) -> Measure:
    from dpdmd_pipeline.metrics.alignment import clip_score

    share = partial(settings.shared, needed=needed, output=_PROJECTED)
    score = clip_score(settings.folder_of(needed), settings.passes, side, share)
    return PictureScores("score", score, score.cut_at)


def _pick_score(settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.alignment import PickScore

    score = PickScore(settings.folder_of(w.PICKSCORE), settings.passes)
    return PictureScores("score", score, score.cut_at)


def _hps(settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.alignment import hps_score

    file = settings.folder_of(w.HPS_V2_1) / str(w.HPS_V2_1.files[0])
    score = hps_score("ViT-H-14", file, settings.passes)
    return PictureScores("score", score, score.cut_at)


def _asked(needed: w.Weights, kind: Literal["vqa", "rating", "parts"], settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.questions import PartQuestions, RatedQuality, VisionLanguage, VqaScore

    if kind == "parts" and not settings.parts:
        raise w.UnavailableError(
            "geneval_vqa needs the parts of the prompts: name evaluation_metadata.jsonl with --geneval, or, for the "
            f"stage evaluate, put it into {settings.weights / GENEVAL}"
        )
    model = VisionLanguage(settings.folder_of(needed), settings.passes)
    if kind == "parts":
        return PartScores(PartQuestions(model, settings.parts))
    if kind == "rating":
        return PictureScores("score", RatedQuality(model), why=NO_ANSWER)
    return PictureScores("score", VqaScore(model))


def _arniqa(settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.quality import Arniqa

    return PictureScores("score", Arniqa(settings.weights, settings.passes))


def _pyiqa(name: str, settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.quality import Pyiqa

    return PictureScores("score", Pyiqa(name, settings.weights, settings.passes))


def _reader(names: tuple[str, ...], least: int, settings: Settings) -> Measure:
    return ShapesReader(names, least)


_READ_DIVERSITY, _READ_QUALITY = (("effective_modes", "coverage", "entropy"), ("valid", "aligned", "residual"))
_COSINE = "1 - mean cosine over pairs, Vendi score, near-duplicates; "

PRESETS = (
    Preset("diversity", "pixels", "RMS difference of pixels, mean over pairs", _pixels, (), True),
    Preset(
        "diversity",
        "dino_v2",
        f"{_COSINE}DINOv2 ViT-B/14, pooler_output",
        partial(_vision, SetDiversity, w.DINO_V2, "pooled"),
        (w.DINO_V2,),
        True,
    ),
    Preset(
        "diversity",
        "dino_v2_patch",
        f"{_COSINE}DINOv2 ViT-B/14, cosine of patches at the same place",
        partial(_vision, SetDiversity, w.DINO_V2, "patches"),
        (w.DINO_V2,),
        True,
    ),
    Preset(
        "diversity",
        "dino_v3",
        f"{_COSINE}DINOv3 ViT-L/16, pooler_output (DP-DMD's DINO)",
        partial(_vision, SetDiversity, w.DINO_V3, "pooled"),
        (w.DINO_V3,),
    ),
    Preset(
        "diversity",
        "dino_v3_patch",
        f"{_COSINE}DINOv3 ViT-L/16, cosine of patches at the same place",
        partial(_vision, SetDiversity, w.DINO_V3, "patches"),
        (w.DINO_V3,),
    ),
    Preset(
        "diversity",
        "clip",
        f"{_COSINE}CLIP ViT-L/14, projected embedding, open_clip",
        partial(_open_clip, w.CLIP_L),
        (w.CLIP_L,),
        True,
    ),
    Preset(
        "diversity",
        "clip_raw_cls",
        f"{_COSINE}CLIP ViT-L/14, class token before norm and projection (DP-DMD's CLIP)",
        partial(_vision, SetDiversity, w.CLIP_L_HF, "raw_cls"),
        (w.CLIP_L_HF,),
    ),
    Preset(
        "diversity",
        "clip_shapes",
        f"{_COSINE}the embedded world's own CLIP, projected embedding, open_clip",
        partial(_open_clip, w.CLIP_SHAPES, side=RESOLUTION),
        (w.CLIP_SHAPES,),
    ),
    Preset(
        "diversity",
        "lpips",
        f"LPIPS 0.1 AlexNet at {_LPIPS_SIDE} px, mean over pairs",
        partial(_lpips, "alex"),
        (w.ALEXNET,),
        True,
    ),
    Preset(
        "diversity",
        "lpips_squeeze",
        f"LPIPS 0.1 SqueezeNet at {_LPIPS_SIDE} px, mean over pairs",
        partial(_lpips, "squeeze"),
        (w.SQUEEZENET,),
    ),
    Preset(
        "diversity",
        "shapes",
        "exact reader of the embedded world, over valid pictures that show the prompt",
        partial(_reader, _READ_DIVERSITY, 2),
    ),
    Preset(
        "quality",
        "arniqa",
        "ARNIQA, KonIQ-10k regressor, 0 to 1",
        _arniqa,
        (w.ARNIQA, w.ARNIQA_KONIQ),
        True,
    ),
    Preset(
        "quality",
        "visualquality_r1",
        "VisualQuality-R1 7B with reasoning, greedy, 1 to 5",
        partial(_asked, w.VISUALQUALITY_R1, "rating"),
        (w.VISUALQUALITY_R1,),
    ),
    Preset("quality", "maniqa_pipal", "pyiqa maniqa-pipal, 20 crops", partial(_pyiqa, "maniqa-pipal"), (w.MANIQA,)),
    Preset("quality", "topiq", "pyiqa topiq_nr", partial(_pyiqa, "topiq_nr"), (w.TOPIQ,)),
    Preset("quality", "clipiqa_plus", "pyiqa clipiqa+", partial(_pyiqa, "clipiqa+"), (w.CLIPIQA_PLUS, w.CLIP_RN50)),
    Preset(
        "quality",
        "shapes",
        "exact reader of the embedded world",
        partial(_reader, _READ_QUALITY, 1),
    ),
    Preset(
        "alignment",
        "clip_score",
        "100 max(cos, 0), CLIP ViT-L/14, open_clip",
        partial(_clip_score, w.CLIP_L),
        (w.CLIP_L,),
        True,
    ),
    Preset(
        "alignment",
        "clip_shapes",
        "100 max(cos, 0), the embedded world's own CLIP, open_clip",
        partial(_clip_score, w.CLIP_SHAPES, side=RESOLUTION),
        (w.CLIP_SHAPES,),
    ),
    Preset(
        "alignment",
        "vqa_score",
        "P(Yes) to VQAScore's question, Qwen2.5-VL 7B",
        partial(_asked, w.QWEN_VL, "vqa"),
        (w.QWEN_VL,),
    ),
    Preset(
        "alignment",
        "geneval_vqa",
        "questions about GenEval's parts to Qwen2.5-VL 7B; not GenEval's detector",
        partial(_asked, w.QWEN_VL, "parts"),
        (w.QWEN_VL,),
    ),
    Preset("preference", "pickscore", "PickScore v1, temperature x cosine", _pick_score, (w.PICKSCORE,), True),
    Preset("preference", "hps_v2_1", "HPSv2.1, cosine, longest side padded", _hps, (w.HPS_V2_1,), True),
    Preset(
        "distribution",
        "inception",
        "FID and KID, Inception 2015-12-05, 2048 features, bilinear without antialias",
        _inception,
        (w.INCEPTION,),
        True,
    ),
    Preset(
        "distribution",
        "dino_v2",
        "precision, recall, density, coverage, k = 5, DINOv2 ViT-B/14, pooler_output",
        partial(_vision, SetFeatures, w.DINO_V2, "pooled"),
        (w.DINO_V2,),
        True,
    ),
)


# What people ask for and cannot have in one environment, with the reason (docs of the packages as of 2026-11).
LEFT_OUT = {
    "image_reward": "its package pins timm 0.6.13 and imports what transformers 5 has dropped",
    "hps_v3": "its package pins transformers 4.45.2",
    "geneval": "needs mmdet 2 and mmcv-full 1; ask for alignment.geneval_vqa, which asks a chat model instead",
    "t2v_metrics": "its package pins torch 2.5.1; alignment.vqa_score has its question and formula",
}


def _plain(name: str) -> str:
    """A name as people write it, without case and marks: ImageReward is image_reward."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def choose(wanted: str) -> list[Preset]:
    """Presets of a list such as `diversity,quality.visualquality_r1`, in the order of PRESETS.

    Raises:
        ValueError: for a name that is not there, with those that are.
    """
    reasons = {_plain(name): reason for name, reason in LEFT_OUT.items()}
    chosen: set[str] = set()
    for name in filter(None, (part.strip() for part in wanted.split(","))):
        found = [p.full_name for p in PRESETS if name == p.full_name or (name == p.axis and p.by_default)]
        left_out = reasons.get(_plain(name.rsplit(".", 1)[-1]))
        if not found and left_out:
            raise ValueError(f"{name} cannot live in this environment: {left_out}")
        if not found:
            raise ValueError(
                f"{name} is no metric: name axes ({', '.join(AXES)}) or metrics "
                f"({', '.join(p.full_name for p in PRESETS)})"
            )
        chosen.update(found)
    return [preset for preset in PRESETS if preset.full_name in chosen]
