"""Files of a run folder that its report is made of: `report/metrics.json`, `report/embeddings.json`, `log.jsonl`."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stdist.errors import DamageError, InputError
from stdist.evaluation.contract import Schema, parsed
from stdist.files import own_file, write_atomically

METRICS = Path("report") / "metrics.json"
NOT_SCALARS = {"stage", "step", "time", "event", "metrics"}


class Errors(BaseModel):
    """MAE, RMSE (data's units), MAPE (a ratio) and NRMSE of ``points`` observed values; None where there are none."""

    mae: float | None
    rmse: float | None
    mape: float | None = None
    nrmse: float | None
    points: int


class StepErrors(Errors):
    """The errors of one horizon step, from 1."""

    step: int


class Scores(BaseModel):
    """One forecaster's ``ErrorState.summary``; ``fallbacks`` of its values are persistence instead."""

    pooled: Errors
    mean_of_horizons: Errors
    per_horizon: list[StepErrors]
    fallbacks: int = 0


class IntervalScore(BaseModel):
    """The share of the scored points in a central interval, and its mean width in the data's units."""

    coverage: float | None
    width: float | None


class QuantileRow(BaseModel, extra="allow"):
    """One row of a ``QuantileErrors.summary``; by level, and by the interval's name. ``extra``: what it is of."""

    points: int
    crps: float | None
    pinball: dict[str, float | None]
    below: dict[str, float | None]
    intervals: dict[str, IntervalScore]


class QuantileScores(BaseModel):
    """One forecaster's ``QuantileErrors.summary``."""

    crps_is: str
    pooled: QuantileRow
    per_horizon: list[QuantileRow]
    per_hour: list[QuantileRow]
    per_place_group: list[QuantileRow]


class StageScores(BaseModel, extra="forbid"):
    """Named figures before and after one training stage, and what it bought in a sentence."""

    before: dict[str, float | None] = {}
    after: dict[str, float | None] = {}
    summary: str = ""


class Efficiency(BaseModel, extra="forbid"):
    """The cost of one stage or forecaster on ``hardware``, at ``batch_size`` windows; None where it was not measured.

    ``samples_per_second`` and ``inference_samples_per_second`` count windows; ``peak_memory_bytes`` is of one process.
    """

    name: str
    parameters: int
    trained_parameters: int
    batch_size: int
    hardware: str
    seconds_per_epoch: float | None = None
    samples_per_second: float | None = None
    inference_samples_per_second: float | None = None
    peak_memory_bytes: int | None = None


class Table(BaseModel, extra="forbid"):
    """Any other figures that a recipe has to show; a row has a value for every column, None where there is none."""

    title: str
    columns: list[str]
    rows: list[list[str | int | float | None]]


class Projection(BaseModel, extra="forbid"):
    """Rows of an embedding as ``points`` in a plane, coloured by ``values``, which are of ``quantity``.

    ``cyclic``: the largest value is next to the smallest, as hours are. ``names``: text beside each point.
    """

    title: str
    points: list[tuple[float, float]]
    values: list[float | None]
    quantity: str
    cyclic: bool = False
    names: list[str] = []


class Embeddings(BaseModel, extra="forbid"):
    """The content of `report/embeddings.json`; ``caption`` says what was projected, and how."""

    projections: list[Projection]
    caption: str


class RunMetrics(BaseModel, extra="forbid"):
    """The content of `report/metrics.json`.

    ``variants`` are other readings of the same model, for instance without frames. ``quantiles``: of ``model`` and
    of its company, where the run is calibrated.
    """

    contract: dict[str, Any]
    model: Scores
    baselines: dict[str, Scores]
    stages: dict[str, StageScores] = {}
    variants: dict[str, Scores] = {}
    quantiles: dict[str, QuantileScores] = {}
    efficiency: list[Efficiency] = []
    tables: list[Table] = []
    notes: list[str] = []


@dataclass
class StageLog:
    """Scalars of one stage by name, each a dict from step to value: of training steps, and of evaluations."""

    training: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    evaluation: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))


def write_metrics(run_dir: Path, metrics: dict[str, Any] | RunMetrics) -> Path:
    """Write `report/metrics.json` of a run. Raises InputError, naming the key, for another form."""
    checked = parsed(RunMetrics, metrics, "metrics", "evaluate the run again")
    return write_atomically(run_dir / METRICS, checked.model_dump_json(indent=1) + "\n")


def read_metrics(run_dir: Path) -> RunMetrics:
    """Read `report/metrics.json` of a run. Raises InputError where it is absent or damaged."""
    return _read(run_dir / METRICS, RunMetrics)


def write_embeddings(run_dir: Path, embeddings: Embeddings) -> Path:
    """Write `report/embeddings.json` of a run."""
    return write_atomically(run_dir / "report" / "embeddings.json", embeddings.model_dump_json() + "\n")


def read_embeddings(run_dir: Path) -> Embeddings:
    """Read `report/embeddings.json` of a run. Raises InputError where it is absent or damaged."""
    return _read(run_dir / "report" / "embeddings.json", Embeddings)


def _read(path: Path, schema: type[Schema]) -> Schema:
    if not path.exists():
        raise InputError(f"{path} does not exist; name the folder of a finished `stdist train`")
    again = "`stdist train` on the run's config writes it again"
    with own_file(path, again):
        content = json.loads(path.read_text(encoding="utf-8"))
    try:
        return parsed(schema, content, str(path), again)
    except InputError as error:
        raise DamageError(str(error)) from None


def add_variants(run_dir: Path, others: list[Path]) -> None:
    """Put the scores of other runs beside this run's own, each under its folder's name."""
    metrics = read_metrics(run_dir)
    for other in others:
        metrics.variants[other.resolve().name] = read_metrics(other).model
    write_metrics(run_dir, metrics)


def add_quantiles(run_dir: Path, scores: dict[str, dict[str, Any]]) -> None:
    """Put the scores of quantiles into a run's metrics, in place of those before; ``model`` is its own."""
    metrics = read_metrics(run_dir)
    metrics.quantiles = {name: QuantileScores.model_validate(each) for name, each in scores.items()}
    write_metrics(run_dir, metrics)


def read_log(path: Path) -> dict[str, StageLog]:
    """The scalars of `log.jsonl` by stage, in the order the stages first appear.

    A resumed run repeats steps: the last line of a step counts. A last line cut short by a kill is left
    out; any other unreadable line raises InputError. Values that are not finite are left out of curves, as
    gaps.
    """
    stages: dict[str, StageLog] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step, log = int(record["step"]), stages.setdefault(record["stage"], StageLog())
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise DamageError(f"{path}, line {number}: no log record with 'stage' and 'step'") from error
        curves, scalars = log.training, {n: v for n, v in record.items() if n not in NOT_SCALARS}
        if record.get("event") == "evaluation":
            curves, scalars = log.evaluation, record.get("metrics") or {}
        for name, value in scalars.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                curves[name][step] = float(value)
    return stages
