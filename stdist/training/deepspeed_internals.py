"""DeepSpeed's private parts that stdist touches, one function a fix; nothing else in stdist knows them.

stdist calls a model's submodules and runs any number of backward passes a step; DeepSpeed is made for calls of the
whole model and equal micro-batches. Each docstring names the public issue (``#N``: of deepspeedai/DeepSpeed) or the
version that it depends on: a new minor version is read against this file, and SUPPORTED is moved.
"""

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from stdist.errors import InputError
from stdist.training.engine import MOMENTS
from stdist.training.process_group import collective_timeout

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

SUPPORTED = ("0.19.8", "0.20")
"""Supported versions, from the first on and below the second: elsewhere what is fixed here may go wrong in silence."""


def check_version(version: str) -> None:
    """Raises InputError for a DeepSpeed whose private parts were not read against this file."""
    if not Version(SUPPORTED[0]) <= Version(version) < Version(SUPPORTED[1]):
        raise InputError(
            f"DeepSpeed {version} is not supported; pip install 'deepspeed>={SUPPORTED[0]},<{SUPPORTED[1]}', "
            "or set learners.engine: torch"
        )


check_version(deepspeed.__version__)
deepspeed.utils.logger.setLevel(logging.ERROR)
# DeepSpeed calls collectives by names that torch is about to change.
warnings.filterwarnings("ignore", message=".torch.distributed", category=FutureWarning)
# On CPUs DeepSpeed would compile a faster all-reduce at first use; a process killed in that leaves a lock behind that
# every later one waits for (pytorch/pytorch#189245).
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_world_group_timeout() -> None:
    """Has DeepSpeed's own world group wait for a silent learner as long as the launcher's.

    DeepSpeed clones the world without a time-out (huggingface/transformers#32036, huggingface/transformers#38933).
    """
    if deepspeed_groups._WORLD_GROUP is None:
        deepspeed_groups._WORLD_GROUP = dist.new_group(timeout=collective_timeout())


def destroy(engine: Any) -> None:
    """Ends a DeepSpeed engine so that another one can follow on the same model (#7204).

    Its ``__del__`` destroys once more, whenever garbage is collected: that would cut the next engine's links from these
    parameters to their moments, and half of them would be saved as zeros. ``mpu`` would be the next engine's too (both
    seen with 0.19.8).
    """
    engine.destroy()
    engine.optimizer = None
    deepspeed_groups.mpu = None
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        hook.remove()


