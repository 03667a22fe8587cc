"""What learners leave behind, damaged, on a disk that was full, for others to go on from: they do, or refuse it."""

import shutil

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'stdist[cluster]'")


def zero(stage: int) -> list[str]:
    return ["learners.engine=deepspeed", "learners.num_workers=2", f"learners.zero_stage={stage}"]


@pytest.fixture
def interrupted(two, runs):
    """Trains by two learners until one of them gets a Ctrl-C in step 5 of SFT, which is saved."""

    def train(name: str, zero_stage: int = 2) -> None:
        answers = two.train(name, *zero(zero_stage), trap="interrupt sft 5 1")
        assert [a["error"].partition(":")[0] for a in answers] == ["Interrupted"] * 2, answers
        assert (runs / name / "checkpoints" / "sft" / "latest").read_text() == "step-5"

    return train


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", pytest.param("trainer_state/shard-00001-of-00002.safetensors", marks=pytest.mark.slow)],
)
def test_a_damaged_newest_checkpoint(two, runs, interrupted, undisturbed, file):
    """A flipped byte: the one before serves, and the first learner says so."""
    name = f"damaged-{file[0]}"
    interrupted(name)
    newest = runs / name / "checkpoints" / "sft" / "step-5"
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / file).write_bytes(content)
    said = two.finish(name, *zero(2))
    assert f"{newest} is damaged ({file} is not as it was written); going on from step-3" in said
    runs.require_same(name, undisturbed)


@pytest.mark.slow
def test_a_lost_latest(two, runs, interrupted, undisturbed):
    interrupted("lost-latest")
    latest = runs / "lost-latest" / "checkpoints" / "sft" / "latest"
    latest.unlink()
    two.finish("lost-latest", *zero(2))
    assert latest.read_text() == "step-8"
    runs.require_same("lost-latest", undisturbed)


def test_a_full_disk(two, runs, undisturbed):
    """Of the second learner alone: both end with the same line, nothing half-written is left, and with room they go
    on. A limit on the size of its files stands for the disk: it is the kernel that refuses."""
    answers = two.train("full", *zero(2), full=100_000)
    checkpoints = runs / "full" / "checkpoints" / "alignment"
    for answer in answers:
        assert answer["error"].startswith(f"ResourceError: {checkpoints / 'step-3'} could not be written (learner 1: ")
        assert "make room and run the same command" in answer["error"] and "\n" not in answer["error"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-0"]
    two.finish("full", *zero(2))
    runs.require_same("full", undisturbed)


@pytest.mark.slow
def test_two_learners_then_one_with_plain_torch(two, alone, runs, interrupted, undisturbed):
    interrupted("to-one")
    alone("to-one")
    runs.require_close("to-one", undisturbed)


def test_one_with_plain_torch_then_two_with_zero_3(two, alone, runs, undisturbed):
    alone("to-two", interrupt_in=4 + 5)
    assert (runs / "to-two" / "checkpoints" / "sft" / "latest").read_text() == "step-5"
    two.finish("to-two", *zero(3))
    runs.require_close("to-two", undisturbed)


@pytest.mark.slow
def test_from_zero_2_to_zero_3(two, runs, interrupted, undisturbed):
    interrupted("to-three")
    two.finish("to-three", *zero(3))
    runs.require_close("to-three", undisturbed)


def test_a_checkpoint_of_another_vocabulary(two, runs, undisturbed):
    """The folder says that it is the run's: every learner refuses what is in it, and nothing is written."""
    shutil.copytree(runs / undisturbed, runs / "other")
    config = runs / "other" / "config.yaml"
    ours = config.read_text().replace("mantissa_digits: 2", "mantissa_digits: 3")
    config.write_text(ours.replace(f"name: {undisturbed}", "name: other"))
    before = sorted((runs / "other").rglob("*"))
    answers = two.train("other", "numerals.mantissa_digits=3", *zero(2))
    checkpoint = runs / "other" / "checkpoints" / "alignment" / "step-4"
    for answer in answers:
        assert answer["error"].startswith(f"InputError: checkpoint {checkpoint}: ")
        assert answer["error"].endswith("it belongs to another model or vocabulary")
    assert sorted((runs / "other").rglob("*")) == before
