"""The peer of ``grpo_step.py``: TRL's GRPOTrainer on the policy's own weights, as a plain transformers model.

It samples from its whole vocabulary, that is how it works, but exactly K tokens. Old log-probabilities cost no side a
pass: the trainer takes those of the update, stdist those of its sampler. Two things favour the peer: the numeral rows
stay frozen (GRPOTrainer refuses an adapter of the head), and only completion positions go through the head, which the
released trainer does on GPUs alone. Its rollouts are ``generate``'s; its continuous batching shares prompts, yet took
several times longer on a CPU.
"""

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _window import plain_model
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback

try:
    import trl.trainer.utils
    from datasets import Dataset
    from trl import GRPOConfig as TRLConfig
    from trl import GRPOTrainer
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is missing; pip install -c constraints.txt -e '.[dev]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.policy.adapters import LORA_TARGETS
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.trl import PolicyProcessor, numeral_reward

TRL_VERSION = trl.__version__
# peft and Trainer ask transformers by names that its next version drops.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
# GRPOTrainer scores all positions, the prompt's too, wherever Triton does not run. Only the choice of positions is
# changed here: the kernel reads a name of its own.
trl.trainer.utils._use_triton = lambda device: True


@dataclass(frozen=True)
class Samples:
    """One step's prompts and what their rewards need: ``[C, K]`` truth and ``[C]`` normalizer d, in units."""

    prompts: list[list[int]]
    truth: np.ndarray
    normalizer: np.ndarray


@dataclass(frozen=True)
class Batches:
    """Sequences a forward and backward pass takes, and sequences that are generated together."""

    update: int
    generation: int

    def __str__(self) -> str:
        return f"{self.update} sequences a backward pass, {self.generation} generated together"


def check_same_model(policy: PolicyModel, samples: Samples) -> None:
    """Stops the benchmark where the peer's model does not give the policy's logits."""
    ids = torch.tensor(samples.prompts[:2])
    with torch.no_grad():
        ours = head_logits(policy.hidden(ids)[:, -1], policy.answer_head)[:, :-1]
        theirs = plain_model(policy)(ids).logits[:, -1, policy.first_numeral_id :]
    processor = PolicyProcessor(policy)
    if any(processor.encode(processor.decode(ids)) != ids for ids in samples.prompts):
        raise SystemExit("error: the peer reads another prompt than stdist")
    if not torch.allclose(ours, theirs, atol=1e-4):
        raise SystemExit("error: the peer's model is another function than the policy")


class Peer:
    """A trainer whose every optimizer step is one whole GRPO step on all of ``samples``.

    Args:
        policy: without LoRA yet.
        batches: both divide C·G; what is generated together is whole groups and whole update batches.
        output_dir: where the trainer may write.
    """

    def __init__(self, policy: PolicyModel, samples: Samples, config: GRPOConfig, batches: Batches, output_dir: Path):
        self._eq_17, self._horizon = numeral_reward(policy, config.half_score), policy.spec.setting.horizon
        processor = PolicyProcessor(policy)
        self._sequences = len(samples.prompts) * config.num_generations
        self.model = plain_model(policy)
        self.tokens_per_candidate: list[float] = []
        self._trainer = GRPOTrainer(
            model=self.model,
            reward_funcs=self._reward,
            args=self._arguments(config, batches, output_dir),
            train_dataset=Dataset.from_dict(
                {
                    "prompt": [processor.decode(ids) for ids in samples.prompts],
                    "truth": samples.truth.tolist(),
                    "normalizer": samples.normalizer.tolist(),
                }
            ),
            processing_class=processor,
            peft_config=LoraConfig(
                r=policy.spec.lora_r, lora_alpha=policy.spec.lora_alpha, target_modules=LORA_TARGETS
            ),
        )
        self._trainer.remove_callback(PrinterCallback)

    def train(self, steps: int, after_step: Callable[[float], None]) -> None:
        """Takes ``steps`` steps in the trainer's own loop and calls ``after_step`` with the seconds each took."""
        self._trainer.args.max_steps = steps
        self._trainer.add_callback(_Clock(after_step))
        self._trainer.train()

    def _arguments(self, config: GRPOConfig, batches: Batches, output_dir: Path) -> TRLConfig:
        return TRLConfig(
            output_dir=str(output_dir),
            per_device_train_batch_size=batches.update,
            gradient_accumulation_steps=self._sequences // batches.update,
            steps_per_generation=batches.generation // batches.update,
            num_generations=config.num_generations,
            max_completion_length=self._horizon,
            generation_kwargs={"min_new_tokens": self._horizon},
            temperature=config.temperature,
            beta=config.beta,
            epsilon=config.epsilon,
            loss_type="grpo",
            scale_rewards=config.scale_rewards,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=False,
            use_cpu=True,
            activation_checkpointing=False,
            disable_dropout=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )

    def _reward(self, completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        self.tokens_per_candidate += [len(ids) for ids in completion_ids]
        return self._eq_17(completion_ids, **columns)


class _Clock(TrainerCallback):
    def __init__(self, after_step: Callable[[float], None]):
        self._after_step, self._start = after_step, 0.0

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self._after_step(time.perf_counter() - self._start)
