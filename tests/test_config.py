"""The configuration tree: what it refuses and how it says so, overrides, and files that come with the project."""

import re
from datetime import date
from pathlib import Path

import pytest
import yaml

from stdist.config import dump_config
from stdist.errors import InputError
from stdist.runs.recipes import load_config, parse_config
from stdist.vision_llm.config import VisionLLMConfig

PROJECT = Path(__file__).resolve().parents[1]
SHIPPED = sorted([*PROJECT.glob("configs/*.yaml"), *PROJECT.glob("stdist/presets/*.yaml")])
SMALLEST = {"name": "toy", "data": {"store": "city.zarr"}}


def _write(folder: Path, tree: object) -> Path:
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _load(folder: Path, *overrides: str, tree: dict | None = None) -> VisionLLMConfig:
    return load_config(_write(folder, tree or SMALLEST), list(overrides))


def _refusal(folder: Path, *overrides: str, tree: dict | None = None) -> str:
    """The one line a wrong configuration is refused with; it names the file."""
    with pytest.raises(InputError) as caught:
        _load(folder, *overrides, tree=tree)
    message = str(caught.value)
    assert "\n" not in message and "toy.yaml" in message and len(message) < 400
    return message


def test_defaults_are_the_papers(tmp_path):
    config = _load(tmp_path)
    assert config.stages == ("alignment", "arithmetic", "sft", "grpo")
    assert (config.numerals.mantissa_digits, config.frames.power, config.sft.blank_share) == (4, 0.5, 0.0)
    assert config.alignment.trainable == "rows" and config.run_dir == Path("runs/toy")


