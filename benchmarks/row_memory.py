"""Memory of training numeral rows alone, beside a frozen text vocabulary: ours against PEFT's two ways.

One model on all sides, a decoder of one layer with a text vocabulary of the published size, whose frozen embedding and
head get rows for numerals; two steps of AdamW on next tokens. Ours keeps the rows in matrices of their own, makes the
head's logits in tiles, and adds to gradients where they are held. PEFT's ``trainable_token_indices`` writes the rows
into a copy of both matrices at every pass, its ``modules_to_save`` trains copies of both whole. A run is a process of
its own, and what counts is its peak above the model. The losses of both steps must agree with ours.

    python benchmarks/row_memory.py --json
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _harness import Cost, comparison, cost_in_fresh_process, figure, parser, publish
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from stdist.training.eight_bit_engine import EightBitEngine
from stdist.training.engine import ParameterGroup, TorchEngine, cosine_schedule
from stdist.vision_llm.kernels.token_losses import token_log_probs
from stdist.vision_llm.policy.numeral_embeddings import NumeralEmbeddings

STEPS, RATE = 2, 1e-3


class Size(NamedTuple):
    positions: int
    text_rows: int
    numeral_rows: int
    d: int


def frozen_model(size: Size) -> tuple[Qwen2ForCausalLM, NumeralEmbeddings, Tensor]:
    """The model, its numeral rows, and tokens, half of them text; from the same seed on all sides."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=size.text_rows,
            hidden_size=size.d,
            intermediate_size=size.d,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    ).requires_grad_(False)
    rows = NumeralEmbeddings(*(0.02 * torch.randn(2, size.numeral_rows, size.d)))
    text = torch.randint(size.text_rows, (size.positions // 2 + 1,))
    numerals = size.text_rows + torch.randint(size.numeral_rows, (size.positions // 2,))
    return model, rows, torch.cat([text, numerals])[torch.randperm(size.positions // 2 * 2 + 1)][None]


def ours(size: Size, engine_class: type[TorchEngine]) -> Callable[[], list[float]]:
    model, rows, tokens = frozen_model(size)

    def steps() -> list[float]:
        parameters = dict(rows.named_parameters())
        engine = engine_class([ParameterGroup(parameters, RATE, 0.0)], cosine_schedule(1, 10**9), 1e9)
        losses = []
        for _ in range(STEPS):
            embeddings = rows.embed(tokens[:, :-1], model.get_input_embeddings(), size.text_rows)
            hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0]
            loss = -token_log_probs(hidden, [model.lm_head.weight, rows.output], tokens[0, 1:]).mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    return steps


def in_plain_torch(size: Size) -> Callable[[], list[float]]:
    return ours(size, TorchEngine)


def in_eight_bits(size: Size) -> Callable[[], list[float]]:
    import bitsandbytes  # noqa: F401, before memory is counted

    return ours(size, EightBitEngine)


def pefts(size: Size, adapted: Callable[[nn.Module, list[int]], nn.Module]) -> Callable[[], list[float]]:
    model, rows, tokens = frozen_model(size)
    model.resize_token_embeddings(size.text_rows + size.numeral_rows, mean_resizing=False)
    for matrix, row in ((model.get_input_embeddings(), rows.input), (model.lm_head, rows.output)):
        matrix.weight.data[size.text_rows :] = row.data
    del rows
    model.requires_grad_(False)
    trained = adapted(model, list(range(size.text_rows, size.text_rows + size.numeral_rows)))

    def steps() -> list[float]:
        parameters = [p for p in trained.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, RATE, betas=(0.9, 0.95), weight_decay=0.0)
        losses = []
        for _ in range(STEPS):
            logits = trained(input_ids=tokens[:, :-1], use_cache=False).logits[0]
            loss = F.cross_entropy(logits, tokens[0, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            del logits, loss
        return losses

    return steps


def trainable_token_indices(size: Size) -> Callable[[], list[float]]:
    from peft import TrainableTokensConfig, get_peft_model

    return pefts(
        size,
        lambda model, ids: get_peft_model(
            model, TrainableTokensConfig(token_indices=ids, target_modules=["embed_tokens", "lm_head"])
        ),
    )


def modules_to_save(size: Size) -> Callable[[], list[float]]:
    from peft import LoraConfig, get_peft_model

    def adapted(model: nn.Module, ids: list[int]) -> nn.Module:
        config = LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(False)
        return wrapped

    return pefts(size, adapted)


SIDES = {
    "ours": in_plain_torch,
    "ours, moments of eight bits": in_eight_bits,
    "PEFT, trainable_token_indices": trainable_token_indices,
    "PEFT, modules_to_save": modules_to_save,
}


def measure(runs: int, size: Size) -> dict[str, Any]:
    costs: dict[str, list[Cost]] = {name: [] for name in SIDES}
    for _ in range(runs):
        for name, prepare in SIDES.items():
            costs[name].append(cost_in_fresh_process(prepare, size))
        losses = {name: each[-1].result for name, each in costs.items()}
        if not all(math.isclose(each[0], losses["ours"][0], rel_tol=1e-4) for each in losses.values()):
            raise SystemExit(f"error: the sides disagree on the loss: {losses}")
    bytes_of = {name: statistics.median(cost.peak_bytes for cost in each) for name, each in costs.items()}
    peer = "PEFT, trainable_token_indices"
    return comparison(
        name="row_memory",
        unit="MB of two steps above the model",
        values=[cost.peak_bytes / 1e6 for cost in costs["ours"]],
        peer=peer,
        peer_values=[cost.peak_bytes / 1e6 for cost in costs[peer]],
        setting=f"{size.numeral_rows:,} numeral rows beside {size.text_rows:,} of text, d {size.d}, "
        f"{size.positions:,} positions, one layer, torch {torch.__version__}",
        better="less",
        megabytes={name: figure(count / 1e6) for name, count in bytes_of.items()},
        times_ours={name: figure(count / bytes_of["ours"]) for name, count in bytes_of.items()},
        seconds={name: figure(statistics.median(cost.seconds for cost in each)) for name, each in costs.items()},
        losses=losses,
    )


def main() -> None:
    arguments = parser(__doc__, runs=3)
    arguments.add_argument("--positions", type=int, default=1024)
    arguments.add_argument("--text-rows", type=int, default=152_000)
    arguments.add_argument("--numeral-rows", type=int, default=199_801)
    arguments.add_argument("--width", type=int, default=256, help="d")
    given = arguments.parse_args()
    publish(measure(given.runs, Size(given.positions, given.text_rows, given.numeral_rows, given.width)), given.json)


if __name__ == "__main__":
    main()
