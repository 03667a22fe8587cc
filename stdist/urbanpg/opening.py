"""The data and the untrained model of a run of UrbanPG's recipes, and all that is refused before its first step."""

from stdist.data.audit import Fitted, data_digest, leak_line, leaks
from stdist.errors import InputError
from stdist.memory import require_room
from stdist.nodes.dataset import NodeDataset, open_dataset, open_period
from stdist.nodes.interface import Forecaster
from stdist.nodes.learners import check_grid
from stdist.runs.run_folder import refuse_foreign_folder
from stdist.training.deepspeed_json import deepspeed_json
from stdist.training.process_group import ProcessGroup
from stdist.urbanpg.checkpoints import backbone_path, load_backbone, stage_names
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.continual import require_gradients
from stdist.urbanpg.models import UrbanPGModelConfig


def check(config: UrbanConfig, group: ProcessGroup) -> list[NodeDataset]:
    """A dataset for every stage. Raises InputError where ``group`` cannot train ``config`` on it, or
    its folder is another run's."""
    learners = config.learners
    periods = config.continual.periods if config.continual else ()
    datasets = [open_period(config.data, period) for period in periods] or [open_dataset(config.data)]
    batch_size = config.training.train_batch_size
    for dataset in datasets:
        if len(dataset.train) < batch_size:
            raise InputError(
                f"{len(dataset.train)} windows of the training days {dataset.train.span} make no batch of "
                f"training.train_batch_size {batch_size}; lower it, or train on more days"
            )
        width = dataset.train.S + dataset.train.K + len(dataset.nodes)
        d = getattr(config.model, "d", None) or 1  # a backbone from outside may have another name for it
        require_room(4 * d * width, f"model.d {d}", "lower it")
    refuse_foreign_folder(config, datasets[0].store.digest)
    require_gradients(config, stage_names(config), datasets)
    if config.model.batch_normalisation and group.size > 1:
        # Each learner would normalise with the statistics of its own windows.
        raise InputError(
            f"model.kind {config.model.kind} has batch normalisation, which {group.size} learners do not share; set "
            "learners.num_workers to 1, or choose another kind"
        )
    zero_stage = learners.zero_stage if learners.engine == "deepspeed" else 1
    check_grid(group.size, config.nodes.ranks, len(datasets[0].nodes), zero_stage, config.nodes.block_nodes)
    ProcessGroup(0, group.size // config.nodes.ranks).local_slice(batch_size, "training.train_batch_size")
    if learners.engine == "deepspeed":
        deepspeed_json(learners, config.training.max_grad_norm, False, group.size // config.nodes.ranks)
    return datasets


def open_run(
    config: UrbanConfig, group: ProcessGroup
) -> tuple[list[NodeDataset], Forecaster, list[tuple[Fitted, ...]], list[str]]:
    """A dataset for every stage, the first one's model, the data each one's result is fitted on, and notes for people.

    Raises InputError for whatever would stop the run later.
    """
    datasets, notes = check(config, group), []
    dataset, seed = datasets[0], config.seed
    if not dataset.holds_weeks:
        until = next((f" until period {n}" for n, later in enumerate(datasets, 1) if later.holds_weeks), "")
        notes.append(f"{dataset.train.span} does not hold every weekday twice: to the model all days are one{until}")
    before: tuple[Fitted, ...] = ()
    if config.few_shot:
        path = backbone_path(config)
        if path != config.few_shot.backbone:
            notes.append(f"{config.few_shot.backbone} is not there any more; its backbone is in {path}")
        backbone, fitted = load_backbone(path)
        assert isinstance(config.model, UrbanPGModelConfig)
        model: Forecaster = config.model.prompts_on(backbone, dataset, seed)
        if fitted is None:
            notes.append(f"nothing says which data the backbone {path} was trained on")
        before = fitted or ()
    else:
        model = config.model.build(dataset, seed)
    model.block_nodes = config.nodes.block_nodes
    return datasets, model, _fitted(config, datasets, before), notes


def _fitted(config: UrbanConfig, datasets: list[NodeDataset], before: tuple[Fitted, ...]) -> list[tuple[Fitted, ...]]:
    """The data each stage's result is fitted on, where the first one's model was on ``before``. Raises InputError where
    one is on days that it is tested on: nobody would score it."""
    fitted = []
    for name, dataset in zip(stage_names(config), datasets, strict=True):
        data = data_digest(dataset.store, config.data.channel)
        before = tuple(dict.fromkeys((*before, Fitted.on("weights", dataset.statistics.span, data))))
        if leaking := leaks(before, dataset.test.span, data):
            days = "continual.periods" if config.continual else "data.split"
            raise InputError(
                f"leak: {leak_line(leaking, dataset.test.span)}, the test days of stage {name}; choose others in {days}"
            )
        fitted.append(before)
    return fitted
