"""One self-contained page about a run: how good, against what, by which contract, what each stage bought.

Everything comes from the run folder (and the store that its configuration names, for the truth), so a report
can be made again at any time, also of an unfinished run: what is missing is said on the page.
"""

from __future__ import annotations

import base64
import io
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from stdist.config.yaml_core import load_yaml
from stdist.data import GridStore, Region, open_store
from stdist.errors import DamageError, InputError
from stdist.evaluation import figures, forecast_header
from stdist.evaluation.forecast_header import ForecastHeader, tiles
from stdist.evaluation.forecasts import ForecastFile, open_forecasts
from stdist.evaluation.levels import INTERVALS
from stdist.evaluation.metrics import ErrorState
from stdist.evaluation.protocol import match_windows, read_targets
from stdist.evaluation.run_files import RunMetrics, Scores, read_embeddings, read_log, read_metrics
from stdist.files import require_writable, write_atomically

DOTS_PER_INCH = 160
TITLE = "stdist report"


@dataclass(frozen=True)
class Image:
    """A figure in the page: PNG as a data address, and what it shows in words."""

    source: str
    caption: str


@dataclass(frozen=True)
class ForecastPictures:
    """Traces of some cells or nodes, where the errors are, and the pooled NRMSE of the forecasts they show."""

    traces: list[Image]
    error_map: Image
    nrmse: float


@dataclass(frozen=True)
class Comparison:
    """The model beside one other forecaster by pooled NRMSE; ``steps_lost`` of the horizons are worse."""

    name: str
    nrmse: float
    ratio: float
    steps_lost: int
    steps: int

    @property
    def model_wins(self) -> bool:
        return self.ratio < 1


def build_report(run_dir: Path) -> Path:
    """Writes ``report/index.html``, one self-contained file, and ``report/figures/*.png``; returns the page.

    Raises InputError where ``run_dir`` is no run folder, or its page is somebody else's, and DamageError where its
    forecasts or their store are damaged.
    """
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise InputError(f"{run_dir}: no run folder (it has no config.yaml); name the folder of a `stdist train`")
    index = run_dir / "report" / "index.html"
    if index.exists() and TITLE not in index.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{index} is no page of stdist's; it stays as it is: move it, or name another run folder")
    for folder in (run_dir / "report", run_dir / "report" / "figures"):
        require_writable(folder)
    config_text = config_file.read_text(encoding="utf-8", errors="replace")
    metrics, pictures, embeddings, missing = None, None, None, []
    if (run_dir / "report" / "metrics.json").is_file():
        metrics = read_metrics(run_dir)
    else:
        missing.append("No metrics yet: the run has not been evaluated.")
    gallery = _Gallery(run_dir / "report" / "figures")
    log_file = run_dir / "log.jsonl"
    stages = read_log(log_file) if log_file.is_file() else {}
    if not stages:
        missing.append("No training curves: the run has logged nothing.")
    curves = {
        stage: gallery.add(f"training-{stage}", figures.training_curves(log), f"Training of stage {stage}")
        for stage, log in stages.items()
        if log.training or log.evaluation
    }
    try:
        pictures = _forecast_pictures(run_dir, config_text, gallery)
    except DamageError:
        raise
    except InputError as error:
        missing.append(f"No figures of forecasts: {error}")
    if (run_dir / "report" / "embeddings.json").is_file():
        projected = read_embeddings(run_dir)
        if projected.projections:
            embeddings = gallery.add("embeddings", figures.projections(projected.projections), projected.caption)
    page = Environment(loader=PackageLoader("stdist.evaluation", "."), autoescape=True, trim_blocks=True)
    page.filters |= {"readable": readable, "percent": percent, "memory": memory, "change_to": change}
    html = page.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        title=TITLE,
        metrics=metrics,
        comparisons=compare(metrics.model, metrics.baselines) if metrics else [],
        variants=compare(metrics.model, metrics.variants) if metrics else [],
        verdict=verdict(metrics) if metrics else "",
        warnings=_warnings(metrics, pictures) if metrics else [],
        horizons=_horizon_figure(metrics, gallery) if metrics else None,
        reliability=_reliability_figure(metrics, gallery) if metrics and metrics.quantiles else None,
        curves=curves,
        pictures=pictures,
        embeddings=embeddings,
        missing=missing,
        config=config_text,
    )
    return write_atomically(index, html)


