"""The request of ``stdist forecast``, which a command line makes and which can be written as one again."""

from dataclasses import dataclass
from pathlib import Path

NEXT = "next"
"""The split of a request for the K steps behind one moment, of which no truth need be there."""


@dataclass(frozen=True)
class ForecastRequest:
    """The arguments of ``stdist forecast``: a finished run, a store, cells or nodes (the run's own where None), a
    split's name, local days ``A:B``, ``NEXT`` or, of ``stdist calibrate``, a number of the newest whole days, and the
    file to write. ``origin``: of the next steps, the local time of the last frame that is looked at, the store's last
    one where None. ``places``: ids in place of a region. ``horizon``: the first steps alone, all of the model's where
    None. ``quantiles``: by the run's calibration, where None if it has one. ``cost_ratio``: of ``forecast_for_cost``,
    none where None. ``channel``: another one than the run's, if any."""

    run_dir: Path
    store: Path
    region: str | None
    split: str | int
    out: Path
    origin: str | None = None
    places: str | None = None
    horizon: int | None = None
    quantiles: bool | None = None
    cost_ratio: float | None = None
    channel: str | None = None

    def as_arguments(self) -> list[str]:
        """The command line that asks for the same, behind ``stdist``."""
        line = ["forecast", str(self.run_dir), str(self.store), "--out", str(self.out)]
        line += ["--next"] if self.split == NEXT else ["--split", str(self.split)]
        options = {
            "--origin": self.origin,
            "--region": self.region,
            "--places": self.places,
            "--horizon": self.horizon,
            "--cost-ratio": self.cost_ratio,
            "--channel": self.channel,
        }
        for name, value in options.items():
            line += [] if value is None else [name, str(value)]
        if self.quantiles is not None:
            line.append("--quantiles" if self.quantiles else "--no-quantiles")
        return line
