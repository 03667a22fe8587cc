"""The plan of a run of ST-Vision-LLM: what each stage holds, computes and sends, and which settings make it smaller."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import inf

import numpy as np
from pydantic import ValidationError

from stdist.data import Region
from stdist.errors import InputError
from stdist.runs import memory_plan
from stdist.runs.devices import Device
from stdist.runs.memory_plan import Ranks, gathered_bytes
from stdist.runs.plan import Changes, RunPlan, StagePlan, update_bytes, verdict
from stdist.training.eight_bit_engine import moment_bytes
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import AlignmentConfig, ForecastStageConfig, GRPOConfig, VisionLLMConfig
from stdist.vision_llm.dataset import ASSUMED_GRID, check_values, open_dataset, open_grid, stage_config, unfitted_spec
from stdist.vision_llm.evaluation_costs import TEST, forecast_hours, hours_of
from stdist.vision_llm.learning import check_learners, parameter_groups
from stdist.vision_llm.policy.presets import SHAPES
from stdist.vision_llm.policy.spec import PolicySpec
from stdist.vision_llm.rollout.forecaster import plan_pieces
from stdist.vision_llm.rollout.versions import sent_bytes
from stdist.vision_llm.stage_costs import (
    Costs,
    Stages,
    alignment_costs,
    policy_weights,
    sampling_bytes,
    shape_policy,
    window_costs,
)
from stdist.vision_llm.warm_start import initial_checkpoint

NETWORK = memory_plan.INFINIBAND
"""Bytes a second that reach a worker."""
HASHING = 1.2e9
"""Bytes a second and core: SHA-256 as measured on an Intel Xeon."""


def plan_run(config: VisionLLMConfig, device: Device = Device()) -> RunPlan:
    """``device``: one learner's. See :func:`plan_stage`.

    Raises InputError also where the learners cannot share a stage's batch, or their engine cannot train this policy.
    """
    check_learners(config, ProcessGroup(0, config.learners.num_workers))
    notes = check_values(config, open_dataset(config)) if config.data.store.exists() else []  # as training would
    initial_checkpoint(config, read_city(config)[0])
    stages = [plan_stage(config, stage, device) for stage in config.stages]
    otherwise = "take a larger device or a smaller base"
    verdicts = [
        verdict(stage, device.memory, _changes(config, stage.stage), partial(_replan, config, stage.stage), otherwise)
        for stage in stages
        if device.memory is not None
    ]
    notes += [
        *read_city(config)[2],
        f"seconds are on paper: {device.flops / 1e12:.0f} TFLOP/s at an assumed MFU of {device.mfu:.0%}, "
        f"{memory_plan.bandwidth(config.learners.num_workers) / 1e9:.0f} GB/s between learners, nothing overlapped",
    ]
    notes += [
        line for plan in stages if _has_workers(config, plan.stage) for line in _notes_on_workers(config, plan, device)
    ]
    if config.backend == "trl":
        notes.append(
            "sft and grpo are counted as stdist makes their steps; TRL computes every sequence whole, and needs more"
        )
    if "grpo" in config.stages:
        notes.append(
            "sampling is counted by its operations; its steps of one token are bound by memory and take longer"
        )
    cells, hours = read_city(config)[1], {}
    for plan in stages:
        hours[plan.stage] = hours_of(config, plan, starting_point(config, plan.stage), cells, device)
    if (of_test := forecast_hours(config, starting_point(config, config.stages[-1]), cells, device)) is not None:
        hours[TEST] = of_test
    else:
        notes.append("hours are without the test forecast: no store and no data.split says how many windows it has")
    if any(getattr(stage_config(config, name), "patience", None) for name in config.stages):
        notes.append("hours are to max_steps; a stage with patience ends earlier where its validation stops falling")
    return RunPlan(stages, verdicts, notes, hours)


def workers_for(sampling_seconds: float, training_seconds: float, version_bytes: int) -> float:
    """How many workers sample as fast as learners train, where both work at the same time. While a worker fetches and
    hashes a version it samples nothing; learners hash it too, when they publish it.

    Args:
        sampling_seconds: of a step's candidates, on one worker.
        training_seconds: of a step, on all learners.
    """
    left = training_seconds - version_bytes / NETWORK
    return sampling_seconds / left if left > 0 else inf


def _notes_on_workers(config: VisionLLMConfig, plan: StagePlan, device: Device) -> Iterator[str]:
    learners, updates, rollouts = plan.ranks.world_size, config.grpo.num_iterations, config.rollouts
    sampling = updates * learners * costs_of(config, plan.stage).sampling_flops / device.sustained
    training = updates * sum(plan.seconds.values())
    version = sum(sent_bytes(shape_policy(*starting_point(config, plan.stage))).values())
    enough = workers_for(sampling, training, version)
    many = f"{enough:.3g} workers, {enough / learners:.3g} a learner, keep up"
    taking_turns = "with rollouts.max_staleness 0 they take turns, from 1 on both work at once"
    yield (
        f"one worker samples a step's candidates in {sampling:.3g} s, learners train {training:.3g} s on them: "
        + (many if enough < inf else "no number of workers keeps up")
        + f" (configured: {rollouts.num_workers})"
        + ("" if rollouts.max_staleness else f"; {taking_turns}")
    )
    yield (
        f"a version of the weights is {version / 1e9:.3g} GB and the embeddings of the numerals that the stage met: "
        f"{version / NETWORK:.2g} s to a worker at {NETWORK / 1e9:.0f} GB/s, {version / HASHING:.2g} s of SHA-256 "
        f"at {HASHING / 1e9:.1f} GB/s a core, on all cores of learner and worker"
    )


def plan_stage(config: VisionLLMConfig, stage: str, device: Device = Device()) -> StagePlan:
    """One stage of a run, from its configuration alone.

    Raises InputError where the base's configuration cannot be read or the store holds no such grid or region.
    """
    settings, ranks = stage_config(config, stage), ranks_of(config)
    policy, costs = shape_policy(*starting_point(config, stage)), costs_of(config, stage)
    weights = policy_weights(policy, config.policy.load_in_4bit, settings.optim)
    if ranks.zero_stage and settings.trainable == "full":  # DeepSpeed casts all of it
        weights = [replace(w, bytes_each=policy.text_head.element_size()) for w in weights]
    groups = parameter_groups(policy, settings)
    phases = costs.phases | {"update": {"temporaries": update_bytes(groups, ranks)}}
    if settings.optim == "paged_adamw_8bit":
        largest = max(p.numel() for group in groups for p in group.parameters.values())
        phases["update"]["moments of a tensor"] = moment_bytes(largest)
    if held := validation_bytes(config, stage):
        phases["validation"] = held
    live, everything = gathered_bytes(weights, ranks)
    if everything:
        # ZeRO-3 makes the policy whole for every validation; a stage that samples is refused it.
        phases["training"] = phases["training"] | {"gathered weights": live}
        phases["validation"] = phases.get("validation", {}) | {"gathered weights": everything}
    return StagePlan(
        stage,
        settings.trainable,
        ranks,
        weights,
        phases,
        costs.flops + (0 if _has_workers(config, stage) else costs.sampling_flops),
        memory_plan.traffic(weights, ranks, *costs.passes(weights)),
        {"tokens_per_learner": costs.tokens, "micro_batches": costs.micro_batches},
        device,
    )


def _has_workers(config: VisionLLMConfig, stage: str) -> bool:
    """Whether others sample what the stage learns from. Its learners' room for sampling stays: evaluations need it."""
    return stage == "grpo" and config.rollouts.num_workers > 0


