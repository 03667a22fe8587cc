"""``stdist prepare READER``: one command a reader, made of its ``plan`` function when it is asked for.

A reader's options are the keywords of its ``plan``: names, types and defaults from the signature, help from the lines
``name: what it is.`` of the docstring. Its page begins with the facts of the data.
"""

import re
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperGroup

from stdist.memory import LARGEST

Body = Callable[..., None]
"""``body(reader, *, <options of every reader>, **options)``; the first keyword is for the sources."""

# What most readers take, for docstrings that do not say it again.
USUAL = {
    "city": "name of the city",
    "channel": "what the values are, as internet",
    "cadence": "minutes between time steps",
    "utc_offset": "minutes the city is ahead of UTC",
    "timezone": "the city's zone in place of an offset, as Europe/Madrid",
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


def run_reader(name: str, body: Body, arguments: list[str], command: str) -> None:
    """Runs ``body`` as the command of one reader, with the options that ``arguments`` give and no default. command:
    what errors call it."""
    from data_prep import READERS

    _command(name, READERS[name], body, given_only=True).main(arguments, prog_name=command, standalone_mode=False)


def _command(name: str, reader: Any, body: Body, given_only: bool = False) -> Any:
    def command(context: typer.Context, **options: Any) -> None:
        sources = {option: context.get_parameter_source(option) for option in options}
        given = {option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
        body(name, **{option: value for option, value in options.items() if not given_only or option in given})

    _, sources, *shared, _ = signature(body, eval_str=True).parameters.values()
    parameters = [sources, *_options(name, reader.plan), *shared]
    context = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)
    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [context, *(parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters)]
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
