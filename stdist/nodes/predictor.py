"""A trained forecaster of nodes as the forecaster of a run: ``stdist forecast`` and a run's own test forecasts."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int

from stdist.config import DataConfig
from stdist.data import GridStore, NodeRange, Windows
from stdist.data.audit import Fitted
from stdist.data.loader import WindowLoader
from stdist.data.sampler import WindowSampler
from stdist.data.spans import AnyRegion, parse_region
from stdist.errors import InputError
from stdist.evaluation import Chunk, ChunkGrid, open_forecasts
from stdist.nodes.interface import Forecaster
from stdist.nodes.learners import NodeLearners
from stdist.nodes.node_set import NodeSet
from stdist.nodes.stage import WindowForecasts
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.forecasting import TEST_FORECASTS, Predictor
from stdist.runs.run_folder import noted_digest


class NodesPredictor(Predictor):
    """``model`` on the nodes that it was trained on, all of them at a time, ``batch_size`` windows at a time.

    ``data``: of its run; ``first_nodes``: how many of that store's first nodes it knows, where not those of a region.
    """

    unit = "windows x nodes"

    def __init__(
        self,
        model: Forecaster,
        data: DataConfig,
        batch_size: int,
        fitted: tuple[Fitted, ...],
        first_nodes: int | None = None,
    ):
        self.model, self.data, self.batch_size, self.fitted = model.eval(), data, batch_size, fitted
        self.first_nodes = first_nodes

    def regions(
        self, store: GridStore, request: ForecastRequest, log: Callable[[str], None]
    ) -> tuple[AnyRegion, AnyRegion]:
        """The part of this store that is asked for, all of the run's nodes by default; the history is all of theirs."""
        if request.channel not in (None, self.data.channel):
            raise InputError(
                f"--channel {request.channel}: mean, deviation and rows of {request.run_dir} are those of "
                f"{self.data.channel}; train a run on the other channel"
            )
        known = self._known_region(store, request.run_dir, log)
        region = parse_region(request.region).within(store.shape) if request.region else known
        if any(r.start < k.start or k.stop < r.stop for r, k in zip(region.slices, known.slices, strict=True)):
            raise InputError(
                f"region {region} is not within the nodes {known} of {store.path} that {request.run_dir} knows"
            )
        return region, known

    def check(self, windows: Windows) -> list[str]:
        """Raises InputError where the model is of another cadence, of other numbers of frames or nodes than
        ``windows``, or a node has no value."""
        nodes = NodeSet.of(windows.store, windows.history_region)
        store, city = windows.store, self.model.scaling
        cadence = int(store.cadence / np.timedelta64(1, "m"))
        if cadence != city.cadence:
            raise InputError(
                f"{store.path} has a value every {cadence} min, {city.who} are of {city.cadence} min; "
                f"{self.model.elsewhere}"
            )
        history = nodes.select(torch.from_numpy(windows.read([0]).history))
        self.model.check(history, *city.calendar(store.slot_times[windows.origins[:1]]))
        return []

    def grid(self, windows: Windows) -> tuple[ChunkGrid, Int[np.ndarray, " nodes"]]:
        nodes = self._nodes(windows)
        return ChunkGrid(len(windows), len(nodes), self.batch_size, len(nodes)), nodes.positions

    @torch.no_grad()
    def predict(
        self, windows: Windows, chunks: Iterable[Chunk]
    ) -> Iterator[tuple[Chunk, Float[np.ndarray, "1 windows K nodes"], dict[str, int]]]:
        chunks = list(chunks)
        if not chunks:
            return
        nodes, known = self._nodes(windows), NodeSet.of(windows.store, windows.history_region)
        targets = np.searchsorted(known.numbers, nodes.numbers)
        forecasts = WindowForecasts(self.model, windows, NodeLearners(len(known)))
        sampler = WindowSampler(forecasts.windows, self.batch_size, shuffle=False)
        sampler.consumed = chunks[0].windows.start
        for chunk, batch in zip(chunks, WindowLoader(sampler), strict=True):
            predicted, _ = forecasts(batch)
            yield chunk, predicted[None, :, :, targets].cpu().numpy(), {}

    def _nodes(self, windows: Windows) -> NodeSet:
        nodes = NodeSet.of(windows.store, windows.region)
        return replace(nodes, positions=self.wanted(nodes.positions))

    def _known_region(self, store: GridStore, run_dir: Path, log: Callable[[str], None]) -> AnyRegion:
        """The region of ``store`` with the run's own nodes, by their ids: an embedding, a weight or a graph is of
        one node and no other.

        A run without test forecasts does not say which they are: those of the store it was trained on, else all. Raises
        InputError where the nodes are not there, or not one after the other.
        """
        path = run_dir / TEST_FORECASTS
        if not path.exists():
            log(f"note: {path} is not there to say which nodes the run knows; those of {store.path} are taken for them")
            if not store.is_or_was(noted_digest(run_dir)):
                return store.region()
            return NodeRange(0, self.first_nodes) if self.first_nodes else store.region(self.data.region)
        trained = open_forecasts(path).header
        ids, stored = trained.cell_ids, store.cell_ids
        if ids.ndim != stored.ndim:
            kind, other = ("a grid", "nodes") if stored.ndim == 2 else ("nodes", "cells of a grid")
            raise InputError(f"{store.path} holds {kind}, {run_dir} forecasts {other}; {self.model.elsewhere}")
        first = next(iter(np.argwhere(stored == ids.flat[0])), np.zeros(ids.ndim, np.int64))
        edges = list(zip(first.tolist(), (first + ids.shape).tolist(), strict=True))
        if stored[tuple(slice(*edge) for edge in edges)].tolist() != ids.tolist():
            raise InputError(
                f"{store.path} has {stored.size} nodes, ids {stored.flat[0]} to {stored.flat[-1]}, and not one after "
                f"the other the {ids.size} that {run_dir} was trained on, ids {ids.flat[0]} to {ids.flat[-1]}; "
                f"{self.model.elsewhere}"
            )
        if store.city != (city := trained.metadata.contract.city):
            cities = f"{store.path} is of {store.city!r}, the run of {city!r}"
            log(f"note: {cities}; nodes of one id are taken to be the same")
        return parse_region(",".join(f"{start}:{stop}" for start, stop in edges))
