"""Eq. 17 as one of TRL's ``reward_funcs``."""

from collections.abc import Callable
from itertools import takewhile

import torch

from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.stages.reward import RewardKind, reward_terms


def numeral_reward(
    policy: PolicyModel, half_score: float = 0.2, kind: RewardKind = "eq17"
) -> Callable[..., list[float | None]]:
    """Returns ``reward(completion_ids, truth, normalizer, **_) -> list[float]``, which ``GRPOTrainer`` calls with the
    columns of :func:`window_dataset`, one entry a completion, and the trainer's ``log_metric``.

    What counts is the numerals in front of the first other token; where that is not the end, or where there is none in
    front of it, decoding has failed. See :func:`stdist.vision_llm.stages.reward.reward_terms` for ``half_score`` and
    ``kind``; ``error_of_mean`` is for candidates drawn in one pass, which TRL does not draw.
    """
    first, end, values = policy.first_numeral_id, policy.end_id, policy.vocabulary.values

    def numeral_reward(
        completion_ids: list[list[int]],
        truth: list[list[float]],
        normalizer: list[float],
        log_metric: Callable[[str, float], None] | None = None,
        **_: object,
    ) -> list[float | None]:
        numerals = [list(takewhile(lambda id: id >= first, ids)) for ids in completion_ids]
        lengths = torch.tensor([len(written) for written in numerals])
        predicted = torch.zeros(len(numerals), max(1, int(lengths.max())))
        for row, written in zip(predicted, numerals, strict=True):
            row[: len(written)] = torch.from_numpy(values[[id - first for id in written]])
        ended = [ids[n : n + 1] in ([], [end]) for ids, n in zip(completion_ids, lengths.tolist(), strict=True)]
        terms = reward_terms(
            predicted,
            lengths,
            torch.tensor(truth),
            torch.tensor(normalizer),
            half_score,
            torch.tensor(ended),
            kind,
        )
        if log_metric:
            for name, term in terms._asdict().items():
                log_metric(f"reward/{name}", float(term.mean()))
        return terms.reward.tolist()

    return numeral_reward
