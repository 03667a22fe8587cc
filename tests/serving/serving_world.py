"""What tests of the service and their fixtures share."""

from pathlib import Path

from stdist.runs.forecast_request import NEXT, ForecastRequest


def silent(line: str) -> None:
    pass


def request_of(folder: Path) -> ForecastRequest:
    """What ``stdist serve FOLDER/runs/tiny FOLDER/city.zarr`` asks for."""
    return ForecastRequest(folder / "runs" / "tiny", folder / "city.zarr", None, NEXT, Path())
