"""Keys of every run's configuration: its data, its learners, and how a stage trains."""

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from stdist.dates import parse_day
from stdist.errors import InputError


def _day(value: Any) -> date:
    try:
        return date.fromisoformat(str(parse_day(value)))
    except InputError as error:
        raise ValueError(str(error)) from None


Day = Annotated[date, BeforeValidator(_day)]
Days = tuple[Day, Day]
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
"""So that a run's config.yaml finds its files from any folder."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitConfig(Strict):
    """Inclusive local calendar days, as ["2013-11-01", "2013-11-20"]."""

    train: Days
    validation: Days
    test: Days


class DataConfig(Strict):
    """The windows of a store that a run reads. ``fraction`` takes the first part of the training days (few-shot)."""

    store: AbsolutePath
    channel: str = "internet"
    history: int = Field(12, ge=1, description="S, frames a window looks back")
    horizon: int = Field(12, ge=1, description="K, steps forecast")
    region: str | None = Field(None, description="r0:r1,c0:c1, cells to forecast; the whole grid if absent")
    split: SplitConfig | None = Field(None, description="the store's own split if absent")
    fraction: float = Field(1.0, gt=0, le=1)


class OptimizerConfig(Strict):
    """The update of any stage's weights: AdamW, a linear warm-up, then a cosine."""

    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    logging_steps: int = Field(10, ge=1)


class LearnersConfig(Strict):
    """The learners, processes that train one run together, in Ray Train's and DeepSpeed's names; one without Ray unless
    ``num_workers`` asks for more. They may change between a run and its continuation, but for the ``engine`` of a stage
    that trains bfloat16 weights in full.

    ``engine``: plain torch (one learner) or DeepSpeed. ``zero_stage``: what is sharded, 1 optimizer state, 2 gradients
    too, 3 weights too. ``offload_optimizer`` keeps the optimizer in CPU memory. ``deepspeed``: a DeepSpeed JSON of the
    user's own, merged under what the other keys say. ``resources_per_worker``: as {GPU: 1, CPU: 8}; a GPU each where
    the cluster has any, if absent. ``max_failures``: lost learners or nodes before the run gives up. ``timeout``:
    seconds a learner waits for the others before it calls them hung.
    """

    num_workers: int = Field(1, ge=1)
    engine: Literal["torch", "deepspeed"] = "torch"
    zero_stage: Literal[1, 2, 3] = 1
    offload_optimizer: bool = False
    deepspeed: AbsolutePath | None = None
    resources_per_worker: dict[str, Annotated[float, Field(gt=0)]] | None = None
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    max_failures: int = Field(3, ge=0)
    timeout: float = Field(1800.0, gt=0)

    @model_validator(mode="after")
    def _deepspeed_where_it_is_needed(self) -> "LearnersConfig":
        if self.engine == "torch" and (self.num_workers > 1 or self.offload_optimizer or self.deepspeed):
            raise ValueError("num_workers, offload_optimizer and deepspeed need engine: deepspeed")
        return self


class WorkersConfig(Strict):
    """Actors of a Ray cluster that hold a model and do what they are asked; none if 0, then the run does it itself.

    ``resources_per_worker``: as {GPU: 0.5, CPU: 2}, a share of a GPU puts it beside a learner; a GPU each where the
    cluster has any, if absent. ``lease_timeout``: seconds after which another worker does what one has not done.
    ``timeout``: seconds without any progress before the run gives up.
    """

    num_workers: int = Field(0, ge=0)
    resources_per_worker: dict[str, Annotated[float, Field(gt=0)]] | None = None
    lease_timeout: float = Field(120.0, gt=0)
    timeout: float = Field(1800.0, gt=0)


class RunConfig(Strict):
    """A run of any recipe."""

    recipe: str
    name: str
    seed: int = Field(0, ge=0, lt=2**32)  # what numpy and scikit-learn take
    output_dir: Path = Path("runs")
    data: DataConfig
    learners: LearnersConfig = LearnersConfig()

    @field_validator("name")
    @classmethod
    def _name_of_a_folder(cls, name: str) -> str:
        if Path(name).name != name or name in ("", ".."):
            raise ValueError("must name one folder below output_dir, without slashes")
        return name

    @classmethod
    def of_tree(cls, tree: dict[str, Any]) -> type[Self]:
        """The class that validates ``tree``, where a value in it says which keys there are. Raises InputError."""
        return cls

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name

    @property
    def last_split(self) -> SplitConfig | None:
        """Days of the last stage; the store's own split where None."""
        return self.data.split

    def shared_paths(self, root: Path) -> dict[str, Path]:
        """Files and folders that every machine of a cluster must see, by their key; ``root``: what relative ones are
        relative to."""
        return {"data.store": self.data.store, "output_dir": root / self.output_dir}
