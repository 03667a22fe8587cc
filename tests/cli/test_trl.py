"""``backend: trl``: a run whose steps TRL makes is a run like any other."""

import json

import pytest

from stdist.vision_llm.policy.checkpoints import load_policy

pytest.importorskip("trl", reason="TRL is not installed: pip install 'stdist[dev]'")

FEW = ["stages=[sft,grpo]", "sft.trainable=lora", "sft.max_steps=2"]
FEW += ["grpo.max_steps=2", "grpo.num_iterations=2", "grpo.eval_steps=2"]


def test_a_run_from_its_configuration_to_another_forecast(stdist, config, city, tmp_path):
    result = stdist("train", config, "backend=trl", *FEW, "--json")
    assert result.code == 0, result.err
    assert "steps of sft and grpo by the trainers of TRL" in result.err and "Warning" not in result.err
    assert set(result.json["stages"]) == {"sft", "grpo"} and result.json["test"]["nrmse"] > 0
    run = tmp_path / "runs" / "tiny"
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in logged if line["stage"] == "grpo" and "loss" in line]
    assert [step["step"] for step in steps] == [1, 2] and steps[0]["reward"] == steps[1]["reward"]
    for step in steps:
        assert step["reward"] == pytest.approx(sum(step[f"reward/{n}"] for n in ("accuracy", "length", "decoding")))
        assert step["completions/max_length"] <= 2 + 4
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert metrics["tables"][0]["title"] == "GRPO's rollouts, 2 logged steps"
    for stage in ("sft", "grpo"):
        load_policy(run / "checkpoints" / stage / "step-2")
    out = tmp_path / "again.zarr"
    assert stdist("forecast", run, city, "--out", out).code == 0
    again = stdist("evaluate", out, city, "--json").json
    assert again["pooled"]["nrmse"] == pytest.approx(result.json["test"]["nrmse"], rel=1e-6)
    # The same command again has nothing left to do.
    assert stdist("train", config, "backend=trl", *FEW, "--json").json["test"] == result.json["test"]


def test_what_trl_cannot_do_is_one_line(refused, config):
    line = refused("train", config, "backend=trl", "grpo.candidates=direct")
    assert line.endswith(
        "grpo.candidates is direct, which backend trl cannot do; set it to chain, or backend to stdist"
    )


def test_a_plan_says_whose_steps_it_counts(stdist, config):
    assert "TRL computes every sequence whole" in stdist("plan", config, "backend=trl").out
    assert "TRL" not in stdist("plan", config).out
