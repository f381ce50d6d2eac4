"""Functions that build the measure of a preset; called with the settings and the preset's weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from dpdmd_pipeline.metrics import alignment, measures, questions
from dpdmd_pipeline.metrics.embedders import Inception, Lpips, OpenClipVision, TransformersVision
from dpdmd_pipeline.metrics.errors import UnavailableError
from dpdmd_pipeline.metrics.measures import Measure
from dpdmd_pipeline.metrics.quality import Arniqa, Pyiqa
from dpdmd_pipeline.scoring.preset import Settings
from dpdmd_pipeline.scoring.weights import Weights

GENEVAL = "geneval"  # folder of evaluation_metadata.jsonl, beside the weights
LPIPS_SIDE = 256
_PROJECTED = "projected"  # output of a CLIP that diversity and alignment share


def vision(measure: Callable[[Any], Measure], tokens: Any, settings: Settings, weights: Weights) -> Measure:
    embed = TransformersVision(settings.folder_of(weights), tokens, settings.passes)
    # Features of all patches would be larger than the picture itself.
    return measure(embed if tokens == "patches" else settings.shared(embed, weights, tokens))


def clip_diversity(settings: Settings, weights: Weights, side: int | None = None) -> Measure:
    embed = OpenClipVision.of(settings.folder_of(weights), settings.passes, side)
    return measures.SetDiversity(settings.shared(embed, weights, _PROJECTED))


def lpips(network: Literal["alex", "squeeze"], settings: Settings, weights: Weights) -> Measure:
    return measures.PairDiversity(Lpips(network, settings.weights, LPIPS_SIDE, settings.passes))


def pixels(settings: Settings) -> Measure:
    return measures.PairDiversity(measures.pixel_distances)


def inception(settings: Settings, weights: Weights) -> Measure:
    return measures.SetFeatures(settings.shared(Inception(settings.file_of(weights), settings.passes), weights, "2048"))


def clip_score(settings: Settings, weights: Weights, side: int | None = None) -> Measure:
    share = partial(settings.shared, weights=weights, output=_PROJECTED)
    return measures.PictureScores(alignment.clip_score(settings.folder_of(weights), settings.passes, side, share))


def pick_score(settings: Settings, weights: Weights) -> Measure:
    return measures.PictureScores(alignment.PickScore(settings.folder_of(weights), settings.passes))


def hps(settings: Settings, weights: Weights) -> Measure:
    return measures.PictureScores(alignment.hps_score("ViT-H-14", settings.file_of(weights), settings.passes))


def vqa_score(settings: Settings, weights: Weights) -> Measure:
    model = questions.VisionLanguage(settings.folder_of(weights), settings.passes)
    return measures.PictureScores(partial(questions.vqa_score, model))


def rated_quality(settings: Settings, weights: Weights) -> Measure:
    model = questions.VisionLanguage(settings.folder_of(weights), settings.passes)
    return measures.PictureScores(partial(questions.rated_quality, model), why=measures.NO_ANSWER)


def part_scores(settings: Settings, weights: Weights) -> Measure:
    if not settings.parts:
        raise UnavailableError(
            "geneval_vqa needs the parts of the prompts: name evaluation_metadata.jsonl with --geneval or, for the "
            f"stage evaluate, put it into {settings.weights / GENEVAL}"
        )
    model = questions.VisionLanguage(settings.folder_of(weights), settings.passes)
    return measures.PartScores(partial(questions.part_answers, model, settings.parts))


def arniqa(settings: Settings, *weights: Weights) -> Measure:
    return measures.PictureScores(Arniqa(settings.weights, settings.passes))


def pyiqa(name: str, settings: Settings, *weights: Weights) -> Measure:
    return measures.PictureScores(Pyiqa(name, settings.weights, settings.passes))


def shapes(names: tuple[str, ...], least: int, settings: Settings) -> Measure:
    return measures.ShapesReader(names, least)
