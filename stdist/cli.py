"""The door: every command is a few lines that call the floor below. Heavy imports wait for the command that needs them.

Every command takes ``--json`` (one JSON object as its last line) and answers bad input with one line and exit code 2.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stdist.errors import DivergenceError, InputError, Interrupted

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Forecast city-wide traffic.",
)
err = Console(stderr=True, highlight=False, soft_wrap=True)
Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")]


def say(line: str) -> None:
    """A line for people; standard output stays free for results."""
    err.print(line, markup=False)


def finish(result: dict[str, Any], as_json: bool, line: str) -> None:
    print(json.dumps(result) if as_json else line, flush=True)


@app.command()
def prepare(
    context: typer.Context,
    reader: Annotated[str, typer.Argument(help="telecom-italia | frames-npz | wide-csv | synthetic")],
    sources: Annotated[list[Path] | None, typer.Argument(help="raw files or folders")] = None,
    out: Annotated[Path, typer.Option(help="store to write, as city.zarr")] = ...,  # type: ignore[assignment]
    city: Annotated[str | None, typer.Option(help="name of the city")] = None,
    channel: Annotated[str | None, typer.Option(help="what the values are, as internet")] = None,
    start: Annotated[str | None, typer.Option(help="local time of the first frame, 2013-11-01T00:00")] = None,
    cadence: Annotated[int | None, typer.Option(help="minutes between frames")] = None,
    utc_offset: Annotated[int | None, typer.Option(help="minutes the city is ahead of UTC")] = None,
    height: Annotated[int | None, typer.Option(help="rows of the grid")] = None,
    width: Annotated[int | None, typer.Option(help="columns of the grid")] = None,
    row0: Annotated[int | None, typer.Option(help="the data's row id of the first row")] = None,
    col0: Annotated[int | None, typer.Option(help="the data's column id of the first column")] = None,
    id_width: Annotated[int | None, typer.Option(help="columns of the grid the cell ids count in")] = None,
    days: Annotated[int | None, typer.Option(help="days to generate")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the generated city")] = None,
    train: Annotated[str | None, typer.Option(help="training days, 2013-11-01:2013-11-20")] = None,
    validation: Annotated[str | None, typer.Option(help="validation days")] = None,
    test: Annotated[str | None, typer.Option(help="test days")] = None,
    as_json: Json = False,
) -> None:
    """Turn raw files into a grid store."""
    from data_prep import READERS
    from data_prep.preparation import prepare as write_store
    from stdist.progress import progress_bar

    if reader not in READERS:
        raise InputError(f"no reader {reader!r}; readers: {', '.join(READERS)}")
    options = {name for each in READERS.values() for name in each.options}
    given = {name: value for name, value in context.params.items() if name in options and value is not None}
    unknown = [name for name in given if name not in READERS[reader].options]
    if unknown:
        taken = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(READERS[reader].options))
        raise InputError(f"{reader} takes no --{unknown[0].replace('_', '-')}; it takes {taken}")
    with progress_bar("prepare") as progress:
        summary = write_store(READERS[reader].plan(sources or [], **given), out, progress=progress)
    missing = sum(summary.missing.values())
    line = f"{summary.path}: {summary.city}, {summary.cells} cells, {summary.frames} frames in {summary.runs} runs"
    finish(
        summary.as_dict(),
        as_json,
        f"{line}, {', '.join(summary.channels)}; {missing} values missing and imputed",
    )


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML, as configs/milan_block.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    as_json: Json = False,
) -> None:
    """Run or resume every stage a config names, then forecast, score and report."""
    from stdist.config import load_config
    from stdist.vision_llm import recipe

    result = recipe.train(load_config(config, overrides), say)
    finish(result, as_json, result["report"])


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="run folder")] = Path("runs/demo"),
    data: Annotated[Path | None, typer.Option(help="a store instead of the synthetic city")] = None,
    as_json: Json = False,
) -> None:
    """The whole pipeline on an embedded synthetic city, or on a store."""
    from stdist.vision_llm.demo import run_demo

    result = run_demo(out, data, say)
    finish(result, as_json, result["report"])


@app.command()
def forecast(
    run: Annotated[Path, typer.Argument(help="run folder")],
    store: Annotated[Path, typer.Argument(help="grid store")],
    out: Annotated[Path, typer.Option(help="NAME.zarr or NAME.parquet")] = ...,  # type: ignore[assignment]
    region: Annotated[str | None, typer.Option(help="r0:r1,c0:c1; the run's own if absent")] = None,
    split: Annotated[str, typer.Option(help="train, validation, test, or local days A:B")] = "test",
    as_json: Json = False,
) -> None:
    """Forecast a region of a store for every window of a split."""
    from stdist.vision_llm import scoring

    if out.suffix not in (".zarr", ".parquet"):
        raise InputError(f"{out}: forecasts are written as .zarr or .parquet; change --out")
    result = scoring.forecast(run, store, region, split, out, say)
    finish(result, as_json, str(out))


@app.command()
def evaluate(
    forecasts: Annotated[Path, typer.Argument(help="what stdist forecast wrote")],
    store: Annotated[Path, typer.Argument(help="the store it was made on")],
    as_json: Json = False,
) -> None:
    """Score forecasts on observed points, with their evaluation contract."""
    from stdist.evaluation import evaluate as score

    result = score(forecasts, store).to_json()
    contract, pooled, mean = result["contract"], result["pooled"], result["mean_of_horizons"]
    lines = [f"{key}: {value}" for key, value in contract.items()]
    for name, errors in (("pooled", pooled), ("mean of horizons", mean)):
        lines.append(f"{name}: " + ", ".join(f"{k.upper()} {errors[k]:.4f}" for k in ("mae", "rmse", "nrmse")))
    finish(result, as_json, "\n".join(lines))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="run folder")],
    beside: Annotated[list[Path] | None, typer.Option(help="runs to show as variants")] = None,
    as_json: Json = False,
) -> None:
    """Build the run's report page again, with other runs beside it if asked."""
    from stdist.evaluation import add_variants, build_report

    if beside:
        add_variants(run, beside)
    page = build_report(run)
    finish({"report": str(page)}, as_json, str(page))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine has: devices, attention back ends and why they are chosen, versions."""
    from stdist.vision_llm.doctor import as_lines, examine

    findings = examine()
    finish(findings, as_json, as_lines(findings))


def main() -> None:
    """Console script: bad input exits 2, a diverged training 3, Ctrl-C 130, each with one line; the rest is a bug."""
    try:
        app()
    except (InputError, DivergenceError, Interrupted) as error:
        codes = {InputError: 2, DivergenceError: 3, Interrupted: 130}
        say(f"{'interrupted' if isinstance(error, Interrupted) else 'error'}: {error}")
        sys.exit(codes[type(error)])
