"""Keys that every run's YAML has, and how a YAML is read; each recipe's own keys are in its folder's ``config.py``."""

from stdist.config.base import DataConfig, LearnersConfig, OptimizerConfig, RunConfig, Strict
from stdist.config.reading import dump_config, read_tree, validated

__all__ = [
    "DataConfig",
    "LearnersConfig",
    "OptimizerConfig",
    "RunConfig",
    "Strict",
    "dump_config",
    "read_tree",
    "validated",
]
