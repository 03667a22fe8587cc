"""The synthetic city: seeded, positive, with a long tail, and as hard to forecast as a real one."""

import numpy as np
import pytest

from stdist.data.synthetic import SyntheticCity, generate
from stdist.errors import InputError


def _all(city: SyntheticCity) -> np.ndarray:
    return np.concatenate([values for _, values in generate(city)])


def test_same_seed_same_city_and_more_days_only_append():
    short, long, other = (_all(SyntheticCity(4, 5, days=d, seed=s)) for d, s in ((2, 1), (3, 1), (2, 2)))
    np.testing.assert_array_equal(short, long[:288])
    assert not np.array_equal(short, other)
    assert short.shape == (288, 4, 5) and short.dtype == np.float32 and np.nanmin(short) >= 0


@pytest.mark.parametrize("cadence", [5, 10, 60])
def test_any_cadence_and_size(cadence):
    values = _all(SyntheticCity(1, 3, days=1, cadence_minutes=cadence))
    assert values.shape == (1440 // cadence, 1, 3)


def test_missing_share():
    lost = np.isnan(_all(SyntheticCity(20, 20, days=5, missing_share=0.02))).mean()
    assert 0.01 < lost < 0.03
    assert not np.isnan(_all(SyntheticCity(5, 5, days=2, missing_share=0))).any()


def test_long_tail_and_neighbours_alike():
    level = np.log(SyntheticCity(100, 100).level)
    assert 0.8 < level.std() < 1.5
    assert np.exp(level).max() > 10 * np.exp(np.median(level))
    centred = level - level.mean()
    assert (centred[:, 1:] * centred[:, :-1]).mean() / centred.var() > 0.6


def test_simple_forecasts_err_as_on_the_real_central_block():
    """Pooled RMSE / mean at K = 12 over central 5 x 5 blocks: Milan has 0.268 and 0.297."""
    persistence, yesterday = [], []
    for seed in range(3):
        x = _all(SyntheticCity(20, 20, days=21, seed=seed, missing_share=0))[:, 8:13, 9:14]
        origins = np.arange(7 * 144 - 1, len(x) - 12)
        targets = origins[:, None] + np.arange(1, 13)
        truth = x[targets]
        for errors, forecast in ((persistence, x[origins][:, None]), (yesterday, x[targets - 144])):
            errors.append(np.sqrt(((truth - forecast) ** 2).mean()) / truth.mean())
    assert 0.22 < np.mean(persistence) < 0.32
    assert 0.25 < np.mean(yesterday) < 0.37


@pytest.mark.parametrize(("fields", "line"), [({"height": 0}, "is empty"), ({"cadence_minutes": 7}, "divide")])
def test_impossible_cities_are_refused(fields, line):
    with pytest.raises(InputError, match=line):
        SyntheticCity(**fields)
