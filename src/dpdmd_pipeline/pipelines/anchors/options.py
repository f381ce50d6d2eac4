"""Options of the anchors stage; training reads them too, to check a cache against them."""

from dpdmd_pipeline.training.recipe import AnchorLevel, AnchorRecipe

AnchorsOptions = AnchorRecipe

__all__ = ["AnchorLevel", "AnchorsOptions"]
