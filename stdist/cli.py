"""The door: every command is a few lines that call the floor below. Heavy imports wait for the command that needs them.

Every command takes ``--json`` (one JSON object as its last line) and answers bad input with one line and exit code 2.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stdist import __version__
from stdist.boundary import Json, ended, finish, log
from stdist.errors import InputError
from stdist.forecast_options import ABSENT, request_of, takes_forecast_options
from stdist.operation_commands import calibrate, said_of_next, serve, watch
from stdist.reader_commands import Group, reader_commands, run_reader
from stdist.scalars import figure

MOST_PROCESSES, MOST_WORKERS = 1024, 65536
"""Processes that a command may ask of one machine, and of a cluster."""
DAMAGED = 4
"""Exit code where something is not as it was written, of ``stdist check`` and of ``stdist ledger``."""

app = typer.Typer(
    cls=Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Forecast city-wide traffic.",
)


@app.callback(invoke_without_command=True)
def everywhere(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        print(f"stdist {__version__}")
        raise typer.Exit


def prepare(
    reader: str,
    *,
    sources: Annotated[list[Path] | None, typer.Argument(help="raw files or folders")] = None,
    out: Annotated[Path, typer.Option(help="store to write, as city.zarr")] = ...,  # type: ignore[assignment]
    workers: Annotated[int, typer.Option(max=MOST_PROCESSES, help="processes of this machine")] = 1,
    ray: Annotated[str | None, typer.Option(help="Ray cluster: HOST:6379, ray://HOST:10001, auto or local")] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    from data_prep import READERS
    from data_prep.preparation import prepare as write_store
    from stdist.progress import progress_bar

    if ray and workers > 1:
        raise InputError(f"--workers {workers} are of this machine, --ray {ray} has its own; give one of the two")
    if ray:
        # Workers stand in folders of their own.
        out, sources = out.absolute(), [source.absolute() for source in sources or []]
        options = {name: value.absolute() if isinstance(value, Path) else value for name, value in options.items()}
    plan = READERS[reader].plan(sources or [], **options)
    if plan.read_as:
        log(plan.read_as)
    with cluster(ray) as executor, progress_bar("prepare") as progress:
        summary = write_store(plan, out, workers, progress, executor)
    missing, absent = sum(summary.missing.values()), summary.absent_days
    line = f"{summary.path}: {summary.city}, {summary.cells} cells, {summary.frames} frames in {summary.runs} runs"
    if absent:
        line += f", {len(absent)} days absent ({', '.join(absent[:3])}{', …' if len(absent) > 3 else ''})"
    line += f", {', '.join(summary.channels)}; {missing} values missing and imputed"
    for channel, counts in summary.unseen.items():
        if counts["never_observed"]:
            line += f"; {channel}: {counts['never_observed']} cells never observed"
        if counts["never_in_training"]:
            line += f"; {channel}: {counts['never_in_training']} cells scored but never observed in training"
    said = {"read_as": plan.read_as, "said": [*plan.said]}
    finish(summary.as_dict() | said, as_json, "; ".join([line, *plan.said]))


def cluster(address: str | None) -> AbstractContextManager[Any]:
    """Returns the executor of a preparation's parts, in a context: None for this machine."""
    if address is None:
        return nullcontext()
    from stdist.orchestration.preparation import ray_executor

    return ray_executor(address)


app.add_typer(
    reader_commands(
        prepare,
        "Turn raw files into a store: stdist prepare READER SRC... --out STORE. Interrupted, the same command goes on "
        "where it was. Every reader takes --out, --workers, --ray and --json; stdist prepare READER --help says the "
        "rest, and what the data is.",
    ),
    name="prepare",
)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def append(
    context: typer.Context,
    store: Annotated[Path, typer.Argument(help="grid store that stdist prepare made")],
    corrections: Annotated[
        bool, typer.Option("--corrections", help="values other than the store's take their place, and are counted")
    ] = False,
    as_json: Json = False,
) -> None:
    """Append the days of new files to a store, in one step: stdist append STORE SRC...

    The files are read by the reader and options that made the store; options of stdist prepare READER that follow win.
    Late values are taken; other values than the store's are refused without --corrections. Files without stamps of
    their own need --start. The split stays. Who reads the store meanwhile goes on with its old bytes, or is told that
    they changed.
    """
    from data_prep.append import append as grow
    from data_prep.append import reader_of
    from stdist.data.append import recover
    from stdist.data.metadata import read_attributes
    from stdist.progress import progress_bar

    def body(reader: str, *, sources: Annotated[list[Path] | None, typer.Argument()] = None, **options: Any) -> None:
        with progress_bar("append") as progress:
            summary = grow(store, sources or [], corrections, progress, **options)
        if summary.read_as:
            log(summary.read_as)
        finish(summary.as_dict(), as_json, "; ".join([summary.line, *summary.said]))

    recover(store)
    run_reader(reader_of(read_attributes(store), store), body, context.args, f"stdist append {store}")


