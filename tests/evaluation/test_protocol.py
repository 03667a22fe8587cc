"""Every figure carries its protocol, and what cannot be scored is refused in one line."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from stdist.data import Day, DaySpan, Region, open_store
from stdist.data.append import StoreAppender
from stdist.errors import InputError
from stdist.evaluation import ErrorState, evaluate, forecast_contract

from .conftest import make_forecasts, score, write_city, write_forecasts


@pytest.fixture
def windows(store):
    return store.windows("test", 6, 4, channel="flow", region=Region(0, 3, 0, 3))


@pytest.fixture
def forecasts(windows):
    return make_forecasts(windows)


def with_contract(forecasts, **changes):
    contract = forecasts.metadata.contract.model_copy(update=changes)
    return replace(forecasts, metadata=forecasts.metadata.model_copy(update={"contract": contract}))


def test_errors_against_a_naive_loop(store, windows, forecasts):
    values, observed = store.values("flow", 0, len(store.times)), store.observed("flow")
    errors, truths = [], []
    for n, origin in enumerate(windows.origins):
        for k in range(4):
            for row in range(3):
                for col in range(3):
                    if observed[origin + 1 + k, row, col]:
                        truth = float(values[origin + 1 + k, row, col])
                        errors.append(float(forecasts.values[n, k, row, col]) - truth)
                        truths.append(truth)
    result = score(forecasts, store)
    pooled = result.state.pooled()
    assert pooled["points"] == len(errors) == result.contract.points
    assert len(errors) < forecasts.values.size - len(windows) * 4, "some values inside the city are imputed"
    assert pooled["mae"] == pytest.approx(np.mean(np.abs(errors)))
    assert pooled["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert pooled["nrmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))) / np.mean(truths))


def test_the_contract_says_what_was_scored(store, windows, forecasts):
    contract = score(forecasts, store).contract
    assert (contract.city, contract.channel, contract.units) == ("toyville", "flow", "vehicles")
    assert contract.store_digest == store.digest
    assert (contract.split, contract.first_day, contract.last_day) == ("test", "2024-03-21", "2024-03-24")
    assert not contract.history_inside
    assert (contract.S, contract.K, contract.region) == (6, 4, (0, 3, 0, 3))
    assert (contract.cadence_seconds, contract.cells) == (3600, 9)
    assert contract.windows == contract.windows_in_split == len(windows) == 4 * 24 - 4 + 1
    assert (contract.first_target, contract.last_target) == ("2024-03-20T23:00Z", "2024-03-24T22:00Z")
    assert contract.horizons == [1, 2, 3, 4]
    assert contract.mask_rule == "observed points only; inputs may be imputed"
    assert contract.pooling == "pooled over all points, and mean of the horizons' figures"
    assert contract.split_rule == "every window start whose targets lie inside the local days, none across a gap"
    assert json.loads(json.dumps(score(forecasts, store).to_json()))["contract"]["windows"] == 93


def test_both_formats_score_alike_and_a_store_may_be_a_path(store, forecasts, tmp_path):
    path = write_forecasts(forecasts, tmp_path / "made.parquet")
    assert evaluate(str(path), str(store.path)).to_json() == score(forecasts, store).to_json()


def test_parts_add_up_to_the_whole(store, forecasts):
    """As several ranks would score their own windows: window for window the single-process figures."""
    parts = [replace(forecasts, values=forecasts.values[i::3], origins=forecasts.origins[i::3]) for i in range(3)]
    results = [score(part, store) for part in parts]
    total = sum((r.state for r in results), ErrorState.empty(4))
    whole = score(forecasts, store)
    assert sum(r.contract.windows for r in results) == whole.contract.windows
    assert results[0].contract.windows_in_split == whole.contract.windows_in_split == 93
    assert np.array_equal(total.count, whole.state.count)
    assert total.pooled() == pytest.approx(whole.state.pooled(), rel=1e-12)


def test_named_spans_keep_their_history_rule(store):
    inside = store.windows(DaySpan.parse("2024-03-21:2024-03-24"), 6, 4, channel="flow")
    assert forecast_contract(inside).history_inside
    contract = score(make_forecasts(inside), store).contract
    assert contract.windows == contract.windows_in_split == 93 - 6
    assert "whose targets and history lie inside" in contract.split_rule


def test_other_data_is_refused_naming_both(forecasts, store, tmp_path):
    other = write_city(tmp_path / "elsewhere.zarr", city="elsewhere", seed=1)
    with pytest.raises(InputError) as refusal:
        score(forecasts, other)
    for part in (store.digest, other.digest, "toyville", "elsewhere"):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_forecasts_made_before_days_were_appended_are_scored_on_the_grown_store(forecasts, store, tmp_path):
    path = shutil.copytree(store.path, tmp_path / "grown.zarr")
    with StoreAppender(path) as appender:
        appender.begin(store.days.last_day + 1)
        appender.add(Day(len(store.days), {name: np.ones((24, *store.shape)) for name in store.channels}))
        appender.finish()
    grown = open_store(path)
    assert len(grown.days) == len(store.days) + 1 and grown.digest != store.digest
    assert score(forecasts, grown).to_json() == score(forecasts, store).to_json()


def test_forecasts_past_the_data_are_refused(forecasts, store):
    late = replace(forecasts, origins=forecasts.origins + np.timedelta64(1, "h"))
    with pytest.raises(InputError, match=r"reach to 2024-03-24T23:00Z, past the data .* 2024-03-24T22:00Z"):
        score(late, store)


def test_cells_not_in_the_store_are_refused(forecasts, store):
    with pytest.raises(InputError, match=r"9 forecast cells are not in .*, first 6000"):
        score(replace(forecasts, cell_ids=forecasts.cell_ids + 5000), store)
    with pytest.raises(InputError, match="are not those of region 0:3,0:3"):
        score(replace(forecasts, cell_ids=forecasts.cell_ids[::-1]), store)


def test_windows_outside_the_claimed_split_are_refused(forecasts, store):
    early = replace(forecasts, origins=forecasts.origins - np.timedelta64(30, "D") // 30)
    with pytest.raises(InputError, match=r"24 forecasts, first at origin 2024-03-19T22:00Z, are no windows"):
        score(early, store)


def test_strange_times_channels_and_repeats_are_refused(forecasts, store):
    with pytest.raises(InputError, match="origin 2024-03-20T21:53Z is not a time of"):
        score(replace(forecasts, origins=forecasts.origins - np.timedelta64(7, "m")), store)
    with pytest.raises(InputError, match="channel 'noise'"):
        score(with_contract(forecasts, channel="noise"), store)
    twice = replace(forecasts, origins=np.concatenate([forecasts.origins[:1], forecasts.origins[:-1]]))
    with pytest.raises(InputError, match="more than once"):
        score(twice, store)
    with pytest.raises(InputError, match="no window"):
        score(replace(forecasts, origins=forecasts.origins[:0], values=forecasts.values[:0]), store)


def test_an_unfinished_forecast_is_refused(forecasts, store):
    hole = forecasts.values.copy()
    hole[:, :, 1, 1] = np.nan
    with pytest.raises(InputError, match="not finite"):
        score(replace(forecasts, values=hole), store)
