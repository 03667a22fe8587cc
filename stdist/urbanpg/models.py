"""UrbanPG in a run's ``model:``: its options, the untrained model, and each learner's share of it. Its network is
imported when it is built: a configuration is read without torch."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stdist.config import LearnersConfig
from stdist.errors import InputError
from stdist.nodes.config import EpochsConfig
from stdist.nodes.kinds import BACKBONES, ModelConfig

if TYPE_CHECKING:
    from stdist.nodes.dataset import NodeDataset
    from stdist.nodes.interface import Forecaster
    from stdist.nodes.learners import NodeLearners
    from stdist.training.engine import Engine
    from stdist.urbanpg.backbone import Backbone
    from stdist.urbanpg.model import UrbanPG
    from stdist.urbanpg.prompts import ContextPrompts


@BACKBONES.register("urbanpg")
class UrbanPGModelConfig(ModelConfig):
    """``d``: hidden width, 256 where absent; a backbone that is given has its own.

    Ablations: ``temporal`` or ``spatial`` false leave out these contexts (w/o TC, w/o SC), ``p: 0`` the random
    perturbation of Eq. 4 (w/o RPR), ``stca: false`` Eq. 6 (w/o STCA). ``stca_normalizer``: ``none`` is the paper,
    ``sum`` makes the attention's weights a mean, so that its scale does not grow with the nodes. ``residual``: the
    result of attention and Eq. 7 is added to what went in; false takes its place, which is Eq. 5–7 as printed.
    """

    shares_nodes = True
    kind: Literal["urbanpg"] = "urbanpg"
    d: int | None = Field(None, ge=1)
    temporal: bool = True
    spatial: bool = True
    p: float = Field(0.1, ge=0, lt=1)
    q: float = Field(0.5, ge=0, lt=1)
    stca: bool = True
    stca_normalizer: Literal["none", "sum"] = "none"
    residual: bool = True

    def build(self, dataset: "NodeDataset", seed: int) -> "UrbanPG":
        import torch

        from stdist.urbanpg.backbone import Backbone, BackboneSpec
        from stdist.urbanpg.model import UrbanPG

        torch.manual_seed(seed)
        d = self.d or BackboneSpec.model_fields["d"].default
        attention = self.model_dump(include={"stca", "stca_normalizer", "residual"})
        spec = BackboneSpec(history=dataset.train.S, horizon=dataset.train.K, d=d, **attention)
        return UrbanPG(Backbone(spec), self._prompts(dataset, spec.d))

    def prompts_on(self, backbone: "Backbone", dataset: "NodeDataset", seed: int) -> "UrbanPG":
        """New prompts on ``backbone``, which this freezes (Eq. 8). Raises InputError where it is of another d, S or K,
        or has its attention otherwise than these options say."""
        import torch

        from stdist.urbanpg.model import UrbanPG

        torch.manual_seed(seed)
        spec, windows = backbone.spec, dataset.train
        settings = {
            "model.d": (self.d, spec.d),
            "data.history": (windows.S, spec.history),
            "data.horizon": (windows.K, spec.horizon),
            "model.stca": (self.stca, spec.stca),
            "model.stca_normalizer": (self.stca_normalizer, spec.stca_normalizer),
            "model.residual": (self.residual, spec.residual),
        }
        for key, (mine, its) in settings.items():
            if mine is not None and mine != its:
                raise InputError(
                    f"{key} is {mine} and the backbone's is {its}; set it to that, or give another backbone"
                )
        return UrbanPG(backbone.requires_grad_(False), self._prompts(dataset, spec.d))

    def _prompts(self, dataset: "NodeDataset", d: int) -> "ContextPrompts":
        """For the nodes of ``dataset``, with the mean and standard deviation of its training span."""
        from stdist.urbanpg.prompts import ContextPrompts, PromptSpec

        spec = PromptSpec(
            scenario=re.sub(r"[^\w.-]+", "-", dataset.store.city).strip("-.") or "city",
            periods=(len(dataset.nodes),),
            cadence=dataset.cadence,
            d=d,
            weekdays=dataset.holds_weeks,
            **self.model_dump(include={"temporal", "spatial", "p", "q"}),
        )
        return ContextPrompts(spec, dataset.statistics.mean, dataset.statistics.std)

    def load(self, folder: Path) -> "UrbanPG":
        from stdist.urbanpg.model import UrbanPG

        return UrbanPG.from_pretrained(folder)

    def on_learner(self, model: "Forecaster", learners: "NodeLearners") -> "Forecaster":
        if learners.node_ranks == 1:
            return model
        from stdist.urbanpg.model import UrbanPG
        from stdist.urbanpg.node_parallel import NodeParallel

        assert isinstance(model, UrbanPG)
        parallel = NodeParallel(model.backbone, model.prompts, learners)
        parallel.block_nodes = model.block_nodes
        return parallel

    def make_engine(
        self, model: "Forecaster", settings: EpochsConfig, steps: int, config: LearnersConfig, data_ranks: int
    ) -> "Engine":
        from stdist.training.deepspeed_json import deepspeed_json
        from stdist.training.engine import ParameterGroup, cosine_schedule
        from stdist.urbanpg.node_parallel import NodeParallel

        if not isinstance(model, NodeParallel):
            return super().make_engine(model, settings, steps, config, data_ranks)
        from stdist.urbanpg.node_engine import NodeEngine  # imports DeepSpeed, which is not installed everywhere

        weights = ParameterGroup(model.trained_parameters(), settings.learning_rate, settings.weight_decay)
        configuration = deepspeed_json(config, settings.max_grad_norm, False, data_ranks)
        return NodeEngine(model, [weights], cosine_schedule(settings.warmup_steps, steps), configuration)