# --- unknown keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("nmae", "name"),
        ("polcy", "policy"),
        ("data.horzion", "horizon"),
        ("sft.learning_rte", "learning_rate"),
        ("grpo.num_generation", "num_generations"),
        ("policy.load_in_4bits", "load_in_4bit"),
        ("alignment.values_per_examples", "values_per_example"),
        ("data.split.trian", "train"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(tmp_path, key, nearest):
    message = _refusal(tmp_path, f"{key}=1")
    assert f"unknown key {key!r}; did you mean {nearest!r}?" in message


def test_an_unknown_key_like_no_other_lists_the_known_ones(tmp_path):
    assert "known keys: enabled, power, pixels_per_cell" in _refusal(tmp_path, "frames.zzz=1")


def test_unknown_keys_of_the_file_are_refused_like_overrides(tmp_path):
    tree = SMALLEST | {"sft": {"max_step": 3}}
    assert "unknown key 'sft.max_step'; did you mean 'max_steps'?" in _refusal(tmp_path, tree=tree)


# --- wrong values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "why"),
    [
        ("data.history=0", "data.history", "greater than or equal to 1"),
        ("data.horizon=three", "data.horizon", "integer"),
        ("data.fraction=1.5", "data.fraction", "less than or equal to 1"),
        ("numerals.mantissa_digits=5", "numerals.mantissa_digits", "2, 3 or 4"),
        ("frames.pixels_per_cell=big", "frames.pixels_per_cell", "auto"),
        ("frames.pixels_per_cell=0", "frames.pixels_per_cell", "greater than or equal to 1"),
        ("policy.dtype=float16", "policy.dtype", "'float32' or 'bfloat16'"),
        ("policy.load_in_4bit=nf4", "policy.load_in_4bit", "boolean"),
        ("policy.gradient_checkpointing=layers", "policy.gradient_checkpointing", "boolean"),
        ("sft.learning_rate=-1", "sft.learning_rate", "greater than 0"),
        ("sft.trainable=everything", "sft.trainable", "'rows', 'lora' or 'full'"),
        ("grpo.num_generations=1", "grpo.num_generations", "a group of 1 has no baseline"),
        ("grpo.num_iterations=3", "grpo", "save_steps is 200, no multiple of num_iterations 3"),
        ("grpo.trainable=full", "grpo.trainable", "'lora'"),
        ("forecast.decoding=beam", "forecast.decoding", "'median'"),
        ("name=3", "name", "string"),
        ("name=", "name", "string"),
        ("output_dir=[a]", "output_dir", "path"),
        ("seed=-1", "seed", "greater than or equal to 0"),
        ("seed=4294967296", "seed", "less than 4294967296"),
        ("stages=[alignment, stf]", "stages", "'sft'"),
        ("stages=[]", "stages", "at least 1"),
        ("data.split={train: ['2013-11-31', 2013-12-01]}", "data.split.train", "in no calendar"),
        ("data.split={train: [2013-11-01, 2013-11-02]}", "data.split.validation", "required"),
        ("policy=tiny", "policy", "dictionary"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_it_must_be(tmp_path, override, key, why):
    message = _refusal(tmp_path, override)
    assert f"toy.yaml: {key}: " in message and why in message


def test_a_wrong_value_is_shown(tmp_path):
    assert "(given: 'three')" in _refusal(tmp_path, "data.horizon=three")


def test_a_missing_key_is_named(tmp_path):
    assert "toy.yaml: data.store: Field required" in _refusal(tmp_path, tree={"name": "toy", "data": {}})


@pytest.mark.parametrize("name", ["", ".", "a/b", "../elsewhere"])
def test_a_name_is_a_folder_of_its_own(tmp_path, name):
    """The run lies in output_dir/name: a name never reaches out of it, nor is it output_dir itself."""
    assert "toy.yaml: name: " in _refusal(tmp_path, tree=SMALLEST | {"name": name})


# --- stages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", ["[sft]", "[alignment, sft]", "[arithmetic, grpo]", "[alignment, arithmetic, grpo]"])
def test_stages_are_any_some_in_the_papers_order(tmp_path, stages):
    assert list(_load(tmp_path, f"stages={stages}").stages) == yaml.safe_load(stages)


@pytest.mark.parametrize("stages", ["[sft, alignment]", "[grpo, sft]", "[sft, sft]"])
def test_stages_out_of_order_or_twice_are_refused(tmp_path, stages):
    message = _refusal(tmp_path, f"stages={stages}")
    assert "stages must be some of ['alignment', 'arithmetic', 'sft', 'grpo'], in this order" in message


# --- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_values_of_nested_keys(tmp_path):
    config = _load(
        tmp_path,
        "name=other",
        "data.history=6",
        "data.region=0:2,0:3",
        "sft.learning_rate=2e-4",
        "frames.enabled=false",
        "frames.pixels_per_cell=auto",
        "stages=[alignment, sft]",
        "data.split={train: [2013-11-01, 2013-11-02], validation: [2013-11-03, 2013-11-03],"
        " test: [2013-11-04, 2013-11-05]}",
    )
    assert (config.name, config.data.history, config.data.region) == ("other", 6, "0:2,0:3")
    assert config.sft.learning_rate == 2e-4 and config.frames.enabled is False
    assert config.stages == ("alignment", "sft")
    assert config.data.split is not None and config.data.split.test == (date(2013, 11, 4), date(2013, 11, 5))


@pytest.mark.parametrize(
    "overrides", [["seed=1", "seed=2"], ["seed=1", "seed=1"], ["data.history=3", "data={store: a.zarr}"]]
)
def test_an_override_that_undoes_another_is_refused(tmp_path, overrides):
    with pytest.raises(
        InputError, match=rf"override {re.escape(repr(overrides[1]))} would undo the one of [a-z.]+ before it"
    ):
        _load(tmp_path, *overrides)


def test_an_override_may_change_what_another_gave(tmp_path):
    assert _load(tmp_path, "data={store: a.zarr, history: 5}", "data.history=6").data.history == 6


def test_a_group_that_is_given_twice_is_refused(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("name: toy\nsft:\n  max_steps: 5\ndata: {store: city.zarr}\nsft:\n  eval_steps: 5\n")
    with pytest.raises(InputError, match=r"toy\.yaml is not valid YAML: line 5, column 1: key 'sft' is given twice"):
        load_config(path)


def test_an_override_may_hold_equals_signs(tmp_path):
    assert _load(tmp_path, "policy.base=hub/a=b").policy.base == "hub/a=b"


def test_overrides_of_one_group_keep_its_other_keys(tmp_path):
    config = _load(tmp_path, "sft.max_steps=3", tree=SMALLEST | {"sft": {"eval_steps": 5}})
    assert (config.sft.max_steps, config.sft.eval_steps) == (3, 5)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("seed", "must look like key.sub=value"),
        ("--seed", "must look like key.sub=value"),
        ("name.first=x", "name is a value, not a group of keys"),
        ("stages=[sft", "is not a YAML value"),
        ("seed={a: 1, a: 2}", "is not a YAML value"),
    ],
)
def test_a_bad_override_is_shown(tmp_path, override, why):
    with pytest.raises(InputError) as caught:
        _load(tmp_path, override)
    message = str(caught.value)
    assert repr(override) in message and why in message and "\n" not in message


# --- files ---------------------------------------------------------------------------------------------------------


def _file_refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_configuration(tmp_path):
    path = tmp_path / "toy.yaml"
    assert "does not exist" in _file_refusal(path)
    assert "cannot be read (Is a directory)" in _file_refusal(tmp_path)
    path.write_text("name: [toy\ndata: }")
    assert "is not valid YAML" in _file_refusal(path)
    path.write_bytes(b"\x89PNG\xff\xfe\x00")
    assert "is not valid YAML" in _file_refusal(path)
    for text in ("", "- name\n- data\n", "just text"):
        path.write_text(text)
        assert "must be a mapping of keys to values" in _file_refusal(path)


def test_yaml_builds_no_objects(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(f"name: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'exploded'}]\n")
    assert "is not valid YAML" in _file_refusal(path)
    assert not (tmp_path / "exploded").exists()


def test_dump_and_load_is_the_same_configuration(tmp_path):
    config = _load(
        tmp_path,
        "data.split={train: [2013-11-01, 2013-11-02], validation: [2013-11-03, 2013-11-03],"
        " test: [2013-11-04, 2013-11-05]}",
        "stages=[sft]",
        "sft.numeral_learning_rate=1.0e-3",
        "frames.pixels_per_cell=14",
        "grpo.normalizer=city_mean",
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert yaml.safe_load(path.read_text())["grpo"]["beta"] == 0.04  # defaults are written out


def test_the_store_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _load(tmp_path).data.store == tmp_path / "city.zarr"


def test_a_resolved_configuration_does_not_depend_on_how_it_was_given(tmp_path):
    tree = SMALLEST | {"sft": {"max_steps": 3}}
    assert dump_config(_load(tmp_path, tree=tree)) == dump_config(_load(tmp_path, "sft.max_steps=3"))


def test_parse_config_names_where_a_tree_came_from():
    with pytest.raises(InputError, match="the demo's config: unknown key 'nam'"):
        parse_config(SMALLEST | {"nam": 1}, where="the demo's config")


def test_some_configurations_are_shipped():
    assert {"milan_block.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path):
    """A preset is completed by the command that uses it, which gives the store."""
    tree = yaml.safe_load(path.read_text())
    if "presets" in path.parts:
        tree["data"] = {"store": "city.zarr", **tree.get("data", {})}
        tree = {"name": "preset", **tree}
    config = parse_config(tree, where=path.name)
    if isinstance(config, VisionLLMConfig):
        assert all(getattr(config, stage).max_steps >= 1 for stage in config.stages)
    else:
        assert config.recipe in path.read_text()


@pytest.mark.parametrize(
    ("file", "given", "why"),
    [
        ("sft/step-4/policy.json", "sft/step-4", "is a checkpoint of a stdist run.*as this one's own, org/base"),
        ("sft/step-4/policy.json", "sft", "holds checkpoints of a stdist run"),
        ("run/checkpoints/sft/step-4/policy.json", "run", "is the folder of a run"),
        ("peft/adapter_config.json", "peft", "is an adapter without its model"),
    ],
)
def test_a_base_that_is_no_base_says_what_it_is(tmp_path, file, given, why):
    """transformers would open the first, numerals forgotten, and call the others an unrecognized model."""
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text('{"base": "org/base"}')
    line = _refusal(tmp_path, f"policy.base={tmp_path / given}")
    assert re.search(why, line) and "policy.base" in line and "Qwen2.5-VL as published" in line and "\n" not in line


def test_a_folder_with_a_model_may_be_a_base(tmp_path):
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    assert _load(tmp_path, f"policy.base={tmp_path}").policy.base == str(tmp_path)
