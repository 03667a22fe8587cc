"""``init_from``: a run begins with another run's policy, says what it took, and refuses one that does not fit."""

import shutil

import pytest

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
