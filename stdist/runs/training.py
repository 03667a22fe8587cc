"""A run from its configuration to its report: open, train the stages, forecast, score, report.

Every step is skipped when its result is already in the run folder, so the same command run again resumes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from stdist.config import RunConfig
from stdist.runs.fit import Plan, advice, require_fit, this_device
from stdist.runs.forecasting import drop_test_forecasts
from stdist.runs.run import Run, stage_sentence
from stdist.runs.run_folder import CONFIG, begin_run_folder, open_together, require_writable_run
from stdist.runs.scoring import score_test
from stdist.training.loop import Trainer
from stdist.training.process_group import ProcessGroup


def train(
    config: RunConfig,
    stages: Sequence[str],
    open_run: Callable[[ProcessGroup], Run],
    log: Callable[[str], None],
    on_metrics: Callable[[dict[str, float]], None],
    plan: Plan,
    force: bool = False,
) -> dict[str, Any]:
    """Runs or resumes every stage, then forecasts and scores. Returns test metrics, stage summaries and paths.

    As one of several learners (torch.distributed is up) this process trains its share; the main one also writes the run
    folder, forecasts and scores, and only its result has the metrics. ``log`` is given a line for people at each
    milestone, by the main learner; ``on_metrics`` every logged step's scalars, on every learner. ``plan``: of this run,
    for a device. A run that does not fit this learner's GPU is refused before it begins, unless ``force`` is set.
    """
    group, run_dir = ProcessGroup.current(), config.run_dir

    def open_input() -> Run:
        if group.is_main:
            require_writable_run(run_dir)
            if not (run_dir / CONFIG).exists():  # what goes on did fit
                require_fit(plan, this_device(), force, log)
        return open_run(group)

    run = open_together(group, open_input)
    if group.is_main:
        begin_run_folder(config, run.store.digest)
    trainer = Trainer(run_dir, group, log, on_metrics, partial(advice, plan))
    trainer.log(f"run {run_dir}: {run.store.city}, {run.summary}, {len(run.train)} training windows")
    for note in run.notes:
        trainer.log(note)
    summaries: dict[str, dict[str, Any]] = {}
    for stage in stages:
        if group.is_main and trainer.checkpoints(stage).finished is None:
            drop_test_forecasts(run_dir)
        summaries[stage] = run.fit(stage, trainer)
        trainer.log(stage_sentence(summaries[stage]))
    trainer.close()
    result: dict[str, Any] = {"run": str(run_dir), "stages": summaries}
    if not group.is_main:
        return result
    return result | score_test(run, summaries, trainer.log)