def compare(model: Scores, others: dict[str, Scores]) -> list[Comparison]:
    """Returns the model beside every other forecaster that has a pooled NRMSE, the strongest first."""
    comparisons = []
    for name, scores in others.items():
        if model.pooled.nrmse is None or not scores.pooled.nrmse:
            continue
        pairs = [(m.nrmse, o.nrmse) for m, o in zip(model.per_horizon, scores.per_horizon, strict=False)]
        lost = [m >= o for m, o in pairs if m is not None and o is not None]
        ratio = model.pooled.nrmse / scores.pooled.nrmse
        comparisons.append(Comparison(name, scores.pooled.nrmse, ratio, sum(lost), len(lost)))
    return sorted(comparisons, key=lambda comparison: comparison.nrmse)


def verdict(metrics: RunMetrics) -> str:
    """One or two plain sentences, true of every metric that the page shows: which baselines the model beats by all of
    them, and where it does not."""
    rows = compare(metrics.model, metrics.baselines)
    if metrics.model.pooled.nrmse is None:
        return "The model was scored on no observed point with traffic."
    if not rows:
        return "The model has no baseline to stand beside."
    losses = {name: losses_to(metrics.model, metrics.baselines[name]) for name in (row.name for row in rows)}
    lost = {name: by for name, by in losses.items() if by}
    strongest = rows[0]
    if not lost:
        return (
            f"The model beats every baseline ({len(rows)}); its NRMSE is {strongest.ratio:.2f} times that of "
            f"the strongest, {strongest.name}."
        )
    named = ", ".join(f"{name} (by {', '.join(by)})" for name, by in lost.items())
    beaten = (
        f"It beats the other {len(rows) - len(lost)}." if len(lost) < len(rows) else "It beats none by all of them."
    )
    return f"The model loses to {len(lost)} of {len(rows)} baselines: {named}. {beaten}"


def losses_to(model: Scores, other: Scores) -> list[str]:
    """The metrics by which ``other`` is no worse than ``model``, as ``MAE 1.05 ×``: how many times as large the model's
    error is, pooled, and where only the mean of horizons is no better, that."""
    losses = []
    for name in ("mae", "rmse", "mape", "nrmse"):
        for what, ours, theirs in (
            ("", model.pooled, other.pooled),
            (", mean of horizons,", model.mean_of_horizons, other.mean_of_horizons),
        ):
            own, its = getattr(ours, name), getattr(theirs, name)
            if own is not None and its is not None and own >= its:
                losses.append(f"{name.upper()}{what} {own / its:.2f} ×" if its else f"{name.upper()}{what} of 0")
                break
    return losses


def _warnings(metrics: RunMetrics, pictures: ForecastPictures | None) -> list[str]:
    """Lines about what makes the figures less than they seem."""
    lines = []
    pooled = metrics.model.pooled
    if pictures and pooled.nrmse is not None and not np.isclose(pictures.nrmse, pooled.nrmse, rtol=1e-4):
        lines.append(
            f"The forecasts drawn below have NRMSE {pictures.nrmse:.4f}, not the {pooled.nrmse:.4f} of the metrics: "
            "they were not made together."
        )
    for name, scores in {**metrics.baselines, **metrics.variants}.items():
        if scores.pooled.points != pooled.points:
            lines.append(
                f"{name} was scored on {scores.pooled.points:,} points, the model on {pooled.points:,}: "
                "their errors are not comparable."
            )
        if scores.fallbacks:
            share = f"{scores.fallbacks:,} of {scores.pooled.points:,} points"
            lines.append(f"{name}: {share} had no source and are persistence.")
    for row in compare(metrics.model, metrics.variants):
        if not row.model_wins:
            lines.append(f"The variant '{row.name}' is no worse than the model itself ({row.nrmse:.4f}).")
    scored, in_split = metrics.contract.get("windows"), metrics.contract.get("windows_in_split")
    if scored and in_split and scored < in_split:
        lines.append(f"Scored on {scored:,} of the {in_split:,} windows of the split.")
    return lines


