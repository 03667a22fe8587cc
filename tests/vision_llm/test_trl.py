"""The policy, its data and its reward inside TRL's trainers: the same numbers as in stdist's own stages."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from stdist.data import GridStore
from stdist.errors import InputError
from stdist.training.engine import TorchEngine, cosine_schedule
from stdist.training.loop import LoopSettings, Trainer
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm import Policy, learning
from stdist.vision_llm.config import GRPOConfig, SFTConfig, VisionLLMConfig
from stdist.vision_llm.kernels.token_losses import head_logits
from stdist.vision_llm.learning import begin_stage, check_learners, parameter_groups
from stdist.vision_llm.policy.adapters import adapter_names
from stdist.vision_llm.policy.checkpoints import snapshot_policy
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.rollouts import Candidates
from stdist.vision_llm.run import PolicyFiles
from stdist.vision_llm.stages.grpo import GRPOStage
from stdist.vision_llm.stages.loss import LOSSES
from stdist.vision_llm.stages.sft import SFTStage

pytest.importorskip("trl", reason="TRL is not installed: pip install 'stdist[dev]'")

from trl import GRPOTrainer

from stdist.vision_llm.trl import AnswerCollator, PolicyProcessor, TransformersView, numeral_reward, window_dataset
from stdist.vision_llm.trl.steps import make_steps, make_trl_engine

ROOT = Path(__file__).parents[2]
SEED, STEPS = 5, 4
FEW: dict[str, Any] = {
    "max_steps": STEPS,
    "warmup_steps": 1,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_steps": STEPS,
    "eval_windows": 1,
    "windows_per_step": 2,
    "cells_per_window": 3,
    "learning_rate": 1e-3,
    "numeral_learning_rate": 3e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
}


def cities(policy: PolicyModel, store: GridStore) -> tuple[CityWindows, CityWindows]:
    train, validation = (
        CityWindows(policy, store.windows(name, 4, 3, channel="internet")) for name in ("train", "validation")
    )
    return train, validation


def sft_stage(policy: PolicyModel, store: GridStore, trainable: str = "full", **changes: Any) -> SFTStage:
    config = SFTConfig.model_validate(FEW | {"trainable": trainable} | changes)
    begin_stage(policy, "sft", trainable, SEED)
    return SFTStage(policy, *cities(policy, store), config, SEED, "median")


def grpo_stage(policy: PolicyModel, store: GridStore, **changes: Any) -> GRPOStage:
    config = GRPOConfig.model_validate(FEW | {"num_generations": 4, "num_iterations": 2, "half_score": 1.0} | changes)
    begin_stage(policy, "grpo", "lora", SEED)
    cell_mean = np.linspace(50, 150, 20)
    return GRPOStage(policy, *cities(policy, store), cell_mean, config, SEED, "median")


def fit(
    stage: SFTStage | GRPOStage, folder: Path, by_trl: bool, on_metrics: Callable[..., None] = lambda scalars: None
) -> list[dict[str, float]]:
    """Trains the stage in ``folder`` to its last step, which is its result. Returns what was logged of each step."""
    policy, config = stage.policy, stage.config
    stage.monitor = None

    def own_engine() -> TorchEngine:
        schedule = cosine_schedule(config.warmup_steps, config.max_steps)
        return TorchEngine(parameter_groups(policy, config), schedule, config.max_grad_norm)

    Trainer(folder, on_metrics=on_metrics).fit(
        stage,
        PolicyFiles(policy),
        partial(make_trl_engine, policy, config) if by_trl else own_engine,
        LoopSettings(config.max_steps, config.logging_steps, config.save_steps, config.eval_steps),
        make_steps=partial(make_steps, stage, SEED) if by_trl else None,
    )
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def trained(policy: PolicyModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters() if p.requires_grad])


@pytest.mark.parametrize("trainable", ["rows", "lora", "full"])
def test_fine_tuning_by_trl_is_stdists_step_by_step(
    make_policy: Callable[..., PolicyModel], store: GridStore, tmp_path: Path, trainable: str
) -> None:
    """The same windows, cells, blanks and frames in the same order, the same clipping, decay and learning rates: losses
    and gradients' norms at each step, and the weights behind them."""
    logs, weights, begun = [], [], torch.zeros(0)
    for by_trl in (False, True):
        policy = make_policy()
        # TRL's micro-batches are parts of the six sequences: they add up to the step all the same.
        stage = sft_stage(policy, store, trainable, blank_share=0.5, activation_memory=0.01 if by_trl else 1.0)
        begun = trained(policy)
        logs.append(fit(stage, tmp_path / str(by_trl), by_trl))
        weights.append(trained(policy))
    for key in ("loss", "grad_norm", "learning_rate"):
        ours, theirs = ([step[key] for step in log] for log in logs)
        assert theirs == pytest.approx(ours, rel=1e-4), key
    # Adam makes whole steps of gradients that are rounding alone, as those of the keys' biases are.
    assert (weights[0] - weights[1]).norm() < 0.002 * (weights[0] - begun).norm()


