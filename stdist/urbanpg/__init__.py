"""UrbanPG: context prompts of a city, and a backbone that all cities share."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stdist.urbanpg.backbone import Backbone, BackboneSpec
    from stdist.urbanpg.model import UrbanPG
    from stdist.urbanpg.prompts import ContextPrompts, PromptSpec

__all__ = ["Backbone", "BackboneSpec", "ContextPrompts", "PromptSpec", "UrbanPG"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: a configuration is read without torch."""
    for home in ("backbone", "prompts", "model") if name in __all__ else ():
        if hasattr(module := import_module(f"{__name__}.{home}"), name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