class _Gallery:
    """Saves figures as PNG files and hands them out as data addresses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, figure: Figure, caption: str) -> Image:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
        write_atomically(self.folder / f"{name}.png", buffer.getvalue())
        return Image("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), caption)


def _horizon_figure(metrics: RunMetrics, gallery: _Gallery) -> Image:
    def curve(scores: Scores) -> list[float]:
        return [float("nan") if e.nrmse is None else e.nrmse for e in scores.per_horizon]

    others = {name: curve(scores) for name, scores in {**metrics.variants, **metrics.baselines}.items()}
    minutes = metrics.contract.get("cadence_seconds", 0) / 60
    figure = figures.horizon_curves(curve(metrics.model), others, minutes)
    return gallery.add("horizons", figure, "NRMSE of each step ahead")


def _reliability_figure(metrics: RunMetrics, gallery: _Gallery) -> Image:
    below = {
        name: {float(level): share for level, share in scores.pooled.below.items() if share is not None}
        for name, scores in metrics.quantiles.items()
    }
    steps = metrics.quantiles["model"].per_horizon if "model" in metrics.quantiles else []
    coverage = {
        name: [float("nan") if (share := step.intervals[name].coverage) is None else share for step in steps]
        for name in (steps[0].intervals if steps else ())
    }
    minutes = metrics.contract.get("cadence_seconds", 0) / 60
    figure = figures.reliability(below, coverage, minutes)
    return gallery.add("reliability", figure, "Quantiles of the test days, by those of the days calibrated on")


def _forecast_pictures(run_dir: Path, config_text: str, gallery: _Gallery) -> ForecastPictures:
    forecasts = open_forecasts(run_dir / "forecasts" / "test.zarr")
    header, store = forecasts.header, store_of(run_dir, config_text)
    cells, origins = cell_errors(forecasts, store)
    mean_truth = cells.sum_truth / np.maximum(cells.count, 1)
    kind = "cell" if isinstance(header.region, Region) else "node"
    traces = [
        gallery.add(
            f"forecast-{size}-{kind}".lower(),
            figures.cell_traces(read_trace(f"{size} {kind}", cell, forecasts, store, origins)),
            f"{size} {kind}: forecasts against what was observed, local time",
        )
        for size, cell in representative_cells(mean_truth).items()
    ]
    if isinstance(header.region, Region):
        figure = _grid_errors(header, header.region, store, int(origins[0]) + 1, cells)
        caption = "Traffic of the first scored day, and the error of each cell"
    else:
        errors, places = cells.errors(), None
        if {"longitude", "latitude"} <= set(store.dataset.coords):
            degrees = np.stack([store.dataset[name].values for name in ("longitude", "latitude")])
            places = degrees[:, *header.region.slices]
        figure = figures.node_errors(errors["nrmse"], errors["mae"], mean_truth, places, store.units)
        caption = "The error of each node, and against its mean"
    return ForecastPictures(traces, gallery.add("error-map", figure, caption), cells.pooled()["nrmse"])


def cell_errors(forecasts: ForecastFile, store: GridStore) -> tuple[ErrorState, Int[np.ndarray, " N"]]:
    """Returns errors with an entry a cell (row by row) or node, and the store's frame index of every origin."""
    header = forecasts.header
    windows, origins = match_windows(header, store)
    numbers = np.arange(header.cell_ids.size).reshape(header.cell_ids.shape)
    errors = ErrorState.empty(numbers.size)
    for block, tile in header.blocks():
        batch = forecasts.read(block, tile)[0], *read_targets(windows, tile, origins[block])
        cells = numbers[header.place(block, tile)[2:]].ravel()
        errors.add_at(cells, ErrorState.of(*(array.reshape(-1, cells.size) for array in batch)))
    return errors, origins


