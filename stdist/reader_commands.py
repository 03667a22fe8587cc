"""``stdist prepare READER``: one command a reader, made of its ``plan`` function when it is asked for.

A reader's options are the keywords of its ``plan``: names, types and defaults from the signature, help from the lines
``name: what it is.`` of the docstring. Its page begins with the facts of the data.
"""

import re
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args

import click
import typer
from click.core import ParameterSource
from typer.core import TyperGroup

from stdist.memory import LARGEST

Body = Callable[..., None]
"""``body(reader, *, <options of every reader>, **options)``; the first keyword is for the sources."""

GIVEN = ParameterSource.COMMANDLINE

# What most readers take, for docstrings that do not say it again.
USUAL = {
    "city": "name of the city",
    "channel": "what the values are, as internet",
    "cadence": "minutes between time steps",
    "utc_offset": "minutes the city is ahead of UTC",
    "height": "rows of the grid",
    "width": "columns of the grid",
    "row0": "the data's row id of the first row",
    "col0": "the data's column id of the first column",
    "id_width": "columns of the grid the cell ids count in",
    "train": "training days, as 2013-11-01:2013-11-20",
    "validation": "validation days",
    "test": "test days",
}


class Group(TyperGroup):
    """A group of commands that shows its help where it is given none."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        return super().parse_args(context, arguments or ["--help"])


def reader_commands(body: Body, help: str) -> typer.Typer:
    """A group of one command a reader, each of which calls ``body``."""

    class Readers(Group):
        def list_commands(self, _context: Any) -> list[str]:
            from data_prep import READERS

            return list(READERS)

        def get_command(self, _context: Any, name: str) -> Any:
            from data_prep import READERS

            return _command(name, READERS[name], body)

    return typer.Typer(cls=Readers, help=help)


def run_reader(name: str, body: Body, arguments: list[str]) -> None:
    """Calls ``body`` as the command of one reader does with ``arguments``."""
    from data_prep import READERS

    _command(name, READERS[name], body).main(arguments, prog_name="stdist append STORE", standalone_mode=False)


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of a running command's options that its caller gave."""
    context = click.get_current_context()
    return {name: value for name, value in options.items() if context.get_parameter_source(name) is GIVEN}


def _command(name: str, reader: Any, body: Body) -> Any:
    def command(**options: Any) -> None:
        body(name, **options)

    _, sources, *shared, _ = signature(body).parameters.values()
    parameters = [sources, *_options(name, reader.plan), *shared]
    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command(name, help=reader.facts)(command)
    return typer.main.get_command(app)


def _options(name: str, plan: Callable[..., Any]) -> list[Parameter]:
    helps = option_help(plan)
    _, *options = signature(plan).parameters.values()
    return [
        option.replace(
            annotation=Annotated[
                option.annotation,
                typer.Option(
                    help=helps[option.name], rich_help_panel=f"Options of {name}", **_bounds(option.annotation)
                ),
            ]
        )
        for option in options
    ]


def _bounds(annotation: Any) -> dict[str, Any]:
    """Bounds of an option that is an integer: beyond them no library counts."""
    return {"min": -LARGEST, "max": LARGEST} if int in (annotation, *get_args(annotation)) else {}


def option_help(plan: Callable[..., Any]) -> dict[str, str | None]:
    """Reads off a docstring the help of each keyword in ``name: text`` or ``name, other: text``, else what is usual."""
    names = list(signature(plan).parameters)
    text = " ".join((plan.__doc__ or "").split()).partition(" Raises ")[0]
    said = [m for m in re.finditer(r"(?:\w+, )*\w+(?=: )", text) if set(m[0].split(", ")) <= set(names)]
    helps: dict[str, str | None] = {name: USUAL.get(name) for name in names}
    for match, following in zip(said, [*said[1:], None], strict=True):
        what = text[match.end() + 2 : following.start() if following else None]
        # What introduces the next class of options is no help of the last one of this.
        what = re.split(r"\.? (?:Options\b|Plan of\b)", what)[0].strip().rstrip(".").replace("``", "")
        helps |= dict.fromkeys(match[0].split(", "), what)
    return helps
