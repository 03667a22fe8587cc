"""TorchEngine: sums of gradients, clipping, the schedule, and an exact continuation."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from stdist.config import LearnersConfig
from stdist.errors import InputError
from stdist.training.eight_bit_engine import EightBitEngine, moment_bytes
from stdist.training.engine import ParameterGroup, TorchEngine, cosine_schedule
from stdist.training.engines import check_optim


def _parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values))


def _group(*parameters: torch.nn.Parameter, learning_rate: float = 0.1, weight_decay: float = 0.0) -> ParameterGroup:
    return ParameterGroup({f"w{id(p)}": p for p in parameters}, learning_rate, weight_decay)


def _engine(*parameters: torch.nn.Parameter, max_grad_norm: float = 1e9, learning_rate: float = 0.1) -> TorchEngine:
    return TorchEngine([_group(*parameters, learning_rate=learning_rate)], lambda step: 1.0, max_grad_norm)


def test_gradients_of_several_backward_calls_add_up():
    """d/dw of 3·w₀ + w₁, then of 4·w₁: the sum is (3, 5), its norm √34."""
    w = _parameter(1.0, 1.0)
    engine = _engine(w)
    engine.backward((torch.tensor([3.0, 1.0]) * w).sum())
    engine.backward(4 * w[1])
    assert w.grad is not None and w.grad.tolist() == [3.0, 5.0]
    assert engine.step() == pytest.approx(math.sqrt(34))
    assert w.grad is None  # nothing of this step reaches the next one


def test_gradients_are_clipped_by_their_norm_over_all_groups():
    """Gradients (3,) and (4,) in two groups have norm 5; limit 1 leaves (0.6,) and (0.8,). The norm is of before."""
    a, b = _parameter(0.0), _parameter(0.0)
    groups = [ParameterGroup({"a": a}, 0.1, 0.0), ParameterGroup({"b": b}, 0.1, 0.0)]
    engine = TorchEngine(groups, lambda step: 1.0, max_grad_norm=1.0)
    engine.backward(3 * a.sum() + 4 * b.sum())
    assert engine.step() == pytest.approx(5.0)
    tensors = dict(engine.state())
    # Adam's first moment after one step is (1 − 0.9) · gradient.
    assert tensors["a/exp_avg"].item() == pytest.approx(0.1 * 0.6, rel=1e-4)
    assert tensors["b/exp_avg"].item() == pytest.approx(0.1 * 0.8, rel=1e-4)


def test_small_gradients_are_not_scaled_up():
    w = _parameter(0.0)
    engine = TorchEngine([ParameterGroup({"w": w}, 0.1, 0.0)], lambda step: 1.0, max_grad_norm=1.0)
    engine.backward(0.5 * w.sum())
    engine.step()
    assert dict(engine.state())["w/exp_avg"].item() == pytest.approx(0.05)


def test_adamw_by_hand():
    """Gradients 1, then 0, under betas (0.9, 0.95), rate 0.1, without decay: after two steps the moments are
    m = 0.9·0.1 = 0.09 and v = 0.95·0.05 = 0.0475, and the second update is
    0.1 · (0.09 / (1 − 0.9²)) / √(0.0475 / (1 − 0.95²))."""
    w = _parameter(0.0)
    engine = TorchEngine([ParameterGroup({"w": w}, 0.1, 0.0)], lambda step: 1.0, 1e9)
    engine.backward(w.sum())
    engine.step()
    assert w.item() == pytest.approx(-0.1)
    engine.backward(0 * w.sum())
    engine.step()
    state = dict(engine.state())
    assert state["w/exp_avg"].item() == pytest.approx(0.09) and state["w/exp_avg_sq"].item() == pytest.approx(0.0475)
    assert w.item() == pytest.approx(-0.1 - 0.1 * (0.09 / 0.19) / math.sqrt(0.0475 / 0.0975))


def test_cosine_schedule_by_hand():
    """Warm-up 1/4 … 4/4, then 0.03 + 0.97 · (1 + cos πp) / 2 with p from 0 at step 4 to 1 at step 12."""
    scale = cosine_schedule(warmup_steps=4, max_steps=12)
    assert [scale(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert scale(4) == pytest.approx(1.0)
    assert scale(6) == pytest.approx(0.03 + 0.97 * (1 + math.sqrt(0.5)) / 2)
    assert scale(8) == pytest.approx(0.515)
    assert scale(12) == pytest.approx(0.03) and scale(100) == pytest.approx(0.03)


def test_cosine_schedule_without_warm_up_and_with_nothing_behind_it():
    assert cosine_schedule(0, 10)(0) == pytest.approx(1.0)
    assert [cosine_schedule(20, 5)(step) for step in (0, 4)] == [0.05, 0.25]


def test_learning_rates_of_groups_follow_the_schedule():
    """Without decay Adam's first update is learning rate · sign of the gradient, here 0.5 of 0.1 and of 0.02."""
    fast, slow = _parameter(1.0), _parameter(1.0)
    groups = [_group(fast), _group(learning_rate=9.0), _group(slow, learning_rate=0.02)]
    engine = TorchEngine(groups, lambda step: [0.5, 0.25][step], 1e9)
    assert engine.learning_rate == pytest.approx(0.05)
    engine.backward(fast.sum() + slow.sum())
    engine.step()
    assert fast.item() == pytest.approx(1 - 0.05) and slow.item() == pytest.approx(1 - 0.01)
    assert engine.learning_rate == pytest.approx(0.025)