def costs_of(config: VisionLLMConfig, stage: str) -> Costs:
    """One learner's of a step."""
    settings, group = stage_config(config, stage), ProcessGroup(0, config.learners.num_workers)
    fused = config.learners.engine == "torch"
    if isinstance(settings, AlignmentConfig):
        examples = len(group.local_items(range(settings.train_batch_size)))
        return alignment_costs(*starting_point(config, stage), settings, examples, fused)
    assert isinstance(settings, ForecastStageConfig)
    windows = len(group.local_items(range(settings.windows_per_step)))
    cells = min(settings.cells_per_window, read_city(config)[1])
    return window_costs(*starting_point(config, stage), settings, windows, cells, fused)


def validation_bytes(config: VisionLLMConfig, stage: str) -> dict[str, float]:
    """Bytes that an evaluation holds on a learner: forecasts of all cells, and where it looks at candidates these."""
    settings, cells = stage_config(config, stage), read_city(config)[1]
    if not isinstance(settings, ForecastStageConfig):
        return {}
    windows = min(settings.windows_per_step, settings.eval_windows)
    piece, drawing = plan_pieces(windows, cells, windows), config.forecast.decoding
    held = sampling_bytes(
        *starting_point(config, stage),
        piece.windows_per_chunk,
        piece.cells_per_chunk,
        1,
        "direct" if drawing == "direct" else "chain",
    )
    if isinstance(settings, GRPOConfig):
        of_candidates = sampling_bytes(
            *starting_point(config, stage), windows, cells, settings.num_generations, settings.candidates
        )
        held = {what: max(size, of_candidates[what]) for what, size in held.items()}
    return held


