"""``init_from``: a run begins with another run's policy, says what it took, and refuses one that does not fit.
``reuse_alignment``: stages that read no traffic are trained once for all runs that begin alike."""

import json
import shutil
import zlib
from pathlib import Path

import pytest

from stdist.runs.recipes import load_config
from stdist.training.checkpoint import StageCheckpoints
from stdist.vision_llm.policy.spec import read_spec
from stdist.vision_llm.reuse import take_over

from .conftest import files_below

ONE_STEP = ["stages=[sft]", "sft.max_steps=1", "forecast.windows_per_batch=64"]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_run_begins_where_another_stage_ended(stdist, finished_run, config, stage):
    """Before its first step it forecasts as the other did with its result."""
    source = finished_run.run_dir / stage if stage == "sft" else finished_run.run_dir  # whose last stage is GRPO
    result = stdist("train", config, f"init_from={source}", *ONE_STEP, "--json")
    assert result.code == 0, result.err
    theirs = finished_run.result.json["stages"][stage]
    begun = result.json["stages"]["sft"]["before"]
    assert begun == pytest.approx(theirs["after"] if stage == "sft" else {k: theirs["after"][k] for k in begun})
    took = f"began with base{', adapter' * (stage == 'grpo')} and 1,801 numerals of "
    where = finished_run.run_dir / "checkpoints" / stage / theirs["checkpoint"]
    said = f"{took}{where}, trained on internet of synthetic; this run is on internet of synthetic, with t_max of"
    assert said in result.err


def test_another_horizon_is_no_other_policy(stdist, finished_run, config):
    result = stdist("train", config, f"init_from={finished_run.run_dir}", "data.horizon=1", *ONE_STEP)
    assert result.code == 0, result.err


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(
    ("source", "overrides", "expected"),
    [
        ("", ["numerals.mantissa_digits=3"], "has numerals.mantissa_digits 2, this run 3; give both the same"),
        ("", ["policy.base=small"], "has policy.base tiny, this run small; give both the same"),
        ("sft", ["policy.lora_r=4"], "has policy.lora_r 16, this run 4; give both the same"),
        ("checkpoints", [], "has the stages alignment, arithmetic, sft, grpo"),
        ("sft/step-2", [], "is neither a run nor one of its stages; give RUN or RUN/STAGE"),
    ],
)
def test_what_cannot_be_begun_with(refused, finished_run, config, command, source, overrides, expected):
    line = refused(command, config, "name=new", f"init_from={finished_run.run_dir / source}", *overrides)
    assert line.startswith(f"init_from {finished_run.run_dir / source}") and line.endswith(expected)


def test_an_unfinished_stage(refused, finished_run, config, tmp_path):
    shutil.copytree(finished_run.run_dir, tmp_path / "copy")
    (tmp_path / "copy" / "checkpoints" / "grpo" / "finished.json").unlink()
    line = refused("train", config, "name=new", f"init_from={tmp_path}/copy")
    assert line.startswith(f"{tmp_path}/copy has not finished its stage grpo; ")


def test_a_source_that_was_trained_again_is_another(stdist, finished_run, config, tmp_path):
    """What GRPO is held to is what it began with: a run resumed from other weights would not be the same run."""
    shutil.copytree(finished_run.run_dir, tmp_path / "source")
    begun = ["train", config, "name=new", "init_from=source/sft", *ONE_STEP]
    assert stdist(*begun).code == 0
    state = newest(tmp_path / "source", "sft") / "trainer_state" / "state.json"
    content = json.loads(state.read_text())
    del content["crc32"]
    content["step"] += 1
    state.write_text(json.dumps(content | {"crc32": zlib.crc32(json.dumps(content).encode())}))
    again = stdist(*begun)
    assert again.code == 2
    assert "init_from source/sft was trained again since runs/new began with it; choose another name=" in again.err


# --- alignment once ------------------------------------------------------------------------------------------------


