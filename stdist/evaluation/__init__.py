"""Error figures that carry their protocol, the baselines to beat, and a run's report."""

from stdist.evaluation.baselines import score_baselines
from stdist.evaluation.contract import ForecastMetadata
from stdist.evaluation.forecast_header import ForecastHeader
from stdist.evaluation.forecast_writer import Chunk, ChunkGrid, ForecastWriter
from stdist.evaluation.forecasts import open_forecasts
from stdist.evaluation.metrics import ErrorState
from stdist.evaluation.protocol import evaluate, forecast_contract
from stdist.evaluation.report import build_report
from stdist.evaluation.run_files import (
    Efficiency,
    Embeddings,
    Projection,
    Table,
    add_variants,
    write_embeddings,
    write_metrics,
)

__all__ = [
    "Chunk",
    "ChunkGrid",
    "Efficiency",
    "Embeddings",
    "ErrorState",
    "ForecastHeader",
    "ForecastMetadata",
    "ForecastWriter",
    "Projection",
    "Table",
    "add_variants",
    "build_report",
    "evaluate",
    "forecast_contract",
    "open_forecasts",
    "score_baselines",
    "write_embeddings",
    "write_metrics",
]
