"""Sizes in a configuration that no machine has room for, refused before anything of that size is made.

These are floors, of the inputs alone: what passes here may still be too much, which ``stdist plan`` says in full.
"""

from stdist.memory import require_room
from stdist.runs.dataset import Dataset
from stdist.vision_llm.config import AlignmentConfig, ForecastStageConfig, GRPOConfig, VisionLLMConfig
from stdist.vision_llm.dataset import stage_config, unfitted_spec

FLOAT, CHANNELS, ID = 4, 3, 8


def require_room_for_steps(config: VisionLLMConfig, dataset: Dataset) -> None:
    """Raises InputError, naming the key, where a step's frames, prompts or candidates alone are more than memory."""
    frames = unfitted_spec(config, dataset.store).frames
    pixels = (frames.height * frames.width * frames.pixels_per_cell**2) if frames else 0
    window = config.data.history * pixels * CHANNELS * FLOAT
    require_room(window, f"frames.pixels_per_cell {config.frames.pixels_per_cell}: a window", "lower it")
    require_room(config.policy.lora_r * FLOAT * 64, f"policy.lora_r {config.policy.lora_r}", "lower it")
    region, S, K = dataset.train.region.shape, config.data.history, config.data.horizon
    cells = region[0] * region[1]
    for name in config.stages:
        stage = stage_config(config, name)
        if isinstance(stage, AlignmentConfig):
            for key, count in (("train_batch_size", stage.train_batch_size), ("eval_examples", stage.eval_examples)):
                size = count * stage.values_per_example * ID
                require_room(size, f"{name}.{key} {count} x {name}.values_per_example", "lower them")
        if isinstance(stage, ForecastStageConfig):
            values = stage.windows_per_step * min(cells, stage.cells_per_window) * (S + K) * ID
            require_room(values, f"{name}.windows_per_step {stage.windows_per_step}", "lower it")
            require_room(
                stage.windows_per_step * window, f"{name}.windows_per_step {stage.windows_per_step}", "lower it"
            )
        if isinstance(stage, GRPOConfig):
            size = values * stage.num_generations
            require_room(size, f"{name}.num_generations {stage.num_generations} of every cell of a step", "lower it")
    G, windows = config.forecast.num_generations, min(config.forecast.windows_per_batch, len(dataset.test))
    require_room(windows * G * K * ID, f"forecast.num_generations {G} of {windows} windows", "lower it")
