"""The tree of ``recipe: vision-llm``: ST-Vision-LLM, its stages in order."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stdist.config.base import OptimizerConfig, RunConfig, Strict, WorkersConfig
from stdist.vision_llm.base_folder import why_no_base

StageName = Literal["alignment", "arithmetic", "sft", "grpo"]
Trainable = Literal["rows", "lora", "full"]
Optim = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]
Drawing = Literal["chain", "direct"]
WITH_TRL = {
    "learners.num_workers": 1,
    "learners.engine": "torch",
    "policy.load_in_4bit": False,
    "rollouts.num_workers": 0,
    "sft.optim": "adamw_torch",
    "grpo.optim": "adamw_torch",
    "grpo.candidates": "chain",
    "grpo.kl_estimator": "k3",
}
"""Keys of what stdist does and TRL's trainers do not, with the one value that both know."""


class NumeralsConfig(Strict):
    mantissa_digits: Literal[2, 3, 4] = 4
    out_of_range: Literal["error", "clamp"] = "error"


class FramesConfig(Strict):
    """Grids as images (Eq. 8–11): p of Eq. 8, and the whole enlargement in pixels per cell."""

    enabled: bool = True
    power: float = Field(0.5, gt=0, le=1)
    pixels_per_cell: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"


class PolicyConfig(Strict):
    """``base``: preset ``tiny`` or ``small``, a folder in Qwen2.5-VL's format, or a hub name. ``load_in_4bit`` keeps a
    frozen base's decoder in NF4; ``gradient_checkpointing`` recomputes its layers in the backward pass."""

    base: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    dtype: Literal["float32", "bfloat16"] = "float32"
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    lora_r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)

    @field_validator("base")
    @classmethod
    def _absolute_folder(cls, base: str) -> str:
        """A folder is the same folder for every learner; anything else is a name."""
        folder = Path(base).expanduser()
        if not folder.is_dir():
            return base
        if reason := why_no_base(folder.absolute()):
            raise ValueError(reason)
        return str(folder.absolute())


class StageConfig(OptimizerConfig):
    """Keys of every stage. ``trainable``: numeral rows only, LoRA and rows, or everything. ``optim``, in transformers'
    names: AdamW with moments in the dtype of their weight, or in eight bits (engine torch, extra ``quantised``), which
    ``paged`` lets a GPU's driver move to the CPU where room is short."""

    trainable: Trainable = "lora"
    optim: Optim = "adamw_torch"
    max_steps: int = Field(1000, ge=1)
    numeral_learning_rate: float | None = Field(None, gt=0, le=100, description="learning_rate if absent")
    save_steps: int = Field(200, ge=1)
    eval_steps: int = Field(200, ge=1)


class AlignmentConfig(StageConfig):
    """Both numerical alignment stages. ``train_batch_size`` examples a step over all learners, each learner's share in
    ``gradient_accumulation_steps`` parts. Accuracy is measured on ``eval_examples`` examples of each task."""

    train_batch_size: int = Field(64, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    values_per_example: int = Field(4, ge=1)
    eval_examples: int = Field(64, ge=1)


class ForecastStageConfig(StageConfig):
    """Stages on windows. A step sees ``windows_per_step`` windows × ``cells_per_window`` cells; micro-batches are as
    large as ``activation_memory`` (GiB) lets them be. Validation scores ``eval_windows`` evenly spaced windows."""

    windows_per_step: int = Field(8, ge=1)
    cells_per_window: int = Field(16, ge=1)
    activation_memory: float = Field(1.0, gt=0)
    eval_windows: int = Field(32, ge=1)

    @property
    def activation_bytes(self) -> int:
        return int(self.activation_memory * 2**30)


class SFTConfig(ForecastStageConfig):
    """``blank_share``: share of training sequences whose previous answer values are blanks, so that far steps are
    learned directly and not only as a chain of one-step guesses (docs/decisions.md); 0 is the paper. ``patience``
    evaluations without a fall end the stage, as GRPO's do; without it the stage runs to ``max_steps``."""

    blank_share: float = Field(0.0, ge=0, le=1)
    patience: int | None = Field(None, ge=1)


class GRPOConfig(ForecastStageConfig):
    """Eq. 17–19 and TRL's names. ``candidates`` are written step by step and end themselves (``chain``, the paper), or
    all steps at once behind blanks, each drawn by itself (``direct``, for a policy trained with ``blank_share``).
    ``reward``: Eq. 17 with ``half_score`` x_h; minus the squared error over d², which is what RMSE adds up; or, of
    ``direct`` candidates, each step's part in that of the group's mean, which is the forecast (``stages/reward.py``).
    ``patience`` evaluations without a fall end the stage.
    ``loss_type`` says what the loss is averaged over (``stages/loss.py``); ``num_iterations`` updates are made on the
    candidates of one rollout, and checkpoints fall between rollouts."""

    trainable: Literal["lora"] = "lora"
    candidates: Drawing = "chain"
    num_generations: int = Field(8, ge=1, description="G")
    num_iterations: int = Field(1, ge=1)
    loss_type: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    epsilon: float = Field(0.2, gt=0)
    epsilon_high: float | None = Field(None, gt=0, description="epsilon if absent")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    beta: float = Field(0.04, ge=0)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    scale_rewards: Literal["none", "group"] = "none"
    reward: Literal["eq17", "squared_error", "error_of_mean"] = "eq17"
    half_score: float = Field(0.2, gt=0)
    normalizer: Literal["cell_mean", "window_mean", "city_mean"] = "cell_mean"
    patience: int = Field(3, ge=1)

    @field_validator("num_generations")
    @classmethod
    def _a_group(cls, num_generations: int) -> int:
        if num_generations < 2:
            raise ValueError("a group of 1 has no baseline: its advantage is always 0; use at least 2")
        return num_generations

    @model_validator(mode="after")
    def _steps_that_are_independent(self) -> "GRPOConfig":
        if self.reward == "error_of_mean" and self.candidates != "direct":
            raise ValueError(
                "reward error_of_mean judges each step by itself, and a chain's later steps follow from its earlier "
                "ones; set candidates: direct"
            )
        return self

    @model_validator(mode="after")
    def _checkpoints_between_rollouts(self) -> "GRPOConfig":
        for name in ("save_steps", "eval_steps"):
            if getattr(self, name) % self.num_iterations:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, no multiple of num_iterations {self.num_iterations}: the "
                    "updates of one rollout cannot be parted by a checkpoint"
                )
        return self