@pytest.mark.parametrize(("loss_type", "fine_tuned"), [("grpo", False), *((name, True) for name in LOSSES)])
def test_grpo_by_trl_on_the_same_candidates_is_stdists(
    make_policy: Callable[..., PolicyModel],
    store: GridStore,
    tmp_path: Path,
    batch: PolicyBatch,
    lean_towards_end: Callable[[PolicyModel, PolicyBatch, float], None],
    monkeypatch: pytest.MonkeyPatch,
    loss_type: str,
    fine_tuned: bool,
) -> None:
    """Two updates on one rollout, of candidates that end early or never: rewards, and from the distribution over answer
    tokens alone the loss with its clipped ratios and its KL to the rows and the adapter of before."""
    logs, weights, begun = [], [], torch.zeros(0)
    for by_trl in (False, True):
        policy = make_policy()
        lean_towards_end(policy, batch, 6.0)
        if fine_tuned:
            begin_stage(policy, "sft", "lora", SEED)
        stage = grpo_stage(policy, store, loss_type=loss_type, beta=0.5, max_steps=2, eval_steps=2)
        begun = trained(policy)

        def candidates(*_: object, policy: PolicyModel = policy, stage: GRPOStage = stage) -> tuple[list, None]:
            records: list[Candidates] = stage.rollouts.sample(0, stage.batches(0), "these")
            end, ids = len(policy.vocabulary), []
            for answer, length in ((a, n) for r in records for a, n in zip(r.answer_ids, r.lengths, strict=True)):
                written = answer[: length + 1]
                ids.append([policy.end_id if i == end else i + policy.first_numeral_id for i in written.tolist()])
            assert len({len(row) for row in ids}) > 2
            return ids, None

        monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", candidates)
        logs.append(fit(stage, tmp_path / str(by_trl), by_trl))
        weights.append(trained(policy))
        assert stage.policy.backbone.active_adapter == "grpo" and "ref" not in policy.backbone.peft_config
    ours, theirs = logs
    for key in ("reward", "reward/accuracy", "reward/length", "loss", "grad_norm", "kl"):
        assert [step[key] for step in theirs] == pytest.approx([step[key] for step in ours], rel=1e-3, abs=1e-6), key
    assert ours[1]["kl"] > 0 < ours[1]["clip_ratio"]
    assert theirs[1]["clip_ratio/region_mean"] == pytest.approx(ours[1]["clip_ratio"], abs=1e-6)
    assert (weights[0] - weights[1]).norm() < 0.02 * (weights[0] - begun).norm()


