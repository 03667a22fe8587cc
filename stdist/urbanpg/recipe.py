"""Forecasters of nodes as recipes, in UrbanPG's three paradigms: pre-training (or training from scratch), few-shot
(Eq. 8) and continual learning (Eq. 9–10). Baselines train in the same harness. What opens, trains and plans a run is
imported when it is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING

from stdist.runs.recipes import Recipe
from stdist.urbanpg.config import UrbanConfig

if TYPE_CHECKING:
    from stdist.nodes.dataset import NodeDataset
    from stdist.nodes.predictor import NodesPredictor
    from stdist.runs.devices import Device
    from stdist.runs.plan import RunPlan
    from stdist.training.process_group import ProcessGroup
    from stdist.urbanpg.run import NodesRun


class UrbanPGRecipe(Recipe[UrbanConfig]):
    """``recipe: urbanpg-train``, ``few-shot`` and ``continual``."""

    Config = UrbanConfig

    def stages(self, config: UrbanConfig) -> tuple[str, ...]:
        from stdist.urbanpg.checkpoints import stage_names

        return stage_names(config)

    def check(self, config: UrbanConfig, group: "ProcessGroup") -> "list[NodeDataset]":
        from stdist.urbanpg.opening import check

        return check(config, group)

    def open(self, config: UrbanConfig, group: "ProcessGroup") -> "NodesRun":
        from stdist.urbanpg.opening import open_run
        from stdist.urbanpg.run import NodesRun

        return NodesRun(config, *open_run(config, group))

    def load(self, config: UrbanConfig, checkpoint: Path) -> "NodesPredictor":
        from stdist.nodes.checkpoints import load_fitted
        from stdist.urbanpg.run import learner_device, nodes_predictor

        model = config.model.load(checkpoint)
        model.block_nodes = config.nodes.block_nodes
        return nodes_predictor(config, model.to(learner_device()), load_fitted(checkpoint) or ())

    def plan(self, config: UrbanConfig, device: "Device") -> "RunPlan":
        from stdist.urbanpg.plan import plan_run

        return plan_run(config, device)
