"""Draws the README's picture of a report from a finished run: a day of forecasts, and its error beside the baselines'.

    stdist demo --out demo
    python docs/make_picture.py demo/runs/NAME --out docs/report.png

Says the size of the file, and fails above 200 kB.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from stdist.evaluation.figures import MODEL, MUTED, draw_day, page_figure
from stdist.evaluation.forecasts import open_forecasts
from stdist.evaluation.report import cell_errors, read_trace, store_of
from stdist.evaluation.run_files import read_metrics

WIDTH, HEIGHT, DOTS_PER_INCH = 11.0, 3.6, 110
LARGEST_FILE = 200_000


def picture(run_dir: Path) -> Figure:
    """Draws the cell or node with the most traffic, and pooled NRMSE, the smallest on top."""
    forecasts = open_forecasts(run_dir / "forecasts" / "test.zarr")
    store = store_of(run_dir, (run_dir / "config.yaml").read_text(encoding="utf-8"))
    cells, origins = cell_errors(forecasts, store)
    trace = read_trace("Busiest", int(cells.sum_truth.argmax()), forecasts, store, origins)
    metrics = read_metrics(run_dir)
    errors = {name: scores.pooled.nrmse or 0.0 for name, scores in metrics.baselines.items()}
    errors["this model"] = metrics.model.pooled.nrmse or 0.0
    names = sorted(errors, key=errors.__getitem__, reverse=True)
    with page_figure(HEIGHT) as figure:
        figure.set_figwidth(WIDTH)
        day, bars = figure.subplots(1, 2, width_ratios=(3, 2))
        draw_day(day, trace)
        steps = trace.forecast.shape[1]
        day.set(title=f"Forecasts of {steps} steps (orange) and what was observed", ylabel=trace.units)
        colours = [MODEL if name == "this model" else MUTED for name in names]
        drawn = bars.barh(names, [errors[name] for name in names], color=colours)
        bars.bar_label(drawn, fmt="%.3f", padding=4)
        bars.set(title="Error on the test days (NRMSE)")
        bars.grid(visible=False)
        bars.margins(x=0.15)
        return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("report.png"))
    arguments = parser.parse_args()
    picture(arguments.run_dir).savefig(arguments.out, dpi=DOTS_PER_INCH)
    size = arguments.out.stat().st_size
    print(f"{arguments.out}: {size / 1000:.0f} kB")
    if size > LARGEST_FILE:
        raise SystemExit(f"larger than {LARGEST_FILE / 1000:.0f} kB; lower DOTS_PER_INCH")


if __name__ == "__main__":
    main()
