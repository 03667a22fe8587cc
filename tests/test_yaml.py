"""YAML is read by the rules of 1.2: text that looks like text is text, and nothing is said twice."""

import pytest
import yaml

from stdist.config.yaml_core import dump_yaml, load_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10:30", "10:30"),  # 630 by 1.1
        ("1:30.5", "1:30.5"),
        ("010", 10),  # 8 by 1.1
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("+5", 5),
        ("1e-3", 0.001),  # text by 1.1
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("off", "off"),
        ("no", "no"),
        ("y", "y"),
        ("Yes", "Yes"),
        ("ON", "ON"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("2013-11-01", "2013-11-01"),
        ("2013-11-01 10:30:00", "2013-11-01 10:30:00"),
        ("=", "="),
        ("'010'", "010"),
        ("[010, no]", [10, "no"]),
        ("{no: 1}", {"no": 1}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
    ],
)
def test_a_plain_scalar(text, value):
    read = load_yaml(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", r"line 3, column 1: key 'a' is given twice, first in line 1"),
        ("b:\n  c: 1\n  d: 2\n  c: 1\n", r"line 4, column 3: key 'c' is given twice, first in line 2"),
        ("{a: {x: 1, x: 2}}", r"line 1, column 12: key 'x' is given twice"),
        ("- {a: 1}\n- {a: 1, 'a': 1}\n", r"line 2, column 10: key 'a' is given twice"),
        ("1: a\n0x1: b\n", r"line 2, column 1: key 1 is given twice"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("[" * 5000, "nested too deep"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)
def test_what_is_no_yaml_names_its_line(text, line):
    with pytest.raises(ValueError, match=line) as error:
        load_yaml(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["10:30", "010", "off", "1e-3", "1_000", "2013-11-01", "~", "", "null", "<<", "0o7", "=", "y"]
)
def test_text_that_either_version_would_take_for_something_else_is_quoted(text):
    written = dump_yaml({"key": text})
    assert load_yaml(written) == yaml.safe_load(written) == {"key": text}


@pytest.mark.parametrize("value", [1e-5, 1e300, float("inf"), 10, True, None, [1, "a"], {"b": {"c": 0.1}}])
def test_values_come_back(value):
    assert load_yaml(dump_yaml({"key": value})) == {"key": value}
