"""Every key of a run's YAML: a pydantic tree for each kind of recipe, and how it is read."""

from stdist.config.base import DataConfig, LearnersConfig, OptimizerConfig, RunConfig
from stdist.config.reading import dump_config, load_config, parse_config
from stdist.config.urban import ContinualConfig, EpochsConfig, ModelConfig, PeriodConfig, UrbanConfig
from stdist.config.vision_llm import (
    AlignmentConfig,
    ForecastConfig,
    ForecastStageConfig,
    FramesConfig,
    GRPOConfig,
    NumeralsConfig,
    PolicyConfig,
    SFTConfig,
    StageConfig,
    StageName,
    Trainable,
    VisionLLMConfig,
)

__all__ = [
    "AlignmentConfig",
    "ContinualConfig",
    "DataConfig",
    "EpochsConfig",
    "ForecastConfig",
    "ForecastStageConfig",
    "FramesConfig",
    "GRPOConfig",
    "LearnersConfig",
    "ModelConfig",
    "NumeralsConfig",
    "OptimizerConfig",
    "PeriodConfig",
    "PolicyConfig",
    "RunConfig",
    "SFTConfig",
    "StageConfig",
    "StageName",
    "Trainable",
    "UrbanConfig",
    "VisionLLMConfig",
    "dump_config",
    "load_config",
    "parse_config",
]
