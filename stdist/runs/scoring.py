"""A run's test forecasts beside the baselines they have to beat, and its report."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from stdist.evaluation import build_report, evaluate, score_baselines, write_metrics
from stdist.evaluation.unseen import unseen
from stdist.files import own_file, to_json, write_atomically
from stdist.runs.forecasting import TEST_FORECASTS, Written, write_forecasts
from stdist.runs.run import Run, stage_sentence
from stdist.scalars import figure

WRITTEN = "written.json"
"""A file beside a run's test forecasts: notes, and windows forecast a second."""


def score_test(run: Run, summaries: dict[str, dict[str, Any]], log: Callable[[str], None]) -> dict[str, Any]:
    """Forecasts the test windows, scores them beside the baselines, writes ``report/``. Returns errors and paths."""
    run_dir, path = run.config.run_dir, run.config.run_dir / TEST_FORECASTS
    written = _written(run, list(summaries.values())[-1], log)
    for note in written.notes:
        log(note)
    scores = evaluate(path, run.store).to_json()
    contract = scores.pop("contract")
    baselines = score_baselines(run.store, run.train.span, run.test)
    blind = unseen(run.test, run.train.span).notes()
    for note in blind:
        log(note)
    metrics = {
        "contract": contract,
        "model": scores,
        "baselines": baselines,
        "stages": {
            stage: {"before": s["before"], "after": s["after"], "summary": stage_sentence(s)}
            for stage, s in summaries.items()
        },
        "notes": [*run.notes, *written.notes, *blind],
    }
    write_metrics(run_dir, metrics | run.report_extras(written))
    page = build_report(run_dir)
    pooled = {name: errors["pooled"] for name, errors in baselines.items()}
    own, mean = scores["pooled"], scores["mean_of_horizons"]
    others = ", ".join(f"{name} {figure(errors[run.metric])}" for name, errors in pooled.items())
    log(f"test {run.metric.upper()} {figure(own[run.metric])}; {others}")
    return {"test": own, "mean_of_horizons": mean, "baselines": pooled, "report": str(page)}


def _written(run: Run, summary: dict[str, Any], log: Callable[[str], None]) -> Written:
    """Writes the test forecasts; where they are there, reads what was noted of them: nothing, where the process was
    killed between the two files."""
    path = run.config.run_dir / TEST_FORECASTS
    beside = path.with_name(WRITTEN)
    if not path.exists():
        written = write_forecasts(run.config, run.predictor(), run.test, summary, path, log)
        write_atomically(beside, to_json(asdict(written)))
    if not beside.exists():
        return Written([], None)
    with own_file(beside, f"delete {path.parent} to forecast the test windows again"):
        return TypeAdapter(Written).validate_json(beside.read_text())
