"""Functions that build the measure of a preset from its weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from dpdmd_pipeline.metrics.errors import UnavailableError
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
from dpdmd_pipeline.scoring import published
from dpdmd_pipeline.scoring.preset import Settings
from dpdmd_pipeline.scoring.weights import Weights

GENEVAL = "geneval"  # folder of evaluation_metadata.jsonl, beside the weights
LPIPS_SIDE = 256
_PROJECTED = "projected"  # output of a CLIP that diversity and alignment share


def vision(measure: Callable[[Any], Measure], weights: Weights, tokens: Any, settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.embedders import TransformersVision

    embed = TransformersVision(settings.folder_of(weights), tokens, settings.passes)
    # Features of all patches would be larger than the picture itself.
    return measure(embed if tokens == "patches" else settings.shared(embed, weights, tokens))


def clip_diversity(weights: Weights, settings: Settings, side: int | None = None) -> Measure:
    from dpdmd_pipeline.metrics.embedders import OpenClipVision

    embed = OpenClipVision.of(settings.folder_of(weights), settings.passes, side)
    return SetDiversity(settings.shared(embed, weights, _PROJECTED))


def lpips(network: Literal["alex", "squeeze"], settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.embedders import Lpips

    return PairDiversity("mean_distance", Lpips(network, settings.weights, LPIPS_SIDE, settings.passes))


def pixels(settings: Settings) -> Measure:
    return PairDiversity("mean_distance", pixel_distances)


def inception(settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.embedders import Inception

    embed = Inception(settings.file_of(published.INCEPTION), settings.passes)
    return SetFeatures(settings.shared(embed, published.INCEPTION, "2048"))


def clip_score(weights: Weights, settings: Settings, side: int | None = None) -> Measure:
    from dpdmd_pipeline.metrics import alignment

    share = partial(settings.shared, weights=weights, output=_PROJECTED)
    score = alignment.clip_score(settings.folder_of(weights), settings.passes, side, share)
    return PictureScores("score", score, score.cut_at)


def pick_score(settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.alignment import PickScore

    score = PickScore(settings.folder_of(published.PICKSCORE), settings.passes)
    return PictureScores("score", score, score.cut_at)


def hps(settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.alignment import hps_score

    score = hps_score("ViT-H-14", settings.file_of(published.HPS_V2_1), settings.passes)
    return PictureScores("score", score, score.cut_at)


def chat_model(weights: Weights, task: Literal["vqa", "rating", "parts"], settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.questions import PartQuestions, RatedQuality, VisionLanguage, VqaScore

    if task == "parts" and not settings.parts:
        raise UnavailableError(
            "geneval_vqa needs the parts of the prompts: name evaluation_metadata.jsonl with --geneval or, for the "
            f"stage evaluate, put it into {settings.weights / GENEVAL}"
        )
    model = VisionLanguage(settings.folder_of(weights), settings.passes)
    if task == "parts":
        return PartScores(PartQuestions(model, settings.parts))
    if task == "rating":
        return PictureScores("score", RatedQuality(model), why=NO_ANSWER)
    return PictureScores("score", VqaScore(model))


def arniqa(settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.quality import Arniqa

    return PictureScores("score", Arniqa(settings.weights, settings.passes))


def pyiqa(name: str, settings: Settings) -> Measure:
    from dpdmd_pipeline.metrics.quality import Pyiqa

    return PictureScores("score", Pyiqa(name, settings.weights, settings.passes))


def shapes(names: tuple[str, ...], least: int, settings: Settings) -> Measure:
    return ShapesReader(names, least)