@app.command()
def check(
    store: Annotated[Path, typer.Argument(help="grid store")],
    as_json: Json = False,
) -> None:
    """Look at everything in a store: schema, digests, gaps, coverage, ranges, orientation, statistics, imputation.

    Exit code 4 where something is damaged or wrong; warnings leave it at 0.
    """
    from stdist.data.check import check_store
    from stdist.data.check_report import as_table
    from stdist.progress import progress_bar

    with progress_bar("check") as progress:
        report = check_store(store, progress)
    if not as_json:
        Console(highlight=False).print(as_table(report))
    finish(report.as_dict(), as_json, report.verdict)
    if not report.ok:
        raise typer.Exit(DAMAGED)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML, as configs/milan_block.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    force: Annotated[bool, typer.Option("--force", help="also where the plan says that a GPU is too small")] = False,
    as_json: Json = False,
) -> None:
    """Run or resume every stage a config names, then forecast, score and report."""
    from stdist.runs import recipes

    loaded = recipes.load_config(config, overrides)
    if loaded.learners.num_workers > 1 or recipes.recipe_of(loaded).workers(loaded):
        from stdist.orchestration import learners

        result = learners.train(loaded, log, force)
    else:
        result = recipes.train(loaded, log, force=force)
    finish(result, as_json, result["report"])


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="run folder")] = Path("runs/demo"),
    data: Annotated[Path | None, typer.Option(help="a store instead of the synthetic city")] = None,
    as_json: Json = False,
) -> None:
    """The whole pipeline on an embedded synthetic city, or on a store."""
    from stdist.vision_llm.demo import run_demo

    result = run_demo(out, data, log)
    finish(result, as_json, result["report"])


@app.command()
@takes_forecast_options
def forecast(
    run: Annotated[Path, typer.Argument(help="run folder")],
    store: Annotated[Path, typer.Argument(help="grid store")],
    out: Annotated[Path, typer.Option(help="NAME.zarr, .parquet or .csv")] = ...,  # type: ignore[assignment]
    workers: Annotated[
        int | None, typer.Option(max=MOST_WORKERS, help="Ray actors that forecast; as many as fit if --ray alone")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="their cluster: HOST:6379, ray://HOST:10001, auto or local")] = None,
    as_json: Json = False,
    **asked: Any,
) -> None:
    """Forecast a region of a store for every window of a split, or what comes next, in this process or by workers."""
    from stdist.runs import recipes

    request = request_of(run, store, out, **asked)
    if workers is None and ray is None:
        result = recipes.forecast(request, log)
    else:
        from stdist.orchestration.policy_workers.sweep import sweep

        result = sweep(request, workers, ray, log)
    finish(result, as_json, "; ".join([str(out), *said_of_next(result)]))


for command in (calibrate, watch, serve):
    app.command()(command)


@app.command()
def ledger(
    run: Annotated[Path, typer.Argument(help="run folder")],
    as_json: Json = False,
) -> None:
    """Prove from a run's own record that every group of candidates was learnt from exactly once.

    Exit code 4 where one was not, and its name.
    """
    from stdist.orchestration.policy_workers.proof import prove_run

    proof = prove_run(run)
    if not as_json:
        for problem in proof.problems[1:]:
            log(problem)
    finish(proof.as_dict(), as_json, proof.verdict)
    if proof.problems:
        raise typer.Exit(DAMAGED)


