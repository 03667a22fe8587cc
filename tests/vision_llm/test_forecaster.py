"""Forecasts of many cells come in parts that bound the memory of shared keys and values, and change nothing."""

from collections.abc import Callable

import numpy as np
import pytest

from stdist.data import GridStore
from stdist.vision_llm import forecaster
from stdist.vision_llm.city_windows import CityWindows
from stdist.vision_llm.forecaster import forecast_batches
from stdist.vision_llm.policy import Policy


@pytest.mark.parametrize("decoding", ["median", "direct"])
def test_parts_of_cells_equal_all_cells_at_once(
    policy: Policy, store: GridStore, monkeypatch: pytest.MonkeyPatch, decoding: str
) -> None:
    setting = policy.spec.setting
    windows = store.windows("train", setting.history, setting.horizon, channel=setting.channel)
    city = CityWindows(policy, windows)

    def forecast() -> tuple[list[int], np.ndarray]:
        sizes: list[int] = []
        branch: Callable = policy.branch
        with monkeypatch.context() as patch:
            patch.setattr(policy, "branch", lambda prefix, ids: sizes.append(len(ids)) or branch(prefix, ids))
            ((_, values),) = forecast_batches(policy, city, np.array([0, 5]), 2, decoding)
        return sizes, values

    whole_sizes, whole = forecast()
    assert whole_sizes == [2 * len(city.cells)]
    monkeypatch.setattr(forecaster, "PREFIX_BYTES", 1)
    part_sizes, parts = forecast()
    assert part_sizes == [2] * len(city.cells)
    np.testing.assert_allclose(parts, whole, rtol=1e-4)
