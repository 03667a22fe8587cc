"""The prefix tree computes what one full sequence per candidate through transformers computes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.policy.adapters import add_lora, train_only
from stdist.vision_llm.policy.city_windows import PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.prompts import IMAGE

MakePolicy = Callable[..., PolicyModel]
PlainModel = Callable[[PolicyModel], Qwen2_5_VLForConditionalGeneration]
PlainInputs = Callable[..., dict[str, Tensor]]


@pytest.mark.parametrize("sees_frames", [True, False])
def test_prefix_and_branch_equal_one_sequence_of_transformers(
    make_policy: MakePolicy,
    make_batch: Callable[..., PolicyBatch],
    plain_model: PlainModel,
    plain_inputs: PlainInputs,
    sees_frames: bool,
) -> None:
    """Two windows × three cells against six separate sequences, with transformers' own M-RoPE index and masks."""
    policy = make_policy() if sees_frames else make_policy(frames=None)
    policy.eval()
    batch = make_batch(policy)
    assert (batch.shared == policy.image_id).any() == sees_frames
    with torch.no_grad():
        prefix = policy.prefix(batch.shared, batch.grids)
        previous = batch.answers[:, :-1]
        hidden, _ = policy.branch(prefix, torch.cat([batch.prompts, previous], dim=1))
        ours = head_logits(hidden.flatten(0, 1), policy.full_head).view(*hidden.shape[:2], -1)
        model = plain_model(policy)
        for child in range(6):
            theirs = model(**plain_inputs(policy, batch, child, previous[child])).logits[0]
            assert torch.allclose(ours[child], theirs[batch.shared.shape[1] :], rtol=0, atol=1e-4)


def test_logits_say_only_tokens_that_exist_in_the_order_of_ids(policy: PolicyModel) -> None:
    hidden = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    full, answer = head_logits(hidden, policy.full_head), head_logits(hidden, policy.answer_head)
    n, first = len(policy.vocabulary), policy.first_numeral_id
    assert full.shape == (3, first + n) and answer.shape == (3, n + 1)
    assert torch.allclose(full[:, first:], answer[:, :-1], atol=1e-6)
    assert torch.allclose(full[:, policy.end_id], answer[:, -1], atol=1e-6)
    numeral = policy.vocabulary.indices(42, 1)
    assert torch.allclose(answer[:, numeral], hidden @ policy.rows.output[numeral], atol=1e-6)


