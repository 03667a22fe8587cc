"""DeepSpeed's engine on UrbanPG with its nodes on several learners (:mod:`stdist.urbanpg.node_parallel`).

What it gives and takes is of the whole city: a checkpoint serves any number of learners along ``nodes`` and ``data``,
and one process with plain torch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from stdist.training.deepspeed_engine import DeepSpeedEngine
from stdist.training.engine import ParameterGroup
from stdist.urbanpg.node_parallel import ROWS, NodeParallel


class NodeEngine(DeepSpeedEngine):
    """See :class:`stdist.training.engine.Engine`. A learner's losses are its share of the whole loss, times
    ``data_ranks``.

    Args:
        groups: of ``model.trained_parameters()``, the same ones on every learner.
        configuration: ``deepspeed_json`` for ``data_ranks`` learners, of ZeRO 1 or 2 (``check_grid``).
    """

    def __init__(
        self,
        model: NodeParallel,
        groups: Iterable[ParameterGroup],
        schedule: Callable[[int], float],
        configuration: dict[str, Any],
    ):
        super().__init__(model, groups, schedule, configuration, mpu=model.learners.mpu)
        self._model, self._first = model, model.first_elements()
        self._whole_rows: dict[str, nn.Parameter] = {}
        self._hooks = model.sum_gradients()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Inside of :meth:`gather_full_params`, rows are those of the whole city."""
        own = super().parameters
        if not self._whole_rows:
            return own
        return {name: p for name, p in own.items() if name not in self._first} | self._whole_rows

    def eval_mode(self) -> AbstractContextManager[None]:
        """Nothing is gathered: every learner evaluates its own nodes."""
        return nullcontext()

    @contextmanager
    def gather_full_params(self) -> Iterator[None]:
        """Also the whole city's prompts are there (``model.whole_prompts``); calling the model stays a collective."""
        with super().gather_full_params(), self._model.gathered() as prompts:
            rows = {f"{ROWS}.{period}": rows for period, rows in enumerate(prompts.node_rows)}
            self._whole_rows = {name: row for name, row in rows.items() if row.requires_grad}
            try:
                yield
            finally:
                self._whole_rows = {}

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for key, part in super().state():
            name, _, start = key.partition("@")
            if (first := self._first.get(name.rpartition("/")[0])) is not None:
                yield f"{name}@{first + int(start)}", part
            elif self._model.learners.node_rank == 0:  # the others have the same
                yield key, part

    def load_state(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        super().load_state(_Parts(tensors, self._first, self.parameters), steps)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        super().close()


class _Parts(Mapping[str, Tensor]):
    """The parts of the whole city's tensors that belong to this learner's parameters."""

    def __init__(self, tensors: Mapping[str, Tensor], first: dict[str, int], parameters: dict[str, nn.Parameter]):
        self._tensors, self._first, self._parameters = tensors, first, parameters

    def __getitem__(self, key: str) -> Tensor:
        name, tensor = key.rpartition("/")[0], self._tensors[key]
        if (first := self._first.get(name)) is None:
            return tensor
        return tensor.flatten()[first:][: self._parameters[name].numel()].view_as(self._parameters[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