def test_weight_decay_belongs_to_its_group():
    """Decoupled decay: w ← w·(1 − learning rate · decay) before an update that a zero gradient leaves empty."""
    decayed, kept = _parameter(2.0), _parameter(2.0)
    groups = [_group(decayed, weight_decay=0.5), _group(kept)]
    engine = TorchEngine(groups, lambda step: 1.0, 1.0)
    engine.backward(0 * decayed.sum() + 0 * kept.sum())
    engine.step()
    assert decayed.item() == pytest.approx(2 * (1 - 0.05)) and kept.item() == 2.0


def _steps(engine: TorchEngine, model: torch.nn.Module, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        loss = model(x.to(next(model.parameters()).device)).pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def _model_and_engine() -> tuple[torch.nn.Module, TorchEngine]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    return model, TorchEngine([ParameterGroup(dict(model.named_parameters()), 0.05, 0.1)], cosine_schedule(3, 12), 0.5)


def test_state_continues_the_optimisation_bit_for_bit():
    model, engine = _model_and_engine()
    first = _steps(engine, model, range(5))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tensors, steps = {name: value.clone() for name, value in engine.state()}, engine.steps
    expected = _steps(engine, model, range(5, 12))

    other, resumed = _model_and_engine()
    assert _steps(resumed, other, range(20, 22)) != first[:2]  # a history of its own, which load_state replaces
    other.load_state_dict(weights)
    resumed.load_state(tensors, steps)
    assert _steps(resumed, other, range(5, 12)) == expected
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_state_without_its_moments_does_not_continue():
    """The check above can fail: the same weights under a fresh optimizer go elsewhere."""
    model, engine = _model_and_engine()
    _steps(engine, model, range(5))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = _steps(engine, model, range(5, 8))
    other, fresh = _model_and_engine()
    other.load_state_dict(weights)
    assert _steps(fresh, other, range(5, 8)) != expected


def test_state_is_named_as_the_parameters_are():
    model, engine = _model_and_engine()
    assert list(engine.state()) == [] and engine.steps == 0
    _steps(engine, model, range(2))
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert {name for name, _ in engine.state()} == {f"{name}/{key}" for name in engine.parameters for key in keys}
    assert list(engine.parameters) == [name for name, _ in model.named_parameters()] and engine.steps == 2


def test_a_parameter_without_a_gradient_so_far_has_no_state_and_needs_none():
    """Its own first step comes later: Adam's correction of the moments counts from there, also after a resume."""
    used, idle = _parameter(1.0), _parameter(1.0)
    groups = [ParameterGroup({"used": used}, 0.1, 0.0), ParameterGroup({"idle": idle}, 0.1, 0.0)]
    engine = TorchEngine(groups, lambda step: 1.0, 1e9)
    for _ in range(3):
        engine.backward(used.sum())
        engine.step()
    tensors = {name: value.clone() for name, value in engine.state()}
    assert {name.split("/")[0] for name in tensors} == {"used"}
    resumed = TorchEngine(groups, lambda step: 1.0, 1e9)
    resumed.load_state(tensors, 3)
    resumed.backward(used.sum() + idle.sum())
    resumed.step()
    counts = {name: value.item() for name, value in resumed.state() if name.endswith("/step")}
    assert counts == {"used/step": 4.0, "idle/step": 1.0} and idle.item() == pytest.approx(0.9)


def test_closing_leaves_no_gradient():
    w = _parameter(1.0)
    engine = _engine(w)
    engine.backward(w.sum())
    engine.close()
    assert w.grad is None


# --- moments of eight bits -----------------------------------------------------------------------------------------


def _wide(
    engine_class: Callable[..., TorchEngine], device: str = "cpu", inside: int = 64
) -> tuple[torch.nn.Module, TorchEngine]:
    """A matrix of 128 x 64 (``inside``) that has moments in eight bits, and vectors too small for that."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, inside), torch.nn.Tanh(), torch.nn.Linear(inside, 128)).to(device)
    return model, engine_class([ParameterGroup(dict(model.named_parameters()), 0.05, 0.1)], cosine_schedule(3, 12), 0.5)


@pytest.mark.parametrize(
    ("device", "paged"),
    [("cpu", False), *(pytest.param("cuda", paged, marks=pytest.mark.gpu) for paged in (False, True))],
)
def test_eight_bit_state_continues_the_optimisation_bit_for_bit(device, paged):
    """Paged moments are of 100,000 elements and more: bitsandbytes leaves smaller ones on the card."""
    inside = 1000 if paged else 64
    model, engine = _wide(partial(EightBitEngine, paged=paged), device, inside)
    _steps(engine, model, range(5))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tensors, steps = {name: value.to("cpu", copy=True) for name, value in engine.state()}, engine.steps
    expected = _steps(engine, model, range(5, 12))

    other, resumed = _wide(partial(EightBitEngine, paged=paged), device, inside)
    _steps(resumed, other, range(20, 22))
    other.load_state_dict(weights)
    resumed.load_state(tensors, steps)
    assert _steps(resumed, other, range(5, 12)) == expected
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_eight_bit_state_has_the_bytes_that_are_planned():
    """Two bytes an element, and two float32 scales a block of 256; float32 below 4,096 elements."""
    model, engine = _wide(EightBitEngine)
    _steps(engine, model, range(1))
    held = {name: value for name, value in engine.state() if not name.endswith("/step")}
    assert held["2.weight/state1"].dtype == torch.uint8 and held["0.weight/state1"].dtype == torch.float32
    for name, parameter in model.named_parameters():
        size = sum(value.nbytes for key, value in held.items() if key.startswith(f"{name}/"))
        assert size == moment_bytes(parameter.numel()), name
    assert moment_bytes(128 * 64) == 2 * 8192 + 2 * 32 * 4 and moment_bytes(4 * 64) == 2 * 256 * 4


def test_eight_bits_are_near_torchs_own_adamw():
    (model, engine), (other, exact) = _wide(EightBitEngine), _wide(TorchEngine)
    ours, theirs = _steps(engine, model, range(12)), _steps(exact, other, range(12))
    assert ours == pytest.approx(theirs, rel=0.02) and ours != theirs


def test_a_parameter_without_a_gradient_so_far_has_no_eight_bit_state():
    used, idle = _parameter(1.0), _parameter(1.0)
    groups = [ParameterGroup({"used": used}, 0.1, 0.0), ParameterGroup({"idle": idle}, 0.1, 0.0)]
    engine, resumed = (EightBitEngine(groups, lambda step: 1.0, 1e9) for _ in range(2))
    engine.backward(used.sum())
    engine.step()
    resumed.load_state({name: value.clone() for name, value in engine.state()}, 1)
    resumed.backward(used.sum() + idle.sum())
    resumed.step()
    counts = {name: value.item() for name, value in resumed.state() if name.endswith("/step")}
    assert counts == {"used/step": 2.0, "idle/step": 1.0} and idle.item() == pytest.approx(0.9)


def test_eight_bits_are_refused_with_deepspeed_and_without_bitsandbytes(monkeypatch):
    check_optim(LearnersConfig(engine="deepspeed"), "adamw_torch", "sft.optim")
    check_optim(LearnersConfig(), "adamw_8bit", "sft.optim")
    with pytest.raises(InputError, match=r"sft\.optim adamw_8bit is of engine torch: DeepSpeed"):
        check_optim(LearnersConfig(engine="deepspeed"), "adamw_8bit", "sft.optim")
    monkeypatch.setattr("stdist.training.eight_bit_engine.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"sft\.optim paged_adamw_8bit needs bitsandbytes: pip install"):
        check_optim(LearnersConfig(), "paged_adamw_8bit", "sft.optim")


@pytest.mark.gpu
def test_an_update_on_a_gpu_makes_no_temporary():
    """From the second step on: the first one makes the moments."""
    model, engine = _wide(TorchEngine, "cuda", 2**16)
    largest = max(p.nbytes for p in model.parameters())
    for _ in range(2):
        engine.backward(model(torch.ones(8, 4, device="cuda")).pow(2).mean())
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.step()
        made = torch.cuda.max_memory_allocated() - before
    assert made < largest / 100, f"{made} bytes beside a matrix of {largest}"
