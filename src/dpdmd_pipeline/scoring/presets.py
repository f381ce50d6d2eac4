"""All metrics by name, each with the one protocol of its numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from dpdmd_pipeline.metrics.measures import Measure, SetDiversity, SetFeatures
from dpdmd_pipeline.metrics.shapes import DIVERSITY, QUALITY
from dpdmd_pipeline.scoring import builders as b
from dpdmd_pipeline.scoring import published as w
from dpdmd_pipeline.scoring.preset import AXES, Preset
from dpdmd_pipeline.scoring.weights import Weights
from dpdmd_pipeline.shapes.world import RESOLUTION

_POOLED, _PATCHES, _RAW_CLS = (partial(b.vision, SetDiversity, tokens) for tokens in ("pooled", "patches", "raw_cls"))


def _cosine(name: str, space: str, build: Callable[..., Measure], weights: Weights, by_default: bool = False) -> Preset:
    """Diversity from cosines in the feature space of a network."""
    protocol = f"1 - mean cosine over pairs, Vendi score, near-duplicates; {space}"
    return Preset("diversity", name, protocol, build, (weights,), by_default)


def _lpips(name: str, title: str, network: str, weights: Weights, by_default: bool = False) -> Preset:
    protocol = f"LPIPS 0.1 {title} at {b.LPIPS_SIDE} px, mean over pairs"
    return Preset("diversity", name, protocol, partial(b.lpips, network), (weights,), by_default)


_diversity, _quality, _alignment = (partial(Preset, axis) for axis in ("diversity", "quality", "alignment"))

PRESETS = (
    _diversity("pixels", "RMS difference of pixels, mean over pairs", b.pixels, (), True),
    _cosine("dino_v2", "DINOv2 ViT-B/14, pooler_output", _POOLED, w.DINO_V2, True),
    _cosine("dino_v2_patch", "DINOv2 ViT-B/14, cosine of patches at the same place", _PATCHES, w.DINO_V2, True),
    _cosine("dino_v3", "DINOv3 ViT-L/16, pooler_output (DP-DMD's DINO)", _POOLED, w.DINO_V3),
    _cosine("dino_v3_patch", "DINOv3 ViT-L/16, cosine of patches at the same place", _PATCHES, w.DINO_V3),
    _cosine("clip", "CLIP ViT-L/14, projected embedding, open_clip", b.clip_diversity, w.CLIP_L, True),
    _cosine(
        "clip_raw_cls", "CLIP ViT-L/14, class token before norm and projection (DP-DMD's CLIP)", _RAW_CLS, w.CLIP_L_HF
    ),
    _cosine(
        "clip_shapes",
        "the embedded world's own CLIP, projected embedding, open_clip",
        partial(b.clip_diversity, side=RESOLUTION),
        w.CLIP_SHAPES,
    ),
    _lpips("lpips", "AlexNet", "alex", w.ALEXNET, True),
    _lpips("lpips_squeeze", "SqueezeNet", "squeeze", w.SQUEEZENET),
    _diversity(
        "shapes",
        "exact reader of the embedded world, over valid pictures that show the prompt",
        partial(b.shapes, DIVERSITY, 2),
    ),
    _quality("arniqa", "ARNIQA, KonIQ-10k regressor, 0 to 1", b.arniqa, (w.ARNIQA, w.ARNIQA_KONIQ), True),
    _quality(
        "visualquality_r1", "VisualQuality-R1 7B with reasoning, greedy, 1 to 5", b.rated_quality, (w.VISUALQUALITY_R1,)
    ),
    _quality("maniqa_pipal", "pyiqa maniqa-pipal, 20 crops", partial(b.pyiqa, "maniqa-pipal"), (w.MANIQA,)),
    _quality("topiq", "pyiqa topiq_nr", partial(b.pyiqa, "topiq_nr"), (w.TOPIQ,)),
    _quality("clipiqa_plus", "pyiqa clipiqa+", partial(b.pyiqa, "clipiqa+"), (w.CLIPIQA_PLUS, w.CLIP_RN50)),
    _quality("shapes", "exact reader of the embedded world", partial(b.shapes, QUALITY, 1)),
    _alignment("clip_score", "100 max(cos, 0), CLIP ViT-L/14, open_clip", b.clip_score, (w.CLIP_L,), True),
    _alignment(
        "clip_shapes",
        "100 max(cos, 0), the embedded world's own CLIP, open_clip",
        partial(b.clip_score, side=RESOLUTION),
        (w.CLIP_SHAPES,),
    ),
    _alignment("vqa_score", "P(Yes) to VQAScore's question, Qwen2.5-VL 7B", b.vqa_score, (w.QWEN_VL,)),
    _alignment(
        "geneval_vqa",
        "questions about GenEval's parts to Qwen2.5-VL 7B; not GenEval's detector",
        b.part_scores,
        (w.QWEN_VL,),
    ),
    Preset("preference", "pickscore", "PickScore v1, temperature x cosine", b.pick_score, (w.PICKSCORE,), True),
    Preset("preference", "hps_v2_1", "HPSv2.1, cosine, longest side padded", b.hps, (w.HPS_V2_1,), True),
    Preset(
        "distribution",
        "inception",
        "FID and KID, Inception 2015-12-05, 2048 features, bilinear without antialias",
        b.inception,
        (w.INCEPTION,),
        True,
    ),
    Preset(
        "distribution",
        "dino_v2",
        "precision, recall, density, coverage, k = 5, DINOv2 ViT-B/14, pooler_output",
        partial(b.vision, SetFeatures, "pooled"),
        (w.DINO_V2,),
        True,
    ),
)

# Metrics that need an environment of their own, with the reason (from the packages' documentation in 2026-11).
LEFT_OUT = {
    "image_reward": "its package pins timm 0.6.13 and imports names that transformers 5 has removed",
    "hps_v3": "its package pins transformers 4.45.2",
    "geneval": "needs mmdet 2 and mmcv-full 1; use alignment.geneval_vqa, which asks a chat model instead",
    "t2v_metrics": "its package pins torch 2.5.1; use alignment.vqa_score, which has its question and formula",
}


def choose(names: str) -> list[Preset]:
    """Presets of a list such as `diversity,quality.visualquality_r1`, in the order of PRESETS."""
    chosen: set[str] = set()
    for name in filter(None, (part.strip() for part in names.split(","))):
        matches = [p.full_name for p in PRESETS if name == p.full_name or (name == p.axis and p.by_default)]
        if not matches:
            raise ValueError(_why_not(name))
        chosen.update(matches)
    return [preset for preset in PRESETS if preset.full_name in chosen]


def _why_not(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", name.rsplit(".", 1)[-1].lower())  # ImageReward equals image_reward
    for left_out, reason in LEFT_OUT.items():
        if left_out.replace("_", "") == plain:
            return f"{name} does not work in this environment: {reason}"
    metrics = ", ".join(preset.full_name for preset in PRESETS)
    return f"unknown metric {name}: name axes ({', '.join(AXES)}) or metrics ({metrics})"
