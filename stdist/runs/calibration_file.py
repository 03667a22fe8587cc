"""The calibration of a run: what its quantiles are made of, for whom it was made, and where it fits."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from pydantic import BaseModel

from stdist.data import Windows
from stdist.data.audit import Fitted
from stdist.errors import DamageError, InputError
from stdist.evaluation.conformal import ConformalQuantiles
from stdist.evaluation.contract import ForecastContract, parsed
from stdist.evaluation.levels import LEVELS
from stdist.evaluation.unusual import Reference
from stdist.files import read_sealed, write_sealed

CALIBRATION = "calibration.json"
REMEDY = "`stdist calibrate` makes it again, and --no-quantiles forecasts without"


class Calibration(BaseModel, extra="forbid", frozen=True):
    """``contract`` and ``windows`` (their number) of the forecasts whose residuals it was made of, ``model`` the digest
    of what made them (:func:`model_digest`); ``fitted``: it on these days, so that its intervals are not scored on
    them. ``corrects_own``: the model's own quantiles are what it is added to. The rest is of
    :class:`stdist.evaluation.conformal.ConformalQuantiles`, of the places named ``places``. ``reference``: what
    `stdist watch` compares later days with; None where no window lies in one day, and in files of earlier versions."""

    run: str
    checkpoint: str
    model: str
    contract: ForecastContract
    fitted: Fitted
    windows: int
    corrects_own: bool
    levels: tuple[float, ...] = LEVELS
    places: tuple[int, ...] | tuple[str, ...]
    edges: list[list[float]]
    scales: list[list[float]]
    offsets: list[list[list[float]]]
    lowest: float | None
    reference: Reference | None = None

    @property
    def conformal(self) -> ConformalQuantiles:
        edges = np.array(self.edges).reshape(len(self.places), -1)
        return ConformalQuantiles(edges, np.array(self.scales), np.array(self.offsets), self.lowest)

    @property
    def digest(self) -> str:
        made_of = self.model_dump_json(exclude={"reference"})  # no quantile depends on it
        return hashlib.sha256(made_of.encode()).hexdigest()

    def numbers_of(self, ids: np.ndarray) -> Int[np.ndarray, " p"]:
        """The numbers of the places ``ids``, all of which it has."""
        known = {place: number for number, place in enumerate(self.places)}
        return np.array([known[place] for place in ids.tolist()], np.int64)

    def require_fit(self, path: Path, model: str, windows: Windows, ids: np.ndarray) -> None:
        """Raises InputError where it is of another model, of other data than ``windows``, or lacks one of ``ids``."""
        if self.model != model:
            raise InputError(f"{path} is of another training or decoding than the run has now; {REMEDY}")
        store = windows.store
        now = {
            "city": store.city,
            "channel": windows.channel,
            "units": store.units,
            "cadence_seconds": int(store.cadence / np.timedelta64(1, "s")),
            "S": windows.S,
            "K": windows.K,
        }
        for name, value in now.items():
            if (then := getattr(self.contract, name)) != value:
                raise InputError(f"{path} is of {name} {then}, these forecasts of {value}; {REMEDY}")
        if absent := sorted({*ids.tolist()} - {*self.places}):
            raise InputError(
                f"{path} knows {len(self.places)} places, {len(absent)} of these {len(ids)} are none of them, first "
                f"{absent[0]}; `stdist calibrate --region` widens it, and --no-quantiles forecasts without"
            )


def model_digest(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Returns what tells two models apart: the closing ``summary`` of the training and the ``settings`` of the
    decoding."""
    return hashlib.sha256(json.dumps([summary, dict(settings)], sort_keys=True).encode()).hexdigest()


def write_calibration(path: Path, calibration: Calibration) -> None:
    write_sealed(path, calibration.model_dump(mode="json"))


def read_calibration(path: Path) -> Calibration:
    """Raises InputError where there is none, DamageError where it is not as it was written."""
    if not path.exists():
        raise InputError(f"{path.parent} has no calibration to make quantiles with; run `stdist calibrate` first")
    if (content := read_sealed(path)) is None:
        raise DamageError(f"{path} is damaged; {REMEDY}")
    try:
        return parsed(Calibration, content, str(path), REMEDY)
    except InputError as error:
        raise DamageError(str(error)) from None
