"""The stable door to UrbanPG from Python, wherever its room stands."""

from stdist.urbanpg.model import UrbanPG

__all__ = ["UrbanPG"]
