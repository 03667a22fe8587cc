"""Reads a run's configuration from YAML: unknown keys are errors that name the nearest right key.

Hyper-parameter names follow Hugging Face and TRL; the papers' letters stand where those are the field's names.
"""

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stdist.config.base import RunConfig
from stdist.config.yaml_core import dump_yaml, load_yaml
from stdist.errors import InputError


def read_tree(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Reads a YAML file and applies ``key.sub=value`` overrides.

    Raises InputError where it is missing or not YAML, and where a key is given twice.
    """
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"config {path} does not exist") from None
    except OSError as error:
        raise InputError(f"config {path} cannot be read ({error.strerror})") from None
    except ValueError as error:  # also where the text is not UTF-8
        raise InputError(f"config {path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"config {path} must be a mapping of keys to values")
    given: list[list[str]] = []
    for override in overrides or []:
        keys = override.partition("=")[0].split(".")
        if earlier := next((other for other in given if other[: len(keys)] == keys), None):
            raise InputError(f"override {override!r} would undo the one of {'.'.join(earlier)} before it; give one")
        given.append(keys)
        _apply(tree, override)
    return tree


def validated(tree: dict[str, Any], kind: type[RunConfig], where: str) -> RunConfig:
    """The configuration of ``kind`` in ``tree``; ``where`` names its source in errors.

    Raises InputError for an unknown key (with the nearest right one) or a wrong value.
    """
    try:
        kind = kind.of_tree(tree)
        return kind.model_validate(tree)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except ValidationError as error:
        raise InputError(f"{where}: {_first_problem(error, kind)}") from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every default written out."""
    return dump_yaml(config.model_dump(mode="json"))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise InputError(f"override {override!r} must look like key.sub=value")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise InputError(f"override {override!r}: {parent} is a value, not a group of keys")
    try:
        tree[last] = load_yaml(value)
    except ValueError:
        raise InputError(f"override {override!r}: {value!r} is not a YAML value") from None


def _first_problem(error: ValidationError, kind: type[RunConfig]) -> str:
    """The first unknown key, else the first wrong value; a key that may be one of several kinds says all of them."""
    problems = error.errors()
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    if problem["type"] == "extra_forbidden":
        *group, name = (part for part in problem["loc"] if isinstance(part, str))
        keys = list(_fields_at(kind, group))
        nearest = difflib.get_close_matches(name, keys, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(keys)}"
        return f"unknown key {'.'.join([*group, name])!r}; {hint}"
    key = _key(problem, kind)
    same = [p for p in problems if _key(p, kind) == key and p["input"] == problem["input"]]
    message = " or ".join(dict.fromkeys(p["msg"].removeprefix("Value error, ") for p in same))
    value = f" (given: {problem['input']!r})" if key and problem["type"] != "missing" else ""
    return f"{key or 'config'}: {message}{value}"


def _key(problem: Any, kind: type[RunConfig]) -> str:
    """The dotted key of a problem, without what pydantic adds behind it: the item, the kind that was tried."""
    path: list[str] = []
    for part in problem["loc"]:
        if part not in _fields_at(kind, path):
            break
        path.append(part)
    return ".".join(path)


def _fields_at(kind: type[RunConfig], path: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = kind.model_fields
    for part in path:
        annotation = fields[part].annotation
        models = [a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")]
        fields = models[0].model_fields if models else {}
    return fields
