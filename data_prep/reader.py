"""Readers: functions that turn raw files into plans, by the name the command line gives them.

A reader is one file::

    @reader("my-format")
    def plan(sources: list[Path], *, city: str | None = None, grid: GridPlace) -> Plan:
        ...

Its keywords are the options of ``stdist prepare my-format``; one whose type is a dataclass of options gives its fields
as options and is handed over made. An option ``timezone`` becomes the spec's too. The module's docstring tells the
facts of the data. A package from outside names its function in the entry-point group ``stdist.readers``.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, cast

from data_prep.preparation import Plan, PrepareSummary, prepare
from stdist.data import GridSpec, NodeSpec, Split
from stdist.errors import InputError
from stdist.registry import Registry


@dataclass(frozen=True)
class Reader:
    """``plan(sources, **options)``, whose signature and docstring are the command line's options and their help, and
    the ``facts`` of the data, its page."""

    plan: Callable[..., Plan]
    facts: str

    def prepare(self, sources: list[Path], out: Path, **options: Any) -> PrepareSummary:
        """Plans and writes the store ``out`` in this process; see ``preparation.prepare`` for more of them."""
        return prepare(self.plan(sources, **options), out)


READERS: Registry[Reader] = Registry("reader", "stdist.readers", package="data_prep")


def reader(name: str, facts: str | None = None) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Decorates a plan function: registers it under ``name``, with options of its own and those of every reader, the
    spans of the default split. The recipe of its plans tells ``name`` and the options that were given. facts: its page,
    the docstring of its module by default."""

    def add(plan: Callable[..., Plan]) -> Callable[..., Plan]:
        flat = _with_options(name, plan)
        READERS.register(name)(Reader(flat, facts or sys.modules[plan.__module__].__doc__ or ""))
        return flat

    return add


SPANS = ("train", "validation", "test")


def _with_options(name: str, plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """``plan`` with the fields of its option classes in their place, and ``SPANS``."""
    parameters: list[Parameter] = []
    classes: dict[str, type] = {}
    for parameter in signature(plan, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            classes[parameter.name] = options_class = cast("type", parameter.annotation)
            fields = signature(options_class).parameters.values()
            parameters += [field.replace(kind=Parameter.KEYWORD_ONLY) for field in fields]
        else:
            parameters.append(parameter)
    parameters += [Parameter(span, Parameter.KEYWORD_ONLY, default=None, annotation=str | None) for span in SPANS]

    @wraps(plan)
    def flat(sources: list[Path], **options: Any) -> Plan:
        spans, zone = [options.pop(span, None) for span in SPANS], options.get("timezone")
        recipe = {"reader": name} | ({"options": given} if (given := _given(parameters, options)) else {})
        for keyword, options_class in classes.items():
            fields = signature(options_class).parameters
            options[keyword] = options_class(**{field: options.pop(field) for field in fields if field in options})
        planned = plan(sources, **options)
        if zone is not None:
            planned = replace(planned, spec=replace(planned.spec, timezone=zone))
        return replace(planned, recipe=planned.recipe | recipe, split=_split(planned.spec, *spans))

    flat.__signature__ = signature(plan).replace(parameters=parameters)  # type: ignore[attr-defined]
    flat.__doc__ = " ".join([*(options_class.__doc__ or "" for options_class in classes.values()), plan.__doc__ or ""])
    return flat


def _given(parameters: list[Parameter], options: dict[str, Any]) -> dict[str, Any]:
    """Options that are not as they are by default, JSON; paths as they are found from anywhere."""
    defaults = {parameter.name: parameter.default for parameter in parameters}
    given = {name: value for name, value in options.items() if value != defaults.get(name)}
    return {name: os.path.abspath(value) if isinstance(value, Path) else value for name, value in given.items()}


def _split(spec: GridSpec | NodeSpec, train: str | None, validation: str | None, test: str | None) -> Split | None:
    """Split of local dates ``A:B``; None where none is given, so that the store chooses its default.

    Raises InputError where a span leaves the data's days, before any work is done.
    """
    if train is validation is test is None:
        return None
    split, days = Split.parse(train, validation, test), spec.local_days
    for span in (split.train, split.validation, split.test):
        if span and (span.first_day < days.first_day or span.last_day > days.last_day):
            raise InputError(f"span {span} leaves the data's days {days}; choose days within")
    return split
