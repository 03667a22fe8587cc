"""One interface between a stage and whatever optimises it. Here: plain torch on one device."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Engine(Protocol):
    """A stage calls ``backward`` any number of times, then ``step`` once; gradients of the calls add up."""

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> float:
        """Clips, updates, advances the schedule, clears gradients. Returns the gradient norm before clipping."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values that continue the optimisation exactly."""
        ...

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class ParameterGroup:
    parameters: list[torch.nn.Parameter]
    learning_rate: float
    weight_decay: float


def cosine_schedule(warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Linear warm-up, then a cosine to 3 % of the peak at ``max_steps``."""

    def scale(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress))

    return scale


class TorchEngine:
    """AdamW with gradient clipping by global norm."""

    def __init__(self, groups: Iterable[ParameterGroup], schedule: Callable[[int], float], max_grad_norm: float):
        self._groups = [group for group in groups if group.parameters]
        self._optimizer = torch.optim.AdamW(
            [{"params": g.parameters, "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in self._groups],
            betas=(0.9, 0.95),
        )
        self._schedule, self._max_grad_norm, self._steps = schedule, max_grad_norm, 0

    @property
    def learning_rate(self) -> float:
        """Of the first group, for the step to come."""
        return self._groups[0].learning_rate * self._schedule(self._steps)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        parameters = [parameter for group in self._groups for parameter in group.parameters]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        for torch_group, group in zip(self._optimizer.param_groups, self._groups, strict=True):
            torch_group["lr"] = group.learning_rate * self._schedule(self._steps)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        return float(norm)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self._optimizer.state_dict()["state"]
        tensors = {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}
        return tensors, {"steps": self._steps}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._steps = values["steps"]
