"""The baselines beside a file of forecasts, so that its figure never stands alone, a zero-shot one's least of all."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stdist.data import open_store
from stdist.errors import InputError
from stdist.evaluation.baselines import score_baselines
from stdist.evaluation.forecasts import open_forecasts
from stdist.evaluation.protocol import match_windows
from stdist.scalars import figure


@dataclass(frozen=True)
class Company:
    """``scores`` by baseline, as ``score_baselines`` has them, fitted on ``fitted_on``; none where ``why`` says why."""

    scores: dict[str, dict[str, Any]]
    fitted_on: str
    why: str | None = None

    @property
    def line(self) -> str:
        """For people."""
        if self.why is not None:
            return f"no baselines beside it: {self.why}"
        errors = sorted((each["pooled"]["nrmse"], name) for name, each in self.scores.items())
        beside = ", ".join(f"{name} {figure(error)}" for error, name in errors)
        return f"baselines fitted on {self.fitted_on}, on the same points: NRMSE {beside}"


def baselines_beside(forecasts: Path, store: Path) -> Company:
    """Scores the baselines on the windows and places of a file of forecasts, fitted on the training days of the store's
    own split. Raises InputError as ``evaluate`` does; days that they cannot be fitted for are none of its reasons."""
    opened, header = open_store(store), open_forecasts(forecasts).header
    split, origins = match_windows(header, opened)
    train = opened.default_split.named("train")
    windows = replace(split)
    windows.origins = np.sort(origins)
    try:
        return Company(score_baselines(opened, train, windows, header.asked), str(train))
    except InputError as error:
        return Company({}, str(train), str(error))
