"""The scale and calendar of one city's data: mean and standard deviation of the training span, slots of the day at its
cadence, and checks of input against them."""

import math

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from stdist.errors import InputError

MINUTES_PER_DAY = 24 * 60


class CityScaling(nn.Module):
    """``who``: what errors call this, in the plural; ``cadence`` in minutes; mean and std in the data's units;
    ``weekdays`` False: to the calendar all days are one, for training spans that do not hold every weekday twice.

    Raises InputError where the cadence does not divide a day, or there are no such mean and std.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, who: str, cadence: int, mean: float, std: float, weekdays: bool = True) -> None:
        super().__init__()
        if cadence < 1 or MINUTES_PER_DAY % cadence:
            raise InputError(f"{who}: a cadence of {cadence} min does not divide a day; give whole minutes that do")
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise InputError(f"{who}: mean {mean}, std {std}; give those of the training span, std above 0")
        self.who, self.cadence, self.slots, self.weekdays = who, cadence, MINUTES_PER_DAY // cadence, weekdays
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))

    def normalise(self, history: Float[Tensor, "B S N"]) -> Float[Tensor, "B N S"]:
        """z-scores; a missing value (NaN) is the mean."""
        scores = (history - self.mean) / self.std
        return scores.masked_fill(scores.isnan(), 0.0).transpose(1, 2)

    def restore(self, scores: Float[Tensor, "B N K"]) -> Float[Tensor, "B K N"]:
        """z-scores in the data's units."""
        return torch.addcmul(self.mean, scores, self.std).transpose(1, 2)

    def calendar(self, local_times: np.ndarray) -> tuple[Int64[Tensor, " B"], Int64[Tensor, " B"]]:
        """Slot of the day and weekday (Monday 0; always 0 without ``weekdays``) of last history frames, datetime64 [B]
        in the city's local time.

        Raises InputError where one lies between two slots: the data has another cadence.
        """
        minutes = local_times.astype("datetime64[m]").astype(np.int64)
        if np.any(off := minutes % self.cadence):
            raise InputError(
                f"{local_times[off != 0][0]} is no time of {self.who}, which have a slot every {self.cadence} min; "
                "make some of the data's cadence"
            )
        slot, days = minutes % MINUTES_PER_DAY // self.cadence, minutes // MINUTES_PER_DAY
        weekday = (days + 3) % 7 * self.weekdays  # 1 January 1970 was a Thursday
        return torch.from_numpy(slot), torch.from_numpy(weekday)

    def check_batch(
        self,
        history: Tensor,
        slot: Tensor,
        weekday: Tensor,
        frames: int,
        nodes: int | None,
        remedy: str,
        first_node: int = 0,
    ) -> None:
        """Raises InputError where history is not [B, ``frames``, ``nodes``] (None: any; ``remedy`` says what to do
        about others), the calendar has no such slot or weekday, or a node has no value at all; waits for the device
        once."""
        if history.ndim != 3 or history.shape[1] != frames:
            raise InputError(f"history is {list(history.shape)}; the backbone needs [B, {frames}, N]")
        if nodes is not None and history.shape[2] != nodes:
            raise InputError(f"history has {history.shape[2]} nodes, {self.who} have {nodes}; {remedy}")
        if slot.shape != history.shape[:1] or weekday.shape != slot.shape:
            raise InputError(f"slot {list(slot.shape)}, weekday {list(weekday.shape)}: give one of each per sample")
        empty = history.isnan().all(1)
        wrong = (slot < 0) | (slot >= self.slots), (weekday < 0) | (weekday > 6)
        if not torch.stack([empty.any(), *(w.any().to(empty.device) for w in wrong)]).any():
            return
        if wrong[0].any():
            raise InputError(
                f"slot {int(slot[wrong[0]][0])} is not in the calendar of {self.who}: {self.slots} slots of "
                f"{self.cadence} min, from 0; is the data of another cadence?"
            )
        if wrong[1].any():
            raise InputError(f"weekday {int(weekday[wrong[1]][0])} is none; give 0 (Monday) to 6")
        sample, node = empty.nonzero()[0].tolist()
        raise InputError(
            f"node {first_node + node} has no value in the history of sample {sample} "
            f"({int(empty.any(0).sum())} such nodes in the batch); impute them, or leave them out"
        )
