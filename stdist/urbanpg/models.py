"""The models that a configuration names, untrained: UrbanPG, on a given backbone or its own, and the baselines."""

import re
from typing import Any

import torch

from stdist.errors import InputError
from stdist.nodes.backbones import GraphWaveNetSpec, NodeForecaster, STGCNSpec, STIDSpec, build
from stdist.nodes.backbones.interface import ForecasterSpec
from stdist.nodes.task import Task
from stdist.urbanpg.config import ModelConfig
from stdist.urbanpg.model import Backbone, BackboneSpec, UrbanPG
from stdist.urbanpg.prompts import Prompts, PromptSpec


def new_urbanpg(config: ModelConfig, task: Task, seed: int) -> UrbanPG:
    """Backbone and prompts as they start."""
    torch.manual_seed(seed)
    windows = task.train
    spec = BackboneSpec(
        history=windows.S,
        horizon=windows.K,
        d=config.d or BackboneSpec.model_fields["d"].default,
        stca=config.stca,
        stca_normalizer=config.stca_normalizer,
        residual=config.residual,
    )
    return UrbanPG(Backbone(spec), new_prompts(config, task, spec.d))


def new_prompts(config: ModelConfig, task: Task, d: int) -> Prompts:
    """For the nodes of ``task``, with the mean and standard deviation of its training span."""
    spec = PromptSpec(
        scenario=re.sub(r"[^\w.-]+", "-", task.store.city).strip("-.") or "city",
        periods=task.nodes.shape,
        cadence=task.cadence,
        d=d,
        weekdays=task.holds_weeks,
        temporal=config.temporal,
        spatial=config.spatial,
        p=config.p,
        q=config.q,
    )
    return Prompts(spec, task.statistics.mean, task.statistics.std)


def prompts_on(backbone: Backbone, config: ModelConfig, task: Task, seed: int) -> UrbanPG:
    """New prompts on a backbone that is frozen here (Eq. 8). Raises InputError where it is of another d, S or K, or
    has its attention otherwise than ``config``."""
    torch.manual_seed(seed)
    spec, windows = backbone.spec, task.train
    wanted = {
        "model.d": (config.d, spec.d),
        "data.history": (windows.S, spec.history),
        "data.horizon": (windows.K, spec.horizon),
        "model.stca": (config.stca, spec.stca),
        "model.stca_normalizer": (config.stca_normalizer, spec.stca_normalizer),
        "model.residual": (config.residual, spec.residual),
    }
    for key, (here, there) in wanted.items():
        if here is not None and here != there:
            raise InputError(f"{key} is {here} and the backbone's is {there}; set it to that, or give another backbone")
    return UrbanPG(backbone.requires_grad_(False), new_prompts(config, task, spec.d))


def new_baseline(config: ModelConfig, task: Task, seed: int) -> NodeForecaster:
    """On the store's graph where the method takes one. Raises InputError where it needs one and there is none."""
    torch.manual_seed(seed)
    graph = task.store.adjacency
    if graph is not None:
        graph = graph[task.nodes.slices[0], task.nodes.slices[0]]
    return build(_spec(config, task), task.statistics.mean, task.statistics.std, graph)


def _spec(config: ModelConfig, task: Task) -> ForecasterSpec:
    """The authors' sizes; another ``d`` scales all widths alike."""
    windows, d = task.train, config.d
    sizes: dict[str, Any] = {"history": windows.S, "horizon": windows.K, "cadence": task.cadence}
    sizes |= {"weekdays": task.holds_weeks, "nodes": task.nodes.shape[0]}
    if config.kind == "stid":
        return STIDSpec(**sizes, **({"d": d} if d else {}))
    if config.kind == "stgcn":
        return STGCNSpec(**sizes, **({"channels": d, "graph_channels": max(1, d // 4)} if d else {}))
    widths = (
        {"residual_channels": d, "dilation_channels": d, "skip_channels": 8 * d, "end_channels": 16 * d} if d else {}
    )
    return GraphWaveNetSpec(**sizes, **widths)
