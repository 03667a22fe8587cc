"""Pools of toy workers on a real cluster of this process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toys
from toys import ToyPool


@pytest.fixture
def make_pool(local_ray: None, tmp_path: Path) -> Iterator[Callable[..., ToyPool]]:
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(toys)  # workers cannot import it
    pools: list[ToyPool] = []

    def make(**options: Any) -> ToyPool:
        pools.append(ToyPool(tmp_path, **options))
        return pools[-1]

    yield make
    for pool in pools:
        ray.kill(pool.actor)
