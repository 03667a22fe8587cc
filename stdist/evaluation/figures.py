"""The report's figures: pure functions of arrays that return matplotlib figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import matplotlib.dates as mdates
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stdist.evaluation.run_files import Projection, StageLog

MODEL = "#c2410c"
TRUTH = "#1f2937"
MUTED = "#94a3b8"
OTHERS = ("#0f766e", "#1d4ed8", "#7c3aed", "#64748b", "#a16207", "#be185d", "#15803d")
STYLES: Any = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
WIDTH = 8.4
PREFERRED_SCALARS = ("loss", "reward", "kl", "learning_rate")
PANELS_PER_STAGE = 6
DATES = ["%Y", "%b", "%d %b", "%H:%M", "%H:%M", "%H:%M"]
DATES_AT_ZERO = ["", "%Y", "%d %b", "%d %b", "%H:%M", "%H:%M"]
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": "#475569",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.7,
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "legend.frameon": False,
    "legend.fontsize": 10,
}


@contextmanager
def page_figure(height: float, **style: Any) -> Iterator[Figure]:
    """A figure of the page's width, to be drawn on while the report's style holds."""
    rc: Any = STYLE | style
    with rc_context(rc):
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def horizon_curves(model: Sequence[float], others: Mapping[str, Sequence[float]], minutes_per_step: float) -> Figure:
    """NRMSE of each horizon step, the model against every other forecaster."""
    with page_figure(4.6) as figure:
        axes = figure.add_subplot()
        axes.set_prop_cycle(color=OTHERS, linestyle=STYLES)
        marker = "o" if len(model) < 40 else ""
        for name, curve in others.items():
            axes.plot(np.arange(1, len(curve) + 1), curve, label=name, linewidth=1.6, marker=marker, markersize=2.5)
        model_line: dict[str, Any] = {"color": MODEL, "linestyle": "-", "linewidth": 2.8, "markersize": 4}
        axes.plot(np.arange(1, len(model) + 1), model, label="model", marker=marker, **model_line)
        axes.set(xlabel=f"steps ahead (one step = {minutes_per_step:g} min)", ylabel="NRMSE")
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure


def reliability(
    below: Mapping[str, Mapping[float, float]], coverage: Mapping[str, Sequence[float]], minutes_per_step: float
) -> Figure:
    """Left, of every forecaster, the share of truths no larger than each quantile against its level: on the diagonal
    where both agree. Right, the share of truths inside the model's intervals, by name as ``80 %``, at each step; the
    dashed lines are what was promised."""
    with page_figure(4.2) as figure:
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle="--")
        left.set_prop_cycle(color=OTHERS, linestyle=STYLES)
        for name, shares in below.items():
            own: dict[str, Any] = {"color": MODEL, "linestyle": "-", "linewidth": 2.4} if name == "model" else {}
            left.plot([*shares], [*shares.values()], label=name, marker="o", markersize=4, **own)
        left.set(
            title="Reliability of the quantiles", xlabel="level of the quantile", ylabel="share of truths below it"
        )
        left.set(xlim=(0, 1), ylim=(0, 1))
        left.set_aspect("equal")
        for (name, shares_inside), colour in zip(coverage.items(), (MODEL, TRUTH), strict=False):
            steps = np.arange(1, len(shares_inside) + 1)
            right.plot(
                steps, shares_inside, color=colour, linewidth=2, marker="o", markersize=4, label=f"{name} interval"
            )
            right.axhline(float(name.removesuffix("%")) / 100, color=colour, linewidth=1.2, linestyle="--")
        right.set(title="Coverage by step, model", xlabel=f"steps ahead (one step = {minutes_per_step:g} min)")
        right.set_ylim(min([0.5, *(share for shares in coverage.values() for share in shares if share < 0.5)]), 1)
        right.locator_params(axis="x", integer=True)
        handles = [pair for axes in (left, right) for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
        figure.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=2)
        return figure


def training_curves(log: StageLog) -> Figure:
    """Every logged scalar of one stage in a panel of its own, evaluations as points."""
    names = [n for n in PREFERRED_SCALARS if n in log.training]
    names += [n for n in log.training if n not in names]
    panels = [(f"{name} (evaluation)", values, True) for name, values in log.evaluation.items()]
    panels = [(n, log.training[n], False) for n in names[: max(2, PANELS_PER_STAGE - len(panels))]] + panels
    rows = -(-len(panels) // 2)
    with page_figure(2.5 * rows) as figure:
        for i, (name, values, is_evaluation) in enumerate(panels):
            axes = figure.add_subplot(rows, 2, i + 1)
            steps = np.array(sorted(values))
            curve = np.array([values[step] for step in steps])
            if is_evaluation:
                axes.plot(steps, curve, color=MODEL, marker="o", markersize=5, linewidth=1.2)
            else:
                axes.plot(steps, curve, color=MUTED, linewidth=0.9)
                axes.plot(steps, smoothed(curve), color=TRUTH, linewidth=1.6)
            axes.set(title=name, xlabel="step")
            axes.locator_params(axis="x", nbins=5, integer=True)
        figure.align_labels()
        return figure


def smoothed(curve: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Centred moving mean over a twentieth of the curve, shorter at its ends."""
    window = np.ones(2 * (len(curve) // 40) + 1)
    return np.convolve(curve, window, "same") / np.convolve(np.ones_like(curve), window, "same")


class Trace(NamedTuple):
    """One cell: N forecasts of K steps and the truth. ``times`` are local stamps, or those of UTC where ``timezone``
    names the zone whose clock is shown; ``origins`` count into them."""

    title: str
    units: str
    times: Shaped[np.ndarray, " T"]
    truth: Float[np.ndarray, " T"]
    """NaN where it was not observed."""
    origins: Int[np.ndarray, " N"]
    forecast: Float[np.ndarray, "N K"]
    band: Float[np.ndarray, "2 N K"] | None = None
    """The 0.1 and the 0.9 quantile of the candidates."""
    timezone: str | None = None


def cell_traces(trace: Trace) -> Figure:
    """Forecasts stitched at the last step, above whole K-step forecasts of the busiest day."""
    K, origins = trace.forecast.shape[1], trace.origins
    with page_figure(5.4) as figure:
        top, bottom = figure.subplots(2, 1, gridspec_kw={"hspace": 0.08})
        stitched = np.full(len(trace.times), np.nan)
        stitched[origins + K] = trace.forecast[:, K - 1]
        dense = len(origins) > 1 and np.median(np.diff(np.sort(origins))) == 1
        marks: dict[str, Any] = {"linewidth": 1.3} if dense else {"linestyle": "", "marker": "o", "markersize": 3}
        top.plot(trace.times, trace.truth, color=TRUTH, linewidth=1.3, label="observed")
        top.plot(trace.times, stitched, color=MODEL, label="forecast", **marks)
        top.set(title=f"{trace.title}: every forecast {K} steps ahead", ylabel=trace.units)
        _time_axis(top, trace)
        draw_day(bottom, trace)
        interval = ", with 10 to 90 % of the candidates" if trace.band is not None else ""
        bottom.set(title=f"One day of whole {K}-step forecasts{interval}; dots are origins", ylabel=trace.units)
        figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure


def draw_day(axes: Axes, trace: Trace) -> None:
    """Draws whole forecasts of the busiest day, one after the other, over what was observed."""
    times, truth, origins, K = trace.times, trace.truth, trace.origins, trace.forecast.shape[1]
    day = int(np.timedelta64(1, "D") / (times[1] - times[0]))
    next_free = start = _busiest(truth, origins, day)
    stop = min(len(times), start + day + K)
    axes.plot(times[start:stop], truth[start:stop], color=TRUTH, linewidth=1.3, label="observed")
    for row in np.argsort(origins):
        origin = int(origins[row])
        if origin < next_free or origin + K >= stop:
            continue
        next_free = origin + K
        targets = times[origin + 1 : origin + K + 1]
        if trace.band is not None:
            axes.fill_between(targets, *trace.band[:, row], color=MODEL, alpha=0.18, linewidth=0)
        axes.plot(targets, trace.forecast[row], color=MODEL, linewidth=1.5)
        axes.plot(times[origin], truth[origin], marker="o", markersize=4, color=TRUTH, linestyle="")
    _time_axis(axes, trace)


def _time_axis(axes: Axes, trace: Trace) -> None:
    zone = ZoneInfo(trace.timezone or "UTC")
    locator = mdates.AutoDateLocator(zone, minticks=4, maxticks=9)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(
        mdates.ConciseDateFormatter(locator, zone, formats=DATES, zero_formats=DATES_AT_ZERO, show_offset=False)
    )
    axes.set_ylim(bottom=min(0.0, float(np.nanmin(trace.forecast))))
    axes.margins(x=0.01)


def _busiest(truth: np.ndarray, origins: np.ndarray, day: int) -> int:
    """The origin after which a day of forecasts meets the most traffic."""
    total = np.concatenate(([0.0], np.cumsum(np.nan_to_num(truth))))
    traffic = total[np.minimum(origins + day, len(truth))] - total[origins]
    return int(origins[np.argmax(np.where(origins + day <= origins.max() + 1, traffic, -1))])


def error_map(
    cell_nrmse: Float[np.ndarray, "h w"],
    region: tuple[int, int, int, int],
    city_mean: Float[np.ndarray, "H W"],
    units: str,
    inside: Bool[np.ndarray, "H W"],
) -> Figure:
    """Mean traffic of the whole city with the region marked, and each scored cell's NRMSE; north is up."""
    r0, r1, c0, c1 = region
    traffic = np.where(inside & (city_mean > 0), city_mean, np.nan)
    maps: Any = (
        (f"Mean traffic, {inside.shape[0]} × {inside.shape[1]} cells", traffic, units, "Greys", None),
        ("Error of each scored cell", cell_nrmse, "NRMSE", "YlOrBr", (c0 - 0.5, c1 - 0.5, r0 - 0.5, r1 - 0.5)),
    )
    with page_figure(4.0, **{"axes.grid": False}) as figure:
        left, right = figure.subplots(1, 2)
        for axes, (title, values, label, colours, extent) in zip((left, right), maps, strict=True):
            norm = LogNorm() if axes is left and _long_tailed(values) else None
            image = axes.imshow(values, origin="lower", cmap=colours, norm=norm, extent=extent)
            figure.colorbar(image, ax=axes, label=label, shrink=0.8)
            axes.set(title=title, xlabel="column", ylabel="row (north is up)")
            axes.locator_params(nbins=5, integer=True)
        left.add_patch(Rectangle((c0 - 0.5, r0 - 0.5), c1 - c0, r1 - r0, fill=False, edgecolor=MODEL, linewidth=2))
        right.set_facecolor("#e2e8f0")
        return figure


def node_errors(
    nrmse: Float[np.ndarray, " n"],
    mae: Float[np.ndarray, " n"],
    mean: Float[np.ndarray, " n"],
    places: Float[np.ndarray, "2 n"] | None,
    units: str,
) -> Figure:
    """NRMSE of each scored node on a map, or the largest first without ``places`` (longitude, latitude); MAE against
    the mean. A node without an observed point (NaN) is left out."""
    with page_figure(4.0) as figure:
        left, right = figure.subplots(1, 2)
        size = np.clip(5000 / len(mean), 4, 40)
        seen = ~np.isnan(nrmse)
        if places is None:
            left.plot(np.arange(1, seen.sum() + 1), np.sort(nrmse[seen])[::-1], color=MODEL, linewidth=1.8)
            left.set(title="Error of each node, sorted", xlabel="rank of the node", ylabel="NRMSE")
            left.set_ylim(bottom=0)
            left.locator_params(axis="x", nbins=5, integer=True)
        else:
            # One broken sensor must not take the colours of all others.
            low, high = np.percentile(nrmse[seen], (2, 98)) if seen.any() else (0, 1)
            share = np.maximum(mean, 0) / max(float(np.max(mean)), 1e-9)
            dots = left.scatter(
                *places[:, seen], c=nrmse[seen], s=size * (0.4 + 2 * share[seen]), cmap="YlOrBr", vmin=low, vmax=high
            )
            dots.set(edgecolor="#78716c", linewidth=0.3)
            figure.colorbar(dots, ax=left, label="NRMSE", shrink=0.8, extend="both")
            left.set_aspect(1 / max(np.cos(np.radians(np.nanmean(places[1]))), 0.1), adjustable="datalim")
            left.set(title="Error of each node; size: its mean", xlabel="longitude", ylabel="latitude")
            left.locator_params(axis="x", nbins=4)
            left.ticklabel_format(useOffset=False)
        right.scatter(mean[seen], mae[seen], s=size, color=MODEL, alpha=0.6, linewidth=0)
        if _long_tailed(mean[seen]):
            right.set(xscale="log", yscale="log")
        right.set(title="Error against traffic", xlabel=f"mean ({units})", ylabel=f"MAE ({units})")
        return figure


def _long_tailed(values: Float[np.ndarray, " n"]) -> bool:
    """True where a logarithmic scale shows the positive values better."""
    finite = values[~np.isnan(values)]
    return bool(finite.size) and 0 < 20 * finite.min() < finite.max()


def projections(panels: Sequence[Projection]) -> Figure:
    """Embeddings in a plane, three in a row; axes have no meaning of their own, only what lies close does."""
    rows = -(-len(panels) // 3)
    plain = {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}
    with page_figure(3.5 * rows, **plain) as figure:
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(rows, min(3, len(panels)), i + 1)
            values, (x, y) = np.array(panel.values, float), np.array(panel.points, float).T
            dots = axes.scatter(
                x,
                y,
                c=values,
                s=np.clip(3000 / len(values), 3, 40),
                cmap="twilight_shifted" if panel.cyclic else "viridis",
                norm=LogNorm() if _long_tailed(values) and not panel.cyclic else None,
            )
            for name, point in zip(panel.names, panel.points, strict=bool(panel.names)):
                axes.annotate(name, point, xytext=(4, 4), textcoords="offset points", fontsize=8)
            if not panel.names:
                figure.colorbar(dots, ax=axes, label=panel.quantity, location="bottom", shrink=0.9)
            axes.set(title=panel.title, xticks=[], yticks=[])
            axes.margins(0.15)
        return figure
