"""Which system a run's recipe belongs to. Each of the two has these three functions, and is imported when it is asked
for: one brings transformers, the other does not need it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stdist.config import RunConfig, UrbanConfig, VisionLLMConfig
from stdist.errors import InputError
from stdist.training.group import Group
from stdist.training.run_folder import read_run_config


def check(config: RunConfig, group: Group) -> None:
    """Raises InputError for what would stop ``group``, one that may be yet to be started, in training ``config``."""
    if isinstance(config, UrbanConfig):
        from stdist.urban import recipe as urban

        urban.check(config, group)
    else:
        from stdist.vision_llm import recipe as vision_llm

        vision_llm.check(as_vision_llm(config), group)


def train(
    config: RunConfig,
    say: Callable[[str], None],
    report: Callable[[dict[str, float]], None] = lambda scalars: None,
) -> dict[str, Any]:
    """Runs or resumes everything ``config`` names; see the recipe's own ``train``."""
    if isinstance(config, UrbanConfig):
        from stdist.urban import recipe as urban

        return urban.train(config, say, report)
    from stdist.vision_llm import recipe as vision_llm

    return vision_llm.train(as_vision_llm(config), say, report)


def forecast(
    run_dir: Path, store_path: Path, region: str | None, split: str, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Forecasts with a finished run; see the ``forecast`` of the run's system."""
    if isinstance(read_run_config(run_dir), UrbanConfig):
        from stdist.urban import scoring as urban

        return urban.forecast(run_dir, store_path, region, split, out, say)
    from stdist.vision_llm import scoring as vision_llm

    return vision_llm.forecast(run_dir, store_path, region, split, out, say)


def as_vision_llm(config: RunConfig) -> VisionLLMConfig:
    """``config`` where it is of this system; raises InputError, for what only this one can do."""
    if not isinstance(config, VisionLLMConfig):
        raise InputError(f"recipe {config.recipe} has no such command yet; recipe vision-llm has")
    return config