_MARKS = {
    *("_hp_mapping", "_dp_group", "_index_in_param_group", "param_idx_in_group", "grad_accum"),
    *("get_full_hp_grad", "set_full_hp_grad", "get_full_hp_param", "set_full_hp_param", "load_hp_checkpoint_state"),
    *("_external_params", "_original_parameters", "all_parameters"),
    *("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "_zero_optimizer"),
}
"""Marks left on parameters and modules beside ``ds_...``, as 0.19.8 names them."""


def remove_marks(module: nn.Module) -> None:
    """Deletes what DeepSpeed leaves on parameters and modules; some holds the optimizer's memory (#5496, #5674)."""
    for marked in (*module.modules(), *module.parameters()):
        for name in [name for name in vars(marked) if name.startswith("ds_") or name in _MARKS]:
            delattr(marked, name)


def restore_linear(linear: Callable[..., Tensor]) -> None:
    """Puts ``linear`` back as ``nn.functional.linear``, for which ZeRO-3 has put its own, for every model of the
    process and for ever (#975; since #8189 also with models made before)."""
    nn.functional.linear = linear


# --- gradients -----------------------------------------------------------------------------------------------------


def begin_backward(zero3: Any) -> None:
    """Tells ZeRO-3 that the backward pass before is over, which it would learn from the model's ``forward``, never
    called. Without it only the last pass of a step would count (several are possible since #7665; seen with 0.19.8)."""
    zero3.clear_backward_seen_flag()


def clear_gradients_zero3(zero3: Any) -> None:
    """After a step: ZeRO-3 overwrites its buffer in the first backward pass of a step and adds to it in later ones, so
    what gets its first gradient in a later pass would keep that of the step before (seen with 0.19.8).

    The next pass over the model is the first of a step, which it would learn from the hook on the model's ``forward``
    too (the one in #8043).
    """
    zero3.grad_partitions_flat_buffer.zero_()
    zero3.parameter_offload.get_param_coordinator().reset_step()


def clear_gradients_offloaded(zero2: Any) -> None:
    """After a step: as ``clear_gradients_zero3``, for ZeRO-2's buffers in CPU memory, those of #7981."""
    for buffer in zero2.accumulated_grads_in_cpu.values():
        buffer.zero_()


# --- weights of ZeRO-3 ---------------------------------------------------------------------------------------------


@contextmanager
def gathered(zero3: Any, module: nn.Module) -> Iterator[None]:
    """Inside, all weights are on every learner and the model can be called: the hooks that would free a submodule
    after its call are off (#5658, and huggingface/trl#1617 for what was active before)."""
    offload = zero3.parameter_offload
    offload._remove_module_hooks()
    offload.forward_hooks.clear()
    offload.backward_hooks.clear()
    for parameter in module.parameters():
        parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
    try:
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            yield
    finally:
        offload.setup_zero_stage3_hooks()
        _gather_persistent(zero3)


def keep_full(zero3: Any, parameters: Collection[nn.Parameter]) -> None:
    """Keeps weights that are read outside of their own submodule's ``forward`` (#1019) on every learner. DeepSpeed
    gathers its persistent parameters again after every step, but chooses them by size alone (seen with 0.19.8)."""
    more = [p for p in parameters if not p.ds_persist]  # type: ignore[attr-defined]
    for parameter in more:
        parameter.ds_persist = True  # type: ignore[attr-defined]
    zero3.persistent_parameters.extend(more)
    _gather_persistent(zero3)


def _gather_persistent(zero3: Any) -> None:
    if persistent := zero3.persistent_parameters:
        persistent[0].all_gather(persistent)


def plain_parameters(zero3: Any, module: nn.Module, dtypes: dict[nn.Parameter, torch.dtype]) -> dict[nn.Parameter, Any]:
    """Returns a full plain parameter, of the precision in ``dtypes``, for each that ZeRO-3 has sharded."""
    with gathered(zero3, module):
        # A copy: outside of this block the gathered memory is freed again.
        return {p: nn.Parameter(p.data.to(dtype, copy=True), p.requires_grad) for p, dtype in dtypes.items()}


def put_back(zero3: Any, module: nn.Module, plain: dict[nn.Parameter, Any]) -> None:
    """Undoes ZeRO-3 on a module whose engine was destroyed: no hooks, and ``plain`` where shards were."""
    zero3.parameter_offload._remove_module_hooks()
    for submodule in module.modules():
        # Also takes the place of DeepSpeed's own dictionary class.
        submodule._parameters = {
            name: parameter if parameter is None else plain[parameter]
            for name, parameter in submodule._parameters.items()
        }


# --- the optimizer's state -----------------------------------------------------------------------------------------


def make_moments(zero: Any, stage: int, steps: int) -> None:
    """Gives the inner optimizer the state that its first step would make, of zeros, to be filled by ``set_state``.

    DeepSpeed's own checkpoints serve one number of learners (deepspeedai/Megatron-DeepSpeed#439).
    """
    flat = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for parameter in flat:
        moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
        zero.optimizer.state[parameter] = {
            "step": torch.tensor(float(steps), device=parameter.device),
            **moments,
        }


def link_moments(zero: Any) -> None:
    """Tells parameters of ZeRO-1 and 2 where their moments are. DeepSpeed does so once, in its first group's first
    step, when the other groups have none yet (#5104, seen with 0.19.8)."""
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def local_state(parameter: nn.Parameter, stage: int, key: str | None) -> tuple[int, Tensor] | None:
    """This learner's part of a moment, or without ``key`` of the master weights, flat, and the element it begins at.

    Nothing is communicated; the tensor is the optimizer's own. None where it has no part.
    """
    if stage == 3:
        shard: Any = parameter
        start = dist.get_rank() * shard.ds_tensor.ds_numel
        local = safe_get_local_optimizer_state(parameter, key) if key else safe_get_local_fp32_param(parameter)
        return start, local.flatten()[: max(0, shard.ds_numel - start)]
    if (mapping := parameter._hp_mapping) is None:  # type: ignore[attr-defined]
        return None
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)


def set_state(zero: Any, parameter: nn.Parameter, stage: int, value: Tensor, key: str | None) -> None:
    """Puts a full moment, or without ``key`` the master weights, where this learner keeps its part of them.

    ZeRO-3 itself reads past the end of what the learners cannot share evenly (seen with 0.19.8).
    """
    if stage != 3:
        parameter.set_full_hp_param(value, key)  # type: ignore[attr-defined]
        return
    count = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    part = value.flatten()[dist.get_rank() * count :][:count]
    zero.set_local_hp_param(nn.functional.pad(part, (0, count - part.numel())), parameter, key)
