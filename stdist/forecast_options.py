"""The options that say what to forecast, defined and checked once: ``stdist forecast`` has them, and ``stdist submit``
for the forecast of a job."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stdist.errors import InputError

if TYPE_CHECKING:
    from stdist.runs.forecast_request import ForecastRequest


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="What to forecast")


def request_of(
    run: Path,
    store: Path,
    out: Path,
    *,
    region: Annotated[str | None, _option("r0:r1,c0:c1; the run's own if absent")] = None,
    places: Annotated[str | None, _option("ids of the store's places instead, as 4142,4143, or all")] = None,
    split: Annotated[str | None, _option("train, validation, test (if absent), or local days A:B")] = None,
    next_steps: Annotated[bool, _option("the steps behind the store's last frame instead", "--next")] = False,
    origin: Annotated[str | None, _option("of --next: another last frame, local time")] = None,
    horizon: Annotated[int | None, _option("the first steps only, as 3; all of the run's if absent")] = None,
    quantiles: Annotated[
        bool | None, _option("by stdist calibrate; if absent, where it was run", "--quantiles/--no-quantiles")
    ] = None,
    cost_ratio: Annotated[
        float | None, _option("forecast_for_cost: too little costs so many times as much as too much")
    ] = None,
    channel: Annotated[str | None, _option("another one than the run's own, which ST-Vision-LLM can forecast")] = None,
) -> "ForecastRequest":
    """The request that the options make. Raises InputError where two of them say the same thing."""
    from stdist.runs.forecast_request import NEXT, ForecastRequest

    if region is not None and places is not None:
        raise InputError("--region and --places both say which places; give one of them")
    next_steps = next_steps or origin is not None
    if next_steps and split is not None:
        raise InputError("--split names past windows, --next and --origin the steps behind one frame; give one of them")
    days = NEXT if next_steps else split or "test"
    return ForecastRequest(run, store, region, days, out, origin, places, horizon, quantiles, cost_ratio, channel)


ABSENT: dict[str, Any] = {**(request_of.__kwdefaults__ or {})}
"""The options' defaults: what a command is given as ``asked`` where its line has none of them."""


def takes_forecast_options(command: Callable[..., None]) -> Callable[..., None]:
    """Has ``command`` take the options of ``request_of`` as its keywords ``**asked``."""
    own = signature(command)
    *parameters, _ = own.parameters.values()
    options = [option for option in signature(request_of).parameters.values() if option.name in ABSENT]
    keywords = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
    command.__signature__ = own.replace(parameters=[*keywords, *options])  # type: ignore[attr-defined]
    return command
