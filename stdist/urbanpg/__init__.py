"""UrbanPG: context prompts of a city, and a backbone that all cities share."""

from stdist.urbanpg.backbone import Backbone, BackboneSpec
from stdist.urbanpg.model import UrbanPG
from stdist.urbanpg.prompts import ContextPrompts, PromptSpec

__all__ = ["Backbone", "BackboneSpec", "ContextPrompts", "PromptSpec", "UrbanPG"]
