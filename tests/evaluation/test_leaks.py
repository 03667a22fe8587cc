"""The leak audit at the doors of evaluation: nothing is scored on days that its forecaster was fitted on."""

from dataclasses import replace

import pytest

from stdist.data import DaySpan
from stdist.data.audit import Fitted, data_digest
from stdist.errors import InputError
from stdist.evaluation import evaluate, score_baselines

from .conftest import make_forecasts, read_forecasts, score, write_forecasts


def test_forecasts_of_days_the_forecaster_was_fitted_on_are_not_scored(store):
    data = data_digest(store, "flow")
    windows = store.windows("test", 6, 4, channel="flow")
    forecasts = make_forecasts(windows)

    def fitted(span, data):
        trained = (Fitted.on("weights", DaySpan.parse(span), data), Fitted.on("t_max", DaySpan.parse(span), data))
        return replace(forecasts, metadata=forecasts.metadata.model_copy(update={"fitted": trained}))

    with pytest.raises(InputError, match=r"^leak: weights, t_max fitted on 2024-03-04:2024-03-21 of this data, which"):
        score(fitted("2024-03-04:2024-03-21", data), store)
    with pytest.raises(InputError, match="leak"):  # a forecaster of one channel, told by its values
        score(fitted("2024-03-24:2024-03-24", data), store)
    assert score(fitted("2024-03-04:2024-03-20", data), store).state.count.sum() > 0
    assert score(fitted("2024-03-04:2024-03-24", data_digest(store, "speed")), store).state.count.sum() > 0


@pytest.mark.parametrize("suffix", [".zarr", ".parquet"])
def test_files_of_forecasts_remember_what_was_fitted(store, tmp_path, suffix):
    forecasts = make_forecasts(store.windows("test", 6, 4, channel="flow"))
    trained = (Fitted("weights", "2024-03-04", "2024-03-24", data_digest(store, "flow")),)
    forecasts = replace(forecasts, metadata=forecasts.metadata.model_copy(update={"fitted": trained}))
    path = write_forecasts(forecasts, tmp_path / f"f{suffix}")
    assert read_forecasts(path).metadata.fitted == trained
    with pytest.raises(InputError, match="leak: weights fitted on"):
        evaluate(path, store)


def test_baselines_fitted_on_the_scored_days_are_refused(store):
    validation = store.windows("validation", 6, 4, channel="flow")
    with pytest.raises(InputError, match=r"leak: baselines fitted on 2024-03-04:2024-03-18 .* 2024-03-18:2024-03-20"):
        score_baselines(store, DaySpan.parse("2024-03-04:2024-03-18"), validation)
