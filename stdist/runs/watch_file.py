"""The note of what ``stdist watch`` has said of a run, so that cron does not hear it again."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from stdist.errors import DamageError, InputError
from stdist.evaluation.contract import parsed
from stdist.files import read_sealed, write_sealed

WATCH = "watch.json"
REMEDY = "remove it, and `stdist watch` says again what it has said"

Places = tuple[int, ...] | tuple[str, ...]


class Said(BaseModel, extra="forbid", frozen=True):
    """The watch before: by the calibration of this digest, of the local days ``first_day`` to ``last_day`` (ISO), of
    ``data``, the digest of what was observed on them. ``drift``: those days whose coverage was a drift's.
    ``silent``: places that had stopped; ``unusual``: that were named for these days."""

    calibration: str
    first_day: str
    last_day: str
    data: str
    drift: tuple[str, ...] = ()
    silent: Places = ()
    unusual: Places = ()

    @property
    def days(self) -> tuple[str, str]:
        return self.first_day, self.last_day


def read_said(path: Path) -> Said | None:
    """None where nothing was said yet. Raises DamageError where the file is not as it was written."""
    if not path.exists():
        return None
    if (content := read_sealed(path)) is None:
        raise DamageError(f"{path} is damaged; {REMEDY}")
    try:
        return parsed(Said, content, str(path), REMEDY)
    except InputError as error:
        raise DamageError(str(error)) from None


def write_said(path: Path, said: Said) -> None:
    write_sealed(path, said.model_dump(mode="json"))


def unsaid_drift(said: Said | None, days: list[str], drifting: list[str]) -> list[str]:
    """Returns the ``drifting`` days of ``days`` (rising) that nobody was told of and that no drift that was told of
    goes on into."""
    known = set(said.drift) if said else set()
    goes_on = said is not None and said.last_day in known and said.last_day < days[0]
    fresh = []
    for day in days:
        if day in drifting and not (day in known or goes_on):
            fresh.append(day)
        goes_on = day in drifting
    return fresh
