"""Keys that every recipe for nodes has: how its stages train, how nodes are shared, and periods."""

from pydantic import Field

from stdist.config.base import Days, OptimizerConfig, Strict


class EpochsConfig(OptimizerConfig):
    """Training by epochs over all windows of the span, ``train_batch_size`` windows a step over all learners.
    ``patience`` epochs without a fall of the validation MAE end it; the best epoch's weights are the result."""

    learning_rate: float = Field(2e-3, gt=0, le=100)
    weight_decay: float = Field(1e-4, ge=0, le=100)
    max_grad_norm: float = Field(5.0, gt=0)
    max_epochs: int = Field(300, ge=1)
    patience: int = Field(30, ge=1)
    train_batch_size: int = Field(64, ge=1)


class NodesConfig(Strict):
    """``ranks``: learners that share the nodes of a window; the rest of ``learners.num_workers`` share the batch.
    ``block_nodes``: nodes that are computed together, twice, where not all fit."""

    ranks: int = Field(1, ge=1)
    block_nodes: int | None = Field(None, ge=1)


class PeriodConfig(Strict):
    """One period's local days; ``nodes``: how many of the store's nodes there are by then, the first ones."""

    train: Days
    validation: Days
    test: Days
    nodes: int = Field(ge=1)
