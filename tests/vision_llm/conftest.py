"""A tiny policy, a tiny city, and the plain transformers model that a policy must equal."""

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2_5_VLForConditionalGeneration

from data_prep import READERS
from stdist.data import GridStore, open_store
from stdist.vision_llm.policy.checkpoints import build_policy
from stdist.vision_llm.policy.city_windows import CityWindows, PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.presets import build_image_processor, build_model, build_tokenizer
from stdist.vision_llm.policy.spec import FrameSpec, PolicySpec, Setting
from stdist.vision_llm.rollout.recorded_step import RECORDINGS

HISTORY, HORIZON = 4, 3


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> GridStore:
    """Six hourly days of a 5×4 city: four of training, one of validation, one of test."""
    out = tmp_path_factory.mktemp("city") / "city.zarr"
    READERS["synthetic"].prepare([], out, city="toy", height=5, width=4, days=6, cadence=60, seed=3)
    return open_store(out)


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., PolicyModel]:
    """Fresh policies of the preset ``tiny``; keyword arguments replace fields of the spec."""

    def make(seed: int = 0, **changes: object) -> PolicyModel:
        spec = PolicySpec(
            base="tiny",
            mantissa_digits=2,
            setting=Setting(city="toy", channel="internet", cadence=60, history=HISTORY, horizon=HORIZON),
            frames=FrameSpec(height=5, width=4, pixels_per_cell=12, power=0.5, t_max=2000.0),
            base_is_trained=True,
            lora_r=4,
            lora_alpha=8,
        )
        return build_policy(spec.model_copy(update=changes), seed)

    return make


@pytest.fixture(scope="session")
def policy(make_policy: Callable[..., PolicyModel]) -> PolicyModel:
    """Shared by tests that change nothing of it."""
    return make_policy().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def make_batch(store: GridStore) -> Callable[..., PolicyBatch]:
    """Windows × cells of the training span, as the policy reads them."""

    def make(
        policy: PolicyModel, windows: tuple[int, ...] = (0, 31), cells: tuple[int, ...] = (1, 10, 18)
    ) -> PolicyBatch:
        city = CityWindows(policy, store.windows("train", HISTORY, HORIZON, channel="internet"))
        return city.batch(np.array(windows), np.array(cells))

    return make


@pytest.fixture(scope="session")
def batch(policy: PolicyModel, make_batch: Callable[..., PolicyBatch]) -> PolicyBatch:
    """Two windows of three cells."""
    return make_batch(policy)


@pytest.fixture(scope="session")
def lean_towards_end() -> Callable[[PolicyModel, PolicyBatch, float], None]:
    """Gives the end token about this logit after the batch's prompts and answers."""

    @torch.no_grad()
    def lean(policy: PolicyModel, batch: PolicyBatch, logit: float) -> None:
        ids = torch.cat([batch.prompts, batch.answers[:, :-1]], dim=1)
        hidden, _ = policy.branch(policy.prefix(batch.shared, batch.grids), ids)
        mean = hidden[:, batch.prompts.shape[1] - 1 :].mean((0, 1))
        policy.base_model.lm_head.weight[policy.end_id] = mean * logit / mean.pow(2).sum()

    return lean


class LargestMade(TorchDispatchMode):
    """Elements of the largest memory that an operation made; what it only looks at is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.fixture(scope="session")
def largest_made() -> type[LargestMade]:
    return LargestMade


@dataclass
class Graphs:
    """Stand-ins of CUDA graphs: how many sequences each was recorded with, and those that are alive."""

    sizes: list[int] = field(default_factory=list)
    alive: WeakSet = field(default_factory=WeakSet)

    def record(self, run: Callable[[], Tensor]) -> "Graph":
        graph = Graph(run)
        self.sizes.append(len(graph.result))
        self.alive.add(graph)
        return graph


class Graph:
    """Computes into the same memory at every replay, as a CUDA graph does."""

    def __init__(self, run: Callable[[], Tensor]):
        self._run, self.result = run, run()

    def replay(self) -> None:
        self.result.copy_(self._run())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """CPUs record too, and nothing is freed but what nobody holds."""
    made = Graphs()
    monkeypatch.setitem(RECORDINGS, "cpu", made.record)
    gc.disable()
    yield made
    gc.enable()


@pytest.fixture(scope="session")
def plain_model() -> Callable[[PolicyModel], Qwen2_5_VLForConditionalGeneration]:
    """The policy as transformers knows it: one embedding and one head of text rows, then numeral rows."""

    def make(policy: PolicyModel) -> Qwen2_5_VLForConditionalGeneration:
        model = copy.deepcopy(policy.base_model)
        first = policy.first_numeral_id
        model.resize_token_embeddings(first + len(policy.vocabulary), mean_resizing=False)
        model.get_input_embeddings().weight.data[first:] = policy.rows.input.data
        model.lm_head.weight.data[first:] = policy.rows.output.data
        return model.eval().requires_grad_(True)

    return make


@pytest.fixture(scope="session")
def plain_inputs() -> Callable[..., dict[str, Tensor]]:
    """Inputs of transformers for one child of a batch: its window's prompt, its own, and ``tail``."""

    def make(policy: PolicyModel, batch: PolicyBatch, child: int, tail: Tensor) -> dict[str, Tensor]:
        window = child // (len(batch.prompts) // len(batch.shared))
        ids = torch.cat([batch.shared[window], batch.prompts[child], tail])[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if policy.encoder:
            patches, thw = policy.encoder(batch.grids[window : window + 1])
            inputs |= {"pixel_values": patches, "image_grid_thw": thw}
            inputs["mm_token_type_ids"] = (ids == policy.image_id).int()
        return inputs

    return make


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL as its makers would publish it: its matrices padded beyond its tokenizer."""
    path = tmp_path_factory.mktemp("base") / "qwen"
    model = build_model("tiny", seed=8)
    model.resize_token_embeddings(len(build_tokenizer()) + 25, mean_resizing=False)
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    build_image_processor().save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for one checkpoint."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    return path
