"""One interface between a stage and what optimises it, and its engine of plain torch on one device.

The other one is :mod:`stdist.training.deepspeed_engine`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from stdist.training.fused_accumulation import set_fused_accumulation

BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two moments, as torch calls them."""


class Engine(Protocol):
    """Optimises what a stage trains: ``backward`` any number of times, whose gradients add up, then ``step`` once.

    A learner's losses are means over its equal share of the batch; gradients are averaged over learners.
    """

    @property
    def learning_rate(self) -> float:
        """The first group's, for the step to come."""
        ...

    @property
    def steps(self) -> int:
        """Steps made so far."""
        ...

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The weights that train, by names that do not depend on engine, stage of ZeRO or number of learners."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def discard_gradients(self) -> bool:
        """Drops the gradients of a step that failed, so that it can be made again; False where it cannot."""
        ...

    def step(self) -> float:
        """Clips, updates, advances the schedule, clears gradients. Returns the gradient norm before clipping."""
        ...

    def gather_full_params(self) -> AbstractContextManager[None]:
        """Inside, every learner has all weights, to save or to compare them."""
        ...

    def eval_mode(self) -> AbstractContextManager[None]:
        """Inside, the model can be called for as many batches as each learner has."""
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """This learner's part of the optimizer: a whole tensor as NAME/exp_avg and the like, or, flat, the part of one
        that begins at element 128 as NAME/exp_avg@128. No collective; the tensors are the optimizer's own."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Goes on from the ``state`` of any engine, of all its learners, after ``steps`` steps: whole tensors, of any
        shape."""
        ...

    def close(self) -> None:
        """Gives the model back as the plain module that it was, with the trained weights."""
        ...


@dataclass(frozen=True)
class ParameterGroup:
    parameters: dict[str, torch.nn.Parameter]
    learning_rate: float
    weight_decay: float


def cosine_schedule(warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Returns the factor on a learning rate by step: a linear warm-up, then a cosine to 3 % at ``max_steps``."""

    def scale(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress))

    return scale


def torch_groups(groups: Iterable[ParameterGroup]) -> list[dict[str, Any]]:
    """Groups as optimizers take them."""
    return [
        {"params": list(g.parameters.values()), "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in groups
    ]


def adamw(groups: Iterable[ParameterGroup]) -> torch.optim.AdamW:
    """The optimizer of every engine by default. On a GPU it is fused and updates in place: torch's other way makes
    temporaries as large as all that trains. On a CPU it is not: there the last digits of a fused update depend on where
    in its tensor an element lies, and learners that hold different parts of one would differ."""
    given = torch_groups(groups)
    on_gpu = all(parameter.device.type != "cpu" for group in given for parameter in group["params"])
    return torch.optim.AdamW(given, betas=BETAS, fused=on_gpu)


class Scheduled:
    """The part that all engines share: parameter groups, their learning rates, the number of steps."""

    def __init__(self, groups: Iterable[ParameterGroup], schedule: Callable[[int], float]):
        self._groups = [group for group in groups if group.parameters]
        self._schedule, self._steps = schedule, 0

    @property
    def learning_rate(self) -> float:
        return self._groups[0].learning_rate * self._schedule(self._steps)

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for group in self._groups for name, parameter in group.parameters.items()}

    def eval_mode(self) -> AbstractContextManager[None]:
        return self.gather_full_params()

    def gather_full_params(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _set_rates(self, param_groups: list[dict[str, Any]]) -> None:
        """Gives an optimizer's groups the learning rates of the step to come."""
        for torch_group, group in zip(param_groups, self._groups, strict=True):
            torch_group["lr"] = group.learning_rate * self._schedule(self._steps)


class TorchEngine(Scheduled):
    """AdamW with gradient clipping by global norm, for one learner."""

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        schedule: Callable[[int], float],
        max_grad_norm: float,
        make_optimizer: Callable[[Iterable[ParameterGroup]], torch.optim.Optimizer] = adamw,
    ):
        super().__init__(groups, schedule)
        self._optimizer, self._max_grad_norm = make_optimizer(self._groups), max_grad_norm
        set_fused_accumulation(self.parameters.values(), True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def discard_gradients(self) -> bool:
        self._optimizer.zero_grad(set_to_none=True)
        return True

    def step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._max_grad_norm)
        self._set_rates(self._optimizer.param_groups)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        return float(norm)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                yield f"{name}/{key}", value

    def load_state(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        for name, parameter in self.parameters.items():
            if f"{name}/{MOMENTS[0]}" not in tensors:
                continue  # it has not had a gradient yet
            # A parameter counts the steps in which it had a gradient; DeepSpeed counts all.
            count = tensors.get(f"{name}/step", torch.tensor(float(steps)))
            moments = {key: tensors[f"{name}/{key}"].view_as(parameter).to(parameter) for key in MOMENTS}
            self._optimizer.state[parameter] = {"step": count.clone().to(parameter.device), **moments}
        self._steps = steps

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        set_fused_accumulation(self.parameters.values(), False)