def _grid_errors(header: ForecastHeader, region: Region, store: GridStore, first: int, cells: ErrorState) -> Figure:
    """The error map, beside the city's traffic of the day from frame ``first`` on, until its clock is a day ahead."""
    later = np.flatnonzero(store.local_slots[first:] >= store.local_slots[first] + store.slots_per_day)
    stop = first + int(later[0]) if later.size else len(store.times)
    city_mean = np.empty(store.shape)
    for tile in tiles(store.region(), forecast_header.POINTS_IN_MEMORY // store.slots_per_day):
        day = store.values(header.metadata.contract.channel, first, stop, tile)
        # NaN: cells outside the city, and frames of a gap.
        city_mean[tile.slices] = np.nansum(day, axis=0) / np.maximum((~np.isnan(day)).sum(axis=0), 1)
    nrmse = cells.errors()["nrmse"].reshape(region.shape)
    return figures.error_map(nrmse, astuple(region), city_mean, store.units, store.inside)


def representative_cells(mean_truth: np.ndarray) -> dict[str, int]:
    """Cells or nodes of the largest, the median and a small (tenth percentile) mean, among those with traffic."""
    active = np.flatnonzero(mean_truth > 0)
    ranked = active[np.argsort(mean_truth[active])]
    labels: dict[int, str] = {}
    if len(ranked):
        for label, rank in (("Largest", -1), ("Median", len(ranked) // 2), ("Small", len(ranked) // 10)):
            labels.setdefault(int(ranked[rank]), label)
    return {label: cell for cell, label in labels.items()}


def read_trace(
    name: str, cell: int, forecasts: ForecastFile, store: GridStore, origins: Int[np.ndarray, " N"]
) -> figures.Trace:
    """Reads one cell's forecasts, by its position in the region row by row, and the truth of all their steps."""
    header, contract = forecasts.header, forecasts.header.metadata.contract
    index = np.unravel_index(cell, header.cell_ids.shape)
    position = [axis.start + int(i) for axis, i in zip(header.region.slices, index, strict=True)]
    first, stop = int(origins.min()), int(origins.max()) + contract.K + 1
    region = type(header.region)(*(edge for i in position for edge in (i, i + 1)))
    observed = store.observed(contract.channel, first, stop, region).ravel()
    truth = np.where(observed, store.values(contract.channel, first, stop, region).ravel(), np.nan)
    values = forecasts.read(slice(0, len(origins)), region, quantiles=True)
    point, *quantiles = values.reshape(values.shape[:3])
    where = ", ".join(f"{dim} {i}" for dim, i in zip(header.dims[2:], position, strict=True))
    title, band = f"{name} {header.cell_ids[index]} ({where})", None
    if quantiles:
        band = np.stack([quantiles[header.levels.index(level)] for level in INTERVALS["80 %"]])
    # Where clocks are changed, stamps of the wall clock are no axis: some come twice.
    times, zone = (store.local_times, None) if store.timezone is None else (store.times, store.timezone)
    return figures.Trace(title, contract.units, times[first:stop], truth, origins - first, point, band, zone)


def store_of(run_dir: Path, config_text: str) -> GridStore:
    """Opens the store that a run's configuration names. Raises InputError where it names none."""
    try:
        config: Any = load_yaml(config_text)
    except ValueError as error:
        raise DamageError(f"{run_dir / 'config.yaml'} is no YAML any more ({' '.join(str(error).split())})") from None
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict) or not data.get("store"):
        raise InputError(f"{run_dir / 'config.yaml'} names no data.store, so there is no truth to draw")
    return open_store(Path(data["store"]))


def readable(value: str | float | None) -> str:
    """Four decimals below 10, two below 1000, none above or for a count; a dash for nothing; text as it is."""
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return value if isinstance(value, str) else f"{value:,}"
    decimals = 4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0
    return f"{value:,.{decimals}f}"


def percent(ratio: float | None) -> str:
    """A ratio in per cent, as 12.3 %; a dash for nothing."""
    return "–" if ratio is None else f"{100 * ratio:,.1f} %"


def memory(size: int | None) -> str:
    """Bytes in GiB, or in MiB below one; a dash for nothing."""
    if size is None:
        return "–"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def change(before: float | None, after: float) -> str:
    """The way from ``before`` to ``after`` in per cent, or as a factor where it is tenfold or more."""
    if not before:
        return "–"
    if abs(after / before) >= 10:
        return f"× {after / before:,.0f}"
    return f"{100 * (after - before) / abs(before):+.1f} %"
