"""Embedding and head rows of the numerals beside a frozen text vocabulary."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from stdist.numerals import Vocabulary
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.numeral_embeddings import NumeralEmbeddings, initial_embeddings


def test_embed_mixes_text_and_numeral_rows_and_trains_only_numerals_that_occur() -> None:
    text = nn.Embedding(5, 3)
    before = text.weight.detach().clone()
    rows = NumeralEmbeddings(torch.randn(4, 3), torch.randn(4, 3))
    text.weight.requires_grad_(False)
    ids = torch.tensor([[0, 5, 4], [8, 8, 2]])
    embedded = rows.embed(ids, text, first_id=5)
    expected = torch.stack([before[0], rows.input[0], before[4], rows.input[3], rows.input[3], before[2]]).view(2, 3, 3)
    assert torch.equal(embedded, expected)
    embedded.sum().backward()
    assert rows.input.grad.tolist() == [[1.0] * 3, [0.0] * 3, [0.0] * 3, [2.0] * 3]
    assert rows.output.grad is None and text.weight.grad is None
    assert torch.equal(text.weight, before) and text.weight.shape == (5, 3)


def test_a_trained_text_row_gets_nothing_from_numerals() -> None:
    """Numeral positions look row 0 up and throw it away: its gradient must not count them."""
    text, rows = nn.Embedding(5, 3), NumeralEmbeddings(torch.randn(4, 3), torch.randn(4, 3))
    rows.embed(torch.tensor([5, 6, 7, 2]), text, first_id=5).sum().backward()
    assert text.weight.grad.sum(1).tolist() == [0.0, 0.0, 3.0, 0.0, 0.0]


def test_the_base_is_never_resized(policy: PolicyModel) -> None:
    text_tokens = policy.first_numeral_id
    assert policy.base_model.get_input_embeddings().weight.shape[0] == text_tokens
    assert policy.base_model.lm_head.weight.shape[0] == text_tokens
    assert policy.base_model.config.get_text_config().vocab_size == text_tokens
    assert policy.rows.input.shape == policy.rows.output.shape == (len(policy.vocabulary), 128)


@pytest.fixture(scope="module")
def three_digits() -> tuple[Vocabulary, torch.Tensor]:
    vocabulary = Vocabulary(mantissa_digits=3)
    digits = torch.randn(10, 128, generator=torch.Generator().manual_seed(0)) * 0.09
    return vocabulary, initial_embeddings(vocabulary, digits, seed=0)


def test_initial_rows_order_values(three_digits: tuple[Vocabulary, torch.Tensor]) -> None:
    """Neighbours in value are nearer in angle than numerals further away, at every magnitude."""
    vocabulary, rows = three_digits

    def similarity(a: list[float], b: list[float]) -> torch.Tensor:
        return cosine_similarity(rows[vocabulary.encode(a)], rows[vocabulary.encode(b)])

    base = [1.5e-3, 0.052, 1.23, 45.6, 789.0, 2.5e4]
    near = similarity(base, [v * 1.01 for v in base])
    third = similarity(base, [v * 1.35 for v in base])
    decades = similarity(base, [v * 73 if v < 1 else v / 73 for v in base])
    negated = similarity(base, [-v for v in base])
    assert (near > third + 0.1).all()
    assert near.mean() > third.mean() > decades.mean()
    assert (near > negated + 0.1).all()


def test_aliases_of_a_value_are_near_but_not_identical(three_digits: tuple[Vocabulary, torch.Tensor]) -> None:
    """12/1 and 120/1 both mean 12."""
    vocabulary, rows = three_digits
    short, long = vocabulary.indices([12, 50, -73], [1, -2, 3]), vocabulary.indices([120, 500, -730], [1, -2, 3])
    assert (vocabulary.decode(short) == vocabulary.decode(long)).all()
    similarity = cosine_similarity(rows[short], rows[long])
    assert (similarity > 0.5).all() and (similarity < 0.999).all()


def test_initial_rows_are_reproducible_finite_distinct_and_sized_like_digits(
    three_digits: tuple[Vocabulary, torch.Tensor],
) -> None:
    vocabulary, rows = three_digits
    digits = torch.randn(10, 128, generator=torch.Generator().manual_seed(0)) * 0.09
    assert torch.equal(rows, initial_embeddings(vocabulary, digits, seed=0))
    assert not torch.equal(rows, initial_embeddings(vocabulary, digits, seed=1))
    assert rows.isfinite().all()
    assert len(rows.unique(dim=0)) == len(vocabulary)
    assert rows.pow(2).mean().sqrt().item() == pytest.approx(digits.pow(2).mean().sqrt().item(), rel=0.1)
