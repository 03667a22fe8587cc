"""One pydantic tree for every YAML: unknown keys are errors that name the nearest right key.

Hyper-parameter names follow Hugging Face and TRL; the papers' letters stand where those are the field's names.
"""

import difflib
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stdist.errors import InputError

StageName = Literal["alignment", "arithmetic", "sft", "grpo"]
Trainable = Literal["rows", "lora", "full"]
Days = tuple[date, date]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitConfig(Strict):
    """Inclusive local calendar days, as ["2013-11-01", "2013-11-20"]."""

    train: Days
    validation: Days
    test: Days


class DataConfig(Strict):
    """Which windows of which store. ``fraction`` takes the first part of the training days (few-shot)."""

    store: Path
    channel: str = "internet"
    history: int = Field(12, ge=1, description="S, frames a window looks back")
    horizon: int = Field(12, ge=1, description="K, steps forecast")
    region: str | None = Field(None, description="r0:r1,c0:c1, cells to forecast; the whole grid if absent")
    split: SplitConfig | None = Field(None, description="the store's own split if absent")
    fraction: float = Field(1.0, gt=0, le=1)

    @field_validator("store")
    @classmethod
    def _absolute(cls, store: Path) -> Path:
        """So that a run's config.yaml finds its data from any folder."""
        return store.expanduser().absolute()


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
        return str(folder.absolute()) if folder.is_dir() else base


