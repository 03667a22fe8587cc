"""Evaluation mode around what only computes."""

import pytest
import torch
from torch import nn

from stdist.training.inference import inference


@pytest.mark.parametrize("fails", [False, True])
def test_each_part_is_in_its_own_mode_again(fails: bool) -> None:
    """A part that was frozen in evaluation mode does not begin to train because another one does."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5))).train()
    model[1].eval()
    try:
        with inference(model):
            assert not any(part.training for part in model.modules()) and not torch.is_grad_enabled()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert torch.is_grad_enabled()
    assert [part.training for part in model.modules()] == [True, True, False, False]
