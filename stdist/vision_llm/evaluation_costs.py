"""Hours that a run takes on paper: its stages' steps, their evaluations, and the forecast of its test days."""

from functools import cache

import torch

from stdist.data import DaySpan
from stdist.runs.devices import Device
from stdist.runs.meter import metered
from stdist.runs.plan import Hours, StagePlan
from stdist.training.inference import inference
from stdist.vision_llm.config import AlignmentConfig, ForecastStageConfig, GRPOConfig, VisionLLMConfig
from stdist.vision_llm.dataset import open_dataset, stage_config
from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.policy.spec import PolicySpec
from stdist.vision_llm.rollout.forecaster import candidates_per_cell
from stdist.vision_llm.stage_costs import Stages, example_flops, shape_batch, shape_policy
from stdist.vision_llm.stages.alignment import TASKS

TEST = "test forecast"


def hours_of(
    config: VisionLLMConfig, plan: StagePlan, start: tuple[PolicySpec, Stages], cells: int, device: Device
) -> Hours:
    """Hours of one stage, whose evaluations all learners share. ``start``: the policy that it trains; ``cells``: of the
    region, all of which are evaluated."""
    settings = stage_config(config, plan.stage)
    if isinstance(settings, AlignmentConfig):
        flops = settings.eval_examples * TASKS[plan.stage] * example_flops(*start, settings)
    else:
        assert isinstance(settings, ForecastStageConfig)
        windows = min(settings.eval_windows, windows_of(config, "validation") or settings.eval_windows)
        flops = windows * window_flops(*start, cells, 1)
        if isinstance(settings, GRPOConfig):  # it also looks at the reward of candidates
            candidates = 1 if settings.candidates == "direct" else settings.num_generations
            flops += windows * window_flops(*start, cells, candidates)
    return Hours(
        settings.max_steps,
        sum(plan.seconds.values()),
        # Before the first step, every eval_steps and behind the last.
        1 + -(-settings.max_steps // settings.eval_steps),
        flops / config.learners.num_workers / device.sustained,
    )


def forecast_hours(
    config: VisionLLMConfig, start: tuple[PolicySpec, Stages], cells: int, device: Device
) -> Hours | None:
    """Hours of the first learner, which forecasts the test days alone; None where nothing tells their windows."""
    if (windows := windows_of(config, "test")) is None:
        return None
    flops = windows * window_flops(*start, cells, candidates_per_cell(config.forecast))
    return Hours(0, 0, 1, flops / device.sustained)


def windows_of(config: VisionLLMConfig, span: str) -> int | None:
    """Returns how many windows the ``validation`` or ``test`` days have: those of the store, or where it is yet to be
    prepared, of days without a gap at the assumed 10 minutes. A window counts to the day of its targets."""
    data = config.data
    if data.store.exists():
        return len(getattr(open_dataset(config), span))
    days = getattr(data.split, span) if data.split else None
    return max(0, len(DaySpan(*days)) * 24 * 6 - data.horizon + 1) if days else None


def window_flops(spec: PolicySpec, stages: Stages, cells: int, candidates: int) -> float:
    """Operations of a window's forecast: its frames once, each cell's prompt once, each candidate's K values."""
    window, prompt, answer = forecast_flops(spec, stages)
    return window + cells * (prompt + candidates * answer)


@cache
def forecast_flops(spec: PolicySpec, stages: Stages) -> tuple[float, float, float]:
    """Operations of a window's frames, of one cell's prompt, and of K values behind it with a head over all numerals;
    step by step or at once, they are as many."""
    policy = shape_policy(spec, stages)
    batch = shape_batch(policy, 1, 1)
    with metered(policy) as meter, inference(policy):
        window = policy.prefix(batch.shared, batch.grids)
        of_window = meter.flops
        _, cell = policy.branch(window, batch.prompts)
        of_prompt = meter.flops - of_window
        states, _ = policy.branch(cell, torch.zeros(1, spec.setting.horizon, dtype=torch.long))
        head_logits(states.flatten(0, 1), policy.answer_head)
        return of_window, of_prompt, meter.flops - of_window - of_prompt