class StageConfig(Strict):
    """What every stage has. ``trainable``: numeral rows only, LoRA and rows, or everything."""

    trainable: Trainable = "lora"
    max_steps: int = Field(1000, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    numeral_learning_rate: float | None = Field(None, gt=0, description="learning_rate if absent")
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    logging_steps: int = Field(10, ge=1)
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
    learned directly and not only as a chain of one-step guesses (docs/decisions.md); 0 is the paper."""

    blank_share: float = Field(0.0, ge=0, le=1)


class GRPOConfig(ForecastStageConfig):
    """Eq. 17–19 and TRL's names. ``half_score`` is x_h; ``patience`` evaluations without a fall end the stage."""

    trainable: Literal["lora"] = "lora"
    num_generations: int = Field(8, ge=2, description="G")
    epsilon: float = Field(0.2, gt=0)
    beta: float = Field(0.04, ge=0)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    scale_rewards: Literal["none", "group"] = "none"
    half_score: float = Field(0.2, gt=0)
    normalizer: Literal["cell_mean", "window_mean", "city_mean"] = "cell_mean"
    patience: int = Field(3, ge=1)


class ForecastConfig(Strict):
    """How forecasts are decoded: step by step by each step's most likely numeral (``greedy``) or the ``median`` of its
    distribution; as the median of ``num_generations`` candidates (``sample``, also gives quantiles); or all steps at
    once behind blanks, each the mean of its distribution (``direct``, for a policy trained with ``blank_share``)."""

    decoding: Literal["greedy", "median", "sample", "direct"] = "median"
    num_generations: int = Field(1, ge=1)
    windows_per_batch: int = Field(16, ge=1)


class LearnersConfig(Strict):
    """How a run is spread over processes, in Ray Train's and DeepSpeed's names; it may change between a run and its
    continuation, but for the ``engine`` of a stage that trains bfloat16 weights in full. One learner without Ray unless
    ``num_workers`` asks for more.

    ``engine``: plain torch (one learner) or DeepSpeed. ``zero_stage``: what is sharded, 1 optimizer state, 2 gradients
    too, 3 weights too. ``offload_optimizer`` keeps the optimizer in CPU memory. ``deepspeed``: a DeepSpeed JSON of the
    user's own, merged under what the other keys say. ``resources_per_worker``: as {GPU: 1, CPU: 8}; a GPU each where
    the cluster has any, if absent. ``max_failures``: lost workers or nodes before the run gives up. ``timeout``:
    seconds a learner waits for the others before it calls them hung.
    """

    num_workers: int = Field(1, ge=1)
    engine: Literal["torch", "deepspeed"] = "torch"
    zero_stage: Literal[1, 2, 3] = 1
    offload_optimizer: bool = False
    deepspeed: Path | None = None
    resources_per_worker: dict[str, Annotated[float, Field(gt=0)]] | None = None
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    max_failures: int = Field(3, ge=0)
    timeout: float = Field(1800.0, gt=0)

    @field_validator("deepspeed")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path and path.expanduser().absolute()

    @model_validator(mode="after")
    def _deepspeed_where_it_is_needed(self) -> "LearnersConfig":
        if self.engine == "torch" and (self.num_workers > 1 or self.offload_optimizer or self.deepspeed):
            raise ValueError("num_workers, offload_optimizer and deepspeed need engine: deepspeed")
        return self


class Config(Strict):
    """A run: data, policy, and the stages in order."""

    name: str
    seed: int = Field(0, ge=0)
    output_dir: Path = Path("runs")
    stages: tuple[StageName, ...] = Field(("alignment", "arithmetic", "sft", "grpo"), min_length=1)
    data: DataConfig
    numerals: NumeralsConfig = NumeralsConfig()
    frames: FramesConfig = FramesConfig()
    policy: PolicyConfig = PolicyConfig()
    alignment: AlignmentConfig = AlignmentConfig(trainable="rows")
    arithmetic: AlignmentConfig = AlignmentConfig()
    sft: SFTConfig = SFTConfig()
    grpo: GRPOConfig = GRPOConfig()
    learners: LearnersConfig = LearnersConfig()
    forecast: ForecastConfig = ForecastConfig()

    @field_validator("name")
    @classmethod
    def _name_of_a_folder(cls, name: str) -> str:
        if Path(name).name != name or name in ("", ".."):
            raise ValueError("must name one folder below output_dir, without slashes")
        return name

    @model_validator(mode="after")
    def _stages_in_order(self) -> "Config":
        order = ["alignment", "arithmetic", "sft", "grpo"]
        if list(self.stages) != [stage for stage in order if stage in self.stages]:
            raise ValueError(f"stages must be some of {order}, in this order")
        return self

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies ``key.sub=value`` overrides.

    Raises InputError: file missing or not YAML, an unknown key (with the nearest right one), a wrong value.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise InputError(f"config {path} does not exist") from None
    except OSError as error:
        raise InputError(f"config {path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError where a date is none or the text is not UTF-8
        raise InputError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"config {path} must be a mapping of keys to values")
    for override in overrides or []:
        _apply(tree, override)
    return parse_config(tree, where=str(path))


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """Validates a tree; ``where`` names its source in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{where}: {_first_problem(error)}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise InputError(f"override {override!r} must look like key.sub=value")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise InputError(f"override {override!r}: {parent} is a value, not a group of keys")
    try:
        tree[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise InputError(f"override {override!r}: {value!r} is not a YAML value") from None


def _first_problem(error: ValidationError) -> str:
    """The first unknown key, else the first wrong value; a key that may be one of several kinds says all of them."""
    problems = error.errors()
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    if problem["type"] == "extra_forbidden":
        *group, name = (part for part in problem["loc"] if isinstance(part, str))
        known = list(_fields_at(group))
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
        return f"unknown key {'.'.join([*group, name])!r}; {hint}"
    key = _key(problem)
    same = [p for p in problems if _key(p) == key and p["input"] == problem["input"]]
    message = " or ".join(dict.fromkeys(p["msg"].removeprefix("Value error, ") for p in same))
    given = f" (given: {problem['input']!r})" if key and problem["type"] != "missing" else ""
    return f"{key or 'config'}: {message}{given}"


def _key(problem: Any) -> str:
    """The dotted key of a problem, without what pydantic adds behind it: the item, the kind that was tried."""
    path: list[str] = []
    for part in problem["loc"]:
        if part not in _fields_at(path):
            break
        path.append(part)
    return ".".join(path)


def _fields_at(path: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = Config.model_fields
    for part in path:
        annotation = fields[part].annotation
        models = [a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")]
        fields = models[0].model_fields if models else {}
    return fields
