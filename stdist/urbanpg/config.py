"""The tree of the recipes for nodes: ``urbanpg-train``, ``few-shot`` and ``continual``."""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializeAsAny, create_model, field_validator, model_validator

from stdist.config.base import AbsolutePath, RunConfig, SplitConfig, Strict
from stdist.errors import InputError
from stdist.nodes.config import EpochsConfig, NodesConfig, PeriodConfig
from stdist.nodes.kinds import BACKBONES, ModelConfig
from stdist.urbanpg.models import UrbanPGModelConfig


class FewShotConfig(Strict):
    """``backbone``: the run that trained it, or a saved ``UrbanPG`` or ``Backbone``; it is frozen (Eq. 8)."""

    backbone: AbsolutePath


class ContinualConfig(Strict):
    """Periods in order. From the second one on the backbone (Eq. 10) and the rows of nodes that were there before
    are frozen, unless ``train_backbone`` or ``train_old_rows``."""

    periods: tuple[PeriodConfig, ...] = Field(min_length=2)
    train_backbone: bool = False
    train_old_rows: bool = False

    @field_validator("periods")
    @classmethod
    def _in_order(cls, periods: tuple[PeriodConfig, ...]) -> tuple[PeriodConfig, ...]:
        for number, (before, after) in enumerate(pairwise(periods), 2):
            if after.nodes < before.nodes:
                raise ValueError(f"period {number} has {after.nodes} nodes, the one before {before.nodes}; none may go")
            if after.train[0] <= before.train[0]:
                raise ValueError(f"period {number} does not begin after the one before")
        return periods


class UrbanConfig(RunConfig):
    """A run on nodes, or on a grid's cells as nodes. ``model.kind`` names a backbone of ``BACKBONES`` and the other
    keys of ``model`` are its own; ``few_shot`` and ``continual`` belong to the recipes of these names."""

    recipe: Literal["urbanpg-train", "few-shot", "continual"]
    model: SerializeAsAny[ModelConfig] = UrbanPGModelConfig()
    training: EpochsConfig = EpochsConfig()
    nodes: NodesConfig = NodesConfig()
    few_shot: FewShotConfig | None = None
    continual: ContinualConfig | None = None

    @classmethod
    def of_tree(cls, tree: dict[str, Any]) -> type[Self]:
        """This tree with ``model`` of its kind."""
        model = tree.get("model")
        name = str(model.get("kind", "urbanpg")) if isinstance(model, dict) else "urbanpg"
        if name not in BACKBONES:
            raise InputError(f"model.kind {name!r} is none; choose one of {', '.join(sorted(BACKBONES))}")
        kind = BACKBONES[name]
        return create_model(cls.__name__, __base__=cls, model=(kind, kind(kind=name)))

    @field_validator("model", mode="before")
    @classmethod
    def _options_of_the_kind(cls, model: Any) -> Any:
        """Runs of other kinds used to note UrbanPG's options too, at their defaults."""
        kind, urbanpg = cls.model_fields["model"].annotation, UrbanPGModelConfig.model_fields
        if not isinstance(model, dict) or kind is None:
            return model
        foreign = {key for key in model if key in urbanpg and key not in kind.model_fields}
        for key in urbanpg:
            if key in foreign and model[key] != urbanpg[key].default:
                raise ValueError(f"{key} is UrbanPG's, and kind is {model['kind']}")
        return {key: value for key, value in model.items() if key not in foreign}

    @model_validator(mode="before")
    @classmethod
    def _keys_of_the_recipe(cls, tree: Any) -> Any:
        if isinstance(tree, dict):
            for recipe, key in (("few-shot", "few_shot"), ("continual", "continual")):
                if (tree.get(key) is not None) != (tree.get("recipe") == recipe):
                    raise ValueError(f"recipe {recipe} and the key {key} go together, and recipe is {tree['recipe']}")
        return tree

    @property
    def last_split(self) -> SplitConfig | None:
        if not self.continual:
            return self.data.split
        last = self.continual.periods[-1]
        return SplitConfig(train=last.train, validation=last.validation, test=last.test)

    def shared_paths(self, root: Path) -> dict[str, Path]:
        more = {"few_shot.backbone": self.few_shot.backbone} if self.few_shot else {}
        return super().shared_paths(root) | more

    @model_validator(mode="after")
    def _what_goes_together(self) -> "UrbanConfig":
        if self.recipe != "urbanpg-train" and self.model.kind != "urbanpg":
            raise ValueError(f"recipe {self.recipe} is UrbanPG's, and model.kind is {self.model.kind}")
        if not self.model.shares_nodes and (self.nodes.ranks > 1 or self.nodes.block_nodes):
            raise ValueError(f"nodes.ranks and nodes.block_nodes need UrbanPG, and model.kind is {self.model.kind}")
        if self.continual and (self.data.split or self.data.region or self.data.fraction < 1):
            raise ValueError("data.split, data.region and data.fraction come from continual.periods in this recipe")
        return self
