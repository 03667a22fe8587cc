"""The steps of fine-tuning and GRPO in TRL's own loops; what they log, validate and save is a run's as ever.

Windows, cells and blanks of a step are those of stdist's own stage, and so are parameter groups, optimizer and learning
rates. In GRPO the model writes and scores answer tokens alone, and TRL draws: other candidates than stdist would.
"""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl
from trl import GRPOConfig as TRLGRPOConfig
from trl import GRPOTrainer, SFTTrainer
from trl import SFTConfig as TRLSFTConfig

from stdist.training.engine import TorchEngine, cosine_schedule
from stdist.training.guards import resource_errors
from stdist.training.loop import StageRun
from stdist.vision_llm.config import ForecastStageConfig, StageConfig
from stdist.vision_llm.learning import parameter_groups
from stdist.vision_llm.policy.adapters import train_only
from stdist.vision_llm.policy.city_windows import PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.rollouts import max_tokens
from stdist.vision_llm.stages.grpo import GRPOStage
from stdist.vision_llm.stages.sft import SFTStage, sft_tree
from stdist.vision_llm.tree.micro_batches import activation_bytes
from stdist.vision_llm.trl.processor import PolicyProcessor
from stdist.vision_llm.trl.reward import numeral_reward
from stdist.vision_llm.trl.view import TransformersView, grpo_view
from stdist.vision_llm.trl.window_dataset import AnswerCollator, rows_of


class HandedEngine(TorchEngine):
    """AdamW and the learning rates of stdist's own engine, stepped by a trainer of TRL's."""

    def handed(self) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """What the trainer steps, from the step that the engine is at."""
        done = self._steps
        return self._optimizer, LambdaLR(self._optimizer, lambda step: self._schedule(done + step))

    def stepped(self) -> None:
        """The trainer has made a step."""
        self._steps += 1


def make_trl_engine(policy: PolicyModel, settings: StageConfig) -> HandedEngine:
    """The engine of what trains in the stage."""
    schedule = cosine_schedule(settings.warmup_steps, settings.max_steps)
    return HandedEngine(parameter_groups(policy, settings), schedule, settings.max_grad_norm)


def make_steps(stage: SFTStage | GRPOStage, seed: int, run: StageRun) -> None:
    """Makes the stage's steps from where ``run`` is. Of GRPO, call ``begin_grpo(policy)`` before."""
    with _silence(), resource_errors(stage.name, "a step of TRL's", run.step, run.group):
        if isinstance(stage, SFTStage):
            _sft_steps(stage, seed, run)
        else:
            _grpo_steps(stage, seed, run)


