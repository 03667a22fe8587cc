"""Forecasters of nodes, sensors or zones of one city or of many. UrbanPG: context prompts and a general backbone."""

from stdist.urban.prompts import Prompts, PromptSpec
from stdist.urban.urbanpg import Backbone, BackboneSpec, UrbanPG

__all__ = ["Backbone", "BackboneSpec", "PromptSpec", "Prompts", "UrbanPG"]
