"""Commands of who forecasts every day: calibrate, watch and serve, which ``cli`` registers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from stdist.boundary import Json, finish, log
from stdist.errors import InputError
from stdist.scalars import figure

NEWS = 6
"""Exit code of ``stdist watch`` where something is unusual that it has not said before."""


def said_of_next(result: dict[str, Any]) -> list[str]:
    """Returns what a forecast of the next steps rests on, in words; nothing of a split's."""
    lines = []
    if "origin" in result:
        lines.append(f"behind {result['origin']} local time")
    if absent := result.get("frames_absent_behind_it"):
        lines.append(f"{absent} frames of the store behind it are absent")
    if imputed := result.get("imputed"):
        lines.append(f"{imputed} values of the history were missing and are imputed, as in training")
    return lines


def calibrate(
    run: Annotated[Path, typer.Argument(help="run folder")],
    store: Annotated[Path, typer.Argument(help="grid store")],
    region: Annotated[str | None, typer.Option(help="r0:r1,c0:c1; the run's own if absent")] = None,
    split: Annotated[
        str | None, typer.Option(help="validation (if absent), or local days A:B that the model was not fitted on")
    ] = None,
    newest: Annotated[int | None, typer.Option(min=1, help="as many of the newest whole local days instead")] = None,
    as_json: Json = False,
) -> None:
    """Forecast days whose truth is known and keep, by step and place, how far off it was: the quantiles and intervals
    of all later forecasts of the run (docs/intervals.md)."""
    from stdist.runs import recipes
    from stdist.runs.calibration import FORECASTS
    from stdist.runs.forecast_request import ForecastRequest

    if split is not None and newest is not None:
        raise InputError("--split and --newest both say which days; give one of them")
    result = recipes.calibrate(
        ForecastRequest(run, store, region, newest or split or "validation", run / FORECASTS), log
    )
    line = f"{result['calibration']}: {result['days']} days, {result['windows']} windows, {result['places']} places"
    for name, scores in result.get("test", {}).items():
        covered = ", ".join(f"{each['coverage']:.1%} in {which}" for which, each in scores["intervals"].items())
        line += f"; test, {name}: CRPS {figure(scores['crps'])}, {covered}"
    finish(result, as_json, line)


def watch(
    run: Annotated[Path, typer.Argument(help="run folder")],
    store: Annotated[Path, typer.Argument(help="grid store that days were appended to")],
    days: Annotated[int, typer.Option(help="newest whole local days to look at")] = 1,
    again: Annotated[bool, typer.Option("--again", help="say again what was said before")] = False,
    out: Annotated[Path | None, typer.Option(help="NAME.parquet or .csv: the scores of all places")] = None,
    as_json: Json = False,
) -> None:
    """Compare the newest whole day with the days that the run was calibrated on: places that left their intervals,
    places that stopped, drift of the whole and the command that helps (docs/intervals.md).

    Exit code 6 where something is unusual; what was said before is not said again.
    """
    from stdist.runs import recipes
    from stdist.runs.watch import WatchRequest, lines_of

    def tell(result: dict[str, Any]) -> None:
        finish(result, as_json, "\n".join(lines_of(result)))

    if recipes.watch(WatchRequest(run, store, days, again, out), tell, log):
        raise typer.Exit(NEWS)


def serve(
    run: Annotated[Path, typer.Argument(help="run folder")],
    store: Annotated[Path, typer.Argument(help="grid store")],
    places: Annotated[str | None, typer.Option(help="their ids, as 4142,4143, or all; the run's own if absent")] = None,
    host: Annotated[str, typer.Option(help="address; another than this machine's own needs a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free")] = 8000,
    token_file: Annotated[Path | None, typer.Option(help="file with the token; if absent STDIST_SERVE_TOKEN")] = None,
    rate: Annotated[float, typer.Option(help="requests a second of one client; 0: any number")] = 50.0,
    ray: Annotated[str | None, typer.Option(help="on a cluster: HOST:6379, ray://HOST:10001, auto or local")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="with --ray: processes that answer; 1 if absent")] = None,
    as_json: Json = False,
) -> None:
    """Answer over HTTP what comes next: /forecast, /places, /health, /metrics, and a page with a map (docs/serving.md).

    A forecast of all places is made at the start and after each stdist append or calibrate. Ends on Ctrl-C or SIGTERM.
    """

    def ready(said: dict[str, Any]) -> None:
        log("; ".join([f"{said['places']} places", *said_of_next(said), "Ctrl-C ends it"]))
        finish(said, as_json, said["url"])

    if ray is None and replicas is not None:
        raise InputError(f"--replicas {replicas} are processes of a Ray cluster; give --ray ADDRESS, or leave it out")
    from stdist.serving import service

    if ray is None:
        request = service.ServeRequest(run, store, places, host, port, token_file, rate)
        return service.serve(request, ready, log)
    from stdist.orchestration.serving import serve as serve_on_ray

    # Replicas stand in folders of their own.
    request = service.ServeRequest(run.absolute(), store.absolute(), places, host, port, token_file, rate)
    serve_on_ray(request, ray, replicas or 1, ready)
