"""Forecasters of nodes, sensors or zones of one city or of many. UrbanPG: context prompts and a general backbone."""

from stdist.urbanpg.model import Backbone, BackboneSpec, UrbanPG
from stdist.urbanpg.prompts import Prompts, PromptSpec

__all__ = ["Backbone", "BackboneSpec", "PromptSpec", "Prompts", "UrbanPG"]
