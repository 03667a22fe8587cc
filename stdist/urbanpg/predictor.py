"""A trained forecaster of nodes as the forecaster of a run: ``stdist forecast`` and a run's own test forecasts."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int

from stdist.data import GridStore, NodeRange, Windows
from stdist.data.audit import Fitted
from stdist.data.loader import WindowLoader
from stdist.data.sampler import WindowSampler
from stdist.data.spans import AnyRegion
from stdist.errors import InputError
from stdist.evaluation import Piece, PiecePlan, open_forecasts
from stdist.nodes.learners import NodeLearners
from stdist.nodes.stage import WindowForecasts
from stdist.runs.forecasting import TEST_FORECASTS, ForecastRequest, Predictor
from stdist.urbanpg.checkpoints import Model, city_of, nodes_of_model
from stdist.urbanpg.config import UrbanConfig
from stdist.urbanpg.model import UrbanPG


class NodesPredictor(Predictor):
    """``model`` on the nodes that it was trained on, all of them at a time."""

    unit = "windows x nodes"

    def __init__(self, model: Model, config: UrbanConfig, fitted: tuple[Fitted, ...]):
        self.model, self.config, self.fitted = model.eval(), config, fitted

    def regions(
        self, store: GridStore, request: ForecastRequest, log: Callable[[str], None]
    ) -> tuple[AnyRegion, AnyRegion]:
        """The nodes asked for, n0:n1 of this store, all of the run's by default; their history is that of all of the
        run's."""
        if len(store.shape) != 1:
            raise InputError(f"{store.path} holds a grid; this run forecasts nodes")
        known = self._known_nodes(store, request.run_dir, log)
        region = NodeRange.parse(request.region) if request.region else known
        if not (known.n0 <= region.n0 and region.n1 <= known.n1):
            raise InputError(
                f"region {region} is not within the nodes {known} of {store.path} that {request.run_dir} knows"
            )
        return region, known

    def check(self, windows: Windows) -> list[str]:
        """Raises InputError where the model is of another cadence, of other numbers of frames or nodes than
        ``windows``, or a node has no value."""
        store, city = windows.store, city_of(self.model)
        cadence = int(store.cadence / np.timedelta64(1, "m"))
        if cadence != city.cadence:
            raise InputError(
                f"{store.path} has a value every {cadence} min, {city.who} are of {city.cadence} min; fit prompts to "
                "this data with recipe few-shot"
            )
        history = torch.from_numpy(windows.read([0]).history)
        self.model.check(history, *city.calendar(store.local_times[windows.origins[:1]]))
        return []

    def plan(self, windows: Windows) -> tuple[PiecePlan, Int[np.ndarray, " nodes"]]:
        nodes = windows.region.shape[0]
        return PiecePlan(len(windows), nodes, self.config.training.train_batch_size, nodes), np.arange(nodes)

    @torch.no_grad()
    def predict(
        self, windows: Windows, pieces: Iterable[Piece]
    ) -> Iterator[tuple[Piece, Float[np.ndarray, "1 windows K nodes"], dict[str, int]]]:
        pieces = list(pieces)
        if not pieces:
            return
        targets, first = windows.region.slices[0], windows.history_region.slices[0].start
        own = slice(targets.start - first, targets.stop - first)
        learners = NodeLearners(windows.history_region.shape[0])
        forecasts = WindowForecasts(self.model, windows, learners, self.config.nodes.block_nodes)
        sampler = WindowSampler(windows, self.config.training.train_batch_size, shuffle=False)
        sampler.consumed = pieces[0].windows.start
        for piece, batch in zip(pieces, WindowLoader(sampler), strict=True):
            predicted, _ = forecasts(batch)
            yield piece, predicted[None, :, :, own].cpu().numpy(), {}

    def _known_nodes(self, store: GridStore, run_dir: Path, log: Callable[[str], None]) -> NodeRange:
        """The run's own nodes in ``store``, by their ids: a row, a weight or a graph is of one node and no other.

        A run without test forecasts does not say which they are: those of the store it was trained on, else all. Raises
        InputError where the nodes are not there, or not one after the other.
        """
        path = run_dir / TEST_FORECASTS
        if not path.exists():
            log(f"note: {path} is not there to say which nodes the run knows; those of {store.path} are taken for them")
            if not self.config.data.store.resolve() == store.path.resolve():
                return NodeRange(0, store.shape[0])
            first = NodeRange.parse(self.config.data.region).n0 if self.config.data.region else 0
            return NodeRange(first, first + (nodes_of_model(self.model) or store.shape[0] - first)).within(store.shape)
        trained = open_forecasts(path).header
        ids, found = trained.cell_ids.tolist(), store.cell_ids.tolist()
        first = found.index(ids[0]) if ids[0] in found else 0
        if found[first : first + len(ids)] != ids:
            remedy = (
                "fit prompts to it with recipe few-shot" if isinstance(self.model, UrbanPG) else "train others on it"
            )
            raise InputError(
                f"{store.path} has {len(found)} nodes, ids {found[0]} to {found[-1]}, and not one after the other the "
                f"{len(ids)} that {run_dir} was trained on, ids {ids[0]} to {ids[-1]}; {remedy}"
            )
        if store.city != (city := trained.metadata.contract.city):
            cities = f"{store.path} is of {store.city!r}, the run of {city!r}"
            log(f"note: {cities}; nodes of one id are taken to be the same")
        return NodeRange(first, first + len(ids))
