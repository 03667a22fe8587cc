"""Which system a run's recipe belongs to. Each of the two has these functions, and is imported when it is asked
for: one brings transformers, the other does not need it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stdist.config import RunConfig, UrbanConfig, VisionLLMConfig
from stdist.training.group import Group
from stdist.training.run_folder import read_run_config


def check(config: RunConfig, group: Group) -> None:
    """Raises InputError for what would stop ``group``, one that may be yet to be started, in training ``config``."""
    if isinstance(config, UrbanConfig):
        from stdist.urban import recipe as urban

        urban.check(config, group)
    else:
        from stdist.vision_llm import recipe as vision_llm

        vision_llm.check(_vision_llm(config), group)


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

    return vision_llm.train(_vision_llm(config), say, report)


def forecast(
    run_dir: Path, store_path: Path, region: str | None, split: str, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Forecasts with a finished run; see the ``forecast`` of the run's system."""
    if isinstance(read_run_config(run_dir), UrbanConfig):
        from stdist.urban import scoring as urban

        return urban.forecast(run_dir, store_path, region, split, out, say)
    from stdist.vision_llm import scoring as vision_llm

    return vision_llm.forecast(run_dir, store_path, region, split, out, say)


def plan(config: RunConfig, device_memory: int | None, device_flops: float) -> Any:
    """What every stage will hold and compute; see the ``plan_run`` of the run's system."""
    if isinstance(config, UrbanConfig):
        from stdist.urban.plan import plan_run as plan_nodes

        return plan_nodes(config, device_memory)
    from stdist.vision_llm.plan import plan_run

    return plan_run(_vision_llm(config), device_memory, device_flops)


def _vision_llm(config: RunConfig) -> VisionLLMConfig:
    assert isinstance(config, VisionLLMConfig)  # there are two kinds
    return config
