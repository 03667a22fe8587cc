"""Error figures that carry their protocol, the baselines to beat, and a run's report."""

from stdist.evaluation.baselines import BaselineForecasts, forecast_baselines, score_baselines
from stdist.evaluation.contract import EvaluationContract, ForecastContract, ForecastMetadata
from stdist.evaluation.forecast_header import ForecastHeader
from stdist.evaluation.forecast_writer import ForecastWriter, Piece, PiecePlan
from stdist.evaluation.forecasts import Forecasts, open_forecasts, read_forecasts, write_forecasts
from stdist.evaluation.metrics import ErrorState
from stdist.evaluation.protocol import EvaluationResult, evaluate, forecast_contract
from stdist.evaluation.report import build_report
from stdist.evaluation.run_files import (
    Efficiency,
    Embeddings,
    Projection,
    RunMetrics,
    Table,
    add_variants,
    write_embeddings,
    write_metrics,
)

__all__ = [
    "BaselineForecasts",
    "Efficiency",
    "Embeddings",
    "ErrorState",
    "EvaluationContract",
    "EvaluationResult",
    "ForecastContract",
    "ForecastHeader",
    "ForecastMetadata",
    "ForecastWriter",
    "Forecasts",
    "Piece",
    "PiecePlan",
    "Projection",
    "RunMetrics",
    "Table",
    "add_variants",
    "build_report",
    "evaluate",
    "forecast_baselines",
    "forecast_contract",
    "open_forecasts",
    "read_forecasts",
    "score_baselines",
    "write_embeddings",
    "write_forecasts",
    "write_metrics",
]
