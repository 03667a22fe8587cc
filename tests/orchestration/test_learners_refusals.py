"""What learners cannot do is one line, and nothing is started for it."""

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'stdist[cluster]'")

from stdist.errors import InputError  # noqa: E402
from stdist.orchestration import learners  # noqa: E402
from stdist.runs.recipes import load_config  # noqa: E402

TWO = ["learners.engine=deepspeed", "learners.num_workers=2"]


@pytest.fixture
def refused(runs, monkeypatch):
    """The line with which ``stdist train`` of a run is refused; where none is written there, none is after it."""

    def never(*_: object, **__: object) -> None:
        pytest.fail("Ray was asked")

    def line(name: str, *overrides: str, asks_ray: bool = False) -> str:
        if not asks_ray:
            monkeypatch.setattr(ray, "init", never)
        before = sorted(runs.folder.rglob("*"))
        with pytest.raises(InputError) as refusal:
            learners.train(load_config(runs.config, [f"name={name}", *overrides]), lambda line: None)
        assert sorted(runs.folder.rglob("*")) == before and "\n" not in str(refusal.value)
        return str(refusal.value)

    return line


@pytest.mark.parametrize(("stage", "key"), [("alignment", "train_batch_size"), ("sft", "windows_per_step")])
def test_a_batch_that_they_cannot_share(refused, stage, key):
    assert refused("odd", *TWO, f"{stage}.{key}=5").startswith(
        f"{stage}.{key} is 5, which 2 learners cannot share evenly; make it a multiple of 2"
    )


def test_grpo_with_sharded_weights(refused):
    line = refused("sharded", *TWO, "learners.zero_stage=3", "stages=[sft,grpo]")
    assert line.startswith("learners.zero_stage 3 shards the weights that the stage grpo samples with")


def test_the_folder_of_another_config(refused, runs, alone):
    if not (runs / "short").exists():
        alone("short", "stages=[alignment]", "alignment.max_steps=1")
    line = refused("short", *TWO, "stages=[alignment]", "alignment.max_steps=2")
    assert "belongs to another config (alignment.max_steps is 1 there, 2 here)" in line


def test_a_cluster_that_is_not_there(refused, monkeypatch):
    assert not ray.is_initialized()  # this test stands before those that start a cluster
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert refused("nowhere", *TWO, asks_ray=True).startswith("nothing answers at 127.0.0.1:1 (Connection refused)")


@pytest.mark.parametrize(
    ("asked", "missing"),
    [
        (
            ["learners.engine=deepspeed", "learners.num_workers=4"],
            "learners.num_workers 4 need 4 CPU and the cluster (1 nodes) has 2;",
        ),
        (
            [*TWO, "learners.resources_per_worker={GPU: 1}"],
            "learners.num_workers 2 need 2 GPU and the cluster (1 nodes) has 0;",
        ),
    ],
)
def test_more_than_the_cluster_has(refused, local_ray, asked, missing):
    line = refused("large", "alignment.train_batch_size=4", "sft.windows_per_step=4", *asked)
    assert line.startswith(missing)
