"""A metric with known answers, the presets made of it, and sets of random pictures."""

import math
from functools import partial

import torch

from dpdmd_pipeline.metrics.measures import PictureScores, SetDiversity, SetFeatures
from dpdmd_pipeline.scoring.preset import Preset
from dpdmd_pipeline.scoring.published import DINO_V2
from dpdmd_pipeline.scoring.sets import TensorSet


class Corners:
    """Features of a picture: four of its pixels, all channels; NaN for a white one."""

    def __init__(self, batch_size=1):
        self.batch_size = batch_size

    def __call__(self, images):
        rows = [[value for x in (0, 3) for y in (0, 3) for value in image.getpixel((x, y))] for image in images]
        features = torch.tensor(rows, dtype=torch.float32) / 255
        return features.masked_fill((features == 1).all(1, keepdim=True), math.nan)


def corners(kind, settings):
    return kind(Corners())


def shared_corners(settings):
    """Corner pixels as features that metrics and processes share."""
    return SetDiversity(settings.shared(Corners(), DINO_V2, "corners"))


def brightness(settings):
    return PictureScores(lambda text, images: Corners()(images).mean(1))


DIVERSITY = Preset("diversity", "corners", "corner pixels", partial(corners, SetDiversity))
SHARED = Preset("diversity", "shared", "corner pixels", shared_corners)
FEATURES = Preset("distribution", "dino_v2", "corner pixels, k = 5", partial(corners, SetFeatures))
MOMENTS = Preset("distribution", "inception", "corner pixels", partial(corners, SetFeatures))
QUALITY = Preset("quality", "bright", "mean of corners", brightness)
FITTING = Preset("alignment", "bright", "mean of corners", brightness)
ABSENT = Preset("diversity", "dino_v2", "DINO", partial(corners, SetDiversity), (DINO_V2,))


def make_sets(prompts, pictures, seed, low=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, pictures, 3, 4, 4)
    pixels = torch.randint(low, 255, shape, generator=generator, dtype=torch.uint8)
    return [TensorSet(f"p{number}", f"prompt {number}", images) for number, images in enumerate(pixels)]