@app.command()
def evaluate(
    forecasts: Annotated[Path, typer.Argument(help="what stdist forecast wrote")],
    store: Annotated[Path, typer.Argument(help="the store it was made on")],
    as_json: Json = False,
) -> None:
    """Score forecasts on observed points, with their evaluation contract, and the baselines on the same points."""
    from stdist.evaluation import evaluate as score
    from stdist.evaluation.company import baselines_beside

    result = score(forecasts, store).to_json()
    company = baselines_beside(forecasts, store)
    result["baselines"] = company.scores
    contract, pooled, mean = result["contract"], result["pooled"], result["mean_of_horizons"]
    lines = [f"{key}: {value}" for key, value in contract.items() if value is not None]
    for name, errors in (("pooled", pooled), ("mean of horizons", mean)):
        figures = [f"{key.upper()} {figure(errors[key])}" for key in ("mae", "rmse", "mape", "nrmse")]
        lines.append(f"{name}: {', '.join(figures)}")
    lines.append(company.line)
    if "quantiles" in result:
        pooled = result["quantiles"]["pooled"]
        lines.append(f"CRPS {result['quantiles']['crps_is']}: {figure(pooled['crps'])}")
        for name, interval in pooled["intervals"].items():
            lines.append(
                f"{name} interval: coverage {interval['coverage']:.1%}, mean width {figure(interval['width'])}"
            )
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
@takes_forecast_options
def submit(
    config: Annotated[Path | None, typer.Argument(help="YAML below the working directory, or a run folder")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    address: Annotated[str, typer.Option(help="the cluster's dashboard, http://HOST:8265")] = ...,  # type: ignore[assignment]
    working_dir: Annotated[Path, typer.Option(help="folder the job gets a copy of")] = Path("."),
    submission_id: Annotated[str | None, typer.Option(help="name of the job; Ray chooses one if absent")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="do not follow the job's log")] = False,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="end a job instead; it saves its step first")] = None,
    store: Annotated[Path | None, typer.Option("--forecast", metavar="STORE", help="forecast it with the run")] = None,
    out: Annotated[Path | None, typer.Option(help="of --forecast, as of stdist forecast")] = None,
    workers: Annotated[
        int | None, typer.Option(max=MOST_WORKERS, help="of --forecast; as many as fit if absent")
    ] = None,
    as_json: Json = False,
    **asked: Any,
) -> None:
    """Run stdist train CONFIG, or with --forecast stdist forecast RUN STORE, on a Ray cluster and follow its log; the
    exit code is the job's.

    Ctrl-C detaches: the job goes on. Relative paths in CONFIG are made absolute on this machine, so that store and run
    folder lie where the cluster finds them too (docs/cluster.md).
    """
    from stdist.orchestration import jobs

    if stop is not None and config is None:
        end = jobs.find(address, stop).stop()
        return finish(vars(end), as_json, f"{end.submission_id}: {end.status}")
    if stop is not None or config is None:
        raise InputError("submit takes the CONFIG of a job to run, or --stop ID of one to end")
    if store is not None:
        from stdist.evaluation.forecasts import require_suffix

        if out is None:
            raise InputError("--forecast needs --out NAME.zarr, .parquet or .csv, where the cluster can write it")
        request = request_of(config, store, require_suffix(out), **asked)
        job, result = jobs.submit_forecast(request, workers, address, working_dir, submission_id), out.absolute()
    elif out is not None or workers is not None or asked != ABSENT:
        raise InputError("a training has no --out, no --workers and nothing to forecast; name a store by --forecast")
    else:
        job, parsed = jobs.submit(config, overrides or [], address, working_dir, submission_id)
        result = working_dir.absolute() / parsed.run_dir
    started = {"submission_id": job.submission_id, "out" if store else "run": str(result)}
    log(f"job {job.submission_id} was submitted; {job.how_to_go_on}")
    if detach:
        return finish(started, as_json, job.submission_id)
    end = job.follow(lambda text: print(text, end="", file=sys.stderr, flush=True))
    if end.exit_code == 0 or as_json:
        finish(started | vars(end), as_json, f"{end.submission_id}: {end.status}, {result}")
    if end.exit_code:
        log(f"error: job {end.submission_id} {end.status.lower()}" + (f": {end.error}" if end.error else ""))
        raise typer.Exit(end.exit_code)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML, as configs/milan_7b.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    device: Annotated[str | None, typer.Option(help="one learner's, as 4090, 5090, a100-80, h100, l40s")] = None,
    device_memory: Annotated[str | None, typer.Option(help="of a device without a name here, as 32GiB")] = None,
    device_flops: Annotated[float | None, typer.Option(help="its peak in bfloat16, operations a second")] = None,
    mfu: Annotated[float | None, typer.Option(help="share of the peak that a step reaches; 0.22 if absent")] = None,
    as_json: Json = False,
) -> None:
    """Say what every stage of a run will hold, compute and send, before anything starts."""
    from stdist.runs import devices
    from stdist.runs.memory_plan import parse_memory
    from stdist.runs.recipes import load_config, recipe_of

    memory = None if device_memory is None else parse_memory(device_memory)
    planned_for = devices.device(device, memory, device_flops, mfu)
    loaded = load_config(config, overrides)
    result = recipe_of(loaded).plan(loaded, planned_for)
    if not as_json:
        Console(highlight=False).print(result.as_tables())
    finish(result.as_dict(), as_json, "\n".join([*result.notes, *result.verdicts]))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine has: devices, attention back ends and why they are chosen, versions."""
    from stdist.vision_llm.doctor import as_lines, examine

    findings = examine()
    finish(findings, as_json, as_lines(findings))


def main() -> None:
    """Console script: bad input exits 2, a diverged training 3, damage 4, a machine that gave out 5, Ctrl-C 130, each
    with one line; the rest is a bug. ``watch`` exits 6 where something is unusual."""
    if code := ended(lambda: app(prog_name="stdist", standalone_mode=False), log):
        sys.exit(code)