def starting_point(config: VisionLLMConfig, stage: str) -> tuple[PolicySpec, Stages]:
    """The policy that the run trains, and the stages that it has begun when ``stage`` trains it."""
    spec = read_city(config)[0].model_copy(update={"load_in_4bit": False})  # which has no shapes of its own
    names = config.stages[: config.stages.index(stage) + 1]
    return spec, tuple((name, stage_config(config, name).trainable) for name in names)


def ranks_of(config: VisionLLMConfig) -> Ranks:
    learners = config.learners
    stage = learners.zero_stage if learners.engine == "deepspeed" else 0
    return Ranks(learners.num_workers, stage, learners.offload_optimizer)


def read_city(config: VisionLLMConfig) -> tuple[PolicySpec, int, list[str]]:
    """The policy of the run's store, how many cells there are to draw from, and notes: on a store that is yet to be
    prepared."""
    path, store, inside, notes = config.data.store, None, np.ones(ASSUMED_GRID, bool), []
    if path.exists():
        store = open_grid(path)
        inside = store.inside
    else:
        notes.append(f"{path} does not exist yet: a grid of {inside.shape[0]} x {inside.shape[1]} cells is assumed")
    if config.data.region:
        inside = inside[Region.parse(config.data.region).within(inside.shape).slices]
    return unfitted_spec(config, store), int(inside.sum()), notes


def _changes(config: VisionLLMConfig, stage: str) -> Iterator[Changes]:
    settings, learners = stage_config(config, stage), config.learners
    if isinstance(settings, ForecastStageConfig):
        yield {f"{stage}.activation_memory": min(1.0, settings.activation_memory)}
    elif isinstance(settings, AlignmentConfig):
        yield {f"{stage}.gradient_accumulation_steps": settings.train_batch_size // learners.num_workers}
    yield {"policy.gradient_checkpointing": True}
    if learners.num_workers > 1:
        yield {"learners.zero_stage": 2}
        yield {"learners.zero_stage": 3}
    if config.policy.base not in SHAPES and all(stage_config(config, s).trainable != "full" for s in config.stages):
        yield {"policy.load_in_4bit": True}
    for optim in ("adamw_8bit", "paged_adamw_8bit"):
        yield {f"{stage}.optim": optim}
    yield {"learners.engine": "deepspeed", "learners.offload_optimizer": True}
    yield {"numerals.mantissa_digits": 3}


def _replan(config: VisionLLMConfig, stage: str, changes: Changes) -> StagePlan | None:
    """None where such a configuration could not be trained."""
    tree = config.model_dump(mode="json")
    for path, value in changes.items():
        section, key = path.split(".")
        tree[section][key] = value
    try:
        changed = VisionLLMConfig.model_validate(tree)
        check_learners(changed, ProcessGroup(0, changed.learners.num_workers))
    except (ValidationError, InputError):
        return None
    return plan_stage(changed, stage)
