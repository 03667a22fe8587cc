"""The tree of the recipes for nodes: ``urbanpg-train``, ``few-shot`` and ``continual``."""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from stdist.config.base import RunConfig, SplitConfig, Strict
from stdist.nodes.config import EpochsConfig, NodesConfig, PeriodConfig

URBANPG_ONLY = ("temporal", "spatial", "p", "q", "stca", "stca_normalizer", "residual")


class ModelConfig(Strict):
    """``kind``: UrbanPG, or a baseline trained in the same harness. ``d``: UrbanPG's hidden width, 256 where absent; a
    backbone that is given has its own. Of a baseline, whose sizes are the authors' where it is absent: of STID the
    width of each of its four embeddings (32; its hidden layers are four times as wide), of Graph WaveNet the residual
    channels (32), of STGCN the channels of temporal convolutions (64), and all other widths in proportion.

    UrbanPG's ablations: ``temporal`` or ``spatial`` false leave out these contexts (w/o TC, w/o SC), ``p: 0`` the
    random perturbation of Eq. 4 (w/o RPR), ``stca: false`` Eq. 6 (w/o STCA). ``stca_normalizer``: ``none`` is the
    paper, ``sum`` makes the attention's weights a mean, so that its scale does not grow with the nodes. ``residual``:
    what attention and Eq. 7 make is added to what went in; false takes its place, which is Eq. 5–7 as printed.
    """

    kind: Literal["urbanpg", "stid", "graph_wavenet", "stgcn"] = "urbanpg"
    d: int | None = Field(None, ge=1)
    temporal: bool = True
    spatial: bool = True
    p: float = Field(0.1, ge=0, lt=1)
    q: float = Field(0.5, ge=0, lt=1)
    stca: bool = True
    stca_normalizer: Literal["none", "sum"] = "none"
    residual: bool = True

    @model_validator(mode="after")
    def _ablations_are_of_urbanpg(self) -> "ModelConfig":
        changed = [key for key in URBANPG_ONLY if getattr(self, key) != type(self).model_fields[key].default]
        if self.kind != "urbanpg" and changed:
            raise ValueError(f"{changed[0]} is UrbanPG's, and kind is {self.kind}")
        return self


class FewShotConfig(Strict):
    """``backbone``: the run that trained it, or a saved ``UrbanPG`` or ``Backbone``; it is frozen (Eq. 8)."""

    backbone: Path

    @field_validator("backbone")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().absolute()


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
    """A run on a store of nodes. ``few_shot`` and ``continual`` belong to the recipes of these names."""

    recipe: Literal["urbanpg-train", "few-shot", "continual"]
    model: ModelConfig = ModelConfig()
    training: EpochsConfig = EpochsConfig()
    nodes: NodesConfig = NodesConfig()
    few_shot: FewShotConfig | None = None
    continual: ContinualConfig | None = None

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
        if self.model.kind != "urbanpg" and (self.nodes.ranks > 1 or self.nodes.block_nodes):
            raise ValueError(f"nodes.ranks and nodes.block_nodes need UrbanPG, and model.kind is {self.model.kind}")
        if self.continual and (self.data.split or self.data.region or self.data.fraction < 1):
            raise ValueError("data.split, data.region and data.fraction come from continual.periods in this recipe")
        return self
