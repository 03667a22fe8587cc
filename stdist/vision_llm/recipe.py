"""ST-Vision-LLM as a recipe. What opens, trains and plans a run is imported when it is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING

from stdist.runs.recipes import Recipe
from stdist.runs.run_folder import refuse_foreign_folder
from stdist.vision_llm.config import VisionLLMConfig

if TYPE_CHECKING:
    from stdist.config.base import WorkersConfig
    from stdist.runs.dataset import Dataset
    from stdist.runs.devices import Device
    from stdist.runs.plan import RunPlan
    from stdist.runs.workers import WorkerProgram
    from stdist.training.process_group import ProcessGroup
    from stdist.vision_llm.predictor import PolicyPredictor
    from stdist.vision_llm.run import VisionLLMRun


class VisionLLMRecipe(Recipe[VisionLLMConfig]):
    """``recipe: vision-llm``."""

    Config = VisionLLMConfig

    def stages(self, config: VisionLLMConfig) -> tuple[str, ...]:
        return config.stages

    def check(self, config: VisionLLMConfig, group: "ProcessGroup") -> "Dataset":
        """The run's data. Raises InputError where ``group`` cannot train on it, or the folder is another run's."""
        from stdist.vision_llm.dataset import open_dataset, unfitted_spec
        from stdist.vision_llm.learning import check_learners
        from stdist.vision_llm.room import require_room_for_steps
        from stdist.vision_llm.warm_start import initial_checkpoint

        check_learners(config, group)
        dataset = open_dataset(config)
        initial_checkpoint(config, unfitted_spec(config, dataset.store))
        require_room_for_steps(config, dataset)
        refuse_foreign_folder(config, dataset.store.digest)
        return dataset

    def open(self, config: VisionLLMConfig, group: "ProcessGroup") -> "VisionLLMRun":
        from stdist.vision_llm.run import VisionLLMRun

        return VisionLLMRun(config, self.check(config, group))

    def load(self, config: VisionLLMConfig, checkpoint: Path) -> "PolicyPredictor":
        from stdist.vision_llm.policy.checkpoints import load_policy
        from stdist.vision_llm.predictor import PolicyPredictor
        from stdist.vision_llm.run import on_device

        return PolicyPredictor(on_device(load_policy(checkpoint)), config)

    def workers(self, config: VisionLLMConfig) -> "WorkersConfig | None":
        return config.rollouts if config.rollouts.num_workers and "grpo" in config.stages else None

    def worker_program(self, config: VisionLLMConfig) -> "WorkerProgram":
        from stdist.vision_llm.run import rollout_program

        return rollout_program(config)

    def plan(self, config: VisionLLMConfig, device: "Device") -> "RunPlan":
        from stdist.vision_llm.plan import plan_run

        return plan_run(config, device)
