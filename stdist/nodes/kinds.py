"""Kinds of forecasters of nodes, by the name that ``model.kind`` gives them. A model is one file with a
:class:`~stdist.nodes.interface.Forecaster` (or a network inside ``NodeForecaster``) and a :class:`ModelConfig`,
registered in :data:`BACKBONES`. Imports no torch: a configuration is read without it."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from stdist.config import LearnersConfig, Strict
from stdist.nodes.config import EpochsConfig
from stdist.registry import Registry

if TYPE_CHECKING:
    from stdist.nodes.dataset import NodeDataset
    from stdist.nodes.interface import Forecaster
    from stdist.nodes.learners import NodeLearners
    from stdist.training.engine import Engine


class ModelConfig(Strict, ABC):
    """A run's section ``model:``: ``kind`` and the options of that model, and how it is made and trained.

    ``shares_nodes``: its nodes may lie on several learners or pass in blocks. ``batch_normalisation``: it normalises
    with the statistics of a batch, which several learners would not share.
    """

    shares_nodes: ClassVar[bool] = False
    batch_normalisation: ClassVar[bool] = False

    kind: str

    @abstractmethod
    def build(self, dataset: "NodeDataset", seed: int) -> "Forecaster":
        """The untrained model of ``dataset``. Raises InputError where the two do not go together."""

    @abstractmethod
    def load(self, folder: Path) -> "Forecaster":
        """A saved model of this kind, in evaluation mode. Raises InputError where the folder holds none."""

    def on_learner(self, model: "Forecaster", learners: "NodeLearners") -> "Forecaster":
        """The model, or the part of it that this learner trains. Collective."""
        return model

    def make_engine(
        self, model: "Forecaster", settings: EpochsConfig, steps: int, config: LearnersConfig, data_ranks: int
    ) -> "Engine":
        """The engine that trains what :meth:`on_learner` returned, on ``data_ranks`` learners that share the batch."""
        from stdist.training.engine import ParameterGroup
        from stdist.training.engines import make_engine

        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        weights = ParameterGroup(trained, settings.learning_rate, settings.weight_decay)
        return make_engine(config, settings, steps, model, [weights], data_ranks)


BACKBONES: Registry[type[ModelConfig]] = Registry("backbone", "stdist.backbones", package="stdist.nodes.backbones")
"""By ``model.kind``."""
