"""UrbanPG (Liu and Zhang, "UrbanPG: An Efficient Framework with Personalized Context and General Backbone Interaction
for Urban Spatio-Temporal Learning"): a backbone that knows no city (Eq. 5–7) and prompts that know one (Eq. 3–4).
:mod:`stdist.urbanpg.plain` has the equations as printed.

The learning paradigms are ways of putting the two together:

* from scratch: ``UrbanPG(Backbone(spec), ContextPrompts(spec))``;
* fine-tuning (Eq. 8): ``UrbanPG(backbone.requires_grad_(False), ContextPrompts(spec_of_the_new_city))``;
* continual learning (Eq. 9–10): ``UrbanPG(backbone.requires_grad_(False), prompts.expand(new_nodes))``.
"""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from stdist.errors import InputError
from stdist.evaluation import Embeddings
from stdist.nodes.interface import Forecaster
from stdist.nodes.scaling import CityScaling
from stdist.urbanpg.backbone import Backbone
from stdist.urbanpg.blocks import forward_in_blocks
from stdist.urbanpg.prompts import ContextPrompts

BACKBONE, PROMPTS = "backbone", "prompts"


class UrbanPG(Forecaster):
    """A backbone with the prompts of one scenario, neither of them copied. Raises InputError where their d differ.

    Saved as ``backbone/`` and ``prompts/SCENARIO/``, so that many scenarios share one backbone.
    """

    elsewhere = "fit prompts to it with recipe few-shot"

    def __init__(self, backbone: Backbone, prompts: ContextPrompts) -> None:
        super().__init__()
        if backbone.spec.d != prompts.spec.d:
            raise InputError(
                f"the backbone has d {backbone.spec.d}, prompts {prompts.spec.scenario!r} have {prompts.spec.d}; "
                "make prompts of the backbone's d"
            )
        self.backbone, self.prompts = backbone, prompts

    @property
    def scaling(self) -> CityScaling:
        return self.prompts

    @property
    def nodes(self) -> int:
        return self.prompts.spec.nodes

    def forward(self, history: Tensor, slot: Tensor, weekday: Tensor, *, noise_seed: int | None = None) -> Tensor:
        """See :class:`Forecaster`; ``noise_seed`` is of the random perturbation (Eq. 4)."""
        self.check(history, slot, weekday)
        backbone, prompts, inputs = self.backbone, self.prompts, (history, slot, weekday)
        noise_seed = self.step_seed(noise_seed)
        if self.block_nodes is not None:
            return forward_in_blocks(backbone, prompts, self.all_reduce, *inputs, self.block_nodes, noise_seed)
        x, temporal, spatial = prompts.normalise(history), prompts.temporal(slot, weekday), prompts.node_embeddings()
        if spatial is not None:
            spatial = prompts.perturb(spatial, 0, noise_seed)
        qkv = backbone.qkv_maps() if backbone.spec.stca else None
        sums = None if qkv is None else self.all_reduce(backbone.attention_sums(x, spatial, qkv))
        maps = backbone.node_maps(sums, temporal, qkv)
        return prompts.restore(backbone.node_forecasts(x, maps, spatial))

    def all_reduce(self, sums: Float[Tensor, "B d+1 S+1"]) -> Float[Tensor, "B d+1 S+1"]:
        """Sums over all of the city's nodes from those over this process's nodes: itself, which has all of them."""
        return sums

    def step_seed(self, noise_seed: int | None) -> int | None:
        """The seed of this step's perturbation (Eq. 4); None in evaluation mode: there is none."""
        if not self.training:
            return None
        return int(torch.randint(2**62, ())) if noise_seed is None else noise_seed

    def check(self, history: Tensor, slot: Tensor, weekday: Tensor) -> None:
        remedy = "expand them for nodes that joined, or fit new prompts on the frozen backbone"
        frames, nodes = self.backbone.spec.history, self.prompts.spec.nodes
        self.prompts.check_batch(history, slot, weekday, frames, nodes, remedy, self.prompts.first_node)

    def node_parameters(self) -> list[nn.Parameter]:
        return list(self.prompts.node_rows)

    def part(self, nodes: slice) -> "UrbanPG":
        part = UrbanPG(self.backbone, self.prompts.part(nodes.start, nodes.stop))
        part.block_nodes = self.block_nodes
        return part

    def embeddings(self, node_means: Float[np.ndarray, " N"], seed: int) -> Embeddings:
        from stdist.urbanpg.embeddings import project_embeddings  # scikit-learn takes a second to import

        return project_embeddings(self.prompts, node_means, seed)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``backbone/`` and ``prompts/SCENARIO/`` in ``folder``; other scenarios there stay."""
        self.backbone.save_pretrained(Path(folder) / BACKBONE)
        self.prompts.save_pretrained(Path(folder) / PROMPTS / self.prompts.spec.scenario)

    @classmethod
    def from_pretrained(cls, folder: str | Path, scenario: str | None = None) -> Self:
        """A saved backbone with the prompts of ``scenario``, of the one there is by default, in evaluation mode. Raises
        InputError where either is not there."""
        prompts = Path(folder) / PROMPTS
        scenarios = sorted(path.name for path in prompts.glob("*/"))
        if scenario is None and len(scenarios) == 1:
            scenario = scenarios[0]
        if scenario not in scenarios:
            raise InputError(f"{folder} has no prompts {scenario!r}; it has: {', '.join(scenarios) or 'none'}")
        backbone = Backbone.from_pretrained(Path(folder) / BACKBONE)
        return cls(backbone, ContextPrompts.from_pretrained(prompts / scenario)).eval()