def test_cells_of_a_window_do_not_see_each_other(policy: PolicyModel, batch: PolicyBatch) -> None:
    with torch.no_grad():
        together, _ = policy.branch(policy.prefix(batch.shared, batch.grids), batch.prompts)
        for child in range(6):
            window = slice(child // 3, child // 3 + 1)
            prefix = policy.prefix(batch.shared[window], batch.grids[window])
            alone, _ = policy.branch(prefix, batch.prompts[child : child + 1])
            assert torch.allclose(together[child], alone[0], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)  # other cell
    assert not torch.allclose(together[0], together[3], atol=0.01)  # other window


def test_the_frames_matter(policy: PolicyModel, batch: PolicyBatch) -> None:
    with torch.no_grad():
        seen, _ = policy.branch(policy.prefix(batch.shared, batch.grids), batch.prompts)
        other, _ = policy.branch(policy.prefix(batch.shared, batch.grids.flip(1)), batch.prompts)
    assert not torch.allclose(seen, other, atol=1e-2)  # the frames' order counts


def test_every_branch_starts_where_the_prefix_ends(policy: PolicyModel, batch: PolicyBatch) -> None:
    """An H×W image moves M-RoPE on by max(h, w) of its merged patches, not by its number of tokens (6 of 3×2)."""
    geometry = policy.encoder.geometry
    prefix = policy.prefix(batch.shared, batch.grids)
    text_tokens = int((batch.shared[0] != policy.image_id).sum())
    assert (geometry.patch_rows // 2, geometry.patch_cols // 2) == (3, 2)
    assert prefix.position.tolist() == [text_tokens + 4 * 3] * 2
    hidden, cells = policy.branch(prefix, batch.prompts)
    assert cells.position.tolist() == [text_tokens + 4 * 3 + batch.prompts.shape[1]] * 6 and cells.sequences == 6
    again, _ = policy.branch(prefix, batch.prompts)  # a prefix serves any number of branches
    assert torch.equal(hidden, again)
    longer, _ = policy.branch(prefix, torch.cat([batch.prompts, batch.answers], dim=1))
    assert torch.allclose(hidden, longer[:, : hidden.shape[1]], atol=1e-5)


def test_a_branch_of_a_branch_equals_one_branch(policy: PolicyModel, batch: PolicyBatch) -> None:
    """Depth two: candidates that continue cells that continue windows."""
    prefix = policy.prefix(batch.shared, batch.grids)
    whole, _ = policy.branch(prefix, torch.cat([batch.prompts, batch.answers], dim=1))
    first, cells = policy.branch(prefix, batch.prompts)
    second, _ = policy.branch(cells, batch.answers)
    assert torch.allclose(torch.cat([first, second], dim=1), whole, atol=1e-4)
    assert torch.equal(cells.last, first[:, -1])


def test_gradient_through_a_shared_prefix_is_the_sum_over_samples(
    make_policy: MakePolicy, batch: PolicyBatch, plain_model: PlainModel, plain_inputs: PlainInputs
) -> None:
    """Numeral rows, a projection of the first layer and the vision tower, against six sequences of transformers."""
    policy = make_policy()
    train_only(policy, "full")
    hidden, _ = policy.branch(
        policy.prefix(batch.shared, batch.grids), torch.cat([batch.prompts, batch.answers[:, :-1]], dim=1)
    )
    predicted = head_logits(hidden[:, batch.prompts.shape[1] - 1 :].flatten(0, 1), policy.full_head)
    torch.nn.functional.cross_entropy(predicted, batch.answers.flatten(), reduction="sum").backward()

    model = plain_model(policy)
    for child in range(6):
        logits = model(**plain_inputs(policy, batch, child, batch.answers[child, :-1])).logits[0, -4:]
        torch.nn.functional.cross_entropy(logits, batch.answers[child], reduction="sum").backward()

    first = policy.first_numeral_id
    ours, theirs = policy.base_model, model
    pairs = {
        "numeral embedding": (policy.rows.input.grad, theirs.get_input_embeddings().weight.grad[first:]),
        "numeral head": (policy.rows.output.grad, theirs.lm_head.weight.grad[first:]),
        "text embedding": (ours.get_input_embeddings().weight.grad, theirs.get_input_embeddings().weight.grad[:first]),
        "text head": (ours.lm_head.weight.grad, theirs.lm_head.weight.grad[:first]),
    }
    their_parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.endswith(("layers.0.self_attn.k_proj.weight", "patch_embed.proj.weight", "merger.mlp.2.weight")):
            pairs[name] = (parameter.grad, their_parameters[name].grad)
    assert len(pairs) == 7
    for name, (our_gradient, their_gradient) in pairs.items():
        assert their_gradient.norm() > 0, name
        assert (our_gradient - their_gradient).norm() / their_gradient.norm() < 1e-4, name


def test_a_part_of_a_prefix_is_a_view_that_knows_what_it_continues(policy: PolicyModel, batch: PolicyBatch) -> None:
    _, cells = policy.branch(policy.prefix(batch.shared, batch.grids), batch.prompts)
    part = cells.part(3, 5)
    assert (part.sequences, part.position.tolist()) == (2, cells.position[3:5].tolist())
    assert part.parent is not None and part.parent.sequences == 1
    for ours, whole in zip(part.tensors, cells.tensors, strict=True):
        assert torch.equal(ours, whole[3:5]) and ours.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    for ours, whole in zip(part.parent.tensors, cells.parent.tensors, strict=True):
        assert torch.equal(ours, whole[1:2]) and ours.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_children_read_their_parents_memory_itself(policy: PolicyModel, batch: PolicyBatch) -> None:
    """Three cells a window, yet a layer's segments hold one row of keys for each window."""
    prefix = policy.prefix(batch.shared, batch.grids)
    _, cells = policy.branch(prefix, batch.prompts)
    for layer in range(4):
        own, windows = cells.segments(layer)
        assert own.keys is cells.keys[layer] and own.values is cells.values[layer]
        assert windows.keys is prefix.keys[layer] and len(windows.keys) == 2 and len(own.keys) == 6


@pytest.mark.parametrize("part", ["rows", "lora", "full"])
def test_train_only_chooses_what_trains(make_policy: MakePolicy, part: str) -> None:
    policy = make_policy()
    add_lora(policy)
    train_only(policy, part)
    trains = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    is_lora = {name for name, _ in policy.named_parameters() if "lora_" in name}
    is_row = {"rows.input", "rows.output"}
    everything = {name for name, _ in policy.named_parameters()}
    assert trains == {"rows": is_row, "lora": is_row | is_lora, "full": everything}[part]
    assert is_lora and not any("visual" in name for name in is_lora)


def test_the_image_token_of_prompts_is_the_models_own(policy: PolicyModel) -> None:
    assert policy.image_id == policy.base_model.config.image_token_id
    assert policy.tokenizer.decode([policy.image_id]) == IMAGE