class RolloutsConfig(WorkersConfig):
    """Workers that sample GRPO's candidates. ``max_staleness``: rollouts that they may be ahead of the weights; with 0
    they wait for every update, from 1 on workers and learners work at the same time."""

    max_staleness: int = Field(0, ge=0)


class ForecastConfig(Strict):
    """Decoding of forecasts: step by step by each step's most likely numeral (``greedy``) or the ``median`` of its
    distribution; as the median of ``num_generations`` candidates (``sample``, also gives quantiles); or all steps at
    once behind blanks, each the mean of its distribution (``direct``, for a policy trained with ``blank_share``)."""

    decoding: Literal["greedy", "median", "sample", "direct"] = "median"
    num_generations: int = Field(1, ge=1)
    windows_per_batch: int = Field(16, ge=1)


class VisionLLMConfig(RunConfig):
    """A run: data, policy, and the stages in order. ``init_from``: RUN or RUN/STAGE of a finished stage whose weights
    the policy begins with. ``reuse_alignment``: a run of the same ``output_dir`` that began with the same base and seed
    and aligned them alike gives this one the result. ``backend``: whose loops make the steps of ``sft`` and ``grpo``,
    stdist's or those of TRL's trainers, on one device (extra ``trl``)."""

    recipe: Literal["vision-llm"] = "vision-llm"
    backend: Literal["stdist", "trl"] = "stdist"
    init_from: Path | None = None
    reuse_alignment: bool = True
    stages: tuple[StageName, ...] = Field(("alignment", "arithmetic", "sft", "grpo"), min_length=1)
    numerals: NumeralsConfig = NumeralsConfig()
    frames: FramesConfig = FramesConfig()
    policy: PolicyConfig = PolicyConfig()
    alignment: AlignmentConfig = AlignmentConfig(trainable="rows")
    arithmetic: AlignmentConfig = AlignmentConfig()
    sft: SFTConfig = SFTConfig()
    grpo: GRPOConfig = GRPOConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    forecast: ForecastConfig = ForecastConfig()

    def shared_paths(self, root: Path) -> dict[str, Path]:
        base = root / self.policy.base
        paths = super().shared_paths(root) | ({"policy.base": base} if (base / "config.json").is_file() else {})
        return paths | ({"init_from": root / self.init_from} if self.init_from else {})

    @model_validator(mode="after")
    def _work_for_every_worker(self) -> "VisionLLMConfig":
        windows = self.grpo.windows_per_step * (1 + self.rollouts.max_staleness)
        if self.rollouts.num_workers > windows:
            raise ValueError(
                f"rollouts.num_workers is {self.rollouts.num_workers} and only {windows} windows can be in flight "
                "(grpo.windows_per_step × (1 + rollouts.max_staleness)): the others would never have work"
            )
        return self

    @model_validator(mode="after")
    def _what_trl_can_do(self) -> "VisionLLMConfig":
        for key, known in WITH_TRL.items() if self.backend == "trl" else ():
            part, name = key.split(".")
            value = getattr(getattr(self, part), name)
            if value != known and (part in self.stages or part not in ("sft", "grpo")):
                raise ValueError(
                    f"{key} is {value}, which backend trl cannot do; set it to {known}, or backend to stdist".lower()
                )
        return self

    @model_validator(mode="after")
    def _stages_in_order(self) -> "VisionLLMConfig":
        order = ["alignment", "arithmetic", "sft", "grpo"]
        if list(self.stages) != [stage for stage in order if stage in self.stages]:
            raise ValueError(f"stages must be some of {order}, in this order")
        return self
