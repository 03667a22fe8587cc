"""DeepSpeed's ZeRO behind the one engine interface (ZeRO, arXiv 1910.02054, stages 1, 2 and 3).

The optimizer's state goes in and out whole and by name, so that a checkpoint of one stage of ZeRO or number of
learners serves any other.
"""

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stdist.errors import InputError
from stdist.training.engine import MOMENTS, ParameterGroup, Scheduled, adamw
from stdist.training.process_group import patience

# Asked for, it is neither looked for nor talked about.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
try:
    import deepspeed
    from deepspeed.utils import groups as deepspeed_groups
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
except ModuleNotFoundError as error:
    raise InputError(
        "DeepSpeed is not installed; pip install 'stdist[cluster]', or set learners.engine: torch"
    ) from error

deepspeed.utils.logger.setLevel(logging.ERROR)

# DeepSpeed calls collectives by names that torch is about to change.
warnings.filterwarnings("ignore", message=".torch.distributed", category=FutureWarning)
# On CPUs DeepSpeed would compile a faster all-reduce at first use; a process killed in that leaves a lock behind that
# every later one waits for.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_MARKS = {
    *("_hp_mapping", "_dp_group", "_index_in_param_group", "param_idx_in_group", "grad_accum"),
    *("get_full_hp_grad", "set_full_hp_grad", "get_full_hp_param", "set_full_hp_param", "load_hp_checkpoint_state"),
    *("_external_params", "_original_parameters", "all_parameters"),
    *("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "_zero_optimizer"),
}
"""What DeepSpeed 0.19 leaves on parameters and modules, beside ds_...; some of it holds the optimizer's memory."""


def _bound_waiting() -> None:
    """Has DeepSpeed's collectives wait for a silent learner as long as the launcher's."""
    if deepspeed_groups._WORLD_GROUP is None:
        deepspeed_groups._WORLD_GROUP = dist.new_group(timeout=patience())


