"""YAML by the rules of its version 1.2, whose core schema has no dates, no octal ``010``, no minutes ``10:30`` and no
booleans ``on``, ``off``, ``yes`` and ``no``: all of these are text, or the number that people read. A key that is given
twice in one group is an error, and merging (``<<``) is not part of 1.2.

PyYAML, which reads 1.1, does the rest.
"""

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

_FIRST = list("-+.0123456789")
_KINDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", _FIRST),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        _FIRST,
    ),
}
"""Patterns of the core schema, and the characters that they begin with."""
_BASES = {"0o": 8, "0x": 16}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key, mark = self.construct_object(key_node), key_node.start_mark
            if key in lines:
                raise ConstructorError(None, None, f"key {key!r} is given twice, first in line {lines[key]}", mark)
            lines[key] = mark.line + 1
        return super().construct_mapping(node, deep)

    def _int(self, node: yaml.ScalarNode) -> int:
        text = node.value
        return int(text[2:], _BASES[text[:2]]) if text[:2] in _BASES else int(text)

    def _float(self, node: yaml.ScalarNode) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


for _kind, (_pattern, _first) in _KINDS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader._int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader._float)


def load_yaml(text: str) -> Any:
    """Raises ValueError, with line and column, where ``text`` is no YAML or gives a key twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("groups are nested too deep") from None


def dump_yaml(tree: Any) -> str:
    """YAML that both versions read alike."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