def _sft_steps(stage: SFTStage, seed: int, run: StageRun) -> None:
    policy, config, batches = stage.policy, stage.config, stage.batches

    def blanks(step: int, batch: PolicyBatch) -> np.ndarray:
        return batches.blanks(step, batch, config.blank_share)

    rows = rows_of(policy, batches, range(run.step, config.max_steps), blanks=blanks)
    sequences = len(rows) // (config.max_steps - run.step)
    micro_batch = _micro_batch(policy, batches(run.step), config, sequences)
    rng_state = torch.get_rng_state() if run.resumed else None
    with tempfile.TemporaryDirectory() as folder, TransformersView(policy) as view:
        arguments = TRLSFTConfig(
            **_arguments(run, policy, config, seed, folder),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=sequences // micro_batch,
            max_length=None,
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(
            policy.backbone,
            arguments,
            data_collator=AnswerCollator(policy),
            train_dataset=rows,
            processing_class=PolicyProcessor(policy),
            optimizers=_engine(run).handed(),
        )
        _train(trainer, run, policy, config, view, rng_state)


def _grpo_steps(stage: GRPOStage, seed: int, run: StageRun) -> None:
    policy, config, updates = stage.policy, stage.config, stage.config.num_iterations
    rollouts = range(run.step // updates, -(-config.max_steps // updates))
    rows = rows_of(policy, stage.batches, rollouts, stage.normalizers)
    sequences = len(rows) // len(rollouts) * config.num_generations
    micro_batch = _micro_batch(policy, stage.batches(rollouts[0]), config, sequences)
    rng_state = torch.get_rng_state() if run.resumed else None
    with tempfile.TemporaryDirectory() as folder, grpo_view(policy) as view:
        arguments = TRLGRPOConfig(
            **_arguments(run, policy, config, seed, folder),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=sequences // micro_batch,
            num_generations=config.num_generations,
            num_iterations=updates,
            max_completion_length=max_tokens(policy, config.candidates),
            temperature=config.temperature,
            top_p=config.top_p,
            beta=config.beta,
            use_bias_correction_kl=False,  # nor does the paper
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            loss_type="grpo" if config.loss_type == "gspo" else config.loss_type,
            importance_sampling_level="sequence" if config.loss_type == "gspo" else "token",
            scale_rewards=config.scale_rewards,
            shuffle_dataset=False,
        )
        trainer = GRPOTrainer(
            policy.backbone,
            numeral_reward(policy, config.half_score, config.reward),
            arguments,
            train_dataset=rows,
            processing_class=PolicyProcessor(policy),
            optimizers=_engine(run).handed(),
        )
        _train(trainer, run, policy, config, view, rng_state)


@contextmanager
def _silence() -> Iterator[None]:
    """Inside, transformers says no more than its errors: what it aligns and will rename is no news to who trains."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(before)


def _train(
    trainer: Trainer,
    run: StageRun,
    policy: PolicyModel,
    config: ForecastStageConfig,
    view: TransformersView,
    rng_state: Tensor | None,
) -> None:
    """Runs the trainer's own loop, with ``run`` told of every step."""
    # A trainer that adds an adapter lets go of what trains and freezes the rest by its own rules.
    train_only(policy, config.trainable)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Reporter(run, view, rng_state))
    trainer.train()


class _Reporter(TrainerCallback):
    """Tells ``run`` of every step, and the trainer where to stop."""

    def __init__(self, run: StageRun, view: TransformersView, rng_state: Tensor | None):
        self._run, self._view, self._rng_state = run, view, rng_state
        self._scalars: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        if self._rng_state is not None:  # a trainer seeds the generators when it is made
            torch.set_rng_state(self._rng_state)

    def on_log(
        self, args: Any, state: Any, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any
    ) -> TrainerControl:
        """Behind every step, and once at the end, without a loss."""
        assert logs is not None
        if "loss" in logs:
            engine = _engine(self._run)
            # What a step without a rollout of its own does not say is as it was.
            self._scalars |= {name: float(value) for name, value in logs.items()}
            self._scalars["learning_rate"] = engine.learning_rate
            engine.stepped()
            with self._view.lifted():
                self._run.made(self._scalars)
            control.should_training_stop |= not self._run.goes_on
        return control


def _engine(run: StageRun) -> HandedEngine:
    assert isinstance(run.engine, HandedEngine)
    return run.engine


def _micro_batch(policy: PolicyModel, batch: PolicyBatch, config: ForecastStageConfig, sequences: int) -> int:
    """Sequences of a backward pass: a divisor of a step's, as many as ``activation_memory`` allows of whole ones."""
    none_blank = torch.zeros(len(batch.prompts), dtype=torch.bool, device=policy.device)
    whole = sum(activation_bytes(policy, sft_tree(policy, batch, none_blank)))
    most = max(1, config.activation_bytes // whole)
    return max(n for n in range(1, sequences + 1) if sequences % n == 0 and n <= most)


def _arguments(
    run: StageRun, policy: PolicyModel, config: ForecastStageConfig, seed: int, folder: str
) -> dict[str, Any]:
    """What both trainers are told. A run's own engine, log and checkpoints stand in for the trainer's."""
    return {
        "output_dir": folder,
        "max_steps": config.max_steps - run.step,
        "learning_rate": config.learning_rate,
        "max_grad_norm": config.max_grad_norm,
        "seed": seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "activation_checkpointing": False,  # the policy has its own
        "bf16": False,  # the policy has its dtypes already
        "use_cpu": policy.device.type == "cpu",
        "dataloader_pin_memory": False,
    }
