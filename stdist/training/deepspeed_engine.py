"""DeepSpeed's ZeRO behind the one engine interface (ZeRO, arXiv 1910.02054, stages 1, 2 and 3).

The optimizer's state goes in and out whole and by name, so that a checkpoint of one stage of ZeRO or number of
learners serves any other. What of DeepSpeed is private is in :mod:`stdist.training.deepspeed_internals`.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stdist.training import deepspeed_internals as internals
from stdist.training.deepspeed_internals import deepspeed
from stdist.training.engine import MOMENTS, ParameterGroup, Scheduled, adamw
from stdist.training.process_group import collective_backend


class DeepSpeedEngine(Scheduled):
    """See :class:`stdist.training.engine.Engine`.

    Args:
        module: the whole model, also what is frozen; never called itself, its submodules are.
        persistent: parameters that are read outside of their own submodules' ``forward``; ZeRO-3 keeps them in full.
        configuration: see :func:`stdist.training.deepspeed_json.deepspeed_json`.
        mpu: says which learners hold different parts of the model, as DeepSpeed's argument of this name does: gradients
            are averaged over its data-parallel group alone, and a parameter marked ``model_parallel`` counts in the
            gradient norm on every rank of its model-parallel group, any other on the first. With ZeRO 1 and 2.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Iterable[ParameterGroup],
        schedule: Callable[[int], float],
        configuration: dict[str, Any],
        persistent: Collection[nn.Parameter] = (),
        mpu: Any = None,
    ):
        if not dist.is_initialized():
            backend = collective_backend(torch.cuda.is_available())
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists; launchers of many learners set it
        super().__init__(groups, schedule)
        self._module = module
        self._dtypes = {parameter: parameter.dtype for parameter in module.parameters()}
        self._linear = nn.functional.linear
        internals.set_world_group_timeout()
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=adamw(self._groups), config=configuration, mpu=mpu, dist_init_required=False
        )
        self._zero, self._stage = self._engine.optimizer, self._engine.zero_optimization_stage()
        if self._stage == 3:
            internals.keep_full(self._zero, persistent)

    def backward(self, loss: Tensor) -> None:
        if self._stage == 3:
            internals.begin_backward(self._zero)
        self._engine.backward(loss)

    def discard_gradients(self) -> bool:
        return False  # some of them are in its buckets, or on their way

    def step(self) -> float:
        self._set_rates(self._zero.param_groups)
        self._engine.step()
        if self._stage == 3:
            internals.clear_gradients_zero3(self._zero)
        elif self._stage == 2 and self._zero.cpu_offload:
            internals.clear_gradients_offloaded(self._zero)
        self._steps += 1
        return float(self._engine.get_global_grad_norm())

    def gather_full_params(self) -> AbstractContextManager[None]:
        return internals.gathered(self._zero, self._module) if self._stage == 3 else nullcontext()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        self._link_moments()
        for name, parameter in self.parameters.items():
            keys: list[str | None] = [*MOMENTS] if self._steps else []
            for key in [*keys, None] if parameter.dtype != torch.float32 else keys:
                start, part = internals.local_state(parameter, self._stage, key) or (0, torch.empty(0))
                if part.numel():
                    yield f"{name}/{key or 'master'}@{start}", part

    def load_state(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        self._steps = steps
        if steps:
            internals.make_moments(self._zero, self._stage, steps)
        self._link_moments()
        for name, parameter in self.parameters.items():
            for key in (*MOMENTS, None):
                if (stored := f"{name}/{key or 'master'}") in tensors:
                    value = tensors[stored].to(self._engine.device)
                    internals.set_state(self._zero, parameter, self._stage, value, key)

    def _link_moments(self) -> None:
        if self._stage != 3 and self._steps:
            internals.link_moments(self._zero)

    def close(self) -> None:
        if self._stage == 3:
            plain = internals.plain_parameters(self._zero, self._module, self._dtypes)
        internals.destroy(self._engine)
        internals.restore_linear(self._linear)
        if self._stage == 3:
            internals.put_back(self._zero, self._module, plain)
        else:
            for parameter, dtype in self._dtypes.items():
                parameter.data = parameter.data.to(dtype)  # where one is bfloat16, DeepSpeed makes all so
        internals.remove_marks(self._module)