def test_a_killed_fine_tuning_goes_on_from_its_checkpoint(
    make_policy: Callable[..., PolicyModel], store: GridStore, tmp_path: Path
) -> None:
    whole = make_policy()
    losses = [step["loss"] for step in fit(sft_stage(whole, store, save_steps=1), tmp_path / "whole", True)]

    def kill(scalars: dict[str, float]) -> None:
        if scalars["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(sft_stage(make_policy(), store, save_steps=1), tmp_path / "killed", True, kill)
    policy = make_policy(seed=1)
    again = fit(sft_stage(policy, store, save_steps=1), tmp_path / "killed", True)
    assert [step["step"] for step in again] == [1, 2, 3, 4]
    assert [step["loss"] for step in again] == pytest.approx(losses, rel=1e-6)
    assert torch.allclose(trained(policy), trained(whole), atol=1e-6)


def test_the_reward_by_hand(policy: PolicyModel) -> None:
    """Truth 10, 20, 40 and d = 10, x_h = 0.2: what is right, 2 too much everywhere (½), short, long, and what decodes
    no further than to the first word."""
    values = lambda *numbers: (policy.vocabulary.encode(np.array(numbers, float)) + policy.first_numeral_id).tolist()  # noqa: E731
    end, word = [policy.end_id], policy.prompts.text_ids("traffic")
    completions = [
        values(10, 20, 40) + end,
        values(12, 22, 42) + end,
        values(10, 20) + end,
        values(10, 20, 40, 99),  # cut off
        values(10, 20) + word + values(40) + end,
        end,
        word,
    ]
    seen: dict[str, float] = {}
    rewards = numeral_reward(policy)(
        prompts=[None] * 7,
        completions=[None] * 7,
        completion_ids=completions,
        truth=[[10.0, 20.0, 40.0]] * 7,
        normalizer=[10.0] * 7,
        log_metric=seen.__setitem__,
    )
    third = 1 / 3
    expected = [1, 0.5, 1 - third / 2, 1 - third / 2, 1 - third / 2 - 0.5, -1, -1]
    assert rewards == pytest.approx(expected)
    assert seen["reward/decoding"] == pytest.approx(-1.5 / 7)
    (squared,) = numeral_reward(policy, kind="squared_error")([values(10, 20)], [[10.0, 20.0, 40.0]], [10.0])
    assert squared == pytest.approx(-(1600 / 3) / 100 - third / 2)


@pytest.mark.parametrize("sees", [True, False])
def test_rows_are_the_policys_own_tokens_and_pixels(
    make_policy: Callable[..., PolicyModel], store: GridStore, sees: bool
) -> None:
    policy = make_policy() if sees else make_policy(frames=None)
    windows, cells = store.windows("train", 4, 3, channel="internet"), np.array([3, 8])
    rows = window_dataset(policy, windows, np.arange(20.0), cells)
    assert len(rows) == 2 * len(windows)
    city = CityWindows(policy, windows)
    batch = city.batch(np.array([7]), cells)
    row = rows[15]  # window 7, cell 8
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["truth"] == batch.truth[0, 1].tolist() and row["normalizer"] == 8.0
    assert rows[14]["normalizer"] == 3.0 and rows[0]["normalizer"] == 3.0
    read = AnswerCollator(policy)([rows[14], row])
    assert torch.equal(read["input_ids"], torch.cat([batch.shared.expand(2, -1), batch.prompts, batch.answers], dim=1))
    assert torch.equal(read["labels"][:, -4:], batch.answers) and (read["labels"][:, :-4] == -100).all()
    assert ("pixel_values" in read) == sees == ("images" in row)
    if policy.encoder:
        patches, thw = policy.encoder(batch.grids.expand(2, -1, -1, -1))
        assert torch.equal(read["pixel_values"], patches) and torch.equal(read["image_grid_thw"], thw)


def test_a_name_that_text_cannot_say_is_refused(make_policy: Callable[..., PolicyModel], store: GridStore) -> None:
    setting = make_policy().spec.setting.model_copy(update={"city": "a<|im_end|>b"})
    rows = window_dataset(make_policy(setting=setting), store.windows("train", 4, 3, channel="internet"), np.ones(20))
    with pytest.raises(InputError, match="rename it"):
        rows[0]


def test_text_comes_back(policy: PolicyModel, batch: PolicyBatch) -> None:
    """Every numeral of the vocabulary, aliases too, and a prompt with its frames."""
    processor, numerals = PolicyProcessor(policy), list(range(policy.first_numeral_id, policy.first_numeral_id + 1801))
    ids = [*batch.shared[0].tolist(), *batch.prompts[0].tolist(), *numerals]
    text = processor.decode(ids)
    assert processor.encode(text) == ids
    assert text.count("<|image_pad|>") == 4 and text.endswith(policy.vocabulary.token(1800))


def test_the_view_writes_what_the_policy_does_and_leaves_it_as_it_was(
    make_policy: Callable[..., PolicyModel],
    batch: PolicyBatch,
    plain_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    policy = make_policy()
    modules = list(policy.base_model.modules())
    prefix = policy.prefix(batch.shared[:1], batch.grids[:1])
    hidden, _ = policy.branch(prefix, batch.prompts[:1])
    inputs = plain_inputs(policy, batch, 0, torch.zeros(0, dtype=torch.long))
    for answers_only in (False, True):
        with torch.no_grad(), TransformersView(policy, answers_only):
            model = policy.backbone
            assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
            logits = model(**inputs).logits[0, -1]
            (written,) = model.generate(**inputs, do_sample=False, max_new_tokens=1, suppress_tokens=[0])[
                :, -1:
            ].tolist()
        expected = head_logits(hidden[:, -1], policy.full_head)[0]
        kept = torch.ones_like(expected, dtype=torch.bool)
        if answers_only:
            kept[: policy.first_numeral_id] = False
            kept[policy.end_id] = True
        probabilities = expected.masked_fill(~kept, -torch.inf).softmax(-1)
        assert torch.allclose(logits.softmax(-1), probabilities, atol=1e-5)
        assert written == [int(expected.masked_fill(~kept, -torch.inf)[1:].argmax()) + 1]
    assert list(policy.base_model.modules()) == modules and "forward" not in vars(policy.base_model)


CONFIG: dict[str, Any] = {"name": "a", "data": {"store": "a.zarr"}, "backend": "trl"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("grpo.candidates", "direct"),
        ("grpo.kl_estimator", "k1"),
        ("grpo.optim", "adamw_8bit"),
        ("sft.optim", "adamw_8bit"),
        ("policy.load_in_4bit", True),
        ("rollouts.num_workers", 2),
        ("learners.engine", "deepspeed"),
    ],
)
def test_what_trl_cannot_do_is_refused_by_its_key(key: str, value: object) -> None:
    part, name = key.split(".")
    with pytest.raises(ValueError, match=f"{key} is {str(value).lower()}, which backend trl cannot do; set it to"):
        VisionLLMConfig.model_validate(CONFIG | {part: {name: value}})
    VisionLLMConfig.model_validate(CONFIG | {"backend": "stdist", part: {name: value}})
    if part == "grpo":
        VisionLLMConfig.model_validate(CONFIG | {"stages": ["sft"], part: {name: value}})


def test_a_machine_that_cannot_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VisionLLMConfig.model_validate(CONFIG)
    check_learners(config, ProcessGroup())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="2 GPUs are visible; set CUDA_VISIBLE_DEVICES=0"):
        check_learners(config, ProcessGroup())
    monkeypatch.setattr(learning, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'stdist\[trl\]'"):
        check_learners(config, ProcessGroup())
    check_learners(config.model_copy(update={"backend": "stdist"}), ProcessGroup())


def test_the_notebook_of_the_docs(
    make_policy: Callable[..., PolicyModel],
    store: GridStore,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    policy = make_policy()
    snapshot_policy(policy)(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trl.md").read_text(), re.DOTALL)
    code = code.replace("runs/NAME/checkpoints/sft/step-1000", str(folder)).replace("city.zarr", str(store.path))
    few = code.replace("max_steps=100", "max_steps=1, report_to='none', bf16=False, use_cpu=True")
    assert few != code
    exec(few, {})
    learnt = Policy.from_pretrained(tmp_path / "out" / "policy").model
    assert not torch.equal(learnt.rows.output, policy.rows.output) and adapter_names(learnt)