class DeepSpeedEngine(Scheduled):
    """See :class:`stdist.training.engine.Engine`.

    Args:
        module: the whole model, also what is frozen; never called itself, its submodules are.
        persistent: parameters that are read outside of their own submodules' ``forward``; ZeRO-3 keeps them whole.
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
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists; launchers of many learners set it
        super().__init__(groups, schedule)
        self._module = module
        self._dtypes = {parameter: parameter.dtype for parameter in module.parameters()}
        self._linear = nn.functional.linear  # ZeRO-3 puts its own in this place, for every model of the process
        _bound_waiting()
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=adamw(self._groups), config=configuration, mpu=mpu, dist_init_required=False
        )
        self._zero = self._engine.optimizer
        self._stage = self._engine.zero_optimization_stage()
        if self._stage == 3:
            self._keep_whole(persistent)

    def backward(self, loss: Tensor) -> None:
        if self._stage == 3:
            # Tells ZeRO-3 that the backward pass before is over; DeepSpeed does so in the model's forward, which is
            # never called. Without it only the last pass of a step would count.
            self._zero.clear_backward_seen_flag()
        self._engine.backward(loss)

    def step(self) -> float:
        self._set_rates(self._zero.param_groups)
        self._engine.step()
        self._forget_gradients()
        self._steps += 1
        return float(self._engine.get_global_grad_norm())

    def _forget_gradients(self) -> None:
        """DeepSpeed 0.19 overwrites a gradient buffer in the first backward pass of a step and adds to it in later
        ones: what gets its first gradient in a later pass would keep that of the step before."""
        if self._stage == 3:
            self._zero.grad_partitions_flat_buffer.zero_()
            # The next pass over the model is the first of a step; DeepSpeed would learn it from the model's forward.
            self._zero.parameter_offload.get_param_coordinator().reset_step()
        elif self._stage == 2 and self._zero.cpu_offload:
            for buffer in self._zero.accumulated_grads_in_cpu.values():
                buffer.zero_()

    @contextmanager
    def gather_full_params(self) -> Iterator[None]:
        if self._stage != 3:
            yield
            return
        # As TRL does for generation: gather all, and take off the hooks that would free a submodule after its call.
        offload = self._zero.parameter_offload
        offload._remove_module_hooks()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        for parameter in self._module.parameters():
            parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
        try:
            with deepspeed.zero.GatheredParameters(list(self._module.parameters())):
                yield
        finally:
            offload.setup_zero_stage3_hooks()
            self._gather_persistent()

    def _keep_whole(self, persistent: Collection[nn.Parameter]) -> None:
        """DeepSpeed gathers its persistent parameters again after every step; it chooses them by size alone."""
        more = [p for p in persistent if not p.ds_persist]  # type: ignore[attr-defined]
        for parameter in more:
            parameter.ds_persist = True  # type: ignore[attr-defined]
        self._zero.persistent_parameters.extend(more)
        self._gather_persistent()

    def _gather_persistent(self) -> None:
        if chosen := self._zero.persistent_parameters:
            chosen[0].all_gather(chosen)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        self._link_moments()
        for name, parameter in self.parameters.items():
            if self._steps:
                for key in MOMENTS:
                    yield from self._part(f"{name}/{key}", parameter, key)
            if parameter.dtype != torch.float32:
                yield from self._part(f"{name}/master", parameter, None)

    def _part(self, name: str, parameter: nn.Parameter, key: str | None) -> Iterator[tuple[str, Tensor]]:
        """What this learner keeps of a moment, or without ``key`` of the master weights; nothing is communicated."""
        if self._stage == 3:
            start = dist.get_rank() * parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            local = safe_get_local_optimizer_state(parameter, key) if key else safe_get_local_fp32_param(parameter)
            part = local.flatten()[: max(0, parameter.ds_numel - start)]  # type: ignore[attr-defined]
        elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            start, part = mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)
        else:
            return
        if part.numel():
            yield f"{name}@{start}", part

    def load_state(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        self._steps = steps
        if steps:
            self._materialise(steps)
        for name, parameter in self.parameters.items():
            for key in MOMENTS:
                if f"{name}/{key}" in tensors:
                    self._set(parameter, tensors[f"{name}/{key}"], key)
            if f"{name}/master" in tensors:
                self._set(parameter, tensors[f"{name}/master"])

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Puts a whole moment, or without ``key`` the master weights, where this learner keeps its part of them."""
        value = value.to(self._engine.device)
        if self._stage != 3:
            parameter.set_full_hp_param(value, key)  # type: ignore[attr-defined]
            return
        # DeepSpeed 0.19 itself reads past the end of what the learners cannot share evenly.
        each = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        mine = value.flatten()[dist.get_rank() * each :][:each]
        self._zero.set_local_hp_param(nn.functional.pad(mine, (0, each - mine.numel())), parameter, key)

    def _materialise(self, steps: int) -> None:
        """Gives the inner optimizer the state that its first step would make, of zeros."""
        optimizer = self._zero.optimizer
        flat = (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        for parameter in flat:
            moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}
        self._link_moments()

    def _link_moments(self) -> None:
        """Tells parameters where their moments are. DeepSpeed 0.19 does so after the first group's first step, when
        the other groups have none yet."""
        if self._stage != 3 and self._steps:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        full: dict[nn.Parameter, nn.Parameter] = {}
        if self._stage == 3:
            with self.gather_full_params():
                for parameter, dtype in self._dtypes.items():
                    # A copy: outside of this block the gathered memory is freed again.
                    full[parameter] = nn.Parameter(parameter.data.to(dtype, copy=True), parameter.requires_grad)
        self._engine.destroy()
        # Garbage collection would destroy it once more, and with it the next engine's links from these parameters to
        # their moments: half of them would be saved as zeros.
        self._engine.optimizer = None
        deepspeed_groups.mpu = None  # it would be the next engine's too
        nn.functional.linear = self._linear
        if self._stage == 3:
            self._zero.parameter_offload._remove_module_hooks()
            for module in self._module.modules():
                module._parameters = {
                    name: parameter if parameter is None else full[parameter]
                    for name, parameter in module._parameters.items()
                }
        else:
            for parameter, dtype in self._dtypes.items():
                parameter.data = parameter.data.to(dtype)  # where one is bfloat16, DeepSpeed makes all so
        for hook in (self._engine.module_forward_pre_hook, self._engine.module_forward_post_hook):
            hook.remove()
        for thing in (*self._module.modules(), *self._module.parameters()):
            for mark in [name for name in vars(thing) if name.startswith("ds_") or name in _MARKS]:
                delattr(thing, mark)