@pytest.fixture
def beside(finished_run, config, tmp_path) -> Path:
    """The finished run's folder in the ``output_dir`` of ``config``."""
    shutil.copytree(finished_run.run_dir, tmp_path / "runs" / "tiny")
    return tmp_path / "runs" / "tiny"


def test_a_second_run_on_the_same_base_aligns_nothing(stdist, beside, config):
    """Its fine-tuning begins where it would have with an alignment of its own."""
    second = ["train", config, "data.horizon=1", "stages=[alignment,arithmetic,sft]", *ONE_STEP[1:], "--json"]
    result = stdist(*second, "name=second")
    assert result.code == 0, result.err
    for stage in ("alignment", "arithmetic"):
        assert f"{stage}: taken from runs/tiny, which began with the same base, seed and stages" in result.err
        assert result.json["stages"][stage]["seconds"] == 0
        assert f"(3 steps, taken from runs/tiny/checkpoints/{stage})" in result.err
    alone = stdist(*second, "name=alone", "reuse_alignment=false")
    assert "taken from" not in alone.err
    assert alone.json["stages"]["sft"]["before"] == result.json["stages"]["sft"]["before"]
    assert alone.json["test"] == result.json["test"]


def taken(config: Path, *overrides: str, stage: str = "alignment") -> str | None:
    run = load_config(config, ["name=second", *overrides])
    spec = read_spec(newest(Path("runs/tiny"), stage))
    return take_over(run, spec, stage, StageCheckpoints(run.run_dir / "checkpoints" / stage))


def newest(run_dir: Path, stage: str) -> Path:
    folder = run_dir / "checkpoints" / stage
    return folder / json.loads((folder / "finished.json").read_text())["checkpoint"]


def test_what_is_taken_is_what_was_there(beside, config):
    assert taken(config) and taken(config, stage="arithmetic")
    for stage in ("alignment", "arithmetic"):
        ours, theirs = newest(Path("runs/second"), stage), newest(beside, stage)
        assert files_below(ours) == files_below(theirs)
        StageCheckpoints(ours.parent).check(ours)
    assert not taken(config), "it has begun"


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("alignment", "seed=1"),
        ("alignment", "alignment.max_steps=4"),
        ("arithmetic", "alignment.learning_rate=0.01"),
        ("alignment", "stages=[alignment]"),
        ("alignment", "init_from=runs/tiny"),
        ("alignment", "reuse_alignment=false"),
        ("sft", "seed=0"),
    ],
)
def test_another_beginning_is_no_reason(beside, config, stage, override):
    assert taken(config, override, stage=stage) is None
    assert not Path("runs/second").exists()


@pytest.mark.parametrize("changes", [{"base": "small"}, {"base_sha256": (("model.safetensors", "12"),)}])
def test_another_base_is_no_reason(beside, config, changes):
    run = load_config(config, ["name=second"])
    spec = read_spec(newest(beside, "alignment"))
    checkpoints = StageCheckpoints(run.run_dir / "checkpoints" / "alignment")
    assert take_over(run, spec.model_copy(update=changes), "alignment", checkpoints) is None
    assert take_over(run, spec, "alignment", checkpoints)


def test_what_is_unfinished_or_damaged_is_not_taken(beside, config):
    weights = newest(beside, "alignment") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert taken(config) is None
    (beside / "checkpoints" / "arithmetic" / "finished.json").unlink()
    run = load_config(config, ["name=second"])
    spec = read_spec(newest(beside, "alignment"))
    assert take_over(run, spec, "arithmetic", StageCheckpoints(run.run_dir / "checkpoints" / "arithmetic")) is None


def test_a_run_that_began_with_another_gives_nothing(beside, config):
    text = (beside / "config.yaml").read_text()
    (beside / "config.yaml").write_text(text.replace("init_from: null", "init_from: runs/older"))
    assert "runs/older" in (beside / "config.yaml").read_text() and taken(config) is None
